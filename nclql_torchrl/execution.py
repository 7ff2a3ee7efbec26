"""How chains and updates are executed, apart from what they compute: one by one, compiled, or as a CUDA graph.

==============  ====================================================================================================
``eager``       Operation by operation. Nothing to wait for; the library's default.
``compile``     The whole chain, and each step of an update from batch to gradients, as one compiled program
                (torch.compile). The first call of every batch shape compiles for tens of seconds on a CPU; later
                processes find the result in torch's cache on disk. On a CPU with AVX2 the action gradient of our
                critics is one operator in it (:mod:`nclql_torchrl.fused_gradient`).
``cudagraph``   The compiled programs captured as CUDA graphs: one launch instead of hundreds.
``auto``        ``cudagraph`` on a GPU with Triton, ``compile`` on a CPU with a C++ compiler, else ``eager``.
==============  ====================================================================================================

Whichever it is, the random numbers come from outside: what is compiled or captured is a deterministic function. Batches
too large for :data:`MEMORY_LIMIT` run in several parts, one after the other.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, Literal, TypeVar

import torch
from torch import Tensor, nn
from torch._dynamo.exc import BackendCompilerFailed
from torch.fx.experimental.proxy_tensor import make_fx
from torch.utils._triton import has_triton
from torchrl import torchrl_logger

from nclql_torchrl import fused_gradient
from nclql_torchrl.machine import cpp_compiler
from nclql_torchrl.mish import mish_with_slope
from nclql_torchrl.products import is_onednn_faster, onednn_bmm
from nclql_torchrl.value import ActionValue, check_choice

Execution = Literal["eager", "compile", "cudagraph", "auto"]
"""How a chain runs; see the module."""

Function = TypeVar("Function", bound=Callable[..., Any])

Chain = Callable[..., tuple[Tensor, ...]]
"""Sampler, values, start [*batch, action_dim], noise [num_levels, steps_per_level, *batch, noise_dim], and whether the
levels are a loop of the compiled program -> actions [*batch, action_dim], then the kernel's statistics, each of shape
[*batch]."""

WARMUP_CALLS = 3
"""Calls of a function before it is captured as a CUDA graph."""

MEMORY_LIMIT = 4 * 2**30
"""Bytes that one chain may need, by :attr:`ActionValue.memory_per_state`."""


def check_execution(execution: str) -> None:
    """Raises ValueError for an unknown choice, and RuntimeError where this machine lacks what it needs."""
    check_choice("execution", execution, Execution)
    if execution == "cudagraph" and not torch.cuda.is_available():
        raise RuntimeError(
            "execution is 'cudagraph', but this machine has no CUDA device; expected 'compile', 'eager', or "
            "'auto', which chooses what the machine can do."
        )
    if execution == "compile" and not torch.cuda.is_available() and cpp_compiler() is None:
        raise RuntimeError(
            "execution is 'compile', but neither $CXX, g++ nor clang++ is a C++ compiler here; expected 'eager', "
            "or 'auto', which chooses what the machine can do."
        )


def resolve(execution: Execution, device: str) -> Execution:
    """What "auto" means on a type of device; the other choices mean themselves."""
    if execution != "auto":
        return execution
    # On a GPU, too: Triton builds its launchers with the host's compiler.
    if cpp_compiler() is None:
        return "eager"
    if device == "cuda":
        return "cudagraph" if has_triton() else "eager"
    return "compile" if device == "cpu" else "eager"


def compiled(function: Function, device: str) -> Function:
    """The function of tensors on a type of device as one compiled program per batch shape.

    torch.compile counts and limits recompilations per code object: every program gets one of its own.
    """

    def program(*args: Any) -> Any:
        return function(*args)

    program.__code__ = program.__code__.replace()
    return _compile(program, device)  # pyright: ignore[reportReturnType]


def _compile(function: Callable[..., Any], device: str) -> Callable[..., Any]:
    """torch.compile, which also gets over what a killed process has left in torch's cache on disk.

    A process that dies while a library is being linked leaves an empty file, which torch 2.13 takes for the library in
    every later process. It is deleted and built again; a library that is empty then too is an error.
    """
    # dynamic=False: a shape that changes at run time (a smaller last batch) compiles its own fast version.
    # On a CPU what calls the kernels is C++, too: in Python it takes as long as the chain of a single state.
    options: dict[str, Any] | None = {"cpp_wrapper": True} if device == "cpu" else None
    program = torch.compile(function, fullgraph=True, dynamic=False, options=options)

    def call(*args: Any) -> Any:
        if torch.compiler.is_compiling():
            return program(*args)
        deleted: set[Path] = set()
        while True:
            try:
                return program(*args)
            except BackendCompilerFailed as error:
                library = _unfinished_library(error)
                if library is None or library in deleted:
                    raise
            torchrl_logger.warning(f"{library} was left unfinished by a killed process: deleted and built again.")
            library.unlink(missing_ok=True)
            deleted.add(library)

    return call


def _unfinished_library(error: BackendCompilerFailed) -> Path | None:
    """The library that could not be loaded because its file ends too early, if that is what the error is about."""
    cause = getattr(error, "inner_exception", None)
    if not isinstance(cause, ImportError) or cause.path is None or not str(cause).endswith(": file too short"):
        return None
    return Path(cause.path)


def capture(function: Callable[..., tuple[Any, ...]], inputs: Sequence[Tensor]) -> Callable[..., tuple[Any, ...]]:
    """A CUDA graph of a deterministic function without side effects, for inputs of these shapes and types.

    tensordict's CudaGraphModule does the same, but waits for the whole device before every replay, so that nothing is
    prepared on the host while the GPU works.
    """
    static = [tensor.clone() for tensor in inputs]
    # Streams are made on the current device, which need not be that of the tensors.
    with torch.cuda.device_of(static[0]):
        # What compiles, chooses kernels or makes handles does so before the capture, on a stream of its own.
        stream = torch.cuda.Stream()
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            for _ in range(WARMUP_CALLS):
                function(*static)
        torch.cuda.current_stream().wait_stream(stream)
        graph = torch.cuda.CUDAGraph()
        # JAX's threads may allocate meanwhile, which would spoil a capture that watches the whole process.
        with torch.cuda.graph(graph, capture_error_mode="thread_local"):
            outputs = function(*static)

    def replay(*inputs: Tensor) -> tuple[Any, ...]:
        # One launch for all of one type.
        torch._foreach_copy_(static, list(inputs), non_blocking=True)  # pyright: ignore[reportPrivateImportUsage]
        graph.replay()
        # The graph overwrites its outputs at the next replay.
        return tuple(None if output is None else output.clone() for output in outputs)

    return replay


class Executor:
    """Runs a sampler's chain as chosen.

    What it compiles or captures stays with it; a copied or unpickled executor starts anew.

    Args:
        chain: a pure function; its first argument is the module that holds the settings.
        execution: see the module.

    Raises:
        ValueError: for an unknown choice.
        RuntimeError: for "cudagraph" on a machine without CUDA, and "compile" on one without CUDA and C++ compiler.
    """

    def __init__(self, chain: Chain, execution: Execution) -> None:
        check_execution(execution)
        self.chain = chain
        self.execution: Execution = execution
        self._resolved: dict[str, Execution] = {}
        self._compiled: dict[str, Chain] = {}
        self._graphs: dict[tuple[object, ...], Chain] = {}

    def __reduce__(self) -> tuple[type[Executor], tuple[Chain, Execution]]:
        return Executor, (self.chain, self.execution)

    def __call__(self, sampler: nn.Module, value: ActionValue, start: Tensor, noise: Tensor) -> tuple[Tensor, ...]:
        """Normalised actions, shape [*batch, action_dim], and statistics, [*batch] each."""
        execution = self._resolve(value.device.type)
        run = {"eager": self.chain, "compile": self._compile, "cudagraph": self._replay}[execution]
        # The chain keeps no graph in any mode: saying so lets it use products without derivatives, and spares a second
        # compilation.
        with torch.no_grad(), tensor_cores(value.device):
            num_states, part = value.batch_shape.numel(), max(1, MEMORY_LIMIT // value.memory_per_state)
            if num_states <= part:
                return run(sampler, value, start, noise)
            return _in_parts(run, part, sampler, value, start, noise)

    def _resolve(self, device: str) -> Execution:
        """What "auto" means on a device; said once."""
        if self.execution != "auto":
            return self.execution
        if device not in self._resolved:
            self._resolved[device] = resolve("auto", device)
            torchrl_logger.info(f"execution=auto: Langevin chains on {device} run as {self._resolved[device]!r}.")
        return self._resolved[device]

    def _compile(self, sampler: nn.Module, value: ActionValue, start: Tensor, noise: Tensor) -> tuple[Tensor, ...]:
        device = value.device.type
        if device == "cpu" and not torch.compiler.is_compiling():
            fused_gradient.load()
        if device not in self._compiled:
            self._compiled[device] = compiled(self.chain, device)
        # One layout, also of dimensions of size 1: a caller's own noise and drawn noise are one compiled program.
        start, noise = (tensor.clone(memory_format=torch.contiguous_format) for tensor in (start, noise))
        # Unrolled, twenty steps take a minute to compile, and a loop of ten rounds a few seconds. Not on a GPU, where
        # every round would wait for the host; and not within a program that somebody else compiles: there a loop makes
        # torch 2.13 leave behind, for the whole process, the exploration type that the program has set.
        rolled = device == "cpu" and not torch.compiler.is_compiling()
        return self._compiled[device](sampler, value, start, noise, rolled)

    def _replay(self, sampler: nn.Module, value: ActionValue, start: Tensor, noise: Tensor) -> tuple[Tensor, ...]:
        """Replays the CUDA graph of this batch shape and these parameter tensors.

        Observations, start and noise are copied to where the graph reads them. The critics' parameters are read where
        they are, so that a graph sees what the optimizer writes into them; parameters that live elsewhere (target
        networks, reloaded ones) get a graph of their own.
        """
        if value.device.type != "cuda":
            raise RuntimeError(f"execution is 'cudagraph', but the critics are on {value.device}; expected a GPU.")
        static = (*value.parameters, *sampler.buffers())
        key = (noise.shape, start.dtype, *(tensor.data_ptr() for tensor in static))
        inputs = (start, noise, *(tensor.detach() for tensor in value.observations))
        if key not in self._graphs:

            def capturable(start: Tensor, noise: Tensor, *observations: Tensor) -> tuple[Tensor, ...]:
                return self._compile(sampler, value.at_observations(observations), start, noise)

            self._graphs[key] = capture(capturable, inputs)
        return self._graphs[key](*inputs)


class Program:
    """A function of tensors that computes gradients and writes nothing, run as chosen.

    Compiled or captured, it is traced once per shape of its inputs down to operations on tensors, gradients included:
    a graph without any Python, which compiles in a tenth of the time that torch.compile needs for losses and
    tensordicts, and has next to nothing to check at a call. What is no tensor, such as a loss's ``reward_scale``, is
    read at the first call; tensors that the function reads are read at every call, wherever they are.

    Args:
        function: tensors -> tuple of tensors and None; deterministic.
        execution: "eager", "compile" or "cudagraph".
        tensors: all other tensors that it reads.
    """

    def __init__(
        self, function: Callable[..., tuple[Any, ...]], execution: Execution, tensors: Sequence[Tensor]
    ) -> None:
        self._function = function
        self._execution = execution
        self._tensors = tensors
        self._traced: dict[tuple[object, ...], Callable[..., tuple[Any, ...]]] = {}

    def __call__(self, *inputs: Tensor) -> tuple[Any, ...]:
        """The function's value."""
        if self._execution == "eager":
            return self._function(*inputs)
        # Shapes, and where the other tensors are: moved ones belong to another graph.
        key = (*[tensor.shape for tensor in inputs], *[tensor.data_ptr() for tensor in self._tensors])
        if key not in self._traced:
            traced = _compile(_trace(self._function, inputs), inputs[0].device.type)
            self._traced[key] = capture(traced, inputs) if self._execution == "cudagraph" else traced
        return self._traced[key](*inputs)


