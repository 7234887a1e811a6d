"""THE table: every tensor of every Mistral once, with its name, axes, kind and foreign names.

Names and layout ([out, in]) are Hugging Face's; q and k rows are in half-split rotary order. Every backend, format and
sharding rule is derived from these rows: a new tensor is a new row and nothing else changes.
"""

from __future__ import annotations

import math
import zlib
from collections.abc import Iterator
from typing import TYPE_CHECKING, NamedTuple

import numpy as np

if TYPE_CHECKING:
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
    gguf: str | None = None
    """The name in GGUF files of the architecture `llama`."""
    keras_hub: str | None = None
    """The path in a KerasHub preset; `{}` stands for the name of the layer."""
    maxtext: str | None = None
    """The path in MaxText's tree; `{}` stands for `layers` (scanned) or `layers_<index>`."""
    rotary: bool = False
    """Rows are rotary pairs, which raw Mistral and GGUF store interleaved."""

    @property
    def is_linear(self) -> bool:
        """A matrix that inputs are multiplied by, which most frameworks but torch store [in, out]."""
        return self.kind in ("attention", "mlp", "head") and len(self.axes) == 2

    @property
    def is_of_layer(self) -> bool:
        """A matrix of a decoder layer."""
        return self.kind in ("attention", "mlp")


_LAYER = "model.layers.{}."

BODY = (
    Parameter("model.embed_tokens.weight", ("V", "D"), "embedding", raw="tok_embeddings.weight",
              gguf="token_embd.weight", keras_hub="layers/reversible_embedding/vars/0",
              maxtext="token_embedder/embedding"),
    Parameter(_LAYER + "input_layernorm.weight", ("D",), "norm", raw="layers.{}.attention_norm.weight",
              gguf="blk.{}.attn_norm.weight", keras_hub="layers/{}/_self_attention_layernorm/vars/0",
              maxtext="decoder/{}/pre_self_attention_layer_norm/scale"),
    Parameter(_LAYER + "self_attn.q_proj.weight", ("NH", "D"), "attention", raw="layers.{}.attention.wq.weight",
              gguf="blk.{}.attn_q.weight", keras_hub="layers/{}/_self_attention_layer/_query_dense/vars/0",
              maxtext="decoder/{}/self_attention/query/kernel", rotary=True),
    Parameter(_LAYER + "self_attn.k_proj.weight", ("KH", "D"), "attention", raw="layers.{}.attention.wk.weight",
              gguf="blk.{}.attn_k.weight", keras_hub="layers/{}/_self_attention_layer/_key_dense/vars/0",
              maxtext="decoder/{}/self_attention/key/kernel", rotary=True),
    Parameter(_LAYER + "self_attn.v_proj.weight", ("KH", "D"), "attention", raw="layers.{}.attention.wv.weight",
              gguf="blk.{}.attn_v.weight", keras_hub="layers/{}/_self_attention_layer/_value_dense/vars/0",
              maxtext="decoder/{}/self_attention/value/kernel"),
    Parameter(_LAYER + "self_attn.o_proj.weight", ("D", "NH"), "attention", raw="layers.{}.attention.wo.weight",
              gguf="blk.{}.attn_output.weight", keras_hub="layers/{}/_self_attention_layer/_output_dense/vars/0",
              maxtext="decoder/{}/self_attention/out/kernel"),
    Parameter(_LAYER + "post_attention_layernorm.weight", ("D",), "norm", raw="layers.{}.ffn_norm.weight",
              gguf="blk.{}.ffn_norm.weight", keras_hub="layers/{}/_feedforward_layernorm/vars/0",
              maxtext="decoder/{}/post_self_attention_layer_norm/scale"),
    Parameter(_LAYER + "mlp.gate_proj.weight", ("F", "D"), "mlp", raw="layers.{}.feed_forward.w1.weight",
              gguf="blk.{}.ffn_gate.weight", keras_hub="layers/{}/_feedforward_gate_dense/vars/0",
              maxtext="decoder/{}/mlp/wi_0/kernel"),
    Parameter(_LAYER + "mlp.up_proj.weight", ("F", "D"), "mlp", raw="layers.{}.feed_forward.w3.weight",
              gguf="blk.{}.ffn_up.weight", keras_hub="layers/{}/_feedforward_intermediate_dense/vars/0",
              maxtext="decoder/{}/mlp/wi_1/kernel"),
    Parameter(_LAYER + "mlp.down_proj.weight", ("D", "F"), "mlp", raw="layers.{}.feed_forward.w2.weight",
              gguf="blk.{}.ffn_down.weight", keras_hub="layers/{}/_feedforward_output_dense/vars/0",
              maxtext="decoder/{}/mlp/wo/kernel"),
    Parameter("model.norm.weight", ("D",), "norm", raw="norm.weight", gguf="output_norm.weight",
              keras_hub="layers/mistral_layer_normalization/vars/0", maxtext="decoder/decoder_norm/scale"),
)  # fmt: skip

HEADS: dict[str, tuple[Parameter, ...]] = {
    "MistralModel": (),
    "MistralForCausalLM": (
        Parameter("lm_head.weight", ("V", "D"), "head", raw="output.weight", gguf="output.weight",
                  keras_hub="layers/reversible_embedding/vars/1", maxtext="decoder/logits_dense/kernel"),
    ),
    "MistralForSequenceClassification": (Parameter("score.weight", ("C", "D"), "head"),),
    "MistralForTokenClassification": (
        Parameter("score.weight", ("C", "D"), "head"),
        Parameter("score.bias", ("C",), "head"),
    ),
    "MistralForQuestionAnswering": (
        Parameter("qa_outputs.weight", ("2", "D"), "head"),
        Parameter("qa_outputs.bias", ("2",), "head"),
    ),
}  # fmt: skip
"""Class name -> the rows of its head; the class names are the same in every backend and in `architectures`."""

LM_HEAD = HEADS["MistralForCausalLM"][0].name
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


def layer_of(name: str) -> int | None:
    """The index of the layer in a full name; None outside the layers."""
    return next((int(part) for part in name.split(".") if part.isdigit()), None)


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
