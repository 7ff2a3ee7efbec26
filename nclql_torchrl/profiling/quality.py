"""How good the sampled actions are: against a long reference chain, and against targets known exactly."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from nclql_torchrl.actor import LangevinActor
from nclql_torchrl.langevin import LangevinSampler, best_particle
from nclql_torchrl.profiling.config import Setting
from nclql_torchrl.profiling.schedules import base_schedule, mixing_schedule
from nclql_torchrl.profiling.subject import Subject
from nclql_torchrl.targets import TARGETS
from nclql_torchrl.training.config import SamplerConfig

TARGET_SAMPLES = 4096
"""Independent chains on each analytic target."""

TARGET_BINS = 10
"""Bins per dimension for the total-variation distance: exact samples come to about 0.4 sqrt(100 / 4096) = 0.06."""

REFERENCE_BATCH = 4096
"""States that the reference chain samples for at once."""


@dataclass(frozen=True)
class Reference:
    """What settings are compared with, on the same states."""

    q: Tensor
    """Mean Q of the long chain's actions, shape [states]."""
    q_uniform: float
    """Mean Q of uniformly random actions: where every chain starts."""
    spread: float | None
    """See :func:`spread`."""
    langevin_steps: int
    """Length of the chain."""


def sample_actions(actor: LangevinActor, subject: Subject, batch: int, chains: int) -> Tensor:
    """Independent normalised actions in every state of a subject, drawn ``batch`` states at a time.

    Returns:
        Shape [chains, states, action_dim].
    """
    num_states = subject.inputs.shape[0]
    wanted = chains * num_states
    # The states in a row, again and again, cut into batches of the size that was timed (and compiled).
    tensordict = subject.states(-(-wanted // batch) * batch)
    actions = torch.cat([actor(part)[actor.action_key].clone() for part in tensordict.split(batch)])[:wanted]
    normalised = (actions - actor.sampler.action_center) / actor.sampler.action_half_range
    return normalised.reshape(chains, num_states, -1)


def noise_free_q(actor: LangevinActor, subject: Subject, actions: Tensor) -> Tensor:
    """Q at the last level as the chain sees it, per critic: the critics' mean, or their lowest if that is climbed.

    Args:
        actor: any over the subject's critics.
        subject: gives the states.
        actions: normalised, shape [chains, states, action_dim].

    Returns:
        Shape [chains, states].
    """
    value = actor.action_value(subject.states(actions.shape[1]), num_particles=actions.shape[0])
    heads = value.at_level(actor.sampler.schedule.num_levels - 1).heads(actions)
    return heads.amin(0) if actor.ensemble_reduction == "min" else heads.mean(0)


def spread(actions: Tensor) -> float | None:
    """Standard deviation of a coordinate within a state, over independent chains; root mean square over the rest.
    None for a single chain.

    Args:
        actions: normalised, shape [chains, states, action_dim].
    """
    return float(actions.double().var(0).mean().sqrt()) if actions.shape[0] > 1 else None


def make_reference(subject: Subject, steps_per_level: int, chains: int) -> Reference:
    """Runs the long chain: the critic's own schedule with more steps at every level, one particle, float32, eager.

    Args:
        subject: the critic and the states.
        steps_per_level: never fewer than the schedule needs to mix.
        chains: independent ones in every state.
    """
    schedule = base_schedule(subject.sampler)
    steps_per_level = max(steps_per_level, schedule.minimum_steps_per_level())
    setting = Setting(
        schedule.num_levels, steps_per_level, REFERENCE_BATCH, 1, "eager", "float32", "cpu", subject.sampler.kernel
    )
    actor = subject.actor_on(schedule, setting)
    batch = min(REFERENCE_BATCH, chains * subject.inputs.shape[0])
    actions = sample_actions(actor, subject, batch, chains)
    uniform = torch.rand_like(actions) * 2.0 - 1.0
    return Reference(
        q=noise_free_q(actor, subject, actions).double().mean(0),
        q_uniform=float(noise_free_q(actor, subject, uniform).double().mean()),
        spread=spread(actions),
        langevin_steps=setting.langevin_steps,
    )


def critic_quality(
    actor: LangevinActor, subject: Subject, reference: Reference, batch: int, chains: int
) -> dict[str, Any]:
    """Columns of a row: Q of the sampled actions, its gap to the reference on the same states, and their spread."""
    actions = sample_actions(actor, subject, batch, chains)
    q = noise_free_q(actor, subject, actions).double().mean(0)
    gap = reference.q.to(q.device) - q
    q_reference, q_mean = float(reference.q.mean()), float(q.mean())
    return {
        "q_mean": q_mean,
        "q_gap": float(gap.mean()),
        "q_gap_stderr": float(gap.std() / gap.shape[0] ** 0.5),
        "q_recovered": (q_mean - reference.q_uniform) / (q_reference - reference.q_uniform),
        "spread": spread(actions),
    }


@torch.no_grad()
def target_quality(
    sampler: SamplerConfig, levels: int, steps_per_level: int, particles: int, kernel: str, start_level: int = 0
) -> dict[str, float]:
    """Columns of a row: the same chain, in eager float32 on the CPU, on targets whose density is known.

    ``tv_TARGET`` is the total-variation distance between samples and density over equally probable bins of the first
    two dimensions. ``modes_covered`` counts the modes of ``four_modes`` that hold at least half of their weight within
    three deviations of their centre, and ``tv_mode_weights`` is the distance between what they hold and their weights.

    Args:
        sampler: settings of the run that trained the critic.
        levels, steps_per_level, particles, kernel, start_level: of the chain, which starts anywhere in the box.
    """
    schedule = mixing_schedule(sampler, levels, steps_per_level)
    w = float(sampler.w)
    columns: dict[str, float] = {}
    for name, make_target in TARGETS.items():
        target = make_target(w=w)
        bound = torch.ones(target.action_dim)
        chain = LangevinSampler(
            -bound,
            bound,
            schedule,
            steps_per_level=steps_per_level,
            w=w,
            normalize_gradient=sampler.normalize_gradient,
            boundary=sampler.boundary,  # pyright: ignore[reportArgumentType]
            kernel=kernel,  # pyright: ignore[reportArgumentType]
        )
        value = target.action_value((particles, TARGET_SAMPLES), schedule)
        actions = chain(value, start_level=start_level)
        chosen = best_particle(actions, chain.score(value, actions))
        columns[f"tv_{name}"] = target.total_variation(chosen, TARGET_BINS)
        if name == "four_modes":
            near = ((chosen.double().unsqueeze(1) - target.centers) / target.deviations).square().sum(-1) <= 9.0
            shares = near.double().mean(0)
            columns["modes_covered"] = int((shares >= 0.5 * target.weights).sum())
            # What is near no mode is a fifth place, which should be empty.
            away = 1.0 - shares.sum()
            columns["tv_mode_weights"] = float(0.5 * ((shares - target.weights).abs().sum() + away))
    return columns
