"""Configuration of a training run: names, types, defaults, and what each value may be."""

from __future__ import annotations

import difflib
import importlib.util
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, fields, is_dataclass
from typing import Any, get_args

from omegaconf import OmegaConf
from omegaconf.errors import OmegaConfBaseException
from yaml import YAMLError

from envs import ENGINES
from nclql_torchrl.execution import Execution
from nclql_torchrl.kernels import Boundary, KernelName, make_kernel
from nclql_torchrl.temperature import check_target_spread
from nclql_torchrl.update import UpdateMode
from nclql_torchrl.value import EnsembleReduction, Precision

LOGGER_BACKENDS = ("csv", "tensorboard", "wandb", "none")
COLLECTOR_BACKENDS = ("direct", "async", "ray")


class ConfigError(ValueError):
    """A configuration that cannot run; the message names the value, what was expected and the nearest valid choice."""


@dataclass
class EnvConfig:
    """The environments that data is collected from."""

    task: str = "HalfCheetah-v5"
    """Gymnasium id of a continuous-control task, or module:id."""
    engine: str = "auto"
    """auto (mjx on a GPU, mujoco on a CPU; gymnasium for tasks that they do not have), mujoco, mjx or gymnasium."""
    num_envs: int = 5
    """Environments stepped together, by every worker and learner."""
    task_options: dict[str, Any] = field(default_factory=dict)
    """Options of the task's constructor, for training and evaluation."""
    engine_options: dict[str, Any] = field(default_factory=dict)
    """Options of the engine, such as solver of mjx or num_threads of mujoco."""
    max_diverged_fraction: float = 0.01
    """Share of a log interval's transitions that may be lost to simulations that diverge; beyond it the run stops."""


@dataclass
class CollectorConfig:
    """How much data is collected, in transitions over all environments."""

    total_frames: int = 5_000_000
    """Length of the run."""
    init_random_frames: int = 30_000
    """Uniformly random actions, and no updates, before learning starts."""
    frames_per_batch: int | None = None
    """Transitions between two rounds of updates, a multiple of num_envs; null: one vector step, num_envs."""
    backend: str = "direct"
    """direct (in turn with the updates), or at the same time: async (processes here) or ray (anywhere in a cluster)."""
    num_workers: int = 1
    """Processes of async and ray, each with env.num_envs environments."""
    device: str = "cpu"
    """Where the workers of async and ray simulate and act: auto, cpu, cuda or cuda:<index>."""
    weight_update_interval: int = 1
    """Updates between two publications of the weights to the workers of async and ray."""


@dataclass
class ReplayBufferConfig:
    """Uniform replay."""

    size: int = 1_000_000
    """Capacity in transitions, of every learner."""


@dataclass
class OptimConfig:
    """The update."""

    batch_size: int = 256
    """Transitions per update, of every learner."""
    lr: float = 1e-4
    """Adam's learning rate."""
    utd_ratio: float = 0.2
    """Updates per collected transition (the authors: one update per vector step of 5 environments)."""
    gamma: float = 0.99
    """Discount per control step."""
    n_steps: int = 1
    """Rewards in a return before it bootstraps; several are those of the actions taken, however old."""
    target_update_polyak: float = 0.995
    """Share of the old target parameters kept at each update; 1 - tau."""
    reward_scale: float = 0.2
    """Factor on the reward."""
    update: str = "sequential"
    """sequential (the authors' two Adam steps) or summed (one step on the sum)."""
    delay_actor: bool = False
    """Sample the next action from the target critics instead of the online ones."""
    clip_noisy_action: bool = False
    """Clip noisy actions of the noise loss to the action range."""


@dataclass
class NetworkConfig:
    """The critics."""

    hidden_sizes: list[int] = field(default_factory=lambda: [256, 256, 256])
    """Units of the hidden layers."""
    num_critics: int = 2
    """Members of the ensemble."""
    layer_norm: bool = False
    """Layer normalisation between each hidden layer and its activation."""
    normalize_observation: bool = False
    """Normalise observations by the mean and deviation of all that were collected."""


