"""THE table: every tensor of every Mistral once, with its name, axes, raw name and kind.

Names and layout ([out, in]) are Hugging Face's; q and k rows are in half-split rotary order. Every backend, format and
sharding rule is derived from these rows: a new tensor is a new row and nothing else changes.
"""

from __future__ import annotations

import math
import zlib
from collections.abc import Iterator
from typing import NamedTuple

import numpy as np

from .config import MistralConfig


class Parameter(NamedTuple):
    """One row of the table; `{}` in a name stands for the layer index."""

    name: str
    axes: tuple[str, ...]
    """Axis letters of each dimension; two letters are their product, query and key/value heads being flattened."""
    kind: str
    """embedding | norm | attention | mlp | head"""
    raw: str | None = None
    """The name in raw Mistral checkpoints (consolidated.*), or None where that format has no such tensor."""
    rotary: bool = False
    """Rows are rotary pairs, which raw Mistral and GGUF store interleaved."""


_LAYER = "model.layers.{}."

BODY = (
    Parameter("model.embed_tokens.weight", ("V", "D"), "embedding", "tok_embeddings.weight"),
    Parameter(_LAYER + "input_layernorm.weight", ("D",), "norm", "layers.{}.attention_norm.weight"),
    Parameter(_LAYER + "self_attn.q_proj.weight", ("NH", "D"), "attention",
              "layers.{}.attention.wq.weight", rotary=True),
    Parameter(_LAYER + "self_attn.k_proj.weight", ("KH", "D"), "attention",
              "layers.{}.attention.wk.weight", rotary=True),
    Parameter(_LAYER + "self_attn.v_proj.weight", ("KH", "D"), "attention",
              "layers.{}.attention.wv.weight"),
    Parameter(_LAYER + "self_attn.o_proj.weight", ("D", "NH"), "attention",
              "layers.{}.attention.wo.weight"),
    Parameter(_LAYER + "post_attention_layernorm.weight", ("D",), "norm",
              "layers.{}.ffn_norm.weight"),
    Parameter(_LAYER + "mlp.gate_proj.weight", ("F", "D"), "mlp", "layers.{}.feed_forward.w1.weight"),
    Parameter(_LAYER + "mlp.up_proj.weight", ("F", "D"), "mlp", "layers.{}.feed_forward.w3.weight"),
    Parameter(_LAYER + "mlp.down_proj.weight", ("D", "F"), "mlp", "layers.{}.feed_forward.w2.weight"),
    Parameter("model.norm.weight", ("D",), "norm", "norm.weight"),
)  # fmt: skip

HEADS = {
    "MistralModel": (),
    "MistralForCausalLM": (Parameter("lm_head.weight", ("V", "D"), "head", "output.weight"),),
    "MistralForSequenceClassification": (Parameter("score.weight", ("C", "D"), "head"),),
    "MistralForTokenClassification": (
        Parameter("score.weight", ("C", "D"), "head"),
        Parameter("score.bias", ("C",), "head"),
    ),
    "MistralForQuestionAnswering": (
        Parameter("qa_outputs.weight", ("2", "D"), "head"),
        Parameter("qa_outputs.bias", ("2",), "head"),
    ),
}
"""Class name -> the rows of its head; the class names are the same in every backend and in `architectures`."""

BASE_PREFIX = "model."
"""What the names of a bare `MistralModel` lack in its own files."""


def axis_sizes(config: MistralConfig) -> dict[str, int]:
    """Axis letter -> size; the legend stands in `config.py`."""
    return {
        "V": config.vocab_size,
        "D": config.hidden_size,
        "N": config.num_attention_heads,
        "K": config.num_key_value_heads,
        "H": config.head_dim,
        "F": config.intermediate_size,
        "C": config.num_labels,
        "2": 2,
    }


def shape_of(parameter: Parameter, config: MistralConfig) -> tuple[int, ...]:
    """The shape of one row's tensor under a config."""
    sizes = axis_sizes(config)
    return tuple(math.prod(sizes[letter] for letter in axis) for axis in parameter.axes)


def head_of(config: MistralConfig, architecture: str) -> tuple[Parameter, ...]:
    """The rows of a class's head; a tied `lm_head` is the embedding itself and has none."""
    tied = config.tie_word_embeddings and architecture == "MistralForCausalLM"
    return () if tied else HEADS[architecture]


def parameters(config: MistralConfig, architecture: str = "MistralForCausalLM") -> Iterator[tuple[str, Parameter]]:
    """Yield (full name, row) of every tensor that the model owns, in checkpoint order."""
    embedding, *layer_rows, final_norm = BODY
    yield embedding.name, embedding
    for layer in range(config.num_hidden_layers):
        for row in layer_rows:
            yield row.name.format(layer), row
    for row in (final_norm, *head_of(config, architecture)):
        yield row.name, row


def shapes(config: MistralConfig, architecture: str = "MistralForCausalLM") -> dict[str, tuple[int, ...]]:
    """Full name -> shape of every tensor that the model owns."""
    return {name: shape_of(row, config) for name, row in parameters(config, architecture)}


def parameter_count(config: MistralConfig, architecture: str = "MistralForCausalLM") -> int:
    """Number of parameters; tied heads count once. Costs nothing, whatever the size."""
    embedding, *layer_rows, final_norm = BODY
    layer = sum(math.prod(shape_of(row, config)) for row in layer_rows)
    rest = (embedding, final_norm, *head_of(config, architecture))
    return layer * config.num_hidden_layers + sum(math.prod(shape_of(row, config)) for row in rest)


def initial_value(name: str, row: Parameter, config: MistralConfig, *, seed: int = 0) -> np.ndarray:
    """A fresh float32 tensor: ones for norms, zeros for biases, else normal(0, initializer_range).

    The numbers depend on `seed` and the name only, so every backend starts from the same head.
    """
    shape = shape_of(row, config)
    if row.kind == "norm":
        return np.ones(shape, np.float32)
    if name.endswith(".bias"):
        return np.zeros(shape, np.float32)
    generator = np.random.Generator(np.random.PCG64([seed, zlib.crc32(name.encode())]))
    return generator.standard_normal(shape, np.float32) * np.float32(config.initializer_range)
