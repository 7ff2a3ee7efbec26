"""A program for torchrun with two processes; it fails unless data-parallel learning keeps its promises.

``torchrun --nproc-per-node=2 data_parallel.py DIRECTORY [EXECUTION]`` writes runs into the directory.
"""

from __future__ import annotations

import os
import signal
import sys
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from tensordict import TensorDict
from torch import Tensor
from torchrl.data import Bounded
from torchrl.modules import ValueOperator
from torchrl.objectives import SoftUpdate

from nclql_torchrl import LangevinActor, NCLQLLoss, NCLQLUpdate, NoiseConditionedQNetwork, NoiseSchedule
from nclql_torchrl.training import Interrupted, RunDirectory, TrainConfig, train
from nclql_torchrl.training.config import load_config
from nclql_torchrl.training.distributed import Learners
from tests.conftest import TINY

BATCH = 8
SCHEDULE = NoiseSchedule(3, 0.2, 0.05)


def make_loss() -> NCLQLLoss:
    critics = [
        ValueOperator(NoiseConditionedQNetwork(3, 2, (16,)), in_keys=["observation", "action", "level"])
        for _ in range(2)
    ]
    actor = LangevinActor(critics, spec=Bounded(-1.0, 1.0, torch.Size([2])), schedule=SCHEDULE, w=5.0)
    return NCLQLLoss(actor)


def make_update(loss: NCLQLLoss, **options: Any) -> NCLQLUpdate:
    optimizer = torch.optim.Adam(loss.parameters(), lr=1e-2)
    return NCLQLUpdate(loss, optimizer, SoftUpdate(loss, tau=0.1), **options)


def make_batch(size: int, generator: torch.Generator) -> TensorDict:
    """Transitions with all the noise that an update draws."""

    def normal(*shape: int) -> Tensor:
        return torch.randn(size, *shape, generator=generator)

    done = torch.arange(size).remainder(4).eq(0).unsqueeze(-1)
    following = {
        "observation": normal(3),
        "reward": normal(1),
        "done": done,
        "terminated": done,
        "initial_action": normal(1, 2).clamp(-1, 1),
        "langevin_noise": normal(1, 3, 2, 2),
    }
    return TensorDict(
        {
            "observation": normal(3),
            "action": normal(2).clamp(-1, 1),
            "noise_level": torch.randint(2, (size,), generator=generator),
            "action_noise": normal(2),
            "next": following,
        },
        [size],
    )


def flat(loss: NCLQLLoss) -> Tensor:
    """All parameters and targets in one vector."""
    networks = (loss.qvalue_network_params, loss.target_qvalue_network_params)
    return torch.cat([tensor.detach().reshape(-1) for network in networks for tensor in network.values(True, True)])


def check_updates(mode: Any, execution: Any) -> None:
    """After every update all ranks have the same parameters to the last bit, which are those of one process with the
    combined batch up to rounding."""
    options = {"mode": mode, "execution": execution}
    with Learners() as learners:
        assert learners.world_size == 2
        torch.manual_seed(learners.rank)
        loss, reference = make_loss(), make_loss()
        learners.broadcast(loss)
        reference.load_state_dict(loss.state_dict())
        update = make_update(loss, average=learners.average, **options)
        reference_update = make_update(reference, **options)
        generator = torch.Generator().manual_seed(0)
        for number in range(5):
            combined, before = make_batch(2 * BATCH, generator), flat(loss)
            metrics = update(combined[learners.rank * BATCH :][:BATCH].clone())
            reference_metrics = reference_update(combined.clone())
            ranks = [torch.empty_like(before) for _ in range(2)]
            dist.all_gather(ranks, flat(loss))
            assert torch.equal(ranks[0], ranks[1]), f"the ranks differ after update {number}"
            assert not torch.equal(before, ranks[0])
            torch.testing.assert_close(flat(loss), flat(reference), rtol=0.0, atol=1e-9)
            row = learners.average_row({"frames": 1, "updates": 1, "loss_qvalue": float(metrics["loss_qvalue"])})
            torch.testing.assert_close(row["loss_qvalue"], float(reference_metrics["loss_qvalue"]), rtol=1e-9, atol=0.0)


def check_runs(directory: Path) -> None:
    """A run that one rank's SIGTERM stopped, resumed, is the run that was never stopped."""

    def config(name: str, *options: str) -> TrainConfig:
        tuned = ("sampler.w=auto", "sampler.target_spread=0.9")
        stateful = ("network.normalize_observation=true", "optim.n_steps=3")
        return load_config({}, [*TINY, f"run_dir={directory / name}", *tuned, *stateful, *options])

    rank = os.environ["RANK"]
    whole = train(config("whole", "profile=true"))
    assert (whole["frames"], whole["updates"]) == (240, 60)

    append = RunDirectory.append_metrics

    def stop_rank_one(run: RunDirectory, row: dict[str, float]) -> None:
        append(run, row)
        if rank == "1" and row["frames"] == 100:
            os.kill(os.getpid(), signal.SIGTERM)

    RunDirectory.append_metrics = stop_rank_one  # pyright: ignore[reportAttributeAccessIssue]
    stopped = config("stopped")
    try:
        train(stopped)
    except Interrupted as interruption:
        assert interruption.signal_number == signal.SIGTERM
    else:
        raise AssertionError("one rank's SIGTERM did not stop this one")
    RunDirectory.append_metrics = append
    stopped.resume = stopped.run_dir
    resumed = train(stopped)
    assert {**resumed, "seconds": 0, "run_dir": ""} == {**whole, "seconds": 0, "run_dir": ""}


if __name__ == "__main__":
    execution = sys.argv[2] if len(sys.argv) > 2 else "eager"
    # Tolerances for rounding are of this precision.
    torch.set_default_dtype(torch.float64)
    check_updates("sequential", execution)
    check_updates("summed", execution)
    torch.set_default_dtype(torch.float32)
    check_runs(Path(sys.argv[1]))
