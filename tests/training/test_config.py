"""A configuration that cannot run is refused in one sentence, before anything starts."""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path

import pytest

from nclql_torchrl.training import ConfigError, TrainConfig, train, validate
from nclql_torchrl.training.components import make_device
from nclql_torchrl.training.config import check_override_keys, load_config


def test_the_defaults_are_valid() -> None:
    validate(TrainConfig())


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("env.engine=mjxx", "env.engine is 'mjxx'; expected one of auto, mujoco, mjx, gymnasium. did you mean 'mjx'?"),
        ("optim.update=sumed", "did you mean 'summed'?"),
        ("sampler.boundary=clamp", "expected one of clip, reflect"),
        ("sampler.ensemble_reduction=max", "expected one of sum, mean, min"),
        ("sampler.w=automatic", "sampler.w is 'automatic'; expected a positive number or 'auto'"),
        ("sampler.w=-5", "sampler.w is -5; expected a positive"),
        ("sampler.start_level=3", "sampler.start_level is 3; expected a level, 0 to 2"),
        ("sampler.kernel=malla", "did you mean 'mala'?"),
        ("sampler.kernel=mala", "sampler.normalize_gradient is True with kernel 'mala'; expected False"),
        ("sampler.execution=jit", "expected one of eager, compile, cudagraph, auto"),
        ("sampler.precision=bf16", "did you mean 'bfloat16'?"),
        ("logger.backend=tensorbord", "did you mean 'tensorboard'?"),
        ("sampler.num_levels=0", "sampler.num_levels is 0; expected at least 1"),
        ("sampler.sigma_min=0.2", "sigma_min is 0.2 and sampler.sigma_max is 0.02; expected sigma_min < sigma_max"),
        ("sampler.sigma_min=-1", "sampler.sigma_min is -1; expected a positive"),
        ("optim.lr=nan", "optim.lr is nan; expected a positive"),
        ("optim.gamma=1.5", "optim.gamma is 1.5; expected a number in [0, 1)"),
        ("optim.n_steps=0", "optim.n_steps is 0; expected at least 1"),
        ("optim.n_steps=21", "init_random_frames is 40 for each learner; expected at least 42 (optim.n_steps * env."),
        ("optim.utd_ratio=-0.1", "optim.utd_ratio is -0.1; expected"),
        ("optim.batch_size=1000", "replay_buffer.size is 160, less than optim.batch_size (1000)"),
        ("collector.frames_per_batch=7", "expected a multiple of env.num_envs (2), such as 8"),
        ("collector.backend=asynch", "did you mean 'async'?"),
        ("collector.num_workers=0", "collector.num_workers is 0; expected at least 1"),
        ("collector.num_workers=2", "no workers with collector.backend=direct; expected 1, or collector.backend=async"),
        ("collector.device=cuda", "no workers with collector.backend=direct; expected cpu"),
        ("collector.weight_update_interval=0", "collector.weight_update_interval is 0; expected at least 1"),
        ("network.hidden_sizes=[]", "network.hidden_sizes is []; expected"),
        ("seed=-1", "seed is -1; expected"),
    ],
)
def test_an_impossible_value_is_an_error(tiny_config: Callable[..., TrainConfig], override: str, message: str) -> None:
    config = tiny_config(override)
    with pytest.raises(ConfigError, match=re.escape(message)):
        train(config)
    assert config.run_dir is not None and not Path(config.run_dir).exists()


def test_the_preset_for_a_cpu_learns_as_the_best_does() -> None:
    presets = Path(__file__).parents[2] / "nclql_torchrl" / "conf" / "preset"
    cpu, best = (load_config(str(presets / f"{name}.yaml")) for name in ("cpu", "best"))
    assert (cpu.optim, cpu.sampler, cpu.network) == (best.optim, best.sampler, best.network)


def test_workers_on_a_cpu_have_no_cuda_graphs(tiny_config: Callable[..., TrainConfig]) -> None:
    with pytest.raises(ConfigError, match=r"'cudagraph' with workers that act on a CPU .*; expected 'auto'"):
        train(tiny_config("sampler.execution=cudagraph", "collector.backend=async"))


def test_returns_of_several_steps_need_one_stream_of_them(tiny_config: Callable[..., TrainConfig]) -> None:
    with pytest.raises(ConfigError, match=r"optim.n_steps is 3 with collector.backend=async.*expected 1, or"):
        train(tiny_config("optim.n_steps=3", "collector.backend=async"))


def test_ray_is_an_extra(tiny_config: Callable[..., TrainConfig], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(ConfigError, match=r"pip install 'nclql-torchrl\[ray\]'"):
        validate(tiny_config("collector.backend=ray"))


def test_a_spread_that_the_chain_cannot_have_is_an_error(tiny_config: Callable[..., TrainConfig]) -> None:
    with pytest.raises(
        ConfigError, match=r"sampler.target_spread is 0.01; expected a number from 0.02, twice the noise"
    ):
        train(tiny_config("sampler.w=auto", "sampler.target_spread=0.01"))
    validate(tiny_config("sampler.target_spread=0.01"))


def test_a_misspelt_key_is_an_error_with_the_nearest_one() -> None:
    with pytest.raises(ConfigError, match=r"no option 'env.num_env'; did you mean 'env.num_envs'"):
        check_override_keys(["env.num_env=3"])
    with pytest.raises(ConfigError, match="does not fit"):
        load_config({"env": {"num_env": 3}})


def test_hydra_options_and_sweeps_pass_the_key_check() -> None:
    check_override_keys(["-m", "--cfg=job", "seed=1,2", "hydra.sweep.dir=x", "preset=cpu", "optim.lr=1e-3"])


def test_a_wrong_type_is_an_error() -> None:
    with pytest.raises(ConfigError, match="could not be converted to Integer"):
        load_config({}, ["env.num_envs=many"])


@pytest.mark.parametrize("device", ["gpu", "cuda:99"])
def test_an_unknown_device_is_an_error(device: str) -> None:
    with pytest.raises(ConfigError, match=f"device is '{device}'"):
        make_device(device)


def test_unknown_task_is_an_error_before_the_run_directory_exists(tiny_config: Callable[..., TrainConfig]) -> None:
    config = tiny_config("env.task=Pendulumm-v1")
    with pytest.raises(ValueError, match="Pendulum-v1"):
        train(config)
    assert config.run_dir is not None and not Path(config.run_dir).exists()
