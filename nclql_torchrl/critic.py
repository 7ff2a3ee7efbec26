"""The noise-conditioned critic Q(s, a, l), and its action gradient written out."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from copy import copy
from itertools import pairwise
from typing import NamedTuple

import torch
import torch.nn.functional as F
from tensordict import TensorDictBase, TensorDictParams
from torch import Tensor, nn

from nclql_torchrl.fused_gradient import FusedCritics, may_fuse
from nclql_torchrl.langevin import action_range
from nclql_torchrl.mish import mish_with_slope
from nclql_torchrl.products import batched_product
from nclql_torchrl.value import ActionValue, EnsembleReduction, Level, LevelValue, Precision, entry, reduce_ensemble

LEVEL_EMBEDDING_DIM = 16
LEVEL_HIDDEN_DIM = 32
LAYER_NORM_EPSILON = 1e-5
OBSERVATION_LIMIT = 10.0

FEW_ROWS = 5
"""Up to so many states a compiled chain on a CPU multiplies in loops of its own; at 8 a library is faster."""


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
        layer_norm: whether layer normalisation (arXiv 1607.06450), with its own scale and shift, stands between each
            hidden layer and its mish.
        normalize_observation: whether observations are normalised by the buffers ``observation_mean`` and
            ``observation_deviation``, which whoever trains sets, and clipped to 10 deviations: what has hardly varied
            so far is a huge number when it first does. It costs nothing per Langevin step.
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

    observation_mean: Tensor
    """With ``normalize_observation``: shape [observation_dim], zeros at first."""

    observation_deviation: Tensor
    """Likewise, ones at first."""

    def __init__(
        self,
        observation_dim: int,
        action_dim: int,
        hidden_sizes: Sequence[int] = (256, 256, 256),
        *,
        layer_norm: bool = False,
        normalize_observation: bool = False,
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
        self.normalize_observation = normalize_observation
        if normalize_observation:
            self.register_buffer("observation_mean", torch.zeros(observation_dim, device=device, dtype=dtype))
            self.register_buffer("observation_deviation", torch.ones(observation_dim, device=device, dtype=dtype))
        sizes = (observation_dim + action_dim + LEVEL_EMBEDDING_DIM, *hidden_sizes, 1)

        def linear(inputs: int, outputs: int) -> nn.Linear:
            return nn.Linear(inputs, outputs, device=device, dtype=dtype)

        self.embed = nn.ModuleList(
            [linear(LEVEL_EMBEDDING_DIM, LEVEL_HIDDEN_DIM), linear(LEVEL_HIDDEN_DIM, LEVEL_EMBEDDING_DIM)]
        )
        self.trunk = nn.ModuleList([linear(inputs, outputs) for inputs, outputs in pairwise(sizes)])
        self.layer_norm = layer_norm
        self.norms = nn.ModuleList(
            nn.LayerNorm(size, LAYER_NORM_EPSILON, device=device, dtype=dtype) for size in hidden_sizes if layer_norm
        )
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Weights from a normal of deviation ``1 / sqrt(fan_in)`` cut at two deviations; biases zero.

        Layer normalisations scale by one and shift by zero.
        """
        for layer in (*self.embed, *self.trunk):
            assert isinstance(layer, nn.Linear)
            deviation = layer.in_features**-0.5
            nn.init.trunc_normal_(layer.weight, std=deviation, a=-2.0 * deviation, b=2.0 * deviation)
            nn.init.zeros_(layer.bias)
        for norm in self.norms:
            assert isinstance(norm, nn.LayerNorm)
            norm.reset_parameters()

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
        if self.normalize_observation:
            observation = normalise(observation, self.observation_mean, self.observation_deviation)
        normalised = (action - self.action_center) / self.action_half_range
        first, *hidden_layers, last = self.trunk
        assert isinstance(first, nn.Linear)
        sizes = [self.observation_dim, self.action_dim, LEVEL_EMBEDDING_DIM]
        observation_weight, action_weight, embedding_weight = first.weight.split(sizes, dim=-1)
        # The first layer in three parts: no gradient flows into an observation, which is most of its input.
        hidden = F.linear(observation, observation_weight, first.bias) + F.linear(normalised, action_weight)
        hidden = self._activate(hidden + F.linear(self.embed_level(level), embedding_weight), 0)
        for index, layer in enumerate(hidden_layers, start=1):
            hidden = self._activate(layer(hidden), index)
        return last(hidden)

    def _activate(self, hidden: Tensor, index: int) -> Tensor:
        """What follows the hidden linear layer of that index."""
        return F.mish(self.norms[index](hidden) if self.layer_norm else hidden)

    def action_value(
        self,
        parameters: TensorDictParams | TensorDictBase,
        observation: Tensor,
        *,
        num_levels: int,
        action_center: Tensor,
        action_half_range: Tensor,
        reduction: EnsembleReduction = "sum",
        precision: Precision = "float32",
    ) -> EnsembleActionValue:
        """Q of an ensemble of such networks at fixed observations, for the sampler.

        Args:
            parameters: parameters and buffers of the ensemble, stacked along a first dimension.
            observation: shape [batch, observation_dim].
            num_levels: number of noise levels.
            action_center, action_half_range: the environment's action is ``center + half_range * normalised``.
            reduction: how the critics are combined.
            precision: of the matrix products at every Langevin step.
        """
        return EnsembleActionValue(
            EnsembleWeights.of(self, parameters),
            observation,
            num_levels=num_levels,
            action_center=action_center,
            action_half_range=action_half_range,
            reduction=reduction,
            precision=precision,
        )


