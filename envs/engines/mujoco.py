"""C MuJoCo on CPU threads: one simulation per environment, exactly as Gymnasium steps it, observed in batch."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from itertools import chain, pairwise
from types import SimpleNamespace
from typing import Any

import mujoco as _mujoco
import numpy as np
import torch

from envs.batched import ENVIRONMENTS_PER_THREAD, LARGEST_NUMBER, Step, choose_num_threads
from envs.models import action_bounds
from envs.task import POSTCONSTRAINT_FIELDS, Task

mujoco: Any = _mujoco  # its compiled functions have no type stubs

CHUNKS_PER_THREAD = 4


class MujocoEngine:
    """A batch of simulations of one task in C MuJoCo, float64 inside.

    Threads step the simulations, which release Python's lock; what the task computes from them (observation, reward,
    termination) is NumPy on the whole batch. A step does what Gymnasium's does, in the same order, so results agree to
    the last bit of the physics.

    Args:
        task: what to simulate.
        num_envs: simulations in the batch.
        device: where tensors are handed out; the simulations are on the CPU.
        num_threads: threads that step; by default one per available core.

    Raises:
        ValueError: for ``num_threads`` below 1, or a model with actuators that have no control range.

    Examples:
        >>> from envs.tasks.hopper import Hopper
        >>> engine = MujocoEngine(Hopper(), num_envs=3)
        >>> engine.step(torch.zeros(3, 3)).next_observation.shape
        torch.Size([3, 11])
    """

    def __init__(
        self, task: Task, num_envs: int, *, device: torch.device | str = "cpu", num_threads: int | None = None
    ) -> None:
        num_threads = choose_num_threads(num_threads)
        self.task = task
        self.num_envs = num_envs
        self.device = torch.device(device)
        self.model: Any = task.load_model()
        # MuJoCo would quietly put a diverged simulation back to the model's initial state; here its episode ends.
        self.model.opt.disableflags |= int(mujoco.mjtDisableBit.mjDSBL_AUTORESET)
        self.action_low, self.action_high = map(torch.from_numpy, action_bounds(self.model))
        self._control_timestep = task.control_timestep(self.model)
        self._fields = ("qpos", "qvel", *task.reads)
        self._data = [mujoco.MjData(self.model) for _ in range(num_envs)]
        # Views of every simulation's memory, taken once: MuJoCo's own attributes make a new one at each access.
        self._views = {name: [getattr(data, name) for data in self._data] for name in self._fields}
        self._controls = [data.ctrl for data in self._data]

        self._threads = min(num_threads, -(-num_envs // ENVIRONMENTS_PER_THREAD))
        # Several chunks per thread, taken as they come: contacts make some simulations slower than others.
        bounds = np.linspace(0, num_envs, CHUNKS_PER_THREAD * self._threads + 1).astype(int).tolist()
        self._chunks = [range(start, stop) for start, stop in pairwise(bounds)]
        self._pool: ThreadPoolExecutor | None = None

        self._elapsed_steps = np.zeros(num_envs, np.int64)
        self._episode = np.zeros(num_envs, np.int64)
        self._key = np.zeros((num_envs, 2), np.uint64)
        self.seed(0)
        everyone = range(num_envs)
        for index in everyone:
            mujoco.mj_forward(self.model, self._data[index])
        physics = self._physics(everyone)
        self._position = np.array(task.position(np, self.model, physics), np.float64)
        self.observation_dim = task.observe(np, self.model, physics).shape[-1]

    def seed(self, seed: int) -> None:
        """Fixes the initial states of all episodes from here on; those under way go on."""
        self._key[:, 0], self._key[:, 1] = seed, np.arange(self.num_envs)
        self._episode[:] = 0

    def step(self, action: torch.Tensor) -> Step:
        """One control step; environments that end begin their next episode in the same call.

        Args:
            action: [num_envs, action_dim] float32, clipped by MuJoCo to the actuators' range.
        """
        controls = action.numpy(force=True)
        chunks = iter(self._chunks)
        # The calling thread does its share.
        running = [self._executor().submit(self._advance, chunks, controls) for _ in range(self._threads - 1)]
        self._advance(chunks, controls)
        for future in running:
            future.result()
        task, model, physics = self.task, self.model, self._physics(range(self.num_envs))
        self._elapsed_steps += 1

        with np.errstate(invalid="ignore", over="ignore"):
            position = task.position(np, model, physics)
            velocity = (position - self._position) / self._control_timestep
            observation = task.observe(np, model, physics).astype(np.float32)
            reward = task.reward(np, model, physics, controls, velocity).astype(np.float32)
            terminated = np.array(task.terminated(np, model, physics), bool)
            finite = np.abs(physics.qpos).max(-1) <= LARGEST_NUMBER
            finite &= np.abs(physics.qvel).max(-1) <= LARGEST_NUMBER
            finite &= np.isfinite(observation).all(-1) & np.isfinite(reward)
        self._position = np.array(position, np.float64)
        diverged = ~finite
        if diverged.any():
            observation[diverged], reward[diverged], terminated[diverged] = 0.0, 0.0, True
        truncated = self._elapsed_steps >= task.max_episode_steps
        ended = np.flatnonzero(terminated | truncated).tolist()
        present, qpos = observation, torch.from_numpy(physics.qpos)
        if ended:
            present = observation.copy()
            present[ended] = self._begin(ended)
        return Step(*map(self._tensor, (observation, reward, terminated, truncated, diverged, present)), qpos=qpos)

    def reset(self, mask: torch.Tensor) -> torch.Tensor:
        """Begins new episodes where ``mask`` [num_envs] is true; returns every observation.

        Of the others the observation is made anew from the state as it is.
        """
        chosen = np.flatnonzero(mask.numpy(force=True)).tolist()
        observation = self._observe(range(self.num_envs))
        if chosen:
            observation[chosen] = self._begin(chosen)
        return self._tensor(observation)

    def set_state(self, qpos: torch.Tensor, qvel: torch.Tensor) -> torch.Tensor:
        """Begins episodes at positions [num_envs, nq] and velocities [num_envs, nv]; returns every observation.

        Raises:
            ValueError: for another shape.
        """
        for name, value, size in (("qpos", qpos, self.model.nq), ("qvel", qvel, self.model.nv)):
            if value.shape != (self.num_envs, size):
                raise ValueError(f"{name!r} has shape {list(value.shape)}; expected {[self.num_envs, size]}.")
        everyone = range(self.num_envs)
        return self._tensor(self._begin_at(everyone, list(qpos.numpy(force=True)), list(qvel.numpy(force=True))))

    def positions(self) -> torch.Tensor:
        """Generalized positions [num_envs, nq] float64."""
        return torch.from_numpy(np.stack(self._views["qpos"]))

    def state_dict(self) -> dict[str, torch.Tensor]:
        """The whole state; each tensor has the batch dimension first."""
        kind = mujoco.mjtState.mjSTATE_INTEGRATION
        simulation = np.empty((self.num_envs, mujoco.mj_stateSize(self.model, kind)))
        for data, row in zip(self._data, simulation, strict=True):
            mujoco.mj_getState(self.model, data, row, kind)
        arrays = {
            "simulation": simulation,
            "position": self._position.copy(),
            "elapsed_steps": self._elapsed_steps.copy(),
            "episode": self._episode.copy(),
            "key": self._key.view(np.int64).copy(),
        }
        return {name: torch.from_numpy(array) for name, array in arrays.items()}

    def load_state_dict(self, state: Mapping[str, torch.Tensor]) -> None:
        """Goes on from :meth:`state_dict` exactly.

        Raises:
            ValueError: for a state of another task or another number of simulations.
        """
        expected = self.state_dict()
        if set(state) != set(expected):
            raise ValueError(f"The state has {', '.join(sorted(state))}; expected {', '.join(sorted(expected))}.")
        for name, value in expected.items():
            if state[name].shape != value.shape:
                raise ValueError(f"{name!r} has shape {list(state[name].shape)}; expected {list(value.shape)}.")
        arrays = {name: value.numpy(force=True) for name, value in state.items()}
        kind = mujoco.mjtState.mjSTATE_INTEGRATION
        for data, row in zip(self._data, arrays["simulation"], strict=True):
            mujoco.mj_setState(self.model, data, row, kind)
        self._position[:] = arrays["position"]
        self._elapsed_steps[:] = arrays["elapsed_steps"]
        self._episode[:] = arrays["episode"]
        self._key[:] = arrays["key"].view(np.uint64)

    def _executor(self) -> ThreadPoolExecutor:
        # Made on first use, so that an engine that was never stepped can be sent to another process.
        if self._pool is None:
            self._pool = ThreadPoolExecutor(self._threads - 1, thread_name_prefix="mujoco")
        return self._pool

    def _advance(self, chunks: Iterator[range], controls: np.ndarray) -> None:
        """A control step of the simulations of as many chunks as this thread gets hold of."""
        model, frame_skip, step = self.model, self.task.frame_skip, mujoco.mj_step
        # Gymnasium always computes these forces; here only for a task that looks at them.
        forces = None if POSTCONSTRAINT_FIELDS.isdisjoint(self.task.reads) else mujoco.mj_rnePostConstraint
        for index in chain.from_iterable(chunks):
            data = self._data[index]
            self._controls[index][:] = controls[index]
            step(model, data, frame_skip)
            if forces is not None:
                forces(model, data)

    def _physics(self, environments: Sequence[int]) -> Any:
        """What the task reads, stacked over environments; written into fresh arrays."""
        everyone = len(environments) == self.num_envs

        def stacked(views: list[np.ndarray]) -> np.ndarray:
            chosen = views if everyone else [views[index] for index in environments]
            # Joined end to end, which takes a fifth of np.stack's time.
            return np.concatenate(chosen).reshape(len(chosen), *chosen[0].shape)

        return SimpleNamespace(**{name: stacked(views) for name, views in self._views.items()})

    def _observe(self, environments: Sequence[int]) -> np.ndarray:
        return self.task.observe(np, self.model, self._physics(environments)).astype(np.float32)

    def _begin(self, environments: Sequence[int]) -> np.ndarray:
        """Begins the next episode of some environments; returns their first observations."""
        states = [self.task.reset(np, self._random(index), self.model) for index in environments]
        self._episode[environments] += 1
        qpos, qvel = zip(*states, strict=True)
        return self._begin_at(environments, qpos, qvel)

    def _begin_at(
        self, environments: Sequence[int], qpos: Sequence[np.ndarray], qvel: Sequence[np.ndarray]
    ) -> np.ndarray:
        """Begins an episode of some environments at given states; returns their first observations."""
        for index, position, velocity in zip(environments, qpos, qvel, strict=True):
            data = self._data[index]
            mujoco.mj_resetData(self.model, data)
            data.qpos[:], data.qvel[:] = position, velocity
            mujoco.mj_forward(self.model, data)
        physics = self._physics(environments)
        self._position[environments] = self.task.position(np, self.model, physics)
        self._elapsed_steps[environments] = 0
        return self.task.observe(np, self.model, physics).astype(np.float32)

    def _random(self, index: int) -> np.random.Generator:
        """The draws of an environment's next reset: a function of its key and the episode's number alone."""
        counter = [0, 0, 0, self._episode[index]]
        return np.random.Generator(np.random.Philox(key=self._key[index], counter=counter))

    def _tensor(self, array: np.ndarray) -> torch.Tensor:
        return torch.from_numpy(array).to(self.device, non_blocking=True)
