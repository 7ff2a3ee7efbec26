"""A task's transitions in MJX, as compiled pure functions of a batch of states."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, fields
from types import SimpleNamespace
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import mujoco as _mujoco
import numpy as np

from envs.batched import LARGEST_NUMBER
from envs.engines.mjx_corrections import corrections, mjx, same_types, step
from envs.engines.mjx_track import may_be_recentred
from envs.engines.mjx_warp import OVERFLOWS, Room
from envs.task import POSTCONSTRAINT_FIELDS, Model, Physics, Task

mujoco: Any = _mujoco  # its compiled functions have no type stubs

State = dict[str, jax.Array]
"""Of every environment: "qpos", "qvel", "qacc_warmstart" and "act" as in ``MjData``; "position", the task's, after the
last step; "origin", where the track's coordinates are counted from; "observation", the present one; "elapsed_steps",
control steps of this episode; "episode", the number of episodes begun; "key", the random key; "overflow", which of
Warp's buffers were too small."""


class Transition(NamedTuple):
    """What one control step yields besides the new state: the entries of :class:`~envs.batched.Step`, in its order."""

    next_observation: jax.Array
    reward: jax.Array
    terminated: jax.Array
    truncated: jax.Array
    diverged: jax.Array
    observation: jax.Array
    qpos: jax.Array


class Random:
    """The draws of one reset, as :class:`envs.task.Random` asks for them."""

    def __init__(self, key: jax.Array) -> None:
        self.key = key

    def _next_key(self) -> jax.Array:
        self.key, key = jax.random.split(self.key)
        return key

    def uniform(self, low: float, high: float, size: int | tuple[int, ...]) -> jax.Array:
        """Draws of shape ``size``, uniform in [low, high)."""
        return jax.random.uniform(self._next_key(), shape(size), minval=low, maxval=high)

    def standard_normal(self, size: int | tuple[int, ...]) -> jax.Array:
        """Draws of shape ``size`` from the standard normal distribution."""
        return jax.random.normal(self._next_key(), shape(size))


def shape(size: int | tuple[int, ...]) -> tuple[int, ...]:
    """NumPy's ``size`` as JAX has it."""
    return (size,) if isinstance(size, int) else size


@dataclass(frozen=True)
class Settings:
    """How MJX simulates a task; see :class:`~envs.engines.mjx.MJXEngine`."""

    device: Any
    float64: bool
    iterations: int
    """Of the constraint solver, at most."""
    ls_iterations: int
    """Of a solver iteration's line search, at most."""
    warp: Room | None
    """Room for the contacts of all environments together, and for the constraints of each; None steps in JAX."""


def load_model(task: Task) -> Model:
    """The task's model with a solver that MJX has: Newton's method in place of projected Gauss-Seidel."""
    model = task.load_model()
    if model.opt.solver == mujoco.mjtSolver.mjSOL_PGS:
        model.opt.solver = mujoco.mjtSolver.mjSOL_NEWTON
    return model


