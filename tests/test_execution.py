"""Promises of every way to run a chain: the same actions as eager, fresh noise, no recompilation."""

from __future__ import annotations

import copy
import pickle
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from tensordict import TensorDict
from tensordict.nn import TensorDictModule
from torch import Tensor, nn
from torch._dynamo import lookup_backend
from torch._dynamo.utils import counters
from torch._inductor import config as inductor
from torch._inductor.cpp_builder import CppBuilder
from torch._inductor.exc import InductorError
from torch._inductor.utils import fresh_cache, run_and_get_code
from torchrl.collectors import Collector
from torchrl.data import Bounded
from torchrl.envs import GymEnv, SerialEnv
from torchrl.envs.utils import ExplorationType, set_exploration_type
from torchrl.modules import ValueOperator

from nclql_torchrl import LangevinActor, LangevinSampler, NoiseConditionedQNetwork, NoiseSchedule, execution, machine
from nclql_torchrl.value import ModuleActionValue

IN_KEYS = ["observation", "action", "level"]
SCHEDULE = NoiseSchedule(2, 0.012, 0.01)
"""Two levels: enough to see that levels differ, little to compile, and close enough to mix."""


class AnyQ(nn.Module):
    """A critic that the library knows nothing about."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.Sequential(nn.Linear(5, 8), nn.Tanh(), nn.Linear(8, 1))

    def forward(self, observation: Tensor, action: Tensor) -> Tensor:
        return self.layers(torch.cat([observation, action], -1))


def make(kind: str, **options: Any) -> LangevinActor:
    """An actor over observations of size 3 and actions of size 2 in [-2, 2], with one step per level."""
    torch.manual_seed(1)
    if kind != "any":
        bounds: Any = {"action_low": -2.0, "action_high": 2.0}
        networks = [
            NoiseConditionedQNetwork(3, 2, (16, 16), layer_norm=kind == "layer_norm", **bounds) for _ in range(2)
        ]
        critics = [ValueOperator(network, in_keys=IN_KEYS) for network in networks]
    else:
        critics = [TensorDictModule(AnyQ(), ["observation", "action"], ["state_action_value"]) for _ in range(2)]
    options = {"schedule": SCHEDULE, "steps_per_level": 1, "w": 5.0} | options
    return LangevinActor(critics, spec=Bounded(-2.0, 2.0, torch.Size([2])), **options)


def like(actor: LangevinActor, **options: Any) -> LangevinActor:
    """Another actor on the very parameters of ``actor``."""
    options = {"schedule": SCHEDULE, "steps_per_level": 1, "w": 5.0} | options
    return LangevinActor(actor.qvalue_network, actor.qvalue_network_params, spec=actor.spec["action"], **options)


def observations(*shape: int) -> TensorDict:
    return TensorDict({"observation": torch.randn(*shape, 3)}, shape)


def explicit(*shape: int) -> TensorDict:
    """Observations with start and noise."""
    batch = observations(*shape)
    batch["initial_action"] = torch.rand(*shape, 1, 2) * 2 - 1
    batch["langevin_noise"] = torch.randn(*shape, 1, 2, 1, 2)
    return batch


@pytest.fixture(scope="module", params=["standard", "layer_norm", "any"])
def pair(request: pytest.FixtureRequest) -> Iterator[tuple[LangevinActor, LangevinActor]]:
    """An eager actor and a compiled one on the same critics; the module's tests share what it compiles."""
    eager = make(request.param)
    yield eager, like(eager, execution="compile")


