"""Running a module of this package in a process of its own.

Libraries that are large, or that read their settings at import, are used there alone: the process
ends with its answer, and nothing of it stays in the memory of the service.
"""

import os
import subprocess
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import MappingProxyType


def run_module(
    module: str,
    arguments: Sequence[str] = (),
    *,
    seconds: float,
    too_slow: str,
    text: str = "",
    environment: Mapping[str, str] = MappingProxyType({}),
    folder: str | None = None,
) -> subprocess.CompletedProcess[str]:
    """Run `python -m module` and return its exit code, output and errors.

    Args:
        module: Full name of a module that can be run.
        arguments: Arguments of the command line.
        seconds: Time after which the process is killed.
        too_slow: Message of the error that follows.
        text: Standard input.
        environment: Variables on top of those of this process.
        folder: Working directory, by default that of this process.

    Raises:
        ValueError: the process took longer than `seconds`.
    """
    # The child must find this package where this process found it, installed or not.
    package = str(Path(__file__).parents[2])
    paths = os.pathsep.join(filter(None, (package, os.environ.get("PYTHONPATH"))))
    try:
        return subprocess.run(  # noqa: S603 - our own module, and no shell
            # -P: a file in the working directory must not pass for a module.
            [sys.executable, "-P", "-m", module, *arguments],
            input=text,
            env={**os.environ, "PYTHONPATH": paths, **environment},
            cwd=folder,
            capture_output=True,
            text=True,
            timeout=seconds,
            check=False,
        )
    except subprocess.TimeoutExpired:
        raise ValueError(too_slow) from None
