"""n-step returns are those that one computes by hand, whatever the batches they are collected in."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from tensordict import TensorDict
from torch import Tensor

from nclql_torchrl import LangevinActor, NCLQLLoss
from nclql_torchrl.training.n_step import STEPS_KEY, NStepReturns

GAMMA = 0.9
NUM_ENVS, TIME = 3, 24


@pytest.fixture
def steps() -> TensorDict:
    """Steps [num_envs, time] with observations that count them, terminal and truncated ends, some in a row."""
    terminated, truncated = (torch.rand(NUM_ENVS, TIME, 1) < 0.15 for _ in range(2))
    count = torch.arange(NUM_ENVS * TIME, dtype=torch.float32).reshape(NUM_ENVS, TIME, 1).expand(-1, -1, 4)
    following = {
        "observation": count + 0.5,
        "reward": torch.randn(NUM_ENVS, TIME, 1),
        "terminated": terminated,
        "done": terminated | truncated,
    }
    action = torch.rand(NUM_ENVS, TIME, 2)
    return TensorDict({"observation": count, "action": action, "next": following}, [NUM_ENVS, TIME])


def by_hand(reward: Tensor, done: Tensor, env: int, time: int) -> tuple[float, int]:
    """The 3-step return without its bootstrap, and the index of its last step."""
    last = next((step for step in (time, time + 1) if done[env, step]), time + 2)
    return sum(GAMMA ** (step - time) * float(reward[env, step]) for step in range(time, last + 1)), last


@pytest.mark.parametrize("sizes", [(TIME,), (1,) * TIME, (1, 4, 2, 1, 16)])
def test_a_return_ends_after_n_steps_or_with_its_episode(
    steps: TensorDict, sizes: tuple[int, ...], make_actor: Callable[..., LangevinActor]
) -> None:
    loss = NCLQLLoss(make_actor())
    loss.make_value_estimator(gamma=GAMMA)
    n_step = NStepReturns(3, GAMMA, loss.in_keys)
    batches = [n_step(batch) for batch in steps.split(list(sizes), dim=1)]
    # The three newest steps of every environment wait.
    assert sum(len(batch) for batch in batches) == NUM_ENVS * (TIME - 3)
    transitions: Any = TensorDict.cat([batch for batch in batches if len(batch)])
    _, metadata = loss.qvalue_loss(transitions)
    following, action = transitions.get("next"), transitions["action"]
    distance = transitions[STEPS_KEY].tolist()
    kinds = set()
    for index, count in enumerate(transitions["observation"][:, 0].tolist()):
        env, time = divmod(int(count), TIME)
        expected, last = by_hand(steps["next", "reward"], steps["next", "done"], env, time)
        assert float(following["reward"][index]) == pytest.approx(expected, abs=1e-5)
        assert torch.equal(action[index], steps["action"][env, time])
        for key in ("observation", "terminated", "done"):
            assert torch.equal(following[key][index], steps["next", key][env, last])
        assert distance[index] == last - time + 1
        ends = bool(following["terminated"][index])
        kinds.add((distance[index], ends, bool(following["done"][index])))
        bootstrap = 0.0 if ends else GAMMA ** distance[index] * float(metadata["next_state_value"][index])
        target = loss.reward_scale * expected + bootstrap
        assert float(metadata["target_value"][index]) == pytest.approx(target, abs=1e-5)
    # Terminal and truncated ends within the return, and at its end, and none.
    assert {(1, True, True), (2, True, True), (1, False, True), (2, False, True), (3, False, False)} <= kinds


def test_what_a_lost_simulation_cut_short_is_left_out(steps: TensorDict) -> None:
    steps["next", "done"][:] = False
    steps["next", "terminated"][:] = False
    diverged = torch.zeros(NUM_ENVS, TIME, 1, dtype=torch.bool)
    diverged[1, 10] = True
    for key in ("diverged", "done", "terminated"):
        steps["next", key] = diverged.clone()
    transitions = NStepReturns(3, GAMMA, ["observation", ("next", "reward")])(steps)
    kept = {divmod(int(count), TIME) for count in transitions["observation"][:, 0]}
    assert {(1, time) for time in range(TIME - 3)} - {place for place in kept if place[0] == 1} == {
        (1, 8),
        (1, 9),
        (1, 10),
    }
    assert set(transitions.keys(True, True)) == {"observation", ("next", "reward"), STEPS_KEY}


def test_what_waits_is_its_state(steps: TensorDict) -> None:
    first, second = (NStepReturns(3, GAMMA, ["observation", ("next", "reward")]) for _ in range(2))
    second.load_state_dict(first.state_dict())
    first(steps[:, :5])
    second.load_state_dict(first.state_dict())
    assert (first(steps[:, 5:]) == second(steps[:, 5:])).all()
