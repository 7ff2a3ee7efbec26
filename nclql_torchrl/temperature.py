"""Automatic temperature: the sampler's w is tuned so that sampled actions spread as much as asked for."""

from __future__ import annotations

import torch
from tensordict import TensorDictBase
from torch import Tensor, nn

from nclql_torchrl.actor import LangevinActor


def check_target_spread(target_spread: float, noise: float) -> None:
    """Raises ValueError for a spread that chains cannot have whose last steps inject ``noise``, a standard deviation.

    Examples:
        >>> check_target_spread(0.01, noise=0.01)
        Traceback (most recent call last):
        ...
        ValueError: target_spread is 0.01; expected a number from 0.02, twice the noise of the last step, to 1.
    """
    if not 2.0 * noise * (1 - 1e-9) <= target_spread < 1.0:
        raise ValueError(
            f"target_spread is {target_spread:g}; expected a number from {2.0 * noise:g}, twice the noise of the last "
            "step, to 1."
        )


class AutomaticTemperature(nn.Module):
    """Tunes the inverse temperature ``w`` of an actor's sampler, in place, to a spread of the actions it samples.

    SAC (arXiv 1812.05905) and MFPO (arXiv 2604.14698) hold the policy's entropy at a target. Langevin chains have no
    density to take the entropy of, and estimates of it from a few samples (nearest neighbours) break down where chains
    end on the faces of the box, many at the same point. What is held here instead is the spread: the standard
    deviation, in units of half the action range, of actions sampled for the same state, over the action dimensions
    together, of the median state. A normal policy of that spread has the entropy
    ``action_dim * log(spread * sqrt(2 pi e))`` in these units: SAC's target of ``-action_dim`` is a spread of 0.089,
    MFPO's ``-action_dim / 2`` one of 0.147.

    The median, because the deviation of a state with two good actions is their distance, whatever ``w``: a mean over
    states is made by the few of them (on Pendulum-v1 an eighth of the states held it above 0.3 from w = 10 to 500).
    Where more than half of the states are such, the spread is out of control.

    Each step samples ``num_particles`` chains for some states and multiplies ``w`` by
    ``(spread / target_spread) ** gain``; nothing waits for the device.

    A chain cannot be narrower than the noise of its last steps, and where that is close a larger ``w`` makes it wider:
    the drift overshoots. So targets below ``2 sqrt(last step size)`` are refused (0.02 by default), and with the
    normalised gradient, where ``w`` is the length of the drift as much as a temperature, ``w`` is kept below
    ``5 / sqrt(last step size)`` (500 by default, the authors' value). The range that was measured is in
    benchmarks/results/README.md.

    Args:
        actor: whose ``sampler.w`` is tuned, and whose critics and chains are used.
        target_spread: the spread asked for, from ``2 sqrt(last step size)`` to 1; that of uniform actions is 0.58.
        num_states: how many states of the batch each step looks at.
        num_particles: chains per state.
        gain: exponent of the correction; one step closes about that share of the gap.

    Raises:
        ValueError: for a ``target_spread`` outside of that, ``num_states < 1``, ``num_particles < 2`` or a ``gain``
            outside (0, 1].

    Examples:
        >>> from tensordict import TensorDict
        >>> from torchrl.data import Bounded
        >>> from torchrl.modules import ValueOperator
        >>> from nclql_torchrl import LangevinActor, NoiseConditionedQNetwork
        >>> critic = ValueOperator(NoiseConditionedQNetwork(3, 2, (32,)), in_keys=["observation", "action", "level"])
        >>> actor = LangevinActor([critic], spec=Bounded(-1.0, 1.0, (2,)))
        >>> temperature = AutomaticTemperature(actor, target_spread=0.3)
        >>> temperature.step(TensorDict({"observation": torch.randn(64, 3)}, [64]))
        >>> bool(actor.sampler.w < 500), bool(temperature.spread < 0.3)
        (True, True)
    """

    actor: LangevinActor
    """The actor, as given."""

    spread: Tensor
    """Spread measured by the last step, a scalar; NaN before the first."""

    def __init__(
        self,
        actor: LangevinActor,
        target_spread: float = 0.1,
        *,
        num_states: int = 32,
        num_particles: int = 4,
        gain: float = 0.1,
    ) -> None:
        super().__init__()
        noise = float(actor.sampler.schedule.step_sizes[-1]) ** 0.5
        check_target_spread(target_spread, noise)
        if num_states < 1 or num_particles < 2:
            raise ValueError(
                f"num_states is {num_states} and num_particles is {num_particles}; expected at least 1 and 2."
            )
        if not 0.0 < gain <= 1.0:
            raise ValueError(f"gain is {gain}; expected a number in (0, 1].")
        # In __dict__: the actor's parameters are not this module's.
        self.__dict__["actor"] = actor  # pyright: ignore[reportIndexIssue]
        self.target_spread = target_spread
        self.num_states = num_states
        self.num_particles = num_particles
        self.gain = gain
        w = actor.sampler.w
        self.register_buffer("spread", torch.full_like(w, torch.nan))
        # The median of the sample variance of normals that have variance 1 (Wilson and Hilferty, 1931).
        self._median_of_variance = (1.0 - 2.0 / (9.0 * (num_particles - 1) * actor.sampler.action_dim)) ** 3
        self.largest_w = 5.0 / noise if actor.sampler.normalize_gradient else 1e8

    @torch.no_grad()
    def step(self, batch: TensorDictBase) -> None:
        """Measures the spread and corrects ``w``.

        Args:
            batch: holds observations, batch shape [num_samples]; the first ``num_states`` are used.
        """
        sampler = self.actor.sampler
        value = self.actor.action_value(batch[: self.num_states], num_particles=self.num_particles)
        variance = sampler(value).to(self.spread.dtype).var(0)
        self.spread.copy_((variance.mean(-1).quantile(0.5) / self._median_of_variance).sqrt())
        # At most a factor e a step counts: one odd batch must not throw w far off.
        excess = (self.spread / self.target_spread).log().clamp(-1.0, 1.0)
        sampler.w.mul_((self.gain * excess).exp()).clamp_(1e-3, self.largest_w)
