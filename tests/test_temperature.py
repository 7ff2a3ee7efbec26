"""The automatic temperature holds the spread where it can be held, and says where it cannot."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from tensordict import TensorDict
from torch import Tensor, nn
from torchrl.data import Bounded
from torchrl.modules import ValueOperator

from nclql_torchrl import AutomaticTemperature, LangevinActor, NCLQLLoss


class Quadratic(nn.Module):
    """Q = -curvature / 2 (a - tanh(s))^2, the same at every level."""

    def __init__(self, curvature: float = 1.0) -> None:
        super().__init__()
        self.curvature = nn.Parameter(torch.tensor(curvature))

    def forward(self, observation: Tensor, action: Tensor, level: Tensor) -> Tensor:
        return -0.5 * self.curvature * (action - 0.5 * observation.tanh()).square().sum(-1, keepdim=True)


def make_actor(action_dim: int, **options: Any) -> LangevinActor:
    critic = ValueOperator(Quadratic(), in_keys=["observation", "action", "level"])
    return LangevinActor([critic], spec=Bounded(-1.0, 1.0, torch.Size([action_dim])), **options)


def batch(action_dim: int) -> TensorDict:
    return TensorDict({"observation": torch.randn(64, action_dim)}, [64])


@pytest.mark.parametrize("normalize", [True, False], ids=["normalized", "unnormalized"])
@pytest.mark.parametrize(("action_dim", "target"), [(1, 0.1), (6, 0.05), (6, 0.3)])
def test_the_spread_reaches_its_target(action_dim: int, target: float, normalize: bool) -> None:
    actor = make_actor(action_dim, normalize_gradient=normalize)
    temperature = AutomaticTemperature(actor, target, gain=0.5)
    spreads = []
    for _ in range(30):
        temperature.step(batch(action_dim))
        spreads.append(float(temperature.spread))
    # A measurement has num_states (num_particles - 1) action_dim degrees of freedom, and a median costs a factor of
    # 1.25. The mean of the last 15 is known better than one of them; that is not counted on, as each corrects w by what
    # the one before got wrong.
    error = 1.25 * math.sqrt(0.5 / (32 * 3 * action_dim))
    assert abs(math.log(sum(spreads[-15:]) / 15 / target)) < 5 * error


class TwoModes(nn.Module):
    """Q with one top for negative observations, and two equal ones at -0.8 and 0.8 for positive ones."""

    def __init__(self) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.ones(()))

    def forward(self, observation: Tensor, action: Tensor, level: Tensor) -> Tensor:
        top = torch.where(observation > 0, 0.8, 0.0)
        return -0.5 * self.scale * (action.abs() - top).square().sum(-1, keepdim=True)


def test_states_with_two_modes_do_not_drive_w_while_they_are_few() -> None:
    critic = ValueOperator(TwoModes(), in_keys=["observation", "action", "level"])
    actor = LangevinActor([critic], spec=Bounded(-1.0, 1.0, torch.Size([1])))
    temperature = AutomaticTemperature(actor, 0.1, gain=0.5)
    observation = torch.where(torch.arange(32) < 8, 1.0, -1.0).unsqueeze(-1)
    for _ in range(20):
        temperature.step(TensorDict({"observation": observation}, [32]))
    # With one mode 0.1 takes about w = 30 (benchmarks/results/README.md).
    assert 10 < actor.sampler.w < 60


def test_w_stays_below_the_bound_of_the_normalised_gradient() -> None:
    actor = make_actor(17)
    temperature = AutomaticTemperature(actor, 0.02, gain=1.0)
    # A critic that does not care about the action: no w narrows its chains.
    actor.qvalue_network_params.apply_(lambda parameter: parameter.data.zero_())
    for _ in range(4):
        temperature.step(batch(17))
    assert float(actor.sampler.w) == temperature.largest_w == pytest.approx(500)
    assert temperature.spread > 0.3


def test_w_stays_the_same_tensor_and_is_saved_with_the_loss() -> None:
    actor = make_actor(2)
    loss, w = NCLQLLoss(actor), actor.sampler.w
    AutomaticTemperature(actor, 0.5).step(batch(2))
    assert actor.sampler.w is w and float(w) < 500
    other = NCLQLLoss(make_actor(2))
    other.load_state_dict(loss.state_dict())
    assert torch.equal(other.sampler.w, w)
    assert not list(AutomaticTemperature(actor, 0.5).parameters()), "nothing that an optimizer would train"


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"target_spread": 1.0}, "target_spread is 1; expected a number from 0.02"),
        ({"target_spread": 0.01}, "target_spread is 0.01; expected a number from 0.02"),
        ({"num_particles": 1}, "num_particles is 1; expected at least 1 and 2"),
        ({"gain": 0.0}, "gain is 0.0"),
    ],
)
def test_bad_settings_are_named(options: dict, words: str) -> None:
    with pytest.raises(ValueError, match=words):
        AutomaticTemperature(make_actor(2), **options)
