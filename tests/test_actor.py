"""Promises of LangevinActor: TorchRL's conventions, exploration types, live parameters, explicit randomness."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from tensordict import TensorDict, TensorDictParams
from tensordict.nn import TensorDictModule
from torch import Tensor, nn
from torchrl.collectors import Collector
from torchrl.data import Bounded, Composite, Unbounded
from torchrl.envs import GymEnv, SerialEnv, StepCounter, TransformedEnv
from torchrl.envs.utils import ExplorationType, set_exploration_type
from torchrl.modules import ValueOperator

from nclql_torchrl import LangevinActor, NCLQLLoss, NoiseConditionedQNetwork, NoiseSchedule
from nclql_torchrl.actor import DIAGNOSTIC_KEYS

MakeActor = Callable[..., LangevinActor]


def observations(*shape: int) -> TensorDict:
    return TensorDict({"observation": torch.randn(*shape, 4)}, shape)


@pytest.mark.parametrize("shape", [(), (3,), (2, 5), (2, 3, 4)])
@pytest.mark.parametrize("num_particles", [1, 4])
def test_any_batch_shape_stays_in_the_box(make_actor: MakeActor, shape: tuple[int, ...], num_particles: int) -> None:
    action = make_actor(num_particles=num_particles)(observations(*shape))["action"]
    assert action.shape == (*shape, 2)
    assert action.abs().max() <= 2.0
    assert not action.requires_grad


def test_uneven_bounds_are_reached_and_kept(make_actor: MakeActor) -> None:
    low, high = torch.tensor([-3.0, 0.5]), torch.tensor([-1.0, 4.0])
    action = make_actor(spec=Bounded(low, high, torch.Size([2])), w=1e-3)(observations(500))["action"]
    assert (action >= low).all() and (action <= high).all()
    assert (action.amax(0) - action.amin(0) > 0.2 * (high - low)).all()


def test_random_explores_and_deterministic_repeats(make_actor: MakeActor) -> None:
    actor, tensordict = make_actor(), observations(32)
    with set_exploration_type(ExplorationType.RANDOM):
        assert not torch.equal(actor(tensordict.clone())["action"], actor(tensordict.clone())["action"])
    for kind in (ExplorationType.DETERMINISTIC, ExplorationType.MODE, ExplorationType.MEAN):
        with set_exploration_type(kind):
            first = actor(tensordict.clone())["action"]
            state = torch.get_rng_state()
            assert torch.equal(first, actor(tensordict.clone())["action"])
            assert torch.equal(first[:3], actor(tensordict[:3].clone())["action"]) or torch.allclose(
                first[:3], actor(tensordict[:3].clone())["action"], atol=1e-5
            ), "the action depends on its own observation only"
            assert torch.equal(state, torch.get_rng_state()), "no random number is drawn"


def test_torch_manual_seed_fixes_the_action(make_actor: MakeActor) -> None:
    actor, tensordict = make_actor(num_particles=2), observations(6)
    torch.manual_seed(3)
    first = actor(tensordict.clone())["action"]
    torch.manual_seed(3)
    assert torch.equal(first, actor(tensordict.clone())["action"])


@pytest.mark.parametrize("shape", [(), (5,), (2, 3)])
def test_explicit_start_and_noise_replace_the_draws(make_actor: MakeActor, shape: tuple[int, ...]) -> None:
    actor, tensordict = make_actor(num_particles=3), observations(*shape)
    tensordict["initial_action"] = torch.rand(*shape, 3, 2) * 2 - 1
    tensordict["langevin_noise"] = torch.randn(*shape, 3, 10, 2, 2)
    first = actor(tensordict.clone())["action"]
    assert torch.equal(first, actor(tensordict.clone())["action"])
    tensordict["langevin_noise"] = torch.randn(*shape, 3, 10, 2, 2)
    assert not torch.equal(first, actor(tensordict.clone())["action"])


def test_more_particles_choose_higher_values(make_actor: MakeActor) -> None:
    # A chain with little drift, so that particles differ and choosing matters.
    options = {"diagnostics": True, "w": 1e-3, "schedule": NoiseSchedule(2, 0.1, 0.09)}
    actor = make_actor(**options)
    many = LangevinActor(
        actor.qvalue_network, actor.qvalue_network_params, spec=actor.spec["action"], num_particles=16, **options
    )
    tensordict = observations(64)
    assert many(tensordict.clone())["q_after"].mean() > actor(tensordict.clone())["q_after"].mean()


def test_diagnostics_describe_the_chain(make_actor: MakeActor) -> None:
    actor = make_actor(diagnostics=True)
    assert actor.out_keys == ["action", *DIAGNOSTIC_KEYS]
    tensordict = actor(observations(64))
    assert all(tensordict[key].shape == (64, 1) for key in DIAGNOSTIC_KEYS)
    assert tensordict["q_after"].mean() > tensordict["q_before"].mean(), "a chain climbs"
    on_face = (tensordict["action"].abs() >= 2.0).float().mean(-1, keepdim=True)
    torch.testing.assert_close(tensordict["clipped_fraction"], on_face)
    action = tensordict["action"].clone().requires_grad_()
    inputs = TensorDict({"observation": tensordict["observation"], "action": action}, [64])
    inputs["level"] = torch.full((64,), 9)
    total: Tensor = torch.zeros(())
    for parameters in actor.qvalue_network_params.unbind(0):
        with parameters.to_module(actor.qvalue_network):
            total = total + actor.qvalue_network(inputs.clone())["state_action_value"].sum()
    (gradient,) = torch.autograd.grad(total, action)
    # In normalised units an action of half range 2 moves the critic twice as much.
    torch.testing.assert_close(tensordict["gradient_norm"], 2 * gradient.norm(dim=-1, keepdim=True), rtol=1e-4, atol=0)


@pytest.mark.parametrize("kernel", ["mala", "underdamped", "preconditioned"])
def test_every_kernel_acts(make_actor: MakeActor, kernel: str) -> None:
    actor = make_actor(
        kernel=kernel, normalize_gradient=False, boundary="reflect", w=20.0, num_particles=3, diagnostics=True
    )
    tensordict = actor(observations(5))
    assert tensordict["action"].shape == (5, 2) and tensordict["action"].abs().max() <= 2.0
    if kernel == "mala":
        assert actor.out_keys[-1] == "acceptance_rate"
        rate = tensordict["acceptance_rate"]
        # Of 20 steps, for the particle that was chosen.
        assert rate.shape == (5, 1) and torch.equal(rate, (rate * 20).round() / 20) and 0 < rate.mean() < 1
    start, noise = torch.rand(5, 3, 2), torch.randn(5, 3, 10, 2, 3 if kernel == "mala" else 2)
    tensordict = observations(5).update({"initial_action": start, "langevin_noise": noise})
    assert torch.equal(actor(tensordict.clone())["action"], actor(tensordict.clone())["action"])
    with set_exploration_type(ExplorationType.DETERMINISTIC):
        assert torch.equal(actor(tensordict[:2])["action"], actor(tensordict[:2])["action"])


def test_acts_on_the_parameters_that_the_loss_trains(make_actor: MakeActor, make_batch: Callable) -> None:
    actor, tensordict = make_actor(), observations(8)
    loss = NCLQLLoss(actor, delay_qvalue=False)
    assert {id(parameter) for parameter in actor.parameters()} == {id(parameter) for parameter in loss.parameters()}
    with set_exploration_type(ExplorationType.DETERMINISTIC):
        before = actor(tensordict.clone())["action"]
        optimizer = torch.optim.SGD(loss.parameters(), lr=10.0)
        loss(make_batch())["loss_qvalue"].backward()
        optimizer.step()
        assert not torch.equal(before, actor(tensordict.clone())["action"])


def test_keys_can_be_renamed_and_nested() -> None:
    network = NoiseConditionedQNetwork(4, 2, (8,))
    keys = [("agent", "state"), ("agent", "control"), "sigma_index"]
    critic = ValueOperator(network, in_keys=keys, out_keys=["q"])
    actor = LangevinActor(
        [critic],
        spec=Composite({("agent", "control"): Bounded(-1.0, 1.0, torch.Size([2]))}),
        action_key=("agent", "control"),
        level_key="sigma_index",
        value_key="q",
    )
    assert actor.in_keys == [("agent", "state")] and actor.out_keys == [("agent", "control")]
    tensordict = actor(TensorDict({("agent", "state"): torch.randn(5, 4)}, [5]))
    assert tensordict["agent", "control"].shape == (5, 2)
    assert set(tensordict.keys(True, True)) == {("agent", "state"), ("agent", "control")}


def test_any_differentiable_critic_is_sampled() -> None:
    class Valley(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.scale = nn.Parameter(torch.tensor(1.0))

        def forward(self, target: Tensor, action: Tensor) -> Tensor:
            return -self.scale * (action - target).square().sum(-1, keepdim=True)

    critic = ValueOperator(Valley(), in_keys=["target", "action"])
    actor = LangevinActor(
        [critic, critic], spec=Bounded(-1.0, 1.0, torch.Size([2])), schedule=NoiseSchedule.constant(1e-4)
    )
    tensordict = TensorDict({"target": torch.rand(20, 2) - 0.5}, [20])
    tensordict["initial_action"] = tensordict["target"].unsqueeze(1)
    assert actor.in_keys == ["target"]
    distance = (actor(tensordict)["action"] - tensordict["target"]).norm(dim=-1)
    assert distance.max() < 0.2, "chains stay near the top"


def test_parameters_of_another_loss_are_read_without_copies(make_actor: MakeActor) -> None:
    owner = make_actor()
    actor = LangevinActor(owner.qvalue_network, owner.qvalue_network_params, spec=owner.spec["action"])
    assert actor.qvalue_network_params is owner.qvalue_network_params


def test_the_constructor_keeps_the_critics_weights(make_actor: MakeActor) -> None:
    critics = [
        ValueOperator(NoiseConditionedQNetwork(4, 2, (8,)), in_keys=["observation", "action", "level"])
        for _ in range(3)
    ]
    actor = LangevinActor(critics, spec=Bounded(-1.0, 1.0, torch.Size([2])))
    expected = torch.stack([critic.module.trunk[0].weight for critic in critics])
    assert torch.equal(actor.qvalue_network_params["module", "trunk", "0", "weight"], expected)
    assert isinstance(actor.qvalue_network_params, TensorDictParams)


def test_state_dict_moves_a_policy(make_actor: MakeActor) -> None:
    first, second, tensordict = make_actor(), make_actor(), observations(4)
    second.load_state_dict(first.state_dict())
    with set_exploration_type(ExplorationType.DETERMINISTIC):
        assert torch.equal(first(tensordict.clone())["action"], second(tensordict.clone())["action"])


def test_compiled_execution_agrees_with_eager(make_actor: MakeActor) -> None:
    eager = make_actor(w=1.0)
    compiled = LangevinActor(
        eager.qvalue_network, eager.qvalue_network_params, spec=eager.spec["action"], w=1.0, execution="compile"
    )
    tensordict = observations(6)
    tensordict["initial_action"], tensordict["langevin_noise"] = torch.zeros(6, 1, 2), torch.randn(6, 1, 10, 2, 2)
    for _ in range(2):
        expected, action = eager(tensordict.clone())["action"], compiled(tensordict.clone())["action"]
        torch.testing.assert_close(action, expected, atol=1e-4, rtol=0)
    fresh = observations(6)
    assert not torch.equal(compiled(fresh.clone())["action"], compiled(fresh.clone())["action"]), "noise is fresh"


def warm_actor(make_actor: MakeActor, **options: Any) -> LangevinActor:
    return make_actor(start_level=9, warm_start=True, **options)


def test_a_warm_start_continues_the_previous_action_and_a_fresh_episode_does_not(make_actor: MakeActor) -> None:
    actor = warm_actor(make_actor, num_particles=3)
    assert actor.in_keys == ["observation", "previous_action", "is_init"]
    assert actor.out_keys == ["action", ("next", "previous_action")]
    previous = (torch.rand(2000, 2) - 0.5) * 2
    is_init = torch.zeros(2000, 1, dtype=torch.bool)
    is_init[::2] = True
    tensordict = actor(observations(2000).update({"previous_action": previous, "is_init": is_init}))
    assert torch.equal(tensordict["next", "previous_action"], tensordict["action"])
    moved = (tensordict["action"] - previous).norm(dim=-1) / 2
    # Level 9 alone: two drifts of 0.025, two steps of noise 0.01 and the start's 0.001 in each of two dimensions; 0.05
    # and five deviations of a coordinate, twice over.
    assert moved[1::2].max() < 0.05 + 5 * 2**0.5 * 0.0142 * 2**0.5
    assert moved[::2].mean() > 0.3
    # Without the entry, and by an explicit start, it is a cold chain.
    cold = actor(observations(2000).update({"is_init": is_init}))
    assert (cold["action"] - previous).norm(dim=-1).mean() > 0.6
    with set_exploration_type(ExplorationType.DETERMINISTIC):
        inputs = observations(4).update({"previous_action": previous[:4], "is_init": is_init[:4]})
        assert torch.equal(actor(inputs.clone())["action"], actor(inputs.clone())["action"])


def test_start_level_skips_the_levels_before_it(make_actor: MakeActor) -> None:
    whole, short = make_actor(), make_actor(start_level=7)
    short.load_state_dict(whole.state_dict())
    tensordict = observations(6).update(
        {"initial_action": torch.rand(6, 1, 2), "langevin_noise": torch.randn(6, 1, 3, 2, 2)}
    )
    value = whole.action_value(tensordict)
    start, noise = whole.explicit_randomness(tensordict, value)
    expected = whole.sampler.to_environment(whole.sampler(value, start, noise, start_level=7)[0])
    assert torch.equal(short(tensordict)["action"], expected)
    with pytest.raises(ValueError, match="start_level is 10; expected one of the schedule's levels, 0 to 9"):
        make_actor(start_level=10)


@pytest.mark.parametrize("warm_start", [True, False])
def test_the_previous_action_travels_through_a_collector(warm_start: bool) -> None:
    env = SerialEnv(2, lambda: TransformedEnv(GymEnv("Pendulum-v1"), StepCounter(max_steps=5)))
    critics = [
        ValueOperator(NoiseConditionedQNetwork(3, 1, (16,), action_low=-2.0, action_high=2.0),
                      in_keys=["observation", "action", "level"])
    ]  # fmt: skip
    actor = LangevinActor(critics, spec=env.action_spec_unbatched, start_level=8, warm_start=warm_start)
    collector = Collector(env, actor, frames_per_batch=24, total_frames=48, auto_register_policy_transforms=True)
    previous = torch.zeros(2, 1)
    for batch in collector:
        assert ("previous_action" in list(batch.keys())) == warm_start
        if not warm_start:
            continue
        for step in range(12):
            now: Any = batch[:, step]
            # Five steps to an episode, and 12 to a batch: the second begins in the middle of one.
            fresh = now["is_init"]
            assert torch.equal(now["previous_action"], torch.where(fresh, torch.zeros(2, 1), previous))
            assert torch.equal(now["next", "previous_action"], now["action"])
            previous = now["action"]
        assert 4 <= batch["is_init"].sum() <= 6
    collector.shutdown()


@pytest.mark.parametrize("num_critics", [1, 2])
def test_acts_on_a_critic_without_parameters(num_critics: int) -> None:
    # A known model, say: its best action is the observation.
    def value(observation: Tensor, action: Tensor) -> Tensor:
        return -(action - observation).square().sum(-1, keepdim=True)

    critic = TensorDictModule(value, in_keys=["observation", "action"], out_keys=["state_action_value"])
    actor = LangevinActor([critic] * num_critics, spec=Bounded(-1.0, 1.0, torch.Size([2])), num_particles=3)
    observation = torch.rand(50, 2) - 0.5
    # The last steps' noise is 0.01 per dimension.
    action = actor(TensorDict({"observation": observation}, [50]))["action"]
    assert (action - observation).abs().max() < 0.1


def test_acts_inside_a_collector() -> None:
    env = SerialEnv(2, lambda: GymEnv("Pendulum-v1"))
    critic = ValueOperator(
        NoiseConditionedQNetwork(3, 1, (8,), action_low=-2.0, action_high=2.0),
        in_keys=["observation", "action", "level"],
    )
    actor = LangevinActor([critic], spec=env.action_spec_unbatched, w=1.0)
    collector = Collector(env, actor, frames_per_batch=20, total_frames=20, auto_register_policy_transforms=False)
    (batch,) = list(collector)
    assert batch["action"].shape == (2, 10, 1)
    assert batch["action"].unique().numel() > 2
    collector.shutdown()


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"spec": Unbounded(torch.Size([2]))}, "expected a torchrl.data.Bounded"),
        ({"spec": Bounded(-1.0, 1.0, torch.Size([3, 2]))}, "of one dimension"),
        ({"num_particles": 0}, "num_particles is 0"),
        ({"deterministic_num_particles": -1}, "deterministic_num_particles is -1"),
        ({"steps_per_level": 0}, "steps_per_level is 0"),
        ({"w": float("nan")}, "w is nan"),
        ({"ensemble_reduction": "max"}, "ensemble_reduction is 'max'"),
        ({"boundary": "wrap"}, "boundary is 'wrap'"),
        ({"execution": "compiled"}, "'compile'"),
    ],
)
def test_bad_settings_are_named(make_actor: MakeActor, options: dict, words: str) -> None:
    with pytest.raises(ValueError, match=words):
        make_actor(**options)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_two_calls_on_a_gpu_differ(make_actor: MakeActor) -> None:
    actor, tensordict = make_actor(w=1.0).to("cuda"), observations(8).to("cuda")
    first, second = actor(tensordict.clone())["action"], actor(tensordict.clone())["action"]
    assert first.is_cuda and not torch.equal(first, second)
