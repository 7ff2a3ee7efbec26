"""One step of a Langevin chain: the authors' unadjusted step, and other transitions with the same target exp(w Q)."""

from __future__ import annotations

import abc
import math
from dataclasses import dataclass
from typing import ClassVar, Literal, Protocol

import torch
from torch import Tensor

from nclql_torchrl.value import action_gradient, check_choice

Boundary = Literal["clip", "reflect"]
"""What happens to a coordinate that leaves [-1, 1]: it stops at the face, or bounces back."""

KernelName = Literal["langevin", "mala", "underdamped", "preconditioned"]
"""The kernels by name, each with its default settings."""

Carry = tuple[Tensor, ...]
"""What a kernel remembers from step to step: tensors of fixed shapes."""


class ValueAtLevel(Protocol):
    """Any differentiable Q as the chain sees it: normalised actions [*batch, action_dim] -> values [*batch]."""

    def __call__(self, action: Tensor, /) -> Tensor: ...


def apply_boundary(action: Tensor, boundary: Boundary) -> Tensor:
    """Brings normalised actions of any shape back into [-1, 1] by clipping or by reflection at the faces.

    Examples:
        >>> apply_boundary(torch.tensor([0.5, 1.25, -3.5]), "reflect")
        tensor([0.5000, 0.7500, 0.5000])
    """
    if boundary == "clip":
        return action.clamp(-1.0, 1.0)
    return 1.0 - ((action + 1.0).remainder(4.0) - 2.0).abs()


def langevin_step(
    value: ValueAtLevel,
    action: Tensor,
    noise: Tensor | None,
    step_size: Tensor,
    w: Tensor | float,
    normalize_gradient: bool = True,
    boundary: Boundary = "clip",
) -> Tensor:
    """One Langevin step on ``w Q``: ``a + step_size / 2 * w * g + sqrt(step_size) * z``, kept in the box.

    ``g`` is the action gradient of the combined critics, divided by its norm over the action dimensions (plus 1e-8)
    when ``normalize_gradient`` is set. A value that has a ``gradient`` method is asked for it; any other is
    differentiated by ``torch.func.grad``.

    Args:
        value: the landscape at this level.
        action: normalised actions, shape [*batch, action_dim].
        noise: standard normal noise of the same shape, or None for a step without noise.
        step_size: this level's step size, a scalar tensor.
        w: inverse temperature.
        normalize_gradient: whether to use the gradient's direction only.
        boundary: "clip" or "reflect".

    Returns:
        The next actions, shape [*batch, action_dim].

    Examples:
        >>> value = lambda action: -(action - 0.5).square().sum(-1)
        >>> start = torch.zeros(1, 2)
        >>> langevin_step(value, start, None, torch.tensor(0.2), 1.0, normalize_gradient=False)
        tensor([[0.1000, 0.1000]])
    """
    gradient = _direction(_gradient(value, action), normalize_gradient)
    action = action + (0.5 * step_size * w) * gradient
    if noise is not None:
        action = action + step_size.sqrt() * noise
    return apply_boundary(action, boundary)


class Kernel(abc.ABC):
    """One transition of a Langevin chain, with what it carries from step to step.

    A kernel is stateless: its fields are settings, and everything that changes is in the carry, a tuple of tensors
    whose shapes never change, so that a step can be compiled or captured. All kernels read the step size alike: with
    ``step_size`` the injected noise moves an action by about ``sqrt(step_size)``.
    """

    statistic_keys: ClassVar[tuple[str, ...]] = ()
    """Names of :meth:`statistics`."""

    def noise_dim(self, action_dim: int) -> int:
        """How many standard normal numbers one step takes per action."""
        return action_dim

    def check(self, normalize_gradient: bool, boundary: Boundary) -> None:  # noqa: B027
        """Raises ValueError for settings of the chain with which the kernel would not sample exp(w Q)."""

    def init(self, action: Tensor) -> Carry:
        """The carry at the start of a chain, for actions of shape [*batch, action_dim]."""
        return ()

    def enter_level(self, value: ValueAtLevel, action: Tensor, carry: Carry) -> Carry:
        """The carry after the landscape has changed to ``value``."""
        return carry

    @abc.abstractmethod
    def step(
        self,
        value: ValueAtLevel,
        action: Tensor,
        carry: Carry,
        noise: Tensor | None,
        step_size: Tensor,
        w: Tensor | float,
        normalize_gradient: bool,
        boundary: Boundary,
    ) -> tuple[Tensor, Carry]:
        """One step; arguments as for :func:`langevin_step`, with noise of shape [*batch, noise_dim]."""

    def statistics(self, carry: Carry, num_steps: int) -> dict[str, Tensor]:
        """What the chain can tell of itself after ``num_steps`` steps: a tensor of shape [*batch] for each key."""
        return {}


