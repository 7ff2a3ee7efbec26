"""One gradient update of NC-LQL: the authors' two steps in sequence, or one step on the summed loss."""

from __future__ import annotations

from typing import Literal

from tensordict import TensorDict, TensorDictBase
from torch import Tensor
from torch.optim import Optimizer
from torchrl.objectives.utils import TargetNetUpdater

from nclql_torchrl.loss import NCLQLLoss
from nclql_torchrl.value import check_choice

UpdateMode = Literal["sequential", "summed"]
"""The authors' TD step followed by a noise step, or one step on the sum of the two losses."""


class NCLQLUpdate:
    """Applies :class:`~nclql_torchrl.NCLQLLoss` to a batch (arXiv 2602.07873; order of its authors' program).

    "sequential": a step on the TD loss, then a step on the noise loss at the new parameters, regressing to the critics'
    mean from before the first step; both share the optimizer's state. "summed": one step on the sum of the two losses.
    Either way the target network follows once. With one noise level (LQL) there is only the TD step.

    Args:
        loss: the loss module.
        optimizer: over ``loss.parameters()``.
        target_updater: TorchRL's ``SoftUpdate`` or ``HardUpdate``, or None without target parameters.
        mode: "sequential" or "summed".

    Raises:
        ValueError: for an unknown mode.

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
    ) -> None:
        check_choice("mode", mode, UpdateMode)
        self.loss = loss
        self.optimizer = optimizer
        self.target_updater = target_updater
        self.mode = mode

    def __call__(self, batch: TensorDictBase) -> TensorDict:
        """Updates the critics in place, and writes the TD error into ``batch``.

        Args:
            batch: transitions, batch shape [*batch].

        Returns:
            Detached scalars: the losses and the loss's diagnostics, averaged over the batch.
        """
        loss_qvalue, metadata = self.loss.qvalue_loss(batch)
        batch.set(self.loss.tensor_keys.priority, metadata["td_error"])
        noise_target = metadata["pred_value"]
        if self.mode == "summed":
            loss_noise = self.loss.noise_loss(batch, noise_target)
            self._step(loss_qvalue + loss_noise)
        else:
            self._step(loss_qvalue)
            loss_noise = self.loss.noise_loss(batch, noise_target)
            # A step on a constant zero would still advance Adam's moments.
            if self.loss.sampler.schedule.num_levels > 1:
                self._step(loss_noise)
        if self.target_updater is not None:
            self.target_updater.step()
        metrics = {key: value.mean() for key, value in metadata.items()}
        return TensorDict({"loss_qvalue": loss_qvalue.detach(), "loss_noise": loss_noise.detach(), **metrics})

    def _step(self, loss: Tensor) -> None:
        loss.backward()
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
