"""Checkpoints: complete, written atomically, read without executing anything they contain.

A checkpoint is a directory of torchrl.checkpoint (JSON and archives of raw tensors, no pickle) with an
``inventory.json`` of file sizes beside its manifest. It is written under a temporary name and renamed, so a directory
with its final name is whole; one that was damaged later is recognised by the inventory before anything is read.
docs/checkpoints.md says what is in it.
"""

from __future__ import annotations

import errno
import json
import os
import shutil
import zipfile
from collections.abc import Collection, Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from torchrl.checkpoint import (
    Checkpoint,
    CheckpointError,
    CheckpointOptions,
    CheckpointRotation,
    GlobalRNGState,
    StateDictCheckpointAdapter,
)

from nclql_torchrl.training.run_directory import sync

INVENTORY = "inventory.json"
ARCHIVE = ".tdz"
SAFE_SUFFIXES = (".json", ".memmap")
"""All that a checkpoint and the archives in it may contain. tensordict would unpickle a side file of any other kind."""

REPLAY = "replay_buffer"
"""Name of the component that is written incrementally: a :class:`~nclql_torchrl.training.replay_state.ReplayState`."""

POLICY = ("config", "loss")
"""What acting needs: the components of a best checkpoint."""

BEST_METRIC = "evaluation_return"


class RandomStates(GlobalRNGState):
    """Random states of Python, NumPy and torch; of GPUs only where there are as many as when they were saved.

    So a run can go on where there is no GPU, or another number of them, with draws that it would not have made.
    """

    def load_state_dict(self, state_dict: Mapping[str, Any]) -> None:
        """Restores what fits this machine."""
        state = dict(state_dict)
        if len(state.get("torch_cuda", ())) != torch.cuda.device_count():
            state.pop("torch_cuda", None)
        super().load_state_dict(state)


def make_checkpoint(**components: Any) -> Checkpoint:
    """A checkpoint of components: JSON values, and objects with ``state_dict`` or ``dump``.

    State dicts go into archives, which are written byte after byte. TorchRL's default, memory-mapped files, would kill
    the process (SIGBUS) where the disk is full; an archive raises OSError.

    Examples:
        >>> make_checkpoint(network=torch.nn.Linear(2, 1), config={"seed": 3}).components["config"]
        {'seed': 3}
    """
    checkpoint = Checkpoint()
    for name, component in components.items():
        archived = hasattr(component, "state_dict")
        checkpoint.register(name, component, adapter=StateDictCheckpointAdapter("archive") if archived else None)
    return checkpoint


def save_checkpoint(
    checkpoint: Checkpoint, directory: Path, *, frames: int, keep: int, metadata: Mapping[str, Any]
) -> Path:
    """Writes ``directory/checkpoint-<frames>`` and removes all but the newest ``keep``.

    Args:
        checkpoint: the registered components.
        directory: the run's checkpoint directory, which nobody else writes to.
        frames: transitions collected so far.
        keep: how many to keep.
        metadata: JSON values for the manifest. ``task`` is compared on loading; if all are those of the newest
            checkpoint, there is nothing to save.

    Returns:
        Path of the checkpoint.

    Raises:
        OSError: if it cannot be written, such as on a full disk; then the directory is as it was.
    """
    rotation = CheckpointRotation(directory, keep_last=keep)
    latest, metadata = rotation.latest(), {**metadata, "frames": frames}
    if latest is not None and Checkpoint.manifest(latest)["metadata"] == metadata:
        return latest
    path = _free_path(directory / f"checkpoint-{frames:012d}")
    options = {}
    if REPLAY in checkpoint and latest is not None:
        options[REPLAY] = CheckpointOptions(save_kwargs={"previous": _component(latest, REPLAY)})
    _write(checkpoint, path, metadata=metadata, component_options=options)
    rotation.prune()
    return path


