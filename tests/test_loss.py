"""Promises of NCLQLLoss: the conventions that TorchRL's own losses are tested for, and the algorithm's."""

from __future__ import annotations

import copy
import warnings
from collections.abc import Callable

import pytest
import torch
from tensordict import TensorDict
from tensordict.nn.probabilistic import interaction_type
from tensordict.utils import assert_close
from torch import nn
from torchrl.data import Bounded, MultiStep
from torchrl.envs.utils import ExplorationType, set_exploration_type
from torchrl.modules import ValueOperator
from torchrl.objectives import HardUpdate, SoftUpdate
from torchrl.objectives.utils import ValueEstimators

from nclql_torchrl import LangevinActor, NCLQLLoss, NoiseConditionedQNetwork, NoiseSchedule

MakeActor = Callable[..., LangevinActor]
MakeBatch = Callable[..., TensorDict]
LOSSES = ("loss_qvalue", "loss_noise")


def seeded_forward(loss: NCLQLLoss, batch: TensorDict, seed: int = 0) -> TensorDict:
    torch.manual_seed(seed)
    return loss(batch)


@pytest.mark.filterwarnings("ignore:No target network updater")
@pytest.mark.parametrize("num_critics", [1, 2, 4, 8])
@pytest.mark.parametrize("delay_qvalue", [True, False])
@pytest.mark.parametrize("delay_actor", [True, False])
@pytest.mark.parametrize("estimator", [None, *ValueEstimators])
def test_every_estimator_gives_gradients_to_all_and_only_its_parameters(
    make_actor: MakeActor,
    make_batch: MakeBatch,
    num_critics: int,
    delay_qvalue: bool,
    delay_actor: bool,
    estimator: ValueEstimators | None,
) -> None:
    actor = make_actor(num_critics, steps_per_level=1, schedule=NoiseSchedule(2, 0.011, 0.01))
    loss = NCLQLLoss(actor, delay_qvalue=delay_qvalue, delay_actor=delay_actor)
    if estimator is not None and estimator not in NCLQLLoss.SUPPORTED_VALUE_ESTIMATORS:
        with pytest.raises(NotImplementedError):
            loss.make_value_estimator(estimator)
        return
    if estimator is not None:
        loss.make_value_estimator(estimator)
    # TD1 and TDLambda look along time.
    batch = make_batch(3, 4)
    batch["next", "done"][:, -1] = True
    given = batch.clone()
    output = loss(batch)
    assert_close(batch.exclude("td_error"), given)
    assert batch["td_error"].shape == (3, 4)
    parameters = dict(loss.named_parameters())
    for name in LOSSES:
        output[name].backward(retain_graph=True)
        assert all(parameter.grad is not None for parameter in parameters.values())
        norms = [parameter.grad.norm() for parameter in parameters.values() if parameter.grad is not None]
        assert all(norm > 0 for norm in norms), name
        loss.zero_grad()
    assert not any("target" in name for name in parameters)
    assert all(not value.requires_grad for name, value in loss.named_buffers())
    names = [name for name, _ in (*loss.named_parameters(), *loss.named_buffers())]
    assert len(names) == len(set(names))
    assert (("target_qvalue_network_params.module.trunk.0.weight") in names) == delay_qvalue


def test_warns_without_a_target_updater_and_only_then(make_actor: MakeActor, make_batch: MakeBatch) -> None:
    loss = NCLQLLoss(make_actor())
    with pytest.warns(UserWarning, match="No target network updater"):
        loss(make_batch())
    for delayed in (True, False):
        loss = NCLQLLoss(make_actor(), delay_qvalue=delayed)
        if delayed:
            SoftUpdate(loss, eps=0.995)
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            loss(make_batch())
        assert not any("target network updater" in str(warning.message) for warning in caught)


