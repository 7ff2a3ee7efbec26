"""MuJoCo in JAX: one compiled call per control step for the whole batch, meant for GPUs.

On a CPU this engine is correct but slower than the engine ``mujoco``; there every core steps a part of the batch.
"""

from __future__ import annotations

import functools
import os
from collections.abc import Callable, Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

# JAX would otherwise reserve most of a GPU's memory as soon as it starts, and torch needs some.
os.environ.setdefault("XLA_PYTHON_CLIENT_PREALLOCATE", "false")

import jax
import jax.numpy as jnp
import numpy as np
import torch

from envs.batched import ENVIRONMENTS_PER_THREAD, Step, choose_num_threads
from envs.bridge import to_jax, to_jax_device, to_torch
from envs.engines.mjx_corrections import check_version, corrected_release
from envs.engines.mjx_dynamics import Dynamics, Settings, State, load_model
from envs.engines.mjx_warp import Room, choose_room
from envs.models import action_bounds
from envs.task import Model, Task

SOLVERS = ("gymnasium", "fast")

FAST_ITERATIONS: dict[str, tuple[int, int]] = {
    "Ant-v5": (8, 16),  # with (4, 8), one observation in twenty is off by more than 0.01
    "HalfCheetah-v5": (4, 8),
    "Hopper-v5": (4, 8),
    "Humanoid-v5": (8, 16),
    "HumanoidStandup-v5": (8, 16),
    "InvertedDoublePendulum-v5": (4, 8),
    "InvertedPendulum-v5": (4, 8),
    "Pusher-v5": (8, 16),
    "Reacher-v5": (4, 8),
    "Swimmer-v5": (4, 8),
    "Walker2d-v5": (8, 16),
}
"""``solver="fast"``: iterations of the solver and of its line search, with which float32 errs no more than with all of
Gymnasium's (``envs/engines/mjx_parity.py``). In a batch everybody waits for the slowest: on a CPU, 256 HalfCheetahs are
2.2 times as fast so."""


def make_dynamics(task: Task, settings: Settings) -> Dynamics:
    """The task's compiled dynamics, which its environments share while the file of its model stays the same.

    Only that file is watched, not those that it includes.
    """
    return _make_dynamics(task, settings, task.xml_path.read_bytes())


@functools.lru_cache(maxsize=16)
def _make_dynamics(task: Task, settings: Settings, model: bytes) -> Dynamics:
    del model  # told apart by it, and read by the task
    return Dynamics(task, settings)


