"""The pieces of a Mistral in the order of use; letters are those of `mistral_core.config`.

A function does mathematics, a module holds parameters. Numbers: the contract of `mistral_core.reference.ops`. What
every call computes adds axes by `tf.expand_dims`: an index like `x[:, None]` makes four constants, and takes five times
as long.
"""

from __future__ import annotations

from typing import Any

import keras
import tensorflow as tf
from tensorflow import Tensor

from mistral_core import MistralConfig
from mistral_core.config.rope import query_scaling, rotary_table

from .attention import attend, check_implementation
from .cache import remember
from .products import product
from .step import Step, look
from .traces import sizes


class Layer(keras.layers.Layer):
    """A Keras layer whose inputs keep their dtypes (cos, sin and caches among them) and whose weights exist at once."""

    def __init__(self, *, dtype: Any, name: str | None = None) -> None:
        super().__init__(dtype=dtype, name=name, autocast=False)
        self.built = True

    def replace_weight(self, rows: Any) -> None:
        """Hold another number of rows."""
        del self.weight  # which Keras tracks, and an assignment alone does not undo
        self.weight = self.add_weight(shape=rows.shape, initializer="zeros", name=f"{self.name}.weight")
        self.weight.assign(rows)


class Linear(Layer):
    """x W^T + b in the dtype of x, with W [out, in] as in every checkpoint."""

    def __init__(
        self, size_in: int, size_out: int, *, bias: bool = False, dtype: Any, initializer: Any, name: str | None = None
    ) -> None:
        super().__init__(dtype=dtype, name=name)
        self.weight = self.add_weight(shape=(size_out, size_in), initializer=initializer, name=f"{self.name}.weight")
        self.bias = self.add_weight(shape=(size_out,), initializer="zeros", name=f"{self.name}.bias") if bias else None

    def call(self, x: Tensor) -> Tensor:
        return product(x, tf.cast(self.weight, x.dtype), self.bias)


class Embedding(Layer):
    """The rows [V, D] that token ids pick, in the dtype that the model computes in."""

    def __init__(self, size: int, width: int, *, dtype: Any, initializer: Any, name: str | None = None) -> None:
        super().__init__(dtype=dtype, name=name)
        self.weight = self.add_weight(shape=(size, width), initializer=initializer, name=f"{self.name}.weight")

    def call(self, ids_BT: Tensor) -> Tensor:
        return tf.cast(tf.gather(tf.convert_to_tensor(self.weight), ids_BT), self.compute_dtype)

    def as_linear(self, x: Tensor) -> Tensor:
        """What a Head of the same weight gives: a tied head is the embedding itself."""
        return product(x, self.weight, dtype=tf.float32)

    @property
    def factor(self) -> Any:
        """The W of x W^T, where `as_linear` is nothing else; None where it is."""
        return self.weight if type(self) is Embedding else None


class RMSNorm(Layer):
    """x / sqrt(mean(x^2) + eps) in float32, cast to the dtype of x, then times the weight [D]."""

    def __init__(self, size: int, eps: float, *, dtype: Any, name: str | None = None) -> None:
        super().__init__(dtype=dtype, name=name)
        self.weight = self.add_weight(shape=(size,), initializer="ones", name=f"{self.name}.weight")
        self.eps = eps

    def call(self, x_BTD: Tensor) -> Tensor:
        h = tf.cast(x_BTD, tf.float32)
        h = h * tf.math.rsqrt(tf.reduce_mean(tf.square(h), -1, keepdims=True) + self.eps)
        return tf.cast(h, x_BTD.dtype) * tf.cast(self.weight, x_BTD.dtype)


def token_order(attention_mask_BT: Tensor, past_length_B: Tensor) -> Tensor:
    """[B, T]: the number of real tokens before each token of its row, -1 for padding."""
    order = tf.expand_dims(past_length_B, 1) + tf.cumsum(attention_mask_BT, 1) - 1
    return tf.where(attention_mask_BT != 0, order, -1)


