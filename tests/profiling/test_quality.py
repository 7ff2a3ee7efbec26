"""Quality says how far a chain is from what it should sample."""

from __future__ import annotations

import pytest
import torch

from nclql_torchrl.profiling import ProfileConfig, Setting, quality
from nclql_torchrl.profiling.quality import critic_quality, make_reference, sample_actions, spread, target_quality
from nclql_torchrl.profiling.subject import Subject, untrained
from nclql_torchrl.training.config import SamplerConfig


@pytest.fixture(scope="module")
def subject() -> Subject:
    config = ProfileConfig(observation_dim=3, action_dim=2, hidden_sizes=[16, 16], quality_states=40)
    return untrained(config, torch.device("cpu"))


def setting(levels: int, steps: int) -> Setting:
    return Setting(levels, steps, 16, 1, "eager", "float32", "cpu")


@torch.no_grad()
def test_a_long_chain_is_as_good_as_the_reference_and_a_short_one_is_not(subject: Subject) -> None:
    reference = make_reference(subject, steps_per_level=20, chains=8)
    assert reference.langevin_steps == 200
    long = critic_quality(subject.actor(setting(10, 20)), subject, reference, batch=320, chains=8)
    short = critic_quality(subject.actor(setting(1, 1)), subject, reference, batch=320, chains=8)
    # Two independent estimates of the same mean: their paired standard error, five times.
    assert abs(long["q_gap"]) < 5 * long["q_gap_stderr"]
    assert long["q_recovered"] == pytest.approx(1.0, abs=0.02)
    assert short["q_gap"] > 5 * short["q_gap_stderr"]
    assert short["q_recovered"] < 0.3
    assert long["spread"] == pytest.approx(reference.spread, rel=0.3)
    # One tiny step keeps the uniform start: its standard deviation is 1 / sqrt(3).
    assert short["spread"] == pytest.approx(3**-0.5, rel=0.1)


@torch.no_grad()
def test_actions_are_fresh_and_belong_to_their_states(subject: Subject) -> None:
    # 3 chains of 40 states in batches of 16: the last one is cut.
    actions = sample_actions(subject.actor(setting(10, 2)), subject, batch=16, chains=3)
    assert actions.shape == (3, 40, 2)
    assert not torch.equal(actions[0], actions[1])
    assert actions.abs().max() <= 1.0
    # What a state's chains have in common is its own landscape: they are closer together than to another state's.
    within = spread(actions)
    between = spread(actions.roll(1, dims=1)[0:1].expand(1, -1, -1).transpose(0, 1))
    assert within is not None and between is not None and within < between


def test_spread_is_the_deviation_within_a_state() -> None:
    offsets = torch.tensor([-0.1, 0.1]).reshape(2, 1, 1)
    assert spread(torch.rand(1, 50, 3) + offsets) == pytest.approx(0.1 * 2**0.5, abs=1e-6)
    assert spread(torch.rand(1, 5, 3)) is None


def test_targets_tell_a_chain_that_samples_from_one_that_has_not_moved(monkeypatch: pytest.MonkeyPatch) -> None:
    # 512 samples: a share of 0.4 has a standard error of 0.02, and the shares below differ by much more.
    monkeypatch.setattr(quality, "TARGET_SAMPLES", 512)
    default = target_quality(SamplerConfig(), 10, 2, 1, "langevin")
    unmoved = target_quality(SamplerConfig(), 1, 1, 1, "langevin")
    assert default["modes_covered"] == 4 and unmoved["modes_covered"] < 4
    # The authors' chain flattens the weights .4, .3, .2, .1 a little; a start has most of its chains near no mode.
    assert default["tv_mode_weights"] < 0.2 < unmoved["tv_mode_weights"]
    assert default["tv_stiff_quadratic"] < unmoved["tv_stiff_quadratic"]
    assert all(0.0 <= value <= 1.0 for name, value in default.items() if name.startswith("tv_"))
    # The best of many particles sits at the highest mode.
    assert target_quality(SamplerConfig(), 10, 1, 16, "langevin")["modes_covered"] < 4
