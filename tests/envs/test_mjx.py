"""The mjx engine steps Gymnasium's HalfCheetah-v5, and keeps TorchRL's contract.

Compiling a step takes tens of seconds on a CPU, so the tests share one environment.
"""

from __future__ import annotations

from typing import Any

import gymnasium
import numpy as np
import pytest
import torch
from tensordict import TensorDict
from torchrl.data import Bounded
from torchrl.envs.utils import check_env_specs

from envs import make_env
from envs.batched import BatchedEnv
from envs.tasks.half_cheetah import HalfCheetah

NUM_ENVS = 4
MAX_EPISODE_STEPS = 6


@pytest.fixture(scope="module")
def env() -> BatchedEnv:
    made = make_env("HalfCheetah-v5", NUM_ENVS, engine="mjx", seed=1, max_episode_steps=MAX_EPISODE_STEPS)
    assert isinstance(made, BatchedEnv)
    return made


@pytest.fixture
def actions() -> torch.Tensor:
    """Actions of ten steps [10, NUM_ENVS, 6]."""
    return torch.rand(10, NUM_ENVS, 6, generator=torch.Generator().manual_seed(2)) * 2 - 1


def gymnasium_transitions(number: int, distance: float) -> dict[str, np.ndarray]:
    """Float64 transitions of Gymnasium from float32 states on a random walk, with the root at ``distance`` metres."""
    reference: Any = gymnasium.make("HalfCheetah-v5").unwrapped
    reference.reset(seed=0)
    generator = np.random.default_rng(0)
    rows = []
    for _ in range(number):
        qpos, qvel = reference.data.qpos.astype(np.float32), reference.data.qvel.astype(np.float32)
        qpos[0] = distance
        reference.set_state(qpos.astype(np.float64), qvel.astype(np.float64))
        reference.data.qacc_warmstart[:] = 0
        action = generator.uniform(-1, 1, 6).astype(np.float32)
        observation, reward, *_ = reference.step(action)
        rows.append((qpos, qvel, action, observation, reward))
    names = ("qpos", "qvel", "action", "observation", "reward")
    return {name: np.stack(column) for name, column in zip(names, zip(*rows, strict=True), strict=True)}


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"ctrl_cost_weight": 0.3, "forward_reward_weight": 2.0, "reset_noise_scale": 0.2, "frame_skip": 3},
        {"exclude_current_positions_from_observation": False},
    ],
)
def test_the_task_in_numpy_is_gymnasiums(options: dict[str, Any]) -> None:
    reference: Any = gymnasium.make("HalfCheetah-v5", **options).unwrapped
    task = HalfCheetah(**options)
    observation, _ = reference.reset(seed=7)
    assert task.xml_path.samefile(reference.fullpath)
    assert task.frame_skip == reference.frame_skip
    qpos, qvel = task.reset(np.random.Generator(np.random.PCG64(7)), reference.init_qpos, reference.init_qvel)
    before, action = type(reference.data)(reference.model), np.linspace(-1, 1, 6)
    before.qpos[:], before.qvel[:] = qpos, qvel
    np.testing.assert_array_equal(task.observe(np, before), observation)
    observation, reward, *_ = reference.step(action)
    np.testing.assert_array_equal(task.observe(np, reference.data), observation)
    np.testing.assert_allclose(task.reward(np, before, reference.data, action, reference.dt), reward, rtol=1e-14)
    assert not task.terminated(np, reference.data)


@pytest.mark.slow
@pytest.mark.parametrize("distance", [0.0, 500.0])
def test_a_step_is_gymnasiums_in_float32(env: BatchedEnv, distance: float) -> None:
    expected = gymnasium_transitions(128, distance)
    observation_errors, reward_errors = [], []
    for start in range(0, 128, NUM_ENVS):
        batch = {name: value[start : start + NUM_ENVS] for name, value in expected.items()}
        tensordict = env.set_state(torch.from_numpy(batch["qpos"]), torch.from_numpy(batch["qvel"]))
        following = env.step(tensordict.set("action", torch.from_numpy(batch["action"])))["next"]
        observation_errors.append(np.abs(following["observation"].numpy() - batch["observation"]).max(-1))
        reward_errors.append(np.abs(following["reward"][:, 0].numpy() - batch["reward"]))
        assert not following["done"].any()
    # Measured here: 5.6e-4, 3.7e-6 and 2.6e-6; over 2048 other transitions 1.7e-3, 4.8e-6 and 3.0e-5. The largest are
    # velocities at impacts, which amplify rounding. Without recentring, 500 m away: 1.3e-2, 1.2e-4 and 1.2e-3.
    assert np.max(observation_errors) < 5e-3
    assert np.median(observation_errors) < 2e-5
    assert np.max(reward_errors) < 1e-4


