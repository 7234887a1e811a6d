"""The pieces of a Mistral in the order of use; letters are those of `mistral_core.config`.

A function does mathematics, a module holds parameters. Numbers: the contract of `mistral_core.reference.ops`.
"""

from __future__ import annotations

import functools
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jax import Array

from mistral_core import MistralConfig
from mistral_core.config.rope import query_scaling, rotary_table

from .attention import attend, check_implementation
from .cache import remember
from .products import product
from .programs import in_one_program
from .step import Step, look


@functools.partial(in_one_program, static_argnames=("shape", "dtype"))
def _normal(key: Array, *, shape: tuple[int, ...], dtype: Any, std: float) -> Array:
    """Random numbers of this deviation around 0."""
    return jax.random.normal(key, shape, dtype) * std


class Linear(nnx.Module):
    """x W^T + b in the dtype of x, with W [out, in] as in every checkpoint."""

    def __init__(
        self, size_in: int, size_out: int, *, bias: bool = False, param_dtype: Any, rngs: nnx.Rngs, std: float
    ) -> None:
        self.weight = nnx.Param(_normal(rngs.params(), shape=(size_out, size_in), dtype=param_dtype, std=std))
        self.bias = nnx.Param(jnp.zeros(size_out, param_dtype)) if bias else None

    def __call__(self, x: Array) -> Array:
        return product(x, self.weight[...], None if self.bias is None else self.bias[...])


class Embedding(nnx.Module):
    """The rows [V, D] that token ids pick, in the dtype that the model computes in."""

    def __init__(self, size: int, width: int, *, dtype: Any, param_dtype: Any, rngs: nnx.Rngs, std: float) -> None:
        self.weight = nnx.Param(_normal(rngs.params(), shape=(size, width), dtype=param_dtype, std=std))
        self.dtype = dtype

    def __call__(self, ids_BT: Array) -> Array:
        # "fill": an id out of range under jit makes NaN, not the nearest row
        return jnp.take(self.weight[...], ids_BT, axis=0, mode="fill").astype(self.dtype)

    def as_linear(self, x: Array) -> Array:
        """What a Head of the same weight gives: a tied head is the embedding itself."""
        return product(x, self.weight[...], dtype=jnp.float32)

    @property
    def factor(self) -> Array | None:
        """The W of x W^T, where `as_linear` is nothing else; None where it is."""
        return self.weight[...] if type(self) is Embedding else None


class RMSNorm(nnx.Module):
    """x / sqrt(mean(x^2) + eps) in float32, cast to the dtype of x, then times the weight [D]."""

    def __init__(self, size: int, eps: float, *, param_dtype: Any) -> None:
        self.weight = nnx.Param(jnp.ones(size, param_dtype))
        self.eps = eps

    def __call__(self, x_BTD: Array) -> Array:
        return _rms_norm(x_BTD, self.weight[...], self.eps)


@functools.partial(in_one_program, static_argnames="eps")
def _rms_norm(x_BTD: Array, weight_D: Array, eps: float) -> Array:
    """x / sqrt(mean(x^2) + eps) in float32, cast to the dtype of x, then times the weight."""
    h = x_BTD.astype(jnp.float32)
    h = h * jax.lax.rsqrt(jnp.square(h).mean(-1, keepdims=True) + eps)
    weight = jnp.expand_dims(weight_D, range(x_BTD.ndim - 1))  # JAX can be told to add no axes by itself
    return h.astype(x_BTD.dtype) * weight.astype(x_BTD.dtype)


@in_one_program
def token_order(attention_mask_BT: Array, past_length_B: Array) -> Array:
    """[B, T]: the number of real tokens before each token of its row, -1 for padding."""
    order = past_length_B[:, None] + attention_mask_BT.cumsum(1) - 1
    return jnp.where(attention_mask_BT != 0, order, -1)


@in_one_program
def token_positions(attention_mask_BT: Array, past_length_B: Array, document_ids_BT: Array | None = None) -> Array:
    """[B, T]: the position each token is rotated by; each packed document counts anew."""
    position = jnp.maximum(past_length_B[:, None] + attention_mask_BT.cumsum(1) - 1, 0)
    if document_ids_BT is None:
        return position
    same = document_ids_BT[:, 1:] == document_ids_BT[:, :-1]
    starts = jnp.concatenate([jnp.ones_like(same[:, :1]), ~same], axis=1)
    return position - jax.lax.cummax(jnp.where(starts, position, 0), axis=1)


def rotary(position_BT: Array, config: MistralConfig) -> tuple[Array, Array]:
    """cos and sin [B, T, H/2] in float32, whatever the dtype of the model."""
    table = rotary_table(config)
    cos, sin = _cos_sin(position_BT, jnp.array(table.inverse_frequency, jnp.float32))
    return cos * table.attention_factor, sin * table.attention_factor


@in_one_program
def _cos_sin(position_BT: Array, inverse_frequency_H: Array) -> tuple[Array, Array]:
    """cos and sin [B, T, H/2] of the positions times each frequency [H/2]."""
    angle = position_BT.astype(jnp.float32)[..., None] * inverse_frequency_H[None, None]
    return jnp.cos(angle), jnp.sin(angle)


@in_one_program
def rotate(x_BTNH: Array, cos_BTH: Array, sin_BTH: Array) -> Array:
    """Turn the pairs (x_i, x_{i+H/2}) by their angles, in float32."""
    first, second = jnp.split(x_BTNH.astype(jnp.float32), 2, axis=-1)
    cos, sin = cos_BTH[:, :, None, :], sin_BTH[:, :, None, :]
    return jnp.concatenate([first * cos - second * sin, second * cos + first * sin], axis=-1).astype(x_BTNH.dtype)


