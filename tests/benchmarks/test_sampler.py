"""The sampler's benchmark counts the arithmetic that a chain really does, on every device."""

from __future__ import annotations

import jax
import pytest
import torch
from tensordict import TensorDict
from torch.utils.flop_counter import FlopCounterMode

from benchmarks.sampler import described, floor_flop, make_actor, matmul_rate, measure


def test_the_floor_is_the_arithmetic_of_the_steps() -> None:
    states, observation_dim, action_dim, width, levels = 64, 3, 2, 256, 10
    actor = make_actor(observation_dim, action_dim)
    batch = TensorDict({"observation": torch.randn(states, observation_dim)}, [states])
    with torch.no_grad(), FlopCounterMode(display=False) as counter:
        actor.sampler(actor.action_value(batch))
    # What is multiplied once per call, or once per level, by each of the two critics.
    level_embedding = levels * (16 * 32 + 32 * 16 + 16 * width)
    once = 2 * 2 * (states * observation_dim * width + level_embedding)
    floor = floor_flop(actor, states)
    assert floor == 4 * 20 * states * 2 * (action_dim * width + 2 * width * width + width)
    # The last layer has one output: its products are written as sums, which the counter does not see.
    last = 4 * 20 * states * 2 * width
    assert counter.get_total_flops() == pytest.approx(floor - last + once, rel=1e-5)


@pytest.mark.parametrize(
    "device",
    [
        "cpu",
        pytest.param(
            "cuda",
            marks=[
                pytest.mark.gpu,
                pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
            ],
        ),
    ],
)
@torch.no_grad()
def test_every_row_is_compared_with_floor_and_eager(device: str) -> None:
    modes = ["eager"] if device == "cpu" else ["eager", "compile", "cudagraph"]
    rates = {precision: matmul_rate(device, precision, 256) for precision in ("float32", "bfloat16")}
    assert all(rate > 1e6 for rate in rates.values())
    figures = measure(4, 3, 2, modes, rates, rounds=2, device=device)["figures"]
    rows = {name: row for name, row in figures.items() if name != "jax"}
    assert list(rows) == [f"{mode} {precision}" for mode in modes for precision in rates]
    for name, row in rows.items():
        flop = row["floor_ms"] * 1e-3 * rates[name.split()[1]]
        assert flop == pytest.approx(floor_flop(make_actor(3, 2), 4))
        assert row["over_floor"] == pytest.approx(row["median_ms"] / row["floor_ms"]) and row["over_floor"] > 0
        assert row["first_call_s"] > 0 and ("peak_memory_mib" in row) == (device == "cuda")
        assert "of the floor" in described(row)
    assert rows["eager float32"]["faster_than_eager"] == 1.0
    assert ("ratio" in rows["eager float32"]) == (jax.default_backend() == {"cpu": "cpu", "cuda": "gpu"}[device])
    if device == "cuda":
        assert rows["cudagraph float32"]["faster_than_eager"] > 1.0
        assert rows["cudagraph float32"]["peak_memory_mib"] > 0
