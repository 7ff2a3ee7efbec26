"""The model card of an exported agent: front matter for the Hugging Face Hub, and what the run measured."""

from __future__ import annotations

import json
from typing import Any

from omegaconf import OmegaConf

from nclql_torchrl.training.config import TrainConfig
from nclql_torchrl.training.run_directory import RunDirectory


def measured_score(run: RunDirectory, frames: int) -> dict[str, Any] | None:
    """What the run itself measured of the agent that it had after ``frames`` transitions.

    Args:
        run: the run directory.
        frames: of the checkpoint; a score of any other moment would be of another agent.

    Returns:
        ``return_mean``, ``return_std``, ``episodes`` and ``source``, the file that says so; None without an evaluation.
    """
    if run.summary.is_file():
        summary = json.loads(run.summary.read_text())
        if summary["frames"] == frames:
            names = ("return_mean", "return_std", "episodes")
            return {**{name: summary[name] for name in names}, "source": run.summary.name}
    for row in run.read_metrics() if run.metrics.is_file() else []:
        if int(row["frames"]) == frames and "evaluation_return" in row:
            return {
                "return_mean": row["evaluation_return"],
                "return_std": row["evaluation_return_std"],
                "episodes": None,
                "source": run.metrics.name,
            }
    return None


def model_card(
    config: TrainConfig,
    *,
    frames: int,
    score: dict[str, Any] | None,
    best: bool = False,
    programs: list[str] | None = None,
) -> str:
    """The card, in Markdown.

    Args:
        config: of the run.
        frames: transitions that the agent was trained on.
        score: from :func:`measured_score`.
        best: whether it was kept for the best of the run's evaluations, which makes its score an optimistic one.
        programs: names of the compiled programs that lie beside it.

    Examples:
        >>> score = {"return_mean": -150.0, "return_std": 80.0, "episodes": 10, "source": "summary.json"}
        >>> print(model_card(TrainConfig(), frames=6000, score=score).split("# ")[-1].splitlines()[0])
        How it was trained
    """
    task, sampler = config.env.task, config.sampler
    front: dict[str, Any] = {
        "library_name": "nclql-torchrl",
        "tags": ["reinforcement-learning", "torchrl", "nc-lql", task],
    }
    if score is None:
        measured = "The run did not evaluate this checkpoint; `nclql-evaluate` does."
    else:
        spread = f"{score['return_mean']:.1f} +/- {score['return_std']:.1f}"
        episodes = config.logger.eval_episodes if score["episodes"] is None else score["episodes"]
        measured = (
            f"| Task | Return, mean ± standard deviation | Episodes | Source |\n|---|---|---|---|\n"
            f"| {task} | {spread.replace('+/-', '±')} | {episodes} | the run's {score['source']} |\n\n"
            "Whole episodes without exploration noise on Gymnasium's own environment, undiscounted; one training seed."
            + (" It is the best of the run's evaluations, so expect less of new episodes." if best else "")
        )
        metric = {"type": "mean_reward", "name": "mean_reward", "value": spread, "verified": False}
        kind = {"type": "reinforcement-learning", "name": "reinforcement-learning"}
        result = {"task": kind, "dataset": {"name": task, "type": task}, "metrics": [metric]}
        front["model-index"] = [{"name": f"NC-LQL {task}", "results": [result]}]
    settings = {
        "transitions": f"{frames:,}",
        "updates per transition": config.optim.utd_ratio,
        "seed": config.seed,
        "critics": f"{config.network.num_critics} x {config.network.hidden_sizes}"
        + (" with layer normalisation" if config.network.layer_norm else ""),
        "noise levels x steps": f"{sampler.num_levels} x {sampler.steps_per_level}",
        "w": sampler.w,
        "learning rate": config.optim.lr,
        "discount": config.optim.gamma,
    }
    rows = "\n".join(f"| {name} | {value} |" for name, value in settings.items())
    compiled = "" if not programs else PROGRAMS.format(names=" and ".join(f"`{name}`" for name in programs))
    return CARD.format(
        front=OmegaConf.to_yaml(OmegaConf.create(front)), task=task, measured=measured, rows=rows, compiled=compiled
    )


CARD = """---
{front}---

# NC-LQL on {task}

An agent of [NC-LQL](https://arxiv.org/abs/2602.07873): no policy network, but Langevin dynamics on the action gradient
of noise-conditioned critics, whose weights are here.

## Measured

{measured}

## Use

```python
from nclql_torchrl.pretrained import NCLQLAgent

agent = NCLQLAgent.from_pretrained("PATH OR owner/name")
action = agent.act(observation)  # [*batch, observation_dim] -> [*batch, action_dim]
```
{compiled}
## How it was trained

| Setting | Value |
|---|---|
{rows}

Everything else is in `config.json`.
"""

PROGRAMS = """
{names}: the same policy compiled ahead of time by AOTInductor for the machine that exported it; `nclql_torchrl.program`
loads them. They are native code: run only those that you trust.
"""
