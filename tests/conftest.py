"""Shared fixtures."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from tensordict import TensorDict
from torchrl.data import Bounded
from torchrl.modules import ValueOperator

from nclql_torchrl import LangevinActor, NoiseConditionedQNetwork
from nclql_torchrl.training import TrainConfig
from nclql_torchrl.training.config import load_config

TINY = (
    "env.task=Pendulum-v1",
    "env.engine=gymnasium",
    "env.num_envs=2",
    "collector.total_frames=240",
    "collector.init_random_frames=40",
    "replay_buffer.size=160",
    "optim.batch_size=8",
    "optim.lr=1e-3",
    "optim.utd_ratio=0.3",
    "network.hidden_sizes=[8,8]",
    "sampler.num_levels=3",
    "sampler.sigma_max=0.02",
    "sampler.sigma_min=0.01",
    "logger.backend=none",
    "logger.log_interval=50",
    "logger.eval_interval=100",
    "logger.eval_episodes=2",
    "checkpoint.interval=90",
    "device=cpu",
)
"""A run of a second that passes through everything: warm-up, a full replay buffer, rows, evaluations, checkpoints."""


@pytest.fixture(autouse=True)
def seeded() -> None:
    """The same random numbers in every run of a test."""
    torch.manual_seed(0)


@pytest.fixture
def tiny_config(tmp_path: Path) -> Callable[..., TrainConfig]:
    """Makes a tiny Pendulum run in ``tmp_path/run``; arguments are further ``name=value`` overrides."""

    def make(*overrides: str) -> TrainConfig:
        return load_config({}, [*TINY, f"run_dir={tmp_path / 'run'}", *overrides])

    return make


@pytest.fixture
def make_actor() -> Callable[..., LangevinActor]:
    """Makes a small actor over observations of size 4 and actions of size 2 in [-2, 2]; options are the actor's."""

    def make(num_critics: int = 2, **options: Any) -> LangevinActor:
        def critic() -> ValueOperator:
            network = NoiseConditionedQNetwork(4, 2, (16, 16), action_low=-2.0, action_high=2.0)
            return ValueOperator(network, in_keys=["observation", "action", "level"])

        options.setdefault("spec", Bounded(-2.0, 2.0, torch.Size([2])))
        return LangevinActor([critic() for _ in range(num_critics)], **options)

    return make


@pytest.fixture
def make_batch() -> Callable[..., TensorDict]:
    """Makes transitions that fit ``make_actor``, of any batch shape."""

    def make(*shape: int) -> TensorDict:
        shape = shape or (12,)
        terminated = torch.zeros(*shape, 1, dtype=torch.bool)
        terminated.view(-1)[::4] = True
        following = {
            "observation": torch.randn(*shape, 4),
            "reward": torch.randn(*shape, 1),
            "terminated": terminated,
            "done": terminated.clone(),
        }
        return TensorDict(
            {"observation": torch.randn(*shape, 4), "action": torch.rand(*shape, 2) * 4 - 2, "next": following}, shape
        )

    return make
