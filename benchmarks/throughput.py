"""Environment steps and updates per second of a whole training loop, beside simulation and learning alone.

The parts are those of ``nclql-train``, from a preset; the loop is its loop: a vector step of acting and simulating,
replay, and a fixed number of updates. Alone, simulation steps the environments with uniform actions, and learning
samples batches and updates. One command measures, adds to ``throughput.jsonl`` and draws the figure::

    python -m benchmarks.throughput --num-envs 64 256 1024 4096 --output benchmarks/results/throughput
    python -m benchmarks.throughput --preset gpu_4096 --updates-per-step 4 --num-envs 64 256 1024 4096 16384
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
import torch
from omegaconf import OmegaConf
from torch.profiler import ProfilerActivity, profile

import nclql_torchrl.conf
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
from nclql_torchrl.training.config import load_config, validate
from nclql_torchrl.training.metrics import MetricsWindow
from nclql_torchrl.training.time_profile import gpu_busy
from nclql_torchrl.training.training import ENDED_KEYS

PRESETS = Path(next(iter(nclql_torchrl.conf.__path__))) / "preset"
REPLAYED = 4
"""Vector steps in the replay buffer before anything is timed."""


def configure(preset: str, num_envs: int, overrides: Sequence[str]) -> TrainConfig:
    """A preset's configuration for a number of environments; it acts by its sampler from the first step on."""
    values = OmegaConf.to_container(OmegaConf.load(PRESETS / f"{preset}.yaml"))
    assert isinstance(values, dict)
    own = [f"env.num_envs={num_envs}", "collector.init_random_frames=0", "replay_buffer.size=200000"]
    config = load_config({str(key): value for key, value in values.items()}, [*own, *overrides])
    validate(config)
    return config


def rate(call: Callable[[], object], seconds: float, device: torch.device) -> float:
    """Calls per second, from a few seconds of them; what was compiled before is not counted."""
    call()
    _synchronize(device)
    begin, count = time.perf_counter(), 0
    while time.perf_counter() - begin < seconds:
        call()
        count += 1
    _synchronize(device)
    return count / (time.perf_counter() - begin)


def measure(config: TrainConfig, updates_per_step: int, seconds: float) -> dict[str, Any]:
    """Steps and updates per second of simulation alone, learning alone and the loop."""
    device, num_envs = make_device(config.device), config.env.num_envs
    torch.manual_seed(0)
    env = make_train_env(config, device)
    actor = make_actor(config, env, device)
    loss = make_loss(config, actor)
    update, window = make_update(config, loss), MetricsWindow()
    replay_buffer = make_replay_buffer(config, device)
    actions = [env.action_spec.rand() for _ in range(8)]
    state, index = env.reset(), 0

    def simulate() -> None:
        nonlocal state, index
        index = (index + 1) % len(actions)
        _, state = env.step_and_maybe_reset(state.set("action", actions[index]))

    def learn() -> None:
        window.add_update(update(sample(replay_buffer)))

    # First: a collector closes its environments when it ends.
    simulation = rate(simulate, seconds, device) * num_envs
    collector = make_collector(config, env, actor, device)
    batches = iter(collector)

    def collect() -> None:
        batch = next(batches)
        batch.select(*ENDED_KEYS).cpu()  # as the training loop does, to see what has ended
        replay_buffer.extend(batch.reshape(-1).select(*loss.in_keys))

    def train() -> None:
        collect()
        for _ in range(updates_per_step):
            learn()

    for _ in range(REPLAYED):
        collect()
    begin = time.perf_counter()
    for _ in range(4):  # compiles, and captures on a GPU
        learn()
    row = {
        "num_envs": num_envs,
        "task": config.env.task,
        "engine": config.env.engine,
        "device": str(device),
        "execution": config.sampler.execution,
        "batch_size": config.optim.batch_size,
        "updates_per_step": updates_per_step,
        "compile_s": round(time.perf_counter() - begin, 1),
    }
    row["simulation_steps_per_second"] = simulation
    row["learning_updates_per_second"] = rate(learn, seconds, device)
    row["collection_steps_per_second"] = rate(collect, seconds, device) * num_envs
    steps = rate(train, seconds, device)
    row["loop_steps_per_second"], row["loop_updates_per_second"] = steps * num_envs, steps * updates_per_step
    if device.type == "cuda":
        row["loop_gpu_busy"] = traced_gpu_busy(train)
    collector.shutdown()
    return {key: round(value, 3) if isinstance(value, float) else value for key, value in row.items()}


def _synchronize(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def traced_gpu_busy(call: Callable[[], object], calls: int = 10) -> float:
    """Share of the time in which the GPU runs anything."""
    torch.cuda.synchronize()
    with profile(activities=[ProfilerActivity.CUDA]) as trace:
        begin = time.perf_counter()
        for _ in range(calls):
            call()
        torch.cuda.synchronize()
        seconds = time.perf_counter() - begin
    return gpu_busy(trace, seconds)


def draw(rows: Sequence[dict[str, Any]], path: Path) -> None:
    """Steps and updates per second against environments: the newest measurement of each number on each device."""
    newest = {(row["device"], row["num_envs"]): row for row in rows}
    figure, axes = plt.subplots(1, 2, figsize=(8.5, 3.6))
    panels = (
        ("environment steps per second", (("simulation alone", "simulation_steps_per_second", "#999999"),
         ("acting and simulation", "collection_steps_per_second", "#56B4E9"),
         ("training loop", "loop_steps_per_second", "#0072B2"))),
        ("updates per second", (("learning alone", "learning_updates_per_second", "#E69F00"),
         ("training loop", "loop_updates_per_second", "#0072B2"))),
    )  # fmt: skip
    for axis, (label, lines) in zip(axes, panels, strict=True):
        for device, style in zip(sorted({device for device, _ in newest}), ("-", "--", ":"), strict=False):
            points = [row for (of, _), row in sorted(newest.items()) if of == device]
            for name, key, colour in lines:
                axis.plot(
                    [row["num_envs"] for row in points], [row[key] for row in points],
                    style, marker="o", markersize=4, color=colour, label=f"{name}, {device}",
                )  # fmt: skip
        axis.set(xscale="log", yscale="log", xlabel="environments", ylabel=label)
        axis.grid(alpha=0.3, which="both", linewidth=0.5)
        axis.legend(frameon=False, fontsize=8)
    figure.tight_layout()
    figure.savefig(path, dpi=150)
    plt.close(figure)


def main() -> None:
    """Measures, adds a JSON line per number of environments, and draws all lines."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--preset", default="gpu_4096" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--num-envs", type=int, nargs="*", default=[64, 256, 1024, 4096, 16384])
    parser.add_argument("--updates-per-step", type=int, default=4 if torch.cuda.is_available() else 1)
    parser.add_argument("--seconds", type=float, default=5.0, help="of every measurement")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--output", type=Path, default=Path("benchmarks/results/throughput"))
    parser.add_argument("overrides", nargs="*", help="name=value, as of nclql-train")
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    arguments.output.mkdir(parents=True, exist_ok=True)
    file = arguments.output / "throughput.jsonl"
    for num_envs in arguments.num_envs:
        row = measure(
            configure(arguments.preset, num_envs, arguments.overrides), arguments.updates_per_step, arguments.seconds
        )
        print(json.dumps(row), flush=True)
        with file.open("a") as lines:
            lines.write(json.dumps({**row, "machine": describe_machine(("torch", "torchrl", "mujoco", "jax"))}) + "\n")
    draw([json.loads(line) for line in file.read_text().splitlines()], arguments.output / "throughput.png")


if __name__ == "__main__":
    main()
