"""TD3 (Fujimoto et al., 2018, arXiv 1802.09477), with TorchRL's TD3Loss."""

from __future__ import annotations

import torch
from tensordict import TensorDict, TensorDictBase
from tensordict.nn import TensorDictModule, TensorDictSequential
from torchrl.modules import AdditiveGaussianModule, TanhModule
from torchrl.objectives import SoftUpdate, TD3Loss

from benchmarks.baselines.algorithm import Algorithm, Problem, make_critics, make_mlp, with_value


def make_td3(
    problem: Problem,
    *,
    lr: float = 3e-4,
    exploration_noise: float = 0.1,
    policy_noise: float = 0.2,
    noise_clip: float = 0.5,
    policy_delay: int = 2,
) -> Algorithm:
    """TD3 with the settings of its authors' program.

    Args:
        problem: sizes, bounds and discount.
        lr: Adam's learning rate of actor and critics.
        exploration_noise: standard deviation of the noise on collected actions, in units of half the action range.
        policy_noise: of that on the target's actions, likewise.
        noise_clip: largest noise on the target's actions, likewise.
        policy_delay: critic updates for each update of the actor and of the targets.
    """
    network = make_mlp(problem, problem.observation_dim, problem.action_dim)
    squash = TanhModule(in_keys=["action"], spec=problem.action_spec)
    policy = TensorDictSequential([TensorDictModule(network, in_keys=["observation"], out_keys=["action"]), squash])
    # TD3Loss and the exploration module take one number for all dimensions.
    unit = float(problem.half_range.max())
    sigma = exploration_noise * unit
    noise = AdditiveGaussianModule(spec=problem.action_spec, sigma_init=sigma, sigma_end=sigma)
    actor = TensorDictSequential([policy, noise])
    loss = TD3Loss(
        policy,
        make_critics(problem),
        action_spec=problem.action_spec,
        policy_noise=policy_noise * unit,
        noise_clip=noise_clip * unit,
        loss_function="l2",
    )
    loss.make_value_estimator(gamma=problem.gamma)
    actor_optimizer = torch.optim.Adam(loss.actor_network_params.values(True, True), lr=lr)
    critic_optimizer = torch.optim.Adam(loss.qvalue_network_params.values(True, True), lr=lr)
    target_updater = SoftUpdate(loss, tau=problem.tau)
    num_updates = 0

    def update(batch: TensorDictBase) -> TensorDictBase:
        nonlocal num_updates
        loss_qvalue, _ = loss.value_loss(batch)
        loss_qvalue.backward()
        critic_optimizer.step()
        critic_optimizer.zero_grad(set_to_none=True)
        metrics = TensorDict({"loss_qvalue": loss_qvalue.detach()})
        num_updates += 1
        if num_updates % policy_delay == 0:
            loss_actor, _ = loss.actor_loss(batch)
            loss_actor.backward()
            actor_optimizer.step()
            actor_optimizer.zero_grad(set_to_none=True)
            target_updater.step()
            metrics["loss_actor"] = loss_actor.detach()
        return metrics

    return Algorithm(actor, loss, update, with_value(actor, loss))
