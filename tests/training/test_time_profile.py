"""``profile=true`` accounts for the time of a run, and leaves no trace in others."""

from __future__ import annotations

import json
import time
import types
from collections.abc import Callable
from pathlib import Path

import pytest

from nclql_torchrl.training import TrainConfig, train, training
from nclql_torchrl.training.time_profile import WORK, TimeProfile


def test_the_shares_of_a_run_add_up(
    tiny_config: Callable[..., TrainConfig], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    evaluate = training.run_evaluation
    train(tiny_config("profile=true", "sampler.w=auto"))
    profile = json.loads((tmp_path / "run" / "profile.json").read_text())
    # 60 updates, of which the first 20 are not measured; those of a vector step belong together.
    assert 38 <= profile["updates"] <= 40
    assert sum(profile["shares"].values()) == pytest.approx(1.0)
    assert sum(profile["parts"].values()) == pytest.approx(profile["seconds"])
    work = [share for part, share in profile["shares"].items() if part in WORK]
    assert len(work) == len(WORK) and sum(work) + profile["overhead"] == pytest.approx(1.0)
    assert all(0.0 < share < 1.0 for share in profile["shares"].values()), profile["shares"]
    # A dozen operations against chains of six steps; "other" is the collector's and the loop's own work.
    assert profile["shares"]["other"] < 0.5
    assert "target sampling" in capsys.readouterr().err
    events = json.loads((tmp_path / "run" / "trace.json").read_text())["traceEvents"]
    assert {"simulation", "acting", "critic update"} <= {event.get("name") for event in events}
    assert training.run_evaluation is evaluate


def test_the_same_run_with_and_without(tiny_config: Callable[..., TrainConfig], tmp_path: Path) -> None:
    returns = [
        train(tiny_config(f"run_dir={tmp_path / str(profile)}", f"profile={profile}"))["return_mean"]
        for profile in (True, False)
    ]
    assert returns[0] == returns[1]
    assert not (tmp_path / "False" / "profile.json").exists()


def test_a_part_of_a_part_is_told_apart_only_there(tmp_path: Path) -> None:
    class Chain:
        def step(self) -> None:
            time.sleep(0.02)

    def evaluate() -> None:
        Chain().step()

    here = types.SimpleNamespace(evaluate=evaluate, log=evaluate)
    with TimeProfile(tmp_path) as profile:
        profile.watch(here, "evaluate", "evaluation")
        profile.watch(here, "log", "logging")
        profile.watch(Chain, "step", "evaluation: acting", within="evaluation")
        for updates in (0, 20):
            profile.advance(updates)
        here.evaluate()
        here.log()
        Chain().step()
        parts = profile.summary()["parts"]
    assert min(parts[part] for part in ("evaluation: acting", "logging", "other")) >= 0.02 > parts["evaluation"]


def test_a_run_that_is_too_short_says_so(
    tiny_config: Callable[..., TrainConfig], capsys: pytest.CaptureFixture[str]
) -> None:
    train(tiny_config("profile=true", "collector.total_frames=60"))
    assert "ended before update 20" in capsys.readouterr().err
