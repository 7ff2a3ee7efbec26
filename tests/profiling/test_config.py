"""A grid that cannot be measured is refused in one sentence; what this machine lacks is named."""

from __future__ import annotations

import re
from typing import Any

import pytest
import torch
from torch._inductor import config as inductor

from nclql_torchrl.profiling import ProfileConfig, availability, profile
from nclql_torchrl.profiling.availability import split, unavailable
from nclql_torchrl.profiling.config import settings
from nclql_torchrl.training import ConfigError


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"levels": [0]}, "levels is 0; expected at least 1."),
        ({"levels": []}, "levels is empty; expected at least one value."),
        ({"hidden_sizes": []}, "hidden_sizes is empty"),
        ({"states": [4, -1]}, "states is -1; expected at least 1."),
        ({"start_level": [None, -1]}, "start_level is -1; expected at least 0."),
        ({"quality_states": 1}, "quality_states is 1; expected at least 2."),
        ({"execution": ["compiled"]}, "execution is 'compiled'; expected one of eager, compile, "),
        ({"precision": ["float16"]}, "did you mean 'bfloat16'?"),
        ({"device": ["gpu"]}, "device is 'gpu'; expected auto, cpu, cuda or cuda:<index>."),
        ({"w": -1.0}, "w is -1; expected a positive, finite inverse temperature."),
        ({"seed": -1}, "seed is -1; expected"),
    ],
)
def test_an_impossible_value_is_an_error(values: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=re.escape(message)):
        profile(ProfileConfig(**values))


def test_the_grid_is_every_combination_once() -> None:
    config = ProfileConfig(
        levels=[5, 10, 5], steps_per_level=[1, 2], execution=["eager"], states=[1, 8], device=["cpu"]
    )
    found = list(settings(config))
    assert len(found) == len(set(found)) == 8
    assert [setting.langevin_steps for setting in found[:4]] == [5, 10, 10, 20]


def test_what_cannot_run_is_named_with_the_reason() -> None:
    modes = ["eager", "compile", "cudagraph"]
    config = ProfileConfig(levels=[10], steps_per_level=[2], execution=modes, device=["cpu", "cuda:99"])
    unavailable.cache_clear()
    with inductor.patch({"cpp.cxx": ("no-such-compiler",)}):
        runnable, skipped = split(settings(config))
    unavailable.cache_clear()
    assert [(setting.execution, setting.device) for setting in runnable] == [("eager", "cpu")]
    reasons = {entry["setting"]: entry["reason"] for entry in skipped}
    assert list(reasons) == ["compile on cpu", "cudagraph on cpu", "cuda:99"]
    assert "needs a C++ compiler" in reasons["compile on cpu"]
    assert "need a CUDA device" in reasons["cudagraph on cpu"]
    assert "CUDA devices" in reasons["cuda:99"]


def test_without_triton_a_gpu_has_eager_only(monkeypatch: pytest.MonkeyPatch) -> None:
    unavailable.cache_clear()
    monkeypatch.setattr(availability, "has_triton", lambda: False)
    reasons = {mode: unavailable(mode, torch.device("cuda")) for mode in ("eager", "compile", "cudagraph")}
    unavailable.cache_clear()
    assert reasons.pop("eager") is None
    assert all(reason is not None and reason.startswith(f"{mode} needs Triton") for mode, reason in reasons.items())


def test_a_device_that_goes_by_two_names_is_measured_once() -> None:
    device = "cuda" if torch.cuda.is_available() else "cpu"
    config = ProfileConfig(levels=[10], steps_per_level=[2], execution=["eager"], device=["auto", device])
    assert len(split(settings(config))[0]) == 1
