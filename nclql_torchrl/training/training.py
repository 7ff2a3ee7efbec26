"""The training run, from top to bottom."""

from __future__ import annotations

import math
import random
import sys
import time
from collections.abc import Iterator, Mapping
from contextlib import AbstractContextManager, ExitStack, suppress
from dataclasses import asdict, replace
from fractions import Fraction
from pathlib import Path
from typing import Any

import numpy as np
import torch
from tensordict import TensorDictBase
from torchrl.checkpoint import Checkpoint
from torchrl.collectors import Collector
from torchrl.data import TensorDictReplayBuffer
from torchrl.envs import TransformedEnv
from torchrl.envs.utils import ExplorationType, set_exploration_type
from tqdm import tqdm

from envs import default_engine
from envs.engines.gymnasium import GymnasiumEnvs
from nclql_torchrl.actor import LangevinActor
from nclql_torchrl.loss import NCLQLLoss
from nclql_torchrl.temperature import AutomaticTemperature
from nclql_torchrl.training.checkpoint import (
    RandomStates,
    latest_checkpoint,
    load_checkpoint,
    make_checkpoint,
    save_best,
    save_checkpoint,
)
from nclql_torchrl.training.collection import Workers, collection_metrics, collector_state, make_collector
from nclql_torchrl.training.components import (
    make_actor,
    make_loss,
    make_n_step,
    make_normalizer,
    make_replay_buffer,
    make_temperature,
    make_train_env,
    make_update,
    sample,
)
from nclql_torchrl.training.config import TrainConfig, validate
from nclql_torchrl.training.distributed import Learners
from nclql_torchrl.training.evaluation import SEED_OFFSET, Evaluation, evaluate
from nclql_torchrl.training.interruption import Abandoned, Interrupted, StopRequest
from nclql_torchrl.training.loggers import RunLogger
from nclql_torchrl.training.memory import check_replay_fits
from nclql_torchrl.training.metrics import MetricsWindow
from nclql_torchrl.training.replay_state import ReplayState
from nclql_torchrl.training.run_directory import RunDirectory, refuse_taken, sync
from nclql_torchrl.training.time_profile import TimeProfile
from nclql_torchrl.update import NCLQLUpdate

TEMPERATURE_INTERVAL = 10
"""Updates between two corrections of w: the critics change little in between, and chains are what costs."""

