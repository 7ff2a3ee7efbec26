"""The noise-conditioned critic Q(s, a, l), and its action gradient written out."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise

import torch
import torch.nn.functional as F
from tensordict import TensorDictBase, TensorDictParams
from torch import Tensor, nn

from nclql_torchrl.langevin import action_range
from nclql_torchrl.value import ActionValue, EnsembleReduction, LevelValue

LEVEL_EMBEDDING_DIM = 16
LEVEL_HIDDEN_DIM = 32


class NoiseConditionedQNetwork(nn.Module):
    """Q(s, a, l): the value of an action under noise level ``l`` (arXiv 2602.07873; sizes of its authors' program).

    The level becomes sines and cosines, which two small layers refine; observation, action and level embedding enter
    one multi-layer perceptron with mish activations. Actions are mapped to [-1, 1] on entry, so that replay, loss and
    actor can all speak the environment's units.

    :meth:`action_value` gives the sampler what it needs: there the observation's and the level's share of the first
    layer are computed once per call instead of at every Langevin step.

    Args:
        observation_dim: size of the observation.
        action_dim: size of the action.
        hidden_sizes: widths of the hidden layers.
        action_low: lowest action of the environment, a number or a tensor of shape [action_dim].
        action_high: highest action of the environment, likewise.
        device: where to create the parameters.
        dtype: their type.

    Raises:
        ValueError: for a size below 1, or ``action_low`` not below ``action_high``.

    Examples:
        >>> critic = NoiseConditionedQNetwork(observation_dim=17, action_dim=6)
        >>> sum(parameter.numel() for parameter in critic.parameters())
        143153
        >>> critic(torch.zeros(5, 17), torch.zeros(5, 6), torch.tensor([0, 3, 9, 9, 9])).shape
        torch.Size([5, 1])
    """

    action_center: Tensor
    """Middle of the action range, shape [action_dim]."""

    action_half_range: Tensor
    """Half of the action range, shape [action_dim]."""

    level_frequencies: Tensor
    """Frequencies of the level embedding, shape [8]."""

    def __init__(
        self,
        observation_dim: int,
        action_dim: int,
        hidden_sizes: Sequence[int] = (256, 256, 256),
        *,
        action_low: float | Tensor = -1.0,
        action_high: float | Tensor = 1.0,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        for name, size in (("observation_dim", observation_dim), ("action_dim", action_dim)):
            if size < 1:
                raise ValueError(f"{name} is {size}; expected at least 1.")
        if not hidden_sizes or min(hidden_sizes) < 1:
            raise ValueError(f"hidden_sizes is {tuple(hidden_sizes)}; expected at least one width, each at least 1.")
        self.observation_dim = observation_dim
        self.action_dim = action_dim
        low = torch.as_tensor(action_low, device=device).expand(action_dim)
        high = torch.as_tensor(action_high, device=device).expand(action_dim)
        center, half_range = action_range(low, high)
        self.register_buffer("action_center", center.to(dtype or torch.get_default_dtype()))
        self.register_buffer("action_half_range", half_range.to(dtype or torch.get_default_dtype()))
        half = LEVEL_EMBEDDING_DIM // 2
        frequencies = 10000.0 ** (-torch.arange(half, dtype=torch.float64) / half)
        self.register_buffer("level_frequencies", frequencies.to(device, dtype or torch.get_default_dtype()))
        sizes = (observation_dim + action_dim + LEVEL_EMBEDDING_DIM, *hidden_sizes, 1)

        def linear(inputs: int, outputs: int) -> nn.Linear:
            return nn.Linear(inputs, outputs, device=device, dtype=dtype)

        self.embed = nn.ModuleList(
            [linear(LEVEL_EMBEDDING_DIM, LEVEL_HIDDEN_DIM), linear(LEVEL_HIDDEN_DIM, LEVEL_EMBEDDING_DIM)]
        )
        self.trunk = nn.ModuleList([linear(inputs, outputs) for inputs, outputs in pairwise(sizes)])
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Weights from a normal of deviation ``1 / sqrt(fan_in)`` cut at two deviations; biases zero."""
        for layer in (*self.embed, *self.trunk):
            assert isinstance(layer, nn.Linear)
            deviation = layer.in_features**-0.5
            nn.init.trunc_normal_(layer.weight, std=deviation, a=-2.0 * deviation, b=2.0 * deviation)
            nn.init.zeros_(layer.bias)

    def embed_level(self, level: Tensor) -> Tensor:
        """Embedding of noise levels.

        Args:
            level: integer levels, shape [*batch].

        Returns:
            Embedding, shape [*batch, 16].
        """
        angle = level.unsqueeze(-1) * self.level_frequencies
        embedding = torch.cat([angle.sin(), angle.cos()], -1) / LEVEL_EMBEDDING_DIM**0.5
        return self.embed[1](F.mish(self.embed[0](embedding)))

    def forward(self, observation: Tensor, action: Tensor, level: Tensor) -> Tensor:
        """Q(s, a, l).

        Args:
            observation: shape [*batch, observation_dim].
            action: in the environment's units, shape [*batch, action_dim].
            level: integer noise level, shape [*batch] (or broadcastable to it); ``num_levels - 1`` is noise-free.

        Returns:
            Value, shape [*batch, 1].
        """
        normalised = (action - self.action_center) / self.action_half_range
        embedding = self.embed_level(level).expand(*observation.shape[:-1], -1)
        hidden = torch.cat([observation, normalised, embedding], -1)
        for layer in self.trunk[:-1]:
            hidden = F.mish(layer(hidden))
        return self.trunk[-1](hidden)

    def action_value(
        self,
        parameters: TensorDictParams | TensorDictBase,
        observation: Tensor,
        *,
        num_levels: int,
        action_center: Tensor,
        action_half_range: Tensor,
        reduction: EnsembleReduction = "sum",
    ) -> EnsembleActionValue:
        """Q of an ensemble of such networks at fixed observations, for the sampler.

        Args:
            parameters: parameters and buffers of the ensemble, stacked along a first dimension.
            observation: shape [batch, observation_dim].
            num_levels: number of noise levels.
            action_center, action_half_range: the environment's action is ``center + half_range * normalised``.
            reduction: how the critics are combined.
        """
        return EnsembleActionValue(
            self,
            parameters,
            observation,
            num_levels=num_levels,
            action_center=action_center,
            action_half_range=action_half_range,
            reduction=reduction,
        )


class EnsembleActionValue(ActionValue):
    """:class:`ActionValue` of an ensemble of :class:`NoiseConditionedQNetwork`: see its ``action_value``.

    All critics go through one batched matrix product per layer. Where the observation is given in the environment's
    units and the action in [-1, 1], the affine map between them is folded into the first layer.
    """

    def __init__(
        self,
        network: NoiseConditionedQNetwork,
        parameters: TensorDictParams | TensorDictBase,
        observation: Tensor,
        *,
        num_levels: int,
        action_center: Tensor,
        action_half_range: Tensor,
        reduction: EnsembleReduction,
    ) -> None:
        self.reduction: EnsembleReduction = reduction
        self.batch_shape = observation.shape[:-1]
        self.dtype, self.device = observation.dtype, observation.device
        parameters = parameters.detach()
        weights = [parameters.get(("trunk", str(index), "weight")) for index in range(len(network.trunk))]
        biases = [parameters.get(("trunk", str(index), "bias")).unsqueeze(-2) for index in range(len(network.trunk))]
        first = weights[0]
        split = [network.observation_dim, network.action_dim, LEVEL_EMBEDDING_DIM]
        observation_weight, action_weight, embedding_weight = first.split(split, dim=-1)
        # Normalised action u -> environment's action -> the critic's own normalisation: one affine map, folded here.
        half_range = parameters.get("action_half_range")
        scale = (action_half_range.to(first) / half_range).unsqueeze(-2)
        shift = ((action_center.to(first) - parameters.get("action_center")) / half_range).unsqueeze(-1)
        self.action_weight = action_weight * scale
        bias = biases[0] + (action_weight @ shift).mT
        self.observation_features = observation.reshape(-1, observation.shape[-1]) @ observation_weight.mT + bias

        levels = torch.arange(num_levels, device=self.device)

        def embed(critic: TensorDictBase) -> Tensor:
            with critic.to_module(network, preserve_module_state=False):
                return network.embed_level(levels)

        self.level_features = torch.vmap(embed)(parameters) @ embedding_weight.mT
        self.weights, self.biases = weights[1:-1], biases[1:-1]
        self.output_weight, self.output_bias = weights[-1], biases[-1]

    def at_level(self, level: int) -> EnsembleLevelValue:
        """The landscape over actions at one noise level."""
        return EnsembleLevelValue(
            self.observation_features + self.level_features[:, level : level + 1],
            self.action_weight,
            self.weights,
            self.biases,
            self.output_weight,
            self.output_bias,
            self.reduction,
            self.batch_shape,
        )


class EnsembleLevelValue(LevelValue):
    """:class:`LevelValue` of an ensemble of :class:`NoiseConditionedQNetwork`, with its gradient written out.

    Args:
        features: what observation and level add to the first layer, shape [num_critics, batch, hidden].
        action_weight: the action's part of the first layer, shape [num_critics, hidden, action_dim].
        weights: the other hidden layers, each [num_critics, hidden_out, hidden_in].
        biases: likewise, each [num_critics, 1, hidden_out].
        output_weight: shape [num_critics, 1, hidden].
        output_bias: shape [num_critics, 1, 1].
        reduction: how the critics are combined.
        batch_shape: shape of the batch of observations; its flattened size is ``batch``.
    """

    def __init__(
        self,
        features: Tensor,
        action_weight: Tensor,
        weights: list[Tensor],
        biases: list[Tensor],
        output_weight: Tensor,
        output_bias: Tensor,
        reduction: EnsembleReduction,
        batch_shape: torch.Size,
    ) -> None:
        self.features = features
        self.action_weight = action_weight
        self.weights, self.biases = weights, biases
        self.output_weight, self.output_bias = output_weight, output_bias
        self.reduction: EnsembleReduction = reduction
        self.batch_shape = batch_shape

    def _first_layer(self, action: Tensor) -> Tensor:
        flat = action.reshape(-1, action.shape[-1])
        return self.features + flat @ self.action_weight.mT

    def heads(self, action: Tensor) -> Tensor:
        """Every critic's value, shape [num_critics, *batch]."""
        hidden = F.mish(self._first_layer(action))
        for weight, bias in zip(self.weights, self.biases, strict=True):
            hidden = F.mish(torch.baddbmm(bias, hidden, weight.mT))
        values = torch.baddbmm(self.output_bias, hidden, self.output_weight.mT).squeeze(-1)
        return values.reshape(-1, *self.batch_shape)

    def gradient(self, action: Tensor) -> Tensor:
        """Gradient of the combined value with respect to the action, shape [*batch, action_dim].

        The chain rule of this network by hand: one pass up that keeps each mish's slope, one pass down. It spares
        automatic differentiation's bookkeeping, shares the exponential between mish and its slope, and never touches
        a parameter's gradient.
        """
        hidden, slope = mish_with_slope(self._first_layer(action))
        slopes = [slope]
        for weight, bias in zip(self.weights, self.biases, strict=True):
            hidden, slope = mish_with_slope(torch.baddbmm(bias, hidden, weight.mT))
            slopes.append(slope)
        delta = self.output_weight * slopes[-1]
        if self.reduction == "min":
            values = torch.baddbmm(self.output_bias, hidden, self.output_weight.mT)
            lowest = values.amin(0, keepdim=True)
            is_lowest = (values == lowest).to(values.dtype)
            # Ties share the gradient, as torch.amin's own derivative does.
            delta = delta * (is_lowest / is_lowest.sum(0, keepdim=True))
        for weight, slope in zip(reversed(self.weights), reversed(slopes[:-1]), strict=True):
            delta = (delta @ weight) * slope
        gradient = (delta @ self.action_weight).sum(0)
        if self.reduction == "mean":
            gradient = gradient / self.action_weight.shape[0]
        return gradient.reshape(action.shape)


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
