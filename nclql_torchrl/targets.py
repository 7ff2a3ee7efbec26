"""Landscapes over actions whose Boltzmann density is known exactly: what samplers are tested and profiled on."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from nclql_torchrl.schedule import NoiseSchedule
from nclql_torchrl.value import ActionValue, EnsembleReduction, LevelValue

QUADRATURE_ORDER = 7
"""Gauss-Hermite nodes per action dimension of :meth:`AnalyticTarget.smoothed`: exact for polynomials of degree 13."""


class AnalyticTarget:
    """Q over normalised actions with ``exp(w Q)`` a mixture of axis-aligned normals cut off at the box [-1, 1]^d.

    With one component Q is a quadratic. Everything a sampler can be held to is exact: moments, weights of the modes,
    samples, and the probability of any rectangle.

    Args:
        centers: of the components, shape [num_modes, action_dim]. They may lie outside the box.
        deviations: of the components before they are cut off, shape [num_modes, action_dim].
        weights: probability of each component, shape [num_modes]; by default all the same.
        w: inverse temperature: Q is ``log_density / w``.
        dtype: of the target and of what it returns.
        device: where the target is evaluated and sampled.

    Raises:
        ValueError: for shapes that do not fit, a deviation, weight or ``w`` that is not positive, or a component with
            nothing inside the box.

    Examples:
        >>> target = AnalyticTarget([[0.2, -0.3]], [[0.1, 0.01]])
        >>> target(torch.zeros(5, 2)).shape
        torch.Size([5])
        >>> bool((target.sample(10_000).mean(0) - target.mean).abs().max() < 0.01)
        True
    """

    def __init__(
        self,
        centers: Sequence[Sequence[float]] | Tensor,
        deviations: Sequence[Sequence[float]] | Tensor,
        weights: Sequence[float] | Tensor | None = None,
        *,
        w: float = 500.0,
        dtype: torch.dtype = torch.float32,
        device: torch.device | str = "cpu",
    ) -> None:
        # The exact quantities are computed in float64 on the CPU; `log_density` in the target's own type and place.
        self.centers = torch.as_tensor(centers, dtype=torch.float64)
        self.deviations = torch.as_tensor(deviations, dtype=torch.float64)
        num_modes = self.centers.shape[0]
        weights = torch.ones(num_modes) if weights is None else weights
        self.weights = torch.as_tensor(weights, dtype=torch.float64)
        if self.centers.ndim != 2 or self.deviations.shape != self.centers.shape or self.weights.shape != (num_modes,):
            raise ValueError(
                f"centers, deviations and weights have shapes {tuple(self.centers.shape)}, "
                f"{tuple(self.deviations.shape)} and {tuple(self.weights.shape)}; expected [num_modes, action_dim] "
                "twice and [num_modes]."
            )
        for name, values in (("deviations", self.deviations), ("weights", self.weights), ("w", torch.tensor(w))):
            if not (values.isfinite() & (values > 0)).all():
                raise ValueError(f"{name} is {values.tolist()}; expected positive, finite numbers.")
        self.weights = self.weights / self.weights.sum()
        self.w = w
        self.dtype, self.device = dtype, torch.device(device)
        # A component's share of its normal that lies in the box, per dimension.
        self._low = _normal_cdf((-1.0 - self.centers) / self.deviations)
        self._inside = _normal_cdf((1.0 - self.centers) / self.deviations) - self._low
        if not (self._inside > 0).all():
            raise ValueError(f"centers is {self.centers.tolist()}; expected components that reach into the box.")
        scale = self.deviations * self._inside * math.sqrt(2.0 * math.pi)
        self._log_scale = (self.weights.log() - scale.log().sum(-1)).to(self.device, dtype)
        self._points = self.centers.to(self.device, dtype)
        self._inverse = self.deviations.reciprocal().to(self.device, dtype)

    @property
    def action_dim(self) -> int:
        """Size of the action."""
        return self.centers.shape[1]

    @property
    def num_modes(self) -> int:
        """Number of components."""
        return self.centers.shape[0]

    def __call__(self, action: Tensor) -> Tensor:
        """Q, shape [*batch], of normalised actions of shape [*batch, action_dim]. It is smooth beyond the box too."""
        return self.log_density(action) / self.w

    def log_density(self, action: Tensor) -> Tensor:
        """Logarithm of the normalised density, shape [*batch], of actions inside the box."""
        standardised = (action.unsqueeze(-2) - self._points) * self._inverse
        return torch.logsumexp(self._log_scale - 0.5 * standardised.square().sum(-1), -1)

    def smoothed(self, sigma: float) -> LevelValue:
        """``E[Q(a + sigma z)]``: what a noise-conditioned critic learns where its data covers the actions evenly.

        A quadratic only loses a constant and stays as it is. A mixture is integrated by Gauss-Hermite quadrature, which
        rounds off the ridges between its modes: there it errs by about ``0.1 / w``.

        Raises:
            ValueError: for a mixture of more than two action dimensions, whose quadrature would have too many nodes.
        """
        return _SmoothedTarget(self, sigma)

    def action_value(self, batch_shape: Sequence[int], schedule: NoiseSchedule) -> ActionValue:
        """The target as :class:`~nclql_torchrl.LangevinSampler` reads a critic: smoothed by each level's noise.

        The last level is not smoothed, so that a chain which is exact there is exact for the target.

        Args:
            batch_shape: how many independent chains, in any shape.
            schedule: gives the noise of the levels.
        """
        return _TargetActionValue(self, torch.Size(batch_shape), [*schedule.sigmas[:-1].tolist(), 0.0])

    @property
    def mean(self) -> Tensor:
        """Exact mean, shape [action_dim]."""
        return (self.weights.unsqueeze(-1) * self._component_moments()[0]).sum(0).to(self.device, self.dtype)

    @property
    def covariance(self) -> Tensor:
        """Exact covariance, shape [action_dim, action_dim]."""
        means, variances = self._component_moments()
        offsets = means - (self.weights.unsqueeze(-1) * means).sum(0)
        between = torch.einsum("k,ki,kj->ij", self.weights, offsets, offsets)
        return (between + torch.diag((self.weights.unsqueeze(-1) * variances).sum(0))).to(self.device, self.dtype)

    def _component_moments(self) -> tuple[Tensor, Tensor]:
        """Means and variances of the truncated components, float64, each of shape [num_modes, action_dim]."""
        low, high = (-1.0 - self.centers) / self.deviations, (1.0 - self.centers) / self.deviations
        density_low, density_high = _normal_density(low), _normal_density(high)
        shift = (density_low - density_high) / self._inside
        means = self.centers + self.deviations * shift
        narrowing = 1.0 + (low * density_low - high * density_high) / self._inside - shift.square()
        return means, self.deviations.square() * narrowing

    def sample(self, num_samples: int) -> Tensor:
        """Exact, independent samples, shape [num_samples, action_dim]."""
        mode = torch.multinomial(self.weights, num_samples, replacement=True)
        uniform = torch.rand(num_samples, self.action_dim, dtype=torch.float64)
        quantile = torch.special.ndtri(self._low[mode] + uniform * self._inside[mode])
        return (self.centers[mode] + self.deviations[mode] * quantile).clamp(-1.0, 1.0).to(self.device, self.dtype)

    def mode(self, action: Tensor) -> Tensor:
        """The component that most probably gave each action, integers of shape [*batch]."""
        standardised = (action.unsqueeze(-2) - self._points) * self._inverse
        return (self._log_scale - 0.5 * standardised.square().sum(-1)).argmax(-1)

    def mode_shares(self, action: Tensor) -> Tensor:
        """Share of the actions in each mode, shape [num_modes]; ``weights`` where modes are far apart and all is well.

        Args:
            action: shape [num_samples, action_dim].
        """
        return torch.bincount(self.mode(action), minlength=self.num_modes) / action.shape[0]

    def cell_probabilities(self, num_bins: int = 20) -> tuple[list[Tensor], Tensor]:
        """A grid over the first two action dimensions (or the only one), and the exact probability of its cells.

        Edges are quantiles of the marginals, so that a narrow density is resolved as well as a wide one.

        Args:
            num_bins: per dimension.

        Returns:
            Per dimension the edges between bins, shape [num_bins - 1]; and probabilities, shape [num_bins] * min(2, d).
        """
        levels = torch.arange(1, num_bins, dtype=torch.float64) / num_bins
        # 50,000 intervals: 4e-5 wide, far below any deviation that is of use.
        grid = torch.linspace(-1.0, 1.0, 50_001, dtype=torch.float64)
        edges, masses = [], []
        for dimension in range(min(2, self.action_dim)):
            marginal = (self.weights * self._component_cdf(grid, dimension)).sum(-1)
            inner = grid[torch.searchsorted(marginal, levels).clamp(max=grid.shape[0] - 1)]
            bounds = torch.cat([inner.new_tensor([-1.0]), inner, inner.new_tensor([1.0])])
            edges.append(inner)
            masses.append(self._component_cdf(bounds, dimension).diff(dim=0))
        if len(masses) == 1:
            return edges, (masses[0] * self.weights).sum(-1)
        return edges, torch.einsum("ik,jk,k->ij", *masses, self.weights)

    def _component_cdf(self, points: Tensor, dimension: int) -> Tensor:
        """Cumulative probability of each component along one dimension, shape [len(points), num_modes]."""
        standardised = (points.unsqueeze(-1) - self.centers[:, dimension]) / self.deviations[:, dimension]
        return (_normal_cdf(standardised) - self._low[:, dimension]) / self._inside[:, dimension]

    def total_variation(self, action: Tensor, num_bins: int = 20) -> float:
        """Total-variation distance of samples to the target over the grid of :meth:`cell_probabilities`, in [0, 1].

        Even exact samples are not at zero: ``n`` of them are expected at
        ``0.5 sum_cells sqrt(2 p (1 - p) / (pi n))``, about ``0.4 sqrt(num_cells / n)``.

        Args:
            action: shape [num_samples, action_dim].
            num_bins: per dimension.
        """
        edges, probabilities = self.cell_probabilities(num_bins)
        index = torch.zeros(action.shape[0], dtype=torch.int64)
        for dimension, inner in enumerate(edges):
            coordinate = action[:, dimension].to("cpu", torch.float64).contiguous()
            index = index * num_bins + torch.bucketize(coordinate, inner)
        found = torch.bincount(index, minlength=probabilities.numel()) / action.shape[0]
        return float(0.5 * (found - probabilities.flatten()).abs().sum())

    def __repr__(self) -> str:
        return f"{type(self).__name__}(num_modes={self.num_modes}, action_dim={self.action_dim}, w={self.w:g})"


class _SmoothedTarget(LevelValue):
    """See :meth:`AnalyticTarget.smoothed`."""

    reduction: EnsembleReduction = "sum"

    def __init__(self, target: AnalyticTarget, sigma: float) -> None:
        self.target = target
        self.offsets: Tensor | None = None
        if target.num_modes == 1 or sigma == 0.0:
            return
        if target.action_dim > 2:
            raise ValueError(
                f"This mixture has {target.action_dim} action dimensions; expected at most 2 for the quadrature that "
                "smooths it."
            )
        nodes, weights = _gauss_hermite(QUADRATURE_ORDER)
        nodes = torch.cartesian_prod(*[nodes] * target.action_dim).reshape(-1, target.action_dim)
        products = torch.cartesian_prod(*[weights] * target.action_dim).reshape(-1, target.action_dim).prod(-1)
        self.offsets = (sigma * nodes).to(target.device, target.dtype)
        self.node_weights = products.to(target.device, target.dtype)

    def heads(self, action: Tensor) -> Tensor:
        """One critic, the target: shape [1, *batch]."""
        if self.offsets is None:
            return self.target(action).unsqueeze(0)
        return (self.target(action.unsqueeze(-2) + self.offsets) @ self.node_weights).unsqueeze(0)


class _TargetActionValue(ActionValue):
    """See :meth:`AnalyticTarget.action_value`."""

    def __init__(self, target: AnalyticTarget, batch_shape: torch.Size, sigmas: list[float]) -> None:
        self.target = target
        self.batch_shape = batch_shape
        self.dtype, self.device = target.dtype, target.device
        self.sigmas = sigmas

    def levels(self) -> Callable[[int], LevelValue]:
        """The target smoothed by each level's noise."""
        return lambda level: self.target.smoothed(self.sigmas[level])

    @property
    def observations(self) -> tuple[Tensor, ...]:
        """A placeholder, so that a batch of chains can be divided."""
        return (torch.zeros(self.batch_shape, device=self.device),)

    def at_observations(self, observations: tuple[Tensor, ...]) -> _TargetActionValue:
        """As many chains as there are entries."""
        return _TargetActionValue(self.target, observations[0].shape, self.sigmas)

    @property
    def parameters(self) -> list[Tensor]:
        """What the target is made of."""
        return [self.target._log_scale, self.target._points, self.target._inverse]

    @property
    def memory_per_state(self) -> int:
        """Bytes per chain: the standardised action of every mode at every node of the quadrature, eight times."""
        nodes = QUADRATURE_ORDER**self.target.action_dim if self.target.num_modes > 1 else 1
        return 8 * nodes * self.target.num_modes * self.target.action_dim * self.dtype.itemsize


