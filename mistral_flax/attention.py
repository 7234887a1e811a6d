"""Attention: who sees whom, the formula, and the fused kernels that compute the same.

Axis letters are those of the legend in `mistral_core.config`.

Every implementation takes q [B, T, N, H], k and v [B, S, K, H] and who sees whom, and returns the output [B, T, N, H]
and, where it has them, the weights [B, N, T, S].
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import Array

from mistral_core.errors import UnsupportedFeatureError

from .attention_in_c import attend_in_c, is_for_c
from .blocks import Blocks, attend_by_blocks, cut
from .mask import mask
from .programs import in_one_program

INTERPRET = False
"""Whether splash runs in Pallas' interpreter, which works anywhere and is slow: for tests."""
LANES = 128
"""What a TPU kernel's sizes are multiples of."""


class Visibility(NamedTuple):
    """Who sees whom: what an attention mask is made of."""

    query_order_BT: Array
    """[B, T]: the number of real tokens before each query in its row, -1 for padding."""
    key_order_BS: Array
    """[B, S]: the same of each key."""
    window: int | None = None
    """How many keys a query sees, itself included; None: all."""
    document_ids_BT: Array | None = None
    """[B, T]: the packed document of each token, where queries and keys are the same tokens."""
    mask_BTS: Array | None = None
    """The mask where it is made already, for several layers."""
    blocks: Blocks | None = None
    """How a long text is cut."""


@in_one_program
def attention_mask(visibility: Visibility) -> Array:
    """[B, T, S] bool: a query sees the W keys up to itself, counted in real tokens, of its own document."""
    query_order_BT, key_order_BS, window, document_ids_BT, mask_BTS, _ = visibility
    if mask_BTS is not None:
        return mask_BTS
    documents = None if document_ids_BT is None else (document_ids_BT, document_ids_BT)
    return mask(query_order_BT, key_order_BS, window, documents)


def prepared(visibility: Visibility, implementation: str) -> Visibility:
    """The same, with what layers share made: the mask, or the blocks of a long text, where attention reads them."""
    if implementation in BY_BLOCKS:
        blocks = cut(*visibility[:4], always=implementation == "blocked")
        if blocks is not None:
            return visibility._replace(blocks=blocks)
    return visibility._replace(mask_BTS=attention_mask(visibility)) if implementation in MASKED else visibility


def attend(
    q_BTNH: Array,
    k_BSKH: Array,
    v_BSKH: Array,
    visibility: Visibility,
    *,
    implementation: str = "eager",
    dropout: float = 0.0,
    rngs: Array | None = None,
) -> tuple[Array, Array | None]:
    """softmax(q k / sqrt(H)) v [B, T, N, H], and the weights [B, N, T, S] where the implementation has them."""
    if rngs is None:
        dropout = 0.0
    if implementation == "dot_product" and not dropout and _is_for_c(q_BTNH, k_BSKH, v_BSKH, visibility):
        *orders, window, document_ids_BT = visibility[:4]
        told = {"window": window, "document_ids_BT": document_ids_BT}
        return attend_in_c(q_BTNH, k_BSKH, v_BSKH, *orders, **told, formula=_formula), None
    if dropout and implementation == "splash":  # which has prepared nothing that the formula reads
        implementation, visibility = "dot_product", prepared(visibility, "dot_product")
    if visibility.blocks is not None:
        told = {"dropout": dropout, "rngs": rngs}
        return attend_by_blocks(q_BTNH, k_BSKH, v_BSKH, visibility.blocks, _of_block, **told), None
    # on a CPU, JAX has no kernel of float16, and for one query the formula takes about two thirds of the kernel's time
    better_eager = jax.default_backend() == "cpu" and (q_BTNH.dtype == jnp.float16 or q_BTNH.shape[1] == 1)
    if better_eager or (dropout and implementation in WITHOUT_DROPOUT):
        implementation = "eager"
    return ATTENTION[implementation](q_BTNH, k_BSKH, v_BSKH, visibility, dropout, rngs)


