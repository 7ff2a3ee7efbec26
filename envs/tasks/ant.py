"""Ant-v5: run forward on four legs; contact forces are observed and cost."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

from envs.task import Array, Model, Physics, Random, flatten
from envs.tasks.locomotion import HealthyRunner


@dataclass(frozen=True, kw_only=True)
class Ant(HealthyRunner):
    """Gymnasium's Ant-v5. Further options: see :class:`~envs.tasks.locomotion.HealthyRunner`.

    Args:
        contact_cost_weight: weight of the squared norm of the contact forces.
        main_body: name or number of the body whose velocity counts.
        healthy_z_range: what the torso's height must lie in, in metres.
        contact_force_range: what contact forces are clipped to, in newtons and newton metres.
        include_cfrc_ext_in_observation: whether contact forces are observed.
    """

    name: ClassVar[str] = "Ant-v5"
    reads: ClassVar[tuple[str, ...]] = ("xpos", "cfrc_ext")
    track: ClassVar[tuple[int, ...]] = (0, 1)

    xml_file: str = "ant.xml"
    frame_skip: int = 5
    ctrl_cost_weight: float = 0.5
    contact_cost_weight: float = 5e-4
    healthy_reward: float = 1.0
    main_body: int | str = 1
    healthy_z_range: tuple[float, float] = (0.2, 1.0)
    contact_force_range: tuple[float, float] = (-1.0, 1.0)
    reset_noise_scale: float = 0.1
    include_cfrc_ext_in_observation: bool = True

    def reset(self, xp: Any, random: Random, model: Model) -> tuple[Array, Array]:
        qpos = model.qpos0 + self.reset_noise(random, model.nq)
        return qpos, self.reset_noise_scale * random.standard_normal(model.nv)

    def position(self, xp: Any, model: Model, physics: Physics) -> Array:
        return physics.xpos[..., model.body(self.main_body).id, :2]

    def contact_forces(self, xp: Any, physics: Physics) -> Array:
        """Forces and torques on every body, clipped: [..., bodies, 6]."""
        return xp.clip(physics.cfrc_ext, *self.contact_force_range)

    def observe(self, xp: Any, model: Model, physics: Physics) -> Array:
        parts = [self.seen_positions(physics), physics.qvel]
        if self.include_cfrc_ext_in_observation:
            # Not the world's.
            parts.append(flatten(self.contact_forces(xp, physics)[..., 1:, :]))
        return xp.concatenate(parts, axis=-1)

    def healthy(self, xp: Any, model: Model, physics: Physics) -> Array:
        low, high = self.healthy_z_range
        height = physics.qpos[..., 2]
        finite = xp.isfinite(physics.qpos).all(axis=-1) & xp.isfinite(physics.qvel).all(axis=-1)
        return finite & (low <= height) & (height <= high)

    def costs(self, xp: Any, model: Model, physics: Physics, action: Array) -> Array:
        contact = self.contact_cost_weight * xp.sum(xp.square(self.contact_forces(xp, physics)), axis=(-2, -1))
        return super().costs(xp, model, physics, action) + contact
