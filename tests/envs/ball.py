"""A ball that rolls along a floor: the smallest task with a track, whose model the tests change."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

from envs.task import Task, flatten

MODEL = """
<mujoco>
  <option timestep="0.01"/>
  <worldbody>
    <geom name="floor" type="plane" size="9 9 1" condim="1"/>
    <body name="ball" pos="0 0 0.1">
      <joint name="x" type="slide" axis="1 0 0"/>
      <joint name="z" type="slide" axis="0 0 1"/>
      <geom type="sphere" size="0.1" mass="1" condim="1"/>
    </body>
  </worldbody>
  <actuator>
    <motor name="lift" joint="z" gear="20" ctrlrange="-1 1"/>
  </actuator>
</mujoco>
"""


WALL = '<geom type="box" pos="1 0 0.5" size="0.1 1 0.5"/>'


def write_model(directory: Path, old: str = "", new: str = "") -> str:
    """The path of the model with ``old`` replaced by ``new``."""
    assert old in MODEL
    path = directory / "ball.xml"
    path.write_text(MODEL.replace(old, new, 1))
    return str(path)


@dataclass(frozen=True, kw_only=True)
class Ball(Task):
    """Observes all but how far it has come."""

    name: ClassVar[str] = "Ball-v0"
    track: ClassVar[tuple[int, ...]] = (0,)

    frame_skip: int = 1

    @property
    def observes_track(self) -> bool:
        return False

    def reset(self, xp: Any, random: Any, model: Any) -> tuple[Any, Any]:
        return random.uniform(0.0, 0.1, model.nq), random.uniform(-1.0, 1.0, model.nv)

    def observe(self, xp: Any, model: Any, physics: Any) -> Any:
        return xp.concatenate([physics.qpos[..., 1:], physics.qvel], axis=-1)

    def reward(self, xp: Any, model: Any, physics: Any, action: Any, velocity: Any) -> Any:
        return velocity[..., 0]


@dataclass(frozen=True, kw_only=True)
class FeelingBall(Ball):
    """Observes what MuJoCo computes only for those who ask."""

    name: ClassVar[str] = "FeelingBall-v0"
    reads: ClassVar[tuple[str, ...]] = ("cacc", "cfrc_int")

    def observe(self, xp: Any, model: Any, physics: Any) -> Any:
        return xp.concatenate([flatten(physics.cacc), flatten(physics.cfrc_int)], axis=-1)
