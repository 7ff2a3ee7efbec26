"""Replay in checkpoints: segments that are written once and shared from checkpoint to checkpoint.

Transitions are numbered in the order in which they were written; number n lies at index n modulo the capacity. A
segment is a file of consecutive transitions, and never changes. A checkpoint writes what is new since the one before as
a segment, and links the older segments that are still needed: a hard link, so that every checkpoint is complete in
itself, and the space is freed with the last one that needs it. TorchRL's own storage checkpointers write the whole
capacity each time, or, with memory-mapped storage, write over the transitions that an older checkpoint is made of.

::

    replay.json                                    how many transitions were written, the capacity, the segments
    segment-000000000000-000000050000.tdz          tensordict's memory-mapped archive: JSON and raw tensors
"""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path
from typing import Any

import torch
from tensordict import TensorDict, TensorDictBase
from torchrl.data import TensorDictReplayBuffer

INDEX = "replay.json"

SMALLEST_SHARE = 64
"""A newest segment of less than the capacity divided by this is written again, together with what is new: so there are
never many more segments than this."""

Segment = tuple[int, int]
"""Numbers of the first transition and of the one after the last."""


class ReplayState:
    """Content and write position of a replay buffer, for torchrl.checkpoint's ``dump`` and ``load``.

    Args:
        replay_buffer: of single transitions, over a storage of fixed capacity on any device, filled only by ``extend``.

    Examples:
        >>> import tempfile
        >>> from torchrl.data import LazyTensorStorage
        >>> source, target = (TensorDictReplayBuffer(storage=LazyTensorStorage(4), batch_size=2) for _ in range(2))
        >>> _ = source.extend(TensorDict({"reward": torch.arange(6.0)}, [6]))
        >>> with tempfile.TemporaryDirectory() as directory:
        ...     ReplayState(source).dump(Path(directory))
        ...     ReplayState(target).load(Path(directory))
        >>> target[:]["reward"]
        tensor([4., 5., 2., 3.])
    """

    def __init__(self, replay_buffer: TensorDictReplayBuffer) -> None:
        self.replay_buffer = replay_buffer

    def dump(self, path: Path, previous: Path | None = None) -> None:
        """Writes the buffer's content into an empty directory.

        Args:
            path: the directory.
            previous: where an earlier state of the same buffer was dumped, on the same file system; what it has is
                linked, or copied where the file system knows no links.
        """
        written, oldest, capacity = self._bounds()
        segments = [] if previous is None else [each for each in _read_index(previous)["segments"] if each[1] > oldest]
        if segments and segments[-1][1] - segments[-1][0] < capacity // SMALLEST_SHARE:
            segments.pop()
        for segment in segments:
            assert previous is not None
            _link(previous / _name(segment), path / _name(segment))
        start = max(segments[-1][1], oldest) if segments else oldest
        while start < written:
            # A segment ends where the storage does, so that it is one piece of it.
            stop = min(written, (start // capacity + 1) * capacity)
            self._read(start, stop).save(str(path / _name((start, stop))), archive=True)
            segments.append((start, stop))
            start = stop
        index = {"write_count": written, "capacity": capacity, "segments": segments}
        (path / INDEX).write_text(json.dumps(index))

    def load(self, path: Path) -> None:
        """Restores :meth:`dump`: every transition at the index it had, so that the same draws sample the same.

        Raises:
            ValueError: if the state is of another capacity.
        """
        storage: Any = self.replay_buffer.storage
        index, capacity = _read_index(path), storage.max_size
        if index["capacity"] != capacity:
            raise ValueError(f"The replay buffer has room for {capacity} transitions; expected {index['capacity']}.")
        self.replay_buffer.empty()
        written = index["write_count"]
        for start, stop in index["segments"]:
            # Numbers below are overwritten in the buffer, and only their segment is not yet.
            first = max(start, written - capacity)
            segment = TensorDict.load_memmap(path / _name((start, stop)), allow_pickle=False)
            # Copied, so that no storage is ever made of mapped files.
            transitions = segment[first - start :].clone().to(storage.device)
            storage.set(torch.arange(first, stop) % capacity, transitions)
        self.replay_buffer.writer.load_state_dict({"_cursor": written % capacity, "_write_count": written})

    def _bounds(self) -> tuple[int, int, int]:
        """How many transitions were written, the number of the oldest one that is left, and the capacity."""
        written = int(self.replay_buffer.write_count)
        return written, written - len(self.replay_buffer), self.replay_buffer.storage.max_size

    def _read(self, start: int, stop: int) -> TensorDictBase:
        capacity = self.replay_buffer.storage.max_size
        first = start % capacity
        transitions: Any = self.replay_buffer.storage[first : first + stop - start]
        return transitions


def _read_index(path: Path) -> dict[str, Any]:
    index = json.loads((path / INDEX).read_text())
    return {**index, "segments": [tuple(segment) for segment in index["segments"]]}


def _name(segment: Segment) -> str:
    return f"segment-{segment[0]:012d}-{segment[1]:012d}.tdz"


def _link(source: Path, target: Path) -> None:
    try:
        os.link(source, target)
    except OSError:
        shutil.copyfile(source, target)
