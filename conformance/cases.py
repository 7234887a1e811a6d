"""The cases: data, each there because somebody got it wrong (bug numbers: CONTRIBUTING.md, "Cases").

No two sizes of the config are equal, heads x head_dim is not the hidden size, norms are not ones, and every text is
longer than three windows, so that no axis, no transpose and no window can be confused with another.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, NamedTuple

import numpy as np

from mistral_core.config import MistralConfig
from mistral_core.config.presets import TINY

T = 17
LENGTHS = (17, 11, 6)
EVEN = TINY.replace(
    vocab_size=160, hidden_size=128, intermediate_size=384, num_hidden_layers=2, num_attention_heads=8,
    num_key_value_heads=4, head_dim=32,
)  # fmt: skip
"""All columns are multiples of 128, which the kernels and the libraries of packed matrices ask for."""
INT8_TEXT = 31705
INT8_MARGIN = 1e-3
ROUNDED_TEXT = 516
ROUNDED_MARGIN = 5e-4


class Case(NamedTuple):
    """One model and one batch."""

    name: str
    why: str
    config: MistralConfig
    architecture: str
    inputs: Mapping[str, Any]
    """Keyword arguments of a model call, NumPy arrays."""
    packing: str = ""
    """A key of `packed.PACKINGS`: what becomes of its matrices."""

    @property
    def mask(self) -> np.ndarray:
        """[B, T] of ones and zeros, given or not."""
        return self.inputs.get("attention_mask", np.ones((len(LENGTHS), T), np.int64))


def token_ids(config: MistralConfig = TINY, *, seed: int = 0, shape: tuple[int, int] = (len(LENGTHS), T)) -> np.ndarray:
    """Random ids that are not the padding token."""
    return np.random.default_rng(seed).integers(3, config.vocab_size, shape)


def padded(side: str) -> np.ndarray:
    """A mask of rows of LENGTHS, padded on the left, on the right, or with holes inside."""
    column, length = np.arange(T), np.array(LENGTHS)[:, None]
    if side == "right":
        return (column < length).astype(np.int64)
    if side == "left":
        return (column >= T - length).astype(np.int64)
    mask = np.ones((len(LENGTHS), T), np.int64)
    mask[0, [3, 4, 9]] = mask[1, [0, 5, 6, 7, 16]] = mask[2, 1::2] = 0
    return mask


def _causal(name: str, why: str, inputs: Mapping[str, Any] | None = None, **changes: Any) -> Case:
    config = TINY.replace(**changes)
    labels = token_ids(config, seed=1)
    labels[0, :4] = labels[1, 7] = -100
    return Case(
        name,
        why,
        config,
        "MistralForCausalLM",
        {"input_ids": token_ids(config), "labels": labels, **(inputs or {})},
    )


_MIXED = ("full_attention", "sliding_attention", "sliding_attention")
_YARN = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 32}
_LLAMA3 = {
    "rope_type": "llama3", "factor": 8.0, "original_max_position_embeddings": 64, "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
}  # fmt: skip
_QUERIES = {
    "rope_type": "yarn", "factor": 16.0, "original_max_position_embeddings": 5, "beta_fast": 32.0, "beta_slow": 1.0,
    "mscale": 1.0, "mscale_all_dim": 1.0, "llama_4_scaling_beta": 0.1,
}  # fmt: skip
_ALL_PADDING = padded("left") * np.array([[1], [0], [1]])
_EMBEDS = np.random.default_rng(8).normal(size=(len(LENGTHS), T, TINY.hidden_size)).astype(np.float32)
_DOCUMENTS = np.array([[0] * 9 + [1] * 8, [0] * 2 + [1] * 7 + [2] * 8, [0] * 17])
_BEGIN_AGAIN = np.array(
    [[*range(9), *range(8)], [*range(3, 5), *range(7), *range(8)], [*range(1), *range(1), *range(15)]]
)
_ROWS = np.array([[0], [1], [2]])

CAUSAL = (
    _causal("window", "2-5: W keys, itself included, no more and no fewer"),
    _causal("window-none", "1: None is no window, not a window of 0", sliding_window=None),
    _causal("window-1", "6: x[-W+1:] keeps everything at W = 1", sliding_window=1),
    _causal("window-at-length", "9: rings are wrong where the text just fills them", sliding_window=T),
    _causal("window-beyond-length", "9: and where it does not", sliding_window=T + 1),
    _causal("layer-types", "8: windows by layer", layer_types=_MIXED),
    _causal("theta", "26: theta hard-coded to 1e4 or left at a default", rope_theta=500.0),
    _causal("eps", "rms_norm_eps hard-coded", rms_norm_eps=0.01),
    _causal("multi-head", "27: key/value heads as many as query heads", num_key_value_heads=6),
    _causal("multi-query", "27: one key/value head", num_key_value_heads=1),
    _causal("three-groups", "head n reads key/value head n // G, not n % K", num_key_value_heads=3),
    _causal("tied", "29: tied head ignored", tie_word_embeddings=True),
    _causal("rope-linear", "rope scaling ignored", rope_scaling={"rope_type": "linear", "factor": 3.0}),
    _causal("rope-yarn", "23: attention factor forgotten", rope_scaling=_YARN),
    _causal("rope-llama3", "rope scaling ignored", rope_scaling=_LLAMA3),
    _causal("query-scale", "queries scaled by their position: floor, length, and pads that count",
            {"attention_mask": padded("left")}, model_type="ministral3", rope_scaling=_QUERIES, sliding_window=None),
    _causal("query-scale-far", "the scale's position is the one that rotates, not the order",
            {"position_ids": np.arange(T)[None] * 7 + _ROWS}, model_type="ministral3", rope_scaling=_QUERIES),
    _causal("left-padding", "11, 18: pads shift the window, NaN rows", {"attention_mask": padded("left")}),
    _causal("right-padding", "14: positions cached and incremented", {"attention_mask": padded("right")}),
    _causal("holes", "93: positions are counted in real tokens", {"attention_mask": padded("holes")}),
    _causal("all-padding", "18, 92: a row that sees nothing", {"attention_mask": _ALL_PADDING}),
    _causal("documents", "17: packed documents see each other", {"document_ids": _DOCUMENTS}),
    _causal("begin-again", "17: packed documents told by positions alone", {"position_ids": _BEGIN_AGAIN}),
    _causal("far-positions", "21: angles in bfloat16 or rounded tables",
            {"position_ids": np.arange(T)[None] * 7001 + _ROWS}),
    _causal("embeddings", "inputs_embeds instead of ids", {"input_ids": None, "inputs_embeds": _EMBEDS}),
)  # fmt: skip

_LATE = (np.arange(80) >= np.array([[0], [19], [10]])).astype(np.int64)
_PIECES = np.arange(80) // np.array([[23], [31], [80]])

LONG = _causal(
    "long",
    "what is in C of 64 tokens and more: rows that begin late, documents, a window that ends within them",
    {"input_ids": token_ids(shape=(3, 80)), "labels": np.where(_LATE != 0, token_ids(seed=1, shape=(3, 80)), -100),
     "attention_mask": _LATE, "document_ids": _PIECES},
    head_dim=32, sliding_window=13,
)  # fmt: skip

INT8 = _causal(
    "int8",
    "the cache in int8: scales shared over heads or tokens, a token that sees itself unrounded, pads that count",
    {"input_ids": token_ids(seed=INT8_TEXT), "attention_mask": padded("left")},
    num_hidden_layers=2,
)
"""A text of which each code of the specification lies `INT8_MARGIN` of a code or more from where it would be another.