def query_scale(position_BT: Array, config: MistralConfig) -> Array | None:
    """[B, T]: what the rotated queries are multiplied by, float32 in every model; None: by nothing."""
    scaling = query_scaling(config)
    if scaling is None:
        return None
    turns_BT = position_BT // scaling.original_length
    return 1 + scaling.beta * jnp.log(1 + turns_BT.astype(jnp.float32))


@in_one_program
def scale_queries(q_BTNH: Array, scale_BT: Array | None) -> Array:
    """The rotated queries, each times its scale, in float32."""
    if scale_BT is None:
        return q_BTNH
    return (q_BTNH.astype(jnp.float32) * scale_BT[:, :, None, None]).astype(q_BTNH.dtype)


class Attention(nnx.Module):
    """Grouped-query attention: project, rotate, remember, attend, project back."""

    def __init__(
        self, config: MistralConfig, window: int | None, implementation: str | None, *, param_dtype: Any, rngs: nnx.Rngs
    ) -> None:
        D, N, H = config.hidden_size, config.num_attention_heads, config.head_dim
        K = config.num_key_value_heads
        options = {"param_dtype": param_dtype, "rngs": rngs, "std": config.initializer_range}
        self.q_proj = Linear(D, N * H, **options)
        self.k_proj = Linear(D, K * H, **options)
        self.v_proj = Linear(D, K * H, **options)
        self.o_proj = Linear(N * H, D, **options)
        self.head_dim = H
        self.window = window
        self.implementation = check_implementation(implementation)
        self.dropout = config.attention_dropout

    def __call__(
        self,
        x_BTD: Array,
        step: Step,
        past: tuple[Array, ...] | None = None,
        *,
        rngs: Array | None = None,
    ) -> tuple[Array, Array | None, tuple[Array, ...] | None]:
        B, T, _ = x_BTD.shape
        q_BTNH = rotate(self.q_proj(x_BTD).reshape(B, T, -1, self.head_dim), *step.cos_sin)
        q_BTNH = scale_queries(q_BTNH, step.query_scale_BT)
        k_BTKH = rotate(self.k_proj(x_BTD).reshape(B, T, -1, self.head_dim), *step.cos_sin)
        v_BTKH = self.v_proj(x_BTD).reshape(B, T, -1, self.head_dim)
        where, visibility = step.sight or look(step, self.window, past)
        k_BSKH, v_BSKH, kept = remember(k_BTKH, v_BTKH, past, where)
        o_BTNH, weights = attend(
            q_BTNH,
            k_BSKH,
            v_BSKH,
            visibility,
            implementation="eager" if step.output_attentions else self.implementation,
            dropout=self.dropout,
            rngs=rngs,
        )
        return self.o_proj(o_BTNH.reshape(B, T, -1)), weights, kept


class MLP(nnx.Module):
    """SwiGLU: down(silu(gate(x)) * up(x))."""

    def __init__(self, config: MistralConfig, *, param_dtype: Any, rngs: nnx.Rngs) -> None:
        options = {"param_dtype": param_dtype, "rngs": rngs, "std": config.initializer_range}
        self.gate_proj = Linear(config.hidden_size, config.intermediate_size, **options)
        self.up_proj = Linear(config.hidden_size, config.intermediate_size, **options)
        self.down_proj = Linear(config.intermediate_size, config.hidden_size, **options)

    def __call__(self, x_BTD: Array) -> Array:
        return self.down_proj(silu(self.gate_proj(x_BTD)) * self.up_proj(x_BTD))


@in_one_program
def silu(x: Array) -> Array:
    """x / (1 + exp(-x)) in float32, rounded once."""
    return jax.nn.silu(x.astype(jnp.float32)).astype(x.dtype)


class DecoderLayer(nnx.Module):
    """x + attention(norm(x)), then x + mlp(norm(x))."""

    def __init__(
        self, config: MistralConfig, window: int | None, implementation: str | None, *, param_dtype: Any, rngs: nnx.Rngs
    ) -> None:
        self.input_layernorm = RMSNorm(config.hidden_size, config.rms_norm_eps, param_dtype=param_dtype)
        self.self_attn = Attention(config, window, implementation, param_dtype=param_dtype, rngs=rngs)
        self.post_attention_layernorm = RMSNorm(config.hidden_size, config.rms_norm_eps, param_dtype=param_dtype)
        self.mlp = MLP(config, param_dtype=param_dtype, rngs=rngs)

    def __call__(
        self,
        x_BTD: Array,
        step: Step,
        past: tuple[Array, ...] | None = None,
        *,
        rngs: Array | None = None,
    ) -> tuple[Array, Array | None, tuple[Array, ...] | None]:
        h, weights, kept = self.self_attn(self.input_layernorm(x_BTD), step, past, rngs=rngs)
        x_BTD = x_BTD + h
        return x_BTD + self.mlp(self.post_attention_layernorm(x_BTD)), weights, kept


class Head(Linear):
    """A Linear whose product is accumulated and returned in float32."""

    def __call__(self, x: Array) -> Array:
        return product(x, self.weight[...], None if self.bias is None else self.bias[...], dtype=jnp.float32)

    @property
    def factor(self) -> Array | None:
        """The W of x W^T, where a call is nothing else; None where it is."""
        return self.weight[...] if type(self) is Head and self.bias is None else None


@in_one_program
def last_token(attention_mask_BT: Array) -> Array:
    """[B]: the column of each row's last real token, 0 where a row has none."""
    column = jnp.arange(attention_mask_BT.shape[1])[None]
    return jnp.where(attention_mask_BT.astype(bool), column, 0).max(1)
