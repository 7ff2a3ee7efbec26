"""Batched MuJoCo environments for TorchRL: each task defined once, stepped by interchangeable engines.

Importing this package imports neither JAX nor MuJoCo, and starts no GPU.
"""

from envs.factory import ENGINES, list_engines, list_tasks, make_env

__all__ = ["ENGINES", "list_engines", "list_tasks", "make_env"]
