"""Conformance of a backend on a real checkpoint: one pass, padded batch, cache by ones and in chunks, greedy tokens."""

from __future__ import annotations

import functools
import os
from collections.abc import Iterator
from typing import Any, NamedTuple

import numpy as np

from mistral_core.arrays import Array
from mistral_core.config import MistralConfig
from mistral_core.outputs import CausalLMOutput
from mistral_core.reference import heads, ops
from mistral_core.weights import loading

from . import adapters
from .compare import Comparison, compare
from .pieces import Subject
from .tolerances import Tolerance

NEW_TOKENS = 64
LONGEST_WINDOW = 96
"""A wider window is narrowed to this, or no affordable text would ever leave it and a wrong window would pass."""


def check(
    path: str | os.PathLike[str], backend: str, *, dtype: str = "float32", implementation: str | None = None
) -> list[Comparison]:
    """Compare every attention implementation of a backend, or the one named, with the reference.

    The weights are the checkpoint's, the window at most LONGEST_WINDOW. Costs float64 passes of the whole model.
    """
    config, parameters = _load(os.fspath(path), dtype)
    window, length = _sizes(config)
    if config.sliding_window is not None:
        config = config.replace(sliding_window=window)
    adapter, expected = adapters.get(backend), _expected(config, parameters, dtype, length)
    with adapter.short_blocks():
        return [
            item
            for each in ((implementation,) if implementation else adapter.implementations)
            for item in _check(Subject(adapter, each, dtype), config, parameters, window, expected)
        ]


@functools.lru_cache(maxsize=1)
def _load(path: str, dtype: str) -> tuple[MistralConfig, dict[str, Array]]:
    loaded = loading.load_pretrained(path, "MistralForCausalLM", dtype=dtype)
    return loaded.config, dict(loaded.tensors)


def _sizes(config: MistralConfig) -> tuple[int, int]:
    """The window to test with, and the length of a text that leaves it twice and has room for new tokens."""
    window = max(1, min(config.sliding_window or 32, LONGEST_WINDOW, config.max_position_embeddings // 4))
    return window, 2 * window + 3


class _Expected(NamedTuple):
    """A batch with a padded row, and what the reference makes of it: rounded as the dtype says, and exact."""

    ids: Array
    mask: Array
    wanted: CausalLMOutput
    exact: CausalLMOutput
    tokens: Array
    """[B, T + new] after a greedy decode; in float32 only."""


def _expected(config: MistralConfig, parameters: dict[str, Array], dtype: str, length: int) -> _Expected:
    ids = np.random.default_rng(0).integers(0, config.vocab_size, (2, length))
    mask = np.ones_like(ids)
    mask[0, : length // 3] = 0
    wanted = exact = heads.causal_lm(config, parameters, ids, attention_mask=mask)
    tokens = ids
    if dtype == "float32":
        new = min(NEW_TOKENS, config.max_position_embeddings - length)
        tokens = np.concatenate([ids, heads.greedy(config, parameters, ids, mask, max_new_tokens=new)], axis=1)
    else:
        wanted = heads.causal_lm(config, parameters, ids, attention_mask=mask, round=ops.rounding(dtype))
    return _Expected(ids, mask, wanted, exact, tokens)


def _check(
    subject: Subject, config: MistralConfig, parameters: dict[str, Array], window: int, expected: _Expected
) -> Iterator[Comparison]:
    adapter, (ids, mask, wanted, exact, tokens) = subject.adapter, expected
    length = ids.shape[1]
    model = adapter.model("MistralForCausalLM", config, parameters, subject.dtype, subject.implementation)
    out = adapter.call(model, input_ids=ids, attention_mask=mask, output_hidden_states=True)
    assert wanted.hidden_states is not None
    assert exact.hidden_states is not None
    assert wanted.logits is not None
    assert exact.logits is not None
    for index, states in enumerate(zip(out.hidden_states, wanted.hidden_states, exact.hidden_states, strict=True)):
        yield subject.compare("padded batch", f"hidden_states {index}", *states)
    yield subject.compare("padded batch", "logits", out.logits, wanted.logits, exact.logits)
    ones = min(8, length - 1)
    for name, sizes in (("by ones", (length - ones, *[1] * ones)), ("chunks", (1, window + 1, window + 1))):
        logits = _in_chunks(subject, model, config, ids, mask, sizes)
        yield subject.compare(name, "logits cached", logits, wanted.logits, exact.logits)
    if subject.dtype == "float32":
        new = tokens.shape[1] - length
        written = model.generate(ids, attention_mask=mask, max_new_tokens=new, eos_token_id=None)
        yield compare(subject.key, f"{new} tokens", "greedy", adapter.numpy(written), tokens, Tolerance(0.0, 1.0))


def _in_chunks(
    subject: Subject, model: Any, config: MistralConfig, ids: Array, mask: Array, sizes: tuple[int, ...]
) -> Array:
    past, start, logits = subject.adapter.allocate(config, len(ids), ids.shape[1], subject.dtype), 0, []
    for size in sizes:
        part = slice(start, start + size)
        out = subject.adapter.call(model, input_ids=ids[:, part], attention_mask=mask[:, part], past_key_values=past)
        past, start = out.past_key_values, start + size
        logits.append(subject.adapter.numpy(out.logits))
    return np.concatenate(logits, axis=1)
