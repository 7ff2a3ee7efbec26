"""From collected batches to the transitions that replay gets, when a return has several rewards."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from tensordict import TensorDict, TensorDictBase
from tensordict.utils import NestedKey
from torchrl.envs import MultiStepTransform

STEPS_KEY = "steps_to_next_obs"
"""Where TorchRL's value estimators read how far the next observation is: they discount it by gamma to that power."""


class NStepReturns:
    """n-step returns by TorchRL's ``MultiStepTransform``, without correction for actions of older policies.

    A transition becomes: its observation and action, the discounted sum of its n next rewards, and the observation and
    flags n steps on, or at the end of the episode if that is sooner. It is complete when n more steps were collected;
    the steps that wait for theirs are this object's state. Each call waits for a GPU, twice: for TorchRL's count of
    episodes, and for that of what is left out.

    Args:
        n_steps: rewards in a return.
        gamma: discount per step.
        keys: entries of a transition that replay needs; with them comes :data:`STEPS_KEY`.

    Examples:
        >>> import torch
        >>> n_step = NStepReturns(2, 0.5, ["observation", ("next", "reward")])
        >>> following = {"reward": torch.ones(1, 4, 1), "done": torch.zeros(1, 4, 1, dtype=torch.bool)}
        >>> batch = TensorDict({"observation": torch.zeros(1, 4, 3), "next": following}, [1, 4])
        >>> n_step(batch)["next", "reward"].flatten()
        tensor([1.5000, 1.5000])
    """

    def __init__(self, n_steps: int, gamma: float, keys: Sequence[NestedKey]) -> None:
        self.keys = list(keys)
        # By default TorchRL leaves the flags of a step where they are: a return that runs into a terminal state would
        # bootstrap from it. Without done_keys they move on with the observation.
        self._transform = MultiStepTransform(n_steps, gamma, done_keys=[])

    def __call__(self, batch: TensorDictBase) -> TensorDictBase:
        """Takes the next steps, and gives the transitions that they complete.

        Args:
            batch: steps [num_envs, time] that follow those of the call before.

        Returns:
            Transitions [*], maybe none, without those whose return a lost simulation cut short.
        """
        flags = (("next", "done"), ("next", "diverged"))
        complete = self._transform.inv(batch.select(*self.keys, *flags, strict=False))
        if complete is None:
            return batch.reshape(-1)[:0]
        transitions = complete.reshape(-1)
        diverged = transitions.get(("next", "diverged"), None)
        if diverged is not None:
            transitions = transitions[~diverged.reshape(-1)]
        return transitions.select(*self.keys, STEPS_KEY)

    def state_dict(self) -> dict[str, Any]:
        """The steps that wait, as nested mappings of tensors."""
        window = self._transform._buffer
        return {} if window is None else {"window": window.to_dict()}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Restores :meth:`state_dict`."""
        window = state.get("window")
        batch_size = None if window is None else window["next"]["done"].shape[:2]
        self._transform._buffer = None if window is None else TensorDict(window, batch_size)
