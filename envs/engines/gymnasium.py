"""The truth: Gymnasium's own environments, through TorchRL's own wrapper, one after the other."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import gymnasium
import numpy as np
import torch
from tensordict import TensorDictBase
from torchrl.envs import DoubleToFloat, EnvBase, GymWrapper, SerialEnv, TransformedEnv

from envs.batched import refuse_lost_actions
from envs.models import action_bounds, silent_deprecations


class GymnasiumEnvs(SerialEnv):
    """A batch of Gymnasium environments of one id, in this process.

    Observations and rewards are float32. ``state_dict`` holds what Gymnasium lets one read: each environment's random
    state and elapsed steps; for MuJoCo tasks the whole simulation state, for others the ``state`` attribute that
    Gymnasium's classic-control tasks keep. Resuming is exact for those two kinds; a task of another kind continues from
    a fresh episode's state.

    Args:
        task: Gymnasium id of a task with a bounded box of actions.
        num_envs: environments in the batch.
        device: where observations and actions live.
        seed: fixes the initial states of every episode.
        **task_options: keyword arguments of the Gymnasium constructor.

    Raises:
        ValueError: if actions are discrete, unbounded, or not a vector; in a step, for an action that is not finite.

    Examples:
        >>> env = GymnasiumEnvs("Pendulum-v1", num_envs=2)
        >>> env.reset()["observation"].shape
        torch.Size([2, 3])
    """

    def __init__(
        self, task: str, num_envs: int, *, device: torch.device | str = "cpu", seed: int = 0, **task_options: Any
    ) -> None:
        probe = make_quietly(task, **task_options)
        space = probe.action_space
        model = getattr(probe.unwrapped, "model", None)
        probe.close()
        if not isinstance(space, gymnasium.spaces.Box):
            raise ValueError(
                f"Task {task!r} has the action space {space}; expected a bounded box of continuous actions, as in "
                "'Pendulum-v1' or 'HalfCheetah-v5'."
            )
        bounded = np.isfinite(space.low).all() and np.isfinite(space.high).all() and (space.low < space.high).all()
        if not bounded and hasattr(model, "actuator_ctrlrange"):
            action_bounds(model)
        if len(space.shape) != 1 or not bounded:
            raise ValueError(
                f"Task {task!r} has the action space {space}; expected a vector with finite bounds (wrap the task in "
                "gymnasium.wrappers.RescaleAction or ClipAction to give it some)."
            )

        def make() -> EnvBase:
            return TransformedEnv(GymWrapper(make_quietly(task, **task_options)), DoubleToFloat())

        super().__init__(num_envs, make, device=device)
        self.set_seed(seed)

    def _step(self, tensordict: TensorDictBase) -> TensorDictBase:
        refuse_lost_actions(tensordict["action"])
        return super()._step(tensordict)

    def simulations(self) -> list[gymnasium.Env]:
        """The Gymnasium environments, with their wrappers."""
        if self.is_closed:
            self.start()
        return [env.base_env._env for env in self._envs]  # pyright: ignore

    def state_dict(self, *args: Any, **kwargs: Any) -> dict[str, Any]:
        """The simulations' states: tensors, numbers and strings only."""
        return {str(index): _read_state(env) for index, env in enumerate(self.simulations())}

    def load_state_dict(self, state_dict: Mapping[str, Any], *args: Any, **kwargs: Any) -> None:
        """Puts every simulation back where :meth:`state_dict` found it.

        Raises:
            ValueError: if the states are of another number of environments.
        """
        simulations = self.simulations()
        if len(state_dict) != len(simulations):
            raise ValueError(f"The states are of {len(state_dict)} environments; expected {len(simulations)}.")
        for index, env in enumerate(simulations):
            _write_state(env, state_dict[str(index)])


def make_quietly(task: str, **options: Any) -> gymnasium.Env:
    """``gymnasium.make``, without MuJoCo's complaints about Gymnasium's own models."""
    with silent_deprecations():
        return gymnasium.make(task, **options)


def _wrappers(env: gymnasium.Env) -> list[gymnasium.Env]:
    """The environment and everything it wraps, outermost first."""
    chain = [env]
    while isinstance(chain[-1], gymnasium.Wrapper):
        chain.append(chain[-1].env)
    return chain


def _read_state(env: gymnasium.Env) -> dict[str, Any]:
    generator = env.unwrapped.np_random.bit_generator.state
    state: dict[str, Any] = {
        # 128-bit integers travel as text.
        "random": {"state": str(generator["state"]["state"]), "inc": str(generator["state"]["inc"]),
                   "has_uint32": int(generator["has_uint32"]), "uinteger": int(generator["uinteger"])},
        "elapsed_steps": [int(getattr(wrapper, "_elapsed_steps", None) or 0) for wrapper in _wrappers(env)],
    }  # fmt: skip
    simulation: Any = env.unwrapped
    if hasattr(simulation, "model") and hasattr(simulation, "data"):
        state["mujoco"] = torch.from_numpy(_mujoco_state(simulation))
        # Rewards compare with the previous body positions, which MuJoCo leaves as its last substep computed them.
        state["xpos"] = torch.from_numpy(simulation.data.xpos.copy())
        state["xipos"] = torch.from_numpy(simulation.data.xipos.copy())
    elif isinstance(getattr(simulation, "state", None), np.ndarray):
        state["state"] = torch.from_numpy(simulation.state.copy())
    return state


def _write_state(env: gymnasium.Env, state: Mapping[str, Any]) -> None:
    env.reset()
    random = state["random"]
    env.unwrapped.np_random.bit_generator.state = {
        "bit_generator": "PCG64",
        "state": {"state": int(random["state"]), "inc": int(random["inc"])},
        "has_uint32": random["has_uint32"],
        "uinteger": random["uinteger"],
    }
    for wrapper, elapsed in zip(_wrappers(env), state["elapsed_steps"], strict=True):
        if hasattr(wrapper, "_elapsed_steps"):
            wrapper._elapsed_steps = elapsed  # pyright: ignore
    simulation: Any = env.unwrapped
    if "mujoco" in state:
        mujoco = _mujoco()

        mujoco.mj_setState(
            simulation.model, simulation.data, state["mujoco"].numpy(force=True), mujoco.mjtState.mjSTATE_INTEGRATION
        )
        simulation.data.xpos[:] = state["xpos"].numpy(force=True)
        simulation.data.xipos[:] = state["xipos"].numpy(force=True)
    elif "state" in state:
        simulation.state = state["state"].numpy(force=True).copy()


def _mujoco_state(simulation: Any) -> np.ndarray:
    mujoco = _mujoco()
    kind = mujoco.mjtState.mjSTATE_INTEGRATION
    state = np.empty(mujoco.mj_stateSize(simulation.model, kind))
    mujoco.mj_getState(simulation.model, simulation.data, state, kind)
    return state


def _mujoco() -> Any:
    """The module, imported on use; its compiled functions have no type stubs."""
    import mujoco

    return mujoco
