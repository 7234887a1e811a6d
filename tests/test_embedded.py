"""The embedded checkpoint: small, real, and the same 256 tokens in NumPy, PyTorch, Flax and TensorFlow."""

from __future__ import annotations

import functools
import json

import numpy as np
import pytest

from mistral_core import MistralTokenizer
from mistral_core.data import TINY_CHECKPOINT
from mistral_core.reference import heads
from mistral_core.weights import loading, manifest

NEW = 256
ATOL = 32 * float(np.finfo(np.float32).eps)


@functools.cache
def reference():
    loaded = loading.load_pretrained(TINY_CHECKPOINT, "MistralForCausalLM", dtype="float32")
    parameters = dict(loaded.tensors)
    prompt = np.array([MistralTokenizer.from_pretrained(TINY_CHECKPOINT).encode("Elizabeth was surprised")])
    written = heads.greedy(loaded.config, parameters, prompt, max_new_tokens=NEW)
    tokens = np.concatenate([prompt, written], axis=1)
    return loaded.config, prompt, tokens, heads.causal_lm(loaded.config, parameters, tokens).logits


def test_the_embedded_checkpoint_is_small_and_real():
    config = reference()[0]
    assert config.num_attention_heads * config.head_dim != config.hidden_size
    assert config.num_attention_heads > config.num_key_value_heads
    assert config.sliding_window < NEW
    assert sum(path.stat().st_size for path in TINY_CHECKPOINT.iterdir()) <= 5_000_000
    manifest.verify(TINY_CHECKPOINT, "full")


def test_its_tokenizer_is_what_is_saved_of_it(tmp_path):
    names = ["tokenizer.json", "tokenizer_config.json"]
    MistralTokenizer.from_pretrained(TINY_CHECKPOINT).save_pretrained(tmp_path)
    for name in names:
        assert (tmp_path / name).read_bytes() == (TINY_CHECKPOINT / name).read_bytes()
    assert set(names) <= set(json.loads((TINY_CHECKPOINT / "mistral_manifest.json").read_text())["files"])


def test_it_writes_english():
    *_, tokens, _ = reference()
    text = MistralTokenizer.from_pretrained(TINY_CHECKPOINT).decode(tokens[0], skip_special_tokens=True)
    words = set(text.lower().split())
    assert len({"she", "was", "the", "and", "to", "her", "not", "i", "be"} & words) > 5


def test_the_reference_s_cache_agrees_with_its_one_pass():
    _, prompt, tokens, logits = reference()
    assert np.array_equal(logits[:, prompt.shape[1] - 1 : -1].argmax(-1), tokens[:, prompt.shape[1] :])


def test_256_tokens_cached_one_pass_and_chunked(backend):
    config, prompt, tokens, logits = reference()
    model = backend.MistralForCausalLM.from_pretrained(TINY_CHECKPOINT, dtype="float32")
    written = np.asarray(model.generate(prompt, max_new_tokens=NEW, eos_token_id=None))
    assert np.array_equal(written, tokens)
    bound = ATOL * np.abs(logits).max()
    one_pass = plain(model(tokens).logits)
    assert np.abs(one_pass - logits).max() <= bound
    past, chunks = backend.KVCache.allocate(config, 1, tokens.shape[1]), []
    for start in range(0, tokens.shape[1], 100):
        out = model(tokens[:, start : start + 100], past_key_values=past)
        past = out.past_key_values
        chunks.append(plain(out.logits))
    assert past.keys[0].shape[1] == config.sliding_window + 1
    assert np.abs(np.concatenate(chunks, axis=1) - logits).max() <= bound


@pytest.mark.parametrize("head", ["MistralForSequenceClassification", "MistralForTokenClassification"])
def test_its_body_serves_classifiers(backend, head):
    with pytest.warns(UserWarning):  # noqa: PT030  (the head is new, and the old one is dropped)
        model = getattr(backend, head).from_pretrained(TINY_CHECKPOINT, num_labels=4)
    assert plain(model(reference()[1]).logits).shape[-1] == 4


def plain(array):
    return np.asarray(array.detach() if hasattr(array, "detach") else array)