ENDED_KEYS = [("next", name) for name in ("done", "diverged", "episode_reward", "step_count")]
"""What the loop has to know of every batch."""


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
        BlockingIOError: if another process trains in the run directory.
        Interrupted: after Ctrl-C or SIGTERM, with a checkpoint saved.
        TrainingError: when the critic is no longer finite, or too many simulations are not.
    """
    validate(config)
    with ExitStack() as stack, StopRequest(abandon=True) as stop:
        try:
            learners = stack.enter_context(Learners())
            return _train(learners.localize(config), learners, stack, stop)
        except Abandoned:
            assert stop.signal_number is not None
            raise Interrupted("Stopped; there was nothing that is not saved.", stop.signal_number) from None


def _train(config: TrainConfig, learners: Learners, stack: ExitStack, stop: StopRequest) -> dict[str, Any]:
    """The run; ``stack`` ends what has to be ended, and ``stop`` knows of signals."""
    share = learners.share(config)
    validate(share)
    run = None
    if config.resume is not None:
        run = stack.enter_context(RunDirectory.open(config.resume))
        run.lock()
    elif config.run_dir is not None:
        refuse_taken(Path(config.run_dir))
    device = learners.device(config.device)
    if config.collector.backend == "direct" and config.env.engine == "auto":
        # Into config.yaml it goes as what it is here: on another device "auto" is an engine with another state.
        engine = default_engine(config.env.task, device)
        config, share = (replace(each, env=replace(each.env, engine=engine)) for each in (config, share))
    random.seed(share.seed)
    np.random.seed(share.seed)
    torch.manual_seed(share.seed)

    env = make_train_env(share, device)
    actor = make_actor(config, env, device)
    loss = make_loss(config, actor)
    learners.broadcast(loss)
    update = make_update(config, loss, learners.average)
    temperature = make_temperature(config, actor)
    collector = make_collector(share, env, actor, device)
    stack.callback(collector.shutdown)
    check_replay_fits(config.replay_buffer.size, env, loss.in_keys, device)
    replay_buffer = make_replay_buffer(config, device)
    n_step = make_n_step(config, loss)
    normalizer = make_normalizer(config, loss, learners.average_)
    probe = make_actor(config, env, device, loss, diagnostics=True)

    window = MetricsWindow()
    progress: dict[str, Any] = {"frames": 0, "updates": 0, "reported_frames": 0, "seconds": 0.0}
    checkpoint = make_checkpoint(
        collector=collector_state(collector),
        config=asdict(config),
        loss=loss,
        optimizer=update.optimizer,
        progress=progress,
        replay_buffer=ReplayState(replay_buffer),
        rng=RandomStates(),
        window=window,
        **({} if temperature is None else {"temperature": temperature}),
        **({} if n_step is None else {"n_step": n_step}),
        **({} if normalizer is None else {"normalizer": normalizer}),
    )
    with learners.rank_zero_first():
        if run is None:
            run = stack.enter_context(RunDirectory.create(config))
    restored = learners.latest_checkpoint(run)
    if restored is not None:
        load_checkpoint(checkpoint, restored, task=config.env.task, device=device)
        if config.collector.backend != "direct":
            say("Everything is restored but what the workers were doing: they begin new episodes.")
    run.rewind_metrics(progress["reported_frames"])
    run.write_config(config)
    logger = RunLogger(config.logger.backend, run, progress["reported_frames"], say)
    stack.callback(logger.close)
    frames, updates, previous_seconds = progress["frames"], progress["updates"], progress["seconds"]
    reported_frames = progress["reported_frames"]

    start = row_start = time.monotonic()
    row_frames, row_updates = frames, updates
    evaluation, evaluated_at = None, -1
    bar = tqdm(
        total=config.collector.total_frames, initial=frames, unit=" frames", smoothing=0.05, dynamic_ncols=True,
        mininterval=0.5 if sys.stderr.isatty() else 30.0, disable=learners.rank > 0,
    )  # fmt: skip

    metadata = {"task": config.env.task, "world_size": learners.world_size}

    def save() -> str:
        """Saves a checkpoint, and returns a sentence that says so; on a full disk the run goes on without it."""
        check_finite_losses(window, updates)
        logger.flush()
        seconds = previous_seconds + time.monotonic() - start
        progress.update(frames=frames, updates=updates, reported_frames=reported_frames, seconds=seconds)
        try:
            # The other ranks keep one more: rank 0's, the last to be written, may not be.
            keep = config.checkpoint.keep + min(1, learners.rank)
            with learners.rank_zero_last():
                # A resumed run keeps the rows that its checkpoint counts: they have to be there, and on the disk.
                run.flush_metrics()
                sync(run.metrics)
                described = {**metadata, "updates": updates, "reported_frames": reported_frames}
                path = save_checkpoint(checkpoint, run.checkpoints, frames=frames, keep=keep, metadata=described)
        except OSError as error:
            kept = latest_checkpoint(run.checkpoints) if run.has_checkpoint() else "none"
            sentence = f"The checkpoint after {frames} frames was not written ({error}); the last one is {kept}."
            say(sentence)
            return sentence
        return f"Saved {path}."

    profile = stack.enter_context(TimeProfile(run.path)) if config.profile else None
    if profile is not None:
        watch(profile, learners, collector, env, actor, probe, replay_buffer, loss, update, temperature)

    stop.abandon = False
    batches = iter(collector)
    warm = False
    with bar:
        while not learners.should_stop(stop):
            # Learn: utd_ratio updates per transition after the random ones, counted exactly.
            previous_updates = updates
            while updates < updates_due(config, frames) and not learners.should_stop(stop):
                learned = sample(replay_buffer)
                window.add_update(update(learned))
                updates += 1
                if temperature is not None and updates % TEMPERATURE_INTERVAL == 0:
                    temperature.step(learned)
                    learners.average_(actor.sampler.w)
            if profile is not None:
                profile.advance(updates)
            if learners.stop_signal is not None:
                break  # what is owed of this batch is learned and reported when the run is resumed
            # TorchRL's collector in this process acts with the live critics.
            if not isinstance(collector, Collector) and crossed(
                config.collector.weight_update_interval, previous_updates, updates
            ):
                collector.update_policy_weights_()

            # Evaluate, report, save.
            evaluation_due = crossed(config.logger.eval_interval, reported_frames, frames) and updates > 0
            if evaluation_due or crossed(config.logger.log_interval, reported_frames, frames):
                check_finite_losses(window, updates)
                now = time.monotonic()
                row = {
                    "frames": frames,
                    "updates": updates,
                    "wall_time": previous_seconds + now - start,
                    "frames_per_second": (frames - row_frames) / (now - row_start),
                    "updates_per_second": (updates - row_updates) / (now - row_start),
                    **window.means(),
                    **collection_metrics(collector),
                }
                try:
                    with stop.abandonable():
                        if updates > 0:
                            row |= sampler_diagnostics(probe, replay_buffer)
                            if temperature is not None:
                                row |= {"w": float(actor.sampler.w), "spread": float(temperature.spread)}
                        if evaluation_due:
                            evaluation, evaluated_at = run_evaluation(config, probe), frames
                            row |= evaluation_row(evaluation)
                except Abandoned:
                    pass
                if learners.should_stop(stop):
                    break
                row = learners.average_row(row)
                report(run, logger, row)
                if evaluation_due and evaluation is not None:
                    keep_best(checkpoint, run, evaluation, frames, metadata)
                bar.set_postfix(describe(row, evaluation), refresh=False)
                window.clear()
                row_start, row_frames, row_updates = time.monotonic(), frames, updates
            previous_frames, reported_frames = reported_frames, frames
            if crossed(config.checkpoint.interval, previous_frames, frames):
                save()
            if frames >= config.collector.total_frames:
                break

            # Collect: one vector step (or frames_per_batch) of the live critics' policy, random at first.
            if not warm and frames >= config.collector.init_random_frames:
                # The next steps may compile for minutes, in which nothing could be saved.
                save()
                warm = True
            try:
                batch = collect(batches)
            except ValueError as error:
                # Environments refuse actions that are not finite.
                check_finite_losses(window, updates)
                raise TrainingError(f"{error} The last checkpoint is kept.") from error
            if normalizer is not None:
                normalizer.update(batch["observation"])
            transitions = batch.reshape(-1)
            # On a GPU this waits for the vector step, as TorchRL's collector has just done to see whether to reset.
            # Nothing else here waits between two rows of metrics.csv, but with lost simulations or n_steps above 1.
            ended = batch.select(*ENDED_KEYS).cpu()
            done, diverged = ended["next", "done"], ended["next", "diverged"]
            if done.any():
                window.add_episodes(ended["next", "episode_reward"][done], ended["next", "step_count"][done])
                lost = int(diverged.sum())
                if lost:
                    # What a lost simulation led to is nothing to learn from.
                    transitions = transitions[~diverged.reshape(-1).to(transitions.device)]
                    window.add_diverged(lost)
                    check_diverged(config, window, frames, batch.numel())
            transitions = transitions.select(*loss.in_keys) if n_step is None else n_step(batch)
            if len(transitions):
                replay_buffer.extend(transitions)
            frames += learners.world_size * batch.numel()
            bar.update(learners.world_size * batch.numel())
        saved = save()
    if profile is not None:
        table = profile.report()
        if learners.rank == 0:
            say(table)

    if learners.stop_signal is not None:
        with suppress(OSError):  # a full disk, of which save() has told
            run.draw_learning_curve(config.env.task)
        raise Interrupted(
            f"Stopped after {frames} frames and {updates} updates. {saved} "
            f"Continue with: nclql-train resume={run.path}",
            learners.stop_signal,
        )

    if evaluation is None or evaluated_at != frames:
        with stop.abandonable():
            evaluation = run_evaluation(config, probe)
        # When a finished run is resumed, the row is there already.
        if not any(row["frames"] == frames and "evaluation_return" in row for row in run.read_metrics()):
            seconds = previous_seconds + time.monotonic() - start
            row = {"frames": frames, "updates": updates, "wall_time": seconds, **evaluation_row(evaluation)}
            report(run, logger, row)
        keep_best(checkpoint, run, evaluation, frames, metadata)
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
    run.flush_metrics()
    run.write_summary(summary)
    run.draw_learning_curve(config.env.task)
    return {**summary, "run_dir": str(run.path)}


def collect(batches: Iterator[TensorDictBase]) -> TensorDictBase:
    """The next batch; by a name, for the profile to find."""
    return next(batches)


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


def check_diverged(config: TrainConfig, window: MetricsWindow, frames: int, batch_frames: int) -> None:
    """Raises TrainingError if more of a log interval's transitions were lost than the configuration allows."""
    share, interval = config.env.max_diverged_fraction, max(config.logger.log_interval, batch_frames)
    if window.recently_diverged > share * interval:
        raise TrainingError(
            f"{window.recently_diverged} simulations diverged (observations or rewards that are not finite) since the "
            f"last row of metrics.csv, in the batch after frame {frames} for the last time; expected at most "
            f"env.max_diverged_fraction={share:g} of {interval} transitions. The last checkpoint is kept. Check the "
            "physics of the task."
        )