def _is_for_c(q_BTNH: Array, k_BSKH: Array, v_BSKH: Array, visibility: Visibility) -> bool:
    """Whether C may compute this; a block has a mask alone."""
    return visibility.query_order_BT.shape[1] == q_BTNH.shape[1] and is_for_c(q_BTNH, k_BSKH, v_BSKH)


def _formula(
    q_BTNH: Array, k_BSKH: Array, v_BSKH: Array, query_order_BT: Array, key_order_BS: Array,
    document_ids_BT: Array | None = None, *, window: int | None,
) -> Array:  # fmt: skip
    """What C computes, in JAX' own operations."""
    visibility = prepared(Visibility(query_order_BT, key_order_BS, window, document_ids_BT), "dot_product")
    if visibility.blocks is not None:
        return attend_by_blocks(q_BTNH, k_BSKH, v_BSKH, visibility.blocks, _of_block)
    return attend_dot_product(q_BTNH, k_BSKH, v_BSKH, visibility, 0.0, None)[0]


def _of_block(
    q_BCNH: Array, k_BSKH: Array, v_BSKH: Array, mask_BCS: Array, dropout: float, rngs: Array | None
) -> Array:
    """The output of a block's queries."""
    nobody = jnp.zeros((*mask_BCS.shape[:1], 0), jnp.int32)
    told = {"implementation": "dot_product", "dropout": dropout, "rngs": rngs}
    return attend(q_BCNH, k_BSKH, v_BSKH, Visibility(nobody, nobody, mask_BTS=mask_BCS), **told)[0]


