"""The directory that holds everything a run leaves behind.

::

    config.yaml          the whole configuration
    metrics.csv          one row per log interval
    summary.json         the final evaluation
    learning_curve.png   evaluation and training returns over frames
    checkpoints/         the newest checkpoints
"""

from __future__ import annotations

import csv
import json
import os
from collections.abc import Mapping
from dataclasses import replace
from datetime import datetime
from pathlib import Path
from typing import Any

from matplotlib.figure import Figure
from omegaconf import OmegaConf

from nclql_torchrl.training.config import TrainConfig

METRICS: tuple[str, ...] = (
    "frames",
    "updates",
    "wall_time",
    "frames_per_second",
    "updates_per_second",
    "train_return",
    "train_length",
    "diverged",
    "evaluation_return",
    "evaluation_return_std",
    "evaluation_length",
    "estimated_q",
    "discounted_return",
    "overestimation",
    "loss_qvalue",
    "loss_noise",
    "q_mean",
    "q_target_mean",
    "td_error",
    "gradient_norm",
    "clipped_fraction",
    "q_before",
    "q_after",
    "acceptance_rate",
    "w",
    "spread",
)
"""Columns of metrics.csv; a cell is empty where nothing was measured."""


class RunDirectory:
    """Paths and files of one run. ``create`` starts a new one, ``open`` an existing one.

    Examples:
        >>> import tempfile
        >>> with tempfile.TemporaryDirectory() as parent:
        ...     run = RunDirectory.create(TrainConfig(run_dir=f"{parent}/run"))
        ...     run.append_metrics({"frames": 5, "updates": 1})
        ...     run.read_metrics()[0]["frames"]
        5.0
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self.config = path / "config.yaml"
        self.metrics = path / "metrics.csv"
        self.summary = path / "summary.json"
        self.learning_curve = path / "learning_curve.png"
        self.checkpoints = path / "checkpoints"

    @classmethod
    def create(cls, config: TrainConfig) -> RunDirectory:
        """Makes the directory and writes config.yaml.

        Raises:
            FileExistsError: if the path is taken, by a run or by anything else.
        """
        path = _automatic_path(config) if config.run_dir is None else Path(config.run_dir)
        if path.exists() and not path.is_dir():
            raise FileExistsError(f"run_dir {path} is a file; expected a new or empty directory.")
        if (path / "config.yaml").exists():
            raise FileExistsError(
                f"run_dir {path} already holds a run; continue it with resume={path}, or choose another run_dir."
            )
        if path.exists() and any(path.iterdir()):
            raise FileExistsError(
                f"run_dir {path} exists and is not a run (it has no config.yaml); expected a new or empty directory."
            )
        path.mkdir(parents=True, exist_ok=True)
        run = cls(path.resolve())
        run.checkpoints.mkdir()
        with run.metrics.open("w", newline="") as file:
            csv.writer(file).writerow(METRICS)
        # config.yaml last: a directory that has one is complete.
        run.write_config(config)
        return run

    @classmethod
    def open(cls, path: str | Path) -> RunDirectory:
        """Opens an existing run.

        Raises:
            FileNotFoundError: if the directory does not exist or is not a run.
        """
        run = cls(Path(path).resolve())
        if not run.config.is_file():
            state = "is not a run (it has no config.yaml)" if run.path.exists() else "does not exist"
            raise FileNotFoundError(f"{path} {state}; expected the directory of an earlier nclql-train run.")
        return run

    @classmethod
    def containing(cls, path: str | Path) -> RunDirectory:
        """The run that a run directory, or one of its checkpoints, belongs to."""
        path = Path(path).resolve()
        return cls(path if (path / "checkpoints").is_dir() else path.parent.parent)

    def write_config(self, config: TrainConfig) -> None:
        """Writes config.yaml."""
        resolved = replace(config, run_dir=str(self.path), resume=None)
        write_atomically(self.config, OmegaConf.to_yaml(OmegaConf.structured(resolved)))

    def append_metrics(self, row: Mapping[str, float]) -> None:
        """Adds a row to metrics.csv. Names must be among :data:`METRICS`."""
        with self.metrics.open("a", newline="") as file:
            csv.DictWriter(file, METRICS).writerow(row)

    def read_metrics(self) -> list[dict[str, float]]:
        """Complete rows of metrics.csv, empty cells left out."""
        with self.metrics.open(newline="") as file:
            rows = list(csv.DictReader(file))
        # A killed process may leave a last row that stops short; DictReader fills what is missing with None.
        whole = [row for row in rows if None not in row.values()]
        return [{name: float(cell) for name, cell in row.items() if cell} for row in whole]

    def rewind_metrics(self, frames: int) -> None:
        """Drops the rows after ``frames``, which a resumed run is about to write again."""
        kept = [row for row in self.read_metrics() if row["frames"] <= frames]
        temporary = self.metrics.with_suffix(".csv.tmp")
        with temporary.open("w", newline="") as file:
            writer = csv.DictWriter(file, METRICS)
            writer.writeheader()
            writer.writerows(_with_integer_counts(row) for row in kept)
        os.replace(temporary, self.metrics)

    def write_summary(self, summary: Mapping[str, Any]) -> None:
        """Writes summary.json."""
        write_atomically(self.summary, json.dumps(summary, indent=2) + "\n")

    def draw_learning_curve(self, title: str) -> None:
        """Draws learning_curve.png from metrics.csv."""
        rows = self.read_metrics()
        train = [row for row in rows if "train_return" in row]
        evaluations = [row for row in rows if "evaluation_return" in row]
        figure = Figure(figsize=(7, 4.2), layout="constrained")
        axes = figure.subplots()
        axes.plot([r["frames"] for r in train], [r["train_return"] for r in train], color="0.65", label="training")
        frames = [row["frames"] for row in evaluations]
        mean = [row["evaluation_return"] for row in evaluations]
        low = [row["evaluation_return"] - row["evaluation_return_std"] for row in evaluations]
        high = [row["evaluation_return"] + row["evaluation_return_std"] for row in evaluations]
        axes.fill_between(frames, low, high, color="C0", alpha=0.2, linewidth=0)
        axes.plot(frames, mean, color="C0", marker="o", markersize=3, label="evaluation (mean ± standard deviation)")
        axes.set(xlabel="environment steps", ylabel="return", title=title)
        axes.legend(frameon=False)
        temporary = self.learning_curve.with_suffix(".tmp.png")
        figure.savefig(temporary, dpi=150)
        os.replace(temporary, self.learning_curve)


def write_atomically(path: Path, text: str) -> None:
    """Writes a file so that a reader, or a crash, sees the old content or the new one, never a part."""
    temporary = path.with_name(f".{path.name}.tmp")
    temporary.write_text(text)
    os.replace(temporary, path)


def _automatic_path(config: TrainConfig) -> Path:
    name = f"{datetime.now():%Y%m%d-%H%M%S}-seed{config.seed}"
    path = Path("runs", config.env.task, name)
    number = 1
    while path.exists():
        number += 1
        path = path.with_name(f"{name}-{number}")
    return path


def _with_integer_counts(row: Mapping[str, float]) -> dict[str, float]:
    return {name: int(value) if name in ("frames", "updates") else value for name, value in row.items()}
