"""What a task is: a MuJoCo model with its observation, reward, termination and reset.

A task is written once, for one environment and over an array namespace ``xp``, so that any engine can step it: NumPy
gives float64 reference values from ``mujoco.MjData``, ``jax.numpy`` is traced and batched by the ``mjx`` engine.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Any, ClassVar, Protocol

Array = Any
"""An array of NumPy or JAX."""


class Physics(Protocol):
    """What tasks read of a simulation; ``mujoco.MjData`` and ``mjx.Data`` both have it."""

    @property
    def qpos(self) -> Array:
        """Generalized positions [nq], in metres and radians."""

    @property
    def qvel(self) -> Array:
        """Generalized velocities [nv], per second."""


class Random(Protocol):
    """Draws of a reset; ``numpy.random.Generator`` has these methods, and the ``mjx`` engine brings its own."""

    def uniform(self, low: float, high: float, size: int) -> Array:
        """Draws [size], uniform in [low, high)."""

    def standard_normal(self, size: int) -> Array:
        """Draws [size] from the standard normal distribution."""


@dataclass(frozen=True, kw_only=True)
class Task(ABC):
    """A task; its fields are the options of the Gymnasium task of the same name.

    Args:
        frame_skip: physics steps per control step, at least 1.
        max_episode_steps: control steps after which an episode is truncated, at least 1.

    Raises:
        ValueError: for a ``frame_skip`` or ``max_episode_steps`` below 1.
    """

    name: ClassVar[str]
    """Gymnasium id."""
    xml_file: ClassVar[str]
    """The model's file among Gymnasium's assets."""
    state_fields: ClassVar[tuple[str, ...]] = ("qpos", "qvel", "qacc_warmstart")
    """All that one control step needs to know of the previous one, as fields of the simulation data."""
    solver_iterations: ClassVar[tuple[int, int] | None] = None
    """Limits of the constraint solver and of its line search where float32 rounds; by default those of the model.

    The model's stopping tolerance is out of float32's reach, and a batch iterates until its slowest environment stops.
    """

    frame_skip: int
    max_episode_steps: int = 1000

    def __post_init__(self) -> None:
        for option in ("frame_skip", "max_episode_steps"):
            if getattr(self, option) < 1:
                raise ValueError(f"{option} is {getattr(self, option)}; expected at least 1.")

    @property
    def xml_path(self) -> Path:
        """The model's file in the installed Gymnasium, found without importing Gymnasium."""
        package = find_spec("gymnasium")
        if package is None or package.origin is None:
            raise ImportError("Gymnasium is not installed, and its MuJoCo models come with it: pip install gymnasium.")
        return Path(package.origin).parent / "envs" / "mujoco" / "assets" / self.xml_file

    @abstractmethod
    def reset(self, random: Random, qpos: Array, qvel: Array) -> tuple[Array, Array]:
        """Where an episode starts.

        Args:
            random: gives the draws.
            qpos: the model's own initial positions [nq].
            qvel: the model's own initial velocities [nv].

        Returns:
            Positions [nq] and velocities [nv].
        """

    def recentre(self, xp: Any, qpos: Array) -> Array:
        """Positions [nq] nearer the origin that neither physics nor the task can tell from ``qpos``; by default itself.

        In float32 a position of 500 m is known to 0.03 mm, which a control step makes an error of 0.6 mm/s.
        """
        return qpos

    @abstractmethod
    def observe(self, xp: Any, physics: Physics) -> Array:
        """The observation [observation_dim]."""

    @abstractmethod
    def reward(self, xp: Any, before: Physics, after: Physics, action: Array, dt: float) -> Array:
        """The reward of a control step, a scalar.

        Args:
            xp: array namespace.
            before: the simulation before the control step.
            after: the simulation after it.
            action: as the agent gave it, [action_dim].
            dt: seconds of a control step.
        """

    def terminated(self, xp: Any, physics: Physics) -> Array:
        """Whether the task has ended, a boolean scalar; by default never."""
        return xp.zeros((), bool)
