"""Soft Q-learning (Haarnoja et al., 2017, arXiv 1702.08165) with its sampling network, trained by Stein's gradient."""

from __future__ import annotations

import math

import torch
from tensordict import TensorDictBase
from tensordict.nn import TensorDictModule, TensorDictModuleBase
from tensordict.nn.probabilistic import interaction_type
from torch import Tensor, nn
from torchrl.data import Composite
from torchrl.envs.utils import ExplorationType

from benchmarks.baselines.actor_critic import ActorCriticLoss, make_actor_critic
from benchmarks.baselines.algorithm import Algorithm, Problem, make_critics, make_mlp


class SamplingNetwork(nn.Module):
    """Maps normal noise and an observation to an action in [-1, 1]: samples of the policy, whose density is unknown.

    Args:
        problem: sizes.
    """

    def __init__(self, problem: Problem) -> None:
        super().__init__()
        self.action_dim = problem.action_dim
        self.network = make_mlp(problem, problem.observation_dim + problem.action_dim, problem.action_dim)

    def forward(self, observation: Tensor, noise: Tensor) -> Tensor:
        """Action, shape [*batch, action_dim], of noise of the same shape."""
        return self.network(torch.cat([observation, noise], -1)).tanh()


class SamplingActor(TensorDictModuleBase):
    """Acts with a sampling network; where exploration is off its noise is zero.

    Args:
        problem: sizes and bounds.
    """

    center: Tensor
    half_range: Tensor

    def __init__(self, problem: Problem) -> None:
        super().__init__()
        self.in_keys, self.out_keys = ["observation"], ["action"]
        self.sampling_network = SamplingNetwork(problem)
        self.spec = Composite(action=problem.action_spec)
        self.register_buffer("center", problem.center)
        self.register_buffer("half_range", problem.half_range)

    def forward(self, tensordict: TensorDictBase) -> TensorDictBase:
        """Writes the action, in the environment's units."""
        observation = tensordict.get("observation")
        shape = (*observation.shape[:-1], self.sampling_network.action_dim)
        explores = interaction_type() in (ExplorationType.RANDOM, None)
        noise = observation.new_empty(shape).normal_() if explores else observation.new_zeros(shape)
        return tensordict.set("action", self.center + self.half_range * self.sampling_network(observation, noise))


class SQLLoss(ActorCriticLoss):
    """Loss of soft Q-learning (arXiv 1702.08165).

    - ``loss_qvalue``: the next state is worth ``alpha log`` of the integral of ``exp(Q(s', a) / alpha)``, of the lowest
      target critic, estimated with uniform actions.
    - ``loss_actor``: its gradient moves samples of the network along Stein's variational gradient towards
      ``exp(Q / alpha)``: half of the particles are moved, by the other half.

    Args:
        actor_network: a :class:`SamplingActor`.
        qvalue_network: the critics.
        alpha: temperature.
        num_value_particles: uniform actions for the value of a state.
        num_particles: actions of the sampling network for each half of the particles.
    """

    actor_network: SamplingActor
    center: Tensor
    half_range: Tensor

    def __init__(
        self,
        actor_network: SamplingActor,
        qvalue_network: list[TensorDictModule],
        *,
        alpha: float = 1.0,
        num_value_particles: int = 16,
        num_particles: int = 8,
        reduction: str | None = None,
    ) -> None:
        super().__init__(actor_network, qvalue_network, reduction=reduction)
        self.register_buffer("center", actor_network.center)
        self.register_buffer("half_range", actor_network.half_range)
        self.action_dim = actor_network.sampling_network.action_dim
        self.alpha = alpha
        self.num_value_particles = num_value_particles
        self.num_particles = num_particles

    def next_state_value(self, tensordict: TensorDictBase) -> Tensor:
        """Soft value, by uniform actions in [-1, 1]^d."""
        inputs = tensordict.expand(self.num_value_particles, *tensordict.batch_size)
        uniform = torch.rand(*inputs.batch_size, self.action_dim, device=self.center.device)
        action = self.center + self.half_range * (2.0 * uniform - 1.0)
        values = self.values(inputs, action, self.target_qvalue_network_params).amin(0)
        log_mean = torch.logsumexp(values / self.alpha, 0) - math.log(self.num_value_particles)
        return self.alpha * (log_mean + self.action_dim * math.log(2.0))

    def actor_loss(self, tensordict: TensorDictBase) -> Tensor:
        """A surrogate whose gradient is minus Stein's direction times the derivative of the sampled actions."""
        keys = self.tensor_keys
        observation = tensordict.get(keys.observation)
        particles = observation.expand(2 * self.num_particles, *observation.shape)
        noise = torch.randn(*particles.shape[:-1], self.action_dim, device=observation.device)
        with self.actor_network_params.to_module(self.actor_network):
            action = self.actor_network.sampling_network(particles, noise)
        fixed, moved = action.split(self.num_particles)
        fixed = fixed.detach()
        inputs = tensordict.select(keys.observation).expand(self.num_particles, *tensordict.batch_size)
        gradient = self.action_gradient(inputs, self.center + self.half_range * fixed) * self.half_range / self.alpha
        # Samples are images of tanh: the density of what is squashed has this factor, which keeps them off the faces.
        gradient = gradient - 2.0 * fixed / (1.0 - fixed.square() + 1e-6)
        direction = stein_direction(fixed, moved.detach(), gradient)
        loss = -(direction * moved).sum(-1).mean(0)
        return self._reduce_loss(loss, tensordict=tensordict)


def stein_direction(fixed: Tensor, moved: Tensor, gradient: Tensor) -> Tensor:
    """Stein's variational gradient with a Gaussian kernel, whose width is the median distance (Liu and Wang, 2016).

    Args:
        fixed: particles that act, shape [num_fixed, *batch, action_dim].
        moved: particles that are acted on, shape [num_moved, *batch, action_dim].
        gradient: of the log density at ``fixed``.

    Returns:
        Direction for ``moved``, of its shape.
    """
    difference = moved.unsqueeze(0) - fixed.unsqueeze(1)
    squared_distance = difference.square().sum(-1)
    num_fixed = fixed.shape[0]
    median = squared_distance.flatten(0, 1).median(0).values
    width = (median / math.log(num_fixed + 1.0)).clamp_min(1e-3)
    kernel = (-squared_distance / width).exp().unsqueeze(-1)
    repulsion = 2.0 * difference / width.unsqueeze(-1)
    return (kernel * (gradient.unsqueeze(1) + repulsion)).mean(0)


def make_sql(problem: Problem, *, lr: float = 3e-4, alpha: float = 1.0 / 30.0) -> Algorithm:
    """Soft Q-learning: Adam at 3e-4, 16 actions for values, 16 particles, half of which are moved.

    Its authors keep alpha at 1 and multiply rewards by 30 on HalfCheetah, Hopper and Swimmer; alpha of 1/30 is the
    same policy. Two critics and soft target updates as in the other baselines, instead of one critic and a copy of it
    every 1,000 updates.

    Args:
        problem: sizes, bounds and discount.
        lr: Adam's learning rate of sampling network and critics.
        alpha: temperature in units of the reward.
    """
    actor = SamplingActor(problem)
    loss = SQLLoss(actor, make_critics(problem), alpha=alpha)
    return make_actor_critic(problem, actor, loss, lr)
