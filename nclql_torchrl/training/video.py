"""One episode as an mp4."""

from __future__ import annotations

import importlib.util
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import gymnasium
import numpy as np
import torch
from tensordict import TensorDict
from torchrl.envs.utils import ExplorationType, set_exploration_type

from envs.models import silent_deprecations
from nclql_torchrl.actor import LangevinActor


class VideoError(RuntimeError):
    """No video could be written; the message says in one sentence what is missing."""


@torch.no_grad()
def record_episode(
    actor: LangevinActor, task: str, path: Path, seed: int, task_options: Mapping[str, Any] | None = None
) -> None:
    """Plays one episode without exploration noise and writes what the camera sees.

    Without a display MuJoCo renders through OSMesa unless ``MUJOCO_GL`` says otherwise.

    Args:
        actor: the policy.
        task: Gymnasium id.
        path: the mp4 to write; a file there is replaced.
        seed: of the environment.
        task_options: options of the task's constructor.

    Raises:
        VideoError: if a renderer or the encoder is missing.
    """
    if importlib.util.find_spec("imageio_ffmpeg") is None:
        raise VideoError("No video: imageio-ffmpeg is not installed; pip install 'nclql-torchrl[video]'.")
    import imageio_ffmpeg

    if "DISPLAY" not in os.environ:
        os.environ.setdefault("MUJOCO_GL", "osmesa")
    device = actor.deterministic_start.device
    try:
        with silent_deprecations():
            env = gymnasium.make(task, render_mode="rgb_array", **(task_options or {}))
        observation, _ = env.reset(seed=seed)
        frame = np.asarray(env.render())
    # Renderers fail in their own ways: ImportError, AttributeError, gymnasium's errors, mujoco.FatalError...
    except Exception as error:
        raise VideoError(
            f"No video: {task} cannot be rendered here ({type(error).__name__}: {error}); without a display, install "
            "OSMesa (libosmesa6) and set MUJOCO_GL=osmesa, or use a GPU with MUJOCO_GL=egl."
        ) from error
    temporary = path.with_suffix(".tmp.mp4")
    height, width = frame.shape[:2]
    fps = env.metadata.get("render_fps", 30)
    writer = imageio_ffmpeg.write_frames(str(temporary), (width, height), fps=fps, macro_block_size=2)
    writer.send(None)
    done = False
    carried = TensorDict({}, [])
    with set_exploration_type(ExplorationType.DETERMINISTIC):
        while not done:
            writer.send(np.ascontiguousarray(frame))
            inputs = torch.as_tensor(observation, dtype=torch.get_default_dtype(), device=device)
            tensordict = actor(carried.set("observation", inputs))
            # A warm-started actor leaves its previous action here.
            carried = tensordict.get("next", TensorDict({}, []))
            observation, _, terminated, truncated, _ = env.step(tensordict["action"].cpu().numpy())
            done = terminated or truncated
            frame = np.asarray(env.render())
    writer.close()
    env.close()
    os.replace(temporary, path)
