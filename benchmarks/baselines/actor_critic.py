"""What soft Q-learning's and Q-score matching's losses have in common: a TD loss of several critics, and an actor's."""

from __future__ import annotations

from abc import abstractmethod
from dataclasses import dataclass

import torch
from tensordict import TensorDict, TensorDictBase, TensorDictParams
from tensordict.nn import TensorDictModule, TensorDictModuleBase, dispatch
from tensordict.utils import NestedKey, unravel_key
from torch import Tensor
from torchrl.envs.utils import ExplorationType, set_exploration_type
from torchrl.objectives import SoftUpdate
from torchrl.objectives.common import LossModule
from torchrl.objectives.utils import ValueEstimators, _vmap_func, dispatch_value_estimator, distance_loss

from benchmarks.baselines.algorithm import Algorithm, Problem, with_value


class ActorCriticLoss(LossModule):
    """A loss with ``loss_qvalue``, the squared TD error summed over the critics, and ``loss_actor``.

    A subclass says what the next state is worth, and how the actor learns; the gradient of each loss reaches only the
    parameters that it is named after.

    Args:
        actor_network: writes the action from an observation.
        qvalue_network: the critics, one module each, of an observation and an action.

    Keyword Args:
        delay_actor: whether there are target parameters of the actor.
        loss_function: distance of the TD error.
        reduction: "none", "mean" or "sum" over the batch. Defaults to "mean".
    """

    @dataclass
    class _AcceptedKeys:
        action: NestedKey = "action"
        observation: NestedKey = "observation"
        value: NestedKey = "state_value"
        state_action_value: NestedKey = "state_action_value"
        priority: NestedKey = "td_error"
        reward: NestedKey = "reward"
        done: NestedKey = "done"
        terminated: NestedKey = "terminated"

    default_keys = _AcceptedKeys
    tensor_keys: _AcceptedKeys
    default_value_estimator = ValueEstimators.TD0
    out_keys = ["loss_actor", "loss_qvalue", "pred_value", "target_value"]  # noqa: RUF012  # pyright: ignore[reportAssignmentType]

    actor_network: TensorDictModuleBase
    actor_network_params: TensorDictParams
    target_actor_network_params: TensorDictParams
    qvalue_network: TensorDictModuleBase
    qvalue_network_params: TensorDictParams
    target_qvalue_network_params: TensorDictParams

    def __init__(
        self,
        actor_network: TensorDictModuleBase,
        qvalue_network: list[TensorDictModule],
        *,
        delay_actor: bool = False,
        loss_function: str = "l2",
        reduction: str | None = None,
    ) -> None:
        self._in_keys = None
        super().__init__()
        self.convert_to_functional(actor_network, "actor_network", create_target_params=delay_actor)  # pyright: ignore[reportArgumentType]
        self.convert_to_functional(
            qvalue_network,  # pyright: ignore[reportArgumentType]
            "qvalue_network",
            expand_dim=len(qvalue_network),
            create_target_params=True,
        )
        self.loss_function = loss_function
        self.reduction = "mean" if reduction is None else reduction
        self._make_vmap()

    @abstractmethod
    def next_state_value(self, tensordict: TensorDictBase) -> Tensor:
        """Value of the states of a tensordict [*batch] under the target critics, shape [*batch]."""

    @abstractmethod
    def actor_loss(self, tensordict: TensorDictBase) -> Tensor:
        """The actor's reduced loss on a batch of transitions."""

    def _make_vmap(self) -> None:
        self._vmap_qnetworkN0 = _vmap_func(self.qvalue_network, (None, 0), randomness=self.vmap_randomness)

    def _forward_value_estimator_keys(self, **kwargs: NestedKey) -> None:
        if self._value_estimator is not None:
            self._value_estimator.set_keys(
                value=self.tensor_keys.value,
                reward=self.tensor_keys.reward,
                done=self.tensor_keys.done,
                terminated=self.tensor_keys.terminated,
            )
        self._in_keys = None

    def make_value_estimator(
        self, value_type: ValueEstimators | str | None = None, **hyperparams: object
    ) -> ActorCriticLoss:
        """Chooses how targets are formed: TD0; ``gamma`` is the discount."""
        value_type, options = self._prepare_value_estimator_kwargs(value_type, **hyperparams)
        if value_type is not None:
            keys = self.tensor_keys
            dispatch_value_estimator(
                self,
                value_type,
                supported=(ValueEstimators.TD0,),
                tensor_keys={
                    "value_target": "value_target",
                    "value": keys.value,
                    "reward": keys.reward,
                    "done": keys.done,
                    "terminated": keys.terminated,
                },
                value_network=None,
                **(options or {}),
            )
        return self

    @property
    def in_keys(self) -> list[NestedKey]:
        """Entries that the loss reads."""
        if self._in_keys is None:
            keys = self.tensor_keys
            following = (keys.observation, keys.reward, keys.done, keys.terminated)
            self._in_keys = [keys.observation, keys.action, *(unravel_key(("next", key)) for key in following)]
        return self._in_keys  # pyright: ignore[reportReturnType]

    @in_keys.setter
    def in_keys(self, values: list[NestedKey]) -> None:
        self._in_keys = values  # pyright: ignore[reportAttributeAccessIssue]

    @dispatch  # pyright: ignore[reportArgumentType]
    def forward(self, tensordict: TensorDictBase) -> TensorDictBase:
        """Both losses, and the detached means of the critics' values and targets."""
        loss_qvalue, metadata = self.qvalue_loss(tensordict)
        loss_actor = self.actor_loss(tensordict)
        tensordict.set(self.tensor_keys.priority, metadata.pop("td_error"))
        scalars = {key: value.mean() for key, value in metadata.items()}
        output = TensorDict({"loss_actor": loss_actor, "loss_qvalue": loss_qvalue, **scalars})
        self._clear_weakrefs(tensordict, output, "actor_network_params", "qvalue_network_params")
        return output

    def qvalue_loss(self, tensordict: TensorDictBase) -> tuple[Tensor, dict[str, Tensor]]:
        """The reduced TD loss, and ``td_error``, ``pred_value`` and ``target_value`` of shape [*batch]."""
        keys = self.tensor_keys
        with torch.no_grad(), set_exploration_type(ExplorationType.RANDOM):
            inputs = tensordict.clone(False)
            value = self.next_state_value(inputs.get("next").select(keys.observation))
            inputs.set(("next", keys.value), value.unsqueeze(-1))
            target = self.value_estimator.value_estimate(inputs).squeeze(-1)
        predictions = self.values(tensordict, tensordict.get(keys.action), self.qvalue_network_params)
        targets = target.expand_as(predictions)
        loss = distance_loss(predictions, targets, loss_function=self.loss_function).sum(0)
        predictions = predictions.detach()
        metadata = {
            "td_error": (predictions - targets).abs().amax(0),
            "pred_value": predictions.mean(0),
            "target_value": target,
        }
        return self._reduce_loss(loss, tensordict=tensordict), metadata

    def values(self, tensordict: TensorDictBase, action: Tensor, params: TensorDictBase) -> Tensor:
        """Every critic's value of an action.

        Args:
            tensordict: holds the observation, batch shape [*batch].
            action: shape [*batch, action_dim].
            params: the critics' parameters, live or target.

        Returns:
            Values, shape [num_critics, *batch].
        """
        inputs = tensordict.select(self.tensor_keys.observation).set(self.tensor_keys.action, action)
        assert self._vmap_qnetworkN0 is not None
        return self._vmap_qnetworkN0(inputs, params).get(self.tensor_keys.state_action_value).squeeze(-1)

    def action_gradient(self, tensordict: TensorDictBase, action: Tensor) -> Tensor:
        """Gradient of the critics' mean value by the action, detached, shape [*batch, action_dim]."""
        params = self.qvalue_network_params.detach()

        def mean_value(action: Tensor) -> Tensor:
            return self.values(tensordict, action, params).mean(0).sum()

        gradient = torch.func.grad(mean_value)(action.detach())
        assert isinstance(gradient, Tensor)
        return gradient.detach()


def make_actor_critic(problem: Problem, actor: TensorDictModuleBase, loss: ActorCriticLoss, lr: float) -> Algorithm:
    """An actor-critic loss with one Adam for its disjoint parameters and soft target updates."""
    loss.make_value_estimator(gamma=problem.gamma)
    optimizer = torch.optim.Adam(loss.parameters(), lr=lr)
    target_updater = SoftUpdate(loss, tau=problem.tau)

    def update(batch: TensorDictBase) -> TensorDictBase:
        losses = loss(batch)
        (losses["loss_actor"] + losses["loss_qvalue"]).backward()
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        target_updater.step()
        return losses.detach()

    return Algorithm(actor, loss, update, with_value(actor, loss))
