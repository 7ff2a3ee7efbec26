"""``profile=true`` accounts for the time of a run, and leaves no trace in others."""

from __future__ import annotations

import json
import time
import types
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch._C._autograd import DeviceType
from torch.autograd.profiler_util import FunctionEvent

from nclql_torchrl.training import TrainConfig, train, training
from nclql_torchrl.training.time_profile import FIRST_UPDATE, WORK, TimeProfile, gpu_busy


def test_the_shares_of_a_run_add_up(
    tiny_config: Callable[..., TrainConfig], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    evaluate = training.run_evaluation
    train(tiny_config("profile=true", "sampler.w=auto"))
    profile = json.loads((tmp_path / "run" / "profile.json").read_text())
    # 60 updates, of which the first 20 are not measured; those of a vector step belong together.
    assert 38 <= profile["updates"] <= 40
    assert sum(profile["shares"].values()) == pytest.approx(1.0)
    assert sum(profile["parts"].values()) == pytest.approx(profile["seconds"])
    work = [share for part, share in profile["shares"].items() if part in WORK]
    assert len(work) == len(WORK) and sum(work) + profile["overhead"] == pytest.approx(1.0)
    assert all(0.0 < share < 1.0 for share in profile["shares"].values()), profile["shares"]
    # A dozen operations against chains of six steps; "other" is the collector's and the loop's own work.
    assert profile["shares"]["other"] < 0.5
    assert 0.0 <= profile["idle"] < 1.0
    table = capsys.readouterr().err
    assert "target sampling" in table and "of it idle: this process did not run" in table
    events = json.loads((tmp_path / "run" / "trace.json").read_text())["traceEvents"]
    assert {"simulation", "acting", "critic update"} <= {event.get("name") for event in events}
    assert training.run_evaluation is evaluate


def test_the_same_run_with_and_without(tiny_config: Callable[..., TrainConfig], tmp_path: Path) -> None:
    returns = [
        train(tiny_config(f"run_dir={tmp_path / str(profile)}", f"profile={profile}"))["return_mean"]
        for profile in (True, False)
    ]
    assert returns[0] == returns[1]
    assert not (tmp_path / "False" / "profile.json").exists()


def test_a_part_of_a_part_is_told_apart_only_there(tmp_path: Path) -> None:
    class Chain:
        def step(self) -> None:
            time.sleep(0.02)

    def evaluate() -> None:
        Chain().step()

    here = types.SimpleNamespace(evaluate=evaluate, log=evaluate)
    with TimeProfile(tmp_path) as profile:
        profile.watch(here, "evaluate", "evaluation")
        profile.watch(here, "log", "logging")
        profile.watch(Chain, "step", "evaluation: acting", within="evaluation")
        for updates in (0, 20):
            profile.advance(updates)
        here.evaluate()
        here.log()
        Chain().step()
        parts = profile.summary()["parts"]
    assert min(parts[part] for part in ("evaluation: acting", "logging", "other")) >= 0.02 > parts["evaluation"]


def test_a_run_that_is_too_short_says_so(
    tiny_config: Callable[..., TrainConfig], capsys: pytest.CaptureFixture[str]
) -> None:
    train(tiny_config("profile=true", "collector.total_frames=60"))
    assert "ended before update 20" in capsys.readouterr().err


def test_a_process_that_waits_is_idle(tmp_path: Path) -> None:
    with TimeProfile(tmp_path) as profile:
        for updates in (0, FIRST_UPDATE):
            profile.advance(updates)
        profile._end_trace()  # which takes the processor a while
        while time.process_time() - profile._processor_started < 0.05:
            pass
        waited = 9 * (time.time() - (profile._started or 0.0))
        time.sleep(waited)
        idle = profile.summary()["idle"]
    # It slept for nine tenths of the time; in the rest two threads may have worked.
    assert 0.8 <= idle < 1.0


def test_a_gpu_is_busy_while_anything_runs_on_it() -> None:
    def event(device: DeviceType, start: int, end: int, **options: Any) -> FunctionEvent:
        return FunctionEvent(0, "event", 0, start, end, device_type=device, **options)

    events = [
        event(DeviceType.CUDA, 0, 10),
        event(DeviceType.CUDA, 5, 8),  # on another stream, within the first
        event(DeviceType.CUDA, 30, 50),
        event(DeviceType.CUDA, 40, 60),
        event(DeviceType.CUDA, 0, 100, is_user_annotation=True),  # a part of the profile, not work
        event(DeviceType.CPU, 0, 100),
    ]
    trace: Any = types.SimpleNamespace(events=lambda: events)
    assert gpu_busy(trace, seconds=100e-6) == pytest.approx(0.4)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_a_gpu_that_multiplies_is_busy_and_one_that_waits_is_not(tmp_path: Path) -> None:
    matrix = torch.rand(4096, 4096, device="cuda")
    torch.mm(matrix, matrix)  # The first one loads cuBLAS, for longer than the others take.
    torch.cuda.synchronize()
    idle = []
    for pause in (0.0, 2.0):
        with TimeProfile(tmp_path) as profile:
            for updates in (0, FIRST_UPDATE):
                profile.advance(updates)
            for _ in range(50):
                torch.mm(matrix, matrix)
            torch.cuda.synchronize()
            time.sleep(pause)
            assert "of it idle: the GPU ran nothing" in profile.report()
            idle.append(profile.summary()["idle"])
    assert 0.0 <= idle[0] < 0.5 < idle[1] < 1.0
