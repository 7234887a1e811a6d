"""The mask that is drawn is the mask that is used: a key is changed, and the queries that see it change, no others.

One layer's attention works and all else is off (its own MLP, the other layers), so that a hidden state after that layer
is its input and what its attention read.
"""

from __future__ import annotations

import functools
import shutil

import numpy as np
import pytest

from conformance import adapters
from conformance.weights import random_parameters
from mistral_core.config.presets import TINY
from mistral_core.data import TINY_CHECKPOINT
from mistral_core.pictures import AttentionMaskVisualizer
from mistral_core.pictures.inputs import read
from mistral_core.reference import model as reference

WINDOW = 3
CONFIG = TINY.replace(
    vocab_size=2048,
    sliding_window=WINDOW,
    layer_types=("sliding_attention", "full_attention", "sliding_attention"),
    bos_token_id=1,
    eos_token_id=2,
)
TEXTS = ["Emma was", "The evening was not"]
CASES = {
    "left": {"padding_side": "left"},
    "right": {"padding_side": "right"},
    "packed": {"packed": True},
}
SMALL, LARGE = 1e-5, 1e-3


@pytest.fixture(scope="module")
def path(tmp_path_factory):
    """A config with windows by layer and a tokenizer."""
    directory = tmp_path_factory.mktemp("windows")
    CONFIG.save_pretrained(directory)
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copy(TINY_CHECKPOINT / name, directory)
    return directory


def parameters_with_only(layer):
    """Random weights; every other layer, and this one's MLP, adds nothing."""
    found = random_parameters(CONFIG)
    for name in found:
        off = "down_proj" in name or ("o_proj" in name and f".layers.{layer}." not in name)
        found[name] = np.zeros_like(found[name]) if off else found[name]
    return found


def states_of_the_reference(layer):
    parameters = parameters_with_only(layer)
    return lambda **inputs: reference.forward(CONFIG, parameters, **inputs).hidden_states[layer + 1]


@functools.cache
def states_of(adapter, layer, implementation):
    model = adapter.model("MistralForCausalLM", CONFIG, parameters_with_only(layer), "float32", implementation)

    def call(embeds, mask, documents):
        inputs = {"inputs_embeds": embeds, "attention_mask": mask, "document_ids": documents}
        return adapter.call(model, **inputs, use_cache=False, output_hidden_states=True).hidden_states[layer + 1]

    if adapter.name == "flax":  # which compiles op by op otherwise
        import jax

        call = jax.jit(call)

    def states(*, inputs_embeds, attention_mask, document_ids):
        return adapter.numpy(call(adapter.array(inputs_embeds, "float32"), attention_mask, document_ids))

    return states


def seen(states, rows):
    """[B, T, T] bool: for each key, the queries whose attention reads something else when that key is another."""
    B, T = rows.input_ids.shape
    random = np.random.default_rng(5)
    x_BTD = 0.3 * random.normal(size=(B, T, CONFIG.hidden_size))  # small: attention is spread over all keys seen
    batch = np.repeat(x_BTD[None], T + 1, axis=0)
    for key in range(T):
        batch[key, :, key] += random.normal(size=(B, CONFIG.hidden_size))
    flat = batch.reshape((T + 1) * B, T, -1).astype(np.float32)
    documents = None if rows.document_ids is None else np.tile(rows.document_ids, (T + 1, 1))
    after = states(inputs_embeds=flat, attention_mask=np.tile(rows.attention_mask, (T + 1, 1)), document_ids=documents)
    read_from = (after - flat).reshape(batch.shape)
    change = np.abs(read_from[:T] - read_from[T]).max(axis=-1)  # [key, B, query]
    assert ((change < SMALL) | (change > LARGE)).all(), "neither changed nor the same"
    return (change > LARGE).transpose(1, 2, 0)


def assert_drawn_is_seen(visualizer, states, layer, case):
    drawn = visualizer.picture(TEXTS, layer=layer, **CASES[case])
    found = seen(states, read(visualizer.tokenizer, TEXTS, **CASES[case]))
    assert len(drawn.panels) == len(found)
    for index, panel in enumerate(drawn.panels):
        assert panel.layers == (layer,)
        assert np.array_equal(drawn.mask(index), found[panel.row]), (case, layer)


LAYERS = [(0, "left"), (0, "right"), (0, "packed"), (1, "packed")]
"""The layer with the window, and one without; the last one's states are normed."""


@pytest.mark.parametrize(("layer", "case"), LAYERS)
def test_reference(path, layer, case):
    assert_drawn_is_seen(AttentionMaskVisualizer(path), states_of_the_reference(layer), layer, case)


@pytest.mark.feature("The attention mask as a picture")
def test_backend(path, backend):
    adapter = adapters.get(backend.__name__.removeprefix("mistral_"))
    visualizer = AttentionMaskVisualizer(path, backend=adapter.name)
    for implementation in adapter.implementations:
        for layer, case in LAYERS:
            states = states_of(adapter, layer, implementation)
            assert_drawn_is_seen(visualizer, states, layer, case)


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("off", [-1, 1])
def test_a_drawing_that_is_off_by_one_is_found(path, monkeypatch, off, case):
    right = AttentionMaskVisualizer._visible
    monkeypatch.setattr(
        AttentionMaskVisualizer, "_visible", lambda self, rows, window: right(self, rows, window and window + off)
    )
    with pytest.raises(AssertionError):
        assert_drawn_is_seen(AttentionMaskVisualizer(path), states_of_the_reference(0), 0, case)


@pytest.mark.parametrize("off", [-1, 1])
def test_a_model_that_is_off_by_one_is_found(path, monkeypatch, off):
    right = reference.ops.attention_mask
    visualizer = AttentionMaskVisualizer(path)

    def wrong(query, key, window, **more):
        return right(query, key, window and window + off, **more)

    def states(**inputs):
        with monkeypatch.context() as patch:
            patch.setattr(reference.ops, "attention_mask", wrong)
            return states_of_the_reference(0)(**inputs)

    with pytest.raises(AssertionError):
        assert_drawn_is_seen(visualizer, states, 0, "left")
