"""Critics are given the statistics of everything that was collected, and of nothing else."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torchrl.data import Bounded
from torchrl.modules import ValueOperator

from nclql_torchrl import LangevinActor, NCLQLLoss, NoiseConditionedQNetwork
from nclql_torchrl.training import TrainConfig, train
from nclql_torchrl.training.evaluation import load_policy
from nclql_torchrl.training.normalization import ObservationNormalizer
from tests.training.runs import final_state


def make_loss(**options: Any) -> NCLQLLoss:
    networks = [NoiseConditionedQNetwork(3, 1, (8,), normalize_observation=True) for _ in range(2)]
    critics = [ValueOperator(network, in_keys=["observation", "action", "level"]) for network in networks]
    return NCLQLLoss(LangevinActor(critics, spec=Bounded(-1.0, 1.0, torch.Size([1]))), **options)


def test_the_statistics_are_those_of_all_observations() -> None:
    loss = make_loss()
    normalizer = ObservationNormalizer(loss)
    # Far from zero: sums of squares would lose the variance in float32.
    observations = torch.randn(6, 50, 3) * torch.tensor([1.0, 20.0, 0.0]) + 300.0
    for part in observations.split([1, 7, 42], dim=1):
        normalizer.update(part)
    seen = observations.reshape(-1, 3).double()
    for params in (loss.qvalue_network_params, loss.target_qvalue_network_params):
        mean, deviation = (params["module", f"observation_{name}"] for name in ("mean", "deviation"))
        torch.testing.assert_close(mean, seen.mean(0).float().expand(2, 3))
        # The square of what is always 300 is known to 300^2 2^-52 = 2e-11, 0.2% of the epsilon, at every update.
        expected = (seen.var(0, correction=0) + 1e-8).sqrt().float().expand(2, 3)
        torch.testing.assert_close(deviation, expected, rtol=1e-2, atol=0.0)
        torch.testing.assert_close(deviation[:, :2], expected[:, :2])
    assert not any("observation" in name for name, _ in loss.named_parameters()), "nothing that is trained"


def test_observations_may_be_on_another_device(monkeypatch: pytest.MonkeyPatch) -> None:
    normalizer = ObservationNormalizer(make_loss())
    normalizer.mean, normalizer.variance = normalizer.mean.to("meta"), normalizer.variance.to("meta")
    monkeypatch.setattr(normalizer, "_write", lambda: None)  # the critics are not there
    normalizer.update(torch.zeros(4, 3))
    assert normalizer.mean.device.type == "meta" and normalizer.count == 4


def test_learners_share_their_statistics() -> None:
    observations = torch.randn(2, 10, 3)
    moments = torch.stack([observations.mean(1), observations.square().mean(1)], 1).double().mean(0)
    loss = make_loss(delay_qvalue=False)

    def average_(tensor: Tensor) -> None:
        tensor.copy_(moments)

    ObservationNormalizer(loss, average_).update(observations[0])
    mean = loss.qvalue_network_params["module", "observation_mean"][0]
    deviation = loss.qvalue_network_params["module", "observation_deviation"][0]
    torch.testing.assert_close(mean, observations.mean((0, 1)))
    torch.testing.assert_close(deviation, observations.reshape(-1, 3).std(0, correction=0))


def test_a_policy_brings_its_statistics(tiny_config: Callable[..., TrainConfig], tmp_path: Path) -> None:
    # Its episodes are short.
    task = ("env.task=InvertedPendulum-v5", "env.engine=mujoco", "logger.eval_episodes=1")
    train(tiny_config("network.normalize_observation=true", "collector.total_frames=60", *task))
    actor = load_policy(tmp_path / "run", torch.device("cpu"))[1]
    # 60 transitions in a replay buffer that has room for 160: all that was observed.
    observed = final_state(tmp_path / "run")["replay"]["transitions"]["observation"]
    for name, expected in (("mean", observed.mean(0)), ("deviation", observed.std(0, correction=0))):
        statistic = actor.qvalue_network_params["module", f"observation_{name}"]
        torch.testing.assert_close(statistic, expected.expand_as(statistic))
