"""Q-score matching (Psenka et al., 2023, arXiv 2312.11752): an online diffusion policy, TorchRL's DiffusionActor."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from tensordict import TensorDictBase
from tensordict.nn import TensorDictModule, TensorDictSequential
from torch import Tensor, nn
from torchrl.modules import DiffusionActor

from benchmarks.baselines.actor_critic import ActorCriticLoss, make_actor_critic
from benchmarks.baselines.algorithm import Algorithm, Problem, make_critics, make_mlp


class ScoreNetwork(nn.Module):
    """The noise in a noisy action, for DiffusionActor.

    QSM clips actions to [-1, 1] at every denoising step, and DiffusionActor does not. So this network hands it a noise
    whose step ends within the box.

    Args:
        problem: sizes.
        betas: share of noise that each step of the forward process adds, shape [num_steps]; the step enters the network
            as a one-hot vector.
    """

    scale: Tensor
    """Factor of the noise in a denoising step, shape [num_steps]."""
    growth: Tensor
    """What a denoising step divides by, likewise."""

    def __init__(self, problem: Problem, betas: Tensor) -> None:
        super().__init__()
        num_steps = betas.shape[0]
        self.num_steps = num_steps
        self.action_dim = problem.action_dim
        self.register_buffer("scale", betas / (1.0 - torch.cumprod(1.0 - betas, 0)).sqrt())
        self.register_buffer("growth", (1.0 - betas).sqrt())
        self.network = make_mlp(problem, problem.action_dim + problem.observation_dim + num_steps, problem.action_dim)

    def forward(self, inputs: Tensor) -> Tensor:
        """Noise such that ``(noisy action - scale * noise) / growth``, DiffusionActor's step, is within [-1, 1].

        Args:
            inputs: noisy action, observation and step, shape [*batch, action_dim + observation_dim + 1].

        Returns:
            Shape [*batch, action_dim].
        """
        step = inputs[..., -1].long()
        noisy_action = inputs[..., : self.action_dim]
        scale, growth = self.scale[step].unsqueeze(-1), self.growth[step].unsqueeze(-1)
        denoised = (noisy_action - scale * self.predict(inputs[..., :-1], step)) / growth
        return (noisy_action - growth * denoised.clamp(-1.0, 1.0)) / scale

    def predict(self, action_and_observation: Tensor, step: Tensor) -> Tensor:
        """The network itself, whose output is matched to the critics' gradient.

        Args:
            action_and_observation: shape [*batch, action_dim + observation_dim].
            step: shape [*batch].

        Returns:
            Shape [*batch, action_dim].
        """
        one_hot = F.one_hot(step, self.num_steps).to(action_and_observation.dtype)
        return self.network(torch.cat([action_and_observation, one_hot], -1))


class QSMLoss(ActorCriticLoss):
    """Loss of Q-score matching (arXiv 2312.11752).

    The score of the diffusion policy is regressed, at noisy versions of replayed actions, to the action gradient of the
    critics: ``loss_actor = |predicted noise + gradient_scale * dQ/da|^2``, with actions in [-1, 1] and the mean of the
    critics. The critics learn from actions that the target policy samples, as in TD3 from the lowest target critic.

    Args:
        actor_network: a sequence of a DiffusionActor with a :class:`ScoreNetwork`, and the map to the environment's
            units.
        qvalue_network: the critics.
        center: middle of the action range, shape [action_dim].
        half_range: half of it, likewise.
        gradient_scale: the paper's alpha, its program's M_q.
    """

    actor_network: TensorDictSequential
    center: Tensor
    half_range: Tensor

    def __init__(
        self,
        actor_network: TensorDictSequential,
        qvalue_network: list[TensorDictModule],
        *,
        center: Tensor,
        half_range: Tensor,
        gradient_scale: float = 50.0,
        reduction: str | None = None,
    ) -> None:
        super().__init__(actor_network, qvalue_network, delay_actor=True, reduction=reduction)
        self.register_buffer("center", center)
        self.register_buffer("half_range", half_range)
        self.gradient_scale = gradient_scale

    def next_state_value(self, tensordict: TensorDictBase) -> Tensor:
        """Lowest target critic of an action of the target policy."""
        with self.target_actor_network_params.to_module(self.actor_network):
            action = self.actor_network(tensordict.copy()).get(self.tensor_keys.action)
        return self.values(tensordict, action, self.target_qvalue_network_params).amin(0)

    def actor_loss(self, tensordict: TensorDictBase) -> Tensor:
        """Squared distance of the score to the critics' action gradient."""
        action = (tensordict.get(self.tensor_keys.action) - self.center) / self.half_range
        observation = tensordict.get(self.tensor_keys.observation)
        with self.actor_network_params.to_module(self.actor_network):
            diffusion: Any = self.actor_network[0].module
            score: ScoreNetwork = diffusion.score_network
            step = torch.randint(score.num_steps, action.shape[:-1], device=action.device)
            noisy_action, _ = diffusion.add_noise(action, step)
            prediction = score.predict(torch.cat([noisy_action, observation], -1), step)
        # The chain rule turns the gradient into that of normalised actions.
        gradient = self.action_gradient(tensordict, self.center + self.half_range * noisy_action) * self.half_range
        loss = (prediction + self.gradient_scale * gradient).square().mean(-1)
        return self._reduce_loss(loss, tensordict=tensordict)


def make_qsm(
    problem: Problem,
    *,
    lr: float = 3e-4,
    num_steps: int = 5,
    beta_start: float = 0.2,
    beta_end: float = 0.84,
    gradient_scale: float = 50.0,
) -> Algorithm:
    """Q-score matching with the settings of its authors' program: five denoising steps, Adam at 3e-4, M_q = 50.

    DiffusionActor's noise schedule is linear; its ends are those of the variance-preserving one of QSM's program.

    Args:
        problem: sizes, bounds and discount.
        lr: Adam's learning rate of actor and critics.
        num_steps: denoising steps.
        beta_start: share of noise that the first step of the forward process adds.
        beta_end: the last one's.
        gradient_scale: factor on the critics' gradient, an inverse temperature.
    """
    betas = torch.linspace(beta_start, beta_end, num_steps)
    center, half_range = problem.center, problem.half_range

    def to_environment(action: Tensor) -> Tensor:
        return center + half_range * action.clamp(-1.0, 1.0)

    diffusion = DiffusionActor(
        problem.action_dim,
        score_network=ScoreNetwork(problem, betas),
        num_steps=num_steps,
        beta_start=beta_start,
        beta_end=beta_end,
    )
    scaling = TensorDictModule(to_environment, in_keys=["action"], out_keys=["action"])
    actor = TensorDictSequential([diffusion, scaling])
    loss = QSMLoss(
        actor,
        make_critics(problem),
        center=center,
        half_range=half_range,
        gradient_scale=gradient_scale,
    )
    return make_actor_critic(problem, actor, loss, lr)
