"""The noise levels of NC-LQL and the Langevin step sizes that go with them."""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable

import torch
from torch import Tensor, nn


class NoiseSchedule(nn.Module):
    """Geometric noise levels and their Langevin step sizes (arXiv 2602.07873).

    Level ``0`` carries the most noise, level ``num_levels - 1`` the least:

    ``sigma_l = sigma_max * (sigma_min / sigma_max) ** (l / (num_levels - 1))`` and
    ``step_size_l = step_lr * (sigma_l / sigma_min) ** 2``.

    Both are buffers, kept in float64 on construction and never below float32 when the module is cast to a
    half-precision type: the smallest step, 1e-4, would otherwise lose three digits. They are the only source of the
    numbers that the sampler and the loss use, so changing a buffer changes both.

    Args:
        num_levels: number of noise levels ``L``, at least 1. With one level the sampler is LQL's.
        sigma_max: standard deviation of level 0, in units of half the action range.
        sigma_min: standard deviation of the last level, in the same unit.
        step_lr: Langevin step size of the last level (the squared standard deviation of the injected noise).

    Raises:
        ValueError: for ``num_levels < 1``, ``sigma_min >= sigma_max`` or a value that is not positive and finite.

    Examples:
        >>> schedule = NoiseSchedule()
        >>> schedule.num_levels
        10
        >>> [round(float(schedule.step_sizes[level]), 4) for level in (0, 5, 9)]
        [1.0, 0.006, 0.0001]
    """

    sigmas: Tensor
    """Noise standard deviation of every level, shape [num_levels]."""

    step_sizes: Tensor
    """Langevin step size of every level, shape [num_levels]."""

    def __init__(
        self,
        num_levels: int = 10,
        sigma_max: float = 0.1,
        sigma_min: float = 0.001,
        step_lr: float = 1e-4,
    ) -> None:
        super().__init__()
        if not isinstance(num_levels, int) or num_levels < 1:
            raise ValueError(f"num_levels is {num_levels!r}; expected an integer of at least 1 (1 gives LQL).")
        for name, value in (("sigma_max", sigma_max), ("sigma_min", sigma_min), ("step_lr", step_lr)):
            if not (math.isfinite(value) and value > 0.0):
                raise ValueError(f"{name} is {value!r}; expected a positive, finite number.")
        if sigma_min >= sigma_max:
            raise ValueError(
                f"sigma_min is {sigma_min!r} and sigma_max is {sigma_max!r}; expected sigma_min < sigma_max "
                f"(did you mean sigma_min={sigma_max!r}, sigma_max={sigma_min!r}?)."
                if sigma_min > sigma_max
                else f"sigma_min and sigma_max are both {sigma_min!r}; expected sigma_min < sigma_max."
            )
        position = torch.arange(num_levels, dtype=torch.float64) / max(num_levels - 1, 1)
        ratio = sigma_min / sigma_max
        sigmas = sigma_max * ratio**position if num_levels > 1 else torch.tensor([sigma_min], dtype=torch.float64)
        self.register_buffer("sigmas", sigmas)
        self.register_buffer("step_sizes", step_lr * (sigmas / sigmas[-1]) ** 2)

    @classmethod
    def constant(cls, step_size: float) -> NoiseSchedule:
        """The schedule of LQL, the paper's base method: one level, ``a + step_size * w * grad + sqrt(2 step_size) z``.

        Args:
            step_size: LQL's constant step ``alpha``; in this class's convention ``step_lr = 2 * alpha``.

        Examples:
            >>> NoiseSchedule.constant(1e-3).step_sizes.tolist()
            [0.002]
        """
        return cls(num_levels=1, step_lr=2.0 * step_size)

    @property
    def num_levels(self) -> int:
        """Number of noise levels ``L``."""
        return self.sigmas.shape[0]

    def minimum_steps_per_level(self) -> int:
        """Langevin steps that each level needs to mix: the least integer ``T >= 0.5 max_l (sigma_l / sigma_{l+1})^2``.

        What a level leaves undone, about half of its last drift, must be coverable by the ``T`` smaller steps of the
        level that follows; otherwise chains stop far from the mode.

        Examples:
            >>> NoiseSchedule().minimum_steps_per_level(), NoiseSchedule(num_levels=5).minimum_steps_per_level()
            (2, 5)
        """
        if self.num_levels == 1:
            return 1
        largest_ratio = (self.sigmas[:-1] / self.sigmas[1:]).max().item()
        # A hair of tolerance, so that a ratio that is an exact bound up to rounding is not rounded up.
        return max(1, math.ceil(0.5 * largest_ratio**2 - 1e-6))

    def warn_if_not_mixing(self, steps_per_level: int) -> None:
        """Warns when ``steps_per_level`` breaks the mixing rule of :meth:`minimum_steps_per_level`.

        Args:
            steps_per_level: Langevin steps at each level, ``T``.
        """
        needed = self.minimum_steps_per_level()
        if steps_per_level < needed:
            warnings.warn(
                f"This schedule cannot mix: steps_per_level is {steps_per_level}, but the rule "
                f"steps_per_level >= 0.5 (sigma_l / sigma_{{l+1}})^2 asks for {needed} with {self.num_levels} levels "
                f"from {self.sigmas[0].item():g} to {self.sigmas[-1].item():g}. Chains will stop far from the modes of "
                f"Q; use more levels, or steps_per_level={needed}.",
                UserWarning,
                stacklevel=3,
            )

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> NoiseSchedule:
        exact = {name: buffer for name, buffer in self._buffers.items() if buffer is not None}
        super()._apply(fn, recurse)
        for name, buffer in exact.items():
            applied = self._buffers[name]
            if applied is not None and applied.dtype.itemsize < 4:
                self._buffers[name] = buffer.to(applied.device)
        return self

    def extra_repr(self) -> str:
        """Shown by ``print(schedule)``."""
        return f"num_levels={self.num_levels}, sigmas={self.sigmas[0].item():g}..{self.sigmas[-1].item():g}"
