"""The actor in TorchRL's multi-process collector: worker processes act, this one learns and sends them its critics.

From the repository's root::

    python examples/multi_process_collector.py --frames 4000 --workers 2
"""

from __future__ import annotations

import argparse
from functools import partial

import torch
from torchrl.collectors import MultiSyncCollector
from torchrl.data import LazyTensorStorage, TensorDictReplayBuffer
from torchrl.modules import ValueOperator
from torchrl.objectives import SoftUpdate

from envs import make_env
from nclql_torchrl import LangevinActor, NCLQLLoss, NCLQLUpdate, NoiseConditionedQNetwork


def main(frames: int = 4_000, workers: int = 2, batch_size: int = 256, seed: int = 0) -> float:
    """Trains on Pendulum-v1, an update for every second transition.

    Args:
        frames: transitions to collect, the first quarter with random actions.
        workers: processes, each with four environments.
        batch_size: transitions per update.
        seed: of networks, actions and environments.

    Returns:
        Mean reward per step over the last quarter of the transitions.
    """
    torch.manual_seed(seed)
    make_worker_env = partial(make_env, "Pendulum-v1", num_envs=4)
    spec = make_worker_env().action_spec_unbatched
    networks = [NoiseConditionedQNetwork(3, 1, (64, 64), action_low=-2.0, action_high=2.0) for _ in range(2)]
    critics = [ValueOperator(network, in_keys=["observation", "action", "level"]) for network in networks]
    actor = LangevinActor(critics, spec=spec)
    loss = NCLQLLoss(actor)
    update = NCLQLUpdate(loss, torch.optim.Adam(loss.parameters(), lr=1e-3), SoftUpdate(loss, tau=0.005))
    replay_buffer = TensorDictReplayBuffer(storage=LazyTensorStorage(frames), batch_size=batch_size)

    collector = MultiSyncCollector(
        [make_worker_env] * workers,
        actor,
        frames_per_batch=40 * workers,
        total_frames=frames,
        init_random_frames=frames // 4,
        cat_results="stack",
    )
    collector.set_seed(seed)
    rewards = []
    try:
        for batch in collector:
            replay_buffer.extend(batch.select(*loss.in_keys).reshape(-1))
            rewards.append(float(batch["next", "reward"].mean()))
            if len(replay_buffer) <= frames // 4:
                continue
            for _ in range(batch.numel() // 2):
                update(replay_buffer.sample())
            # On a CPU the workers read the learner's parameters in shared memory; elsewhere this sends them.
            collector.update_policy_weights_()
    finally:
        collector.shutdown()
    last = rewards[-max(1, len(rewards) // 4) :]
    result = sum(last) / len(last)
    print(f"reward per step: {rewards[0]:.2f} at first, {result:.2f} over the last quarter")
    return result


# Without this guard every worker would start workers of its own.
if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--frames", type=int, default=4_000)
    parser.add_argument("--workers", type=int, default=2)
    parser.add_argument("--seed", type=int, default=0)
    main(**vars(parser.parse_args()))
