"""HalfCheetah-v5: run forward, with little control effort."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

from envs.task import Array, Model, Random
from envs.tasks.locomotion import Runner


@dataclass(frozen=True, kw_only=True)
class HalfCheetah(Runner):
    """Gymnasium's HalfCheetah-v5; it never terminates. Options: see :class:`~envs.tasks.locomotion.Runner`.

    Examples:
        >>> HalfCheetah(ctrl_cost_weight=0.0).max_episode_steps
        1000
    """

    name: ClassVar[str] = "HalfCheetah-v5"
    track: ClassVar[tuple[int, ...]] = (0,)

    xml_file: str = "half_cheetah.xml"
    frame_skip: int = 5
    ctrl_cost_weight: float = 0.1
    reset_noise_scale: float = 0.1

    def reset(self, xp: Any, random: Random, model: Model) -> tuple[Array, Array]:
        # Positions are drawn first, as Gymnasium does: the same generator gives the same state.
        qpos = model.qpos0 + self.reset_noise(random, model.nq)
        return qpos, self.reset_noise_scale * random.standard_normal(model.nv)
