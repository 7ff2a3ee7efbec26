"""Time of a sampler call in every mode and precision, against the same chain as one jitted JAX program, and against
the time that its matrix products alone would take.

``python -m benchmarks.sampler [--device cpu] [--states 256] [--sizes 17x6] [--modes eager compile] [--json OUTPUT]``
``python -m benchmarks.sampler --device cuda --states 1024 4096 16384 65536 --json OUTPUT``

All are timed in turn, in one process, with critics of 3x256 and 10 levels of 2 steps. A call of ours reads the live
parameters, draws noise and runs the chain, from an observation to a normalised action, until the device is done. JAX is
left out where it cannot use the device.

The arithmetic floor is 4 FLOP for every parameter that a step multiplies, every step and every state (forward, and back
to the action), at the rate of one large square product of the precision, measured on the same device.
"""

from __future__ import annotations

import argparse
import json
import os
import time
from collections.abc import Callable
from functools import partial
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
from nclql_torchrl import LangevinActor, NoiseConditionedQNetwork, fused_gradient
from nclql_torchrl.machine import describe_machine, processor_flags
from nclql_torchrl.products import batched_product
from nclql_torchrl.value import ActionValue

IN_KEYS = ["observation", "action", "level"]


def machine() -> dict[str, Any]:
    """What the figures depend on."""
    return {
        **describe_machine(("torch", "jax")),
        "instructions": [flag for flag in ("avx2", "avx512f", "avx512_bf16", "amx_bf16") if flag in processor_flags()],
        "openmp": {name: os.environ.get(name) for name in ("OMP_WAIT_POLICY", "GOMP_SPINCOUNT")},
    }


def summary(seconds: list[float], yardstick: list[float] | None) -> dict[str, float]:
    """Median, 10th and 90th percentile, in milliseconds; and the ratio to JAX, of its rounds the median, if it ran.

    Within a round all are timed within a second or two, so the machine's changes of speed cancel.
    """
    low, median, high = np.percentile(np.array(seconds) * 1e3, [10, 50, 90])
    row = {"median_ms": float(median), "p10_ms": float(low), "p90_ms": float(high)}
    return row if yardstick is None else row | {"ratio": float(np.median(np.array(seconds) / np.array(yardstick)))}


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
    return {name: summary(values, seconds.get("jax")) for name, values in seconds.items()}


def make_actor(observation_dim: int, action_dim: int, device: str = "cpu", **options: Any) -> LangevinActor:
    """A fresh actor over actions in [-1, 1], with the authors' sizes; the same parameters in every call."""
    torch.manual_seed(0)
    networks = [NoiseConditionedQNetwork(observation_dim, action_dim) for _ in range(2)]
    critics = [ValueOperator(network, in_keys=IN_KEYS) for network in networks]
    return LangevinActor(critics, spec=Bounded(-1.0, 1.0, torch.Size([action_dim])), **options).to(device)


def critics_of(actor: LangevinActor, observation_dim: int, action_dim: int) -> list[NoiseConditionedQNetwork]:
    """The actor's ensemble as plain networks."""
    networks = []
    for parameters in actor.qvalue_network_params["module"].unbind(0):
        network = NoiseConditionedQNetwork(observation_dim, action_dim)
        parameters.data.to_module(network)
        networks.append(network)
    return networks


def synchronize(device: str) -> None:
    """Waits until a device is done."""
    if device == "cuda":
        torch.cuda.synchronize()


@torch.no_grad()
def matmul_rate(device: str, precision: str, size: int | None = None) -> float:
    """FLOP per second of a product of square matrices as chains have it, of ten the fastest; float32 on a GPU is TF32.

    Args:
        device: "cpu" or "cuda".
        precision: "float32" or "bfloat16".
        size: of the matrices; by default 2,048 on a CPU and 8,192 on a GPU.
    """
    size = size or (8192 if device == "cuda" else 2048)
    left, right = (torch.randn(1, size, size, device=device, dtype=getattr(torch, precision)) for _ in range(2))
    before = torch.backends.cuda.matmul.allow_tf32
    torch.backends.cuda.matmul.allow_tf32 = True
    try:
        fastest = float("inf")
        for _ in range(11):  # the first prepares
            synchronize(device)
            begin = time.perf_counter()
            batched_product(left, right)
            synchronize(device)
            fastest = min(fastest, time.perf_counter() - begin)
    finally:
        torch.backends.cuda.matmul.allow_tf32 = before
    return 2.0 * size**3 / fastest


