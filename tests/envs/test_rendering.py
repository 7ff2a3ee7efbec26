"""Frames of chosen environments, for people and for TorchRL's video recorder."""

from __future__ import annotations

import ctypes.util
from pathlib import Path

import pytest
import torch
from torchrl.envs import TransformedEnv
from torchrl.record import CSVLogger, PixelRenderTransform, VideoRecorder

from envs import make_env
from envs.batched import BatchedEnv

pytestmark = pytest.mark.skipif(
    ctypes.util.find_library("OSMesa") is None, reason="needs OSMesa (libosmesa6) to render without a display"
)


def make(num_envs: int = 3) -> BatchedEnv:
    env = make_env("HalfCheetah-v5", num_envs, engine="mujoco", seed=1)
    assert isinstance(env, BatchedEnv)
    env.reset()
    return env


def test_frames_show_their_environments() -> None:
    env = make()
    state = torch.zeros(3, 9, dtype=torch.float64)
    state[1, 2] = 1.5  # this one stands on its head
    env.set_state(state, torch.zeros_like(state))
    frames = env.render(width=64, height=48)
    assert frames.shape == (3, 48, 64, 3) and frames.dtype == torch.uint8
    assert frames.float().std() > 10
    assert torch.equal(frames[0], frames[2]) and not torch.equal(frames[0], frames[1])
    assert torch.equal(env.render([2, 1], width=64, height=48), frames[[2, 1]])
    assert torch.equal(env.render(1, width=64, height=48), frames[1])


@pytest.mark.parametrize("engine", ["mujoco", pytest.param("mjx", marks=pytest.mark.slow)])
def test_an_ended_episode_is_shown_where_it_ended(engine: str) -> None:
    env = make_env("InvertedPendulum-v5", 4, engine=engine, seed=1, max_episode_steps=6)
    assert isinstance(env, BatchedEnv)
    state = torch.zeros(4, 2)
    state[:, 0] = torch.tensor([0.5, 0.5, -0.5, 0.0])
    velocity = torch.zeros(4, 2)
    velocity[1, 1] = 6.0  # beyond 0.2 rad in a step of 0.04 s
    action = torch.zeros(4, 1)
    following = env.step(env.set_state(state, velocity).set("action", action))["next"]
    assert following["terminated"][:, 0].tolist() == [False, True, False, False]
    last = env.render(width=64, height=48)
    env.reset(following.clone().set("_reset", following["terminated"]))
    after = env.render(width=64, height=48)
    assert torch.equal(after[[0, 2, 3]], last[[0, 2, 3]]) and not torch.equal(after[1], last[1])
    # What is observed of a pendulum is its positions and velocities.
    env.set_state(following["observation"][:, :2], following["observation"][:, 2:])
    difference = env.render(width=64, height=48).float() - last.float()
    # The positions were rounded to float32 in between, which a pixel on an edge may show.
    assert difference.abs().mean() < 0.1 < (after[1].float() - last[1].float()).abs().mean()


def test_rendering_does_not_disturb_the_simulation() -> None:
    env, undisturbed = make(), make()
    env.render(width=32, height=32)
    for name, value in env.state_dict()["engine"].items():
        assert torch.equal(value, undisturbed.state_dict()["engine"][name]), name


def test_torchrls_recorder_films_it(tmp_path: Path) -> None:
    env = TransformedEnv(make(), PixelRenderTransform(environments=0, width=64, height=48))
    recorder = VideoRecorder(CSVLogger("film", log_dir=str(tmp_path), video_format="pt"), tag="cheetah")
    env.append_transform(recorder)
    env.rollout(5)
    recorder.dump()
    (film,) = tmp_path.rglob("*.pt")
    frames = torch.load(film, weights_only=True)
    # The first frame and one for each step.
    assert frames.shape[-3:] == (3, 48, 64) and frames.shape[-4] in (5, 6)


def test_an_environment_or_camera_that_does_not_exist_is_named() -> None:
    with pytest.raises(IndexError, match="There is no environment 3; expected 0 to 2"):
        make().render([0, 3])
    with pytest.raises(ValueError, match=r"There is no camera 'side' in the model, which has \['track'\]"):
        make().render(camera="side")
