"""Room in the buffers of MuJoCo Warp, whose sizes are fixed before the simulation runs."""

from __future__ import annotations

from importlib.util import find_spec
from typing import NamedTuple

from envs.task import Task

NEFC, NJMAX_NNZ, BROADPHASE, NARROWPHASE, CCD = (1 << bit for bit in range(5))
OVERFLOWS = NEFC | NJMAX_NNZ | BROADPHASE | NARROWPHASE | CCD
"""Bits of Warp's ``overflow`` that tell of contacts or constraints lost; others tell of the solver's iterations."""


class Room(NamedTuple):
    """Room for one environment."""

    contacts: int
    """On average: all environments share one buffer."""
    constraints: int
    """Rows: four for a contact with friction, one for a joint at its limit."""


ROOM: dict[str, Room] = {
    "Ant-v5": Room(16, 64),
    "HalfCheetah-v5": Room(16, 64),
    "Hopper-v5": Room(16, 64),
    "Humanoid-v5": Room(32, 128),
    "HumanoidStandup-v5": Room(32, 128),
    "InvertedDoublePendulum-v5": Room(4, 16),
    "InvertedPendulum-v5": Room(4, 16),
    "Pusher-v5": Room(24, 64),
    "Reacher-v5": Room(4, 16),
    "Swimmer-v5": Room(4, 16),
    "Walker2d-v5": Room(16, 64),
}
"""More than twice the most that C MuJoCo had in 1,800 control steps of uniform and bang-bang actions, which was 13
contacts and 37 rows, of HumanoidStandup; Warp also tries pairs of bodies that then do not touch."""

DEFAULT_ROOM = Room(64, 256)
"""Of tasks of one's own."""


def choose_room(task: Task, impl: str, max_contacts: int | None, max_constraints: int | None) -> Room | None:
    """Room in Warp's buffers for one environment; None with JAX, which has no buffers.

    Raises:
        RuntimeError: if Warp is not installed.
        ValueError: for an unknown ``impl``, or sizes without "warp" or below 1.
    """
    if impl not in ("jax", "warp"):
        raise ValueError(f"impl is {impl!r}; expected 'jax' or 'warp'.")
    for name, size in (("max_contacts", max_contacts), ("max_constraints", max_constraints)):
        if size is not None and impl == "jax":
            raise ValueError(f"{name} is {size}; expected it with impl='warp' only: 'jax' has no buffers.")
        if size is not None and size < 1:
            raise ValueError(f"{name} is {size}; expected at least 1.")
    if impl == "jax":
        return None
    if find_spec("warp") is None:
        raise RuntimeError("impl='warp' needs Warp: pip install 'nclql-torchrl[warp]'; or choose impl='jax'.")
    room = ROOM.get(task.name, DEFAULT_ROOM)
    return Room(max_contacts or room.contacts, max_constraints or room.constraints)