class MJXEngine:
    """A batch of simulations of one task in JAX.

    A step is one compiled call: physics, observation, reward, termination, time limit and the next episodes of those
    that ended. The state stays on the device and is donated from step to step. On a CPU, where XLA computes most of a
    step in one thread, the batch is stepped in equal parts, one for each thread. In float32 (see ``envs/engines/
    mjx_parity.py`` for how far a step is from Gymnasium's) the agent is moved back to the origin of its track before
    every step where nobody can tell (``envs/engines/mjx_track.py``); :meth:`positions` has it where it is.

    A model with the solver PGS, which MJX lacks, is solved by Newton's method. Contacts of steep capsules with the
    ground are corrected (``envs/engines/mjx_corrections.py``), but not those of Warp, whose friction acts along other
    axes there: with it Ant and the humanoids differ from Gymnasium's at such contacts.

    Args:
        task: what to simulate.
        num_envs: simulations in the batch.
        device: where; "cuda" needs JAX for CUDA.
        impl: "jax", or "warp" for MuJoCo Warp on NVIDIA GPUs, which needs the extra ``warp``.
        solver: how many iterations the constraint solver may take, and its line search in each: "gymnasium" has those
            of the task's model, "fast" as few as leave the accuracy of float32, or a pair of numbers. With "warp" fewer
            iterations were not measured.
        dtype: torch.float32, or torch.float64 for comparisons with MuJoCo; the engine's observations and rewards are of
            it too, those of :class:`~envs.batched.BatchedEnv` are float32 in any case.
        num_threads: on a CPU, parts of the batch that are stepped at a time: as many as divide it equally, at most this
            number, which by default is that of the available cores.
        max_contacts: contacts that "warp" has room for, per environment on average; by default the task's.
        max_constraints: rows of constraints that "warp" has room for in each environment; by default the task's.
        allow_untested_version: whether other releases of mujoco and mujoco-mjx are used than those whose physics was
            compared with Gymnasium's.

    Raises:
        RuntimeError: if JAX does not see the device, mujoco or mujoco-mjx is of an untested release, or there is no
            Warp.
        NotImplementedError: if MJX cannot simulate the task's model.
        ValueError: for an unknown ``impl``, ``solver`` or ``dtype``, or buffer sizes without "warp" or below 1, or
            ``num_threads`` below 1 or where a batch is stepped as one, or a model with actuators that have no control
            range.

    Examples:
        >>> from envs.tasks.reacher import Reacher
        >>> engine = MJXEngine(Reacher(), num_envs=3)
        >>> engine.step(torch.zeros(3, 2)).next_observation.shape
        torch.Size([3, 10])
    """

    def __init__(
        self,
        task: Task,
        num_envs: int,
        *,
        device: torch.device | str = "cpu",
        impl: str = "jax",
        solver: str | tuple[int, int] = "gymnasium",
        dtype: torch.dtype = torch.float32,
        num_threads: int | None = None,
        max_contacts: int | None = None,
        max_constraints: int | None = None,
        allow_untested_version: bool = False,
    ) -> None:
        check_version(allow_untested_version)
        use_compilation_cache()
        if dtype not in (torch.float32, torch.float64):
            raise ValueError(f"dtype is {dtype}; expected torch.float32 or torch.float64.")
        self.task = task
        self.num_envs = num_envs
        self.device = torch.device(device)
        self._jax_device = to_jax_device(self.device)
        self._num_parts = choose_num_parts(num_envs, self.device, impl, num_threads)
        self._room = choose_room(task, impl, max_contacts, max_constraints)
        if self._room is not None and dtype != torch.float32:
            raise ValueError(f"dtype is {dtype}; expected torch.float32 with impl='warp', which has no other.")
        iterations, ls_iterations = choose_iterations(task, solver)
        self._dynamics = make_dynamics(
            task,
            Settings(
                device=self._jax_device,
                float64=dtype == torch.float64,
                iterations=iterations,
                ls_iterations=ls_iterations,
                warp=self._room and Room(self._room.contacts * num_envs, self._room.constraints),
            ),
        )
        self.model: Model = self._dynamics.model
        self.action_low, self.action_high = map(torch.from_numpy, action_bounds(self.model))
        initial_state = self._dynamics.initial_state(num_envs // self._num_parts)
        # Of every part; one for the whole batch but on a CPU.
        self._states = [self._put(initial_state) for _ in range(self._num_parts)]
        self._pool = ThreadPoolExecutor(self._num_parts, thread_name_prefix="mjx") if self._num_parts > 1 else None
        self._compiled: set[Callable[..., Any]] = set()
        self.observation_dim = initial_state["observation"].shape[-1]
        self._overflow: Any = None
        self.seed(0)

    def seed(self, seed: int) -> None:
        """Fixes the initial states of all episodes from here on; those under way go on."""
        self._write({"key": self._keys(seed), "episode": torch.zeros(self.num_envs)})

    def _keys(self, seed: int) -> torch.Tensor:
        """Random keys [num_envs, 2] that follow from ``seed``, one per simulation."""
        with jax.default_device(self._jax_device), jax.enable_x64(False):
            keys = jax.vmap(jax.random.fold_in, (None, 0))(jax.random.key(seed), jnp.arange(self.num_envs))
        return torch.from_numpy(_signed(np.array(jax.random.key_data(keys))))

    def step(self, action: torch.Tensor) -> Step:
        """One control step; environments that end begin their next episode in the same call.

        Args:
            action: [num_envs, action_dim] float32, clipped by MuJoCo to the actuators' range.

        Raises:
            RuntimeError: if one of Warp's buffers was too small in an earlier step.
        """
        # An earlier step's, if the device is done with it: a step waits for none.
        if self._overflow is not None and self._overflow.is_ready():
            self._check_overflow(self._overflow)
        return Step(*self._call(self._dynamics.step, action))

    def _call(self, function: Callable[..., Any], *arguments: torch.Tensor) -> list[torch.Tensor]:
        """What a compiled function of the state and of tensors [num_envs, ...] gives: tensors [num_envs, ...]."""

        def part(index: int) -> list[torch.Tensor]:
            # Kept until torch's stream waits for the results: torch might give its memory to somebody else before.
            arrays = [to_jax(argument.chunk(self._num_parts)[index]) for argument in arguments]
            self._states[index], results, overflow = function(self._states[index], *arrays)
            if self._room is not None:
                overflow.copy_to_host_async()
                self._overflow = overflow
            return list(map(to_torch, results))

        if self._pool is None:
            return part(0)
        # The first part compiles for the others.
        first = [] if function in self._compiled else [part(0)]
        self._compiled.add(function)
        parts = first + list(self._pool.map(part, range(len(first), self._num_parts)))
        return list(map(torch.cat, zip(*parts, strict=True)))

    def _check_overflow(self, overflow: jax.Array) -> None:
        """Raises if contacts were lost, for which it waits. What overflowed once stays so."""
        if self._room is None or not np.any(overflow):
            return
        raise RuntimeError(
            f"Warp has room for {self._room.contacts * self.num_envs} contacts of {self.num_envs} environments of "
            f"{self.task.name} and {self._room.constraints} constraint rows in each, and there were more, so that "
            f"steps went wrong. Raise max_contacts beyond {self._room.contacts} or max_constraints beyond "
            f"{self._room.constraints} (engine_options)."
        )

    def reset(self, mask: torch.Tensor) -> torch.Tensor:
        """Begins new episodes where ``mask`` [num_envs] is true; returns every observation.

        Raises:
            RuntimeError: if one of Warp's buffers was too small until now.
        """
        (observation,) = self._call(self._dynamics.reset, mask)
        self._check_overflow(self._overflow)
        return observation

    def set_state(self, qpos: torch.Tensor, qvel: torch.Tensor) -> torch.Tensor:
        """Begins episodes at positions [num_envs, nq] and velocities [num_envs, nv]; returns every observation.

        Raises:
            ValueError: for another shape.
            RuntimeError: if one of Warp's buffers was too small until now.
        """
        arrays = (self._array(name, value) for name, value in (("qpos", qpos), ("qvel", qvel)))
        (observation,) = self._call(
            self._dynamics.set_state, *(torch.from_numpy(array).to(self.device) for array in arrays)
        )
        self._check_overflow(self._overflow)
        return observation

    def positions(self) -> torch.Tensor:
        """Generalized positions [num_envs, nq], on the CPU."""
        qpos = self._whole("qpos")
        qpos[:, list(self.task.track)] += self._whole("origin")
        return torch.from_numpy(qpos)

    def state_dict(self) -> dict[str, torch.Tensor]:
        """The whole state, random keys included, copied to the CPU; each tensor has the batch dimension first.

        Raises:
            RuntimeError: if one of Warp's buffers was too small until now.
        """
        self._check_overflow(self._states[0]["overflow"])
        arrays = {name: self._whole(name) for name in self._states[0]}
        return {name: torch.from_numpy(_signed(array)) for name, array in arrays.items()}

    def load_state_dict(self, state: Mapping[str, torch.Tensor]) -> None:
        """Goes on from :meth:`state_dict` exactly.

        Raises:
            ValueError: for a state of another task or another number of simulations.
        """
        expected = set(self._states[0])
        if set(state) != expected:
            raise ValueError(f"The state has {', '.join(sorted(state))}; expected {', '.join(sorted(expected))}.")
        self._write(state)
        self._overflow = None

    def _whole(self, name: str) -> np.ndarray:
        """A copy of an entry of the state, of all environments, on the host."""
        return np.concatenate([np.asarray(state[name]) for state in self._states])

    def _write(self, state: Mapping[str, torch.Tensor]) -> None:
        arrays = {name: np.split(self._array(name, value), self._num_parts) for name, value in state.items()}
        for index in range(self._num_parts):
            self._states[index] |= self._put({name: parts[index] for name, parts in arrays.items()})

    def _array(self, name: str, value: torch.Tensor) -> np.ndarray:
        """An entry of the state, of all environments, on the host.

        Raises:
            ValueError: for another shape.
        """
        current, array = self._states[0][name], value.numpy(force=True)
        expected = (self.num_envs, *current.shape[1:])
        if array.shape != expected:
            raise ValueError(f"{name!r} has shape {list(array.shape)}; expected {list(expected)}.")
        return array.view(np.uint32) if name == "key" else array.astype(current.dtype)

    def _put(self, arrays: Mapping[str, np.ndarray]) -> State:
        # Copied, because the state is donated to the next step, which may write its results over it.
        with jax.enable_x64(True):
            return {
                name: jax.device_put(np.array(array), self._jax_device, may_alias=False)
                for name, array in arrays.items()
            }


def _signed(array: np.ndarray) -> np.ndarray:
    """Random keys, which are uint32, as int32 with the same bits: few things in torch can handle uint32."""
    return array.view(np.int32) if array.dtype == np.uint32 else array


def choose_num_parts(num_envs: int, device: torch.device, impl: str, num_threads: int | None) -> int:
    """Parts of equal size in which a batch is stepped.

    Raises:
        ValueError: for ``num_threads`` below 1, or on a device or with an implementation that steps the batch as one.
    """
    # Other releases are not corrected, and their LAPACK would wait for itself.
    parallel = device.type == "cpu" and impl == "jax" and corrected_release()
    threads = choose_num_threads(num_threads)
    if num_threads is not None and not parallel:
        raise ValueError(
            f"num_threads is {num_threads} with impl={impl!r} on {device}; expected None: only impl='jax' on a CPU, "
            "with the tested release of MJX, steps a batch in several threads."
        )
    most = min(threads, num_envs // ENVIRONMENTS_PER_THREAD) if parallel else 1
    return next((count for count in range(most, 1, -1) if num_envs % count == 0), 1)


def choose_iterations(task: Task, solver: str | tuple[int, int]) -> tuple[int, int]:
    """Iterations of the constraint solver and of its line search.

    Raises:
        ValueError: for an unknown ``solver``, or "fast" for a task with which it was not measured.
    """
    if solver == "gymnasium":
        option = load_model(task).opt
        return option.iterations, option.ls_iterations
    if solver == "fast":
        if task.name not in FAST_ITERATIONS:
            raise ValueError(
                f"solver='fast' was not measured for {task.name}; expected a pair of numbers, such as solver=(8, 16)."
            )
        return FAST_ITERATIONS[task.name]
    if isinstance(solver, str) or len(solver) != 2 or min(solver) < 1:
        raise ValueError(f"solver is {solver!r}; expected 'gymnasium', 'fast', or two numbers of at least 1.")
    return solver[0], solver[1]


def use_compilation_cache() -> None:
    """Keeps compiled steps in the user's cache directory, unless JAX was told where to keep them."""
    if jax.config.jax_compilation_cache_dir is None:  # pyright: ignore[reportAttributeAccessIssue]
        caches = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
        jax.config.update("jax_compilation_cache_dir", str(caches / "nclql-torchrl" / "jax"))
