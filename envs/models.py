"""Loading MuJoCo's models without complaints about what their users cannot change."""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Iterator
from typing import Any


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
