"""The Langevin sampler as a TensorDict module: a policy without a policy network."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from tensordict import TensorDict, TensorDictBase, TensorDictParams
from tensordict.nn import TensorDictModuleBase, dispatch
from tensordict.nn.probabilistic import interaction_type
from tensordict.utils import NestedKey
from torch import Tensor
from torchrl.data import Bounded, Composite, TensorSpec
from torchrl.envs.utils import ExplorationType

from nclql_torchrl.critic import NoiseConditionedQNetwork
from nclql_torchrl.execution import Execution
from nclql_torchrl.langevin import Boundary, LangevinSampler, best_particle
from nclql_torchrl.schedule import NoiseSchedule
from nclql_torchrl.value import ActionValue, EnsembleReduction, ModuleActionValue, Precision, check_choice

DETERMINISTIC_TYPES = (ExplorationType.DETERMINISTIC, ExplorationType.MODE, ExplorationType.MEAN)
DIAGNOSTIC_KEYS = ("gradient_norm", "clipped_fraction", "q_before", "q_after")


class LangevinActor(TensorDictModuleBase):
    """Acts by Langevin dynamics on the action gradient of a critic ensemble (NC-LQL, arXiv 2602.07873).

    The actor owns no weights of its own. ``qvalue_network_params`` are the critics' parameters, stacked along a
    first dimension; :class:`~nclql_torchrl.NCLQLLoss` trains that very object, so the actor always acts on the critics
    as they are, without copies or synchronisation.

    Under ``ExplorationType.RANDOM`` (and outside any ``set_exploration_type``) chains start uniformly in the action
    box and carry noise. Under ``DETERMINISTIC``, ``MODE`` or ``MEAN`` they start at fixed points (the middle of the
    box; with several particles the others at points of a Sobol sequence) and carry none, so the same observation
    always gives the same action.

    Args:
        qvalue_network: a critic, or a list with one module per member of the ensemble. Each maps ``observation`` keys,
            the action and, where it is noise-conditioned, an integer ``level`` to a value of shape [*batch, 1]. The
            modules' weights are kept exactly, but copied: from then on ``qvalue_network_params`` is what counts.
        params: parameters to read instead of the modules' own, stacked along a first dimension: for example
            ``loss.qvalue_network_params`` of any TorchRL loss. Then ``qvalue_network`` is one module.

    Keyword Args:
        spec: the action's spec (one environment's, without batch dimensions), bounded below and above.
        schedule: noise levels and step sizes. Defaults to ``NoiseSchedule()``.
        steps_per_level: Langevin steps at each level.
        w: inverse temperature.
        normalize_gradient: whether the drift uses the gradient's direction only.
        num_particles: independent chains per observation; the one with the highest lowest-critic value is kept.
        deterministic_num_particles: likewise where exploration is off. Defaults to ``num_particles``.
        ensemble_reduction: how the critics form the drift: "sum", "mean" or "min".
        boundary: "clip" or "reflect" at the faces of the box.
        execution: "eager", "compile", "cudagraph" or "auto": how a chain runs, see :mod:`nclql_torchrl.execution`.
        precision: "float32", or "bfloat16" for matrix products of that type at every Langevin step.
        diagnostics: adds the out_keys ``gradient_norm`` (of the combined critics at the returned action),
            ``clipped_fraction`` (share of the action's coordinates on a face), ``q_before`` and ``q_after`` (lowest
            critic at the chain's start and end), each of shape [*batch, 1], for actions in [-1, 1].
        action_key, level_key, value_key: tensordict entries of the critic; the action is written to ``action_key``.
        initial_action_key: optional input, normalised starts of shape [*batch, num_particles, action_dim].
        noise_key: optional input, standard normal noise of shape
            [*batch, num_particles, num_levels, steps_per_level, action_dim].

    Raises:
        ValueError: for an unbounded action spec, parameters without a leading ensemble dimension, no observation key,
            or an invalid setting.

    Examples:
        >>> from torchrl.data import Bounded
        >>> from torchrl.modules import ValueOperator
        >>> critics = [
        ...     ValueOperator(NoiseConditionedQNetwork(3, 2, (32, 32)), in_keys=["observation", "action", "level"])
        ...     for _ in range(2)
        ... ]
        >>> actor = LangevinActor(critics, spec=Bounded(-1.0, 1.0, (2,)))
        >>> actor(TensorDict({"observation": torch.randn(5, 3)}, [5]))["action"].shape
        torch.Size([5, 2])
        >>> actor(observation=torch.randn(3)).shape
        torch.Size([2])
    """

    qvalue_network: TensorDictModuleBase
    """The critic's structure. Its own parameters are not read."""

    qvalue_network_params: TensorDictParams
    """The critics' live parameters, each of shape [num_critics, ...]."""

    deterministic_start: Tensor
    """Normalised starts used where exploration is off, shape [deterministic_num_particles, action_dim]."""

    def __init__(
        self,
        qvalue_network: TensorDictModuleBase | Sequence[TensorDictModuleBase],
        params: TensorDictParams | None = None,
        *,
        spec: TensorSpec,
        schedule: NoiseSchedule | None = None,
        steps_per_level: int = 2,
        w: float = 500.0,
        normalize_gradient: bool = True,
        num_particles: int = 1,
        deterministic_num_particles: int | None = None,
        ensemble_reduction: EnsembleReduction = "sum",
        boundary: Boundary = "clip",
        execution: Execution = "eager",
        precision: Precision = "float32",
        diagnostics: bool = False,
        action_key: NestedKey = "action",
        level_key: NestedKey = "level",
        value_key: NestedKey = "state_action_value",
        initial_action_key: NestedKey = "initial_action",
        noise_key: NestedKey = "langevin_noise",
    ) -> None:
        super().__init__()
        networks = [qvalue_network] if isinstance(qvalue_network, TensorDictModuleBase) else list(qvalue_network)
        if params is None:
            params = TensorDict.from_modules(*networks, as_module=True)
        elif len(networks) != 1 or params.ndim != 1:
            raise ValueError(
                f"With params, expected one qvalue_network and parameters stacked along one dimension; got "
                f"{len(networks)} networks and parameters of batch size {tuple(params.batch_size)}."
            )
        # In __dict__, as LossModule does: the structure's own parameters must not appear among the actor's.
        self.__dict__["qvalue_network"] = networks[0]
        self.qvalue_network_params = params

        deterministic_num_particles = (
            num_particles if deterministic_num_particles is None else deterministic_num_particles
        )
        counts = {"num_particles": num_particles, "deterministic_num_particles": deterministic_num_particles}
        for name, count in counts.items():
            if count < 1:
                raise ValueError(f"{name} is {count}; expected at least 1.")
        check_choice("ensemble_reduction", ensemble_reduction, EnsembleReduction)
        check_choice("precision", precision, Precision)
        if isinstance(spec, Composite):
            spec = spec[action_key]
        low, high = _action_box(spec)
        leaf = next(parameter for parameter in params.values(True, True) if parameter.is_floating_point())
        self.sampler = LangevinSampler(
            low,
            high,
            schedule,
            steps_per_level=steps_per_level,
            w=w,
            normalize_gradient=normalize_gradient,
            boundary=boundary,
            execution=execution,
        ).to(leaf.device)
        # Not `.to(dtype)`: the schedule keeps its own precision.
        self.sampler.action_center = self.sampler.action_center.to(leaf.dtype)
        self.sampler.action_half_range = self.sampler.action_half_range.to(leaf.dtype)
        self.num_particles = num_particles
        starts = _fixed_starts(deterministic_num_particles, self.sampler.action_dim)
        self.register_buffer("deterministic_start", starts.to(leaf.device, leaf.dtype))
        self.ensemble_reduction: EnsembleReduction = ensemble_reduction
        self.precision: Precision = precision
        self.diagnostics = diagnostics

        self.action_key, self.level_key, self.value_key = action_key, level_key, value_key
        self.initial_action_key, self.noise_key = initial_action_key, noise_key
        self._spec = Composite({action_key: spec})
        self.in_keys: list[NestedKey] = [
            key for key in self.qvalue_network.in_keys if key not in (action_key, level_key)
        ]
        if not self.in_keys:
            raise ValueError(f"The critic's in_keys are {self.qvalue_network.in_keys}; expected an observation too.")
        self.out_keys: list[NestedKey] = [action_key, *(DIAGNOSTIC_KEYS if diagnostics else ())]

    @property
    def spec(self) -> Composite:
        """Spec of what the actor writes."""
        return self._spec

    @dispatch(auto_batch_size=False)
    def forward(self, tensordict: TensorDictBase) -> TensorDictBase:
        """Writes the sampled action, in the environment's units.

        Args:
            tensordict: any batch shape; holds the observation and, optionally, explicit starts and noise.

        Returns:
            The same tensordict, with the action of shape [*batch, action_dim].
        """
        deterministic = interaction_type() in DETERMINISTIC_TYPES
        num_particles = self.deterministic_start.shape[0] if deterministic else self.num_particles
        value = self.action_value(tensordict, num_particles=num_particles)
        start, noise = self.explicit_randomness(tensordict, value)
        if start is None and deterministic:
            start = self.deterministic_start.reshape(num_particles, *(1,) * (len(value.batch_shape) - 1), -1)
            start = start.expand(*value.batch_shape, -1)
        elif start is None and self.diagnostics:
            start = self.sampler.random_start(value)
        particles = self.sampler(value, start, noise, deterministic=deterministic)
        tensordict.set(self.action_key, self.sampler.to_environment(self.select(value, particles)))
        if self.diagnostics:
            assert start is not None
            self._write_diagnostics(tensordict, value, start, particles)
        return tensordict

    def action_value(
        self,
        tensordict: TensorDictBase,
        params: TensorDictParams | TensorDictBase | None = None,
        *,
        num_particles: int = 1,
    ) -> ActionValue:
        """The critics at the observations of a tensordict, as the sampler reads them.

        Args:
            tensordict: holds the observation, batch shape [*batch].
            params: critics' parameters, by default the live ones.
            num_particles: the observation is repeated that often along a new first dimension.

        Returns:
            Values over actions, batch shape [num_particles, *batch].
        """
        params = self.qvalue_network_params if params is None else params
        inputs = tensordict.select(*self.in_keys)
        inputs = inputs.expand(num_particles, *inputs.batch_size)
        network = getattr(self.qvalue_network, "module", None)
        if isinstance(network, NoiseConditionedQNetwork) and self.qvalue_network.in_keys == [
            *self.in_keys,
            self.action_key,
            self.level_key,
        ]:
            return network.action_value(
                params["module"],
                inputs.get(self.in_keys[0]),
                num_levels=self.sampler.schedule.num_levels,
                action_center=self.sampler.action_center,
                action_half_range=self.sampler.action_half_range,
                reduction=self.ensemble_reduction,
                precision=self.precision,
            )
        return ModuleActionValue(
            self.qvalue_network,
            params,
            inputs,
            action_center=self.sampler.action_center,
            action_half_range=self.sampler.action_half_range,
            reduction=self.ensemble_reduction,
            precision=self.precision,
            action_key=self.action_key,
            level_key=self.level_key,
            value_key=self.value_key,
        )

    def explicit_randomness(
        self, tensordict: TensorDictBase, value: ActionValue
    ) -> tuple[Tensor | None, Tensor | None]:
        """The chain's start and noise where the tensordict brings its own, in the sampler's layout, else None."""
        start = tensordict.get(self.initial_action_key, None)
        noise = tensordict.get(self.noise_key, None)
        batch_ndim = len(value.batch_shape) - 1
        if start is not None:
            start = start.movedim(batch_ndim, 0)
        if noise is not None:
            noise = noise.movedim((batch_ndim + 1, batch_ndim + 2, batch_ndim), (0, 1, 2))
        return start, noise

    def select(self, value: ActionValue, particles: Tensor) -> Tensor:
        """The particle whose lowest critic is highest: [num_particles, *batch, action_dim] -> [*batch, action_dim]."""
        if particles.shape[0] == 1:
            return particles[0]
        return best_particle(particles, self.sampler.score(value, particles))

    def _write_diagnostics(
        self, tensordict: TensorDictBase, value: ActionValue, start: Tensor, particles: Tensor
    ) -> None:
        landscape = value.at_level(self.sampler.schedule.num_levels - 1)
        q_before, q_after = landscape.heads(start).amin(0), landscape.heads(particles).amin(0)
        norm = torch.linalg.vector_norm(landscape.gradient(particles), dim=-1)
        clipped = (particles.abs() >= 1.0).to(particles.dtype).mean(-1)
        chosen = q_after.argmax(0, keepdim=True)
        for key, entry in zip(DIAGNOSTIC_KEYS, (norm, clipped, q_before, q_after), strict=True):
            tensordict.set(key, entry.gather(0, chosen).squeeze(0).unsqueeze(-1))


def _action_box(spec: TensorSpec | None) -> tuple[Tensor, Tensor]:
    """Bounds of a bounded, one-dimensional action spec."""
    if not isinstance(spec, Bounded) or len(spec.shape) != 1:
        raise ValueError(
            f"The action spec is {spec}; expected a torchrl.data.Bounded spec of one dimension "
            "(an environment's `action_spec_unbatched`), because Langevin chains live in a box."
        )
    low, high = spec.low, spec.high
    return low, high


def _fixed_starts(num_particles: int, action_dim: int) -> Tensor:
    """Middle of the box, then a Sobol sequence: [num_particles, action_dim] in [-1, 1]."""
    starts = torch.zeros(num_particles, action_dim, dtype=torch.float64)
    if num_particles > 1:
        sobol = torch.quasirandom.SobolEngine(action_dim, scramble=False)
        starts[1:] = sobol.draw(num_particles, dtype=torch.float64)[1:] * 2.0 - 1.0
    return starts
