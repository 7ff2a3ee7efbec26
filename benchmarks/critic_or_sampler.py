"""A Langevin policy fails: is it the critic, or the sampler that does not find the critic's best action?

``python -m benchmarks.critic_or_sampler`` takes the options of ``benchmarks.learning``, trains one run of a task with
actions of one or two dimensions, and lets that same critic act in several ways: by its own chain, by other chains, and
by the best of a fine grid of actions, which is what a perfect greedy sampler would do. It appends a JSON line to
``benchmarks/results/critic_or_sampler/critic_or_sampler.jsonl``.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import hydra
import torch
from omegaconf import DictConfig, OmegaConf
from tensordict import TensorDictBase
from tensordict.nn import TensorDictModuleBase
from torch import Tensor

from benchmarks.baselines.algorithm import VALUE_KEY, Algorithm, Problem
from benchmarks.baselines.langevin import make_config
from benchmarks.learning import LearningConfig, append_record, evaluate, make_problem, run
from envs import make_env
from nclql_torchrl import NCLQLLoss
from nclql_torchrl.training.components import make_actor_for

RESULTS = Path(__file__).parent / "results" / "critic_or_sampler"
GRID_SIDES = {1: 401, 2: 41}
"""Grid actions per dimension, for actions of that many dimensions."""
CHAINS: dict[str, dict[str, Any]] = {
    "its own chain": {},
    "8 particles": {"deterministic_num_particles": 8},
    "1 step per level, sigma_max 0.004": {"steps_per_level": 1, "sigma_max": 0.004},
    "5 steps per level": {"steps_per_level": 5},
    "3 steps per level, sigma_max 0.03": {"steps_per_level": 3, "sigma_max": 0.03},
    "9 steps per level, sigma_max 0.3": {"steps_per_level": 9, "sigma_max": 0.3},
    "gradient of the lowest critic": {"ensemble_reduction": "min"},
    "w 50": {"w": 50.0},
    "w 5000": {"w": 5000.0},
    "gradient as it is, w 5": {"normalize_gradient": False, "w": 5.0},
    "gradient as it is, w 50": {"normalize_gradient": False, "w": 50.0},
    "gradient as it is, w 500": {"normalize_gradient": False, "w": 500.0},
}
"""What is changed of its own chain. The number of levels is not, since the critic knows a level by its number; every
chain can mix with five levels from 0.01 and with ten from 0.1."""


class GridActor(TensorDictModuleBase):
    """The best of evenly spaced actions by the lowest noise-free critic.

    Args:
        loss: whose critics.
        problem: of actions of one or two dimensions.

    Raises:
        ValueError: of more dimensions.
    """

    def __init__(self, loss: NCLQLLoss, problem: Problem) -> None:
        super().__init__()
        if problem.action_dim not in GRID_SIDES:
            raise ValueError(f"The task has actions of dimension {problem.action_dim}; a grid is for 1 or 2.")
        self.in_keys, self.out_keys = ["observation"], ["action", VALUE_KEY]
        self.__dict__["loss"] = loss
        low, high = problem.action_spec.low, problem.action_spec.high
        unit = torch.linspace(0, 1, GRID_SIDES[problem.action_dim])
        grid = torch.cartesian_prod(*[unit] * problem.action_dim).view(-1, problem.action_dim)
        self.actions = low + (high - low) * grid

    def values(self, tensordict: TensorDictBase) -> Tensor:
        """Lowest critic of every action, shape [grid, *batch]."""
        loss: NCLQLLoss = self.__dict__["loss"]
        inputs = tensordict.select("observation").expand(len(self.actions), *tensordict.batch_size)
        action = self.actions.view(len(self.actions), *(1,) * tensordict.batch_dims, -1).expand(*inputs.batch_size, -1)
        level = loss.noise_free_level(inputs, action.device)
        return loss.ensemble_values(inputs, action, level).amin(0)

    def forward(self, tensordict: TensorDictBase) -> TensorDictBase:
        """Writes the action and its value."""
        value, index = self.values(tensordict).max(0)
        tensordict.set("action", self.actions[index])
        return tensordict.set(VALUE_KEY, value.unsqueeze(-1))


def compare(config: LearningConfig) -> dict[str, Any]:
    """Trains once and evaluates every way to act.

    Returns:
        The run's curve, and an evaluation for each way of acting.
    """
    record, algorithm = run(config)
    loss = algorithm.loss
    assert isinstance(loss, NCLQLLoss)
    env = make_env(config.task.name, 1, engine="gymnasium", seed=config.seed)
    problem = make_problem(config.task, env)
    actors: dict[str, TensorDictModuleBase] = {"best of a grid": GridActor(loss, problem)}
    own = config.algorithm.options.get("sampler", {}) | {"execution": "eager", "w": loss.sampler.w.item()}
    for name, chain in CHAINS.items():
        settings = make_config(problem, config.algorithm.options | {"sampler": own | chain})
        actors[name] = make_actor_for(
            settings,
            problem.observation_dim,
            problem.action_spec,
            torch.device("cpu"),
            loss,
            diagnostics=True,
            share_sampler=False,
        )
    evaluations = {
        name: evaluate(config, Algorithm(algorithm.actor, loss, algorithm.update, actor, algorithm.reward_scale))
        for name, actor in actors.items()
    }
    return {name: record[name] for name in ("config", "curve", "machine")} | {"evaluations": evaluations}


@hydra.main(version_base="1.3", config_path="conf", config_name="learning")
def _hydra_main(composed: DictConfig) -> None:
    config = OmegaConf.to_object(composed)
    assert isinstance(config, LearningConfig)
    result = compare(config)
    append_record(RESULTS / "critic_or_sampler.jsonl", result)
    for name, evaluation in result["evaluations"].items():
        print(f"{name:34s} {evaluation['return_mean']:8.1f}  Q {evaluation['estimated_q']:.2f}", flush=True)


if __name__ == "__main__":
    torch.set_num_threads(1)
    _hydra_main()
