"""How long does the mjx engine take to start, the first time and again?

Starts every task in a process of its own with an empty compilation cache, and once more with the cache filled, and
times what a user waits for until the first step is done: tracing and compiling, or loading what was compiled. Imports
are not counted::

    python -m benchmarks.compile_time --output benchmarks/results/mjx/compile_time.json

"cpu" seconds, of all threads, hardly depend on what else the machine does; "wall" seconds do.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Any

from envs.tasks import TASKS


def start(task: str, num_envs: int, device: str) -> dict[str, float]:
    """Seconds until environments of a task have made their first step in this process."""
    import torch

    from envs.engines.mjx import MJXEngine

    task_class: Any = TASKS[task]
    wall, cpu = time.perf_counter(), time.process_time()
    engine = MJXEngine(task_class(), num_envs, device=device)
    engine.reset(torch.ones(num_envs, dtype=torch.bool, device=device))
    step = engine.step(torch.zeros(num_envs, len(engine.action_low), device=device))
    step.reward.cpu()
    return {"wall": round(time.perf_counter() - wall, 1), "cpu": round(time.process_time() - cpu, 1)}


def measure(task: str, num_envs: int, device: str) -> dict[str, Any]:
    """Starts a task twice, in new processes that share a new cache."""
    row: dict[str, Any] = {"task": task, "num_envs": num_envs, "device": device, "cores": os.cpu_count()}
    with tempfile.TemporaryDirectory() as cache:
        environment = {**os.environ, "XDG_CACHE_HOME": cache}
        environment.pop("JAX_COMPILATION_CACHE_DIR", None)
        for name in ("first", "second"):
            program = [sys.executable, "-m", "benchmarks.compile_time", "--tasks", task, "--device", device]
            program += ["--num-envs", str(num_envs), "--here"]
            result = subprocess.run(program, env=environment, check=True, capture_output=True, text=True)
            row[name] = json.loads(result.stdout.splitlines()[-1])
    return row | {package: version(package) for package in ("mujoco-mjx", "jax")}


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tasks", nargs="+", default=list(TASKS), choices=list(TASKS))
    parser.add_argument("--num-envs", type=int, default=256)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--output", type=Path, help="a JSON file")
    parser.add_argument("--here", action="store_true", help="start the tasks once, in this process")
    options = parser.parse_args(arguments)
    rows = []
    for task in options.tasks:
        rows.append((start if options.here else measure)(task, options.num_envs, options.device))
        print(json.dumps(rows[-1]), flush=True)
        if options.output is not None:
            options.output.parent.mkdir(parents=True, exist_ok=True)
            lines = ",\n".join(map(json.dumps, rows))
            options.output.write_text(f"[\n{lines}\n]\n")


if __name__ == "__main__":
    main()
