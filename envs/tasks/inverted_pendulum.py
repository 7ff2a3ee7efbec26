"""InvertedPendulum-v5: balance a pole on a cart."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

from envs.task import Array, Model, Physics, Random, Task


@dataclass(frozen=True, kw_only=True)
class InvertedPendulum(Task):
    """Gymnasium's InvertedPendulum-v5: a reward of 1 for every step until the pole leaves 0.2 radians.

    Args:
        reset_noise_scale: half width of the uniform noise on initial positions and velocities.
    """

    name: ClassVar[str] = "InvertedPendulum-v5"

    xml_file: str = "inverted_pendulum.xml"
    frame_skip: int = 2
    reset_noise_scale: float = 0.01

    def reset(self, xp: Any, random: Random, model: Model) -> tuple[Array, Array]:
        scale = self.reset_noise_scale
        return model.qpos0 + random.uniform(-scale, scale, model.nq), random.uniform(-scale, scale, model.nv)

    def observe(self, xp: Any, model: Model, physics: Physics) -> Array:
        return xp.concatenate([physics.qpos, physics.qvel], axis=-1)

    def reward(self, xp: Any, model: Model, physics: Physics, action: Array, velocity: Array) -> Array:
        return xp.where(self.terminated(xp, model, physics), 0.0, 1.0)

    def terminated(self, xp: Any, model: Model, physics: Physics) -> Array:
        finite = xp.isfinite(self.observe(xp, model, physics)).all(axis=-1)
        return ~finite | (xp.abs(physics.qpos[..., 1]) > 0.2)
