"""The yardstick of `benchmarks.sampler`: the same chain as one jitted JAX program, as a JAX user would write it."""

from __future__ import annotations

from collections.abc import Callable

import jax
import jax.numpy as jnp
import torch

from nclql_torchrl import LangevinSampler, NoiseConditionedQNetwork

Parameters = dict[str, jax.Array]


def q_value(parameters: Parameters, observation: jax.Array, action: jax.Array, level: jax.Array) -> jax.Array:
    """Q(s, a, l) of one critic: observation, action and level embedding concatenated, as in the authors' program.

    Args:
        parameters: a critic's state dict, with weights of shape [inputs, outputs] as JAX libraries keep them.
        observation: shape [batch, observation_dim].
        action: in [-1, 1], shape [batch, action_dim].
        level: the noise level, a scalar.

    Returns:
        Values, shape [batch].
    """

    def linear(name: str, inputs: jax.Array) -> jax.Array:
        return inputs @ parameters[f"{name}.weight"] + parameters[f"{name}.bias"]

    angle = level * parameters["level_frequencies"]
    embedding = jnp.concatenate([jnp.sin(angle), jnp.cos(angle)]) / jnp.sqrt(2.0 * angle.size)
    embedding = linear("embed.1", jax.nn.mish(linear("embed.0", embedding)))
    embedding = jnp.broadcast_to(embedding, (observation.shape[0], embedding.size))
    hidden = jnp.concatenate([observation, action, embedding], axis=-1)
    num_hidden = sum(name.startswith("trunk.") and name.endswith(".weight") for name in parameters) - 1
    for index in range(num_hidden):
        hidden = jax.nn.mish(linear(f"trunk.{index}", hidden))
    return linear(f"trunk.{num_hidden}", hidden).squeeze(-1)


def make_chain(
    critics: list[NoiseConditionedQNetwork], sampler: LangevinSampler
) -> Callable[[jax.Array, jax.Array], jax.Array]:
    """The sampler's chain on the sum of the critics, jitted: ``lax.scan`` over the steps, random numbers drawn inside.

    Returns:
        Maps a random key and observations [batch, observation_dim] to normalised actions [batch, action_dim].
    """
    parameters = [{name: jnp.asarray(value.T.numpy()) for name, value in c.state_dict().items()} for c in critics]
    num_levels, steps_per_level = sampler.noise_shape
    levels = jnp.repeat(jnp.arange(num_levels), steps_per_level)
    step_sizes = jnp.asarray(sampler.schedule.step_sizes.to(torch.float32).numpy())[levels]
    w = float(sampler.w)

    @jax.jit
    def chain(parameters: list[Parameters], key: jax.Array, observation: jax.Array) -> jax.Array:
        shape = (observation.shape[0], sampler.action_dim)
        start_key, noise_key = jax.random.split(key)
        start = jax.random.uniform(start_key, shape, minval=-1.0, maxval=1.0)
        noise = jax.random.normal(noise_key, (levels.size, *shape))

        def step(action: jax.Array, inputs: tuple[jax.Array, ...]) -> tuple[jax.Array, None]:
            level, step_size, z = inputs

            def value(action: jax.Array) -> jax.Array:
                return sum(q_value(critic, observation, action, level).sum() for critic in parameters)  # pyright: ignore[reportReturnType]

            gradient = jax.grad(value)(action)
            gradient = gradient / (jnp.linalg.norm(gradient, axis=-1, keepdims=True) + 1e-8)
            action = action + 0.5 * step_size * w * gradient + jnp.sqrt(step_size) * z
            return jnp.clip(action, -1.0, 1.0), None

        return jax.lax.scan(step, start, (levels, step_sizes, noise))[0]

    return lambda key, observation: chain(parameters, key, observation)
