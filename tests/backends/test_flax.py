"""JAX's own ways: params as a plain pytree of Hugging Face names under jit, grad, vmap and eval_shape."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from conformance.weights import random_parameters
from mistral_core.parameters import shapes
from mistral_core.presets import TINY
from mistral_flax import KVCache, MistralForCausalLM, MistralModel

IDS = np.random.default_rng(0).integers(3, TINY.vocab_size, (2, 17))
PARAMETERS = random_parameters(TINY, "MistralForCausalLM")


@pytest.fixture(scope="module")
def model():
    return MistralForCausalLM(TINY).load_arrays(PARAMETERS)


def close(a, b):
    return np.allclose(np.asarray(a), np.asarray(b), atol=2e-5)


def test_params_are_a_plain_pytree_with_the_table_s_names(model):
    assert {name: tuple(array.shape) for name, array in model.params.items()} == shapes(TINY)
    assert all(isinstance(array, jax.Array) for array in jax.tree.leaves(model.params))


def test_params_given_are_the_ones_used(model):
    other = {name: array * 0.5 for name, array in model.params.items()}
    assert close(model(IDS, params=model.params).logits, model(IDS).logits)
    assert not close(model(IDS, params=other).logits, model(IDS).logits)


def test_jit(model):
    jitted = jax.jit(lambda params, ids: model(ids, params=params))
    assert close(jitted(model.params, IDS).logits, model(IDS).logits)


def test_jit_with_a_cache_that_goes_in_and_comes_out(model):
    step = jax.jit(lambda params, ids, past: model(ids, params=params, past_key_values=past))
    past, logits = KVCache.allocate(TINY, 2, 17), []
    for t in range(17):
        out = step(model.params, jnp.asarray(IDS[:, t : t + 1]), past)
        past = out.past_key_values
        logits.append(out.logits)
    assert step._cache_size() == 1, "one compilation for all steps"
    assert close(jnp.concatenate(logits, axis=1), model(IDS).logits)


def test_grad_under_jit(model):
    def loss(params):
        return model(IDS, params=params, labels=IDS).loss

    eager, compiled = jax.grad(loss)(model.params), jax.jit(jax.grad(loss))(model.params)
    assert eager.keys() == model.params.keys()
    assert all(close(eager[name], compiled[name]) for name in eager)


def test_vmap_over_rows(model):
    alone = jax.vmap(lambda row: model(row[None]).logits[0])(jnp.asarray(IDS))
    assert close(alone, model(IDS).logits)


def test_eval_shape_of_a_published_size_takes_no_memory():
    from mistral_core.presets import PRESETS

    config = PRESETS["mistral-large-123b-2407"]
    model = nnx.eval_shape(lambda: MistralModel(config, dtype="bfloat16"))
    assert model.layers["87"].mlp.up_proj.weight.shape == (28672, 12288)


def test_nnx_jit_and_grad(model):
    loss = nnx.jit(lambda m: m(IDS, labels=IDS).loss)
    assert close(loss(model), model(IDS, labels=IDS).loss)
    gradients = nnx.grad(lambda m: m(IDS, labels=IDS).loss)(model)
    assert np.abs(gradients["lm_head"]["weight"][...]).max() > 0


def test_dropout_is_on_where_rngs_are_given():
    model = MistralForCausalLM(TINY.replace(attention_dropout=0.5)).load_arrays(PARAMETERS)
    assert close(model(IDS).logits, model(IDS).logits)
    first, second = (model(IDS, rngs=jax.random.key(seed)).logits for seed in (0, 1))
    assert not close(first, second)
    assert close(first, model(IDS, rngs=jax.random.key(0)).logits)


def test_an_id_out_of_range_under_jit_makes_nan(model):
    jitted = jax.jit(lambda ids: model(ids).logits)
    assert np.isnan(jitted(jnp.full((1, 2), TINY.vocab_size))).all()


def test_generate_compiles_once_for_a_shape(model):
    from mistral_flax.generate import _steps

    for _ in range(2):
        model.generate(IDS, max_new_tokens=4)
    assert [jitted._cache_size() for jitted in _steps(model)] == [1, 1]
