"""What a checkpoint of a full replay buffer costs: the first one, and those that write only what is new.

``python -m benchmarks.checkpoints [directory]`` fills a buffer with a million transitions of HalfCheetah-v5's shapes
and saves it once whole and then after every 50,000 new ones, each time waiting for the disk. It writes
``checkpoints.json``: seconds, and the megabytes that the checkpoints take together.
"""

from __future__ import annotations

import json
import statistics
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import torch
from tensordict import TensorDict
from torchrl.data import LazyTensorStorage, TensorDictReplayBuffer

from nclql_torchrl.machine import describe_machine
from nclql_torchrl.training.checkpoint import latest_checkpoint, load_checkpoint, make_checkpoint, save_checkpoint
from nclql_torchrl.training.replay_state import ReplayState

RESULTS = Path(__file__).parent / "results" / "checkpoints"
CAPACITY, NEW, ROUNDS = 1_000_000, 50_000, 9
OBSERVATION_DIM, ACTION_DIM = 17, 6


def transitions(number: int) -> TensorDict:
    """Random ones; how well they compress does not matter, because nothing is compressed."""
    flags = torch.zeros(number, 1, dtype=torch.bool)
    following = {
        "observation": torch.randn(number, OBSERVATION_DIM),
        "reward": torch.randn(number, 1),
        "done": flags,
        "terminated": flags.clone(),
    }
    root = {"observation": torch.randn(number, OBSERVATION_DIM), "action": torch.rand(number, ACTION_DIM)}
    return TensorDict({**root, "next": following}, [number])


def make_buffer() -> TensorDictReplayBuffer:
    """An empty buffer."""
    return TensorDictReplayBuffer(storage=LazyTensorStorage(CAPACITY), batch_size=256)


def measure(parent: Path) -> dict[str, Any]:
    """Seconds of the checkpoints of a run in ``parent``."""
    replay_buffer = make_buffer()
    for _ in range(CAPACITY // NEW):
        replay_buffer.extend(transitions(NEW))
    checkpoint = make_checkpoint(replay_buffer=ReplayState(replay_buffer))
    seconds = []
    for number in range(1 + ROUNDS):
        if number > 0:
            replay_buffer.extend(transitions(NEW))
        start = time.perf_counter()
        save_checkpoint(checkpoint, parent, frames=number, keep=2, metadata={"task": "HalfCheetah-v5"})
        seconds.append(time.perf_counter() - start)
    restored = make_buffer()
    start = time.perf_counter()
    load_checkpoint(
        make_checkpoint(replay_buffer=ReplayState(restored)), latest_checkpoint(parent), task="HalfCheetah-v5"
    )
    loading = time.perf_counter() - start
    if not (restored[:] == replay_buffer[:]).all():
        raise RuntimeError("The restored replay buffer is another one.")
    # Files that two checkpoints share are counted once.
    sizes = {path.stat().st_ino: path.stat().st_size for path in parent.rglob("*") if path.is_file()}
    return {
        "full_seconds": round(seconds[0], 3),
        "incremental_seconds": round(statistics.median(seconds[1:]), 3),
        "all_incremental_seconds": [round(each, 3) for each in seconds[1:]],
        "load_seconds": round(loading, 3),
        "megabytes_of_two_checkpoints": round(sum(sizes.values()) / 2**20),
    }


def main() -> None:
    """Entry point of ``python -m benchmarks.checkpoints``."""
    with tempfile.TemporaryDirectory() as parent:
        result = {"capacity": CAPACITY, "new": NEW, **measure(Path(parent)), "machine": describe_machine()}
    directory = Path(sys.argv[1]) if len(sys.argv) > 1 else RESULTS
    directory.mkdir(parents=True, exist_ok=True)
    (directory / "checkpoints.json").write_text(json.dumps(result, indent=1) + "\n")
    print(json.dumps(result, indent=1))


if __name__ == "__main__":
    main()
