"""A Q-network of one's own in the sampler and the loss: any module that maps observation, action and level to a value.

The sampler differentiates it by ``torch.func.grad``, all members of the ensemble at once by ``torch.vmap``. A network
without ``level`` among its in_keys works too: then every noise level sees the same landscape.

From the repository's root::

    python examples/custom_q_network.py --frames 4000
"""

from __future__ import annotations

import argparse

import torch
from tensordict.nn import TensorDictModule
from torch import Tensor, nn
from torchrl.collectors import Collector
from torchrl.data import LazyTensorStorage, TensorDictReplayBuffer
from torchrl.objectives import SoftUpdate

from envs import make_env
from nclql_torchrl import LangevinActor, NCLQLLoss, NCLQLUpdate, NoiseSchedule


class ResidualQNetwork(nn.Module):
    """Q(s, a, l) of residual blocks with layer normalisation; the level scales and shifts the features.

    Args:
        observation_dim: size of the observation.
        action_dim: size of the action.
        num_levels: of the noise schedule.
        width: of the hidden layers.
    """

    def __init__(self, observation_dim: int, action_dim: int, num_levels: int, width: int = 64) -> None:
        super().__init__()
        self.input = nn.Linear(observation_dim + action_dim, width)
        self.level = nn.Embedding(num_levels, 2 * width)
        self.blocks = nn.ModuleList(
            [nn.Sequential(nn.LayerNorm(width), nn.Linear(width, width), nn.SiLU()) for _ in range(2)]
        )
        self.output = nn.Linear(width, 1)

    def forward(self, observation: Tensor, action: Tensor, level: Tensor) -> Tensor:
        """Values, shape [*batch, 1]; the level is an integer, shape [*batch]."""
        features = self.input(torch.cat([observation, action], -1))
        scale, shift = self.level(level).chunk(2, -1)
        features = features * (1.0 + scale) + shift
        for block in self.blocks:
            features = features + block(features)
        return self.output(features)


def main(frames: int = 4_000, batch_size: int = 128, seed: int = 0) -> float:
    """Trains on Pendulum-v1, an update for every second transition.

    Args:
        frames: transitions to collect, the first quarter with random actions.
        batch_size: transitions per update.
        seed: of networks, actions and environments.

    Returns:
        Mean reward per step at the end.
    """
    torch.manual_seed(seed)
    env = make_env("Pendulum-v1", num_envs=4, seed=seed)
    schedule = NoiseSchedule(num_levels=10)
    critics = [
        TensorDictModule(
            ResidualQNetwork(3, 1, schedule.num_levels),
            in_keys=["observation", "action", "level"],
            out_keys=["state_action_value"],
        )
        for _ in range(2)
    ]
    actor = LangevinActor(critics, spec=env.action_spec_unbatched, schedule=schedule)
    loss = NCLQLLoss(actor)
    update = NCLQLUpdate(loss, torch.optim.Adam(loss.parameters(), lr=1e-3), SoftUpdate(loss, tau=0.005))
    replay_buffer = TensorDictReplayBuffer(storage=LazyTensorStorage(frames), batch_size=batch_size)
    reward = 0.0
    collector = Collector(
        env,
        actor,
        frames_per_batch=40,
        total_frames=frames,
        init_random_frames=frames // 4,
        auto_register_policy_transforms=False,
    )
    for transitions in collector:
        reward = float(transitions["next", "reward"].mean())
        replay_buffer.extend(transitions.select(*loss.in_keys).reshape(-1))
        if len(replay_buffer) <= frames // 4:
            continue
        for _ in range(transitions.numel() // 2):
            update(replay_buffer.sample())
    print(f"reward per step at the end {reward:.2f}")
    return reward


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--frames", type=int, default=4_000)
    parser.add_argument("--seed", type=int, default=0)
    main(**vars(parser.parse_args()))
