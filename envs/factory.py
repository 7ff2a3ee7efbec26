"""From a task's name and an engine's name to a TorchRL environment."""

from __future__ import annotations

import difflib
from collections.abc import Mapping
from dataclasses import fields
from typing import Any

import torch
from torchrl.envs import EnvBase

from envs.tasks import TASKS

ENGINES = ("gymnasium", "mjx")
"""Engines of this version."""


def list_engines() -> tuple[str, ...]:
    """Names that ``engine=`` accepts besides "auto"."""
    return ENGINES


def list_tasks(engine: str = "gymnasium") -> tuple[str, ...]:
    """Gymnasium ids of the tasks that an engine has.

    Args:
        engine: "gymnasium" has every registered task, and takes those with bounded continuous actions.

    Raises:
        ValueError: for an unknown engine.

    Examples:
        >>> list_tasks("mjx")
        ('HalfCheetah-v5',)
    """
    if engine not in ENGINES:
        raise ValueError(f"There is no engine {engine!r}; expected {', '.join(ENGINES)}. {nearest(engine, ENGINES)}")
    if engine == "mjx":
        return tuple(sorted(TASKS))
    import gymnasium

    return tuple(sorted(gymnasium.registry))


def make_env(
    task: str,
    num_envs: int,
    engine: str = "auto",
    device: torch.device | str = "cpu",
    seed: int = 0,
    **task_options: Any,
) -> EnvBase:
    """Environments of one task, stepped together.

    Args:
        task: Gymnasium id, such as "HalfCheetah-v5".
        num_envs: environments in the batch, at least 1.
        engine: what steps them. "gymnasium" is the reference; "mjx" steps thousands of environments on a GPU; "auto" is
            "mjx" on a CUDA device for the tasks it has, and otherwise "gymnasium".
        device: where observations and actions live.
        seed: fixes the initial states of every episode.
        **task_options: keyword arguments of the Gymnasium constructor; "mjx" takes those that change the task.

    Returns:
        An environment of batch size [num_envs]: float32 "observation" [num_envs, observation_dim], "action"
        [num_envs, action_dim], and under "next" also "reward", "terminated", "truncated" and "done" [num_envs, 1].

    Raises:
        ValueError: for an unknown task, engine or option, ``num_envs < 1``, or a task whose actions are not a bounded
            box.
        RuntimeError: if "mjx" cannot run here: JAX without the device, or an untested release of mujoco-mjx.

    Examples:
        >>> env = make_env("Pendulum-v1", num_envs=3)
        >>> env.rollout(4)["next", "reward"].shape
        torch.Size([3, 4, 1])
    """
    if num_envs < 1:
        raise ValueError(f"num_envs is {num_envs}; expected at least 1.")
    if engine not in ("auto", *ENGINES):
        raise ValueError(
            f"There is no engine {engine!r}; expected auto, {', '.join(ENGINES)}. {nearest(engine, ENGINES)}"
        )
    if engine == "auto":
        engine = "mjx" if torch.device(device).type == "cuda" and task in TASKS else "gymnasium"
    if engine == "mjx":
        return make_mjx_env(task, num_envs, device, seed, task_options)
    if task not in list_tasks():
        raise ValueError(f"There is no task {task!r} in Gymnasium's registry; {nearest(task, list_tasks())}")
    from envs.engines.gymnasium import GymnasiumEnvs

    return GymnasiumEnvs(task, num_envs, device=device, seed=seed, **task_options)


def make_mjx_env(
    task: str, num_envs: int, device: torch.device | str, seed: int, task_options: Mapping[str, Any]
) -> EnvBase:
    """As :func:`make_env`, with the ``mjx`` engine."""
    if task not in TASKS:
        raise ValueError(
            f"There is no task {task!r} for the engine 'mjx', which has {', '.join(TASKS)}; "
            f"{nearest(task, tuple(TASKS))} The engine 'gymnasium' has all tasks."
        )
    options = tuple(field.name for field in fields(TASKS[task]))
    for option in task_options:
        if option not in options:
            raise ValueError(
                f"There is no option {option!r} of {task!r} with the engine 'mjx', which has {', '.join(options)}; "
                f"{nearest(option, options)}"
            )
    definition = TASKS[task](**task_options)
    # Imported on use: this imports JAX.
    from envs.batched import BatchedEnv
    from envs.engines.mjx import MJXEngine

    return BatchedEnv(MJXEngine(definition, num_envs, device=device), seed=seed)


def nearest(name: str, choices: tuple[str, ...]) -> str:
    """A question that names the nearest valid choice."""
    return f"did you mean {difflib.get_close_matches(name, choices, n=1, cutoff=0.0)[0]!r}?"
