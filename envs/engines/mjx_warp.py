"""Sizes of MuJoCo Warp's buffers, which are fixed before the simulation runs."""

from __future__ import annotations

from typing import NamedTuple

NEFC, NJMAX_NNZ, BROADPHASE, NARROWPHASE, CCD = (1 << bit for bit in range(5))
OVERFLOWS = NEFC | NJMAX_NNZ | BROADPHASE | NARROWPHASE | CCD
"""Bits of Warp's ``overflow`` that tell of contacts or constraints lost; others tell of the solver's iterations."""


class WarpBuffers(NamedTuple):
    """What Warp has room for."""

    contacts: int
    """Contacts of all environments together."""
    constraints_per_env: int
    """Rows of constraints of one environment: four for a contact with friction, one for a joint at its limit."""


class Room(NamedTuple):
    """Room for one environment."""

    contacts: int
    constraints: int


ROOM: dict[str, Room] = {}
"""Twice the most seen in C MuJoCo."""

DEFAULT_ROOM = Room(64, 256)