def check_finite_losses(window: MetricsWindow, updates: int) -> None:
    """Raises TrainingError if the critic's losses since the last row are not finite."""
    first = window.first_diverged_update(updates)
    if first is not None:
        raise TrainingError(
            f"The critic diverged: from update {first} on its losses are not finite. The last checkpoint is kept. Try "
            "a lower optim.lr or optim.reward_scale."
        )


def unchanged_random_states(probe: LangevinActor) -> AbstractContextManager[None]:
    """Within it an actor may draw: torch's random states come back, of its device and of the CPU.

    Looking at those of other GPUs, as ``fork_rng`` does by default, would initialise these.
    """
    device = next(probe.parameters()).device
    return torch.random.fork_rng([] if device.type == "cpu" else [device])


def run_evaluation(config: TrainConfig, probe: LangevinActor) -> Evaluation:
    """Evaluates on the run's evaluation seeds, without touching the run's random states."""
    with unchanged_random_states(probe):
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
    with unchanged_random_states(probe), set_exploration_type(ExplorationType.RANDOM):
        tensordict = probe(sample(replay_buffer).select("observation"))
    return {key: float(tensordict[key].mean()) for key in probe.diagnostic_keys}


def report(run: RunDirectory, logger: RunLogger, row: dict[str, float]) -> None:
    """Writes a row to metrics.csv, later if the disk is full, and hands it to the logger."""
    try:
        run.append_metrics(row)
    except OSError as error:
        say(f"A row of metrics.csv is written later ({error}).")
    logger.log(row)


