"""What can go wrong in a day, done to real runs."""

from __future__ import annotations

import ctypes
import multiprocessing
import multiprocessing.process
import os
import random
import re
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path

import pytest
import torch
from torchrl.record.loggers import CSVLogger

from envs import make_env
from nclql_torchrl.training import RunDirectory, TrainConfig, loggers, memory, train, training
from nclql_torchrl.training.checkpoint import latest_checkpoint
from nclql_torchrl.training.config import ConfigError, load_config
from nclql_torchrl.training.interruption import StopRequest
from tests.conftest import TINY
from tests.training.runs import assert_same_run

ROOT = Path(__file__).parents[2]
ENVIRONMENT = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": os.pathsep.join([str(ROOT), *sys.path])}
ENDLESS = "collector.total_frames=1000000"


def start(*arguments: str, errors: Path, environment: Mapping[str, str] = ENVIRONMENT) -> subprocess.Popen[bytes]:
    """Starts nclql-train; what it says goes to a file."""
    command = [sys.executable, "-m", "nclql_torchrl.commands.train", *arguments]
    with errors.open("ab") as file:
        return subprocess.Popen(command, env=environment, stdout=subprocess.DEVNULL, stderr=file)


def wait_for(condition: Callable[[], object], process: subprocess.Popen[bytes], seconds: float = 120) -> None:
    """Waits until something is true, while the process lives."""
    deadline = time.monotonic() + seconds
    while not condition():
        assert process.poll() is None and time.monotonic() < deadline
        time.sleep(0.02)


def checkpoints(run_dir: Path) -> list[str]:
    """Names of the whole checkpoints, oldest first."""
    return sorted(path.name for path in (run_dir / "checkpoints").glob("checkpoint-*"))


# Kill -9, twenty times. A server that has imported everything forks a process for each life of the run.

KILLED = (
    "env.num_envs=2", "collector.total_frames=1500", "collector.init_random_frames=40", "optim.utd_ratio=0.1",
    "sampler.num_levels=1", "network.num_critics=1", "logger.log_interval=50", "logger.eval_interval=750",
    "logger.eval_episodes=1", "logger.backend=csv", "checkpoint.interval=20",
)  # fmt: skip


def live(run_dir: str, resume: bool) -> None:
    """A process's life."""
    for stream in (sys.stdout, sys.stderr):
        os.dup2(os.open(os.devnull, os.O_WRONLY), stream.fileno())
    torch.set_num_threads(1)
    config = load_config({}, [*TINY, *KILLED, f"run_dir={run_dir}"])
    config.resume = run_dir if resume else None
    train(config)


