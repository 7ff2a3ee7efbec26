"""From a configuration to the parts of a run: environment, actor, loss, update, replay buffer."""

from __future__ import annotations

from collections.abc import Callable

import torch
from tensordict import TensorDictBase
from torch import Tensor
from torch.optim import Adam
from torchrl.data import Bounded, LazyTensorStorage, TensorDictReplayBuffer
from torchrl.envs import Compose, EnvBase, RewardSum, StepCounter, TransformedEnv
from torchrl.modules import ValueOperator
from torchrl.objectives import SoftUpdate

from envs import make_env
from envs.divergence import EndDiverged
from nclql_torchrl.actor import LangevinActor
from nclql_torchrl.critic import NoiseConditionedQNetwork
from nclql_torchrl.loss import NCLQLLoss
from nclql_torchrl.schedule import NoiseSchedule
from nclql_torchrl.temperature import AutomaticTemperature
from nclql_torchrl.training.config import ConfigError, TrainConfig
from nclql_torchrl.training.n_step import NStepReturns
from nclql_torchrl.training.normalization import ObservationNormalizer
from nclql_torchrl.update import Average, NCLQLUpdate

INITIAL_W = 500.0
"""Where ``sampler.w=auto`` starts: the authors' value."""


def make_device(name: str, key: str = "device") -> torch.device:
    """The device of ``auto``, ``cpu``, ``cuda`` or ``cuda:<index>``, the value of the configuration's ``key``.

    Raises:
        ConfigError: for a device that this machine does not have.
    """
    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        device = torch.device(name)
    except RuntimeError:
        raise ConfigError(f"{key} is {name!r}; expected auto, cpu, cuda or cuda:<index>.") from None
    if device.type == "cuda" and (device.index or 0) >= torch.cuda.device_count():
        raise ConfigError(f"{key} is {name!r}, but this machine has {torch.cuda.device_count()} CUDA devices.")
    return device


def make_train_env(config: TrainConfig, device: torch.device) -> TransformedEnv:
    """The training environments, batch size [num_envs], with episode returns and lengths.

    Whatever the engine, a simulation that is lost ends its episode, flagged in ("next", "diverged"). Where workers
    collect, in environments of their own, this one only tells the sizes: its batch size is [1].
    """
    env = make_env(
        config.env.task,
        config.env.num_envs if config.collector.backend == "direct" else 1,
        engine=config.env.engine,
        device=device,
        seed=config.seed,
        engine_options=config.env.engine_options,
        **config.env.task_options,
    )
    flags = [] if "diverged" in env.observation_spec else [EndDiverged()]
    return TransformedEnv(env, Compose(*flags, RewardSum(), StepCounter()))  # pyright: ignore[reportCallIssue]


def make_actor(
    config: TrainConfig, env: EnvBase, device: torch.device, loss: NCLQLLoss | None = None, diagnostics: bool = False
) -> LangevinActor:
    """The Langevin actor for an environment's observations and actions.

    Args:
        config: the run.
        env: gives the sizes and the action bounds.
        device: where the critics live.
        loss: when given, the actor reads the critics that this loss trains, and its w; otherwise it brings fresh ones.
        diagnostics: whether the actor also writes what its chains did.
    """
    spec = env.action_spec_unbatched
    assert isinstance(spec, Bounded)
    (observation_dim,) = env.observation_spec_unbatched["observation"].shape
    return make_actor_for(config, observation_dim, spec, device, loss, diagnostics)


