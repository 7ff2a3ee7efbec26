"""What the sampler needs of a critic: Q at fixed observations, as a function of the action."""

from __future__ import annotations

import abc
from collections.abc import Callable
from typing import Any, ClassVar, Literal, get_args

import torch
from tensordict import TensorDict, TensorDictBase, TensorDictParams
from tensordict.nn import TensorDictModuleBase
from tensordict.utils import NestedKey
from torch import Tensor

EnsembleReduction = Literal["sum", "mean", "min"]
"""How the critics of an ensemble are combined into the one landscape that the chain climbs."""

Precision = Literal["float32", "bfloat16"]
"""Type of the operands of the matrix products at every Langevin step; all else, and every sum, stays in the
observation's own type. "float32" leaves that type as it is, and uses TF32 on a GPU that has it."""


Level = int | Tensor
"""A noise level; a tensor of shape [1] where it counts the rounds of a compiled loop."""


def entry(tensor: Tensor, level: Level, dim: int = 0) -> Tensor:
    """The part of a tensor that belongs to a level: its dimension ``dim`` becomes 1.

    Examples:
        >>> entry(torch.arange(6.0).reshape(3, 2), 1)
        tensor([[2., 3.]])
    """
    return tensor.narrow(dim, level, 1) if isinstance(level, int) else tensor.index_select(dim, level)


def check_choice(name: str, value: str, choices: object) -> None:
    """Raises ValueError unless ``value`` is one of the Literal type ``choices``."""
    if value not in get_args(choices):
        raise ValueError(f"{name} is {value!r}; expected one of {', '.join(map(repr, get_args(choices)))}.")


def reduce_ensemble(heads: Tensor, reduction: EnsembleReduction) -> Tensor:
    """Combines the values of an ensemble along its first dimension.

    Args:
        heads: values, shape [num_critics, *batch].
        reduction: "sum" (the authors' choice for the drift), "mean" or "min".

    Returns:
        Combined values, shape [*batch].
    """
    if reduction == "min":
        return heads.amin(0)
    return heads.sum(0) if reduction == "sum" else heads.mean(0)


class LevelValue(abc.ABC):
    """An ensemble's Q at fixed observations and one noise level: a scalar landscape over actions.

    Actions are normalised, each coordinate in [-1, 1]. A subclass provides :meth:`heads`; it may provide
    :meth:`gradient` where it knows one that is cheaper than automatic differentiation.
    """

    reduction: EnsembleReduction

    @abc.abstractmethod
    def heads(self, action: Tensor) -> Tensor:
        """Every critic's value, shape [num_critics, *batch], of normalised actions of shape [*batch, action_dim]."""

    def __call__(self, action: Tensor) -> Tensor:
        """The combined value, shape [*batch]."""
        return reduce_ensemble(self.heads(action), self.reduction)

    def gradient(self, action: Tensor) -> Tensor:
        """Gradient of the combined value with respect to the action, shape [*batch, action_dim]."""
        return action_gradient(self, action)

    def value_and_gradient(self, action: Tensor) -> tuple[Tensor, Tensor]:
        """:meth:`__call__` and :meth:`gradient`; a subclass may know how to share what they have in common."""
        return self(action), self.gradient(action)


def action_gradient(value: Callable[[Tensor], Tensor], action: Tensor) -> Tensor:
    """Gradient of a batch of independent values with respect to their actions, by ``torch.func.grad``.

    It works under ``torch.no_grad``, ``torch.inference_mode``, ``torch.vmap`` and ``torch.compile(fullgraph=True)``,
    where ``torch.autograd.grad`` does not.

    Args:
        value: maps actions [*batch, action_dim] to values [*batch]; each value depends on its own action only.
        action: where to differentiate, shape [*batch, action_dim].

    Returns:
        Gradient, shape [*batch, action_dim].

    Examples:
        >>> action_gradient(lambda a: -(a**2).sum(-1), torch.tensor([[1.0, -2.0]]))
        tensor([[-2.,  4.]])
    """
    return torch.func.grad(lambda a: value(a).sum())(action)


class ActionValue(abc.ABC):
    """An ensemble's Q at fixed observations. It holds tensors and computes nothing until :meth:`levels` is called."""

    batch_shape: torch.Size
    """Shape of the batch of observations."""

    dtype: torch.dtype
    """Type in which actions are sampled."""

    device: torch.device
    """Where actions are sampled."""

    takes_tensor_levels: ClassVar[bool] = False
    """Whether the function that :meth:`levels` returns takes a level that is a tensor, so that a compiled chain can be
    a loop instead of one long program."""

    @abc.abstractmethod
    def levels(self) -> Callable[[Any], LevelValue]:
        """The landscape over actions as a function of the noise level. Work that no action changes is done here, once
        per chain."""

    def at_level(self, level: int) -> LevelValue:
        """The landscape over actions at one noise level."""
        return self.levels()(level)

    @property
    @abc.abstractmethod
    def observations(self) -> tuple[Tensor, ...]:
        """What changes from call to call, each of shape [*batch, ...]."""

    @abc.abstractmethod
    def at_observations(self, observations: tuple[Tensor, ...]) -> ActionValue:
        """The same critics at other observations, of any batch shape."""

    @property
    @abc.abstractmethod
    def parameters(self) -> list[Tensor]:
        """What stays from call to call and changes in place only, each of shape [num_critics, ...]."""

    @property
    def memory_per_state(self) -> int:
        """Bytes that a chain needs for each of its states, an upper estimate.

        A layer's activations, for all critics, are alive in several forms at once: before and after the nonlinearity,
        its slope, and temporaries of an unfused evaluation. Eight of each cover both kinds of value here.
        """
        outputs = sum(matrix.shape[0] * matrix.shape[1] for matrix in self.parameters if matrix.ndim > 2)
        return 8 * max(1, outputs) * self.dtype.itemsize


