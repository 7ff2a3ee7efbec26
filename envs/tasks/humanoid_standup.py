"""HumanoidStandup-v5: stand up from lying down."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any, ClassVar

from envs.task import Array, Model, Physics
from envs.tasks.humanoid import BODY_READS, BodyObservation


@dataclass(frozen=True, kw_only=True)
class HumanoidStandup(BodyObservation):
    """Gymnasium's HumanoidStandup-v5; it never terminates. Further options: see
    :class:`~envs.tasks.humanoid.BodyObservation` and :class:`~envs.tasks.locomotion.Robot`.

    The engine ``mjx`` solves its contacts by Newton's method, since MJX has no PGS; ``envs/engines/mjx_parity.py``
    bounds the difference.

    Args:
        uph_cost_weight: accepted for Gymnasium's sake, which ignores it too.
        impact_cost_weight: weight of the squared norm of the external forces.
        impact_cost_range: what the impact cost is clipped to.
    """

    name: ClassVar[str] = "HumanoidStandup-v5"
    reads: ClassVar[tuple[str, ...]] = BODY_READS
    track: ClassVar[tuple[int, ...]] = (0, 1)

    xml_file: str = "humanoidstandup.xml"
    frame_skip: int = 5
    uph_cost_weight: float = 1.0
    ctrl_cost_weight: float = 0.1
    impact_cost_weight: float = 5e-7
    impact_cost_range: tuple[float, float] = (-math.inf, 10.0)
    reset_noise_scale: float = 0.01

    def costs(self, xp: Any, model: Model, physics: Physics, action: Array) -> Array:
        impact = self.impact_cost_weight * xp.sum(xp.square(physics.cfrc_ext), axis=(-2, -1))
        return super().costs(xp, model, physics, action) + xp.clip(impact, *self.impact_cost_range)

    def reward(self, xp: Any, model: Model, physics: Physics, action: Array, velocity: Array) -> Array:
        # Gymnasium divides the height itself by the physics step: a "velocity" from the ground up.
        height = physics.qpos[..., 2] / float(model.opt.timestep)
        return height - self.costs(xp, model, physics, action) + 1.0
