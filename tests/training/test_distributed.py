"""Learners that torchrun starts learn as one, stop as one, and go on as one."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest
import torch.distributed as dist
from torchrl.checkpoint import CheckpointError

from nclql_torchrl.training import RunDirectory, TrainConfig, distributed, train
from nclql_torchrl.training.distributed import Learners, rank_seed
from tests.training.sockets import listening_addresses

LOOPBACK_ONLY = ("--rdzv-backend=c10d", "--rdzv-conf=store_type=file")
"""With ``TORCH_DISABLE_SHARE_RDZV_TCP_STORE=1``: what docs/distributed.md says."""

TIMINGS = ("wall_time", "frames_per_second", "updates_per_second")


def rows(run_dir: Path) -> list[dict[str, float]]:
    metrics = RunDirectory.open(run_dir).read_metrics()
    return [{name: value for name, value in row.items() if name not in TIMINGS} for row in metrics]


@pytest.mark.slow
def test_two_learners_learn_as_one_and_resume_exactly(tiny_config: Callable[..., TrainConfig], tmp_path: Path) -> None:
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node=2"]
    program = Path(__file__).with_name("data_parallel.py")
    environment = {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(program.parents[2])}
    addresses: set[str] = set()
    with (tmp_path / "errors").open("w") as errors:
        process = subprocess.Popen(
            [*torchrun, *LOOPBACK_ONLY, str(program), str(tmp_path)],
            env={**os.environ, "TORCH_DISABLE_SHARE_RDZV_TCP_STORE": "1", **environment},
            stdout=subprocess.DEVNULL,
            stderr=errors,
        )
        try:
            deadline = time.monotonic() + 280
            while process.poll() is None and time.monotonic() < deadline:
                addresses |= listening_addresses(process.pid)
                time.sleep(0.25)
        finally:
            process.terminate()
    said = (tmp_path / "errors").read_text()
    assert process.wait(30) == 0, said[-5000:]
    assert addresses == {"127.0.0.1"}
    whole, stopped = rows(tmp_path / "whole"), rows(tmp_path / "stopped")
    assert [row["frames"] for row in whole] == [52, 100, 152, 200, 240]
    assert whole == stopped
    assert whole == rows(tmp_path / "whole" / "rank-1"), "metrics are those of all ranks"
    # From the third row on: three-step returns come later, and so do the updates that tune w.
    assert all(row["w"] < 500.0 for row in whole[2:4])
    for path in (tmp_path / "whole", tmp_path / "whole" / "rank-1"):
        assert json.loads((path / "profile.json").read_text())["parts"]["exchange between learners"] > 0.0
    assert said.count("profile of ") == 1

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


def test_a_port_that_torchrun_opens_to_everybody_is_mentioned(monkeypatch: pytest.MonkeyPatch) -> None:
    launched = {"RANK": 0, "LOCAL_RANK": 0, "WORLD_SIZE": 2, "LOCAL_WORLD_SIZE": 2, "MASTER_PORT": 29500}
    for name, value in {**launched, "TORCHELASTIC_USE_AGENT_STORE": True}.items():
        monkeypatch.setenv(name, str(value))
    for name in ("GLOO_SOCKET_IFNAME", "NCCL_SOCKET_IFNAME"):
        monkeypatch.setenv(name, "")  # restored afterwards
        monkeypatch.delenv(name)
    given: dict[str, object] = {}
    monkeypatch.setattr(dist, "init_process_group", lambda backend, **options: given.update(options))
    monkeypatch.setattr(distributed.atexit, "register", lambda function: None)
    with pytest.warns(UserWarning, match=r"listens on all interfaces.*port 29500.*docs/distributed.md"):
        distributed._init_process_group()
    assert given["store"] is None and os.environ["GLOO_SOCKET_IFNAME"] == "lo"
