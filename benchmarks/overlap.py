"""What it gains that one worker simulates and acts while the learner learns: a training loop with
``collector.backend=async`` against one with ``direct``.

``python -m benchmarks.overlap [--num-envs 5 64 256] [--rounds 5] [--seconds 2] [--output FILE]``

Both loops have the same configuration, the preset ``cpu``, and make one update per vector step, so the ratio of updates
to transitions is the same. "direct" has all threads for both; TorchRL leaves one of them to the worker of "async". They
are timed in turn in one process, the worker of "async" waiting meanwhile, and ratios are medians over the rounds.
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Sequence
from pathlib import Path
from statistics import median
from typing import Any

import torch

from benchmarks.throughput import configure
from nclql_torchrl.machine import describe_machine
from nclql_torchrl.training import TrainConfig
from nclql_torchrl.training.collection import make_collector
from nclql_torchrl.training.components import (
    make_actor,
    make_device,
    make_loss,
    make_replay_buffer,
    make_train_env,
    make_update,
    sample,
)

BACKENDS = ("direct", "async")

UNTIMED_STEPS = 4
"""Before every measurement: what the worker has collected in advance is used up."""


class Loop:
    """A training loop, of one vector step and one update at a time.

    Args:
        config: the run.
        threads: of torch, for the loop and its worker.
    """

    def __init__(self, config: TrainConfig, threads: int) -> None:
        torch.set_num_threads(threads)
        device = make_device(config.device)
        env = make_train_env(config, device)
        actor = make_actor(config, env, device)
        self.loss = make_loss(config, actor)
        self.update = make_update(config, self.loss)
        self.replay_buffer = make_replay_buffer(config, device)
        self.collector = make_collector(config, env, actor, device)
        self.batches = iter(self.collector)
        # TorchRL leaves threads to workers.
        self.threads = torch.get_num_threads()

    def step(self) -> None:
        """A vector step, replay, an update, and its weights for whoever acts."""
        self.replay_buffer.extend(next(self.batches).reshape(-1).select(*self.loss.in_keys))
        self.update(sample(self.replay_buffer))
        self.collector.update_policy_weights_()

    def rate(self, seconds: float) -> float:
        """Steps per second."""
        torch.set_num_threads(self.threads)
        for _ in range(UNTIMED_STEPS):
            self.step()
        begin, count = time.perf_counter(), 0
        while time.perf_counter() - begin < seconds:
            self.step()
            count += 1
        return count / (time.perf_counter() - begin)


def measure(num_envs: int, rounds: int, seconds: float, threads: int, overrides: Sequence[str] = ()) -> dict[str, Any]:
    """Vector steps per second of both loops, and the median of the rounds' ratios."""
    loops = {
        name: Loop(configure("cpu", num_envs, [f"collector.backend={name}", "env.engine=mujoco", *overrides]), threads)
        for name in BACKENDS
    }
    for loop in loops.values():
        loop.rate(0.0)  # compiles
    rates = [{name: loop.rate(seconds) for name, loop in loops.items()} for _ in range(rounds)]
    row = {
        "num_envs": num_envs,
        "threads": {name: loop.threads for name, loop in loops.items()},
        "steps_per_second": {name: round(median(rate[name] for rate in rates) * num_envs, 1) for name in BACKENDS},
        "updates_per_second": {name: round(median(rate[name] for rate in rates), 2) for name in BACKENDS},
        "async_to_direct": round(median(rate["async"] / rate["direct"] for rate in rates), 3),
        "of_each_round": [round(rate["async"] / rate["direct"], 3) for rate in rates],
    }
    for loop in loops.values():
        loop.collector.shutdown()
    return row


def main() -> None:
    """Prints a row per number of environments, and adds it to a file of JSON lines when asked to."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--num-envs", type=int, nargs="+", default=[5, 64, 256])
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--seconds", type=float, default=2.0, help="of every measurement")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--output", type=Path)
    parser.add_argument("overrides", nargs="*", help="name=value, as of nclql-train")
    arguments = parser.parse_args()
    for num_envs in arguments.num_envs:
        row = measure(num_envs, arguments.rounds, arguments.seconds, arguments.threads, arguments.overrides)
        print(json.dumps(row), flush=True)
        if arguments.output:
            arguments.output.parent.mkdir(parents=True, exist_ok=True)
            with arguments.output.open("a") as lines:
                machine = describe_machine(("torch", "torchrl", "mujoco"))
                lines.write(json.dumps({**row, "machine": machine}) + "\n")


if __name__ == "__main__":
    main()
