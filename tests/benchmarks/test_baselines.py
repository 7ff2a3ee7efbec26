"""The baselines obey the conventions of TorchRL's losses, and learn what they should on problems with known answers."""

from __future__ import annotations

import pytest
import torch
from tensordict import TensorDict
from torchrl.data import Bounded
from torchrl.envs.utils import ExplorationType, set_exploration_type

from benchmarks.baselines.actor_critic import ActorCriticLoss
from benchmarks.baselines.algorithm import VALUE_KEY, Algorithm, Problem
from benchmarks.baselines.qsm import QSMLoss, ScoreNetwork, make_qsm
from benchmarks.baselines.sql import stein_direction
from benchmarks.learning import FAMILIES

PROBLEM = Problem(3, Bounded(torch.tensor([-2.0, 0.0]), torch.tensor([2.0, 1.0])), (16, 16))
OWN_LOSSES = ("sql", "qsm")
VARIANTS = ("langevin", "quantiles", "crossq")


def make(family: str, problem: Problem = PROBLEM, lr: float = 3e-4) -> Algorithm:
    torch.manual_seed(0)
    if family in VARIANTS:
        return FAMILIES[family](problem, optim={"lr": lr}, sampler={"execution": "eager"})
    return FAMILIES[family](problem, lr=lr)


def transitions(num: int = 32, problem: Problem = PROBLEM) -> TensorDict:
    flags = torch.zeros(num, 1, dtype=torch.bool)
    following = {
        "observation": torch.randn(num, problem.observation_dim),
        "reward": torch.randn(num, 1),
        "done": flags,
        "terminated": flags,
    }
    action = problem.action_spec.rand(torch.Size([num]))
    return TensorDict({"observation": torch.randn(num, 3), "action": action, "next": following}, [num])


@pytest.mark.parametrize("family", FAMILIES)
class TestEveryAlgorithm:
    def test_actions_are_within_bounds_and_repeat_without_exploration(self, family: str) -> None:
        algorithm = make(family)
        observation = TensorDict({"observation": torch.randn(64, 3)}, [64])
        with torch.no_grad(), set_exploration_type(ExplorationType.RANDOM):
            first, second = (algorithm.actor(observation.copy())["action"] for _ in range(2))
        assert not torch.equal(first, second)
        assert PROBLEM.action_spec.expand(64, 2).is_in(first)
        with torch.no_grad(), set_exploration_type(ExplorationType.DETERMINISTIC):
            first, second = (algorithm.evaluator(observation.copy()) for _ in range(2))
        assert torch.equal(first["action"], second["action"])
        assert first[VALUE_KEY].shape == (64, 1)

    def test_an_update_changes_what_is_trained_and_moves_the_targets_a_little(self, family: str) -> None:
        algorithm = make(family)
        batch = transitions()
        batch_before = batch.clone()
        before = {name: value.clone() for name, value in algorithm.loss.state_dict().items() if value is not None}
        # TD3 updates its actor every second time.
        for _ in range(2):
            metrics = algorithm.update(batch)
        assert all(value.ndim == 0 and not value.requires_grad for value in metrics.values())
        after = algorithm.loss.state_dict()
        trained = [name for name, parameter in algorithm.loss.named_parameters() if parameter.requires_grad]
        assert trained and algorithm.num_parameters == sum(before[name].numel() for name in trained)
        assert all(not torch.equal(before[name], after[name]) for name in trained)
        for name in after:
            if name.startswith("target_qvalue") and before[name].is_floating_point():
                live = name.removeprefix("target_")
                if live in trained:
                    moved = (after[name] - before[name]).abs().max()
                    assert 0 < moved < (after[live] - before[live]).abs().max()
        assert (batch.select(*batch_before.keys()) == batch_before).all()

    def test_one_step_problems_are_learned(self, family: str) -> None:
        """Reward 1 - (a - 0.5)^2 at the end of every episode: the critic knows it, and the actor goes there."""
        problem = Problem(3, Bounded(-1.0, 1.0, torch.Size([1])), (32, 32), tau=0.05)
        algorithm = make(family, problem, lr=3e-3)
        for _ in range(200):
            batch = transitions(64, problem)
            batch["next", "reward"] = 1.0 - (batch["action"] - 0.5).square()
            batch["next", "terminated"] = batch["next", "done"] = torch.ones(64, 1, dtype=torch.bool)
            algorithm.update(batch)
        with torch.no_grad(), set_exploration_type(ExplorationType.DETERMINISTIC):
            result = algorithm.evaluator(TensorDict({"observation": torch.randn(64, 3)}, [64]))
        reward = 1.0 - (result["action"] - 0.5).square()
        assert (result[VALUE_KEY] / algorithm.reward_scale - reward).abs().mean() < 0.2
        # A uniform action obtains 0.42 on average, the nearer face 0.75: TD3's tanh saturates there while its critic is
        # still a plane, and QSM's few and long denoising steps end there.
        assert reward.mean() > 0.7


