"""``nclql-export``: writes a trained agent as a directory that can be published, and on request as native code."""

from __future__ import annotations

import sys
from dataclasses import dataclass
from pathlib import Path

import hydra
from hydra.core.config_store import ConfigStore
from omegaconf import MISSING, DictConfig, OmegaConf
from torchrl.checkpoint import CheckpointError

from nclql_torchrl.training.checkpoint import BEST_METRIC, find_checkpoint, read_metadata
from nclql_torchrl.training.components import make_device
from nclql_torchrl.training.config import ConfigError, check_override_keys
from nclql_torchrl.training.run_directory import RunDirectory


@dataclass
class ExportConfig:
    """Options of nclql-export."""

    checkpoint: str = MISSING
    """A run directory (its newest checkpoint is taken) or a checkpoint directory."""
    best: bool = False
    """Of a run directory, take the policy of the best evaluation instead."""
    output: str | None = None
    """The directory to write, which must not exist; null: exported-<transitions> in the run directory."""
    program: bool = False
    """Also compile the policy ahead of time for this machine: deterministic.pt2 and sampling.pt2."""
    states: int = 1
    """With program=true: observations that one call acts on."""
    device: str = "auto"
    """With program=true: what the programs run on; auto (a GPU when there is one), cpu, cuda or cuda:<index>."""


ConfigStore.instance().store(name="export_schema", node=ExportConfig)


def main() -> None:
    """Entry point of ``nclql-export``."""
    try:
        check_override_keys(sys.argv[1:], ExportConfig)
    except ConfigError as error:
        sys.exit(f"nclql-export: {error}")
    _hydra_main()


@hydra.main(version_base="1.3", config_path="pkg://nclql_torchrl.conf", config_name="export")
def _hydra_main(composed: DictConfig) -> None:
    try:
        _export(composed)
    except ModuleNotFoundError as error:
        if error.name != "safetensors":
            raise
        sys.exit("nclql-export: safetensors is not installed; pip install nclql-torchrl[export].")
    except (ValueError, OSError, CheckpointError, RuntimeError) as error:
        sys.exit(f"nclql-export: {error}")


def _export(composed: DictConfig) -> None:
    # Here, because they need safetensors, an extra.
    from nclql_torchrl.model_card import measured_score, model_card
    from nclql_torchrl.pretrained import NCLQLAgent
    from nclql_torchrl.program import DETERMINISTIC, SAMPLING

    if OmegaConf.is_missing(composed, "checkpoint"):
        raise ConfigError("checkpoint is not set; expected checkpoint=<run directory or checkpoint directory>.")
    options = OmegaConf.to_object(composed)
    assert isinstance(options, ExportConfig)
    if options.states < 1:
        raise ConfigError(f"states is {options.states}; expected at least 1.")
    checkpoint = find_checkpoint(Path(options.checkpoint), options.best)
    agent = NCLQLAgent.from_run(checkpoint, device=make_device(options.device))
    run, metadata = RunDirectory.containing(checkpoint), read_metadata(checkpoint)
    frames = metadata["frames"]
    score = measured_score(run, frames)
    card = model_card(
        agent.config,
        frames=frames,
        score=score,
        best=BEST_METRIC in metadata,
        programs=[DETERMINISTIC, SAMPLING] if options.program else None,
    )
    output = run.path / f"exported-{frames}" if options.output is None else Path(options.output)
    agent.save_pretrained(output, card=card, program_states=options.states if options.program else None)
    measured = "not evaluated by the run" if score is None else f"return {score['return_mean']:.1f} in the run"
    print(f"{output}: {agent.config.env.task} after {frames} transitions, {measured}")


if __name__ == "__main__":
    main()
