"""A profile from configuration to files: settings -> measurements -> rows -> report."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, fields, replace
from datetime import datetime
from functools import partial
from pathlib import Path
from typing import Any

import torch
from tensordict import TensorDictBase
from tqdm import tqdm

from nclql_torchrl.actor import LangevinActor
from nclql_torchrl.profiling import availability, report
from nclql_torchrl.profiling.config import ProfileConfig, Setting, settings, validate
from nclql_torchrl.profiling.figure import draw
from nclql_torchrl.profiling.quality import Reference, critic_quality, make_reference, target_quality
from nclql_torchrl.profiling.schedules import describe_change
from nclql_torchrl.profiling.subject import Subject, make_subject
from nclql_torchrl.profiling.timing import (
    ROUNDS,
    WARM_UP_CALLS,
    peak_memory_cpu,
    percentile,
    time_calls,
    warm_up,
    write_trace,
)
from nclql_torchrl.training.evaluation import SEED_OFFSET, evaluate

Row = dict[str, Any]


class NothingToMeasure(ValueError):
    """This machine can run no setting of the grid; the message names them and says why."""


@torch.no_grad()
def profile(config: ProfileConfig) -> dict[str, Any]:
    """Measures every setting of a grid and writes profile.json, profile.csv and profile.png.

    Args:
        config: the grid, the critic and how to measure.

    Returns:
        ``run_dir``, the new ``rows``, what was ``skipped``, and ``trace`` (a path or None).

    Raises:
        ConfigError: for a value that cannot work.
        NothingToMeasure: if this machine can run no setting.
        FileNotFoundError: if there is no checkpoint where one is given.
        CheckpointError: if it is damaged or unsafe.
    """
    validate(config)
    path = Path(config.run_dir) if config.run_dir else Path("runs", f"profile-{datetime.now():%Y%m%d-%H%M%S}")
    before = report.read(path)  # what cannot be added to is an error now, not after the measurement
    runnable, skipped = availability.split(settings(config))
    subject = None
    if runnable:
        torch.manual_seed(config.seed)
        subject = make_subject(config, torch.device(runnable[0].device))
        runnable, impossible = availability.as_the_run(runnable, subject.sampler, trained=subject.trained)
        skipped += impossible
    if subject is None or not runnable:
        reasons = "; ".join(f"{entry['setting']}: {entry['reason']}" for entry in skipped)
        raise NothingToMeasure(f"Nothing to measure. {reasons}")

    reference = make_reference(subject, config.reference_steps, config.quality_chains)
    trace = _trace_path(config.trace, path)
    rows: list[Row] = []
    steps = len(runnable) * (2 + min(ROUNDS, config.repetitions))
    with tqdm(total=steps, desc="profile", dynamic_ncols=True) as bar:
        for block in _blocks(runnable):
            on_device = subject.to(torch.device(block[0].device))
            rows += _measure(block, on_device, reference, config, None if rows else trace, skipped, bar)
    _add_target_quality(rows, subject, config)

    run = {
        "time": f"{datetime.now().astimezone():%Y-%m-%d %H:%M:%S %z}",
        "critic": subject.name,
        "trained": subject.trained,
        "machine": {name: report.machine(torch.device(name)) for name in dict.fromkeys(s.device for s in runnable)},
        "config": asdict(config),
        "sampler": asdict(subject.sampler),
        "reference": {
            "langevin_steps": reference.langevin_steps,
            "q_mean": float(reference.q.mean()),
            "q_uniform": reference.q_uniform,
            "spread": reference.spread,
        },
        "skipped": skipped,
    }
    whole = report.write(path, before, run, rows)
    if subject.trained and config.episodes:
        for _ in _add_returns(rows, subject, config):
            # Episodes take minutes a setting: each is kept at once.
            whole = report.write(path, before, run, rows)
    draw(whole, path / "profile.png")
    return {"run_dir": str(path), "rows": rows, "skipped": skipped, "trace": None if trace is None else str(trace)}


def _blocks(runnable: Sequence[Setting]) -> Iterator[list[Setting]]:
    """Settings that are timed in turn: all of a CPU's, whose speed drifts with its load; a GPU's each by itself,
    because only so many captured graphs fit into its memory."""
    on_cpu = [setting for setting in runnable if setting.device == "cpu"]
    if on_cpu:
        yield on_cpu
    yield from ([setting] for setting in runnable if setting.device != "cpu")


def _measure(
    block: Sequence[Setting],
    subject: Subject,
    reference: Reference,
    config: ProfileConfig,
    trace: Path | None,
    skipped: list[dict[str, str]],
    bar: tqdm,
) -> list[Row]:
    """Rows of the settings of a block. What fails, for lack of memory for example, is added to ``skipped``."""
    device = subject.device
    working: list[tuple[Setting, LangevinActor, Callable[[], object], float, int | None]] = []
    for setting in block:
        bar.set_postfix_str(_name(setting))
        actor = subject.actor(setting)
        call = partial(_act, actor, subject.states(setting.states))
        try:
            working.append((setting, actor, call, *warm_up(call, device)))
        except RuntimeError as error:
            skipped.append({"setting": _name(setting), "reason": str(error).splitlines()[0]})
        bar.update()
    bar.set_postfix_str("timing")
    timed = time_calls([call for _, _, call, *_ in working], device, config.repetitions, bar.update)
    if trace is not None and working:
        write_trace(working[0][2], device, trace)
    rows = []
    for (setting, actor, call, seconds, peak), milliseconds in zip(working, timed, strict=True):
        bar.set_postfix_str(f"quality of {_name(setting)}")
        schedule = actor.sampler.schedule
        # A larger batch than the timed one is quicker, but would have to be compiled too.
        batch = max(setting.states, config.quality_states) if setting.execution == "eager" else setting.states
        median = percentile(milliseconds, 50)
        rows.append(
            asdict(setting)
            | {
                "langevin_steps": setting.langevin_steps,
                "sigma_max": schedule.sigmas[0].item(),
                "schedule_change": describe_change(subject.sampler, schedule),
                "ms_median": median,
                "ms_p10": percentile(milliseconds, 10),
                "ms_p90": percentile(milliseconds, 90),
                "actions_per_second": setting.states / median * 1e3,
                "compile_seconds": None
                if setting.execution == "eager"
                else max(0.0, seconds - WARM_UP_CALLS * median / 1e3),
                "peak_memory_mib": (peak_memory_cpu(call) if peak is None else peak) / 2**20,
            }
            | critic_quality(actor, subject, reference, batch, config.quality_chains)
        )
        bar.update()
    return rows


def _act(actor: LangevinActor, states: TensorDictBase) -> None:
    """What is timed: the actor as a collector calls it."""
    actor(states.copy())


def _add_target_quality(rows: Sequence[Row], subject: Subject, config: ProfileConfig) -> None:
    """Adds what the chains of each schedule do on the analytic targets, whatever runs them."""
    found: dict[tuple[int, int, int, str, int], Row] = {}
    for row in tqdm(rows, desc="analytic targets", dynamic_ncols=True):
        chain = (row["levels"], row["steps_per_level"], row["particles"], row["kernel"], row["start_level"])
        if chain not in found:
            torch.manual_seed(config.seed)
            found[chain] = target_quality(subject.sampler, *chain)
        row |= found[chain]


def _add_returns(rows: Sequence[Row], subject: Subject, config: ProfileConfig) -> Iterator[Row]:
    """Adds the return of the policy with each schedule: eager, since every mode computes the same actions. Yields every
    row that it completes."""
    found: dict[Setting, Row] = {}
    for row in tqdm(rows, desc="episodes", dynamic_ncols=True):
        setting = Setting(**{entry.name: row[entry.name] for entry in fields(Setting)})
        setting = replace(setting, states=config.episodes, execution="eager")
        if setting not in found:
            run = subject.config
            result = evaluate(
                subject.to(torch.device(setting.device)).actor(setting, diagnostics=True),
                run.env.task,
                episodes=config.episodes,
                seed=run.seed + SEED_OFFSET,
                gamma=run.optim.gamma,
                reward_scale=run.optim.reward_scale,
                task_options=run.env.task_options,
            )
            found[setting] = {"return_mean": result.mean, "return_std": result.std}
        row |= found[setting]
        yield row


def _name(setting: Setting) -> str:
    start = f" from level {setting.start_level}" if setting.start_level else ""
    return (
        f"{setting.execution} {setting.precision} {setting.kernel} on {setting.device}, "
        f"{setting.levels} x {setting.steps_per_level} steps{start}{', warm' if setting.warm_start else ''}, "
        f"{setting.states} states, {setting.particles} particles"
    )


def _trace_path(trace: str | None, path: Path) -> Path | None:
    if trace is None or trace.lower() in ("false", "null", ""):
        return None
    return path / "trace.json" if trace.lower() == "true" else Path(trace)
