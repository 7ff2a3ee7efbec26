"""What is particular to the trials: quantile critics, and batch-normalised ones without target networks."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from tensordict import TensorDict
from torchrl.data import Bounded

from benchmarks.baselines.algorithm import Algorithm, Problem
from benchmarks.baselines.crossq import BatchRenorm, CrossQLoss, make_crossq
from benchmarks.baselines.quantiles import QuantileLoss, QuantileQNetwork, make_quantiles, quantile_huber_loss
from nclql_torchrl.value import action_gradient

PROBLEM = Problem(3, Bounded(torch.tensor([-2.0, 0.0]), torch.tensor([2.0, 1.0])), (16, 16))
TRIALS = {"quantiles": make_quantiles, "crossq": make_crossq}


def make(maker: Callable[..., Algorithm], **options: Any) -> Algorithm:
    """With critics whose parameters and statistics are all different."""
    torch.manual_seed(0)
    algorithm = maker(PROBLEM, **{"sampler.execution": "eager"} | options)
    loss = algorithm.loss
    for name, tensor in loss.state_dict().items():
        if "norms" in name and tensor.is_floating_point():
            tensor.uniform_(0.5, 2.0)
    return algorithm


def transitions(num: int = 32, terminated: bool = False) -> TensorDict:
    flags = torch.full((num, 1), terminated)
    following = {
        "observation": torch.randn(num, 3),
        "reward": torch.randn(num, 1),
        "done": flags,
        "terminated": flags,
    }
    action = PROBLEM.action_spec.rand(torch.Size([num]))
    return TensorDict({"observation": torch.randn(num, 3) + 1.0, "action": action, "next": following}, [num])


@pytest.mark.parametrize("name", TRIALS)
@pytest.mark.parametrize("layer_norm", [False, True])
@pytest.mark.parametrize("level", [0, 9])
def test_the_sampler_climbs_what_the_loss_trains(name: str, level: int, layer_norm: bool) -> None:
    loss = make(TRIALS[name], **{"network.layer_norm": layer_norm}).loss
    assert isinstance(loss, QuantileLoss | CrossQLoss)
    batch = transitions(8).select("observation")
    landscape = loss.actor_network.action_value(batch, num_particles=1).at_level(level)
    normalised = torch.rand(1, 8, 2) * 2.0 - 1.0

    def values(normalised: torch.Tensor) -> torch.Tensor:
        action = loss.sampler.to_environment(normalised[0])
        return loss.ensemble_values(batch, action, torch.full((8,), level))

    torch.testing.assert_close(landscape.heads(normalised).squeeze(1), values(normalised))
    gradient = action_gradient(lambda action: values(action).sum(0), normalised)
    torch.testing.assert_close(landscape.gradient(normalised), gradient)


class TestQuantiles:
    def test_the_loss_finds_the_quantiles(self) -> None:
        """Of 0, 1, ..., 999, a thousand times Huber's threshold: there it is the absolute error but for rounding."""
        samples = torch.arange(1_000.0)
        quantiles = torch.full((4,), 500.0, requires_grad=True)
        optimizer = torch.optim.SGD([quantiles], lr=500.0)
        for _ in range(200):
            optimizer.zero_grad()
            quantile_huber_loss(quantiles, samples).backward()
            optimizer.step()
        # The middles of four equal shares. Between two samples the pull does not change sign: an error of one.
        torch.testing.assert_close(quantiles.detach(), torch.tensor([125.0, 375.0, 625.0, 875.0]), atol=2.0, rtol=0.0)

    def test_a_common_small_error_counts_as_its_square(self) -> None:
        loss = quantile_huber_loss(torch.full((2, 25), 3.0), torch.tensor([[3.1], [2.8]]).expand(2, 25))
        torch.testing.assert_close(loss, torch.tensor([0.01, 0.04]))

    def test_targets_are_the_quantiles_of_the_lower_critic(self) -> None:
        loss = make(make_quantiles).loss
        assert isinstance(loss, QuantileLoss)
        batch = loss.draw(transitions())
        targets, next_state_value = loss.target_quantiles(batch)
        level = torch.full((32,), 9)
        first, second = loss.quantiles(
            batch.get("next"), batch["next_action"], level, loss.target_qvalue_network_params
        )
        lower = torch.where(first.mean(-1, keepdim=True) < second.mean(-1, keepdim=True), first, second)
        torch.testing.assert_close(targets, 0.2 * batch["next", "reward"] + 0.99 * lower)
        torch.testing.assert_close(next_state_value, lower.mean(-1))
        # Two steps of reward already in "reward", as MultiStepTransform leaves them.
        two_steps, _ = loss.target_quantiles(batch.set("steps_to_next_obs", torch.full((32, 1), 2)))
        torch.testing.assert_close(two_steps, 0.2 * batch["next", "reward"] + 0.99**2 * lower)

    def test_a_coin_is_two_quantiles(self) -> None:
        """Rewards of -1 or 1 at the end of every episode, at a scale where Huber's loss is mostly linear."""
        algorithm = make(
            make_quantiles, num_quantiles=4, **{"optim.reward_scale": 5.0, "optim.lr": 2e-2, "sampler.num_levels": 1}
        )
        loss = algorithm.loss
        assert isinstance(loss, QuantileLoss)
        for _ in range(100):
            batch = transitions(256, terminated=True)
            batch["next", "reward"] = torch.randint(2, (256, 1)) * 2.0 - 1.0
            algorithm.update(batch)
        with torch.no_grad():
            batch = transitions()
            quantiles = loss.quantiles(batch, batch["action"], torch.zeros(32, dtype=torch.int64)).mean((0, 1))
        # Shares of 1/8, 3/8, 5/8 and 7/8; within Huber's threshold of 1 of -5 and 5.
        assert (quantiles[:2] < -4.0).all() and (quantiles[2:] > 4.0).all()

    def test_one_quantile_is_refused(self) -> None:
        with pytest.raises(ValueError, match="num_quantiles is 1"):
            QuantileQNetwork(3, 2, num_quantiles=1)


