"""Swimmer-v5: swim forward in a viscous fluid."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from envs.tasks.locomotion import Runner


@dataclass(frozen=True, kw_only=True)
class Swimmer(Runner):
    """Gymnasium's Swimmer-v5; it never terminates. Options: see :class:`~envs.tasks.locomotion.Runner`."""

    name: ClassVar[str] = "Swimmer-v5"
    track: ClassVar[tuple[int, ...]] = (0, 1)

    xml_file: str = "swimmer.xml"
    frame_skip: int = 4
    ctrl_cost_weight: float = 1e-4
    reset_noise_scale: float = 0.1