@dataclass(frozen=True)
class UnadjustedLangevin(Kernel):
    """The authors' kernel, :func:`langevin_step`: nothing is carried, nothing is rejected.

    Its stationary density is exp(w Q) only up to an error of the order of the step size times the curvature, and with
    the normalised gradient it is another one altogether: modes keep their order but not their weights
    (benchmarks/results/README.md has figures).

    Examples:
        >>> UnadjustedLangevin().init(torch.zeros(5, 2))
        ()
    """

    def step(
        self,
        value: ValueAtLevel,
        action: Tensor,
        carry: Carry,
        noise: Tensor | None,
        step_size: Tensor,
        w: Tensor | float,
        normalize_gradient: bool,
        boundary: Boundary,
    ) -> tuple[Tensor, Carry]:
        """See :meth:`Kernel.step`."""
        return langevin_step(value, action, noise, step_size, w, normalize_gradient, boundary), carry


@dataclass(frozen=True)
class MetropolisAdjustedLangevin(Kernel):
    """MALA (Roberts and Tweedie, 1996): proposes the Langevin step and accepts it by the Metropolis-Hastings test.

    Within a level it leaves exp(w Q) restricted to the box exactly invariant, at any step size; a step that is too
    large shows as a low acceptance rate instead of as bias. Two settings are refused because they would break that:

    - the normalised gradient, which is legal as a proposal but no longer points along the energy that is tested: the
      test would reject most of it;
    - clipping, which puts a positive probability on the faces, where the density exp(w Q) has none.

    Reflection is exact. Continue Q beyond the box by its mirror images, ``Q(reflect(x))``: the proposal is made and
    tested in that unfolded space, where it is an ordinary normal and the gradient at an image is mirrored with it; the
    whole picture is symmetric under the mirrors, so folding the result back keeps detailed balance. No sum over images
    is needed.

    Each level costs one evaluation of value and gradient beside one per step. A step takes ``action_dim + 1`` normal
    numbers: the last is turned into the test's uniform number by the normal distribution function. Without noise a
    step is accepted where it does not lower Q: an ascent. ``statistics`` has ``acceptance_rate``.

    Examples:
        >>> MetropolisAdjustedLangevin().noise_dim(6)
        7
    """

    statistic_keys = ("acceptance_rate",)

    def noise_dim(self, action_dim: int) -> int:
        """The proposal's, and one for the test."""
        return action_dim + 1

    def check(self, normalize_gradient: bool, boundary: Boundary) -> None:
        """See the class."""
        if normalize_gradient:
            raise ValueError(
                "normalize_gradient is True with kernel 'mala'; expected False: the normalised gradient is not that of "
                "the energy which the Metropolis test compares."
            )
        if boundary != "reflect":
            raise ValueError(
                f"boundary is {boundary!r} with kernel 'mala'; expected 'reflect': clipped proposals pile up on the "
                "faces of the box, where exp(w Q) has no mass."
            )

    def init(self, action: Tensor) -> Carry:
        """Value and gradient at the action, filled in by :meth:`enter_level`; accepted steps."""
        return torch.zeros_like(action[..., 0]), torch.zeros_like(action), torch.zeros_like(action[..., 0])

    def enter_level(self, value: ValueAtLevel, action: Tensor, carry: Carry) -> Carry:
        """Value and gradient on the new landscape."""
        return (*_value_and_gradient(value, action), carry[-1])

    def step(
        self,
        value: ValueAtLevel,
        action: Tensor,
        carry: Carry,
        noise: Tensor | None,
        step_size: Tensor,
        w: Tensor | float,
        normalize_gradient: bool,
        boundary: Boundary,
    ) -> tuple[Tensor, Carry]:
        """See :meth:`Kernel.step`."""
        level, gradient, accepted = carry
        drift = 0.5 * step_size * w
        unfolded = action + drift * gradient
        if noise is not None:
            unfolded = unfolded + step_size.sqrt() * noise[..., :-1]
        proposal = apply_boundary(unfolded, "reflect")
        proposal_level, proposal_gradient = _value_and_gradient(value, proposal)
        if noise is None:
            accept = proposal_level >= level
        else:
            # The image that `unfolded` lies in runs against the box where the mirrors have turned it an odd number of
            # times; the gradient there is turned as well.
            turned = (unfolded + 1.0).remainder(4.0) >= 2.0
            unfolded_gradient = torch.where(turned, -proposal_gradient, proposal_gradient)
            reverse = (action - unfolded - drift * unfolded_gradient).square().sum(-1) / step_size
            forward = noise[..., :-1].square().sum(-1)
            log_ratio = w * (proposal_level - level) + 0.5 * (forward - reverse)
            accept = _log_uniform(noise[..., -1]) < log_ratio
            # No noise may also come as zeros, which a normal number never is.
            accept = torch.where((noise[..., :-1] == 0.0).all(-1), proposal_level >= level, accept)
        moved = accept.unsqueeze(-1)
        carry = (
            torch.where(accept, proposal_level, level),
            torch.where(moved, proposal_gradient, gradient),
            accepted + accept,
        )
        return torch.where(moved, proposal, action), carry

    def statistics(self, carry: Carry, num_steps: int) -> dict[str, Tensor]:
        """Share of accepted steps."""
        return {"acceptance_rate": carry[-1] / num_steps}


