"""Tasks have Gymnasium's options; a task of one's own is a task like any other."""

from __future__ import annotations

import importlib
import inspect
import subprocess
import sys
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any, ClassVar

import gymnasium
import numpy as np
import pytest
import torch
from torchrl.envs.utils import check_env_specs

from envs import list_tasks, make_env, register_task
from envs.task import first_valid
from envs.tasks import GYMNASIUM_TASKS, TASKS
from envs.tasks.half_cheetah import HalfCheetah
from envs.tasks.swimmer import Swimmer
from nclql_torchrl.training import RunDirectory

EXAMPLES = Path(__file__).parents[2] / "examples"


@pytest.fixture
def cart(monkeypatch: pytest.MonkeyPatch) -> Any:
    monkeypatch.syspath_prepend(EXAMPLES)
    return importlib.import_module("cart").CartToGoal


@pytest.mark.parametrize("task", GYMNASIUM_TASKS, ids=lambda task: task.name)
def test_options_are_those_of_gymnasiums_constructor(task: Any) -> None:
    spec = gymnasium.spec(task.name)
    module, name = str(spec.entry_point).split(":")
    constructor = inspect.signature(getattr(importlib.import_module(module), name).__init__).parameters
    theirs = {name: parameter.default for name, parameter in constructor.items()}
    for other in ("self", "default_camera_config", "kwargs"):
        del theirs[other]
    assert {field.name: field.default for field in fields(task)} == theirs | {
        "max_episode_steps": spec.max_episode_steps
    }


OPTIONS: list[tuple[str, dict[str, Any]]] = [
    ("HalfCheetah-v5", {"forward_reward_weight": 2.0, "ctrl_cost_weight": 0.3, "frame_skip": 3}),
    ("HalfCheetah-v5", {"exclude_current_positions_from_observation": False}),
    ("Hopper-v5", {"healthy_z_range": (0.9, 1.2), "healthy_state_range": (-5.0, 5.0), "healthy_reward": 3.0}),
    ("Walker2d-v5", {"healthy_angle_range": (-0.1, 0.1), "terminate_when_unhealthy": False}),
    ("Swimmer-v5", {"exclude_current_positions_from_observation": False, "ctrl_cost_weight": 1.0}),
    ("Ant-v5", {"include_cfrc_ext_in_observation": False, "main_body": "torso", "contact_cost_weight": 0.1}),
    ("Ant-v5", {"contact_force_range": (-0.5, 0.2), "healthy_z_range": (0.4, 0.7)}),
    ("Humanoid-v5", {"include_cinert_in_observation": False, "contact_cost_range": (0.0, 0.01)}),
    ("HumanoidStandup-v5", {"include_cvel_in_observation": False, "impact_cost_weight": 1e-3}),
    ("InvertedDoublePendulum-v5", {"healthy_reward": 1.0, "reset_noise_scale": 0.3}),
    ("Reacher-v5", {"reward_dist_weight": 0.1, "reward_control_weight": 3.0}),
    ("Pusher-v5", {"reward_near_weight": 2.0, "reward_dist_weight": 0.2, "reward_control_weight": 1.0}),
]


@pytest.mark.parametrize(("task", "options"), OPTIONS)
def test_options_do_what_gymnasiums_do(task: str, options: dict[str, Any]) -> None:
    env: Any = make_env(task, 1, engine="mujoco", seed=3, **options)
    reference: Any = gymnasium.make(task, **options).unwrapped
    reference.reset(seed=0)
    tensordict = env.reset()
    state = env._engine._data[0]
    reference.set_state(state.qpos, state.qvel)
    generator = np.random.default_rng(0)
    for _ in range(12):
        action = generator.uniform(reference.action_space.low, reference.action_space.high).astype(np.float32)
        following = env.step(tensordict.set("action", torch.from_numpy(action)[None]))["next"]
        observation, reward, terminated, *_ = reference.step(action)
        np.testing.assert_array_equal(following["observation"][0].numpy(), observation.astype(np.float32))
        np.testing.assert_allclose(following["reward"].item(), reward, rtol=1e-5, atol=1e-6)
        assert following["terminated"].item() == terminated
        if terminated:
            break
        tensordict = following


