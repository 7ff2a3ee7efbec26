"""What is profiled: a critic, the states that it is asked about, and the sampler over it in any setting."""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from tensordict import TensorDict, TensorDictParams
from torchrl.data import Bounded
from torchrl.envs import EnvBase, TransformedEnv
from torchrl.envs.utils import ExplorationType, set_exploration_type
from torchrl.modules import ValueOperator
from torchrl.modules.utils import get_env_transforms_from_module

from envs import make_env
from nclql_torchrl.actor import LangevinActor
from nclql_torchrl.critic import NoiseConditionedQNetwork
from nclql_torchrl.profiling.config import ProfileConfig, Setting
from nclql_torchrl.profiling.schedules import ResampledQNetwork, base_schedule, mixing_schedule, nearest_levels
from nclql_torchrl.schedule import NoiseSchedule
from nclql_torchrl.training.config import SamplerConfig, TrainConfig
from nclql_torchrl.training.evaluation import SEED_OFFSET, load_policy

VISITING_ENVS = 8
"""Environments in which a trained policy acts to find the states that it visits."""

VISITING_STEPS = 1_000
"""Control steps that it takes in each of them: whole episodes of the MuJoCo tasks."""


@dataclass(frozen=True)
class Subject:
    """A critic ensemble, and states to sample actions for."""

    name: str
    """How results call it."""
    params: TensorDictParams
    """Parameters of the critics, stacked along a first dimension of size [num_critics]."""
    hidden_sizes: tuple[int, ...]
    spec: Bounded
    """Spec of the action."""
    inputs: TensorDict
    """What the sampler reads, batch size [quality_states]: observations; and where a policy visited them, the previous
    actions and where episodes begin."""
    config: TrainConfig
    """Of the run that trained it; the defaults for an untrained critic."""
    trained: bool

    @property
    def sampler(self) -> SamplerConfig:
        """Settings of the sampler that the critic was trained with, ``w`` as it was last."""
        return self.config.sampler

    @property
    def device(self) -> torch.device:
        """Where the critics are."""
        return self.inputs["observation"].device

    def to(self, device: torch.device) -> Subject:
        """The same on another device."""
        params = self.params.data.to(device)
        return replace(
            self,
            params=TensorDictParams(params, no_convert=True),
            spec=self.spec.to(device),
            inputs=self.inputs.to(device),
        )

    def states(self, count: int) -> TensorDict:
        """Inputs of any number of states, batch size [count]; they repeat where there are not enough."""
        return self.inputs[torch.arange(count, device=self.device) % self.inputs.shape[0]]

    def actor(self, setting: Setting, *, diagnostics: bool = False) -> LangevinActor:
        """The sampler in one setting of the grid, on a schedule that can mix."""
        schedule = mixing_schedule(self.sampler, setting.levels, setting.steps_per_level)
        return self.actor_on(schedule, setting, diagnostics=diagnostics)

    def actor_on(self, schedule: NoiseSchedule, setting: Setting, *, diagnostics: bool = False) -> LangevinActor:
        """The sampler on a given schedule; everything else is the setting's, and what that leaves open the run's."""
        network = ResampledQNetwork(
            nearest_levels(base_schedule(self.sampler), schedule),
            self.sampler.num_levels,
            self.inputs["observation"].shape[-1],
            self.spec.shape[-1],
            self.hidden_sizes,
            layer_norm=self.config.network.layer_norm,
            normalize_observation=self.config.network.normalize_observation,
            action_low=self.spec.low,
            action_high=self.spec.high,
            device=self.device,
        )
        return LangevinActor(
            ValueOperator(network, in_keys=["observation", "action", "level"]),
            self.params,
            spec=self.spec,
            schedule=schedule,
            steps_per_level=setting.steps_per_level,
            w=float(self.sampler.w),
            normalize_gradient=self.sampler.normalize_gradient,
            num_particles=setting.particles,
            ensemble_reduction=self.sampler.ensemble_reduction,  # pyright: ignore[reportArgumentType]
            boundary=self.sampler.boundary,  # pyright: ignore[reportArgumentType]
            kernel=setting.kernel,  # pyright: ignore[reportArgumentType]
            start_level=setting.start_level or 0,
            warm_start=bool(setting.warm_start),
            execution=setting.execution,  # pyright: ignore[reportArgumentType]
            precision=setting.precision,  # pyright: ignore[reportArgumentType]
            diagnostics=diagnostics,
        )