@pytest.mark.slow
def test_compiled_is_eager_follows_parameters_and_compiles_once(pair: tuple[LangevinActor, LangevinActor]) -> None:
    eager, compiled = pair
    # Twice: tensordict's memo of known classes, on which a foreign Q's program depends, is complete after the first.
    for _ in range(2):
        eager(explicit(6))
        compiled(explicit(6))
    before = counters["stats"]["unique_graphs"]
    assert before > 0
    for _ in range(3):
        batch = explicit(6)
        # Two programs that round each of a few dozen float32 operations differently, two steps of slope w / 2 at most.
        expected, action = eager(batch.clone())["action"], compiled(batch.clone())["action"]
        torch.testing.assert_close(action, expected, atol=1e-5, rtol=0)
        with torch.no_grad():
            for parameter in eager.qvalue_network_params.parameters():
                parameter.add_(0.1 * torch.randn_like(parameter))
    batch = observations(6)
    assert not torch.equal(compiled(batch.clone())["action"], compiled(batch.clone())["action"]), "noise is fresh"
    with torch.no_grad():
        compiled(batch.clone())
        with set_exploration_type(ExplorationType.DETERMINISTIC):
            compiled(batch.clone())
    assert counters["stats"]["unique_graphs"] == before, "no recompilation"
    with torch.inference_mode():
        assert compiled(observations(6))["action"].isfinite().all()


@pytest.mark.parametrize("kernel", ["mala", "underdamped", "preconditioned"])
def test_a_loop_over_the_levels_is_eager_with_every_kernel(kernel: str, monkeypatch: pytest.MonkeyPatch) -> None:
    loops: list[bool] = []

    def backend(graph: torch.fx.GraphModule, inputs: list[Tensor], **options: object) -> Callable[..., Any]:
        loops.append(any("while_loop" in str(node.target) for node in graph.graph.nodes))
        return lookup_backend("aot_eager")(graph, inputs)

    # Traced as it is for a compiler, but run without one: seconds instead of minutes.
    monkeypatch.setattr(execution.torch, "compile", partial(torch.compile, backend=backend))
    options: dict[str, Any] = {
        "kernel": kernel,
        "normalize_gradient": False,
        "boundary": "reflect",
        "steps_per_level": 2,
    }
    eager = make("standard", schedule=NoiseSchedule(4, 0.07, 0.01), **options)
    looped = like(eager, schedule=NoiseSchedule(4, 0.07, 0.01), execution="compile", **options)
    value = eager.action_value(observations(50))
    noise_dim = eager.sampler.kernel.noise_dim(2)
    start, noise = torch.rand(1, 50, 2) * 2 - 1, torch.randn(3, 2, 1, 50, noise_dim)
    expected, statistics = eager.sampler.sample(value, start, noise, start_level=1)
    action, found = looped.sampler.sample(value, start, noise, start_level=1)
    # Both round each of some hundred float32 operations: the same ones, but some in another order.
    torch.testing.assert_close(action, expected, atol=1e-5, rtol=0)
    torch.testing.assert_close(found, statistics, atol=1e-5, rtol=0)
    assert (action - start).abs().max() > 0.01, "chains move"
    assert loops and all(loops)


@pytest.mark.slow
@pytest.mark.skipif(machine.cpp_compiler() is None, reason="needs a C++ compiler")
def test_a_library_that_a_killed_process_left_empty_is_built_again(monkeypatch: pytest.MonkeyPatch) -> None:
    emptied: list[Path] = []
    said: list[str] = []
    build = CppBuilder.build

    def killed_once(self: CppBuilder) -> None:
        build(self)
        library = Path(self.get_target_file_path())
        if library.name.endswith(".main.so") and not emptied:
            library.unlink()
            library.touch()
            emptied.append(library)

    monkeypatch.setattr(CppBuilder, "build", killed_once)
    monkeypatch.setattr(execution.torchrl_logger, "warning", said.append)
    x = torch.randn(5)
    with fresh_cache(), inductor.patch(compile_threads=1):
        torch.testing.assert_close(execution.compiled(lambda x: x.sin() + 1.25, "cpu")(x), x.sin() + 1.25)
        assert emptied[0].stat().st_size > 0
    assert said == [f"{emptied[0]} was left unfinished by a killed process: deleted and built again."]


