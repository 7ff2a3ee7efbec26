"""What a task is: a MuJoCo model with its observation, reward, termination and reset.

A task is written once, over an array namespace ``xp``, and every engine steps it: the ``mujoco`` engine calls it with
NumPy on a whole batch, the ``mjx`` engine traces it with ``jax.numpy`` for one environment. So index from the right
(``qpos[..., 0]``, ``axis=-1``), and branch with ``xp.where``.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Any, ClassVar, Protocol

from envs.models import silent_deprecations

Array = Any
"""An array of NumPy or JAX."""

Model = Any
"""A ``mujoco.MjModel``; its compiled class has no type stubs."""


POSTCONSTRAINT_FIELDS = frozenset({"cacc", "cfrc_int", "cfrc_ext"})
"""Fields of ``MjData`` that MuJoCo computes for those only who call ``mj_rnePostConstraint``, as Gymnasium does."""


class Physics(Protocol):
    """What a task reads of a simulation after a control step: ``qpos``, ``qvel`` and the fields named in ``reads``.

    Names and meanings are those of ``mujoco.MjData``. As in MuJoCo, what follows from the state (``xpos``, ``cinert``)
    is as the last substep computed it, before it moved the state on.
    """

    qpos: Array
    """Generalized positions [..., nq], in metres and radians."""
    qvel: Array
    """Generalized velocities [..., nv], per second."""

    def __getattr__(self, name: str) -> Array: ...


class Random(Protocol):
    """Draws of a reset; ``numpy.random.Generator`` has these methods, and the ``mjx`` engine brings its own."""

    def uniform(self, low: float, high: float, size: int | tuple[int, ...]) -> Array:
        """Draws of shape ``size``, uniform in [low, high)."""

    def standard_normal(self, size: int | tuple[int, ...]) -> Array:
        """Draws of shape ``size`` from the standard normal distribution."""


@dataclass(frozen=True, kw_only=True)
class Task(ABC):
    """A task; its fields are its options. Gymnasium's tasks have the options of Gymnasium's constructor.

    Args:
        xml_file: the model: a path that begins with ``/``, ``.`` or ``~``, or a file among Gymnasium's assets.
        frame_skip: physics steps per control step, at least 1.
        max_episode_steps: control steps after which an episode is truncated, at least 1.

    Raises:
        ValueError: for a ``frame_skip`` or ``max_episode_steps`` below 1.
        FileNotFoundError: if the model's file does not exist.
    """

    name: ClassVar[str]
    """Gymnasium id."""
    reads: ClassVar[tuple[str, ...]] = ()
    """Fields of ``MjData`` that the task reads beside ``qpos`` and ``qvel``, such as "xpos" or "cfrc_ext"."""
    track: ClassVar[tuple[int, ...]] = ()
    """Coordinates of ``qpos`` along which the agent travels."""

    xml_file: str
    frame_skip: int
    max_episode_steps: int = 1000

    def __post_init__(self) -> None:
        for option in ("frame_skip", "max_episode_steps"):
            if getattr(self, option) < 1:
                raise ValueError(f"{option} is {getattr(self, option)}; expected at least 1.")
        if not self.xml_path.is_file():
            raise FileNotFoundError(
                f"xml_file is {self.xml_file!r}, but {self.xml_path} does not exist; expected a path that begins with "
                "'/', '.' or '~', or the name of one of Gymnasium's MuJoCo models."
            )

    @property
    def xml_path(self) -> Path:
        """The model's file; Gymnasium's own are found without importing Gymnasium."""
        if self.xml_file.startswith(("/", ".", "~")):
            return Path(self.xml_file).expanduser()
        package = find_spec("gymnasium")
        if package is None or package.origin is None:
            raise ImportError("Gymnasium is not installed, and its MuJoCo models come with it: pip install gymnasium.")
        return Path(package.origin).parent / "envs" / "mujoco" / "assets" / self.xml_file

    @property
    def observes_track(self) -> bool:
        """Whether the observation, the reward or the termination tells how far the agent has travelled.

        If not, engines in float32 may move the agent back along the track, unseen, where the model's world is the same
        everywhere along it: 500 m from the origin a position is known to 0.03 mm, which a control step would make an
        error of 0.6 mm/s.
        """
        return True

    def load_model(self) -> Model:
        """The compiled model."""
        import mujoco

        with silent_deprecations():
            return mujoco.MjModel.from_xml_path(str(self.xml_path))  # pyright: ignore[reportAttributeAccessIssue]

    def control_timestep(self, model: Model) -> float:
        """Seconds of a control step."""
        return float(model.opt.timestep) * self.frame_skip

    @abstractmethod
    def reset(self, xp: Any, random: Random, model: Model) -> tuple[Array, Array]:
        """Where an episode of one environment starts.

        Args:
            xp: array namespace.
            random: gives the draws.
            model: its ``qpos0`` is the model's own initial position [nq].

        Returns:
            Positions [nq] and velocities [nv].
        """

    def position(self, xp: Any, model: Model, physics: Physics) -> Array:
        """Where the agent is along the track [..., len(track)], in metres; the reward gets its rate of change."""
        return physics.qpos[..., list(self.track)]

    @abstractmethod
    def observe(self, xp: Any, model: Model, physics: Physics) -> Array:
        """The observation [..., observation_dim]."""

    @abstractmethod
    def reward(self, xp: Any, model: Model, physics: Physics, action: Array, velocity: Array) -> Array:
        """The reward of a control step [...].

        Args:
            xp: array namespace.
            model: the model.
            physics: the simulation after the step.
            action: as the agent gave it, [..., action_dim].
            velocity: mean velocity of ``position`` over the step [..., len(track)], in metres per second.
        """

    def terminated(self, xp: Any, model: Model, physics: Physics) -> Array:
        """Whether the task has ended [...], boolean; by default never."""
        return xp.zeros(physics.qpos.shape[:-1], bool)


def flatten(array: Array) -> Array:
    """One vector per environment from one vector per body: [..., bodies, size] -> [..., bodies * size]."""
    return array.reshape(*array.shape[:-2], -1)


def within(xp: Any, value: Array, bounds: tuple[float, float]) -> Array:
    """Whether values lie strictly between two bounds; never for NaN."""
    low, high = bounds
    return xp.logical_and(low < value, value < high)


def first_valid(xp: Any, candidates: Array, valid: Array) -> Array:
    """The first candidate that is valid: rejection sampling with a fixed number of draws, which a compiler can trace.

    Args:
        xp: array namespace.
        candidates: draws [count, size].
        valid: which are accepted [count].

    Returns:
        A draw [size]; the first one where none is valid, so ``count`` must make that improbable.
    """
    return xp.take(candidates, xp.argmax(valid), axis=0)