@pytest.mark.parametrize("updater", [SoftUpdate, HardUpdate])
def test_target_updaters_move_the_targets(make_actor: MakeActor, make_batch: MakeBatch, updater: type) -> None:
    loss = NCLQLLoss(make_actor())
    targets = updater(loss, eps=0.9) if updater is SoftUpdate else updater(loss, value_network_update_interval=1)
    before = loss.target_qvalue_network_params.data.clone()
    assert_close(before, loss.qvalue_network_params.data)
    loss.qvalue_network_params.apply_(lambda parameter: parameter.data.add_(1.0))
    assert_close(loss.target_qvalue_network_params.data, before)
    for _ in range(1 if updater is SoftUpdate else 2):  # HardUpdate(1) counts one step, and moves at the next
        targets.step()
    moved = loss.target_qvalue_network_params.data - before
    expected = torch.tensor(0.1 if updater is SoftUpdate else 1.0)
    layers = [entry for key, entry in moved.items(True, True) if key[-1] in ("weight", "bias")]
    assert len(layers) == 10 and all(torch.allclose(entry, expected, atol=1e-5) for entry in layers)


def test_the_user_s_actor_and_the_loss_share_parameters(make_actor: MakeActor) -> None:
    actor = make_actor()
    loss = NCLQLLoss(actor)
    loss.qvalue_network_params.data.apply_(lambda parameter: parameter.add_(torch.randn_like(parameter)))
    assert actor.qvalue_network_params is loss.qvalue_network_params
    targets = loss.target_qvalue_network_params.data.values(True, True)
    online = loss.qvalue_network_params.data.values(True, True)
    assert all(not torch.equal(first, second) for first, second in zip(targets, online, strict=True))


def test_reset_parameters_recursive(make_actor: MakeActor, make_batch: MakeBatch) -> None:
    actor = make_actor()
    loss = NCLQLLoss(actor)
    SoftUpdate(loss, eps=0.995)
    online, targets = loss.qvalue_network_params.data.clone(), loss.target_qvalue_network_params.data.clone()
    loss.reset_parameters_recursive()
    weight = ("module", "trunk", "0", "weight")
    assert not torch.equal(online[weight], loss.qvalue_network_params.data[weight])
    assert not torch.equal(targets[weight], loss.target_qvalue_network_params.data[weight])
    assert not torch.equal(*loss.qvalue_network_params.data[weight]), "members of the ensemble differ"
    assert actor.qvalue_network_params is loss.qvalue_network_params
    loss(make_batch())["loss_qvalue"].backward()
    assert all(parameter.grad is not None for parameter in actor.parameters())


def test_deactivate_vmap_changes_nothing(make_actor: MakeActor, make_batch: MakeBatch) -> None:
    actor, batch = make_actor(3), make_batch()
    with_vmap = NCLQLLoss(actor, delay_qvalue=False)
    without = NCLQLLoss(actor, delay_qvalue=False, deactivate_vmap=True)
    assert_close(seeded_forward(with_vmap, batch.clone()), seeded_forward(without, batch.clone()))


def test_dispatch_gives_what_the_tensordict_call_gives(make_actor: MakeActor, make_batch: MakeBatch) -> None:
    loss, batch = NCLQLLoss(make_actor(), delay_qvalue=False), make_batch()
    assert set(loss.in_keys) == {
        "observation", "action", ("next", "observation"), ("next", "reward"), ("next", "done"), ("next", "terminated"),
    }  # fmt: skip
    flat = {key if isinstance(key, str) else f"{key[0]}_{key[1]}": batch[key] for key in loss.in_keys}
    expected = seeded_forward(loss, batch.clone())
    torch.manual_seed(0)
    outputs = loss(**flat)
    assert len(outputs) == len(loss.out_keys)
    for key, output in zip(loss.out_keys, outputs, strict=True):
        torch.testing.assert_close(output, expected[key])
    torch.manual_seed(0)
    (selected,) = [loss.select_out_keys("loss_noise")(**flat)]
    torch.testing.assert_close(selected, expected["loss_noise"])


