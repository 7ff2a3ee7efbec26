"""The run directory never mixes two runs, and survives half-written files."""

from __future__ import annotations

from pathlib import Path

import pytest

from nclql_torchrl.training import RunDirectory, TrainConfig
from nclql_torchrl.training.config import load_config


def test_a_directory_that_is_not_a_run_is_refused(tmp_path: Path) -> None:
    (tmp_path / "thesis.tex").write_text("precious")
    with pytest.raises(FileExistsError, match="exists and is not a run"):
        RunDirectory.create(TrainConfig(run_dir=str(tmp_path)))
    assert [file.name for file in tmp_path.iterdir()] == ["thesis.tex"]


def test_a_file_is_refused(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(FileExistsError, match="is a file"):
        RunDirectory.create(TrainConfig(run_dir=str(tmp_path / "file")))


def test_an_existing_run_is_refused_with_the_way_to_resume_it(tmp_path: Path) -> None:
    RunDirectory.create(TrainConfig(run_dir=str(tmp_path / "run")))
    with pytest.raises(FileExistsError, match=r"already holds a run; continue it with resume="):
        RunDirectory.create(TrainConfig(run_dir=str(tmp_path / "run")))


def test_opening_what_is_not_a_run_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match="is not a run"):
        RunDirectory.open(tmp_path)
    with pytest.raises(FileNotFoundError, match="does not exist"):
        RunDirectory.open(tmp_path / "nothing")


def test_automatic_directories_differ(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    first, second = (RunDirectory.create(TrainConfig()) for _ in range(2))
    assert first.path != second.path
    assert first.path.parent == tmp_path / "runs" / "HalfCheetah-v5"


def test_config_yaml_reads_back_as_the_configuration(tmp_path: Path) -> None:
    config = TrainConfig(run_dir=str(tmp_path / "run"), seed=7)
    run = RunDirectory.create(config)
    assert load_config(str(run.config)) == config


def test_rewinding_drops_later_and_half_written_rows(tmp_path: Path) -> None:
    run = RunDirectory.create(TrainConfig(run_dir=str(tmp_path / "run")))
    for frames in (10, 20, 30):
        run.append_metrics({"frames": frames, "updates": frames, "train_return": -1.5})
    with run.metrics.open("a") as file:
        file.write("40,4")
    assert [row["frames"] for row in run.read_metrics()] == [10, 20, 30]
    run.rewind_metrics(20)
    assert run.read_metrics() == [{"frames": f, "updates": f, "train_return": -1.5} for f in (10, 20)]
    assert "10,10," in run.metrics.read_text()


def test_the_learning_curve_is_a_picture(tmp_path: Path) -> None:
    run = RunDirectory.create(TrainConfig(run_dir=str(tmp_path / "run")))
    run.append_metrics({"frames": 10, "updates": 1, "evaluation_return": 3.0, "evaluation_return_std": 1.0})
    run.draw_learning_curve("task")
    assert run.learning_curve.read_bytes().startswith(b"\x89PNG")