def normalise(observation: Tensor, mean: Tensor, deviation: Tensor) -> Tensor:
    """Observations in deviations from the mean, clipped; shapes [*batch, observation_dim], or broadcastable to it."""
    return ((observation - mean) / deviation).clamp(-OBSERVATION_LIMIT, OBSERVATION_LIMIT)


class EnsembleWeights(NamedTuple):
    """What :class:`EnsembleActionValue` reads of an ensemble: views of the live parameters, [num_critics, ...] each."""

    embed: list[tuple[Tensor, Tensor]]
    """Weight [num_critics, outputs, inputs] and bias [num_critics, 1, outputs] of the level embedding's layers."""

    trunk: list[tuple[Tensor, Tensor]]
    """Likewise of the trunk's layers."""

    norms: list[tuple[Tensor, Tensor]]
    """Scale and shift [num_critics, 1, outputs] of the trunk's layer normalisations; empty where there are none."""

    statistics: tuple[Tensor, Tensor] | tuple[()]
    """Mean and deviation [num_critics, 1, observation_dim] of the observations; empty where they are not normalised."""

    level_frequencies: Tensor
    """Shape [num_critics, 1, 8]."""

    action_center: Tensor
    """Shape [num_critics, action_dim, 1]."""

    action_half_range: Tensor
    """Shape [num_critics, 1, action_dim]."""

    @classmethod
    def of(cls, network: NoiseConditionedQNetwork, parameters: TensorDictParams | TensorDictBase) -> EnsembleWeights:
        """Reads them from stacked parameters. Detached: neither the chain nor its caller collects their gradients."""

        def layers(name: str, count: int) -> list[tuple[Tensor, Tensor]]:
            keys = [(name, str(index)) for index in range(count)]
            return [
                (parameters.get((*key, "weight")).detach(), parameters.get((*key, "bias")).detach().unsqueeze(-2))
                for key in keys
            ]

        statistics: tuple[Tensor, Tensor] | tuple[()] = ()
        if network.normalize_observation:
            mean, deviation = parameters.get("observation_mean"), parameters.get("observation_deviation")
            statistics = (mean.unsqueeze(-2), deviation.unsqueeze(-2))
        return cls(
            layers("embed", len(network.embed)),
            layers("trunk", len(network.trunk)),
            [(scale.unsqueeze(-2), shift) for scale, shift in layers("norms", len(network.norms))],
            statistics,
            parameters.get("level_frequencies").unsqueeze(-2),
            parameters.get("action_center").unsqueeze(-1),
            parameters.get("action_half_range").unsqueeze(-2),
        )


