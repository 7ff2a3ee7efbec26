"""Promises of exported agents: the same actions, nothing executed when they are read, damage is named."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from tensordict import TensorDict
from torchrl.collectors import Collector

from envs import make_env
from nclql_torchrl.training import TrainConfig
from nclql_torchrl.training.config import ConfigError, NetworkConfig, SamplerConfig, load_config

pytest.importorskip("safetensors")

from safetensors import safe_open

from nclql_torchrl.pretrained import CARD, CONFIG, WEIGHTS, NCLQLAgent, PretrainedError

LOW, HIGH = torch.tensor([-2.0, 0.0]), torch.tensor([2.0, 0.5])


def make_agent(normalised: bool = False, **sampler: Any) -> NCLQLAgent:
    """An untrained agent with observations of size 3."""
    network = NetworkConfig(hidden_sizes=[8, 8], layer_norm=normalised, normalize_observation=normalised)
    config = TrainConfig(network=network, sampler=SamplerConfig(**sampler))
    config.run_dir = "/home/somebody/run"
    return NCLQLAgent(config, 3, LOW, HIGH)


@pytest.fixture
def directory(tmp_path: Path) -> Path:
    """An exported agent."""
    return make_agent().save_pretrained(tmp_path / "agent", card="# Card")


def test_what_is_loaded_acts_as_what_was_saved(tmp_path: Path) -> None:
    agent = make_agent(normalised=True, w="auto")
    for name in (("norms", "0", "weight"), "observation_mean"):
        agent.actor.qvalue_network_params["module"].get(name).data.fill_(0.5)
    agent.actor.sampler.w.fill_(37.5)  # as tuned in training
    loaded = NCLQLAgent.from_pretrained(agent.save_pretrained(tmp_path / "agent", card=""))
    assert float(loaded.actor.sampler.w) == 37.5
    assert loaded.spec == agent.spec
    observation = torch.randn(4, 5, 3)
    action = loaded.act(observation)
    assert action.shape == (4, 5, 2) and (action >= LOW).all() and (action <= HIGH).all()
    assert torch.equal(action, agent.act(observation)) and torch.equal(action, loaded.act(observation))
    torch.manual_seed(1)
    explored = agent.act(observation[0], deterministic=False)
    torch.manual_seed(1)
    tensordict = TensorDict({"observation": observation[0]}, [5])
    assert torch.equal(loaded(tensordict)["action"], explored) and not torch.equal(explored, action[0])


def test_is_a_policy_for_a_collector() -> None:
    config = TrainConfig(network=NetworkConfig([8]), sampler=SamplerConfig(w=5.0))
    agent = NCLQLAgent(config, 3, torch.tensor([-2.0]), torch.tensor([2.0]))
    env = make_env("Pendulum-v1", num_envs=2, seed=0)
    (batch,) = Collector(env, agent, frames_per_batch=6, total_frames=6, auto_register_policy_transforms=False)
    assert batch["action"].shape == (2, 3, 1) and batch["action"].unique().numel() == 6


def test_the_directory_holds_raw_tensors_and_text(directory: Path) -> None:
    assert {path.name for path in directory.iterdir()} == {WEIGHTS, CONFIG, CARD}
    with safe_open(directory / WEIGHTS, framework="pt") as file:
        assert {"w", "trunk.0.weight", "embed.1.bias"} <= set(file.keys())
        assert file.get_slice("trunk.0.weight").get_shape() == [2, 8, 3 + 2 + 16]
    training = json.loads((directory / CONFIG).read_text())["training"]
    assert training["run_dir"] is None and load_config(training).network.hidden_sizes == [8, 8]


def test_sampler_options_replace_those_of_the_run(directory: Path) -> None:
    agent = NCLQLAgent.from_pretrained(directory, w=20.0, deterministic_num_particles=3)
    assert float(agent.actor.sampler.w) == 20.0 and agent.actor.deterministic_start.shape == (3, 2)
    with pytest.raises(ConfigError, match=r"'sampler\.num_particle'; did you mean 'sampler\.num_particles'"):
        NCLQLAgent.from_pretrained(directory, num_particle=3)
    with pytest.raises(ConfigError, match=r"sampler\.num_particles is 0"):
        NCLQLAgent.from_pretrained(directory, num_particles=0)


def test_how_chains_run_is_chosen_where_they_run(tmp_path: Path) -> None:
    # Trained on a GPU, used on a machine without.
    directory = make_agent(execution="cudagraph").save_pretrained(tmp_path / "agent", card="")
    assert json.loads((directory / CONFIG).read_text())["training"]["sampler"]["execution"] == "cudagraph"
    assert NCLQLAgent.from_pretrained(directory).actor.sampler.execution == "eager"
    assert NCLQLAgent.from_pretrained(directory, execution="auto").actor.sampler.execution == "auto"


def test_a_directory_is_never_overwritten(directory: Path) -> None:
    with pytest.raises(FileExistsError, match="agent exists"):
        make_agent().save_pretrained(directory, card="")
    assert [path.name for path in directory.parent.iterdir()] == ["agent"]


def test_damage_is_named(directory: Path) -> None:
    weights, config = directory / WEIGHTS, directory / CONFIG
    whole, text = weights.read_bytes(), config.read_text()
    weights.write_bytes(whole[:-10])
    with pytest.raises(PretrainedError, match=r"model\.safetensors cannot be read"):
        NCLQLAgent.from_pretrained(directory)
    weights.write_bytes(whole)
    config.write_text(text.replace('"observation_dim": 3', '"observation_dim": 4'))
    with pytest.raises(PretrainedError, match=r"shape \(2, 8, 21\) for trunk\.0\.weight; expected shape \(2, 8, 22\)"):
        NCLQLAgent.from_pretrained(directory)
    config.write_text(text.replace('"format": 1', '"format": 9'))
    with pytest.raises(PretrainedError, match="format 9; this version reads up to 1"):
        NCLQLAgent.from_pretrained(directory)
    config.write_text("{}")
    with pytest.raises(PretrainedError, match="not the configuration of an exported agent"):
        NCLQLAgent.from_pretrained(directory)


@pytest.mark.parametrize("name", ["nowhere", "./no/where/else", "/owner/name"])
def test_what_is_neither_a_directory_nor_a_hub_id_is_refused(name: str) -> None:
    with pytest.raises(FileNotFoundError, match="expected one written by nclql-export, or owner/name on the Hub"):
        NCLQLAgent.from_pretrained(name)


def test_a_hub_id_is_downloaded_by_huggingface_hub(directory: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    hub = pytest.importorskip("huggingface_hub")
    asked = []

    def snapshot_download(repository: str, **options: Any) -> str:
        asked.append((repository, options["revision"], options["allow_patterns"]))
        return str(directory)

    monkeypatch.setattr(hub, "snapshot_download", snapshot_download)
    assert NCLQLAgent.from_pretrained("somebody/nclql-pendulum@v1").observation_dim == 3
    # No native code among what is fetched.
    assert asked == [("somebody/nclql-pendulum", "v1", [WEIGHTS, CONFIG, CARD])]


def test_an_observation_of_another_size_is_refused() -> None:
    with pytest.raises(ValueError, match=r"shape \(5, 4\); expected \[\*batch, 3\]"):
        make_agent().act(torch.zeros(5, 4))
