"""Soft actor-critic (Haarnoja et al., 2018, arXiv 1812.05905), with TorchRL's SACLoss."""

from __future__ import annotations

import torch
from tensordict import TensorDictBase
from tensordict.nn import NormalParamExtractor, TensorDictModule
from torch import nn
from torchrl.modules import ProbabilisticActor, TanhNormal
from torchrl.objectives import SACLoss, SoftUpdate

from benchmarks.baselines.algorithm import Algorithm, Problem, make_critics, make_mlp, with_value


def make_sac(
    problem: Problem, *, lr: float = 3e-4, alpha: float | None = None, compile_update: bool = False
) -> Algorithm:
    """SAC with the paper's settings: Adam, two critics, tuned temperature with a target entropy of -action_dim.

    The target holds for actions in [-1, 1]; in the environment's units it is larger by the logarithm of the half range.

    Args:
        problem: sizes, bounds and discount.
        lr: Adam's learning rate of actor, critics and temperature.
        alpha: a fixed temperature instead of the tuned one.
        compile_update: whether the update is a compiled program, as NC-LQL's is, for comparisons in seconds.
    """
    network = nn.Sequential(
        make_mlp(problem, problem.observation_dim, 2 * problem.action_dim),
        NormalParamExtractor(scale_mapping="biased_softplus_1.0", scale_lb=1e-3),  # pyright: ignore[reportArgumentType],
    )
    actor = ProbabilisticActor(
        TensorDictModule(network, in_keys=["observation"], out_keys=["loc", "scale"]),
        spec=problem.action_spec,
        in_keys=["loc", "scale"],
        distribution_class=TanhNormal,
        distribution_kwargs={"low": problem.action_spec.low, "high": problem.action_spec.high, "tanh_loc": False},
    )
    loss = SACLoss(
        actor,
        make_critics(problem),
        loss_function="l2",
        alpha_init=1.0 if alpha is None else alpha,
        fixed_alpha=alpha is not None,
        target_entropy=-problem.action_dim + float(problem.half_range.log().sum()),
    )
    loss.make_value_estimator(gamma=problem.gamma)
    # The three losses have disjoint parameters, so that one Adam is as good as three.
    optimizer = torch.optim.Adam(loss.parameters(), lr=lr)
    target_updater = SoftUpdate(loss, tau=problem.tau)

    def update(batch: TensorDictBase) -> TensorDictBase:
        losses = loss(batch)
        (losses["loss_actor"] + losses["loss_qvalue"] + losses["loss_alpha"]).backward()
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        target_updater.step()
        return losses.detach()

    return Algorithm(actor, loss, torch.compile(update) if compile_update else update, with_value(actor, loss))
