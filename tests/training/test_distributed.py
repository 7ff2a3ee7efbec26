"""Learners that torchrun starts learn as one, stop as one, and go on as one."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
from torchrl.checkpoint import CheckpointError

from nclql_torchrl.training import RunDirectory, TrainConfig, train
from nclql_torchrl.training.distributed import Learners, rank_seed

TIMINGS = ("wall_time", "frames_per_second", "updates_per_second")


def rows(run_dir: Path) -> list[dict[str, float]]:
    metrics = RunDirectory.open(run_dir).read_metrics()
    return [{name: value for name, value in row.items() if name not in TIMINGS} for row in metrics]


@pytest.mark.slow
def test_two_learners_learn_as_one_and_resume_exactly(tiny_config: Callable[..., TrainConfig], tmp_path: Path) -> None:
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2"]
    program = Path(__file__).with_name("data_parallel.py")
    process = subprocess.run(
        [*torchrun, str(program), str(tmp_path)],
        env={**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(program.parents[2])},
        capture_output=True,
        text=True,
        timeout=280,
    )
    assert process.returncode == 0, process.stderr[-5000:]
    whole, stopped = rows(tmp_path / "whole"), rows(tmp_path / "stopped")
    assert [row["frames"] for row in whole] == [52, 100, 152, 200, 240]
    assert whole == stopped
    assert whole == rows(tmp_path / "whole" / "rank-1"), "metrics are those of all ranks"
    assert all(row["w"] < 500.0 for row in whole[1:4])
    for path in (tmp_path / "whole", tmp_path / "whole" / "rank-1"):
        assert json.loads((path / "profile.json").read_text())["parts"]["exchange between learners"] > 0.0
    assert process.stderr.count("profile of ") == 1

    config = tiny_config("collector.total_frames=300")
    config.resume = str(tmp_path / "stopped")
    with pytest.raises(CheckpointError, match=r"of 2 learners; there are 1 now. Expected .* --nproc-per-node=2"):
        train(config)


def test_a_single_learner_exchanges_nothing(tiny_config: Callable[..., TrainConfig]) -> None:
    config = tiny_config()
    with Learners() as learners:
        assert learners.localize(config) is config
        assert learners.share(config) is config
        assert learners.average([None]) == [None]
        assert learners.average_row({"frames": 3}) == {"frames": 3}
    assert rank_seed(0, 1) != rank_seed(0, 2) != rank_seed(1, 2)