def token_positions(attention_mask_BT: Tensor, past_length_B: Tensor, document_ids_BT: Tensor | None = None) -> Tensor:
    """[B, T]: the position each token is rotated by; each packed document counts anew."""
    position = tf.maximum(tf.expand_dims(past_length_B, 1) + tf.cumsum(attention_mask_BT, 1) - 1, 0)
    if document_ids_BT is None:
        return position
    same = document_ids_BT[:, 1:] == document_ids_BT[:, :-1]
    starts = tf.concat([tf.ones_like(document_ids_BT[:, :1], tf.bool), ~same], axis=1)
    B, T = sizes(position)
    # which document of all rows; TensorFlow has no largest value so far, and a comparison of all columns is [T, T]
    document_BT = tf.cumsum(tf.cast(starts, tf.int32), 1) - 1 + T * tf.range(B)[:, None]
    first = tf.math.unsorted_segment_sum(tf.where(starts, position, 0), document_BT, B * T)
    return position - tf.gather(first, document_BT)


def rotary(position_BT: Tensor, config: MistralConfig) -> tuple[Tensor, Tensor]:
    """cos and sin [B, T, H/2] in float32, whatever the dtype of the model."""
    table = rotary_table(config)
    inverse_frequency = tf.constant(table.inverse_frequency, tf.float32)
    angle = tf.expand_dims(tf.cast(position_BT, tf.float32), -1) * inverse_frequency
    return tf.cos(angle) * table.attention_factor, tf.sin(angle) * table.attention_factor


def rotate(x_BTNH: Tensor, cos_BTH: Tensor, sin_BTH: Tensor) -> Tensor:
    """Turn the pairs (x_i, x_{i+H/2}) by their angles, in float32."""
    first, second = tf.split(tf.cast(x_BTNH, tf.float32), 2, axis=-1)
    cos, sin = tf.expand_dims(cos_BTH, 2), tf.expand_dims(sin_BTH, 2)
    return tf.cast(tf.concat([first * cos - second * sin, second * cos + first * sin], axis=-1), x_BTNH.dtype)


def query_scale(position_BT: Tensor, config: MistralConfig) -> Tensor | None:
    """[B, T]: what the rotated queries are multiplied by, float32 in every model; None: by nothing."""
    scaling = query_scaling(config)
    if scaling is None:
        return None
    turns_BT = position_BT // scaling.original_length
    return 1 + scaling.beta * tf.math.log(1 + tf.cast(turns_BT, tf.float32))


def scale_queries(q_BTNH: Tensor, scale_BT: Tensor | None) -> Tensor:
    """The rotated queries, each times its scale, in float32."""
    if scale_BT is None:
        return q_BTNH
    return tf.cast(tf.cast(q_BTNH, tf.float32) * scale_BT[:, :, None, None], q_BTNH.dtype)


class Attention(Layer):
    """Grouped-query attention: project, rotate, remember, attend, project back."""

    def __init__(
        self,
        config: MistralConfig,
        window: int | None,
        implementation: str | None,
        *,
        dtype: Any,
        initializer: Any,
        name: str | None = None,
    ) -> None:
        super().__init__(dtype=dtype, name=name)
        D, N, H = config.hidden_size, config.num_attention_heads, config.head_dim
        K = config.num_key_value_heads
        options = {"dtype": dtype, "initializer": initializer}
        self.q_proj = Linear(D, N * H, name=f"{self.name}.q_proj", **options)
        self.k_proj = Linear(D, K * H, name=f"{self.name}.k_proj", **options)
        self.v_proj = Linear(D, K * H, name=f"{self.name}.v_proj", **options)
        self.o_proj = Linear(N * H, D, name=f"{self.name}.o_proj", **options)
        self.heads, self.key_value_heads, self.head_dim = N, K, H
        self.window = window
        self.implementation = check_implementation(implementation)
        self.dropout = config.attention_dropout

    def call(
        self,
        x_BTD: Tensor,
        step: Step,
        past: tuple[Tensor, ...] | None = None,
        *,
        seed: Tensor | None = None,
    ) -> tuple[Tensor, Tensor | None, tuple[Tensor, ...] | None]:
        B, T = sizes(step.order_BT)
        q_BTNH = rotate(tf.reshape(self.q_proj(x_BTD), [B, T, self.heads, self.head_dim]), *step.cos_sin)
        q_BTNH = scale_queries(q_BTNH, step.query_scale_BT)
        k_BTKH = rotate(tf.reshape(self.k_proj(x_BTD), [B, T, self.key_value_heads, self.head_dim]), *step.cos_sin)
        v_BTKH = tf.reshape(self.v_proj(x_BTD), [B, T, self.key_value_heads, self.head_dim])
        where, visibility = step.sight or look(step, self.window, past)
        k_BSKH, v_BSKH, kept = remember(k_BTKH, v_BTKH, past, where)
        o_BTNH, weights = attend(
            q_BTNH,
            k_BSKH,
            v_BSKH,
            visibility,
            implementation="eager" if step.output_attentions else self.implementation,
            dropout=self.dropout,
            seed=seed,
        )
        return self.o_proj(tf.reshape(o_BTNH, [B, T, self.heads * self.head_dim])), weights, kept


