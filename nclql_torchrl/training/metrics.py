"""What is measured between two rows of metrics.csv."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from tensordict import TensorDict
from torch import Tensor

UPDATE_METRICS = {
    "loss_qvalue": "loss_qvalue",
    "loss_noise": "loss_noise",
    "pred_value": "q_mean",
    "target_value": "q_target_mean",
    "td_error": "td_error",
}
"""What the update reports, and its column in metrics.csv."""

RECENT_EPISODES = 20

DIVERGED = "diverged_updates"

SUMMED = (*UPDATE_METRICS, DIVERGED)
"""What is added up over the updates since the last row."""


class MetricsWindow:
    """Means since the last row. Update metrics are added up where they are, so that no step waits for a GPU."""

    def __init__(self) -> None:
        self.updates = 0
        self.diverged = 0
        """Simulations that were lost, over the whole run."""
        self.recently_diverged = 0
        """Those of them that were lost since the last row."""
        self.returns: list[float] = []
        self.lengths: list[int] = []
        self._sums: list[Tensor] | None = None
        """Of :data:`SUMMED`, scalars."""

    def add_update(self, metrics: TensorDict) -> None:
        """Adds the scalars of one update."""
        diverged = (~(metrics["loss_qvalue"] + metrics["loss_noise"]).isfinite()).float()
        scalars = [*(metrics[key] for key in UPDATE_METRICS), diverged]
        if self._sums is None:
            self._sums = [scalar.clone() for scalar in scalars]
        else:
            torch._foreach_add_(self._sums, scalars)  # pyright: ignore[reportPrivateImportUsage]
        self.updates += 1

    def add_episodes(self, returns: Tensor, lengths: Tensor) -> None:
        """Adds finished training episodes; the newest are remembered beyond the row."""
        self.returns = [*self.returns, *returns.flatten().tolist()][-RECENT_EPISODES:]
        self.lengths = [*self.lengths, *lengths.flatten().tolist()][-RECENT_EPISODES:]

    def add_diverged(self, number: int) -> None:
        """Counts simulations that were lost."""
        self.diverged += number
        self.recently_diverged += number

    def first_diverged_update(self, updates: int) -> int | None:
        """Number of the first update since the last row whose losses are not finite; None if all are.

        Args:
            updates: number of the last one. Parameters that are not finite stay so: all after the first are like it.
        """
        diverged = 0 if self._sums is None else int(self._sums[-1])
        return updates - diverged + 1 if diverged else None

    def means(self) -> dict[str, float]:
        """Column -> mean, for what was measured."""
        row: dict[str, float] = {}
        if self.returns:
            row["train_return"] = sum(self.returns) / len(self.returns)
            row["train_length"] = sum(self.lengths) / len(self.lengths)
        row["diverged"] = self.diverged
        if self._sums is not None:
            sums = torch.stack(self._sums).tolist()  # one wait for a GPU
            means = (total / self.updates for total in sums[:-1])
            row |= dict(zip(UPDATE_METRICS.values(), means, strict=True))
        return row

    def clear(self) -> None:
        """Starts the next row. Recent episodes stay: most rows of a slow task see no episode end."""
        self.updates, self.recently_diverged, self._sums = 0, 0, None

    def state_dict(self) -> dict[str, Any]:
        """What a checkpoint keeps."""
        # Copies: what is added later changes the sums in place.
        sums = {} if self._sums is None else {key: total.clone() for key, total in zip(SUMMED, self._sums, strict=True)}
        return {
            "updates": self.updates,
            "diverged": self.diverged,
            "recently_diverged": self.recently_diverged,
            "returns": self.returns,
            "lengths": self.lengths,
            "sums": sums,
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Restores :meth:`state_dict`."""
        self.updates, self.diverged = state["updates"], state["diverged"]
        self.recently_diverged = state["recently_diverged"]
        self.returns, self.lengths = list(state["returns"]), list(state["lengths"])
        self._sums = [state["sums"][key].clone() for key in SUMMED] if state["sums"] else None
