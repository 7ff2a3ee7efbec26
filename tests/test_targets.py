"""The analytic targets are what they claim: their own samples, by another route, agree with every exact quantity."""

from __future__ import annotations

import math

import pytest
import torch

from nclql_torchrl import LangevinSampler, NoiseSchedule
from nclql_torchrl.targets import TARGETS, AnalyticTarget, four_modes, truncated_quadratic

NUM_SAMPLES = 200_000


@pytest.mark.parametrize("name", TARGETS)
def test_samples_have_the_exact_moments(name: str) -> None:
    target = TARGETS[name]()
    sample = target.sample(NUM_SAMPLES)
    assert sample.abs().max() <= 1.0
    deviations = target.covariance.diagonal().sqrt()
    assert ((sample.mean(0) - target.mean).abs() < 5 * deviations / NUM_SAMPLES**0.5).all()
    # A sample covariance is off by about deviation_i deviation_j sqrt(kurtosis / n), and no kurtosis here exceeds 3.
    scale = deviations.unsqueeze(0) * deviations.unsqueeze(1)
    assert ((torch.cov(sample.T) - target.covariance).abs() < 5 * scale * math.sqrt(3 / NUM_SAMPLES)).all()


@pytest.mark.parametrize("name", ["four_modes", "truncated_quadratic"])
def test_the_density_integrates_to_one_and_to_the_cells(name: str) -> None:
    target = TARGETS[name](dtype=torch.float64)
    # Midpoints: the error of the rule is of second order in a spacing that is far below the deviations.
    side = 1_000
    points = (torch.arange(side, dtype=torch.float64) + 0.5) * 2 / side - 1
    density = target.log_density(torch.cartesian_prod(points, points)).exp().reshape(side, side)
    assert density.mean() * 4 == pytest.approx(1.0, abs=1e-4)
    edges, cells = target.cell_probabilities(4)
    assert cells.sum() == pytest.approx(1.0)
    below = density[points < edges[0][0]][:, points < edges[1][0]].sum() * 4 / side**2
    # An edge lies within a cell of the rule: half a row and half a column may be on the wrong side.
    assert below == pytest.approx(float(cells[0, 0]), abs=4 / side)


def test_mode_shares_and_total_variation() -> None:
    target = four_modes()
    sample = target.sample(NUM_SAMPLES)
    error = (target.mode_shares(sample) - target.weights).abs()
    assert (error < 5 * (target.weights * (1 - target.weights) / NUM_SAMPLES).sqrt()).all()
    cells = target.cell_probabilities(10)[1].flatten()
    expected = 0.5 * float((2 * cells * (1 - cells) / (math.pi * NUM_SAMPLES)).sqrt().sum())
    # Its standard deviation: those of half-normals of variance p / n, halved and added in squares.
    deviation = 0.5 * math.sqrt((1 - 2 / math.pi) / NUM_SAMPLES)
    assert target.total_variation(sample, 10) == pytest.approx(expected, abs=5 * deviation)
    one_mode = sample[target.mode(sample) == 0]
    assert target.total_variation(one_mode, 10) == pytest.approx(0.6, abs=0.02), "all but the weight of that mode"


def test_smoothing_is_the_mean_over_the_noise() -> None:
    target, action = four_modes(dtype=torch.float64), torch.rand(6, 2, dtype=torch.float64) * 2 - 1
    values = target(action + 0.1 * torch.randn(100_000, 6, 2, dtype=torch.float64))
    error = (target.smoothed(0.1)(action) - values.mean(0)).abs()
    # Five standard errors; where a ridge between two modes is near, what it states.
    assert (error < 5 * values.std(0) / 100_000**0.5 + 0.2 / target.w).all()
    assert (error < 5 * values.std(0) / 100_000**0.5 + 0.02 / target.w).sum() >= 4
    quadratic = truncated_quadratic(dtype=torch.float64)
    assert torch.equal(quadratic.smoothed(0.1)(action), quadratic(action))


def test_the_sampler_reads_a_target_like_a_critic() -> None:
    target = four_modes()
    sampler = LangevinSampler(-torch.ones(2), torch.ones(2), NoiseSchedule())
    value = target.action_value([3, 4], sampler.schedule)
    assert sampler(value).shape == (3, 4, 2)
    action = torch.rand(3, 4, 2)
    torch.testing.assert_close(value.at_level(9)(action), target(action))
    assert not torch.allclose(value.at_level(0)(action), target(action))


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (([[0.0, 0.0]], [[0.1]]), "have shapes"),
        (([[0.0]], [[0.0]]), "deviations is"),
        (([[0.0]], [[0.1]], [-1.0]), "weights is"),
        (([[9.0]], [[0.1]]), "reach into the box"),
    ],
)
def test_bad_settings_are_named(arguments: tuple, words: str) -> None:
    with pytest.raises(ValueError, match=words):
        AnalyticTarget(*arguments)


def test_quadrature_of_many_dimensions_is_refused() -> None:
    target = AnalyticTarget(torch.zeros(2, 3), torch.ones(2, 3))
    with pytest.raises(ValueError, match="expected at most 2"):
        target.smoothed(0.1)