def make_actor_for(
    config: TrainConfig,
    observation_dim: int,
    spec: Bounded,
    device: torch.device,
    loss: NCLQLLoss | None = None,
    diagnostics: bool = False,
    network_class: Callable[..., NoiseConditionedQNetwork] = NoiseConditionedQNetwork,
    share_sampler: bool = True,
) -> LangevinActor:
    """:func:`make_actor` without an environment: for observations of a size and actions of a spec.

    ``network_class`` makes the critics; it is called like NoiseConditionedQNetwork. Without ``share_sampler`` the chain
    is that of ``config`` even where there is a loss, whose critics it reads.
    """

    def critic() -> ValueOperator:
        network = network_class(
            observation_dim,
            spec.shape[-1],
            config.network.hidden_sizes,
            layer_norm=config.network.layer_norm,
            normalize_observation=config.network.normalize_observation,
            action_low=spec.low.to(device),
            action_high=spec.high.to(device),
            device=device,
        )
        return ValueOperator(network, in_keys=["observation", "action", "level"])

    sampler = config.sampler
    actor = LangevinActor(
        [critic() for _ in range(config.network.num_critics)] if loss is None else loss.qvalue_network,
        None if loss is None else loss.qvalue_network_params,
        spec=spec.to(device),
        schedule=NoiseSchedule(sampler.num_levels, sampler.sigma_max, sampler.sigma_min, sampler.step_lr),
        steps_per_level=sampler.steps_per_level,
        w=INITIAL_W if isinstance(sampler.w, str) else sampler.w,
        normalize_gradient=sampler.normalize_gradient,
        num_particles=sampler.num_particles,
        deterministic_num_particles=sampler.deterministic_num_particles,
        ensemble_reduction=sampler.ensemble_reduction,  # pyright: ignore[reportArgumentType]
        boundary=sampler.boundary,  # pyright: ignore[reportArgumentType]
        kernel=sampler.kernel,  # pyright: ignore[reportArgumentType]
        start_level=sampler.start_level,
        warm_start=sampler.warm_start,
        execution=sampler.execution,  # pyright: ignore[reportArgumentType]
        precision=sampler.precision,  # pyright: ignore[reportArgumentType]
        diagnostics=diagnostics,
    )
    if loss is not None and share_sampler:
        # The same w, which is tuned in place, and the same compiled programs.
        actor.sampler = loss.sampler
    return actor


def make_temperature(config: TrainConfig, actor: LangevinActor) -> AutomaticTemperature | None:
    """What tunes w with ``sampler.w=auto``, else None."""
    return AutomaticTemperature(actor, config.sampler.target_spread) if config.sampler.w == "auto" else None


def make_loss(config: TrainConfig, actor: LangevinActor, loss_class: Callable[..., NCLQLLoss] = NCLQLLoss) -> NCLQLLoss:
    """The NC-LQL loss with its target networks; ``loss_class`` makes it, and is called like NCLQLLoss."""
    loss = loss_class(
        actor,
        delay_actor=config.optim.delay_actor,
        reward_scale=config.optim.reward_scale,
        target_num_particles=config.sampler.target_num_particles,
        clip_noisy_action=config.optim.clip_noisy_action,
    )
    loss.make_value_estimator(gamma=config.optim.gamma)
    return loss


def make_update(config: TrainConfig, loss: NCLQLLoss, average: Average | None = None) -> NCLQLUpdate:
    """The update: Adam, then the soft step of the targets; it runs as ``sampler.execution`` says.

    ``average`` is for several learners.
    """
    optimizer = Adam(loss.parameters(), lr=config.optim.lr, fused=True)
    target_updater = SoftUpdate(loss, eps=config.optim.target_update_polyak) if loss.delay_qvalue else None
    return NCLQLUpdate(
        loss,
        optimizer,
        target_updater,
        mode=config.optim.update,  # pyright: ignore[reportArgumentType]
        average=average,
    )


def make_replay_buffer(config: TrainConfig, device: torch.device) -> TensorDictReplayBuffer:
    """Uniform replay of single transitions, kept on the learner's device."""
    return TensorDictReplayBuffer(
        storage=LazyTensorStorage(config.replay_buffer.size, device=device), batch_size=config.optim.batch_size
    )


def make_n_step(config: TrainConfig, loss: NCLQLLoss) -> NStepReturns | None:
    """What makes transitions of collected steps with ``optim.n_steps`` above 1, else None: each is one."""
    n_steps = config.optim.n_steps
    return None if n_steps == 1 else NStepReturns(n_steps, config.optim.gamma, loss.in_keys)


def make_normalizer(
    config: TrainConfig, loss: NCLQLLoss, average: Callable[[Tensor], None] | None = None
) -> ObservationNormalizer | None:
    """What keeps the statistics of observations with ``network.normalize_observation``, else None.

    ``average`` is for several learners.
    """
    return ObservationNormalizer(loss, average) if config.network.normalize_observation else None


def sample(replay_buffer: TensorDictReplayBuffer) -> TensorDictBase:
    """One batch from replay.

    Raises:
        ValueError: if the buffer is empty.
    """
    if len(replay_buffer) == 0:
        raise ValueError(
            "The replay buffer holds 0 transitions; expected at least 1 before sampling. Extend it with collected "
            "transitions first (collector.init_random_frames does so in a training run)."
        )
    return replay_buffer.sample()
