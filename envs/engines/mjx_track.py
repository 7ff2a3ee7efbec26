"""Whether an agent may be moved along its track without anybody noticing, which the model decides and not the task."""

from __future__ import annotations

from typing import Any

import mujoco as _mujoco
import numpy as np

from envs.task import Model, Task

mujoco: Any = _mujoco  # its compiled functions have no type stubs


def may_be_recentred(task: Task, model: Model) -> bool:
    """Whether neither physics nor what the task makes of it depends on where along its track the agent is.

    Obstacles, terrain, walls across the track, and springs, limits or motors that hold the agent to a place forbid it.

    Examples:
        >>> from envs.tasks.half_cheetah import HalfCheetah
        >>> may_be_recentred(HalfCheetah(), HalfCheetah().load_model())
        True
    """
    if task.observes_track or not task.track:
        return False
    return all(same_along(model, coordinate) for coordinate in task.track) and seen_alike(task, model)


def same_along(model: Model, coordinate: int) -> bool:
    """Whether a model's physics is the same wherever it is along a coordinate of ``qpos``.

    So it is if the coordinate carries one whole tree of bodies in a fixed direction, all else is planes along that
    direction, which are infinite, and nothing ties the tree to a place. Where that is not certain, the answer is no.
    """
    data = mujoco.MjData(model)
    mujoco.mj_kinematics(model, data)
    joint = int(np.searchsorted(model.jnt_qposadr, coordinate, side="right")) - 1
    body = model.jnt_bodyid[joint]
    # Joints of a body act in turn: one that turns it would turn the axes of those after it.
    up_to = model.jnt_type[model.body_jntadr[body] : joint + 1]
    if model.jnt_type[joint] == mujoco.mjtJoint.mjJNT_FREE and coordinate < model.jnt_qposadr[joint] + 3:
        direction = np.eye(3)[coordinate - model.jnt_qposadr[joint]]
    elif model.body_parentid[body] == 0 and (up_to == mujoco.mjtJoint.mjJNT_SLIDE).all():
        direction = data.xaxis[joint]
    else:
        return False
    elsewhere = model.body_rootid[model.geom_bodyid] != body
    planes = model.geom_type[elsewhere] == mujoco.mjtGeom.mjGEOM_PLANE
    slopes = np.abs(data.geom_xmat[elsewhere][:, 2::3] @ direction)  # of their normals, the matrices' last columns
    # Tendons and motors that act on anything but joints may pull towards a place, and so may those on this joint.
    on_joints = np.isin(model.actuator_trntype, (mujoco.mjtTrn.mjTRN_JOINT, mujoco.mjtTrn.mjTRN_JOINTINPARENT)).all()
    on_joints &= (model.wrap_type == mujoco.mjtWrap.mjWRAP_JOINT).all()
    tied = model.jnt_limited[joint] or model.jnt_stiffness[joint] or model.neq or model.nflex
    tied = tied or joint in model.wrap_objid or joint in model.actuator_trnid[:, 0]
    return bool(planes.all() and (slopes < np.finfo(np.float32).eps).all() and on_joints and not tied)


def seen_alike(task: Task, model: Model) -> bool:
    """Whether, a metre on along each coordinate of the track, only the task's position differs, by that metre."""
    data, action, still = mujoco.MjData(model), np.zeros(model.nu), np.zeros(len(task.track))

    def seen() -> tuple[np.ndarray, np.ndarray]:
        mujoco.mj_forward(model, data)
        rest = (
            task.observe(np, model, data),
            task.reward(np, model, data, action, still),
            task.terminated(np, model, data),
        )
        return np.array(task.position(np, model, data)), np.concatenate([np.ravel(value) for value in rest])

    for number, coordinate in enumerate(task.track):
        position, rest = seen()
        position[number] += 1.0
        data.qpos[coordinate] += 1.0
        if not all(map(np.allclose, seen(), (position, rest))):
            return False
    return True