class Dynamics:
    """Compiled transitions of one task; what they compute is described at :class:`~envs.engines.mjx.MJXEngine`.

    Args:
        task: what to simulate.
        settings: how.

    Raises:
        NotImplementedError: if MJX cannot simulate the task's model; says why.
        ValueError: for a task that reads a field which MJX does not have.
    """

    def __init__(self, task: Task, settings: Settings) -> None:
        self.task = task
        self.settings = settings
        self.model = load_model(task)
        self.model.opt.iterations = settings.iterations
        self.model.opt.ls_iterations = settings.ls_iterations
        self._control_timestep = task.control_timestep(self.model)
        self._forces = POSTCONSTRAINT_FIELDS & set(task.reads)
        self._carried = ("qpos", "qvel", "qacc_warmstart", "act")
        with jax.enable_x64(settings.float64):
            self._mjx_model, self._template = self._put_model()
        self._public = {field.name for field in fields(mjx.Data)}
        for name in task.reads:
            if name not in self._public and not hasattr(self._template._impl, name):
                raise ValueError(f"{task.name} reads {name!r}, which MJX does not have; choose engine='mujoco'.")
        self._recentred = may_be_recentred(task, self.model)
        # Each gives the new state, what is handed out, and whether one of Warp's buffers was too small.
        self.step = self._compiled(self._step)
        self.reset = self._compiled(self._reset)
        self.set_state = self._compiled(self._set_state)

    def _put_model(self) -> tuple[Any, Any]:
        device, warp = self.settings.device, self.settings.warp
        try:
            if warp is None:
                return (
                    mjx.put_model(self.model, device=device, impl="jax"),
                    mjx.make_data(self.model, device=device, impl="jax"),
                )
            model = mjx.put_model(self.model, device=device, impl="warp")
            if self._forces:
                model = model.tree_replace({"opt._impl.run_rne_postconstraint": True})
            data = mjx.make_data(self.model, device=device, impl="warp", naconmax=warp.contacts, njmax=warp.constraints)
            return model, data
        except (NotImplementedError, ValueError) as error:
            raise NotImplementedError(
                f"MJX cannot simulate {self.task.name} ({self.task.xml_path}): it has no {error}. Choose "
                "engine='mujoco', which has all of MuJoCo."
            ) from error

    def _compiled(self, function: Callable[..., Any]) -> Callable[..., Any]:
        """A function of a donated state and further arrays, compiled on first use."""

        def traced(state: State, *arguments: jax.Array) -> Any:
            # By default JAX multiplies matrices in TensorFloat-32 on recent GPUs: its three digits are too few here.
            with corrections(self.settings.device.platform), jax.default_matmul_precision("highest"):
                return function(state, *arguments)

        # On a CPU the other emitters take twice as long to compile, and the code is no faster. Products that are split
        # among threads would take those in which other parts of the batch are stepped.
        on_cpu = self.settings.device.platform == "cpu"
        options = {"xla_cpu_use_fusion_emitters": False, "xla_cpu_multi_thread_eigen": False} if on_cpu else None
        compiled = jax.jit(traced, donate_argnums=0, compiler_options=options)

        def called(state: State, *arguments: jax.Array) -> Any:
            with jax.enable_x64(self.settings.float64):
                return compiled(state, *arguments)

        return called

    def initial_state(self, num_envs: int) -> dict[str, np.ndarray]:
        """A batch at the model's own initial state, before any episode; C MuJoCo computes it without compiling."""
        data = mujoco.MjData(self.model)
        mujoco.mj_forward(self.model, data)
        row = {name: np.array(getattr(data, name)) for name in self._carried} | {
            "position": np.array(self.task.position(np, self.model, data)),
            "origin": np.zeros(len(self.task.track)),
            "observation": np.array(self.task.observe(np, self.model, data)),
        }
        real = np.float64 if self.settings.float64 else np.float32
        state = {name: np.tile(value.astype(real), (num_envs, 1)) for name, value in row.items()}
        state["qacc_warmstart"][:] = 0.0
        counters = {name: np.zeros(num_envs, np.int32) for name in ("elapsed_steps", "episode", "overflow")}
        return {**state, **counters, "key": np.zeros((num_envs, 2), np.uint32)}

    def _step(self, state: State, action: jax.Array) -> tuple[State, Transition, jax.Array]:
        state, transition = jax.vmap(self._step_one)(state, action)
        return state, transition, state["overflow"].any()

    def _step_one(self, state: State, action: jax.Array) -> tuple[State, Transition]:
        task, model = self.task, self.model
        state = self._recentre(state)
        # MJX clips what drives the actuators, as MuJoCo does.
        control = action.astype(self._template.ctrl.dtype)
        before = self._template.replace(ctrl=control, **{name: state[name] for name in self._carried})

        def substep(data: Any, _: None) -> tuple[Any, None]:
            return same_types(step(self._mjx_model, data), data), None

        after, _ = jax.lax.scan(substep, before, length=task.frame_skip)
        if self._forces and self.settings.warp is None:
            after = mjx.rne_postconstraint(self._mjx_model, after)
        physics = self._physics(after)

        position = task.position(jnp, model, physics)
        velocity = (position - state["position"]) / self._control_timestep
        observation = task.observe(jnp, model, physics).astype(after.qpos.dtype)
        reward = jnp.asarray(task.reward(jnp, model, physics, action, velocity), after.qpos.dtype)
        lost = ~(
            (jnp.abs(after.qpos).max() <= LARGEST_NUMBER)
            & (jnp.abs(after.qvel).max() <= LARGEST_NUMBER)
            & jnp.isfinite(observation).all()
            & jnp.isfinite(reward)
        )
        observation = jnp.where(lost, 0.0, observation)
        elapsed_steps = state["elapsed_steps"] + 1
        terminated = task.terminated(jnp, model, physics) | lost
        truncated = elapsed_steps >= task.max_episode_steps
        reached = state | {name: getattr(after, name) for name in self._carried}
        reached |= {"position": position, "observation": observation, "elapsed_steps": elapsed_steps}
        if self.settings.warp is not None:
            reached["overflow"] = self._overflow(state, after)
        following = self._select(terminated | truncated, self._begin(reached), reached)
        transition = Transition(
            next_observation=observation,
            reward=jnp.where(lost, 0.0, reward),
            terminated=terminated,
            truncated=truncated,
            diverged=lost,
            observation=following["observation"],
            qpos=self._uncentred(reached),
        )
        return following, transition

    def _recentre(self, state: State) -> State:
        """The state with the agent back at the track's origin, where float32 is finest, if nobody can see it."""
        if not self._recentred:
            return state
        track = np.array(self.task.track)
        travelled = state["qpos"][track]
        return state | {
            "qpos": state["qpos"].at[track].set(0.0),
            "position": state["position"] - travelled,
            "origin": state["origin"] + travelled,
        }

    def _uncentred(self, state: State) -> jax.Array:
        """Positions [nq] where the agent really is."""
        if not self._recentred:
            return state["qpos"]
        return state["qpos"].at[np.array(self.task.track)].add(state["origin"])

    @staticmethod
    def _overflow(state: State, data: Any) -> jax.Array:
        """Which of Warp's buffers were too small at any time, ``data`` included."""
        return state["overflow"] | (data._impl.overflow & OVERFLOWS)

    def _reset(self, state: State, mask: jax.Array) -> tuple[State, tuple[jax.Array], jax.Array]:
        state = jax.vmap(lambda state, chosen: self._select(chosen, self._begin(state), state))(state, mask)
        # Twice, since the state's own copy is donated to the next step.
        return state, (state["observation"],), state["overflow"].any()

    def _set_state(self, state: State, qpos: jax.Array, qvel: jax.Array) -> tuple[State, tuple[jax.Array], jax.Array]:
        state = jax.vmap(self._begin_at)(state, qpos, qvel)
        return state, (state["observation"],), state["overflow"].any()

    def _begin(self, state: State) -> State:
        """The state at the start of the environment's next episode: a function of its key and the episode's number."""
        random = Random(jax.random.fold_in(jax.random.wrap_key_data(state["key"]), state["episode"]))
        qpos, qvel = self.task.reset(jnp, random, self.model)
        return self._begin_at(state | {"episode": state["episode"] + 1}, qpos, qvel)

    def _begin_at(self, state: State, qpos: jax.Array, qvel: jax.Array) -> State:
        real = self._template.qpos.dtype
        data = self._template.replace(qpos=jnp.asarray(qpos, real), qvel=jnp.asarray(qvel, real))
        if self.task.reads:
            # Of this, XLA compiles only what the task looks at: for most tasks, where the bodies are.
            data = mjx.forward(self._mjx_model, data)
        # These forces are those of a step, and there was none.
        physics = self._physics(data, **{name: jnp.zeros((self.model.nbody, 6), real) for name in self._forces})
        if self.settings.warp is not None:
            state = state | {"overflow": self._overflow(state, data)}
        return state | {
            **{name: getattr(data, name) for name in self._carried},
            "qacc_warmstart": jnp.zeros_like(state["qacc_warmstart"]),
            "position": self.task.position(jnp, self.model, physics).astype(real),
            "origin": jnp.zeros_like(state["origin"]),
            "observation": self.task.observe(jnp, self.model, physics).astype(real),
            "elapsed_steps": jnp.zeros_like(state["elapsed_steps"]),
        }

    def _physics(self, data: Any, **given: jax.Array) -> Physics:
        """What the task reads."""
        reads = {name: getattr(data if name in self._public else data._impl, name) for name in self.task.reads}
        physics: Any = SimpleNamespace(qpos=data.qpos, qvel=data.qvel, **{**reads, **given})
        return physics

    @staticmethod
    def _select(condition: jax.Array, chosen: State, otherwise: State) -> State:
        return {name: jnp.where(condition, chosen[name], otherwise[name]) for name in otherwise}