def _trace(function: Callable[..., Any], inputs: Sequence[Tensor]) -> torch.fx.GraphModule:
    """The operations that a function performs, as a graph that tracks no gradients itself."""
    aten = torch.ops.aten
    graph = make_fx(
        function,
        # One exponential each, where torch's own decompositions take a logarithm and a hyperbolic tangent too, which
        # cost as much as the matrix products.
        decomposition_table={
            aten.mish.default: lambda x: mish_with_slope(x)[0],
            aten.mish_backward.default: lambda gradient, x: gradient * mish_with_slope(x)[1],
            aten.bmm.default: lambda x, y: onednn_bmm(x, y) if is_onednn_faster(x, y) else NotImplemented,
        },
    )(*inputs)
    for name, parameter in list(graph.named_parameters()):
        delattr(graph, name)
        graph.register_buffer(name, parameter.detach())
    return graph


def _in_parts(
    run: Chain, part: int, sampler: nn.Module, value: ActionValue, start: Tensor, noise: Tensor
) -> tuple[Tensor, ...]:
    """Runs at most ``part`` chains at a time."""
    batch_ndim = len(value.batch_shape)
    observations = [tensor.reshape(-1, *tensor.shape[batch_ndim:]).split(part) for tensor in value.observations]
    starts = start.reshape(-1, start.shape[-1]).split(part)
    noises = noise.reshape(*noise.shape[:2], -1, noise.shape[-1]).split(part, dim=2)
    outputs = [
        run(sampler, value.at_observations(observation), start_part, noise_part)
        for start_part, noise_part, observation in zip(starts, noises, zip(*observations, strict=True), strict=True)
    ]
    whole = (torch.cat(parts) for parts in zip(*outputs, strict=True))
    return tuple(output.reshape(*value.batch_shape, *output.shape[1:]) for output in whole)


@contextlib.contextmanager
def tensor_cores(device: torch.device) -> Iterator[None]:
    """TF32 products of float32 matrices on a GPU, as chains have them; the process's setting comes back.

    Args:
        device: of the matrices; on any but a CUDA device this does nothing.
    """
    matmul = torch.backends.cuda.matmul
    # Not `allow_tf32`, which cannot be read any more once a user has set the newer `fp32_precision`.
    if device.type != "cuda" or torch.compiler.is_compiling() or matmul.fp32_precision == "tf32":
        yield
        return
    previous = matmul.fp32_precision
    matmul.fp32_precision = "tf32"
    try:
        yield
    finally:
        matmul.fp32_precision = previous
