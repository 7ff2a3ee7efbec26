"""Latency of one policy call, from observation to action: the actor in Python against its ahead-of-time program.

``python -m benchmarks.deployment --programs DIR [--states 1] [--json O]``: the programs are compiled into DIR/STATES
unless they are there. Critics of 3x256, observation 17, action 6, 10 levels of 2 steps, float32; all timed in turn, in
one process, beside the same chain as one jitted JAX program, which draws its noise as the actor does. ``sampling.pt2``
is given noise that is drawn within the timed call; ``deterministic.pt2`` needs none.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import torch
from tensordict import TensorDict

from benchmarks.baselines.jax_sampler import make_chain
from benchmarks.sampler import critics_of, machine, make_actor, timed_in_turn
from nclql_torchrl.program import DETERMINISTIC, SAMPLING, SamplingPolicy, compile_programs, load_program

OBSERVATION_DIM, ACTION_DIM = 17, 6


def measure(states: int, directory: Path, rounds: int) -> dict[str, Any]:
    """Milliseconds per call of each way to act on so many states."""
    eager = make_actor(OBSERVATION_DIM, ACTION_DIM)
    compiled = make_actor(OBSERVATION_DIM, ACTION_DIM, execution="compile")
    if not (directory / SAMPLING).exists():
        directory.mkdir(parents=True, exist_ok=True)
        print(f"largest differences of actions: {compile_programs(eager, directory, states)}")
    deterministic, sampling = load_program(directory / DETERMINISTIC), load_program(directory / SAMPLING)
    observation, start, noise = SamplingPolicy(eager).example_inputs(states)
    batch = TensorDict({"observation": observation}, [states])
    chain = make_chain(critics_of(eager, OBSERVATION_DIM, ACTION_DIM), eager.sampler)
    key, jax_observation = jax.random.key(0), jnp.asarray(observation.numpy())
    calls = {
        "jax": lambda: chain(key, jax_observation).block_until_ready(),
        "eager actor": lambda: eager(batch),
        "compiled actor": lambda: compiled(batch),
        "compiled sampler": lambda: compiled.sampler(compiled.action_value(batch)),
        DETERMINISTIC: lambda: deterministic(observation),
        SAMPLING: lambda: sampling(observation, torch.rand_like(start) * 2.0 - 1.0, torch.randn_like(noise)),
    }
    for call in calls.values():
        call()
    return {"states": states, "figures": timed_in_turn(calls, rounds)}


def main() -> None:
    """Prints a table, and writes JSON when asked to."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--programs", type=Path, required=True)
    parser.add_argument("--states", type=int, nargs="+", default=[1])
    parser.add_argument("--rounds", type=int, default=300)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--json", type=Path)
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    result: dict[str, Any] = {"machine": machine(), "cases": []}
    with torch.no_grad():
        for states in arguments.states:
            case = measure(states, arguments.programs / str(states), arguments.rounds)
            result["cases"].append(case)
            for name, row in case["figures"].items():
                spread = f"{row['p10_ms']:.2f} to {row['p90_ms']:.2f}"
                print(f"{states}  {name:18s} {row['median_ms']:7.2f} ms ({spread})  ratio to JAX {row['ratio']:.2f}")
    if arguments.json:
        arguments.json.parent.mkdir(parents=True, exist_ok=True)
        arguments.json.write_text(json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    main()