class EnsembleActionValue(ActionValue):
    """:class:`ActionValue` of an ensemble of :class:`NoiseConditionedQNetwork`: see its ``action_value``.

    All critics go through one batched matrix product per layer. Where the observation is given in the environment's
    units and the action in [-1, 1], the affine map between them is folded into the first layer.
    """

    takes_tensor_levels = True

    def __init__(
        self,
        weights: EnsembleWeights,
        observation: Tensor,
        *,
        num_levels: int,
        action_center: Tensor,
        action_half_range: Tensor,
        reduction: EnsembleReduction,
        precision: Precision,
    ) -> None:
        self.weights = weights
        self.observation = observation.detach()
        self.num_levels = num_levels
        self.action_center, self.action_half_range = action_center, action_half_range
        self.reduction: EnsembleReduction = reduction
        self.precision: Precision = precision
        self.batch_shape = observation.shape[:-1]
        self.dtype, self.device = observation.dtype, observation.device

    @property
    def observations(self) -> tuple[Tensor, ...]:
        return (self.observation,)

    def at_observations(self, observations: tuple[Tensor, ...]) -> EnsembleActionValue:
        (observation,) = observations
        value = copy(self)
        value.observation = observation.detach()
        value.batch_shape = observation.shape[:-1]
        value.dtype, value.device = observation.dtype, observation.device
        return value

    @property
    def parameters(self) -> list[Tensor]:
        embed, trunk, norms, statistics, *buffers = self.weights
        return [*(tensor for layer in (*embed, *trunk, *norms, statistics) for tensor in layer), *buffers]

    def trunk(self) -> list[tuple[Tensor, Tensor]]:
        """Weights and biases of the trunk as a chain applies them: where a subclass folds in what else is linear."""
        return self.weights.trunk

    def levels(self) -> Callable[[Level], EnsembleLevelValue]:
        """The landscapes, with the observation's and the levels' share of the first layer computed here, once."""
        weights = self.weights
        (first, first_bias), *hidden, (output_weight, output_bias) = self.trunk()
        split = [self.observation.shape[-1], self.action_center.shape[-1], LEVEL_EMBEDDING_DIM]
        observation_weight, action_weight, embedding_weight = first.split(split, dim=-1)
        # Normalised action u -> environment's action -> the critic's own normalisation: one affine map, folded here.
        scale = self.action_half_range.to(first) / weights.action_half_range
        shift = (self.action_center.to(first).unsqueeze(-1) - weights.action_center) / weights.action_half_range.mT
        bias = first_bias + (action_weight @ shift).mT
        observation = self.observation.reshape(-1, split[0])
        if weights.statistics:
            observation = normalise(observation, *weights.statistics)
        observation_features = observation @ observation_weight.mT + bias

        angle = torch.arange(self.num_levels, device=self.device).unsqueeze(-1) * weights.level_frequencies
        embedding = torch.cat([angle.sin(), angle.cos()], -1) / LEVEL_EMBEDDING_DIM**0.5
        (embed_weight, embed_bias), (refine_weight, refine_bias) = weights.embed
        embedding = F.mish(torch.baddbmm(embed_bias, embedding, embed_weight.mT))
        level_features = torch.baddbmm(refine_bias, embedding, refine_weight.mT) @ embedding_weight.mT

        # Cast once per chain. Float64 stays: the option is about the speed of float32.
        dtype = torch.bfloat16 if self.precision == "bfloat16" and first.dtype == torch.float32 else first.dtype
        fused = None
        if not weights.norms and may_fuse(observation_features, hidden, dtype):
            output, num_states = (output_weight, output_bias), observation_features.shape[1]
            fused = FusedCritics.of(action_weight * scale, hidden, output, dtype, num_states)
        fixed = {
            "action_weight": (action_weight * scale).to(dtype),
            # A loop of a compiled program takes no tensor twice.
            "weights": fused.down if fused is not None and dtype == first.dtype else [w.to(dtype) for w, _ in hidden],
            "biases": [bias for _, bias in hidden],
            "norms": weights.norms,
            "output_weight": output_weight,
            "output_bias": output_bias,
            "reduction": self.reduction,
            "batch_shape": self.batch_shape,
            "fused": fused,
        }
        return lambda level: EnsembleLevelValue(observation_features, entry(level_features, level, dim=1), **fixed)