@dataclass
class SamplerConfig:
    """The Langevin sampler."""

    num_levels: int = 10
    """Noise levels; 1 gives LQL."""
    steps_per_level: int = 2
    """Langevin steps at each level."""
    sigma_max: float = 0.1
    """Noise of the first level, in units of half the action range."""
    sigma_min: float = 0.001
    """Noise of the last level, likewise."""
    step_lr: float = 1e-4
    """Step size of the last level."""
    w: int | float | str = 500.0
    """Inverse temperature; auto starts at 500 and tunes it to target_spread."""
    target_spread: float = 0.1
    """With w=auto: standard deviation of the actions sampled for one state, in units of half the action range."""
    normalize_gradient: bool = True
    """Whether the drift uses the gradient's direction only."""
    num_particles: int = 1
    """Chains per observation when exploring."""
    deterministic_num_particles: int = 1
    """Chains per observation when evaluating."""
    target_num_particles: int = 1
    """Chains per observation when sampling the TD target's action."""
    ensemble_reduction: str = "sum"
    """sum, mean or min of the critics forms the drift."""
    boundary: str = "clip"
    """clip or reflect at the faces of the action box."""
    kernel: str = "langevin"
    """langevin (the authors'), mala (with normalize_gradient=false boundary=reflect), underdamped or preconditioned."""
    start_level: int = 0
    """First noise level that chains visit when acting; those of the TD target visit all."""
    warm_start: bool = False
    """Start acting chains from the environment's previous action plus noise of start_level."""
    execution: str = "eager"
    """How chains and updates run: eager, compile, cudagraph or auto (see docs/performance.md)."""
    precision: str = "float32"
    """float32 (TF32 where the GPU has it) or bfloat16, of the matrix products inside the sampler."""


@dataclass
class LoggerConfig:
    """Metrics and evaluation; intervals in transitions."""

    backend: str = "csv"
    """csv, tensorboard, wandb or none. The run directory's metrics.csv is written in any case."""
    log_interval: int = 5_000
    """Between two rows of metrics.csv."""
    eval_interval: int = 25_000
    """Between two evaluations."""
    eval_episodes: int = 10
    """Episodes of an evaluation, all at the same time."""


@dataclass
class CheckpointConfig:
    """Checkpoints; interval in transitions."""

    interval: int = 50_000
    """Between two checkpoints: the most that an interruption costs."""
    keep: int = 2
    """How many of the newest are kept."""


@dataclass
class TrainConfig:
    """A whole run. The defaults are the authors' settings.

    Examples:
        >>> config = TrainConfig(env=EnvConfig(task="Pendulum-v1", num_envs=1))
        >>> validate(config)
        >>> config.collector.frames_per_batch is None
        True
    """

    env: EnvConfig = field(default_factory=EnvConfig)
    collector: CollectorConfig = field(default_factory=CollectorConfig)
    replay_buffer: ReplayBufferConfig = field(default_factory=ReplayBufferConfig)
    optim: OptimConfig = field(default_factory=OptimConfig)
    network: NetworkConfig = field(default_factory=NetworkConfig)
    sampler: SamplerConfig = field(default_factory=SamplerConfig)
    logger: LoggerConfig = field(default_factory=LoggerConfig)
    checkpoint: CheckpointConfig = field(default_factory=CheckpointConfig)
    seed: int = 0
    """Of parameters, actions and environments."""
    device: str = "auto"
    """auto (a GPU when there is one), cpu, cuda or cuda:<index>."""
    run_dir: str | None = None
    """Where the run is written; null: runs/<task>/<time>-seed<seed>."""
    resume: str | None = None
    """Run directory to continue."""
    profile: bool = False
    """Measure where the time goes: prints shares, and writes profile.json and trace.json to the run directory."""


OPEN_NAMES = ("env.task_options.", "env.engine_options.")
"""Names under these are the task's and the engine's own, which check them."""

RESUMABLE_KEYS = (
    "collector.total_frames",
    "profile",
    "collector.device",
    "env.max_diverged_fraction",
    "logger.",
    "checkpoint.",
    "device",
)
"""What may change when a run is resumed; the rest is what makes it the same run."""


