"""nclql-export, run as a user runs it."""

from __future__ import annotations

import json
import re
import shutil
import sys
from pathlib import Path

import pytest
import torch

from nclql_torchrl.commands.export import main
from nclql_torchrl.training import RunDirectory, train
from nclql_torchrl.training.config import load_config
from nclql_torchrl.training.evaluation import load_policy
from tests.commands.test_commands import run
from tests.conftest import TINY

pytest.importorskip("safetensors")

from nclql_torchrl.pretrained import NCLQLAgent


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A finished tiny run."""
    path = tmp_path_factory.mktemp("finished") / "run"
    train(load_config({}, [*TINY, f"run_dir={path}"]))
    return path


def export(monkeypatch: pytest.MonkeyPatch, *arguments: str) -> None:
    monkeypatch.setattr(sys, "argv", ["nclql-export", *arguments])
    main()


def test_exports_the_newest_checkpoint_with_its_measured_score(finished: Path) -> None:
    result = run("export", f"checkpoint={finished}", cwd=finished.parent)
    assert result.returncode == 0, result.stderr
    directory = finished / "exported-240"
    summary = json.loads((finished / "summary.json").read_text())
    mean, deviation = f"{summary['return_mean']:.1f}", f"{summary['return_std']:.1f}"
    assert result.stdout == f"{directory}: Pendulum-v1 after 240 transitions, return {mean} in the run\n"
    card = (directory / "README.md").read_text()
    assert f"| Pendulum-v1 | {mean} ± {deviation} | 2 | the run's summary.json |" in card
    assert f"value: {mean} +/- {deviation}" in card and card.startswith("---\nlibrary_name:")
    assert "pt2" not in card and "{" not in card

    agent, (_, actor) = NCLQLAgent.from_pretrained(directory), load_policy(finished, torch.device("cpu"))
    observation = torch.randn(6, 3)
    torch.manual_seed(3)
    expected = actor(observation=observation)[0]
    torch.manual_seed(3)
    assert torch.equal(agent.act(observation, deterministic=False), expected)
    again = run("export", f"checkpoint={finished}", cwd=finished.parent)
    assert again.returncode == 1 and "exported-240 exists" in again.stderr and "Traceback" not in again.stderr


def test_the_score_is_that_of_the_checkpoint(
    finished: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    earlier = sorted((finished / "checkpoints").glob("checkpoint-*"))[0]
    frames = int(earlier.name.removeprefix("checkpoint-"))
    assert frames < 240
    rows = {int(row["frames"]): row for row in RunDirectory(finished).read_metrics()}
    assert "evaluation_return" not in rows.get(frames, {})
    export(monkeypatch, f"checkpoint={earlier}", f"output={tmp_path / 'a'}")
    assert "not evaluated by the run" in capsys.readouterr().out
    assert "The run did not evaluate this checkpoint" in (tmp_path / "a" / "README.md").read_text()
    # The best has the score that it was kept for.
    export(monkeypatch, f"checkpoint={finished}", "best=true", f"output={tmp_path / 'best'}")
    returns = [row["evaluation_return"] for row in rows.values() if "evaluation_return" in row]
    assert f"return {max(returns):.1f} in the run" in capsys.readouterr().out
    assert "It is the best of the run's evaluations" in (tmp_path / "best" / "README.md").read_text()
    # A checkpoint away from its run has no score either.
    shutil.copytree(earlier.with_name("checkpoint-000000000240"), tmp_path / "alone" / "checkpoint-000000000240")
    export(monkeypatch, f"checkpoint={tmp_path}/alone/checkpoint-000000000240", f"output={tmp_path / 'b'}")
    assert "not evaluated by the run" in capsys.readouterr().out


def test_an_unfinished_run_has_the_score_of_its_metrics(
    finished: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    copy = Path(shutil.copytree(finished, tmp_path / "copy", ignore=shutil.ignore_patterns("exported*", "summary*")))
    export(monkeypatch, f"checkpoint={copy}", f"output={tmp_path / 'c'}")
    assert re.search(r"\| Pendulum-v1 \| -\d+\.\d ± \d+\.\d \| 2 \|", (tmp_path / "c" / "README.md").read_text())


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["outputs=x"], "There is no option 'outputs'; did you mean 'output'?"),
        ([], "checkpoint is not set; expected checkpoint="),
        (["checkpoint=nowhere"], "checkpoint nowhere does not exist"),
        (["checkpoint=nowhere", "states=0"], "states is 0; expected at least 1."),
    ],
)
def test_names_what_is_wrong(monkeypatch: pytest.MonkeyPatch, arguments: list[str], message: str) -> None:
    with pytest.raises(SystemExit) as exit:
        export(monkeypatch, *arguments)
    assert message in str(exit.value)
