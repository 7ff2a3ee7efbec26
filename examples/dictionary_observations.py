"""Dictionary observations and nested keys: a Gymnasium task with a dictionary of observations, under keys of one's own.

The critic says what it reads by its in_keys, and actor and loss follow.

From the repository's root::

    python examples/dictionary_observations.py --frames 4000
"""

from __future__ import annotations

import argparse
from typing import Any

import gymnasium
import numpy as np
import torch
from tensordict.nn import TensorDictModule
from torch import Tensor, nn
from torchrl.collectors import Collector
from torchrl.data import LazyTensorStorage, TensorDictReplayBuffer
from torchrl.envs import GymWrapper, RenameTransform, TransformedEnv
from torchrl.objectives import SoftUpdate

from nclql_torchrl import LangevinActor, NCLQLLoss, NCLQLUpdate, NoiseConditionedQNetwork

POSITION, GOAL, ACTION = ("robot", "position"), ("task", "goal"), ("robot", "action")


class Reach(gymnasium.Env[dict[str, np.ndarray], np.ndarray]):
    """A point in a square moves to a goal. Both are two numbers in [-1, 1]; an episode takes 20 steps."""

    observation_space = gymnasium.spaces.Dict(
        {name: gymnasium.spaces.Box(-1.0, 1.0, (2,), np.float32) for name in ("position", "goal")}
    )
    action_space = gymnasium.spaces.Box(-0.2, 0.2, (2,), np.float32)

    def reset(self, *, seed: int | None = None, options: dict[str, Any] | None = None) -> tuple[dict, dict]:
        super().reset(seed=seed)
        self.position, self.goal = self.np_random.uniform(-1.0, 1.0, (2, 2)).astype(np.float32)
        return {"position": self.position, "goal": self.goal}, {}

    def step(self, action: np.ndarray) -> tuple[dict, float, bool, bool, dict]:
        self.position = np.clip(self.position + action, -1.0, 1.0).astype(np.float32)
        distance = float(np.linalg.norm(self.position - self.goal))
        return {"position": self.position, "goal": self.goal}, -distance, False, False, {}


class GoalQNetwork(nn.Module):
    """The paper's network on two observations at once."""

    def __init__(self) -> None:
        super().__init__()
        self.network = NoiseConditionedQNetwork(4, 2, (64, 64), action_low=-0.2, action_high=0.2)

    def forward(self, position: Tensor, goal: Tensor, action: Tensor, level: Tensor) -> Tensor:
        """Values, shape [*batch, 1]."""
        return self.network(torch.cat([position, goal], -1), action, level)


def main(frames: int = 4_000, batch_size: int = 128, seed: int = 0) -> float:
    """Trains on the task above, an update for every second transition.

    Args:
        frames: transitions to collect, the first quarter with random actions.
        batch_size: transitions per update.
        seed: of networks, actions and environment.

    Returns:
        Mean distance to the goal over the last 200 transitions.
    """
    torch.manual_seed(seed)
    env = GymWrapper(gymnasium.wrappers.TimeLimit(Reach(), 20))
    # TorchRL puts the entries of the dictionary side by side; here they go where the rest of a program may want them.
    env = TransformedEnv(
        env, RenameTransform(["position", "goal"], [POSITION, GOAL], ["action"], [ACTION], create_copy=False)
    )
    env.set_seed(seed)
    critics = [
        TensorDictModule(GoalQNetwork(), in_keys=[POSITION, GOAL, ACTION, "level"], out_keys=["state_action_value"])
        for _ in range(2)
    ]
    actor = LangevinActor(critics, spec=env.full_action_spec_unbatched, action_key=ACTION)
    loss = NCLQLLoss(actor)
    loss.make_value_estimator(gamma=0.9)
    update = NCLQLUpdate(loss, torch.optim.Adam(loss.parameters(), lr=1e-3), SoftUpdate(loss, tau=0.005))
    replay_buffer = TensorDictReplayBuffer(storage=LazyTensorStorage(frames), batch_size=batch_size)
    collector = Collector(
        env,
        actor,
        frames_per_batch=20,
        total_frames=frames,
        init_random_frames=frames // 4,
        auto_register_policy_transforms=False,
    )
    for transitions in collector:
        replay_buffer.extend(transitions.select(*loss.in_keys))
        if len(replay_buffer) <= frames // 4:
            continue
        for _ in range(transitions.numel() // 2):
            update(replay_buffer.sample())
    distances = -replay_buffer[:]["next", "reward"].flatten()
    distance = float(distances[-200:].mean())
    print(f"mean distance to the goal {float(distances[: frames // 4].mean()):.2f} at first, {distance:.2f} at the end")
    return distance


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--frames", type=int, default=4_000)
    parser.add_argument("--seed", type=int, default=0)
    main(**vars(parser.parse_args()))
