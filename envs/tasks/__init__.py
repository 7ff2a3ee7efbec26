"""Gymnasium's MuJoCo tasks, one file each. A task of one's own is the same kind of file: ``envs.register_task``."""

from __future__ import annotations

from envs.task import Task
from envs.tasks.ant import Ant
from envs.tasks.half_cheetah import HalfCheetah
from envs.tasks.hopper import Hopper
from envs.tasks.humanoid import Humanoid
from envs.tasks.humanoid_standup import HumanoidStandup
from envs.tasks.inverted_double_pendulum import InvertedDoublePendulum
from envs.tasks.inverted_pendulum import InvertedPendulum
from envs.tasks.pusher import Pusher
from envs.tasks.reacher import Reacher
from envs.tasks.swimmer import Swimmer
from envs.tasks.walker2d import Walker2d

GYMNASIUM_TASKS: tuple[type[Task], ...] = (
    Ant,
    HalfCheetah,
    Hopper,
    Humanoid,
    HumanoidStandup,
    InvertedDoublePendulum,
    InvertedPendulum,
    Pusher,
    Reacher,
    Swimmer,
    Walker2d,
)

TASKS: dict[str, type[Task]] = {task.name: task for task in GYMNASIUM_TASKS}
"""Tasks of the batched engines by id, with those that ``envs.register_task`` added."""
