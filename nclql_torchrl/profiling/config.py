"""Configuration of a profile: the grid of sampler settings, and how each is measured."""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import get_args

import torch

from nclql_torchrl.execution import Execution
from nclql_torchrl.kernels import Boundary, KernelName
from nclql_torchrl.training.config import ConfigError, choose
from nclql_torchrl.value import Precision

GRID = (
    "device",
    "precision",
    "execution",
    "kernel",
    "particles",
    "states",
    "levels",
    "steps_per_level",
    "start_level",
    "warm_start",
)
"""Keys that take several values; every combination of them is measured, the first key outermost."""


@dataclass
class ProfileConfig:
    """Options of nclql-profile.

    Examples:
        >>> config = ProfileConfig(levels=[5, 10], steps_per_level=[2], execution=["eager"])
        >>> [setting.langevin_steps for setting in settings(config)]
        [10, 20]
    """

    levels: list[int] = field(default_factory=lambda: [1, 3, 5, 10, 20])
    """Noise levels of the chain; 1 is LQL."""
    steps_per_level: list[int] = field(default_factory=lambda: [1, 2])
    """Langevin steps at each level."""
    start_level: list[int | None] = field(default_factory=lambda: [None])
    """First level that is visited, those before it skipped; null: that of the noise at which the run's chains start."""
    warm_start: list[bool | None] = field(default_factory=lambda: [None])
    """Start chains from the previous action plus noise of start_level (with a checkpoint); null: as the run does."""
    states: list[int] = field(default_factory=lambda: [256])
    """States that one call acts on."""
    particles: list[int] = field(default_factory=lambda: [1])
    """Chains per state, of which the best is kept."""
    kernel: list[str] = field(default_factory=lambda: ["auto"])
    """auto (the run's own, or the authors' langevin), langevin, mala, underdamped or preconditioned."""
    execution: list[str] = field(default_factory=lambda: ["eager", "compile", "cudagraph"])
    """eager, compile, cudagraph or auto; what this machine cannot run is named and skipped."""
    precision: list[str] = field(default_factory=lambda: ["float32"])
    """float32 or bfloat16."""
    device: list[str] = field(default_factory=lambda: ["auto"])
    """auto (a GPU when there is one), cpu, cuda or cuda:<index>."""
    checkpoint: str | None = None
    """Run directory or checkpoint: its critic is profiled, on states that its policy visits; null: an untrained one."""
    observation_dim: int = 17
    """Of the untrained critic."""
    action_dim: int = 6
    """Of the untrained critic."""
    hidden_sizes: list[int] = field(default_factory=lambda: [256, 256, 256])
    """Of the untrained critic."""
    num_critics: int = 2
    """Of the untrained ensemble."""
    w: float | None = None
    """Inverse temperature; null: the run's own, or the authors' 500."""
    normalize_gradient: bool | None = None
    """Whether the drift uses the gradient's direction only; null: as the run does, or true."""
    boundary: str | None = None
    """clip or reflect; null: as the run does, or clip."""
    repetitions: int = 20
    """Timed calls of each setting."""
    quality_states: int = 256
    """States on which the quality of the actions is measured."""
    quality_chains: int = 8
    """Independent actions drawn in each of these states."""
    reference_steps: int = 50
    """Langevin steps per level of the reference chain, which runs the critic's own schedule."""
    episodes: int = 5
    """Episodes per setting on Gymnasium, with a checkpoint; 0: none."""
    trace: str | None = None
    """true, or a file: writes a torch.profiler trace of one call of the first setting."""
    seed: int = 0
    """Of critics, states and chains."""
    run_dir: str | None = None
    """Where the results go; an earlier profile there is appended to. null: runs/profile-<time>."""


@dataclass(frozen=True)
class Setting:
    """One point of the grid."""

    levels: int
    steps_per_level: int
    states: int
    particles: int
    execution: str
    precision: str
    device: str
    kernel: str = "langevin"
    start_level: int | None = 0
    """None: not known before the run is."""
    warm_start: bool | None = False
    """None likewise."""

    @property
    def langevin_steps(self) -> int:
        """Sequential gradient steps of a chain."""
        return (self.levels - (self.start_level or 0)) * self.steps_per_level


def settings(config: ProfileConfig) -> Iterator[Setting]:
    """Every combination of the grid."""
    for combination in itertools.product(*(dict.fromkeys(getattr(config, name)) for name in GRID)):
        yield Setting(**dict(zip(GRID, combination, strict=True)))


def validate(config: ProfileConfig) -> None:
    """Checks everything that can be checked before anything starts.

    Raises:
        ConfigError: for the first value that cannot work.
    """
    for name in GRID:
        if not getattr(config, name):
            raise ConfigError(f"{name} is empty; expected at least one value.")
    for name in ("levels", "steps_per_level", "states", "particles", "hidden_sizes"):
        for value in getattr(config, name):
            _at_least(name, value, 1)
    if not config.hidden_sizes:
        raise ConfigError("hidden_sizes is empty; expected widths of at least 1.")
    for name in ("observation_dim", "action_dim", "num_critics", "repetitions", "reference_steps", "quality_chains"):
        _at_least(name, getattr(config, name), 1)
    for start_level in config.start_level:
        if start_level is not None:
            _at_least("start_level", start_level, 0)
    _at_least("quality_states", config.quality_states, 2)  # a standard error needs two
    _at_least("episodes", config.episodes, 0)
    for execution in config.execution:
        choose("execution", execution, get_args(Execution))
    for kernel in config.kernel:
        choose("kernel", kernel, ("auto", *get_args(KernelName)))
    if config.boundary is not None:
        choose("boundary", config.boundary, get_args(Boundary))
    for precision in config.precision:
        choose("precision", precision, get_args(Precision))
    for device in config.device:
        check_device_name(device)
    if config.w is not None and not (math.isfinite(config.w) and config.w > 0.0):
        raise ConfigError(f"w is {config.w:g}; expected a positive, finite inverse temperature.")
    if not 0 <= config.seed < 2**31:
        raise ConfigError(f"seed is {config.seed}; expected an integer in [0, 2**31).")


def check_device_name(name: str) -> None:
    """Raises ConfigError for a name that no machine knows; a device that this one lacks is skipped later."""
    try:
        known = name == "auto" or torch.device(name).type in ("cpu", "cuda")
    except RuntimeError:
        known = False
    if not known:
        raise ConfigError(f"device is {name!r}; expected auto, cpu, cuda or cuda:<index>.")


def _at_least(name: str, value: int, least: int) -> None:
    if value < least:
        raise ConfigError(f"{name} is {value}; expected at least {least}.")