@pytest.mark.slow
def test_specs(env: BatchedEnv) -> None:
    check_env_specs(env)
    assert env.batch_size == torch.Size([NUM_ENVS])
    assert env.observation_spec["observation"].shape == (NUM_ENVS, 17)
    assert env.observation_spec["observation"].dtype == env.reward_spec.dtype == torch.float32
    assert env.action_spec == Bounded(-1.0, 1.0, torch.Size([NUM_ENVS, 6]))


@pytest.mark.slow
def test_the_seed_fixes_every_episode_and_environments_differ(env: BatchedEnv, actions: torch.Tensor) -> None:
    first, again, other = (roll(env, actions, seed) for seed in (3, 3, 4))
    assert torch.equal(first, again)
    assert not torch.equal(first, other)
    assert len(first[0].unique(dim=0)) == NUM_ENVS


@pytest.mark.slow
def test_initial_states_are_of_gymnasiums_distribution(env: BatchedEnv) -> None:
    env.set_seed(0)
    observations = torch.cat([env.reset()["observation"] for _ in range(200)])
    positions, velocities = observations[:, :8], observations[:, 8:]
    assert len(observations.unique(dim=0)) == 200 * NUM_ENVS
    assert 0.099 < positions.abs().max() <= 0.1
    torch.testing.assert_close(positions.std(0), torch.full((8,), 0.1 / 3**0.5), rtol=0.1, atol=0.0)
    torch.testing.assert_close(velocities.std(0), torch.full((9,), 0.1), rtol=0.15, atol=0.0)


@pytest.mark.slow
def test_the_time_limit_truncates_with_the_true_last_observation(env: BatchedEnv, actions: torch.Tensor) -> None:
    env.reset()
    saved = env.state_dict()
    untruncated = env.step(present(env).set("action", actions[0]))["next"].clone()
    undisturbed = env.state_dict()["engine"]
    saved["engine"]["elapsed_steps"] = torch.tensor([0, MAX_EPISODE_STEPS - 1, 2, MAX_EPISODE_STEPS - 1])
    env.load_state_dict(saved)
    stepped, following = env.step_and_maybe_reset(present(env).set("action", actions[0]))
    ended = torch.tensor([False, True, False, True])
    assert torch.equal(stepped["next", "truncated"][:, 0], ended)
    assert torch.equal(stepped["next", "done"][:, 0], ended)
    assert not stepped["next", "terminated"].any()
    assert torch.equal(stepped["next", "observation"], untruncated["observation"])
    assert torch.equal(stepped["next", "reward"], untruncated["reward"])
    assert torch.equal(following["observation"][~ended], untruncated["observation"][~ended])
    assert (following["observation"][ended][:, :8].abs() <= 0.1).all()
    assert not following["done"].any()
    state = env.state_dict()["engine"]
    assert state.pop("elapsed_steps").tolist() == [1, 0, 3, 0]
    for name in state:
        assert torch.equal(state[name][~ended], undisturbed[name][~ended]), name


@pytest.mark.slow
def test_a_partial_reset_touches_only_its_rows(env: BatchedEnv, actions: torch.Tensor) -> None:
    tensordict = env.reset()
    tensordict = env.step(tensordict.set("action", actions[0]))["next"]
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
    assert not torch.equal(before["qpos"][1], after["qpos"][1])


@pytest.mark.slow
def test_a_partial_reset_right_after_others_ended(env: BatchedEnv, actions: torch.Tensor) -> None:
    """Environments 1 and 2 are reset, of which only 1 has ended; 3 has ended too, and is reset later."""
    saved = env.state_dict()
    saved["engine"]["elapsed_steps"] = torch.tensor([0, MAX_EPISODE_STEPS - 1, 0, MAX_EPISODE_STEPS - 1])
    env.load_state_dict(saved)
    tensordict = env.step(present(env).set("action", actions[0]))["next"]
    episodes = env.state_dict()["engine"]["episode"]
    tensordict = env.reset(tensordict.set("_reset", torch.tensor([[False], [True], [True], [False]])))
    tensordict = env.reset(tensordict.set("_reset", torch.tensor([[False], [False], [False], [True]])))
    state = env.state_dict()["engine"]
    assert (state["episode"] - episodes).tolist() == [0, 0, 1, 0]
    expected = torch.cat([state["qpos"][:, 1:], state["qvel"]], dim=-1)
    assert torch.equal(tensordict["observation"], expected)


