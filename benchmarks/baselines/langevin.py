"""NC-LQL and LQL (arXiv 2602.07873): this project's own loss, actor and update, from its own configuration."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from omegaconf import OmegaConf
from tensordict import TensorDictBase

from benchmarks.baselines.algorithm import Algorithm, Problem
from nclql_torchrl.critic import NoiseConditionedQNetwork
from nclql_torchrl.loss import NCLQLLoss
from nclql_torchrl.training.components import (
    make_actor_for,
    make_loss,
    make_n_step,
    make_normalizer,
    make_temperature,
    make_update,
)
from nclql_torchrl.training.config import TrainConfig, load_config, validate
from nclql_torchrl.training.training import TEMPERATURE_INTERVAL


def make_langevin(problem: Problem, **options: Any) -> Algorithm:
    """NC-LQL with the authors' settings except for ``options``; LQL with ``{"sampler.num_levels": 1}``.

    Args:
        problem: sizes, bounds and discount.
        **options: of the package's configuration, by dotted names or sections: ``{"optim.lr": 3e-4}``,
            ``optim={"lr": 3e-4}``.

    Raises:
        ConfigError: for an option that does not exist or cannot work.
    """
    return make_variant(problem, options)


def make_variant(
    problem: Problem,
    options: dict[str, Any],
    network_class: Callable[..., NoiseConditionedQNetwork] = NoiseConditionedQNetwork,
    loss_class: Callable[..., NCLQLLoss] = NCLQLLoss,
) -> Algorithm:
    """:func:`make_langevin` with critics or a loss of one's own, which are called like the package's."""
    config = make_config(problem, options)
    device = torch.device("cpu")
    sizes = problem.observation_dim, problem.action_spec
    actor = make_actor_for(config, *sizes, device, network_class=network_class)
    loss = make_loss(config, actor, loss_class)
    langevin_update = make_update(config, loss)
    temperature = make_temperature(config, actor)
    n_step, normalizer = make_n_step(config, loss), make_normalizer(config, loss)
    num_updates = 0

    def prepare(batch: TensorDictBase) -> TensorDictBase:
        if normalizer is not None:
            normalizer.update(batch["observation"])
        return batch.select(*loss.in_keys).reshape(-1) if n_step is None else n_step(batch)

    def update(batch: TensorDictBase) -> TensorDictBase:
        nonlocal num_updates
        metrics = langevin_update(batch)
        num_updates += 1
        if temperature is not None and num_updates % TEMPERATURE_INTERVAL == 0:
            temperature.step(batch)
        return metrics

    evaluator = make_actor_for(config, *sizes, device, loss, diagnostics=True)
    return Algorithm(actor, loss, update, evaluator, config.optim.reward_scale, prepare)


def make_config(problem: Problem, options: dict[str, Any]) -> TrainConfig:
    """The package's configuration for a problem; an option wins over what the problem says."""
    shared = {
        "network.hidden_sizes": list(problem.hidden_sizes),
        "optim.gamma": problem.gamma,
        "optim.target_update_polyak": 1.0 - problem.tau,
    }
    values = OmegaConf.create({"sampler": {"execution": "compile"}})
    for name, value in (shared | options).items():
        OmegaConf.update(values, name, value)
    content = OmegaConf.to_container(values)
    assert isinstance(content, dict)
    config = load_config({str(name): value for name, value in content.items()})
    validate(config)
    return config