def test_keys_can_be_set_and_unknown_ones_are_errors(make_actor: MakeActor, make_batch: MakeBatch) -> None:
    loss, batch = NCLQLLoss(make_actor(), delay_qvalue=False), make_batch()
    expected = seeded_forward(loss, batch.clone())
    with pytest.raises(ValueError):
        loss.set_keys(no_such_key="x")
    loss.make_value_estimator(gamma=0.99)
    loss.set_keys(
        reward="gain", done=("flags", "done"), terminated=("flags", "terminated"), priority="priority", value="v"
    )
    assert loss.value_estimator.tensor_keys.reward == "gain"
    assert loss.value_estimator.tensor_keys.terminated == ("flags", "terminated")
    assert loss.value_estimator.tensor_keys.value == "v"
    assert ("next", "gain") in loss.in_keys and ("next", "flags", "done") in loss.in_keys
    following = batch.get("next")
    following["gain"] = following.pop("reward")
    following["flags"] = {"done": following.pop("done"), "terminated": following.pop("terminated")}
    assert_close(seeded_forward(loss, batch), expected)
    assert "priority" in set(batch.keys()) and "td_error" not in set(batch.keys())


def test_nested_keys_work() -> None:
    keys = [("agent", "state"), ("agent", "control"), "level"]
    critics = [
        ValueOperator(NoiseConditionedQNetwork(4, 2, (8,)), in_keys=keys, out_keys=[("agent", "q")]) for _ in range(2)
    ]
    actor = LangevinActor(
        critics, spec=Bounded(-1.0, 1.0, torch.Size([2])), action_key=("agent", "control"), value_key=("agent", "q")
    )
    loss = NCLQLLoss(actor, delay_qvalue=False)
    flags = {"done": torch.zeros(6, 1, dtype=torch.bool), "terminated": torch.zeros(6, 1, dtype=torch.bool)}
    batch = TensorDict(
        {
            "agent": {"state": torch.randn(6, 4), "control": torch.rand(6, 2)},
            "next": {"agent": {"state": torch.randn(6, 4)}, "reward": torch.randn(6, 1), **flags},
        },
        [6],
    )
    output = loss(batch)
    (output["loss_qvalue"] + output["loss_noise"]).backward()
    assert all(parameter.grad is not None for parameter in loss.parameters())


@pytest.mark.parametrize("reduction", [None, "none", "mean", "sum"])
def test_reduction(make_actor: MakeActor, make_batch: MakeBatch, reduction: str | None) -> None:
    actor, batch = make_actor(), make_batch()
    loss = NCLQLLoss(actor, delay_qvalue=False, reduction=reduction)
    output = seeded_forward(loss, batch.clone())
    per_sample = seeded_forward(NCLQLLoss(actor, delay_qvalue=False, reduction="none"), batch.clone())
    for name in LOSSES:
        if reduction == "none":
            assert output[name].shape == batch.shape
        else:
            assert output[name].shape == ()
            expected = per_sample[name].sum() if reduction == "sum" else per_sample[name].mean()
            torch.testing.assert_close(output[name], expected)


@pytest.mark.parametrize("skip_done_states", [False, True])
def test_nan_after_the_end_of_an_episode_is_harmless(
    make_actor: MakeActor, make_batch: MakeBatch, skip_done_states: bool
) -> None:
    loss = NCLQLLoss(make_actor(), delay_qvalue=False, skip_done_states=skip_done_states)
    batch = make_batch()
    ended = batch["next", "terminated"].squeeze(-1)
    if skip_done_states:
        batch["next", "done"][1] = True
        ended = batch["next", "done"].squeeze(-1)
    batch["next", "observation"][ended] = float("nan")
    output = loss(batch)
    assert all(output[key].isfinite().all() for key in loss.out_keys)
    (output["loss_qvalue"] + output["loss_noise"]).backward()
    assert all(parameter.grad is not None and parameter.grad.isfinite().all() for parameter in loss.parameters())


