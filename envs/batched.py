"""The TorchRL environment over an engine that steps a whole batch at once.

An engine resets environments within the step that ends them, so a step yields two observations: the true one that the
step led to, which is ("next", "observation"), and the one that the environment is at now. ``_reset`` hands out the
latter to environments that have just ended, and asks the engine only for those that were interrupted.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, NamedTuple, Protocol

import torch
from tensordict import TensorDict, TensorDictBase
from torchrl.data import Binary, Bounded, Composite, Unbounded
from torchrl.envs import EnvBase

DONE_KEYS = ("terminated", "truncated", "done")


class Step(NamedTuple):
    """What one control step of a batch yields."""

    next_observation: torch.Tensor
    """What the step led to, [num_envs, observation_dim] float32; of an ended episode its true last observation."""
    reward: torch.Tensor
    """[num_envs] float32."""
    terminated: torch.Tensor
    """Whether the task ended, [num_envs] bool."""
    truncated: torch.Tensor
    """Whether the time limit was reached, [num_envs] bool."""
    observation: torch.Tensor
    """Where environments are now, [num_envs, observation_dim] float32; of an ended episode the next one's first."""


class Engine(Protocol):
    """A batch of simulations of one task. Tensors are on ``device`` and never written to after they are returned."""

    num_envs: int
    device: torch.device
    observation_dim: int
    action_low: torch.Tensor
    action_high: torch.Tensor

    def seed(self, seed: int) -> None:
        """Fixes the initial states of all episodes from here on; those under way go on."""

    def step(self, action: torch.Tensor) -> Step:
        """One control step with ``action`` [num_envs, action_dim] float32; ended episodes are followed by new ones."""
        ...

    def reset(self, mask: torch.Tensor) -> torch.Tensor:
        """Begins new episodes where ``mask`` [num_envs] is true; returns every observation."""
        ...

    def observe(self) -> torch.Tensor:
        """Every observation [num_envs, observation_dim]."""
        ...

    def set_state(self, qpos: torch.Tensor, qvel: torch.Tensor) -> torch.Tensor:
        """Begins episodes at positions [num_envs, nq] and velocities [num_envs, nv]; returns every observation."""
        ...

    def state_dict(self) -> dict[str, torch.Tensor]:
        """The whole state, each tensor with the batch dimension first."""
        ...

    def load_state_dict(self, state: Mapping[str, torch.Tensor]) -> None:
        """Goes on from a state exactly."""


class BatchedEnv(EnvBase):
    """Environments that an engine steps together.

    An environment that ended and is stepped on without a reset is in its next episode.

    Args:
        engine: the simulations.
        seed: fixes the initial states of every episode; environment i's n-th episode starts from the same state
            whatever happens in the others.

    Examples:
        >>> from envs.engines.mjx import MJXEngine
        >>> from envs.tasks.half_cheetah import HalfCheetah
        >>> env = BatchedEnv(MJXEngine(HalfCheetah(), num_envs=2))
        >>> env.reset()["observation"].shape
        torch.Size([2, 17])
    """

    def __init__(self, engine: Engine, *, seed: int = 0) -> None:
        shape, column = torch.Size([engine.num_envs]), torch.Size([engine.num_envs, 1])
        super().__init__(device=engine.device, batch_size=shape)
        self._engine = engine
        observation = Unbounded(torch.Size([*shape, engine.observation_dim]), device=self.device)
        self.observation_spec = Composite(observation=observation, shape=shape, device=self.device)
        self.action_spec = Bounded(
            engine.action_low.expand(*shape, -1), engine.action_high.expand(*shape, -1), device=self.device
        )
        self.reward_spec = Unbounded(column, device=self.device)
        self.full_done_spec = Composite(
            {name: Binary(shape=column, dtype=torch.bool, device=self.device) for name in DONE_KEYS},
            shape=shape,
            device=self.device,
        )
        self._observation = engine.observe()
        self._prepared = torch.zeros(shape, dtype=torch.bool, device=self.device)
        self.set_seed(seed)

    def _step(self, tensordict: TensorDictBase) -> TensorDictBase:
        action = tensordict["action"]
        if action.shape != self.action_spec.shape:
            raise ValueError(f"The action has shape {list(action.shape)}; expected {list(self.action_spec.shape)}.")
        step = self._engine.step(action.to(torch.float32))
        done = step.terminated | step.truncated
        self._observation, self._prepared = step.observation, done
        return TensorDict(
            {
                "observation": step.next_observation,
                "reward": step.reward.unsqueeze(-1),
                "terminated": step.terminated.unsqueeze(-1),
                "truncated": step.truncated.unsqueeze(-1),
                "done": done.unsqueeze(-1),
            },
            self.batch_size,
            device=self.device,
        )

    def _reset(self, tensordict: TensorDictBase | None = None, **kwargs: Any) -> TensorDictBase:
        mask = None if tensordict is None else tensordict.get("_reset", None)
        if mask is None:
            self._observation = self._engine.reset(torch.ones_like(self._prepared))
            self._prepared = torch.zeros_like(self._prepared)
        else:
            mask = mask.view(self.batch_size)
            interrupted = mask & ~self._prepared
            if interrupted.any():
                self._observation = torch.where(
                    interrupted.unsqueeze(-1), self._engine.reset(interrupted), self._observation
                )
            self._prepared = self._prepared & ~mask
        return self._beginning()

    def _beginning(self) -> TensorDictBase:
        """The present observations, with no episode done; copied, since they may be handed out in parts."""
        tensordict = self.full_done_spec.zero()
        return tensordict.set("observation", self._observation.clone())

    def _set_seed(self, seed: int | None) -> None:
        self._engine.seed(0 if seed is None else seed)
        # Episodes that were begun already came of the old seed: a reset asks for others.
        self._prepared = torch.zeros_like(self._prepared)

    def set_state(self, qpos: torch.Tensor, qvel: torch.Tensor) -> TensorDictBase:
        """Begins an episode in every environment from a given state.

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
        self._observation = state_dict["observation"].to(self._observation)
        self._prepared = state_dict["prepared"].to(self._prepared)
