"""JAX with its strict switches runs forward, loss, gradients and generate."""

from __future__ import annotations

import jax
import numpy as np
import pytest

import mistral_flax
from mistral_core.config.presets import TINY

CONFIG = TINY.replace(num_hidden_layers=1, layer_types=None)
IDS = np.random.default_rng(0).integers(3, CONFIG.vocab_size, (2, 9))
MASK = np.array([[0] * 3 + [1] * 6, [1] * 9])
LABELS = {
    "MistralForCausalLM": {"labels": IDS},
    "MistralForSequenceClassification": {"labels": IDS[:, 0] % CONFIG.num_labels},
    "MistralForTokenClassification": {"labels": IDS % CONFIG.num_labels},
    "MistralForQuestionAnswering": {"start_positions": IDS[:, 0] % 5, "end_positions": IDS[:, 1] % 9},
}


def gradients(architecture="MistralForCausalLM"):
    model = getattr(mistral_flax, architecture)(CONFIG)

    def loss(params):
        return model(IDS, MASK, params=params, use_cache=False, **LABELS[architecture]).loss

    return jax.jit(jax.grad(loss))(model.params)


def tokens(**options):
    model = mistral_flax.MistralForCausalLM(CONFIG)
    return model.generate(IDS, attention_mask=MASK, max_new_tokens=2, eos_token_id=None, **options)


@pytest.mark.parametrize("architecture", LABELS)
def test_no_axis_and_no_dtype_is_promoted_in_training(strict_jax, architecture):
    assert all(np.isfinite(gradient).all() for gradient in gradients(architecture).values())


@pytest.mark.parametrize(
    "options",
    [
        {"do_sample": True, "seed": 1, "top_k": 5, "top_p": 0.9, "temperature": 0.7, "repetition_penalty": 1.2},
        {"num_beams": 2, "logit_bias": {5: 1.0}},
        {"on_device_loop": True},
    ],
    ids=["sampled", "beams", "loop"],
)
def test_no_axis_and_no_dtype_is_promoted_by_generate(strict_jax, options):
    assert tokens(**options).shape == (2, 11)


def test_a_bfloat16_model_under_the_strict_switches(strict_jax):
    model = mistral_flax.MistralForCausalLM(CONFIG, dtype="bfloat16")
    assert np.isfinite(model(IDS, MASK, labels=IDS).loss)


@pytest.mark.parametrize("switch", ["jax_debug_nans", "jax_check_tracer_leaks"])
def test_nothing_is_nan_and_no_tracer_leaks(switch):
    jax.config.update(switch, True)
    try:
        gradients()
        if switch == "jax_debug_nans":  # looking for leaks, JAX traces everything anew
            assert tokens().shape == (2, 11)
    finally:
        jax.config.update(switch, False)
