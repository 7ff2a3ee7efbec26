"""From a task's name and an engine's name to a TorchRL environment."""

from __future__ import annotations

import difflib
from typing import Any

import torch
from torchrl.envs import EnvBase

ENGINES = ("gymnasium",)
"""Engines of this version."""


def list_engines() -> tuple[str, ...]:
    """Names that ``engine=`` accepts besides "auto"."""
    return ENGINES


def list_tasks() -> tuple[str, ...]:
    """Gymnasium ids of every registered task; the ``gymnasium`` engine takes those with continuous actions."""
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
        engine: what steps them; "auto" chooses by device and task.
        device: where observations and actions live.
        seed: fixes the initial states of every episode.
        **task_options: keyword arguments of the Gymnasium constructor.

    Returns:
        An environment of batch size [num_envs]: float32 "observation" [num_envs, observation_dim], "action"
        [num_envs, action_dim], and under "next" also "reward", "terminated", "truncated" and "done" [num_envs, 1].

    Raises:
        ValueError: for an unknown task or engine, ``num_envs < 1``, or a task whose actions are not a bounded box.

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
    if task not in list_tasks():
        raise ValueError(f"There is no task {task!r} in Gymnasium's registry; {nearest(task, list_tasks())}")
    from envs.engines.gymnasium import GymnasiumEnvs

    return GymnasiumEnvs(task, num_envs, device=device, seed=seed, **task_options)


def nearest(name: str, choices: tuple[str, ...]) -> str:
    """A question that names the nearest valid choice."""
    return f"did you mean {difflib.get_close_matches(name, choices, n=1, cutoff=0.0)[0]!r}?"
