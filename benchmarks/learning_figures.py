"""Figures and tables of ``benchmarks.learning``, from the committed JSON lines alone.

``python -m benchmarks.learning_figures [directory]`` draws, for every ``NAME.jsonl`` of the directory, ``NAME.png``:
return over environment steps and over CPU seconds, and overestimation over environment steps; and rewrites the tables
of the directory's README.md, between its two marks.

Lines are inter-quartile means over seeds, bands their 95% bootstrap intervals (percentiles), as rliable (arXiv
2108.13264) has them: its mean is scipy's trimmed mean, and scipy's bootstrap gives its intervals. rliable 1.2 itself
ignores the random state it is given, so that no table could be checked against its lines, takes seconds per curve, and
needs pandas 2. Of three seeds the mean trims none: it is their mean.
"""

from __future__ import annotations

import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import matplotlib
import numpy as np
from numpy.typing import NDArray
from scipy.stats import bootstrap, trim_mean

from benchmarks.learning import RESULTS, read_records

matplotlib.use("Agg")
from matplotlib import pyplot as plt

Records = Sequence[Mapping[str, Any]]
MARKS = ("<!-- written by benchmarks.learning_figures -->", "<!-- end -->")
NUM_POINTS = 100
"""Of a curve over seconds: runs are evaluated at different seconds, and interpolated to the same ones."""
NUM_RESAMPLES = 2_000


def interquartile_mean(values: NDArray[np.floating], axis: int = 0) -> NDArray[np.floating]:
    """Mean of the middle half along an axis; of fewer than four values, of all of them."""
    return trim_mean(values, 0.25, axis=axis)


def interval(values: NDArray[np.floating]) -> tuple[NDArray[np.floating], NDArray[np.floating]]:
    """95% bootstrap interval of the inter-quartile mean over seeds.

    Args:
        values: shape [seeds, points].

    Returns:
        Lower and upper ends, shape [points]; the value itself for a single seed.
    """
    if values.shape[0] < 2:
        return values[0], values[0]
    found = bootstrap(
        (values,), interquartile_mean, n_resamples=NUM_RESAMPLES, method="percentile", vectorized=True, rng=0
    ).confidence_interval
    return found.low, found.high


def curves(records: Records, x: str, y: str) -> tuple[NDArray[np.floating], NDArray[np.floating]]:
    """The curves of one algorithm's runs at common places.

    Args:
        records: runs that differ in their seeds only.
        x: "frames", at which all runs were evaluated, or "cpu_seconds" or "wall_seconds".
        y: any entry of the curve's points.

    Returns:
        Places, shape [points], and values, shape [seeds, points].
    """
    places = [np.array([point[x] for point in record["curve"]], dtype=float) for record in records]
    values = [np.array([point[y] for point in record["curve"]], dtype=float) for record in records]
    if x == "frames":
        return places[0], np.stack(values)
    common = np.linspace(max(place[0] for place in places), min(place[-1] for place in places), NUM_POINTS)
    return common, np.stack([np.interp(common, *run) for run in zip(places, values, strict=True)])


def by_algorithm(records: Records) -> dict[str, Records]:
    """Runs by the name of their algorithm, in order of first appearance."""
    names = dict.fromkeys(record["config"]["algorithm"]["name"] for record in records)
    return {name: [record for record in records if record["config"]["algorithm"]["name"] == name] for name in names}


