"""The figure of a profile: what steps cost, and what they buy."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

from matplotlib import rc_context
from matplotlib.axes import Axes
from matplotlib.axis import Axis
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, LogLocator, NullLocator

Row = dict[str, Any]

# Okabe and Ito's colours, told apart by colour-blind readers too, the darkest first; markers say the same again.
COLORS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000")
MARKERS = ("o", "s", "^", "D", "v", "P", "X")
SERIES = ("run", "device", "execution", "precision", "kernel", "states", "particles", "warm_start")
"""What tells one line from another; those that are the same everywhere go into the title."""

STYLE: dict[Any, Any] = {
    "font.size": 9,
    "axes.titlesize": 9.5,
    "axes.titlelocation": "left",
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "grid.color": "0.92",
    "axes.axisbelow": True,
    "legend.frameon": False,
    "legend.fontsize": 8,
}


def pareto_front(
    rows: Iterable[Row], cost: str, gain: Callable[[Row], float], noise: Callable[[Row], float] = lambda _: 0.0
) -> list[Row]:
    """Rows that no other row beats in both respects, by rising cost.

    Args:
        rows: with a number under ``cost``.
        cost: name of what should be small.
        gain: what should be large.
        noise: by how much a row must be better than a cheaper one: its standard error.

    Examples:
        >>> rows = [{"ms": 1.0, "q": 1.0}, {"ms": 2.0, "q": 0.5}, {"ms": 3.0, "q": 4.0}]
        >>> [row["ms"] for row in pareto_front(rows, "ms", lambda row: row["q"])]
        [1.0, 3.0]
    """
    front: list[Row] = []
    for row in sorted(rows, key=lambda row: (row[cost], -gain(row))):
        if not front or gain(row) > gain(front[-1]) + noise(row):
            front.append(row)
    return front


def draw(profile: dict[str, Any], path: Path) -> None:
    """Draws a profile's rows.

    Args:
        profile: as ``report.write`` returns it.
        path: of the image; its suffix decides the format.
    """
    rows = profile["rows"]
    if not rows:
        return
    series = _series(rows, profile["runs"])
    # Quality is drawn for one number of states: it does not depend on it, the time does.
    most = max(row["states"] for row in rows)
    with rc_context(STYLE):
        has_returns = any(row["return_mean"] is not None for row in rows)
        figure = Figure(figsize=(9.6, 7.0) if has_returns else (12.6, 3.9), layout="constrained")
        axes = figure.subplots(2, 2).flatten() if has_returns else figure.subplots(1, 3)
        _draw_time(axes[0], series)
        chosen = [(label, [row for row in part if row["states"] == most]) for label, part in series]
        _draw_gap(axes[1], chosen, most)
        if has_returns:
            _draw_return(axes[2], chosen, most)
        _draw_targets(axes[-1], rows)
        handles, labels = axes[0].get_legend_handles_labels()
        rings, names = axes[1].get_legend_handles_labels()
        figure.legend(
            [*handles, *rings], [*labels, *names], loc="outside lower center", ncols=min(4, len(labels) + len(names))
        )
        figure.suptitle(_title(profile, rows), fontsize=9.5, x=0.01, ha="left")
        temporary = path.with_name(f".{path.stem}.tmp{path.suffix}")
        figure.savefig(temporary, dpi=200)
    os.replace(temporary, path)


def _series(rows: Sequence[Row], runs: Sequence[dict[str, Any]]) -> list[tuple[str, list[Row]]]:
    """(label, rows) for each line of the figure."""
    varying = [name for name in SERIES if len({row[name] for row in rows}) > 1]
    critics = {run["critic"] for run in runs}
    if len(critics) == 1 and "run" in varying:
        varying.remove("run")

    def label(row: Row) -> str:
        words = []
        for name in varying or ["execution"]:
            value = runs[row["run"]]["critic"] if name == "run" else row[name]
            if name == "warm_start":
                value = "warm starts" if value else "cold starts"
            words.append(f"{value} {name}" if name in ("states", "particles") else str(value))
        return ", ".join(words)

    found: dict[str, list[Row]] = {}
    for row in rows:
        found.setdefault(label(row), []).append(row)
    return list(found.items())


def _draw_time(axes: Axes, series: Sequence[tuple[str, list[Row]]]) -> None:
    for number, (label, rows) in enumerate(series):
        rows = sorted(rows, key=lambda row: (row["langevin_steps"], row["ms_median"]))
        steps = [row["langevin_steps"] for row in rows]
        axes.errorbar(
            steps,
            [row["ms_median"] for row in rows],
            yerr=_interval(rows),
            label=label,
            linewidth=1.2,
            elinewidth=0.8,
            **_look(number),
        )
    axes.set(xlabel="Langevin steps per action (levels × steps per level)")
    axes.set(ylabel="time per call [ms], median, p10–p90", title="What steps cost")
    _log_axis(axes.xaxis)
    _log_axis(axes.yaxis)


def _draw_gap(axes: Axes, series: Sequence[tuple[str, list[Row]]], states: int) -> None:
    rows = [row for _, part in series for row in part]
    for number, (_, part) in enumerate(series):
        axes.errorbar(
            [row["ms_median"] for row in part],
            [_lost(row) for row in part],
            xerr=_interval(part),
            linestyle="none",
            elinewidth=0.8,
            **_look(number),
        )
    front = pareto_front(rows, "ms_median", lambda row: -row["q_gap"], lambda row: row["q_gap_stderr"])
    _mark_front(axes, front, _lost)
    axes.set(xlabel=f"time per call, {states} states [ms]")
    axes.set(ylabel="Q lost against the reference chain [%]", title="What they buy: Q of the actions")
    _log_axis(axes.xaxis)
    _log_axis(axes.yaxis)


def _draw_return(axes: Axes, series: Sequence[tuple[str, list[Row]]], states: int) -> None:
    rows = [row for _, part in series for row in part if row["return_mean"] is not None]
    for number, (_, part) in enumerate(series):
        part = [row for row in part if row["return_mean"] is not None]
        axes.errorbar(
            [row["ms_median"] for row in part],
            [row["return_mean"] for row in part],
            yerr=[row["return_std"] for row in part],
            linestyle="none",
            elinewidth=0.8,
            **_look(number),
        )
    _mark_front(axes, pareto_front(rows, "ms_median", lambda row: row["return_mean"]), lambda row: row["return_mean"])
    axes.set(xlabel=f"time per call, {states} states [ms]")
    axes.set(ylabel="episode return, mean ± standard deviation", title="What they buy: return")
    _log_axis(axes.xaxis)


def _draw_targets(axes: Axes, rows: Sequence[Row]) -> None:
    quantities = {
        "tv_mode_weights": "four modes: weights",
        "tv_four_modes": "four modes: density",
        "tv_stiff_quadratic": "stiff quadratic: density",
        "tv_truncated_quadratic": "truncated quadratic: density",
    }
    fewest = min(row["particles"] for row in rows)

    def simplest(row: Row) -> bool:
        first = min(other["start_level"] for other in rows if other["levels"] == row["levels"])
        return row["particles"] == fewest and row["start_level"] == first

    for number, (name, label) in enumerate(quantities.items()):
        points = sorted({(row["langevin_steps"], row[name]) for row in rows if simplest(row)})
        look: dict[str, Any] = _look(number) | {
            "color": "0.25",
            "markerfacecolor": ("0.25", "white", "0.6", "0.9")[number],
        }
        steps, distances = zip(*points, strict=True)
        axes.plot(steps, distances, linestyle=":", linewidth=0.7, label=label, **look)
    axes.set(xlabel="Langevin steps per action", ylim=(0, 1.3), yticks=[0, 0.2, 0.4, 0.6, 0.8, 1.0])
    axes.set(ylabel="total-variation distance", title="What they buy: distributions known exactly")
    axes.legend(loc="upper center", ncols=2, columnspacing=1.0, handletextpad=0.4)
    _log_axis(axes.xaxis)


def _lost(row: Row) -> float:
    """Percent of the reference's gain over uniform actions that a setting does not reach, not below what is noise."""
    return max(100.0 * (1.0 - row["q_recovered"]), FLOOR)


