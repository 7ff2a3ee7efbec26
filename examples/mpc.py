"""Model-predictive control: Langevin over a whole action sequence, on the return that a known model predicts for it.

The sequence is one long action, and the "critic" is the model unrolled: a function without parameters. Each control
step starts half of its chains from the previous plan, moved on by a step.

From the repository's root::

    python examples/mpc.py --frames 200 --horizon 20
"""

from __future__ import annotations

import argparse
import math

import torch
from tensordict.nn import TensorDictModule
from torch import Tensor
from torchrl.data import Bounded
from torchrl.envs import set_exploration_type
from torchrl.envs.utils import ExplorationType

from envs import make_env
from nclql_torchrl import LangevinActor, NoiseSchedule

GRAVITY, STEP, MAX_TORQUE, MAX_SPEED = 10.0, 0.05, 2.0, 8.0


def predicted_return(observation: Tensor, plan: Tensor) -> Tensor:
    """Sum of rewards along a plan, in the equations of Gymnasium's Pendulum-v1 (mass and length are 1).

    Args:
        observation: cosine and sine of the angle, and its speed, shape [*batch, 3].
        plan: torques, shape [*batch, horizon].

    Returns:
        Shape [*batch, 1].
    """
    angle, speed = torch.atan2(observation[..., 1], observation[..., 0]), observation[..., 2]
    total = torch.zeros_like(speed)
    for torque in plan.unbind(-1):
        wrapped = torch.remainder(angle + math.pi, 2.0 * math.pi) - math.pi
        total = total - (wrapped.square() + 0.1 * speed.square() + 0.001 * torque.square())
        acceleration = 1.5 * GRAVITY * angle.sin() + 3.0 * torque
        speed = (speed + STEP * acceleration).clamp(-MAX_SPEED, MAX_SPEED)
        angle = angle + STEP * speed
    return total.unsqueeze(-1)


def main(frames: int = 200, horizon: int = 20, num_plans: int = 16, seed: int = 0) -> float:
    """Controls one Pendulum-v1.

    Args:
        frames: control steps.
        horizon: control steps that a plan looks ahead.
        num_plans: chains per control step; the plan with the best predicted return is followed.
        seed: of the first state and of the chains.

    Returns:
        Return of the episode.
    """
    torch.manual_seed(seed)
    env = make_env("Pendulum-v1", num_envs=1, seed=seed)
    model = TensorDictModule(predicted_return, in_keys=["observation", "plan"], out_keys=["predicted_return"])
    planner = LangevinActor(
        model,
        spec=Bounded(-MAX_TORQUE, MAX_TORQUE, torch.Size([horizon])),
        # The model is exact, so there is no noise to anneal but the search's own: from a third of the range down.
        schedule=NoiseSchedule(num_levels=5, sigma_max=0.03, sigma_min=0.001, step_lr=1e-4),
        w=100.0,
        steps_per_level=3,
        num_particles=num_plans,
        action_key="plan",
        value_key="predicted_return",
    )
    tensordict = env.reset()
    starts = torch.zeros(1, num_plans, horizon)
    total = 0.0
    for _ in range(frames):
        # Half of the chains improve on the last plan, half look elsewhere.
        starts[:, num_plans // 2 :] = torch.rand(1, num_plans - num_plans // 2, horizon) * 2.0 - 1.0
        with torch.no_grad(), set_exploration_type(ExplorationType.RANDOM):
            plan = planner(tensordict.set("initial_action", starts))["plan"]
        transition, tensordict = env.step_and_maybe_reset(tensordict.set("action", plan[..., :1]))
        total += float(transition["next", "reward"])
        starts = (plan / MAX_TORQUE).roll(-1, -1).expand(num_plans, 1, -1).movedim(0, 1).clone()
    print(f"return over {frames} steps: {total:.1f}")
    return total


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--frames", type=int, default=200)
    parser.add_argument("--horizon", type=int, default=20)
    parser.add_argument("--num-plans", type=int, default=16)
    parser.add_argument("--seed", type=int, default=0)
    main(**vars(parser.parse_args()))