@pytest.mark.slow
def test_a_compiled_update_of_sac_trains_all_that_an_update_does() -> None:
    moves = []
    for compile_update in (False, True):
        algorithm = FAMILIES["sac"](PROBLEM, lr=3e-4, compile_update=compile_update)
        before = {name: parameter.detach().clone() for name, parameter in algorithm.loss.named_parameters()}
        assert algorithm.update(transitions())["loss_qvalue"] > 0.0
        moves.append({name: value - before[name] for name, value in algorithm.loss.named_parameters()})
    assert moves[0].keys() == moves[1].keys()
    for name, move in moves[0].items():
        # Adam's first step is the learning rate, wherever there is a gradient.
        for moved in (move, moves[1][name]):
            torch.testing.assert_close(moved.abs().max(), torch.tensor(3e-4), rtol=1e-2, atol=0.0)


@pytest.mark.parametrize("family", OWN_LOSSES)
class TestOwnLosses:
    def test_gradients_reach_only_their_own_parameters(self, family: str) -> None:
        loss = make(family).loss
        for name in ("actor", "qvalue"):
            loss.zero_grad()
            loss(transitions())[f"loss_{name}"].backward()
            for parameter_name, parameter in loss.named_parameters():
                own = parameter_name.startswith(name)
                reached = parameter.grad is not None and bool(parameter.grad.abs().sum() > 0)
                assert reached == own, parameter_name

    def test_keys_can_be_renamed(self, family: str) -> None:
        loss = make(family).loss
        batch = transitions()
        torch.manual_seed(1)
        expected = loss(batch.clone())
        loss.set_keys(reward="gain")
        batch.rename_key_(("next", "reward"), ("next", "gain"))
        torch.manual_seed(1)
        assert torch.equal(loss(batch)["loss_qvalue"], expected["loss_qvalue"])
        assert ("next", "gain") in loss.in_keys
        with pytest.raises(ValueError, match="colour"):
            loss.set_keys(colour="red")

    def test_it_takes_keyword_arguments(self, family: str) -> None:
        loss = make(family).loss
        batch = transitions()
        torch.manual_seed(1)
        expected = loss(batch.clone())
        torch.manual_seed(1)
        kwargs = {f"next_{key}": value for key, value in batch.get("next").items()}
        found = loss(observation=batch["observation"], action=batch["action"], **kwargs)
        assert len(found) == len(loss.out_keys)
        torch.testing.assert_close(found[loss.out_keys.index("loss_qvalue")], expected["loss_qvalue"])

    def test_terminal_states_are_worth_nothing(self, family: str) -> None:
        loss = make(family).loss
        batch = transitions()
        batch["next", "terminated"] = batch["next", "done"] = torch.ones(32, 1, dtype=torch.bool)
        torch.testing.assert_close(loss(batch)["target_value"], batch["next", "reward"].mean())

    def test_per_sample_losses(self, family: str) -> None:
        loss = make(family).loss
        assert isinstance(loss, ActorCriticLoss)
        loss.reduction = "none"
        losses = loss(transitions())
        assert losses["loss_actor"].shape == losses["loss_qvalue"].shape == (32,)


