"""Schedules that can be compared: each able to mix, each reading the critic at the noise that it was trained with."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import torch
from tensordict import TensorDictBase, TensorDictParams
from torch import Tensor

from nclql_torchrl.critic import NoiseConditionedQNetwork
from nclql_torchrl.schedule import NoiseSchedule
from nclql_torchrl.training.config import SamplerConfig
from nclql_torchrl.value import ActionValue, Level, LevelValue


def base_schedule(sampler: SamplerConfig) -> NoiseSchedule:
    """The schedule that a critic was trained with."""
    return NoiseSchedule(sampler.num_levels, sampler.sigma_max, sampler.sigma_min, sampler.step_lr)


def mixing_schedule(sampler: SamplerConfig, levels: int, steps_per_level: int) -> NoiseSchedule:
    """The schedule with that many levels that is closest to the run's own and can mix in ``steps_per_level`` steps.

    Fewer levels or steps break the rule of :meth:`NoiseSchedule.minimum_steps_per_level`: neighbouring levels may
    differ by a factor of ``sqrt(2 steps_per_level)`` at most. Then the first level comes down, to
    ``sigma_min * sqrt(2 steps_per_level) ** (levels - 1)``. The last level, which decides how sharp the sampled
    distribution is, stays as it is, and so does the number of steps, which is what is being compared; what is lost is
    the reach of the first steps, and that is what few steps really cost. It distorts least: with 5 levels of 2 steps on
    ``targets.stiff_quadratic`` the mean log-density falls 14 short of exact samples this way, 642 with the schedule as
    it was, and 1,693 with the last level raised instead, the first step being kept.

    Args:
        sampler: settings of the run that trained the critic.
        levels: number of noise levels.
        steps_per_level: Langevin steps at each level.

    Examples:
        >>> mixing_schedule(SamplerConfig(), levels=10, steps_per_level=2)
        NoiseSchedule(num_levels=10, sigmas=0.1..0.001)
        >>> mixing_schedule(SamplerConfig(), levels=5, steps_per_level=2)
        NoiseSchedule(num_levels=5, sigmas=0.016..0.001)
    """
    sigma_max = sampler.sigma_max
    if levels > 1:  # with one level, LQL, sigma_max plays no part
        sigma_max = min(sigma_max, sampler.sigma_min * math.sqrt(2.0 * steps_per_level) ** (levels - 1))
    return NoiseSchedule(levels, sigma_max, sampler.sigma_min, sampler.step_lr)


def describe_change(sampler: SamplerConfig, schedule: NoiseSchedule) -> str:
    """What :func:`mixing_schedule` changed beside the number of levels; empty if nothing.

    Examples:
        >>> describe_change(SamplerConfig(), mixing_schedule(SamplerConfig(), levels=5, steps_per_level=2))
        'sigma_max 0.1 -> 0.016'
    """
    before, after = sampler.sigma_max, schedule.sigmas[0].item()
    if schedule.num_levels == 1 or math.isclose(before, after, rel_tol=1e-6):
        return ""
    return f"sigma_max {before:g} -> {after:.3g}"


def nearest_levels(base: NoiseSchedule, schedule: NoiseSchedule) -> list[int]:
    """The critic's level of nearest noise (in ratio) for every level of a schedule.

    Args:
        base: the schedule that the critic was trained with.
        schedule: the one that samples from it.

    Examples:
        >>> nearest_levels(NoiseSchedule(), NoiseSchedule(num_levels=4))
        [0, 3, 6, 9]
    """
    distance = (schedule.sigmas.log().unsqueeze(-1) - base.sigmas.log()).abs()
    return distance.argmin(-1).tolist()


class ResampledQNetwork(NoiseConditionedQNetwork):
    """A critic read with other levels than it was trained with.

    Only the structure counts, as in every actor that is given parameters: level ``k`` of the sampler's schedule reads
    the critic's level ``critic_levels[k]``.

    Args:
        critic_levels: the critic's level at each level of the sampler's schedule.
        num_levels: of the critic.
        observation_dim, action_dim, hidden_sizes, options: of the critic.
    """

    def __init__(
        self,
        critic_levels: Sequence[int],
        num_levels: int,
        observation_dim: int,
        action_dim: int,
        hidden_sizes: Sequence[int],
        **options: Any,
    ) -> None:
        super().__init__(observation_dim, action_dim, hidden_sizes, **options)
        self.critic_levels, self.num_levels = tuple(critic_levels), num_levels
        self.level_index = torch.tensor(self.critic_levels, device=options.get("device"))

    def action_value(  # pyright: ignore[reportIncompatibleMethodOverride]
        self, parameters: TensorDictParams | TensorDictBase, observation: Tensor, *, num_levels: int, **options: Any
    ) -> ResampledActionValue:
        """Q at fixed observations, for the sampler; ``num_levels`` are the schedule's."""
        value = super().action_value(parameters, observation, num_levels=self.num_levels, **options)
        assert num_levels == len(self.critic_levels)
        return ResampledActionValue(value, self.critic_levels, self.level_index)


class ResampledActionValue(ActionValue):
    """Another :class:`ActionValue` with its levels chosen anew: level ``k`` is its level ``critic_levels[k]``.

    Args:
        value: takes levels that are tensors, so that what is compiled is the loop that users get.
        critic_levels: its level at each level of the sampler's schedule.
        level_index: the same as a tensor.
    """

    takes_tensor_levels = True

    def __init__(self, value: ActionValue, critic_levels: tuple[int, ...], level_index: Tensor) -> None:
        assert value.takes_tensor_levels
        self.value, self.critic_levels, self.level_index = value, critic_levels, level_index
        self.batch_shape, self.dtype, self.device = value.batch_shape, value.dtype, value.device

    def levels(self) -> Callable[[Level], LevelValue]:
        """The landscape over actions as a function of the schedule's level."""
        landscape, critic_levels, level_index = self.value.levels(), self.critic_levels, self.level_index
        return lambda level: landscape(
            critic_levels[level] if isinstance(level, int) else level_index.index_select(0, level)
        )

    @property
    def observations(self) -> tuple[Tensor, ...]:
        """The critics' own."""
        return self.value.observations

    def at_observations(self, observations: tuple[Tensor, ...]) -> ResampledActionValue:
        """The same at other observations."""
        return ResampledActionValue(self.value.at_observations(observations), self.critic_levels, self.level_index)

    @property
    def parameters(self) -> list[Tensor]:
        """The critics' own."""
        return self.value.parameters