def kill(process: multiprocessing.process.BaseProcess, run_dir: Path, when: str, interval: float) -> bool:
    """Kills a process at a random moment; returns whether it was writing a checkpoint."""

    def written() -> int:
        return max((int(name.split("-")[1]) for name in checkpoints(run_dir)), default=0)

    def writing() -> bool:
        return any((run_dir / "checkpoints").glob(".*checkpoint-*"))

    start, before = time.monotonic(), written()
    if when == "starting":
        # A life begins with reading the run and making its parts.
        time.sleep(random.uniform(0.0, 0.5))
    while when != "starting" and process.is_alive():
        if written() > before and (when == "running" or writing()):
            break
        assert time.monotonic() < start + 60
        time.sleep(0.0005)
    if when == "running":
        time.sleep(random.uniform(0.0, interval))
    elif when == "writing":
        time.sleep(random.uniform(0.0, 0.02))
    process.kill()
    process.join()
    assert process.exitcode == -signal.SIGKILL, "the run was over before it was killed"
    return writing()


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_a_run_killed_twenty_times_ends_as_if_nothing_had_happened(tmp_path: Path) -> None:
    random.seed(0)
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["tests.training.test_faults", "nclql_torchrl.training"])
    whole, parts = tmp_path / "whole", tmp_path / "parts"
    process = context.Process(target=live, args=(str(whole), False))
    process.start()
    while len(checkpoints(whole)) < 2:
        time.sleep(0.01)
    begin, first = time.monotonic(), int(checkpoints(whole)[-1].split("-")[1])
    process.join()
    interval = (time.monotonic() - begin) / ((1500 - first) / 20)

    killed_while_writing = 0
    for life in range(20):
        process = context.Process(target=live, args=(str(parts), (parts / "config.yaml").exists()))
        process.start()
        killed_while_writing += kill(process, parts, ("running", "writing", "starting")[life % 3], interval)
    assert killed_while_writing >= 3
    process = context.Process(target=live, args=(str(parts), True))
    process.start()
    process.join()
    assert process.exitcode == 0
    assert_same_run(parts, whole)
    for path in (whole / "logs" / "whole" / "scalars").glob("*.csv"):
        if path.stem not in ("wall_time", "frames_per_second", "updates_per_second"):
            assert (parts / "logs" / "parts" / "scalars" / path.name).read_text() == path.read_text()
    # Nothing is left of the checkpoints that were not finished.
    assert not list((parts / "checkpoints").glob(".*"))


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A file system of four megabytes."""
    path = tmp_path / "disk"
    path.mkdir()
    mounted = subprocess.run(["mount", "-t", "tmpfs", "-o", "size=4m", "tmpfs", path], capture_output=True, check=False)
    if mounted.returncode != 0:
        pytest.skip(f"needs to mount a small file system: {mounted.stderr.decode().strip()}")
    yield path
    subprocess.run(["umount", "--lazy", path], check=True)


def test_a_full_disk_costs_checkpoints_but_not_the_run(small_disk: Path, tmp_path: Path) -> None:
    run_dir, errors, filler = small_disk / "run", tmp_path / "errors", small_disk / "filler"
    options = ("logger.eval_interval=1000000", "checkpoint.interval=30", "logger.log_interval=10")
    process = start(*TINY, *options, ENDLESS, f"run_dir={run_dir}", errors=errors)
    try:
        wait_for(lambda: len(checkpoints(run_dir)) >= 2, process)
        with filler.open("wb", buffering=0) as file, pytest.raises(OSError, match="No space left"):
            while True:
                file.write(bytes(1024))
        wait_for(lambda: errors.read_text().count("No space left on device") >= 3, process)
        kept = checkpoints(run_dir)[-1]
        assert f"the last one is {run_dir / 'checkpoints' / kept}" in errors.read_text()
        filler.unlink()
        wait_for(lambda: checkpoints(run_dir)[-1] > kept, process)
        process.terminate()
        assert process.wait(60) == 143
    finally:
        process.kill()
    frames = [int(row["frames"]) for row in RunDirectory.open(run_dir).read_metrics()]
    assert frames == list(range(10, frames[-1] + 1, 10))
    with RunDirectory.open(run_dir) as run:
        run.lock()  # nothing else is wrong with it
    latest_checkpoint(run_dir / "checkpoints")


def test_a_second_run_is_refused_until_the_first_is_dead(tmp_path: Path) -> None:
    run_dir, errors = tmp_path / "run", tmp_path / "errors"
    first = start(*TINY, ENDLESS, f"run_dir={run_dir}", errors=errors)
    try:
        wait_for(lambda: checkpoints(run_dir), first)
        second = start(f"resume={run_dir}", errors=errors)
        assert second.wait(120) == 1
        assert f"is in use by process {first.pid} on" in errors.read_text()
        assert first.poll() is None
        with pytest.raises(BlockingIOError, match="is in use by process"):
            RunDirectory.open(run_dir).lock()
    finally:
        first.kill()
    first.wait()
    with RunDirectory.open(run_dir) as run:
        run.lock()


def test_two_processes_cannot_make_the_same_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    config = TrainConfig(run_dir=str(tmp_path / "run"))
    with RunDirectory.create(config), pytest.raises(FileExistsError, match="already holds a run"):
        RunDirectory.create(config)
    (tmp_path / "run" / "config.yaml").unlink()
    for path in (tmp_path / "run").iterdir():
        path.rmdir() if path.is_dir() else path.unlink()
    # The one that was quicker has not written its config.yaml yet.
    other = RunDirectory(tmp_path / "run")
    other._acquire()
    with pytest.raises(BlockingIOError, match="is in use by process"):
        RunDirectory.create(config)


def test_a_run_that_was_killed_before_its_first_checkpoint_begins_anew(
    tiny_config: Callable[..., TrainConfig], tmp_path: Path
) -> None:
    config = tiny_config("collector.total_frames=60")
    train(config)
    config.run_dir = str(tmp_path / "killed")
    run = RunDirectory(tmp_path / "killed")
    run.path.mkdir()
    run.write_config(config)
    config.resume = config.run_dir
    train(config)
    assert_same_run(tmp_path / "killed", tmp_path / "run")


@pytest.mark.slow
def test_sigterm_ends_an_evaluation_at_once(tmp_path: Path) -> None:
    # 300 simulations of 200 steps take much longer than it may take to stop.
    errors, options = tmp_path / "errors", ("logger.eval_interval=50", "logger.eval_episodes=300")
    process = start(*TINY, *options, f"run_dir={tmp_path / 'run'}", errors=errors)
    try:
        wait_for(lambda: checkpoints(tmp_path / "run"), process)
        time.sleep(2.0)
        process.terminate()
        begin = time.monotonic()
        assert process.wait(30) == 143
        assert time.monotonic() - begin < 15
    finally:
        process.kill()
    assert checkpoints(tmp_path / "run")[-1] == "checkpoint-000000000050"
    assert "Stopped after 50 frames" in errors.read_text()


def test_sigterm_ends_what_reaches_no_safe_point() -> None:
    # A long call into C, as a compilation is one: Python's signal handlers wait for its end.
    program = (
        "import hashlib, threading, os, signal\n"
        "from nclql_torchrl.training.interruption import StopRequest\n"
        "with StopRequest(grace=0.5):\n"
        "    threading.Timer(0.5, os.kill, (os.getpid(), signal.SIGTERM)).start()\n"
        "    hashlib.pbkdf2_hmac('sha256', b'password', b'salt', 2_000_000_000)\n"
    )
    command = [sys.executable, "-c", program]
    result = subprocess.run(command, env=ENVIRONMENT, capture_output=True, text=True, timeout=60, check=False)
    assert result.returncode == 143
    assert "No safe point within 0 s of SIGTERM; the last checkpoint is kept." in result.stderr


def test_a_stop_request_leaves_no_thread_and_no_file_behind() -> None:
    before = len(os.listdir("/proc/self/fd"))
    for _ in range(3):
        with StopRequest(grace=0.01) as stop:
            os.kill(os.getpid(), signal.SIGTERM)
            assert stop.signal_number == signal.SIGTERM
    assert len(os.listdir("/proc/self/fd")) == before


def test_a_logger_that_fails_stops_nothing_and_is_mentioned_once(
    tiny_config: Callable[..., TrainConfig],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    class Unreachable(CSVLogger):
        def log_metrics(self, *args: object, **kwargs: object) -> None:
            raise ConnectionError("service unreachable")

    monkeypatch.setattr(loggers, "get_logger", lambda *args, **kwargs: Unreachable("x", str(tmp_path / "x")))
    train(tiny_config("logger.backend=csv", "logger.eval_interval=1000"))
    assert len(RunDirectory.open(tmp_path / "run").read_metrics()) == 5
    assert capsys.readouterr().err.count("The logger csv failed (ConnectionError: service unreachable)") == 1


def test_a_replay_buffer_that_does_not_fit_is_refused(tiny_config: Callable[..., TrainConfig], tmp_path: Path) -> None:
    # Pendulum-v1: 3 + 1 + 3 numbers, a reward, two flags, the index.
    message = (
        r"is 1,000,000,000,000: transitions of 42 bytes make that 39115.5 GiB, and .* are free on cpu; expected at"
    )
    with pytest.raises(ConfigError, match=message):
        train(tiny_config("replay_buffer.size=1000000000000"))
    assert not (tmp_path / "run").exists()


def test_learners_of_one_machine_share_its_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    env = make_env("Pendulum-v1", 2)
    each = memory.transition_bytes(env, ["observation"])
    assert each == 3 * 4 + 8
    monkeypatch.setattr(memory, "free_memory", lambda device: 150 * each)
    memory.check_replay_fits(100, env, ["observation"], torch.device("cpu"))
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "2")
    with pytest.raises(ConfigError, match="expected at most 75"):
        memory.check_replay_fits(100, env, ["observation"], torch.device("cpu"))


@pytest.mark.slow
@pytest.mark.skipif(shutil.which("c++") is None, reason="needs a C++ compiler")
def test_sigterm_ends_a_compilation_in_time(tmp_path: Path) -> None:
    errors, cache = tmp_path / "errors", tmp_path / "cache"
    environment = {**ENVIRONMENT, "TORCHINDUCTOR_CACHE_DIR": str(cache)}
    options = ("sampler.execution=compile", f"run_dir={tmp_path / 'run'}")
    process = start(*TINY, *options, errors=errors, environment=environment)
    try:
        wait_for(lambda: cache.exists() and any(cache.iterdir()), process)
        process.terminate()
        begin = time.monotonic()
        assert process.wait(40) == 143
        assert time.monotonic() - begin < 30
    finally:
        process.kill()
    assert re.search(r"Stopped|No safe point within 25 s", errors.read_text())


LEAK_LIMIT = 4 * 2**20
"""Bytes in 250 vector steps and 150 updates."""


class Mallinfo(ctypes.Structure):
    """glibc's ``struct mallinfo2``."""

    _fields_ = tuple(
        (name, ctypes.c_size_t)
        for name in [
            "arena",
            "ordblks",
            "smblks",
            "hblks",
            "hblkhd",
            "usmblks",
            "fsmblks",
            "uordblks",
            "fordblks",
            "keepcost",
        ]
    )