def test_priority_weights_weigh_the_loss_unless_told_otherwise(make_actor: MakeActor, make_batch: MakeBatch) -> None:
    # TorchRL's prioritised buffer needs its C++ extension, which the pinned torch does not load: the entries that it
    # writes stand in for it.
    actor, batch = make_actor(), make_batch()
    batch["priority_weight"] = torch.linspace(0.1, 2.0, 12)
    batch["td_error"] = torch.zeros(12)
    weighted = seeded_forward(NCLQLLoss(actor, delay_qvalue=False), batch.clone())
    plain = seeded_forward(NCLQLLoss(actor, delay_qvalue=False, use_prioritized_weights=False), batch.clone())
    forced = seeded_forward(NCLQLLoss(actor, delay_qvalue=False, use_prioritized_weights=True), batch.clone())
    per_sample = NCLQLLoss(actor, delay_qvalue=False, use_prioritized_weights=False, reduction="none")
    samples = seeded_forward(per_sample, batch)
    assert (batch["td_error"] > 0).all(), "the new priority replaces the old one"
    weight = batch["priority_weight"]
    for name in LOSSES:
        assert not torch.allclose(weighted[name], plain[name])
        torch.testing.assert_close(weighted[name], forced[name])
        torch.testing.assert_close(weighted[name], (samples[name] * weight).sum() / weight.sum())


@pytest.mark.parametrize("n_steps", [1, 3])
def test_n_step_returns(make_actor: MakeActor, make_batch: MakeBatch, n_steps: int) -> None:
    loss, batch = NCLQLLoss(make_actor(), delay_qvalue=False), make_batch(2, 6)
    batch["next", "done"].zero_()
    batch["next", "terminated"].zero_()
    batch["collector", "mask"] = torch.ones(2, 6, dtype=torch.bool)
    multi_step = MultiStep(gamma=0.99, n_steps=n_steps)(batch.clone())
    # The same draws for both: explicit starts and noise.
    start, noise = torch.zeros(2, 6, 1, 2), torch.zeros(2, 6, 1, 10, 2, 2)
    targets = []
    for data in (batch, multi_step):
        data["next", "initial_action"], data["next", "langevin_noise"] = start, noise
        targets.append(seeded_forward(loss, data.clone(), seed=1)["target_value"])
        seeded_forward(loss, data)["loss_qvalue"].backward()
    assert torch.allclose(targets[0], targets[1], atol=1e-3) == (n_steps == 1)


def test_state_dict_moves_a_loss(make_actor: MakeActor, make_batch: MakeBatch) -> None:
    first, second, batch = NCLQLLoss(make_actor()), NCLQLLoss(make_actor()), make_batch()
    for loss in (first, second):
        SoftUpdate(loss, eps=0.9)
        loss.make_value_estimator(gamma=0.9)
    first.target_qvalue_network_params.data.apply_(lambda parameter: parameter.add_(0.1))
    second.load_state_dict(first.state_dict())
    assert_close(seeded_forward(first, batch.clone()), seeded_forward(second, batch.clone()))


def test_moving_the_loss_moves_the_actor(make_actor: MakeActor, make_batch: MakeBatch) -> None:
    actor = make_actor()
    loss = NCLQLLoss(actor, delay_qvalue=False).to(torch.float64)
    assert all(parameter.dtype == torch.float64 for parameter in actor.parameters())
    output = loss(make_batch().apply(lambda entry: entry.double() if entry.is_floating_point() else entry))
    assert output["loss_qvalue"].dtype == torch.float64


def test_one_level_is_lql(make_actor: MakeActor, make_batch: MakeBatch) -> None:
    actor = make_actor(schedule=NoiseSchedule.constant(1e-3), steps_per_level=5)
    output = NCLQLLoss(actor, delay_qvalue=False)(make_batch())
    assert output["loss_noise"] == 0.0 and output["loss_qvalue"] > 0.0


def test_the_td_target_is_the_paper_s(make_actor: MakeActor, make_batch: MakeBatch) -> None:
    loss, batch = NCLQLLoss(make_actor(), reward_scale=0.2), make_batch()
    SoftUpdate(loss, eps=0.9)
    loss.make_value_estimator(gamma=0.95)
    loss.reduction = "none"
    output = seeded_forward(loss, batch)
    lowest = output["next_state_value"]
    alive = 1.0 - batch["next", "terminated"].squeeze(-1).float()
    expected = 0.2 * batch["next", "reward"].squeeze(-1) + 0.95 * alive * lowest
    torch.testing.assert_close(output["target_value"], expected)
    truncated = batch.clone()
    truncated.get(("next", "done")).fill_(True)
    torch.testing.assert_close(seeded_forward(loss, truncated)["target_value"], expected, msg="truncation bootstraps")


