"""Where MJX is not MuJoCo: which release was compared with Gymnasium, and what is corrected in it.

Corrections replace three of MJX's functions only while this package's own functions are traced, so other users of MJX in
the same process get it as it was released.
"""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Callable, Iterator
from importlib.metadata import version
from typing import Any

import jax
import jax.numpy as jnp
from mujoco.mjx._src import collision_driver, collision_primitive, scan, solver
from mujoco.mjx._src.types import GeomType

TESTED_VERSION = "3.17.0"
"""The release of mujoco and mujoco-mjx whose steps were compared with Gymnasium's (``benchmarks/mjx_parity.py``)."""

_TRACING = threading.RLock()


def check_version(allow_untested: bool) -> None:
    """Refuses releases whose physics was not compared with Gymnasium's.

    Args:
        allow_untested: lets any other release pass.

    Raises:
        RuntimeError: if mujoco or mujoco-mjx is of another release than ``TESTED_VERSION``.
    """
    found = {package: version(package) for package in ("mujoco", "mujoco-mjx")}
    if allow_untested or set(found.values()) == {TESTED_VERSION}:
        return
    raise RuntimeError(
        f"mujoco is {found['mujoco']} and mujoco-mjx is {found['mujoco-mjx']}; expected {TESTED_VERSION} of both, whose "
        f"physics was compared with Gymnasium's. Install them (pip install mujoco=={TESTED_VERSION} "
        f"mujoco-mjx=={TESTED_VERSION}), or use these with allow_untested_version=True."
    )


@contextlib.contextmanager
def corrections() -> Iterator[None]:
    """While it lasts, MJX is traced with the corrections; in the tested release, the only one they were made for."""
    if version("mujoco-mjx") != TESTED_VERSION:
        yield
        return
    collisions: dict[Any, Any] = collision_driver._COLLISION_FUNC
    pair = (GeomType.PLANE, GeomType.CAPSULE)
    with _TRACING:
        released = collisions[pair], solver._while_loop_scan, scan.body_tree
        collisions[pair], solver._while_loop_scan = plane_capsule, while_loop
        scan.body_tree = with_barriers(released[2])
        try:
            yield
        finally:
            collisions[pair], solver._while_loop_scan, scan.body_tree = released


@collision_primitive.collider(ncon=2)
def plane_capsule(plane: Any, capsule: Any) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Distances, points and frames of a capsule's two contacts with a plane.

    As in C (``mjc_PlaneCapsule``, ``mju_makeFrame``), the first tangent is the capsule's axis projected onto the plane.
    MJX takes another for steep capsules; and friction, whose cone is a pyramid, depends on where its edges point: Ant
    was off by up to 1.3 in velocity after one step.
    """
    normal, axis = plane.mat[:, 2], capsule.mat[:, 2]
    projected = axis - normal * jnp.dot(normal, axis)
    length = jnp.sqrt(jnp.sum(projected**2))
    # An axis along the normal has no projection; C's mju_normalize3 then gives the x axis.
    upright = length < 1e-15
    tangent = jnp.where(upright, jnp.array([1.0, 0.0, 0.0]), projected / jnp.where(upright, 1.0, length))
    frame = jnp.stack([normal, tangent, jnp.cross(normal, tangent)])
    half = axis * capsule.size[1]
    contacts = [
        collision_primitive._plane_sphere(normal, plane.pos, capsule.pos + offset, capsule.size[0])
        for offset in (half, -half)
    ]
    distances, points = (jnp.stack(values) for values in zip(*contacts, strict=True))
    return distances, points, jnp.stack([frame, frame])


def while_loop(
    condition: Callable[[Any], jax.Array], body: Callable[[Any], Any], start: Any, max_iterations: int
) -> Any:
    """The line search's loop, which ends when every environment's search has.

    MJX makes it a scan over all ``ls_iterations`` so that it can be differentiated backwards: in a batch, Gymnasium's 50
    iterations are computed where a handful do anything. The results are the same.
    """
    del max_iterations  # the condition counts too
    return jax.lax.while_loop(condition, body, start)


def with_barriers(body_tree: Callable[..., Any]) -> Callable[..., Any]:
    """MJX's passes over the tree of bodies, with each body's result computed once.

    XLA would fuse a chain of bodies into one loop, in which every body computes all bodies above it anew, so the work
    doubles with each: Pusher's arm took 4.9 s for the kinematics of 16 environments on a CPU, and takes 2.7 ms so.
    """

    def passes(model: Any, function: Callable[..., Any], *arguments: Any, **options: Any) -> Any:
        def barred(*values: Any) -> Any:
            return jax.lax.optimization_barrier(function(*values))

        return body_tree(model, barred, *arguments, **options)

    return passes
