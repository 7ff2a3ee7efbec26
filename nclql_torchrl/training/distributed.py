"""Data-parallel learning: ``torchrun --nproc-per-node=N -m nclql_torchrl.commands.train ...``. What listens where, and
the options with which torchrun itself does not, are in docs/distributed.md.

Every process (rank) is a learner with environments, replay, random numbers and a run directory of its own, and all go
through the training loop in step: they average their gradients before each step of the optimizer, so that their
parameters, which begin as those of rank 0, stay the same. Transitions are counted over all ranks. Rank 0 has the run
directory, the others one inside of it, ``rank-1`` and so on, with their parts of the checkpoints.

The loss calls its critics functionally, which torch's ``DistributedDataParallel`` cannot wrap; it does this averaging.
"""

from __future__ import annotations

import atexit
import math
import os
import shutil
import socket
import warnings
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from datetime import timedelta
from pathlib import Path
from types import TracebackType

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch._C._distributed_c10d import Store, TCPStore
from torchrl.checkpoint import CheckpointError

from nclql_torchrl.training.checkpoint import latest_checkpoint, read_metadata
from nclql_torchrl.training.components import make_device
from nclql_torchrl.training.config import ConfigError, TrainConfig
from nclql_torchrl.training.interruption import StopRequest
from nclql_torchrl.training.run_directory import METRICS, RunDirectory, automatic_path

TIMEOUT = timedelta(hours=2)
"""How long ranks wait for one another: for one that compiles, say, or evaluates."""

SUMMED = ("diverged", "lost_frames")
"""Columns of metrics.csv that are counts of each rank; the others are averaged."""


