"""What two runs are compared by."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torchrl.data import LazyTensorStorage, TensorDictReplayBuffer

from nclql_torchrl.training import RunDirectory
from nclql_torchrl.training.checkpoint import latest_checkpoint, make_checkpoint
from nclql_torchrl.training.config import load_config
from nclql_torchrl.training.replay_state import ReplayState

TIMINGS = ("wall_time", "frames_per_second", "updates_per_second")


def rows_without_timings(run_dir: Path) -> list[dict[str, float]]:
    rows = RunDirectory.open(run_dir).read_metrics()
    return [{name: value for name, value in row.items() if name not in TIMINGS} for row in rows]


def final_state(run_dir: Path) -> dict[str, Any]:
    """Everything in the last checkpoint that training changes, as plain values."""

    class Collect:
        def state_dict(self) -> dict[str, Any]:
            return {}

        def load_state_dict(self, state: dict[str, Any]) -> None:
            self.state = state

    parts = {name: Collect() for name in ("loss", "optimizer", "rng", "window")}
    config = load_config(str(RunDirectory.open(run_dir).config))
    replay_buffer = TensorDictReplayBuffer(storage=LazyTensorStorage(config.replay_buffer.size), batch_size=4)
    checkpoint = make_checkpoint(replay_buffer=ReplayState(replay_buffer), **parts)
    checkpoint.load(latest_checkpoint(run_dir / "checkpoints"))
    replay = {"transitions": replay_buffer[:].to_dict(), "written": replay_buffer.write_count}
    return {"replay": replay, **{name: part.state for name, part in parts.items()}}


def assert_identical(first: Any, second: Any, where: str = "") -> None:
    assert type(first) is type(second), where
    if isinstance(first, torch.Tensor):
        assert torch.equal(first, second), where
    elif isinstance(first, dict):
        assert first.keys() == second.keys(), where
        for key in first:
            assert_identical(first[key], second[key], f"{where}/{key}")
    elif isinstance(first, list | tuple):
        assert len(first) == len(second), where
        for index, (a, b) in enumerate(zip(first, second, strict=True)):
            assert_identical(a, b, f"{where}/{index}")
    else:
        assert first == second, where


def assert_same_run(first: Path, second: Path) -> None:
    """Same metrics, but for times, and same parameters, optimizer, replay and random states, bit for bit."""
    assert rows_without_timings(first) == rows_without_timings(second)
    assert_identical(final_state(first), final_state(second))
