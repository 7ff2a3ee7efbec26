"""A trial: NC-LQL with CrossQ's critics (arXiv 1902.05605), batch-normalised and without target networks.

Statistics come from the noise-free level alone, from the joint batch of (s, a) and (s', a'). Everything else, which is
acting, the sampler and the noise loss, uses the running ones:

- A noisy level is only ever read by the sampler, with running statistics. The noise loss trains it as it is read.
- Noisy actions would move the statistics with which the noise-free level is read, the one that the TD loss is about.
  Statistics of each level would come from a ninth of a batch; and noise of at most a tenth of the half range changes
  what enters the network little.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from tensordict import TensorDict, TensorDictBase, TensorDictParams
from tensordict.utils import expand_as_right
from torch import Tensor, nn
from torchrl.modules import BatchRenorm1d

from benchmarks.baselines.algorithm import Algorithm, Problem
from benchmarks.baselines.langevin import make_variant
from nclql_torchrl.actor import LangevinActor
from nclql_torchrl.critic import EnsembleActionValue, EnsembleWeights, NoiseConditionedQNetwork, normalise
from nclql_torchrl.loss import NCLQLLoss

EPSILON = 1e-5
"""Added to the variances."""


class BatchRenorm(BatchRenorm1d):
    """TorchRL's, over the last dimension, and with a count of batches that ends at ``warmup_steps``.

    TorchRL 0.14.1 means to end it there but drops the result: from twice the warm-up on its corrections are doubled.
    """

    num_batches_tracked: Tensor
    """Batches seen in training mode, at most ``warmup_steps``."""

    def forward(self, x: Tensor) -> Tensor:
        """Normalised, shape [*batch, num_features]."""
        normalised = super().forward(x.reshape(-1, x.shape[-1])).reshape(x.shape)
        if self.training:
            # Not clamp_, which has no batching rule for torch.vmap.
            self.num_batches_tracked.copy_(self.num_batches_tracked.clamp(max=self.warmup_steps))
        return normalised


class Renorm(NamedTuple):
    """What :class:`BatchRenorm` is made of where it is not training, each of shape [num_critics, num_features]."""

    weight: Tensor
    bias: Tensor
    running_mean: Tensor
    running_var: Tensor


class CrossQNetwork(NoiseConditionedQNetwork):
    """Q(s, a, l) with batch renormalisation before every layer of the trunk; the level's embedding is left as it is.

    In training mode statistics are the batch's, and the running ones follow.

    Args:
        observation_dim, action_dim, hidden_sizes: as of NoiseConditionedQNetwork.
        warmup_steps: batches that are normalised by their own statistics alone.
        **options: those of NoiseConditionedQNetwork.
    """

    def __init__(
        self, observation_dim: int, action_dim: int, hidden_sizes: Any, *, warmup_steps: int, **options: Any
    ) -> None:
        super().__init__(observation_dim, action_dim, hidden_sizes, **options)
        widths = (observation_dim + action_dim, *hidden_sizes)
        self.renorms = nn.ModuleList(BatchRenorm(width, eps=EPSILON, warmup_steps=warmup_steps) for width in widths)
        self.renorms.to(self.action_center)

    def forward(self, observation: Tensor, action: Tensor, level: Tensor) -> Tensor:
        """Value, shape [*batch, 1]."""
        if self.normalize_observation:
            observation = normalise(observation, self.observation_mean, self.observation_deviation)
        normalised = (action - self.action_center) / self.action_half_range
        hidden = self.renorms[0](torch.cat([observation, normalised], -1))
        # It only takes as many values as there are levels: one in a batch of the TD loss, where it has no variance.
        hidden = torch.cat([hidden, self.embed_level(level)], -1)
        for index, (layer, renorm) in enumerate(zip(self.trunk[:-1], self.renorms[1:], strict=True)):
            hidden = renorm(self._activate(layer(hidden), index))
        return self.trunk[-1](hidden)

    def action_value(
        self, parameters: TensorDictParams | TensorDictBase, observation: Tensor, **options: Any
    ) -> RenormActionValue:
        """The ensemble at its running statistics, for the sampler."""
        keys = [("renorms", str(index)) for index in range(len(self.renorms))]
        renorms = [Renorm(*(parameters.get((*key, name)).detach() for name in Renorm._fields)) for key in keys]
        return RenormActionValue(EnsembleWeights.of(self, parameters), observation, renorms=renorms, **options)


class RenormActionValue(EnsembleActionValue):
    """An ensemble of :class:`CrossQNetwork` at its running statistics.

    There every normalisation is an affine map before a linear layer: a linear layer together. So the action gradient
    stays the written-out one.

    Args:
        weights, observation, **options: those of EnsembleActionValue.
        renorms: what stands before each layer of the trunk.
    """

    def __init__(self, weights: EnsembleWeights, observation: Tensor, *, renorms: list[Renorm], **options: Any) -> None:
        super().__init__(weights, observation, **options)
        self.renorms = renorms

    @property
    def parameters(self) -> list[Tensor]:
        return [*super().parameters, *(tensor for renorm in self.renorms for tensor in renorm)]

    def trunk(self) -> list[tuple[Tensor, Tensor]]:
        """Each normalisation folded into the layer after it."""
        layers = zip(super().trunk(), self.renorms, strict=True)
        return [self._fold(weight, bias, renorm) for (weight, bias), renorm in layers]

    @staticmethod
    def _fold(weight: Tensor, bias: Tensor, renorm: Renorm) -> tuple[Tensor, Tensor]:
        """Weight and bias of the layer on what is not normalised yet."""
        scale = renorm.weight / (renorm.running_var + EPSILON).sqrt()
        shift = renorm.bias - renorm.running_mean * scale
        # The level's embedding, the last inputs of the first layer, is not normalised.
        missing = weight.shape[-1] - scale.shape[-1]
        scale, shift = F.pad(scale, (0, missing), value=1.0), F.pad(shift, (0, missing))
        return weight * scale.unsqueeze(-2), bias + shift.unsqueeze(-2) @ weight.mT


class CrossQLoss(NCLQLLoss):
    """NCLQLLoss without target networks, for :class:`CrossQNetwork` s.

    Args:
        actor_network: its critics are :class:`CrossQNetwork` s.
        **options: those of NCLQLLoss.
    """

    def __init__(self, actor_network: LangevinActor, **options: Any) -> None:
        super().__init__(actor_network, delay_qvalue=False, **options)
        self.qvalue_network.eval()

    def qvalue_loss(self, tensordict: TensorDictBase) -> tuple[Tensor, dict[str, Tensor]]:
        """Squared TD error at the noise-free level, whose target comes out of the same pass; batch shape [batch]."""
        next_tensordict = self._next(tensordict)
        next_action = self._next_action(tensordict, next_tensordict)
        keys = self.actor_network.observation_keys
        joint = TensorDict.cat([tensordict.select(*keys), next_tensordict.select(*keys)])
        assert isinstance(joint, TensorDictBase)
        action = torch.cat([tensordict.get(self.tensor_keys.action), next_action])
        level = self.noise_free_level(joint, action.device)
        with self._batch_statistics():
            values = self.ensemble_values(joint, action, level)
        predictions, next_values = values.chunk(2, dim=1)
        next_state_value = next_values.detach().amin(0)
        target_value = self.bootstrap(tensordict, next_state_value)
        return self.td_loss(tensordict, predictions, target_value, next_state_value)

    @contextmanager
    def _batch_statistics(self) -> Iterator[None]:
        """Critics normalise by the batch, and move their running statistics.

        A compiled update moves them also while it is traced: once more, or five times with a CUDA graph.
        """
        self.qvalue_network.train()
        try:
            yield
        finally:
            self.qvalue_network.eval()

    def _next(self, tensordict: TensorDictBase) -> TensorDictBase:
        """The next state, and the state itself where nothing bootstraps: zeros would move the statistics."""
        next_tensordict = super()._next(tensordict)
        unused = tensordict.get(("next", self.tensor_keys.terminated))
        for key in self.actor_network.observation_keys:
            observation = tensordict.get(key)
            mask = expand_as_right(unused.squeeze(-1), observation)
            next_tensordict.set(key, torch.where(mask, observation, next_tensordict.get(key)))
        return next_tensordict


def make_crossq(problem: Problem, *, warmup_steps: int = 1_000, **options: Any) -> Algorithm:
    """NC-LQL with CrossQ's critics; widths and Adam's settings stay NC-LQL's.

    Args:
        problem: sizes, bounds and discount; there is nothing that ``tau`` could move.
        warmup_steps: updates with plain batch normalisation. CrossQ's 100,000 are more than these budgets.
        **options: those of :func:`~benchmarks.baselines.langevin.make_langevin`.
    """
    return make_variant(problem, options, partial(CrossQNetwork, warmup_steps=warmup_steps), CrossQLoss)