def keep_best(
    checkpoint: Checkpoint, run: RunDirectory, evaluation: Evaluation, frames: int, metadata: dict[str, Any]
) -> None:
    """Keeps the policy if no evaluation has returned as much."""
    try:
        save_best(checkpoint, run.checkpoints, frames=frames, evaluation_return=evaluation.mean, metadata=metadata)
    except OSError as error:
        say(f"The best policy so far was not written ({error}).")


def say(sentence: str) -> None:
    """Tells the user something, above the progress bar."""
    tqdm.write(sentence, file=sys.stderr)


def watch(
    profile: TimeProfile,
    learners: Learners,
    collector: Collector | Workers,
    env: TransformedEnv,
    actor: LangevinActor,
    probe: LangevinActor,
    replay_buffer: TensorDictReplayBuffer,
    loss: NCLQLLoss,
    update: NCLQLUpdate,
    temperature: AutomaticTemperature | None,
) -> None:
    """Tells a profile what of a run belongs to which part of its time."""
    here = sys.modules[__name__]
    if isinstance(collector, Collector):
        profile.watch(here, "collect", "collection")
        profile.watch(env.base_env, "_step", "simulation")
        profile.watch(env.base_env, "_reset", "simulation")
        profile.watch(actor, "forward", "acting")
    else:
        profile.watch(here, "collect", "waiting for workers")
    parts = [
        (replay_buffer, "extend", "replay"),
        (replay_buffer, "sample", "replay"),
        (loss, "draw", "target sampling"),
        (update, "learn", "critic update"),
        (here, "sampler_diagnostics", "logging"),
        (here, "report", "logging"),
        (here, "run_evaluation", "evaluation"),
        (here, "save_checkpoint", "checkpoints"),
        (here, "keep_best", "checkpoints"),
    ]
    for owner, method, part in parts:
        profile.watch(owner, method, part)
    if temperature is not None:
        profile.watch(temperature, "step", "temperature")
    if learners.world_size > 1:
        profile.watch(learners, "_all_reduce", "exchange between learners")
    profile.watch(probe, "forward", "evaluation: acting", within="evaluation")
    # A class, since every evaluation makes environments of its own.
    for method in ("_step", "_reset"):
        profile.watch(GymnasiumEnvs, method, "evaluation: simulation", within="evaluation")


def describe(row: Mapping[str, float], evaluation: Evaluation | None) -> dict[str, str]:
    """The progress bar's trailing figures."""
    text = {"updates/s": f"{row['updates_per_second']:.1f}"}
    if "train_return" in row:
        text["train"] = f"{row['train_return']:.0f}"
    if evaluation is not None:
        text["evaluation"] = f"{evaluation.mean:.0f}±{evaluation.std:.0f}"
    return text
