"""What Ray reads from the environment, once, when it is imported: set before `import ray`."""

import os
import secrets

# glibc gives memory back to the kernel after each step of training, and faults every page of it in
# again at the next. A worker process keeps it, in large pages where the kernel has them: a few % of
# a step's time on a CPU (benchmarks/train_throughput.py). Whatever the user has set stands.
ALLOCATOR = {
    "MALLOC_MMAP_THRESHOLD_": str(2**25),
    "MALLOC_TRIM_THRESHOLD_": str(2**32),
    "MALLOC_TOP_PAD_": str(2**26),
    "GLIBC_TUNABLES": "glibc.malloc.hugetlb=1",
}


def set_for_any_ray() -> None:
    """Settings of every fleet: GPUs stay visible by their own ids, so warm processes can move."""
    os.environ["RAY_EXPERIMENTAL_NOSET_CUDA_VISIBLE_DEVICES"] = "1"
    os.environ["RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO"] = "0"
    for name, value in ALLOCATOR.items():
        os.environ.setdefault(name, value)


def set_for_local_ray() -> None:
    """Settings of a Ray that this process starts and alone may use.

    Its ports are open to the network, and whoever talks to an unauthenticated Ray runs code in it
    (CVE-2023-48022): hence a token, fresh each time, inherited by Ray's own processes. Given both
    variables Ray writes no `~/.ray/auth_token`, which would lock out the user's other drivers.
    """
    set_for_any_ray()
    os.environ["RAY_AUTH_MODE"] = "token"
    os.environ["RAY_AUTH_TOKEN"] = secrets.token_hex(32)
    os.environ.pop("RAY_AUTH_TOKEN_PATH", None)
    os.environ["RAY_USAGE_STATS_ENABLED"] = "0"