def save_best(
    checkpoint: Checkpoint, directory: Path, *, frames: int, evaluation_return: float, metadata: Mapping[str, Any]
) -> Path | None:
    """Writes ``directory/best-<frames>``, the policy alone, if no evaluation has returned as much.

    Returns:
        Path of the checkpoint, or None if there is a better one.

    Raises:
        OSError: if it cannot be written; then the directory is as it was.
    """
    rotation = _best_rotation(directory)
    best = rotation.best()
    if best is not None and Checkpoint.manifest(best)["metadata"][BEST_METRIC] >= evaluation_return:
        return None
    path = _free_path(directory / f"best-{frames:012d}")
    metadata = {**metadata, "frames": frames, BEST_METRIC: evaluation_return}
    _write(checkpoint, path, metadata=metadata, components=POLICY)
    rotation.prune()
    return path


def _free_path(path: Path) -> Path:
    """A path that is not taken by a checkpoint of the same frames, of a run that was stopped within them.

    That one stays until the new one is whole. To TorchRL a name with one more zero is the same number of frames, of
    which the newer counts.
    """
    while path.exists():
        path = path.with_name(path.name.replace("-", "-0"))
    return path


def _best_rotation(directory: Path) -> CheckpointRotation:
    """Of the policies, the one that returned most; a killed process may have left one of later frames beside it."""
    return CheckpointRotation(directory, keep_last=1, keep_best=(BEST_METRIC, "max"), prefix="best")


def _write(checkpoint: Checkpoint, path: Path, **options: Any) -> None:
    """Saves under a temporary name, and renames when everything is on the disk."""
    for leftover in path.parent.glob(".*"):
        # Of a process that was killed: whoever writes here is the only one.
        shutil.rmtree(leftover)
    temporary = path.with_name(f".{path.name}.tmp")
    try:
        checkpoint.save(temporary, **options)
        sizes = {str(file.relative_to(temporary)): file.stat().st_size for file in _files(temporary)}
        (temporary / INVENTORY).write_text(json.dumps(sizes))
        sync(temporary, *temporary.rglob("*"))
        os.replace(temporary, path)
        sync(path.parent)
    except RuntimeError as error:
        # torch, which prepares an archive's files, has no other kind of error.
        full = (os.strerror(number) for number in (errno.ENOSPC, errno.EDQUOT))
        if any(text in str(error) for text in full):
            raise OSError(str(error)) from error
        raise
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


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
    for name in _contents(path):
        if not name.endswith(SAFE_SUFFIXES):
            raise CheckpointError(
                f"Checkpoint {path} contains {name}; expected only {' and '.join(SAFE_SUFFIXES)} files, and archives "
                "of them. It is refused, because other formats can execute code when they are read."
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


def best_checkpoint(directory: Path) -> Path:
    """The policy of the best evaluation, in a run's checkpoint directory.

    Raises:
        FileNotFoundError: if there is none.
    """
    best = _best_rotation(directory).best()
    if best is None:
        raise FileNotFoundError(f"{directory} holds no best checkpoint; the run stopped before its first evaluation.")
    return best


def find_checkpoint(path: Path, best: bool = False) -> Path:
    """The checkpoint that a user means by a path.

    Args:
        path: a run directory (its newest checkpoint is taken) or a checkpoint directory.
        best: of a run directory, take the policy of the best evaluation instead.

    Raises:
        FileNotFoundError: if there is none.
    """
    if not path.exists():
        raise FileNotFoundError(
            f"checkpoint {path} does not exist; expected a run directory or one of its checkpoints."
        )
    if (path / "checkpoints").is_dir():
        return (best_checkpoint if best else latest_checkpoint)(path / "checkpoints")
    return path


def _component(path: Path, name: str) -> Path:
    """Where a checkpoint keeps a component."""
    return path / Checkpoint.manifest(path)["components"][name]["path"]


def _contents(path: Path) -> Iterator[str]:
    """Names of all files of a checkpoint, with those in its archives; of a link, what makes it unsafe."""
    for file in _files(path):
        name = str(file.relative_to(path))
        if file.is_symlink():
            yield f"{name} -> {os.readlink(file)} (a link)"
        elif file.suffix == ARCHIVE:
            try:
                with zipfile.ZipFile(file) as archive:
                    yield from (f"{name}/{member}" for member in archive.namelist())
            except zipfile.BadZipFile as error:
                raise CheckpointError(f"Checkpoint {path} is damaged: {name} is no archive ({error}).") from error
        else:
            yield name


def _files(path: Path) -> list[Path]:
    return [file for file in sorted(path.rglob("*")) if not file.is_dir() or file.is_symlink()]
