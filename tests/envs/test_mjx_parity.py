"""One step of the mjx engine is Gymnasium's within the tolerances of ``envs/engines/mjx_parity.py``.

In float32 a few tasks are compiled and compared here; the others take minutes, and are compared where the environment
variable MJX_PARITY_ALL is set, or by ``python -m benchmarks.mjx_parity``.
"""

from __future__ import annotations

import json
import os
from pathlib import Path

import pytest
import torch

from benchmarks.mjx_parity import compare, tolerance
from envs.engines.mjx import MJXEngine
from envs.engines.mjx_parity import TOLERANCES
from envs.tasks import GYMNASIUM_TASKS
from envs.tasks.half_cheetah import HalfCheetah
from tests.envs.transitions import gymnasium_transitions

MEASURED = json.loads((Path(__file__).parents[2] / "benchmarks/results/mjx/parity.json").read_text())
IN_BRIEF = {
    ("Ant-v5", "float32", "gymnasium"),  # steep capsules on the ground, external forces
    ("HalfCheetah-v5", "float32", "gymnasium"),
    ("Hopper-v5", "float32", "fast"),  # falls
    ("InvertedDoublePendulum-v5", "float64", "gymnasium"),  # constraint forces
    ("Reacher-v5", "float32", "gymnasium"),  # positions of bodies
    ("Swimmer-v5", "float64", "gymnasium"),
}
LISTED = {(row["task"], row["dtype"], row["solver"]) for row in MEASURED}


@pytest.mark.slow
@pytest.mark.parametrize(("task", "dtype", "solver"), sorted(LISTED))
def test_a_step_is_gymnasiums(task: str, dtype: str, solver: str) -> None:
    if (task, dtype, solver) not in IN_BRIEF and not os.environ.get("MJX_PARITY_ALL"):
        pytest.skip("compiles for long; set MJX_PARITY_ALL=1")
    measured = compare(task, 128, dtype=dtype, solver=solver)
    allowed = TOLERANCES[task, dtype, solver]
    assert measured["terminated"] == 0
    for quantity, bounds in allowed._asdict().items():
        for statistic, bound in bounds._asdict().items():
            assert measured[quantity][statistic] <= bound, (quantity, statistic)


@pytest.mark.slow
def test_a_step_far_from_the_origin_is_as_good() -> None:
    expected = gymnasium_transitions("HalfCheetah-v5", 128)
    qpos = torch.from_numpy(expected["qpos"]).clone()
    engine = MJXEngine(HalfCheetah(), 128)

    def velocities(distance: float) -> torch.Tensor:
        qpos[:, 0] = distance
        engine.set_state(qpos, torch.from_numpy(expected["qvel"]))
        step = engine.step(torch.from_numpy(expected["action"]))
        return torch.cat([step.next_observation, step.reward.unsqueeze(-1)], -1)

    # Known to 0.03 mm there, a position would make an error of 0.6 mm/s of the reward's velocity.
    assert torch.equal(velocities(500.0), velocities(0.0))


def test_tolerances_follow_from_what_was_measured() -> None:
    assert set(TOLERANCES) == LISTED
    for row in MEASURED:
        allowed = TOLERANCES[row["task"], row["dtype"], row["solver"]]
        assert row["states"] >= 100 and row["terminated"] == 0
        for quantity, bounds in allowed._asdict().items():
            for statistic, bound in bounds._asdict().items():
                assert bound == tolerance(row[quantity][statistic], row["dtype"]), row


def test_every_task_of_gymnasium_is_listed() -> None:
    names = {task.name for task in GYMNASIUM_TASKS}
    for dtype, solver in (("float32", "gymnasium"), ("float32", "fast"), ("float64", "gymnasium")):
        assert {task for task in names if (task, dtype, solver) in LISTED} == names