class Learners:
    """The ranks of a run, seen from one of them. Without torchrun there is one, and nothing is exchanged.

    A context manager, for one run: at its end the ranks wait for each other.

    Attributes:
        rank: number of this process.
        world_size: how many there are.
        stop_signal: the signal that all agreed to stop for.
    """

    def __init__(self) -> None:
        self.rank = self.local_rank = 0
        self.world_size = 1
        self.stop_signal: int | None = None

    def __enter__(self) -> Learners:
        if dist.is_torchelastic_launched():
            if not dist.is_initialized():
                _init_process_group()
            self.rank, self.world_size = dist.get_rank(), dist.get_world_size()
            self.local_rank = int(os.environ["LOCAL_RANK"])
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self.world_size > 1 and (error is None or self.stop_signal is not None):
            # torchrun ends all as soon as one has ended, and rank 0 has more to write.
            self._all_reduce(torch.zeros(1), dist.ReduceOp.SUM)

    def localize(self, config: TrainConfig) -> TrainConfig:
        """The run as it is for this rank: with its own directory. Loggers are rank 0's.

        Raises:
            CheckpointError: if the run to resume was one of another number of learners.
        """
        if config.resume is not None and self.rank == 0:
            run = RunDirectory.open(config.resume)
            if run.has_checkpoint():
                check_world_size(latest_checkpoint(run.checkpoints), self.world_size)
        if self.world_size == 1:
            return config
        path = Path(config.resume or config.run_dir or automatic_path(config)).resolve()
        path = Path(self._from_rank_zero(str(path)))
        if self.rank == 0:
            return replace(config, run_dir=str(path))
        path = path / f"rank-{self.rank}"
        resume = str(path) if config.resume is not None and (path / "config.yaml").exists() else None
        return replace(config, run_dir=str(path), resume=resume, logger=replace(config.logger, backend="none"))

    def device(self, name: str) -> torch.device:
        """The device of this rank, which becomes the current one: of several GPUs that of its number on its machine.

        Raises:
            ConfigError: for a device that this machine does not have, or one GPU for several ranks.
        """
        device = make_device(name)
        if device.type != "cuda":
            return device
        if self.world_size > 1:
            if device.index is not None:
                raise ConfigError(f"device is {name!r} with {self.world_size} learners; expected auto or cuda.")
            device = make_device(f"cuda:{self.local_rank}")
        if device.index is not None:
            torch.cuda.set_device(device)
        return device

    def latest_checkpoint(self, run: RunDirectory) -> Path | None:
        """This rank's part of the newest checkpoint that is complete, None if there is none: rank 0 writes last."""
        newest = latest_checkpoint(run.checkpoints) if run.has_checkpoint() else None
        if self.world_size == 1:
            return newest
        name = self._from_rank_zero("" if newest is None else newest.name)
        for part in run.checkpoints.glob("checkpoint-*"):
            if self.rank > 0 and part.name != name and _frames(part.name) >= _frames(name):
                # Of one that was not completed. What comes now may not be what came then.
                shutil.rmtree(part)
        return run.checkpoints / name if name else None

    def share(self, config: TrainConfig) -> TrainConfig:
        """What this rank collects of the run: its part of the random transitions, with a seed of its own."""
        if self.world_size == 1:
            return config
        init_random_frames = math.ceil(config.collector.init_random_frames / self.world_size)
        return replace(
            config,
            seed=config.seed if self.rank == 0 else rank_seed(config.seed, self.rank),
            collector=replace(config.collector, init_random_frames=init_random_frames),
        )

    def broadcast(self, module: nn.Module) -> None:
        """Gives a module's parameters and buffers the values of rank 0."""
        if self.world_size > 1:
            with _lost_learner():
                for tensor in module.state_dict(keep_vars=True).values():
                    dist.broadcast(tensor.data, src=0)

    def average(self, tensors: Sequence[Tensor | None]) -> Sequence[Tensor | None]:
        """Means over the ranks, in one exchange; None, the same on all ranks, stays None."""
        if self.world_size == 1:
            return tensors
        present = [tensor for tensor in tensors if tensor is not None]
        bucket = torch.cat([tensor.reshape(-1) for tensor in present])
        self.average_(bucket)
        means = iter(bucket.split([tensor.numel() for tensor in present]))
        return [None if tensor is None else next(means).view_as(tensor) for tensor in tensors]

    def average_(self, tensor: Tensor) -> None:
        """Replaces a tensor by its mean over the ranks."""
        if self.world_size > 1:
            self._all_reduce(tensor, dist.ReduceOp.SUM)
            tensor.div_(self.world_size)

    def average_row(self, row: Mapping[str, float]) -> dict[str, float]:
        """A row of metrics over all ranks; what only some have measured is averaged over these."""
        if self.world_size == 1:
            return dict(row)
        values = torch.tensor([row.get(name, math.nan) for name in METRICS], dtype=torch.float64)
        measured = (~values.isnan()).double()
        reduced = torch.stack([values.nan_to_num(), measured])
        self._all_reduce(reduced, dist.ReduceOp.SUM)
        means = {
            name: float(total if name in SUMMED else total / count)
            for name, total, count in zip(METRICS, *reduced, strict=True)
            if count > 0
        }
        return {**means, "frames": row["frames"], "updates": row["updates"]}

    def should_stop(self, stop: StopRequest) -> bool:
        """Whether any rank was asked to stop: the same answer for all, who have to ask equally often."""
        signal_number = stop.signal_number or 0
        if self.world_size > 1:
            agreed = torch.tensor(signal_number)
            self._all_reduce(agreed, dist.ReduceOp.MAX)
            signal_number = int(agreed)
        self.stop_signal = signal_number or None
        return self.stop_signal is not None

    @contextmanager
    def rank_zero_first(self) -> Iterator[None]:
        """The block is run by rank 0, and then by the others."""
        if self.rank > 0:
            self._all_reduce(torch.zeros(1), dist.ReduceOp.SUM)
        yield
        if self.rank == 0 and self.world_size > 1:
            self._all_reduce(torch.zeros(1), dist.ReduceOp.SUM)

    @contextmanager
    def rank_zero_last(self) -> Iterator[None]:
        """The block is run by the other ranks, by rank 0 if none of them failed, and left by all together.

        Raises:
            OSError: on rank 0, if a block failed with one on another rank.
        """
        if self.world_size == 1:
            yield
            return
        failed = torch.zeros(1)
        if self.rank == 0:
            self._all_reduce(failed, dist.ReduceOp.SUM)
        try:
            if failed > 0:
                raise OSError(f"{int(failed)} other ranks could not write their parts")
            yield
        except OSError:
            failed.fill_(1)
            raise
        finally:
            if self.rank > 0:
                self._all_reduce(failed, dist.ReduceOp.SUM)
            self._all_reduce(torch.zeros(1), dist.ReduceOp.SUM)

    def _all_reduce(self, tensor: Tensor, operation: dist.ReduceOp.RedOpType) -> None:
        with _lost_learner():
            dist.all_reduce(tensor, operation)

    def _from_rank_zero(self, text: str) -> str:
        """A short text of rank 0's, as numbers: torch's own exchange of objects would unpickle them."""
        encoded = torch.zeros(4096, dtype=torch.uint8)
        content = torch.tensor(list(text.encode()), dtype=torch.uint8)
        encoded[: len(content)] = content
        with _lost_learner():
            dist.broadcast(encoded, src=0)
        return bytes(encoded.tolist()).rstrip(b"\0").decode()


