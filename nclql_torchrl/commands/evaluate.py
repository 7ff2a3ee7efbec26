"""``nclql-evaluate``: evaluates a run or a checkpoint, and films it."""

from __future__ import annotations

import sys
from dataclasses import dataclass

import hydra
from hydra.core.config_store import ConfigStore
from omegaconf import MISSING, DictConfig, OmegaConf
from torchrl.checkpoint import CheckpointError

from nclql_torchrl.training import evaluate
from nclql_torchrl.training.components import make_device
from nclql_torchrl.training.config import ConfigError, check_override_keys
from nclql_torchrl.training.evaluation import SEED_OFFSET, load_policy
from nclql_torchrl.training.run_directory import RunDirectory
from nclql_torchrl.training.video import VideoError, record_episode


@dataclass
class EvaluateConfig:
    """Options of nclql-evaluate."""

    checkpoint: str = MISSING
    """A run directory (its newest checkpoint is taken) or a checkpoint directory."""
    best: bool = False
    """Of a run directory, take the policy of the best evaluation instead."""
    episodes: int = 10
    seed: int | None = None
    """Of the environments; null: the seeds on which the run itself was evaluated."""
    video: bool = False
    """Also write one episode as video.mp4 into the run directory."""
    device: str = "auto"


ConfigStore.instance().store(name="evaluate_schema", node=EvaluateConfig)


def main() -> None:
    """Entry point of ``nclql-evaluate``."""
    try:
        check_override_keys(sys.argv[1:], EvaluateConfig)
    except ConfigError as error:
        sys.exit(f"nclql-evaluate: {error}")
    _hydra_main()


@hydra.main(version_base="1.3", config_path="pkg://nclql_torchrl.conf", config_name="evaluate")
def _hydra_main(composed: DictConfig) -> None:
    try:
        _evaluate(composed)
    except (ValueError, OSError, CheckpointError, VideoError) as error:
        sys.exit(f"nclql-evaluate: {error}")


def _evaluate(composed: DictConfig) -> None:
    if OmegaConf.is_missing(composed, "checkpoint"):
        raise ConfigError("checkpoint is not set; expected checkpoint=<run directory or checkpoint directory>.")
    options = OmegaConf.to_object(composed)
    assert isinstance(options, EvaluateConfig)
    if options.episodes < 1:
        raise ConfigError(f"episodes is {options.episodes}; expected at least 1.")
    config, actor = load_policy(options.checkpoint, make_device(options.device), best=options.best)
    task, seed = config.env.task, config.seed + SEED_OFFSET if options.seed is None else options.seed
    result = evaluate(
        actor,
        task,
        episodes=options.episodes,
        seed=seed,
        gamma=config.optim.gamma,
        reward_scale=config.optim.reward_scale,
        task_options=config.env.task_options,
    )
    print(
        f"{task}: return {result.mean:.1f} ± {result.std:.1f} over {options.episodes} episodes, mean length "
        f"{result.mean_length:.0f}; estimated Q {result.estimated_q:.2f}, discounted return obtained "
        f"{result.discounted_return:.2f}, overestimation {result.overestimation:.2f}"
    )
    if options.video:
        path = RunDirectory.containing(options.checkpoint).path / "video.mp4"
        record_episode(actor, task, path, seed, config.env.task_options)
        print(f"video: {path}")


if __name__ == "__main__":
    main()
