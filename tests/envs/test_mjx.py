"""The mjx engine keeps the contract of the batched engines.

Compiling a step takes some ten seconds on a CPU, so the tests share one environment of HalfCheetah-v5; how near all
tasks are to Gymnasium's is asked in ``test_mjx_parity.py``.
"""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from tensordict import TensorDict
from torchrl.data import Bounded
from torchrl.envs.utils import check_env_specs

from envs import make_env
from envs.batched import BatchedEnv
from envs.engines import mjx_corrections
from envs.engines.mjx import MJXEngine, choose_num_parts
from envs.engines.mujoco import MujocoEngine
from envs.task_env import TaskEnv
from envs.tasks.half_cheetah import HalfCheetah
from envs.tasks.inverted_pendulum import InvertedPendulum
from tests.envs.ball import WALL, Ball, FeelingBall, write_model

NUM_ENVS = 4
MAX_EPISODE_STEPS = 6

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def env() -> BatchedEnv:
    made = make_env("HalfCheetah-v5", NUM_ENVS, engine="mjx", seed=1, max_episode_steps=MAX_EPISODE_STEPS)
    assert isinstance(made, BatchedEnv)
    return made


@pytest.fixture
def actions() -> torch.Tensor:
    """Actions of ten steps [10, NUM_ENVS, 6]."""
    return torch.rand(10, NUM_ENVS, 6, generator=torch.Generator().manual_seed(2)) * 2 - 1


def test_specs(env: BatchedEnv) -> None:
    check_env_specs(env)
    assert env.batch_size == torch.Size([NUM_ENVS])
    assert env.observation_spec["observation"].shape == (NUM_ENVS, 17)
    assert env.observation_spec["observation"].dtype == env.reward_spec.dtype == torch.float32
    assert env.action_spec == Bounded(-1.0, 1.0, torch.Size([NUM_ENVS, 6]))


def test_the_seed_fixes_every_episode_and_environments_differ(env: BatchedEnv, actions: torch.Tensor) -> None:
    first, again, other = (roll(env, actions, seed) for seed in (3, 3, 4))
    assert torch.equal(first, again)
    assert not torch.equal(first, other)
    assert len(first[0].unique(dim=0)) == NUM_ENVS


def test_initial_states_are_of_gymnasiums_distribution(env: BatchedEnv) -> None:
    env.set_seed(0)
    observations = torch.cat([env.reset()["observation"] for _ in range(200)])
    positions, velocities = observations[:, :8], observations[:, 8:]
    assert len(observations.unique(dim=0)) == 200 * NUM_ENVS
    assert 0.099 < positions.abs().max() <= 0.1
    torch.testing.assert_close(positions.std(0), torch.full((8,), 0.1 / 3**0.5), rtol=0.1, atol=0.0)
    torch.testing.assert_close(velocities.std(0), torch.full((9,), 0.1), rtol=0.15, atol=0.0)


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


def test_a_simulation_that_diverges_ends_alone(env: BatchedEnv, actions: torch.Tensor) -> None:
    env.set_seed(5)
    env.reset()
    saved = env.state_dict()
    undisturbed = env.step(present(env).set("action", actions[0]))["next"].clone()
    saved["engine"]["qvel"][2, 3] = 1e12
    saved["engine"]["qpos"][3, 1] = torch.nan
    env.load_state_dict(saved)
    stepped, following = env.step_and_maybe_reset(present(env).set("action", actions[0]))
    lost = torch.tensor([False, False, True, True])
    for name in ("diverged", "terminated", "done"):
        assert torch.equal(stepped["next", name][:, 0], lost), name
    assert not stepped["next", "truncated"].any()
    assert not stepped["next", "observation"][lost].any() and not stepped["next", "reward"][lost].any()
    for name in ("observation", "reward"):
        assert torch.equal(stepped["next", name][~lost], undisturbed[name][~lost]), name
    assert (following["observation"][lost][:, :8].abs() <= 0.1).all()
    again = env.step(following.set("action", actions[1]))["next"]
    assert again["observation"].isfinite().all() and not again["diverged"].any()


