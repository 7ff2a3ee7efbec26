"""How fast do the engines step, and what does TorchRL's interface cost on top?

Steps the same task with every engine: alone (a raw loop without TorchRL), through ``env.step_and_maybe_reset`` and
through a ``Collector``, beside Gymnasium's vector environments, EnvPool where it is installed, and TorchRL's own MJX
environment. All are timed in turn, several rounds, in one run, and the medians are kept: ratios mean more than rates::

    python -m benchmarks.engines --task HalfCheetah-v5 --num-envs 64 --num-envs 256 --output benchmarks/results/engines
    python -m benchmarks.engines --figure benchmarks/results/engines

Actions are uniform; environments that end are reset, so resets are included everywhere.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import time
from collections.abc import Callable, Sequence
from functools import cache, partial
from pathlib import Path
from typing import Any

import gymnasium
import numpy as np
import torch
from torchrl.collectors import Collector
from torchrl.envs import EnvBase
from torchrl.envs.utils import RandomPolicy

from benchmarks.engines_figure import draw
from envs import make_env
from envs.batched import BatchedEnv, Engine
from nclql_torchrl.machine import describe_machine

TASKS = ("HalfCheetah-v5", "Hopper-v5", "Walker2d-v5", "Ant-v5", "Humanoid-v5")
PACKAGES = ("torch", "torchrl", "gymnasium", "mujoco", "mujoco-mjx", "jax", "envpool")
COLLECTED_STEPS = 16
"""Vector steps in one batch of the collector."""
LARGEST_ASYNC = 64
"""Environments beyond which AsyncVectorEnv, a process each, is left out."""

Steps = Callable[[int], None]
"""Takes that many control steps of the whole batch."""


def raw(engine: Engine) -> Steps:
    """An engine without TorchRL."""
    low, high = engine.action_low.to(engine.device), engine.action_high.to(engine.device)
    actions = low + (high - low) * torch.rand(8, engine.num_envs, len(low), device=engine.device)
    engine.reset(torch.ones(engine.num_envs, dtype=torch.bool, device=engine.device))

    def steps(count: int) -> None:
        for index in range(count):
            engine.step(actions[index % 8])
        _synchronize(engine.device)

    return steps


def through_env(env: EnvBase) -> Steps:
    """``step_and_maybe_reset``, as a loop of one's own would call it."""
    actions = torch.stack([env.action_spec.rand() for _ in range(8)])
    following = env.reset()

    def steps(count: int) -> None:
        nonlocal following
        for index in range(count):
            _, following = env.step_and_maybe_reset(following.set("action", actions[index % 8]))
        _synchronize(env.device)

    return steps


