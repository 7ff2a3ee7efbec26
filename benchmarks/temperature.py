"""In which range ``sampler.w=auto`` can hold the spread of the actions: quadratic values of known width.

``python -m benchmarks.temperature [directory]`` measures, for Q = -|a - 0.3|^2 / 2 and several action dimensions, with
and without the normalised gradient, the spread that a fixed w gives and the spread that each target ends at. It writes
``temperature.json``.
"""

from __future__ import annotations

import json
import platform
import sys
from pathlib import Path
from typing import Any

import torch
from tensordict import TensorDict
from torch import Tensor, nn
from torchrl.data import Bounded
from torchrl.modules import ValueOperator

from nclql_torchrl import AutomaticTemperature, LangevinActor

RESULTS = Path(__file__).parent / "results" / "temperature"
ACTION_DIMS = (1, 3, 6, 17)
INVERSE_TEMPERATURES = (0.1, 1.0, 3.0, 10.0, 30.0, 100.0, 200.0, 300.0, 500.0, 700.0, 1000.0, 2000.0)
TARGETS = (0.02, 0.05, 0.1, 0.2, 0.4, 0.6, 0.8)
NUM_CORRECTIONS = 60


class Quadratic(nn.Module):
    """Q = -|a - 0.3|^2 / 2, the same at every level."""

    def __init__(self) -> None:
        super().__init__()
        self.center = nn.Parameter(torch.tensor(0.3))

    def forward(self, observation: Tensor, action: Tensor, level: Tensor) -> Tensor:
        """Value, shape [*batch, 1]."""
        return -0.5 * (action - self.center).square().sum(-1, keepdim=True)


def make_actor(action_dim: int, normalize_gradient: bool, w: float = 500.0) -> LangevinActor:
    """An actor on the quadratic."""
    critic = ValueOperator(Quadratic(), in_keys=["observation", "action", "level"])
    spec = Bounded(-1.0, 1.0, torch.Size([action_dim]))
    return LangevinActor([critic], spec=spec, normalize_gradient=normalize_gradient, w=w)


def fixed(action_dim: int, normalize_gradient: bool, w: float) -> float:
    """Spread of 4,000 actions at a fixed w."""
    actor = make_actor(action_dim, normalize_gradient, w)
    action = actor(TensorDict({"observation": torch.zeros(4_000, 1)}, [4_000]))["action"]
    return float(action.var(0).mean().sqrt())


def tuned(action_dim: int, normalize_gradient: bool, target: float) -> tuple[float, float]:
    """Spread and w that a target ends at: means over the second half of the corrections."""
    actor = make_actor(action_dim, normalize_gradient)
    temperature = AutomaticTemperature(actor, target, gain=0.5)
    batch = TensorDict({"observation": torch.zeros(32, 1)}, [32])
    spreads, ws = [], []
    for _ in range(NUM_CORRECTIONS):
        temperature.step(batch)
        spreads.append(float(temperature.spread))
        ws.append(float(actor.sampler.w))
    half = NUM_CORRECTIONS // 2
    return sum(spreads[half:]) / half, sum(ws[half:]) / half


def main() -> None:
    """Entry point of ``python -m benchmarks.temperature``."""
    directory = Path(sys.argv[1]) if len(sys.argv) > 1 else RESULTS
    directory.mkdir(parents=True, exist_ok=True)
    torch.manual_seed(0)
    rows: list[dict[str, Any]] = []
    for normalize in (True, False):
        for action_dim in ACTION_DIMS:
            by_w = {w: round(fixed(action_dim, normalize, w), 4) for w in INVERSE_TEMPERATURES}
            by_target = {target: [round(x, 4) for x in tuned(action_dim, normalize, target)] for target in TARGETS}
            row = {
                "normalize_gradient": normalize,
                "action_dim": action_dim,
                "spread_of_w": by_w,
                "spread_and_w_of_target": by_target,
            }
            print(json.dumps(row), flush=True)
            rows.append(row)
    machine = f"{platform.machine()}, {torch.get_num_threads()} threads, torch {torch.__version__}, float32"
    (directory / "temperature.json").write_text(json.dumps({"machine": machine, "rows": rows}, indent=1) + "\n")


if __name__ == "__main__":
    main()
