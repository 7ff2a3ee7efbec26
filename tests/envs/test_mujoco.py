"""The mujoco engine keeps what BatchedEnv promises over any engine; see also ``test_batched.py``."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from tensordict import TensorDict, TensorDictBase
from torchrl.data import Bounded
from torchrl.envs import EnvBase
from torchrl.envs.utils import check_env_specs

from envs import list_tasks, make_env
from envs.batched import BatchedEnv

NUM_ENVS = 4
MAX_EPISODE_STEPS = 6


def make(task: str = "HalfCheetah-v5", num_envs: int = NUM_ENVS, **options: Any) -> BatchedEnv:
    options = {"engine": "mujoco", "seed": 1, "max_episode_steps": MAX_EPISODE_STEPS} | options
    env = make_env(task, num_envs, **options)
    assert isinstance(env, BatchedEnv)
    return env


@pytest.fixture
def env() -> BatchedEnv:
    return make()


@pytest.fixture
def actions() -> torch.Tensor:
    """Actions of ten steps [10, NUM_ENVS, 6]."""
    return torch.rand(10, NUM_ENVS, 6, generator=torch.Generator().manual_seed(2)) * 2 - 1


def roll(env: EnvBase, actions: torch.Tensor, tensordict: TensorDictBase | None = None) -> torch.Tensor:
    """Next observations [steps, NUM_ENVS, 17] of a sequence of actions, through the ends of episodes."""
    following, observations = env.reset() if tensordict is None else tensordict, []
    for action in actions:
        stepped, following = env.step_and_maybe_reset(following.set("action", action))
        observations.append(stepped["next", "observation"].clone())
    return torch.stack(observations)


def present(env: BatchedEnv) -> TensorDict:
    """The observations that the environments are at."""
    return TensorDict({"observation": env.state_dict()["observation"]}, env.batch_size)


@pytest.mark.parametrize("task", list_tasks("mujoco"))
def test_specs(task: str) -> None:
    env = make(task, 3)
    check_env_specs(env, break_when_any_done="both", seed=0)
    assert env.batch_size == torch.Size([3])
    assert env.observation_spec["observation"].dtype == env.reward_spec.dtype == torch.float32


def test_the_action_spec_is_the_actuators_range(env: BatchedEnv) -> None:
    assert env.action_spec == Bounded(-1.0, 1.0, torch.Size([NUM_ENVS, 6]))
    assert make("Humanoid-v5").action_spec.high.unique().tolist() == [pytest.approx(0.4)]  # pyright: ignore


def test_auto_is_mujoco_on_a_cpu() -> None:
    assert isinstance(make_env("Ant-v5", num_envs=1), BatchedEnv)


def test_the_seed_fixes_every_episode_and_environments_differ(actions: torch.Tensor) -> None:
    first, again, other = (roll(make(seed=seed), actions) for seed in (3, 3, 4))
    assert torch.equal(first, again)
    assert not torch.equal(first, other)
    assert len(first[0].unique(dim=0)) == NUM_ENVS


@pytest.mark.parametrize("num_threads", [1, 3])
def test_the_number_of_threads_changes_nothing(num_threads: int) -> None:
    actions = torch.rand(8, 40, 6) * 2 - 1
    assert torch.equal(roll(make(num_envs=40, engine_options={"num_threads": num_threads}), actions),
                       roll(make(num_envs=40), actions))  # fmt: skip


def test_an_environments_episodes_do_not_depend_on_the_others(env: BatchedEnv) -> None:
    """Environment 0 starts its third episode from the same state whatever happened to the rest."""
    env.reset()
    expected = env.reset()["observation"][0]
    env.set_seed(1)
    tensordict = env.reset()
    for _ in range(3):
        tensordict = env.reset(tensordict.set("_reset", torch.tensor([[False], [True], [True], [False]])))
    tensordict = env.reset(tensordict.set("_reset", torch.tensor([[True], [False], [False], [False]])))
    assert torch.equal(tensordict["observation"][0], expected)


def test_the_time_limit_truncates_with_the_true_last_observation(actions: torch.Tensor) -> None:
    env, unlimited = make(), make(max_episode_steps=1000)
    expected = roll(unlimited, actions[:MAX_EPISODE_STEPS])
    following = env.reset()
    for step in range(MAX_EPISODE_STEPS):
        stepped, following = env.step_and_maybe_reset(following.set("action", actions[step]))
        assert torch.equal(stepped["next", "observation"], expected[step])
        last = step == MAX_EPISODE_STEPS - 1
        assert bool(stepped["next", "truncated"].all()) is bool(stepped["next", "done"].any()) is last
        assert not stepped["next", "terminated"].any()
    assert (following["observation"][:, :8].abs() <= 0.1).all()
    assert not following["done"].any()


def test_termination_is_not_truncation() -> None:
    env = make("Hopper-v5", max_episode_steps=1000)
    qpos = torch.zeros(NUM_ENVS, 6, dtype=torch.float64)
    qpos[:, 1] = 1.25
    qpos[2, 2] = 1.0  # fallen
    tensordict = env.set_state(qpos, torch.zeros(NUM_ENVS, 6, dtype=torch.float64))
    following = env.step(tensordict.set("action", torch.zeros(NUM_ENVS, 3)))["next"]
    assert following["terminated"][:, 0].tolist() == following["done"][:, 0].tolist() == [False, False, True, False]
    assert not following["truncated"].any()
    # The first in the observation is the height: the fallen robot is still shown where it fell.
    assert following["observation"][2, 1] == pytest.approx(1.0, abs=0.1)


def test_a_partial_reset_touches_only_its_rows(env: BatchedEnv, actions: torch.Tensor) -> None:
    tensordict = env.step(env.reset().set("action", actions[0]))["next"]
    before = env.state_dict()["engine"]
    mask = torch.tensor([[False], [True], [False], [False]])
    observation = env.reset(tensordict.clone().set("_reset", mask))["observation"]
    after = env.state_dict()["engine"]
    others = [0, 2, 3]
    assert torch.equal(observation[others], tensordict["observation"][others])
    assert (observation[1, :8].abs() <= 0.1).all()
    for name in before:
        assert torch.equal(before[name][others], after[name][others]), name
    assert after["elapsed_steps"].tolist() == [1, 0, 1, 1]
    assert not torch.equal(before["simulation"][1], after["simulation"][1])


def test_a_partial_reset_right_after_others_ended(env: BatchedEnv, actions: torch.Tensor) -> None:
    """Environments 1 and 2 are reset, of which only 1 has ended; 3 has ended too, and is reset later."""
    env.reset()
    saved = env.state_dict()
    saved["engine"]["elapsed_steps"] = torch.tensor([0, MAX_EPISODE_STEPS - 1, 0, MAX_EPISODE_STEPS - 1])
    env.load_state_dict(saved)
    tensordict = env.step(present(env).set("action", actions[0]))["next"]
    episodes = env.state_dict()["engine"]["episode"]
    tensordict = env.reset(tensordict.set("_reset", torch.tensor([[False], [True], [True], [False]])))
    tensordict = env.reset(tensordict.set("_reset", torch.tensor([[False], [False], [False], [True]])))
    state = env.state_dict()
    assert (state["engine"]["episode"] - episodes).tolist() == [0, 0, 1, 0]
    assert torch.equal(tensordict["observation"], state["observation"])


@pytest.mark.parametrize("task", ["HalfCheetah-v5", "Humanoid-v5"])
def test_a_saved_state_replays_exactly(task: str) -> None:
    # Humanoid's solver starts from its last solution, and its reward compares with where the body was.
    env, other = make(task), make(task, seed=9)
    actions = (torch.rand(10, *env.action_spec.shape) * 2 - 1) * 0.4
    tensordict = env.reset()
    for action in actions[:3]:
        tensordict = env.step(tensordict.set("action", action))["next"]
    saved, start = env.state_dict(), tensordict.select("observation").clone()
    expected = roll(env, actions, start.clone())
    other.load_state_dict(saved)
    assert torch.equal(roll(other, actions, start.clone()), expected)
    with pytest.raises(ValueError, match=r"'elapsed_steps' has shape \[3\]; expected \[4\]"):
        saved["engine"]["elapsed_steps"] = torch.zeros(3)
        env.load_state_dict(saved)


def test_a_state_of_another_shape_is_refused(env: BatchedEnv) -> None:
    with pytest.raises(ValueError, match=r"'qpos' has shape \[4, 8\]; expected \[4, 9\]"):
        env.set_state(torch.zeros(NUM_ENVS, 8), torch.zeros(NUM_ENVS, 9))


def test_an_action_of_the_wrong_shape_is_refused(env: BatchedEnv) -> None:
    with pytest.raises(ValueError, match=r"action has shape \[4, 5\]; expected \[4, 6\]"):
        env.step(env.reset().set("action", torch.zeros(NUM_ENVS, 5)))


def test_an_action_out_of_bounds_drives_like_the_bound_but_costs_more(env: BatchedEnv) -> None:
    env.reset()
    saved = env.state_dict()
    steps = []
    for scale in (1.0, 3.0):
        env.load_state_dict(saved)
        steps.append(env.step(present(env).set("action", torch.full((NUM_ENVS, 6), scale)))["next"])
    assert torch.equal(steps[0]["observation"], steps[1]["observation"])
    torch.testing.assert_close(steps[0]["reward"] - steps[1]["reward"], torch.full((NUM_ENVS, 1), 0.1 * 6 * 8))


def test_a_simulation_that_diverges_ends_alone(env: BatchedEnv, actions: torch.Tensor) -> None:
    tensordict = env.reset()
    saved = env.state_dict()
    undisturbed = env.step(tensordict.clone().set("action", actions[0]))["next"]
    # In MuJoCo's state vector the time comes first, then positions and velocities.
    saved["engine"]["simulation"][2, 1 + 9 : 1 + 18] = 1e9
    env.load_state_dict(saved)
    stepped, following = env.step_and_maybe_reset(tensordict.set("action", actions[0]))
    lost = torch.tensor([False, False, True, False])
    step = stepped["next"]
    assert torch.equal(step["diverged"][:, 0], lost)
    assert torch.equal(step["terminated"][:, 0], lost)
    assert step["observation"].isfinite().all() and not step["observation"][2].any() and step["reward"][2] == 0
    assert torch.equal(step["observation"][~lost], undisturbed["observation"][~lost])
    assert (following["observation"][2, :8].abs() <= 0.1).all() and not following["diverged"].any()
    env.step(following.set("action", actions[1]))


def test_writing_to_what_a_step_returned_does_not_change_the_simulation(actions: torch.Tensor) -> None:
    clean, env = roll(make(seed=3), actions), make(seed=3)
    following = env.reset()
    for action, expected in zip(actions, clean, strict=True):
        stepped, following = env.step_and_maybe_reset(following.set("action", action.clone()))
        assert torch.equal(stepped["next", "observation"], expected)
        stepped["action"].fill_(torch.nan)
        stepped["next", "observation"].fill_(torch.nan)
        following["observation"].fill_(torch.nan)


def test_bad_engine_options_are_refused() -> None:
    with pytest.raises(ValueError, match=r"'threads' of the engine 'mujoco', which has num_threads; .*'num_threads'\?"):
        make(engine_options={"threads": 2})
    with pytest.raises(ValueError, match=r"num_threads is 0; expected at least 1"):
        make(engine_options={"num_threads": 0})
