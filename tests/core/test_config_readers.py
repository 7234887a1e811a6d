"""Every config field has a reader: changing it changes the logits, or it is listed here with who reads it."""

from __future__ import annotations

import dataclasses
from functools import cache

import numpy as np
import pytest

from conformance.weights import random_parameters
from mistral_core import MistralConfig
from mistral_core.config.presets import TINY
from mistral_core.errors import SequenceTooLongError
from mistral_core.generation import GenerationConfig
from mistral_core.parameters import initial_value, parameters, shapes
from mistral_core.reference import heads

BASE = TINY.replace(num_labels=2)
IDS = np.random.default_rng(0).integers(3, BASE.vocab_size, (2, 17))
YARN = {
    "rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 2048, "beta_fast": 32.0, "beta_slow": 1.0,
    "attention_factor": 1.1,
}  # fmt: skip
LLAMA3 = {
    "rope_type": "llama3", "factor": 8.0, "original_max_position_embeddings": 64, "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
}  # fmt: skip

# field -> another value; the parameters stay the same
LOGITS = {
    "rms_norm_eps": 1e-2,
    "rope_theta": 5e2,
    "rope_scaling": {"rope_type": "linear", "factor": 2.0},
    "sliding_window": 6,
    "layer_types": ("full_attention", "sliding_attention", "sliding_attention"),
    "tie_word_embeddings": True,
    "num_key_value_heads": 1,
}
# field -> another value; tensors have another shape
SHAPES = {
    "vocab_size": 98,
    "hidden_size": 50,
    "intermediate_size": 81,
    "num_hidden_layers": 2,
    "num_attention_heads": 8,
    "num_key_value_heads": 3,
    "head_dim": 18,
    "num_labels": 4,
}
# field -> who reads it, tested below or elsewhere
ELSEWHERE = {
    "hidden_act": "only silu exists: test_config",
    "max_position_embeddings": "longer texts are errors: below",
    "initializer_range": "fresh tensors: below",
    "use_cache": "whether a cache comes back: below",
    "pad_token_id": "where a classifier reads: below",
    "bos_token_id": "the tokenizer has its own; kept for the file",
    "eos_token_id": "where generation stops: below",
    "attention_dropout": "training: tests/backends",
    "classifier_dropout": "training of a token classifier: below",
    "id2label": "names of num_labels: test_config",
    "label2id": "names of num_labels: test_config",
    "problem_type": "which loss: below",
    "dtype": "from_pretrained and save_pretrained: tests/backends",
    "output_attentions": "what comes back: below",
    "output_hidden_states": "what comes back: below",
    "return_dict": "what comes back: below",
    "model_type": "what absent fields mean, and how files name it: test_model_types",
    "architectures": "the file's own class: test_checkpoint",
    "extra": "unknown keys, for the way back: test_config",
}


def test_every_field_is_listed():
    assert {f.name for f in dataclasses.fields(MistralConfig)} == {*LOGITS, *SHAPES, *ELSEWHERE}


def drawn(config):
    return random_parameters(config, "MistralForCausalLM")


def reference_logits(config, given):
    return heads.causal_lm(config, given, IDS).logits


def backend_logits(backend, config, given):
    model = backend.MistralForCausalLM(config).load_arrays(given)
    logits = model(IDS, use_cache=False).logits
    return np.asarray(logits.detach() if hasattr(logits, "detach") else logits)


@cache
def base_logits(backend):
    return backend_logits(backend, BASE, drawn(BASE))


def changed(field):
    value = LOGITS[field]
    if field == "num_key_value_heads":  # the same number of rows, shared out differently
        return BASE.replace(num_key_value_heads=1, head_dim=BASE.head_dim * 2, num_attention_heads=3)
    return BASE.replace(**{field: value})


@pytest.mark.parametrize("field", LOGITS)
def test_changing_it_changes_the_logits_of_the_reference(field):
    given = drawn(BASE)
    assert np.abs(reference_logits(changed(field), given) - reference_logits(BASE, given)).max() > 1e-3


@pytest.mark.parametrize("field", LOGITS)
def test_changing_it_changes_the_logits_of_every_backend_alike(backend, field):
    given = drawn(BASE)
    config = changed(field)
    after = backend_logits(backend, config, given)
    assert np.abs(after - base_logits(backend)).max() > 1e-3
    assert np.allclose(after, reference_logits(config, given), atol=1e-4)


