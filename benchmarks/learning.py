"""Does it learn, and against whom: one algorithm on one task with one seed, or with Hydra's ``-m`` a grid of them.

``python -m benchmarks.learning -m algorithm=nclql,sac task=Pendulum-v1 seed=0,1,2`` appends a JSON line per finished
run to ``benchmarks/results/learning/TASK.jsonl`` and skips the runs that are there already, so a grid that was stopped
is continued by the same command. ``python -m benchmarks.learning_figures`` draws them. Every algorithm has the same
loop, environments, budget, network sizes, batches and evaluation: :func:`run`.

``conf/algorithm`` and ``conf/task`` hold what is compared. Other settings: ``algorithm.name=w50
+algorithm.options.sampler.w=50``, where the name is what the figures call it.
"""

from __future__ import annotations

import json
import logging
import math
import os
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, cast

import hydra
import torch
from hydra.core.config_store import ConfigStore
from omegaconf import DictConfig, OmegaConf
from tensordict import TensorDict
from torchrl.collectors import Collector
from torchrl.data import Bounded, LazyTensorStorage, TensorDictReplayBuffer
from torchrl.envs import EnvBase
from torchrl.envs.utils import ExplorationType, set_exploration_type

from benchmarks.baselines.algorithm import Algorithm, Problem
from benchmarks.baselines.crossq import make_crossq
from benchmarks.baselines.langevin import make_langevin
from benchmarks.baselines.qsm import make_qsm
from benchmarks.baselines.quantiles import make_quantiles
from benchmarks.baselines.sac import make_sac
from benchmarks.baselines.sql import make_sql
from benchmarks.baselines.td3 import make_td3
from envs import make_env
from nclql_torchrl.actor import LangevinActor
from nclql_torchrl.machine import describe_machine
from nclql_torchrl.training.config import choose
from nclql_torchrl.training.evaluation import SEED_OFFSET, evaluate_in

FAMILIES: dict[str, Callable[..., Algorithm]] = {
    "langevin": make_langevin,
    "quantiles": make_quantiles,
    "crossq": make_crossq,
    "sac": make_sac,
    "td3": make_td3,
    "sql": make_sql,
    "qsm": make_qsm,
}
RESULTS = Path(__file__).parent / "results" / "learning"
WARM_UP_UPDATES = 2
"""The first updates compile and allocate; they are on a clock of their own."""
TIMED_CALLS = 100
"""Of an actor. The fastest counts: the first calls compile, and other processes on the machine only ever add."""


@dataclass
class AlgorithmConfig:
    """What learns."""

    name: str = "nclql"
    """What the results call it."""
    family: str = "langevin"
    """Which maker of :data:`FAMILIES` makes it."""
    options: dict[str, Any] = field(default_factory=dict)
    """Keyword arguments of the maker."""


@dataclass
class TaskConfig:
    """What is learned, how long, and how it is evaluated; lengths in transitions over all environments."""

    name: str = "Pendulum-v1"
    engine: str = "mujoco"
    """Engine of the training environments; evaluations run on Gymnasium's own."""
    num_envs: int = 1
    total_frames: int = 5_000
    init_random_frames: int = 1_000
    """Uniformly random actions, and no updates, before learning starts."""
    utd_ratio: float = 1.0
    """Updates per transition after the random ones."""
    hidden_sizes: list[int] = field(default_factory=lambda: [256, 256, 256])
    batch_size: int = 256
    gamma: float = 0.99
    tau: float = 0.005
    eval_interval: int = 1_000
    eval_episodes: int = 10


@dataclass
class LearningConfig:
    """One run."""

    algorithm: AlgorithmConfig = field(default_factory=AlgorithmConfig)
    task: TaskConfig = field(default_factory=TaskConfig)
    seed: int = 0
    output: str | None = None
    """JSON lines to append to; null: ``benchmarks/results/learning/TASK.jsonl``."""


class Stopwatch:
    """Seconds spent in its ``with`` blocks, of the clock on the wall and of this process's CPU time."""

    def __init__(self) -> None:
        self.wall = self.cpu = 0.0

    @contextmanager
    def __call__(self) -> Iterator[None]:
        """Adds the length of the block."""
        wall, cpu = time.perf_counter(), time.process_time()
        yield
        self.wall += time.perf_counter() - wall
        self.cpu += time.process_time() - cpu


