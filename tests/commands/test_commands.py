"""The two commands, run as a user runs them."""

from __future__ import annotations

import importlib.util
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from nclql_torchrl.training import RunDirectory
from nclql_torchrl.training.checkpoint import latest_checkpoint
from tests.conftest import TINY

ROOT = Path(__file__).parents[2]
ENVIRONMENT = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": os.pathsep.join([str(ROOT), *sys.path])}


def command(name: str, *arguments: str) -> list[str]:
    return [sys.executable, "-m", f"nclql_torchrl.commands.{name}", *arguments]


def run(name: str, *arguments: str, cwd: Path) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        command(name, *arguments), cwd=cwd, env=ENVIRONMENT, capture_output=True, text=True, timeout=240, check=False
    )


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, str]:
    """A finished tiny run, and what the command printed."""
    parent = tmp_path_factory.mktemp("finished")
    result = run("train", *TINY, "run_dir=run", cwd=parent)
    assert result.returncode == 0, result.stderr
    return parent / "run", result.stdout


def test_train_ends_with_summary_curve_and_run_directory(finished: tuple[Path, str]) -> None:
    path, output = finished
    assert "Pendulum-v1: return -" in output
    for name in ("summary.json", "learning_curve.png"):
        assert str(path / name) in output
    assert output.rstrip().endswith(str(path))
    assert sorted(entry.name for entry in path.parent.iterdir()) == ["run"]


def test_train_refuses_to_overwrite_a_run_in_one_sentence(finished: tuple[Path, str]) -> None:
    path, _ = finished
    result = run("train", *TINY, f"run_dir={path}", cwd=path.parent)
    assert result.returncode == 1
    assert f"already holds a run; continue it with resume={path}" in result.stderr
    assert "Traceback" not in result.stderr


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["env.num_env=3"], "There is no option 'env.num_env'; did you mean 'env.num_envs'?"),
        (["env.num_envs=many"], "Value 'many' of type 'str' could not be converted to Integer"),
        (["sampler.num_levels=0"], "sampler.num_levels is 0; expected at least 1."),
        (["resume=nowhere"], "does not exist; expected the directory of an earlier nclql-train run"),
    ],
)
def test_train_names_what_is_wrong(tmp_path: Path, arguments: list[str], message: str) -> None:
    result = run("train", *arguments, cwd=tmp_path)
    assert result.returncode == 1
    assert message in result.stderr
    assert "Traceback" not in result.stderr
    assert not list(tmp_path.iterdir())


def test_resume_allows_only_changes_that_keep_it_the_same_run(finished: tuple[Path, str]) -> None:
    path, _ = finished
    result = run("train", f"resume={path}", "optim.lr=1e-4", cwd=path.parent)
    assert result.returncode == 1
    assert "optim.lr=1e-4 cannot change when a run is resumed" in result.stderr


def test_evaluate_reproduces_the_final_evaluation(finished: tuple[Path, str]) -> None:
    path, output = finished
    result = run("evaluate", f"checkpoint={path}", "episodes=2", cwd=path.parent)
    assert result.returncode == 0, result.stderr
    assert result.stdout.split(" over ")[0] == output.split(" over ")[0]


def test_evaluate_films_or_says_what_is_missing(finished: tuple[Path, str]) -> None:
    path, _ = finished
    result = run("evaluate", f"checkpoint={path}", "episodes=1", "video=true", cwd=path.parent)
    if importlib.util.find_spec("pygame") and importlib.util.find_spec("imageio_ffmpeg"):
        assert result.returncode == 0, result.stderr
        assert (path / "video.mp4").stat().st_size > 1000
    else:
        assert result.returncode == 1
        assert result.stderr.splitlines()[-1].startswith("nclql-evaluate: No video: ")
        assert not (path / "video.mp4").exists()


def test_evaluate_needs_a_checkpoint(tmp_path: Path) -> None:
    assert "checkpoint is not set" in run("evaluate", cwd=tmp_path).stderr
    assert "nowhere does not exist" in run("evaluate", "checkpoint=nowhere", cwd=tmp_path).stderr


def test_a_sweep_gives_every_job_its_own_run(tmp_path: Path) -> None:
    result = run("train", "-m", *TINY, "run_dir=sweep", "seed=1,2", "collector.total_frames=60", cwd=tmp_path)
    assert result.returncode == 0, result.stderr
    seeds = [RunDirectory.open(tmp_path / "sweep" / job).config.read_text() for job in ("0", "1")]
    assert "seed: 1" in seeds[0] and "seed: 2" in seeds[1]


@pytest.mark.parametrize(("number", "status"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_a_stopped_run_saves_a_checkpoint_and_resumes(tmp_path: Path, number: int, status: int) -> None:
    arguments = [*TINY, "run_dir=run", "collector.total_frames=100000"]
    process = subprocess.Popen(command("train", *arguments), cwd=tmp_path, env=ENVIRONMENT, stderr=subprocess.PIPE)
    try:
        metrics = tmp_path / "run" / "metrics.csv"
        deadline = time.monotonic() + 120
        while not (metrics.exists() and len(metrics.read_text().splitlines()) > 2):
            assert process.poll() is None and time.monotonic() < deadline
            time.sleep(0.05)
        process.send_signal(number)
        _, errors = process.communicate(timeout=60)
    finally:
        process.kill()
    assert process.returncode == status
    assert b"Continue with: nclql-train resume=" in errors
    stopped_at = int(latest_checkpoint(tmp_path / "run" / "checkpoints").name.split("-")[1])
    result = run("train", "resume=run", f"collector.total_frames={stopped_at + 20}", cwd=tmp_path)
    assert result.returncode == 0, result.stderr
    assert f"after {stopped_at + 20} frames" in result.stdout
