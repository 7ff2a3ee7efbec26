"""MuJoCo in JAX: one compiled call per control step for the whole batch, meant for GPUs.

On a CPU this engine is correct but slower than Gymnasium.
"""

from __future__ import annotations

import contextlib
import functools
import io
import os
from collections.abc import Mapping
from importlib.metadata import version
from pathlib import Path
from typing import Any, NamedTuple

# JAX would otherwise reserve most of a GPU's memory as soon as it starts, and torch needs some.
os.environ.setdefault("XLA_PYTHON_CLIENT_PREALLOCATE", "false")

import jax
import jax.numpy as jnp
import mujoco
import numpy as np
import torch

with contextlib.redirect_stdout(io.StringIO()):  # MJX prints that it found no Warp, which is not used here.
    from mujoco import mjx

from envs.batched import Step
from envs.bridge import to_jax, to_jax_device, to_torch
from envs.task import Task

TESTED_VERSION = "3.17"
"""The release of mujoco-mjx whose steps were compared with Gymnasium's."""
ALLOW_UNTESTED_VERSION = "NCLQL_ALLOW_UNTESTED_MJX"
"""Environment variable; "1" allows any other release."""

State = dict[str, jax.Array]
"""Of every environment: the task's ``state_fields``; "elapsed_steps", control steps of this episode; "episode", the
number of episodes begun; "key", the environment's random key."""


class Transition(NamedTuple):
    """What one control step yields besides the new state: the entries of :class:`Step`, in its order."""

    next_observation: jax.Array
    reward: jax.Array
    terminated: jax.Array
    truncated: jax.Array
    observation: jax.Array


class Random:
    """The draws of one reset, as :class:`envs.task.Random` asks for them."""

    def __init__(self, key: jax.Array) -> None:
        self.key = key

    def _next_key(self) -> jax.Array:
        self.key, key = jax.random.split(self.key)
        return key

    def uniform(self, low: float, high: float, size: int) -> jax.Array:
        """Draws [size], uniform in [low, high)."""
        return jax.random.uniform(self._next_key(), (size,), minval=low, maxval=high)

    def standard_normal(self, size: int) -> jax.Array:
        """Draws [size] from the standard normal distribution."""
        return jax.random.normal(self._next_key(), (size,))