def allocated_bytes() -> int:
    """What malloc has handed out in this process. Resident memory would not do: ``make`` has glibc keep what is freed,
    and a leak would be served from what the tests before have left."""
    mallinfo = ctypes.CDLL("libc.so.6").mallinfo2
    mallinfo.restype = Mallinfo
    found = mallinfo()
    return found.uordblks + found.hblkhd


@pytest.mark.parametrize("leaked", [0, 2**16], ids=["as it is", "with a leak"])
def test_a_gross_leak_of_memory_is_noticed(
    tiny_config: Callable[..., TrainConfig], monkeypatch: pytest.MonkeyPatch, leaked: int
) -> None:
    # benchmarks/memory.py looks closer, for much longer.
    allocated: dict[int, int] = {}
    kept: list[torch.Tensor] = []
    due = training.updates_due

    def due_and_look(config: TrainConfig, frames: int) -> int:
        allocated[frames] = allocated_bytes()
        kept.append(torch.ones(leaked, dtype=torch.uint8))
        return due(config, frames)

    monkeypatch.setattr(training, "updates_due", due_and_look)
    train(tiny_config("collector.total_frames=900", "logger.eval_interval=1000", "checkpoint.interval=50"))
    growth = allocated[900] - allocated[400]
    assert (growth > LEAK_LIMIT) == (leaked > 0), f"{growth / 2**20:.1f} MiB"
