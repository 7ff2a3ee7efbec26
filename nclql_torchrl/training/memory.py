"""Whether a replay buffer fits into memory, before anything is collected for it."""

from __future__ import annotations

import os
from collections.abc import Sequence

import torch
from tensordict import NestedKey
from torchrl.envs import EnvBase

from nclql_torchrl.machine import free_memory
from nclql_torchrl.training.config import ConfigError

INDEX_BYTES = 8
"""TorchRL's buffer writes its index into every transition."""


def transition_bytes(env: EnvBase, keys: Sequence[NestedKey]) -> int:
    """Size of one transition of an environment, with the index that replay adds.

    Args:
        env: of batch size [num_envs].
        keys: what is stored of a transition; those that the environment does not have are left out.
    """
    transitions = env.fake_tensordict().select(*keys, strict=False)
    values = transitions.values(include_nested=True, leaves_only=True)
    return INDEX_BYTES + sum(value.numel() * value.element_size() for value in values) // env.batch_size.numel()


def check_replay_fits(size: int, env: EnvBase, keys: Sequence[NestedKey], device: torch.device) -> None:
    """Checks that the memory of a device has room for a replay buffer, which takes it only as it fills.

    Args:
        size: capacity in transitions.
        env: of batch size [num_envs].
        keys: what is stored of a transition.
        device: where.

    Raises:
        ConfigError: if there is less.
    """
    each, free = transition_bytes(env, keys), free_memory(device)
    if free is not None and device.type == "cpu":
        # torchrun's learners on this machine fill buffers of their own from the same memory.
        free //= int(os.environ.get("LOCAL_WORLD_SIZE", "1"))
    if free is not None and size * each > free:
        raise ConfigError(
            f"replay_buffer.size is {size:,}: transitions of {each} bytes make that {size * each / 2**30:.1f} GiB, and "
            f"{free / 2**30:.1f} GiB are free on {device}; expected at most {free // each:,}."
        )
