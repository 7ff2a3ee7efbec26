"""HalfCheetah-v5: run forward, with little control effort."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

from envs.task import Array, Physics, Random, Task


@dataclass(frozen=True, kw_only=True)
class HalfCheetah(Task):
    """Gymnasium's HalfCheetah-v5; it never terminates.

    Args:
        forward_reward_weight: weight of the forward velocity, in metres per second.
        ctrl_cost_weight: weight of the squared norm of the action.
        reset_noise_scale: half width of the uniform noise on positions, and deviation of that on velocities.
        exclude_current_positions_from_observation: leaves the distance run out of the observation (17 numbers, not 18).

    Examples:
        >>> HalfCheetah(ctrl_cost_weight=0.0).max_episode_steps
        1000
    """

    name: ClassVar[str] = "HalfCheetah-v5"
    xml_file: ClassVar[str] = "half_cheetah.xml"
    # Errors against Gymnasium over 10240 random transitions are those of the model's (100, 50); with (4, 8) a few of
    # them are a thousand times larger.
    solver_iterations: ClassVar[tuple[int, int] | None] = (8, 16)

    frame_skip: int = 5
    forward_reward_weight: float = 1.0
    ctrl_cost_weight: float = 0.1
    reset_noise_scale: float = 0.1
    exclude_current_positions_from_observation: bool = True

    def reset(self, random: Random, qpos: Array, qvel: Array) -> tuple[Array, Array]:
        scale = self.reset_noise_scale
        # Positions are drawn first, as Gymnasium does: the same generator gives the same state.
        qpos = qpos + random.uniform(-scale, scale, qpos.shape[0])
        return qpos, qvel + scale * random.standard_normal(qvel.shape[0])

    def recentre(self, xp: Any, qpos: Array) -> Array:
        if not self.exclude_current_positions_from_observation:
            return qpos
        # The track is the same everywhere, and a difference to the nearest integer is exact.
        return xp.concatenate([qpos[:1] - xp.round(qpos[:1]), qpos[1:]])

    def observe(self, xp: Any, physics: Physics) -> Array:
        skipped = int(self.exclude_current_positions_from_observation)
        return xp.concatenate([physics.qpos[skipped:], physics.qvel])

    def reward(self, xp: Any, before: Physics, after: Physics, action: Array, dt: float) -> Array:
        forward_velocity = (after.qpos[0] - before.qpos[0]) / dt
        return self.forward_reward_weight * forward_velocity - self.ctrl_cost_weight * xp.sum(xp.square(action))
