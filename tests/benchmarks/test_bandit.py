"""The bandit judges policies by what is known of their density."""

from __future__ import annotations

import pytest
import torch

from benchmarks import bandit
from nclql_torchrl import NCLQLLoss


@pytest.mark.parametrize("name", list(bandit.BANDITS))
def test_exact_samples_are_right_and_a_single_mode_is_not(name: str) -> None:
    target = bandit.make_bandit(bandit.BANDITS[name])
    exact = bandit.judge(target.sample(bandit.SAMPLES), target)
    # Expected of exact samples in 100 cells: 0.4 sqrt(100 / 4096) = 0.06.
    assert exact["total_variation"] < 0.09
    assert exact["modes_covered"] == 4 and exact["mode_error"] < 0.04
    # A two-dimensional normal cut at three deviations has lost 1.1% of its mass, and 5% of its variance.
    assert exact["spread"] == pytest.approx(0.97, abs=0.02)
    greedy = bandit.judge(torch.tensor(bandit.CENTERS[0]).expand(1000, 2), target)
    assert greedy["modes_covered"] == 1 and greedy["spread"] == 0.0
    assert greedy["mode_error"] == pytest.approx(1 - target.weights[0].item())
    assert greedy["reward"] > exact["reward"]


@pytest.mark.parametrize("name", ["nclql", "lql", "sac", "sql", "qsm"])
def test_every_algorithm_is_trained_and_judged(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(bandit.LANGEVIN, "sampler.execution", "eager")
    monkeypatch.setattr(bandit, "BATCH_SIZE", 32)
    record, agent = bandit.run("unequal", name, seed=0, updates=10)
    _, fresh = bandit.run("unequal", name, seed=0, updates=0)
    assert any(
        not torch.equal(trained, initial)
        for trained, initial in zip(agent.loss.parameters(), fresh.loss.parameters(), strict=True)
    )
    assert bandit.act(agent, 5).shape == (5, 2)
    assert 0.0 < record["total_variation"] <= 1.0
    assert f"| unequal | {name} | 1 |" in bandit.table([record])


def test_the_landscapes_of_the_noise_levels_are_the_critics(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(bandit.LANGEVIN, "sampler.execution", "eager")
    _, agent = bandit.run("equal", "nclql", seed=0, updates=1)
    points = torch.rand(7, 2) * 2 - 1
    found = bandit.landscapes(agent, points)
    assert list(found) == [0, 5, 9]
    assert isinstance(agent.loss, NCLQLLoss)
    expected = agent.loss.ensemble_values(bandit.observations(7), points, torch.full((7,), 5))
    torch.testing.assert_close(found[5], expected.mean(0))
