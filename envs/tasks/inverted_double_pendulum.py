"""InvertedDoublePendulum-v5: balance two poles, one on the other, on a cart."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

from envs.task import Array, Model, Physics, Random, Task


@dataclass(frozen=True, kw_only=True)
class InvertedDoublePendulum(Task):
    """Gymnasium's InvertedDoublePendulum-v5; it ends when the tip falls to 1 m.

    Args:
        healthy_reward: reward of every step before the fall.
        reset_noise_scale: half width of the uniform noise on positions, and deviation of that on velocities.
    """

    name: ClassVar[str] = "InvertedDoublePendulum-v5"
    reads: ClassVar[tuple[str, ...]] = ("site_xpos", "qfrc_constraint")

    xml_file: str = "inverted_double_pendulum.xml"
    frame_skip: int = 5
    healthy_reward: float = 10.0
    reset_noise_scale: float = 0.1

    def reset(self, xp: Any, random: Random, model: Model) -> tuple[Array, Array]:
        scale = self.reset_noise_scale
        qpos = model.qpos0 + random.uniform(-scale, scale, model.nq)
        return qpos, scale * random.standard_normal(model.nv)

    def observe(self, xp: Any, model: Model, physics: Physics) -> Array:
        angles = physics.qpos[..., 1:]
        parts = [
            physics.qpos[..., :1],
            xp.sin(angles),
            xp.cos(angles),
            xp.clip(physics.qvel, -10.0, 10.0),
            xp.clip(physics.qfrc_constraint[..., :1], -10.0, 10.0),
        ]
        return xp.concatenate(parts, axis=-1)

    def reward(self, xp: Any, model: Model, physics: Physics, action: Array, velocity: Array) -> Array:
        x, height = physics.site_xpos[..., 0, 0], physics.site_xpos[..., 0, 2]
        alive = xp.where(self.terminated(xp, model, physics), 0.0, self.healthy_reward)
        distance = 0.01 * x**2 + (height - 2.0) ** 2
        speed = 1e-3 * physics.qvel[..., 1] ** 2 + 5e-3 * physics.qvel[..., 2] ** 2
        return alive - distance - speed

    def terminated(self, xp: Any, model: Model, physics: Physics) -> Array:
        return physics.site_xpos[..., 0, 2] <= 1.0
