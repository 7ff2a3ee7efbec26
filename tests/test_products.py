"""oneDNN's products against float64, where they are taken, and where they are not."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from tensordict import TensorDict
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import FlopCounterMode

from nclql_torchrl import products
from nclql_torchrl.critic import NoiseConditionedQNetwork
from nclql_torchrl.execution import _trace
from nclql_torchrl.products import batched_product, is_onednn_faster, onednn_bmm

pytestmark = pytest.mark.skipif(not torch.backends.mkldnn.is_available(), reason="torch has no oneDNN here")


@pytest.fixture
def mkl_is_slow(monkeypatch: pytest.MonkeyPatch) -> None:
    """As on a processor where torch's own products are slow."""
    monkeypatch.setattr(products, "MKL_IS_SLOW", True)


class Calls(TorchDispatchMode):
    """Counts calls of :func:`onednn_bmm`."""

    count = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.count += func is onednn_bmm
        return func(*args, **(kwargs or {}))


def layouts(matrices: Tensor) -> dict[str, Tensor]:
    """The same numbers as a batch may lie in memory."""
    batch, rows, columns = matrices.shape
    wide = torch.zeros(batch, rows, columns + 7)
    wide[..., :columns] = matrices
    return {
        "rows": matrices.contiguous(),
        "columns": matrices.mT.contiguous().mT,
        "slice": wide[..., :columns],
        "batch between": matrices.transpose(0, 1).contiguous().transpose(0, 1),
        "slice of columns": torch.cat([matrices.mT, matrices.mT], -1)[..., :rows].mT,
    }


@pytest.mark.parametrize("left_layout", layouts(torch.zeros(1, 1, 1)))
@pytest.mark.parametrize("right_layout", layouts(torch.zeros(1, 1, 1)))
def test_products_are_those_of_float64_to_float32s_precision(left_layout: str, right_layout: str) -> None:
    torch.manual_seed(0)
    left, right = layouts(torch.randn(3, 40, 96))[left_layout], layouts(torch.randn(3, 96, 24))[right_layout]
    error = (onednn_bmm(left, right) - left.double() @ right.double()).abs()
    # Every one of the sum's terms is rounded at most `inner` times.
    bound = 96 * torch.finfo(torch.float32).eps * (left.double().abs() @ right.double().abs())
    assert (error <= bound).all()


def test_one_matrix_for_all_is_expanded() -> None:
    left, right = torch.randn(64, 128).expand(4, -1, -1), torch.randn(4, 128, 16)
    torch.testing.assert_close(onednn_bmm(left, right), left @ right, rtol=1e-4, atol=1e-4)


def test_the_operator_is_described_rightly_to_compilers() -> None:
    torch.library.opcheck(onednn_bmm, (torch.randn(2, 8, 5), torch.randn(2, 5, 7)))
    torch.library.opcheck(onednn_bmm, (torch.randn(2, 5, 8).mT, torch.randn(2, 7, 5).mT))


def test_its_arithmetic_is_counted() -> None:
    with FlopCounterMode(display=False) as counter:
        onednn_bmm(torch.randn(2, 8, 5), torch.randn(2, 5, 7))
    assert counter.get_total_flops() == 2 * 2 * 8 * 5 * 7


def test_vmap_multiplies_every_batch() -> None:
    left, right = torch.randn(3, 2, 64, 64), torch.randn(2, 64, 64)
    with torch.no_grad():
        product = torch.vmap(onednn_bmm, (0, None))(left, right)
    torch.testing.assert_close(product, left @ right, rtol=1e-4, atol=1e-4)


@pytest.mark.usefixtures("mkl_is_slow")
def test_taken_for_large_float32_matrices_on_a_cpu_only() -> None:
    large, square = torch.randn(2, 64, 256), torch.randn(2, 256, 256)
    assert is_onednn_faster(large, square)
    assert not is_onednn_faster(large[:, :63], square), "too small"
    assert not is_onednn_faster(large[:1], square), "one for all"
    assert not is_onednn_faster(large.double(), square.double())
    assert not is_onednn_faster(large.bfloat16(), square.bfloat16())
    assert not is_onednn_faster(large.to("meta"), square.to("meta"))


def test_not_taken_where_torch_is_fast(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(products, "MKL_IS_SLOW", False)
    assert not is_onednn_faster(torch.randn(2, 64, 256), torch.randn(2, 256, 256))


@pytest.mark.usefixtures("mkl_is_slow")
def test_gradients_are_recorded_by_torchs_own_products() -> None:
    left, right = torch.randn(2, 64, 256, requires_grad=True), torch.randn(2, 256, 256, requires_grad=True)
    with Calls() as calls:
        batched_product(left, right).sum().backward()
        assert calls.count == 0
        with torch.no_grad():
            batched_product(left, right)
        assert calls.count == 1
    assert left.grad is not None and right.grad is not None
    torch.testing.assert_close(left.grad, right.detach().sum(-1).unsqueeze(1).expand(2, 64, 256))
    with torch.no_grad():
        gradient = torch.func.grad(lambda x: batched_product(x, right).sum())(left.detach())
    torch.testing.assert_close(gradient, left.grad)


def ensemble(observations: Tensor) -> Any:
    """A critic's values: two members, hidden layers of 256."""
    torch.manual_seed(0)
    networks = [NoiseConditionedQNetwork(observations.shape[-1], 2) for _ in range(2)]
    center, half_range = torch.zeros(2), torch.ones(2)
    return networks[0].action_value(
        TensorDict.from_modules(*networks), observations, num_levels=3, action_center=center,
        action_half_range=half_range,
    )  # fmt: skip


@pytest.mark.usefixtures("mkl_is_slow")
def test_a_critics_action_gradient_takes_them_in_every_hidden_layer(monkeypatch: pytest.MonkeyPatch) -> None:
    value = ensemble(torch.randn(64, 3)).at_level(1)
    action = torch.rand(64, 2) * 2 - 1
    with torch.no_grad(), Calls() as calls:
        gradient = value.gradient(action)
    assert calls.count == 4, "two layers, up and down"
    monkeypatch.setattr(products, "MKL_IS_SLOW", False)
    with torch.no_grad(), Calls() as calls:
        torch.testing.assert_close(gradient, value.gradient(action), rtol=1e-4, atol=1e-6)
    assert calls.count == 0


@pytest.mark.usefixtures("mkl_is_slow")
def test_a_traced_update_takes_them_forward_and_backward() -> None:
    x, weight = torch.randn(2, 64, 256), torch.randn(2, 256, 256, requires_grad=True)

    def function(x: Tensor) -> tuple[Tensor, ...]:
        loss = torch.bmm(x, weight).square().mean()
        return loss.detach(), *torch.autograd.grad(loss, weight)

    graph = _trace(function, [x])
    targets = [node.target for node in graph.graph.nodes]
    assert targets.count(onednn_bmm) == 2
    assert torch.ops.aten.bmm.default not in targets
    for found, expected in zip(graph(x), function(x), strict=True):
        torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)
