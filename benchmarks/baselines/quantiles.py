"""A trial: NC-LQL with distributional critics, by quantile regression (QR-DQN, arXiv 1710.10044).

What the sampler climbs is the mean of a critic's quantiles, which is a critic like any other: the last layer is
averaged once per chain, and the action gradient stays the written-out one.
"""

from __future__ import annotations

from functools import partial
from typing import Any

import torch
from tensordict import TensorDictBase, TensorDictParams
from torch import Tensor, nn

from benchmarks.baselines.algorithm import Algorithm, Problem
from benchmarks.baselines.langevin import make_variant
from nclql_torchrl.critic import EnsembleActionValue, EnsembleWeights, NoiseConditionedQNetwork
from nclql_torchrl.loss import NCLQLLoss


class QuantileQNetwork(NoiseConditionedQNetwork):
    """Quantiles of the return of an action under a noise level: its output has shape [*batch, num_quantiles].

    Args:
        *sizes: those of NoiseConditionedQNetwork.
        num_quantiles: number of quantiles, at the middles of that many equal shares of the probability.
        **options: those of NoiseConditionedQNetwork.

    Raises:
        ValueError: for fewer than two quantiles.
    """

    def __init__(self, *sizes: Any, num_quantiles: int = 25, **options: Any) -> None:
        if num_quantiles < 2:
            raise ValueError(f"num_quantiles is {num_quantiles}; expected at least 2.")
        super().__init__(*sizes, **options)
        last = self.trunk[-1]
        assert isinstance(last, nn.Linear)
        self.trunk[-1] = nn.Linear(last.in_features, num_quantiles, device=last.weight.device, dtype=last.weight.dtype)
        self.reset_parameters()

    def action_value(
        self, parameters: TensorDictParams | TensorDictBase, observation: Tensor, **options: Any
    ) -> MeanActionValue:
        """The means of an ensemble, for the sampler."""
        return MeanActionValue(EnsembleWeights.of(self, parameters), observation, **options)


class MeanActionValue(EnsembleActionValue):
    """The mean of the outputs of every member of an ensemble."""

    def trunk(self) -> list[tuple[Tensor, Tensor]]:
        """The last layer is linear, so that its mean is a layer with one output."""
        *hidden, (weight, bias) = super().trunk()
        return [*hidden, (weight.mean(-2, keepdim=True), bias.mean(-1, keepdim=True))]


def quantile_huber_loss(predictions: Tensor, targets: Tensor) -> Tensor:
    """Quantile regression with Huber's loss, threshold 1 (arXiv 1710.10044, eq. 10), averaged over all pairs.

    Times four: a small error that all quantiles have in common then moves their mean as a squared error would. The
    noise loss, which shares Adam's moments, is a squared error, and keeps its weight.

    Args:
        predictions: quantiles, shape [*batch, num_quantiles].
        targets: samples of the return, shape [*batch, num_samples].

    Returns:
        Shape [*batch].
    """
    num_quantiles = predictions.shape[-1]
    probability = (
        torch.arange(num_quantiles, device=predictions.device, dtype=predictions.dtype) + 0.5
    ) / num_quantiles
    error = targets.unsqueeze(-2) - predictions.unsqueeze(-1)
    weight = (probability.unsqueeze(-1) - (error.detach() < 0).to(error.dtype)).abs()
    size = error.abs()
    huber = torch.where(size <= 1.0, 0.5 * error.square(), size - 0.5)
    return 4.0 * (weight * huber).mean((-2, -1))


class QuantileLoss(NCLQLLoss):
    """NCLQLLoss whose critics learn quantiles of the return at the noise-free level.

    The target are the quantiles of whichever target critic has the lower mean at the next action. That is NC-LQL's own
    pessimism; TQC's (arXiv 2005.04269), which drops the highest quantiles of all critics, would be a second change.
    Noisy levels learn the mean of the clean action, as they do without quantiles: nobody asks for more of them.

    Args:
        actor_network: its critics are :class:`QuantileQNetwork` s.
        **options: those of NCLQLLoss; ``loss_function`` is that of the noisy levels. Targets are of one step, or of n
            with MultiStepTransform.
    """

    def quantiles(
        self,
        tensordict: TensorDictBase,
        action: Tensor,
        level: Tensor,
        params: TensorDictParams | TensorDictBase | None = None,
    ) -> Tensor:
        """Quantiles of the whole ensemble, shape [num_critics, *batch, num_quantiles]; see ``ensemble_values``."""
        # Of an output of one number it removes the dimension, of quantiles it does not.
        return super().ensemble_values(tensordict, action, level, params)

    def ensemble_values(
        self,
        tensordict: TensorDictBase,
        action: Tensor,
        level: Tensor,
        params: TensorDictParams | TensorDictBase | None = None,
    ) -> Tensor:
        """Means of the whole ensemble, shape [num_critics, *batch]."""
        return self.quantiles(tensordict, action, level, params).mean(-1)

    def qvalue_loss(self, tensordict: TensorDictBase) -> tuple[Tensor, dict[str, Tensor]]:
        """Quantile regression at the noise-free level; the diagnostics are about the means."""
        targets, next_state_value = self.target_quantiles(tensordict)
        level = self.noise_free_level(tensordict, targets.device)
        predictions = self.quantiles(tensordict, tensordict.get(self.tensor_keys.action), level)
        loss = quantile_huber_loss(predictions, targets.expand_as(predictions)).sum(0)
        loss = self._reduce_loss(loss, tensordict=tensordict, weights=self._maybe_get_priority_weight(tensordict))
        means, target_value = predictions.detach().mean(-1), targets.mean(-1)
        metadata = {
            "td_error": (means - target_value).abs().amax(0),
            "pred_value": means.mean(0),
            "target_value": target_value,
            "next_state_value": next_state_value,
        }
        return loss, metadata

    @torch.no_grad()
    def target_quantiles(self, tensordict: TensorDictBase) -> tuple[Tensor, Tensor]:
        """Quantiles of the TD target, shape [*batch, num_quantiles], and the mean of the next state's, [*batch]."""
        next_tensordict = self._next(tensordict)
        next_action = self._next_action(tensordict, next_tensordict)
        level = self.noise_free_level(tensordict, next_action.device)
        quantiles = self.quantiles(next_tensordict, next_action, level, self.target_qvalue_network_params)
        means = quantiles.mean(-1)
        index = means.argmin(0, keepdim=True).unsqueeze(-1).expand(1, *quantiles.shape[1:])
        lowest = quantiles.gather(0, index).squeeze(0)
        # To the value estimator every quantile is a transition of its own.
        num_quantiles = lowest.shape[-1]
        samples = tensordict.unsqueeze(-1).expand(*tensordict.batch_size, num_quantiles)
        return self.bootstrap(samples, lowest), means.amin(0)


def make_quantiles(problem: Problem, *, num_quantiles: int = 25, **options: Any) -> Algorithm:
    """NC-LQL with quantile critics.

    Args:
        problem: sizes, bounds and discount.
        num_quantiles: of each critic; TQC's number.
        **options: those of :func:`~benchmarks.baselines.langevin.make_langevin`.
    """
    return make_variant(problem, options, partial(QuantileQNetwork, num_quantiles=num_quantiles), QuantileLoss)
