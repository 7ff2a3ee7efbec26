"""How far one step of the mjx engine may be from Gymnasium's: the only place where these numbers are.

An error is |ours - Gymnasium's| / max(1, |Gymnasium's|), of an observation its largest. ``benchmarks/mjx_parity.py``
measured it from 128 states of each task, half visited under uniform and half under bang-bang actions, in episodes of
their own; the tolerances are ten times what it measured, rounded up to one digit. Whether an episode terminates was the
same in every transition.

In float64 what is left is the solver's: where it stops before it has converged, at Gymnasium's own tolerance, C and MJX
stop at different places (Hopper, Walker2d), and Gymnasium's humanoids stop short with PGS. Rewards that sum float32
actions differ by its rounding. In float32 the largest errors come of impacts: a contact that begins in one and not yet
in the other.
"""

from __future__ import annotations

from typing import NamedTuple


class Bounds(NamedTuple):
    """Of the errors of many transitions."""

    max: float
    p95: float
    """The 95th percentile."""
    median: float


class Tolerance(NamedTuple):
    """What a task's steps may be off by."""

    observation: Bounds
    reward: Bounds


TOLERANCES: dict[tuple[str, str, str], Tolerance] = {
    ("Ant-v5", "float32", "fast"): Tolerance(Bounds(9e-01, 3e-04, 2e-05), Bounds(2e-04, 7e-06, 1e-06)),
    ("Ant-v5", "float32", "gymnasium"): Tolerance(Bounds(9e-01, 3e-04, 2e-05), Bounds(2e-04, 7e-06, 1e-06)),
    ("Ant-v5", "float64", "gymnasium"): Tolerance(Bounds(4e-06, 1e-12, 1e-12), Bounds(3e-06, 2e-06, 1e-12)),
    ("HalfCheetah-v5", "float32", "fast"): Tolerance(Bounds(4e-02, 4e-04, 2e-05), Bounds(4e-04, 9e-06, 1e-06)),
    ("HalfCheetah-v5", "float32", "gymnasium"): Tolerance(Bounds(4e-02, 4e-04, 2e-05), Bounds(4e-04, 9e-06, 1e-06)),
    ("HalfCheetah-v5", "float64", "gymnasium"): Tolerance(Bounds(2e-12, 1e-12, 1e-12), Bounds(1e-12, 1e-12, 1e-12)),
    ("Hopper-v5", "float32", "fast"): Tolerance(Bounds(7e-05, 3e-05, 4e-06), Bounds(1e-05, 3e-06, 1e-06)),
    ("Hopper-v5", "float32", "gymnasium"): Tolerance(Bounds(7e-05, 3e-05, 4e-06), Bounds(1e-05, 3e-06, 1e-06)),
    ("Hopper-v5", "float64", "gymnasium"): Tolerance(Bounds(2e-05, 1e-12, 1e-12), Bounds(4e-07, 2e-09, 1e-12)),
    ("Humanoid-v5", "float32", "fast"): Tolerance(Bounds(9e-03, 2e-03, 6e-05), Bounds(4e-03, 4e-05, 2e-06)),
    ("Humanoid-v5", "float32", "gymnasium"): Tolerance(Bounds(9e-03, 2e-03, 6e-05), Bounds(4e-03, 4e-05, 2e-06)),
    ("Humanoid-v5", "float64", "gymnasium"): Tolerance(Bounds(9e-03, 9e-04, 6e-07), Bounds(4e-05, 6e-06, 8e-08)),
    ("HumanoidStandup-v5", "float32", "fast"): Tolerance(Bounds(2e-01, 2e-02, 4e-04), Bounds(3e-05, 3e-06, 1e-06)),
    ("HumanoidStandup-v5", "float32", "gymnasium"): Tolerance(Bounds(2e-01, 2e-02, 4e-04), Bounds(3e-05, 3e-06, 1e-06)),
    ("HumanoidStandup-v5", "float64", "gymnasium"): Tolerance(Bounds(2e-01, 8e-03, 3e-04), Bounds(3e-05, 8e-07, 8e-08)),
    ("InvertedDoublePendulum-v5", "float32", "fast"): Tolerance(
        Bounds(3e-05, 5e-06, 2e-06), Bounds(4e-06, 3e-06, 1e-06)
    ),
    ("InvertedDoublePendulum-v5", "float32", "gymnasium"): Tolerance(
        Bounds(3e-05, 5e-06, 2e-06), Bounds(4e-06, 3e-06, 1e-06)
    ),
    ("InvertedDoublePendulum-v5", "float64", "gymnasium"): Tolerance(
        Bounds(1e-12, 1e-12, 1e-12), Bounds(1e-12, 1e-12, 1e-12)
    ),
    ("InvertedPendulum-v5", "float32", "fast"): Tolerance(Bounds(4e-06, 2e-06, 1e-06), Bounds(1e-06, 1e-06, 1e-06)),
    ("InvertedPendulum-v5", "float32", "gymnasium"): Tolerance(
        Bounds(4e-06, 2e-06, 1e-06), Bounds(1e-06, 1e-06, 1e-06)
    ),
    ("InvertedPendulum-v5", "float64", "gymnasium"): Tolerance(
        Bounds(1e-12, 1e-12, 1e-12), Bounds(1e-12, 1e-12, 1e-12)
    ),
    ("Pusher-v5", "float32", "fast"): Tolerance(Bounds(3e-04, 6e-05, 4e-06), Bounds(2e-06, 1e-06, 1e-06)),
    ("Pusher-v5", "float32", "gymnasium"): Tolerance(Bounds(3e-04, 6e-05, 4e-06), Bounds(2e-06, 1e-06, 1e-06)),
    ("Pusher-v5", "float64", "gymnasium"): Tolerance(Bounds(1e-12, 1e-12, 1e-12), Bounds(1e-12, 1e-12, 1e-12)),
    ("Reacher-v5", "float32", "fast"): Tolerance(Bounds(3e-05, 2e-05, 2e-06), Bounds(2e-06, 1e-06, 1e-06)),
    ("Reacher-v5", "float32", "gymnasium"): Tolerance(Bounds(3e-05, 2e-05, 2e-06), Bounds(2e-06, 1e-06, 1e-06)),
    ("Reacher-v5", "float64", "gymnasium"): Tolerance(Bounds(1e-12, 1e-12, 1e-12), Bounds(9e-07, 5e-07, 1e-12)),
    ("Swimmer-v5", "float32", "fast"): Tolerance(Bounds(7e-05, 2e-05, 3e-06), Bounds(4e-06, 3e-06, 1e-06)),
    ("Swimmer-v5", "float32", "gymnasium"): Tolerance(Bounds(7e-05, 2e-05, 3e-06), Bounds(4e-06, 3e-06, 1e-06)),
    ("Swimmer-v5", "float64", "gymnasium"): Tolerance(Bounds(1e-12, 1e-12, 1e-12), Bounds(2e-10, 4e-11, 1e-12)),
    ("Walker2d-v5", "float32", "fast"): Tolerance(Bounds(1e-03, 4e-04, 4e-05), Bounds(4e-05, 2e-05, 2e-06)),
    ("Walker2d-v5", "float32", "gymnasium"): Tolerance(Bounds(1e-03, 4e-04, 4e-05), Bounds(4e-05, 2e-05, 2e-06)),
    ("Walker2d-v5", "float64", "gymnasium"): Tolerance(Bounds(6e-05, 1e-12, 1e-12), Bounds(2e-06, 1e-12, 1e-12)),
}
"""Of a task in a type with a solver."""
