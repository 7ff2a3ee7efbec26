"""Batched products of float32 matrices on a CPU, by the library that is fast there.

torch multiplies float32 matrices by MKL, which on processors other than Intel's uses half of what AVX-512 has: on an
AMD EPYC oneDNN, which torch brings too but takes for bfloat16 only, is twice as fast.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.utils.flop_counter import register_flop_formula

from nclql_torchrl.machine import processor_entry

MANY_MULTIPLICATIONS = 2**22
"""Multiplications in each product of a batch, from which on oneDNN spares more time than calling it costs: 64 rows and
a layer of 256x256."""


def is_mkl_slow() -> bool:
    """Whether torch's own float32 products leave some of this processor's vector units idle.

    Examples:
        >>> is_mkl_slow() in (True, False)
        True
    """
    return (
        processor_entry("vendor_id") not in ("", "GenuineIntel")
        and torch.backends.cpu.get_cpu_capability() == "AVX512"
        and torch.backends.mkl.is_available()
        and torch.backends.mkldnn.is_available()
    )


MKL_IS_SLOW = is_mkl_slow()

# An operator of its own, because torch.compile would take oneDNN's for one with constant weights.
_LIBRARY = torch.library.Library("nclql_torchrl", "DEF")
_LIBRARY.define("onednn_bmm(Tensor left, Tensor right) -> Tensor")


@torch.library.impl(_LIBRARY, "onednn_bmm", "CPU")
def _multiply(left: Tensor, right: Tensor) -> Tensor:
    linear = torch.ops.mkldnn._linear_pointwise.default
    weights = map(_dense, right.mT.unbind())
    return torch.stack([linear(*pair, None, "none", [], "") for pair in zip(left.unbind(), weights, strict=True)])


def _dense(matrix: Tensor) -> Tensor:
    """The matrix by rows or by columns without gaps: with gaps oneDNN multiplies a thousand times as slowly."""
    return matrix if matrix.is_contiguous() or matrix.mT.is_contiguous() else matrix.contiguous()


def _shape(left: Tensor, right: Tensor) -> Tensor:
    return left.new_empty(left.shape[0], left.shape[1], right.shape[2])


def _multiply_more(info: Any, in_dims: tuple[int | None, ...], left: Tensor, right: Tensor) -> tuple[Tensor, int]:
    left, right = (
        operand if dim is None else operand.movedim(dim, 0) for operand, dim in zip((left, right), in_dims, strict=True)
    )
    return torch.matmul(left, right), 0


def _flop(left_shape: torch.Size, right_shape: torch.Size, *args: Any, **kwargs: Any) -> int:
    return 2 * left_shape.numel() * right_shape[-1]


torch.library.register_fake("nclql_torchrl::onednn_bmm", _shape, lib=_LIBRARY)
torch.library.register_vmap("nclql_torchrl::onednn_bmm", _multiply_more, lib=_LIBRARY)
register_flop_formula(torch.ops.nclql_torchrl.onednn_bmm)(_flop)

onednn_bmm = torch.ops.nclql_torchrl.onednn_bmm.default
"""``torch.bmm`` of float32 matrices on a CPU, by oneDNN. It has no derivative."""


def is_onednn_faster(left: Tensor, right: Tensor) -> bool:
    """Whether :func:`onednn_bmm` can multiply two batches of matrices, and in less time than ``torch.bmm``.

    Args:
        left: shape [batch, rows, inner].
        right: shape [batch, inner, columns].
    """
    return (
        MKL_IS_SLOW
        and left.device.type == "cpu"
        and left.dtype == torch.float32
        and left.shape[0] == right.shape[0]
        and left.shape[1] * right.shape[1] * right.shape[2] >= MANY_MULTIPLICATIONS
        # A program that is exported runs where there is no Python.
        and not torch.compiler.is_exporting()
    )


def batched_product(left: Tensor, right: Tensor) -> Tensor:
    """``torch.matmul`` of two batches of matrices, by oneDNN where that is faster and nothing records gradients.

    Args:
        left: shape [batch, rows, inner], or [1, rows, inner] for all.
        right: shape [batch, inner, columns].

    Returns:
        Shape [batch, rows, columns].

    Examples:
        >>> left, right = torch.randn(2, 256, 256), torch.randn(2, 256, 256)
        >>> with torch.no_grad():
        ...     product = batched_product(left, right)
        >>> bool(torch.allclose(product, left @ right, atol=1e-3))
        True
    """
    if not torch.is_grad_enabled() and is_onednn_faster(left, right):
        return onednn_bmm(left, right)
    return torch.matmul(left, right)
