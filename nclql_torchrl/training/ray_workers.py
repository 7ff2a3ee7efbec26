"""Collection by actors of a Ray cluster, on this machine or on others. A worker that dies is replaced.

TorchRL's ``RayCollector`` ends with the first of its actors that dies: its iterator asks Ray for what that actor should
have collected, and passes the error on. So the actors here are our own; each holds one ordinary TorchRL ``Collector``.

Ray passes objects between its processes as pickles: whoever can reach its ports, and has its token, can run code there.
A cluster that is started here listens on loopback only. Of another one, which ``RAY_ADDRESS`` names, whoever started it
decided.
"""

from __future__ import annotations

import logging
import os
import random
import signal
import threading
import warnings
from collections.abc import Iterator, Mapping
from typing import Any

import numpy as np
import ray
import torch
from ray._private import ray_constants
from ray.exceptions import NodeDiedError, ObjectLostError, OutOfMemoryError, RayActorError, RayError
from tensordict import TensorDict, TensorDictBase

from nclql_torchrl.actor import LangevinActor
from nclql_torchrl.training.collection import make_collector, weights_of, worker_config, worker_seed
from nclql_torchrl.training.components import make_actor, make_device, make_train_env
from nclql_torchrl.training.config import ConfigError, TrainConfig

MAX_DEATHS = 3
"""Times in a row that a worker may die before it delivers anything: what always fails is an error."""

LOST = (RayActorError, ObjectLostError, NodeDiedError, OutOfMemoryError)
"""What Ray says of a worker that died, alone or with its machine, before or after it had collected its batch."""


class RayWorker:
    """One worker: environments, a copy of the actor and TorchRL's ``Collector``, in a process of Ray's.

    Args:
        config: the run.
        seed: of the environments and of this process.
    """

    def __init__(self, config: TrainConfig, seed: int) -> None:
        random.seed(seed)
        np.random.seed(seed)
        torch.manual_seed(seed)
        config = worker_config(config, seed)
        device = make_device(config.collector.device, "collector.device")
        env = make_train_env(config, device)
        actor = make_actor(config, env, device)
        self._weights = weights_of(actor)
        self._collector = make_collector(config, env, actor, device)
        self._batches = iter(self._collector)

    def collect(self, weights: TensorDict | None, random: bool) -> TensorDictBase:
        """The next batch [num_envs, time], on the CPU.

        Args:
            weights: to act with from now on; None keeps those of before.
            random: whether actions are uniformly random.
        """
        if weights is not None:
            self._weights.update_(weights)
        # As TorchRL's own workers are told.
        self._collector.init_random_frames = float("inf") if random else -1  # pyright: ignore[reportAttributeAccessIssue]
        return next(self._batches).cpu()


