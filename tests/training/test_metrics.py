"""Means between two rows of metrics.csv."""

from __future__ import annotations

import pytest
import torch
from tensordict import TensorDict

from nclql_torchrl.training.metrics import UPDATE_METRICS, MetricsWindow


def update(value: float) -> TensorDict:
    """An update's scalars: the first is ``value``, the next ``value + 1``, and so on."""
    return TensorDict({key: torch.tensor(value + index) for index, key in enumerate(UPDATE_METRICS)})


def test_rows_have_the_means_of_the_updates_since_the_last_row() -> None:
    window = MetricsWindow()
    for value in (1.0, 2.0, 6.0):
        window.add_update(update(value))
    assert window.means()["loss_qvalue"] == pytest.approx(3.0)
    assert window.means()["td_error"] == pytest.approx(7.0)
    window.clear()
    window.add_update(update(5.0))
    assert window.means()["loss_qvalue"] == 5.0


def test_an_updates_own_scalars_are_not_written_to() -> None:
    window, first = MetricsWindow(), update(1.0)
    window.add_update(first)
    window.add_update(update(2.0))
    assert first["loss_qvalue"] == 1.0


def test_a_checkpoint_stays_as_it_was_and_goes_on_the_same() -> None:
    window, resumed = MetricsWindow(), MetricsWindow()
    window.add_update(update(1.0))
    state = window.state_dict()
    window.add_update(update(2.0))
    assert state["sums"]["loss_qvalue"] == 1.0
    resumed.load_state_dict(state)
    resumed.add_update(update(2.0))
    assert state["sums"]["loss_qvalue"] == 1.0
    assert resumed.means() == window.means()


def test_the_first_update_that_diverged_is_counted_back_from_the_last() -> None:
    window = MetricsWindow()
    for value in (1.0, float("nan"), float("nan")):
        window.add_update(update(value))
    assert window.first_diverged_update(10) == 9
    window.clear()
    window.add_update(update(1.0))
    assert window.first_diverged_update(11) is None