def test_the_agent_is_moved_back_where_nobody_sees_it(env: BatchedEnv, actions: torch.Tensor) -> None:
    qpos, qvel = torch.zeros(NUM_ENVS, 9), torch.zeros(NUM_ENVS, 9)
    qpos[:, 0] = 500.0
    qvel[:, 0] = 1.0
    engine: Any = env._engine
    env.set_state(qpos, qvel)
    assert torch.equal(engine.positions(), qpos)
    assert torch.equal(engine.step(actions[0]).qpos, engine.positions())
    env.set_state(qpos, qvel)
    for action in actions[:3]:
        env.step(present(env).set("action", action))
    assert (engine.state_dict()["qpos"][:, 0].abs() < 1.0).all()
    travelled = engine.positions()[:, 0] - 500.0
    assert (travelled != 0.0).all() and (travelled.abs() < 1.0).all()


def test_a_saved_state_replays_exactly(env: BatchedEnv, actions: torch.Tensor) -> None:
    tensordict = env.reset()
    for action in actions[:3]:
        tensordict = env.step(tensordict.set("action", action))["next"]
    saved = env.state_dict()
    other = make_env("HalfCheetah-v5", NUM_ENVS, engine="mjx", seed=9, max_episode_steps=MAX_EPISODE_STEPS)
    assert isinstance(other, BatchedEnv)
    assert torch.equal(replay(env, saved, actions), replay(other, saved, actions))
    with pytest.raises(ValueError, match=r"'elapsed_steps' has shape \[3\]; expected \[4\]"):
        saved["engine"]["elapsed_steps"] = torch.zeros(3)
        env.load_state_dict(saved)
    with pytest.raises(ValueError, match=r"The state has qpos; expected .*elapsed_steps.*qvel"):
        env.load_state_dict({**saved, "engine": {"qpos": torch.zeros(NUM_ENVS, 9)}})


def test_a_saved_state_goes_on_exactly_in_another_process(
    env: BatchedEnv, actions: torch.Tensor, tmp_path: Path
) -> None:
    env.reset()
    for action in actions[:3]:
        env.step(present(env).set("action", action))
    torch.save((env.state_dict(), actions), tmp_path / "state.pt")
    program = f"""
import torch
from envs import make_env
from tests.envs.test_mjx import MAX_EPISODE_STEPS, NUM_ENVS, replay
env = make_env("HalfCheetah-v5", NUM_ENVS, engine="mjx", seed=9, max_episode_steps=MAX_EPISODE_STEPS)
torch.save(replay(env, *torch.load({str(tmp_path / "state.pt")!r})), {str(tmp_path / "replayed.pt")!r})
"""
    subprocess.run([sys.executable, "-c", program], check=True, timeout=200, cwd=Path(__file__).parents[2])
    expected = replay(env, env.state_dict(), actions)
    assert torch.equal(torch.load(tmp_path / "replayed.pt"), expected)


def test_an_action_of_the_wrong_shape_is_refused(env: BatchedEnv) -> None:
    with pytest.raises(ValueError, match=r"action has shape \[4, 5\]; expected \[4, 6\]"):
        env.step(env.reset().set("action", torch.zeros(NUM_ENVS, 5)))


def test_a_state_of_the_wrong_shape_is_refused(env: BatchedEnv) -> None:
    with pytest.raises(ValueError, match=r"'qvel' has shape \[4, 8\]; expected \[4, 9\]"):
        env.set_state(torch.zeros(NUM_ENVS, 9), torch.zeros(NUM_ENVS, 8))


def test_actions_are_clipped_for_the_motors_and_not_for_the_reward(env: BatchedEnv) -> None:
    qpos = torch.zeros(NUM_ENVS, 9)
    actions = torch.ones(NUM_ENVS, 6) * torch.tensor([1.0, 5.0, -1.0, -5.0]).unsqueeze(-1)
    following = env.step(env.set_state(qpos, qpos).set("action", actions))["next"]
    observation, reward = following["observation"], following["reward"][:, 0]
    assert torch.equal(observation[0], observation[1]) and torch.equal(observation[2], observation[3])
    torch.testing.assert_close(reward[::2] - reward[1::2], torch.full((2,), 0.1 * 6 * (25 - 1)))


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


