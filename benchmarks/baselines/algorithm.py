"""What the benchmarks ask of every algorithm, and the parts that the baselines share."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from tensordict import TensorDictBase
from tensordict.nn import TensorDictModule, TensorDictModuleBase, TensorDictSequential
from tensordict.utils import NestedKey
from torch import Tensor, nn
from torchrl.data import Bounded
from torchrl.modules import MLP, ValueOperator
from torchrl.objectives import LossModule
from torchrl.objectives.utils import _vmap_func

VALUE_KEY = "q_after"
"""Where evaluations read the critic's estimate, as LangevinActor's diagnostics call it."""


@dataclass(frozen=True)
class Problem:
    """What an algorithm is built for: sizes and bounds, no environment.

    Examples:
        >>> Problem(3, Bounded(-2.0, 2.0, (1,))).half_range
        tensor([2.])
    """

    observation_dim: int
    """Size of the observation, entry "observation"."""
    action_spec: Bounded
    """One action, without batch dimensions, entry "action"."""
    hidden_sizes: tuple[int, ...] = (256, 256, 256)
    """Units of the hidden layers of every network."""
    gamma: float = 0.99
    """Discount per step."""
    tau: float = 0.005
    """Share of the online parameters that the target parameters take at every update."""

    @property
    def action_dim(self) -> int:
        """Size of the action."""
        return self.action_spec.shape[-1]

    @property
    def half_range(self) -> Tensor:
        """Half of the action range, shape [action_dim]."""
        return (self.action_spec.high - self.action_spec.low) / 2

    @property
    def center(self) -> Tensor:
        """Middle of the action range, shape [action_dim]."""
        return (self.action_spec.high + self.action_spec.low) / 2


@dataclass
class Algorithm:
    """An agent that learns from replay."""

    actor: TensorDictModuleBase
    """Writes "action": explores under ``ExplorationType.RANDOM``, repeats itself under ``DETERMINISTIC``."""
    loss: LossModule
    """Owns what is trained; ``loss.in_keys`` is what replay must hold."""
    update: Callable[[TensorDictBase], TensorDictBase]
    """One update from a batch of transitions [batch_size]; returns detached scalars."""
    evaluator: TensorDictModuleBase
    """The actor, which also writes the lowest critic's value of the action as :data:`VALUE_KEY`."""
    reward_scale: float = 1.0
    """Factor on the reward in the critic's units."""
    prepare: Callable[[TensorDictBase], TensorDictBase] | None = None
    """Makes of every collected batch [num_envs, time] the transitions [*], maybe none, that replay gets; by default
    each step is one."""

    def transitions(self, batch: TensorDictBase) -> TensorDictBase:
        """What replay gets of a collected batch [num_envs, time]."""
        return batch.select(*self.loss.in_keys).reshape(-1) if self.prepare is None else self.prepare(batch)

    @property
    def num_parameters(self) -> int:
        """How many numbers are trained."""
        return sum(parameter.numel() for parameter in self.loss.parameters() if parameter.requires_grad)


class LowestValue(TensorDictModuleBase):
    """Writes the lowest value of a loss's critics, shape [*batch, 1], as :data:`VALUE_KEY`.

    Args:
        loss: any TorchRL loss with an ensemble ``qvalue_network``.
    """

    def __init__(self, loss: LossModule) -> None:
        super().__init__()
        network = loss.qvalue_network
        assert isinstance(network, TensorDictModuleBase)
        self.in_keys: list[NestedKey] = list(network.in_keys)
        self.out_keys = [VALUE_KEY]
        # In __dict__: the parameters are the loss's.
        self.__dict__["_loss"] = loss
        self._values = _vmap_func(network, (None, 0))

    def forward(self, tensordict: TensorDictBase) -> TensorDictBase:
        """Reads the observation and the action."""
        assert self._values is not None
        values = self._values(tensordict.select(*self.in_keys), self.__dict__["_loss"].qvalue_network_params)
        return tensordict.set(VALUE_KEY, values.get("state_action_value").amin(0))


def with_value(actor: TensorDictModuleBase, loss: LossModule) -> TensorDictSequential:
    """The evaluator of an actor whose critics take an observation and an action."""
    return TensorDictSequential([actor, LowestValue(loss)])


def make_mlp(problem: Problem, in_features: int, out_features: int) -> MLP:
    """The network of every baseline: layers of ``hidden_sizes`` with ReLU."""
    return MLP(
        in_features=in_features,
        out_features=out_features,
        num_cells=list(problem.hidden_sizes),
        activation_class=nn.ReLU,
    )


class NormalisedActionMLP(nn.Module):
    """Q(s, a) on actions mapped to [-1, 1].

    Args:
        problem: sizes and bounds.
    """

    center: Tensor
    half_range: Tensor

    def __init__(self, problem: Problem) -> None:
        super().__init__()
        self.register_buffer("center", problem.center)
        self.register_buffer("half_range", problem.half_range)
        self.network = make_mlp(problem, problem.observation_dim + problem.action_dim, 1)

    def forward(self, observation: Tensor, action: Tensor) -> Tensor:
        """Value, shape [*batch, 1]."""
        return self.network(torch.cat([observation, (action - self.center) / self.half_range], -1))


def make_critics(problem: Problem, num_critics: int = 2) -> list[TensorDictModule]:
    """Independent critics Q(s, a): a list, because TorchRL's losses would otherwise draw new weights their own way."""
    return [ValueOperator(NormalisedActionMLP(problem), in_keys=["observation", "action"]) for _ in range(num_critics)]
