"""Promises of the Langevin chain: where it works, and that it samples what it should."""

from __future__ import annotations

import math
from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from nclql_torchrl import LangevinSampler, NoiseSchedule, langevin_chain, langevin_step
from nclql_torchrl.kernels import apply_boundary
from nclql_torchrl.langevin import best_particle
from nclql_torchrl.value import action_gradient, reduce_ensemble

STEP_SIZES = NoiseSchedule().step_sizes


def quadratic(target: Tensor) -> Callable[[int], Callable[[Tensor], Tensor]]:
    return lambda level: lambda action: -((action - target) ** 2).sum(-1)


def test_same_inputs_give_the_same_actions_and_other_noise_gives_others() -> None:
    torch.manual_seed(0)
    start, noise = torch.zeros(4, 3), torch.randn(10, 2, 4, 3)
    value = quadratic(torch.full((3,), 0.2))
    first = langevin_chain(value, start, noise, step_sizes=STEP_SIZES)
    assert torch.equal(first, langevin_chain(value, start, noise, step_sizes=STEP_SIZES))
    assert not torch.equal(first, langevin_chain(value, start, torch.randn_like(noise), step_sizes=STEP_SIZES))
    assert (start == 0).all(), "the caller's tensor is not touched"


def test_one_step_is_the_paper_s_formula() -> None:
    action, noise = torch.tensor([[0.1, -0.2]]), torch.tensor([[0.5, 1.0]])
    step_size = torch.tensor(0.01)
    gradient = torch.tensor([[3.0, -4.0]])
    value = lambda a: (a * gradient).sum(-1)  # noqa: E731
    moved = langevin_step(value, action, noise, step_size, 2.0, normalize_gradient=True)
    torch.testing.assert_close(moved, action + 0.005 * 2.0 * gradient / 5.0 + 0.1 * noise)
    moved = langevin_step(value, action, noise, step_size, 2.0, normalize_gradient=False)
    torch.testing.assert_close(moved, action + 0.005 * 2.0 * gradient + 0.1 * noise)
    moved = langevin_step(value, action, None, step_size, 500.0, normalize_gradient=False)
    assert torch.equal(moved, torch.tensor([[1.0, -1.0]])), "clipped"


def test_reflection_stays_in_the_box_and_is_identity_inside() -> None:
    action = torch.linspace(-9.0, 9.0, 1801)
    reflected = apply_boundary(action, "reflect")
    assert reflected.abs().max() <= 1.0
    inside = action.abs() <= 1.0
    torch.testing.assert_close(reflected[inside], action[inside], atol=1e-5, rtol=0)


@pytest.mark.parametrize("context", [torch.no_grad, torch.inference_mode, torch.enable_grad])
def test_works_in_every_gradient_mode(context: Callable) -> None:
    start, noise = torch.zeros(4, 3), torch.randn(10, 2, 4, 3)
    with context():
        action = langevin_chain(quadratic(torch.full((3,), 0.2)), start, noise, step_sizes=STEP_SIZES)
    assert action.isfinite().all()


def test_works_inside_vmap() -> None:
    torch.manual_seed(0)
    targets = torch.tensor([[0.5, -0.5], [-0.3, 0.1], [0.0, 0.9]])
    starts, noise = torch.zeros(3, 8, 2), torch.randn(3, 10, 2, 8, 2)

    def chain(target: Tensor, start: Tensor, noise: Tensor) -> Tensor:
        return langevin_chain(quadratic(target), start, noise, step_sizes=STEP_SIZES)

    batched = torch.vmap(chain)(targets, starts, noise)
    looped = torch.stack([chain(*inputs) for inputs in zip(targets, starts, noise, strict=True)])
    torch.testing.assert_close(batched, looped)


def test_compiles_without_graph_breaks() -> None:
    torch.manual_seed(0)
    start, noise, target = torch.zeros(4, 2), torch.randn(2, 2, 4, 2), torch.tensor([0.3, -0.3])
    step_sizes = NoiseSchedule(2).step_sizes.float()

    def chain(start: Tensor, noise: Tensor, target: Tensor) -> Tensor:
        return langevin_chain(quadratic(target), start, noise, step_sizes=step_sizes)

    compiled = torch.compile(chain, fullgraph=True)
    torch.testing.assert_close(compiled(start, noise, target), chain(start, noise, target))


def test_best_particle_is_the_one_that_scores_highest() -> None:
    particles = torch.randn(5, 3, 4, 2)
    score = torch.randn(5, 3, 4)
    best = best_particle(particles, score)
    for i in range(3):
        for j in range(4):
            assert torch.equal(best[i, j], particles[score[:, i, j].argmax(), i, j])