def draw(records: Records, path: Path) -> None:
    """Draws the three panels of one file's runs."""
    figure, axes = plt.subplots(1, 3, figsize=(15, 4.2), layout="constrained")
    panels = (("frames", "return_mean"), ("cpu_seconds", "return_mean"), ("frames", "overestimation"))
    for number, (name, runs) in enumerate(by_algorithm(records).items()):
        style = {"color": f"C{number % 10}", "linestyle": "-" if number < 10 else "--"}
        for axis, (x, y) in zip(axes, panels, strict=True):
            places, values = curves(runs, x, y)
            low, high = interval(values)
            axis.plot(places, interquartile_mean(values), label=f"{name} ({len(runs)})", **style)
            axis.fill_between(places, low, high, color=style["color"], alpha=0.15, linewidth=0)
    task = records[0]["config"]["task"]
    axes[0].set(xlabel="environment steps", ylabel="return", title=task["name"])
    axes[1].set(xlabel="CPU seconds of collecting and learning", ylabel="return")
    axes[2].set(xlabel="environment steps", ylabel="Q minus discounted return")
    axes[2].axhline(0.0, color="grey", linewidth=0.8)
    axes[2].set_yscale("symlog", linthresh=1.0)
    figure.legend(
        *axes[0].get_legend_handles_labels(), loc="outside right upper", fontsize=8, title="algorithm (seeds)"
    )
    for axis in axes:
        axis.grid(alpha=0.3)
    figure.savefig(path, dpi=110)
    plt.close(figure)


def table(records: Records) -> str:
    """The final scores and what they cost, in Markdown, under a line that says under which conditions."""
    first = records[0]
    task, machine = first["config"]["task"], first["machine"]
    lines = [
        f"{task['name']} (Gymnasium {machine['gymnasium']}, MuJoCo {machine['mujoco']}, engine `{task['engine']}`): "
        f"{task['total_frames']:,} steps of {task['num_envs']} environment(s), the first "
        f"{task['init_random_frames']:,} random, {task['utd_ratio']:g} updates per step, batch {task['batch_size']}, "
        f"hidden {task['hidden_sizes']}, tau {task['tau']}. "
        f"Evaluation: {first['evaluation']}.",
        "",
        "| Algorithm | Seeds | Final return [95%] | Q minus return | Parameters | ms/action, 1 state | 256 states "
        "| Updates/s | CPU s |",
        "|---|---|---|---|---|---|---|---|---|",
    ]
    for name, runs in by_algorithm(records).items():
        returns = np.array([[run["curve"][-1]["return_mean"]] for run in runs])
        (low,), (high,) = interval(returns)
        excess = interquartile_mean(np.array([run["curve"][-1]["overestimation"] for run in runs]))
        # Other processes on the machine only ever add: the fastest run is the measurement.
        one, many = (min(run["action_milliseconds"][states] for run in runs) for states in ("1", "256"))
        updates = max(run["updates_per_cpu_second"] for run in runs)
        seconds = min(run["curve"][-1]["cpu_seconds"] for run in runs)
        (mean,) = interquartile_mean(returns)
        digits = 1 if abs(mean) < 100 else 0
        bounds = f" [{low:.{digits}f}, {high:.{digits}f}]" if len(runs) > 1 else ""
        final = f"{mean:.{digits}f}{bounds}"
        lines.append(
            f"| {name} | {len(runs)} | {final} | {excess:.1f} | {runs[0]['parameters']:,} | {one:.2f} "
            f"| {many:.2f} | {updates:.0f} | {seconds:.0f} |"
        )
    return "\n".join(lines)


def write_tables(directory: Path) -> str:
    """The block between the marks: a heading, a table and a figure for each file, in alphabetical order."""
    sections = []
    for path in sorted(directory.glob("*.jsonl")):
        sections.append(f"### {path.stem}\n\n{table(read_records(path))}\n\n![{path.stem}]({path.stem}.png)")
    return f"{MARKS[0]}\n" + "\n\n".join(sections) + f"\n{MARKS[1]}"


def redraw(directory: Path) -> Path:
    """Draws every figure and rewrites the tables of the page, whose path it returns."""
    for path in sorted(directory.glob("*.jsonl")):
        draw(read_records(path), path.with_suffix(".png"))
    page = directory / "README.md"
    before, _, rest = page.read_text().partition(MARKS[0])
    _, _, after = rest.partition(MARKS[1])
    page.write_text(before + write_tables(directory) + after)
    return page


def main() -> None:
    """Entry point of ``python -m benchmarks.learning_figures``."""
    print(redraw(Path(sys.argv[1]) if len(sys.argv) > 1 else RESULTS))


if __name__ == "__main__":
    main()
