"""Batched MuJoCo environments for TorchRL: each task defined once, stepped by interchangeable engines.

Importing this package does not import JAX, and starts no GPU.
"""

from envs.factory import ENGINES, default_engine, list_engines, list_tasks, make_env, register_task
from envs.task import Task

__all__ = ["ENGINES", "Task", "default_engine", "list_engines", "list_tasks", "make_env", "register_task"]
