"""A resumed run's logger goes on where the checkpoint was: no step twice, none missing."""

from __future__ import annotations

from pathlib import Path

import pytest

from nclql_torchrl.training import RunDirectory, TrainConfig
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
