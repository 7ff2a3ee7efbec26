"""Promises of NCLQLUpdate: the order of the two steps, and the summed alternative."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from tensordict import TensorDict
from tensordict.utils import assert_close
from torch.optim import SGD, Adam
from torchrl.objectives import SoftUpdate

from nclql_torchrl import LangevinActor, NCLQLLoss, NCLQLUpdate, NoiseSchedule

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
