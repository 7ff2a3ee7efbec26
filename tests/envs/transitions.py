"""Transitions of Gymnasium's own environments, which engines must reproduce."""

from __future__ import annotations

from functools import lru_cache
from typing import Any

import gymnasium
import mujoco as _mujoco
import numpy as np

mujoco: Any = _mujoco


@lru_cache(maxsize=32)
def gymnasium_transitions(task: str, number: int) -> dict[str, np.ndarray]:
    """Single steps of Gymnasium from float32 states, without a warm start of the solver.

    The states are visited by episodes of uniform actions and of bang-bang actions held for a few steps (as trained
    policies often act) in turn; every fourth step of them is kept, so that falls and impacts are among them.

    Returns:
        qpos, qvel (float32 numbers in float64), action (float32), observation, reward, terminated.
    """
    reference: Any = gymnasium.make(task).unwrapped
    space = reference.action_space
    generator = np.random.default_rng(0)
    rows, steps, episode, terminated = [], 0, -1, True
    held = np.zeros(space.shape, np.float32)
    while len(rows) < number:
        if terminated or steps % 100 == 0:
            episode += 1
            reference.reset(seed=episode)
        if episode % 2 == 0:
            action = generator.uniform(space.low, space.high).astype(np.float32)
        else:
            if steps % 5 == 0:
                held = np.where(generator.random(space.shape) < 0.5, space.low, space.high).astype(np.float32)
            action = held
        steps += 1
        qpos, qvel = reference.data.qpos.astype(np.float32), reference.data.qvel.astype(np.float32)
        mujoco.mj_resetData(reference.model, reference.data)
        reference.set_state(qpos.astype(np.float64), qvel.astype(np.float64))
        observation, reward, terminated, *_ = reference.step(action)
        if steps % 4 == 0 or terminated:
            rows.append((qpos.astype(np.float64), qvel.astype(np.float64), action, observation, reward, terminated))
    names = ("qpos", "qvel", "action", "observation", "reward", "terminated")
    return {name: np.stack(column) for name, column in zip(names, zip(*rows, strict=True), strict=True)}