class Dynamics:
    """A task's transitions as compiled pure functions of a batch of states.

    Args:
        task: what to simulate.
        device: where.
    """

    def __init__(self, task: Task, device: jax.Device) -> None:  # pyright: ignore[reportInvalidTypeForm]
        model = mujoco.MjModel.from_xml_path(str(task.xml_path))  # pyright: ignore[reportAttributeAccessIssue]
        if task.solver_iterations is not None:
            model.opt.iterations, model.opt.ls_iterations = task.solver_iterations
        self.task = task
        self.dt = float(model.opt.timestep) * task.frame_skip
        self.action_low, self.action_high = model.actuator_ctrlrange.astype(np.float32).T
        self.model = mjx.put_model(model, device=device, impl="jax")
        self.template = mjx.make_data(model, device=device, impl="jax")
        self.step = jax.jit(self._step, donate_argnums=0)
        self.reset = jax.jit(self._reset, donate_argnums=0)
        self.observe = jax.jit(jax.vmap(self._observe))

    def _step(self, state: State, action: jax.Array) -> tuple[State, Transition]:
        # By default JAX multiplies matrices in TensorFloat-32 on recent GPUs: three digits are not enough for contacts.
        with jax.default_matmul_precision("highest"):
            return jax.vmap(self._step_one)(state, action)

    def _step_one(self, state: State, action: jax.Array) -> tuple[State, Transition]:
        before = self._physics(state | {"qpos": self.task.recentre(jnp, state["qpos"])})
        driven = before.replace(ctrl=jnp.clip(action, self.action_low, self.action_high))

        def substep(physics: Any, _: None) -> tuple[Any, None]:
            return mjx.step(self.model, physics), None

        after, _ = jax.lax.scan(substep, driven, length=self.task.frame_skip)
        elapsed_steps = state["elapsed_steps"] + 1
        ended = state | self._fields(after) | {"elapsed_steps": elapsed_steps}
        terminated = self.task.terminated(jnp, after)
        truncated = elapsed_steps >= self.task.max_episode_steps
        state = self._select(terminated | truncated, self._begin(ended), ended)
        transition = Transition(
            next_observation=self.task.observe(jnp, after).astype(jnp.float32),
            reward=jnp.float32(self.task.reward(jnp, before, after, action, self.dt)),
            terminated=terminated,
            truncated=truncated,
            observation=self._observe(state),
        )
        return state, transition

    def _reset(self, state: State, mask: jax.Array) -> tuple[State, jax.Array]:
        state = jax.vmap(lambda state, chosen: self._select(chosen, self._begin(state), state))(state, mask)
        return state, jax.vmap(self._observe)(state)

    def _begin(self, state: State) -> State:
        """The state at the start of the environment's next episode: a function of its key and the episode's number."""
        random = Random(jax.random.fold_in(jax.random.wrap_key_data(state["key"]), state["episode"]))
        qpos, qvel = self.task.reset(random, self.template.qpos, self.template.qvel)
        return {
            **self._fields(self.template.replace(qpos=qpos, qvel=qvel)),
            "elapsed_steps": jnp.zeros_like(state["elapsed_steps"]),
            "episode": state["episode"] + 1,
            "key": state["key"],
        }

    def _observe(self, state: State) -> jax.Array:
        return self.task.observe(jnp, self._physics(state)).astype(jnp.float32)

    def _physics(self, state: State) -> Any:
        return self.template.replace(**{name: state[name] for name in self.task.state_fields})

    def _fields(self, physics: Any) -> State:
        return {name: getattr(physics, name) for name in self.task.state_fields}

    @staticmethod
    def _select(condition: jax.Array, chosen: State, otherwise: State) -> State:
        return {name: jnp.where(condition, chosen[name], otherwise[name]) for name in otherwise}


# Environments of the same task share what was compiled.
make_dynamics = functools.lru_cache(maxsize=16)(Dynamics)


