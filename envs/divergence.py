"""Simulations that are lost to numbers that are not finite, in environments that do not say so themselves."""

from __future__ import annotations

import torch
from tensordict import TensorDictBase
from torchrl.data import Binary, Composite
from torchrl.data.tensor_specs import TensorSpec
from torchrl.envs import Transform

from envs.batched import refuse_lost_actions


class EndDiverged(Transform):
    """Gives any environment what :class:`~envs.batched.BatchedEnv` has: "diverged", and no number that is not finite.

    Where an observation or a reward is not finite, the episode is terminated and flagged in ("next", "diverged")
    [*batch, 1], with zeros in their place, so that it is reset like any other that ended. An episode that begins so is
    flagged as well, and ends with its first step.

    Raises:
        ValueError: for an action that is not finite.

    Examples:
        >>> from torchrl.envs import TransformedEnv
        >>> from envs import make_env
        >>> env = TransformedEnv(make_env("Pendulum-v1", num_envs=2), EndDiverged())
        >>> env.rollout(3)["next", "diverged"].any()
        tensor(False)
    """

    def _step(self, tensordict: TensorDictBase, next_tensordict: TensorDictBase) -> TensorDictBase:
        refuse_lost_actions(tensordict["action"])
        finite = _finite(next_tensordict) & torch.isfinite(next_tensordict["reward"])
        diverged = tensordict["diverged"] | ~finite
        _clear(next_tensordict, diverged)
        next_tensordict["reward"] = torch.where(diverged, 0.0, next_tensordict["reward"])
        terminated = next_tensordict["terminated"] | diverged
        return next_tensordict.update({"terminated": terminated, "done": next_tensordict["done"] | diverged})

    def _reset(self, tensordict: TensorDictBase, tensordict_reset: TensorDictBase) -> TensorDictBase:
        _clear(tensordict_reset, ~_finite(tensordict_reset))
        return tensordict_reset

    def transform_observation_spec(self, observation_spec: TensorSpec) -> TensorSpec:
        """Adds the flag to what is observed."""
        assert isinstance(observation_spec, Composite)
        shape = torch.Size([*observation_spec.shape, 1])
        observation_spec["diverged"] = Binary(shape=shape, dtype=torch.bool, device=observation_spec.device)
        return observation_spec


def _finite(tensordict: TensorDictBase) -> torch.Tensor:
    """Whether observations are finite, [*batch, 1]."""
    return torch.isfinite(tensordict["observation"]).all(-1, keepdim=True)


def _clear(tensordict: TensorDictBase, diverged: torch.Tensor) -> None:
    """Flags what diverged [*batch, 1], with zeros for its observation."""
    tensordict["observation"] = torch.where(diverged, 0.0, tensordict["observation"])
    tensordict["diverged"] = diverged
