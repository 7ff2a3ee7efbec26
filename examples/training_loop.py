"""The loss in a loop of one's own: no collector, no NCLQLUpdate, one optimizer step on the sum of the two losses.

From the repository's root, three minutes on one core::

    python examples/training_loop.py --frames 6000

It ends with a return of -148. Seed 0 is one of those on which NC-LQL is not stable in so few steps: -572.
"""

from __future__ import annotations

import argparse

import torch
from torchrl.data import LazyTensorStorage, TensorDictReplayBuffer
from torchrl.envs import set_exploration_type
from torchrl.envs.utils import ExplorationType
from torchrl.modules import ValueOperator
from torchrl.objectives import SoftUpdate

from envs import make_env
from nclql_torchrl import LangevinActor, NCLQLLoss, NoiseConditionedQNetwork


def main(frames: int = 6_000, random_frames: int = 1_000, batch_size: int = 256, seed: int = 1) -> float:
    """Trains on Pendulum-v1.

    Args:
        frames: transitions to collect; from ``random_frames`` on there is an update for each.
        random_frames: the first transitions, whose actions are uniformly random.
        batch_size: transitions per update.
        seed: of networks, actions and environments.

    Returns:
        Mean return of ten episodes without exploration noise.
    """
    torch.manual_seed(seed)
    env = make_env("Pendulum-v1", num_envs=1, seed=seed)
    networks = [NoiseConditionedQNetwork(3, 1, (64, 64), action_low=-2.0, action_high=2.0) for _ in range(2)]
    critics = [ValueOperator(network, in_keys=["observation", "action", "level"]) for network in networks]
    actor = LangevinActor(critics, spec=env.action_spec_unbatched)
    loss = NCLQLLoss(actor)
    loss.make_value_estimator(gamma=0.99)
    optimizer = torch.optim.Adam(loss.parameters(), lr=1e-3)
    target_updater = SoftUpdate(loss, tau=0.005)
    replay_buffer = TensorDictReplayBuffer(storage=LazyTensorStorage(frames), batch_size=batch_size)

    tensordict = env.reset()
    for frame in range(frames):
        # The actor reads the parameters that the loss trains: there is nothing to synchronise.
        tensordict = env.rand_action(tensordict) if frame < random_frames else actor(tensordict)
        transition, tensordict = env.step_and_maybe_reset(tensordict)
        replay_buffer.extend(transition)
        if frame < random_frames:
            continue
        losses = loss(replay_buffer.sample())
        (losses["loss_qvalue"] + losses["loss_noise"]).backward()
        optimizer.step()
        optimizer.zero_grad()
        target_updater.step()
        if (frame + 1) % 1_000 == 0:
            print(f"{frame + 1} frames: loss_qvalue {losses['loss_qvalue']:.3f}, Q {losses['pred_value']:.1f}")

    evaluation = make_env("Pendulum-v1", num_envs=10, seed=seed + 1)
    with torch.no_grad(), set_exploration_type(ExplorationType.DETERMINISTIC):
        episodes = evaluation.rollout(200, actor)
    result = float(episodes["next", "reward"].sum(1).mean())
    print(f"return of ten episodes: {result:.1f}")
    return result


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--frames", type=int, default=6_000)
    parser.add_argument("--random-frames", type=int, default=1_000)
    parser.add_argument("--seed", type=int, default=1)
    main(**vars(parser.parse_args()))