def stiff_quadratic(
    *, w: float = 500.0, dtype: torch.dtype = torch.float32, device: torch.device | str = "cpu"
) -> AnalyticTarget:
    """One mode well inside the box, with deviations from 0.14 to 0.014: the stiffest direction is 100 times as curved
    as the widest.

    Examples:
        >>> stiff_quadratic().covariance.diagonal().sqrt()
        tensor([0.1400, 0.0450, 0.0140])
    """
    return AnalyticTarget([[0.2, -0.3, 0.1]], [[0.14, 0.045, 0.014]], w=w, dtype=dtype, device=device)


def four_modes(
    *,
    deviation: float = 0.1,
    w: float = 500.0,
    dtype: torch.dtype = torch.float32,
    device: torch.device | str = "cpu",
) -> AnalyticTarget:
    """Modes at (±0.5, ±0.5) of weights 0.4, 0.3, 0.2 and 0.1. With 0.1 no local move crosses between them; with 0.2
    a chain of some hundred steps does.

    Examples:
        >>> four_modes().weights
        tensor([0.4000, 0.3000, 0.2000, 0.1000], dtype=torch.float64)
    """
    centers = [[0.5, 0.5], [-0.5, 0.5], [-0.5, -0.5], [0.5, -0.5]]
    return AnalyticTarget(centers, [[deviation] * 2] * 4, [0.4, 0.3, 0.2, 0.1], w=w, dtype=dtype, device=device)