def test_only_an_unfinished_library_is_deleted_and_only_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    library, said = tmp_path / "a.main.so", []
    monkeypatch.setattr(execution.torchrl_logger, "warning", said.append)

    def failing(text: str) -> Callable[[], None]:
        def program() -> None:
            library.touch()
            raise InductorError(ImportError(f"{library}: {text}", path=str(library)), None)

        monkeypatch.setattr(execution.torch, "compile", lambda *args, **options: program)
        return execution.compiled(lambda: None, "cpu")

    with pytest.raises(InductorError, match="undefined symbol"):
        failing("undefined symbol: f")()
    assert library.exists() and not said
    with pytest.raises(InductorError, match="file too short"):
        failing("file too short")()
    assert len(said) == 1, "a library that stays empty, on a full disk say, is an error"


@pytest.mark.slow
def test_compiled_acts_inside_a_collector() -> None:
    critic = ValueOperator(NoiseConditionedQNetwork(3, 1, (8,), action_low=-2.0, action_high=2.0), in_keys=IN_KEYS)
    env = SerialEnv(2, lambda: GymEnv("Pendulum-v1"))
    actor = LangevinActor(
        [critic], spec=env.action_spec_unbatched, schedule=SCHEDULE, steps_per_level=1, w=5.0, execution="auto"
    )
    collector = Collector(env, actor, frames_per_batch=20, total_frames=40, auto_register_policy_transforms=False)
    batches = list(collector)
    assert len(batches) == 2 and batches[1]["action"].unique().numel() > 2
    collector.shutdown()


@pytest.mark.parametrize("kind", ["standard", "layer_norm", "any"])
def test_bfloat16_products_stay_close(kind: str) -> None:
    actor = make(kind)
    low = like(actor, precision="bfloat16")
    batch = explicit(200)
    value, low_value = actor.action_value(batch), low.action_value(batch)
    action = torch.rand(1, 200, 2) * 2 - 1
    exact = value.at_level(1).gradient(action)
    error = (low_value.at_level(1).gradient(action) - exact).norm(dim=-1) / exact.norm(dim=-1).mean()
    # Operands rounded to 8 bits, relative error 2^-9 each, through at most six products: independent errors add up to
    # sqrt(12) 2^-9 = 0.7% of a typical gradient. Ten of those bound the worst of 200; float32 itself would show 1e-7.
    assert 1e-4 < error.mean() < 0.02 and error.max() < 0.07
    assert low(batch)["action"].dtype == torch.float32


@pytest.mark.slow
@pytest.mark.parametrize("states", [1, 3])
def test_few_states_are_multiplied_in_loops_over_buffers(states: int) -> None:
    actor = make("standard")
    value = actor.action_value(observations(states)).at_level(1)
    action = torch.rand(1, states, 2) * 2 - 1
    gradient = torch.compile(value.gradient, fullgraph=True, dynamic=False)
    found, (code,) = run_and_get_code(gradient, action)
    torch.testing.assert_close(found, value.gradient(action), atol=1e-6, rtol=1e-5)
    assert "bmm(" not in code, "no library is called"
    # Mish and its slope divide. What divides inside of a sum is computed anew for every column of the weight.
    sums = [loop for loop in code.split("tmp_acc0 = 0;")[1:] if "tmp_acc0_vec + " in loop]
    assert sums and not any("/" in loop.split("tmp_acc0_vec + ")[0].replace("//", "") for loop in sums)


