"""On a Ray cluster a worker may die, and the run goes on."""

from __future__ import annotations

import os
import signal
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any, cast

import pytest
import ray
from ray.exceptions import (
    NodeDiedError,
    ObjectFetchTimedOutError,
    ObjectLostError,
    OutOfMemoryError,
    OwnerDiedError,
    RayActorError,
    RayError,
)

from nclql_torchrl.training import ConfigError, Interrupted, RunDirectory, TrainConfig, train, training
from nclql_torchrl.training.ray_workers import RayWorkers, connect
from nclql_torchrl.training.training import updates_due
from tests.training.sockets import listening_addresses


@pytest.mark.slow
def test_a_run_replaces_a_worker_that_dies_and_logs_what_was_lost(
    tiny_config: Callable[..., TrainConfig], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = tiny_config(
        "collector.backend=ray",
        "collector.num_workers=2",
        "collector.total_frames=1000000",
        "logger.eval_interval=1000000",
        "checkpoint.interval=1000000",
    )
    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    make_collector, append, made = training.make_collector, RunDirectory.append_metrics, []

    def make(*arguments: Any) -> Any:
        made.append(make_collector(*arguments))
        return made[0]

    def killed_and_replaced(run: RunDirectory, row: dict[str, float]) -> None:
        """Kills a worker after the first row, and stops the run when its successor has delivered."""
        append(run, row)
        (workers,) = made
        assert isinstance(workers, RayWorkers)
        if row["frames"] == 50:
            assert listening_addresses() == {"127.0.0.1"}
            worker = workers._workers[0]
            os.kill(ray.get(worker.__ray_call__.remote(lambda self: os.getpid())), signal.SIGKILL)
        if workers._deaths[0] == 1 and workers._deaths_in_a_row[0] == 0:
            os.kill(os.getpid(), signal.SIGTERM)

    monkeypatch.setattr(training, "make_collector", make)
    monkeypatch.setattr(RunDirectory, "append_metrics", killed_and_replaced)
    with warnings.catch_warnings(record=True) as caught, pytest.raises(Interrupted) as interruption:
        train(config)
    assert any("worker 0 died and is replaced; the 2 transitions" in str(warning.message) for warning in caught)
    assert interruption.value.signal_number == signal.SIGTERM
    assert not ray.is_initialized()
    rows = RunDirectory.open(tmp_path / "run").read_metrics()
    assert rows[0]["lost_frames"] == 0 and rows[-1]["lost_frames"] == 2
    for row in rows:
        assert row["updates"] == updates_due(config, int(row["frames"]))


@pytest.mark.parametrize(
    "error",
    [
        RayActorError(),
        # The machine is lost: with what was collected there, while it is fetched, or with who knew of it.
        ObjectLostError("00", b"", ""),
        ObjectFetchTimedOutError("00", b"", ""),
        OwnerDiedError("00", b"", ""),
        NodeDiedError("lost"),
        OutOfMemoryError("killed"),
    ],
    ids=lambda error: type(error).__name__,
)
def test_a_worker_that_always_dies_is_an_error(
    tiny_config: Callable[..., TrainConfig],
    make_actor: Callable[..., Any],
    monkeypatch: pytest.MonkeyPatch,
    error: RayError,
) -> None:
    killed: list[Any] = []
    monkeypatch.setattr(ray, "put", lambda weights: weights)
    monkeypatch.setattr(ray, "wait", lambda pending, num_returns: (pending[:1], pending[1:]))
    monkeypatch.setattr(ray, "get", lambda task: (_ for _ in ()).throw(error))
    monkeypatch.setattr(ray, "kill", killed.append)
    workers = RayWorkers(tiny_config("collector.backend=ray"), make_actor())
    monkeypatch.setattr(workers, "_ask", lambda index: workers._pending.setdefault(cast("Any", "task"), index))
    remote = _Remote()
    monkeypatch.setattr(ray, "remote", lambda worker: remote)
    workers._start(0)
    with pytest.warns(UserWarning, match="lost"), pytest.raises(ChildProcessError, match="0 died 4 times before"):
        next(workers._batches())
    assert workers.lost_frames == 3 * 2
    assert killed == ["worker 1", "worker 2", "worker 3", "worker 4"]


class _Remote:
    def __init__(self) -> None:
        self.started = 0

    def options(self, **options: Any) -> _Remote:
        return self

    def remote(self, *arguments: Any) -> str:
        self.started += 1
        return f"worker {self.started}"


def test_too_small_a_cluster_is_an_error(
    tiny_config: Callable[..., TrainConfig], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("RAY_ADDRESS", "head:6379")
    monkeypatch.setattr(ray, "init", lambda address, **options: None)
    monkeypatch.setattr(ray, "cluster_resources", lambda: {"CPU": 4.0})
    with pytest.raises(ConfigError, match=r"num_workers is 5, but the Ray cluster at head:6379 has 4 CPUs"):
        connect(tiny_config("collector.backend=ray", "collector.num_workers=5"))
