"""JAX's switches for those who look for mistakes: all tests run under two of them, here are the others."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import mistral_flax
from mistral_core.config.presets import TINY

CONFIG = TINY.replace(num_hidden_layers=1, layer_types=None)
IDS = np.random.default_rng(0).integers(3, CONFIG.vocab_size, (2, 9))
MASK = np.array([[0] * 3 + [1] * 6, [1] * 9])


def gradients(**options):
    model = mistral_flax.MistralForCausalLM(CONFIG, **options)

    def loss(params):
        return model(IDS, MASK, params=params, use_cache=False, labels=IDS).loss

    return jax.jit(jax.grad(loss))(model.params)


@pytest.mark.parametrize("promoting", [lambda x: x + jnp.zeros((1, 3)), lambda x: x + jnp.zeros(3, jnp.bfloat16)])
def test_in_a_test_no_axis_and_no_dtype_is_promoted(promoting):
    with pytest.raises(ValueError, match="promotion"):
        promoting(jnp.zeros(3))


@pytest.mark.lenient_jax("that a test marked so is spared is what is tested")
def test_a_marked_test_may_promote():
    assert (jnp.zeros(3) + jnp.zeros((1, 3), jnp.bfloat16)).dtype == jnp.float32


@pytest.mark.parametrize("implementation", ["eager", "dot_product"])
@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_gradients_of_lower_precision(dtype, implementation):
    found = gradients(dtype=dtype, attn_implementation=implementation)
    assert all(np.isfinite(gradient).all() for gradient in found.values())


@pytest.mark.parametrize("switch", ["jax_debug_nans", "jax_check_tracer_leaks"])
def test_nothing_is_nan_and_no_tracer_leaks(switch):
    jax.config.update(switch, True)
    try:
        gradients()
        if switch == "jax_debug_nans":  # looking for leaks, JAX traces everything anew
            model = mistral_flax.MistralForCausalLM(CONFIG)
            assert model.generate(IDS, attention_mask=MASK, max_new_tokens=2, eos_token_id=None).shape == (2, 11)
    finally:
        jax.config.update(switch, False)