def test_every_denoising_step_of_the_diffusion_actor_ends_in_the_box() -> None:
    betas = torch.linspace(0.2, 0.84, 5)
    noise_share = (1.0 - torch.cumprod(1.0 - betas, 0)).sqrt()
    score = ScoreNetwork(PROBLEM, betas)
    step = torch.randint(5, (50, 1))
    inputs = torch.cat([torch.randn(50, 2), torch.randn(50, 3), step.float()], -1)

    def denoised() -> torch.Tensor:
        """The step as DiffusionActor writes it."""
        return (inputs[:, :2] - betas[step] / noise_share[step] * score(inputs)) / (1.0 - betas[step]).sqrt()

    with torch.no_grad():
        for parameter in score.network.parameters():
            parameter.fill_(100.0)
        # float32: rounding of the noise, 3 at most, times a factor of at most 2.5.
        torch.testing.assert_close(denoised(), torch.full((50, 2), -1.0), atol=1e-5, rtol=0.0)


def test_the_score_of_qsm_becomes_the_critics_gradient() -> None:
    """A critic that is the plane 3 a_1 - a_2 in normalised actions has a constant gradient."""
    torch.manual_seed(0)
    algorithm = make_qsm(PROBLEM, gradient_scale=2.0)
    loss = algorithm.loss
    assert isinstance(loss, QSMLoss)

    def plane(_: TensorDict, action: torch.Tensor, params: TensorDict) -> torch.Tensor:
        normalised = (action - loss.center) / loss.half_range
        return (normalised @ torch.tensor([3.0, -1.0])).expand(2, *action.shape[:-1])

    loss.values = plane  # pyright: ignore[reportAttributeAccessIssue]
    optimizer = torch.optim.Adam(loss.actor_network_params.values(True, True), lr=1e-2)
    for _ in range(300):
        optimizer.zero_grad()
        loss.actor_loss(transitions()).backward()
        optimizer.step()
    # The target is (-6, 2), whose mean square is 20.
    assert float(loss.actor_loss(transitions()).detach()) < 0.2
    with torch.no_grad(), set_exploration_type(ExplorationType.RANDOM):
        action = algorithm.actor(TensorDict({"observation": torch.randn(500, 3)}, [500]))["action"]
    assert (action[:, 0] > 0.9 * 2.0).float().mean() > 0.9 and action[:, 1].mean() < 0.4


def test_stein_moves_particles_to_the_density() -> None:
    """Particles far from a standard normal have its mean and variance after a few hundred steps."""
    torch.manual_seed(0)
    particles = torch.randn(64, 1, 1) * 0.1 + 3.0
    for _ in range(500):
        particles = particles + 0.3 * stein_direction(particles, particles, -particles)
    # 64 particles of a normal: the standard error of the mean is 0.125.
    assert abs(float(particles.mean())) < 0.25
    assert 0.7 < float(particles.std()) < 1.3


def test_what_the_training_loop_does_with_batches_is_done_here_too() -> None:
    options = {"optim.n_steps": 3, "network.normalize_observation": True, "sampler.execution": "eager"}
    algorithm = FAMILIES["langevin"](PROBLEM, **options)
    batch = transitions(5).unsqueeze(0)
    batch["next", "done"][:] = False
    replayed = algorithm.transitions(batch)
    # Five steps, three of which wait for more.
    assert replayed["steps_to_next_obs"].tolist() == [3, 3]
    assert torch.equal(replayed["next", "observation"], batch["next", "observation"][0, 2:4])
    mean = algorithm.loss.state_dict()["qvalue_network_params.module.observation_mean"]
    torch.testing.assert_close(mean, batch["observation"].mean(1).expand(2, 3))