class MLP(Layer):
    """SwiGLU: down(silu(gate(x)) * up(x))."""

    def __init__(self, config: MistralConfig, *, dtype: Any, initializer: Any, name: str | None = None) -> None:
        super().__init__(dtype=dtype, name=name)
        D, F = config.hidden_size, config.intermediate_size
        options = {"dtype": dtype, "initializer": initializer}
        self.gate_proj = Linear(D, F, name=f"{self.name}.gate_proj", **options)
        self.up_proj = Linear(D, F, name=f"{self.name}.up_proj", **options)
        self.down_proj = Linear(F, D, name=f"{self.name}.down_proj", **options)

    def call(self, x_BTD: Tensor) -> Tensor:
        return self.down_proj(silu(self.gate_proj(x_BTD)) * self.up_proj(x_BTD))


def silu(x: Tensor) -> Tensor:
    """x / (1 + exp(-x)) in float32, rounded once."""
    return tf.cast(tf.nn.silu(tf.cast(x, tf.float32)), x.dtype)


class DecoderLayer(Layer):
    """x + attention(norm(x)), then x + mlp(norm(x))."""

    def __init__(
        self,
        config: MistralConfig,
        window: int | None,
        implementation: str | None,
        *,
        dtype: Any,
        initializer: Any,
        name: str | None = None,
    ) -> None:
        super().__init__(dtype=dtype, name=name)
        options = {"dtype": dtype, "initializer": initializer}
        self.input_layernorm = RMSNorm(
            config.hidden_size, config.rms_norm_eps, dtype=dtype, name=f"{self.name}.input_layernorm"
        )
        self.self_attn = Attention(config, window, implementation, name=f"{self.name}.self_attn", **options)
        self.post_attention_layernorm = RMSNorm(
            config.hidden_size, config.rms_norm_eps, dtype=dtype, name=f"{self.name}.post_attention_layernorm"
        )
        self.mlp = MLP(config, name=f"{self.name}.mlp", **options)

    def call(
        self,
        x_BTD: Tensor,
        step: Step,
        past: tuple[Tensor, ...] | None = None,
        *,
        seed: Tensor | None = None,
    ) -> tuple[Tensor, Tensor | None, tuple[Tensor, ...] | None]:
        h, weights, kept = self.self_attn(self.input_layernorm(x_BTD), step=step, past=past, seed=seed)
        x_BTD = x_BTD + h
        return x_BTD + self.mlp(self.post_attention_layernorm(x_BTD)), weights, kept


class Head(Linear):
    """A Linear whose product is accumulated and returned in float32."""

    def call(self, x: Tensor) -> Tensor:
        return product(x, self.weight, self.bias, dtype=tf.float32)

    @property
    def factor(self) -> Any:
        """The W of x W^T, where a call is nothing else; None where it is."""
        return self.weight if type(self) is Head and self.bias is None else None


def last_token(attention_mask_BT: Tensor) -> Tensor:
    """[B]: the column of each row's last real token, 0 where a row has none."""
    column = tf.range(tf.shape(attention_mask_BT)[1])
    return tf.reduce_max(tf.where(attention_mask_BT != 0, column, 0), axis=1)
