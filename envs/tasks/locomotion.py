"""What Gymnasium's robots share: effort costs; runners are paid for speed, and some for staying healthy."""

from __future__ import annotations

from abc import abstractmethod
from dataclasses import dataclass
from typing import Any

from envs.task import Array, Model, Physics, Random, Task


@dataclass(frozen=True, kw_only=True)
class Robot(Task):
    """Observes its positions and velocities; effort costs.

    Args:
        ctrl_cost_weight: weight of the squared norm of the action.
        reset_noise_scale: half width of the uniform noise on initial positions and velocities.
        exclude_current_positions_from_observation: whether the observation leaves out how far the robot has come.
    """

    ctrl_cost_weight: float
    reset_noise_scale: float
    exclude_current_positions_from_observation: bool = True

    @property
    def observes_track(self) -> bool:
        return not self.exclude_current_positions_from_observation

    def reset(self, xp: Any, random: Random, model: Model) -> tuple[Array, Array]:
        return model.qpos0 + self.reset_noise(random, model.nq), self.reset_noise(random, model.nv)

    def reset_noise(self, random: Random, size: int) -> Array:
        """Uniform noise [size]."""
        return random.uniform(-self.reset_noise_scale, self.reset_noise_scale, size)

    def seen_positions(self, physics: Physics) -> Array:
        """Positions without those along the track, if these are excluded: [..., nq] or [..., nq - len(track)]."""
        return physics.qpos if self.observes_track else physics.qpos[..., len(self.track) :]

    def observe(self, xp: Any, model: Model, physics: Physics) -> Array:
        return xp.concatenate([self.seen_positions(physics), physics.qvel], axis=-1)

    def costs(self, xp: Any, model: Model, physics: Physics, action: Array) -> Array:
        """What the step costs [...]."""
        return self.ctrl_cost_weight * xp.sum(xp.square(action), axis=-1)


@dataclass(frozen=True, kw_only=True)
class Runner(Robot):
    """A robot that is paid for speed.

    Args:
        forward_reward_weight: weight of the forward velocity, in metres per second.
    """

    forward_reward_weight: float = 1.0

    def reward(self, xp: Any, model: Model, physics: Physics, action: Array, velocity: Array) -> Array:
        return self.forward_reward_weight * velocity[..., 0] - self.costs(xp, model, physics, action)


@dataclass(frozen=True, kw_only=True)
class HealthyRunner(Runner):
    """A runner that is also paid for staying healthy.

    Args:
        healthy_reward: reward of every step that leaves the robot healthy.
        terminate_when_unhealthy: whether an unhealthy robot ends the episode.
    """

    healthy_reward: float
    terminate_when_unhealthy: bool = True

    @abstractmethod
    def healthy(self, xp: Any, model: Model, physics: Physics) -> Array:
        """Whether the robot is healthy [...]."""

    def reward(self, xp: Any, model: Model, physics: Physics, action: Array, velocity: Array) -> Array:
        survival = self.healthy_reward * self.healthy(xp, model, physics)
        return survival + super().reward(xp, model, physics, action, velocity)

    def terminated(self, xp: Any, model: Model, physics: Physics) -> Array:
        return xp.logical_and(self.terminate_when_unhealthy, ~self.healthy(xp, model, physics))
