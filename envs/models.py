"""MuJoCo's models: loaded without complaints about what their users cannot change, and what their motors take."""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Iterator
from typing import Any

import numpy as np


@contextlib.contextmanager
def silent_deprecations() -> Iterator[None]:
    """While it lasts, MuJoCo says nothing of deprecated attributes; its other warnings come as ever.

    Gymnasium's HalfCheetah has such an attribute, and every environment that is made would say so on the terminal and
    in a file MUJOCO_LOG.TXT.

    Examples:
        >>> import gymnasium
        >>> with silent_deprecations():
        ...     env = gymnasium.make("HalfCheetah-v5")
    """
    import mujoco as imported

    mujoco: Any = imported  # its compiled functions have no type stubs
    previous = mujoco.get_mju_user_warning()

    def warn(message: str) -> None:
        if "is deprecated" in message:
            return
        if previous is None:
            print(f"WARNING: {message}", file=sys.stderr)
        else:
            previous(message)

    mujoco.set_mju_user_warning(warn)
    try:
        yield
    finally:
        mujoco.set_mju_user_warning(previous)


def action_bounds(model: Any) -> tuple[np.ndarray, np.ndarray]:
    """Lowest and highest actions of a ``mujoco.MjModel``, [nu] float32 each: what its actuators are clipped to.

    Raises:
        ValueError: for actuators without a control range, which MuJoCo would give the range [0, 0].

    Examples:
        >>> from envs.tasks.inverted_pendulum import InvertedPendulum
        >>> action_bounds(InvertedPendulum().load_model())
        (array([-3.], dtype=float32), array([3.], dtype=float32))
    """
    low, high = model.actuator_ctrlrange.astype(np.float32).T
    unlimited = np.flatnonzero((model.actuator_ctrllimited == 0) | (low >= high)).tolist()
    if unlimited:
        names = ", ".join(repr(model.actuator(index).name or index) for index in unlimited)
        raise ValueError(
            f"The model's actuators {names} have no control range, so that actions have no bounds; expected "
            'ctrlrange="LOW HIGH" on each, or in <default>, such as <motor joint="hip" ctrlrange="-1 1"/> (and no '
            'ctrllimited="false").'
        )
    return low.copy(), high.copy()
