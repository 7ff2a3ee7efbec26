"""nclql-profile, run as a user runs it."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest

from nclql_torchrl.commands.profile import as_list, main
from tests.commands.test_commands import run

TINY_PROFILE = (
    "levels=2",
    "steps_per_level=1,2",
    "execution=eager",
    "device=cpu",
    "observation_dim=3",
    "action_dim=2",
    "hidden_sizes=[8]",
    "repetitions=2",
    "quality_states=4",
    "quality_chains=2",
    "reference_steps=1",
)


def test_a_sweep_appends_to_one_profile_and_prints_its_table(tmp_path: Path) -> None:
    options = [option for option in TINY_PROFILE if not option.startswith("steps")]
    result = run("profile", "-m", *options, "steps_per_level=[1],[2,3]", "run_dir=p", "--trace=t.json", cwd=tmp_path)
    assert result.returncode == 0, result.stderr
    whole = json.loads((tmp_path / "p" / "profile.json").read_text())
    assert len(whole["runs"]) == 2
    assert [row["steps_per_level"] for row in whole["rows"]] == [1, 2, 3]
    assert (tmp_path / "t.json").exists()
    assert sorted(entry.name for entry in tmp_path.iterdir()) == ["p", "t.json"]
    lines = result.stdout.splitlines()
    header = next(line for line in lines if "actions/s" in line)
    assert "x steps" in header and "Q gap" in header
    assert "p/profile.png" in lines and "t.json" in lines
    # tqdm's bars go to stderr, and so does nothing else.
    assert "profile: 100%" in result.stderr and "Warning" not in result.stderr


@pytest.mark.parametrize(
    ("argument", "message"),
    [
        ("level=5", "There is no option 'level'; did you mean 'levels'?"),
        ("sampler.w=5", "There is no option 'sampler.w'"),
    ],
)
def test_a_misspelt_key_is_an_error(argument: str, message: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "argv", ["nclql-profile", argument])
    with pytest.raises(SystemExit, match=message):
        main()


def test_a_wrong_type_is_an_error(tmp_path: Path) -> None:
    result = run("profile", "levels=ten", cwd=tmp_path)
    assert result.returncode == 1
    assert "Value 'ten' of type 'str' could not be converted to Integer" in result.stderr
    assert "Traceback" not in result.stderr
    assert not list(tmp_path.iterdir())


def test_one_value_or_several_need_no_brackets() -> None:
    assert as_list("levels=5,10", multirun=False) == "levels=[5,10]"
    assert as_list("levels=5,10", multirun=True) == "levels=[5],[10]"
    assert as_list("levels=[5,10],[20]", multirun=True) == "levels=[5,10],[20]"
    assert as_list("run_dir=a,b", multirun=True) == "run_dir=a,b"
