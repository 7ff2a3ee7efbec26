"""NC-LQL and LQL (arXiv 2602.07873): this project's own loss, actor and update, from its own configuration."""

from __future__ import annotations

from typing import Any, cast

import torch
from omegaconf import OmegaConf
from tensordict import TensorDictBase
from torchrl.envs import EnvBase

from benchmarks.baselines.algorithm import Algorithm, Problem
from nclql_torchrl.training.components import make_actor, make_loss, make_temperature, make_update
from nclql_torchrl.training.config import TrainConfig, load_config, validate
from nclql_torchrl.training.training import TEMPERATURE_INTERVAL


def make_langevin(problem: Problem, **options: Any) -> Algorithm:
    """NC-LQL with the authors' settings except for ``options``; LQL with ``sampler={"num_levels": 1}``.

    Args:
        problem: sizes, bounds and discount.
        **options: sections of the package's configuration, ``optim={"lr": 3e-4}``.

    Raises:
        ConfigError: for an option that does not exist or cannot work.
    """
    config = make_config(problem, options)
    # make_actor reads two specs of its environment, and a problem has both.
    env = cast(EnvBase, problem)
    device = torch.device("cpu")
    actor = make_actor(config, env, device)
    loss = make_loss(config, actor)
    langevin_update = make_update(config, loss)
    temperature = make_temperature(config, actor)
    num_updates = 0

    def update(batch: TensorDictBase) -> TensorDictBase:
        nonlocal num_updates
        metrics = langevin_update(batch)
        num_updates += 1
        if temperature is not None and num_updates % TEMPERATURE_INTERVAL == 0:
            temperature.step(batch)
        return metrics

    evaluator = make_actor(config, env, device, loss, diagnostics=True)
    return Algorithm(actor, loss, update, evaluator, config.optim.reward_scale)


def make_config(problem: Problem, options: dict[str, Any]) -> TrainConfig:
    """The package's configuration for a problem."""
    shared = {
        "network": {"hidden_sizes": list(problem.hidden_sizes)},
        "optim": {"gamma": problem.gamma, "target_update_polyak": 1.0 - problem.tau},
    }
    values = OmegaConf.to_container(OmegaConf.merge({"sampler": {"execution": "compile"}}, options, shared))
    assert isinstance(values, dict)
    config = load_config({str(name): value for name, value in values.items()})
    validate(config)
    return config