def test_reduce_ensemble() -> None:
    heads = torch.tensor([[1.0, 5.0], [3.0, 2.0]])
    assert reduce_ensemble(heads, "sum").tolist() == [4.0, 7.0]
    assert reduce_ensemble(heads, "mean").tolist() == [2.0, 3.5]
    assert reduce_ensemble(heads, "min").tolist() == [1.0, 2.0]


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ({"steps_per_level": 0}, "steps_per_level is 0"),
        ({"w": 0.0}, "w is 0.0"),
        ({"boundary": "wrap"}, "boundary is 'wrap'; expected one of 'clip', 'reflect'"),
        ({"execution": "fast"}, "execution is 'fast'"),
    ],
)
def test_bad_settings_are_named(arguments: dict, words: str) -> None:
    with pytest.raises(ValueError, match=words):
        LangevinSampler(-torch.ones(2), torch.ones(2), **arguments)


def test_schedule_that_cannot_mix_warns() -> None:
    with pytest.warns(UserWarning, match="cannot mix"):
        LangevinSampler(-torch.ones(2), torch.ones(2), NoiseSchedule(num_levels=3))


def test_boltzmann_mean_and_covariance_on_a_quadratic() -> None:
    """Without normalisation, far from the box, small constant steps sample exp(wQ): a Gaussian."""
    torch.manual_seed(0)
    precision = torch.tensor([[2.0, 0.6], [0.6, 1.0]])
    mean, w, step, num_chains, num_steps = torch.tensor([0.1, -0.2]), 200.0, 2e-4, 20_000, 400

    def value(level: int) -> Callable[[Tensor], Tensor]:
        def quadratic_form(action: Tensor) -> Tensor:
            difference = action - mean
            return -0.5 * ((difference @ precision) * difference).sum(-1)

        return quadratic_form

    action = langevin_chain(
        value,
        torch.zeros(num_chains, 2),
        torch.randn(1, num_steps, num_chains, 2),
        step_sizes=torch.tensor([step]),
        steps_per_level=num_steps,
        w=w,
        normalize_gradient=False,
    )
    covariance = torch.linalg.inv(w * precision)
    deviations = covariance.diagonal().sqrt()
    assert (action.abs() < 1).all(), "the box must not matter"
    # Slowest rate of the chain: exp(-400 steps * step / 2 * w * 0.72) = 3e-3 of the start's offset is left; the
    # sampling error of a mean is deviation / sqrt(n), of a (co)variance about variance * sqrt(2 / n): five of each.
    tolerance = 5 * deviations / num_chains**0.5 + 4e-3 * mean.abs()
    assert ((action.mean(0) - mean).abs() < tolerance).all()
    # The discretised chain's stationary variance exceeds the target's by the factor 1 / (1 - step * w * curvature / 4).
    bias = step * w * torch.linalg.eigvalsh(precision).max() / 4
    scale = deviations.unsqueeze(0) * deviations.unsqueeze(1)
    error = (torch.cov(action.T) - covariance).abs() / scale
    assert (error < 5 * math.sqrt(2 / num_chains) + 1.5 * bias).all()


def test_all_modes_of_a_mixture_are_visited_in_their_order() -> None:
    """Four modes of weights .4 .3 .2 .1: the annealed default chain finds all and keeps the ranking."""
    torch.manual_seed(0)
    w, num_chains, spread = 500.0, 8_000, 0.05
    centers = torch.tensor([[0.5, 0.5], [-0.5, 0.5], [-0.5, -0.5], [0.5, -0.5]])
    log_weights = torch.tensor([0.4, 0.3, 0.2, 0.1]).log()
    sigmas = NoiseSchedule().sigmas.float()

    def value(level: int) -> Callable[[Tensor], Tensor]:
        # exp(wQ) of each level is the mixture smoothed by that level's noise, in the coarse levels widened so that
        # the modes overlap, as a trained noise-conditioned critic's are.
        width = (spread**2 + (4 * sigmas[level]) ** 2).sqrt()

        def log_density(action: Tensor) -> Tensor:
            squared = ((action.unsqueeze(-2) - centers) ** 2).sum(-1)
            return (log_weights - 0.5 * squared / width**2).logsumexp(-1) / w

        return log_density

    action = langevin_chain(
        value,
        torch.rand(num_chains, 2) * 2 - 1,
        torch.randn(10, 2, num_chains, 2),
        step_sizes=STEP_SIZES,
        w=w,
        normalize_gradient=True,
    )
    distance = (action.unsqueeze(1) - centers).norm(dim=-1)
    nearest_distance, nearest = distance.min(-1)
    share = torch.bincount(nearest, minlength=4) / num_chains
    # A uniform start splits the chains between the modes' basins: a share of 1/4, known to 5 standard errors, would be
    # the least informed sampler; every mode must hold well more than none.
    assert share.min() > 0.02 + 5 * math.sqrt(0.02 * 0.98 / num_chains), share
    assert (nearest_distance < 3 * spread).float().mean() > 0.95, "chains end at modes"


def test_action_gradient_matches_autograd_and_keeps_no_graph() -> None:
    weight = torch.randn(3, 1, requires_grad=True)
    action = torch.randn(5, 3)
    gradient = action_gradient(lambda a: (a.pow(2) @ weight).squeeze(-1), action)
    torch.testing.assert_close(gradient, 2 * action * weight.detach().T)
