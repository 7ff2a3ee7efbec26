"""Checkpoints: complete, written atomically, read without executing anything they contain.

A checkpoint is a directory of torchrl.checkpoint (JSON and raw memory-mapped tensors, no pickle) with an
``inventory.json`` of file sizes beside its manifest. It is written under a temporary name and renamed, so a directory
with its final name is whole; one that was damaged later is recognised by the inventory before anything is read.
"""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any

import torch
from tensordict import TensorDict
from torchrl.checkpoint import Checkpoint, CheckpointError, CheckpointRotation
from torchrl.data import TensorDictReplayBuffer

INVENTORY = "inventory.json"
SAFE_SUFFIXES = (".json", ".memmap")
"""All that a checkpoint may contain. tensordict would unpickle a side file of any other kind."""


class ReplayState:
    """Content and write position of a replay buffer.

    ``ReplayBuffer.dumps`` writes the whole capacity and a pickle; this is only what is filled, as raw tensors.
    """

    def __init__(self, replay_buffer: TensorDictReplayBuffer) -> None:
        self.replay_buffer = replay_buffer

    def state_dict(self) -> dict[str, Any]:
        """Nested mapping of tensors [len(replay_buffer), ...] and numbers."""
        transitions: Any = self.replay_buffer.storage[: len(self.replay_buffer)]
        return {"transitions": transitions.to_dict(), "writer": dict(self.replay_buffer.writer.state_dict())}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Restores :meth:`state_dict`: every transition at the index it had, so that the same draws sample the same."""
        self.replay_buffer.empty()
        self.replay_buffer.extend(TensorDict(state["transitions"]).auto_batch_size_(1))
        self.replay_buffer.writer.load_state_dict(state["writer"])


def save_checkpoint(
    checkpoint: Checkpoint, directory: Path, *, frames: int, keep: int, metadata: Mapping[str, Any]
) -> Path:
    """Writes ``directory/checkpoint-<frames>`` and removes all but the newest ``keep``.

    Args:
        checkpoint: the registered components.
        directory: the run's checkpoint directory.
        frames: transitions collected so far; a checkpoint that exists for this number is kept as it is.
        keep: how many to keep.
        metadata: JSON values for the manifest; ``task`` is compared on loading.

    Returns:
        Path of the checkpoint.
    """
    path = directory / f"checkpoint-{frames:012d}"
    if not path.exists():
        temporary = directory / f".{path.name}.tmp"
        shutil.rmtree(temporary, ignore_errors=True)
        checkpoint.save(temporary, metadata={**metadata, "frames": frames})
        sizes = {str(file.relative_to(temporary)): file.stat().st_size for file in _files(temporary)}
        (temporary / INVENTORY).write_text(json.dumps(sizes))
        os.replace(temporary, path)
    CheckpointRotation(directory, keep_last=keep).prune()
    return path


def load_checkpoint(
    checkpoint: Checkpoint,
    path: Path,
    *,
    task: str,
    components: Collection[str] | None = None,
    device: torch.device | None = None,
) -> None:
    """Restores components from a checkpoint directory.

    Args:
        checkpoint: the registered components, of the same shapes as when saved.
        path: the checkpoint directory.
        task: the task that the components are for.
        components: names to restore; by default all.
        device: where tensors go; by default where they were.

    Raises:
        CheckpointError: if the checkpoint is of another task, damaged, or holds anything but JSON and raw tensors.
    """
    metadata = read_metadata(path)
    if metadata.get("task") != task:
        raise CheckpointError(
            f"Checkpoint {path} is of task {metadata.get('task')!r}; expected {task!r}. Set env.task to match, or "
            "choose a checkpoint of this task."
        )
    checkpoint.load(path, components=components, map_location=device)


def read_metadata(path: Path) -> dict[str, Any]:
    """The metadata of an intact checkpoint.

    Raises:
        CheckpointError: if the checkpoint is damaged, or holds anything but JSON and raw tensors.
    """
    if not path.is_dir():
        raise CheckpointError(f"{path} is not a checkpoint; expected a directory written by nclql-train.")
    for file in _files(path):
        if file.suffix not in SAFE_SUFFIXES or file.is_symlink():
            raise CheckpointError(
                f"Checkpoint {path} contains {file.relative_to(path)}; expected only {' and '.join(SAFE_SUFFIXES)} "
                "files. It is refused, because other formats can execute code when they are read."
            )
    try:
        sizes = json.loads((path / INVENTORY).read_text())
    except (OSError, ValueError) as error:
        raise CheckpointError(
            f"Checkpoint {path} has no readable {INVENTORY}; it is damaged or no checkpoint."
        ) from error
    for name, size in sizes.items():
        file = path / name
        found = file.stat().st_size if file.is_file() else None
        if found != size:
            state = "is missing" if found is None else f"has {found} bytes"
            raise CheckpointError(
                f"Checkpoint {path} is truncated: {name} {state}; expected {size} bytes. Remove this directory to fall "
                "back to the checkpoint before it."
            )
    return Checkpoint.manifest(path)["metadata"]


def read_config(path: Path) -> dict[str, Any]:
    """The configuration stored in an intact checkpoint."""
    read_metadata(path)
    config: dict[str, Any] = {}
    Checkpoint(config=config).load(path, components=["config"])
    return config


def latest_checkpoint(directory: Path) -> Path:
    """The newest checkpoint of a run's checkpoint directory.

    Raises:
        FileNotFoundError: if there is none.
    """
    latest = CheckpointRotation(directory, keep_last=1).latest()
    if latest is None:
        raise FileNotFoundError(f"{directory} holds no checkpoint; the run stopped before it wrote its first one.")
    return latest


def _files(path: Path) -> list[Path]:
    return [file for file in sorted(path.rglob("*")) if not file.is_dir() or file.is_symlink()]
