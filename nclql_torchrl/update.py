"""One gradient update of NC-LQL: the authors' two steps in sequence, or one step on the summed loss."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, Literal

import torch
from tensordict import TensorDict, TensorDictBase
from tensordict.utils import NestedKey
from torch import Tensor
from torch.optim import Optimizer
from torchrl.objectives.utils import TargetNetUpdater

from nclql_torchrl.execution import Execution, Program, check_execution, resolve
from nclql_torchrl.loss import METADATA_KEYS, NCLQLLoss
from nclql_torchrl.value import check_choice

UpdateMode = Literal["sequential", "summed"]
"""The authors' TD step followed by a noise step, or one step on the sum of the two losses."""

Average = Callable[[Sequence[Tensor | None]], Sequence[Tensor | None]]
"""Gradients of one learner -> their means over all learners."""


class NCLQLUpdate:
    """Applies :class:`~nclql_torchrl.NCLQLLoss` to a batch (arXiv 2602.07873; order of its authors' program).

    "sequential": a step on the TD loss, then a step on the noise loss at the new parameters, regressing to the critics'
    mean from before the first step; both share the optimizer's state. "summed": one step on the sum of the two losses.
    Either way the target network follows once. With one noise level (LQL) there is only the TD step.

    Everything random is drawn first (:meth:`NCLQLLoss.draw`); what remains of each step, from the batch to the
    gradients, is a deterministic function, and runs as one compiled program or one CUDA graph.

    Args:
        loss: the loss module.
        optimizer: over ``loss.parameters()``.
        target_updater: TorchRL's ``SoftUpdate`` or ``HardUpdate``, or None without target parameters.
        mode: "sequential" or "summed".
        execution: how losses and gradients are computed, see :mod:`nclql_torchrl.execution`. Defaults to that of the
            sampler.
        average: applied to the gradients before each step of the optimizer, None for parameters without one: how
            several learners that train together average theirs.

    Raises:
        ValueError: for an unknown mode or execution.
        RuntimeError: where this machine lacks what ``execution`` needs.

    Examples:
        >>> import torch
        >>> from torchrl.data import Bounded
        >>> from torchrl.modules import ValueOperator
        >>> from torchrl.objectives import SoftUpdate
        >>> from nclql_torchrl import LangevinActor, NoiseConditionedQNetwork
        >>> critic = ValueOperator(NoiseConditionedQNetwork(3, 2, (32,)), in_keys=["observation", "action", "level"])
        >>> loss = NCLQLLoss(LangevinActor([critic], spec=Bounded(-1.0, 1.0, (2,))))
        >>> update = NCLQLUpdate(loss, torch.optim.Adam(loss.parameters(), lr=1e-4), SoftUpdate(loss, tau=0.005))
        >>> batch = TensorDict({
        ...     "observation": torch.randn(8, 3), "action": torch.zeros(8, 2),
        ...     "next": {
        ...         "observation": torch.randn(8, 3), "reward": torch.ones(8, 1),
        ...         "done": torch.zeros(8, 1, dtype=torch.bool), "terminated": torch.zeros(8, 1, dtype=torch.bool),
        ...     },
        ... }, [8])
        >>> sorted(update(batch).keys())
        ['loss_noise', 'loss_qvalue', 'next_state_value', 'pred_value', 'target_value', 'td_error']
    """

    def __init__(
        self,
        loss: NCLQLLoss,
        optimizer: Optimizer,
        target_updater: TargetNetUpdater | None = None,
        mode: UpdateMode = "sequential",
        execution: Execution | None = None,
        average: Average | None = None,
    ) -> None:
        check_choice("mode", mode, UpdateMode)
        self.loss = loss
        self.optimizer = optimizer
        self.target_updater = target_updater
        self.mode = mode
        self.average = average
        self.execution: Execution = loss.sampler.execution if execution is None else execution
        check_execution(self.execution)
        self._trained = [parameter for group in optimizer.param_groups for parameter in group["params"]]
        # A step on a constant zero would still advance Adam's moments.
        self._has_noise_step = mode == "sequential" and loss.sampler.schedule.num_levels > 1
        self._programs: dict[tuple[object, ...], tuple[Program, Program]] = {}

    def __call__(self, batch: TensorDictBase) -> TensorDict:
        """Updates the critics in place, and writes the TD error into ``batch``.

        Args:
            batch: transitions, batch shape [*batch].

        Returns:
            Detached scalars: the losses and the loss's diagnostics, averaged over the batch.
        """
        drawn = self.loss.draw(batch)
        metrics, td_error = self.learn(drawn)
        batch.set(self.loss.tensor_keys.priority, td_error)
        return metrics

    def learn(self, drawn: TensorDictBase) -> tuple[TensorDict, Tensor]:
        """The update by a batch with its randomness (:meth:`NCLQLLoss.draw`): its scalars, and TD errors [*batch]."""
        first, second, inputs = self._prepare(drawn)
        td_error, noise_target, loss_qvalue, loss_noise, *outputs = first(*inputs)
        means, gradients = outputs[: len(METADATA_KEYS)], outputs[len(METADATA_KEYS) :]
        self._step(gradients)
        if self._has_noise_step:
            loss_noise, *gradients = second(noise_target, *inputs)
            self._step(gradients)
        if self.target_updater is not None:
            self.target_updater.step()
        metrics = dict(zip(METADATA_KEYS, means, strict=True))
        return TensorDict({"loss_qvalue": loss_qvalue, "loss_noise": loss_noise, **metrics}), td_error

    def _step(self, gradients: Sequence[Tensor | None]) -> None:
        """One step of the optimizer along given gradients."""
        if self.average is not None:
            gradients = self.average(gradients)
        for parameter, gradient in zip(self._trained, gradients, strict=True):
            parameter.grad = gradient
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)

    def _prepare(self, drawn: TensorDictBase) -> tuple[Program, Program, list[Tensor]]:
        """The programs of the first and the second step for a batch of this layout, and the tensors that they take."""
        priority_key = self.loss.tensor_keys.priority  # an earlier update's
        entries = {
            key: value for key, value in drawn.items(True, True) if isinstance(value, Tensor) and key != priority_key
        }
        layout = (drawn.batch_dims, *entries)
        if layout not in self._programs:
            execution = resolve(self.execution, drawn.get(self.loss.tensor_keys.action).device.type)
            self._programs[layout] = self._make_programs(list(entries), drawn.batch_dims, execution)
        return *self._programs[layout], list(entries.values())

    def _make_programs(self, keys: list[NestedKey], batch_dims: int, execution: Execution) -> tuple[Program, Program]:
        loss, trained = self.loss, self._trained

        def batch_of(tensors: Sequence[Tensor]) -> TensorDict:
            batch = TensorDict(batch_size=tensors[0].shape[:batch_dims])
            for key, tensor in zip(keys, tensors, strict=True):
                batch.set(key, tensor)
            return batch

        def gradients(total: Tensor) -> list[Tensor | None]:
            found = torch.autograd.grad(total, trained, allow_unused=True)
            # As the parameters lie in memory, for the optimizer's sake.
            return [None if gradient is None else gradient.contiguous() for gradient in found]

        def first(*tensors: Tensor) -> tuple[Any, ...]:
            batch = batch_of(tensors)
            loss_qvalue, metadata = loss.qvalue_loss(batch)
            total, loss_noise = loss_qvalue, torch.zeros_like(loss_qvalue)
            if self.mode == "summed":
                loss_noise = loss.noise_loss(batch, metadata["pred_value"])
                total = loss_qvalue + loss_noise
            means = (metadata[key].mean() for key in METADATA_KEYS)
            losses = (loss_qvalue.detach(), loss_noise.detach())
            return metadata["td_error"], metadata["pred_value"], *losses, *means, *gradients(total)

        def second(noise_target: Tensor, *tensors: Tensor) -> tuple[Any, ...]:
            loss_noise = loss.noise_loss(batch_of(tensors), noise_target)
            return loss_noise.detach(), *gradients(loss_noise)

        read = [*loss.parameters(), *loss.buffers()]
        return Program(first, execution, read), Program(second, execution, read)
