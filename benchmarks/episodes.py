"""Do whole episodes of an engine return what Gymnasium's do?

Plays episodes under a fixed stochastic policy (uniform actions, each held for four steps) on an engine and on
Gymnasium's own environments, with other seeds, and compares the two samples of returns and of lengths by the two-sample
Kolmogorov-Smirnov test::

    python -m benchmarks.episodes --engine mujoco --output benchmarks/results/engines/episodes.json

A correct engine gives p-values uniform in [0, 1]; below 0.001 is suspicious.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from scipy import stats
from torchrl.envs import EnvBase

from envs import list_engines, list_tasks, make_env

HOLD = 4
"""Steps for which an action is held."""


def episode_returns(env: EnvBase, seed: int) -> np.ndarray:
    """Returns [num_envs] of the first episode of each environment.

    Args:
        env: batch size [num_envs].
        seed: of the actions.
    """
    return play_episodes(env, seed)[0]


def play_episodes(env: EnvBase, seed: int) -> tuple[np.ndarray, np.ndarray]:
    """Returns and lengths, each [num_envs], of the first episode of each environment."""
    generator = torch.Generator().manual_seed(seed)
    spec: Any = env.action_spec
    low, high = spec.low, spec.high
    tensordict = env.reset()
    num_envs = env.batch_size[0]
    returns, lengths = torch.zeros(num_envs, dtype=torch.float64), torch.zeros(num_envs)
    active, step, action = torch.ones(num_envs, dtype=torch.bool), 0, low
    while active.any():
        if step % HOLD == 0:
            action = low + (high - low) * torch.rand(low.shape, generator=generator)
        transition, tensordict = env.step_and_maybe_reset(tensordict.set("action", action))
        returns += transition["next", "reward"][:, 0] * active
        lengths += active
        active &= ~transition["next", "done"][:, 0]
        step += 1
    return returns.numpy(), lengths.numpy()


def pvalue(first: np.ndarray, second: np.ndarray) -> float:
    """Of the two-sample Kolmogorov-Smirnov test."""
    result: Any = stats.ks_2samp(first, second)
    return float(result.pvalue)


def compare(task: str, engine: str, episodes: int, engine_options: dict[str, Any], **options: Any) -> dict[str, Any]:
    """Both samples' statistics and the tests' p-values, as a row of the result."""
    ours = play_episodes(
        make_env(task, episodes, engine=engine, seed=1, engine_options=engine_options, **options), seed=2
    )
    theirs = play_episodes(make_env(task, episodes, engine="gymnasium", seed=3, **options), seed=4)
    row: dict[str, Any] = {"task": task, "engine": engine, "engine_options": engine_options, "episodes": episodes}
    for name, mine, reference in zip(("return", "length"), ours, theirs, strict=True):
        row |= {
            f"{name}_mean": float(mine.mean()),
            f"{name}_std": float(mine.std()),
            f"gymnasium_{name}_mean": float(reference.mean()),
            f"gymnasium_{name}_std": float(reference.std()),
            f"{name}_pvalue": pvalue(mine, reference),
        }
    return row | options


def main(arguments: Sequence[str] | None = None) -> int:
    """Command line; returns 1 if a p-value is below 0.001."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--engine", choices=list_engines(), default="mujoco")
    parser.add_argument("--engine-options", type=json.loads, default={}, metavar="JSON")
    parser.add_argument("--task", action="append", choices=list_tasks(), metavar="ID", help="by default all")
    parser.add_argument("--episodes", type=int, default=200)
    parser.add_argument("--max-episode-steps", type=int, help="by default the task's own limit")
    parser.add_argument("--output", type=Path, help="JSON file; rows of other tasks or engines in it are kept")
    options = parser.parse_args(arguments)
    limit = {} if options.max_episode_steps is None else {"max_episode_steps": options.max_episode_steps}
    rows = []
    for task in options.task or list_tasks():
        row = compare(task, options.engine, options.episodes, options.engine_options, **limit)
        rows.append(row)
        print(
            f"{task:26s} return {row['return_mean']:10.2f} (Gymnasium {row['gymnasium_return_mean']:10.2f}) p "
            f"{row['return_pvalue']:.3f}, length {row['length_mean']:6.1f} ({row['gymnasium_length_mean']:6.1f}) p "
            f"{row['length_pvalue']:.3f}",
            flush=True,
        )
        if options.output is not None:
            _merge(options.output, row)
    return int(any(min(row["return_pvalue"], row["length_pvalue"]) < 1e-3 for row in rows))


def _merge(path: Path, row: dict[str, Any]) -> None:
    rows = json.loads(path.read_text()) if path.exists() else []
    rows = [other for other in rows if (other["task"], other["engine"]) != (row["task"], row["engine"])]
    rows = sorted([*rows, row], key=lambda other: (other["engine"], other["task"]))
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(rows, indent=1) + "\n")


if __name__ == "__main__":
    raise SystemExit(main())
