"""From a task and an engine's name to a TorchRL environment."""

from __future__ import annotations

import difflib
import importlib
import inspect
from collections.abc import Callable, Mapping
from dataclasses import fields
from typing import Any, TypeVar

import torch
from torchrl.envs import EnvBase

from envs.batched import BatchedEnv, Engine
from envs.task import Task
from envs.tasks import TASKS

ENGINES = ("mujoco", "mjx", "gymnasium")
"""Engines of this version."""

TaskClass = TypeVar("TaskClass", bound=type[Task])


def list_engines() -> tuple[str, ...]:
    """Names that ``engine=`` accepts besides "auto"."""
    return ENGINES


def list_tasks(engine: str = "mujoco") -> tuple[str, ...]:
    """Ids of the tasks that an engine has.

    Args:
        engine: "mujoco" and "mjx" have Gymnasium's MuJoCo tasks of version 5 and those of :func:`register_task`;
            "gymnasium" has every registered task, and takes those with bounded continuous actions.

    Raises:
        ValueError: for an unknown engine.

    Examples:
        >>> list_tasks("mjx")[:3]
        ('Ant-v5', 'HalfCheetah-v5', 'Hopper-v5')
    """
    if engine not in ENGINES:
        raise ValueError(f"There is no engine {engine!r}; expected {', '.join(ENGINES)}. {nearest(engine, ENGINES)}")
    if engine != "gymnasium":
        return tuple(sorted(TASKS))
    import gymnasium

    return tuple(sorted(gymnasium.registry))


def register_task(task: TaskClass) -> TaskClass:
    """Makes a task of one's own known by its name: to :func:`make_env` and, for evaluation, to ``gymnasium.make``.

    It is a decorator. From elsewhere, ``"my_module:MyTask-v0"`` imports ``my_module`` first, as Gymnasium has it.

    Args:
        task: the class, with a ``name`` of Gymnasium's form.

    Returns:
        The class.

    Raises:
        ValueError: if the name is that of another task.
    """
    import gymnasium

    if TASKS.get(task.name) is task:
        return task
    if task.name in TASKS or task.name in gymnasium.registry:
        raise ValueError(f"There is a task {task.name!r} already; expected a new name for {task.__qualname__}.")
    (limit,) = (field.default for field in fields(task) if field.name == "max_episode_steps")
    assert isinstance(limit, int)
    gymnasium.register(
        task.name, "envs.task_env:TaskEnv", max_episode_steps=limit, kwargs={"task": task}, disable_env_checker=True
    )
    TASKS[task.name] = task
    return task


def make_env(
    task: str | Task,
    num_envs: int,
    engine: str = "auto",
    device: torch.device | str = "cpu",
    seed: int = 0,
    *,
    engine_options: Mapping[str, Any] | None = None,
    **task_options: Any,
) -> EnvBase:
    """Environments of one task, stepped together.

    Args:
        task: Gymnasium id, such as "HalfCheetah-v5", or "module:id", or a :class:`~envs.task.Task` with its options.
        num_envs: environments in the batch, at least 1.
        engine: what steps them. "mujoco" is C MuJoCo on CPU threads; "mjx" steps thousands of environments on a GPU;
            "gymnasium" is the reference, and has tasks of any kind; "auto" is "mjx" on a CUDA device and "mujoco" on
            a CPU, and "gymnasium" for tasks that these do not have.
        device: where observations and actions live.
        seed: fixes the initial states of every episode.
        engine_options: keyword arguments of the engine: of "mujoco" ``num_threads``; of "mjx" see
            :class:`~envs.engines.mjx.MJXEngine`.
        **task_options: the task's options, which are those of the Gymnasium constructor.

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
        >>> make_env("Hopper-v5", num_envs=2, healthy_reward=0.5).reset()["observation"].shape
        torch.Size([2, 11])
    """
    if num_envs < 1:
        raise ValueError(f"num_envs is {num_envs}; expected at least 1.")
    if engine not in ("auto", *ENGINES):
        raise ValueError(
            f"There is no engine {engine!r}; expected auto, {', '.join(ENGINES)}. {nearest(engine, ENGINES)}"
        )
    if isinstance(task, Task):
        if task_options:
            raise ValueError(f"The options {', '.join(task_options)} belong into {type(task).__name__}(...).")
        register_task(type(task))
        task_options = {field.name: getattr(task, field.name) for field in fields(task)}
        task = task.name
    task = _import_task(task)
    if engine == "auto":
        engine = default_engine(task, device)
    options = dict(engine_options or {})
    if engine == "gymnasium":
        return _make_gymnasium_env(task, num_envs, device, seed, options, task_options)
    definition = _make_task(task, engine, task_options)
    # Imported on use: one imports JAX, the other MuJoCo.
    if engine == "mjx":
        from envs.engines.mjx import MJXEngine as engine_class
    else:
        from envs.engines.mujoco import MujocoEngine as engine_class
    return BatchedEnv(_make_engine(engine, engine_class, definition, num_envs, device, options), seed=seed)


