"""A profile from its configuration to its files."""

from __future__ import annotations

import csv
import json
import struct
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from envs import make_env
from nclql_torchrl import NoiseSchedule
from nclql_torchrl.profiling import ProfileConfig, profile, quality, report, subject
from nclql_torchrl.profiling.availability import unavailable
from nclql_torchrl.profiling.profile import NothingToMeasure
from nclql_torchrl.training import TrainConfig, evaluate, train
from nclql_torchrl.training.evaluation import SEED_OFFSET, load_policy


@pytest.fixture(autouse=True)
def few_samples(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(quality, "TARGET_SAMPLES", 64)
    monkeypatch.setattr(subject, "VISITING_STEPS", 20)


def tiny(path: Path, **options: Any) -> ProfileConfig:
    values: dict[str, Any] = {
        "levels": [2, 10],
        "steps_per_level": [1, 2],
        "states": [4],
        "execution": ["eager"],
        "device": ["cpu"],
        "observation_dim": 3,
        "action_dim": 2,
        "hidden_sizes": [8],
        "repetitions": 3,
        "quality_states": 8,
        "quality_chains": 2,
        "reference_steps": 2,
        "run_dir": str(path),
    }
    return ProfileConfig(**values | options)


def test_every_file_says_the_same(tmp_path: Path) -> None:
    result = profile(tiny(tmp_path / "p", execution=["eager", "cudagraph"], trace="true"))
    whole = json.loads((tmp_path / "p" / "profile.json").read_text())
    with (tmp_path / "p" / "profile.csv").open(newline="") as file:
        table = list(csv.DictReader(file))
    assert sorted(entry.name for entry in (tmp_path / "p").iterdir()) == [
        "profile.csv",
        "profile.json",
        "profile.png",
        "trace.json",
    ]

    rows, (run,) = whole["rows"], whole["runs"]
    assert [{name: "" if value is None else str(value) for name, value in row.items()} for row in rows] == table
    assert list(table[0]) == list(whole["columns"])
    assert [{**row, "run": 0, "return_mean": None, "return_std": None} for row in result["rows"]] == rows
    assert [(row["levels"], row["steps_per_level"]) for row in rows] == [(2, 1), (2, 2), (10, 1), (10, 2)]
    assert "cudagraph on cpu" in [entry["setting"] for entry in run["skipped"]]
    assert "skipped: cudagraph on cpu: CUDA graphs need" in report.table(result["rows"], result["skipped"])
    assert run["machine"]["cpu"]["torch"] == torch.__version__
    assert run["reference"]["langevin_steps"] == 20

    for row in rows:
        assert 0.0 < row["ms_p10"] <= row["ms_median"] <= row["ms_p90"]
        assert row["actions_per_second"] == pytest.approx(row["states"] / row["ms_median"] * 1e3)
        assert row["langevin_steps"] == row["levels"] * row["steps_per_level"]
        assert row["execution"] == "eager" and row["compile_seconds"] is None
        assert 0.0 < row["peak_memory_mib"] < 1.0
        assert run["reference"]["q_mean"] - row["q_mean"] == pytest.approx(row["q_gap"], abs=1e-9)
        schedule = NoiseSchedule(row["levels"], row["sigma_max"])
        assert schedule.minimum_steps_per_level() <= row["steps_per_level"]
        assert bool(row["schedule_change"]) == (row["sigma_max"] != pytest.approx(0.1))

    events = json.loads((tmp_path / "p" / "trace.json").read_text())["traceEvents"]
    assert any(str(event.get("name", "")).startswith("aten::") for event in events)
    header = (tmp_path / "p" / "profile.png").read_bytes()[:24]
    width, height = struct.unpack(">II", header[16:])
    assert header[:8] == b"\x89PNG\r\n\x1a\n" and width > 1500 and height > 500


@pytest.mark.skipif(unavailable("compile", torch.device("cpu")) is not None, reason="needs a C++ compiler")
def test_compile_time_is_no_part_of_a_call(tmp_path: Path) -> None:
    (row,) = profile(tiny(tmp_path, levels=[1], steps_per_level=[1], execution=["compile"]))["rows"]
    # A program of C++ is compiled, with an empty cache: no machine does it in the time of a hundred calls.
    assert row["compile_seconds"] > 0.1 * row["ms_p90"]


def test_a_second_profile_is_appended_and_a_foreign_file_is_not_touched(tmp_path: Path) -> None:
    first = profile(tiny(tmp_path, levels=[2], steps_per_level=[1]))
    profile(tiny(tmp_path, levels=[2], steps_per_level=[1], states=[2, 6], particles=[2]))
    whole = report.read(tmp_path)
    assert whole is not None and len(whole["runs"]) == 2
    assert [(row["run"], row["states"], row["particles"]) for row in whole["rows"]] == [(0, 4, 1), (1, 2, 2), (1, 6, 2)]
    assert whole["rows"][0]["ms_median"] == first["rows"][0]["ms_median"]

    (tmp_path / "profile.json").write_text('{"rows": []}')
    with pytest.raises(ValueError, match="is no profile of this version"):
        profile(tiny(tmp_path))
    assert (tmp_path / "profile.json").read_text() == '{"rows": []}'


def test_nothing_to_measure_is_an_error_that_says_why(tmp_path: Path) -> None:
    with pytest.raises(NothingToMeasure, match="cudagraph on cpu: CUDA graphs need a CUDA device"):
        profile(tiny(tmp_path / "p", execution=["cudagraph"]))
    assert not (tmp_path / "p").exists()


def test_a_setting_that_fails_is_skipped_with_its_reason(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    module = sys.modules[profile.__module__]
    original = module.warm_up  # pyright: ignore[reportAttributeAccessIssue]

    def fail_once(call: Callable[[], object], device: torch.device) -> tuple[float, int | None]:
        monkeypatch.setattr(module, "warm_up", original)
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 80 GiB.\nMore words.")

    monkeypatch.setattr(module, "warm_up", fail_once)
    result = profile(tiny(tmp_path, levels=[2, 3], steps_per_level=[1]))
    assert [row["levels"] for row in result["rows"]] == [3]
    (entry,) = result["skipped"]
    assert entry["reason"] == "CUDA out of memory. Tried to allocate 80 GiB."
    assert entry["setting"] == "eager float32 langevin on cpu, 2 x 1 steps, 4 states, 1 particles"


@pytest.mark.parametrize(
    "overrides", [(), ("sampler.start_level=1", "sampler.warm_start=true", "env.task_options.g=5")]
)
def test_a_trained_critic_adds_returns(
    overrides: tuple[str, ...],
    tmp_path: Path,
    tiny_config: Callable[..., TrainConfig],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    run = train(tiny_config("collector.total_frames=60", *overrides))["run_dir"]
    visited: list[dict[str, Any]] = []
    monkeypatch.setattr(
        subject, "make_env", lambda *args, **options: (visited.append(options), make_env(*args, **options))[1]
    )
    result = profile(tiny(tmp_path / "p", levels=[1, 3], steps_per_level=[2], checkpoint=run, episodes=2))
    short, own = result["rows"]
    config, actor = load_policy(run, torch.device("cpu"))
    expected = evaluate(
        actor,
        "Pendulum-v1",
        episodes=2,
        seed=config.seed + SEED_OFFSET,
        gamma=config.optim.gamma,
        reward_scale=config.optim.reward_scale,
        task_options=config.env.task_options,
    )
    assert visited[0].get("g") == config.env.task_options.get("g")
    # The run's own schedule: the very policy that nclql-evaluate plays, on the same initial states.
    assert own["sigma_max"] == config.sampler.sigma_max and own["schedule_change"] == ""
    assert (own["start_level"], own["warm_start"]) == (config.sampler.start_level, config.sampler.warm_start)
    assert short["start_level"] == 0 and own["langevin_steps"] == 2 * (3 - own["start_level"])
    assert own["return_mean"] == pytest.approx(expected.mean)
    assert short["return_mean"] != own["return_mean"]
    whole = report.read(tmp_path / "p")
    assert whole is not None and whole["runs"][0]["trained"] and "Pendulum-v1" in whole["runs"][0]["critic"]


def test_skipped_levels_and_warm_starts_have_rows_of_their_own(
    tmp_path: Path, tiny_config: Callable[..., TrainConfig]
) -> None:
    grid: dict[str, Any] = {
        "levels": [3],
        "steps_per_level": [2],
        "start_level": [0, 2, 3],
        "warm_start": [False, True],
    }
    run = train(tiny_config("collector.total_frames=60"))["run_dir"]
    result = profile(tiny(tmp_path / "p", **grid, checkpoint=run, episodes=1, quality_states=64, quality_chains=8))
    rows = {(row["start_level"], row["warm_start"]): row for row in result["rows"]}
    assert list(rows) == [(0, False), (0, True), (2, False), (2, True)]
    assert result["skipped"] == [{"setting": "start_level 3, 3 levels", "reason": "The levels are 0 to 2."}]
    assert [row["langevin_steps"] for row in rows.values()] == [6, 6, 2, 2]
    # A critic of a few updates hardly moves its chains. Cold ones start all over the box, with a deviation of
    # 1 / sqrt(3); warm ones from one action plus noise of at most 0.02, but in the few states that begin an episode.
    for start_level in (0, 2):
        assert rows[start_level, True]["spread"] < 0.5 * rows[start_level, False]["spread"]
    assert len({row["return_mean"] for row in rows.values()}) == 4
    assert len({row["tv_four_modes"] for row in rows.values()}) == 2, "analytic targets know no previous action"
    text = report.table(result["rows"], result["skipped"])
    assert "from level" in text and "warm" in text

    (row,) = (untrained := profile(tiny(tmp_path / "u", **grid | {"start_level": [2]})))["rows"]
    assert not row["warm_start"] and row["start_level"] == 2
    assert (
        untrained["skipped"][0]["setting"] == "warm_start" and "previous actions" in untrained["skipped"][0]["reason"]
    )


def test_a_profile_that_is_killed_in_its_episodes_keeps_what_it_measured(
    tmp_path: Path, tiny_config: Callable[..., TrainConfig], monkeypatch: pytest.MonkeyPatch
) -> None:
    run = train(tiny_config("collector.total_frames=60"))["run_dir"]
    module = sys.modules[profile.__module__]
    original = module.evaluate  # pyright: ignore[reportAttributeAccessIssue]

    def second_is_killed(*args: Any, **kwargs: Any) -> Any:
        def kill(*args: Any, **kwargs: Any) -> Any:
            raise KeyboardInterrupt

        monkeypatch.setattr(module, "evaluate", kill)
        return original(*args, **kwargs)

    monkeypatch.setattr(module, "evaluate", second_is_killed)
    with pytest.raises(KeyboardInterrupt):
        profile(tiny(tmp_path / "p", levels=[1, 3], steps_per_level=[2], checkpoint=run, episodes=2))
    whole = report.read(tmp_path / "p")
    assert whole is not None
    assert [row["return_mean"] is None for row in whole["rows"]] == [False, True]
    assert all(row["ms_median"] > 0 for row in whole["rows"])


def test_the_results_page_says_what_was_measured() -> None:
    results = Path(__file__).parents[2] / "benchmarks" / "results"
    section = (results / "README.md").read_text().split("(`profile/`)")[1].split("\n## ")[0]
    found = {}
    for name in ("trained", "untrained", "best"):
        whole = report.read(results / "profile" / name)
        assert whole is not None
        with (results / "profile" / name / "profile.csv").open(newline="") as file:
            assert len(list(csv.DictReader(file))) == len(whole["rows"])
        found[name] = {(row["execution"], row["levels"], row["steps_per_level"]): row for row in whole["rows"]}

    authors, best = section.split("The preset `cpu`")

    def cells(label: str, part: str = authors) -> list[str]:
        (line,) = (line for line in part.splitlines() if line.startswith(f"| {label} |"))
        return line.removesuffix(" |").split(" | ")[1:]

    for column, chain in enumerate(cells("Levels x steps")):
        levels, steps = map(int, chain.split(" x "))
        eager, compiled = (found["trained"][mode, levels, steps] for mode in ("eager", "compile"))
        untrained = found["untrained"]["compile", levels, steps]
        assert cells("Eager, ms")[column] == f"{eager['ms_median']:.1f}"
        assert cells("Compiled, ms")[column] == f"{compiled['ms_median']:.1f}"
        assert cells("Q lost, %")[column] == f"{100 * (1 - compiled['q_recovered']):.2f}"
        assert cells("Return")[column] == f"{compiled['return_mean']:,.0f}"
        assert cells("Untrained: Q lost, %")[column] == f"{100 * (1 - untrained['q_recovered']):.2f}"
    for column, chain in enumerate(cells("Levels x steps", best)):
        levels, steps = map(int, chain.strip("*").split(" x "))
        eager, compiled = (found["best"][mode, levels, steps] for mode in ("eager", "compile"))
        assert cells("Eager, ms", best)[column] == f"{eager['ms_median']:.1f}"
        assert cells("Compiled, ms", best)[column] == f"{compiled['ms_median']:.1f}"
        assert cells("Q lost, %", best)[column] == f"{100 * (1 - compiled['q_recovered']):.1f}"
        assert cells("Return", best)[column].split(" ± ")[0] == f"{compiled['return_mean']:,.0f}"
