"""Where a training run's time goes: ``nclql-train profile=true``.

The methods of a run's parts are wrapped for as long as the profile lasts; without one nothing is.
"""

from __future__ import annotations

import json
import math
import time
from collections.abc import Callable
from contextlib import ExitStack
from functools import wraps
from pathlib import Path
from typing import Any

import torch
from torch._C._autograd import DeviceType
from torch.profiler import ProfilerActivity, record_function
from torchrl import timeit

from nclql_torchrl.training.run_directory import write_atomically

WORK = (
    "simulation",
    "acting",
    "evaluation: simulation",
    "evaluation: acting",
    "target sampling",
    "critic update",
    "temperature",
)
"""What a run is for: physics, chains and gradients. All other parts are overhead, and so is "other", the rest: the
loop's own bookkeeping."""

FIRST_UPDATE = 20
"""Updates before the measurement begins: the first ones compile."""

PREFIX = "nclql-train/"
"""Of the parts' names among the timers of torchrl's ``timeit``."""

TRACED_UPDATES = 20
"""How many updates from there on the trace shows."""


class TimeProfile:
    """Times the parts of a run, each without those that it calls, and traces a few updates.

    A part's time ends when the GPU has done its work, so that a profiled run on a GPU overlaps less than another.

    Args:
        directory: where ``profile.json`` (seconds and shares) and ``trace.json`` (for chrome://tracing or Perfetto) go.

    Examples:
        >>> import tempfile, types
        >>> sleeper = types.SimpleNamespace(sleep=time.sleep)
        >>> with TimeProfile(Path(tempfile.mkdtemp())) as profile:
        ...     profile.watch(sleeper, "sleep", "simulation")
        ...     profile.advance(0)
        ...     profile.advance(FIRST_UPDATE)
        ...     sleeper.sleep(0.1)
        ...     shares = profile.summary()["shares"]
        >>> shares["simulation"] > 0.9 and sleeper.sleep is time.sleep
        True
    """

    def __init__(self, directory: Path) -> None:
        self.directory = directory
        self._open: timeit | None = None
        self._parts: list[str] = []
        self._undo = ExitStack()
        self._trace: torch.profiler.profile | None = None
        self._trace_started = self._processor_started = 0.0
        self._gpu_idle: float | None = None
        self._started: float | None = None
        self._first_update: int | None = None
        self._updates = 0
        self._before: dict[str, float] = {}

    def watch(self, owner: Any, method: str, part: str, within: str | None = None) -> None:
        """Counts the time of ``owner.method`` as that of a part, until the profile is closed.

        Args:
            owner: a module, an object, or a class, whose objects are then all watched.
            method: its name there.
            part: what the time is counted as.
            within: the part that has to call the method; called by others, the time stays theirs.
        """
        original = getattr(owner, method)
        was_own = method in vars(owner)
        setattr(owner, method, self._timed(original, part, within))
        if part not in self._parts:
            self._parts.append(part)
        if was_own:
            self._undo.callback(setattr, owner, method, original)
        else:
            self._undo.callback(delattr, owner, method)

    def _timed(self, function: Callable[..., Any], part: str, within: str | None) -> Callable[..., Any]:
        name, caller = f"{PREFIX}{part}", f"{PREFIX}{within}"

        @wraps(function)
        def timed(*args: Any, **kwargs: Any) -> Any:
            if within is not None and (self._open is None or self._open.name != caller):
                return function(*args, **kwargs)
            outer, self._open = self._open, timeit(name, sync=True)
            if outer is not None:
                outer.__exit__(None, None, None)
            try:
                with self._open, record_function(part):
                    return function(*args, **kwargs)
            finally:
                self._open = outer
                if outer is not None:
                    outer.__enter__()

        return timed

    def advance(self, updates: int) -> None:
        """Tells how many updates there have been. The measurement starts at :data:`FIRST_UPDATE` of this process."""
        if self._first_update is None:
            self._first_update = updates + FIRST_UPDATE
        self._updates = updates
        if self._started is None and updates >= self._first_update:
            self._before, self._first_update = self._totals(), updates
            activities = [ProfilerActivity.CPU, *([ProfilerActivity.CUDA] if torch.cuda.is_available() else [])]
            self._trace = torch.profiler.profile(activities=activities)
            self._trace.start()
            self._started = self._trace_started = time.time()
            self._processor_started = time.process_time()
        elif self._trace is not None and updates >= self._first_update + TRACED_UPDATES:
            self._end_trace()

    def _end_trace(self) -> None:
        if self._trace is not None and self._started is not None:
            if torch.cuda.is_available():
                torch.cuda.synchronize()
            ended, processor_ended = time.time(), time.process_time()
            seconds = ended - self._trace_started
            self._trace.stop()
            self._trace.export_chrome_trace(str(self.directory / "trace.json"))
            if torch.cuda.is_available() and (busy := gpu_busy(self._trace, seconds)) > 0.0:
                self._gpu_idle = 1.0 - busy
            self._trace = None
            # Writing the trace is no part of the run.
            self._started += time.time() - ended
            self._processor_started += time.process_time() - processor_ended

    def _totals(self) -> dict[str, float]:
        totals = timeit.todict(percall=False)
        return {part: totals.get(f"{PREFIX}{part}", 0.0) for part in self._parts}

    def summary(self) -> dict[str, Any]:
        """Updates, seconds, seconds and shares of the parts, and the shares of overhead and of idleness, since the
        measurement began. What is idle is also in some part: the one that waits."""
        if self._started is None or self._first_update is None:
            return {"updates": 0, "seconds": 0.0, "parts": {}, "shares": {}, "overhead": 0.0, "idle": 0.0}
        seconds = time.time() - self._started
        # Of all threads together: what two did at once makes up for what nobody did, so this is the least it can be.
        processor_idle = max(0.0, 1.0 - (time.process_time() - self._processor_started) / seconds)
        parts = {part: total - self._before[part] for part, total in self._totals().items()}
        parts["other"] = seconds - sum(parts.values())
        return {
            "updates": self._updates - self._first_update,
            "seconds": seconds,
            "parts": parts,
            "shares": {part: spent / seconds for part, spent in parts.items()},
            "overhead": sum(spent for part, spent in parts.items() if part not in WORK) / seconds,
            "idle": processor_idle if self._gpu_idle is None else self._gpu_idle,
        }

    def report(self) -> str:
        """Writes profile.json, and returns a table for people."""
        self._end_trace()
        summary = self.summary()
        write_atomically(self.directory / "profile.json", json.dumps(summary, indent=1) + "\n")
        if not summary["parts"]:
            return f"profile: the run ended before update {FIRST_UPDATE}, where the measurement begins."
        lines = [f"profile of {summary['updates']} updates, {summary['seconds']:.1f} s:"]
        lines += [f"  {share:6.1%}  {part}" for part, share in sorted(summary["shares"].items(), key=lambda x: -x[1])]
        lines.append(f"  {summary['overhead']:6.1%}  of it overhead: neither simulation, chains nor gradients")
        idle = "this process did not run" if self._gpu_idle is None else "the GPU ran nothing, in the traced updates"
        lines.append(f"  {summary['idle']:6.1%}  of it idle: {idle}")
        return "\n".join([*lines, f"  {self.directory / 'profile.json'}, trace.json"])

    def __enter__(self) -> TimeProfile:
        return self

    def __exit__(self, *error: object) -> None:
        if self._trace is not None:
            self._trace.stop()
        self._undo.close()


def gpu_busy(trace: torch.profiler.profile, seconds: float) -> float:
    """Share of a trace's time in which a GPU ran anything, kernels or copies, whoever launched it; several at once
    count once.

    Args:
        trace: a trace that has ended, of CUDA activity.
        seconds: how long it was.
    """
    spans = sorted(
        (event.time_range.start, event.time_range.end)
        for event in trace.events() or ()
        if event.device_type == DeviceType.CUDA and not event.is_user_annotation
    )
    microseconds, reached = 0.0, -math.inf
    for start, end in spans:
        microseconds += max(0.0, end - max(start, reached))
        reached = max(reached, end)
    return microseconds / 1e6 / seconds
