"""Training runs: configuration, loop, evaluation, run directory, checkpoints."""

from nclql_torchrl.training.config import ConfigError, TrainConfig, validate
from nclql_torchrl.training.evaluation import Evaluation, evaluate
from nclql_torchrl.training.interruption import Interrupted
from nclql_torchrl.training.run_directory import RunDirectory
from nclql_torchrl.training.training import TrainingError, train

__all__ = [
    "ConfigError",
    "Evaluation",
    "Interrupted",
    "RunDirectory",
    "TrainConfig",
    "TrainingError",
    "evaluate",
    "train",
    "validate",
]
