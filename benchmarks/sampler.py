"""Time of a sampler call in every mode and precision, against the same chain as one jitted JAX program.

``python -m benchmarks.sampler [--states 256] [--sizes 17x6] [--modes eager compile] [--precisions float32] [--json O]``

Both sides are timed in turn, in one process, with critics of 3x256 and 10 levels of 2 steps. A call of ours reads the
live parameters, draws noise and runs the chain, from an observation to a normalised action.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import torch
from tensordict import TensorDict
from torchrl.data import Bounded
from torchrl.modules import ValueOperator

from benchmarks.baselines.jax_sampler import make_chain
from nclql_torchrl import LangevinActor, NoiseConditionedQNetwork

IN_KEYS = ["observation", "action", "level"]


def machine() -> dict[str, Any]:
    """What the figures depend on."""
    cpu = Path("/proc/cpuinfo").read_text() if Path("/proc/cpuinfo").exists() else ""
    names = [line.split(":", 1)[1].strip() for line in cpu.splitlines() if line.startswith("model name")]
    flags = next((line for line in cpu.splitlines() if line.startswith("flags")), "").split()
    return {
        "cpu": names[0] if names else platform.processor(),
        "cores": os.cpu_count(),
        "instructions": [flag for flag in ("avx2", "avx512f", "avx512_bf16", "amx_bf16") if flag in flags],
        "gpu": torch.cuda.get_device_name() if torch.cuda.is_available() else None,
        "threads": torch.get_num_threads(),
        "load": os.getloadavg(),
        "openmp": {name: os.environ.get(name) for name in ("OMP_WAIT_POLICY", "GOMP_SPINCOUNT")},
        "torch": torch.__version__,
        "jax": jax.__version__,
    }


def summary(seconds: list[float]) -> dict[str, float]:
    """Median, 10th and 90th percentile, in milliseconds."""
    low, median, high = np.percentile(np.array(seconds) * 1e3, [10, 50, 90])
    return {"median_ms": float(median), "p10_ms": float(low), "p90_ms": float(high)}


def timed_in_turn(calls: dict[str, Callable[[], object]], rounds: int) -> dict[str, dict[str, float]]:
    """Times the calls one after the other, round by round; the first of each three calls only warms the caches."""
    seconds: dict[str, list[float]] = {name: [] for name in calls}
    for _ in range(rounds):
        for name, call in calls.items():
            call()
            for _ in range(2):
                begin = time.perf_counter()
                call()
                seconds[name].append(time.perf_counter() - begin)
    return {name: summary(values) for name, values in seconds.items()}


def make_actor(observation_dim: int, action_dim: int, **options: Any) -> LangevinActor:
    """A fresh actor over actions in [-1, 1], with the authors' sizes; the same parameters in every call."""
    torch.manual_seed(0)
    networks = [NoiseConditionedQNetwork(observation_dim, action_dim) for _ in range(2)]
    critics = [ValueOperator(network, in_keys=IN_KEYS) for network in networks]
    return LangevinActor(critics, spec=Bounded(-1.0, 1.0, torch.Size([action_dim])), **options)


def critics_of(actor: LangevinActor, observation_dim: int, action_dim: int) -> list[NoiseConditionedQNetwork]:
    """The actor's ensemble as plain networks."""
    networks = []
    for parameters in actor.qvalue_network_params["module"].unbind(0):
        network = NoiseConditionedQNetwork(observation_dim, action_dim)
        parameters.data.to_module(network)
        networks.append(network)
    return networks


