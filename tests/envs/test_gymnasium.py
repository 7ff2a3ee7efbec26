"""The gymnasium engine is Gymnasium, batched."""

from __future__ import annotations

from typing import Any

import gymnasium
import numpy as np
import pytest
import torch
from torchrl.envs import EnvBase
from torchrl.envs.utils import check_env_specs

from envs import make_env

TASKS = ("Pendulum-v1", "HalfCheetah-v5")


def roll(env: EnvBase, steps: int = 5) -> torch.Tensor:
    """Next observations of a fixed sequence of actions after a reset."""
    tensordict = env.reset()
    generator = torch.Generator().manual_seed(1)
    observations = []
    for _ in range(steps):
        action = torch.rand(env.action_spec.shape, generator=generator) * 2 - 1
        tensordict, following = env.step_and_maybe_reset(tensordict.set("action", action))
        observations.append(tensordict["next", "observation"])
        tensordict = following
    return torch.stack(observations)


@pytest.mark.parametrize("task", TASKS)
def test_specs(task: str) -> None:
    env = make_env(task, num_envs=2, engine="gymnasium")
    check_env_specs(env)
    assert env.batch_size == torch.Size([2])
    assert env.observation_spec["observation"].dtype == env.reward_spec.dtype == torch.float32


def test_auto_is_gymnasium_for_tasks_that_no_other_engine_has() -> None:
    assert type(make_env("Pendulum-v1", num_envs=1)).__name__ == "GymnasiumEnvs"


@pytest.mark.parametrize("task", TASKS)
def test_the_same_seed_gives_the_same_trajectory_and_environments_differ(task: str) -> None:
    first, again, other = (roll(make_env(task, num_envs=2, engine="gymnasium", seed=seed)) for seed in (3, 3, 4))
    assert torch.equal(first, again)
    assert not torch.equal(first, other)
    assert not torch.equal(first[:, 0], first[:, 1])


def test_a_step_is_gymnasiums() -> None:
    env: Any = make_env("HalfCheetah-v5", num_envs=2, engine="gymnasium", ctrl_cost_weight=0.3)
    reference: Any = gymnasium.make("HalfCheetah-v5", ctrl_cost_weight=0.3)
    tensordict = env.reset()
    reference.reset()
    ours = env.simulations()[1].unwrapped
    reference.unwrapped.set_state(ours.data.qpos, ours.data.qvel)
    action = torch.full(env.action_spec.shape, 0.5)
    following = env.step(tensordict.set("action", action))["next"][1]
    observation, reward, *_ = reference.step(np.full(6, 0.5, np.float32))
    np.testing.assert_array_equal(following["observation"].numpy(), observation.astype(np.float32))
    np.testing.assert_allclose(following["reward"].item(), reward, rtol=1e-6)


def test_the_time_limit_truncates_with_the_true_last_observation() -> None:
    limited = make_env("Pendulum-v1", num_envs=2, max_episode_steps=3, seed=5)
    unlimited = make_env("Pendulum-v1", num_envs=2, max_episode_steps=9, seed=5)
    assert torch.equal(roll(limited, steps=3), roll(unlimited, steps=3))
    rollout = limited.rollout(4, break_when_any_done=False)
    assert rollout["next", "truncated"][0, :, 0].tolist() == [False, False, True, False]
    assert not rollout["next", "terminated"].any()
    assert not torch.equal(rollout["next", "observation"][:, 2], rollout["observation"][:, 3])


@pytest.mark.parametrize("task", TASKS)
def test_a_saved_state_replays_exactly(task: str) -> None:
    env = make_env(task, num_envs=2, engine="gymnasium", seed=1, max_episode_steps=4)
    tensordict = env.reset()
    for _ in range(2):
        tensordict = env.step(tensordict.set("action", torch.full(env.action_spec.shape, 0.3)))["next"]
    saved, start = env.state_dict(), tensordict.select("observation").clone()

    def replay(env: EnvBase) -> torch.Tensor:
        env.reset()
        env.load_state_dict(saved)
        following, observations = start.clone(), []
        for _ in range(5):  # past the time limit: the next episode starts from the saved random state
            action = torch.full(env.action_spec.shape, -0.2)
            stepped, following = env.step_and_maybe_reset(following.set("action", action))
            observations.append(stepped["next", "observation"])
        return torch.stack(observations)

    expected = replay(env)
    assert torch.equal(replay(env), expected)
    assert torch.equal(replay(make_env(task, num_envs=2, engine="gymnasium", seed=99, max_episode_steps=4)), expected)


@pytest.mark.parametrize("task", TASKS)
def test_an_action_that_is_not_finite_is_refused_by_name(task: str) -> None:
    env = make_env(task, num_envs=3, engine="gymnasium")
    tensordict = env.reset()
    action = torch.zeros(env.action_spec.shape)
    action[1, 0], action[2, -1] = torch.nan, torch.inf
    with pytest.raises(ValueError, match=r"action of environment 1, 2 is not finite"):
        env.step(tensordict.set("action", action))


def test_a_state_of_another_number_of_environments_is_refused() -> None:
    saved = make_env("Pendulum-v1", num_envs=3).state_dict()
    with pytest.raises(ValueError, match="of 3 environments; expected 2"):
        make_env("Pendulum-v1", num_envs=2).load_state_dict(saved)
