"""Evaluation is repeatable, and its arithmetic is right."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from tensordict import TensorDict, TensorDictBase
from torchrl.data import Bounded, Composite, Unbounded
from torchrl.envs import EnvBase
from torchrl.envs.utils import ExplorationType, set_exploration_type

from envs import make_env
from nclql_torchrl.training import TrainConfig, evaluate
from nclql_torchrl.training.components import make_actor
from nclql_torchrl.training.evaluation import evaluate_in

GAMMA, REWARD_SCALE = 0.5, 0.1


class CountdownEnv(EnvBase):
    """Environment 0 terminates after two steps, environment 1 is truncated after three; every reward is 1."""

    batch_locked = True  # pyright: ignore[reportAssignmentType]

    def __init__(self) -> None:
        super().__init__(batch_size=torch.Size([2]))
        self.action_spec = Bounded(-1.0, 1.0, torch.Size([2, 1]))
        self.observation_spec = Composite(observation=Unbounded(torch.Size([2, 1])), shape=(2,))
        self.reward_spec = Unbounded(torch.Size([2, 1]))
        self.time = torch.zeros(2, 1)

    def _reset(self, tensordict: TensorDictBase | None = None, **kwargs: Any) -> TensorDict:
        mask = torch.ones(2, 1, dtype=torch.bool) if tensordict is None else tensordict["_reset"]
        self.time = torch.where(mask, 0.0, self.time)
        return TensorDict({"observation": self.time.clone()}, [2])

    def _step(self, tensordict: TensorDictBase) -> TensorDict:
        self.time = self.time + 1
        terminated = self.time == torch.tensor([[2.0], [-1.0]])
        truncated = self.time == torch.tensor([[-1.0], [3.0]])
        entries = {"observation": self.time.clone(), "reward": torch.ones(2, 1), "terminated": terminated}
        return TensorDict({**entries, "truncated": truncated, "done": terminated | truncated}, [2])

    def _set_seed(self, seed: int | None) -> None:
        pass


def test_returns_lengths_and_overestimation() -> None:
    env = CountdownEnv()
    config = TrainConfig()
    config.network.hidden_sizes = [4]
    actor = make_actor(config, env, torch.device("cpu"), diagnostics=True)
    result = evaluate_in(actor, env, gamma=GAMMA, reward_scale=REWARD_SCALE)
    assert result.returns == [2.0, 3.0]
    assert result.lengths == [2, 3]
    assert (result.mean, result.std, result.mean_length) == (2.5, 0.5, 2.5)
    # Terminated: nothing follows. Truncated: the critic's value of what would follow, discounted three times.
    with torch.no_grad(), set_exploration_type(ExplorationType.DETERMINISTIC):
        first = actor(TensorDict({"observation": torch.zeros(1, 1)}, [1]))["q_after"].item()
        last = actor(TensorDict({"observation": torch.full((1, 1), 3.0)}, [1]))["q_after"].item()
    terminated = REWARD_SCALE * (1 + GAMMA)
    truncated = REWARD_SCALE * (1 + GAMMA + GAMMA**2) + GAMMA**3 * last
    assert result.discounted_return == pytest.approx((terminated + truncated) / 2, rel=1e-5)
    assert result.estimated_q == pytest.approx(first, rel=1e-5)
    assert result.overestimation == result.estimated_q - result.discounted_return


def test_the_same_seed_gives_the_same_returns() -> None:
    config = TrainConfig()
    config.network.hidden_sizes = [8]
    env = make_env("Pendulum-v1", 1, engine="gymnasium", device="cpu", seed=0)
    actor = make_actor(config, env, torch.device("cpu"), diagnostics=True)

    def returns(seed: int) -> list[float]:
        return evaluate(actor, "Pendulum-v1", episodes=2, seed=seed, gamma=0.99, reward_scale=0.2).returns

    assert returns(1) == returns(1)
    assert returns(1) != returns(2)