def test_other_users_of_mjx_get_it_as_released(env: BatchedEnv) -> None:
    from mujoco.mjx._src import collision_driver, collision_primitive, scan, solver
    from mujoco.mjx._src.types import GeomType

    env.step(env.reset().set("action", torch.zeros(NUM_ENVS, 6)))
    assert vars(collision_driver)["_COLLISION_FUNC"][GeomType.PLANE, GeomType.CAPSULE] is (
        collision_primitive.plane_capsule
    )
    for function, module in ((solver._while_loop_scan, solver), (scan.body_tree, scan)):
        assert function.__module__ == module.__name__


@pytest.mark.parametrize("other", ["mujoco", "mujoco-mjx"])
def test_another_release_is_refused_unless_allowed(monkeypatch: pytest.MonkeyPatch, other: str) -> None:
    releases = {"mujoco": "3.17.0", "mujoco-mjx": "3.17.0", other: "4.1.0"}
    monkeypatch.setattr(mjx_corrections, "version", releases.__getitem__)
    with pytest.raises(RuntimeError, match=rf"{other} is 4\.1\.0.*expected 3\.17\.0.*allow_untested_version=True"):
        make_env("HalfCheetah-v5", NUM_ENVS, engine="mjx")
    make_env("HalfCheetah-v5", NUM_ENVS, engine="mjx", engine_options={"allow_untested_version": True})


def test_a_device_that_jax_does_not_see_is_refused() -> None:
    with pytest.raises(RuntimeError, match=r"JAX does not see the device 'cuda:97'; it sees .*engine='mujoco'"):
        make_env("HalfCheetah-v5", NUM_ENVS, engine="mjx", device="cuda:97")


@dataclass(frozen=True, kw_only=True)
class Unmeasured(HalfCheetah):
    """A task of one's own."""

    name: ClassVar[str] = "Unmeasured-v0"


@dataclass(frozen=True, kw_only=True)
class Curious(HalfCheetah):
    """A task that looks at what MJX does not have."""

    reads: ClassVar[tuple[str, ...]] = ("bvh_active",)


