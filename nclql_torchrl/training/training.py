"""The training run, from top to bottom."""

from __future__ import annotations

import math
import random
import sys
import time
from collections.abc import Mapping
from dataclasses import asdict
from fractions import Fraction
from pathlib import Path
from typing import Any

import numpy as np
import torch
from tensordict import TensorDictBase
from torchrl.checkpoint import Checkpoint, GlobalRNGState
from torchrl.data import TensorDictReplayBuffer
from torchrl.envs.utils import ExplorationType, set_exploration_type
from torchrl.record.loggers import Logger, get_logger
from tqdm import tqdm

from nclql_torchrl.actor import LangevinActor
from nclql_torchrl.training.checkpoint import (
    ReplayState,
    latest_checkpoint,
    load_checkpoint,
    save_checkpoint,
)
from nclql_torchrl.training.collection import collector_state, make_collector, shutting_down
from nclql_torchrl.training.components import (
    make_actor,
    make_device,
    make_loss,
    make_replay_buffer,
    make_temperature,
    make_train_env,
    make_update,
    sample,
)
from nclql_torchrl.training.config import TrainConfig, validate
from nclql_torchrl.training.evaluation import SEED_OFFSET, Evaluation, evaluate
from nclql_torchrl.training.interruption import Interrupted, StopRequest
from nclql_torchrl.training.metrics import MetricsWindow
from nclql_torchrl.training.run_directory import RunDirectory

TEMPERATURE_INTERVAL = 10
"""Updates between two corrections of w: the critics change little in between, and chains are what costs."""


class TrainingError(RuntimeError):
    """The run cannot go on; its last checkpoint is kept."""


