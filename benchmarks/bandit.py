"""A bandit with several best actions: who finds all of them, and in the right proportion?

One state, actions in [-1, 1]^2, and a reward whose Boltzmann density exp(w r) is a mixture of four normals, of equal
weights (modes of equal height) or of 0.4, 0.3, 0.2 and 0.1: the kind of landscape that noise conditioning is meant for
(arXiv 2602.07873). Every algorithm learns from the actions that it takes itself; then its policy is compared with the
exact density::

    python -m benchmarks.bandit --bandit equal --bandit unequal     # trains what is not in bandit.jsonl yet

A figure for each, ``equal.png``, is made with the agents of seed 0, which are trained again where they are not new.

The soft optimum is known because every step is terminal, so that Q is the reward: the policy should be exp(w r). w is
20 for the Langevin samplers, and SAC and soft Q-learning have the fixed temperature 1 / w. Q-score matching has no such
temperature, since its score ignores the noise that a step adds: its factor on the action gradient, 1, did best on the
unequal modes of 0.2, 1, 3, 8 and 20, tried with Adam 1e-3 only.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from matplotlib.colors import to_rgba
from matplotlib.figure import Figure
from tensordict import TensorDict
from torch import Tensor
from torchrl.data import Bounded, LazyTensorStorage, TensorDictReplayBuffer
from torchrl.envs.utils import ExplorationType, set_exploration_type

from benchmarks.baselines.algorithm import Algorithm, Problem
from benchmarks.baselines.langevin import make_langevin
from benchmarks.baselines.qsm import make_qsm
from benchmarks.baselines.sac import make_sac
from benchmarks.baselines.sql import make_sql
from nclql_torchrl.actor import LangevinActor
from nclql_torchrl.machine import describe_machine
from nclql_torchrl.targets import AnalyticTarget

RESULTS = Path(__file__).parent / "results" / "bandit"
W = 20.0
"""Inverse temperature of the exact density, exp(W reward)."""
CENTERS = [[0.5, 0.5], [-0.5, 0.5], [-0.5, -0.5], [0.5, -0.5]]
DEVIATION = 0.15
BANDITS = {"equal": [0.25, 0.25, 0.25, 0.25], "unequal": [0.4, 0.3, 0.2, 0.1]}
"""Weights of the modes at :data:`CENTERS`."""
RANDOM_ACTIONS = 2_000
"""Uniform, before learning starts."""
ACTIONS_PER_UPDATE = 8
BATCH_SIZE = 256
LR = 1e-2
"""Of every algorithm. With 1e-3 critics see no modes yet after 2,000 updates: fitted to uniform actions, they stay at
an error of 0.11, the deviation of the reward itself, and with 1e-2 come to 0.016."""
SAMPLES = 4_096
"""Actions that a policy is judged by; exact ones come to a total variation of about 0.06."""
BINS = 10
"""Equally probable bins per dimension of the total variation."""

EXACT = {"sampler.normalize_gradient": False, "sampler.boundary": "reflect", "sampler.ensemble_reduction": "mean"}
"""The drift of exp(w Q) itself: neither its direction only, nor the sum over two critics, which doubles w."""
LANGEVIN = {"optim.reward_scale": 1.0, "optim.lr": LR, "sampler.w": W, "sampler.execution": "compile"}

ALGORITHMS: dict[str, Callable[[Problem], Algorithm]] = {
    "nclql": lambda problem: make_langevin(problem, **LANGEVIN),
    "nclql, exact drift": lambda problem: make_langevin(problem, **LANGEVIN, **EXACT),
    "lql": lambda problem: make_langevin(
        problem,
        **LANGEVIN,
        **EXACT,
        **{"sampler.num_levels": 1, "sampler.steps_per_level": 20, "sampler.step_lr": 5e-3},
    ),
    "sac": lambda problem: make_sac(problem, lr=LR, alpha=1.0 / W),
    "sql": lambda problem: make_sql(problem, lr=LR, alpha=1.0 / W),
    "qsm": lambda problem: make_qsm(problem, lr=LR, gradient_scale=1.0),
}


def make_bandit(weights: list[float]) -> AnalyticTarget:
    """The reward, as a landscape whose density exp(W reward) is known."""
    return AnalyticTarget(CENTERS, [[DEVIATION] * 2] * 4, weights, w=W)


def observations(count: int) -> TensorDict:
    """The only state, ``count`` times."""
    return TensorDict({"observation": torch.zeros(count, 1)}, [count])


def act(algorithm: Algorithm, count: int) -> Tensor:
    """Exploring actions, shape [count, 2]."""
    with torch.no_grad(), set_exploration_type(ExplorationType.RANDOM):
        return algorithm.actor(observations(count))["action"]


def train(algorithm: Algorithm, bandit: AnalyticTarget, updates: int) -> None:
    """Acts, learns, and acts again, from replay of everything so far."""
    replay_buffer = TensorDictReplayBuffer(
        storage=LazyTensorStorage(RANDOM_ACTIONS + updates * ACTIONS_PER_UPDATE), batch_size=BATCH_SIZE
    )

    def store(action: Tensor) -> None:
        transitions = observations(len(action)).set("action", action)
        ended = torch.ones(len(action), 1, dtype=torch.bool)
        following = observations(len(action)).update(
            {"reward": bandit(action).unsqueeze(-1), "done": ended, "terminated": ended}
        )
        replay_buffer.extend(transitions.set("next", following))

    store(torch.rand(RANDOM_ACTIONS, 2) * 2 - 1)
    for _ in range(updates):
        store(act(algorithm, ACTIONS_PER_UPDATE))
        algorithm.update(replay_buffer.sample())


def judge(action: Tensor, bandit: AnalyticTarget) -> dict[str, Any]:
    """How far a policy's actions are from the exact density.

    Args:
        action: shape [samples, 2].
        bandit: the reward.

    Returns:
        ``total_variation`` over bins; ``mode_shares``, of the actions within three deviations of each mode;
        ``modes_covered``, those that hold at least half of their weight; ``mode_error``, the total-variation distance
        between shares and weights; ``reward``, the mean; and ``spread``, the deviation of actions within a mode as a
        multiple of the right one.
    """
    offsets = action.double().unsqueeze(1) - bandit.centers
    near = (offsets / bandit.deviations).square().sum(-1) <= 9.0
    shares = near.double().mean(0)
    inside = offsets[near]
    return {
        "total_variation": bandit.total_variation(action, BINS),
        "mode_shares": shares.tolist(),
        "modes_covered": int((shares >= 0.5 * bandit.weights).sum()),
        "mode_error": float(0.5 * ((shares - bandit.weights).abs().sum() + (1.0 - shares.sum()))),
        "reward": float(bandit(action).mean()),
        "spread": float(inside.square().mean().sqrt() / DEVIATION) if len(inside) else None,
    }


def landscapes(algorithm: Algorithm, points: Tensor) -> dict[int, Tensor]:
    """Noise level -> the critics' mean Q at ``points`` [count, 2], for a Langevin agent."""
    actor = algorithm.actor
    assert isinstance(actor, LangevinActor)
    value = actor.action_value(observations(len(points)))
    num_levels = actor.sampler.schedule.num_levels
    levels = (0, num_levels // 2, num_levels - 1)
    return {level: value.at_level(level).heads(points.unsqueeze(0)).mean(0).squeeze(0) for level in levels}


def run(bandit_name: str, name: str, seed: int, updates: int) -> tuple[dict[str, Any], Algorithm]:
    """Trains and judges one algorithm; its record, and the agent."""
    torch.manual_seed(seed)
    bandit = make_bandit(BANDITS[bandit_name])
    problem = Problem(1, Bounded(-1.0, 1.0, torch.Size([2])), hidden_sizes=(64, 64))
    algorithm = ALGORITHMS[name](problem)
    started = time.process_time()
    train(algorithm, bandit, updates)
    seconds = time.process_time() - started
    record = {"bandit": bandit_name, "algorithm": name, "seed": seed, "updates": updates, "cpu_seconds": seconds}
    return record | judge(act(algorithm, SAMPLES), bandit), algorithm


def draw(bandit_name: str, agents: dict[str, Algorithm], path: Path) -> None:
    """The landscapes that NC-LQL learned at several noise levels, and what everyone samples.

    Args:
        bandit_name: of :data:`BANDITS`.
        agents: trained, by the names of :data:`ALGORITHMS`.
        path: the PNG to write.
    """
    axis = torch.linspace(-1.0, 1.0, 81)
    points = torch.cartesian_prod(axis, axis)
    density = make_bandit(BANDITS[bandit_name]).log_density(points).exp().reshape(81, 81)
    images = {"exp(w r), exact": density}
    for level, q in landscapes(agents["nclql"], points).items():
        images[f"NC-LQL's Q, level {level}"] = q.reshape(81, 81)
    figure = Figure(figsize=(2.1 * 5, 2.2 * 2), layout="constrained")
    panels = iter(figure.subplots(2, 5).flat)
    for (title, image), axes in zip(images.items(), panels, strict=False):
        axes.imshow(image.T, origin="lower", extent=(-1, 1, -1, 1), cmap="viridis", aspect="auto")
        axes.set_title(title, fontsize=9)
    for (name, agent), axes in zip(agents.items(), panels, strict=False):
        axes.contour(axis, axis, density.T, levels=4, colors="0.75", linewidths=0.7)
        action = act(agent, 512)
        axes.scatter(action[:, 0], action[:, 1], s=3, color=to_rgba("C0", 0.5), linewidths=0)
        axes.set(xlim=(-1.03, 1.03), ylim=(-1.03, 1.03))
        axes.set_title(f"{name}: actions", fontsize=9)
    for axes in figure.axes:
        axes.set(xticks=[-1, 0, 1], yticks=[-1, 0, 1])
        axes.tick_params(labelsize=7)
    figure.savefig(path, dpi=150)


def table(records: list[dict[str, Any]]) -> str:
    """Means over seeds as Markdown."""
    lines = [
        "| Modes | Algorithm | Seeds | Total variation | Modes covered | Mode error | Spread | Reward |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for bandit_name in BANDITS:
        for name in ALGORITHMS:
            found = [r for r in records if (r["bandit"], r["algorithm"]) == (bandit_name, name)]
            if not found:
                continue

            def mean(column: str, found: list[dict[str, Any]] = found) -> float:
                return statistics.mean(record[column] for record in found if record[column] is not None)

            lines.append(
                f"| {bandit_name} | {name} | {len(found)} | {mean('total_variation'):.2f} | "
                f"{mean('modes_covered'):.1f} of 4 | {mean('mode_error'):.2f} | {mean('spread'):.2f} | "
                f"{mean('reward'):.3f} |"
            )
    return "\n".join(lines)


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--bandit", action="append", choices=list(BANDITS), help="by default all")
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--updates", type=int, default=2_000)
    parser.add_argument("--directory", type=Path, default=RESULTS)
    options = parser.parse_args()
    torch.set_num_threads(1)
    options.directory.mkdir(parents=True, exist_ok=True)
    path = options.directory / "bandit.jsonl"
    records = [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []
    done = {(r["bandit"], r["algorithm"], r["seed"], r["updates"]) for r in records}
    for bandit_name in options.bandit or BANDITS:
        agents: dict[str, Algorithm] = {}
        for seed in range(options.seeds):
            for name in ALGORITHMS:
                is_done = (bandit_name, name, seed, options.updates) in done
                if is_done and seed > 0:
                    continue
                record, agent = run(bandit_name, name, seed, options.updates)
                if seed == 0:
                    agents[name] = agent
                if is_done:
                    continue
                records.append(record | {"machine": describe_machine(("torch", "torchrl"))})
                with path.open("a") as file:
                    file.write(json.dumps(records[-1]) + "\n")
                print(
                    f"{bandit_name:8s} {name:20s} seed {seed}: total variation {record['total_variation']:.2f}, "
                    f"{record['modes_covered']} of 4 modes, {record['cpu_seconds']:.0f} CPU s",
                    flush=True,
                )
            if seed == 0:
                draw(bandit_name, agents, options.directory / f"{bandit_name}.png")
    print(table(records))


if __name__ == "__main__":
    main()
