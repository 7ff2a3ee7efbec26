"""Promises of NoiseConditionedQNetwork and of its hand-written action gradient."""

from __future__ import annotations

from typing import Any, get_args

import pytest
import torch
import torch.nn.functional as F
from tensordict import TensorDict
from torchrl.modules import ValueOperator

from nclql_torchrl import NoiseConditionedQNetwork
from nclql_torchrl.mish import mish_with_slope
from nclql_torchrl.value import EnsembleReduction, ModuleActionValue, action_gradient

IN_KEYS = ["observation", "action", "level"]


@pytest.mark.parametrize(
    ("observation_dim", "action_dim", "parameters"), [(17, 6, 286_306), (11, 3, 281_698), (8, 2, 279_650)]
)
def test_sizes_are_the_authors(observation_dim: int, action_dim: int, parameters: int) -> None:
    critic = NoiseConditionedQNetwork(observation_dim, action_dim)
    assert 2 * sum(parameter.numel() for parameter in critic.parameters()) == parameters


def test_initialisation_is_truncated_normal_with_zero_biases() -> None:
    torch.manual_seed(0)
    layer = NoiseConditionedQNetwork(17, 6).trunk[1]
    assert isinstance(layer, torch.nn.Linear)
    weight = layer.weight
    deviation = 256**-0.5
    assert weight.abs().max() <= 2 * deviation
    # A standard normal cut at two deviations has standard deviation 0.8796; 65,536 draws know it to about 0.3%.
    assert abs(weight.std().item() / deviation - 0.8796) < 0.01
    parameters = NoiseConditionedQNetwork(3, 2).trunk.named_parameters()
    assert all(not parameter.any() for name, parameter in parameters if name.endswith("bias"))


def test_level_changes_the_value_and_any_batch_shape_works() -> None:
    critic = NoiseConditionedQNetwork(3, 2, (16, 16))
    observation, action = torch.randn(4, 5, 3), torch.rand(4, 5, 2)
    values = critic(observation, action, torch.zeros(4, 5, dtype=torch.int64))
    assert values.shape == (4, 5, 1)
    assert (values != critic(observation, action, torch.full((4, 5), 9))).any()
    assert critic(observation[0, 0], action[0, 0], torch.tensor(3)).shape == (1,)


def test_action_range_is_normalised_inside() -> None:
    torch.manual_seed(0)
    narrow = NoiseConditionedQNetwork(3, 2, (16,), action_low=-0.4, action_high=0.4)
    wide = NoiseConditionedQNetwork(3, 2, (16,))
    wide.load_state_dict({k: v for k, v in narrow.state_dict().items() if not k.startswith("action_")}, strict=False)
    observation, action, level = torch.randn(6, 3), torch.rand(6, 2) * 2 - 1, torch.zeros(6, dtype=torch.int64)
    torch.testing.assert_close(narrow(observation, 0.4 * action, level), wide(observation, action, level))


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ({"observation_dim": 0, "action_dim": 1}, "observation_dim is 0"),
        ({"observation_dim": 1, "action_dim": 1, "hidden_sizes": ()}, "hidden_sizes is"),
        ({"observation_dim": 1, "action_dim": 1, "action_low": 1.0}, "low < high"),
        ({"observation_dim": 1, "action_dim": 1, "action_high": float("inf")}, "finite"),
    ],
)
def test_bad_values_are_named(arguments: dict, words: str) -> None:
    with pytest.raises(ValueError, match=words):
        NoiseConditionedQNetwork(**arguments)


def test_mish_with_slope_matches_torch() -> None:
    x = torch.cat([torch.linspace(-50.0, 50.0, 10_001, dtype=torch.float64), torch.tensor([-1e4, 1e4])])
    x.requires_grad_()
    expected = F.mish(x)
    (slope,) = torch.autograd.grad(expected.sum(), x)
    value, own_slope = mish_with_slope(x.detach())
    torch.testing.assert_close(value, expected.detach(), rtol=1e-13, atol=1e-15)
    torch.testing.assert_close(own_slope, slope, rtol=1e-12, atol=1e-14)
    assert all(part.isfinite().all() for part in mish_with_slope(x.detach().float()))


