"""The action gradient of an ensemble as one operator for CPUs, which compiled chains take where they can.

A compiled chain otherwise calls a library for every product and a kernel of its own for every mish: each of them reads
from memory what the one before has written there. The operator (``fused_gradient.cpp``) takes some rows through the
whole network and back while they are in a core's cache, by the products that torch brings for the purpose. It is built
by the C++ compiler that torch.compile needs anyway, in seconds, once per machine and version of torch.
"""

from __future__ import annotations

import hashlib
import os
import subprocess
import tempfile
import threading
from pathlib import Path
from typing import Any, NamedTuple

import torch
from filelock import FileLock
from torch import Tensor
from torchrl import torchrl_logger

from nclql_torchrl.machine import cpp_compiler, processor_flags

SOURCE = Path(__file__).with_suffix(".cpp")

WIDTH_DIVISOR = 16
"""Numbers in the largest of a processor's registers: the width of every hidden layer is a multiple."""

CAPABILITIES = ("AVX512", "AVX2")
"""What torch may call the processor where the operator can be built."""

FLAGS = ("-O3", "-std=c++20", "-march=native", "-shared", "-fPIC", "-fopenmp", "-DAT_PARALLEL_OPENMP=1")

_operand_types: tuple[torch.dtype, ...] | None = None
"""Types of the products' operands that the operator takes here: none where it could not be loaded, None before it was
tried."""

_loading = threading.Lock()
"""Collecting and learning threads compile their first chains at the same time."""


class FusedCritics(NamedTuple):
    """An ensemble's weights as the operator reads them.

    Examples:
        >>> layers = [(torch.randn(2, 32, 16), torch.zeros(2, 1, 32)), (torch.randn(2, 1, 32), torch.zeros(2, 1, 1))]
        >>> critics = FusedCritics.of(torch.randn(2, 16, 3), layers[:1], layers[1], torch.float32, num_states=5)
        >>> critics.action_up.shape, critics.up[0].shape, critics.down[0].shape
        (torch.Size([2, 3, 16]), torch.Size([2, 16, 32]), torch.Size([2, 32, 16]))
    """

    action_up: Tensor
    """The action's part of the first layer, shape [num_critics, action_dim, hidden]; float32 as all but two."""

    action_down: Tensor
    """Its transpose, shape [num_critics, hidden, action_dim]."""

    up: list[Tensor]
    """The other hidden layers, each [num_critics, hidden_in, hidden_out], of the products' type, bfloat16 in pairs.
    None in float32 for a single state: reading them would take longer than computing with ``down``."""

    down: list[Tensor]
    """Their transposes, each [num_critics, hidden_out, hidden_in]; likewise."""

    biases: list[Tensor]
    """Each [num_critics, 1, hidden_out]."""

    output_weight: Tensor
    """Shape [num_critics, 1, hidden]."""

    output_bias: Tensor
    """Shape [num_critics, 1, 1]."""

    @classmethod
    def of(
        cls,
        action_weight: Tensor,
        hidden: list[tuple[Tensor, Tensor]],
        output: tuple[Tensor, Tensor],
        dtype: torch.dtype,
        num_states: int,
    ) -> FusedCritics:
        """Lays the weights out, once per chain.

        Args:
            action_weight: the action's part of the first layer, shape [num_critics, hidden, action_dim].
            hidden: weight [num_critics, hidden_out, hidden_in] and bias [num_critics, 1, hidden_out] of the others.
            output: weight [num_critics, 1, hidden] and bias [num_critics, 1, 1] of the last layer.
            dtype: of the products' operands.
            num_states: states that the operator will be called with.
        """
        weights = [weight.to(dtype) for weight, _ in hidden]
        transposed = _in_pairs if dtype == torch.bfloat16 else lambda weight: weight.mT.contiguous()
        return cls(
            # A copy where there is one action, too: a loop of a compiled program takes no tensor twice.
            action_weight.mT.clone(memory_format=torch.contiguous_format),
            action_weight.contiguous(),
            [transposed(weight) for weight in weights if num_states > 1 or dtype != torch.float32],
            [transposed(weight.mT) for weight in weights],
            [bias for _, bias in hidden],
            *output,
        )

    def values_and_gradients(
        self, action: Tensor, observation_features: Tensor, level_features: Tensor
    ) -> tuple[Tensor, Tensor]:
        """Every critic's value and its gradient with respect to the action.

        Args:
            action: shape [batch, action_dim].
            observation_features: what the observation adds to the first layer, shape [num_critics, batch, hidden].
            level_features: what the level adds, shape [num_critics, 1, hidden].

        Returns:
            Values, shape [num_critics, batch], and gradients, shape [num_critics, batch, action_dim].
        """
        return torch.ops.nclql_torchrl.fused_gradient.default(action, observation_features, level_features, *self)


def _in_pairs(transposed: Tensor) -> Tensor:
    """The transpose of a bfloat16 matrix with its rows two by two, their numbers in turn.

    Args:
        transposed: shape [num_critics, columns, inner].

    Returns:
        Numbers as in a tensor of shape [num_critics, inner / 2, columns, 2]; shape [num_critics, inner, columns].
    """
    # Two numbers in turn are one of 32 bits, and such matrices transpose quickly.
    pairs = transposed.contiguous().view(torch.float32).mT.contiguous().view(torch.bfloat16)
    return pairs.reshape(transposed.mT.shape)


