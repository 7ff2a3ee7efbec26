"""Promises of ahead-of-time programs: the actor's own actions, in native code."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from tensordict import TensorDict
from torchrl.envs.utils import ExplorationType, set_exploration_type

from nclql_torchrl import LangevinActor, NoiseSchedule, program
from nclql_torchrl.machine import cpp_compiler
from nclql_torchrl.program import DETERMINISTIC, SAMPLING, SamplingPolicy, compile_programs, load_program

MakeActor = Callable[..., LangevinActor]

needs_compiler = pytest.mark.skipif(cpp_compiler() is None, reason="needs a C++ compiler")


@pytest.fixture
def actor(make_actor: MakeActor) -> LangevinActor:
    """Short chains of two particles: little to compile."""
    schedule = NoiseSchedule(2, 0.012, 0.01)
    return make_actor(schedule=schedule, steps_per_level=1, w=5.0, num_particles=2, deterministic_num_particles=1)


def test_the_policy_of_tensors_is_the_actor(actor: LangevinActor) -> None:
    policy = SamplingPolicy(actor)
    observation, start, noise = policy.example_inputs(7)
    names = ("observation", "initial_action", "langevin_noise")
    tensordict = TensorDict(dict(zip(names, (observation, start, noise), strict=True)), [7])
    assert torch.equal(policy(observation, start, noise), actor(tensordict)["action"])


@needs_compiler
@pytest.mark.slow
@pytest.mark.timeout(900)  # two calls of the C++ compiler's, on a machine that may be busy
def test_programs_act_as_the_actor_does(actor: LangevinActor, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    differences = compile_programs(actor, tmp_path, states=2)
    assert {path.name for path in tmp_path.iterdir()} == {DETERMINISTIC, SAMPLING} == set(differences)
    # As for torch.compile in tests/test_execution.py: a few dozen roundings, two steps of slope w / 2 at most.
    assert max(differences.values()) < 1e-5
    deterministic, sampling = load_program(tmp_path / DETERMINISTIC), load_program(tmp_path / SAMPLING)
    observation, start, noise = SamplingPolicy(actor).example_inputs(2)
    with set_exploration_type(ExplorationType.DETERMINISTIC):
        expected = actor(TensorDict({"observation": observation}, [2]))["action"]
    torch.testing.assert_close(deterministic(observation), expected, atol=2e-5, rtol=0.0)
    assert torch.equal(sampling(observation, start, noise), sampling(observation, start, noise))
    assert not torch.equal(sampling(observation, start, noise), sampling(observation, start, -noise))
    # The check is one: a program of other weights fails it.
    with torch.no_grad():
        actor.qvalue_network_params["module", "trunk", "0", "weight"].mul_(-1.0)
    assert program._difference(deterministic, actor, SamplingPolicy(actor), 2, 1) > program.TOLERANCE


def test_what_cannot_be_a_program_is_named(make_actor: MakeActor, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"sampler\.warm_start is true"):
        compile_programs(make_actor(warm_start=True), tmp_path)
    with pytest.raises(ValueError, match="states is 0"):
        compile_programs(make_actor(), tmp_path, states=0)
    with pytest.raises(FileNotFoundError, match=r"written by nclql-export program=true"):
        load_program(tmp_path / SAMPLING)
    assert not list(tmp_path.iterdir())
