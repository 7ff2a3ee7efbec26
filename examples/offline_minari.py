"""Offline training from a saved dataset: an agent plays into a Minari dataset, another one learns from the file alone.

Everything is written into a temporary directory and nothing is downloaded; it needs the extra ``examples``.

From the repository's root::

    python examples/offline_minari.py --frames 3000 --episodes 25 --updates 2000
"""

from __future__ import annotations

import argparse
import os
import tempfile
from pathlib import Path

import gymnasium
import minari
import numpy as np
import torch
from tensordict import TensorDict
from torchrl.data import LazyTensorStorage, TensorDictReplayBuffer
from torchrl.envs import set_exploration_type
from torchrl.envs.utils import ExplorationType
from torchrl.modules import ValueOperator
from torchrl.objectives import SoftUpdate

from envs import make_env
from nclql_torchrl import LangevinActor, NCLQLLoss, NCLQLUpdate, NoiseConditionedQNetwork
from nclql_torchrl.training import TrainConfig, train
from nclql_torchrl.training.config import CollectorConfig, EnvConfig, LoggerConfig, NetworkConfig, OptimConfig
from nclql_torchrl.training.evaluation import load_policy

TASK = "Pendulum-v1"
DATASET = "pendulum/nclql-v0"


def record(run_dir: str, frames: int, episodes: int) -> None:
    """Trains an agent for ``frames`` transitions and writes what it does, exploration included, as ``DATASET``."""
    config = TrainConfig(
        env=EnvConfig(task=TASK, num_envs=4),
        collector=CollectorConfig(total_frames=frames, init_random_frames=frames // 3),
        network=NetworkConfig(hidden_sizes=[64, 64]),
        optim=OptimConfig(lr=1e-3, utd_ratio=0.5, batch_size=128),
        logger=LoggerConfig(backend="none", eval_episodes=2),
        run_dir=run_dir,
    )
    train(config)
    _, actor = load_policy(run_dir, torch.device("cpu"))
    env = minari.DataCollector(gymnasium.make(TASK), data_format="hdf5")
    for episode in range(episodes):
        observation, _ = env.reset(seed=episode)
        done = False
        while not done:
            action, *_ = actor(observation=torch.as_tensor(observation))
            observation, _, terminated, truncated, _ = env.step(action.numpy())
            done = terminated or truncated
    env.create_dataset(DATASET, algorithm_name="NC-LQL", description="Pendulum, played by a partly trained agent.")
    env.close()


def read(batch_size: int) -> TensorDictReplayBuffer:
    """The dataset's transitions. TorchRL 0.14.1's own ``MinariExperienceReplay`` would fill its storage with zeros."""

    def column(values: np.ndarray) -> torch.Tensor:
        return torch.as_tensor(values).reshape(len(values), -1)

    episodes = []
    for episode in minari.load_dataset(DATASET).iterate_episodes():
        observations, terminated = column(episode.observations), column(episode.terminations)
        following = {
            "observation": observations[1:],
            "reward": column(episode.rewards).float(),
            "terminated": terminated,
            "done": terminated | column(episode.truncations),
        }
        entries = {"observation": observations[:-1], "action": column(episode.actions), "next": following}
        episodes.append(TensorDict(entries, [len(terminated)]))
    transitions = torch.cat(episodes)
    replay_buffer = TensorDictReplayBuffer(storage=LazyTensorStorage(len(transitions)), batch_size=batch_size)
    replay_buffer.extend(transitions)
    return replay_buffer


def learn(replay_buffer: TensorDictReplayBuffer, updates: int, seed: int) -> float:
    """Trains new critics on the dataset; the mean return of ten episodes."""
    torch.manual_seed(seed)
    env = make_env(TASK, num_envs=10, seed=seed + 1)
    networks = [NoiseConditionedQNetwork(3, 1, (64, 64), action_low=-2.0, action_high=2.0) for _ in range(2)]
    critics = [ValueOperator(network, in_keys=["observation", "action", "level"]) for network in networks]
    # Offline, a Q that is wrong where there is no data is not corrected by trying: the lowest critic leads the chain.
    actor = LangevinActor(critics, spec=env.action_spec_unbatched, ensemble_reduction="min")
    loss = NCLQLLoss(actor)
    update = NCLQLUpdate(loss, torch.optim.Adam(loss.parameters(), lr=1e-3), SoftUpdate(loss, tau=0.005))
    for _ in range(updates):
        update(replay_buffer.sample())
    with torch.no_grad(), set_exploration_type(ExplorationType.DETERMINISTIC):
        return float(env.rollout(200, actor)["next", "reward"].sum(1).mean())


def main(frames: int = 3_000, episodes: int = 25, updates: int = 2_000, batch_size: int = 128, seed: int = 0) -> float:
    """Records a dataset and learns from it.

    Args:
        frames: transitions that the recording agent was trained on.
        episodes: recorded ones, of 200 transitions each.
        updates: of the offline learner.
        batch_size: transitions per update.
        seed: of the offline learner.

    Returns:
        Mean return of ten episodes of the offline learner.
    """
    with tempfile.TemporaryDirectory() as directory:
        os.environ["MINARI_DATASETS_PATH"] = str(Path(directory, "datasets"))
        record(str(Path(directory, "run")), frames, episodes)
        replay_buffer = read(batch_size)
        mean_reward = float(replay_buffer[:]["next", "reward"].mean())
        print(f"{len(replay_buffer)} transitions of return {200.0 * mean_reward:.1f} per episode")
        result = learn(replay_buffer, updates, seed)
    print(f"return of ten episodes: {result:.1f}")
    return result


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--frames", type=int, default=3_000)
    parser.add_argument("--episodes", type=int, default=25)
    parser.add_argument("--updates", type=int, default=2_000)
    parser.add_argument("--seed", type=int, default=0)
    main(**vars(parser.parse_args()))
