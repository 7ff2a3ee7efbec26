"""The fused operator against float64, where compiled chains take it, and how it is built."""

from __future__ import annotations

import subprocess
from collections.abc import Callable
from functools import partial
from itertools import pairwise
from pathlib import Path
from typing import Any, get_args

import pytest
import torch
import torch.nn.functional as F
from filelock import FileLock
from tensordict import TensorDict
from torch import Tensor
from torch._dynamo import lookup_backend

from nclql_torchrl import LangevinSampler, NoiseConditionedQNetwork, NoiseSchedule, execution, fused_gradient
from nclql_torchrl.fused_gradient import FusedCritics, is_fusable, load
from nclql_torchrl.machine import cpp_compiler
from nclql_torchrl.profiling.schedules import ResampledActionValue
from nclql_torchrl.value import ActionValue, EnsembleReduction, Precision

load()
TYPES = fused_gradient._operand_types or ()
pytestmark = pytest.mark.skipif(not TYPES, reason="needs a processor with AVX2, and a C++ compiler")

Layers = list[tuple[Tensor, Tensor]]


def make_layers(widths: tuple[int, ...], num_critics: int, action_dim: int) -> tuple[Tensor, Layers]:
    """The action's part of the first layer, and weights and biases of the others."""
    torch.manual_seed(0)
    inputs = (*widths, 1)
    layers = [
        (torch.randn(num_critics, outputs, given) / given**0.5, 0.3 * torch.randn(num_critics, 1, outputs))
        for given, outputs in pairwise(inputs)
    ]
    return torch.randn(num_critics, widths[0], action_dim) / action_dim**0.5, layers


def exact(action: Tensor, features: Tensor, action_weight: Tensor, layers: Layers) -> tuple[Tensor, Tensor]:
    """Values and gradients in float64, by automatic differentiation."""
    action = action.double().expand(len(features), -1, -1).detach().requires_grad_()
    hidden = features.double() + action @ action_weight.double().mT
    for weight, bias in layers:
        hidden = F.mish(hidden) @ weight.double().mT + bias.double()
    return hidden.detach().squeeze(-1), torch.autograd.grad(hidden.sum(), action)[0]


@pytest.mark.parametrize("dtype", TYPES)
@pytest.mark.parametrize("batch", [1, 2, 16, 17, 64, 65, 200])
@pytest.mark.parametrize(
    ("widths", "num_critics", "action_dim"), [((256, 256, 256), 2, 6), ((16, 64, 32), 1, 1), ((48, 16), 3, 17)]
)
@pytest.mark.parametrize("threads", [1, 2])
def test_values_and_gradients_are_those_of_float64(
    threads: int, widths: tuple[int, ...], num_critics: int, action_dim: int, batch: int, dtype: torch.dtype
) -> None:
    action_weight, layers = make_layers(widths, num_critics, action_dim)
    action = torch.rand(batch, action_dim) * 2 - 1
    features, level_features = torch.randn(num_critics, batch, widths[0]), torch.randn(num_critics, 1, widths[0])
    critics = FusedCritics.of(action_weight, layers[:-1], layers[-1], dtype, batch)
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        values, gradients = critics.values_and_gradients(action, features, level_features)
    finally:
        torch.set_num_threads(before)
    exact_values, exact_gradients = exact(action, features + level_features, action_weight, layers)
    # Operands are rounded to 24 bits or to 8, at most six times in a row: independent errors add up to sqrt(12) of a
    # half unit in the last place relative to a typical gradient. Ten of those bound the worst; sums of 256 rounded
    # numbers and an exponential that errs by 20 units add as much again in float32.
    unit = torch.finfo(dtype).eps / 2
    bound = 20 * 12**0.5 * unit
    assert (values - exact_values).abs().max() <= bound * exact_values.abs().max().clamp(min=1.0)
    assert (gradients - exact_gradients).norm(dim=-1).max() <= bound * exact_gradients.norm(dim=-1).mean()