@dataclass(frozen=True)
class UnderdampedLangevin(Kernel):
    """Langevin dynamics with a velocity, by the splitting BAOAB (Leimkuhler and Matthews, 2013), one gradient a step.

    Velocities have unit mass, and the time step is ``h = sqrt(step_size)``, so that the first step from rest moves as
    far as :func:`langevin_step` does. The step is BAOAB entered between its kicks: kick by ``h w g``, drift ``h / 2``,
    friction and noise, drift ``h / 2``; positions are those of BAOAB. On a quadratic its stationary covariance is
    exact for every stable step (``h^2 w curvature < 4``); in general the error is of fourth order in ``h`` at high
    friction and of second order otherwise, where the unadjusted step's is of first order in ``step_size``.

    A coordinate that is reflected turns its velocity too, which is the same dynamics in the mirrored space; one that is
    clipped stops. Chains start at rest. The early levels of an annealed chain take unstable steps and leave velocities
    far above thermal, which the next levels must forget: with the default 2 steps per level only a small
    ``persistence`` can, with 10 about 0.5.

    Args:
        persistence: share of the velocity that a step keeps, in [0, 1): ``exp(-friction h)``. At 0 it is the
            method of Leimkuhler and Matthews for overdamped dynamics.

    Raises:
        ValueError: for a ``persistence`` outside [0, 1).

    Examples:
        >>> kernel = UnderdampedLangevin(persistence=0.8)
        >>> [tuple(entry.shape) for entry in kernel.init(torch.zeros(5, 2))]
        [(5, 2)]
    """

    persistence: float = 0.2

    def __post_init__(self) -> None:
        if not 0.0 <= self.persistence < 1.0:
            raise ValueError(f"persistence is {self.persistence}; expected a number in [0, 1).")

    def init(self, action: Tensor) -> Carry:
        """Velocity."""
        return (torch.zeros_like(action),)

    def step(
        self,
        value: ValueAtLevel,
        action: Tensor,
        carry: Carry,
        noise: Tensor | None,
        step_size: Tensor,
        w: Tensor | float,
        normalize_gradient: bool,
        boundary: Boundary,
    ) -> tuple[Tensor, Carry]:
        """See :meth:`Kernel.step`."""
        (velocity,) = carry
        time_step = step_size.sqrt()
        velocity = velocity + (time_step * w) * _direction(_gradient(value, action), normalize_gradient)
        action, velocity = _drift(action, velocity, 0.5 * time_step, boundary)
        velocity = self.persistence * velocity
        if noise is not None:
            velocity = velocity + math.sqrt(1.0 - self.persistence**2) * noise
        action, velocity = _drift(action, velocity, 0.5 * time_step, boundary)
        return action, (velocity,)


