"""Environment variables that Ray reads once, at import: set them before `import ray`."""

import os
import secrets

# By default glibc returns memory to the kernel after each training step, and faults every page in
# again in the next. With these settings a worker process keeps the memory, in large pages if the
# kernel has them. That saves a few % of a step on a CPU (benchmarks/train_throughput.py). Variables
# that the user has set keep their values.
ALLOCATOR = {
    "MALLOC_MMAP_THRESHOLD_": str(2**25),
    "MALLOC_TRIM_THRESHOLD_": str(2**32),
    "MALLOC_TOP_PAD_": str(2**26),
    "GLIBC_TUNABLES": "glibc.malloc.hugetlb=1",
}


def set_for_any_ray() -> None:
    """Set variables for every fleet: all GPUs stay visible, so warm processes can change GPU."""
    os.environ["RAY_EXPERIMENTAL_NOSET_CUDA_VISIBLE_DEVICES"] = "1"
    os.environ["RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO"] = "0"
    for name, value in ALLOCATOR.items():
        os.environ.setdefault(name, value)


def set_for_local_ray() -> None:
    """Set variables for a Ray that this process starts and that no other process may use.

    Ray's ports are open to the network, and every client of an unauthenticated Ray can run code in
    it (CVE-2023-48022). We therefore set a fresh token that Ray's own processes inherit. With both
    variables set, Ray writes no `~/.ray/auth_token`, which would lock out the user's other drivers.
    """
    set_for_any_ray()
    os.environ["RAY_AUTH_MODE"] = "token"
    os.environ["RAY_AUTH_TOKEN"] = secrets.token_hex(32)
    os.environ.pop("RAY_AUTH_TOKEN_PATH", None)
    os.environ["RAY_USAGE_STATS_ENABLED"] = "0"