def train(config: TrainConfig) -> dict[str, Any]:
    """Trains NC-LQL as configured, or continues the run that ``config.resume`` names.

    Args:
        config: the whole configuration; with ``resume``, that of the run being continued.

    Returns:
        The content of summary.json, with ``run_dir``.

    Raises:
        ConfigError, FileExistsError, ValueError: before anything starts, for a configuration that cannot run.
        Interrupted: after Ctrl-C or SIGTERM, with a checkpoint saved.
        TrainingError: when an observation, a reward or the critic is no longer finite.
    """
    validate(config)
    device = make_device(config.device)
    random.seed(config.seed)
    np.random.seed(config.seed)
    torch.manual_seed(config.seed)

    env = make_train_env(config, device)
    actor = make_actor(config, env, device)
    loss = make_loss(config, actor)
    update = make_update(config, loss)
    temperature = make_temperature(config, actor)
    collector = make_collector(config, env, actor, device)
    replay_buffer = make_replay_buffer(config, device)
    probe = make_actor(config, env, device, loss, diagnostics=True)

    window = MetricsWindow()
    progress: dict[str, Any] = {"frames": 0, "updates": 0, "seconds": 0.0}
    checkpoint = Checkpoint(
        collector=collector_state(collector),
        config=asdict(config),
        loss=loss,
        optimizer=update.optimizer,
        progress=progress,
        replay_buffer=ReplayState(replay_buffer),
        rng=GlobalRNGState(),
        window=window,
    )
    if temperature is not None:
        checkpoint.register("temperature", temperature)
    if config.resume is None:
        run = RunDirectory.create(config)
    else:
        run = RunDirectory.open(config.resume)
        load_checkpoint(checkpoint, latest_checkpoint(run.checkpoints), task=config.env.task, device=device)
        run.rewind_metrics(progress["frames"])
        run.write_config(config)
    logger = make_logger(config, run)
    frames, updates, previous_seconds = progress["frames"], progress["updates"], progress["seconds"]

    start = row_start = time.monotonic()
    row_frames, row_updates = frames, updates
    evaluation, evaluated_at = None, -1
    bar = tqdm(
        total=config.collector.total_frames, initial=frames, unit=" frames", smoothing=0.05, dynamic_ncols=True,
        mininterval=0.5 if sys.stderr.isatty() else 30.0,
    )  # fmt: skip

    def save() -> Path:
        check_finite_losses(window, updates)
        progress.update(frames=frames, updates=updates, seconds=previous_seconds + time.monotonic() - start)
        metadata = {"task": config.env.task, "updates": updates}
        return save_checkpoint(
            checkpoint, run.checkpoints, frames=frames, keep=config.checkpoint.keep, metadata=metadata
        )

    with StopRequest() as stop, bar, shutting_down(collector):
        batches = iter(collector)
        while frames < config.collector.total_frames and stop.signal_number is None:
            # Collect: one vector step (or frames_per_batch) of the live critics' policy, random at first.
            batch = next(batches)
            check_finite_transitions(batch, frames)
            replay_buffer.extend(batch.select(*loss.in_keys).reshape(-1))
            done = batch["next", "done"]
            if done.any():
                window.add_episodes(batch["next", "episode_reward"][done], batch["next", "step_count"][done])
                window.add_diverged(batch.get(("next", "diverged"), None))
            previous_frames, frames = frames, frames + batch.numel()
            previous_updates = updates

            # Learn: utd_ratio updates per transition after the random ones, counted exactly.
            for _ in range(updates_due(config, frames) - updates):
                learned = sample(replay_buffer)
                window.add_update(update(learned))
                updates += 1
                if temperature is not None and updates % TEMPERATURE_INTERVAL == 0:
                    temperature.step(learned)
            if crossed(config.collector.weight_update_interval, previous_updates, updates):
                collector.update_policy_weights_()
            bar.update(frames - previous_frames)

            # Evaluate, report, save.
            evaluation_due = crossed(config.logger.eval_interval, previous_frames, frames) and updates > 0
            if evaluation_due or crossed(config.logger.log_interval, previous_frames, frames):
                check_finite_losses(window, updates)
                now = time.monotonic()
                row = {
                    "frames": frames,
                    "updates": updates,
                    "wall_time": previous_seconds + now - start,
                    "frames_per_second": (frames - row_frames) / (now - row_start),
                    "updates_per_second": (updates - row_updates) / (now - row_start),
                    **window.means(),
                }
                if updates > 0:
                    row |= sampler_diagnostics(probe, replay_buffer)
                    if temperature is not None:
                        row |= {"w": float(actor.sampler.w), "spread": float(temperature.spread)}
                if evaluation_due:
                    evaluation, evaluated_at = run_evaluation(config, probe), frames
                    row |= evaluation_row(evaluation)
                run.append_metrics(row)
                log(logger, row, frames)
                bar.set_postfix(describe(row, evaluation), refresh=False)
                window.clear()
                row_start, row_frames, row_updates = time.monotonic(), frames, updates
            if crossed(config.checkpoint.interval, previous_frames, frames):
                save()
        saved = save()

    if stop.signal_number is not None:
        run.draw_learning_curve(config.env.task)
        raise Interrupted(
            f"Stopped after {frames} frames and {updates} updates; saved {saved}. "
            f"Continue with: nclql-train resume={run.path}",
            stop.signal_number,
        )

    if evaluation is None or evaluated_at != frames:
        evaluation = run_evaluation(config, probe)
        seconds = previous_seconds + time.monotonic() - start
        row = {"frames": frames, "updates": updates, "wall_time": seconds, **evaluation_row(evaluation)}
        run.append_metrics(row)
        log(logger, row, frames)
    summary = {
        "task": config.env.task,
        "seed": config.seed,
        "return_mean": evaluation.mean,
        "return_std": evaluation.std,
        "episodes": len(evaluation.returns),
        "frames": frames,
        "updates": updates,
        "seconds": previous_seconds + time.monotonic() - start,
    }
    run.write_summary(summary)
    run.draw_learning_curve(config.env.task)
    return {**summary, "run_dir": str(run.path)}


def updates_due(config: TrainConfig, frames: int) -> int:
    """Updates owed after ``frames`` transitions: a function of the count alone, so rounding never accumulates.

    Examples:
        >>> config = TrainConfig()
        >>> [updates_due(config, 30_000 + extra) for extra in (0, 4, 5, 500)]
        [0, 0, 1, 100]
    """
    learning_frames = max(0, frames - config.collector.init_random_frames)
    return math.floor(Fraction(repr(config.optim.utd_ratio)) * learning_frames)


