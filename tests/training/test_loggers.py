"""A resumed run's logger goes on where the checkpoint was: no step twice, none missing."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from torchrl.record.loggers import CSVLogger

from nclql_torchrl.training import RunDirectory, TrainConfig, loggers, train
from nclql_torchrl.training.loggers import RunLogger


def test_csv_goes_on_after_the_checkpoint(tmp_path: Path) -> None:
    run = RunDirectory.create(TrainConfig(run_dir=str(tmp_path / "run")))
    logger = RunLogger("csv", run, 0, print)
    for frames in (10, 20, 30):
        logger.log({"frames": frames, "q_mean": frames + 0.5})
    path = run.path / "logs" / "run" / "scalars" / "q_mean.csv"
    with path.open("a") as file:
        file.write("40,4")  # cut short by kill -9
    logger = RunLogger("csv", run, 20, print)
    logger.log({"frames": 30, "q_mean": 31.5})
    assert path.read_text() == "10,10.5\n20,20.5\n30,31.5\n"


def test_tensorboard_goes_on_after_the_checkpoint(tmp_path: Path) -> None:
    accumulator = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
    run = RunDirectory.create(TrainConfig(run_dir=str(tmp_path / "run")))
    logger = RunLogger("tensorboard", run, 0, print)
    for frames in (10, 20, 30):
        logger.log({"frames": frames, "q_mean": frames + 0.5})
    logger.flush()
    logger = RunLogger("tensorboard", run, 20, print)
    logger.log({"frames": 30, "q_mean": 31.5})
    logger.flush()
    events = accumulator.EventAccumulator(str(run.path / "logs" / "run"))
    events.Reload()
    assert [(event.step, event.value) for event in events.Scalars("q_mean")] == [(10, 10.5), (20, 20.5), (30, 31.5)]


def test_a_logger_that_cannot_be_opened_is_mentioned_and_tried_no_more(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*args: object, **kwargs: object) -> None:
        raise TimeoutError("no answer")

    said: list[str] = []
    monkeypatch.setattr("nclql_torchrl.training.loggers.get_logger", refuse)
    logger = RunLogger("wandb", RunDirectory.create(TrainConfig(run_dir=str(tmp_path / "run"))), 0, said.append)
    logger.log({"frames": 10, "q_mean": 1.0})
    logger.flush()
    assert len(said) == 1 and "The logger wandb failed (TimeoutError: no answer)" in said[0]


class Hanging(CSVLogger):
    """Takes one row, and returns from the second when it is let go."""

    def __init__(self, directory: Path) -> None:
        super().__init__("hanging", str(directory))
        self.steps: list[int | None] = []
        self.hangs, self.let_go = threading.Event(), threading.Event()

    def log_metrics(self, metrics: Any, step: int | None = None, **options: Any) -> Any:
        self.steps.append(step)
        if len(self.steps) == 2:
            self.hangs.set()
            self.let_go.wait()


def test_a_service_that_hangs_stops_nothing_and_is_mentioned_once(
    tiny_config: Callable[..., TrainConfig],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    service = Hanging(tmp_path / "service")
    monkeypatch.setattr(loggers, "get_logger", lambda *args, **kwargs: service)
    monkeypatch.setattr(loggers, "PATIENCE_SECONDS", 0.5)
    train(tiny_config("logger.backend=tensorboard", "logger.eval_interval=1000"))
    assert service.steps == [50, 100]
    service.let_go.set()
    assert [row["frames"] for row in RunDirectory.open(tmp_path / "run").read_metrics()] == [50, 100, 150, 200, 240]
    sentence = "The logger tensorboard has not answered for 0.5 s. Training goes on, and metrics.csv has every row."
    errors = capsys.readouterr().err
    assert errors.count(sentence) == errors.count("The logger") == 1


def test_a_service_that_hangs_while_it_is_opened_gets_its_rows_late(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    service, said, let_go = Hanging(tmp_path / "service"), [], threading.Event()

    def open_late(*args: object, **kwargs: object) -> Hanging:
        let_go.wait()
        return service

    monkeypatch.setattr(loggers, "get_logger", open_late)
    monkeypatch.setattr(loggers, "OPENING_SECONDS", 0.1)
    logger = RunLogger("wandb", RunDirectory.create(TrainConfig(run_dir=str(tmp_path / "run"))), 0, said.append)
    logger.log({"frames": 10, "q_mean": 1.0})
    assert len(said) == 1 and "The logger wandb has not answered for 0.1 s." in said[0]
    let_go.set()
    while not service.steps:
        time.sleep(0.01)
    logger.close()
    assert service.steps == [10] and len(said) == 1


def test_a_service_gets_late_what_waits_for_it_and_the_rest_is_dropped(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    service, said = Hanging(tmp_path / "service"), []
    monkeypatch.setattr(loggers, "get_logger", lambda *args, **kwargs: service)
    monkeypatch.setattr(loggers, "WAITING_ROWS", 3)
    logger = RunLogger("wandb", RunDirectory.create(TrainConfig(run_dir=str(tmp_path / "run"))), 0, said.append)
    for frames in (10, 20):
        logger.log({"frames": frames, "q_mean": 1.0})
    service.hangs.wait()
    for frames in (30, 40, 50, 60, 70):
        logger.log({"frames": frames, "q_mean": 1.0})
    service.let_go.set()
    while len(service.steps) < 5:
        time.sleep(0.01)
    logger.close()
    assert service.steps == [10, 20, 30, 40, 50]
    assert len(said) == 1 and "The logger wandb takes nothing any more, so that rows are dropped." in said[0]


def test_a_logger_that_is_not_installed_is_an_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def missing(*args: object, **kwargs: object) -> None:
        raise ImportError("No module named 'wandb'")

    monkeypatch.setattr("nclql_torchrl.training.loggers.get_logger", missing)
    with pytest.raises(ImportError, match="wandb"):
        RunLogger("wandb", RunDirectory.create(TrainConfig(run_dir=str(tmp_path / "run"))), 0, print)


def test_weights_and_biases_knows_the_run_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    ids = []
    monkeypatch.setattr(
        "nclql_torchrl.training.loggers.get_logger",
        lambda *args, wandb_kwargs, **kwargs: ids.append(wandb_kwargs["id"]),
    )
    run = RunDirectory.create(TrainConfig(run_dir=str(tmp_path / "run")))
    for frames in (0, 20):
        RunLogger("wandb", run, frames, print)
    assert len(ids) == 2 and ids[0] == ids[1]
