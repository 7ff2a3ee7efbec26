"""On a Ray cluster a worker may die, and the run goes on."""

from __future__ import annotations

import importlib
import os
import signal
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any, cast

import pytest
import ray
from ray.exceptions import RayActorError

from nclql_torchrl.training import ConfigError, Interrupted, RunDirectory, TrainConfig, train, training
from nclql_torchrl.training.ray_workers import RayWorkers, connect
from nclql_torchrl.training.training import updates_due


def listening_addresses() -> set[str]:
    """Where this process and its descendants, which are the Ray cluster, accept connections."""
    # Ray brings its own.
    psutil: Any = importlib.import_module("psutil")
    driver = psutil.Process()
    connections = [
        connection
        for process in [driver, *driver.children(recursive=True)]
        for connection in process.net_connections("inet")
    ]
    return {connection.laddr.ip.removeprefix("::ffff:") for connection in connections if connection.status == "LISTEN"}


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


def test_a_worker_that_always_dies_is_an_error(
    tiny_config: Callable[..., TrainConfig], make_actor: Callable[..., Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(ray, "put", lambda weights: weights)
    monkeypatch.setattr(ray, "wait", lambda pending, num_returns: (pending[:1], pending[1:]))
    monkeypatch.setattr(ray, "get", lambda task: (_ for _ in ()).throw(RayActorError()))
    workers = RayWorkers(tiny_config("collector.backend=ray"), make_actor())
    monkeypatch.setattr(workers, "_ask", lambda index: workers._pending.setdefault(cast("Any", "task"), index))
    monkeypatch.setattr(ray, "remote", lambda worker: _Remote())
    workers._start(0)
    with pytest.warns(UserWarning, match="lost"), pytest.raises(ChildProcessError, match="0 died 4 times before"):
        next(workers._batches())
    assert workers.lost_frames == 3 * 2


class _Remote:
    def options(self, **options: Any) -> _Remote:
        return self

    def remote(self, *arguments: Any) -> None:
        return None


def test_too_small_a_cluster_is_an_error(
    tiny_config: Callable[..., TrainConfig], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("RAY_ADDRESS", "head:6379")
    monkeypatch.setattr(ray, "init", lambda address, **options: None)
    monkeypatch.setattr(ray, "cluster_resources", lambda: {"CPU": 4.0})
    with pytest.raises(ConfigError, match=r"num_workers is 5, but the Ray cluster at head:6379 has 4 CPUs"):
        connect(tiny_config("collector.backend=ray", "collector.num_workers=5"))
