"""Trained agents as directories that can be published: safetensors weights, a JSON configuration, a model card.

::

    model.safetensors   the critics' parameters, stacked over the ensemble, and the inverse temperature w
    config.json         observation size, action bounds and the run's whole configuration
    README.md           the model card: what it is, what it scored, how to use it

Nothing in them is executed when they are read.
"""

from __future__ import annotations

import importlib
import json
import os
import re
import shutil
from dataclasses import asdict, replace
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from tensordict import TensorDictBase
from tensordict.nn import TensorDictModuleBase
from tensordict.utils import NestedKey
from torch import Tensor
from torchrl.data import Bounded, Composite
from torchrl.envs.utils import ExplorationType, set_exploration_type

from nclql_torchrl.actor import LangevinActor
from nclql_torchrl.execution import Execution
from nclql_torchrl.program import compile_programs
from nclql_torchrl.training.components import make_actor_for
from nclql_torchrl.training.config import TrainConfig, check_override_keys, load_config, validate
from nclql_torchrl.training.evaluation import load_policy

FORMAT = 1
"""Of the directory; a reader refuses a later one."""

WEIGHTS, CONFIG, CARD = "model.safetensors", "config.json", "README.md"


class PretrainedError(ValueError):
    """A directory that is no exported agent, or a damaged one."""


class NCLQLAgent(TensorDictModuleBase):
    """A trained agent: the Langevin actor of a run, with the configuration that it was trained with.

    It is a TensorDict policy with the keys of :class:`~nclql_torchrl.LangevinActor`, and :meth:`act` takes tensors.

    Args:
        config: of the run.
        observation_dim: size of the observation.
        action_low: lowest action, shape [action_dim].
        action_high: highest action, shape [action_dim].
        device: where the critics live.
        execution: how chains run, which is a matter of this machine and not of the one that trained it: see
            :mod:`nclql_torchrl.execution`.

    Examples:
        >>> import tempfile
        >>> from nclql_torchrl.training import TrainConfig
        >>> agent = NCLQLAgent(TrainConfig(), 3, torch.tensor([-2.0]), torch.tensor([2.0]))
        >>> with tempfile.TemporaryDirectory() as parent:
        ...     path = agent.save_pretrained(f"{parent}/agent", card="# An untrained agent")
        ...     same = NCLQLAgent.from_pretrained(path, num_particles=4)
        >>> observation = torch.randn(5, 3)
        >>> bool((same.act(observation) == agent.act(observation)).all())
        True
    """

    actor: LangevinActor
    """Acts; its ``qvalue_network_params`` are the weights."""

    config: TrainConfig
    """Of the run that trained it."""

    def __init__(
        self,
        config: TrainConfig,
        observation_dim: int,
        action_low: Tensor,
        action_high: Tensor,
        device: torch.device | str = "cpu",
        execution: Execution = "eager",
    ) -> None:
        super().__init__()
        self.config = config
        self.observation_dim = observation_dim
        spec = Bounded(action_low, action_high, action_low.shape, dtype=torch.float32)
        here = replace(config, sampler=replace(config.sampler, execution=execution))
        self.actor = make_actor_for(here, observation_dim, spec, torch.device(device))
        self.in_keys: list[NestedKey] = self.actor.in_keys
        self.out_keys: list[NestedKey] = self.actor.out_keys

    @property
    def spec(self) -> Composite:
        """Spec of what the agent writes."""
        return self.actor.spec

    def forward(self, *args: Any, **kwargs: Any) -> TensorDictBase | Tensor:
        """Writes the action into a tensordict, or returns it: see :meth:`LangevinActor.forward`."""
        return self.actor(*args, **kwargs)

    @torch.no_grad()
    def act(self, observation: Tensor, *, deterministic: bool = True) -> Tensor:
        """Actions in the environment's units.

        Args:
            observation: shape [*batch, observation_dim].
            deterministic: without exploration noise: the same observation always gives the same action.

        Returns:
            Shape [*batch, action_dim].

        Raises:
            ValueError: for an observation of another size.
        """
        if observation.shape[-1:] != (self.observation_dim,):
            raise ValueError(
                f"The observation has shape {tuple(observation.shape)}; expected [*batch, {self.observation_dim}]."
            )
        kind = ExplorationType.DETERMINISTIC if deterministic else ExplorationType.RANDOM
        with set_exploration_type(kind):
            outputs = self.actor(observation=observation)
        return outputs if isinstance(outputs, Tensor) else outputs[0]

    @classmethod
    def from_run(cls, path: str | Path, *, device: torch.device | str = "cpu") -> NCLQLAgent:
        """The agent of a run directory (its newest checkpoint) or of a checkpoint.

        Raises:
            FileNotFoundError: if there is no checkpoint.
            CheckpointError: if it is damaged or unsafe.
        """
        config, trained = load_policy(path, torch.device(device))
        spec = trained.spec["action"]
        assert isinstance(spec, Bounded)
        network: Any = trained.qvalue_network
        agent = cls(config, network.module.observation_dim, spec.low, spec.high, device)
        agent._load_weights(_weights(trained), f"The checkpoint of {path}")
        return agent

    @classmethod
    def from_pretrained(
        cls,
        path_or_hub_id: str | Path,
        *,
        device: torch.device | str = "cpu",
        execution: Execution = "eager",
        **sampler: Any,
    ) -> NCLQLAgent:
        """Loads an exported agent.

        Args:
            path_or_hub_id: a directory written by ``nclql-export`` or :meth:`save_pretrained`, or ``owner/name`` on the
                Hugging Face Hub (needs ``huggingface_hub``, in the extra ``export``), optionally with ``@revision``.
            device: where the critics go.
            execution: how chains run here.
            sampler: options of :class:`~nclql_torchrl.training.config.SamplerConfig` other than the run's, such as
                ``deterministic_num_particles=8``.

        Raises:
            FileNotFoundError: if it is neither a directory nor an id of the Hub.
            PretrainedError: if the directory is not an exported agent, is damaged, or is of a later format.
            ConfigError: for a sampler option that does not exist or cannot work.
        """
        directory = _directory(path_or_hub_id)
        content = _read_config(directory / CONFIG)
        config = load_config(content["training"])
        check_override_keys([f"sampler.{name}=" for name in sampler])
        config = replace(config, sampler=replace(config.sampler, **sampler))
        validate(config)
        low, high = (torch.tensor(content[name], dtype=torch.float32) for name in ("action_low", "action_high"))
        agent = cls(config, content["observation_dim"], low, high, device, execution)
        try:
            weights = load_file(directory / WEIGHTS, device=str(device))
        except (OSError, SafetensorError) as error:
            raise PretrainedError(
                f"{directory / WEIGHTS} cannot be read ({error}); it is damaged or missing."
            ) from error
        agent._load_weights(weights, str(directory / WEIGHTS), keep_w="w" in sampler)
        return agent

    def save_pretrained(self, directory: str | Path, *, card: str, program_states: int | None = None) -> Path:
        """Writes weights, configuration and model card.

        Args:
            directory: a new directory.
            card: content of README.md, such as :func:`~nclql_torchrl.model_card.model_card` makes it.
            program_states: also compile the policy, for so many observations at a time: :mod:`nclql_torchrl.program`.

        Returns:
            The directory.

        Raises:
            FileExistsError: if there is something at that path already.
            ProgramError: if a compiled program does not act as the agent does; then nothing is written.
        """
        directory = Path(directory)
        if directory.exists():
            raise FileExistsError(f"{directory} exists; expected the path of a new directory.")
        # Under a temporary name first: a directory with its final name is whole.
        temporary = directory.with_name(f".{directory.name}.tmp")
        shutil.rmtree(temporary, ignore_errors=True)
        temporary.mkdir(parents=True)
        save_file(_weights(self.actor), temporary / WEIGHTS)
        spec: Any = self.spec["action"]
        content = {
            "format": FORMAT,
            "versions": {name: version(name) for name in ("nclql-torchrl", "torch", "torchrl")},
            "observation_dim": self.observation_dim,
            "action_low": spec.low.tolist(),
            "action_high": spec.high.tolist(),
            # Paths of the machine that trained it are nobody else's business.
            "training": asdict(replace(self.config, run_dir=None, resume=None)),
        }
        (temporary / CONFIG).write_text(json.dumps(content, indent=2) + "\n")
        (temporary / CARD).write_text(card)
        if program_states is not None:
            compile_programs(self.actor, temporary, program_states)
        os.replace(temporary, directory)
        return directory

    def _load_weights(self, weights: dict[str, Tensor], source: str, *, keep_w: bool = False) -> None:
        """Copies them in place, so that whoever holds the actor's parameters sees them."""
        own = {name: tensor for name, tensor in _live_weights(self.actor).items() if name != "w" or not keep_w}
        for name, tensor in own.items():
            if name not in weights or weights[name].shape != tensor.shape:
                found = f"shape {tuple(weights[name].shape)}" if name in weights else "nothing"
                raise PretrainedError(f"{source} has {found} for {name}; expected shape {tuple(tensor.shape)}.")
        with torch.no_grad():
            for name, tensor in own.items():
                tensor.copy_(weights[name])


