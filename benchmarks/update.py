"""Time of a whole update against the sampler call within it, and against the same call as a jitted JAX program.

``python -m benchmarks.update [--sizes 17x6 348x17] [--batch 256] [--rounds 30] [--threads 2] [--json FILE]``

An update draws target actions, takes the two critic steps with Adam and moves the targets; critics of 3x256. All are
timed in turn in one process, and ratios are medians over the rounds. "eager update" is the same update with a compiled
sampler and everything else operation by operation. Beside the time by the clock there is the processor's time, of all
threads together: beside other processes the clock counts how often a thread waits for another one, not work.
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import torch
from tensordict import TensorDict
from torchrl.objectives import SoftUpdate

from benchmarks.baselines.jax_sampler import make_chain
from benchmarks.sampler import critics_of, machine, make_actor
from nclql_torchrl import NCLQLLoss, NCLQLUpdate
from nclql_torchrl.execution import Execution


def make_batch(batch_size: int, observation_dim: int, action_dim: int) -> TensorDict:
    """Transitions as replay yields them."""
    done = torch.zeros(batch_size, 1, dtype=torch.bool)
    following = {
        "observation": torch.randn(batch_size, observation_dim),
        "reward": torch.randn(batch_size, 1),
        "done": done,
        "terminated": done.clone(),
    }
    action = torch.rand(batch_size, action_dim) * 2 - 1
    observation = torch.randn(batch_size, observation_dim)
    return TensorDict({"observation": observation, "action": action, "next": following}, [batch_size])


def make_update(observation_dim: int, action_dim: int, execution: Execution) -> NCLQLUpdate:
    """An update as training makes it, with a compiled sampler."""
    loss = NCLQLLoss(make_actor(observation_dim, action_dim, execution="compile"))
    loss.make_value_estimator(gamma=0.99)
    adam = torch.optim.Adam(loss.parameters(), lr=1e-4, fused=True)
    return NCLQLUpdate(loss, adam, SoftUpdate(loss, tau=0.005), execution=execution)


def measure(batch_size: int, observation_dim: int, action_dim: int, rounds: int) -> dict[str, Any]:
    """Milliseconds of every call (the median, the 10th and the 90th percentile), and ratios."""
    batch = make_batch(batch_size, observation_dim, action_dim)
    update = make_update(observation_dim, action_dim, "compile")
    eager = make_update(observation_dim, action_dim, "eager")
    actor = update.loss.actor_network
    chain = make_chain(critics_of(actor, observation_dim, action_dim), actor.sampler)
    observation, key = jnp.asarray(batch["next", "observation"].numpy()), jax.random.key(0)
    calls: dict[str, Callable[[], object]] = {
        "jax sampler": lambda: chain(key, observation).block_until_ready(),
        "sampler": lambda: actor.sampler(actor.action_value(batch["next"])),
        "update": lambda: update(batch),
        "eager update": lambda: eager(batch),
    }
    for call in calls.values():
        call()
        call()
    seconds: dict[str, list[tuple[float, float]]] = {name: [] for name in calls}
    for _ in range(rounds):
        for name, call in calls.items():
            call()  # warms the caches
            begin, begin_cpu = time.perf_counter(), time.process_time()
            call()
            seconds[name].append((time.perf_counter() - begin, time.process_time() - begin_cpu))
    rows: dict[str, dict[str, float]] = {}
    for name in calls:
        row = rows[name] = {}
        for clock, prefix in enumerate(("", "cpu_")):
            values = np.array(seconds[name])[:, clock]
            low, median, high = np.percentile(values * 1e3, [10, 50, 90])
            row |= {f"{prefix}median_ms": median, f"{prefix}p10_ms": low, f"{prefix}p90_ms": high}
            for yardstick in ("sampler", "jax sampler"):
                ratio = np.median(values / np.array(seconds[yardstick])[:, clock])
                row[f"{prefix}to_{yardstick.replace(' ', '_')}"] = ratio
    return {
        "batch": batch_size,
        "observation": observation_dim,
        "action": action_dim,
        "figures": {name: {key: round(float(value), 4) for key, value in row.items()} for name, row in rows.items()},
    }


def main() -> None:
    """Prints a table, and writes JSON when asked to."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--sizes", nargs="+", default=["17x6", "348x17"], help="observation x action")
    parser.add_argument("--batch", type=int, default=256)
    parser.add_argument("--rounds", type=int, default=30)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--json", type=Path)
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    cases = []
    for size in arguments.sizes:
        observation_dim, action_dim = map(int, size.split("x"))
        case = measure(arguments.batch, observation_dim, action_dim, arguments.rounds)
        cases.append(case)
        print(f"batch {arguments.batch}, observation {observation_dim}, action {action_dim}")
        for name, row in case["figures"].items():
            for prefix, clock in (("", "clock"), ("cpu_", "processor")):
                print(
                    f"  {name:13s} {row[f'{prefix}median_ms']:8.2f} ms ({row[f'{prefix}p10_ms']:.2f} to "
                    f"{row[f'{prefix}p90_ms']:.2f}) {clock:9s}  {row[f'{prefix}to_sampler']:5.2f} of the sampler, "
                    f"{row[f'{prefix}to_jax_sampler']:5.2f} of the JAX sampler",
                    flush=True,
                )
        if arguments.json:
            arguments.json.parent.mkdir(parents=True, exist_ok=True)
            arguments.json.write_text(json.dumps({"machine": machine(), "cases": cases}, indent=1) + "\n")


if __name__ == "__main__":
    main()