@pytest.mark.parametrize(
    ("scaling", "key", "value"),
    [
        (YARN, "factor", 8.0),
        (YARN, "original_max_position_embeddings", 256),
        (YARN, "beta_fast", 2.0),
        (YARN, "beta_slow", 0.3),
        (YARN, "attention_factor", 1.3),
        (LLAMA3, "factor", 4.0),
        (LLAMA3, "original_max_position_embeddings", 32),
        (LLAMA3, "low_freq_factor", 2.0),
        (LLAMA3, "high_freq_factor", 8.0),
    ],
)
def test_every_key_of_rope_scaling_changes_the_logits(scaling, key, value):
    config = BASE.replace(rope_theta=1e4, sliding_window=None)
    given = drawn(config)
    before = reference_logits(config.replace(rope_scaling=scaling), given)
    after = reference_logits(config.replace(rope_scaling={**scaling, key: value}), given)
    assert np.abs(after - before).max() > 1e-4


@pytest.mark.parametrize("field", SHAPES)
def test_sizes_change_the_shapes(field):
    architecture = "MistralForSequenceClassification" if field == "num_labels" else "MistralForCausalLM"
    assert shapes(BASE.replace(**{field: SHAPES[field]}), architecture) != shapes(BASE, architecture)


def test_initializer_range_scales_fresh_tensors():
    name, row = next(parameters(BASE))
    once, twice = (initial_value(name, row, BASE.replace(initializer_range=r)) for r in (0.1, 0.2))
    assert np.allclose(twice, 2 * once)


def test_max_position_embeddings_is_the_longest_text(backend):
    model = backend.MistralForCausalLM(BASE.replace(max_position_embeddings=16))
    with pytest.raises(SequenceTooLongError, match="16"):
        model(IDS)


def test_what_comes_back(backend):
    def out(**changes):
        model = backend.MistralModel(BASE.replace(**changes))
        return (model.eval() if backend.__name__ == "mistral_torch" else model)(IDS)

    assert out().past_key_values is not None
    assert out(use_cache=False).past_key_values is None
    assert len(out(output_hidden_states=True).hidden_states) == BASE.num_hidden_layers + 1
    assert out(output_attentions=True).attentions[0].shape == (2, BASE.num_attention_heads, 17, 17)
    assert type(out(return_dict=False)) is tuple


def test_eos_token_id_is_where_generation_stops():
    assert GenerationConfig.from_model_config(BASE.replace(eos_token_id=(5, 7))).eos_token_ids == (5, 7)


def test_pad_token_id_and_problem_type_reach_the_classifier():
    given = random_parameters(BASE, "MistralForSequenceClassification")
    ids = IDS.copy()
    ids[:, -3:] = 9
    before, after = (heads.sequence_classification(BASE.replace(pad_token_id=pad), given, ids).logits for pad in (0, 9))
    assert np.abs(after - before).max() > 1e-3
    labels = np.array([[0.0, 1.0], [1.0, 0.0]])
    losses = {
        kind: heads.sequence_classification(BASE.replace(problem_type=kind), given, ids, labels=labels).loss
        for kind in ("regression", "multi_label_classification")
    }
    assert losses["regression"] != losses["multi_label_classification"]


def test_classifier_dropout_works_in_training(backend):
    given = random_parameters(BASE, "MistralForTokenClassification")
    model = backend.MistralForTokenClassification(BASE.replace(classifier_dropout=0.5)).load_arrays(given)
    options = {}
    if backend.__name__ == "mistral_flax":
        import jax

        options = {"rngs": jax.random.key(0)}
    elif backend.__name__ == "mistral_tf":
        options = {"training": True}
    trained = model.train()(IDS) if backend.__name__ == "mistral_torch" else model(IDS, **options)
    plain = model.eval()(IDS) if backend.__name__ == "mistral_torch" else model(IDS)
    first, second = (
        np.asarray(x.logits.detach() if hasattr(x.logits, "detach") else x.logits) for x in (trained, plain)
    )
    assert np.abs(first - second).max() > 1e-3
