"""Annealed Langevin sampling of actions from exp(w Q(s, a)): the chain as a function, and the module that runs it."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from nclql_torchrl.execution import Execution, Executor
from nclql_torchrl.kernels import (
    Boundary,
    Carry,
    Kernel,
    KernelName,
    UnadjustedLangevin,
    ValueAtLevel,
    make_kernel,
)
from nclql_torchrl.schedule import NoiseSchedule
from nclql_torchrl.value import ActionValue, Level, check_choice, entry, reduce_ensemble

UNADJUSTED = UnadjustedLangevin()
"""The authors' kernel."""


def langevin_chain(
    value_at_level: Callable[[int], ValueAtLevel],
    initial_action: Tensor,
    noise: Tensor | None,
    *,
    step_sizes: Tensor,
    steps_per_level: int = 2,
    w: Tensor | float = 500.0,
    normalize_gradient: bool = True,
    boundary: Boundary = "clip",
    kernel: Kernel = UNADJUSTED,
    start_level: int = 0,
) -> Tensor:
    """The annealed Langevin chain of NC-LQL (arXiv 2602.07873), a pure function: same inputs, same actions.

    It visits the noise levels in order and takes ``steps_per_level`` steps at each, by default
    :func:`~nclql_torchrl.langevin_step`: ``a + step_size / 2 * w * g + sqrt(step_size) * z``. With one level and a
    constant step size it is the chain of LQL. Any differentiable Q will do; the whole batch moves at once.

    Args:
        value_at_level: the landscape at noise level ``0 .. num_levels - 1``, called once per level.
        initial_action: normalised start, shape [*batch, action_dim].
        noise: standard normal noise, shape [num_levels - start_level, steps_per_level, *batch, noise_dim] (the kernel's
            ``noise_dim``: for most the action_dim), or None for a chain without noise.
        step_sizes: one step size per level, shape [num_levels].
        steps_per_level: Langevin steps at each level.
        w: inverse temperature.
        normalize_gradient: whether to use the gradient's direction only.
        boundary: what happens at the faces of the box.
        kernel: the transition.
        start_level: the first level visited.

    Returns:
        Sampled actions in [-1, 1], shape [*batch, action_dim].

    Examples:
        >>> _ = torch.manual_seed(0)
        >>> schedule = NoiseSchedule()
        >>> target = torch.tensor([0.3, -0.6])
        >>> actions = langevin_chain(
        ...     lambda level: lambda action: -((action - target) ** 2).sum(-1),
        ...     torch.zeros(1000, 2),
        ...     torch.randn(10, 2, 1000, 2),
        ...     step_sizes=schedule.step_sizes,
        ... )
        >>> bool((actions.mean(0) - target).abs().max() < 0.01)
        True
    """
    action, _ = kernel_chain(
        value_at_level,
        initial_action,
        noise,
        kernel,
        step_sizes=step_sizes,
        steps_per_level=steps_per_level,
        w=w,
        normalize_gradient=normalize_gradient,
        boundary=boundary,
        start_level=start_level,
    )
    return action


def kernel_chain(
    value_at_level: Callable[[Any], ValueAtLevel],
    action: Tensor,
    noise: Tensor | None,
    kernel: Kernel,
    *,
    step_sizes: Tensor,
    steps_per_level: int,
    w: Tensor | float,
    normalize_gradient: bool,
    boundary: Boundary,
    start_level: int = 0,
    rolled: bool = False,
) -> tuple[Tensor, Carry]:
    """:func:`langevin_chain`, with what the kernel carried to the end, for ``kernel.statistics``.

    Args as there, and:
        rolled: whether the levels are a loop of the compiled program (see :mod:`nclql_torchrl.execution`); then
            ``value_at_level`` gets them as tensors.
    """
    sizes = step_sizes.to(action.dtype)

    def visit(level: Level, action: Tensor, *carry: Tensor) -> tuple[Tensor, ...]:
        value = value_at_level(level)
        # 0-dim: it neither promotes the action's type nor waits for the device.
        step_size = entry(sizes, level).squeeze(0)
        level_noise = None if noise is None else entry(noise, level - start_level).squeeze(0)
        carry = kernel.enter_level(value, action, carry)
        for index in range(steps_per_level):
            step_noise = None if level_noise is None else level_noise[index]
            action, carry = kernel.step(value, action, carry, step_noise, step_size, w, normalize_gradient, boundary)
        return action, *carry

    state = action, *kernel.init(action)
    if rolled:

        def unfinished(level: Tensor, *state: Tensor) -> Tensor:
            return (level < len(sizes)).squeeze(0)

        def next_level(level: Tensor, *state: Tensor) -> tuple[Tensor, ...]:
            return level + 1, *visit(level, *state)

        _, *state = torch.while_loop(unfinished, next_level, (torch.tensor([start_level]), *state))
    else:
        for level in range(start_level, len(sizes)):
            state = visit(level, *state)
    action, *carry = state
    return action, tuple(carry)


