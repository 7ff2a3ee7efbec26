"""Evaluation on Gymnasium's own environment: returns, and how far the critic overestimates them."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from tensordict import TensorDictBase
from torch import Tensor
from torchrl.envs import EnvBase
from torchrl.envs.utils import ExplorationType, set_exploration_type

from nclql_torchrl.actor import LangevinActor

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


@torch.no_grad()
def evaluate(actor: LangevinActor, env: EnvBase, *, gamma: float, reward_scale: float) -> Evaluation:
    """Plays one episode in each environment, without exploration noise.

    Args:
        actor: with ``diagnostics=True``, whose ``q_after`` is the critic's estimate.
        env: batch size [num_envs]; every environment plays until its first done.
        gamma: discount per control step.
        reward_scale: the loss's factor on rewards.

    Returns:
        Statistics over ``num_envs`` episodes.
    """
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
