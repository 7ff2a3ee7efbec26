"""JAX arrays and torch tensors over the same memory, on the CPU or a CUDA device.

Neither direction copies, and neither makes the host wait for a CUDA device. DLPack orders the two libraries' streams:
whoever takes an array over names its own stream, and the other makes that stream wait for what it has under way. Shared
memory asks for care: what was made a tensor must not be donated to a later JAX computation, and a tensor made an array
must not be written to before the JAX computation that reads it has given its results to torch.
"""

from __future__ import annotations

import jax
import torch

ALIGNMENT = 64
"""Bytes to which XLA wants its arguments aligned; a slice of a tensor may start anywhere."""


def to_torch(array: jax.Array) -> torch.Tensor:
    """The tensor of an array's memory.

    Examples:
        >>> import jax.numpy as jnp
        >>> to_torch(jnp.arange(3.0))
        tensor([0., 1., 2.])
    """
    # Given the array and not its capsule, torch names its current stream, which JAX makes wait for the computation.
    return torch.from_dlpack(array)


def to_jax(tensor: torch.Tensor) -> jax.Array:
    """The array of a tensor's memory; a tensor that is not contiguous or not aligned to 64 bytes is copied first.

    Examples:
        >>> to_jax(torch.ones(2)).shape
        (2,)
    """
    tensor = tensor.detach().contiguous()
    if tensor.data_ptr() % ALIGNMENT:
        tensor = tensor.clone()
    # torch hands out memory of its current device only.
    with torch.cuda.device_of(tensor):
        return jax.dlpack.from_dlpack(tensor)


def to_jax_device(device: torch.device) -> jax.Device:  # pyright: ignore[reportInvalidTypeForm]
    """JAX's name of a torch device.

    Raises:
        RuntimeError: if JAX does not see the device.
    """
    index = device.index or 0
    try:
        return jax.local_devices(backend=device.type)[index]
    except (RuntimeError, IndexError) as error:
        raise RuntimeError(
            f"JAX does not see the device {str(device)!r}; it sees {', '.join(map(str, jax.local_devices()))}. On a "
            "machine with a GPU install JAX for CUDA (pip install 'jax[cuda13]'), or choose engine='mujoco'."
        ) from error
