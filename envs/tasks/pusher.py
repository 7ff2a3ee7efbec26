"""Pusher-v5: push a cylinder to a goal with an arm of seven joints."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

from envs.task import Array, Model, Physics, Random, Task, first_valid

GOAL_DISTANCE = 0.17
CYLINDER_DRAWS = 48
"""A draw of the cylinder's place is too near to the goal with probability 0.38; that many are with 6e-21."""


@dataclass(frozen=True, kw_only=True)
class Pusher(Task):
    """Gymnasium's Pusher-v5; it never terminates.

    Args:
        reward_near_weight: weight of the distance between fingertip and cylinder, in metres.
        reward_dist_weight: weight of the distance between cylinder and goal, in metres.
        reward_control_weight: weight of the squared norm of the action.
    """

    name: ClassVar[str] = "Pusher-v5"
    reads: ClassVar[tuple[str, ...]] = ("xpos",)

    xml_file: str = "pusher_v5.xml"
    frame_skip: int = 5
    max_episode_steps: int = 100
    reward_near_weight: float = 0.5
    reward_dist_weight: float = 1.0
    reward_control_weight: float = 0.1

    def reset(self, xp: Any, random: Random, model: Model) -> tuple[Array, Array]:
        x = random.uniform(-0.3, 0.0, (CYLINDER_DRAWS, 1))
        y = random.uniform(-0.2, 0.2, (CYLINDER_DRAWS, 1))
        places = xp.concatenate([x, y], axis=-1)
        cylinder = first_valid(xp, places, xp.sqrt(xp.sum(places**2, axis=-1)) > GOAL_DISTANCE)
        qvel = random.uniform(-0.005, 0.005, model.nv)
        qpos = xp.concatenate([xp.asarray(model.qpos0[:-4]), cylinder, xp.zeros(2)])
        return qpos, xp.concatenate([qvel[:-4], xp.zeros(4)])

    def observe(self, xp: Any, model: Model, physics: Physics) -> Array:
        bodies = [physics.xpos[..., model.body(name).id, :] for name in ("tips_arm", "object", "goal")]
        return xp.concatenate([physics.qpos[..., :7], physics.qvel[..., :7], *bodies], axis=-1)

    def reward(self, xp: Any, model: Model, physics: Physics, action: Array, velocity: Array) -> Array:
        def distance_of_object_to(name: str) -> Array:
            offset = physics.xpos[..., model.body("object").id, :] - physics.xpos[..., model.body(name).id, :]
            return xp.sqrt(xp.sum(offset**2, axis=-1))

        near, far = distance_of_object_to("tips_arm"), distance_of_object_to("goal")
        effort = xp.sum(xp.square(action), axis=-1)
        return -self.reward_near_weight * near - self.reward_dist_weight * far - self.reward_control_weight * effort
