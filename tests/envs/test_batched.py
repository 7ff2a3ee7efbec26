"""BatchedEnv is a TorchRL environment like any other, whichever engine is under it.

The task compiles fast; what all its tests share is compiled once.
"""

from __future__ import annotations

from functools import partial
from typing import Any

import pytest
import torch
from torchrl.collectors import Collector
from torchrl.envs import Compose, InitTracker, ParallelEnv, RewardSum, StepCounter, TransformedEnv
from torchrl.envs.utils import RandomPolicy, check_env_specs

from envs import make_env
from envs.batched import BatchedEnv

NUM_ENVS = 4
MAX_EPISODE_STEPS = 6


@pytest.fixture(params=["mujoco", pytest.param("mjx", marks=pytest.mark.slow)])
def engine(request: pytest.FixtureRequest) -> str:
    return request.param


def make(engine: str, **options: Any) -> BatchedEnv:
    options = {"seed": 1, "max_episode_steps": MAX_EPISODE_STEPS} | options
    env = make_env("InvertedPendulum-v5", NUM_ENVS, engine=engine, **options)
    assert isinstance(env, BatchedEnv)
    return env


def test_specs(engine: str) -> None:
    env = make(engine)
    check_env_specs(env, break_when_any_done="both", seed=0)
    assert env.batch_size == torch.Size([NUM_ENVS])
    assert env.observation_spec["observation"].shape == (NUM_ENVS, 4)


def test_transforms_are_right_across_resets(engine: str) -> None:
    env = TransformedEnv(make(engine), Compose(RewardSum(), StepCounter(), InitTracker()))  # pyright: ignore
    rollout = env.rollout(5 * MAX_EPISODE_STEPS, break_when_any_done=False)
    rewards, done = rollout["next", "reward"][..., 0], rollout["next", "done"][..., 0]
    assert rollout["next", "truncated"].any()
    began, count, total = torch.ones(NUM_ENVS, dtype=torch.bool), torch.zeros(NUM_ENVS), torch.zeros(NUM_ENVS)
    for step in range(rollout.shape[1]):
        count, total = torch.where(began, 1, count + 1), torch.where(began, 0.0, total) + rewards[:, step]
        assert torch.equal(rollout["is_init"][:, step, 0], began)
        assert torch.equal(rollout["next", "step_count"][:, step, 0], count.to(torch.int64))
        assert torch.equal(rollout["next", "episode_reward"][:, step, 0], total)
        assert torch.equal(rollout["next", "truncated"][:, step, 0], count == MAX_EPISODE_STEPS)
        began = done[:, step]


def test_a_collector_steps_it(engine: str) -> None:
    env = make(engine)
    collector = Collector(env, RandomPolicy(env.action_spec), frames_per_batch=8 * NUM_ENVS, total_frames=16 * NUM_ENVS)
    for batch in collector:
        assert batch.shape == (NUM_ENVS, 8)
        ended = batch["next", "done"][:, :-1, 0]
        continued = torch.where(ended.unsqueeze(-1), batch["observation"][:, 1:], batch["next", "observation"][:, :-1])
        assert torch.equal(batch["observation"][:, 1:], continued)
        # ("next", "observation") of an ended episode is where it ended, not where the next one starts.
        assert ended.any() and not torch.equal(
            batch["next", "observation"][:, :-1][ended], batch["observation"][:, 1:][ended]
        )
    collector.shutdown()


@pytest.mark.slow
def test_processes_of_parallel_env_step_it() -> None:
    maker = partial(make_env, "InvertedPendulum-v5", NUM_ENVS, max_episode_steps=MAX_EPISODE_STEPS)
    makers = [partial(maker, engine=engine) for engine in ("mujoco", "mjx")]
    parallel = ParallelEnv(2, makers, mp_start_method="spawn")
    try:
        rollout = parallel.rollout(8, break_when_any_done=False)
        assert rollout.shape == (2, NUM_ENVS, 8)
        assert not torch.equal(rollout["observation"][0], rollout["observation"][1])
        assert rollout["next", "done"][..., :MAX_EPISODE_STEPS, 0].any(-1).all()
    finally:
        parallel.close()


def test_an_action_that_is_not_finite_is_refused_by_name(engine: str) -> None:
    env = make(engine)
    action = torch.zeros(NUM_ENVS, 1)
    action[1], action[3] = torch.nan, torch.inf
    tensordict = env.reset()
    before = env.state_dict()["engine"]
    with pytest.raises(ValueError, match=r"action of environment 1, 3 is not finite"):
        env.step(tensordict.set("action", action))
    assert all(torch.equal(before[name], value) for name, value in env.state_dict()["engine"].items())
    following = env.step(tensordict.set("action", torch.zeros(NUM_ENVS, 1)))["next"]
    assert following["observation"].isfinite().all()
