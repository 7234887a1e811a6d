"""Attention: who sees whom, the formula, and the fused kernels that compute the same.

Axis letters are those of the legend in `mistral_core.config`.

Every implementation takes q [B, T, N, H], k and v [B, S, K, H] and who sees whom, and returns the output [B, T, N, H]
and, where it has them, the weights [B, N, T, S].
"""

from __future__ import annotations

import functools
import importlib.util
import warnings
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention.flex_attention import create_block_mask, flex_attention

from mistral_core.errors import MissingExtraError, UnsupportedFeatureError

from .arrays import without_autocast
from .attention_in_c import Told, attend_in_c, is_for_c, told_of
from .bands import Run, attend_in_bands, runs_of
from .blocks import Blocks, attend_by_blocks, cut
from .cache import has_values
from .mask import in_window, mask
from .native import unwatched


class Visibility(NamedTuple):
    """Who sees whom: what an attention mask is made of."""

    query_order_BT: Tensor
    """[B, T]: the number of real tokens before each query in its row, -1 for padding."""
    key_order_BS: Tensor
    """[B, S]: the same of each key."""
    window: int | None = None
    """How many keys a query sees, itself included; None: all."""
    document_ids_BT: Tensor | None = None
    """[B, T]: the packed document of each token, where queries and keys are the same tokens."""
    mask_BTS: Tensor | None = None
    """The mask where it is made already, for several layers."""
    blocks: Blocks | None = None
    """How a long text is cut."""
    runs: tuple[Run, ...] | None = None
    """The tokens of a long text that stand in order, where a kernel takes each such run."""
    is_causal: bool = False
    """Whether it is known that every query sees each key up to itself: queries and keys are the same tokens."""
    in_c: bool = False
    """Whether C may be asked, by `attention_in_c.may_be_for_c`."""
    told: Told | None = None
    """What it is told, where it is asked."""


def attention_mask(visibility: Visibility) -> Tensor:
    """[B, T, S] bool: a query sees the W keys up to itself, counted in real tokens, of its own document."""
    query_order_BT, key_order_BS, window, document_ids_BT, mask_BTS, *_ = visibility
    if mask_BTS is not None:
        return mask_BTS
    documents = None if document_ids_BT is None else (document_ids_BT, document_ids_BT)
    return mask(query_order_BT, key_order_BS, window, documents)


def prepared(visibility: Visibility, implementation: str) -> Visibility:
    """The same, with what layers share made: the mask, or the blocks of a long text, where attention reads them."""
    if implementation in BY_BLOCKS:
        if implementation != "blocked":
            told = told_of(*visibility[:4]) if visibility.in_c else None
            if told is not None:
                return visibility._replace(told=told)
            if _is_causal(visibility):
                return visibility._replace(is_causal=True)
            runs = runs_of(*visibility[:4])
            if runs is not None:
                return visibility._replace(runs=runs)
        blocks = cut(*visibility[:4], always=implementation == "blocked")
        if blocks is not None:
            return visibility._replace(blocks=blocks)
    return visibility._replace(mask_BTS=attention_mask(visibility)) if implementation in MASKED else visibility


def _is_causal(visibility: Visibility) -> bool:
    """Whether all tokens are real, see themselves alone, as one text, and the window shows all; as far as is known."""
    order_BT, key_order_BS, window, document_ids_BT, *_ = visibility
    T = order_BT.shape[1]
    if order_BT is not key_order_BS or document_ids_BT is not None or not has_values(order_BT):
        return False
    return T > 1 and (window is None or window >= T) and bool((order_BT >= 0).all())


def attend(
    q_BTNH: Tensor,
    k_BSKH: Tensor,
    v_BSKH: Tensor,
    visibility: Visibility,
    *,
    implementation: str = "eager",
    dropout: float = 0.0,
) -> tuple[Tensor, Tensor | None]:
    """softmax(q k / sqrt(H)) v [B, T, N, H], and the weights [B, N, T, S] where the implementation has them."""
    if dropout and implementation in WITHOUT_DROPOUT:
        implementation = "eager"
    return ATTENTION[implementation](q_BTNH, k_BSKH, v_BSKH, visibility, dropout)


