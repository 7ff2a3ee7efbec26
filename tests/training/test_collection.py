"""Workers deliver what this process would: everything, in order, random at first, with the newest weights."""

from __future__ import annotations

import json
import os
import signal
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from multiprocessing import active_children
from pathlib import Path

import pytest
import torch
from tensordict import TensorDictBase

from nclql_torchrl import LangevinActor
from nclql_torchrl.training import Interrupted, RunDirectory, TrainConfig, train
from nclql_torchrl.training.collection import AsyncWorkers
from nclql_torchrl.training.components import make_actor, make_train_env

CPU = torch.device("cpu")


def make_workers(config: TrainConfig) -> tuple[AsyncWorkers, LangevinActor]:
    env = make_train_env(config, CPU)
    actor = make_actor(config, env, CPU)
    return AsyncWorkers(config, env, actor), actor


def prefer(actor: LangevinActor, sign: float) -> None:
    """Makes critics of which every chain ends at an action's upper (1) or lower bound (-1)."""
    for parameter in actor.parameters():
        parameter.data.fill_(0.1)
    actor.qvalue_network_params["module", "trunk", "2", "weight"].data.mul_(sign)


def acts(batch: TensorDictBase, sign: float) -> bool:
    return bool((batch["action"] * sign > 1.8).all())


def take_until(batches: Iterator[TensorDictBase], condition: Callable[[TensorDictBase], bool]) -> TensorDictBase:
    for _ in range(20):
        batch = next(batches)
        if condition(batch):
            return batch
    raise AssertionError("20 batches, and none as awaited")


def assert_workers_end() -> None:
    """Those that were killed, in a moment."""
    for worker in active_children():
        worker.join(timeout=30)
    assert not active_children()


@pytest.mark.slow
def test_async_workers_deliver_everything_and_act_with_what_was_published(
    tiny_config: Callable[..., TrainConfig],
) -> None:
    # At this temperature a chain crosses the whole range of actions.
    config = tiny_config("collector.backend=async", "collector.num_workers=2", "sampler.w=5000")
    workers, actor = make_workers(config)
    prefer(actor, 1.0)
    with ExitStack() as stack:
        stack.callback(workers.shutdown)
        batches = iter(workers)
        assert len(active_children()) == 2
        random_frames, streams = 0, []
        for number in range(40):
            if number == 30:
                # A slow learner, beyond the second that TorchRL's queue waits.
                time.sleep(1.5)
            batch = next(batches)
            assert batch.batch_size == (2, 1)
            # What episodes are logged from.
            assert {("next", "episode_reward"), ("next", "step_count")} <= set(batch.keys(True))
            if not acts(batch, 1.0):
                random_frames += batch.numel()
            begins, ends = batch["observation"][:, 0], batch["next", "observation"][:, -1]
            before = [index for index, stream in enumerate(streams) if torch.equal(stream, begins)]
            assert len(before) == 1 or len(streams) < 2, "a batch that continues none was not the first of its worker"
            if before:
                streams[before[0]] = ends
            else:
                streams.append(ends)
        # The first 40 frames, and what the two workers had begun then.
        assert 40 <= random_frames <= 40 + 2 * 2
        assert workers.frames == 80

        prefer(actor, -1.0)
        assert acts([next(batches) for _ in range(4)][-1], 1.0), "weights that were not published yet"
        workers.update_policy_weights_()
        take_until(batches, lambda batch: acts(batch, -1.0))
        actor.sampler.w.neg_()
        workers.update_policy_weights_()
        take_until(batches, lambda batch: acts(batch, 1.0))

        killed = active_children()[0]
        killed.kill()
        killed.join(timeout=60)
        assert killed.exitcode == -signal.SIGKILL
        with pytest.raises(ChildProcessError, match=r"A collection worker died \(exit codes: .*-9"):
            for _ in range(20):
                next(batches)
    assert_workers_end()


@pytest.mark.slow
def test_an_async_run_counts_updates_exactly_stops_on_a_signal_and_goes_on(
    tiny_config: Callable[..., TrainConfig], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = tiny_config("collector.backend=async", "sampler.w=auto", "sampler.step_lr=1e-6", "profile=true")
    append = RunDirectory.append_metrics

    def interrupt(run: RunDirectory, row: dict[str, float]) -> None:
        append(run, row)
        if row["frames"] == 100:
            os.kill(os.getpid(), signal.SIGTERM)

    monkeypatch.setattr(RunDirectory, "append_metrics", interrupt)
    with pytest.raises(Interrupted, match=r"Stopped after 102 frames and 18 updates"):
        train(config)
    assert_workers_end()
    config.resume, config.run_dir = config.run_dir, None
    summary = train(config)
    assert_workers_end()
    assert (summary["frames"], summary["updates"]) == (240, 60)
    rows = RunDirectory.open(tmp_path / "run").read_metrics()
    assert [row["frames"] for row in rows] == [50, 100, 150, 200, 240]
    assert [row["updates"] for row in rows] == [3, 18, 33, 48, 60]
    assert all(row["w"] != 500.0 for row in rows[1:4])
    # What the workers do is not this process's time.
    parts = json.loads((tmp_path / "run" / "profile.json").read_text())["parts"]
    assert parts["waiting for workers"] > 0.0 and not {"collection", "simulation", "acting"} & set(parts)
