"""How long a call of the sampler takes, what its first call costs, and how much memory it needs."""

from __future__ import annotations

import os
import statistics
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

import torch
from torch._inductor.utils import fresh_cache
from torch.profiler import ProfilerActivity, profile

Call = Callable[[], object]

ROUNDS = 5
"""Interleaved settings are timed in that many rounds, so that a machine that slows down slows all of them down."""


WARM_UP_CALLS = 4
"""Calls until nothing is compiled or captured any more, with some to spare."""


def percentile(values: Sequence[float], percent: int) -> float:
    """A percentile by linear interpolation between order statistics.

    Examples:
        >>> percentile([4.0, 1.0, 3.0, 2.0], 50), percentile([5.0], 90)
        (2.5, 5.0)
    """
    if len(values) == 1:
        return values[0]
    return statistics.quantiles(values, n=100, method="inclusive")[percent - 1]


def warm_up(call: Call, device: torch.device) -> tuple[float, int | None]:
    """The first :data:`WARM_UP_CALLS` calls of a setting, compiled with an empty cache on disk.

    Args:
        call: one call of the sampler, whose executor has not run yet: each compiles for itself.
        device: where it runs.

    Returns:
        Their seconds; and on a GPU the most bytes that were allocated at once, on top of what was before: a captured
        graph keeps its memory, so that later calls would not show it.
    """
    on_gpu = device.type == "cuda"
    if on_gpu:
        _wait(device)
        torch.cuda.reset_peak_memory_stats(device)
    before = torch.cuda.memory_allocated(device) if on_gpu else 0
    with fresh_cache():
        start = time.perf_counter()
        for _ in range(WARM_UP_CALLS):
            call()
        _wait(device)
        seconds = time.perf_counter() - start
    return seconds, torch.cuda.max_memory_allocated(device) - before if on_gpu else None


def time_calls(calls: Sequence[Call], device: torch.device, repetitions: int, after: Call) -> list[list[float]]:
    """Milliseconds of every timed call of every setting, [len(calls)][repetitions].

    The settings take turns. Each turn begins with a call that is not timed and fills the caches. A GPU's time is that
    between two events around the call, which starts on an idle GPU: what launching costs is part of it.

    Args:
        calls: one for each setting.
        device: where they run.
        repetitions: timed calls of each.
        after: called after every turn, to move a progress bar.
    """
    milliseconds: list[list[float]] = [[] for _ in calls]
    rounds = min(ROUNDS, repetitions)
    for turn in range(rounds):
        count = repetitions * (turn + 1) // rounds - repetitions * turn // rounds
        for call, found in zip(calls, milliseconds, strict=True):
            call()
            found.extend(_milliseconds(call, device) for _ in range(count))
            after()
    return milliseconds


def peak_memory_cpu(call: Call) -> int:
    """Most bytes that one call has allocated at once.

    It is the largest sum of live tensors that torch's allocator handed out during the call, as torch.profiler saw them;
    memory that libraries keep for themselves is not in it.

    Args:
        call: one call of the sampler, warmed up.
    """
    with _silent_profiler(), profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
        call()
    assert profiler.profiler is not None and profiler.profiler.kineto_results is not None
    live = peak = 0
    events = [event for event in profiler.profiler.kineto_results.events() if event.name() == "[memory]"]
    for event in sorted(events, key=lambda event: event.start_ns()):
        live += event.nbytes()  # pyright: ignore[reportAttributeAccessIssue]
        peak = max(peak, live)
    return peak


def write_trace(call: Call, device: torch.device, path: Path) -> None:
    """Writes torch.profiler's trace of one call, in Chrome's format.

    Args:
        call: one call of the sampler, warmed up.
        device: where it runs.
        path: of the file.
    """
    activities = [ProfilerActivity.CPU, *([ProfilerActivity.CUDA] if device.type == "cuda" else [])]
    with _silent_profiler(), profile(activities=activities) as profiler:
        call()
        _wait(device)
    path.parent.mkdir(parents=True, exist_ok=True)
    profiler.export_chrome_trace(str(path))


@contextmanager
def _silent_profiler() -> Iterator[None]:
    """Kineto, as torch 2.13 has it, announces every start and stop on stderr, in the middle of the progress bar."""
    sys.stderr.flush()
    stderr = os.dup(2)
    with open(os.devnull, "w") as nowhere:
        os.dup2(nowhere.fileno(), 2)
    try:
        yield
    finally:
        os.dup2(stderr, 2)
        os.close(stderr)


def _milliseconds(call: Call, device: torch.device) -> float:
    if device.type == "cuda":
        start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        _wait(device)
        start.record()
        call()
        end.record()
        _wait(device)
        return start.elapsed_time(end)
    begin = time.perf_counter()
    call()
    return (time.perf_counter() - begin) * 1e3


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
