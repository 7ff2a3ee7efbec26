"""The directory that holds everything a run leaves behind.

::

    config.yaml          the whole configuration
    metrics.csv          one row per log interval
    summary.json         the final evaluation
    learning_curve.png   evaluation and training returns over frames
    checkpoints/         the newest checkpoints, and the policy of the best evaluation
"""

from __future__ import annotations

import csv
import fcntl
import io
import json
import os
import socket
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
    "lost_frames",
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


LOCK = ".lock"


class RunDirectory:
    """Paths and files of one run. ``create`` starts a new one, ``open`` an existing one.

    Who writes to it holds its lock; as a context manager it releases the lock at the end.

    Examples:
        >>> import tempfile
        >>> with tempfile.TemporaryDirectory() as parent:
        ...     with RunDirectory.create(TrainConfig(run_dir=f"{parent}/run")) as run:
        ...         run.append_metrics({"frames": 5, "updates": 1})
        ...         run.read_metrics()[0]["frames"]
        5.0
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self.config = path / "config.yaml"
        self.metrics = path / "metrics.csv"
        self.summary = path / "summary.json"
        self.learning_curve = path / "learning_curve.png"
        self.checkpoints = path / "checkpoints"

        self._lock: io.TextIOWrapper | None = None
        self._unwritten = ""

    @classmethod
    def create(cls, config: TrainConfig) -> RunDirectory:
        """Makes the directory, locks it, and writes config.yaml.

        Raises:
            FileExistsError: if the path is taken, by a run or by anything else.
            BlockingIOError: if another process is making it at this moment.
        """
        path = automatic_path(config) if config.run_dir is None else Path(config.run_dir)
        refuse_taken(path)
        path.mkdir(parents=True, exist_ok=True)
        run = cls(path.resolve())
        run._acquire()
        refuse_taken(path)  # by somebody who was quicker
        # A directory with a config.yaml is a run; the rest is made where it is missing.
        run.write_config(config)
        run._complete()
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

    def has_checkpoint(self) -> bool:
        """Whether there is one to go on from; a run that was killed earlier begins anew."""
        return any(self.checkpoints.glob("checkpoint-*"))

    def lock(self) -> None:
        """Makes this the only process that trains here, until it ends in any way, or :meth:`unlock`.

        Raises:
            BlockingIOError: if another process does.
        """
        self._acquire()
        self._complete()

    def _acquire(self) -> None:
        file = (self.path / LOCK).open("a+")
        try:
            # The kernel's lock, which no dead process can hold.
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            file.seek(0)
            holder = file.read() or "another process"
            file.close()
            raise BlockingIOError(
                f"run_dir {self.path} is in use by {holder}; expected a run that nobody is training. Wait for it, stop "
                "it, or choose another run_dir."
            ) from None
        file.truncate(0)
        file.write(f"process {os.getpid()} on {socket.gethostname()}")
        file.flush()
        self._lock = file

    def unlock(self) -> None:
        """Lets others train here."""
        if self._lock is not None:
            self._lock.close()
            self._lock = None

    def __enter__(self) -> RunDirectory:
        return self

    def __exit__(self, *error: object) -> None:
        self.unlock()

    def _complete(self) -> None:
        """Makes what is missing beside config.yaml: a process may have been killed before it did."""
        self.checkpoints.mkdir(exist_ok=True)
        if not self.metrics.exists():
            write_atomically(self.metrics, ",".join(METRICS) + "\r\n")

    def write_config(self, config: TrainConfig) -> None:
        """Writes config.yaml."""
        resolved = replace(config, run_dir=str(self.path), resume=None)
        write_atomically(self.config, OmegaConf.to_yaml(OmegaConf.structured(resolved)))

    def append_metrics(self, row: Mapping[str, float]) -> None:
        """Adds a row to metrics.csv. Names must be among :data:`METRICS`.

        Raises:
            OSError: if it cannot be written, such as on a full disk; then :meth:`flush_metrics` writes it, or the next
                row does.
        """
        line = io.StringIO(newline="")
        csv.DictWriter(line, METRICS).writerow(row)
        self._unwritten += line.getvalue()
        self.flush_metrics()

    def flush_metrics(self) -> None:
        """Writes the rows that could not be written before.

        Raises:
            OSError: if they still cannot.
        """
        if not self._unwritten:
            return
        size = self.metrics.stat().st_size
        try:
            with self.metrics.open("a", newline="") as file:
                file.write(self._unwritten)
        except OSError:
            os.truncate(self.metrics, size)
            raise
        self._unwritten = ""

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
        text = io.StringIO(newline="")
        writer = csv.DictWriter(text, METRICS)
        writer.writeheader()
        writer.writerows(_with_integer_counts(row) for row in kept)
        write_atomically(self.metrics, text.getvalue())

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


def refuse_taken(path: Path) -> None:
    """Checks that a new run can be written at ``path``. Hidden files do not count.

    Raises:
        FileExistsError: if the path is taken, by a run or by anything else.
    """
    if path.exists() and not path.is_dir():
        raise FileExistsError(f"run_dir {path} is a file; expected a new or empty directory.")
    if (path / "config.yaml").exists():
        raise FileExistsError(
            f"run_dir {path} already holds a run; continue it with resume={path}, or choose another run_dir."
        )
    if path.exists() and any(not entry.name.startswith(".") for entry in path.iterdir()):
        raise FileExistsError(
            f"run_dir {path} exists and is not a run (it has no config.yaml); expected a new or empty directory."
        )


def write_atomically(path: Path, text: str) -> None:
    """Writes a file so that a reader, or a crash, sees the old content or the new one, never a part."""
    temporary = path.with_name(f".{path.name}.tmp")
    temporary.write_text(text)
    sync(temporary)
    os.replace(temporary, path)
    sync(path.parent)


def sync(*paths: Path) -> None:
    """Waits until files would survive a loss of power, and directories with the names in them."""
    for path in paths:
        descriptor = os.open(path, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)


def automatic_path(config: TrainConfig) -> Path:
    """Where a run is written that has no ``run_dir``: a path that is not taken."""
    name = f"{datetime.now():%Y%m%d-%H%M%S}-seed{config.seed}"
    path = Path("runs", config.env.task, name)
    number = 1
    while path.exists():
        number += 1
        path = path.with_name(f"{name}-{number}")
    return path


def _with_integer_counts(row: Mapping[str, float]) -> dict[str, float]:
    return {name: int(value) if name in ("frames", "updates", "diverged") else value for name, value in row.items()}