So float32, which is wrong by up to 1.6e-4 of a code here, has the same codes, and the bound of everything else holds.
"""


def _head(name: str, why: str, architecture: str, inputs: Mapping[str, Any], **changes: Any) -> Case:
    config = TINY.replace(**changes)
    return Case(name, why, config, architecture, {"input_ids": token_ids(config), **inputs})


def _with_pads(side: str) -> np.ndarray:
    return np.where(padded(side) != 0, token_ids(), TINY.pad_token_id or 0)


_SEQUENCE, _TOKEN, _QA = (
    "MistralForSequenceClassification", "MistralForTokenClassification", "MistralForQuestionAnswering"
)  # fmt: skip
_CLASSES = np.array([1, 6, 0])
_NUMBERS = np.array([0.25, -1.5, 2.0], np.float32)
_MANY = (token_ids(shape=(3, 7)) % 2).astype(np.float32)
_TAGS = np.where(padded("right") != 0, token_ids(seed=2) % 7, -100)
_EOS_INSIDE = _with_pads("right").copy()
_EOS_INSIDE[:, 3] = TINY.pad_token_id

HEADS = (
    _head("sequence", "24: last column", _SEQUENCE, {"labels": _CLASSES}),
    _head("sequence-left", "24: argmax(eq pad) - 1", _SEQUENCE,
          {"attention_mask": padded("left"), "labels": _CLASSES}),
    _head("sequence-right", "24: the last column is padding", _SEQUENCE,
          {"attention_mask": padded("right"), "labels": _CLASSES}),
    _head("sequence-by-pad-id", "24: no mask, pad inside the text", _SEQUENCE, {"input_ids": _EOS_INSIDE}),
    _head("sequence-mask-wins", "24: pad = eos and a real eos at the end", _SEQUENCE,
          {"input_ids": _with_pads("right"), "attention_mask": np.ones((3, T), np.int64)}),
    _head("sequence-no-pad-id", "24: returned [B, T, C] without a pad id", _SEQUENCE, {}, pad_token_id=None),
    _head("sequence-number", "regression of one number", _SEQUENCE, {"labels": _NUMBERS}, num_labels=1),
    _head("sequence-numbers", "regression of many", _SEQUENCE, {"labels": _MANY}, problem_type="regression"),
    _head("sequence-many", "many labels at once", _SEQUENCE, {"labels": _MANY}),
    _head("token", "labels of -100", _TOKEN, {"attention_mask": padded("right"), "labels": _TAGS}),
    _head("question", "spans; one lies beyond the text", _QA,
          {"start_positions": np.array([0, 5, 40]), "end_positions": np.array([3, 16, 40])}),
)  # fmt: skip


def _packed(packing: str, name: str = "", **changes: Any) -> Case:
    config = EVEN.replace(**changes)
    inputs = {"input_ids": token_ids(config), "attention_mask": padded("left")}
    return Case(f"packed {name or packing}", PACKED_WHY, config, "MistralForCausalLM", inputs, packing)


PACKED_WHY = "nibbles swapped, zero points off by one, scales of another group, rounded activations"
PACKED = (
    _packed("int8 row"),
    _packed("int8 32"),
    *(_packed(f"int4 {group}") for group in (16, 32, 64, 128)),
    _packed("int4 row"),
    _packed("int4 asymmetric"),
    _packed("nf4 64"),
    _packed("nf4 16"),
    _packed("nf4 doubled"),
    _packed("fp8 block"),
    _packed("int4 32", "tied", tie_word_embeddings=True),
)
ROUNDED = Case(
    "rounded rows", "rows that no product or each product rounds, scales of another block or row",
    EVEN.replace(num_hidden_layers=1), "MistralForCausalLM",
    {"input_ids": token_ids(EVEN, seed=ROUNDED_TEXT, shape=(1, 6)), "attention_mask": np.ones((1, 6), np.int64)},
    "int4 32",
)  # fmt: skip
"""A short text of which each rounded number of the specification lies `ROUNDED_MARGIN` of a code from another."""
