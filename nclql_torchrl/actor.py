"""The Langevin sampler as a TensorDict module: a policy without a policy network."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from tensordict import TensorDict, TensorDictBase, TensorDictParams
from tensordict.nn import TensorDictModuleBase, dispatch
from tensordict.nn.probabilistic import interaction_type
from tensordict.utils import NestedKey, unravel_key
from torch import Tensor
from torchrl.data import Bounded, Composite, TensorSpec, Unbounded
from torchrl.envs import Compose, TensorDictPrimer, Transform
from torchrl.envs.utils import ExplorationType

from nclql_torchrl.critic import NoiseConditionedQNetwork
from nclql_torchrl.execution import Execution
from nclql_torchrl.kernels import Boundary, Kernel, KernelName, apply_boundary
from nclql_torchrl.langevin import LangevinSampler, best_particle
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

    With ``warm_start`` a chain starts where the previous action of the same environment was, plus noise of the standard
    deviation of ``start_level``, and visits only the levels from there on; the first chain of an episode starts as
    described above, at the same level. The previous action travels as the hidden state of TorchRL's recurrent modules
    does: the actor reads ``previous_action`` and ``is_init`` and writes ``("next", "previous_action")``, and the
    environment needs an ``InitTracker`` and :meth:`make_tensordict_primer` (a ``Collector`` with
    ``auto_register_policy_transforms=True`` adds both). A tensordict without the entry starts cold. So do the chains of
    :class:`~nclql_torchrl.NCLQLLoss`, which then visit every level, unless the batch has ``previous_action`` under
    "next".

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
        kernel: the chain's transition: "langevin" (the authors'), "mala", "underdamped", "preconditioned", or a
            :class:`~nclql_torchrl.kernels.Kernel` with settings of its own.
        start_level: first noise level that chains visit when acting.
        warm_start: whether chains start from the previous action.
        execution: "eager", "compile", "cudagraph" or "auto": how a chain runs, see :mod:`nclql_torchrl.execution`.
        precision: "float32", or "bfloat16" for matrix products of that type at every Langevin step.
        diagnostics: adds the out_keys ``gradient_norm`` (of the combined critics at the returned action),
            ``clipped_fraction`` (share of the action's coordinates on a face), ``q_before`` and ``q_after`` (lowest
            critic at the chain's start and end), each of shape [*batch, 1], for actions in [-1, 1]; and the kernel's
            own: MALA's ``acceptance_rate``.
        action_key, level_key, value_key: tensordict entries of the critic; the action is written to ``action_key``.
        previous_action_key, is_init_key: entries of ``warm_start``; actions in the environment's units.
        initial_action_key: optional input, normalised starts of shape [*batch, num_particles, action_dim].
        noise_key: optional input, standard normal noise of shape
            [*batch, num_particles, num_levels - start_level, steps_per_level, noise_dim], the kernel's ``noise_dim``:
            the action_dim, for MALA one more.

    Raises:
        ValueError: for an unbounded action spec, parameters without a leading ensemble dimension, no observation key,
            a ``start_level`` that the schedule does not have, or an invalid setting.

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
        kernel: KernelName | Kernel = "langevin",
        start_level: int = 0,
        warm_start: bool = False,
        execution: Execution = "eager",
        precision: Precision = "float32",
        diagnostics: bool = False,
        action_key: NestedKey = "action",
        level_key: NestedKey = "level",
        value_key: NestedKey = "state_action_value",
        previous_action_key: NestedKey = "previous_action",
        is_init_key: NestedKey = "is_init",
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
        # A critic without parameters, such as a known model, lives where the action's bounds are.
        leaf = next((parameter for parameter in params.values(True, True) if parameter.is_floating_point()), low)
        self.sampler = LangevinSampler(
            low,
            high,
            schedule,
            steps_per_level=steps_per_level,
            w=w,
            normalize_gradient=normalize_gradient,
            boundary=boundary,
            kernel=kernel,
            execution=execution,
        ).to(leaf.device)
        # Not `.to(dtype)`: the schedule keeps its own precision.
        self.sampler.action_center = self.sampler.action_center.to(leaf.dtype)
        self.sampler.action_half_range = self.sampler.action_half_range.to(leaf.dtype)
        if not 0 <= start_level < self.sampler.schedule.num_levels:
            raise ValueError(
                f"start_level is {start_level}; expected one of the schedule's levels, 0 to "
                f"{self.sampler.schedule.num_levels - 1}."
            )
        self.start_level = start_level
        self.warm_start = warm_start
        self.num_particles = num_particles
        starts = _fixed_starts(deterministic_num_particles, self.sampler.action_dim)
        self.register_buffer("deterministic_start", starts.to(leaf.device, leaf.dtype))
        self.ensemble_reduction: EnsembleReduction = ensemble_reduction
        self.precision: Precision = precision
        self.diagnostics = diagnostics

        self.action_key, self.level_key, self.value_key = action_key, level_key, value_key
        self.previous_action_key, self.is_init_key = previous_action_key, is_init_key
        self.initial_action_key, self.noise_key = initial_action_key, noise_key
        self._spec = Composite({action_key: spec})
        self.observation_keys: list[NestedKey] = [
            key for key in self.qvalue_network.in_keys if key not in (action_key, level_key)
        ]
        if not self.observation_keys:
            raise ValueError(f"The critic's in_keys are {self.qvalue_network.in_keys}; expected an observation too.")
        self.diagnostic_keys = (*DIAGNOSTIC_KEYS, *self.sampler.kernel.statistic_keys) if diagnostics else ()
        carried = (previous_action_key, is_init_key) if warm_start else ()
        self.in_keys: list[NestedKey] = [*self.observation_keys, *carried]
        written = (unravel_key(("next", previous_action_key)),) if warm_start else ()
        self.out_keys: list[NestedKey] = [action_key, *written, *self.diagnostic_keys]

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
        if start is None:
            if deterministic:
                start = self.deterministic_start.reshape(num_particles, *(1,) * (len(value.batch_shape) - 1), -1)
                start = start.expand(*value.batch_shape, -1)
            else:
                start = self.sampler.random_start(value)
            start = self.warm(tensordict, start, deterministic=deterministic)
        particles, statistics = self.sampler.sample(
            value, start, noise, deterministic=deterministic, start_level=self.start_level
        )
        action = self.sampler.to_environment(self.select(value, particles))
        tensordict.set(self.action_key, action)
        if self.warm_start:
            tensordict.set(("next", self.previous_action_key), action)
        if self.diagnostics:
            self._write_diagnostics(tensordict, value, start, particles, statistics)
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
        inputs = tensordict.select(*self.observation_keys)
        inputs = inputs.expand(num_particles, *inputs.batch_size)
        network = getattr(self.qvalue_network, "module", None)
        if isinstance(network, NoiseConditionedQNetwork) and self.qvalue_network.in_keys == [
            *self.observation_keys,
            self.action_key,
            self.level_key,
        ]:
            return network.action_value(
                params["module"],
                inputs.get(self.observation_keys[0]),
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
            # Cloned, so that its strides are those of a drawn start: a compiled chain would tell them apart.
            start = start.movedim(batch_ndim, 0).clone(memory_format=torch.contiguous_format)
        if noise is not None:
            noise = noise.movedim((batch_ndim + 1, batch_ndim + 2, batch_ndim), (0, 1, 2))
            noise = noise.clone(memory_format=torch.contiguous_format)
        return start, noise

    def is_warm(self, tensordict: TensorDictBase) -> bool:
        """Whether chains for this tensordict start from the previous action."""
        return self.warm_start and tensordict.get(self.previous_action_key, None) is not None

    def warm(self, tensordict: TensorDictBase, start: Tensor, *, deterministic: bool = False) -> Tensor:
        """Replaces cold starts by the previous action and noise of ``start_level``, where there is one.

        Args:
            tensordict: batch shape [*batch].
            start: cold normalised starts, shape [num_particles, *batch, action_dim].
            deterministic: no noise.
        """
        if not self.is_warm(tensordict):
            return start
        warm = self.sampler.to_normalised(tensordict.get(self.previous_action_key)).expand_as(start)
        if not deterministic:
            sigma = self.sampler.schedule.sigmas[self.start_level].to(start.dtype)
            warm = apply_boundary(warm + sigma * torch.randn_like(start), self.sampler.boundary)
        is_init = tensordict.get(self.is_init_key, None)
        return warm if is_init is None else torch.where(is_init, start, warm)

    def make_tensordict_primer(self) -> Transform:
        """The transform that an environment needs to carry the previous action; an empty one without ``warm_start``."""
        if not self.warm_start:
            return Compose()  # pyright: ignore[reportCallIssue]
        spec = self.spec[self.action_key]
        return TensorDictPrimer(
            Composite({self.previous_action_key: Unbounded(spec.shape, device=spec.device, dtype=spec.dtype)}),
            default_value=0.0,
            expand_specs=True,
        )

    def select(self, value: ActionValue, particles: Tensor) -> Tensor:
        """The particle whose lowest critic is highest: [num_particles, *batch, action_dim] -> [*batch, action_dim]."""
        if particles.shape[0] == 1:
            return particles[0]
        return best_particle(particles, self.sampler.score(value, particles))

    def _write_diagnostics(
        self,
        tensordict: TensorDictBase,
        value: ActionValue,
        start: Tensor,
        particles: Tensor,
        statistics: dict[str, Tensor],
    ) -> None:
        landscape = value.at_level(self.sampler.schedule.num_levels - 1)
        q_before, q_after = landscape.heads(start).amin(0), landscape.heads(particles).amin(0)
        norm = torch.linalg.vector_norm(landscape.gradient(particles), dim=-1)
        clipped = (particles.abs() >= 1.0).to(particles.dtype).mean(-1)
        chosen = q_after.argmax(0, keepdim=True)
        measured = dict(zip(DIAGNOSTIC_KEYS, (norm, clipped, q_before, q_after), strict=True))
        for key, entry in (measured | statistics).items():
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
