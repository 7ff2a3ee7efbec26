"""TorchRL's loggers, as a run uses them: they neither stop it nor forget where a resumed one goes on."""

from __future__ import annotations

import uuid
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from torchrl.record.loggers import Logger, get_logger

from nclql_torchrl.training.run_directory import RunDirectory, write_atomically


class RunLogger:
    """Hands rows of metrics to a logger of TorchRL that writes into ``logs`` of the run directory.

    The run's own metrics.csv has every row in any case, so a service that cannot be reached costs only its own copy:
    that is said once, and every later row is tried again.

    Args:
        backend: "csv", "tensorboard", "wandb" or "none".
        run: the run directory.
        frames: where the run goes on; later steps, of a process that was killed, are taken back.
        say: tells the user a sentence.

    Raises:
        ImportError: if the backend is not installed.

    Examples:
        >>> import tempfile
        >>> from nclql_torchrl.training import TrainConfig
        >>> with tempfile.TemporaryDirectory() as parent:
        ...     run = RunDirectory.create(TrainConfig(run_dir=f"{parent}/run"))
        ...     logger = RunLogger("csv", run, frames=0, say=print)
        ...     logger.log({"frames": 5, "q_mean": 0.25})
        ...     (run.path / "logs" / "run" / "scalars" / "q_mean.csv").read_text().split()
        ['5,0.25']
    """

    def __init__(self, backend: str, run: RunDirectory, frames: int, say: Callable[[str], None]) -> None:
        self.backend = backend
        self._say = say
        self._failed = False
        self._logger: Logger | None = None
        self._try(lambda: self._open(run, frames))

    def log(self, row: Mapping[str, float]) -> None:
        """Logs a row at its ``frames``."""
        logger, values = self._logger, {name: value for name, value in row.items() if name != "frames"}
        if logger is not None:
            self._try(lambda: logger.log_metrics(values, step=int(row["frames"])))

    def flush(self) -> None:
        """Writes what the logger still holds: what a checkpoint counts as logged has to be."""
        if self._logger is not None:
            self._try(self._logger.flush)

    def _open(self, run: RunDirectory, frames: int) -> None:
        if self.backend == "none":
            return
        backend: Any = self.backend
        directory, name = run.path / "logs", run.path.name
        if backend == "csv":
            rewind_csv(directory / name / "scalars", frames)
        options: dict[str, Any] = {"wandb_kwargs": {"id": _wandb_id(directory)}} if backend == "wandb" else {}
        self._logger = logger = get_logger(backend, logger_name=str(directory), experiment_name=name, **options)
        if backend == "tensorboard" and frames > 0:
            # TensorBoard leaves out what earlier files have from this step on; TorchRL has no argument for it.
            experiment: Any = logger.experiment  # pyright: ignore[reportOptionalMemberAccess]
            experiment.close()
            experiment.purge_step = frames + 1

    def _try(self, action: Callable[[], Any]) -> None:
        try:
            action()
        except ImportError:
            raise
        except Exception as error:  # of whatever kind a service's client raises
            if not self._failed:
                self._say(
                    f"The logger {self.backend} failed ({type(error).__name__}: {error}). Training goes on, and "
                    "metrics.csv has every row."
                )
            self._failed = True


def rewind_csv(directory: Path, frames: int) -> None:
    """Drops the lines after ``frames``, and one that stops short, from TorchRL's CSV files of ``step,value``."""
    for path in directory.glob("*.csv"):
        lines = path.read_text().splitlines(keepends=True)
        kept = [line for line in lines if line.endswith("\n") and int(line.split(",")[0]) <= frames]
        write_atomically(path, "".join(kept))


def _wandb_id(directory: Path) -> str:
    """The id under which Weights & Biases knows the run, so that resuming goes on with the same one."""
    path = directory / "wandb_id"
    if not path.exists():
        directory.mkdir(exist_ok=True)
        write_atomically(path, uuid.uuid4().hex)
    return path.read_text()
