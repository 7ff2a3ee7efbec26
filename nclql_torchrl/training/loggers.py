"""TorchRL's loggers, as a run uses them: they neither stop it nor forget where a resumed one goes on."""

from __future__ import annotations

import threading
import uuid
from collections.abc import Callable, Mapping
from pathlib import Path
from queue import Full, Queue
from typing import Any

from torchrl.record.loggers import Logger, get_logger

from nclql_torchrl.training.run_directory import RunDirectory, write_atomically

SERVICES = ("tensorboard", "wandb")
"""Backends that may not answer: a server, or files that somebody else may serve."""

OPENING_SECONDS = 60.0
"""How long a run waits for a service before it starts without."""

PATIENCE_SECONDS = 5.0
"""How long a checkpoint, and the end of a run, wait for a service to take what it was given."""

WAITING_ROWS = 1000
"""Rows that are kept for a service; later ones are dropped until it has taken some."""


class RunLogger:
    """Hands rows of metrics to a logger of TorchRL that writes into ``logs`` of the run directory.

    The run's own metrics.csv has every row in any case, so a service that fails or hangs costs only its own copy: that
    is said once, and every later row is tried again.

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
        ...     logger.close()
        ...     (run.path / "logs" / "run" / "scalars" / "q_mean.csv").read_text().split()
        ['5,0.25']
    """

    def __init__(self, backend: str, run: RunDirectory, frames: int, say: Callable[[str], None]) -> None:
        self.backend = backend
        self._say = say
        self._said = False
        self._logger: Logger | None = None
        self._service = _Service() if backend in SERVICES else None
        self._awaited: threading.Event | None = None
        missing: list[ImportError] = []

        def open_installed() -> None:
            try:
                self._open(run, frames)
            except ImportError as error:
                missing.append(error)

        self._wait(self._do(open_installed), OPENING_SECONDS)
        if missing:
            raise missing[0]

    def log(self, row: Mapping[str, float]) -> None:
        """Logs a row at its ``frames``."""
        values = {name: value for name, value in row.items() if name != "frames"}
        self._do(lambda: self._logger and self._logger.log_metrics(values, step=int(row["frames"])))

    def flush(self) -> None:
        """Writes what the logger still holds: what a checkpoint counts as logged has to be."""
        self._wait(self._do(lambda: self._logger and self._logger.flush()), PATIENCE_SECONDS)

    def close(self) -> None:
        """Flushes; nothing can be logged any more."""
        self.flush()
        if self._service is not None:
            self._service.end()

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

    def _do(self, action: Callable[[], Any]) -> threading.Event:
        """Does something with the logger, now or, with a service, in turn. The event tells that it is over."""
        done = threading.Event()

        def attempt() -> None:
            try:
                action()
            except Exception as error:  # of whatever kind a service's client raises
                self._say_once(f"failed ({type(error).__name__}: {error})")
            done.set()

        if self._service is None:
            attempt()
        elif not self._service.submit(attempt):
            self._say_once("takes nothing any more, so that rows are dropped")
            done.set()
        return done

    def _wait(self, done: threading.Event, seconds: float) -> None:
        """Waits for something to be over, unless what was waited for before is not over yet."""
        if self._awaited is not None and not self._awaited.is_set():
            return
        self._awaited = done
        if not done.wait(seconds):
            self._say_once(f"has not answered for {seconds:g} s")

    def _say_once(self, what: str) -> None:
        if not self._said:
            self._said = True
            self._say(f"The logger {self.backend} {what}. Training goes on, and metrics.csv has every row.")


class _Service:
    """A thread that may wait for ever, as the run must not. TorchRL's ``ProcessLogger`` waits for every row.

    Nobody waits for the thread, so that a process can end while its service hangs.
    """

    def __init__(self) -> None:
        self._actions: Queue[Callable[[], None] | None] = Queue(WAITING_ROWS)
        threading.Thread(target=self._run, name="logger", daemon=True).start()

    def _run(self) -> None:
        while (action := self._actions.get()) is not None:
            action()

    def submit(self, action: Callable[[], None] | None) -> bool:
        """Has something done after what was submitted before; False if too much is waiting."""
        try:
            self._actions.put_nowait(action)
        except Full:
            return False
        return True

    def end(self) -> None:
        """Ends the thread when all is done."""
        self.submit(None)


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
