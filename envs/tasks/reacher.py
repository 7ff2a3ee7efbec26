"""Reacher-v5: bring the tip of an arm of two links to a target."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

from envs.task import Array, Model, Physics, Random, Task, first_valid

TARGET_RADIUS = 0.2
TARGET_DRAWS = 32
"""A draw of the target's square misses its disc with probability 0.21; that many do with 5e-22."""


@dataclass(frozen=True, kw_only=True)
class Reacher(Task):
    """Gymnasium's Reacher-v5; it never terminates.

    Args:
        reward_dist_weight: weight of the distance between tip and target, in metres.
        reward_control_weight: weight of the squared norm of the action.
    """

    name: ClassVar[str] = "Reacher-v5"
    reads: ClassVar[tuple[str, ...]] = ("xpos",)

    xml_file: str = "reacher.xml"
    frame_skip: int = 2
    max_episode_steps: int = 50
    reward_dist_weight: float = 1.0
    reward_control_weight: float = 1.0

    def reset(self, xp: Any, random: Random, model: Model) -> tuple[Array, Array]:
        qpos = model.qpos0 + random.uniform(-0.1, 0.1, model.nq)
        targets = random.uniform(-TARGET_RADIUS, TARGET_RADIUS, (TARGET_DRAWS, 2))
        target = first_valid(xp, targets, xp.sqrt(xp.sum(targets**2, axis=-1)) < TARGET_RADIUS)
        qvel = random.uniform(-0.005, 0.005, model.nv)
        return xp.concatenate([qpos[:-2], target]), xp.concatenate([qvel[:-2], xp.zeros(2)])

    def offset(self, model: Model, physics: Physics) -> Array:
        """From target to tip [..., 3], in metres."""
        return physics.xpos[..., model.body("fingertip").id, :] - physics.xpos[..., model.body("target").id, :]

    def observe(self, xp: Any, model: Model, physics: Physics) -> Array:
        angles = physics.qpos[..., :2]
        target, speeds = physics.qpos[..., 2:], physics.qvel[..., :2]
        offset = self.offset(model, physics)[..., :2]
        return xp.concatenate([xp.cos(angles), xp.sin(angles), target, speeds, offset], axis=-1)

    def reward(self, xp: Any, model: Model, physics: Physics, action: Array, velocity: Array) -> Array:
        distance = xp.sqrt(xp.sum(self.offset(model, physics) ** 2, axis=-1))
        effort = xp.sum(xp.square(action), axis=-1)
        return -self.reward_dist_weight * distance - self.reward_control_weight * effort