def crossed(interval: int, previous_frames: int, frames: int) -> bool:
    """Whether a multiple of ``interval`` lies in (previous_frames, frames]."""
    return frames // interval > previous_frames // interval


def check_finite_transitions(batch: TensorDictBase, frames: int) -> None:
    """Raises TrainingError if a batch [num_envs, time] has an action, next observation or reward that is not finite."""
    keys = ("action", ("next", "observation"), ("next", "reward"))
    finite = torch.stack([torch.isfinite(batch[key]).all(-1) for key in keys])
    if finite.all():
        return
    # The first in time is the cause; within a step the action comes before what it led to.
    entry, environment, step = min((~finite).nonzero().tolist(), key=lambda index: (index[2], index[0]))
    values = batch[keys[entry]][environment, step].tolist()
    where = f"at step {frames // batch.shape[0] + step} of environment {environment} is {values}"
    kept = f"The batch after frame {frames} was not stored, and the last checkpoint is kept."
    if keys[entry] == "action":
        raise TrainingError(
            f"The action {where}: the critic diverged. {kept} Try a lower optim.lr or optim.reward_scale."
        )
    raise TrainingError(f"The {keys[entry][1]} {where}; expected finite numbers. {kept} Check the physics of the task.")


def check_finite_losses(window: MetricsWindow, updates: int) -> None:
    """Raises TrainingError if the critic's losses since the last row are not finite."""
    for name, value in window.means().items():
        if name.startswith("loss") and not math.isfinite(value):
            raise TrainingError(
                f"{name} became {value} within the {window.updates} updates before update {updates}: the critic "
                "diverged. The last checkpoint is kept. Try a lower optim.lr or optim.reward_scale."
            )


def run_evaluation(config: TrainConfig, probe: LangevinActor) -> Evaluation:
    """Evaluates on the run's evaluation seeds, without touching the run's random states."""
    with torch.random.fork_rng():
        return evaluate(
            probe,
            config.env.task,
            episodes=config.logger.eval_episodes,
            seed=config.seed + SEED_OFFSET,
            gamma=config.optim.gamma,
            reward_scale=config.optim.reward_scale,
            task_options=config.env.task_options,
        )


def evaluation_row(evaluation: Evaluation) -> dict[str, float]:
    """An evaluation's columns in metrics.csv."""
    return {
        "evaluation_return": evaluation.mean,
        "evaluation_return_std": evaluation.std,
        "evaluation_length": evaluation.mean_length,
        "estimated_q": evaluation.estimated_q,
        "discounted_return": evaluation.discounted_return,
        "overestimation": evaluation.overestimation,
    }


@torch.no_grad()
def sampler_diagnostics(probe: LangevinActor, replay_buffer: TensorDictReplayBuffer) -> dict[str, float]:
    """What exploring chains do on a replayed batch of observations, without touching the run's random states."""
    with torch.random.fork_rng(), set_exploration_type(ExplorationType.RANDOM):
        tensordict = probe(sample(replay_buffer).select("observation"))
    return {key: float(tensordict[key].mean()) for key in probe.diagnostic_keys}


def make_logger(config: TrainConfig, run: RunDirectory) -> Logger | None:
    """TorchRL's logger for the chosen backend, writing inside the run directory."""
    if config.logger.backend == "none":
        return None
    backend: Any = config.logger.backend
    return get_logger(backend, logger_name=str(run.path / "logs"), experiment_name=run.path.name)


def log(logger: Logger | None, row: Mapping[str, float], frames: int) -> None:
    """Hands a row of metrics to the logger."""
    if logger is not None:
        logger.log_metrics({name: value for name, value in row.items() if name != "frames"}, step=frames)


def describe(row: Mapping[str, float], evaluation: Evaluation | None) -> dict[str, str]:
    """The progress bar's trailing figures."""
    text = {"updates/s": f"{row['updates_per_second']:.1f}"}
    if "train_return" in row:
        text["train"] = f"{row['train_return']:.0f}"
    if evaluation is not None:
        text["evaluation"] = f"{evaluation.mean:.0f}±{evaluation.std:.0f}"
    return text