def test_a_model_of_ones_own_takes_the_place_of_gymnasiums(tmp_path: Path) -> None:
    model = Swimmer().xml_path.read_text().replace('viscosity="0.1"', 'viscosity="0.3"')
    path = tmp_path / "thick.xml"
    path.write_text(model)
    options = {"engine": "mujoco", "seed": 1}
    thin, thick = make_env("Swimmer-v5", 1, **options), make_env("Swimmer-v5", 1, xml_file=str(path), **options)
    steps = [env.step(env.reset().set("action", torch.ones(1, 2)))["next", "observation"] for env in (thin, thick)]
    assert not torch.equal(*steps)
    with pytest.raises(FileNotFoundError, match=r"xml_file is 'swimer.xml'.*does not exist; expected a path"):
        Swimmer(xml_file="swimer.xml")


@pytest.mark.parametrize("engine", ["mujoco", "gymnasium", pytest.param("mjx", marks=pytest.mark.slow)])
def test_every_engine_steps_a_task_of_ones_own(cart: Any, engine: str) -> None:
    env: Any = make_env("cart:CartToGoal-v0", 3, engine=engine, goal=0.5, max_episode_steps=7, seed=2)
    check_env_specs(env, break_when_any_done="both", seed=0)
    observations = env.rollout(8, break_when_any_done=False)
    torch.testing.assert_close(
        observations["next", "reward"][..., 0],
        # xpos is of before the last substep, so the distance is known only roughly from the observation.
        1.0 - observations["next", "observation"][..., 0].abs() - 0.01 * observations["action"][..., 0] ** 2,
        atol=0.05,
        rtol=0.0,
    )
    assert observations["next", "truncated"][:, 6].all()


def test_a_task_of_ones_own_steps_like_its_gymnasium_environment(cart: Any) -> None:
    env: Any = make_env(cart(goal=-0.5), 1, engine="mujoco", seed=2)
    reference: Any = gymnasium.make("CartToGoal-v0", goal=-0.5, render_mode=None)
    reference.reset(seed=0)
    tensordict = env.reset()
    reference.unwrapped.set_state(env._engine._data[0].qpos, env._engine._data[0].qvel)
    for value in np.linspace(-3.0, 3.0, 20, dtype=np.float32):
        following = env.step(tensordict.set("action", torch.tensor([[value]])))["next"]
        observation, reward, terminated, truncated, _ = reference.step(np.array([value]))
        np.testing.assert_array_equal(following["observation"][0].numpy(), observation.astype(np.float32))
        np.testing.assert_allclose(following["reward"].item(), reward, rtol=1e-6)
        assert (following["terminated"].item(), following["truncated"].item()) == (terminated, truncated)
        tensordict = following


def test_a_task_of_ones_own_is_refused_under_a_name_that_is_taken(cart: Any) -> None:
    assert register_task(cart) is cart  # once more changes nothing
    assert "CartToGoal-v0" in list_tasks("mujoco") and "CartToGoal-v0" in list_tasks("gymnasium")

    @dataclass(frozen=True, kw_only=True)
    class Other(HalfCheetah):
        name: ClassVar[str] = "HalfCheetah-v5"

    with pytest.raises(ValueError, match=r"There is a task 'HalfCheetah-v5' already; expected a new name for .*Other"):
        register_task(Other)
    assert TASKS["HalfCheetah-v5"] is HalfCheetah


def test_options_belong_into_the_task(cart: Any) -> None:
    with pytest.raises(ValueError, match=r"options goal belong into CartToGoal\(\.\.\.\)"):
        make_env(cart(), 1, goal=0.3)


@pytest.mark.slow
def test_a_run_trains_a_task_of_ones_own(tmp_path: Path) -> None:
    command = [
        *(sys.executable, "-m", "nclql_torchrl.commands.train", "env.task=cart:CartToGoal-v0", "env.num_envs=2"),
        *("env.task_options.goal=0.2", "env.task_options.max_episode_steps=20", "env.engine_options.num_threads=1"),
        *("collector.total_frames=120", "logger.log_interval=60"),
        *("collector.init_random_frames=40", "optim.batch_size=8", "network.hidden_sizes=[8,8]"),
        *("logger.eval_episodes=2", "device=cpu", f"run_dir={tmp_path / 'run'}"),
    ]
    result = subprocess.run(command, cwd=EXAMPLES, capture_output=True, text=True, timeout=250)
    assert result.returncode == 0, result.stderr
    assert "CartToGoal-v0: return" in result.stdout
    rows = [row for row in RunDirectory.open(tmp_path / "run").read_metrics() if "train_length" in row]
    assert rows and rows[-1]["train_length"] <= 20 and rows[-1]["diverged"] == 0


def test_first_valid_takes_the_first() -> None:
    candidates = np.array([[0.0], [1.0], [2.0]])
    assert first_valid(np, candidates, np.array([False, True, True])) == [1.0]
