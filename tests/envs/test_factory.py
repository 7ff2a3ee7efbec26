"""make_env refuses what it cannot make, naming the value and a valid choice."""

from __future__ import annotations

import subprocess
import sys
from typing import Any

import gymnasium
import pytest

from envs import list_engines, list_tasks, make_env


def test_importing_envs_does_not_start_jax() -> None:
    program = "import sys, envs; sys.exit('jax' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", program], timeout=120).returncode == 0


def test_engines_and_their_tasks() -> None:
    assert list_engines() == ("mujoco", "mjx", "gymnasium")
    assert len(list_tasks("mjx")) >= 11 and list_tasks("mjx") == list_tasks("mujoco")
    assert set(list_tasks("mjx")) <= set(list_tasks("gymnasium"))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"task": "HalfCheetah-v55"}, r"'HalfCheetah-v55'.*'HalfCheetah-v5'\?"),
        ({"engine": "mjxx"}, r"'mjxx'.*mujoco, mjx, gymnasium.*'mjx'\?"),
        ({"num_envs": 0}, r"num_envs is 0; expected at least 1"),
        ({"num_envs": -3}, r"num_envs is -3; expected at least 1"),
        ({"task": "CartPole-v1"}, r"'CartPole-v1'.*Discrete\(2\).*bounded box.*'Pendulum-v1'"),
        ({"engine": "mjx", "task": "Pendulum-v1"}, r"'Pendulum-v1'.*'mjx'.*HalfCheetah-v5.*did you mean.*'gymnasium'"),
        ({"engine": "mujoco", "task": "Hoper-v5"}, r"'Hoper-v5'.*'mujoco'.*'Hopper-v5'\?"),
        ({"engine": "mujoco", "healthy_reward": 1.0}, r"'healthy_reward' of 'HalfCheetah-v5'.*forward_reward_weight"),
        (
            {"engine": "gymnasium", "engine_options": {"solver": "fast"}},
            r"'solver' of the engine 'gymnasium', it has none",
        ),
        ({"engine": "mjx", "ctrl_cost": 0.1}, r"'ctrl_cost'.*forward_reward_weight.*'ctrl_cost_weight'\?"),
        ({"engine": "mjx", "max_episode_steps": 0}, r"max_episode_steps is 0; expected at least 1"),
    ],
)
def test_a_wrong_argument_is_named_with_a_valid_choice(arguments: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        make_env(**{"task": "HalfCheetah-v5", "num_envs": 1, **arguments})


def test_list_tasks_names_an_unknown_engine() -> None:
    with pytest.raises(ValueError, match=r"'warp'.*mujoco, mjx, gymnasium"):
        list_tasks("warp")


def test_unbounded_actions_are_refused() -> None:
    class Unbounded(gymnasium.Env):
        observation_space = gymnasium.spaces.Box(-1.0, 1.0, (1,))
        action_space = gymnasium.spaces.Box(-float("inf"), float("inf"), (1,))

    gymnasium.register("TestUnboundedActions-v0", lambda **_: Unbounded())
    try:
        with pytest.raises(ValueError, match=r"'TestUnboundedActions-v0'.*inf.*finite bounds.*RescaleAction"):
            make_env("TestUnboundedActions-v0", num_envs=1)
    finally:
        del gymnasium.registry["TestUnboundedActions-v0"]