def test_options_change_what_they_say(make_actor: MakeActor, make_batch: MakeBatch) -> None:
    actor, batch = make_actor(schedule=NoiseSchedule(2, 0.5, 0.4)), make_batch()
    batch.get("action").fill_(2.0)
    batch["noise_level"], batch["action_noise"] = torch.zeros(12, dtype=torch.int64), torch.ones(12, 2)
    free = NCLQLLoss(actor, delay_qvalue=False)(batch.clone())["loss_noise"]
    clipped = NCLQLLoss(actor, delay_qvalue=False, clip_noisy_action=True)(batch.clone())["loss_noise"]
    assert free != clipped
    with pytest.raises(ValueError, match="target_num_particles is 0"):
        NCLQLLoss(actor, target_num_particles=0)
    with pytest.raises(ValueError, match="reward_scale is -1"):
        NCLQLLoss(actor, reward_scale=-1.0)


def test_the_loss_does_not_depend_on_the_exploration_type(make_actor: MakeActor, make_batch: MakeBatch) -> None:
    loss, batch = NCLQLLoss(make_actor(), delay_qvalue=False), make_batch()
    expected = seeded_forward(loss, batch.clone())
    with set_exploration_type(ExplorationType.DETERMINISTIC):
        assert_close(seeded_forward(loss, batch.clone()), expected)


def test_a_user_s_own_critic_is_trained(make_batch: MakeBatch) -> None:
    class Critic(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layers = nn.Sequential(nn.Linear(6, 8), nn.Tanh(), nn.Linear(8, 1))

        def forward(self, observation: torch.Tensor, action: torch.Tensor) -> torch.Tensor:
            return self.layers(torch.cat([observation, action], -1))

    critics = [ValueOperator(Critic(), in_keys=["observation", "action"]) for _ in range(2)]
    before = copy.deepcopy(critics[0].state_dict())
    actor = LangevinActor(critics, spec=Bounded(-2.0, 2.0, torch.Size([2])), schedule=NoiseSchedule.constant(1e-3))
    loss = NCLQLLoss(actor, delay_qvalue=False)
    assert_close(TensorDict(critics[0].state_dict(), []), TensorDict(before, []))
    loss(make_batch())["loss_qvalue"].backward()
    assert all(parameter.grad is not None for parameter in loss.parameters())


def test_compiles_without_graph_breaks(make_actor: MakeActor, make_batch: MakeBatch) -> None:
    actor = make_actor(w=1.0, steps_per_level=1, schedule=NoiseSchedule(2, 0.011, 0.01))
    loss, batch = NCLQLLoss(actor, delay_qvalue=False), make_batch()
    loss.make_value_estimator()
    batch["noise_level"], batch["action_noise"] = torch.zeros(12, dtype=torch.int64), torch.ones(12, 2)
    batch["next", "initial_action"] = torch.zeros(12, 1, 2)
    batch["next", "langevin_noise"] = torch.randn(12, 1, 2, 1, 2)
    expected = loss(batch.clone())
    output = torch.compile(loss, fullgraph=True)(batch.clone())
    assert_close(output.select(*LOSSES), expected.select(*LOSSES), rtol=1e-4, atol=1e-5)
    assert interaction_type() is None, "the loss's exploration type has leaked: the process would explore no more"


def test_target_chains_are_warm_only_where_the_batch_has_the_previous_action(
    make_actor: Callable[..., LangevinActor], make_batch: Callable[..., TensorDict], monkeypatch: pytest.MonkeyPatch
) -> None:
    loss = NCLQLLoss(make_actor(start_level=9, warm_start=True))
    levels = []
    sample = loss.sampler.sample
    monkeypatch.setattr(
        loss.sampler,
        "sample",
        lambda *args, **options: levels.append(options["start_level"]) or sample(*args, **options),
    )
    batch = make_batch()
    assert not any("previous_action" in key for key in loss.in_keys)
    loss(batch)
    batch["next", "previous_action"] = batch["action"]
    loss(batch)
    assert levels == [0, 9]