@pytest.mark.parametrize("dtype", TYPES)
def test_far_from_zero_it_is_the_limit_and_what_is_no_number_stays_none(dtype: torch.dtype) -> None:
    action_weight, layers = make_layers((16, 16), 1, 1)
    critics = FusedCritics.of(action_weight, layers[:-1], layers[-1], dtype, 4)
    level_features = torch.zeros(1, 1, 16)
    features = torch.tensor([-1e4, 1e4, -30.0, 30.0]).reshape(1, 4, 1).expand(1, 4, 16)
    action = torch.zeros(4, 1)
    values, gradients = critics.values_and_gradients(action, features, level_features)
    exact_values, exact_gradients = exact(action, features, action_weight, layers)
    bound = 100 * torch.finfo(dtype).eps
    torch.testing.assert_close(values.double(), exact_values, rtol=bound, atol=bound)
    torch.testing.assert_close(gradients.double(), exact_gradients, rtol=bound, atol=bound)
    nan = critics.values_and_gradients(torch.full((4, 1), torch.nan), features, level_features)
    assert all(tensor.isnan().all() for tensor in nan)


def test_the_operator_is_described_rightly_to_compilers() -> None:
    action_weight, layers = make_layers((32, 16), 2, 3)
    for batch in (1, 5):
        critics = FusedCritics.of(action_weight, layers[:-1], layers[-1], torch.float32, batch)
        inputs = (torch.rand(batch, 3), torch.randn(2, batch, 32), torch.randn(2, 1, 32), *critics)
        torch.library.opcheck(torch.ops.nclql_torchrl.fused_gradient.default, inputs)


def test_tensors_may_lie_in_memory_as_they_like() -> None:
    action_weight, layers = make_layers((32, 16), 2, 3)
    critics = FusedCritics.of(action_weight, layers[:-1], layers[-1], torch.float32, 5)
    action, features, level_features = torch.rand(5, 3), torch.randn(2, 5, 32), torch.randn(2, 1, 32)
    expected = critics.values_and_gradients(action, features, level_features)
    wide = torch.cat([features, features], -1)[..., :32]
    found = critics.values_and_gradients(
        action.T.contiguous().T, wide, level_features.transpose(0, 1).contiguous().mT.mT.transpose(0, 1)
    )
    torch.testing.assert_close(found, expected, rtol=0, atol=0)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"action": torch.zeros(4, 3)}, r"action has shape \[4, 3\].*expected \[batch, action_dim\]"),
        ({"biases": []}, "up, down and biases have 1, 1 and 0 layers"),
        ({"down": [torch.zeros(2, 16, 8)]}, r"down has shape \[2, 16, 8\] at hidden layer 1; expected .*32"),
        ({"up": [], "down": [torch.zeros(2, 16, 32).bfloat16()]}, "down is BFloat16 and up empty; expected float32"),
    ],
)
def test_shapes_that_do_not_fit_are_named(change: dict[str, Any], words: str) -> None:
    action_weight, layers = make_layers((32, 16), 2, 3)
    critics = FusedCritics.of(action_weight, layers[:-1], layers[-1], torch.float32, 5)
    arguments = {
        "action": torch.zeros(5, 3), "observation_features": torch.zeros(2, 5, 32),
        "level_features": torch.zeros(2, 1, 32), **critics._asdict(), **change,
    }  # fmt: skip
    with pytest.raises(RuntimeError, match=words):
        torch.ops.nclql_torchrl.fused_gradient.default(*arguments.values())


