"""Replay is saved piece by piece, and every checkpoint stays what it was."""

from __future__ import annotations

from collections.abc import Iterator
from itertools import pairwise
from pathlib import Path

import pytest
import torch
from tensordict import TensorDict
from torchrl.data import LazyTensorStorage, TensorDictReplayBuffer

from nclql_torchrl.training.checkpoint import latest_checkpoint, load_checkpoint, make_checkpoint, save_checkpoint
from nclql_torchrl.training.replay_state import ReplayState

CAPACITY = 100
DEVICES = ["cpu", pytest.param("cuda", marks=[pytest.mark.gpu])]


def make_buffer(device: str = "cpu", capacity: int = CAPACITY) -> TensorDictReplayBuffer:
    return TensorDictReplayBuffer(storage=LazyTensorStorage(capacity, device=device), batch_size=4)


def extend(replay_buffer: TensorDictReplayBuffer, number: int) -> None:
    """Adds transitions that carry their number."""
    first = replay_buffer.write_count
    values = torch.arange(first, first + number)
    replay_buffer.extend(TensorDict({"x": values, "next": {"x": values + 1, "done": values % 2 == 0}}, [number]))


def dump(replay_buffer: TensorDictReplayBuffer, path: Path, previous: Path | None = None) -> Path:
    path.mkdir()
    ReplayState(replay_buffer).dump(path, previous)
    return path


def assert_equal(first: TensorDictReplayBuffer, second: TensorDictReplayBuffer) -> None:
    """Same content at the same indices, and what is written next goes to the same places."""
    for _ in range(2):
        assert len(first) == len(second) and first.write_count == second.write_count
        assert (first[:] == second[:]).all()
        for replay_buffer in (first, second):
            extend(replay_buffer, 7)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("written", [0, 5, 99, 100, 101, 205, 350])
def test_indices_and_write_position_are_kept(tmp_path: Path, device: str, written: int) -> None:
    if device == "cuda" and not torch.cuda.is_available():
        pytest.skip("needs a CUDA device")
    source, target = make_buffer(device), make_buffer(device)
    for start in range(0, written, 50):
        extend(source, min(50, written - start))
    if written == 0:
        extend(source, 1)
        source.empty()
    extend(target, 30)  # which must be gone
    ReplayState(target).load(dump(source, tmp_path / "state"))
    assert_equal(source, target)


def growing(tmp_path: Path, replay_buffer: TensorDictReplayBuffer, step: int, number: int) -> Iterator[Path]:
    """Dumps of a buffer that grows by ``step`` in between, each linked to the one before."""
    previous = None
    for index in range(number):
        extend(replay_buffer, step)
        previous = dump(replay_buffer, tmp_path / str(index), previous)
        yield previous


@pytest.mark.parametrize("step", [1, 3, 17, 40])
def test_every_state_of_a_growing_buffer_is_kept_whatever_is_written_later(tmp_path: Path, step: int) -> None:
    source, expected = make_buffer(), []
    for _ in growing(tmp_path, source, step, 12):
        expected.append((source.write_count, source[:].clone()))
    for index, (written, content) in enumerate(expected):
        target = make_buffer()
        ReplayState(target).load(tmp_path / str(index))
        assert target.write_count == written
        assert (target[:] == content).all()


def test_only_what_is_new_is_written(tmp_path: Path) -> None:
    source = make_buffer(capacity=1000)
    paths = list(growing(tmp_path, source, 50, 30))
    for before, after in pairwise(paths):
        old = {path.stat().st_ino for path in before.iterdir()}
        new = [path for path in after.glob("*.tdz") if path.stat().st_ino not in old]
        assert len(new) == 1 and new[0].stat().st_size < 10 * 50 * 17


def test_small_segments_are_joined_and_old_ones_go(tmp_path: Path) -> None:
    source = make_buffer(capacity=1000)
    paths = list(growing(tmp_path, source, 1, 60))
    # 15 transitions are a 64th of the capacity.
    assert len(list(paths[-1].glob("*.tdz"))) == 4
    extend(source, 1000)
    assert len(list(dump(source, tmp_path / "full", paths[-1]).glob("*.tdz"))) == 2


def test_a_file_system_without_links_gets_copies(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def link(source: Path, target: Path) -> None:
        raise PermissionError("no links here")

    monkeypatch.setattr("os.link", link)
    source, target = make_buffer(), make_buffer()
    *_, last = growing(tmp_path, source, 30, 5)
    ReplayState(target).load(last)
    assert_equal(source, target)


def test_another_capacity_is_refused(tmp_path: Path) -> None:
    source = make_buffer()
    extend(source, 5)
    with pytest.raises(ValueError, match="has room for 50 transitions; expected 100"):
        ReplayState(make_buffer(capacity=50)).load(dump(source, tmp_path / "state"))


def test_pruned_checkpoints_leave_what_the_kept_ones_need(tmp_path: Path) -> None:
    source, target = make_buffer(), make_buffer()
    checkpoint = make_checkpoint(replay_buffer=ReplayState(source))
    for frames in range(40, 400, 40):
        extend(source, 40)
        save_checkpoint(checkpoint, tmp_path, frames=frames, keep=2, metadata={"task": "x"})
    load_checkpoint(make_checkpoint(replay_buffer=ReplayState(target)), latest_checkpoint(tmp_path), task="x")
    assert_equal(source, target)
