"""Humanoid-v5: run forward on two legs, with seventeen actuators."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any, ClassVar

from envs.task import Array, Model, Physics, flatten, within
from envs.tasks.locomotion import HealthyRunner, Robot

BODY_READS = ("cinert", "cvel", "qfrc_actuator", "cfrc_ext")
"""Fields that the humanoids observe."""


@dataclass(frozen=True, kw_only=True)
class BodyObservation(Robot):
    """The observation of Humanoid and HumanoidStandup.

    Args:
        include_cinert_in_observation: whether the bodies' inertia about the centre of mass is observed.
        include_cvel_in_observation: whether the bodies' velocities are observed.
        include_qfrc_actuator_in_observation: whether the actuators' forces at the joints are observed.
        include_cfrc_ext_in_observation: whether the external forces on the bodies are observed.
    """

    include_cinert_in_observation: bool = True
    include_cvel_in_observation: bool = True
    include_qfrc_actuator_in_observation: bool = True
    include_cfrc_ext_in_observation: bool = True

    def observe(self, xp: Any, model: Model, physics: Physics) -> Array:
        # Neither the world's entries nor the forces at the root, which has no actuator.
        parts = [
            (True, self.seen_positions(physics)),
            (True, physics.qvel),
            (self.include_cinert_in_observation, flatten(physics.cinert[..., 1:, :])),
            (self.include_cvel_in_observation, flatten(physics.cvel[..., 1:, :])),
            (self.include_qfrc_actuator_in_observation, physics.qfrc_actuator[..., 6:]),
            (self.include_cfrc_ext_in_observation, flatten(physics.cfrc_ext[..., 1:, :])),
        ]
        return xp.concatenate([part for included, part in parts if included], axis=-1)


@dataclass(frozen=True, kw_only=True)
class Humanoid(HealthyRunner, BodyObservation):
    """Gymnasium's Humanoid-v5. Further options: see :class:`BodyObservation` and
    :class:`~envs.tasks.locomotion.HealthyRunner`.

    The engine ``mjx`` solves its contacts by Newton's method, since MJX has no PGS; ``envs/engines/mjx_parity.py``
    bounds the difference.

    Args:
        contact_cost_weight: weight of the squared norm of the external forces.
        contact_cost_range: what the contact cost is clipped to.
        healthy_z_range: what the torso's height must lie in, in metres.
    """

    name: ClassVar[str] = "Humanoid-v5"
    reads: ClassVar[tuple[str, ...]] = ("xipos", *BODY_READS)
    track: ClassVar[tuple[int, ...]] = (0, 1)

    xml_file: str = "humanoid.xml"
    frame_skip: int = 5
    forward_reward_weight: float = 1.25
    ctrl_cost_weight: float = 0.1
    contact_cost_weight: float = 5e-7
    contact_cost_range: tuple[float, float] = (-math.inf, 10.0)
    healthy_reward: float = 5.0
    healthy_z_range: tuple[float, float] = (1.0, 2.0)
    reset_noise_scale: float = 0.01

    def position(self, xp: Any, model: Model, physics: Physics) -> Array:
        """Of the centre of mass."""
        share = model.body_mass / model.body_mass.sum()
        return xp.sum(share[:, None] * physics.xipos, axis=-2)[..., :2]

    def healthy(self, xp: Any, model: Model, physics: Physics) -> Array:
        return within(xp, physics.qpos[..., 2], self.healthy_z_range)

    def costs(self, xp: Any, model: Model, physics: Physics, action: Array) -> Array:
        contact = self.contact_cost_weight * xp.sum(xp.square(physics.cfrc_ext), axis=(-2, -1))
        return super().costs(xp, model, physics, action) + xp.clip(contact, *self.contact_cost_range)