@dataclass(frozen=True)
class PreconditionedLangevin(Kernel):
    """Langevin steps with a step size of its own for every coordinate: flat directions move further than steep ones.

    The metric is diagonal: the inverse root mean square of each gradient coordinate over the chain's own past, as in
    pSGLD (Li et al., arXiv 1512.07666), scaled so that equal coordinates keep ``step_size``. It needs no gradients
    beyond those of the chain. On a quadratic of condition number k it leaves about sqrt(k).

    A metric that depends on the position asks for a correction term with its derivative, which is left out, as pSGLD
    does; so early in the chain the density is biased. The average over the past makes the metric move ever less, by
    ``(1 + forgetting) / (t + forgetting)`` at step t, and with it the bias vanishes in long chains; the bias of the
    step size remains, as for the unadjusted step.

    Args:
        forgetting: how much more the recent past counts: the chain's step s in proportion to about ``s ** forgetting``;
            0 is the plain average.
        damping: share of the overall root mean square added to every coordinate's, positive; no coordinate's step size
            grows by more than ``1 + 1 / damping``.

    Raises:
        ValueError: for a negative ``forgetting`` or a ``damping`` that is not positive.

    Examples:
        >>> kernel = PreconditionedLangevin()
        >>> steep = lambda action: -(torch.tensor([1.0, 100.0]) * action.square()).sum(-1)
        >>> start = torch.full((1, 2), 0.5)
        >>> moved, _ = kernel.step(steep, start, kernel.init(start), None, torch.tensor(1e-3), 1.0, False, "clip")
        >>> start - moved
        tensor([[0.0048, 0.0363]])
    """

    forgetting: float = 3.0
    damping: float = 0.1

    def __post_init__(self) -> None:
        if not self.forgetting >= 0.0:
            raise ValueError(f"forgetting is {self.forgetting}; expected at least 0.")
        if not self.damping > 0.0:
            raise ValueError(f"damping is {self.damping}; expected a positive number.")

    def init(self, action: Tensor) -> Carry:
        """Mean squared gradient, and how many steps it stands for."""
        return torch.zeros_like(action), action.new_zeros(())

    def step(
        self,
        value: ValueAtLevel,
        action: Tensor,
        carry: Carry,
        noise: Tensor | None,
        step_size: Tensor,
        w: Tensor | float,
        normalize_gradient: bool,
        boundary: Boundary,
    ) -> tuple[Tensor, Carry]:
        """See :meth:`Kernel.step`."""
        mean_square, count = carry
        gradient = _gradient(value, action)
        count = count + 1.0
        rate = (1.0 + self.forgetting) / (count + self.forgetting)
        mean_square = mean_square + rate * (gradient.square() - mean_square)
        overall = mean_square.mean(-1, keepdim=True).sqrt() + 1e-8
        metric = (1.0 + self.damping) * overall / (mean_square.sqrt() + self.damping * overall)
        action = action + (0.5 * step_size * w) * metric * _direction(gradient, normalize_gradient)
        if noise is not None:
            action = action + (step_size * metric).sqrt() * noise
        return apply_boundary(action, boundary), (mean_square, count)


KERNELS: dict[str, type[Kernel]] = {
    "langevin": UnadjustedLangevin,
    "mala": MetropolisAdjustedLangevin,
    "underdamped": UnderdampedLangevin,
    "preconditioned": PreconditionedLangevin,
}
"""Name -> class."""


def make_kernel(kernel: KernelName | Kernel) -> Kernel:
    """The kernel of that name, or the given one.

    Raises:
        ValueError: for an unknown name.

    Examples:
        >>> make_kernel("underdamped")
        UnderdampedLangevin(persistence=0.2)
    """
    if isinstance(kernel, Kernel):
        return kernel
    check_choice("kernel", kernel, KernelName)
    return KERNELS[kernel]()


def _gradient(value: ValueAtLevel, action: Tensor) -> Tensor:
    """Action gradient, by the value's own method where it has one."""
    return value.gradient(action) if hasattr(value, "gradient") else action_gradient(value, action)  # pyright: ignore


def _value_and_gradient(value: ValueAtLevel, action: Tensor) -> tuple[Tensor, Tensor]:
    """Value and action gradient, likewise."""
    if hasattr(value, "value_and_gradient"):
        return value.value_and_gradient(action)  # pyright: ignore
    return value(action), _gradient(value, action)


def _direction(gradient: Tensor, normalize: bool) -> Tensor:
    if normalize:
        return gradient / (torch.linalg.vector_norm(gradient, dim=-1, keepdim=True) + 1e-8)
    return gradient


def _drift(action: Tensor, velocity: Tensor, time_step: Tensor, boundary: Boundary) -> tuple[Tensor, Tensor]:
    """Free motion in the box."""
    moved = action + time_step * velocity
    if boundary == "clip":
        stopped = moved.abs() > 1.0
        return apply_boundary(moved, boundary), velocity.masked_fill(stopped, 0.0)
    turned = (moved + 1.0).remainder(4.0) >= 2.0
    return apply_boundary(moved, boundary), torch.where(turned, -velocity, velocity)


def _log_uniform(normal: Tensor) -> Tensor:
    """Logarithm of the uniform number that a standard normal one is a quantile of."""
    # Not torch.special.log_ndtr: it has no rule for vmap.
    return (0.5 * torch.erfc(-math.sqrt(0.5) * normal)).log()
