"""The NC-LQL loss: temporal differences at the noise-free level, regression at the noisy ones."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from tensordict import TensorDict, TensorDictBase, TensorDictParams
from tensordict.nn import TensorDictModuleBase, dispatch
from tensordict.utils import NestedKey, expand_as_right, unravel_key
from torch import Tensor
from torchrl.objectives.common import LossModule
from torchrl.objectives.utils import ValueEstimators, _vmap_func, dispatch_value_estimator, distance_loss

from nclql_torchrl.actor import LangevinActor

METADATA_KEYS = ("td_error", "pred_value", "target_value", "next_state_value")


class NCLQLLoss(LossModule):
    """Loss of the noise-conditioned critics of NC-LQL (arXiv 2602.07873).

    - ``loss_qvalue`` is the squared TD error of every critic at the noise-free level. The next action is sampled by
      the actor's own chain, the target is the lowest target critic; there is no entropy term, truncation bootstraps.
      The chain starts cold and visits every level, whatever the actor does when acting, unless the actor warm-starts
      and the batch has the previous action under "next".
    - ``loss_noise`` teaches the noisy levels: at ``action + sigma_l z`` every critic regresses to the ensemble's mean
      value of the clean action, so that level ``l`` learns a landscape smoothed by ``sigma_l``. With one level (LQL)
      it is zero.

    Both are sums over the ensemble. Adding and minimising them together is one way to train; the authors minimise them
    one after the other: :class:`~nclql_torchrl.NCLQLUpdate` does either.

    The critics' parameters are the actor's ``qvalue_network_params``, the same object; only targets are copies.

    Args:
        actor_network: the actor, whose critics are trained and whose sampler draws the next action.

    Keyword Args:
        delay_qvalue: whether targets come from separate target parameters (a ``SoftUpdate`` moves them).
        delay_actor: whether the next action is sampled from the target critics; the authors use the online ones.
        reward_scale: factor on the reward.
        target_num_particles: particles of the chains that draw next actions.
        clip_noisy_action: whether ``action + sigma_l z`` is clipped to the action range. The authors do not.
        loss_function: distance, "l2" (the authors'), "l1" or "smooth_l1".
        skip_done_states: whether next observations of done steps are left out, for environments that fill them with
            NaN. Those of terminated steps always are: nothing bootstraps from them.
        reduction: "none", "mean" or "sum" over the batch. Defaults to "mean".
        deactivate_vmap: whether to loop over the critics instead of vmapping them.
        use_prioritized_weights: whether to weigh samples by ``priority_weight``: True, False or "auto".

    Raises:
        ValueError: for ``target_num_particles < 1`` or a ``reward_scale`` that is not positive.

    Examples:
        >>> from torchrl.data import Bounded
        >>> from torchrl.modules import ValueOperator
        >>> from nclql_torchrl import LangevinActor, NoiseConditionedQNetwork
        >>> critics = [
        ...     ValueOperator(NoiseConditionedQNetwork(3, 2, (32, 32)), in_keys=["observation", "action", "level"])
        ...     for _ in range(2)
        ... ]
        >>> loss = NCLQLLoss(LangevinActor(critics, spec=Bounded(-1.0, 1.0, (2,))), delay_qvalue=False)
        >>> batch = TensorDict({
        ...     "observation": torch.randn(8, 3),
        ...     "action": torch.rand(8, 2) * 2 - 1,
        ...     ("next", "observation"): torch.randn(8, 3),
        ...     ("next", "reward"): torch.randn(8, 1),
        ...     ("next", "done"): torch.zeros(8, 1, dtype=torch.bool),
        ...     ("next", "terminated"): torch.zeros(8, 1, dtype=torch.bool),
        ... }, [8])
        >>> losses = loss(batch)
        >>> (losses["loss_qvalue"] + losses["loss_noise"]).backward()
        >>> loss_qvalue, loss_noise, *_ = loss(
        ...     observation=torch.randn(8, 3), action=torch.zeros(8, 2), next_observation=torch.randn(8, 3),
        ...     next_reward=torch.zeros(8, 1), next_done=torch.zeros(8, 1, dtype=torch.bool),
        ...     next_terminated=torch.zeros(8, 1, dtype=torch.bool))
    """

    @dataclass
    class _AcceptedKeys:
        """Tensordict entries, changed with ``set_keys``.

        ``next_action`` (in the environment's units, shape [*batch, action_dim]), ``noise_level`` (integers, shape
        [*batch]) and ``action_noise`` (standard normal, shape [*batch, action_dim]) are optional inputs that replace
        the loss's own draws, see :meth:`NCLQLLoss.draw`; the actor's ``initial_action`` and ``langevin_noise`` do so
        under "next".
        """

        action: NestedKey = "action"
        value: NestedKey = "state_value"
        state_action_value: NestedKey = "state_action_value"
        priority: NestedKey = "td_error"
        reward: NestedKey = "reward"
        done: NestedKey = "done"
        terminated: NestedKey = "terminated"
        priority_weight: NestedKey = "priority_weight"
        next_action: NestedKey = "next_action"
        noise_level: NestedKey = "noise_level"
        action_noise: NestedKey = "action_noise"

    default_keys = _AcceptedKeys
    tensor_keys: _AcceptedKeys
    default_value_estimator = ValueEstimators.TD0
    SUPPORTED_VALUE_ESTIMATORS = (ValueEstimators.TD0, ValueEstimators.TD1, ValueEstimators.TDLambda)

    actor_network: LangevinActor
    """The actor, as given."""

    qvalue_network: TensorDictModuleBase
    """The critic's structure."""

    qvalue_network_params: TensorDictParams
    """Live parameters of the critics, each of shape [num_critics, ...]; the actor's own object."""

    target_qvalue_network_params: TensorDictParams
    """Target parameters, likewise."""

    def __init__(
        self,
        actor_network: LangevinActor,
        *,
        delay_qvalue: bool = True,
        delay_actor: bool = False,
        reward_scale: float = 0.2,
        target_num_particles: int = 1,
        clip_noisy_action: bool = False,
        loss_function: str = "l2",
        skip_done_states: bool = False,
        reduction: str | None = None,
        deactivate_vmap: bool = False,
        use_prioritized_weights: str | bool = "auto",
    ) -> None:
        self._in_keys = None
        self._out_keys = None
        super().__init__()
        if target_num_particles < 1:
            raise ValueError(f"target_num_particles is {target_num_particles}; expected at least 1.")
        if not 0.0 < reward_scale < float("inf"):
            raise ValueError(f"reward_scale is {reward_scale}; expected a positive, finite number.")
        self.delay_qvalue = delay_qvalue
        self.delay_actor = delay_actor
        self.reward_scale = reward_scale
        self.target_num_particles = target_num_particles
        self.clip_noisy_action = clip_noisy_action
        self.loss_function = loss_function
        self.skip_done_states = skip_done_states
        self.reduction = "mean" if reduction is None else reduction
        self.deactivate_vmap = deactivate_vmap
        self.use_prioritized_weights = use_prioritized_weights

        # The actor goes where LossModule keeps structure without parameters. Its parameters and its sampler become the
        # loss's own, as the same objects, so that `.to(device)` on either moves both.
        self.__dict__["actor_network"] = actor_network  # pyright: ignore[reportIndexIssue]
        self.__dict__["qvalue_network"] = actor_network.qvalue_network  # pyright: ignore[reportIndexIssue]
        self.qvalue_network_params = actor_network.qvalue_network_params
        self.sampler = actor_network.sampler
        if delay_qvalue:
            self.target_qvalue_network_params = TensorDictParams(
                self.qvalue_network_params.apply(lambda parameter: parameter.data.clone(), filter_empty=False),
                no_convert=True,
            )
        self._has_update_associated["qvalue_network"] = not delay_qvalue
        self._make_vmap()
        self.set_keys(action=actor_network.action_key, state_action_value=actor_network.value_key)

    @property
    def num_qvalue_nets(self) -> int:
        """Number of critics in the ensemble."""
        return self.qvalue_network_params.shape[0]

    def _make_vmap(self) -> None:
        self._vmap_qnetworkN0 = _vmap_func(
            self.qvalue_network, (None, 0), randomness=self.vmap_randomness, pseudo_vmap=self.deactivate_vmap
        )

    def _forward_value_estimator_keys(self, **kwargs: NestedKey) -> None:
        if self._value_estimator is not None:
            self._value_estimator.set_keys(
                value=self.tensor_keys.value,
                reward=self.tensor_keys.reward,
                done=self.tensor_keys.done,
                terminated=self.tensor_keys.terminated,
            )
        self._set_in_keys()

    def make_value_estimator(self, value_type: ValueEstimators | str | None = None, **hyperparams: object) -> NCLQLLoss:
        """Chooses how targets are formed: TD0 (default), TD1 or TDLambda; ``gamma`` is the discount."""
        value_type, options = self._prepare_value_estimator_kwargs(value_type, **hyperparams)
        if value_type is not None:
            dispatch_value_estimator(
                self,
                value_type,
                supported=self.SUPPORTED_VALUE_ESTIMATORS,
                tensor_keys={
                    "value_target": "value_target",
                    "value": self.tensor_keys.value,
                    "reward": self.tensor_keys.reward,
                    "done": self.tensor_keys.done,
                    "terminated": self.tensor_keys.terminated,
                },
                value_network=None,
                deactivate_vmap=self.deactivate_vmap,
                **(options or {}),
            )
        return self

    def _set_in_keys(self) -> None:
        observation_keys = self.actor_network.observation_keys
        keys = [
            self.tensor_keys.action,
            ("next", self.tensor_keys.reward),
            ("next", self.tensor_keys.done),
            ("next", self.tensor_keys.terminated),
            *observation_keys,
            *[("next", key) for key in observation_keys],
        ]
        self._in_keys = list(dict.fromkeys(unravel_key(key) for key in keys))

    @property
    def in_keys(self) -> list[NestedKey]:
        """Entries that the loss reads."""
        if self._in_keys is None:
            self._set_in_keys()
        return self._in_keys  # pyright: ignore[reportReturnType]

    @in_keys.setter
    def in_keys(self, values: list[NestedKey]) -> None:
        self._in_keys = values

    @property
    def out_keys(self) -> list[NestedKey]:
        """Entries that the loss returns: the two losses, then detached diagnostics."""
        if self._out_keys is None:
            self._out_keys = ["loss_qvalue", "loss_noise", *METADATA_KEYS]
        return self._out_keys  # pyright: ignore[reportReturnType]

    @out_keys.setter
    def out_keys(self, values: list[NestedKey]) -> None:
        self._out_keys = values

    @dispatch  # pyright: ignore[reportArgumentType]
    def forward(self, tensordict: TensorDictBase) -> TensorDictBase:
        """Both losses at the present parameters, and writes the TD error for prioritised replay.

        Args:
            tensordict: a batch of transitions.

        Returns:
            ``loss_qvalue`` and ``loss_noise``, and detached ``td_error`` (largest over the critics), ``pred_value``
            (mean over them), ``target_value`` and ``next_state_value``; per sample with ``reduction="none"``, else
            reduced (diagnostics always to their mean).
        """
        loss_qvalue, metadata = self.qvalue_loss(tensordict)
        loss_noise = self.noise_loss(tensordict, metadata["pred_value"])
        tensordict.set(self.tensor_keys.priority, metadata["td_error"])
        per_sample = self.reduction == "none"
        if not per_sample:
            metadata = {key: value.mean() for key, value in metadata.items()}
        output = TensorDict(
            {"loss_qvalue": loss_qvalue, "loss_noise": loss_noise, **metadata},
            batch_size=tensordict.batch_size if per_sample else [],
        )
        self._clear_weakrefs(tensordict, output, "qvalue_network_params", "target_qvalue_network_params")
        return output

    def qvalue_loss(self, tensordict: TensorDictBase) -> tuple[Tensor, dict[str, Tensor]]:
        """Squared TD error at the noise-free level.

        Returns:
            The reduced loss, and per-sample diagnostics of shape [*batch] (see :meth:`forward`).
        """
        target_value, next_state_value = self._target(tensordict)
        level = self.noise_free_level(tensordict, target_value.device)
        predictions = self.ensemble_values(tensordict, tensordict.get(self.tensor_keys.action), level)
        return self.td_loss(tensordict, predictions, target_value, next_state_value)

    def td_loss(
        self, tensordict: TensorDictBase, predictions: Tensor, target_value: Tensor, next_state_value: Tensor
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """What :meth:`qvalue_loss` returns, given predictions [num_critics, *batch] and targets [*batch]."""
        targets = target_value.expand_as(predictions)
        loss = distance_loss(predictions, targets, loss_function=self.loss_function).sum(0)
        loss = self._reduce_loss(loss, tensordict=tensordict, weights=self._maybe_get_priority_weight(tensordict))
        predictions = predictions.detach()
        metadata = {
            "td_error": (predictions - targets).abs().amax(0),
            "pred_value": predictions.mean(0),
            "target_value": target_value,
            "next_state_value": next_state_value,
        }
        return loss, metadata

    def noise_loss(self, tensordict: TensorDictBase, target: Tensor | None = None) -> Tensor:
        """Regression of the noisy levels to the value of the clean action.

        Args:
            tensordict: a batch of transitions.
            target: value of the clean action, shape [*batch]; by default the mean of the present critics. The
                authors' sequence passes the mean from before its TD step, ``qvalue_loss``'s ``pred_value``.

        Returns:
            The reduced loss.
        """
        action = tensordict.get(self.tensor_keys.action)
        schedule = self.sampler.schedule
        num_noisy = schedule.num_levels - 1
        if target is None:
            level = self.noise_free_level(tensordict, action.device)
            with torch.no_grad():
                target = self.ensemble_values(tensordict, action, level).mean(0)
        if num_noisy == 0:
            return self._reduce_loss(torch.zeros_like(target), tensordict=tensordict)
        level, noise = self._noise(tensordict)
        # The noise levels are in units of the normalised action, hence the half range.
        scale = schedule.sigmas[level].to(action.dtype).unsqueeze(-1) * self.sampler.action_half_range
        noisy_action = action + scale * noise
        if self.clip_noisy_action:
            center, half_range = self.sampler.action_center, self.sampler.action_half_range
            noisy_action = noisy_action.clamp(center - half_range, center + half_range)
        predictions = self.ensemble_values(tensordict, noisy_action, level)
        loss = distance_loss(predictions, target.expand_as(predictions), loss_function=self.loss_function).sum(0)
        return self._reduce_loss(loss, tensordict=tensordict, weights=self._maybe_get_priority_weight(tensordict))

    def noise_free_level(self, tensordict: TensorDictBase, device: torch.device) -> Tensor:
        """The last level, once for each entry of a batch: shape [*batch]."""
        return torch.full(tensordict.batch_size, self.sampler.schedule.num_levels - 1, device=device)

    def ensemble_values(
        self,
        tensordict: TensorDictBase,
        action: Tensor,
        level: Tensor,
        params: TensorDictParams | TensorDictBase | None = None,
    ) -> Tensor:
        """Values of the whole ensemble.

        Args:
            tensordict: holds the observation, batch shape [*batch].
            action: in the environment's units, shape [*batch, action_dim].
            level: integer noise levels, shape [*batch].
            params: the critics' parameters, by default the live ones.

        Returns:
            Values, shape [num_critics, *batch].
        """
        actor = self.actor_network
        params = self.qvalue_network_params if params is None else params
        inputs = tensordict.select(*actor.observation_keys)
        inputs.set(actor.action_key, action)
        if actor.level_key in self.qvalue_network.in_keys:
            inputs.set(actor.level_key, level)
        assert self._vmap_qnetworkN0 is not None
        return self._vmap_qnetworkN0(inputs, params).get(self.tensor_keys.state_action_value).squeeze(-1)

    def draw(self, tensordict: TensorDictBase) -> TensorDictBase:
        """The batch with everything random in it, as far as it is not there yet: both losses of the result are
        deterministic functions.

        Args:
            tensordict: a batch of transitions.

        Returns:
            A shallow copy with ``next_action``, ``noise_level`` and ``action_noise``.
        """
        drawn = tensordict.copy()
        drawn.set(self.tensor_keys.next_action, self._next_action(tensordict, self._next(tensordict)))
        if self.sampler.schedule.num_levels > 1:
            level, noise = self._noise(tensordict)
            drawn.set(self.tensor_keys.noise_level, level).set(self.tensor_keys.action_noise, noise)
        return drawn

    def _noise(self, tensordict: TensorDictBase) -> tuple[Tensor, Tensor]:
        """Noisy levels, shape [*batch], and standard normal noise, shape [*batch, action_dim]."""
        action = tensordict.get(self.tensor_keys.action)
        level = tensordict.get(self.tensor_keys.noise_level, None)
        if level is None:
            num_noisy = self.sampler.schedule.num_levels - 1
            level = torch.randint(num_noisy, tensordict.batch_size, device=action.device)
        noise = tensordict.get(self.tensor_keys.action_noise, None)
        return level, torch.randn_like(action) if noise is None else noise

    def _next(self, tensordict: TensorDictBase) -> TensorDictBase:
        """A copy of the next state, with zeros where nothing bootstraps from it."""
        next_tensordict = tensordict.get("next").copy()
        # Nothing bootstraps from a terminal state, whose observation may be NaN; 0 * NaN would poison the target.
        unused = next_tensordict.get(self.tensor_keys.done if self.skip_done_states else self.tensor_keys.terminated)
        for key in self.actor_network.observation_keys:
            observation = next_tensordict.get(key)
            mask = expand_as_right(unused.squeeze(-1), observation)
            next_tensordict.set(key, torch.where(mask, torch.zeros_like(observation), observation))
        return next_tensordict

    @torch.no_grad()
    def _next_action(self, tensordict: TensorDictBase, next_tensordict: TensorDictBase) -> Tensor:
        """Action of the next state, in the environment's units, shape [*batch, action_dim]."""
        next_action = tensordict.get(self.tensor_keys.next_action, None)
        if next_action is not None:
            return next_action
        actor = self.actor_network
        sampling_params = self.target_qvalue_network_params if self.delay_actor else self.qvalue_network_params
        value = actor.action_value(next_tensordict, sampling_params, num_particles=self.target_num_particles)
        start, noise = actor.explicit_randomness(next_tensordict, value)
        # Cold chains through every level, unless the batch carries the previous action of the next state.
        start_level = actor.start_level if actor.is_warm(next_tensordict) else 0
        if start is None:
            start = actor.warm(next_tensordict, self.sampler.random_start(value))
        particles = self.sampler(value, start, noise, start_level=start_level)
        return self.sampler.to_environment(actor.select(value, particles))

    def bootstrap(self, tensordict: TensorDictBase, next_state_value: Tensor) -> Tensor:
        """TD targets of transitions whose next states have that value, both of shape [*batch]."""
        tensordict = tensordict.clone(False)
        reward_key = ("next", self.tensor_keys.reward)
        tensordict.set(reward_key, tensordict.get(reward_key) * self.reward_scale)
        tensordict.set(("next", self.tensor_keys.value), next_state_value.unsqueeze(-1))
        return self.value_estimator.value_estimate(tensordict).squeeze(-1)

    @torch.no_grad()
    def _target(self, tensordict: TensorDictBase) -> tuple[Tensor, Tensor]:
        """TD target and the value of the next state, shape [*batch] each."""
        next_tensordict = self._next(tensordict)
        next_action = self._next_action(tensordict, next_tensordict)
        level = self.noise_free_level(tensordict, next_action.device)
        next_values = self.ensemble_values(next_tensordict, next_action, level, self.target_qvalue_network_params)
        next_state_value = next_values.amin(0)
        return self.bootstrap(tensordict, next_state_value), next_state_value
