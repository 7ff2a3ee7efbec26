"""A task of one's own: bring a cart to a place on its rail.

From this directory every engine steps it, and so does a training run (what it learns is checked on Gymnasium)::

    cd examples
    nclql-train preset=cpu env.task=cart:CartToGoal-v0 collector.total_frames=20000
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

from envs import Task, register_task


@register_task
@dataclass(frozen=True, kw_only=True)
class CartToGoal(Task):
    """Rewards being near the goal; ends at the rail's ends.

    Args:
        goal: where to go, in metres.
    """

    name: ClassVar[str] = "CartToGoal-v0"
    # What is read beside qpos and qvel is named, so that engines compute no more than that.
    reads: ClassVar[tuple[str, ...]] = ("xpos",)

    xml_file: str = str(Path(__file__).with_name("cart.xml"))
    frame_skip: int = 5
    max_episode_steps: int = 100
    goal: float = 1.0

    def reset(self, xp: Any, random: Any, model: Any) -> tuple[Any, Any]:
        return random.uniform(-1.0, 1.0, model.nq), 0.1 * random.standard_normal(model.nv)

    # Index from the right: NumPy calls this for a whole batch, JAX for one environment.
    def observe(self, xp: Any, model: Any, physics: Any) -> Any:
        return xp.concatenate([physics.qpos - self.goal, physics.qvel], axis=-1)

    def reward(self, xp: Any, model: Any, physics: Any, action: Any, velocity: Any) -> Any:
        distance = xp.abs(physics.xpos[..., model.body("cart").id, 0] - self.goal)
        return 1.0 - distance - 0.01 * xp.sum(xp.square(action), axis=-1)

    def terminated(self, xp: Any, model: Any, physics: Any) -> Any:
        return xp.abs(physics.qpos[..., 0]) > 1.9
