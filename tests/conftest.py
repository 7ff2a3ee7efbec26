"""Shared fixtures."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

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


@pytest.fixture
def tiny_config(tmp_path: Path) -> Callable[..., TrainConfig]:
    """Makes a tiny Pendulum run in ``tmp_path/run``; arguments are further ``name=value`` overrides."""

    def make(*overrides: str) -> TrainConfig:
        return load_config({}, [*TINY, f"run_dir={tmp_path / 'run'}", *overrides])

    return make
