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
from nclql_torchrl.profiling.schedules import base_schedule, mixing_schedule, nearest_levels
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
    if execution in ("compile", "cudagraph") and device.type == "cuda" and not has_triton():
        return f"{execution} needs Triton on a GPU; it is not installed, or does not know this GPU."
    if execution == "compile" and device.type == "cpu":
        try:
            get_cpp_compiler()
        except InvalidCxxCompiler:
            return "torch.compile needs a C++ compiler on a CPU; install g++ or name one in CXX."
    return None


def as_the_run(
    settings: Iterable[Setting], sampler: SamplerConfig, *, trained: bool
) -> tuple[list[Setting], list[dict[str, str]]]:
    """Settings with what they leave to the run resolved; and what cannot work with the run, with the reason.

    Args:
        settings: of the grid.
        sampler: the run's.
        trained: whether there are episodes, and so previous actions.

    Examples:
        >>> setting = Setting(10, 2, 256, 1, "eager", "float32", "cpu", "auto", None, None)
        >>> (found,), _ = as_the_run([setting], SamplerConfig(start_level=3), trained=False)
        >>> found.kernel, found.start_level, found.warm_start
        ('langevin', 3, False)
    """
    runnable: dict[Setting, None] = {}
    skipped: dict[str, str] = {}
    for setting in settings:
        levels, start_level = setting.levels, setting.start_level
        if start_level is None:
            schedule = mixing_schedule(sampler, levels, setting.steps_per_level)
            start_level = nearest_levels(schedule, base_schedule(sampler))[sampler.start_level]
        elif start_level >= levels:
            skipped[f"start_level {start_level}, {levels} levels"] = f"The levels are 0 to {levels - 1}."
            continue
        warm_start = sampler.warm_start if setting.warm_start is None else setting.warm_start
        if warm_start and not trained:
            skipped["warm_start"] = "An untrained critic has no episodes, and so no previous actions to start from."
            continue
        kernel = sampler.kernel if setting.kernel == "auto" else setting.kernel
        try:
            make_kernel(kernel).check(sampler.normalize_gradient, sampler.boundary)  # pyright: ignore[reportArgumentType]
        except ValueError as error:
            skipped[f"kernel {kernel}"] = str(error)
        else:
            runnable[replace(setting, kernel=kernel, start_level=start_level, warm_start=warm_start)] = None
    return list(runnable), [{"setting": name, "reason": reason} for name, reason in skipped.items()]