def attend_eager(
    q_BTNH: Tensor, k_BSKH: Tensor, v_BSKH: Tensor, visibility: Visibility, dropout: float
) -> tuple[Tensor, Tensor | None]:
    """The formula: scores and softmax in float32, weights in the dtype of v."""
    B, T, N, H = q_BTNH.shape
    K = k_BSKH.shape[2]
    q_BTKGH = q_BTNH.reshape(B, T, K, N // K, H)
    visible = attention_mask(visibility)[:, None, None]
    with without_autocast(q_BTNH):  # which would round the scores
        scores = torch.einsum("BTKGH,BSKH->BKGTS", q_BTKGH.float(), k_BSKH.float()) * H**-0.5
        # the lowest float, not -inf: a row that sees nothing stays finite, in its gradient too
        weights = torch.softmax(scores.masked_fill(~visible, torch.finfo(scores.dtype).min), dim=-1)
        # what is returned is what is used, so that gradients reach it
        weights_BNTS = weights.masked_fill(~visible, 0).to(v_BSKH.dtype).reshape(B, N, T, -1)
        dropped = F.dropout(weights_BNTS, dropout) if dropout else weights_BNTS
        o_BTKGH = torch.einsum("BKGTS,BSKH->BTKGH", dropped.reshape(B, K, N // K, T, -1), v_BSKH)
    return o_BTKGH.reshape(B, T, N, H), weights_BNTS


def attend_sdpa(
    q_BTNH: Tensor, k_BSKH: Tensor, v_BSKH: Tensor, visibility: Visibility, dropout: float
) -> tuple[Tensor, Tensor | None]:
    """torch's fused scaled_dot_product_attention; it never builds the weights."""
    B, T, N, H = q_BTNH.shape
    if visibility.told is not None:
        *orders, window, document_ids_BT = visibility.told
        if not dropout and is_for_c(q_BTNH, k_BSKH, v_BSKH):
            given, told = (q_BTNH, k_BSKH, v_BSKH, *orders), {"window": window, "document_ids_BT": document_ids_BT}
            o_BTNH = attend_in_c(*given, **told, formula=_formula)
            if o_BTNH is not None:
                return o_BTNH, None
        visibility = prepared(visibility._replace(in_c=False, told=None), DEFAULT)
    if visibility.runs is not None:
        if not dropout and unwatched(q_BTNH, k_BSKH, v_BSKH):
            return attend_in_bands(q_BTNH, k_BSKH, v_BSKH, visibility.runs, visibility.window), None
        visibility = visibility._replace(blocks=cut(*visibility[:4]))
    if visibility.is_causal and dropout and q_BTNH.device.type == "cpu":  # where no kernel drops weights
        visibility = visibility._replace(is_causal=False, blocks=cut(*visibility[:4]))
    if visibility.blocks is not None:

        def of_block(q: Tensor, k: Tensor, v: Tensor, mask_BCS: Tensor) -> Tensor:
            return attend_sdpa(q, k, v, Visibility(*visibility[:2], mask_BTS=mask_BCS), dropout)[0]

        return attend_by_blocks(q_BTNH, k_BSKH, v_BSKH, visibility.blocks, of_block, dropout=dropout), None
    k, v = k_BSKH.transpose(1, 2), v_BSKH.transpose(1, 2)
    if visibility.is_causal:
        q = q_BTNH.transpose(1, 2)
        o = F.scaled_dot_product_attention(q, k, v, is_causal=True, dropout_p=dropout, **_grouped(q, k))
        return o.transpose(1, 2), None
    visible_BTS = attention_mask(visibility)
    if T == 1:  # the query heads of a group as queries of their one key/value head: it is read once
        q_BKGH = q_BTNH.reshape(B, -1, N // k.shape[1], H)
        o = F.scaled_dot_product_attention(q_BKGH, k, v, attn_mask=visible_BTS[:, None], dropout_p=dropout)
        return o.reshape(B, 1, N, H), None
    q = q_BTNH.transpose(1, 2)
    o = F.scaled_dot_product_attention(q, k, v, attn_mask=visible_BTS[:, None], dropout_p=dropout, **_grouped(q, k))
    return o.transpose(1, 2), None


def _formula(
    q_BTNH: Tensor, k_BSKH: Tensor, v_BSKH: Tensor, query_order_BT: Tensor, key_order_BS: Tensor,
    document_ids_BT: Tensor | None = None, *, window: int | None,
) -> Tensor:  # fmt: skip
    """What C computes, as the formula, of whose gradients there are gradients too."""
    visibility = Visibility(query_order_BT, key_order_BS, window, document_ids_BT)
    blocks = cut(*visibility[:4])

    def of_block(q: Tensor, k: Tensor, v: Tensor, mask_BCS: Tensor | None = None) -> Tensor:
        return attend_eager(q, k, v, visibility._replace(mask_BTS=mask_BCS), 0.0)[0]

    return attend_by_blocks(q_BTNH, k_BSKH, v_BSKH, blocks, of_block) if blocks else of_block(q_BTNH, k_BSKH, v_BSKH)


def _grouped(q_BNTH: Tensor, k_BKSH: Tensor) -> dict[str, bool]:
    """The option for groups; a branch, because under torch.compile the comparison is a symbolic bool."""
    return {"enable_gqa": True} if q_BNTH.shape[1] != k_BKSH.shape[1] else {}


def attend_flex(
    q_BTNH: Tensor, k_BSKH: Tensor, v_BSKH: Tensor, visibility: Visibility, dropout: float
) -> tuple[Tensor, Tensor | None]:
    """torch's FlexAttention: blocks that no query sees are skipped. Uncompiled on a CPU it is the plain formula."""
    wanted = torch.is_grad_enabled() and any(x.requires_grad for x in (q_BTNH, k_BSKH, v_BSKH))
    if wanted and q_BTNH.device.type == "cpu":  # it has no backward there
        return attend_eager(q_BTNH, k_BSKH, v_BSKH, visibility, dropout)

    query_order_BT, key_order_BS, window, document_ids_BT, *_ = visibility

    def visible(b: Tensor, head: Tensor, t: Tensor, s: Tensor) -> Tensor:
        seen = in_window(query_order_BT[b, t], key_order_BS[b, s], window)
        return seen if document_ids_BT is None else seen & (document_ids_BT[b, t] == document_ids_BT[b, s])

    B, T = query_order_BT.shape
    blocks = create_block_mask(visible, B, None, T, key_order_BS.shape[1], device=q_BTNH.device)
    q, k, v = (x.transpose(1, 2) for x in (q_BTNH, k_BSKH, v_BSKH))
    o = _flex(q_BTNH.device.type)(q, k, v, block_mask=blocks, **_grouped(q, k))
    return o.transpose(1, 2), None


def _flex(device_type: str) -> Callable[..., Tensor]:
    """FlexAttention as it should be called here: inside a compiled model, compiled alone on a GPU, or plain."""
    if torch.compiler.is_compiling():
        return flex_attention
    return _plain_flex if device_type == "cpu" else _compiled_flex()


def _plain_flex(*arrays: Tensor, **options: Any) -> Tensor:
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="flex_attention called without torch.compile")
        return flex_attention(*arrays, **options)


@functools.cache
def _compiled_flex() -> Callable[..., Tensor]:
    return torch.compile(flex_attention, dynamic=True)


def attend_flash(
    q_BTNH: Tensor, k_BSKH: Tensor, v_BSKH: Tensor, visibility: Visibility, dropout: float
) -> tuple[Tensor, Tensor | None]:
    """flash-attn's kernel over packed sequences: padding is left out, each document is a sequence of its own.

    Raises UnsupportedFeatureError in a precision other than float16 and bfloat16, and for documents in pieces.
    """
    from flash_attn import flash_attn_varlen_func

    if q_BTNH.dtype not in (torch.float16, torch.bfloat16):
        raise UnsupportedFeatureError(
            f"flash_attention_2 computes in float16 and bfloat16, the model is {q_BTNH.dtype}; load it with "
            "dtype='bfloat16' or use attn_implementation='sdpa'."
        )
    query_order_BT, key_order_BS, window, document_ids_BT, *_ = visibility
    real_BT = query_order_BT >= 0
    column_BS = key_order_BS.argsort(dim=1, stable=True)  # a ring holds its keys out of order
    sorted_order_BS = key_order_BS.gather(1, column_BS)
    row_B1 = torch.arange(len(column_BS), device=column_BS.device)[:, None]
    real_BS = sorted_order_BS >= 0
    if document_ids_BT is None:
        query_starts, key_starts = _starts(real_BT.sum(1)), _starts(real_BS.sum(1))
    else:  # without a cache: queries and keys are the same tokens
        query_starts = key_starts = _starts(_run_lengths(real_BT, document_ids_BT))
    o = flash_attn_varlen_func(
        q_BTNH[real_BT],
        k_BSKH[row_B1, column_BS][real_BS],
        v_BSKH[row_B1, column_BS][real_BS],
        query_starts,
        key_starts,
        int(query_starts.diff().max()),
        int(key_starts.diff().max()),
        dropout_p=dropout,
        causal=True,
        window_size=(-1, -1) if window is None else (window - 1, 0),
    )
    o_BTNH = torch.zeros_like(q_BTNH)
    return o_BTNH.index_put((real_BT,), o), None


def _starts(length: Tensor) -> Tensor:
    """Where each packed sequence begins, and where the last one ends, int32."""
    return F.pad(length.cumsum(0), (1, 0)).to(torch.int32)


def _run_lengths(real_BT: Tensor, document_ids_BT: Tensor) -> Tensor:
    """How many real tokens each document of each row has, in the order of the text."""
    row = torch.arange(len(real_BT), device=real_BT.device)[:, None].expand_as(real_BT)
    token_of = torch.stack([row[real_BT], document_ids_BT[real_BT]], dim=1)
    runs, lengths = token_of.unique_consecutive(dim=0, return_counts=True)
    if len(runs.unique(dim=0)) < len(runs):
        raise UnsupportedFeatureError(
            "document_ids: a document goes on after another one; flash_attention_2 takes documents in one piece, "
            "use attn_implementation='sdpa'."
        )
    return lengths


ATTENTION = {
    "eager": attend_eager,
    "sdpa": attend_sdpa,
    "blocked": attend_sdpa,
    "flex": attend_flex,
    "flash_attention_2": attend_flash,
}
DEFAULT = "sdpa"
ALIASES = {"flex_attention": "flex"}
WITHOUT_DROPOUT = ("flex",)
MASKED = ("eager", "sdpa", "blocked")
"""Those that read the mask."""
BY_BLOCKS = ("sdpa", "blocked")
"""Those that take a long text by blocks of queries: where that pays, and always."""


def check_implementation(implementation: str | None) -> str:
    """The name of an attention implementation that runs here; None is the default.

    Raises UnsupportedFeatureError for an unknown one, MissingExtraError for one whose package is not installed.
    """
    name = DEFAULT if implementation is None else ALIASES.get(implementation, implementation)
    if name not in ATTENTION:
        raise UnsupportedFeatureError(
            f"attn_implementation must be one of {', '.join(ATTENTION)}, got {implementation!r}."
        )
    if name == "flash_attention_2" and importlib.util.find_spec("flash_attn") is None:
        raise MissingExtraError(
            "attn_implementation 'flash_attention_2' needs the package flash-attn and an NVIDIA GPU; "
            "pip install flash-attn --no-build-isolation, or use attn_implementation='sdpa'."
        )
    return name


def available() -> tuple[str, ...]:
    """The attention implementations that run here."""
    return tuple(name for name in ATTENTION if name != "flash_attention_2" or importlib.util.find_spec("flash_attn"))