@pytest.mark.parametrize(
    ("task", "options", "message"),
    [
        (HalfCheetah(), {"solver": "fsat"}, r"solver is 'fsat'; expected 'gymnasium', 'fast', or two numbers"),
        (HalfCheetah(), {"solver": (0, 4)}, r"solver is \(0, 4\); expected .*at least 1"),
        (Unmeasured(), {"solver": "fast"}, r"'fast' was not measured for Unmeasured-v0; expected .*solver=\(8, 16\)"),
        (HalfCheetah(), {"dtype": torch.float16}, r"dtype is torch.float16; expected torch.float32 or torch.float64"),
        (HalfCheetah(), {"impl": "cuda"}, r"impl is 'cuda'; expected 'jax' or 'warp'"),
        (HalfCheetah(), {"max_contacts": 9}, r"max_contacts is 9; expected it with impl='warp' only"),
        (HalfCheetah(), {"num_threads": 0}, r"num_threads is 0; expected at least 1, or None for one per core"),
        (HalfCheetah(), {"impl": "warp", "num_threads": 2}, r"num_threads is 2 with impl='warp' on cpu; expected None"),
        (Curious(), {}, r"reads 'bvh_active', which MJX does not have; choose engine='mujoco'"),
    ],
)
def test_a_wrong_option_is_named_with_a_valid_choice(task: HalfCheetah, options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        MJXEngine(task, NUM_ENVS, **options)


@pytest.mark.parametrize(
    ("num_envs", "num_threads", "parts"), [(32, 2, 2), (32, 3, 2), (30, 4, 3), (31, 4, 1), (15, 2, 1), (16, 9, 2)]
)
def test_a_batch_is_stepped_in_equal_parts(num_envs: int, num_threads: int, parts: int) -> None:
    assert choose_num_parts(num_envs, torch.device("cpu"), "jax", num_threads) == parts
    assert choose_num_parts(num_envs, torch.device("cuda"), "jax", None) == 1
    assert choose_num_parts(num_envs, torch.device("cpu"), "warp", None) == 1


def test_threads_change_nothing_but_the_time() -> None:
    num_envs = 16
    task = InvertedPendulum(max_episode_steps=12)
    alone, shared = (MJXEngine(task, num_envs, num_threads=count) for count in (1, 2))
    assert [len(engine._states) for engine in (alone, shared)] == [1, 2]
    actions = torch.rand(30, num_envs, 1, generator=torch.Generator().manual_seed(0)) * 6 - 3
    ended = 0
    for engine in (alone, shared):
        engine.seed(5)
    mask = torch.arange(num_envs) != 9
    assert torch.equal(alone.reset(mask), shared.reset(mask))
    for index, action in enumerate(actions):
        expected, step = alone.step(action), shared.step(action)
        for field, value in expected._asdict().items():
            assert torch.equal(getattr(step, field), value), field
        ended += int((step.terminated | step.truncated).sum())
        if index == 15:
            # They change places: a state fits any number of threads.
            states = alone.state_dict(), shared.state_dict()
            for name, value in states[0].items():
                assert torch.equal(states[1][name], value), name
            alone.load_state_dict(states[1])
            shared.load_state_dict(states[0])
    assert ended > num_envs
    assert torch.equal(alone.positions(), shared.positions())
    qpos, qvel = torch.rand(num_envs, 2) * 0.1, torch.zeros(num_envs, 2)
    assert torch.equal(alone.set_state(qpos, qvel), shared.set_state(qpos, qvel))
    assert torch.equal(shared.positions(), qpos)


def test_no_part_of_a_batch_waits_for_the_threads_of_another() -> None:
    # Of JAX's own functions for these a thread waits in them until others are free: see cho_factor.
    engine = MJXEngine(InvertedPendulum(), 2)
    waiting = {}
    for platform in ("cpu", "cuda"):
        with mjx_corrections.corrections(platform):
            # A function of its own, since JAX remembers what it has traced.
            traced = jax.make_jaxpr(lambda *given: engine._dynamics._step(*given))
            program = str(traced(engine._states[0], jnp.zeros((2, 1))))
        waiting[platform] = [name for name in ("cholesky", "triangular_solve") if name in program]
    assert waiting == {"cpu": [], "cuda": ["cholesky", "triangular_solve"]}


@pytest.mark.parametrize("size", [1, 6, 23])
def test_linear_systems_are_solved_as_jax_does(size: int) -> None:
    generator = np.random.default_rng(size)
    root = generator.standard_normal((5, size, size))
    matrix = (root @ root.transpose(0, 2, 1) + np.eye(size)).astype(np.float32)
    right = generator.standard_normal((5, size)).astype(np.float32)
    factor = jax.vmap(lambda a: mjx_corrections.cho_factor(a)[0])(matrix)
    np.testing.assert_allclose(factor, np.linalg.cholesky(matrix).transpose(0, 2, 1), rtol=1e-4, atol=1e-5)
    solution = jax.vmap(lambda upper, b: mjx_corrections.cho_solve((upper, False), b))(factor, right)
    np.testing.assert_allclose(np.einsum("bij,bj->bi", matrix, solution), right, rtol=1e-4, atol=1e-4)
    assert np.isnan(mjx_corrections.cho_factor(-jnp.eye(size))[0]).any()


def test_a_model_that_was_edited_is_read_anew(tmp_path: Path) -> None:
    path = write_model(tmp_path)
    task = Ball(xml_file=path)
    engines = [MJXEngine(task, 1) for _ in range(2)]
    write_model(tmp_path, 'mass="1"', 'mass="2"')
    engines.append(MJXEngine(task, 1))
    assert engines[0].model is engines[1].model
    assert [engine.model.body_mass[1] for engine in engines] == [1.0, 1.0, 2.0]


@pytest.fixture(scope="module")
def ball(tmp_path_factory: pytest.TempPathFactory) -> MJXEngine:
    """A ball before a wall in float64, compiled in less time than the cheetah."""
    path = write_model(tmp_path_factory.mktemp("ball"), "<worldbody>", f"<worldbody>{WALL}")
    return MJXEngine(FeelingBall(xml_file=path), 2, dtype=torch.float64)


def test_float64_is_handed_out_in_float32(ball: MJXEngine) -> None:
    env = BatchedEnv(ball)
    check_env_specs(env, seed=0)
    assert ball.state_dict()["qpos"].dtype == ball.reset(torch.ones(2, dtype=torch.bool)).dtype == torch.float64
    assert env.set_state(torch.zeros(2, 2), torch.zeros(2, 2))["observation"].dtype == torch.float32


def test_a_wall_and_forces_computed_on_demand_are_gymnasiums(ball: MJXEngine) -> None:
    reference = TaskEnv(FeelingBall, xml_file=ball.task.xml_file)
    reference.reset()
    qpos, qvel = np.zeros(2), np.array([5.0, 0.0])
    reference.set_state(qpos, qvel)
    states = [torch.from_numpy(np.stack([value, value])) for value in (qpos, qvel)]
    engines = ball, MujocoEngine(ball.task, 2)
    for engine in engines:
        engine.set_state(*states)
    largest = 0.0
    for _ in range(40):
        expected, *_ = reference.step(np.ones(1))
        largest = max(largest, np.abs(expected).max())
        for engine in engines:
            step = engine.step(torch.ones(2, 1))
            np.testing.assert_allclose(step.next_observation[1], expected, rtol=1e-5, atol=1e-5)
            np.testing.assert_allclose(step.qpos[1], reference.data.qpos, rtol=1e-5, atol=1e-5)
    # It was stopped at 0.8 m with more than its weight.
    assert largest > 100.0 and 0.5 < reference.data.qpos[0] < 0.85


def test_a_feature_that_mjx_lacks_is_named(tmp_path: Path) -> None:
    model = tmp_path / "implicit.xml"
    text = HalfCheetah().xml_path.read_text()
    assert 'timestep="0.01"' in text
    model.write_text(text.replace('timestep="0.01"', 'timestep="0.01" integrator="implicit"'))
    with pytest.raises(NotImplementedError, match=r"cannot simulate HalfCheetah-v5.*mjINT_IMPLICIT.*engine='mujoco'"):
        MJXEngine(HalfCheetah(xml_file=str(model)), NUM_ENVS)


def test_the_bridge_shares_memory() -> None:
    from envs.bridge import to_jax, to_torch

    tensor = torch.zeros(64, 17)
    array = to_jax(tensor)
    assert array.unsafe_buffer_pointer() == tensor.data_ptr()
    assert to_torch(array).data_ptr() == tensor.data_ptr()


def test_the_bridge_copies_what_is_not_aligned() -> None:
    from envs.bridge import to_jax

    tensor = torch.arange(7.0)[1:]
    assert to_jax(tensor).tolist() == tensor.tolist()


@pytest.fixture
def gpu() -> Iterator[str]:
    if not torch.cuda.is_available():
        pytest.skip("needs a CUDA device")
    yield "cuda"


@pytest.mark.gpu
def test_a_gpu_steps_as_the_cpu_does(env: BatchedEnv, actions: torch.Tensor, gpu: str) -> None:
    on_gpu = make_env("HalfCheetah-v5", NUM_ENVS, device=gpu, max_episode_steps=MAX_EPISODE_STEPS)
    assert isinstance(on_gpu, BatchedEnv)
    check_env_specs(on_gpu)
    env.reset()
    for action in actions:
        on_gpu.load_state_dict(env.state_dict())
        expected = env.step(present(env).set("action", action))["next"]
        following = on_gpu.step(present(on_gpu).set("action", action.to(gpu)))["next"]
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


def replay(env: BatchedEnv, saved: dict[str, Any], actions: torch.Tensor) -> torch.Tensor:
    """Next observations from a saved state on; past the time limit, so that random initial states are among them."""
    env.load_state_dict(saved)
    following, observations = present(env), []
    for action in actions:
        stepped, following = env.step_and_maybe_reset(following.set("action", action))
        observations.append(stepped["next", "observation"].clone())
    return torch.stack(observations)


def present(env: BatchedEnv) -> TensorDict:
    """The observations that the environments are at."""
    return TensorDict({"observation": env.state_dict()["observation"]}, env.batch_size)
