"""Where transitions come from: in this process, or from workers in processes of their own.

What ``make_collector`` makes is iterated over for batches [num_envs, time], given new weights with
``update_policy_weights_`` and ended with ``shutdown``. TorchRL's ``Collector`` collects in this process, a batch
whenever the loop asks. Workers go on while the learner learns, each at most one batch ahead of it:

* ``async``: :class:`AsyncWorkers`, processes of this machine, by TorchRL's ``MultiAsyncCollector``.
* ``ray``: :class:`~nclql_torchrl.training.ray_workers.RayWorkers`, processes anywhere in a Ray cluster.
"""

from __future__ import annotations

import random
import signal
from collections.abc import Iterator, Mapping
from contextlib import suppress
from dataclasses import replace
from functools import partial
from typing import Any, Protocol

import numpy as np
import torch
from tensordict import TensorDict, TensorDictBase
from torchrl.collectors import Collector, MultiAsyncCollector
from torchrl.envs import EnvBase, Transform, TransformedEnv

from nclql_torchrl.actor import LangevinActor
from nclql_torchrl.training.components import make_actor, make_device, make_train_env
from nclql_torchrl.training.config import TrainConfig

SHUTDOWN_SECONDS = 2.0
"""How long workers have to end by themselves. They hold nothing that would be lost."""


class Workers(Protocol):
    """Workers as the training loop sees them; a TorchRL collector has the same methods."""

    lost_frames: int
    """Transitions lost with workers that died, over the whole run."""

    def __iter__(self) -> Iterator[TensorDictBase]:
        """Starts the workers; they deliver until ``shutdown``."""
        ...

    def update_policy_weights_(self) -> None:
        """Publishes the actor's weights as they are now."""
        ...

    def shutdown(self) -> None:
        """Ends the workers."""
        ...

    def state_dict(self) -> dict[str, Any]:
        """What a checkpoint keeps: counters. What the workers' environments are doing is not in it."""
        ...

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Restores :meth:`state_dict`, before the workers are started."""
        ...


def make_collector(
    config: TrainConfig, env: EnvBase, actor: LangevinActor, device: torch.device
) -> Collector | Workers:
    """Endless collection, [num_envs, time] transitions at a time; the training loop decides when to stop.

    Args:
        config: the run; ``collector.backend`` chooses.
        env: the environments of "direct"; for workers, who make their own, an example.
        actor: the policy. "direct" uses it as it is, workers have copies.
        device: of the environments and the actor.
    """
    if config.collector.backend == "async":
        return AsyncWorkers(config, env, actor)
    if config.collector.backend == "ray":
        # Imported on use: Ray is an extra.
        from nclql_torchrl.training.ray_workers import RayWorkers

        return RayWorkers(config, actor)
    return Collector(
        env,
        actor,
        frames_per_batch=config.collector.frames_per_batch or config.env.num_envs,
        total_frames=-1,
        init_random_frames=config.collector.init_random_frames,
        device=device,
        # Trajectory numbers cost a host synchronisation per step on a GPU, and nothing here reads them.
        track_traj_ids=False,
        # A warm-started actor carries its previous action, as a recurrent policy does its hidden state.
        auto_register_policy_transforms=actor.warm_start,
    )


class CollectorState:
    """State of a collector in this process: its environments, the observation they are at, and its counters.

    TorchRL's own ``Collector.state_dict`` leaves out the environments' state and the step that comes next, so a
    restored collector would begin new episodes; here it goes on in the middle of the old ones.
    """

    def __init__(self, collector: Collector) -> None:
        self.collector = collector

    def state_dict(self) -> dict[str, Any]:
        """Nested mapping of tensors and numbers."""
        collector: Any = self.collector
        return {
            "environment": collector.env.base_env.state_dict(),
            "carrier": collector._carrier.to_dict(),
            "frames": collector._frames,
            "iter": collector._iter,
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Restores :meth:`state_dict` into a collector of the same environments."""
        collector: Any = self.collector
        collector.env.base_env.load_state_dict(state["environment"])
        collector._carrier.update(TensorDict(state["carrier"], collector.env.batch_size))
        collector.load_state_dict({"frames": state["frames"], "iter": state["iter"]}, strict=False)


def collector_state(collector: Collector | Workers) -> CollectorState | Workers:
    """A collector's part of a checkpoint."""
    return CollectorState(collector) if isinstance(collector, Collector) else collector


def collection_metrics(collector: Collector | Workers) -> dict[str, float]:
    """A collector's columns in metrics.csv."""
    return {} if isinstance(collector, Collector) else {"lost_frames": collector.lost_frames}


