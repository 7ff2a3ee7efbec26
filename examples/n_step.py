"""n-step returns: TorchRL's MultiStepTransform in the replay buffer; loss and actor stay as they are.

The transform adds up n discounted rewards, moves the next observation n steps on, and says how far in
``steps_to_next_obs``; TorchRL's value estimators discount the bootstrap by ``gamma^steps_to_next_obs``.

From the repository's root::

    python examples/n_step.py --frames 4000 --steps 3
"""

from __future__ import annotations

import argparse

import torch
from torchrl.collectors import Collector
from torchrl.data import LazyTensorStorage, TensorDictReplayBuffer
from torchrl.envs import MultiStepTransform
from torchrl.modules import ValueOperator
from torchrl.objectives import SoftUpdate

from envs import make_env
from nclql_torchrl import LangevinActor, NCLQLLoss, NCLQLUpdate, NoiseConditionedQNetwork

GAMMA = 0.99


def main(frames: int = 4_000, steps: int = 3, batch_size: int = 128, seed: int = 0) -> float:
    """Trains on Pendulum-v1, an update for every second transition.

    Args:
        frames: transitions to collect, the first quarter with random actions.
        steps: n, the rewards in a return.
        batch_size: transitions per update.
        seed: of networks, actions and environments.

    Returns:
        Mean number of steps between the two states of a replayed transition.
    """
    torch.manual_seed(seed)
    env = make_env("Pendulum-v1", num_envs=4, seed=seed)
    networks = [NoiseConditionedQNetwork(3, 1, (64, 64), action_low=-2.0, action_high=2.0) for _ in range(2)]
    critics = [ValueOperator(network, in_keys=["observation", "action", "level"]) for network in networks]
    actor = LangevinActor(critics, spec=env.action_spec_unbatched)
    loss = NCLQLLoss(actor)
    loss.make_value_estimator(gamma=GAMMA)
    update = NCLQLUpdate(loss, torch.optim.Adam(loss.parameters(), lr=1e-3), SoftUpdate(loss, tau=0.005))

    # The transform looks ahead in time, so it is given [num_envs, time]; what it stores is [num_envs, time] too. By
    # default it leaves a step's flags where they are, and a return that runs into a terminal state would bootstrap from
    # it; without done_keys they move on with the observation.
    replay_buffer = TensorDictReplayBuffer(
        storage=LazyTensorStorage(frames, ndim=2),
        batch_size=batch_size,
        transform=MultiStepTransform(steps, GAMMA, done_keys=[]),
    )
    reward, distance = 0.0, 0.0
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
        replay_buffer.extend(transitions.select(*loss.in_keys))
        if len(replay_buffer) <= frames // 4:
            continue
        for _ in range(transitions.numel() // 2):
            batch = replay_buffer.sample()
            distance = float(batch["steps_to_next_obs"].float().mean())
            update(batch)
    print(f"reward per step at the end {reward:.2f}; {distance:.2f} steps from state to next state")
    return distance


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--frames", type=int, default=4_000)
    parser.add_argument("--steps", type=int, default=3)
    parser.add_argument("--seed", type=int, default=0)
    main(**vars(parser.parse_args()))
