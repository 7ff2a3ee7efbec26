"""What of the grid this machine can run, and why not the rest."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import replace
from functools import cache

import torch
from torch._inductor.cpp_builder import get_cpp_compiler
from torch._inductor.exc import InvalidCxxCompiler
from torch.utils._triton import has_triton

from nclql_torchrl.kernels import make_kernel
from nclql_torchrl.profiling.config import Setting
from nclql_torchrl.training.components import make_device
from nclql_torchrl.training.config import ConfigError, SamplerConfig


def split(settings: Iterable[Setting]) -> tuple[list[Setting], list[dict[str, str]]]:
    """Settings that can run, their device resolved, each once; and what cannot, with the reason.

    Examples:
        >>> setting = Setting(10, 2, 256, 1, "eager", "float32", "cpu")
        >>> runnable, skipped = split([setting, setting])
        >>> len(runnable), skipped
        (1, [])
    """
    runnable: dict[Setting, None] = {}
    skipped: dict[str, str] = {}
    for setting in settings:
        try:
            device = make_device(setting.device)
        except ConfigError as error:
            skipped[setting.device] = str(error)
            continue
        reason = unavailable(setting.execution, device)
        if reason is None:
            runnable[replace(setting, device=str(device))] = None
        else:
            skipped[f"{setting.execution} on {device}"] = reason
    return list(runnable), [{"setting": name, "reason": reason} for name, reason in skipped.items()]


@cache
def unavailable(execution: str, device: torch.device) -> str | None:
    """Why an execution mode cannot be used here; None if it can."""
    if execution == "cudagraph" and device.type != "cuda":
        return f"CUDA graphs need a CUDA device; this one is {device}."
    if execution == "compile" and device.type == "cuda" and not has_triton():
        return "torch.compile needs Triton on a GPU; it is not installed, or does not know this GPU."
    if execution == "compile" and device.type == "cpu":
        try:
            get_cpp_compiler()
        except InvalidCxxCompiler:
            return "torch.compile needs a C++ compiler on a CPU; install g++ or name one in CXX."
    return None


def with_kernels(settings: Iterable[Setting], sampler: SamplerConfig) -> tuple[list[Setting], list[dict[str, str]]]:
    """Settings with ``kernel=auto`` resolved; and the kernels that cannot work with the run's other settings."""
    runnable: dict[Setting, None] = {}
    skipped: dict[str, str] = {}
    for setting in settings:
        kernel = sampler.kernel if setting.kernel == "auto" else setting.kernel
        try:
            make_kernel(kernel).check(sampler.normalize_gradient, sampler.boundary)  # pyright: ignore[reportArgumentType]
        except ValueError as error:
            skipped[f"kernel {kernel}"] = str(error)
        else:
            runnable[replace(setting, kernel=kernel)] = None
    return list(runnable), [{"setting": name, "reason": reason} for name, reason in skipped.items()]