class AsyncWorkers:
    """Collection in processes of this machine that simulate while the learner learns.

    TorchRL's ``MultiAsyncCollector`` runs the processes. They start when iteration does, not before, so that a run
    which is refused, or restored first, has not started any.

    The workers act with a copy of the actor in shared memory, and writing into that copy publishes weights; a worker in
    the middle of a chain may then act once on weights that are half new.

    Args:
        config: the run.
        env: tells the sizes of observations and actions.
        actor: the live actor.
    """

    def __init__(self, config: TrainConfig, env: EnvBase, actor: LangevinActor) -> None:
        self.config = config
        self.frames = 0
        self.lost_frames = 0
        self._device = make_device(config.collector.device, "collector.device")
        self._policy = _SharedPolicy(make_actor(config, env, self._device))
        self._published = weights_of(self._policy.actor)
        self._live = weights_of(actor)
        self._collector: MultiAsyncCollector | None = None

    def __iter__(self) -> Iterator[TensorDictBase]:
        config = self.config
        self.update_policy_weights_()
        seeds = [worker_seed(config, self.frames, index) for index in range(config.collector.num_workers)]
        self._collector = _UnhurriedAsyncCollector(
            [partial(make_worker_env, config, self._device, seed) for seed in seeds],
            self._policy,
            frames_per_batch=config.collector.frames_per_batch or config.env.num_envs,
            total_frames=-1,
            # None would be random ones again: the count begins with this process.
            init_random_frames=max(0, config.collector.init_random_frames - self.frames),
            device=self._device,
            trust_policy=True,
            init_fn=ignore_signals,
            auto_register_policy_transforms=config.sampler.warm_start,
        )
        return self._batches(self._collector)

    def _batches(self, collector: MultiAsyncCollector) -> Iterator[TensorDictBase]:
        batches = iter(collector)
        while True:
            try:
                batch = next(batches)
            # ValueError: TorchRL, on finding one dead, trips over the others, which take their time to end.
            except (RuntimeError, ValueError, OSError, EOFError) as error:
                raise ChildProcessError(
                    f"A collection worker died (exit codes: {_exit_codes(collector)}); what it had to say is above. "
                    "The last checkpoint is kept."
                ) from error
            self.frames += batch.numel()
            yield batch

    def update_policy_weights_(self) -> None:
        """Publishes the actor's weights as they are now."""
        self._published.update_(self._live)

    def shutdown(self) -> None:
        """Ends the workers."""
        if self._collector is not None:
            self._collector.shutdown(timeout=SHUTDOWN_SECONDS)

    def state_dict(self) -> dict[str, Any]:
        """Counters only; see :class:`Workers`."""
        return {"frames": self.frames, "lost_frames": self.lost_frames}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Restores :meth:`state_dict`."""
        self.frames, self.lost_frames = state["frames"], state["lost_frames"]


def _exit_codes(collector: MultiAsyncCollector) -> list[int | None]:
    """Of the workers; None for those that run."""
    codes = []
    for process in collector.procs:
        # TorchRL closes processes that it ended.
        with suppress(ValueError):
            codes.append(process.exitcode)
    return codes


class _SharedPolicy:
    """An actor in shared memory, for workers to act with.

    It is no module, because TorchRL gives every module a ``SharedMemWeightSyncScheme``. That waits without limit for
    workers to acknowledge weights, also for one that died, and while Python shuts down it starts a thread, which hangs:
    workers would outlive a learner that was killed.
    """

    def __init__(self, actor: LangevinActor) -> None:
        self.actor = actor.share_memory()

    def __call__(self, tensordict: TensorDictBase) -> TensorDictBase:
        return self.actor(tensordict)

    def make_tensordict_primer(self) -> Transform:
        """What a warm-started actor needs of the environment."""
        return self.actor.make_tensordict_primer()


class _UnhurriedAsyncCollector(MultiAsyncCollector):
    """With room for a batch of every worker.

    In TorchRL's own there is room for one, and a worker that waits for it longer than a second, while the learner
    evaluates, say, throws its batch away and collects another.
    """

    @property
    def _queue_len(self) -> int:
        return len(self.create_env_fn)


def weights_of(actor: LangevinActor) -> TensorDict:
    """What an actor acts by, parameters and the temperature alike; the tensors themselves, without gradients."""
    weights = TensorDict.from_module(actor)
    assert isinstance(weights, TensorDict)
    return weights.data


def make_worker_env(config: TrainConfig, device: torch.device, seed: int) -> TransformedEnv:
    """The environments of one worker. Seeds this process too, whose random numbers are otherwise those of any other."""
    random.seed(seed)
    np.random.seed(seed)
    torch.manual_seed(seed)
    return make_train_env(worker_config(config, seed), device)


def worker_config(config: TrainConfig, seed: int) -> TrainConfig:
    """The run as it is for one worker: collected in its own process, from environments of their own seed."""
    return replace(config, seed=seed, collector=replace(config.collector, backend="direct", num_workers=1))


def worker_seed(config: TrainConfig, frames: int, worker: int, deaths: int = 0) -> int:
    """Seed of a worker's environments and actions, in [0, 2**31).

    Args:
        config: gives the run's seed.
        frames: transitions collected before the worker starts: a resumed run must not repeat itself.
        worker: its number.
        deaths: how many workers of this number died before.

    Examples:
        >>> len({worker_seed(TrainConfig(), frames, worker) for frames in (0, 1000) for worker in range(4)})
        8
    """
    return int(np.random.SeedSequence([config.seed, frames, worker, deaths]).generate_state(1)[0]) >> 1


def ignore_signals() -> None:
    """For workers: Ctrl-C, and SIGTERM of a batch system, reach all processes; when to end is up to the learner."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