def load() -> None:
    """Builds the operator unless that has been done, and loads it, where there is AVX2 and a C++ compiler.

    A build that fails is said once, and costs nothing but speed.
    """
    global _operand_types
    with _loading:
        if _operand_types is None:
            _operand_types = _load()


def _load() -> tuple[torch.dtype, ...]:
    compiler = cpp_compiler()
    if compiler is None or torch.backends.cpu.get_cpu_capability() not in CAPABILITIES:
        return ()
    try:
        torch.ops.load_library(_built(compiler))
    except (OSError, subprocess.CalledProcessError) as error:
        reason = error.stderr[:1000] if isinstance(error, subprocess.CalledProcessError) else error
        torchrl_logger.warning(f"Compiled chains do without {SOURCE.name}, which could not be built: {reason}")
        return ()
    torch.library.register_fake("nclql_torchrl::fused_gradient", _shapes)
    torch.library.register_vmap("nclql_torchrl::fused_gradient", _one_by_one)
    # Without these instructions torch has no such product.
    has_bfloat16 = torch.backends.cpu.get_cpu_capability() == "AVX512" and "avx512_bf16" in processor_flags()
    return (torch.float32, torch.bfloat16) if has_bfloat16 else (torch.float32,)


def may_fuse(observation_features: Tensor, hidden: list[tuple[Tensor, Tensor]], dtype: torch.dtype) -> bool:
    """Whether what is being compiled takes the gradients of these critics from the operator; arguments as below.

    The operator has no derivative, and is not there where an exported program runs.
    """
    return (
        torch.compiler.is_compiling()
        and not torch.compiler.is_exporting()
        and not torch.is_grad_enabled()
        and is_fusable(observation_features, hidden, dtype)
    )


def is_fusable(observation_features: Tensor, hidden: list[tuple[Tensor, Tensor]], dtype: torch.dtype) -> bool:
    """Whether the operator has been loaded and can compute the gradient of these critics.

    Args:
        observation_features: shape [num_critics, batch, hidden].
        hidden: weight and bias of the hidden layers after the first.
        dtype: of the products' operands.
    """
    widths = [observation_features.shape[-1], *(weight.shape[1] for weight, _ in hidden)]
    return (
        dtype in (_operand_types or ())
        and observation_features.device.type == "cpu"
        and observation_features.dtype == torch.float32
        and len(hidden) > 0
        and all(width % WIDTH_DIVISOR == 0 for width in widths)
    )


def _built(compiler: str) -> Path:
    """The library: built for this source, compiler command, version of torch and processor, or found in the cache."""
    torch_directory = Path(torch.__file__).parent
    include, link = torch_directory / "include", torch_directory / "lib"
    # As torch's own kernels for this kind of processor are built.
    capability = torch.backends.cpu.get_cpu_capability()
    flags = [*FLAGS, f"-DCPU_CAPABILITY={capability}", f"-DCPU_CAPABILITY_{capability}"]
    command = [compiler, *flags, f"-I{include}", f"-L{link}", str(SOURCE), "-ltorch_cpu", "-lc10"]
    known = "\n".join([SOURCE.read_text(), compiler, *flags, torch.__version__, *sorted(processor_flags())])
    root = os.environ.get("TORCH_EXTENSIONS_DIR") or Path.home() / ".cache" / "torch_extensions"
    library = Path(root) / "nclql_torchrl" / f"fused_gradient_{hashlib.sha256(known.encode()).hexdigest()[:16]}.so"
    if library.exists():
        return library
    library.parent.mkdir(parents=True, exist_ok=True)
    # One process builds, others wait for it; the system takes the lock from a process that is killed.
    with FileLock(library.with_suffix(".lock")):
        if not library.exists():
            torchrl_logger.info(f"Building {SOURCE.name} for compiled Langevin chains: some ten seconds, once.")
            # Beside it, then renamed: what a killed process leaves behind is never loaded.
            with tempfile.TemporaryDirectory(dir=library.parent) as directory:
                unfinished = Path(directory) / library.name
                subprocess.run([*command, "-o", str(unfinished)], check=True, capture_output=True, text=True)
                unfinished.rename(library)
    return library


def _shapes(
    action: Tensor,
    observation_features: Tensor,
    level_features: Tensor,
    action_up: Tensor,
    action_down: Tensor,
    up: list[Tensor],
    down: list[Tensor],
    biases: list[Tensor],
    output_weight: Tensor,
    output_bias: Tensor,
) -> tuple[Tensor, Tensor]:
    num_critics, batch, _ = observation_features.shape
    values = observation_features.new_empty(num_critics, batch)
    return values, observation_features.new_empty(num_critics, batch, action.shape[1])


def _one_by_one(info: Any, in_dims: tuple[Any, ...], *inputs: Any) -> tuple[tuple[Tensor, ...], tuple[int, int]]:
    """The operator under ``torch.vmap``: what it is mapped over takes turns."""

    def entry(value: Any, dim: Any, index: int) -> Any:
        if isinstance(value, Tensor):
            return value if dim is None else value.select(dim, index)
        return [entry(*pair, index) for pair in zip(value, dim or [None] * len(value), strict=True)]

    operator = torch.ops.nclql_torchrl.fused_gradient.default
    results = [
        operator(*(entry(*pair, index) for pair in zip(inputs, in_dims, strict=True)))
        for index in range(info.batch_size)
    ]
    return tuple(torch.stack(values) for values in zip(*results, strict=True)), (0, 0)
