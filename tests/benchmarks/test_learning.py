"""The learning benchmark: every algorithm's run has what the figures need, finished runs are skipped."""

from __future__ import annotations

import copy
import json
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import pytest
import torch
from hydra import compose, initialize_config_dir
from omegaconf import OmegaConf
from tensordict import TensorDict
from torchrl.data import Bounded

from benchmarks import critic_or_sampler, learning, learning_figures
from benchmarks.baselines.algorithm import Problem
from benchmarks.baselines.langevin import make_langevin
from benchmarks.learning import AlgorithmConfig, LearningConfig, TaskConfig
from nclql_torchrl import NCLQLLoss
from nclql_torchrl.training import components
from nclql_torchrl.training.config import TrainConfig, load_config

CONF = Path(learning.__file__).parent / "conf"
ALGORITHMS = sorted(path.stem for path in (CONF / "algorithm").glob("*.yaml"))
TASKS = sorted(path.stem for path in (CONF / "task").glob("*.yaml"))
TASK = TaskConfig(
    engine="gymnasium",
    total_frames=40,
    init_random_frames=20,
    hidden_sizes=[8],
    batch_size=8,
    eval_interval=20,
    eval_episodes=2,
)


def compose_config(*overrides: str) -> LearningConfig:
    with initialize_config_dir(str(CONF), version_base="1.3"):
        config = OmegaConf.to_object(compose("learning", overrides=list(overrides)))
    assert isinstance(config, LearningConfig)
    return config


def tiny(name: str) -> LearningConfig:
    """The committed algorithm on a tiny budget, without the compiler."""
    algorithm = compose_config(f"algorithm={name}").algorithm
    if algorithm.family in ("langevin", "quantiles", "crossq"):
        algorithm.options.setdefault("sampler", {})["execution"] = "eager"
    return LearningConfig(algorithm, TASK)


def test_the_best_settings_are_the_preset_of_that_name() -> None:
    preset = load_config(str(Path(components.__file__).parents[1] / "conf" / "preset" / "best.yaml"))
    options = compose_config("algorithm=nclql_best").algorithm.options
    standard = TrainConfig()
    assert OmegaConf.to_object(OmegaConf.merge(asdict(standard), options)) == asdict(
        replace(
            preset,
            sampler=replace(preset.sampler, execution=standard.sampler.execution),
            collector=standard.collector,
        )
    )
    assert preset.collector.init_random_frames == TaskConfig().init_random_frames