@functools.partial(in_one_program, static_argnames="dropout")
def attend_eager(
    q_BTNH: Array, k_BSKH: Array, v_BSKH: Array, visibility: Visibility, dropout: float, rngs: Array | None
) -> tuple[Array, Array | None]:
    """The formula: scores and softmax in float32, weights in the dtype of v."""
    B, T, N, H = q_BTNH.shape
    K = k_BSKH.shape[2]
    q_BTKGH = q_BTNH.reshape(B, T, K, N // K, H)
    visible = attention_mask(visibility)[:, None, None]
    highest = jax.lax.Precision.HIGHEST if q_BTNH.dtype == jnp.float32 else None
    scores = jnp.einsum("BTKGH,BSKH->BKGTS", q_BTKGH, k_BSKH, precision=highest, preferred_element_type=jnp.float32)
    scores = scores * H**-0.5
    # the lowest float, not -inf: a row that sees nothing stays finite, in its gradient too
    weights = jax.nn.softmax(jnp.where(visible, scores, jnp.finfo(scores.dtype).min), axis=-1)
    weights = jnp.where(visible, weights, 0).astype(v_BSKH.dtype)
    dropped = weights
    if dropout:
        dropped = jnp.where(jax.random.bernoulli(rngs, 1 - dropout, weights.shape), weights / (1 - dropout), 0)
    o_BTKGH = jnp.einsum("BKGTS,BSKH->BTKGH", dropped, v_BSKH, precision=highest, preferred_element_type=jnp.float32)
    return o_BTKGH.astype(v_BSKH.dtype).reshape(B, T, N, H), weights.reshape(B, N, T, -1)


@functools.partial(in_one_program, static_argnames="dropout")
def attend_dot_product(
    q_BTNH: Array, k_BSKH: Array, v_BSKH: Array, visibility: Visibility, dropout: float, rngs: Array | None
) -> tuple[Array, Array | None]:
    """jax.nn.dot_product_attention, on one CPU the same by rows; it never returns the weights.

    Below float32 it mixes dtypes, in its gradient while that is compiled: JAX's strict switch has the formula instead.
    """
    if q_BTNH.dtype != jnp.float32 and jax.config.jax_numpy_dtype_promotion == "strict":
        return attend_eager(q_BTNH, k_BSKH, v_BSKH, visibility, dropout, rngs)[0], None
    visible_BTS = attention_mask(visibility)
    if jax.default_backend() == "cpu" and jax.device_count() == 1:  # XLA cuts heads over devices, and no rows of them
        o = _by_rows(q_BTNH, k_BSKH, v_BSKH, visible_BTS)
    else:
        # without it, float32 is multiplied in less on GPUs and TPUs
        with jax.default_matmul_precision("highest" if q_BTNH.dtype == jnp.float32 else None):
            o = jax.nn.dot_product_attention(q_BTNH, k_BSKH, v_BSKH, mask=visible_BTS[:, None])
    # for a row that sees nothing it is the mean of v
    return jnp.where(visible_BTS.any(-1)[:, :, None, None], o, 0), None


def _by_rows(q_BTNH: Array, k_BSKH: Array, v_BSKH: Array, visible_BTS: Array) -> Array:
    """The formula with all queries of a key/value head as rows of one product: XLA for CPUs then moves no scores.

    X are the T tokens' G queries of a head. A row that sees nothing has the mean of v.
    """
    B, T, N, H = q_BTNH.shape
    K = k_BSKH.shape[2]
    G = N // K
    highest = jax.lax.Precision.HIGHEST if q_BTNH.dtype == jnp.float32 else None
    q_BKXH = q_BTNH.reshape(B, T, K, G, H).swapaxes(1, 2).reshape(B, K, T * G, H)
    k_BKSH, v_BKSH = k_BSKH.swapaxes(1, 2), v_BSKH.swapaxes(1, 2)
    scores = jnp.einsum("BKXH,BKSH->BKXS", q_BKXH, k_BKSH, precision=highest, preferred_element_type=jnp.float32)
    scores = H**-0.5 * scores.reshape(B, K, T, G, -1)
    scores = jnp.where(visible_BTS[:, None, :, None], scores, jnp.finfo(scores.dtype).min)
    weights = jax.nn.softmax(scores, axis=-1).astype(v_BSKH.dtype).reshape(B, K, T * G, -1)
    o_BKXH = jnp.einsum("BKXS,BKSH->BKXH", weights, v_BKSH, precision=highest, preferred_element_type=jnp.float32)
    return o_BKXH.astype(v_BSKH.dtype).reshape(B, K, T, G, H).swapaxes(1, 2).reshape(B, T, N, H)


def attend_splash(
    q_BTNH: Array, k_BSKH: Array, v_BSKH: Array, visibility: Visibility, dropout: float, rngs: Array | None
) -> tuple[Array, Array | None]:
    """Pallas' splash attention for TPU: blocks outside the window are skipped. One query is dot_product's.

    Each row is sorted by order, padding in front: real tokens end at the last column, so that the distance of two
    tokens is the distance of their columns, whatever the padding, and one static mask serves all rows.
    """
    from jax.experimental.pallas.ops.tpu import splash_attention as splash

    T, H = q_BTNH.shape[1], q_BTNH.shape[3]
    if T == 1:
        return attend_dot_product(q_BTNH, k_BSKH, v_BSKH, visibility, dropout, rngs)
    query_order_BT, key_order_BS, window, document_ids_BT, *_ = visibility
    documents_BT = jnp.zeros_like(query_order_BT) if document_ids_BT is None else document_ids_BT
    documents_BS = jnp.zeros_like(key_order_BS) if document_ids_BT is None else document_ids_BT
    query_column_BT, key_column_BS = query_order_BT.argsort(axis=1), key_order_BS.argsort(axis=1)
    query_size = _block_multiple(T)
    key_size = max(_block_multiple(k_BSKH.shape[1]), query_size)  # so that each query has a key beside it
    q = _right_aligned(q_BTNH * H**-0.5, query_column_BT, query_size)
    k, v = (_right_aligned(x, key_column_BS, key_size) for x in (k_BSKH, v_BSKH))
    segments = splash.SegmentIds(
        _segments(query_order_BT, documents_BT, query_column_BT, query_size),
        _segments(key_order_BS, documents_BS, key_column_BS, key_size),
    )
    with jax.default_matmul_precision("highest" if q_BTNH.dtype == jnp.float32 else None):
        o_BNTH = jax.vmap(_splash_kernel(q.shape[1], query_size, key_size, window, INTERPRET))(q, k, v, segments)
    o_BTNH = o_BNTH.swapaxes(1, 2)[:, query_size - T :, :, :H]
    o_BTNH = jnp.take_along_axis(o_BTNH, query_column_BT.argsort(axis=1)[:, :, None, None], axis=1)
    return jnp.where((query_order_BT >= 0)[:, :, None, None], o_BTNH, 0), None


def _right_aligned(x_BSKH: Array, column_BS: Array, size: int) -> Array:
    """[B, K, size, H'], the columns in this order at the end, zeros in front; H rounded up to whole lanes."""
    x_BSKH = jnp.take_along_axis(x_BSKH, column_BS[:, :, None, None], axis=1)
    _, S, _, H = x_BSKH.shape
    return jnp.pad(x_BSKH, ((0, 0), (size - S, 0), (0, 0), (0, -H % LANES))).swapaxes(1, 2)


def _segments(order_BS: Array, documents_BS: Array, column_BS: Array, size: int) -> Array:
    """[B, size]: what sees only itself: a document, or the padding."""
    padding = jnp.iinfo(jnp.int32).min
    segment_BS = jnp.where(order_BS >= 0, documents_BS, padding).astype(jnp.int32)
    segment_BS = jnp.take_along_axis(segment_BS, column_BS, axis=1)
    return jnp.pad(segment_BS, ((0, 0), (size - segment_BS.shape[1], 0)), constant_values=padding)


def _block_multiple(length: int) -> int:
    """The length rounded up to whole blocks."""
    return -(-length // _block(length)) * _block(length)


def _block(length: int) -> int:
    """How many columns the kernel takes at once: 512, or the whole of a shorter text."""
    return min(4 * LANES, -(-length // LANES) * LANES)


@functools.lru_cache(maxsize=64)
def _splash_kernel(
    heads: int, query_size: int, key_size: int, window: int | None, interpret: bool
) -> Callable[..., Array]:
    """The kernel of one row: q [N, T, H], k and v [K, S, H], the last query beside the last key."""
    from jax.experimental.pallas.ops.tpu import splash_attention as splash

    left = None if window is None else window - 1
    mask = splash.LocalMask((query_size, key_size), (left, 0), key_size - query_size)
    query, key = _block(query_size), _block(key_size)
    blocks = splash.BlockSizes(
        block_q=query, block_kv=key, block_kv_compute=key, block_q_dkv=query, block_kv_dkv=key,
        block_kv_dkv_compute=key, block_q_dq=query, block_kv_dq=key,
    )  # fmt: skip
    with jax.ensure_compile_time_eval():  # the kernel outlives the trace that asks for it first
        return splash.make_splash_mha(
            splash.MultiHeadMask([mask] * heads),
            block_sizes=blocks,
            head_shards=1,
            q_seq_shards=1,
            interpret=interpret,
        )


ATTENTION = {
    "eager": attend_eager,
    "dot_product": attend_dot_product,
    "blocked": attend_dot_product,
    "splash": attend_splash,
}
ALIASES = {"sdpa": "dot_product"}
WITHOUT_DROPOUT = ("dot_product", "blocked")
MASKED = ("eager", "dot_product", "blocked")
"""Those that read the mask."""
BY_BLOCKS = ("dot_product", "blocked")
"""Those that take a long text by blocks of queries: where that pays, and always."""


def default() -> str:
    """The attention implementation where none is asked for: splash on one TPU, whose kernel XLA cannot divide."""
    return "splash" if jax.default_backend() == "tpu" and jax.device_count() == 1 else "dot_product"


def check_implementation(implementation: str | None) -> str:
    """The name of an attention implementation that runs here; None is the default.

    Raises UnsupportedFeatureError for an unknown one, and for splash without a TPU.
    """
    name = default() if implementation is None else ALIASES.get(implementation, implementation)
    if name not in ATTENTION:
        raise UnsupportedFeatureError(
            f"attn_implementation must be one of {', '.join(ATTENTION)}, got {implementation!r}."
        )
    if name not in available():
        raise UnsupportedFeatureError(
            f"attn_implementation 'splash' is a TPU kernel, JAX runs on {jax.default_backend()} here; "
            "use attn_implementation='dot_product' or 'eager'."
        )
    return name


def available() -> tuple[str, ...]:
    """The attention implementations that run here."""
    return tuple(name for name in ATTENTION if name != "splash" or INTERPRET or jax.default_backend() == "tpu")
