"""An ensemble of ten critics: the chain climbs their mean, the target takes the lowest, their spread is an uncertainty.

From the repository's root::

    python examples/ten_critics.py --frames 4000
"""

from __future__ import annotations

import argparse

import torch
from torchrl.collectors import Collector
from torchrl.data import LazyTensorStorage, TensorDictReplayBuffer
from torchrl.modules import ValueOperator
from torchrl.objectives import SoftUpdate

from envs import make_env
from nclql_torchrl import LangevinActor, NCLQLLoss, NCLQLUpdate, NoiseConditionedQNetwork


def main(frames: int = 4_000, num_critics: int = 10, batch_size: int = 128, seed: int = 0) -> float:
    """Trains on Pendulum-v1, an update for every second transition.

    Args:
        frames: transitions to collect, the first quarter with random actions.
        num_critics: members of the ensemble.
        batch_size: transitions per update.
        seed: of networks, actions and environments.

    Returns:
        Standard deviation of Q over the ensemble at states that were visited, divided by that at states that were not.
    """
    torch.manual_seed(seed)
    env = make_env("Pendulum-v1", num_envs=4, seed=seed)
    networks = [NoiseConditionedQNetwork(3, 1, (64, 64), action_low=-2.0, action_high=2.0) for _ in range(num_critics)]
    critics = [ValueOperator(network, in_keys=["observation", "action", "level"]) for network in networks]
    # The sum of ten critics would act as w does when it is multiplied by ten; their mean keeps the scale of one.
    actor = LangevinActor(critics, spec=env.action_spec_unbatched, ensemble_reduction="mean", w=1000.0)
    loss = NCLQLLoss(actor)
    update = NCLQLUpdate(loss, torch.optim.Adam(loss.parameters(), lr=1e-3), SoftUpdate(loss, tau=0.005))
    replay_buffer = TensorDictReplayBuffer(storage=LazyTensorStorage(frames), batch_size=batch_size)
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
            update(replay_buffer.sample())

    with torch.no_grad():
        visited = replay_buffer.sample()
        # A pendulum's sine and cosine cannot both be 3.
        unvisited = visited.clone().set("observation", torch.full_like(visited["observation"], 3.0))
        level = torch.full(visited.shape, actor.sampler.schedule.num_levels - 1)
        spread = [loss.ensemble_values(each, each["action"], level).std(0).mean() for each in (visited, unvisited)]
    print(f"standard deviation of Q over {num_critics} critics: visited {spread[0]:.3f}, unvisited {spread[1]:.3f}")
    return float(spread[0] / spread[1])


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--frames", type=int, default=4_000)
    parser.add_argument("--num-critics", type=int, default=10)
    parser.add_argument("--seed", type=int, default=0)
    main(**vars(parser.parse_args()))