@pytest.fixture(autouse=True)
def few_timed_calls(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(learning, "TIMED_CALLS", 2)


@pytest.fixture(scope="module")
def record() -> dict[str, Any]:
    return learning.run(tiny("td3"))[0]


@pytest.mark.parametrize("name", ALGORITHMS)
def test_every_algorithm_runs_and_its_record_can_be_drawn(name: str, tmp_path: Path) -> None:
    record, algorithm = learning.run(tiny(name))
    assert record["parameters"] == algorithm.num_parameters
    path = tmp_path / "Pendulum-v1.jsonl"
    learning.append_record(path, record)
    (read,) = learning.read_records(path)
    assert read == json.loads(json.dumps(record))
    last = read["curve"][-1]
    assert (last["frames"], last["updates"]) == (40, 20)
    assert last["overestimation"] == pytest.approx(last["estimated_q"] - last["discounted_return"])
    assert last["cpu_seconds"] > 0 and last["wall_seconds"] > 0
    assert read["parameters"] > 0 and read["action_milliseconds"]["256"] > 0 and read["updates_per_cpu_second"] > 0
    assert f"| {name} | 1 |" in learning_figures.table([read])


@pytest.mark.parametrize("task", TASKS)
def test_every_task_is_as_its_file_says(task: str) -> None:
    config = compose_config(f"task={task}", "+algorithm.options.optim.lr=1e-3")
    assert config.task.name == task and config.algorithm.options == {"optim": {"lr": 1e-3}}
    # The last evaluation is that of the whole budget.
    assert config.task.total_frames % config.task.eval_interval == 0


def test_the_same_seed_gives_the_same_run(record: dict[str, Any]) -> None:
    again, _ = learning.run(tiny("td3"))
    assert [point["return_mean"] for point in again["curve"]] == [point["return_mean"] for point in record["curve"]]


def test_finished_runs_are_skipped(
    record: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    config = tiny("td3")
    config.output = str(tmp_path / "runs.jsonl")
    ran = []
    monkeypatch.setattr(learning, "run", lambda config: ran.append(config.seed) or (record, None))
    learning.run_once(config)
    learning.run_once(config)
    assert ran == [0] and "already in" in capsys.readouterr().out
    config.seed = 1
    learning.run_once(config)
    assert ran == [0, 1]


def test_an_unknown_family_names_the_nearest() -> None:
    with pytest.raises(ValueError, match="did you mean 'td3'"):
        learning.run(LearningConfig(AlgorithmConfig(family="td4"), TASK))


def test_figures_and_tables_are_made_of_two_lines(record: dict[str, Any], tmp_path: Path) -> None:
    other = copy.deepcopy(record)
    other["config"]["seed"] = 1
    other["curve"][-1]["return_mean"] += 100.0
    for line in (record, other):
        learning.append_record(tmp_path / "Pendulum-v1.jsonl", line)
    (tmp_path / "README.md").write_text("before\n" + "\n".join(learning_figures.MARKS) + "\nafter\n")
    learning_figures.redraw(tmp_path)
    page = (tmp_path / "README.md").read_text()
    mean = record["curve"][-1]["return_mean"]
    assert f"| td3 | 2 | {mean + 50:.0f} [{mean:.0f}, {mean + 100:.0f}] |" in page
    assert page.startswith("before\n") and page.endswith("after\n")
    assert (tmp_path / "Pendulum-v1.png").stat().st_size > 10_000


def test_the_page_says_what_was_committed() -> None:
    page = (learning.RESULTS / "README.md").read_text()
    assert learning_figures.write_tables(learning.RESULTS) in page


def test_one_critic_acts_in_several_ways(monkeypatch: pytest.MonkeyPatch) -> None:
    # So small a w that the chain stays where it starts.
    chains = {"its own chain": {}, "w 0.001": {"w": 1e-3, "normalize_gradient": False}}
    monkeypatch.setattr(critic_or_sampler, "CHAINS", chains)
    config = tiny("nclql")
    result = critic_or_sampler.compare(config)
    assert list(result["evaluations"]) == ["best of a grid", *chains]
    # The same critic, deterministic: the chain's evaluation is the run's last one.
    assert result["evaluations"]["its own chain"]["return_mean"] == result["curve"][-1]["return_mean"]
    values = {name: evaluation["estimated_q"] for name, evaluation in result["evaluations"].items()}
    assert values["best of a grid"] >= values["its own chain"] - 1e-3 > values["w 0.001"]


def test_the_grid_covers_actions_of_two_dimensions() -> None:
    spec = Bounded(low=torch.tensor([-1.0, 0.0]), high=torch.tensor([1.0, 4.0]), shape=torch.Size([2]))
    problem = Problem(3, spec, hidden_sizes=(8,))
    loss = make_langevin(problem, **{"sampler.execution": "eager"}).loss
    assert isinstance(loss, NCLQLLoss)
    actor = critic_or_sampler.GridActor(loss, problem)
    assert torch.equal(actor.actions.amin(0), spec.low) and torch.equal(actor.actions.amax(0), spec.high)
    acted = actor(TensorDict({"observation": torch.randn(5, 3)}, [5]))
    assert acted["action"].shape == (5, 2)
    values = actor.values(acted)
    assert values.shape == (41**2, 5)
    assert torch.equal(acted[critic_or_sampler.VALUE_KEY].squeeze(-1), values.amax(0))
    assert torch.equal(acted["action"], actor.actions[values.argmax(0)])


@pytest.mark.parametrize("dimensions", [3, 6])
def test_a_grid_of_more_dimensions_is_refused(dimensions: int) -> None:
    problem = Problem(3, Bounded(-1.0, 1.0, torch.Size([dimensions])), hidden_sizes=(8,))
    loss = make_langevin(problem, **{"sampler.execution": "eager"}).loss
    assert isinstance(loss, NCLQLLoss)
    with pytest.raises(ValueError, match=f"dimension {dimensions}; a grid is for 1 or 2"):
        critic_or_sampler.GridActor(loss, problem)


def test_the_page_quotes_the_committed_critics() -> None:
    page = (learning.RESULTS / "README.md").read_text()
    for result in learning.read_records(critic_or_sampler.RESULTS / "critic_or_sampler.jsonl"):
        for name, evaluation in result["evaluations"].items():
            assert f"| {name} | {evaluation['return_mean']:.1f} | {evaluation['estimated_q']:.2f} |" in page