def through_collector(env: EnvBase) -> Steps:
    """A collector with a random policy; drawing its actions is included."""
    frames = env.batch_size.numel() * COLLECTED_STEPS
    policy = RandomPolicy(env.action_spec)
    batches = iter(
        Collector(
            env,
            policy,
            frames_per_batch=frames,
            total_frames=-1,
            track_traj_ids=False,
            auto_register_policy_transforms=False,
        )
    )

    def steps(count: int) -> None:
        for _ in range(-(-count // COLLECTED_STEPS)):
            next(batches)
        _synchronize(env.device)

    return steps


def gymnasium_vector(task: str, num_envs: int, kind: str) -> Steps:
    """Gymnasium's own vector environments."""
    vector_class = gymnasium.vector.SyncVectorEnv if kind == "sync" else gymnasium.vector.AsyncVectorEnv
    env: Any = vector_class([partial(gymnasium.make, task)] * num_envs)
    env.reset(seed=0)
    env.action_space.seed(0)
    actions = [env.action_space.sample() for _ in range(8)]

    def steps(count: int) -> None:
        for index in range(count):
            env.step(actions[index % 8])

    return steps


def envpool(task: str, num_envs: int) -> Steps:
    """EnvPool, synchronous, on the threads that the ``mujoco`` engine would use."""
    import envpool as library  # pyright: ignore[reportMissingImports]

    threads = len(os.sched_getaffinity(0))
    env: Any = library.make(task, env_type="gymnasium", num_envs=num_envs, num_threads=threads, seed=0)
    env.reset()
    space = env.action_space
    generator = np.random.default_rng(0)
    actions = [generator.uniform(space.low, space.high, (num_envs, *space.shape)) for _ in range(8)]

    def steps(count: int) -> None:
        for index in range(count):
            env.step(actions[index % 8])

    return steps


def torchrl_mjx(task: str, num_envs: int) -> Steps:
    """TorchRL's own MJX environment, given Gymnasium's model and frame skip."""
    from torchrl.envs import HopperEnv

    from envs.tasks.hopper import Hopper

    if task != Hopper.name:
        raise LookupError(f"only {Hopper.name} is compared with TorchRL's own environment")
    definition = Hopper()
    return through_env(
        HopperEnv(
            xml_path=str(definition.xml_path),
            patch_xml=False,
            frame_skip=definition.frame_skip,
            backend="mjx",
            num_envs=num_envs,
        )
    )


def systems(task: str, num_envs: int, device: str, engines: Sequence[str]) -> dict[str, Callable[[], Steps]]:
    """What is compared, by name; each is made when called.

    An engine alone, its environment and its collector take turns with the same simulations: three sets of 16,384 would
    not fit into 24 GiB.
    """

    @cache
    def ours(engine: str, **options: Any) -> BatchedEnv:
        env = make_env(task, num_envs, engine=engine, device=device, engine_options=options)
        assert isinstance(env, BatchedEnv)
        return env

    def family(name: str, engine: str, **options: Any) -> dict[str, Callable[[], Steps]]:
        return {
            name: lambda: raw(ours(engine, **options)._engine),
            f"{name} env": lambda: through_env(ours(engine, **options)),
            f"{name} collector": lambda: through_collector(ours(engine, **options)),
        }

    found: dict[str, Callable[[], Steps]] = {}
    if "gymnasium" in engines:
        found["gymnasium sync"] = partial(gymnasium_vector, task, num_envs, "sync")
        if num_envs <= LARGEST_ASYNC:
            found["gymnasium async"] = partial(gymnasium_vector, task, num_envs, "async")
        found["envpool"] = partial(envpool, task, num_envs)
    if "mujoco" in engines:
        found |= family("mujoco", "mujoco")
    if "mjx" in engines:
        found |= family("mjx", "mjx") | family("mjx fast", "mjx", solver="fast")
        found["torchrl mjx"] = partial(torchrl_mjx, task, num_envs)
    if "warp" in engines:
        found |= family("mjx warp", "mjx", impl="warp")
    return found


def measure(task: str, num_envs: int, device: str, engines: Sequence[str], rounds: int, seconds: float) -> list[dict]:
    """One row per system; those that cannot run say why."""
    rows: list[dict[str, Any]] = []
    running: dict[str, tuple[Steps, int]] = {}
    for name, make in systems(task, num_envs, device, engines).items():
        row = {"task": task, "num_envs": num_envs, "system": name}
        try:
            started = time.perf_counter()
            steps = make()
            steps(1)
            first = time.perf_counter() - started
            started = time.perf_counter()
            steps(COLLECTED_STEPS)
            per_step = (time.perf_counter() - started) / COLLECTED_STEPS
        except (ImportError, LookupError, NotImplementedError, ValueError, RuntimeError) as error:
            rows.append(row | {"skipped": f"{type(error).__name__}: {error}"})
            continue
        count = max(1, round(seconds / per_step / COLLECTED_STEPS)) * COLLECTED_STEPS if seconds > per_step else 1
        running[name] = (steps, COLLECTED_STEPS if "collector" in name else count)
        rows.append(row | {"start_seconds": first})
    times: dict[str, list[float]] = {name: [] for name in running}
    for _ in range(rounds):
        for name, (steps, count) in running.items():
            started = time.perf_counter()
            steps(count)
            times[name].append((time.perf_counter() - started) / count)
    for row in rows:
        if (taken := sorted(times.get(row["system"], ()))) and len(taken) > 1:
            row["milliseconds"] = 1e3 * statistics.median(taken)
            row["milliseconds_p10"], *_, row["milliseconds_p90"] = (
                1e3 * value for value in statistics.quantiles(taken, n=10, method="inclusive")
            )
            row["steps_per_second"] = num_envs / statistics.median(taken)
            row["round_milliseconds"] = [1e3 * value for value in times[row["system"]]]
    return rows


def ratios(rows: Sequence[dict]) -> list[tuple[str, int, str, float]]:
    """Task, number of environments, which systems, and by what factor the first is faster than the second.

    Of the rounds' factors the median: within a round all are timed within seconds, so changes of the machine's speed
    cancel.
    """
    found = []
    for task, num_envs in dict.fromkeys((row["task"], row["num_envs"]) for row in rows):
        taken = {
            row["system"]: row["round_milliseconds"]
            for row in rows
            if (row["task"], row["num_envs"]) == (task, num_envs) and "round_milliseconds" in row
        }
        for first, second in (
            ("mujoco env", "mujoco"),
            ("mjx env", "mjx"),
            ("mujoco", "gymnasium sync"),
            ("mujoco", "envpool"),
            ("mjx env", "torchrl mjx"),
            ("mjx fast env", "torchrl mjx"),
            ("mjx warp", "mjx"),
        ):
            if first in taken and second in taken:
                factors = [slow / fast for fast, slow in zip(taken[first], taken[second], strict=True)]
                found.append((task, num_envs, f"{first} / {second}", statistics.median(factors)))
    return found


def _synchronize(device: torch.device | None) -> None:
    if device is not None and device.type == "cuda":
        torch.cuda.synchronize(device)


def _print(rows: Sequence[dict]) -> None:
    for row in rows:
        start = f"{row['task']:16s} {row['num_envs']:6d}  {row['system']:20s}"
        if "skipped" in row:
            print(f"{start} skipped: {row['skipped'][:90]}", flush=True)
        elif "steps_per_second" in row:
            print(
                f"{start} {row['steps_per_second']:10.0f} steps/s  {row['milliseconds']:9.2f} ms  first step after "
                f"{row['start_seconds']:.1f} s",
                flush=True,
            )


def main(arguments: Sequence[str] | None = None) -> int:
    """Command line."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--task", action="append", choices=TASKS, metavar="ID", help=f"by default {', '.join(TASKS)}")
    parser.add_argument("--num-envs", action="append", type=int, help="by default 16, 64 and 256")
    parser.add_argument(
        "--engine", action="append", choices=["gymnasium", "mujoco", "mjx", "warp"], help="by default gymnasium, mujoco"
    )
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--rounds", type=int, default=5, help="how often each system is timed")
    parser.add_argument("--seconds", type=float, default=0.5, help="what one timing takes, about")
    parser.add_argument("--output", type=Path, help="directory; engines.jsonl there is added to")
    parser.add_argument("--figure", type=Path, help="directory; only draws engines.png from its engines.jsonl")
    options = parser.parse_args(arguments)
    if options.figure is not None:
        runs = [json.loads(line) for line in (options.figure / "engines.jsonl").read_text().splitlines()]
        draw([row for run in runs for row in run["rows"]], options.figure / "engines.png")
        print(options.figure / "engines.png")
        return 0
    everything = []
    for task in options.task or TASKS:
        for num_envs in options.num_envs or (16, 64, 256):
            machine = describe_machine(PACKAGES)
            engines = options.engine or ("gymnasium", "mujoco")
            rows = measure(task, num_envs, options.device, engines, options.rounds, options.seconds)
            _print(rows)
            for *_, name, ratio in ratios(rows):
                print(f"    {name}: {ratio:.2f}", flush=True)
            everything.extend(rows)
            if options.output is not None:
                options.output.mkdir(parents=True, exist_ok=True)
                with (options.output / "engines.jsonl").open("a") as file:
                    file.write(json.dumps({"machine": machine, "device": options.device, "rows": rows}) + "\n")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