Backward = Callable[[Tensor], Tensor]
"""Gradient with respect to what a part of the network returned -> that with respect to what it was given, both of shape
[num_critics, batch, hidden]."""


class EnsembleLevelValue(LevelValue):
    """:class:`LevelValue` of an ensemble of :class:`NoiseConditionedQNetwork`, with its gradient written out.

    Args:
        observation_features: what the observation adds to the first layer, shape [num_critics, batch, hidden].
        level_features: what the level adds, shape [num_critics, 1, hidden].
        action_weight: the action's part of the first layer, shape [num_critics, hidden, action_dim]. Its type and that
            of ``weights`` is the type of the matrix products' operands; everything else has that of the features.
        weights: the other hidden layers, each [num_critics, hidden_out, hidden_in].
        biases: likewise, each [num_critics, 1, hidden_out].
        norms: scale and shift of every hidden layer's normalisation, each [num_critics, 1, hidden]; may be empty.
        output_weight: shape [num_critics, 1, hidden].
        output_bias: shape [num_critics, 1, 1].
        reduction: how the critics are combined.
        batch_shape: shape of the batch of observations; its flattened size is ``batch``.
        fused: the same weights for the fused operator, where the gradient is to come from it.
    """

    def __init__(
        self,
        observation_features: Tensor,
        level_features: Tensor,
        action_weight: Tensor,
        weights: list[Tensor],
        biases: list[Tensor],
        norms: list[tuple[Tensor, Tensor]],
        output_weight: Tensor,
        output_bias: Tensor,
        reduction: EnsembleReduction,
        batch_shape: torch.Size,
        fused: FusedCritics | None = None,
    ) -> None:
        self.observation_features, self.level_features = observation_features, level_features
        self.features = observation_features + level_features
        self.action_weight = action_weight
        self.weights, self.biases, self.norms = weights, biases, norms
        self.output_weight, self.output_bias = output_weight, output_bias
        self.reduction: EnsembleReduction = reduction
        self.batch_shape = batch_shape
        self.fused = fused

    def _first_layer(self, action: Tensor) -> Tensor:
        return self.features + _product(action.reshape(1, -1, action.shape[-1]), self.action_weight.transpose(-1, -2))

    def heads(self, action: Tensor) -> Tensor:
        """Every critic's value, shape [num_critics, *batch]."""
        hidden = F.mish(self._normalise(self._first_layer(action), 0)[0])
        for index, (weight, bias) in enumerate(zip(self.weights, self.biases, strict=True), start=1):
            hidden = F.mish(self._normalise(_product(hidden, weight.transpose(-1, -2)) + bias, index)[0])
        values = torch.baddbmm(self.output_bias, hidden, self.output_weight.transpose(-1, -2)).squeeze(-1)
        return values.reshape(-1, *self.batch_shape)

    def gradient(self, action: Tensor) -> Tensor:
        """Gradient of the combined value with respect to the action, shape [*batch, action_dim]."""
        return self._combined(*self._critics(action, with_values=self.reduction == "min")).reshape(action.shape)

    def value_and_gradient(self, action: Tensor) -> tuple[Tensor, Tensor]:
        """The combined value, shape [*batch], and its gradient, shape [*batch, action_dim], from one evaluation."""
        values, gradients = self._critics(action, with_values=True)
        assert values is not None
        value = reduce_ensemble(values, self.reduction).reshape(action.shape[:-1])
        return value, self._combined(values, gradients).reshape(action.shape)

    def _critics(self, action: Tensor, with_values: bool) -> tuple[Tensor | None, Tensor]:
        """Every critic's value, shape [num_critics, batch], and gradient, shape [num_critics, batch, action_dim].

        The chain rule of this network by hand: one pass up that keeps each mish's slope, one pass down. It spares
        automatic differentiation's bookkeeping, shares the exponential between mish and its slope, and never touches
        a parameter's gradient.
        """
        if self.fused is not None:
            flat = action.reshape(-1, action.shape[-1])
            return self.fused.values_and_gradients(flat, self.observation_features, self.level_features)
        hidden, back = self._activate(self._first_layer(action), 0)
        backs = [back]
        for index, (weight, bias) in enumerate(zip(self.weights, self.biases, strict=True), start=1):
            hidden, back = self._activate(_product(hidden, weight.transpose(-1, -2)) + bias, index)
            backs.append(back)
        values = None
        if with_values:
            values = torch.baddbmm(self.output_bias, hidden, self.output_weight.transpose(-1, -2)).squeeze(-1)
        delta = backs[-1](self.output_weight)
        for weight, back in zip(reversed(self.weights), reversed(backs[:-1]), strict=True):
            delta = back(_product(delta, weight))
        return values, _product(delta, self.action_weight)

    def _combined(self, values: Tensor | None, gradients: Tensor) -> Tensor:
        """What :meth:`_critics` returns -> gradient of the combined value, shape [batch, action_dim]."""
        if values is not None and self.reduction == "min":
            is_lowest = (values == values.amin(0)).to(values.dtype)
            # Ties share the gradient, as torch.amin's own derivative does.
            gradients = gradients * (is_lowest / is_lowest.sum(0)).unsqueeze(-1)
        return gradients.mean(0) if self.reduction == "mean" else gradients.sum(0)

    def _activate(self, hidden: Tensor, index: int) -> tuple[Tensor, Backward]:
        """What follows the linear layer of that index, and its part of the pass down."""
        normalised, through_norm = self._normalise(hidden, index)
        activated, slope = mish_with_slope(normalised)
        # Else the pass down would take it from the exponential again, and read two tensors where it can read one.
        slope = _computed_here(slope)
        if through_norm is None:
            return activated, lambda delta: delta * slope
        return activated, lambda delta: through_norm(delta * slope)

    def _normalise(self, hidden: Tensor, index: int) -> tuple[Tensor, Backward | None]:
        """Layer normalisation, and its part of the pass down; nothing where the network has none."""
        if not self.norms:
            return hidden, None
        scale, shift = self.norms[index]
        # Torch's own kernels: operation by operation, written out, they would take half as long as the whole chain.
        shape = hidden.shape[-1:]
        standard, mean, inverse_deviation = torch.native_layer_norm(hidden, shape, None, None, LAYER_NORM_EPSILON)

        def back(delta: Tensor) -> Tensor:
            return torch.ops.aten.native_layer_norm_backward(
                delta * scale, hidden, shape, mean, inverse_deviation, None, None, [True, False, False]
            )[0]

        return standard * scale + shift, back


def _product(x: Tensor, weight: Tensor) -> Tensor:
    """Matrix product of every critic, its operands in the weight's type, its result in that of ``x``."""
    operand = x.to(weight.dtype)
    if torch.compiler.is_compiling() and x.device.type == "cpu" and x.shape[-2] <= FEW_ROWS:
        # As a loop, which the compiler fuses with what surrounds it: calling a library takes longer than the product.
        # With one row the compiler does so by itself, but moves what computes the row into the loop over the weight's
        # columns: mish and its slope hundreds of times.
        operand = _computed_here(operand.contiguous())
        return (operand.unsqueeze(-1) * weight.unsqueeze(-3)).sum(-2).to(x.dtype)
    return batched_product(operand, weight).to(x.dtype)


def _computed_here(x: Tensor) -> Tensor:
    """The tensor. A compiler for CPUs makes a buffer of it instead of computing it wherever it is used."""
    return x.as_strided(x.shape, x.stride()) if torch.compiler.is_compiling() and x.device.type == "cpu" else x
