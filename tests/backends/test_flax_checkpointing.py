"""Gradient checkpointing in JAX: gradients, of gradients too, are those without it, and activations are not kept."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from conformance.weights import random_parameters
from mistral_core.config.presets import TINY
from mistral_flax import KVCache, MistralForCausalLM

CONFIG = TINY.replace(num_hidden_layers=2, layer_types=None, attention_dropout=0.3)
IDS = np.arange(3, 23).reshape(2, 10)
OF_JAX = {"prevent_cse": True}
"""With an option of `jax.checkpoint` it is that; without, on a CPU, a way of our own."""


@pytest.fixture(scope="module")
def model():
    return MistralForCausalLM(CONFIG).load_arrays(random_parameters(CONFIG))


def both(model, compute, options):
    """What a function computes of a model without and with checkpointing."""
    model.gradient_checkpointing_disable()
    plain = compute()
    model.gradient_checkpointing_enable(options)
    try:
        return plain, compute()
    finally:
        model.gradient_checkpointing_disable()


def assert_same(one, other):
    for x, y in zip(jax.tree.leaves(one), jax.tree.leaves(other), strict=True):
        most = np.abs(y).max()
        assert most > 0
        np.testing.assert_allclose(x, y, rtol=0, atol=1e-5 * most)


def loss_of(model):
    key = jax.random.key(1)

    def loss(params, ids=IDS, rngs=key):
        return model(ids, params=params, labels=ids, rngs=rngs, use_cache=False).loss

    return loss


def of_all_outputs(model):
    """Gradients through a cache that a first call filled, and through all that a second call returns."""

    def number(params):
        cache = KVCache.allocate(CONFIG, 2, 16)
        past = model(IDS[:, :4], params=params, past_key_values=cache).past_key_values
        out = model(IDS[:, 4:], params=params, past_key_values=past, output_attentions=True, output_hidden_states=True)
        every = (out.logits, *out.hidden_states, *out.past_key_values.keys)
        return sum((x**2).sum() for x in out.attentions) + sum(jnp.sin(x).sum() for x in every)

    return jax.grad(number)


def direction(params):
    return {name: jnp.cos(jnp.arange(x.size, dtype=x.dtype)).reshape(x.shape) / 8 for name, x in params.items()}


def gradients_of_gradients(model):
    def number(params):
        along = direction(params)
        return sum(jnp.vdot(along[name], x) for name, x in jax.grad(loss_of(model))(params).items())

    return jax.grad(number)


KINDS = {
    "gradients": lambda model: jax.grad(loss_of(model)),
    "of all outputs, with a cache": of_all_outputs,
    "of each row": lambda model: (
        lambda params: jax.vmap(jax.grad(loss_of(model)), in_axes=(None, 0, None))(params, IDS[:, None], None)
    ),
    "along a direction": lambda model: (
        lambda params: jax.jvp(jax.grad(loss_of(model)), (params,), (direction(params),))[1]
    ),
    "gradients of gradients": gradients_of_gradients,
}
"""Derivatives of a model, functions of its parameters."""


@pytest.mark.parametrize("kind", KINDS)
def test_derivatives_are_those_of_a_layer_that_keeps_everything(model, kind):
    assert_same(*both(model, lambda: jax.jit(KINDS[kind](model))(model.params), {}))


def test_activations_are_not_kept():
    """By the compiler's own account of a compiled program, in which all layers could be computed again first."""
    config = CONFIG.replace(
        hidden_size=64, intermediate_size=512, num_hidden_layers=12, num_attention_heads=2, num_key_value_heads=1,
        head_dim=8, vocab_size=16, attention_dropout=0.0, sliding_window=None,
    )  # fmt: skip
    model = MistralForCausalLM(config)
    params, ids = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype), model.params), np.zeros((8, 64), int)

    def compiled():
        gradients = jax.grad(lambda params: model(ids, params=params, labels=ids, use_cache=False).loss)
        return jax.jit(gradients).lower(params).compile().memory_analysis().temp_size_in_bytes

    plain, checkpointed = both(model, compiled, {})
    assert checkpointed < plain / 2


def test_a_derivative_that_goes_forward_first_takes_an_option(model):
    """The way of our own has none, which JAX says; with an option of `jax.checkpoint` there is one."""

    def derivative():
        params = model.params
        return jax.jit(lambda params: jax.jvp(loss_of(model), (params,), (params,))[1])(params)

    with pytest.raises(TypeError, match="forward-mode"):
        both(model, derivative, {})
    assert_same(*both(model, derivative, OF_JAX))