FLOOR = 0.01
"""Percent; a setting that is as good as the reference chain, or better, is drawn there."""


def _mark_front(axes: Axes, front: Sequence[Row], height: Callable[[Row], float]) -> None:
    x, y = [row["ms_median"] for row in front], [height(row) for row in front]
    axes.plot(x, y, drawstyle="steps-post", color="0.35", linewidth=1.0, zorder=1)
    ring: dict[str, Any] = {
        "linestyle": "none",
        "marker": "o",
        "markersize": 10,
        "color": "0.35",
        "fillstyle": "none",
        "zorder": 3,
    }
    axes.plot(x, y, label="Pareto front (levels × steps per level)", **ring)
    for row, across, up, following in zip(front, x, y, [*x[1:], float("inf")], strict=True):
        # To the right, where there is room; else the next one's label would be in the way.
        offset, side = ((6, 6), "left") if following > 1.3 * across else ((-8, -4), "right")
        text = f"{row['levels']}×{row['steps_per_level']}"
        if row["start_level"]:
            text += f" from {row['start_level']}"
        axes.annotate(text, (across, up), xytext=offset, textcoords="offset points", fontsize=7.5, ha=side)
    axes.margins(0.1)


def _interval(rows: Sequence[Row]) -> list[list[float]]:
    return [
        [row["ms_median"] - row["ms_p10"] for row in rows],
        [row["ms_p90"] - row["ms_median"] for row in rows],
    ]


def _look(number: int) -> dict[str, Any]:
    return {
        "color": COLORS[number % len(COLORS)],
        "marker": MARKERS[number % len(MARKERS)],
        "markersize": 4.5,
        "zorder": 2,
    }


def _log_axis(axis: Axis) -> None:
    """A logarithmic axis with ticks at 1, 2 and 5 times powers of ten, written out."""
    axis.axes.set_xscale("log") if axis is axis.axes.xaxis else axis.axes.set_yscale("log")
    axis.set_major_locator(LogLocator(subs=(1.0, 2.0, 5.0)))
    axis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
    axis.set_minor_locator(NullLocator())


def _title(profile: dict[str, Any], rows: Sequence[Row]) -> str:
    runs = [profile["runs"][number] for number in sorted({row["run"] for row in rows})]
    critics = dict.fromkeys(run["critic"] for run in runs)
    machines = dict.fromkeys(found["device"] for run in runs for found in run["machine"].values())
    same = {name: rows[0][name] for name in ("states", "particles") if len({row[name] for row in rows}) == 1}
    counts = [f"{count} {name if count > 1 else name.removesuffix('s')}" for name, count in same.items()]
    return " · ".join([*(critics if len(critics) == 1 else []), *machines, *counts])