def _live_weights(actor: LangevinActor) -> dict[str, Tensor]:
    """Name -> the actor's own tensor."""
    parameters = actor.qvalue_network_params["module"].flatten_keys(".")
    return {**{str(name): tensor for name, tensor in parameters.items()}, "w": actor.sampler.w}


def _weights(actor: LangevinActor) -> dict[str, Tensor]:
    """Name -> a contiguous copy on the CPU."""
    return {name: tensor.detach().cpu().clone().contiguous() for name, tensor in _live_weights(actor).items()}


def _read_config(path: Path) -> dict[str, Any]:
    try:
        content = json.loads(path.read_text())
    except (OSError, ValueError) as error:
        raise PretrainedError(
            f"{path} cannot be read ({error}); expected a directory written by nclql-export."
        ) from error
    names = {"format", "observation_dim", "action_low", "action_high", "training"}
    if not isinstance(content, dict) or not names <= set(content):
        raise PretrainedError(
            f"{path} is not the configuration of an exported agent; expected {', '.join(sorted(names))}."
        )
    if content["format"] > FORMAT:
        raise PretrainedError(f"{path} has format {content['format']}; this version reads up to {FORMAT}.")
    return content


def _directory(path_or_hub_id: str | Path) -> Path:
    """A local directory, or what the Hub has, downloaded into its cache."""
    path = Path(path_or_hub_id)
    if path.is_dir():
        return path
    match = re.fullmatch(r"([\w.-]+/[\w.-]+)(?:@([\w./-]+))?", str(path_or_hub_id))
    if path.exists() or match is None:
        raise FileNotFoundError(
            f"{path_or_hub_id} is not a directory; expected one written by nclql-export, or owner/name on the Hub."
        )
    try:
        hub: Any = importlib.import_module("huggingface_hub")
    except ModuleNotFoundError:
        raise FileNotFoundError(
            f"{path_or_hub_id} is not a directory here, and reading it from the Hub needs huggingface_hub: "
            "pip install nclql-torchrl[export]."
        ) from None
    repository, revision = match.groups()
    return Path(hub.snapshot_download(repository, revision=revision, allow_patterns=[WEIGHTS, CONFIG, CARD]))
