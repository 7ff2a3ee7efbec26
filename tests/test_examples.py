"""The examples run, each on a tiny budget, and do what they say. cart.py has its test in tests/envs/test_tasks.py."""

from __future__ import annotations

import importlib.util
import os
import re
import subprocess
import sys
from pathlib import Path
from types import ModuleType

import pytest
import torch
from tensordict import TensorDict
from torchrl.data import LazyTensorStorage

from envs import make_env

ROOT = Path(__file__).parents[1]
EXAMPLES = ROOT / "examples"


def load(name: str) -> ModuleType:
    """An example as a module. In this process: a new one would spend most of its time on importing."""
    spec = importlib.util.spec_from_file_location(f"example_{name}", EXAMPLES / f"{name}.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.mark.parametrize("path", sorted(EXAMPLES.glob("*.py")), ids=lambda path: path.stem)
def test_is_short_and_says_how_to_run_it(path: Path) -> None:
    source = path.read_text()
    assert source.count("\n") <= 150
    introduction = source.split('"""')[1]
    assert path.name in introduction or "nclql-train" in introduction
    tested = Path(__file__).read_text() + (ROOT / "tests" / "envs" / "test_tasks.py").read_text()
    assert path.stem in tested, f"{path} is run by no test"


@pytest.mark.parametrize(
    ("name", "arguments"),
    [("training_loop", ["--random-frames", "10"]), ("multi_process_collector", ["--workers", "1"])],
)
def test_runs_from_the_shell(name: str, arguments: list[str]) -> None:
    command = [
        sys.executable,
        f"examples/{name}.py",
        "--frames",
        "80" if "workers" in arguments[0] else "13",
        *arguments,
    ]
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    result = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=200)
    assert result.returncode == 0, result.stderr
    assert re.search(r"-\d+\.\d+", result.stdout)


def test_ten_critics() -> None:
    assert load("ten_critics").main(frames=80, batch_size=8) > 0.0


def test_custom_q_network() -> None:
    assert -17.0 < load("custom_q_network").main(frames=40, batch_size=8) < 0.0


def test_dictionary_observations() -> None:
    assert 0.0 < load("dictionary_observations").main(frames=40, batch_size=8) < 3.0


def test_n_step_returns_are_discounted_by_the_steps_that_they_took() -> None:
    example = load("n_step")
    # The last steps of an episode have fewer; there is no end of an episode in so few.
    assert example.main(frames=80, steps=3, batch_size=8) == 3.0


def test_prioritized_replay_prefers_and_weighs() -> None:
    example = load("prioritized_replay")
    assert example.main(frames=80, batch_size=64) > 0.0
    sampler, storage = example.ProportionalSampler(4, alpha=0.5, beta=1.0), LazyTensorStorage(4)
    storage.set(range(4), TensorDict({"x": torch.zeros(4)}, [4]))
    sampler.extend(torch.arange(4))
    sampler.update_priority(torch.arange(4), torch.tensor([1.0, 4.0, 9.0, 36.0]))
    index, info = sampler.sample(storage, 12_000)
    # Probabilities 1/12, 2/12, 3/12, 6/12; a share's deviation is below 0.0046, and four of them are allowed.
    shares = torch.bincount(index, minlength=4) / 12_000
    torch.testing.assert_close(shares, torch.tensor([1.0, 2.0, 3.0, 6.0]) / 12.0, rtol=0.0, atol=0.0183)
    # With beta = 1 the weights are inversely proportional to the probabilities, the largest of them 1.
    torch.testing.assert_close(info["priority_weight"], torch.tensor([1.0, 1 / 2, 1 / 3, 1 / 6])[index])
    assert sampler.priorities.max() == 36.0 + 1e-8
    restored = example.ProportionalSampler(4)
    restored.load_state_dict(sampler.state_dict())
    assert torch.equal(restored.priorities, sampler.priorities)


def test_iql_value() -> None:
    returns = load("iql_value").main(frames=100, updates=3, batch_size=16, evaluation_steps=10)
    assert set(returns) == {"iql", "langevin", "random"} and max(returns.values()) < 0.0


def test_offline_minari(monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("minari")
    monkeypatch.setenv("MINARI_DATASETS_PATH", "")  # so that the example's own value does not outlive the test
    example = load("offline_minari")
    assert example.main(frames=30, episodes=1, updates=3, batch_size=8) < 0.0


def test_mpc_plans_with_the_very_dynamics_of_the_task() -> None:
    example = load("mpc")
    env = make_env("Pendulum-v1", num_envs=5, seed=0)
    episodes = env.rollout(15)
    predicted = example.predicted_return(episodes["observation"][:, 0], episodes["action"].squeeze(-1)).squeeze(-1)
    # Rewards up to 16 a step, in float32: rounding of 1e-6 of a state grows a few times along the plan.
    torch.testing.assert_close(predicted, episodes["next", "reward"].sum((1, 2)), rtol=1e-4, atol=1e-3)
    assert -16.3 * 3 < example.main(frames=3, horizon=5, num_plans=4) < 0.0