def floor_flop(actor: LangevinActor, states: int) -> int:
    """FLOP of the matrix products that every Langevin step needs, for one call.

    The observation's and the level's columns of the first layer are multiplied once per call and level, and left out.
    """
    network = actor.qvalue_network.module
    assert isinstance(network, NoiseConditionedQNetwork)
    keys = [("module", "trunk", str(index), "weight") for index in range(len(network.trunk))]
    first, *others = (actor.qvalue_network_params.get(key) for key in keys)
    parameters = first[..., : network.action_dim].numel() + sum(weight.numel() for weight in others)
    steps = actor.sampler.schedule.num_levels * actor.sampler.steps_per_level
    return 4 * steps * states * parameters


def errors(observation_dim: int, action_dim: int, device: str, mode: str) -> dict[str, dict[str, float]]:
    """Each precision against eager float64 on 256 states: the gradient of a step, and the action after the whole chain.

    The gradient's error is relative to its mean norm. The chain is chaotic where coordinates switch between faces of
    the box, so the distance of the final actions is given by its quantiles.
    """
    batch = TensorDict({"observation": torch.randn(256, observation_dim)}, [256]).to(device)
    start, noise = torch.rand(1, 256, action_dim) * 2 - 1, torch.randn(10, 2, 1, 256, action_dim)
    start, noise = start.to(device), noise.to(device)
    reference = make_actor(observation_dim, action_dim, device).double()
    exact_value = reference.action_value(batch.double())
    exact_gradient = exact_value.at_level(9).gradient(start.double())
    exact_action = reference.sampler(exact_value, start.double(), noise.double())
    table = {}
    for precision in ("float32", "bfloat16"):
        actor = make_actor(observation_dim, action_dim, device, execution=mode, precision=precision)
        value = actor.action_value(batch)
        evaluate = partial(_gradient_at_last_level, value)
        if mode != "eager":
            fused_gradient.load()
            evaluate = torch.compile(evaluate, fullgraph=True)
        gradient = evaluate(start).double()
        distance = (actor.sampler(value, start, noise).double() - exact_action).norm(dim=-1)
        table[precision] = {
            "gradient_relative_error": float((gradient - exact_gradient).norm(dim=-1).mean())
            / float(exact_gradient.norm(dim=-1).mean()),
            **{f"action_distance_p{p}": float(distance.quantile(p / 100)) for p in (50, 90, 99)},
        }
    return table


def _gradient_at_last_level(value: ActionValue, action: torch.Tensor) -> torch.Tensor:
    return value.at_level(9).gradient(action)


