"""Times and memory are those of the call."""

from __future__ import annotations

import json
import time
from pathlib import Path

import pytest
import torch

from nclql_torchrl.profiling.timing import WARM_UP_CALLS, peak_memory_cpu, percentile, time_calls, warm_up, write_trace

CPU = torch.device("cpu")


def test_settings_take_turns_and_each_is_timed_as_often_as_asked() -> None:
    order: list[str] = []
    calls = [lambda: order.append("a"), lambda: order.append("b")]
    turns: list[None] = []
    times = time_calls(calls, CPU, 7, lambda: turns.append(None))
    assert [len(found) for found in times] == [7, 7]
    assert len(turns) == 10
    # Five rounds; in each, one call that is not timed and one or two that are.
    assert order[:4] == ["a", "a", "b", "b"] and order.count("a") == order.count("b") == 12


def test_a_call_takes_as_long_as_it_takes() -> None:
    (times,) = time_calls([lambda: time.sleep(0.01)], CPU, 3, lambda: None)
    assert 10.0 <= min(times) < 100.0
    seconds, memory = warm_up(lambda: time.sleep(0.01), CPU)
    assert seconds >= 0.01 * WARM_UP_CALLS and memory is None


def test_percentiles_are_those_of_the_sorted_values() -> None:
    assert percentile(list(map(float, range(11))), 50) == 5.0
    assert percentile(list(map(float, range(11))), 90) == pytest.approx(9.0)


def test_peak_memory_counts_what_lives_at_the_same_time() -> None:
    def call() -> torch.Tensor:
        first = torch.ones(1000, 1000)  # 4 MB
        second = first @ first
        del first
        return second @ second  # two alive

    assert 8e6 <= peak_memory_cpu(call) < 8.1e6


def test_a_trace_is_a_chrome_trace_and_nothing_is_printed(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "new" / "trace.json"
    write_trace(lambda: torch.ones(8, 8) @ torch.ones(8, 8), CPU, path)
    assert any(event.get("name") == "aten::mm" for event in json.loads(path.read_text())["traceEvents"])
    assert capfd.readouterr() == ("", "")


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs CUDA")
def test_gpu_times_and_memory() -> None:
    device = torch.device("cuda")
    matrix = torch.ones(4096, 4096, device=device)
    (times,) = time_calls([lambda: matrix @ matrix], device, 3, lambda: None)
    # 137 GFLOP: no GPU does it in 10 microseconds; a clock that does not wait would say so.
    assert min(times) > 0.01
    _, memory = warm_up(lambda: matrix @ matrix, device)
    assert memory is not None and memory >= 4096 * 4096 * 4
