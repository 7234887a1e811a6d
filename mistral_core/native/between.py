"""What a layer computes between its products, in C: the norm, the rotation and the gate, by address.

A framework's own operations read and write memory several times for each; `between.c` does once.
"""

from __future__ import annotations

import ctypes
import functools
from typing import Any

from . import library

SOURCE = "between.c"

_I, _L, _P, _F = ctypes.c_int, ctypes.c_int64, ctypes.c_void_p, ctypes.c_float


@functools.cache
def functions() -> Any:
    """`mistral_rms_norm`, `mistral_rotate` and `mistral_gated` of C; None where there is no compiler.

    The first call compiles them.
    """
    code, _ = library.bound(SOURCE, ())
    if code is not None:
        code.mistral_rms_norm.argtypes = [_P, _I, _P, _P, _P, _L, _L, _F, _I]
        code.mistral_rotate.argtypes = [_P, _I, _P, _P, _P, _P, _L, _L, _L, _I]
        code.mistral_gated.argtypes = [_P, _I, _P, _P, _P, _L, _L, _I]
    return code
