"""A value network that TorchRL trained, sampled: implicit Q-learning's Q (arXiv 2110.06169) with Langevin dynamics.

IQL extracts its policy by weighted regression. Here the same Q is also climbed directly: the actor takes the network
and the parameters of any TorchRL loss; CQLLoss, SACLoss and TD3Loss hold theirs under the same names. Such a Q knows no
noise levels, so the chain is that of LQL: steps of one size.

From the repository's root::

    python examples/iql_value.py --frames 10000 --updates 4000
"""

from __future__ import annotations

import argparse

import torch
from tensordict.nn import InteractionType, TensorDictModule
from torch import nn
from torchrl.data import LazyTensorStorage, TensorDictReplayBuffer
from torchrl.envs import set_exploration_type
from torchrl.envs.utils import ExplorationType
from torchrl.modules import MLP, NormalParamExtractor, ProbabilisticActor, TanhNormal, ValueOperator
from torchrl.objectives import IQLLoss, SoftUpdate

from envs import make_env
from nclql_torchrl import LangevinActor, NoiseSchedule


def main(
    frames: int = 10_000, updates: int = 4_000, batch_size: int = 256, evaluation_steps: int = 200, seed: int = 0
) -> dict[str, float]:
    """Learns Pendulum-v1 from random transitions.

    Args:
        frames: transitions of the offline data, all with random actions.
        updates: IQL's.
        batch_size: transitions per update.
        evaluation_steps: of each evaluation episode; Pendulum's have 200.
        seed: of networks, data and evaluation.

    Returns:
        Mean return of ten episodes of IQL's own policy, of Langevin sampling on its Q, and of random actions.
    """
    torch.manual_seed(seed)
    env = make_env("Pendulum-v1", num_envs=50, seed=seed)
    data = env.rollout(frames // 50, break_when_any_done=False).reshape(-1)
    replay_buffer = TensorDictReplayBuffer(storage=LazyTensorStorage(len(data)), batch_size=batch_size)
    replay_buffer.extend(data)

    spec = env.action_spec_unbatched
    policy = nn.Sequential(MLP(in_features=3, out_features=2, num_cells=[64, 64]), NormalParamExtractor())
    policy = ProbabilisticActor(
        TensorDictModule(policy, in_keys=["observation"], out_keys=["loc", "scale"]),
        in_keys=["loc", "scale"],
        spec=spec,
        distribution_class=TanhNormal,
        distribution_kwargs={"low": spec.low, "high": spec.high},
        default_interaction_type=InteractionType.RANDOM,
    )
    qvalue = ValueOperator(MLP(in_features=4, out_features=1, num_cells=[64, 64]), in_keys=["observation", "action"])
    value = ValueOperator(MLP(in_features=3, out_features=1, num_cells=[64, 64]), in_keys=["observation"])
    loss = IQLLoss(policy, qvalue, value, num_qvalue_nets=2, temperature=3.0, expectile=0.9)
    loss.make_value_estimator(gamma=0.99)
    optimizer = torch.optim.Adam(loss.parameters(), lr=1e-3)
    target_updater = SoftUpdate(loss, tau=0.005)
    for _ in range(updates):
        batch = replay_buffer.sample()
        batch["next", "reward"] = 0.2 * batch["next", "reward"]
        losses = loss(batch)
        sum(value for key, value in losses.items() if key.startswith("loss_")).backward()
        optimizer.step()
        optimizer.zero_grad()
        target_updater.step()

    # The target network's lowest critic is the least likely to promise too much where there was no data.
    sampler = LangevinActor(
        loss.qvalue_network,
        loss.target_qvalue_network_params,
        spec=spec,
        schedule=NoiseSchedule.constant(step_size=2e-3),
        steps_per_level=30,
        w=100.0,
        ensemble_reduction="min",
        num_particles=8,
    )
    returns = {}
    for name, actor in (("iql", policy), ("langevin", sampler), ("random", None)):
        evaluation = make_env("Pendulum-v1", num_envs=10, seed=seed + 1)
        with torch.no_grad(), set_exploration_type(ExplorationType.DETERMINISTIC):
            returns[name] = float(evaluation.rollout(evaluation_steps, actor)["next", "reward"].sum(1).mean())
        print(f"{name}: return {returns[name]:.1f}")
    return returns


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--frames", type=int, default=10_000)
    parser.add_argument("--updates", type=int, default=4_000)
    parser.add_argument("--seed", type=int, default=0)
    main(**vars(parser.parse_args()))
