"""Ctrl-C and SIGTERM as a request to stop at the next safe point."""

from __future__ import annotations

import os
import select
import signal
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType, TracebackType

GRACE_SECONDS = 25.0
"""From SIGTERM to the end of the process, whatever it is doing: schedulers send SIGKILL after 30."""


class Interrupted(Exception):
    """A run was asked to stop; what it had learned is in its last checkpoint.

    Attributes:
        signal_number: SIGINT or SIGTERM.
        exit_status: 128 + signal_number, as shells expect.
    """

    def __init__(self, message: str, signal_number: int) -> None:
        super().__init__(message)
        self.signal_number = signal_number
        self.exit_status = 128 + signal_number


class Abandoned(BaseException):
    """Raised at once by a signal within :meth:`StopRequest.abandonable`; no ``except Exception`` may swallow it."""


class StopRequest:
    """While active, the first SIGINT or SIGTERM only sets ``signal_number``; a second one acts as usual.

    What reaches no safe point within ``grace`` seconds of a SIGTERM, such as a compilation, is ended with exit status
    143. Outside the main thread, where Python allows no signal handlers, nothing ever happens.

    Args:
        abandon: whether a signal raises :class:`Abandoned` at once, until ``stop.abandon`` is set to False: for what
            comes before there is anything to lose.
        grace: seconds.

    Examples:
        >>> with StopRequest() as stop:
        ...     os.kill(os.getpid(), signal.SIGINT)
        ...     stop.signal_number == signal.SIGINT
        True
    """

    def __init__(self, abandon: bool = False, grace: float = GRACE_SECONDS) -> None:
        self.signal_number: int | None = None
        self.abandon = abandon
        self.grace = grace
        self._previous: dict[int, object] = {}
        self._watchdog: threading.Thread | None = None
        self._over = threading.Event()

    def __enter__(self) -> StopRequest:
        if threading.current_thread() is threading.main_thread():
            for number in (signal.SIGINT, signal.SIGTERM):
                self._previous[number] = signal.signal(number, self._handle)
            # Python runs handlers between two instructions, which a long call into a library has to end for. The
            # number of a signal comes through this pipe at once, to a thread that does not wait for the main one.
            self._pipe = os.pipe2(os.O_CLOEXEC | os.O_NONBLOCK)
            self._previous_pipe = signal.set_wakeup_fd(self._pipe[1], warn_on_full_buffer=False)
            self._watchdog = threading.Thread(target=self._watch, name="stop request", daemon=True)
            self._watchdog.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._watchdog is not None:
            self._restore()
            self._over.set()
            signal.set_wakeup_fd(self._previous_pipe)
            os.write(self._pipe[1], b"\0")
            self._watchdog.join()
            for descriptor in self._pipe:
                os.close(descriptor)

    @contextmanager
    def abandonable(self) -> Iterator[None]:
        """What can be abandoned without a loss, such as an evaluation: within it, a signal raises Abandoned."""
        before, self.abandon = self.abandon, True
        try:
            if self.signal_number is not None:
                raise Abandoned
            yield
        finally:
            self.abandon = before

    def _handle(self, number: int, frame: FrameType | None) -> None:
        self.signal_number = number
        self._restore()
        if self.abandon:
            raise Abandoned

    def _restore(self) -> None:
        for number, handler in self._previous.items():
            signal.signal(number, handler)  # pyright: ignore[reportArgumentType]
        self._previous.clear()

    def _watch(self) -> None:
        while not self._over.is_set():
            select.select([self._pipe[0]], [], [])
            if signal.SIGTERM in os.read(self._pipe[0], 64) and not self._over.wait(self.grace):
                message = f"No safe point within {self.grace:.0f} s of SIGTERM; the last checkpoint is kept.\n"
                sys.stderr.write(message)
                sys.stderr.flush()
                os._exit(128 + signal.SIGTERM)