def measure(
    states: int,
    observation_dim: int,
    action_dim: int,
    modes: list[str],
    rates: dict[str, float],
    rounds: int,
    device: str = "cpu",
) -> dict[str, Any]:
    """One row of results per mode and precision: the ratios to JAX and to the floor, and how much faster than eager.

    Args:
        states, observation_dim, action_dim: of a call.
        modes: of execution.
        rates: precision -> :func:`matmul_rate`.
        rounds: see :func:`timed_in_turn`.
        device: "cpu" or "cuda"; there rows also have the most memory that the first call has allocated at once, beside
            critics and observations: a captured graph keeps its own.
    """
    batch = TensorDict({"observation": torch.randn(states, observation_dim)}, [states])
    calls: dict[str, Callable[[], object]] = {}
    first_calls: dict[str, dict[str, float]] = {}

    def timed_first(name: str, call: Callable[[], object]) -> None:
        synchronize(device)
        if device == "cuda":
            torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated() if device == "cuda" else 0
        begin = time.perf_counter()
        call()
        first_calls[name], calls[name] = {"first_call_s": time.perf_counter() - begin}, call
        if device == "cuda":
            first_calls[name]["peak_memory_mib"] = (torch.cuda.max_memory_allocated() - before) / 2**20

    plain = make_actor(observation_dim, action_dim)
    if jax.default_backend() == {"cuda": "gpu"}.get(device, device):
        chain = make_chain(critics_of(plain, observation_dim, action_dim), plain.sampler)
        observation, key = jnp.asarray(batch["observation"].numpy()), jax.random.key(0)
        timed_first("jax", lambda: chain(key, observation).block_until_ready())
    batch = batch.to(device)
    for mode in modes:
        for precision in rates:
            actor = make_actor(observation_dim, action_dim, device, execution=mode, precision=precision)

            def call(actor: LangevinActor = actor) -> None:
                actor.sampler(actor.action_value(batch))
                synchronize(device)

            timed_first(f"{mode} {precision}", call)
    figures = timed_in_turn(calls, rounds)
    flop = floor_flop(plain, states)
    for name, row in figures.items():
        row |= first_calls[name]
        mode, _, precision = name.partition(" ")
        if precision:
            row["floor_ms"] = flop / rates[precision] * 1e3
            row["over_floor"] = row["median_ms"] / row["floor_ms"]
            if "eager" in modes:
                row["faster_than_eager"] = figures[f"eager {precision}"]["median_ms"] / row["median_ms"]
    return {"states": states, "observation": observation_dim, "action": action_dim, "figures": figures}


def described(row: dict[str, float]) -> str:
    """A row as text; what it does not have is left out."""
    formats = {
        "ratio": "{:.2f} of JAX",
        "floor_ms": "floor {:.3g} ms",
        "over_floor": "{:.1f} of the floor",
        "faster_than_eager": "{:.2f} times as fast as eager",
        "first_call_s": "first call {:.1f} s",
        "peak_memory_mib": "{:.0f} MiB",
    }
    times = f"{row['median_ms']:8.2f} ms ({row['p10_ms']:.2f} to {row['p90_ms']:.2f})"
    return "  ".join([times, *(text.format(row[name]) for name, text in formats.items() if name in row)])


def main() -> None:
    """Prints a table, and writes JSON when asked to."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", choices=["cpu", "cuda"], default="cpu")
    parser.add_argument("--states", type=int, nargs="+", default=[256])
    parser.add_argument("--sizes", nargs="+", default=["17x6"], help="observation x action")
    parser.add_argument("--modes", nargs="+", help="default: eager, compile, and on a GPU cudagraph")
    parser.add_argument("--precisions", nargs="+", default=["float32", "bfloat16"])
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--json", type=Path)
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    device = arguments.device
    modes = arguments.modes or ["eager", "compile", *(["cudagraph"] if device == "cuda" else [])]
    rates = {precision: matmul_rate(device, precision) for precision in arguments.precisions}
    result: dict[str, Any] = {
        "machine": machine(),
        "device": device,
        "matmul_flop_per_s": rates,
        "cases": [],
        "errors": {},
    }
    print(", ".join(f"{precision} products: {rate / 1e12:.3g} TFLOP/s" for precision, rate in rates.items()))
    for size in arguments.sizes:
        observation_dim, action_dim = map(int, size.split("x"))
        with torch.no_grad():
            result["errors"][size] = errors(observation_dim, action_dim, device, modes[-1])
            for states in arguments.states:
                rounds = arguments.rounds * (5 if states <= 16 else 1)
                case = measure(states, observation_dim, action_dim, modes, rates, rounds, device)
                result["cases"].append(case)
                print(f"\n{states} states, observation {observation_dim}, action {action_dim}")
                for name, row in case["figures"].items():
                    print(f"  {name:18s} {described(row)}", flush=True)
        for precision, row in result["errors"][size].items():
            print(f"  {precision}: " + ", ".join(f"{name} {value:.1e}" for name, value in row.items()))
    if arguments.json:
        arguments.json.parent.mkdir(parents=True, exist_ok=True)
        arguments.json.write_text(json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    main()
