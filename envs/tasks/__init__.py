"""The tasks that batched engines step, one file each; a new one is added to ``TASKS``."""

from __future__ import annotations

from collections.abc import Mapping

from envs.task import Task
from envs.tasks.half_cheetah import HalfCheetah

TASKS: Mapping[str, type[Task]] = {task.name: task for task in (HalfCheetah,)}
"""Tasks by Gymnasium id."""