class RayWorkers:
    """Collection by actors of a Ray cluster that simulate while the learner learns.

    The cluster is the one that the environment variable ``RAY_ADDRESS`` names, else one is started on this machine and
    ended with the run. Every worker takes one of its CPUs, and with ``collector.device=cuda`` one of its GPUs.

    Args:
        config: the run.
        actor: the live actor.
    """

    def __init__(self, config: TrainConfig, actor: LangevinActor) -> None:
        self.config = config
        self.frames = 0
        self.lost_frames = 0
        self.frames_per_batch = config.collector.frames_per_batch or config.env.num_envs
        self._live = weights_of(actor)
        self._weights: ray.ObjectRef | None = None
        self._workers: dict[int, Any] = {}
        self._sent: dict[int, ray.ObjectRef | None] = {}
        self._pending: dict[ray.ObjectRef, int] = {}
        self._deaths = dict.fromkeys(range(config.collector.num_workers), 0)
        self._deaths_in_a_row = dict(self._deaths)
        self._connected = False

    def __iter__(self) -> Iterator[TensorDictBase]:
        connect(self.config)
        self._connected = True
        self.update_policy_weights_()
        for index in range(self.config.collector.num_workers):
            self._start(index)
        return self._batches()

    def _batches(self) -> Iterator[TensorDictBase]:
        while True:
            (done, *_), _ = ray.wait(list(self._pending), num_returns=1)
            index = self._pending.pop(done)
            try:
                batch = ray.get(done)
            except LOST as error:
                self._replace(index, error)
                continue
            self._deaths_in_a_row[index] = 0
            self.frames += batch.numel()
            # Before the batch is handed over: the worker goes on while the learner learns from it.
            self._ask(index)
            yield batch

    def _start(self, index: int) -> None:
        seed = worker_seed(self.config, self.frames, index, self._deaths[index])
        num_gpus = 1 if self.config.collector.device.startswith("cuda") else 0
        worker = ray.remote(RayWorker).options(num_cpus=1, num_gpus=num_gpus, scheduling_strategy="SPREAD")
        self._workers[index] = worker.remote(self.config, seed)
        self._sent[index] = None
        self._ask(index)

    def _ask(self, index: int) -> None:
        """Asks a worker for its next batch, with the weights if it does not have these yet."""
        is_random = self.frames < self.config.collector.init_random_frames
        weights = None if self._sent.get(index) is self._weights else self._weights
        self._sent[index] = self._weights
        self._pending[self._workers[index].collect.remote(weights, is_random)] = index

    def _replace(self, index: int, error: RayError) -> None:
        # Only its batch may be lost, or the way to it: it would go on, and keep a CPU.
        ray.kill(self._workers[index])
        self._deaths[index] += 1
        self._deaths_in_a_row[index] += 1
        if self._deaths_in_a_row[index] > MAX_DEATHS:
            raise ChildProcessError(
                f"Collection worker {index} died {self._deaths_in_a_row[index]} times before it delivered anything. "
                f"The last checkpoint is kept. {error}"
            ) from error
        self.lost_frames += self.frames_per_batch
        warnings.warn(
            f"Collection worker {index} died and is replaced; the {self.frames_per_batch} transitions that it was "
            f"collecting are lost ({self.lost_frames} in this run).",
            stacklevel=2,
        )
        self._start(index)

    def update_policy_weights_(self) -> None:
        """Publishes the actor's weights as they are now: each worker gets them with its next batch."""
        self._weights = ray.put(self._live.cpu())

    def shutdown(self) -> None:
        """Ends the workers, and the cluster if it was started here."""
        if not self._connected:
            return
        self._connected = False
        for worker in self._workers.values():
            ray.kill(worker)
        ray.shutdown()

    def state_dict(self) -> dict[str, Any]:
        """Counters only; see :class:`~nclql_torchrl.training.collection.Workers`."""
        return {"frames": self.frames, "lost_frames": self.lost_frames}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Restores :meth:`state_dict`."""
        self.frames, self.lost_frames = state["frames"], state["lost_frames"]


def connect(config: TrainConfig) -> None:
    """Connects to the cluster that ``RAY_ADDRESS`` names, or starts one for this run.

    Raises:
        ConfigError: if that cluster has fewer CPUs than the run has workers.
    """
    address = os.environ.get("RAY_ADDRESS", "local")
    options: dict[str, Any] = {}
    if address == "local":
        # Nothing leaves this machine, not even statistics of its use. Ray listens on loopback only where it takes the
        # machine for one of those, macOS and Windows, that it makes no clusters of.
        os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
        ray_constants.ENABLE_RAY_CLUSTER = False
        options = {"num_cpus": max(os.cpu_count() or 1, config.collector.num_workers), "include_dashboard": False}
    in_main_thread = threading.current_thread() is threading.main_thread()
    handler = signal.getsignal(signal.SIGTERM)
    ray.init(address, log_to_driver=False, logging_level=logging.ERROR, **options)
    if in_main_thread:
        # Ray puts a handler of its own in the place of the run's, which saves a checkpoint.
        signal.signal(signal.SIGTERM, handler)
    num_cpus = int(ray.cluster_resources().get("CPU", 0))
    if num_cpus < config.collector.num_workers:
        ray.shutdown()
        raise ConfigError(
            f"collector.num_workers is {config.collector.num_workers}, but the Ray cluster at {address} has {num_cpus} "
            "CPUs; expected at most one worker per CPU."
        )
