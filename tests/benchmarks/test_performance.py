"""The benchmarks of speed, memory and checkpoints run, and report what their pages are made of."""

from __future__ import annotations

import json
import math
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from benchmarks import checkpoints, engines, memory, overlap, throughput, update

TINY = (
    "sampler.execution=eager",
    "sampler.num_levels=2",
    "sampler.steps_per_level=1",
    "network.hidden_sizes=[8]",
    "optim.batch_size=4",
    "replay_buffer.size=100",
    "device=cpu",
)


def numbers(row: Any) -> Iterator[float]:
    """All numbers in a row."""
    if isinstance(row, dict | list):
        for value in row.values() if isinstance(row, dict) else row:
            yield from numbers(value)
    elif isinstance(row, int | float):
        yield float(row)


def test_throughput(tmp_path: Path) -> None:
    config = throughput.configure("cpu", 2, ("env.engine=mujoco", *TINY))
    row = throughput.measure(config, updates_per_step=1, seconds=0.05)
    rates = {f"{of}_steps_per_second" for of in ("simulation", "collection", "loop")}
    assert {*rates, "loop_updates_per_second", "learning_updates_per_second"} < row.keys()
    assert all(0.0 < row[name] < math.inf for name in row if name.endswith("per_second"))
    throughput.draw([row], tmp_path / "throughput.png")
    assert (tmp_path / "throughput.png").stat().st_size > 10_000


@pytest.mark.slow
def test_overlap() -> None:
    row = overlap.measure(2, rounds=1, seconds=0.05, threads=1, overrides=TINY)
    assert row.keys() == {
        "num_envs", "threads", "steps_per_second", "updates_per_second", "async_to_direct", "of_each_round",
    }  # fmt: skip
    assert all(0.0 < number < math.inf for number in numbers(row))


def test_update(monkeypatch: pytest.MonkeyPatch) -> None:
    make_actor, make_update = update.make_actor, update.make_update
    monkeypatch.setattr(update, "make_actor", lambda *sizes, execution: make_actor(*sizes, execution="eager"))
    monkeypatch.setattr(update, "make_update", lambda *arguments: make_update(arguments[0], arguments[1], "eager"))
    row = update.measure(batch_size=2, observation_dim=3, action_dim=1, rounds=1)
    assert row["figures"].keys() == {"jax sampler", "sampler", "update", "eager update"}
    for figures in row["figures"].values():
        assert {"median_ms", "to_sampler", "cpu_to_jax_sampler"} < figures.keys()
    assert all(0.0 < number < math.inf for number in numbers(row))


@pytest.mark.slow
def test_memory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    tiny = ["sampler.execution=eager", "checkpoint.interval=300", "logger.eval_interval=300", "logger.log_interval=20"]
    run_options = memory.run_options
    monkeypatch.setattr(memory, "run_options", lambda *arguments: [*run_options(*arguments), *tiny])
    monkeypatch.setattr(sys, "argv", ["memory", "updates=400", "warmup=1", f"directory={tmp_path}"])
    memory.main()
    result = json.loads((tmp_path / "mujoco.json").read_text())
    assert result.keys() == {"engine", "task", "updates", "growth_after_updates", "growth", "machine", "samples"}
    assert math.isfinite(result["growth"])
    assert all(sample["resident_mb"] > 50 for sample in result["samples"])


def test_checkpoints(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in {"CAPACITY": 200, "NEW": 20, "ROUNDS": 2}.items():
        monkeypatch.setattr(checkpoints, name, value)
    row = checkpoints.measure(tmp_path)
    seconds = {"full_seconds", "incremental_seconds", "all_incremental_seconds", "load_seconds"}
    assert row.keys() == {*seconds, "megabytes_of_two_checkpoints"}
    assert len(row["all_incremental_seconds"]) == 2
    assert all(0.0 <= number < math.inf for number in numbers(row))


def test_engines() -> None:
    rows = engines.measure("Hopper-v5", 2, "cpu", ("mujoco",), rounds=2, seconds=0.01)
    assert [row["system"] for row in rows] == ["mujoco", "mujoco env", "mujoco collector"]
    assert all({"start_seconds", "milliseconds", "steps_per_second", "round_milliseconds"} < row.keys() for row in rows)
    ((*_, compared, ratio),) = engines.ratios(rows)
    assert compared == "mujoco env / mujoco" and 0.0 < ratio < math.inf
