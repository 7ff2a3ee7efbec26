"""The TorchRL environment over an engine that steps a whole batch at once.

An engine resets environments within the step that ends them, so a step yields two observations: the true one that the
step led to, which is ("next", "observation"), and the one that the environment is at now. ``_reset`` hands out the
latter to environments that have just ended, and asks the engine only for those that were interrupted.
"""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple, Protocol

import torch
from tensordict import TensorDict, TensorDictBase
from torchrl.data import Binary, Bounded, Composite, Unbounded
from torchrl.envs import EnvBase

from envs.rendering import Renderer
from envs.task import Model

DONE_KEYS = ("terminated", "truncated", "done")

LARGEST_NUMBER = 1e10
"""Positions and velocities beyond it are not physics any more: MuJoCo's own limit, mjMAXVAL."""

ENVIRONMENTS_PER_THREAD = 8
"""Fewer are not worth a thread of an engine."""


class Step(NamedTuple):
    """What one control step of a batch yields; observations and rewards are float32 or float64."""

    next_observation: torch.Tensor
    """What the step led to, [num_envs, observation_dim]; of an ended episode its true last observation."""
    reward: torch.Tensor
    """[num_envs]."""
    terminated: torch.Tensor
    """Whether the task ended, [num_envs] bool."""
    truncated: torch.Tensor
    """Whether the time limit was reached, [num_envs] bool."""
    diverged: torch.Tensor
    """Whether the simulation was lost to numbers that are not finite or beyond ``LARGEST_NUMBER``, [num_envs] bool.
    Then the episode is terminated, and its last observation and reward are zeros."""
    observation: torch.Tensor
    """Where environments are now, [num_envs, observation_dim]; of an ended episode the next one's first."""
    qpos: torch.Tensor
    """Generalized positions that the step led to, [num_envs, nq], for rendering; of an ended episode its last."""


def choose_num_threads(num_threads: int | None) -> int:
    """Threads that an engine may have: those asked for, by default one per available core.

    Raises:
        ValueError: for less than one.
    """
    if num_threads is None:
        return len(os.sched_getaffinity(0))
    if num_threads < 1:
        raise ValueError(f"num_threads is {num_threads}; expected at least 1, or None for one per core.")
    return num_threads


class Engine(Protocol):
    """A batch of simulations of one task. Tensors are on ``device`` and never written to after they are returned."""

    num_envs: int
    device: torch.device
    model: Model
    """The model that is simulated, a ``mujoco.MjModel``."""
    observation_dim: int
    action_low: torch.Tensor
    """Lowest actions [action_dim]."""
    action_high: torch.Tensor
    """Highest actions [action_dim]."""

    def seed(self, seed: int) -> None:
        """Fixes the initial states of all episodes from here on; those under way go on."""

    def step(self, action: torch.Tensor) -> Step:
        """One control step with ``action`` [num_envs, action_dim] float32; ended episodes are followed by new ones."""
        ...

    def reset(self, mask: torch.Tensor) -> torch.Tensor:
        """Begins new episodes where ``mask`` [num_envs] is true; returns every observation."""
        ...

    def set_state(self, qpos: torch.Tensor, qvel: torch.Tensor) -> torch.Tensor:
        """Begins episodes at positions [num_envs, nq] and velocities [num_envs, nv]; returns every observation."""
        ...

    def positions(self) -> torch.Tensor:
        """Generalized positions where environments are now, [num_envs, nq], for rendering."""
        ...

    def state_dict(self) -> dict[str, torch.Tensor]:
        """The whole state, each tensor with the batch dimension first."""
        ...

    def load_state_dict(self, state: Mapping[str, torch.Tensor]) -> None:
        """Goes on from a state exactly."""


