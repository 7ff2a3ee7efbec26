"""Walker2d-v5: walk forward on two legs without falling."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

from envs.task import Array, Model, Physics, within
from envs.tasks.locomotion import HealthyRunner


@dataclass(frozen=True, kw_only=True)
class Walker2d(HealthyRunner):
    """Gymnasium's Walker2d-v5. Further options: see :class:`~envs.tasks.locomotion.HealthyRunner`.

    Args:
        healthy_z_range: what the torso's height must lie in, in metres.
        healthy_angle_range: what the torso's angle must lie in, in radians.
    """

    name: ClassVar[str] = "Walker2d-v5"
    track: ClassVar[tuple[int, ...]] = (0,)

    xml_file: str = "walker2d_v5.xml"
    frame_skip: int = 4
    ctrl_cost_weight: float = 1e-3
    healthy_reward: float = 1.0
    healthy_z_range: tuple[float, float] = (0.8, 2.0)
    healthy_angle_range: tuple[float, float] = (-1.0, 1.0)
    reset_noise_scale: float = 5e-3

    def observe(self, xp: Any, model: Model, physics: Physics) -> Array:
        return xp.concatenate([self.seen_positions(physics), xp.clip(physics.qvel, -10.0, 10.0)], axis=-1)

    def healthy(self, xp: Any, model: Model, physics: Physics) -> Array:
        height, angle = physics.qpos[..., 1], physics.qpos[..., 2]
        return within(xp, height, self.healthy_z_range) & within(xp, angle, self.healthy_angle_range)
