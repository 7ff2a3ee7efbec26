"""Where MJX is not MuJoCo: which release was compared with Gymnasium, and what is corrected in it.

One correction makes MJX compute what MuJoCo does: :func:`plane_capsule`. Others compute the same numbers in less time:
:func:`while_loop`, :func:`with_barriers`, :func:`step`. On a CPU, :func:`cho_factor` and :func:`cho_solve` let several
threads do so at a time. MJX's functions are replaced only while this package's
own functions are traced, so other users of MJX in the same process get it as it was released.
"""

from __future__ import annotations

import contextlib
import io
import threading
from collections.abc import Callable, Iterator
from importlib.metadata import version
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

with contextlib.redirect_stdout(io.StringIO()):  # MJX prints it if there is no Warp.
    from mujoco import mjx as _mjx
    from mujoco.mjx._src import collision_driver, collision_primitive, forward, scan, solver
    from mujoco.mjx._src.types import GeomType

mjx: Any = _mjx  # its types say less than is true

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
        f"mujoco is {found['mujoco']} and mujoco-mjx is {found['mujoco-mjx']}; expected {TESTED_VERSION} of both, "
        f"whose physics was compared with Gymnasium's. Install them (pip install mujoco=={TESTED_VERSION} "
        f"mujoco-mjx=={TESTED_VERSION}), or use these with allow_untested_version=True."
    )


def corrected_release() -> bool:
    """Whether the corrections were made for the installed release."""
    return version("mujoco-mjx") == TESTED_VERSION


@contextlib.contextmanager
def corrections(platform: str) -> Iterator[None]:
    """While it lasts, MJX is traced with the corrections; in the tested release, the only one they were made for.

    Args:
        platform: JAX's name of the kind of device that it is traced for.
    """
    if not corrected_release():
        yield
        return
    replacements: list[Any] = [
        (collision_driver._COLLISION_FUNC, (GeomType.PLANE, GeomType.CAPSULE), plane_capsule),
        (vars(solver), "_while_loop_scan", while_loop),
        (vars(scan), "body_tree", with_barriers(scan.body_tree)),
    ]
    if platform == "cpu":
        linalg = vars(jax.scipy.linalg)
        replacements += [(linalg, "cho_factor", cho_factor), (linalg, "cho_solve", cho_solve)]
    with _TRACING:
        released = [table[name] for table, name, _ in replacements]
        for table, name, corrected in replacements:
            table[name] = corrected
        try:
            yield
        finally:
            for (table, name, _), original in zip(replacements, released, strict=True):
                table[name] = original


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

    MJX makes it a scan over all ``ls_iterations`` so that it can be differentiated backwards: in a batch, Gymnasium's
    50 iterations are computed where a handful do anything. The results are the same.
    """
    del max_iterations  # the condition counts too
    return jax.lax.while_loop(condition, body, start)


def cho_factor(a: jax.Array) -> tuple[jax.Array, bool]:
    """The upper triangular factor of a symmetric positive definite matrix, U' U = ``a``, as JAX's own function has it.

    JAX 0.10 hands a batch of matrices to LAPACK in tasks for its few threads, and what hands them out is one of these
    and waits. With as many programs at a time as there are threads, all of them waited for ever: two halves of 200
    Humanoids stopped in their second step. XLA's own loops wait for nobody. A matrix that is not positive definite
    gives NaN, as there.
    """
    size = a.shape[-1]

    def eliminate(index: jax.Array, rest: jax.Array) -> jax.Array:
        row = jnp.where(jnp.arange(size) >= index, rest[index] / jnp.sqrt(rest[index, index]), 0.0)
        return (rest - row[:, None] * row).at[index].set(row)

    return jax.lax.fori_loop(0, size, eliminate, a), False


def cho_solve(factor: tuple[jax.Array, bool], b: jax.Array) -> jax.Array:
    """Solves U' U x = ``b`` [size] for :func:`cho_factor`'s U."""
    upper, _ = factor
    size = upper.shape[-1]

    def forward_step(index: jax.Array, rest: jax.Array) -> jax.Array:
        value = rest[index] / upper[index, index]
        return (rest - upper[index] * value).at[index].set(value)

    def backward_step(count: jax.Array, solution: jax.Array) -> jax.Array:
        index = size - 1 - count
        known = jnp.sum(upper[index] * solution)
        return solution.at[index].set((halfway[index] - known) / upper[index, index])

    halfway = jax.lax.fori_loop(0, size, forward_step, b)
    return jax.lax.fori_loop(0, size, backward_step, jnp.zeros_like(b))


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


def step(model: Any, data: Any) -> Any:
    """``mjx.step``, with Runge-Kutta's method as a loop over its four stages.

    MJX unrolls the stages, so that forward dynamics are compiled four times; here compiling takes a third of the time.
    """
    if model.impl != mjx.Impl.JAX or model.opt.integrator != mjx.IntegratorType.RK4 or not corrected_release():
        return mjx.step(model, data)
    timestep, jnt_type = model.opt.timestep, model.jnt_type
    start = data

    def integrate(joints: Any, qpos: jax.Array, qvel: jax.Array) -> jax.Array:
        return forward._integrate_pos(joints, qpos, qvel, dt=timestep)

    def stage(carry: Any, tableau: jax.Array) -> tuple[Any, None]:
        data, sums = carry
        ahead, weight = tableau
        data = data.replace(
            qpos=scan.flat(model, integrate, "jqv", "q", jnt_type, start.qpos, ahead * data.qvel),
            qvel=start.qvel + ahead * data.qacc * timestep,
            act=start.act + ahead * data.act_dot * timestep,
            time=start.time + ahead * timestep,
        )
        data = same_types(mjx.forward(model, data), data)
        rates = data.qvel, data.qacc, data.act_dot
        return (data, tuple(total + weight * rate for total, rate in zip(sums, rates, strict=True))), None

    # How far ahead of the start a stage is, in steps, and what its rates weigh.
    tableau = jnp.asarray(np.array([[0.0, 1 / 6], [0.5, 1 / 3], [0.5, 1 / 3], [1.0, 1 / 6]]), start.qvel.dtype)
    sums = tuple(jnp.zeros_like(rate) for rate in (start.qvel, start.qacc, start.act_dot))
    # At the start itself nothing must come from the step before, not even times zero.
    first = start.replace(qacc=jnp.zeros_like(start.qacc), act_dot=jnp.zeros_like(start.act_dot))
    (data, (qvel, qacc, act_dot)), _ = jax.lax.scan(stage, (first, sums), tableau)
    data = data.replace(qpos=start.qpos, qvel=start.qvel, act=start.act, time=start.time)
    return forward._advance(model, data, act_dot, qacc, qvel)


def same_types(new: Any, old: Any) -> Any:
    """``new`` with the types of ``old``: in float64 some of MJX's integers change theirs, which a scan may not."""
    return jax.tree.map(lambda value, model: value.astype(model.dtype), new, old)
