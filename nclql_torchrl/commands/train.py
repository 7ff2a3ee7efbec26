"""``nclql-train``: trains NC-LQL, or continues a run with ``resume=RUN_DIR``."""

from __future__ import annotations

import logging
import sys
from pathlib import Path

import hydra
from hydra.core.config_store import ConfigStore
from hydra.core.hydra_config import HydraConfig
from hydra.types import RunMode
from omegaconf import DictConfig, OmegaConf
from torchrl.checkpoint import CheckpointError

from nclql_torchrl.training import Interrupted, RunDirectory, TrainConfig, TrainingError, train
from nclql_torchrl.training.config import OPEN_NAMES, RESUMABLE_KEYS, ConfigError, check_override_keys, load_config
from nclql_torchrl.training.distributed import is_rank_zero

ConfigStore.instance().store(name="schema", node=TrainConfig)


def main() -> None:
    """Entry point of ``nclql-train``."""
    try:
        check_override_keys(sys.argv[1:])
    except ConfigError as error:
        sys.exit(f"nclql-train: {error}")
    # Hydra would ask for the prefix itself where a name is not in the schema.
    sys.argv[1:] = [f"++{argument}" if argument.startswith(OPEN_NAMES) else argument for argument in sys.argv[1:]]
    # TorchRL reports every buffer that it allocates; the progress bar is what a user wants to see.
    logging.getLogger("torchrl").setLevel(logging.WARNING)
    _hydra_main()


@hydra.main(version_base="1.3", config_path="pkg://nclql_torchrl.conf", config_name="train")
def _hydra_main(composed: DictConfig) -> None:
    try:
        summary = train(_configure(composed))
    except Interrupted as interruption:
        if is_rank_zero():
            print(interruption, file=sys.stderr)
        sys.exit(interruption.exit_status)
    except (ValueError, OSError, CheckpointError, TrainingError) as error:
        # What the user can act on is one sentence; anything else keeps its traceback.
        sys.exit(f"nclql-train: {error}")
    if not is_rank_zero():
        return
    run = RunDirectory.open(summary["run_dir"])
    print(
        f"{summary['task']}: return {summary['return_mean']:.1f} ± {summary['return_std']:.1f} over "
        f"{summary['episodes']} episodes after {summary['frames']} frames and {summary['updates']} updates "
        f"in {summary['seconds']:.0f} s\n"
        f"summary:        {run.summary}\n"
        f"learning curve: {run.learning_curve}\n"
        f"run directory:  {run.path}"
    )


def _configure(composed: DictConfig) -> TrainConfig:
    """The configuration of the run: as composed, or, with ``resume``, that of the run with the changes allowed."""
    config = OmegaConf.to_object(composed)
    assert isinstance(config, TrainConfig)
    job = HydraConfig.get()
    if config.resume is not None:
        run = RunDirectory.open(config.resume)
        overrides = [override for override in job.overrides.task if not override.startswith("resume=")]
        for override in overrides:
            if not override.startswith(RESUMABLE_KEYS):
                raise ConfigError(
                    f"{override} cannot change when a run is resumed; expected only {', '.join(RESUMABLE_KEYS)} "
                    "beside resume."
                )
        resumed = load_config(str(run.config), overrides)
        resumed.resume = config.resume
        return resumed
    if job.mode == RunMode.MULTIRUN:
        parent = Path(job.sweep.dir if config.run_dir is None else config.run_dir)
        config.run_dir = str(parent / str(job.job.num))
    return config


if __name__ == "__main__":
    main()