def validate(config: TrainConfig) -> None:
    """Checks everything that can be checked before anything starts.

    Raises:
        ConfigError: for the first value that cannot work.
    """
    choose("env.engine", config.env.engine, ("auto", *ENGINES))
    choose("optim.update", config.optim.update, get_args(UpdateMode))
    choose("sampler.ensemble_reduction", config.sampler.ensemble_reduction, get_args(EnsembleReduction))
    choose("sampler.boundary", config.sampler.boundary, get_args(Boundary))
    choose("sampler.kernel", config.sampler.kernel, get_args(KernelName))
    choose("sampler.execution", config.sampler.execution, get_args(Execution))
    choose("sampler.precision", config.sampler.precision, get_args(Precision))
    choose("logger.backend", config.logger.backend, LOGGER_BACKENDS)
    choose("collector.backend", config.collector.backend, COLLECTOR_BACKENDS)

    positive_integers = {
        "env.num_envs": config.env.num_envs,
        "collector.total_frames": config.collector.total_frames,
        "collector.num_workers": config.collector.num_workers,
        "collector.weight_update_interval": config.collector.weight_update_interval,
        "replay_buffer.size": config.replay_buffer.size,
        "optim.batch_size": config.optim.batch_size,
        "optim.n_steps": config.optim.n_steps,
        "network.num_critics": config.network.num_critics,
        "sampler.num_levels": config.sampler.num_levels,
        "sampler.steps_per_level": config.sampler.steps_per_level,
        "sampler.num_particles": config.sampler.num_particles,
        "sampler.deterministic_num_particles": config.sampler.deterministic_num_particles,
        "sampler.target_num_particles": config.sampler.target_num_particles,
        "logger.log_interval": config.logger.log_interval,
        "logger.eval_interval": config.logger.eval_interval,
        "logger.eval_episodes": config.logger.eval_episodes,
        "checkpoint.interval": config.checkpoint.interval,
        "checkpoint.keep": config.checkpoint.keep,
    }
    for name, value in positive_integers.items():
        if value < 1:
            raise ConfigError(f"{name} is {value}; expected at least 1.")
    positive_numbers = {
        "optim.lr": config.optim.lr,
        "optim.reward_scale": config.optim.reward_scale,
        "sampler.sigma_max": config.sampler.sigma_max,
        "sampler.sigma_min": config.sampler.sigma_min,
        "sampler.step_lr": config.sampler.step_lr,
    }
    if isinstance(config.sampler.w, str):
        if config.sampler.w != "auto":
            raise ConfigError(f"sampler.w is {config.sampler.w!r}; expected a positive number or 'auto'.")
    else:
        positive_numbers["sampler.w"] = float(config.sampler.w)
    for name, value in positive_numbers.items():
        if not (math.isfinite(value) and value > 0.0):
            raise ConfigError(f"{name} is {value:g}; expected a positive, finite number.")
    if config.sampler.w == "auto":
        try:
            check_target_spread(config.sampler.target_spread, config.sampler.step_lr**0.5)
        except ValueError as error:
            raise ConfigError(f"sampler.{error}") from None
    if not (math.isfinite(config.optim.utd_ratio) and config.optim.utd_ratio >= 0.0):
        raise ConfigError(
            f"optim.utd_ratio is {config.optim.utd_ratio:g}; expected updates per transition, at least 0."
        )
    for name, value in (("gamma", config.optim.gamma), ("target_update_polyak", config.optim.target_update_polyak)):
        if not 0.0 <= value < 1.0:
            raise ConfigError(f"optim.{name} is {value:g}; expected a number in [0, 1).")
    if not 0.0 <= config.env.max_diverged_fraction <= 1.0:
        raise ConfigError(
            f"env.max_diverged_fraction is {config.env.max_diverged_fraction:g}; expected a share in [0, 1]."
        )
    if not 0 <= config.sampler.start_level < config.sampler.num_levels:
        raise ConfigError(
            f"sampler.start_level is {config.sampler.start_level}; expected a level, 0 to "
            f"{config.sampler.num_levels - 1} (sampler.num_levels - 1)."
        )
    if config.sampler.sigma_min >= config.sampler.sigma_max:
        raise ConfigError(
            f"sampler.sigma_min is {config.sampler.sigma_min:g} and sampler.sigma_max is {config.sampler.sigma_max:g}; "
            "expected sigma_min < sigma_max."
        )
    try:
        make_kernel(config.sampler.kernel).check(  # pyright: ignore[reportArgumentType]
            config.sampler.normalize_gradient,
            config.sampler.boundary,  # pyright: ignore[reportArgumentType]
        )
    except ValueError as error:
        raise ConfigError(f"sampler.{error}") from None
    if not config.network.hidden_sizes or min(config.network.hidden_sizes) < 1:
        raise ConfigError(f"network.hidden_sizes is {config.network.hidden_sizes}; expected widths of at least 1.")
    if config.collector.init_random_frames < 0:
        raise ConfigError(
            f"collector.init_random_frames is {config.collector.init_random_frames}; expected at least 0."
        )
    if not 0 <= config.seed < 2**31:
        raise ConfigError(f"seed is {config.seed}; expected an integer in [0, 2**31).")
    if config.replay_buffer.size < config.optim.batch_size:
        raise ConfigError(
            f"replay_buffer.size is {config.replay_buffer.size}, less than optim.batch_size "
            f"({config.optim.batch_size}); expected room for at least one batch."
        )
    frames_per_batch, num_envs = config.collector.frames_per_batch, config.env.num_envs
    if frames_per_batch is not None and (frames_per_batch < 1 or frames_per_batch % num_envs):
        nearest = max(1, round(frames_per_batch / num_envs)) * num_envs
        raise ConfigError(
            f"collector.frames_per_batch is {frames_per_batch}; expected a multiple of env.num_envs ({num_envs}), "
            f"such as {nearest}."
        )

    collector, n_steps = config.collector, config.optim.n_steps
    if n_steps > 1 and collector.backend != "direct":
        raise ConfigError(
            f"optim.n_steps is {n_steps} with collector.backend={collector.backend}, whose batches are of one worker "
            "or another; expected 1, or collector.backend=direct."
        )
    if n_steps > 1 and collector.init_random_frames < n_steps * num_envs:
        raise ConfigError(
            f"collector.init_random_frames is {collector.init_random_frames} for each learner; expected at least "
            f"{n_steps * num_envs} (optim.n_steps * env.num_envs), before which no return is complete."
        )
    if collector.backend == "direct":
        for name, value, default in (("num_workers", collector.num_workers, 1), ("device", collector.device, "cpu")):
            if value != default:
                raise ConfigError(
                    f"collector.{name} is {value}, but there are no workers with collector.backend=direct; expected "
                    f"{default}, or collector.backend=async."
                )
    if config.sampler.execution == "cudagraph" and collector.backend != "direct" and collector.device == "cpu":
        raise ConfigError(
            "sampler.execution is 'cudagraph' with workers that act on a CPU (collector.device=cpu); expected 'auto', "
            "which is CUDA graphs for the learner alone, or collector.device=cuda."
        )
    if collector.backend == "ray" and importlib.util.find_spec("ray") is None:
        raise ConfigError("collector.backend is 'ray', which is not installed; pip install 'nclql-torchrl[ray]'.")


