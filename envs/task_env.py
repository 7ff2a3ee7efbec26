"""A task as an ordinary Gymnasium environment: what ``gymnasium.make`` gives for a task of one's own."""

from __future__ import annotations

from typing import Any

import numpy as np
from gymnasium.envs.mujoco import MujocoEnv
from gymnasium.spaces import Box

from envs.task import Task


class TaskEnv(MujocoEnv):
    """One simulation of a task in C MuJoCo, with Gymnasium's reset, rendering and random numbers.

    Args:
        task: the class.
        render_mode: "human", "rgb_array", "depth_array" or None.
        **options: the task's.

    Examples:
        >>> from envs.tasks.swimmer import Swimmer
        >>> observation, _ = TaskEnv(Swimmer).reset(seed=0)
        >>> observation.shape
        (8,)
    """

    metadata = {"render_modes": ["human", "rgb_array", "depth_array", "rgbd_tuple"]}  # noqa: RUF012

    def __init__(self, task: type[Task], render_mode: str | None = None, **options: Any) -> None:
        self.task = task(**options)
        super().__init__(str(self.task.xml_path), self.task.frame_skip, None, render_mode=render_mode)
        self.metadata = {**self.metadata, "render_fps": round(1.0 / self.dt)}
        size = self._observation().shape
        self.observation_space = Box(-np.inf, np.inf, size, np.float64)

    def step(self, action: np.ndarray) -> tuple[np.ndarray, float, bool, bool, dict[str, Any]]:  # pyright: ignore
        before = np.array(self.task.position(np, self.model, self._physics))
        self.do_simulation(action, self.frame_skip)
        velocity = (self.task.position(np, self.model, self._physics) - before) / self.dt
        reward = float(self.task.reward(np, self.model, self._physics, action, velocity))
        terminated = bool(self.task.terminated(np, self.model, self._physics))
        if self.render_mode == "human":
            self.render()
        return self._observation(), reward, terminated, False, {}

    def reset_model(self) -> np.ndarray:  # pyright: ignore[reportIncompatibleMethodOverride]
        self.set_state(*self.task.reset(np, self.np_random, self.model))
        return self._observation()

    def _observation(self) -> np.ndarray:
        return np.array(self.task.observe(np, self.model, self._physics))

    @property
    def _physics(self) -> Any:
        return self.data
