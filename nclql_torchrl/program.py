"""The policy compiled ahead of time by torch.export and AOTInductor: native code, free of Python's dispatch.

``deterministic.pt2`` maps observations to actions without exploration noise. ``sampling.pt2`` also takes the chain's
start and noise, so that the caller owns every random number. Both are made for one number of states and for the machine
(and the kind of device) that compiled them, with the weights inside. They are native code: load only what you trust.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from tensordict import TensorDict
from torch import Tensor, nn
from torchrl.envs.utils import ExplorationType, set_exploration_type

from nclql_torchrl.actor import LangevinActor
from nclql_torchrl.execution import tensor_cores
from nclql_torchrl.langevin import LangevinSampler

Program = Callable[..., Tensor]
"""Takes and returns tensors on the device that it was compiled for."""

DETERMINISTIC, SAMPLING = "deterministic.pt2", "sampling.pt2"

TOLERANCE = 1e-3
"""Of a whole chain in float32, in units of half the action range. Two programs round each operation differently, by
1e-7; the normalised gradient, whose direction turns fast where the gradient is small, magnifies that at some states."""


class ProgramError(RuntimeError):
    """A compiled program does not act as the agent does."""


class SamplingPolicy(nn.Module):
    """:class:`~nclql_torchrl.LangevinActor` as a function of tensors alone, which torch.export can trace.

    Args:
        actor: whose weights are copied; it has one observation and no ``warm_start``.

    Raises:
        ValueError: for an actor that cannot be a program.
    """

    actor: LangevinActor
    """Read for its settings."""

    sampler: LangevinSampler
    """The actor's own."""

    weight_0: Tensor
    """The first of the weights: its type and place are the program's."""

    def __init__(self, actor: LangevinActor) -> None:
        super().__init__()
        if actor.warm_start:
            raise ValueError(
                "sampler.warm_start is true; a program has no previous action to start from: expected false."
            )
        if len(actor.observation_keys) != 1:
            raise ValueError(f"The critic reads {actor.observation_keys}; expected one observation.")
        # Structure only: its parameters would be traced as TensorDictParams, which torch.export cannot.
        self.__dict__["actor"] = actor
        self.sampler = actor.sampler
        weights = actor.qvalue_network_params.flatten_keys("/")
        self.num_critics = weights.batch_size[0]
        self.weight_names = {str(key): f"weight_{index}" for index, key in enumerate(weights.keys())}
        for key, name in self.weight_names.items():
            self.register_buffer(name, weights[key].detach().clone())

    def forward(self, observation: Tensor, initial_action: Tensor, noise: Tensor) -> Tensor:
        """Actions in the environment's units, shape [states, action_dim].

        Args:
            observation: shape [states, observation_dim].
            initial_action: normalised starts, shape [states, num_particles, action_dim].
            noise: standard normal, shape [states, num_particles, num_levels, steps_per_level, noise_dim].
        """
        actor = self.actor
        weights = {key: getattr(self, name) for key, name in self.weight_names.items()}
        params = TensorDict(weights, [self.num_critics]).unflatten_keys("/")
        inputs = TensorDict({actor.observation_keys[0]: observation}, [observation.shape[0]])
        value = actor.action_value(inputs, params, num_particles=initial_action.shape[1])
        particles, *_ = self.sampler._chain(value, initial_action.movedim(1, 0), noise.movedim((2, 3, 1), (0, 1, 2)))
        return self.sampler.to_environment(actor.select(value, particles))

    def example_inputs(self, states: int, *, deterministic: bool = False) -> tuple[Tensor, Tensor, Tensor]:
        """Random inputs of :meth:`forward`, or those of an actor that does not explore."""
        actor, sampler = self.actor, self.sampler
        leaf = self.weight_0
        network: Any = actor.qvalue_network
        particles = actor.deterministic_start.shape[0] if deterministic else actor.num_particles
        steps = (sampler.schedule.num_levels - actor.start_level, sampler.steps_per_level)
        observation = torch.randn(states, network.module.observation_dim).to(leaf)
        start = torch.rand(states, particles, sampler.action_dim).to(leaf) * 2.0 - 1.0
        noise = torch.randn(states, particles, *steps, sampler.kernel.noise_dim(sampler.action_dim)).to(leaf)
        if deterministic:
            return observation, actor.deterministic_start.expand_as(start), torch.zeros_like(noise)
        return observation, start, noise