def ensemble(batch: int = 6, num_critics: int = 2, action_dim: int = 2, **options: Any) -> ActionValue:
    """A critic's values at random observations."""
    torch.manual_seed(0)
    network: dict[str, Any] = {"hidden_sizes": (32, 16)} | {
        key: options.pop(key) for key in ("hidden_sizes", "layer_norm") if key in options
    }
    networks = [NoiseConditionedQNetwork(3, action_dim, **network) for _ in range(num_critics)]
    center, half_range = torch.zeros(action_dim), torch.ones(action_dim)
    return networks[0].action_value(
        TensorDict.from_modules(*networks), torch.randn(batch, 3), num_levels=3, action_center=center,
        action_half_range=half_range, **options,
    )  # fmt: skip


def counting(calls: list[int]) -> Callable[..., Any]:
    """A backend of torch.compile that runs graphs as they are and notes each one's calls of the operator."""

    def backend(graph: torch.fx.GraphModule, inputs: list[Tensor], **options: object) -> Callable[..., Any]:
        operator = torch.ops.nclql_torchrl.fused_gradient.default
        parts = [module for module in graph.modules() if isinstance(module, torch.fx.GraphModule)]
        calls.append(sum(node.target is operator for part in parts for node in part.graph.nodes))
        return lookup_backend("aot_eager")(graph, inputs)

    return backend


