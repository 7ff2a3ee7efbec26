"""Prioritised replay (arXiv 1511.05952): the loss writes each transition's TD error and reads its weight.

From the repository's root::

    python examples/prioritized_replay.py --frames 4000

TorchRL's own ``PrioritizedSampler(capacity, alpha=0.6, beta=0.4)`` fits in the same place and is faster for millions of
transitions. It needs TorchRL's C++ extension, which TorchRL 0.14.1 cannot load under torch 2.13; hence the class below.
"""

from __future__ import annotations

import argparse
from typing import Any

import torch
from torch import Tensor
from torchrl.collectors import Collector
from torchrl.data import LazyTensorStorage, RandomSampler, TensorDictReplayBuffer
from torchrl.data.replay_buffers.storages import Storage
from torchrl.modules import ValueOperator
from torchrl.objectives import SoftUpdate

from envs import make_env
from nclql_torchrl import LangevinActor, NCLQLLoss, NCLQLUpdate, NoiseConditionedQNetwork


class ProportionalSampler(RandomSampler):
    """Draws transitions with probability proportional to ``priority^alpha``, from one cumulative sum per batch.

    Args:
        capacity: of the replay buffer.
        alpha: 0 samples uniformly, 1 in proportion to the priority.
        beta: how much of the bias the weights ``(len * probability)^-beta`` take back; they are divided by the largest.
    """

    def __init__(self, capacity: int, alpha: float = 0.6, beta: float = 0.4) -> None:
        self.priorities = torch.zeros(capacity, dtype=torch.float64)
        self.alpha, self.beta = alpha, beta

    def sample(self, storage: Storage, batch_size: int) -> tuple[Tensor, dict[str, Any]]:
        cumulative = self.priorities[: len(storage)].pow(self.alpha).cumsum(0)
        total = cumulative[-1]
        index = torch.searchsorted(cumulative, torch.rand(batch_size, dtype=torch.float64) * total)
        weight = (len(storage) * self.priorities[index].pow(self.alpha) / total).pow(-self.beta)
        return index, {"priority_weight": (weight / weight.max()).float()}

    def extend(self, index: Tensor) -> None:
        # What is new goes first: it has the highest priority of all, and 1 where there is none yet.
        highest = self.priorities.max()
        self.priorities[index] = torch.where(highest > 0, highest, 1.0)

    def update_priority(self, index: Tensor, priority: Tensor, **_: Any) -> None:
        self.priorities[index] = priority.double() + 1e-8

    def state_dict(self) -> dict[str, Any]:
        return {"priorities": self.priorities}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self.priorities.copy_(state_dict["priorities"])


def main(frames: int = 4_000, batch_size: int = 128, seed: int = 0) -> float:
    """Trains on Pendulum-v1, an update for every second transition.

    Args:
        frames: transitions to collect, the first quarter with random actions.
        batch_size: transitions per update.
        seed: of networks, actions and environments.

    Returns:
        How many times the mean priority the transitions of the last batch had: above 1, because they were preferred.
    """
    torch.manual_seed(seed)
    env = make_env("Pendulum-v1", num_envs=4, seed=seed)
    networks = [NoiseConditionedQNetwork(3, 1, (64, 64), action_low=-2.0, action_high=2.0) for _ in range(2)]
    critics = [ValueOperator(network, in_keys=["observation", "action", "level"]) for network in networks]
    actor = LangevinActor(critics, spec=env.action_spec_unbatched)
    loss = NCLQLLoss(actor)
    update = NCLQLUpdate(loss, torch.optim.Adam(loss.parameters(), lr=1e-3), SoftUpdate(loss, tau=0.005))
    sampler = ProportionalSampler(capacity=frames)
    replay_buffer = TensorDictReplayBuffer(storage=LazyTensorStorage(frames), sampler=sampler, batch_size=batch_size)
    preference = torch.ones(())
    collector = Collector(
        env,
        actor,
        frames_per_batch=40,
        total_frames=frames,
        init_random_frames=frames // 4,
        auto_register_policy_transforms=False,
    )
    for transitions in collector:
        replay_buffer.extend(transitions.select(*loss.in_keys).reshape(-1))
        if len(replay_buffer) <= frames // 4:
            continue
        for _ in range(transitions.numel() // 2):
            batch = replay_buffer.sample()
            preference = sampler.priorities[batch["index"]].mean() / sampler.priorities[: len(replay_buffer)].mean()
            update(batch)
            replay_buffer.update_priority(batch["index"], batch["td_error"])
    reward = replay_buffer[-400:]["next", "reward"].mean()
    print(f"reward per step at the end {reward:.2f}; priority of the last batch {preference:.2f} times the mean")
    return float(preference)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--frames", type=int, default=4_000)
    parser.add_argument("--seed", type=int, default=0)
    main(**vars(parser.parse_args()))
