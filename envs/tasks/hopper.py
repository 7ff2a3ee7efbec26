"""Hopper-v5: hop forward on one leg without falling."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any, ClassVar

from envs.task import Array, Model, Physics, within
from envs.tasks.locomotion import HealthyRunner


@dataclass(frozen=True, kw_only=True)
class Hopper(HealthyRunner):
    """Gymnasium's Hopper-v5. Further options: see :class:`~envs.tasks.locomotion.HealthyRunner`.

    Args:
        healthy_state_range: what all positions and velocities but the first two positions must lie in.
        healthy_z_range: what the torso's height must lie in, in metres.
        healthy_angle_range: what the torso's angle must lie in, in radians.
    """

    name: ClassVar[str] = "Hopper-v5"
    track: ClassVar[tuple[int, ...]] = (0,)

    xml_file: str = "hopper.xml"
    frame_skip: int = 4
    ctrl_cost_weight: float = 1e-3
    healthy_reward: float = 1.0
    healthy_state_range: tuple[float, float] = (-100.0, 100.0)
    healthy_z_range: tuple[float, float] = (0.7, math.inf)
    healthy_angle_range: tuple[float, float] = (-0.2, 0.2)
    reset_noise_scale: float = 5e-3

    def observe(self, xp: Any, model: Model, physics: Physics) -> Array:
        return xp.concatenate([self.seen_positions(physics), xp.clip(physics.qvel, -10.0, 10.0)], axis=-1)

    def healthy(self, xp: Any, model: Model, physics: Physics) -> Array:
        qpos = physics.qpos
        state = xp.concatenate([qpos[..., 2:], physics.qvel], axis=-1)
        upright = within(xp, qpos[..., 1], self.healthy_z_range) & within(xp, qpos[..., 2], self.healthy_angle_range)
        return upright & xp.all(within(xp, state, self.healthy_state_range), axis=-1)