class ModuleLevelValue(LevelValue):
    """:class:`LevelValue` of any TensorDict module, by ``torch.vmap`` over its stacked parameters."""

    def __init__(self, parent: ModuleActionValue, level: int) -> None:
        self.parent = parent
        self.level = level
        self.reduction = parent.reduction

    def heads(self, action: Tensor) -> Tensor:
        """Every critic's value, shape [num_critics, *batch]."""
        parent = self.parent
        tensordict = parent.inputs.copy()
        tensordict.set(parent.action_key, action * parent.action_half_range + parent.action_center)
        if parent.level_key in parent.module.in_keys:
            tensordict.set(parent.level_key, torch.full(action.shape[:-1], self.level, device=action.device))
        module, value_key = parent.module, parent.value_key

        def one_critic(parameters: TensorDictBase) -> Tensor:
            with parameters.to_module(module, preserve_module_state=False):
                return module(tensordict.copy()).get(value_key).squeeze(-1)

        if parent.stacked.is_empty():
            # Nothing to vmap over: members without parameters are all the same.
            return one_critic(parent.stacked).expand(*parent.stacked.batch_size, *action.shape[:-1])
        if parent.precision == "float32" or action.dtype == torch.float64:
            return torch.vmap(one_critic)(parent.stacked)
        with torch.autocast(action.device.type, torch.bfloat16):
            return torch.vmap(one_critic)(parent.stacked).to(action.dtype)


class ModuleActionValue(ActionValue):
    """:class:`ActionValue` of any differentiable TensorDict module: nothing is known of its inside.

    Args:
        module: maps ``in_keys`` (with ``action_key``, and with ``level_key`` where it is noise-conditioned) to
            ``value_key`` of shape [*batch, 1]; its own parameters are not read.
        parameters: parameters of the ensemble, stacked along a first dimension.
        inputs: the module's inputs other than action and level, batch shape [*batch].
        action_center, action_half_range: the module's actions are ``center + half_range * normalised``.
        reduction: how the critics are combined.
        precision: "bfloat16" runs the module under autocast.
        action_key, level_key, value_key: tensordict entries.
    """

    def __init__(
        self,
        module: TensorDictModuleBase,
        parameters: TensorDictParams | TensorDictBase,
        inputs: TensorDictBase,
        *,
        action_center: Tensor,
        action_half_range: Tensor,
        reduction: EnsembleReduction = "sum",
        precision: Precision = "float32",
        action_key: NestedKey = "action",
        level_key: NestedKey = "level",
        value_key: NestedKey = "state_action_value",
    ) -> None:
        self.module = module
        # Detached, so that neither the chain nor its caller collects parameter gradients. Never `.data`: it breaks
        # inside functorch under torch.compile.
        self.stacked = parameters.detach()
        self.inputs = inputs
        self.reduction: EnsembleReduction = reduction
        self.precision: Precision = precision
        self.action_key, self.level_key, self.value_key = action_key, level_key, value_key
        leaf = next(value for value in inputs.values(True, True) if isinstance(value, Tensor))
        self.batch_shape, self.device = inputs.batch_size, leaf.device
        self.dtype = leaf.dtype if leaf.dtype.is_floating_point else torch.get_default_dtype()
        self.action_center = action_center.to(self.device, self.dtype)
        self.action_half_range = action_half_range.to(self.device, self.dtype)

    def levels(self) -> Callable[[int], ModuleLevelValue]:
        return lambda level: ModuleLevelValue(self, level)

    @property
    def observations(self) -> tuple[Tensor, ...]:
        return tuple(self.inputs.values(True, True))

    def at_observations(self, observations: tuple[Tensor, ...]) -> ModuleActionValue:
        batch_ndim = observations[0].ndim - self.observations[0].ndim + len(self.batch_shape)
        inputs = TensorDict(batch_size=observations[0].shape[:batch_ndim])
        for key, observation in zip(self.inputs.keys(True, True), observations, strict=True):
            inputs.set(key, observation)
        return ModuleActionValue(
            self.module,
            self.stacked,
            inputs,
            action_center=self.action_center,
            action_half_range=self.action_half_range,
            reduction=self.reduction,
            precision=self.precision,
            action_key=self.action_key,
            level_key=self.level_key,
            value_key=self.value_key,
        )

    @property
    def parameters(self) -> list[Tensor]:
        return list(self.stacked.values(True, True))