def _init_process_group() -> None:
    """Connects this process to the others of torchrun. Once: its store takes no second group, of a sweep's next run."""
    rank, world_size = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
    store = None
    if os.environ["LOCAL_WORLD_SIZE"] == os.environ["WORLD_SIZE"]:
        # All on this machine: nothing needs to be reached from outside.
        os.environ.setdefault("GLOO_SOCKET_IFNAME", "lo")
        os.environ.setdefault("NCCL_SOCKET_IFNAME", "lo")
        store = _loopback_store(rank, world_size)
    # Gradients travel on their own device; what the loop agrees on, on the CPU, where no GPU is waited for.
    backend = "cpu:gloo,cuda:nccl" if torch.cuda.is_available() else "gloo"
    dist.init_process_group(backend, timeout=TIMEOUT, store=store, rank=rank, world_size=world_size)
    atexit.register(dist.destroy_process_group)


def _loopback_store(rank: int, world_size: int) -> Store | None:
    """What the ranks of one machine find each other by, on loopback; None if torchrun has opened one to everybody."""
    port = int(os.environ["MASTER_PORT"])
    if os.environ["TORCHELASTIC_USE_AGENT_STORE"] == "True":
        if rank == 0:
            warnings.warn(
                f"torchrun listens on all interfaces, without authentication (port {port} is one of two), though all "
                "learners are on this machine. docs/distributed.md has the options with which it opens no port.",
                stacklevel=2,
            )
        return None
    # torch would listen on all interfaces here too, unless it is given a socket.
    listener = socket.create_server(("127.0.0.1", port)).detach() if rank == 0 else None
    return TCPStore("127.0.0.1", port, world_size, rank == 0, TIMEOUT, master_listen_fd=listener)


def is_rank_zero() -> bool:
    """Whether this process is the one that speaks to the user."""
    return not dist.is_torchelastic_launched() or os.environ["RANK"] == "0"


def rank_seed(seed: int, rank: int) -> int:
    """Seed of what a rank draws, in [0, 2**31)."""
    return int(np.random.SeedSequence([seed, rank]).generate_state(1)[0]) >> 1


def check_world_size(checkpoint: Path, world_size: int) -> None:
    """Raises CheckpointError if a checkpoint is that of another number of learners."""
    saved = read_metadata(checkpoint).get("world_size", 1)
    if saved != world_size:
        raise CheckpointError(
            f"Checkpoint {checkpoint} has the environments, replay and random states of {saved} learners; there are "
            f"{world_size} now. Expected the same number, torchrun --nproc-per-node={saved}."
        )


def _frames(name: str) -> int:
    """After how many transitions a checkpoint of this name was saved; "" is before all."""
    return int(name.split("-")[1]) if name else -1


@contextmanager
def _lost_learner() -> Iterator[None]:
    try:
        yield
    except RuntimeError as error:
        raise ConnectionError(
            "Another learner ended or cannot be reached; its own message says why. The last checkpoint is kept."
        ) from error