class DeterministicPolicy(nn.Module):
    """:class:`SamplingPolicy` from fixed starts and without noise."""

    initial_action: Tensor
    """Shape [states, num_particles, action_dim]."""

    noise: Tensor
    """Zeros, shape [states, num_particles, num_levels, steps_per_level, noise_dim]."""

    def __init__(self, policy: SamplingPolicy, states: int) -> None:
        super().__init__()
        self.policy = policy
        _, start, noise = policy.example_inputs(states, deterministic=True)
        self.register_buffer("initial_action", start.contiguous())
        self.register_buffer("noise", noise)

    def forward(self, observation: Tensor) -> Tensor:
        """Actions, shape [states, action_dim], of observations of shape [states, observation_dim]."""
        return self.policy(observation, self.initial_action, self.noise)


@torch.no_grad()
def compile_programs(actor: LangevinActor, directory: Path, states: int = 1) -> dict[str, float]:
    """Writes both programs and checks them against the actor.

    Args:
        actor: whose policy it is.
        directory: gets :data:`DETERMINISTIC` and :data:`SAMPLING`.
        states: that one call acts on.

    Returns:
        File name -> largest difference of an action from the actor's, in units of half the action range.

    Raises:
        ValueError: for ``states < 1``, or an actor that cannot be a program.
        ProgramError: if one acts differently by more than :data:`TOLERANCE`.
    """
    if states < 1:
        raise ValueError(f"states is {states}; expected at least 1.")
    policy = SamplingPolicy(actor)
    inputs = policy.example_inputs(states)
    modules: dict[str, tuple[nn.Module, tuple[Tensor, ...]]] = {
        DETERMINISTIC: (DeterministicPolicy(policy, states), inputs[:1]),
        SAMPLING: (policy, inputs),
    }
    differences = {}
    for name, (module, arguments) in modules.items():
        exported = torch.export.export(module, arguments)
        torch._inductor.aoti_compile_and_package(exported, package_path=str(directory / name))
        differences[name] = _difference(load_program(directory / name), actor, policy, states, len(arguments))
        if not differences[name] <= TOLERANCE:
            raise ProgramError(
                f"{name} differs from the agent by up to {differences[name]:g} of half the action range; expected at "
                f"most {TOLERANCE:g}. It is not kept."
            )
    return differences


def load_program(path: str | Path) -> Program:
    """Loads a program that :func:`compile_programs` wrote. It runs native code: load only what you trust.

    Raises:
        FileNotFoundError: if there is none.
    """
    if not Path(path).is_file():
        raise FileNotFoundError(f"{path} does not exist; expected a program written by nclql-export program=true.")
    return torch._inductor.aoti_load_package(str(path))


def _difference(program: Program, actor: LangevinActor, policy: SamplingPolicy, states: int, arity: int) -> float:
    """Largest difference between program and actor over 64 random calls, in units of half the action range."""
    largest = 0.0
    for _ in range(64):
        arguments = policy.example_inputs(states)[:arity]
        names = (actor.observation_keys[0], actor.initial_action_key, actor.noise_key)
        tensordict = TensorDict(dict(zip(names, arguments, strict=False)), [states])
        kind = ExplorationType.DETERMINISTIC if arity == 1 else ExplorationType.RANDOM
        with set_exploration_type(kind):
            expected = actor(tensordict)[actor.action_key]
        # A program computes in the process's precision, the actor in that of chains.
        with tensor_cores(expected.device):
            difference = (program(*arguments) - expected).abs() / policy.sampler.action_half_range
        largest = max(largest, float(difference.max()))
    return largest
