"""Promises of NoiseSchedule."""

from __future__ import annotations

import warnings

import pytest
import torch

from nclql_torchrl import NoiseSchedule


def test_default_numbers_are_the_authors() -> None:
    schedule = NoiseSchedule()
    assert schedule.num_levels == 10
    torch.testing.assert_close(schedule.sigmas[[0, -1]], torch.tensor([0.1, 0.001], dtype=torch.float64))
    torch.testing.assert_close(schedule.step_sizes[[0, -1]], torch.tensor([1.0, 1e-4], dtype=torch.float64))
    ratios = schedule.sigmas[1:] / schedule.sigmas[:-1]
    torch.testing.assert_close(ratios, ratios[:1].expand(9))


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ({"num_levels": 0}, "num_levels is 0"),
        ({"num_levels": 2.5}, "num_levels is 2.5"),
        ({"sigma_min": 0.2}, "sigma_min=0.1, sigma_max=0.2"),
        ({"sigma_min": 0.1}, "both 0.1"),
        ({"sigma_min": 0.0}, "sigma_min is 0.0"),
        ({"sigma_max": float("nan")}, "sigma_max is nan"),
        ({"step_lr": -1.0}, "step_lr is -1.0"),
    ],
)
def test_bad_values_are_named(arguments: dict, words: str) -> None:
    with pytest.raises(ValueError, match=words):
        NoiseSchedule(**arguments)


def test_schedule_that_cannot_mix_warns_with_the_rule() -> None:
    schedule = NoiseSchedule(num_levels=5)
    with pytest.warns(UserWarning, match=r"0\.5 \(sigma_l / sigma_\{l\+1\}\)\^2 asks for 5"):
        schedule.warn_if_not_mixing(2)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        schedule.warn_if_not_mixing(5)
        NoiseSchedule().warn_if_not_mixing(2)
        NoiseSchedule(num_levels=1).warn_if_not_mixing(1)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_keeps_the_schedule_exact(dtype: torch.dtype) -> None:
    schedule, expected = NoiseSchedule(), NoiseSchedule()
    schedule.to(dtype)
    assert schedule.sigmas.dtype.itemsize >= 4
    torch.testing.assert_close(schedule.sigmas, expected.sigmas, rtol=0, atol=0)
    assert schedule.float().step_sizes.dtype == torch.float32


def test_constant_schedule_is_lql() -> None:
    schedule = NoiseSchedule.constant(0.01)
    assert schedule.num_levels == 1
    assert schedule.step_sizes.tolist() == [0.02]


def test_state_dict_round_trip() -> None:
    source, target = NoiseSchedule(sigma_max=0.3), NoiseSchedule()
    target.load_state_dict(source.state_dict())
    torch.testing.assert_close(target.sigmas, source.sigmas)