@pytest.mark.parametrize("precision", ["float32", "bfloat16"])
@pytest.mark.parametrize(
    ("wrapped", "batch", "num_critics", "action_dim"),
    [(False, 6, 2, 2), (True, 6, 2, 2), (False, 1, 2, 2), (False, 6, 2, 1), (False, 1, 1, 1)],
)
def test_compiled_chains_take_it_also_for_values_of_others(
    wrapped: bool,
    batch: int,
    num_critics: int,
    action_dim: int,
    precision: Precision,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    if getattr(torch, precision) not in TYPES:
        pytest.skip("the processor has no bfloat16 products")
    calls: list[int] = []
    monkeypatch.setattr(execution.torch, "compile", partial(torch.compile, backend=counting(calls)))
    loads: list[bool] = []
    monkeypatch.setattr(fused_gradient, "load", lambda: loads.append(True))
    value = ensemble(batch, num_critics, action_dim, precision=precision)
    if wrapped:
        value = ResampledActionValue(value, (0, 2), torch.tensor([0, 2]))
    bound = torch.ones(action_dim)
    schedule = NoiseSchedule(2, 0.012, 0.01) if wrapped else NoiseSchedule(3, 0.02, 0.01)
    chain = LangevinSampler(-bound, bound, schedule, steps_per_level=1, w=5.0, execution="compile")
    start, noise = torch.rand(batch, action_dim) * 2 - 1, torch.randn(schedule.num_levels, 1, batch, action_dim)
    eager = LangevinSampler(-bound, bound, schedule, steps_per_level=1, w=5.0)
    # Two programs that round each of a few dozen float32 operations differently; or operands to 8 bits, on which a step
    # of step_size w / 2 along a unit vector turns by a few percent.
    found, expected = chain(value, start, noise), eager(value, start, noise)
    torch.testing.assert_close(found, expected, atol=1e-5 if precision == "float32" else 1e-3, rtol=0)
    assert calls and set(calls) == {1}, "in the loop over the levels"
    assert loads == [True], "by whoever runs the chain, before it is compiled"


def traced(function: Callable[..., Any], *inputs: Tensor) -> tuple[Any, int]:
    """What the compiled function returns, and how many calls of the operator its graph has."""
    calls: list[int] = []
    result = torch.compile(function, backend=counting(calls), fullgraph=True)(*inputs)
    return result, sum(calls)


@pytest.mark.parametrize("reduction", get_args(EnsembleReduction))
@pytest.mark.parametrize("batch", [1, 6])
def test_compiled_gradients_are_the_operators(batch: int, reduction: EnsembleReduction) -> None:
    value = ensemble(batch, reduction=reduction)
    action = torch.rand(batch, 2) * 2 - 1
    with torch.no_grad():
        found, calls = traced(lambda action: value.at_level(1).value_and_gradient(action), action)
        # The same as heads alone, which take no gradient.
        both, _ = traced(lambda action: (value.at_level(1)(action), value.at_level(1).gradient(action)), action)
        expected = value.at_level(1).value_and_gradient(action)
    assert calls == 1
    # Two programs that round each of a few dozen float32 operations differently.
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(both, expected, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("over", ["actions", "critics"])
def test_vmap_takes_turns(over: str) -> None:
    action_weight, layers = make_layers((32, 16), 2, 3)
    features, level_features = torch.randn(2, 5, 32), torch.randn(2, 1, 32)
    actions, scales = torch.rand(4, 5, 3), torch.tensor([0.5, 1.0, 2.0, 3.0])

    def gradients(action: Tensor, scale: Tensor) -> tuple[Tensor, Tensor]:
        hidden = [(weight * scale, bias) for weight, bias in layers[:-1]]
        critics = FusedCritics.of(action_weight, hidden, layers[-1], torch.float32, 5)
        return critics.values_and_gradients(action, features, level_features)

    in_dims = (0, None) if over == "actions" else (None, 0)
    inputs = (actions, scales[1]) if over == "actions" else (actions[0], scales)
    found = torch.vmap(gradients, in_dims)(*inputs)
    pairs = [(action, scales[1]) for action in actions] if over == "actions" else [(actions[0], s) for s in scales]
    turns = [gradients(*pair) for pair in pairs]
    torch.testing.assert_close(found, tuple(torch.stack(part) for part in zip(*turns, strict=True)), rtol=0, atol=0)


def test_compiled_code_may_map_over_it() -> None:
    value, actions = ensemble(), torch.rand(3, 6, 2) * 2 - 1
    gradient = torch.vmap(lambda action: value.at_level(1).gradient(action))
    with torch.no_grad():
        found, calls = traced(gradient, actions)
        torch.testing.assert_close(found, gradient(actions), rtol=1e-5, atol=1e-6)
    assert calls == 1


def test_critics_that_tie_share_the_gradient() -> None:
    value = ensemble(reduction="min")
    assert value.parameters[0].shape[0] == 2
    for tensor in value.parameters:
        tensor[1] = tensor[0]
    action = torch.rand(6, 2) * 2 - 1
    with torch.no_grad():
        found, calls = traced(lambda action: value.at_level(1).gradient(action), action)
        torch.testing.assert_close(found, value.at_level(1).gradient(action), rtol=1e-5, atol=1e-6)
    assert calls == 1


def test_where_it_cannot_compute_the_gradient_compiled_code_does_without() -> None:
    action = torch.rand(6, 2) * 2 - 1

    def calls(value: ActionValue, action: Tensor = action) -> int:
        return traced(lambda action: value.at_level(1).gradient(action), action)[1]

    with torch.no_grad():
        assert calls(ensemble()) == 1
        assert calls(ensemble(layer_norm=True)) == 0
        assert calls(ensemble(hidden_sizes=(32, 24))) == 0, "16 does not divide 24"
        assert calls(ensemble(hidden_sizes=(32,))) == 0, "no product between hidden layers"
    assert calls(ensemble()) == 0, "gradients are recorded, and it has none"
    with torch.no_grad():
        value = ensemble()
        program = torch.export.export(Exported(value), (action,))
    assert not any("fused" in str(node.target) for node in program.graph.nodes), "no such operator where a program runs"


class Exported(torch.nn.Module):
    """A gradient as a module."""

    def __init__(self, value: ActionValue) -> None:
        super().__init__()
        self.value = value

    def forward(self, action: Tensor) -> Tensor:
        return self.value.at_level(1).gradient(action)


def test_taken_for_float32_on_a_cpu_only() -> None:
    hidden = [(torch.zeros(2, 16, 32), torch.zeros(2, 1, 16))]
    features = torch.zeros(2, 5, 32)
    assert is_fusable(features, hidden, torch.float32)
    assert is_fusable(features, hidden, torch.bfloat16) == (torch.bfloat16 in TYPES)
    assert not is_fusable(features.double(), hidden, torch.float64)
    assert not is_fusable(features.to("meta"), hidden, torch.float32)


@pytest.fixture
def unloaded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """As in a new process with an empty cache of extensions, whose directory is returned."""
    monkeypatch.setattr(fused_gradient, "_operand_types", None)
    monkeypatch.setenv("TORCH_EXTENSIONS_DIR", str(tmp_path))
    return tmp_path / "nclql_torchrl"


def test_built_once_and_only_a_finished_library_is_kept(unloaded: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    loaded: list[Path] = []
    monkeypatch.setattr(torch.ops, "load_library", loaded.append)
    run, commands = subprocess.run, []

    def killed(command: list[str], **options: Any) -> None:
        Path(command[-1]).touch()
        raise KeyboardInterrupt

    monkeypatch.setattr(fused_gradient.subprocess, "run", killed)
    with pytest.raises(KeyboardInterrupt):
        load()
    assert not list(unloaded.glob("*.so")) and not loaded

    def counted(command: list[str], **options: Any) -> object:
        commands.append(command)
        return run(["cp", str(fused_gradient.SOURCE), command[-1]], **options)

    monkeypatch.setattr(fused_gradient.subprocess, "run", counted)
    for _ in range(2):
        load()
        monkeypatch.setattr(fused_gradient, "_operand_types", None)
    assert len(commands) == 1 and loaded == [*unloaded.glob("*.so")] * 2
    assert loaded[0].read_text() == fused_gradient.SOURCE.read_text()


def test_one_process_builds_and_others_wait(unloaded: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    locks: list[Path] = []
    loaded: list[Path] = []

    class BuiltMeanwhile(FileLock):
        """A lock that is free when another process has built the library."""

        def acquire(self, *args: Any, **options: Any) -> Any:
            locks.append(Path(self.lock_file))
            locks[0].with_suffix(".so").touch()
            return super().acquire(*args, **options)

    monkeypatch.setattr(fused_gradient, "FileLock", BuiltMeanwhile)
    monkeypatch.setattr(torch.ops, "load_library", loaded.append)
    monkeypatch.setattr(fused_gradient.subprocess, "run", None)
    load()
    assert loaded == [locks[0].with_suffix(".so")]


@pytest.mark.usefixtures("unloaded")
@pytest.mark.parametrize("reason", ["does not compile", "no place for it"])
def test_a_build_that_fails_is_said_once_and_chains_go_on(
    reason: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    said: list[str] = []
    monkeypatch.setattr(fused_gradient.torchrl_logger, "warning", said.append)
    if reason == "does not compile":
        source = tmp_path / "broken.cpp"
        source.write_text("no such language;")
        monkeypatch.setattr(fused_gradient, "SOURCE", source)
    else:
        (tmp_path / "nclql_torchrl").touch()
    for _ in range(2):
        load()
    assert len(said) == 1 and "could not be built" in said[0]
    assert ("broken.cpp:1" if reason == "does not compile" else "File exists") in said[0]
    value = ensemble()
    action = torch.rand(6, 2) * 2 - 1
    with torch.no_grad():
        found, calls = traced(lambda action: value.at_level(1).gradient(action), action)
        torch.testing.assert_close(found, value.at_level(1).gradient(action), rtol=1e-5, atol=1e-6)
    assert calls == 0


@pytest.mark.usefixtures("unloaded")
def test_nothing_is_built_for_other_processors(monkeypatch: pytest.MonkeyPatch) -> None:
    assert cpp_compiler() is not None
    monkeypatch.setattr(torch.backends.cpu, "get_cpu_capability", lambda: "DEFAULT")
    monkeypatch.setattr(fused_gradient.subprocess, "run", None)
    load()
    assert fused_gradient._operand_types == ()