def default_engine(task: str, device: torch.device | str = "cpu") -> str:
    """The engine that "auto" means.

    Args:
        task: a task's name, or "module:id".
        device: where observations and actions live.

    Examples:
        >>> default_engine("Hopper-v5"), default_engine("Hopper-v5", "cuda"), default_engine("Pendulum-v1", "cuda")
        ('mujoco', 'mjx', 'gymnasium')
    """
    if _import_task(task) not in TASKS:
        return "gymnasium"
    return "mjx" if torch.device(device).type == "cuda" else "mujoco"


def _import_task(task: str) -> str:
    """The name alone of "module:id", once the module is imported, which registers it."""
    module, _, name = task.rpartition(":")
    if module:
        importlib.import_module(module)
    return name


def _make_gymnasium_env(
    task: str,
    num_envs: int,
    device: torch.device | str,
    seed: int,
    engine_options: Mapping[str, Any],
    task_options: Mapping[str, Any],
) -> EnvBase:
    if task not in list_tasks("gymnasium"):
        raise ValueError(f"There is no task {task!r} in Gymnasium's registry; {nearest(task, list_tasks('gymnasium'))}")
    _check_options("the engine 'gymnasium'", engine_options, ())
    from envs.engines.gymnasium import GymnasiumEnvs

    return GymnasiumEnvs(task, num_envs, device=device, seed=seed, **task_options)


def _make_task(task: str, engine: str, options: Mapping[str, Any]) -> Task:
    if task not in TASKS:
        raise ValueError(
            f"There is no task {task!r} for the engine {engine!r}, which has {', '.join(TASKS)}; "
            f"{nearest(task, tuple(TASKS))} The engine 'gymnasium' has all tasks."
        )
    _check_options(f"{task!r}", options, tuple(field.name for field in fields(TASKS[task])))
    # Ranges come as lists from a configuration file.
    values: dict[str, Any] = {
        name: tuple(value) if isinstance(value, list) else value for name, value in options.items()
    }
    return TASKS[task](**values)


def _make_engine(
    name: str,
    engine: Callable[..., Engine],
    task: Task,
    num_envs: int,
    device: torch.device | str,
    options: Mapping[str, Any],
) -> Engine:
    accepted = tuple(inspect.signature(engine).parameters)
    _check_options(f"the engine {name!r}", options, tuple(set(accepted) - {"task", "num_envs", "device"}))
    return engine(task, num_envs, device=device, **options)


def _check_options(owner: str, options: Mapping[str, Any], accepted: tuple[str, ...]) -> None:
    for option in options:
        if option not in accepted:
            which = (
                f"which has {', '.join(sorted(accepted))}; {nearest(option, accepted)}" if accepted else "it has none."
            )
            raise ValueError(f"There is no option {option!r} of {owner}, {which}")


def nearest(name: str, choices: tuple[str, ...]) -> str:
    """A question that names the nearest valid choice."""
    return f"did you mean {difflib.get_close_matches(name, choices, n=1, cutoff=0.0)[0]!r}?"
