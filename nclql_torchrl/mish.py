"""The critics' activation with its slope, cheaply."""

from __future__ import annotations

from torch import Tensor


def mish_with_slope(x: Tensor) -> tuple[Tensor, Tensor]:
    """Mish and its derivative from a single exponential.

    With ``e = exp(x)`` and ``n = e (e + 2)``, ``tanh(softplus(x)) = n / (n + 2)``; so ``mish(x) = x n / (n + 2)`` and
    its derivative is ``n / (n + 2) + 4 x e (e + 1) / (n + 2)^2``. Beyond 20 both equal their limits to the last digit
    of a float64, and the clamp keeps ``e^2`` finite.

    Args:
        x: any shape.

    Returns:
        ``mish(x)`` and ``mish'(x)``, each of the shape of ``x``.
    """
    e = x.clamp(max=20.0).exp()
    n = e * (e + 2.0)
    r = (n + 2.0).reciprocal()
    t = n * r
    return x * t, t + 4.0 * x * e * (e + 1.0) * r * r
