"""How far each Langevin kernel is from the density it should sample: analytic targets, errors per gradient evaluation.

``python -m benchmarks.kernels [--directory DIR] [--draw-only]`` samples every target with every kernel, for several
numbers of steps per noise level of the default schedule, and writes ``kernels.json`` and ``kernels.png``, or only draws
the figure again. The first kernel is the authors' default chain. The landscapes of the levels are the target smoothed
by the levels' noise, as a critic that has seen all actions evenly would have learned them.
"""

from __future__ import annotations

import argparse
import json
import platform
import time
from pathlib import Path
from typing import Any, NamedTuple

import matplotlib
import torch

from nclql_torchrl import LangevinSampler, NoiseSchedule
from nclql_torchrl.kernels import Boundary, KernelName
from nclql_torchrl.targets import TARGETS, AnalyticTarget

matplotlib.use("Agg")
from matplotlib import pyplot as plt
from matplotlib import ticker

RESULTS = Path(__file__).parent / "results" / "kernels"
NUM_CHAINS = 10_000
NUM_BINS = 8
STEPS_PER_LEVEL = (2, 5, 10, 20)


class Setting(NamedTuple):
    """A kernel with the options of the chain that it is meant for."""

    kernel: KernelName
    normalize_gradient: bool
    boundary: Boundary


SETTINGS = {
    "authors' default": Setting("langevin", True, "clip"),
    "langevin": Setting("langevin", False, "reflect"),
    "mala": Setting("mala", False, "reflect"),
    "underdamped": Setting("underdamped", False, "reflect"),
    "preconditioned": Setting("preconditioned", False, "reflect"),
}


def measure(target: AnalyticTarget, setting: Setting, steps_per_level: int) -> dict[str, Any]:
    """Samples a target from uniform starts.

    Returns:
        ``gradient_evaluations`` per action; ``mean_error`` in standard deviations of the target, the worst dimension;
        ``std_ratio`` of every dimension, 1 when right; ``mode_shares``; ``mode_error``, their total-variation distance
        to the weights; ``total_variation`` over a grid; ``acceptance_rate`` for MALA; ``seconds``.
    """
    box = torch.ones(target.action_dim)
    schedule = NoiseSchedule()
    sampler = LangevinSampler(-box, box, schedule, steps_per_level=steps_per_level, w=target.w, **setting._asdict())
    torch.manual_seed(0)
    start = time.perf_counter()
    action, statistics = sampler.sample(target.action_value([NUM_CHAINS], schedule))
    seconds = time.perf_counter() - start
    deviations = target.covariance.diagonal().sqrt()
    shares = target.mode_shares(action)
    # MALA evaluates once more where a level begins.
    evaluations = schedule.num_levels * (steps_per_level + (setting.kernel == "mala"))
    return {
        "gradient_evaluations": evaluations,
        "mean_error": float(((action.mean(0) - target.mean) / deviations).abs().max()),
        "std_ratio": (action.std(0) / deviations).tolist(),
        "mode_shares": shares.tolist(),
        "mode_error": float(0.5 * (shares - target.weights).abs().sum()),
        "total_variation": target.total_variation(action, NUM_BINS),
        **{name: float(entry.mean()) for name, entry in statistics.items()},
        "seconds": seconds,
    }


def measure_all() -> dict[str, Any]:
    """Every target with every setting: the content of kernels.json."""
    rows, exact = [], {}
    for name, make in TARGETS.items():
        target = make()
        torch.manual_seed(0)
        exact[name] = target.total_variation(target.sample(NUM_CHAINS), NUM_BINS)
        for label, setting in SETTINGS.items():
            for steps in STEPS_PER_LEVEL:
                row = {"target": name, "setting": label, "steps_per_level": steps, **measure(target, setting, steps)}
                print(json.dumps(row), flush=True)
                rows.append(row)
    return {
        "machine": f"{platform.machine()}, {torch.get_num_threads()} threads, torch {torch.__version__}, float32",
        "num_chains": NUM_CHAINS,
        "num_bins": NUM_BINS,
        "total_variation_of_exact_samples": exact,
        "rows": rows,
    }


def draw(results: dict[str, Any], path: Path) -> None:
    """Errors against gradient evaluations: total variation above, and below what is hardest of each target."""
    figure, axes = plt.subplots(2, len(TARGETS), figsize=(4 * len(TARGETS), 7), sharex=True)
    for column, name in enumerate(TARGETS):
        multimodal = TARGETS[name]().num_modes > 1
        upper, lower = axes[:, column]
        for label in SETTINGS:
            rows = [row for row in results["rows"] if (row["target"], row["setting"]) == (name, label)]
            evaluations = [row["gradient_evaluations"] for row in rows]
            style = {"marker": "o", "markersize": 4, "linestyle": "--" if label == "authors' default" else "-"}
            upper.plot(evaluations, [row["total_variation"] for row in rows], label=label, **style)
            # Chains that all end on one face of the box have no spread at all: cut off at a thousandth.
            worst = [max(max(ratio, 1 / max(ratio, 1e-3)) for ratio in row["std_ratio"]) for row in rows]
            lower.plot(evaluations, [row["mode_error"] for row in rows] if multimodal else worst, **style)
        floor = results["total_variation_of_exact_samples"][name]
        upper.axhline(floor, color="gray", linewidth=0.8, linestyle=":", label="exact samples")
        upper.set(title=name.replace("_", " "), ylim=(0, 1))
        lower.set(xlabel="gradient evaluations per action", xscale="log")
        lower.set_xticks([20, 50, 100, 200], ["20", "50", "100", "200"])
        lower.xaxis.set_minor_locator(ticker.NullLocator())
        if multimodal:
            lower.set(ylabel="error of the modes' weights", ylim=(0, None))
        else:
            lower.set(ylabel="worst deviation / exact, or inverse", yscale="log", ylim=(0.9, None))
            lower.yaxis.set_major_formatter(ticker.FormatStrFormatter("%g"))
            lower.yaxis.set_minor_formatter(ticker.NullFormatter() if max(lower.get_ylim()) > 50 else "{x:g}")
    axes[0, 0].set_ylabel("total-variation distance")
    handles, labels = axes[0, 0].get_legend_handles_labels()
    figure.tight_layout(rect=(0, 0.06, 1, 1))
    figure.legend(handles, labels, loc="lower center", ncol=len(labels), frameon=False)
    figure.savefig(path, dpi=150)
    plt.close(figure)


def main() -> None:
    """Entry point of ``python -m benchmarks.kernels``."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--directory", type=Path, default=RESULTS)
    parser.add_argument("--draw-only", action="store_true", help="draw the figure of an existing kernels.json")
    arguments = parser.parse_args()
    arguments.directory.mkdir(parents=True, exist_ok=True)
    path = arguments.directory / "kernels.json"
    if not arguments.draw_only:
        path.write_text(json.dumps(measure_all(), indent=1) + "\n")
    draw(json.loads(path.read_text()), arguments.directory / "kernels.png")


if __name__ == "__main__":
    main()