@pytest.mark.parametrize("kind", ["standard", "any"])
def test_parts_are_the_whole(kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    actor = make(kind, num_particles=2)
    batch = observations(3, 5)
    value = actor.action_value(batch, num_particles=2)
    start, noise = torch.rand(2, 3, 5, 2), torch.randn(2, 1, 2, 3, 5, 2)
    whole = actor.sampler(value, start, noise)
    calls: list[int] = []
    original = type(value).levels
    monkeypatch.setattr(type(value), "levels", lambda self: (calls.append(self.batch_shape.numel()), original(self))[1])
    monkeypatch.setattr(execution, "MEMORY_LIMIT", 7 * value.memory_per_state)
    torch.testing.assert_close(actor.sampler(value, start, noise), whole, atol=1e-5, rtol=0)
    assert calls == [7, 7, 7, 7, 2]


def test_copies_start_anew() -> None:
    actor = make("standard", execution="compile")
    for twin in (copy.deepcopy(actor), pickle.loads(pickle.dumps(actor.sampler))):
        sampler = twin if isinstance(twin, LangevinSampler) else twin.sampler
        assert sampler.execution == "compile" and sampler._execute is not actor.sampler._execute
    eager = make("standard")
    twin = copy.deepcopy(eager)
    twin.sampler.w.fill_(1e-6)
    batch = explicit(4)
    assert not torch.equal(eager(batch.clone())["action"], twin(batch.clone())["action"]), "its own temperature"


@pytest.mark.skipif(torch.cuda.is_available(), reason="needs a machine without CUDA")
def test_what_a_machine_lacks_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(RuntimeError, match=r"execution is 'cudagraph'.*no CUDA device.*'auto'"):
        make("standard", execution="cudagraph")
    monkeypatch.setattr(machine.shutil, "which", lambda name: None)
    with pytest.raises(RuntimeError, match=r"execution is 'compile'.*C\+\+ compiler"):
        make("standard", execution="compile")
    actor = make("standard", execution="auto")
    said: list[str] = []
    monkeypatch.setattr(execution.torchrl_logger, "info", said.append)
    for _ in range(2):
        actor(observations(2))
    assert said == ["execution=auto: Langevin chains on cpu run as 'eager'."]


def test_other_observations_keep_the_critics() -> None:
    actor = make("any")
    value = actor.action_value(observations(3, 4))
    assert isinstance(value, ModuleActionValue)
    other = value.at_observations((torch.randn(7, 3),))
    assert other.batch_shape == torch.Size([7]) and other.stacked is not None
    assert [p.data_ptr() for p in other.parameters] == [p.data_ptr() for p in value.parameters]


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("mode", ["compile", "cudagraph", "auto"])
@pytest.mark.parametrize("kind", ["standard", "layer_norm", "any"])
def test_gpu_modes_agree_with_eager(kind: str, mode: str) -> None:
    eager = make(kind).to("cuda")
    actor = like(eager, execution=mode)
    for _ in range(5):  # beyond the capture, which is the first
        batch = explicit(6).to("cuda")
        expected, action = eager(batch.clone())["action"], actor(batch.clone())["action"]
        # TF32 keeps 11 bits of an operand: a relative gradient error of about 1e-3, drift at most w / 2 * step.
        torch.testing.assert_close(action, expected, atol=2e-2, rtol=0)
        with torch.no_grad():
            for parameter in eager.qvalue_network_params.parameters():
                parameter.add_(0.1 * torch.randn_like(parameter))
    batch = observations(6).to("cuda")
    assert not torch.equal(actor(batch.clone())["action"], actor(batch.clone())["action"]), "noise is fresh"
    assert torch.backends.cuda.matmul.fp32_precision != "tf32", "the process's setting comes back"


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("mode", ["eager", "compile", "cudagraph"])
def test_65536_states_stay_below_8_gib(mode: Any) -> None:
    critics = [ValueOperator(NoiseConditionedQNetwork(348, 17, device="cuda"), in_keys=IN_KEYS) for _ in range(2)]
    actor = LangevinActor(critics, spec=Bounded(-1.0, 1.0, torch.Size([17]), device="cuda"), execution=mode)
    batch = TensorDict({"observation": torch.randn(65_536, 348, device="cuda")}, [65_536])
    torch.cuda.reset_peak_memory_stats()
    for _ in range(4):
        actor(batch.clone())
    assert torch.cuda.max_memory_allocated() < 8 * 2**30