class TestCrossQ:
    def statistics(self, loss: CrossQLoss) -> dict[str, torch.Tensor]:
        """Running statistics of each layer, each of shape [num_critics, width]."""
        renorms = loss.qvalue_network_params["module", "renorms"].items(True, True)
        return {".".join(key): value.clone() for key, value in renorms if "running" in key[-1]}

    def test_only_the_joint_batch_moves_the_statistics(self) -> None:
        loss = make(make_crossq).loss
        assert isinstance(loss, CrossQLoss)
        batch = loss.draw(transitions())
        before = self.statistics(loss)
        loss.noise_loss(batch)
        assert all(torch.equal(value, before[name]) for name, value in self.statistics(loss).items())
        loss.qvalue_loss(batch)
        after = self.statistics(loss)
        assert all(not torch.equal(value, before[name]) for name, value in after.items())
        mean = torch.cat([batch["observation"], batch["next", "observation"]]).mean(0).expand(2, 3)
        expected = before["0.running_mean"][:, :3] + 0.01 * (mean - before["0.running_mean"][:, :3])
        torch.testing.assert_close(after["0.running_mean"][:, :3], expected)

    def test_terminal_observations_do_not_move_the_statistics(self) -> None:
        loss = make(make_crossq).loss
        assert isinstance(loss, CrossQLoss)
        batch = loss.draw(transitions(terminated=True))
        before = self.statistics(loss)
        batch["next", "observation"] = torch.full((32, 3), float("nan"))
        loss.qvalue_loss(batch)
        expected = before["0.running_mean"][:, :3] + 0.01 * (
            batch["observation"].mean(0) - before["0.running_mean"][:, :3]
        )
        torch.testing.assert_close(self.statistics(loss)["0.running_mean"][:, :3], expected)

    def test_after_the_warm_up_training_sees_what_acting_sees(self) -> None:
        """Where the batch is within the limits of the corrections; for any number of batches after the warm-up."""
        renorm = BatchRenorm(4, warmup_steps=3)
        x = torch.randn(512, 4) * 1.2 + 0.3
        for _ in range(9):
            before = {name: value.clone() for name, value in renorm.state_dict().items()}
            trained = renorm(x)
        renorm.load_state_dict(before)
        torch.testing.assert_close(trained, renorm.eval()(x))
        assert int(renorm.num_batches_tracked) == 3

    def test_the_target_comes_out_of_the_same_pass_without_a_gradient(self) -> None:
        loss = make(make_crossq, warmup_steps=1_000).loss
        assert isinstance(loss, CrossQLoss)
        assert not any(name.startswith("target_") for name, _ in loss.named_parameters())
        batch = loss.draw(transitions())
        joint = TensorDict({"observation": torch.cat([batch["observation"], batch["next", "observation"]])}, [64])
        loss.qvalue_network.train()
        values = loss.ensemble_values(joint, torch.cat([batch["action"], batch["next_action"]]), torch.full((64,), 9))
        loss.qvalue_network.eval()
        target = 0.2 * batch["next", "reward"].squeeze(-1) + 0.99 * values[:, 32:].amin(0).detach()
        expected = (values[:, :32] - target).square().mean(1).sum()
        found, metadata = loss.qvalue_loss(batch)
        torch.testing.assert_close(found, expected)
        torch.testing.assert_close(metadata["target_value"], target)
        parameters = [parameter for parameter in loss.parameters() if parameter.requires_grad]
        gradients = (torch.autograd.grad(loss, parameters, allow_unused=True) for loss in (found, expected))
        for one, other in zip(*gradients, strict=True):
            assert (one is None) == (other is None)
            if one is not None and other is not None:
                torch.testing.assert_close(one, other)