def run(config: LearningConfig) -> tuple[dict[str, Any], Algorithm]:
    """Trains once.

    Args:
        config: algorithm, task and seed.

    Returns:
        The run's record and what it trained. The record is JSON values; its ``curve`` has a point for each evaluation,
        whose seconds count collecting and learning, not evaluations and not the warm-up (the first two updates and the
        actions before them, which compile).

    Raises:
        ValueError: for a family or an option that does not exist.
        FloatingPointError: when an update is no longer finite.
    """
    choose("algorithm.family", config.algorithm.family, tuple(FAMILIES))
    torch.manual_seed(config.seed)
    task = config.task
    # One thread simulates: CPU seconds are to mean the same for every algorithm.
    env = make_env(
        task.name,
        task.num_envs,
        engine=task.engine,
        seed=config.seed,
        engine_options={"num_threads": 1} if task.engine == "mujoco" else {},
    )
    problem = make_problem(task, env)
    algorithm = FAMILIES[config.algorithm.family](problem, **config.algorithm.options)
    collector = Collector(
        env,
        algorithm.actor,
        frames_per_batch=task.num_envs,
        total_frames=-1,
        init_random_frames=task.init_random_frames,
        track_traj_ids=False,
        # No actor here carries anything from step to step.
        auto_register_policy_transforms=False,
    )
    replay_buffer = TensorDictReplayBuffer(storage=LazyTensorStorage(task.total_frames), batch_size=task.batch_size)

    training, learning, warm_up = Stopwatch(), Stopwatch(), Stopwatch()
    curve: list[dict[str, float]] = []
    frames = updates = 0
    metrics = TensorDict()
    batches = iter(collector)
    while frames < task.total_frames:
        warm = updates >= WARM_UP_UPDATES or frames < task.init_random_frames
        with training() if warm else warm_up():
            # Collect one step of every environment: random at first, then the actor that is being trained.
            batch = next(batches)
            transitions = algorithm.transitions(batch)
            if len(transitions):
                replay_buffer.extend(transitions)
            frames += batch.numel()
            # Learn: utd_ratio updates per transition after the random ones.
            due = math.floor(task.utd_ratio * max(0, frames - task.init_random_frames) + 1e-9)
            samples = [replay_buffer.sample() for _ in range(due - updates)]
            with learning() if warm else Stopwatch()():
                for sample in samples:
                    metrics = algorithm.update(sample)
            updates = due
            collector.update_policy_weights_()

        # Evaluate, on a clock of its own.
        if frames % task.eval_interval < task.num_envs and updates > 0:
            if not all(math.isfinite(value) for value in metrics.to_dict().values()):
                raise FloatingPointError(f"{config.algorithm.name} on {task.name} diverged before frame {frames}.")
            point = {"frames": frames, "updates": updates, "wall_seconds": training.wall, "cpu_seconds": training.cpu}
            curve.append(point | evaluate(config, algorithm))
    collector.shutdown()
    measured_updates = updates - WARM_UP_UPDATES
    record = {
        "config": identity(config),
        "curve": curve,
        "evaluation": f"{task.eval_episodes} whole episodes, deterministic actions, Gymnasium's {task.name}",
        "parameters": algorithm.num_parameters,
        "action_milliseconds": {str(states): time_action(algorithm, problem, states) for states in (1, 256)},
        "updates_per_second": measured_updates / learning.wall,
        "updates_per_cpu_second": measured_updates / learning.cpu,
        "warm_up_seconds": warm_up.wall,
        "machine": describe_machine(("torch", "torchrl", "tensordict", "gymnasium", "mujoco", "numpy")),
    }
    return record, algorithm


def make_problem(task: TaskConfig, env: EnvBase) -> Problem:
    """Sizes and bounds of an environment, with the task's networks and discount."""
    spec = env.action_spec_unbatched
    assert isinstance(spec, Bounded)
    (observation_dim,) = env.observation_spec_unbatched["observation"].shape
    return Problem(observation_dim, spec, tuple(task.hidden_sizes), task.gamma, task.tau)