@pytest.mark.slow
def test_a_saved_state_replays_exactly(env: BatchedEnv, actions: torch.Tensor) -> None:
    tensordict = env.reset()
    for action in actions[:3]:
        tensordict = env.step(tensordict.set("action", action))["next"]
    saved, start = env.state_dict(), tensordict.select("observation")
    other = make_env("HalfCheetah-v5", NUM_ENVS, engine="mjx", seed=9, max_episode_steps=MAX_EPISODE_STEPS)

    def replay(env: Any) -> torch.Tensor:
        env.load_state_dict(saved)
        following, observations = start.clone(), []
        for action in actions:  # past the time limit: the next episode starts from the saved random state
            stepped, following = env.step_and_maybe_reset(following.set("action", action))
            observations.append(stepped["next", "observation"])
        return torch.stack(observations)

    assert torch.equal(replay(env), replay(other))
    with pytest.raises(ValueError, match=r"'elapsed_steps' has shape \[3\]; expected \[4\]"):
        saved["engine"]["elapsed_steps"] = torch.zeros(3)
        env.load_state_dict(saved)


@pytest.mark.slow
def test_an_action_of_the_wrong_shape_is_refused(env: BatchedEnv) -> None:
    with pytest.raises(ValueError, match=r"action has shape \[4, 5\]; expected \[4, 6\]"):
        env.step(env.reset().set("action", torch.zeros(NUM_ENVS, 5)))


@pytest.mark.slow
def test_writing_to_what_a_step_returned_does_not_change_the_simulation(env: BatchedEnv, actions: torch.Tensor) -> None:
    clean = roll(env, actions, seed=3)
    env.set_seed(3)
    following = env.reset()
    for action, expected in zip(actions, clean, strict=True):
        stepped, following = env.step_and_maybe_reset(following.set("action", action.clone()))
        assert torch.equal(stepped["next", "observation"], expected)
        stepped["action"].fill_(torch.nan)
        stepped["next", "observation"].fill_(torch.nan)
        following["observation"].fill_(torch.nan)


@pytest.mark.slow
def test_another_release_of_mjx_is_refused_unless_allowed(monkeypatch: pytest.MonkeyPatch) -> None:
    from envs.engines import mjx

    monkeypatch.setattr(mjx, "version", lambda package: "4.1.0")
    monkeypatch.delenv(mjx.ALLOW_UNTESTED_VERSION, raising=False)
    with pytest.raises(RuntimeError, match=r"mujoco-mjx is 4\.1\.0; expected 3\.17\.x.*NCLQL_ALLOW_UNTESTED_MJX=1"):
        mjx.check_version()
    monkeypatch.setenv(mjx.ALLOW_UNTESTED_VERSION, "1")
    mjx.check_version()


@pytest.mark.slow
def test_a_device_that_jax_does_not_see_is_refused() -> None:
    with pytest.raises(RuntimeError, match=r"JAX does not see the device 'cuda:97'; it sees .*engine='gymnasium'"):
        make_env("HalfCheetah-v5", NUM_ENVS, engine="mjx", device="cuda:97")


@pytest.mark.slow
def test_the_bridge_shares_memory() -> None:
    from envs.bridge import to_jax, to_torch

    tensor = torch.zeros(64, 17)
    array = to_jax(tensor)
    assert array.unsafe_buffer_pointer() == tensor.data_ptr()
    assert to_torch(array).data_ptr() == tensor.data_ptr()


@pytest.mark.slow
def test_the_bridge_copies_what_is_not_aligned() -> None:
    from envs.bridge import to_jax

    tensor = torch.arange(7.0)[1:]
    np.testing.assert_array_equal(np.asarray(to_jax(tensor)), tensor.numpy())


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_a_gpu_steps_as_the_cpu_does(env: BatchedEnv, actions: torch.Tensor) -> None:
    on_gpu = make_env("HalfCheetah-v5", NUM_ENVS, device="cuda", max_episode_steps=MAX_EPISODE_STEPS)
    assert isinstance(on_gpu, BatchedEnv)
    check_env_specs(on_gpu)
    env.reset()
    for action in actions:
        on_gpu.load_state_dict(env.state_dict())
        expected = env.step(present(env).set("action", action))["next"]
        following = on_gpu.step(present(on_gpu).set("action", action.cuda()))["next"]
        assert following.device is not None and following.device.type == "cuda"
        torch.testing.assert_close(following["observation"].cpu(), expected["observation"], rtol=0.0, atol=5e-3)
        torch.testing.assert_close(following["reward"].cpu(), expected["reward"], rtol=0.0, atol=1e-4)


def roll(env: BatchedEnv, actions: torch.Tensor, seed: int) -> torch.Tensor:
    """Next observations [steps, NUM_ENVS, 17] of a sequence of actions, through the ends of episodes."""
    env.set_seed(seed)
    following, observations = env.reset(), []
    for action in actions:
        stepped, following = env.step_and_maybe_reset(following.set("action", action))
        observations.append(stepped["next", "observation"].clone())
    return torch.stack(observations)


def present(env: BatchedEnv) -> TensorDict:
    """The observations that the environments are at."""
    return TensorDict({"observation": env.state_dict()["observation"]}, env.batch_size)
