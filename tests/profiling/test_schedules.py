"""Chains of different lengths stay comparable."""

from __future__ import annotations

import itertools
import warnings
from functools import partial
from typing import Any

import pytest
import torch
from tensordict import TensorDict
from torch._dynamo import lookup_backend

from nclql_torchrl import NoiseSchedule
from nclql_torchrl.langevin import LangevinSampler
from nclql_torchrl.profiling.config import ProfileConfig, Setting
from nclql_torchrl.profiling.schedules import base_schedule, describe_change, mixing_schedule, nearest_levels
from nclql_torchrl.profiling.subject import untrained
from nclql_torchrl.targets import stiff_quadratic
from nclql_torchrl.training.config import SamplerConfig

CPU = torch.device("cpu")


@pytest.mark.parametrize(("levels", "steps"), list(itertools.product((1, 2, 3, 5, 10, 20, 40), (1, 2, 3, 4, 10))))
def test_every_schedule_can_mix_and_ends_as_the_critic_was_trained(levels: int, steps: int) -> None:
    base = base_schedule(SamplerConfig())
    schedule = mixing_schedule(SamplerConfig(), levels, steps)
    assert schedule.minimum_steps_per_level() <= steps
    assert schedule.num_levels == levels
    assert schedule.sigmas[-1] == pytest.approx(base.sigmas[-1].item())
    assert schedule.step_sizes[-1] == base.step_sizes[-1]
    # Changed only where it must be, and no further.
    untouched = NoiseSchedule(levels)
    if untouched.minimum_steps_per_level() <= steps:
        torch.testing.assert_close(schedule.sigmas, untouched.sigmas)
        assert describe_change(SamplerConfig(), schedule) == ""
    else:
        assert schedule.minimum_steps_per_level() == steps
        assert describe_change(SamplerConfig(), schedule).startswith("sigma_max 0.1 -> 0.0")


def test_adapting_the_first_level_distorts_least() -> None:
    # The figures that mixing_schedule's docstring quotes; they differ a hundredfold, their noise is a few percent.
    target = stiff_quadratic()
    exact = target.log_density(target.sample(20_000)).mean()
    ratio = 2.0**4  # 5 levels, neighbours differ by sqrt(2 T) = 2

    def shortfall(schedule: NoiseSchedule) -> float:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            sampler = LangevinSampler(-torch.ones(3), torch.ones(3), schedule, steps_per_level=2)
        actions = sampler(target.action_value((4096,), schedule))
        return float(exact - target.log_density(actions).mean())

    adapted = shortfall(mixing_schedule(SamplerConfig(), 5, 2))
    unchanged = shortfall(NoiseSchedule(5))
    end_raised = shortfall(NoiseSchedule(5, 0.1, 0.1 / ratio, 1e-4 * (0.1 / ratio / 0.001) ** 2))
    assert adapted == pytest.approx(14, rel=0.2)
    assert unchanged == pytest.approx(642, rel=0.2)
    assert end_raised == pytest.approx(1693, rel=0.2)


def test_levels_read_the_critic_at_the_noise_they_have() -> None:
    base = NoiseSchedule()
    assert nearest_levels(base, base) == list(range(10))
    assert nearest_levels(base, NoiseSchedule(1)) == [9]
    assert nearest_levels(base, mixing_schedule(SamplerConfig(), 3, 2)) == [6, 8, 9]


def test_the_critics_own_schedule_gives_the_critics_own_actions() -> None:
    subject = untrained(ProfileConfig(observation_dim=3, action_dim=2, hidden_sizes=[8, 8], quality_states=4), CPU)
    setting = Setting(10, 2, 4, 1, "eager", "float32", "cpu")
    actor = subject.actor(setting)
    states = subject.states(4)
    value = actor.action_value(states)
    for level in range(10):
        action = torch.rand(1, 4, 2) * 2 - 1
        found = value.at_level(level).heads(action)
        for critic, expected in enumerate(found):
            network = actor.qvalue_network.module  # pyright: ignore[reportAttributeAccessIssue]
            with actor.qvalue_network_params["module"][critic].to_module(network):
                own = network(states["observation"], action[0], torch.tensor(level))  # pyright: ignore[reportCallIssue]
            torch.testing.assert_close(expected[0], own.squeeze(-1), atol=1e-5, rtol=1e-5)
    # With fewer levels the last one is still the noise-free landscape.
    short = subject.actor(Setting(3, 2, 4, 1, "eager", "float32", "cpu")).action_value(states)
    torch.testing.assert_close(short.at_level(2).heads(action), value.at_level(9).heads(action))


@torch.no_grad()
def test_what_is_compiled_is_the_loop_that_users_get(monkeypatch: pytest.MonkeyPatch) -> None:
    loops: list[bool] = []

    def backend(graph: torch.fx.GraphModule, inputs: list[torch.Tensor], **options: object) -> Any:
        loops.append(any("while_loop" in str(node.target) for node in graph.graph.nodes))
        return lookup_backend("aot_eager")(graph, inputs)

    monkeypatch.setattr(torch, "compile", partial(torch.compile, backend=backend))
    subject = untrained(ProfileConfig(observation_dim=3, action_dim=2, hidden_sizes=[8], quality_states=4), CPU)
    eager, compiled = (subject.actor(Setting(5, 1, 4, 1, mode, "float32", "cpu")) for mode in ("eager", "compile"))
    states = subject.states(4)
    states["initial_action"], states["langevin_noise"] = torch.zeros(4, 1, 2), torch.randn(4, 1, 5, 1, 2)
    expected = eager(states.clone())["action"]
    # Two float32 programs of five steps.
    torch.testing.assert_close(compiled(states.clone())["action"], expected, atol=1e-5, rtol=0)
    assert loops and all(loops)


def test_states_repeat_where_there_are_not_enough() -> None:
    subject = untrained(ProfileConfig(observation_dim=3, action_dim=2, hidden_sizes=[8], quality_states=4), CPU)
    states = subject.states(6)
    assert isinstance(states, TensorDict)
    assert torch.equal(states["observation"][4:], states["observation"][:2])
