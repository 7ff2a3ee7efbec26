"""Promises of NCLQLUpdate: the order of the two steps, and the summed alternative."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterable
from typing import Any

import pytest
import torch
from tensordict import TensorDict
from tensordict.nn.probabilistic import interaction_type
from tensordict.utils import assert_close
from torch._dynamo.utils import counters
from torch.optim import SGD, Adam
from torchrl.objectives import SoftUpdate

from nclql_torchrl import LangevinActor, NCLQLLoss, NCLQLUpdate, NoiseSchedule
from nclql_torchrl.training.metrics import MetricsWindow

MakeActor = Callable[..., LangevinActor]
MakeBatch = Callable[..., TensorDict]


def fixed(batch: TensorDict) -> TensorDict:
    """The batch with all the randomness of an update in it."""
    batch["noise_level"], batch["action_noise"] = torch.arange(12) % 9, torch.randn(12, 2)
    batch["next", "initial_action"], batch["next", "langevin_noise"] = (
        torch.zeros(12, 1, 2),
        torch.zeros(12, 1, 10, 2, 2),
    )
    return batch


def test_sequential_steps_on_one_loss_after_the_other(make_actor: MakeActor, make_batch: MakeBatch) -> None:
    loss, batch = NCLQLLoss(make_actor(), delay_qvalue=False), fixed(make_batch())
    start = loss.qvalue_network_params.data.clone()
    NCLQLUpdate(loss, SGD(loss.parameters(), lr=0.1))(batch.clone())
    updated = loss.qvalue_network_params.data.clone()

    loss.qvalue_network_params.data.update_(start)
    optimizer = SGD(loss.parameters(), lr=0.1)
    before = loss(batch.clone())
    before["loss_qvalue"].backward()
    optimizer.step()
    optimizer.zero_grad()
    values = loss.reduction
    loss.reduction = "none"
    assert before["pred_value"].shape == ()
    # The target of the noise loss is the mean of the critics before the first step.
    halfway = loss.qvalue_network_params.data.clone()
    loss.qvalue_network_params.data.update_(start)
    target = loss(batch.clone())["pred_value"]
    loss.qvalue_network_params.data.update_(halfway)
    loss.reduction = values
    loss.noise_loss(batch, target).backward()
    optimizer.step()
    assert_close(updated, loss.qvalue_network_params.data)


def test_summed_is_one_step_on_the_sum(make_actor: MakeActor, make_batch: MakeBatch) -> None:
    loss, batch = NCLQLLoss(make_actor(), delay_qvalue=False), fixed(make_batch())
    start = loss.qvalue_network_params.data.clone()
    metrics = NCLQLUpdate(loss, Adam(loss.parameters(), lr=0.01), mode="summed")(batch.clone())
    updated = loss.qvalue_network_params.data.clone()
    loss.qvalue_network_params.data.update_(start)
    optimizer = Adam(loss.parameters(), lr=0.01)
    output = loss(batch.clone())
    (output["loss_qvalue"] + output["loss_noise"]).backward()
    optimizer.step()
    assert_close(updated, loss.qvalue_network_params.data)
    for key in metrics.keys():  # noqa: SIM118 - a TensorDict iterates over its batch
        torch.testing.assert_close(metrics[key], output[key].detach())


@pytest.mark.parametrize(
    ("mode", "num_levels", "steps"), [("sequential", 10, 2), ("summed", 10, 1), ("sequential", 1, 1)]
)
def test_adam_counts_the_authors_steps(
    make_actor: MakeActor, make_batch: MakeBatch, mode: str, num_levels: int, steps: int
) -> None:
    schedule = NoiseSchedule() if num_levels > 1 else NoiseSchedule.constant(1e-3)
    loss = NCLQLLoss(make_actor(schedule=schedule), delay_qvalue=False)
    optimizer = Adam(loss.parameters(), lr=1e-3)
    NCLQLUpdate(loss, optimizer, mode=mode)(make_batch())  # pyright: ignore[reportArgumentType]
    assert {int(state["step"]) for state in optimizer.state.values()} == {steps}


def test_targets_follow_once_and_the_priority_is_written(make_actor: MakeActor, make_batch: MakeBatch) -> None:
    loss, batch = NCLQLLoss(make_actor()), make_batch()
    update = NCLQLUpdate(loss, Adam(loss.parameters(), lr=1e-2), SoftUpdate(loss, tau=0.25))
    key = ("module", "trunk", "0", "weight")
    before = loss.target_qvalue_network_params.data.clone()[key]
    metrics = update(batch)
    online = loss.qvalue_network_params.data[key]
    torch.testing.assert_close(loss.target_qvalue_network_params.data[key], 0.75 * before + 0.25 * online)
    assert batch["td_error"].shape == (12,)
    for key in ("loss_qvalue", "loss_noise", "td_error"):
        assert metrics[key].isfinite() and not metrics[key].requires_grad


def test_repeated_updates_lower_the_error(make_actor: MakeActor, make_batch: MakeBatch) -> None:
    loss, batch = NCLQLLoss(make_actor()), make_batch()
    batch.get(("next", "terminated")).fill_(True)
    update = NCLQLUpdate(loss, Adam(loss.parameters(), lr=1e-2), SoftUpdate(loss, tau=0.005))
    first = update(batch)["loss_qvalue"]
    for _ in range(200):
        last = update(batch)["loss_qvalue"]
    assert last < 0.1 * first


def test_an_unknown_mode_is_named(make_actor: MakeActor) -> None:
    loss = NCLQLLoss(make_actor())
    with pytest.raises(ValueError, match=r"mode is 'sum'.*'summed'"):
        NCLQLUpdate(loss, SGD(loss.parameters(), lr=0.1), mode="sum")  # pyright: ignore[reportArgumentType]


def test_everything_random_is_drawn_before(make_actor: MakeActor, make_batch: MakeBatch) -> None:
    loss, batch = NCLQLLoss(make_actor()), make_batch()
    drawn = loss.draw(batch)
    assert drawn["next_action"].shape == drawn["action_noise"].shape == (12, 2)
    assert drawn["noise_level"].shape == (12,)
    assert batch.get("next_action", None) is None
    before = torch.random.get_rng_state()
    first, second = loss(drawn.clone()), loss(drawn.clone())
    assert torch.equal(before, torch.random.get_rng_state())
    assert_close(first.detach(), second.detach(), atol=0, rtol=0)
    assert_close(loss.draw(drawn), drawn, atol=0, rtol=0)


def twins(make_actor: MakeActor, execution: str, device: str = "cpu", **options: Any) -> list[NCLQLUpdate]:
    """An eager update and another one at the same parameters."""
    updates = []
    for how in ("eager", execution):
        torch.manual_seed(3)
        loss = NCLQLLoss(make_actor().to(device))
        adam = Adam(loss.parameters(), lr=1e-3, fused=True)
        updates.append(NCLQLUpdate(loss, adam, SoftUpdate(loss, tau=0.1), execution=how, **options))  # pyright: ignore[reportArgumentType]
    return updates


def assert_stays_eager(updates: list[NCLQLUpdate], batches: Iterable[TensorDict], *, atol: float) -> None:
    """Successive updates at the same randomness give the same metrics, priorities, parameters and Adam moments."""
    for batch in batches:
        copies = [batch.clone(), batch.clone()]
        metrics = [update(copy) for update, copy in zip(updates, copies, strict=True)]
        assert_close(*metrics, atol=atol, rtol=atol)
        torch.testing.assert_close(copies[0]["td_error"], copies[1]["td_error"], atol=atol, rtol=atol)
    eager, other = updates
    assert_close(TensorDict(eager.loss.state_dict()), TensorDict(other.loss.state_dict()), atol=atol, rtol=atol)
    for first, second in zip(*(update.optimizer.state_dict()["state"].values() for update in updates), strict=True):
        assert_close(TensorDict(first), TensorDict(second), atol=atol, rtol=atol)


def assert_goes_on_bitwise(update: NCLQLUpdate, batch: TensorDict) -> None:
    """An update from restored state dicts and random state is the same update, bit for bit."""
    state = copy.deepcopy((update.loss.state_dict(), update.optimizer.state_dict(), torch.get_rng_state()))
    results = []
    for _ in range(2):
        update.loss.load_state_dict(state[0])
        update.optimizer.load_state_dict(copy.deepcopy(state[1]))
        torch.set_rng_state(state[2])
        metrics = update(batch.clone())
        results.append(TensorDict({"metrics": metrics, "parameters": update.loss.qvalue_network_params.data.clone()}))
    assert (results[0] == results[1]).all()


@pytest.mark.slow
@pytest.mark.parametrize("mode", ["sequential", "summed"])
def test_compiled_is_eager_and_compiles_once(make_actor: MakeActor, make_batch: MakeBatch, mode: str) -> None:
    updates = twins(make_actor, "compile", mode=mode)
    # Float32 sums in another order differ by 1e-7 relative to their largest terms; Adam's steps of lr = 1e-3 turn a
    # relative error of a gradient into one of the step, 1e-3 of it where a gradient is 1e-4 of the largest: 1e-6 each.
    assert_stays_eager(updates, (fixed(make_batch()) for _ in range(2)), atol=1e-5)
    before = counters["stats"]["unique_graphs"]
    assert_stays_eager(updates, (fixed(make_batch()) for _ in range(3)), atol=1e-5)
    assert counters["stats"]["unique_graphs"] == before > 0, "no recompilation"
    assert interaction_type() is None
    batch = make_batch()
    assert_goes_on_bitwise(updates[1], batch)
    losses = {float(updates[1](batch.clone())["loss_noise"]) for _ in range(3)}
    assert len(losses) == 3, "randomness is fresh"


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("execution", ["compile", "cudagraph"])
def test_gpu_modes_stay_eager(make_actor: MakeActor, make_batch: MakeBatch, execution: str) -> None:
    updates = twins(make_actor, execution, "cuda")
    assert_stays_eager(updates, (fixed(make_batch()).to("cuda") for _ in range(6)), atol=1e-4)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_updates_do_not_wait_for_the_gpu(make_actor: MakeActor, make_batch: MakeBatch) -> None:
    loss = NCLQLLoss(make_actor(execution="cudagraph").to("cuda"))
    update = NCLQLUpdate(loss, Adam(loss.parameters(), lr=1e-3, fused=True), SoftUpdate(loss, tau=0.1))
    batch, window = make_batch().to("cuda"), MetricsWindow()
    window.add_update(update(batch.clone()))  # captures
    torch.cuda.set_sync_debug_mode("error")
    try:
        for _ in range(3):
            window.add_update(update(batch.clone()))
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert window.first_diverged_update(4) is None