def make_subject(config: ProfileConfig, device: torch.device) -> Subject:
    """The critic that a profile is about.

    Raises:
        FileNotFoundError: if there is no checkpoint where one is given.
        CheckpointError: if it is damaged or unsafe.
    """
    return untrained(config, device) if config.checkpoint is None else trained(config, config.checkpoint, device)


def untrained(config: ProfileConfig, device: torch.device) -> Subject:
    """A freshly initialised critic, asked about normally distributed observations."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(config.seed)
        networks = [
            NoiseConditionedQNetwork(config.observation_dim, config.action_dim, config.hidden_sizes)
            for _ in range(config.num_critics)
        ]
        observations = torch.randn(config.quality_states, config.observation_dim)
    critics = [ValueOperator(network, in_keys=["observation", "action", "level"]) for network in networks]
    subject = Subject(
        name=f"untrained {config.observation_dim}/{config.action_dim}, {config.num_critics} x {config.hidden_sizes}",
        params=TensorDict.from_modules(*critics, as_module=True),
        hidden_sizes=tuple(config.hidden_sizes),
        spec=Bounded(-1.0, 1.0, torch.Size([config.action_dim])),
        inputs=TensorDict({"observation": observations}, [config.quality_states]),
        config=_adjusted(TrainConfig(), config),
        trained=False,
    )
    return subject.to(device)


def trained(config: ProfileConfig, checkpoint: str, device: torch.device) -> Subject:
    """The critic of a run, asked about states that its own policy visits, exploration included."""
    run, actor = load_policy(checkpoint, device)
    network = actor.qvalue_network.module  # pyright: ignore[reportAttributeAccessIssue]
    assert isinstance(network, NoiseConditionedQNetwork)
    spec = actor.spec[actor.action_key]
    assert isinstance(spec, Bounded)
    subject = Subject(
        name=f"{run.env.task}, {checkpoint}",
        params=actor.qvalue_network_params,
        hidden_sizes=tuple(run.network.hidden_sizes),
        spec=spec,
        inputs=TensorDict({"observation": torch.empty(0, network.observation_dim, device=device)}, [0]),
        config=_adjusted(replace(run, sampler=replace(run.sampler, w=actor.sampler.w.item())), config),
        trained=True,
    )
    return replace(subject, inputs=_visited(subject, config))


@torch.no_grad()
def _visited(subject: Subject, config: ProfileConfig) -> TensorDict:
    """Random states of the policy's own episodes, batch size [quality_states]."""
    run, sampler, device = subject.config, subject.sampler, subject.device
    actor = subject.actor_on(
        base_schedule(sampler),
        Setting(
            sampler.num_levels,
            sampler.steps_per_level,
            VISITING_ENVS,
            sampler.num_particles,
            "eager",
            sampler.precision,
            str(device),
            sampler.kernel,
            sampler.start_level,
            sampler.warm_start,
        ),
    )
    steps = max(VISITING_STEPS, -(-config.quality_states // VISITING_ENVS))
    seed = run.seed + SEED_OFFSET + 1 + config.seed
    env: EnvBase = make_env(
        run.env.task, VISITING_ENVS, engine="gymnasium", device=device, seed=seed, **run.env.task_options
    )
    if actor.warm_start:
        env = TransformedEnv(env, get_env_transforms_from_module(actor))
    try:
        with torch.random.fork_rng(devices=[]), set_exploration_type(ExplorationType.RANDOM):
            torch.manual_seed(config.seed)
            rollout = env.rollout(steps, actor, break_when_any_done=False)
            index = torch.randperm(rollout.numel())[: config.quality_states].to(device)
    finally:
        env.close()
    action, done = rollout["action"], rollout["next", "done"]
    inputs = {
        "observation": rollout["observation"],
        actor.previous_action_key: torch.cat([torch.zeros_like(action[:, :1]), action[:, :-1]], 1),
        actor.is_init_key: torch.cat([torch.ones_like(done[:, :1]), done[:, :-1]], 1),
    }
    return TensorDict(inputs, rollout.shape).reshape(-1)[index]


def _adjusted(run: TrainConfig, config: ProfileConfig) -> TrainConfig:
    """The run with what the profile asks for in its place."""
    options = {"w": config.w, "normalize_gradient": config.normalize_gradient, "boundary": config.boundary}
    chosen = {name: value for name, value in options.items() if value is not None}
    return replace(run, sampler=replace(run.sampler, **chosen))