def best_particle(particles: Tensor, score: Tensor) -> Tensor:
    """Keeps the particle with the highest score.

    Args:
        particles: shape [num_particles, *batch, action_dim].
        score: shape [num_particles, *batch].

    Returns:
        Shape [*batch, action_dim].
    """
    best = score.argmax(0, keepdim=True).unsqueeze(-1)
    return particles.gather(0, best.expand(1, *particles.shape[1:])).squeeze(0)


def action_range(low: Tensor, high: Tensor) -> tuple[Tensor, Tensor]:
    """Middle and half width of an action box, float64, of the bounds' shape.

    Raises:
        ValueError: if a bound is not finite or ``low`` is not below ``high`` everywhere.
    """
    low, high = low.to(torch.float64), high.to(torch.float64)
    if not (low.isfinite() & high.isfinite() & (low < high)).all():
        raise ValueError(f"The action range is {low.tolist()} to {high.tolist()}; expected finite bounds, low < high.")
    return (high + low) / 2, (high - low) / 2


class LangevinSampler(nn.Module):
    """Draws normalised actions from an :class:`~nclql_torchrl.value.ActionValue`: everything but the critic.

    It holds the noise schedule and the chain's settings. The actor and the loss share one instance, so that the
    actions of the TD target follow the same settings as the actions of the behaviour policy.

    Args:
        action_low: lowest action of the environment, shape [action_dim].
        action_high: highest action of the environment, shape [action_dim].
        schedule: noise levels and step sizes.
        steps_per_level: Langevin steps at each level.
        w: inverse temperature; a buffer, so that it can be scheduled in place.
        normalize_gradient: whether the drift uses the gradient's direction only.
        boundary: "clip" or "reflect".
        kernel: the transition: "langevin" (the authors'), "mala", "underdamped", "preconditioned", or a
            :class:`~nclql_torchrl.kernels.Kernel` with settings of its own.
        execution: how a chain runs, see :mod:`nclql_torchrl.execution`.

    Raises:
        ValueError: for an empty or infinite action range, ``steps_per_level < 1``, ``w <= 0``, an unknown choice, or
            a kernel that cannot work with ``normalize_gradient`` or ``boundary``.
        RuntimeError: where this machine lacks what ``execution`` needs.

    Examples:
        >>> from nclql_torchrl import NoiseConditionedQNetwork
        >>> from tensordict import TensorDict
        >>> critics = [NoiseConditionedQNetwork(3, 2, (32,), action_low=-2.0, action_high=2.0) for _ in range(2)]
        >>> sampler = LangevinSampler(torch.full((2,), -2.0), torch.full((2,), 2.0), w=100.0)
        >>> value = critics[0].action_value(
        ...     TensorDict.from_modules(*critics), torch.randn(5, 3), num_levels=10,
        ...     action_center=sampler.action_center, action_half_range=sampler.action_half_range)
        >>> sampler.to_environment(sampler(value)).shape
        torch.Size([5, 2])
    """

    action_center: Tensor
    """Middle of the action range, shape [action_dim]."""

    action_half_range: Tensor
    """Half of the action range, shape [action_dim]."""

    w: Tensor
    """Inverse temperature, a scalar."""

    def __init__(
        self,
        action_low: Tensor,
        action_high: Tensor,
        schedule: NoiseSchedule | None = None,
        *,
        steps_per_level: int = 2,
        w: float = 500.0,
        normalize_gradient: bool = True,
        boundary: Boundary = "clip",
        kernel: KernelName | Kernel = "langevin",
        execution: Execution = "eager",
    ) -> None:
        super().__init__()
        if steps_per_level < 1:
            raise ValueError(f"steps_per_level is {steps_per_level}; expected at least 1.")
        if not 0.0 < w < float("inf"):
            raise ValueError(f"w is {w}; expected a positive, finite inverse temperature.")
        check_choice("boundary", boundary, Boundary)
        self.kernel = make_kernel(kernel)
        self.kernel.check(normalize_gradient, boundary)
        center, half_range = action_range(action_low, action_high)
        self.register_buffer("action_center", center.to(torch.get_default_dtype()))
        self.register_buffer("action_half_range", half_range.to(torch.get_default_dtype()))
        self.schedule = NoiseSchedule() if schedule is None else schedule
        self.schedule.warn_if_not_mixing(steps_per_level)
        self.steps_per_level = steps_per_level
        self.normalize_gradient = normalize_gradient
        self.boundary: Boundary = boundary
        self.execution: Execution = execution
        self.register_buffer("w", torch.tensor(w, dtype=torch.float64))
        self._execute = Executor(LangevinSampler._chain, execution)

    @property
    def action_dim(self) -> int:
        """Size of the action."""
        return self.action_center.shape[0]

    def forward(
        self,
        value: ActionValue,
        initial_action: Tensor | None = None,
        noise: Tensor | None = None,
        *,
        deterministic: bool = False,
        start_level: int = 0,
    ) -> Tensor:
        """Runs one chain for every observation of ``value``.

        Args:
            value: the critics at the observations to act on, batch shape [*batch].
            initial_action: normalised start, shape [*batch, action_dim]; drawn uniformly if None, or zero when
                ``deterministic``.
            noise: standard normal noise, shape [num_levels - start_level, steps_per_level, *batch, noise_dim] (the
                kernel's ``noise_dim``, for most the action_dim); drawn if None, unless ``deterministic``.
            deterministic: no noise, so that the same observation always gives the same action.
            start_level: the first noise level visited.

        Returns:
            Normalised actions, shape [*batch, action_dim].
        """
        return self.sample(value, initial_action, noise, deterministic=deterministic, start_level=start_level)[0]

    def sample(
        self,
        value: ActionValue,
        initial_action: Tensor | None = None,
        noise: Tensor | None = None,
        *,
        deterministic: bool = False,
        start_level: int = 0,
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """:meth:`forward`, with the kernel's statistics of each chain: name -> tensor of shape [*batch].

        Raises:
            ValueError: for noise of another shape than that.
        """
        shape = (*value.batch_shape, self.action_dim)
        if initial_action is None and deterministic:
            initial_action = torch.zeros(shape, dtype=value.dtype, device=value.device)
        elif initial_action is None:
            initial_action = self.random_start(value)
        num_levels, noise_dim = self.schedule.num_levels - start_level, self.kernel.noise_dim(self.action_dim)
        noise_shape = (num_levels, self.steps_per_level, *value.batch_shape, noise_dim)
        if noise is None:
            # Drawn outside of anything compiled or captured, so that it is fresh in every call. A chain without noise
            # carries zeros: it is the same compiled program.
            draw = torch.zeros if deterministic else torch.randn
            noise = draw(noise_shape, dtype=value.dtype, device=value.device)
        elif noise.shape != noise_shape:
            raise ValueError(
                f"The noise has shape {tuple(noise.shape)}; expected {noise_shape}: levels visited, steps per level, "
                "batch, and the kernel's noise_dim."
            )
        action, *statistics = self._execute(self, value, initial_action, noise)
        return action, dict(zip(self.kernel.statistic_keys, statistics, strict=True))

    def _chain(
        self, value: ActionValue, initial_action: Tensor, noise: Tensor, rolled: bool = False
    ) -> tuple[Tensor, ...]:
        """The actions, then the kernel's statistics in the order of their keys."""
        # Said by the noise alone, so that it need not be said again to what is compiled or captured.
        num_levels = noise.shape[0]
        action, carry = kernel_chain(
            value.levels(),
            initial_action,
            noise,
            self.kernel,
            step_sizes=self.schedule.step_sizes,
            steps_per_level=self.steps_per_level,
            w=self.w.to(value.dtype),
            normalize_gradient=self.normalize_gradient,
            boundary=self.boundary,
            start_level=self.schedule.num_levels - num_levels,
            rolled=rolled and value.takes_tensor_levels,
        )
        statistics = self.kernel.statistics(carry, num_levels * self.steps_per_level)
        return action, *(statistics[key] for key in self.kernel.statistic_keys)

    def random_start(self, value: ActionValue) -> Tensor:
        """Uniform normalised starts for chains on ``value``, shape [*batch, action_dim]."""
        shape = (*value.batch_shape, self.action_dim)
        return torch.rand(shape, dtype=value.dtype, device=value.device) * 2.0 - 1.0

    def to_environment(self, normalised_action: Tensor) -> Tensor:
        """Actions in [-1, 1] -> actions in the environment's units, shape [*batch, action_dim]."""
        return normalised_action * self.action_half_range + self.action_center

    def to_normalised(self, action: Tensor) -> Tensor:
        """Actions in the environment's units -> actions in [-1, 1], shape [*batch, action_dim]."""
        return (action - self.action_center) / self.action_half_range

    def score(self, value: ActionValue, action: Tensor) -> Tensor:
        """Pessimistic noise-free value: the lowest critic at the last level, shape [*batch]."""
        return reduce_ensemble(value.at_level(self.schedule.num_levels - 1).heads(action), "min")

    def extra_repr(self) -> str:
        """Shown by ``print(sampler)``."""
        return (
            f"steps_per_level={self.steps_per_level}, w={self.w.item():g}, "
            f"normalize_gradient={self.normalize_gradient}, boundary={self.boundary}, kernel={self.kernel}, "
            f"execution={self.execution}"
        )
