"""Frames of a simulation, drawn by Gymnasium's own MuJoCo renderer."""

from __future__ import annotations

import os
from typing import Any

import numpy as np
import torch

from envs.task import Model


class Renderer:
    """Draws a model at given positions.

    Without a display MuJoCo renders through OSMesa unless ``MUJOCO_GL`` says otherwise.

    Args:
        model: the ``mujoco.MjModel``.
        width: of a frame, in pixels.
        height: of a frame, in pixels.
        camera: its name in the model; None for Gymnasium's choice.

    Raises:
        ValueError: for a camera that the model does not have.
    """

    def __init__(self, model: Model, width: int, height: int, camera: str | None = None) -> None:
        # Imported on use: most environments are never drawn.
        import mujoco
        from gymnasium.envs.mujoco.mujoco_rendering import MujocoRenderer

        if "DISPLAY" not in os.environ:
            os.environ.setdefault("MUJOCO_GL", "osmesa")
        cameras = [model.camera(index).name for index in range(model.ncam)]
        if camera is not None and camera not in cameras:
            raise ValueError(f"There is no camera {camera!r} in the model, which has {cameras}.")
        self._mujoco: Any = mujoco
        self._model = model
        # MuJoCo draws into a buffer of the model's own size.
        model.vis.global_.offwidth = max(model.vis.global_.offwidth, width)
        model.vis.global_.offheight = max(model.vis.global_.offheight, height)
        self._data = self._mujoco.MjData(model)
        self._renderer = MujocoRenderer(model, self._data, width=width, height=height, camera_name=camera)
        self.view = (width, height, camera)

    def frame(self, qpos: np.ndarray) -> torch.Tensor:
        """The frame [height, width, 3], uint8, of positions [nq]."""
        self._data.qpos[:] = qpos
        self._mujoco.mj_forward(self._model, self._data)
        frame: Any = self._renderer.render("rgb_array")
        return torch.from_numpy(np.array(frame))
