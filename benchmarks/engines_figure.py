"""The figure of :mod:`benchmarks.engines`: steps per second against environments, a panel per task."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
import numpy as np

STYLES: dict[str, tuple[str, str]] = {
    "gymnasium sync": ("#999999", "o"),
    "gymnasium async": ("#666666", "s"),
    "envpool": ("#E69F00", "^"),
    "torchrl mjx": ("#CC79A7", "v"),
    "mujoco": ("#0072B2", "o"),
    "mujoco env": ("#0072B2", "s"),
    "mujoco collector": ("#0072B2", "^"),
    "mjx": ("#009E73", "o"),
    "mjx env": ("#009E73", "s"),
    "mjx fast": ("#56B4E9", "o"),
    "mjx fast env": ("#56B4E9", "s"),
    "mjx warp": ("#D55E00", "o"),
}
"""Colour (of a palette that colour-blind readers can tell apart) and marker of each system that is drawn."""


def draw(rows: Sequence[dict[str, Any]], path: Path) -> None:
    """Draws the newest measurement of every system, task and number of environments.

    Args:
        rows: as :func:`benchmarks.engines.measure` makes them.
        path: the PNG to write.
    """
    newest = {(row["task"], row["system"], row["num_envs"]): row for row in rows if "steps_per_second" in row}
    tasks = list(dict.fromkeys(task for task, *_ in newest))
    figure, axes = plt.subplots(1, len(tasks), figsize=(3.4 * len(tasks), 3.6), sharey=True, squeeze=False)
    for axis, task in zip(axes[0], tasks, strict=True):
        for system, (colour, marker) in STYLES.items():
            points = sorted(
                (num_envs, row["steps_per_second"])
                for (of, name, num_envs), row in newest.items()
                if (of, name) == (task, system)
            )
            if points:
                style = "-" if system.split()[-1] not in ("env", "collector") else ":"
                axis.plot(*np.array(points).T, style, color=colour, marker=marker, markersize=4, label=system)
        axis.set(title=task, xscale="log", yscale="log", xlabel="environments")
        axis.grid(alpha=0.3, which="both", linewidth=0.5)
    axes[0, 0].set_ylabel("control steps per second")
    handles = {
        label: handle for axis in axes[0] for handle, label in zip(*axis.get_legend_handles_labels(), strict=True)
    }
    figure.legend(handles.values(), handles.keys(), loc="center left", bbox_to_anchor=(1.0, 0.5), frameon=False)
    figure.tight_layout()
    figure.savefig(path, dpi=150, bbox_inches="tight")
    plt.close(figure)