def check_override_keys(overrides: Sequence[str], schema: type = TrainConfig) -> None:
    """Checks the names in ``name=value`` command-line overrides; Hydra's own options and flags pass.

    Args:
        overrides: command-line arguments.
        schema: the dataclass that they configure.

    Raises:
        ConfigError: for a name that no configuration entry has, with the nearest one that exists.

    Examples:
        >>> check_override_keys(["env.taks=Pendulum-v1"])
        Traceback (most recent call last):
        ...
        nclql_torchrl.training.config.ConfigError: There is no option 'env.taks'; did you mean 'env.task'?
    """
    names = ["preset", *_names(schema)] if schema is TrainConfig else list(_names(schema))
    for override in overrides:
        name = override.split("=", 1)[0].lstrip("+~")
        if name.startswith(OPEN_NAMES):
            continue
        if "=" not in override or override.startswith("-") or name.split(".")[0] == "hydra" or name in names:
            continue
        raise ConfigError(f"There is no option {name!r}; {_nearest(name, names)}")


def load_config(saved: str | Mapping[str, Any], overrides: Sequence[str] = ()) -> TrainConfig:
    """Reads a run's config.yaml, or its content, against the schema, with ``name=value`` overrides on top.

    Raises:
        ConfigError: if it does not fit the schema.
    """
    try:
        values = OmegaConf.load(saved) if isinstance(saved, str) else OmegaConf.create(dict(saved))
        merged = OmegaConf.merge(OmegaConf.structured(TrainConfig), values, OmegaConf.from_dotlist(list(overrides)))
        config = OmegaConf.to_object(merged)
    except (OmegaConfBaseException, YAMLError) as error:
        raise ConfigError(f"{saved} does not fit this version's configuration: {error}") from error
    assert isinstance(config, TrainConfig)
    return config


def _names(schema: Any, prefix: str = "") -> Iterator[str]:
    """Dotted names of all entries of a dataclass."""
    instance = schema()
    for entry in fields(instance):
        value = getattr(instance, entry.name)
        if is_dataclass(value):
            yield from _names(type(value), f"{prefix}{entry.name}.")
        else:
            yield prefix + entry.name


def choose(name: str, value: str, choices: Sequence[str]) -> None:
    if value not in choices:
        raise ConfigError(f"{name} is {value!r}; expected one of {', '.join(choices)}. {_nearest(value, choices)}")


def _nearest(value: str, choices: Sequence[str]) -> str:
    matches = difflib.get_close_matches(value, choices, n=1, cutoff=0.0)
    return f"did you mean {matches[0]!r}?"
