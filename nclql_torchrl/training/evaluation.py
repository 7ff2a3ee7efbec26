"""Evaluation on Gymnasium's own environment: returns, and how far the critic overestimates them."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from tensordict import TensorDictBase
from torch import Tensor
from torchrl.checkpoint import Checkpoint
from torchrl.envs import EnvBase, TransformedEnv
from torchrl.envs.utils import ExplorationType, set_exploration_type
from torchrl.modules.utils import get_env_transforms_from_module

from envs import make_env
from nclql_torchrl.actor import LangevinActor
from nclql_torchrl.training.checkpoint import find_checkpoint, load_checkpoint, read_config
from nclql_torchrl.training.components import make_actor, make_loss
from nclql_torchrl.training.config import TrainConfig, load_config

SEED_OFFSET = 1_000_000_000
"""Added to the run's seed, so that evaluation never sees an initial state that training has seen."""


@dataclass(frozen=True)
class Evaluation:
    """Statistics over complete episodes, one per environment."""

    returns: list[float]
    """Undiscounted, unscaled return of each episode."""

    lengths: list[int]
    """Control steps of each episode."""

    estimated_q: float
    """Lowest critic's value of the first state and action, mean over episodes, in the critic's (scaled) units."""

    discounted_return: float
    """Discounted scaled return really obtained from there, mean over episodes. Where a time limit cuts the episode,
    the critic's own value of what would follow is added, discounted: the critic bootstraps there too."""

    @property
    def mean(self) -> float:
        """Mean return."""
        return float(torch.tensor(self.returns, dtype=torch.float64).mean())

    @property
    def std(self) -> float:
        """Standard deviation of the return over episodes."""
        return float(torch.tensor(self.returns, dtype=torch.float64).std(correction=0))

    @property
    def mean_length(self) -> float:
        """Mean number of control steps."""
        return sum(self.lengths) / len(self.lengths)

    @property
    def overestimation(self) -> float:
        """``estimated_q - discounted_return``: positive where the critic promises more than it delivers."""
        return self.estimated_q - self.discounted_return


def evaluate(
    actor: LangevinActor,
    task: str,
    *,
    episodes: int,
    seed: int,
    gamma: float,
    reward_scale: float,
    task_options: Mapping[str, Any] | None = None,
) -> Evaluation:
    """Plays episodes of a task on Gymnasium's own environment, without exploration noise.

    Args:
        actor: with ``diagnostics=True``, whose ``q_after`` is the critic's estimate.
        task: Gymnasium id.
        episodes: how many, all at the same time.
        seed: of the environments; the same seed gives the same initial states.
        gamma: discount per control step.
        reward_scale: the loss's factor on rewards.
        task_options: options of the task's constructor.

    Returns:
        Statistics over the episodes.
    """
    device = actor.deterministic_start.device
    env: EnvBase = make_env(task, episodes, engine="gymnasium", device=device, seed=seed, **(task_options or {}))
    if actor.warm_start:
        env = TransformedEnv(env, get_env_transforms_from_module(actor))
    try:
        return evaluate_in(actor, env, gamma=gamma, reward_scale=reward_scale)
    finally:
        env.close()


def load_policy(path: str | Path, device: torch.device, best: bool = False) -> tuple[TrainConfig, LangevinActor]:
    """The policy of a run or of one of its checkpoints, without its replay buffer or optimizer.

    Args:
        path: a run directory (its newest checkpoint is taken) or a checkpoint directory.
        device: where the critics go.
        best: of a run directory, take the policy of the best evaluation instead.

    Returns:
        The run's configuration, and the actor with ``diagnostics=True``.

    Raises:
        FileNotFoundError: if there is no checkpoint.
        CheckpointError: if it is damaged or unsafe.
    """
    path = find_checkpoint(Path(path), best)
    config = load_config(read_config(path))
    env = make_env(config.env.task, 1, engine="gymnasium", device=device, seed=config.seed, **config.env.task_options)
    loss = make_loss(config, make_actor(config, env, device))
    load_checkpoint(Checkpoint(loss=loss), path, task=config.env.task, device=device)
    actor = make_actor(config, env, device, loss, diagnostics=True)
    env.close()
    return config, actor


@torch.no_grad()
def evaluate_in(actor: LangevinActor, env: EnvBase, *, gamma: float, reward_scale: float) -> Evaluation:
    """Plays one episode in each environment of ``env``: see :func:`evaluate`."""
    with set_exploration_type(ExplorationType.DETERMINISTIC):
        tensordict = env.reset()
        num_envs = env.batch_size.numel()
        kwargs = {"dtype": torch.float64, "device": tensordict.device}
        returns, discounted = torch.zeros(num_envs, **kwargs), torch.zeros(num_envs, **kwargs)
        lengths = torch.zeros(num_envs, dtype=torch.int64, device=tensordict.device)
        active = torch.ones(num_envs, dtype=torch.bool, device=tensordict.device)
        estimated_q: Tensor | None = None
        discount = 1.0
        while active.any():
            tensordict = actor(tensordict)
            if estimated_q is None:
                estimated_q = tensordict["q_after"].flatten().double()
            transition, tensordict = env.step_and_maybe_reset(tensordict)
            reward = transition["next", "reward"].flatten().double() * active
            returns += reward
            discounted += discount * reward_scale * reward
            lengths += active
            discount *= gamma
            terminated = transition["next", "terminated"].flatten()
            done = transition["next", "done"].flatten()
            truncated = active & done & ~terminated
            if truncated.any():
                discounted += discount * truncated * _value(actor, transition["next"])
            active &= ~done
    assert estimated_q is not None
    return Evaluation(
        returns=returns.tolist(),
        lengths=lengths.tolist(),
        estimated_q=float(estimated_q.mean()),
        discounted_return=float(discounted.mean()),
    )


def _value(actor: LangevinActor, tensordict: TensorDictBase) -> Tensor:
    """The critic's value of the action that the actor would take, shape [num_envs]."""
    return actor(tensordict.select("observation"))["q_after"].flatten().double()