class MJXEngine:
    """A batch of simulations of one task in JAX.

    Args:
        task: what to simulate.
        num_envs: simulations in the batch.
        device: where; "cuda" needs JAX for CUDA.

    Raises:
        RuntimeError: if JAX does not see the device, or mujoco-mjx is of an untested release.
    """

    def __init__(self, task: Task, num_envs: int, *, device: torch.device | str = "cpu") -> None:
        check_version()
        use_compilation_cache()
        self.num_envs = num_envs
        self.device = torch.device(device)
        self._jax_device = to_jax_device(self.device)
        self._dynamics = make_dynamics(task, self._jax_device)
        self.action_low = torch.from_numpy(self._dynamics.action_low)
        self.action_high = torch.from_numpy(self._dynamics.action_high)
        template = {name: getattr(self._dynamics.template, name) for name in task.state_fields}
        batch = {name: np.stack([np.asarray(value)] * num_envs) for name, value in template.items()}
        counters = {name: np.zeros(num_envs, np.int32) for name in ("elapsed_steps", "episode")}
        self._state = self._put({**batch, **counters, "key": np.zeros((num_envs, 2), np.uint32)})
        self.seed(0)
        self.observation_dim = self.observe().shape[-1]

    def seed(self, seed: int) -> None:
        """Fixes the initial states of all episodes from here on; those under way go on."""
        self._write({"key": self._keys(seed), "episode": torch.zeros(self.num_envs)})

    def _keys(self, seed: int) -> torch.Tensor:
        """Random keys [num_envs, 2] that follow from ``seed``, one per simulation."""
        with jax.default_device(self._jax_device):
            keys = jax.vmap(jax.random.fold_in, (None, 0))(jax.random.key(seed), jnp.arange(self.num_envs))
        # Keys are uint32, which few things in torch can handle: int32 has the same bits.
        return torch.from_numpy(np.array(jax.random.key_data(keys)).view(np.int32))

    def step(self, action: torch.Tensor) -> Step:
        """One control step; environments that end begin their next episode in the same call.

        Args:
            action: [num_envs, action_dim], clipped to the actuators' range before it drives them.
        """
        self._state, transition = self._dynamics.step(self._state, to_jax(action))
        return Step(*map(to_torch, transition))

    def reset(self, mask: torch.Tensor) -> torch.Tensor:
        """Begins new episodes where ``mask`` [num_envs] is true; returns every observation."""
        self._state, observation = self._dynamics.reset(self._state, to_jax(mask))
        return to_torch(observation)

    def observe(self) -> torch.Tensor:
        """Every environment's observation [num_envs, observation_dim]."""
        return to_torch(self._dynamics.observe(self._state))

    def set_state(self, qpos: torch.Tensor, qvel: torch.Tensor) -> torch.Tensor:
        """Begins episodes at positions [num_envs, nq] and velocities [num_envs, nv]; returns every observation.

        Raises:
            ValueError: for another shape.
        """
        start = {name: torch.zeros_like(value) for name, value in self.state_dict().items()}
        self._write(
            {name: start[name] for name in (*self._dynamics.task.state_fields, "elapsed_steps")}
            | {"qpos": qpos, "qvel": qvel}
        )
        return self.observe()

    def state_dict(self) -> dict[str, torch.Tensor]:
        """The whole state, random keys included, copied to the CPU; each tensor has the batch dimension first."""
        return {
            name: torch.from_numpy(np.array(value).view(np.int32) if name == "key" else np.array(value))
            for name, value in self._state.items()
        }

    def load_state_dict(self, state: Mapping[str, torch.Tensor]) -> None:
        """Goes on from :meth:`state_dict` exactly.

        Raises:
            ValueError: for a state of another task or another number of simulations.
        """
        if set(state) != set(self._state):
            raise ValueError(f"The state has {', '.join(sorted(state))}; expected {', '.join(sorted(self._state))}.")
        self._write(state)

    def _write(self, state: Mapping[str, torch.Tensor]) -> None:
        arrays: dict[str, np.ndarray] = {}
        for name, value in state.items():
            current = self._state[name]
            array = value.detach().cpu().numpy()
            if array.shape != current.shape:
                raise ValueError(f"{name!r} has shape {list(array.shape)}; expected {list(current.shape)}.")
            arrays[name] = array.view(np.uint32) if name == "key" else array.astype(current.dtype)
        self._state = self._state | self._put(arrays)

    def _put(self, arrays: Mapping[str, np.ndarray]) -> State:
        # Copied, because the state is donated to the next step, which may write its results over it.
        return {
            name: jax.device_put(np.array(array), self._jax_device, may_alias=False) for name, array in arrays.items()
        }


def check_version() -> None:
    """Raises RuntimeError unless mujoco-mjx is of the tested release, or the user allowed any other."""
    found = version("mujoco-mjx")
    if found.startswith(f"{TESTED_VERSION}.") or os.environ.get(ALLOW_UNTESTED_VERSION) == "1":
        return
    raise RuntimeError(
        f"mujoco-mjx is {found}; expected {TESTED_VERSION}.x, whose physics was compared with Gymnasium's. Install it "
        f"(pip install 'mujoco-mjx=={TESTED_VERSION}.*'), or set {ALLOW_UNTESTED_VERSION}=1 to use this one."
    )


def use_compilation_cache() -> None:
    """Keeps compiled steps in the user's cache directory, unless JAX was told where to keep them."""
    if jax.config.jax_compilation_cache_dir is None:  # pyright: ignore[reportAttributeAccessIssue]
        caches = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
        jax.config.update("jax_compilation_cache_dir", str(caches / "nclql-torchrl" / "jax"))
