"""Checkpoints hold everything, and a bad one is refused before anything of it is read."""

from __future__ import annotations

import json
import os
import pickle
import shutil
import zipfile
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torchrl.checkpoint import Checkpoint, CheckpointError

from nclql_torchrl.training import TrainConfig, train
from nclql_torchrl.training.checkpoint import (
    INVENTORY,
    RandomStates,
    best_checkpoint,
    latest_checkpoint,
    load_checkpoint,
    make_checkpoint,
    read_config,
    read_metadata,
    save_best,
    save_checkpoint,
)
from nclql_torchrl.training.evaluation import load_policy


@pytest.fixture
def saved(tmp_path: Path) -> Path:
    checkpoint = make_checkpoint(network=torch.nn.Linear(2, 1), config={"seed": 3})
    return save_checkpoint(checkpoint, tmp_path, frames=10, keep=2, metadata={"task": "Hopper-v5"})


def load(path: Path, task: str = "Hopper-v5") -> None:
    load_checkpoint(Checkpoint(network=torch.nn.Linear(2, 1)), path, task=task)


def test_it_reads_back(saved: Path) -> None:
    load(saved)
    assert read_config(saved) == {"seed": 3}


def test_another_task_is_refused(saved: Path) -> None:
    with pytest.raises(CheckpointError, match=r"is of task 'Hopper-v5'; expected 'Ant-v5'"):
        load(saved, task="Ant-v5")


def test_a_truncated_file_is_refused(saved: Path) -> None:
    file = next(saved.rglob("*.tdz"))
    size = file.stat().st_size
    file.write_bytes(file.read_bytes()[:-4])
    with pytest.raises(
        CheckpointError, match=rf"is truncated: .*state.tdz has {size - 4} bytes; expected {size} bytes"
    ):
        load(saved)


def test_an_archive_that_is_none_is_refused(saved: Path) -> None:
    file = next(saved.rglob("*.tdz"))
    file.write_bytes(bytes(file.stat().st_size))
    with pytest.raises(CheckpointError, match=r"is damaged: .*state.tdz is no archive"):
        load(saved)


@pytest.mark.parametrize("name", ["manifest.json", INVENTORY])
def test_a_missing_file_is_refused(saved: Path, name: str) -> None:
    (saved / name).unlink()
    with pytest.raises(CheckpointError, match=name):
        load(saved)


@pytest.mark.parametrize("place", ["beside the archive", "in the archive", "in place of the archive", "linked"])
def test_a_pickle_is_refused_unread(saved: Path, tmp_path: Path, place: str) -> None:
    class Malicious:
        def __reduce__(self) -> tuple[Callable[..., object], tuple[object, ...]]:
            return Path.touch, (tmp_path / "executed",)

    # Where TorchRL and tensordict would look for such data, announced as they would announce it.
    archive = next(saved.rglob("*.tdz"))
    pickled = pickle.dumps(Malicious())
    if place == "beside the archive":
        (archive.parent / "other.pickle").write_bytes(pickled)
    elif place == "in the archive":
        with zipfile.ZipFile(archive, "a") as file:
            file.writestr("other.pickle", pickled)
    elif place == "in place of the archive":
        archive.rename(archive.with_suffix(".pt")).write_bytes(pickled)
    else:
        (tmp_path / "elsewhere.json").write_bytes(pickled)
        (archive.parent / "state.json").unlink()
        (archive.parent / "state.json").symlink_to(tmp_path / "elsewhere.json")
    files = [path for path in saved.rglob("*") if path.is_file() and path.name != INVENTORY]
    sizes = {str(path.relative_to(saved)): path.stat().st_size for path in files}
    (saved / INVENTORY).write_text(json.dumps(sizes))
    with pytest.raises(CheckpointError, match=r"contains .*(other.pickle|state.pt|a link).*can execute code"):
        load(saved)
    assert not (tmp_path / "executed").exists()


def test_a_pickle_file_as_checkpoint_is_refused_unread(tmp_path: Path) -> None:
    path = tmp_path / "checkpoint.pt"
    torch.save({"network": 1}, path)
    with pytest.raises(CheckpointError, match="expected a directory"):
        load(path)


def test_a_symbolic_link_is_refused(saved: Path) -> None:
    (saved / "link.json").symlink_to("/etc/hostname")
    with pytest.raises(CheckpointError, match=r"link.json"):
        load(saved)


def test_random_states_of_gpus_that_are_not_here_are_left_out() -> None:
    states = RandomStates()
    saved = states.state_dict()
    drawn = torch.rand(3)
    gpus = [torch.zeros(16, dtype=torch.uint8)] * (torch.cuda.device_count() + 1)
    states.load_state_dict({**saved, "torch_cuda": gpus})
    assert torch.equal(torch.rand(3), drawn)


def test_only_the_newest_are_kept(tmp_path: Path) -> None:
    checkpoint = Checkpoint(config={"seed": 3})
    for frames in (10, 20, 30):
        save_checkpoint(checkpoint, tmp_path, frames=frames, keep=2, metadata={"task": "x"})
    assert sorted(path.name for path in tmp_path.iterdir()) == ["checkpoint-000000000020", "checkpoint-000000000030"]
    assert latest_checkpoint(tmp_path).name == "checkpoint-000000000030"


