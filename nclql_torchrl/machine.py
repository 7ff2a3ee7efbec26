"""What a reader must know of the machine to understand a time that was measured on it."""

from __future__ import annotations

import os
import platform
import shutil
from collections.abc import Sequence
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch

CONTROL_GROUP = Path("/sys/fs/cgroup")
"""The container's, as it sees it."""


def describe_machine(packages: Sequence[str] = ("torch", "torchrl", "tensordict")) -> dict[str, Any]:
    """The processor, the GPU if there is one, how busy the machine is, and the versions of packages.

    Args:
        packages: distributions whose versions matter; those that are not installed are left out.

    Returns:
        JSON values.

    Examples:
        >>> describe_machine(["torch"])["torch"] == torch.__version__
        True
    """
    return {
        "processor": _processor(),
        "gpu": torch.cuda.get_device_name() if torch.cuda.is_available() else None,
        "cores": len(os.sched_getaffinity(0)),
        "threads": torch.get_num_threads(),
        "load_average": round(os.getloadavg()[0], 2),
        "python": platform.python_version(),
        **{package: found for package in packages if (found := _version(package)) is not None},
    }


def free_memory(device: torch.device) -> int | None:
    """Bytes that a program can still have on a device; None where the system does not tell.

    On the CPU that is what the kernel expects to find without swapping, within the limit of the container.

    Examples:
        >>> (free_memory(torch.device("cpu")) or 1) > 0
        True
    """
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[0]
    try:
        lines = Path("/proc/meminfo").read_text().splitlines()
    except OSError:
        return None
    free = next(int(line.split()[1]) * 1024 for line in lines if line.startswith("MemAvailable:"))
    try:
        limit = (CONTROL_GROUP / "memory.max").read_text().strip()
        used = int((CONTROL_GROUP / "memory.current").read_text())
    except OSError:
        return free
    return free if limit == "max" else min(free, max(int(limit) - used, 0))


def cpp_compiler() -> str | None:
    """The C++ compiler that torch.compile would find, if there is one: ``$CXX``, g++ or clang++.

    Examples:
        >>> cpp_compiler() is None or isinstance(cpp_compiler(), str)
        True
    """
    names = (os.environ.get("CXX", "g++"), "g++", "clang++")
    return next((path for name in names if (path := shutil.which(name))), None)


def processor_flags() -> set[str]:
    """Instructions that the processor has, as Linux names them; nothing where the system does not tell.

    Examples:
        >>> "no such instruction" in processor_flags()
        False
    """
    return set(processor_entry("flags").split())


def processor_entry(name: str) -> str:
    """An entry of Linux's description of the first processor; empty where there is none.

    Args:
        name: such as "vendor_id".

    Examples:
        >>> processor_entry("no such entry")
        ''
    """
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return ""
    return next((line.split(":", 1)[1].strip() for line in lines if line.startswith(name)), "")


def _processor() -> str:
    return processor_entry("model name") or platform.processor() or platform.machine()


def _version(package: str) -> str | None:
    try:
        return version(package)
    except PackageNotFoundError:
        return None
