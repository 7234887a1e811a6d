"""Attention of many queries in C, by address: of one layer, and of whatever keys there are.

It is what `whole_prompt.c` computes of a prompt: by blocks of queries, which meet only keys that one of them sees, with
a running softmax (https://arxiv.org/abs/1805.02867), so that a window costs what it shows. Its gradients are computed
by such blocks as well, from scores that are computed again (https://arxiv.org/abs/2307.08691).
"""

from __future__ import annotations

import ctypes
import functools
from typing import Any

from . import library
from .whole_step import TALL, TYPES, prompts

_I32, _I64, _P = ctypes.c_int32, ctypes.c_int64, ctypes.c_void_p
GRADIENTS = "attention_gradients.c"
MISSING = 1
"""What C gives where a key that is seen is not there."""


class _Seeing(ctypes.Structure):
    _fields_ = [
        *((name, _I64) for name in ("B", "T", "S", "N", "K", "H", "window")), ("type", _I32), ("threads", _I32),
        *((name, _P) for name in ("q", "k", "v", "y", "order", "key_order", "document")),
    ]  # fmt: skip


class _Gradients(ctypes.Structure):
    _fields_ = [
        ("of", _Seeing), *((name, _P) for name in ("dy", "dq", "dk", "dv", "order", "key_order", "document"))
    ]  # fmt: skip


def available(type: int, head_dim: int) -> bool:
    """Whether attention is computed here, of numbers of a type of `library.TYPES` and heads of this size.

    The first call compiles it.
    """
    there = type in TYPES.values() and head_dim % TALL == 0 and prompts(type) is not None
    return there and _gradients() is not None


@functools.cache
def _gradients() -> Any:
    """The library of C, or None where there is no compiler."""
    code, _ = library.bound(GRADIENTS, ())
    if code is not None:
        code.mistral_attention_gradients.argtypes = [_P, _P]
    return code


def addresses() -> tuple[int, int] | None:
    """Where attention and its gradients are, for the libraries of frameworks; None where none is computed here."""
    code, gradients = prompts(TYPES["float32"]), _gradients()
    if code is None or gradients is None:
        return None
    of = (code.mistral_attend, gradients.mistral_attention_gradients)
    attend, back = (ctypes.cast(function, _P).value or 0 for function in of)
    return attend, back


def attend(
    type: int, sizes: tuple[int, int, int, int, int, int], window: int | None, q: int, k: int, v: int, y: int,
    order: int, key_order: int, document: int | None = None, *, threads: int = 0, parallel: int | None = None,
) -> bool:  # fmt: skip
    """Write y [B, T, N, H] = softmax(q k / sqrt(H)) v: True; False, and no y, where a key that is seen is not there.

    `sizes` are B, T, S, N, K, H; q [B, T, N, H], k and v [B, S, K, H] are addresses of numbers of a type, in one piece,
    `order` [B, T] and `key_order` [B, S] of int64: how many real tokens of the row are before each query and each key,
    -1 for none; `document` [B, S] is the document of each token, where queries and keys are the same. Raises
    MemoryError.
    """
    shown = -1 if window is None else window
    given = _Seeing(*sizes, shown, type, threads, q, k, v, y, order, key_order, document)
    code = prompts(type).mistral_attend(ctypes.byref(given), parallel)
    if code != MISSING:
        library.check(code)
    return code == 0


def gradients(
    type: int, sizes: tuple[int, int, int, int, int, int], window: int | None, q: int, k: int, v: int, y: int, dy: int,
    dq: int, dk: int, dv: int, order: int, key_order: int, document: int | None = None, *, threads: int = 0,
    parallel: int | None = None,
) -> None:  # fmt: skip
    """Write dq, dk and dv, the gradients of a loss of which dy [B, T, N, H] is the gradient in what `attend` gave, y.

    The rest is as there, but orders and documents are int32. Raises MemoryError.
    """
    shown = -1 if window is None else window
    of = _Seeing(*sizes, shown, type, threads, q, k, v, y)
    given = _Gradients(of, dy, dq, dk, dv, order, key_order, document)
    library.check(_gradients().mistral_attention_gradients(ctypes.byref(given), parallel))