def evaluate(config: LearningConfig, algorithm: Algorithm) -> dict[str, float]:
    """Plays episodes on Gymnasium's own environment without touching the run's random state.

    Returns:
        Mean and standard deviation of the return, and the critic's estimate, the discounted return obtained and their
        difference ``overestimation``, all three in units of the task's reward.
    """
    task = config.task
    env = make_env(task.name, task.eval_episodes, engine="gymnasium", seed=config.seed + SEED_OFFSET)
    # It reads the action and "q_after", whoever writes them.
    actor = cast(LangevinActor, algorithm.evaluator)
    with torch.random.fork_rng(devices=[]):
        evaluation = evaluate_in(actor, env, gamma=task.gamma, reward_scale=algorithm.reward_scale)
    env.close()
    return {
        "return_mean": evaluation.mean,
        "return_std": evaluation.std,
        "episode_length": evaluation.mean_length,
        "estimated_q": evaluation.estimated_q / algorithm.reward_scale,
        "discounted_return": evaluation.discounted_return / algorithm.reward_scale,
        "overestimation": evaluation.overestimation / algorithm.reward_scale,
    }


@torch.no_grad()
def time_action(algorithm: Algorithm, problem: Problem, num_states: int) -> float:
    """Milliseconds of a call of the exploring actor: the fastest of :data:`TIMED_CALLS`."""
    observation = TensorDict({"observation": torch.randn(num_states, problem.observation_dim)}, [num_states])
    milliseconds = []
    with torch.random.fork_rng(devices=[]), set_exploration_type(ExplorationType.RANDOM):
        for _ in range(TIMED_CALLS):
            inputs = observation.copy()
            start = time.perf_counter()
            algorithm.actor(inputs)
            milliseconds.append((time.perf_counter() - start) * 1e3)
    return min(milliseconds)


def identity(config: LearningConfig) -> dict[str, Any]:
    """What makes two runs the same run: the configuration without where the record goes."""
    values = asdict(config)
    del values["output"]
    return json.loads(json.dumps(values))


def read_records(path: Path) -> list[dict[str, Any]]:
    """The finished runs of a file of JSON lines; none where there is no file."""
    return [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []


def append_record(path: Path, record: dict[str, Any]) -> None:
    """Adds a line in one write, so that runs that finish at the same time do not mix theirs."""
    path.parent.mkdir(parents=True, exist_ok=True)
    line = json.dumps(record) + "\n"
    descriptor = os.open(path, os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o644)
    try:
        os.write(descriptor, line.encode())
    finally:
        os.close(descriptor)


def run_once(config: LearningConfig) -> None:
    """Runs, and appends the record, unless the file has this run already."""
    path = Path(config.output) if config.output else RESULTS / f"{config.task.name}.jsonl"
    label = f"{config.algorithm.name} on {config.task.name}, seed {config.seed}"
    if any(record["config"] == identity(config) for record in read_records(path)):
        print(f"{label}: already in {path}", flush=True)
        return
    record, _ = run(config)
    append_record(path, record)
    last = record["curve"][-1]
    print(
        f"{label}: return {last['return_mean']:.1f} after {last['frames']} frames, {last['cpu_seconds']:.0f} CPU s",
        flush=True,
    )


ConfigStore.instance().store(name="learning_schema", node=LearningConfig)
ConfigStore.instance().store(group="algorithm", name="schema", node=AlgorithmConfig)
ConfigStore.instance().store(group="task", name="schema", node=TaskConfig)


def main() -> None:
    """Entry point of ``python -m benchmarks.learning``."""
    torch.set_num_threads(1)
    logging.getLogger("torchrl").setLevel(logging.WARNING)
    _hydra_main()


@hydra.main(version_base="1.3", config_path="conf", config_name="learning")
def _hydra_main(composed: DictConfig) -> None:
    config = OmegaConf.to_object(composed)
    assert isinstance(config, LearningConfig)
    try:
        run_once(config)
    except (ValueError, FloatingPointError) as error:
        sys.exit(f"benchmarks.learning: {error}")


if __name__ == "__main__":
    main()
