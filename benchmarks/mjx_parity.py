"""How far is one step of the mjx engine from Gymnasium's?

Steps the engine once from states that Gymnasium visited under uniform and under bang-bang actions, and compares
observation, reward and termination with Gymnasium's own step from there::

    python -m benchmarks.mjx_parity --output benchmarks/results/mjx/parity.json
    python -m benchmarks.mjx_parity --tasks Ant-v5 --solvers fast --dtypes float32

An error is |ours - Gymnasium's| / max(1, |Gymnasium's|), of an observation its largest. Rows of the output that were
measured anew are replaced. The tolerances of ``envs/engines/mjx_parity.py`` follow from the committed output, and are
printed at the end.
"""

from __future__ import annotations

import argparse
import json
import math
import time
from collections.abc import Iterable, Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
import torch

from envs.engines.mjx import MJXEngine
from envs.tasks import TASKS
from tests.envs.transitions import gymnasium_transitions

KEY = ("task", "dtype", "solver")
"""What tells one row of the output from another."""


def errors(ours: np.ndarray, theirs: np.ndarray) -> np.ndarray:
    """Absolute errors of numbers below 1 and relative errors of numbers above."""
    return np.abs(ours - theirs) / np.maximum(1.0, np.abs(theirs))


def tolerance(measured: float, dtype: str) -> float:
    """What an error may be: ten times the measured one, rounded up to one digit, and a few roundings in any case.

    The states of another sample, and another processor's order of sums, change the largest errors by such a factor:
    they come of impacts, which amplify a rounding.
    """
    bound = max(10.0 * measured, {"float32": 1e-6, "float64": 1e-12}[dtype])
    unit = 10.0 ** math.floor(math.log10(bound))
    return float(f"{math.ceil(bound / unit - 1e-9) * unit:.0e}")


def table(rows: Iterable[dict[str, Any]]) -> str:
    """The entries of ``TOLERANCES`` in ``envs/engines/mjx_parity.py``."""
    lines = []
    for row in rows:
        bounds = []
        for quantity in ("observation", "reward"):
            numbers = [f"{tolerance(value, row['dtype']):.0e}" for value in row[quantity].values()]
            bounds.append(f"Bounds({', '.join(numbers)})")
        key = ", ".join(f'"{row[name]}"' for name in KEY)
        lines.append(f"    ({key}): Tolerance({', '.join(bounds)}),")
    return "\n".join(lines)


def summary(values: np.ndarray) -> dict[str, float]:
    """Largest, 95th percentile and median."""
    return {"max": float(values.max()), "p95": float(np.quantile(values, 0.95)), "median": float(np.median(values))}


def compare(task: str, number: int, *, dtype: str = "float32", solver: str = "gymnasium") -> dict[str, Any]:
    """Compares one step from each of ``number`` states.

    Returns:
        :func:`summary` of the "observation" and "reward" errors, and how often "terminated" differs.
    """
    expected = gymnasium_transitions(task, number)
    task_class: Any = TASKS[task]
    engine = MJXEngine(task_class(), number, dtype=getattr(torch, dtype), solver=solver)
    engine.set_state(torch.from_numpy(expected["qpos"]), torch.from_numpy(expected["qvel"]))
    step = engine.step(torch.from_numpy(expected["action"]))
    observation = errors(step.next_observation.numpy(), expected["observation"]).max(-1)
    reward = errors(step.reward.numpy(), expected["reward"])
    return {
        "observation": summary(observation),
        "reward": summary(reward),
        "terminated": int((step.terminated.numpy() != expected["terminated"]).sum()),
    }


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tasks", nargs="+", default=list(TASKS), choices=list(TASKS))
    parser.add_argument("--dtypes", nargs="+", default=["float32", "float64"], choices=["float32", "float64"])
    parser.add_argument("--solvers", nargs="+", default=["gymnasium", "fast"], choices=["gymnasium", "fast"])
    parser.add_argument("--number", type=int, default=128, help="states of each task")
    parser.add_argument("--output", type=Path, help="a JSON file")
    options = parser.parse_args(arguments)
    rows: dict[tuple[str, ...], dict[str, Any]] = {}
    if options.output is not None and options.output.exists():
        rows = {tuple(row[name] for name in KEY): row for row in json.loads(options.output.read_text())}
    for dtype in options.dtypes:
        for solver in options.solvers:
            for task in options.tasks:
                start = time.perf_counter()
                row = dict(zip(KEY, (task, dtype, solver), strict=True)) | {"states": options.number}
                row |= compare(task, options.number, dtype=dtype, solver=solver)
                row |= {package: version(package) for package in ("gymnasium", "mujoco", "mujoco-mjx", "jax")}
                rows[task, dtype, solver] = row
                print(json.dumps(row), f"{time.perf_counter() - start:.0f} s", flush=True)
                if options.output is not None:
                    options.output.parent.mkdir(parents=True, exist_ok=True)
                    lines = ",\n".join(json.dumps(rows[key]) for key in sorted(rows))
                    options.output.write_text(f"[\n{lines}\n]\n")
    print(table(rows[key] for key in sorted(rows)))


if __name__ == "__main__":
    main()
