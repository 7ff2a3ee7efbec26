"""The mujoco engine is Gymnasium, task by task: one step from the same state, and whole episodes."""

from __future__ import annotations

from typing import Any

import gymnasium
import numpy as np
import pytest
import torch

from benchmarks.episodes import episode_returns, pvalue
from envs import list_tasks, make_env
from envs.batched import BatchedEnv
from tests.envs.transitions import gymnasium_transitions

TASKS = list_tasks("mujoco")


def mujoco_env(task: str, num_envs: int, **options: Any) -> BatchedEnv:
    env = make_env(task, num_envs, engine="mujoco", **options)
    assert isinstance(env, BatchedEnv)
    return env


@pytest.mark.parametrize("task", TASKS)
def test_a_step_is_gymnasiums(task: str) -> None:
    expected = gymnasium_transitions(task, 128)
    env = mujoco_env(task, 128)
    tensordict = env.set_state(torch.from_numpy(expected["qpos"]), torch.from_numpy(expected["qvel"]))
    following = env.step(tensordict.set("action", torch.from_numpy(expected["action"])))["next"]
    # The same C code runs on the same float64 numbers; only a reward's sum may be taken in another order.
    np.testing.assert_array_equal(following["observation"].numpy(), expected["observation"].astype(np.float32))
    np.testing.assert_allclose(following["reward"][:, 0].numpy(), expected["reward"], rtol=1e-6, atol=1e-6)
    np.testing.assert_array_equal(following["terminated"][:, 0].numpy(), expected["terminated"])


def test_the_transitions_end_episodes_where_the_task_can() -> None:
    """Otherwise the test above would say nothing about termination."""
    ending = {task for task in TASKS if gymnasium_transitions(task, 128)["terminated"].any()}
    assert ending == {
        "Ant-v5", "Hopper-v5", "Humanoid-v5", "InvertedDoublePendulum-v5", "InvertedPendulum-v5", "Walker2d-v5",
    }  # fmt: skip


@pytest.mark.slow
@pytest.mark.parametrize("task", TASKS)
def test_whole_episodes_return_what_gymnasiums_do(task: str) -> None:
    # Cut short for time; benchmarks/episodes.py plays them to the end.
    ours = episode_returns(make_env(task, 200, engine="mujoco", seed=1, max_episode_steps=25), seed=2)
    theirs = episode_returns(make_env(task, 200, engine="gymnasium", seed=3, max_episode_steps=25), seed=4)
    # Fixed seeds, so this passes or fails once and for all; a correct engine fails one task in a thousand.
    assert pvalue(ours, theirs) > 1e-3


@pytest.mark.parametrize("task", TASKS)
def test_first_observations_are_of_gymnasiums_distribution(task: str) -> None:
    ours = make_env(task, 500, engine="mujoco", seed=1).reset()["observation"].numpy()
    reference = gymnasium.make(task)
    theirs = np.stack([reference.reset(seed=seed)[0] for seed in range(500)])
    # Of many coordinates the least probable decides.
    varying = np.flatnonzero(theirs.std(0) > 1e-12)
    np.testing.assert_allclose(np.delete(ours, varying, 1), np.delete(theirs, varying, 1), atol=1e-6)
    pvalues = [pvalue(ours[:, index], theirs[:, index].astype(np.float32)) for index in varying]
    assert min(pvalues) > 1e-3 / len(pvalues)