def errors(observation_dim: int, action_dim: int) -> dict[str, dict[str, float]]:
    """Each precision against float64 on 256 states: the gradient of a step, and the action after the whole chain.

    The gradient's error is relative to its mean norm. The chain is chaotic where coordinates switch between faces of
    the box, so the distance of the final actions is given by its quantiles.
    """
    batch = TensorDict({"observation": torch.randn(256, observation_dim)}, [256])
    start, noise = torch.rand(1, 256, action_dim) * 2 - 1, torch.randn(10, 2, 1, 256, action_dim)
    reference = make_actor(observation_dim, action_dim).double()
    exact_value = reference.action_value(batch.double())
    exact_gradient = exact_value.at_level(9).gradient(start.double())
    exact_action = reference.sampler(exact_value, start.double(), noise.double())
    table = {}
    for precision in ("float32", "bfloat16"):
        actor = make_actor(observation_dim, action_dim, precision=precision)
        value = actor.action_value(batch)
        gradient = value.at_level(9).gradient(start).double()
        distance = (actor.sampler(value, start, noise).double() - exact_action).norm(dim=-1)
        table[precision] = {
            "gradient_relative_error": float((gradient - exact_gradient).norm(dim=-1).mean())
            / float(exact_gradient.norm(dim=-1).mean()),
            **{f"action_distance_p{p}": float(distance.quantile(p / 100)) for p in (50, 90, 99)},
        }
    return table


def measure(
    states: int, observation_dim: int, action_dim: int, modes: list[str], precisions: list[str], rounds: int
) -> dict[str, Any]:
    """One row of results per mode and precision, with the ratio to JAX."""
    batch = TensorDict({"observation": torch.randn(states, observation_dim)}, [states])
    calls: dict[str, Callable[[], object]] = {}
    compile_s: dict[str, float] = {}

    def timed_first(name: str, call: Callable[[], object]) -> None:
        begin = time.perf_counter()
        call()
        compile_s[name], calls[name] = time.perf_counter() - begin, call

    plain = make_actor(observation_dim, action_dim)
    chain = make_chain(critics_of(plain, observation_dim, action_dim), plain.sampler)
    observation, key = jnp.asarray(batch["observation"].numpy()), jax.random.key(0)
    timed_first("jax", lambda: chain(key, observation).block_until_ready())
    for mode in modes:
        for precision in precisions:
            actor = make_actor(observation_dim, action_dim, execution=mode, precision=precision)
            timed_first(f"{mode} {precision}", lambda actor=actor: actor.sampler(actor.action_value(batch)))
    figures = timed_in_turn(calls, rounds)
    for name, row in figures.items():
        row |= {"first_call_s": compile_s[name], "ratio": row["median_ms"] / figures["jax"]["median_ms"]}
    return {"states": states, "observation": observation_dim, "action": action_dim, "figures": figures}


def main() -> None:
    """Prints a table, and writes JSON when asked to."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--states", type=int, nargs="+", default=[256])
    parser.add_argument("--sizes", nargs="+", default=["17x6"], help="observation x action")
    parser.add_argument("--modes", nargs="+", default=["eager", "compile"])
    parser.add_argument("--precisions", nargs="+", default=["float32", "bfloat16"])
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--json", type=Path)
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    result: dict[str, Any] = {"machine": machine(), "cases": [], "errors": {}}
    for size in arguments.sizes:
        observation_dim, action_dim = map(int, size.split("x"))
        with torch.no_grad():
            result["errors"][size] = errors(observation_dim, action_dim)
            for states in arguments.states:
                rounds = arguments.rounds * (5 if states <= 16 else 1)
                case = measure(states, observation_dim, action_dim, arguments.modes, arguments.precisions, rounds)
                result["cases"].append(case)
                print(f"\n{states} states, observation {observation_dim}, action {action_dim}")
                for name, row in case["figures"].items():
                    print(
                        f"  {name:18s} {row['median_ms']:8.2f} ms ({row['p10_ms']:.2f} to {row['p90_ms']:.2f})  "
                        f"ratio {row['ratio']:5.2f}  first call {row['first_call_s']:.1f} s",
                        flush=True,
                    )
        for precision, row in result["errors"][size].items():
            print(f"  {precision}: " + ", ".join(f"{name} {value:.1e}" for name, value in row.items()))
    result["machine"]["load_after"] = os.getloadavg()
    if arguments.json:
        arguments.json.parent.mkdir(parents=True, exist_ok=True)
        arguments.json.write_text(json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    main()
