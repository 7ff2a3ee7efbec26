"""Running mean and deviation of what was observed, for critics that normalise their observations."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor

from nclql_torchrl.loss import NCLQLLoss

VARIANCE_EPSILON = 1e-8
"""Added to the variances: what is always the same has none."""


class ObservationNormalizer:
    """Keeps the statistics of all collected observations, and writes them into a loss's critics and targets.

    TorchRL's ``VecNormV2`` would normalise in the environment: replay would hold observations normalised by statistics
    of different moments, and every evaluation and exported agent would need the transform beside the critics.

    Args:
        loss: its critics are :class:`~nclql_torchrl.NoiseConditionedQNetwork` s with ``normalize_observation``.
        average: replaces a tensor by its mean over several learners, which collect equally much.

    Examples:
        >>> from torchrl.data import Bounded
        >>> from torchrl.modules import ValueOperator
        >>> from nclql_torchrl import LangevinActor, NoiseConditionedQNetwork
        >>> network = NoiseConditionedQNetwork(1, 2, (8,), normalize_observation=True)
        >>> critic = ValueOperator(network, in_keys=["observation", "action", "level"])
        >>> loss = NCLQLLoss(LangevinActor([critic], spec=Bounded(-1.0, 1.0, (2,))))
        >>> normalizer = ObservationNormalizer(loss)
        >>> normalizer.update(torch.tensor([[1.0], [3.0]]))
        >>> normalizer.update(torch.tensor([[5.0]]))
        >>> loss.target_qvalue_network_params["module", "observation_mean"]
        tensor([[3.]])
    """

    def __init__(self, loss: NCLQLLoss, average: Callable[[Tensor], None] | None = None) -> None:
        ensembles = [loss.qvalue_network_params, *([loss.target_qvalue_network_params] if loss.delay_qvalue else [])]
        names = ("observation_mean", "observation_deviation")
        self._written = [[params.get(("module", name)).detach() for params in ensembles] for name in names]
        observed = self._written[0][0][0]
        self.average = average
        self.count = 0
        """Observations so far, of each learner."""
        self.mean = torch.zeros_like(observed, dtype=torch.float64)
        """Shape [observation_dim]."""
        self.variance = torch.zeros_like(self.mean)
        """Likewise."""

    def update(self, observation: Tensor) -> None:
        """Takes newly collected observations, shape [*batch, observation_dim]."""
        # Workers may collect on another device than the learner's.
        observed = observation.reshape(-1, observation.shape[-1]).to(self.mean.device, self.mean.dtype)
        moments = torch.stack([observed.mean(0), observed.square().mean(0)])
        if self.average is not None:
            self.average(moments)
        mean, square = moments
        # Chan, Golub, LeVeque 1979: the variances of two parts, and that between them.
        self.count += observed.shape[0]
        share = observed.shape[0] / self.count
        delta = mean - self.mean
        self.mean += share * delta
        self.variance += share * (square - mean.square() - self.variance) + share * (1.0 - share) * delta.square()
        self._write()

    def _write(self) -> None:
        deviation = (self.variance.clamp_min(0.0) + VARIANCE_EPSILON).sqrt()
        for value, buffers in zip((self.mean, deviation), self._written, strict=True):
            for buffer in buffers:
                buffer.copy_(value)

    def state_dict(self) -> dict[str, Any]:
        """Count, mean and variance."""
        return {"count": self.count, "mean": self.mean, "variance": self.variance}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Restores :meth:`state_dict`; the critics' own statistics come with the critics."""
        self.count = state["count"]
        self.mean.copy_(state["mean"])
        self.variance.copy_(state["variance"])
