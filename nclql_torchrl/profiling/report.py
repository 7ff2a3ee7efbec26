"""What a profile leaves behind: rows and what explains them, as JSON, as CSV, and as a table on the terminal."""

from __future__ import annotations

import csv
import io
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from nclql_torchrl.machine import describe_machine
from nclql_torchrl.targets import TARGETS
from nclql_torchrl.training.run_directory import write_atomically

COLUMNS: dict[str, str] = {
    "run": "Index into the JSON file's runs: machine, critic, reference.",
    "device": "cpu or cuda:<index>.",
    "execution": "How the chain ran.",
    "precision": "Of its matrix products.",
    "kernel": "Transition of the chain.",
    "levels": "Noise levels.",
    "steps_per_level": "Langevin steps at each.",
    "start_level": "The first that is visited.",
    "warm_start": "Whether chains start from the previous action plus noise of that level.",
    "langevin_steps": "Sequential gradient steps: levels visited x steps_per_level.",
    "states": "States per call.",
    "particles": "Chains per state, of which the best is kept.",
    "sigma_max": "Noise of the first level, after the change.",
    "schedule_change": "What was changed so that the schedule can mix; empty: nothing.",
    "ms_median": "Milliseconds per call.",
    "ms_p10": "10th percentile.",
    "ms_p90": "90th percentile.",
    "actions_per_second": "states / ms_median.",
    "compile_seconds": "The first four calls, compiled with empty caches, less four medians; empty in eager mode.",
    "peak_memory_mib": "Beside critics and states. CPU: live tensors of a call; GPU: the allocator's peak until warm.",
    "q_mean": "Mean Q of the actions at the noise-free level, per critic.",
    "q_gap": "The reference chain's mean Q less that, on the same states.",
    "q_gap_stderr": "Its standard error over states.",
    "q_recovered": "Share of the way from uniformly random actions to the reference chain.",
    "spread": "Standard deviation of a normalised action's coordinate within a state, over independent chains.",
    **{f"tv_{name}": f"Total-variation distance to {name}, binned." for name in TARGETS},
    "modes_covered": "Modes of four_modes, of 4, with at least half of their weight; like all tv_..., of cold starts.",
    "tv_mode_weights": "Total-variation distance of the modes' shares to their weights.",
    "return_mean": "Return on Gymnasium, mean over episodes; empty without a checkpoint.",
    "return_std": "Standard deviation over episodes.",
}
"""Columns of profile.csv, which are the entries of the JSON file's rows, and what they mean."""

_TABLE = {
    "device": "device",
    "execution": "execution",
    "precision": "precision",
    "kernel": "kernel",
    "states": "states",
    "particles": "particles",
    "levels": "levels",
    "steps_per_level": "x steps",
    "start_level": "from level",
    "warm_start": "warm",
    "ms_median": "ms",
    "ms_p10": "p10",
    "ms_p90": "p90",
    "actions_per_second": "actions/s",
    "compile_seconds": "compile s",
    "peak_memory_mib": "MiB",
    "q_gap": "Q gap",
    "q_recovered": "recovered",
    "spread": "spread",
    "modes_covered": "modes",
    "tv_mode_weights": "mode TV",
    "return_mean": "return",
    "schedule_change": "schedule",
}


def machine(device: torch.device) -> dict[str, Any]:
    """What a reader must know of the machine to understand a time that was measured on a device of it."""
    found = describe_machine()
    return {"device": torch.cuda.get_device_name(device) if device.type == "cuda" else found["processor"], **found}


def write(
    path: Path, before: dict[str, Any] | None, run: dict[str, Any], rows: Sequence[dict[str, Any]]
) -> dict[str, Any]:
    """Writes profile.json and profile.csv: what was there before, and a run with its rows.

    Args:
        path: the directory.
        before: what :func:`read` found in it.
        run: what its rows have in common.
        rows: without their ``run``.

    Returns:
        The whole profile: ``{"columns": ..., "runs": [...], "rows": [...]}``.
    """
    before = before or {"runs": [], "rows": []}
    number = len(before["runs"])
    added = [{name: {"run": number, **row}.get(name) for name in COLUMNS} for row in rows]
    profile = {"columns": COLUMNS, "runs": [*before["runs"], run], "rows": [*before["rows"], *added]}
    path.mkdir(parents=True, exist_ok=True)
    write_atomically(path / "profile.json", json.dumps(profile, indent=1, allow_nan=False) + "\n")
    text = io.StringIO()
    writer = csv.DictWriter(text, COLUMNS, lineterminator="\n")
    writer.writeheader()
    writer.writerows(profile["rows"])
    write_atomically(path / "profile.csv", text.getvalue())
    return profile


def read(path: Path) -> dict[str, Any] | None:
    """The profile in a directory, or None.

    Raises:
        ValueError: if what is there is not one of this version.
    """
    file = path / "profile.json"
    if not file.exists():
        return None
    try:
        profile = json.loads(file.read_text())
        fits = profile["columns"].keys() == COLUMNS.keys()
    except (ValueError, KeyError, AttributeError, TypeError):
        fits = False
    if not fits:
        raise ValueError(f"{file} is no profile of this version, so nothing can be added; choose another run_dir.")
    return profile


def table(rows: Sequence[dict[str, Any]], skipped: Sequence[dict[str, str]]) -> str:
    """The rows as text, columns that say nothing left out, and what was skipped, with the reason."""
    lines = []
    names = [name for name in _TABLE if any(row.get(name) not in (None, "") for row in rows)]
    # What is the same in all rows stands once, above the table.
    shared = ("device", "precision", "kernel", "particles", "states", "start_level", "warm_start")
    common = [name for name in shared if len({row[name] for row in rows}) == 1]
    if rows:
        if common:
            lines.append(", ".join(f"{name} {rows[0][name]}" for name in common))
        names = [name for name in names if name not in common]
        cells = [[_TABLE[name] for name in names], *([_cell(name, row.get(name)) for name in names] for row in rows)]
        widths = [max(map(len, column)) for column in zip(*cells, strict=True)]
        for line in cells:
            lines.append("  ".join(_align(c, w, n) for c, w, n in zip(line, widths, names, strict=True)).rstrip())
    lines += [f"skipped: {entry['setting']}: {entry['reason']}" for entry in skipped]
    return "\n".join(lines)


def _align(cell: str, width: int, name: str) -> str:
    return (
        cell.ljust(width)
        if name in ("device", "execution", "precision", "kernel", "schedule_change")
        else cell.rjust(width)
    )


def _cell(name: str, value: Any) -> str:
    if value is None:
        return ""
    if name == "actions_per_second":
        return f"{value:,.0f}"
    if name in ("q_recovered", "tv_mode_weights", "spread"):
        return f"{value:.3f}"
    if name in ("compile_seconds", "peak_memory_mib", "return_mean"):
        return f"{value:.1f}"
    return f"{value:.3g}" if isinstance(value, float) else str(value)