def test_the_best_policy_is_kept_whatever_comes_later(tmp_path: Path) -> None:
    checkpoint = make_checkpoint(loss=torch.nn.Linear(2, 1), config={"seed": 3}, progress={"frames": 0})
    with pytest.raises(FileNotFoundError, match="holds no best checkpoint"):
        best_checkpoint(tmp_path)
    for frames, evaluation_return in ((10, -5.0), (20, 3.0), (30, 3.0), (40, -1.0)):
        save_best(
            checkpoint, tmp_path, frames=frames, evaluation_return=evaluation_return, metadata={"task": "Hopper-v5"}
        )
        save_checkpoint(checkpoint, tmp_path, frames=frames, keep=1, metadata={"task": "Hopper-v5"})
    assert sorted(path.name for path in tmp_path.iterdir()) == ["best-000000000020", "checkpoint-000000000040"]
    assert best_checkpoint(tmp_path).name == "best-000000000020"
    assert read_metadata(best_checkpoint(tmp_path))["evaluation_return"] == 3.0
    # The policy alone: nobody resumes from it.
    assert sorted(Checkpoint.manifest(best_checkpoint(tmp_path))["components"]) == ["config", "loss"]


@pytest.mark.parametrize("left_over", [10, 20], ids=["of the same frames", "of later frames"])
def test_a_better_policy_replaces_that_of_a_run_that_was_killed(tmp_path: Path, left_over: int) -> None:
    def save(frames: int, evaluation_return: float, network: torch.nn.Module) -> Path | None:
        checkpoint = make_checkpoint(loss=network, config={"seed": 3})
        options = {"frames": frames, "evaluation_return": evaluation_return, "metadata": {"task": "Hopper-v5"}}
        return save_best(checkpoint, tmp_path, **options)

    worse, better, restored = (torch.nn.Linear(2, 1) for _ in range(3))
    save(left_over, 3.0, worse)
    assert save(10, 3.0, better) is None
    path = save(10, 4.0, better)
    assert path == best_checkpoint(tmp_path)
    load_checkpoint(make_checkpoint(loss=restored), best_checkpoint(tmp_path), task="Hopper-v5")
    assert torch.equal(restored.weight, better.weight)
    # The next of later frames is alone again.
    assert save(30, 5.0, better) is not None
    assert [path.name for path in tmp_path.iterdir()] == ["best-000000000030"]


def test_a_checkpoint_and_the_rows_it_counts_are_on_the_disk_before_it_has_its_name(
    tiny_config: Callable[..., TrainConfig], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    synced: set[str] = set()
    renamed: list[str] = []
    replace = os.replace

    def synchronize(descriptor: int) -> None:
        synced.add(os.readlink(f"/proc/self/fd/{descriptor}"))

    def rename(source: Path, target: Path) -> None:
        if target.name.startswith("checkpoint-"):
            needed = {str(path) for path in (source, *source.rglob("*"), tmp_path / "run" / "metrics.csv")}
            assert needed <= synced, needed - synced
            synced.clear()
            renamed.append(target.name)
        replace(source, target)

    monkeypatch.setattr(os, "fsync", synchronize)
    monkeypatch.setattr(os, "replace", rename)
    train(tiny_config("collector.total_frames=100", "logger.eval_interval=1000"))
    assert len(renamed) >= 3


def test_what_killed_processes_left_is_removed(saved: Path) -> None:
    for name in (".checkpoint-000000000020.tmp", "..checkpoint-000000000020.tmp.stage-1"):
        shutil.copytree(saved, saved.with_name(name))
    checkpoint = make_checkpoint(network=torch.nn.Linear(2, 1))
    save_checkpoint(checkpoint, saved.parent, frames=30, keep=2, metadata={"task": "Hopper-v5"})
    assert sorted(path.name for path in saved.parent.iterdir()) == [saved.name, "checkpoint-000000000030"]


def test_a_checkpoint_that_was_interrupted_while_written_does_not_count(saved: Path) -> None:
    half = saved.with_name(".checkpoint-000000000020.tmp")
    shutil.copytree(saved, half)
    assert latest_checkpoint(saved.parent) == saved


def test_no_checkpoint_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match="holds no checkpoint"):
        latest_checkpoint(tmp_path)


def test_a_run_continued_in_another_tasks_checkpoint_is_refused(
    tiny_config: Callable[..., TrainConfig], tmp_path: Path
) -> None:
    config = tiny_config("collector.total_frames=60")
    train(config)
    manifest = latest_checkpoint(tmp_path / "run" / "checkpoints") / "manifest.json"
    content = manifest.read_text()
    changed = content.replace("Pendulum-v1", "Pendulum-v9")
    manifest.write_text(changed)
    config.resume = config.run_dir
    with pytest.raises(CheckpointError, match=r"is of task 'Pendulum-v9'; expected 'Pendulum-v1'"):
        train(config)


def test_the_policy_alone_is_loaded_from_a_run_or_a_checkpoint(
    tiny_config: Callable[..., TrainConfig], tmp_path: Path
) -> None:
    train(tiny_config("collector.total_frames=60"))
    device = torch.device("cpu")
    config, actor = load_policy(tmp_path / "run", device)
    assert config.env.task == "Pendulum-v1"
    _, best = load_policy(tmp_path / "run", device, best=True)
    assert all(torch.equal(*pair) for pair in zip(actor.parameters(), best.parameters(), strict=True))
    _, same = load_policy(latest_checkpoint(tmp_path / "run" / "checkpoints"), device)
    for first, second in zip(actor.parameters(), same.parameters(), strict=True):
        assert torch.equal(first, second)
    with pytest.raises(FileNotFoundError, match="does not exist"):
        load_policy(tmp_path / "nowhere", device)