def truncated_quadratic(
    *, w: float = 500.0, dtype: torch.dtype = torch.float32, device: torch.device | str = "cpu"
) -> AnalyticTarget:
    """A quadratic cut off by the box: its top is outside in one dimension and close to a face in the other.

    Examples:
        >>> truncated_quadratic().mean
        tensor([ 0.7936, -0.7415])
    """
    return AnalyticTarget([[1.1, -0.95]], [[0.3, 0.3]], w=w, dtype=dtype, device=device)


TARGETS = {
    "stiff_quadratic": stiff_quadratic,
    "four_modes": four_modes,
    "truncated_quadratic": truncated_quadratic,
}
"""Name -> function that makes the target."""


def _normal_cdf(x: Tensor) -> Tensor:
    return torch.special.ndtr(x)


def _normal_density(x: Tensor) -> Tensor:
    return (-0.5 * x.square()).exp() / math.sqrt(2.0 * math.pi)


def _gauss_hermite(order: int) -> tuple[Tensor, Tensor]:
    """Nodes and weights for expectations under a standard normal: eigenvalues of the recurrence's matrix."""
    off_diagonal = torch.arange(1, order, dtype=torch.float64).sqrt()
    nodes, vectors = torch.linalg.eigh(torch.diag(off_diagonal, 1) + torch.diag(off_diagonal, -1))
    return nodes, vectors[0].square()
