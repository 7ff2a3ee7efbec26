"""Whether a run's memory is bounded: resident memory of ``nclql-train`` over its updates, on a small task.

``python -m benchmarks.memory [engine=mujoco] [updates=100000] [warmup=10000] [directory=...]`` trains with tiny critics
and a full replay buffer, reads the process's resident memory from the kernel at every row of metrics.csv, and writes
``ENGINE.json``: the growth after ``warmup`` updates, and the samples. What it reads includes everything that a run
does: evaluations, rows, checkpoints, JAX's caches, what DLPack holds.
"""

from __future__ import annotations

import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from nclql_torchrl.machine import describe_machine
from nclql_torchrl.training import RunDirectory

RESULTS = Path(__file__).parent / "results" / "memory"
TASK = "InvertedPendulum-v5"
PERIOD = 0.25
UTD_RATIO = 2


def run_options(engine: str, updates: int) -> list[str]:
    """A run of so many updates that passes through everything a long run does: the replay buffer is full early."""
    frames, percent = updates // UTD_RATIO, max(updates // UTD_RATIO // 100, 1)
    return [
        f"env.task={TASK}", f"env.engine={engine}", "env.num_envs=4", "collector.init_random_frames=400",
        f"collector.total_frames={frames + 400}", f"optim.utd_ratio={UTD_RATIO}", "optim.batch_size=32",
        "optim.update=summed", "replay_buffer.size=1000", "network.hidden_sizes=[32]", "network.num_critics=1",
        "sampler.num_levels=2", "sampler.sigma_max=0.02", "sampler.sigma_min=0.01", "sampler.steps_per_level=1",
        "sampler.execution=auto", "logger.backend=csv", f"logger.log_interval={percent}",
        f"logger.eval_interval={5 * percent}", "logger.eval_episodes=1", f"checkpoint.interval={2 * percent}",
        "device=cpu",
    ]  # fmt: skip


def resident_bytes(pid: int) -> int:
    """Memory of a process that is in RAM now."""
    return int(Path(f"/proc/{pid}/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")


def measure(engine: str, updates: int) -> list[tuple[int, int]]:
    """(updates, resident bytes), once per row of metrics.csv."""
    samples: list[tuple[int, int]] = []
    with tempfile.TemporaryDirectory() as parent:
        run_dir = Path(parent, "run")
        command = [sys.executable, "-m", "nclql_torchrl.commands.train", *run_options(engine, updates)]
        process = subprocess.Popen([*command, f"run_dir={run_dir}"], stdout=subprocess.DEVNULL)
        try:
            while process.poll() is None:
                time.sleep(PERIOD)
                if not (run_dir / "config.yaml").exists():
                    continue
                rows = RunDirectory.open(run_dir).read_metrics()
                done = int(rows[-1]["updates"]) if rows else 0
                if done > (samples[-1][0] if samples else 0):
                    samples.append((done, resident_bytes(process.pid)))
        except FileNotFoundError:
            process.wait()  # it ended between the two looks at it
        finally:
            process.kill()
    if process.returncode != 0:
        raise RuntimeError(f"nclql-train ended with {process.returncode}.")
    return samples


def growth(samples: list[tuple[int, int]], warmup: int) -> float:
    """Growth after ``warmup`` updates: median of the last tenth of the samples against the first as many after it.

    Examples:
        >>> growth([(1, 50), (2, 100), (3, 100), (4, 102)], warmup=2)
        0.02
    """
    after = [size for updates, size in samples if updates >= warmup]
    count = max(len(after) // 10, 1)
    first, last = statistics.median(after[:count]), statistics.median(after[-count:])
    return last / first - 1


def main() -> None:
    """Entry point of ``python -m benchmarks.memory``."""
    options = {"engine": "mujoco", "updates": "100000", "warmup": "10000", "directory": str(RESULTS)}
    options |= dict(argument.split("=", 1) for argument in sys.argv[1:])
    engine, updates, warmup = options["engine"], int(options["updates"]), int(options["warmup"])
    samples = measure(engine, updates)
    result = {
        "engine": engine,
        "task": TASK,
        "updates": updates,
        "growth_after_updates": warmup,
        "growth": round(growth(samples, warmup), 5),
        "machine": describe_machine(("torch", "torchrl", "tensordict", "mujoco", "jax")),
        "samples": [{"updates": done, "resident_mb": round(size / 2**20, 1)} for done, size in samples],
    }
    directory = Path(options["directory"])
    directory.mkdir(parents=True, exist_ok=True)
    (directory / f"{engine}.json").write_text(json.dumps(result, indent=1) + "\n")
    print(f"{engine}: resident memory grew by {result['growth']:.2%} after the first {warmup:,} of {updates:,} updates")


if __name__ == "__main__":
    main()