def test_layer_norm_stands_between_every_hidden_layer_and_its_activation() -> None:
    critic = NoiseConditionedQNetwork(3, 2, (16, 24), layer_norm=True)
    for parameter in critic.parameters():
        parameter.data += 0.2 * torch.randn_like(parameter)
    observation, action, level = torch.randn(6, 3), torch.rand(6, 2) * 2 - 1, torch.arange(6)
    hidden = torch.cat([observation, action, critic.embed_level(level)], -1)
    for layer, norm in zip(critic.trunk[:2], critic.norms, strict=True):
        hidden = F.mish(norm(layer(hidden)))
    torch.testing.assert_close(critic(observation, action, level), critic.trunk[2](hidden))


def test_layer_norm_is_absent_from_the_state_unless_it_is_asked_for() -> None:
    plain, normalised = (set(NoiseConditionedQNetwork(3, 2, (8,), layer_norm=on).state_dict()) for on in (False, True))
    assert normalised - plain == {"norms.0.weight", "norms.0.bias"}
    assert plain < normalised


def test_observations_are_normalised_and_clipped_inside() -> None:
    critic, plain = (NoiseConditionedQNetwork(3, 2, (16,), normalize_observation=on) for on in (True, False))
    assert not plain.load_state_dict(critic.state_dict(), strict=False).missing_keys
    observation, action, level = torch.randn(6, 3), torch.rand(6, 2) * 2 - 1, torch.arange(6)
    assert torch.equal(critic(observation, action, level), plain(observation, action, level)), "the identity at first"
    critic.observation_mean.copy_(torch.tensor([1.0, 2.0, 3.0]))
    critic.observation_deviation.copy_(torch.tensor([1e-4, 2.0, 0.5]))
    normalised = (observation - critic.observation_mean) / critic.observation_deviation
    assert normalised[:, 0].abs().min() > 10.0
    torch.testing.assert_close(critic(observation, action, level), plain(normalised.clamp(-10, 10), action, level))


@pytest.mark.parametrize("reduction", get_args(EnsembleReduction))
@pytest.mark.parametrize("option", [None, "layer_norm", "normalize_observation"])
@pytest.mark.parametrize("hidden_sizes", [(16,), (16, 24, 8)])
def test_hand_written_gradient_matches_autograd_of_the_plain_forward(
    reduction: EnsembleReduction, hidden_sizes: tuple[int, ...], option: str | None
) -> None:
    torch.manual_seed(1)
    network: dict[str, Any] = {"action_low": -2.0, "action_high": 1.0, "dtype": torch.float64}
    if option is not None:
        network[option] = True
    critics = [NoiseConditionedQNetwork(5, 3, hidden_sizes, **network) for _ in range(3)]
    for critic in critics:
        for parameter in critic.parameters():
            parameter.data += 0.2 * torch.randn_like(parameter)
        if option == "normalize_observation":
            critic.observation_mean.normal_()
            critic.observation_deviation.uniform_(0.1, 2.0)
    modules = [ValueOperator(critic, in_keys=IN_KEYS) for critic in critics]
    params = TensorDict.from_modules(*modules, as_module=True)
    observation = torch.randn(2, 7, 5, dtype=torch.float64)
    center, half_range = torch.tensor([-0.5] * 3), torch.tensor([1.5] * 3)
    options = {"action_center": center.double(), "action_half_range": half_range.double(), "reduction": reduction}
    fast = critics[0].action_value(params["module"], observation, num_levels=10, **options)
    inputs = TensorDict({"observation": observation}, [2, 7])
    plain = ModuleActionValue(modules[0], params, inputs, **options)
    action = torch.rand(2, 7, 3, dtype=torch.float64) * 2 - 1
    for level in (0, 4, 9):
        fast_value, plain_value = fast.at_level(level), plain.at_level(level)
        torch.testing.assert_close(fast_value.heads(action), plain_value.heads(action), rtol=1e-12, atol=1e-12)
        expected = action_gradient(plain_value, action)
        torch.testing.assert_close(fast_value.gradient(action), expected, rtol=1e-11, atol=1e-12)
        torch.testing.assert_close(action_gradient(fast_value, action), expected, rtol=1e-11, atol=1e-12)
        both = plain_value(action), expected
        torch.testing.assert_close(fast_value.value_and_gradient(action), both, rtol=1e-11, atol=1e-12)
        torch.testing.assert_close(plain_value.value_and_gradient(action), both, rtol=1e-11, atol=1e-12)
