"""``nclql-profile``: what the sampler's steps cost and what they buy, over a grid of settings."""

from __future__ import annotations

import sys

import hydra
from hydra.core.config_store import ConfigStore
from hydra.core.hydra_config import HydraConfig
from hydra.types import RunMode
from omegaconf import DictConfig, OmegaConf
from torchrl.checkpoint import CheckpointError

from nclql_torchrl.profiling import ProfileConfig, profile, report
from nclql_torchrl.profiling.config import GRID
from nclql_torchrl.training.config import ConfigError, check_override_keys

ConfigStore.instance().store(name="profile_schema", node=ProfileConfig)


def main() -> None:
    """Entry point of ``nclql-profile``."""
    multirun = any(argument in ("-m", "--multirun") for argument in sys.argv[1:])
    sys.argv[1:] = [as_list(as_override(argument), multirun) for argument in sys.argv[1:]]
    try:
        check_override_keys(sys.argv[1:], ProfileConfig)
    except ConfigError as error:
        sys.exit(f"nclql-profile: {error}")
    # Hydra writes its multirun.yaml into a directory of its own unless told otherwise.
    directories = [argument for argument in sys.argv[1:] if argument.startswith("run_dir=")]
    sys.argv += [f"hydra.sweep.dir={directory.removeprefix('run_dir=')}" for directory in directories]
    _hydra_main()


def as_override(argument: str) -> str:
    """``--trace`` and ``--trace=FILE`` -> ``trace=true`` and ``trace=FILE``.

    Examples:
        >>> as_override("--trace"), as_override("--trace=t.json"), as_override("levels=3")
        ('trace=true', 'trace=t.json', 'levels=3')
    """
    if argument == "--trace":
        return "trace=true"
    return argument.removeprefix("--") if argument.startswith("--trace=") else argument


def as_list(argument: str, multirun: bool) -> str:
    """``states=1,256`` -> ``states=[1,256]``, or with ``-m``, where every value is a job, ``states=[1],[256]``.

    Examples:
        >>> as_list("states=1,256", multirun=False), as_list("states=1,256", multirun=True), as_list("seed=1", False)
        ('states=[1,256]', 'states=[1],[256]', 'seed=1')
    """
    name, _, value = argument.partition("=")
    if name not in GRID or not value or "[" in value:
        return argument
    values = value.split(",") if multirun else [value]
    return f"{name}={','.join(f'[{each}]' for each in values)}"


@hydra.main(version_base="1.3", config_path="pkg://nclql_torchrl.conf", config_name="profile")
def _hydra_main(composed: DictConfig) -> None:
    try:
        config = OmegaConf.to_object(composed)
        assert isinstance(config, ProfileConfig)
        job = HydraConfig.get()
        if job.mode == RunMode.MULTIRUN and config.run_dir is None:
            config.run_dir = job.sweep.dir
        result = profile(config)
    except (ValueError, OSError, CheckpointError) as error:
        sys.exit(f"nclql-profile: {error}")
    print(report.table(result["rows"], result["skipped"]))
    for name in ("profile.json", "profile.csv", "profile.png"):
        print(f"{result['run_dir']}/{name}")
    if result["trace"]:
        print(result["trace"])


if __name__ == "__main__":
    main()