class BatchedEnv(EnvBase):
    """Environments that an engine steps together.

    An environment that ended and is stepped on without a reset is in its next episode. Beside "observation" there is
    "diverged" [num_envs, 1]: a simulation that was lost ends its own episode, and the others go on.

    Args:
        engine: the simulations.
        seed: fixes the initial states of every episode; environment i's n-th episode starts from the same state
            whatever happens in the others.

    Examples:
        >>> from envs.engines.mujoco import MujocoEngine
        >>> from envs.tasks.half_cheetah import HalfCheetah
        >>> env = BatchedEnv(MujocoEngine(HalfCheetah(), num_envs=2))
        >>> env.reset()["observation"].shape
        torch.Size([2, 17])
    """

    def __init__(self, engine: Engine, *, seed: int = 0) -> None:
        shape, column = torch.Size([engine.num_envs]), torch.Size([engine.num_envs, 1])
        super().__init__(device=engine.device, batch_size=shape)
        self._engine = engine
        observation = Unbounded(torch.Size([*shape, engine.observation_dim]), device=self.device)
        diverged = Binary(shape=column, dtype=torch.bool, device=self.device)
        self.observation_spec = Composite(observation=observation, diverged=diverged, shape=shape, device=self.device)
        self.action_spec = Bounded(
            engine.action_low.expand(*shape, -1), engine.action_high.expand(*shape, -1), device=self.device
        )
        self.reward_spec = Unbounded(column, device=self.device)
        self.full_done_spec = Composite(
            {name: Binary(shape=column, dtype=torch.bool, device=self.device) for name in DONE_KEYS},
            shape=shape,
            device=self.device,
        )
        # Made once: building it from the spec at every reset took longer than the rest of the reset.
        self._nothing_done = self.full_done_spec.zero()
        self._nothing_done.set("diverged", torch.zeros(column, dtype=torch.bool, device=self.device))
        self._observation = torch.zeros(observation.shape, device=self.device)
        self._prepared = torch.zeros(shape, dtype=torch.bool, device=self.device)
        self._lost_action = torch.zeros(shape, dtype=torch.bool, pin_memory=self.device.type == "cuda")
        self._last_step: Step | None = None
        self._renderer: Renderer | None = None
        self.set_seed(seed)

    def _step(self, tensordict: TensorDictBase) -> TensorDictBase:
        action = tensordict["action"]
        if action.shape != self.action_spec.shape:
            raise ValueError(f"The action has shape {list(action.shape)}; expected {list(self.action_spec.shape)}.")
        self._check_finite(action)
        step = self._engine.step(action.to(torch.float32))
        done = step.terminated | step.truncated
        self._observation, self._prepared, self._last_step = step.observation, done, step
        return TensorDict(
            {
                "observation": step.next_observation.to(torch.float32),
                "diverged": step.diverged.unsqueeze(-1),
                "reward": step.reward.to(torch.float32).unsqueeze(-1),
                "terminated": step.terminated.unsqueeze(-1),
                "truncated": step.truncated.unsqueeze(-1),
                "done": done.unsqueeze(-1),
            },
            self.batch_size,
            device=self.device,
        )

    def _check_finite(self, action: torch.Tensor) -> None:
        """Raises ValueError for an action that is not finite; on a GPU one step late, since nobody waits for it.

        There the flags travel to the host behind the step's other work, and whoever looks at "done" has waited for
        them by the next step. Until then the environment of such an action counts as diverged.
        """
        lost = ~action.isfinite().all(-1)
        if lost.device.type == "cpu":
            self._lost_action = lost
        if self._lost_action.any():
            error = lost_action_error(self._lost_action)
            self._lost_action.zero_()
            raise error
        if lost.device.type != "cpu":
            self._lost_action.copy_(lost, non_blocking=True)

    def _reset(self, tensordict: TensorDictBase | None = None, **kwargs: Any) -> TensorDictBase:
        mask = None if tensordict is None else tensordict.get("_reset", None)
        if mask is None:
            self._observation = self._engine.reset(torch.ones_like(self._prepared))
            self._prepared = torch.zeros_like(self._prepared)
        else:
            mask = mask.view(self.batch_size)
            interrupted = mask & ~self._prepared
            # Waits for a GPU, as whoever asks for some resets has just done to know which.
            if interrupted.any():
                self._observation = torch.where(
                    interrupted.unsqueeze(-1), self._engine.reset(interrupted), self._observation
                )
            self._prepared = self._prepared & ~mask
        return self._beginning()

    def _beginning(self) -> TensorDictBase:
        """The present observations, with no episode done; copied, since they may be handed out in parts."""
        return self._nothing_done.clone().set("observation", self._observation.to(torch.float32, copy=True))

    def _set_seed(self, seed: int | None) -> None:
        self._engine.seed(0 if seed is None else seed)
        # Episodes that were begun already came of the old seed: a reset asks for others.
        self._prepared = torch.zeros_like(self._prepared)

    def set_state(self, qpos: torch.Tensor, qvel: torch.Tensor) -> TensorDictBase:
        """Begins an episode in every environment from a given state, without a warm start of the solver.

        Args:
            qpos: positions [num_envs, nq], in metres and radians.
            qvel: velocities [num_envs, nv], per second.

        Returns:
            As of ``reset``: "observation" and the done flags.

        Raises:
            ValueError: for other shapes.
        """
        self._observation = self._engine.set_state(qpos, qvel)
        self._prepared = torch.zeros_like(self._prepared)
        return self._beginning()

    def render(
        self,
        environments: int | Sequence[int] | None = None,
        *,
        width: int = 480,
        height: int = 480,
        camera: str | None = None,
    ) -> torch.Tensor:
        """What a camera sees now, as TorchRL's ``PixelRenderTransform`` and ``VideoRecorder`` want it.

        Of an environment that has ended and is not reset yet, it is where the episode ended, as in ("next",
        "observation"); unless the simulation was lost, or the environment's state was loaded since.

        Args:
            environments: number of an environment, several numbers, or None for all.
            width: of a frame, in pixels.
            height: of a frame, in pixels.
            camera: its name in the model; by default Gymnasium's choice, the one named "track" if there is one.

        Returns:
            Frames [len(environments), height, width, 3] uint8 on the CPU; of a single number [height, width, 3].

        Raises:
            IndexError: for an environment that does not exist.
        """
        chosen = range(self.batch_size[0]) if environments is None else environments
        indices = [chosen] if isinstance(chosen, int) else list(chosen)
        for index in indices:
            if not 0 <= index < self.batch_size[0]:
                raise IndexError(f"There is no environment {index}; expected 0 to {self.batch_size[0] - 1}.")
        if self._renderer is None or self._renderer.view != (width, height, camera):
            self._renderer = Renderer(self._engine.model, width, height, camera)
        positions = self._engine.positions()
        if self._last_step is not None:
            ended = (self._prepared & ~self._last_step.diverged).to(positions.device).unsqueeze(-1)
            positions = torch.where(ended, self._last_step.qpos.to(positions), positions)
        frames = torch.stack([self._renderer.frame(positions[index].numpy(force=True)) for index in indices])
        return frames[0] if isinstance(chosen, int) else frames

    def state_dict(self, *args: Any, **kwargs: Any) -> dict[str, Any]:
        """Everything that the future depends on but actions: tensors with the batch dimension first."""
        return {
            "engine": self._engine.state_dict(),
            "observation": self._observation.clone(),
            "prepared": self._prepared.clone(),
        }

    def load_state_dict(self, state_dict: Mapping[str, Any], *args: Any, **kwargs: Any) -> None:
        """Goes on exactly from where :meth:`state_dict` was called.

        Raises:
            ValueError: if the state is of another task or another number of environments.
        """
        self._engine.load_state_dict(state_dict["engine"])
        # Copied: what is handed out is written to by whoever gets it.
        self._observation = state_dict["observation"].to(self._observation, copy=True)
        self._prepared = state_dict["prepared"].to(self._prepared, copy=True)
        self._last_step = None


def refuse_lost_actions(action: torch.Tensor) -> None:
    """Raises ValueError for actions [num_envs, action_dim] that are not finite; waits for their device."""
    lost = ~action.isfinite().all(-1)
    if lost.any():
        raise lost_action_error(lost)


def lost_action_error(lost: torch.Tensor) -> ValueError:
    """What to raise for actions that are not finite, given where they are, [num_envs]."""
    environments = lost.nonzero().flatten().tolist()
    return ValueError(
        f"The action of environment {', '.join(map(str, environments))} is not finite; expected numbers within the "
        "action spec's bounds (those beyond are clipped)."
    )
