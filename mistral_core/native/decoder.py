"""One step of decoding in one call of C: few new tokens through all layers of a model on a CPU, and into its cache.

What a framework runs as a hundred operations a layer takes longer to call than to compute, for one token.
`decoder.c` computes the same formulas from the same memory: weights and caches are a framework's own arrays.
"""

from __future__ import annotations

import ctypes
import functools
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from ..config import MistralConfig
from ..config.rope import query_scaling, rotary_table
from ..generation.cache_layout import overwrites_visible
from ..parameters import LM_HEAD, parameters
from ..quantization.matrix import PackedMatrix
from . import library

SOURCE = "decoder.c"
TYPES = {"float32": 0, "bfloat16": 1}
"""The dtypes of models that are computed."""
CACHE_TYPES = {**TYPES, "int8": 3}
MOST_TOKENS = 16
"""The most new tokens of all rows together that are faster here than in a framework's products of many rows."""

_I32, _I64, _P, _F = ctypes.c_int32, ctypes.c_int64, ctypes.c_void_p, ctypes.c_float


class _Weight(ctypes.Structure):
    _fields_ = [
        ("kind", _I32), ("scale_type", _I32), ("rounded", _I32), ("unused", _I32),
        ("codes", _P), ("scale", _P), ("zero", _P), ("O", _I64), ("I", _I64), ("high", _I64), ("wide", _I64),
    ]  # fmt: skip


_MATRICES = {
    "q": "self_attn.q_proj", "k": "self_attn.k_proj", "v": "self_attn.v_proj", "o": "self_attn.o_proj",
    "gate": "mlp.gate_proj", "up": "mlp.up_proj", "down": "mlp.down_proj",
}  # fmt: skip


class _Layer(ctypes.Structure):
    _fields_ = [
        ("input_norm", _P), ("post_norm", _P), *((name, _Weight) for name in _MATRICES), ("window", _I64),
    ]  # fmt: skip


class _Model(ctypes.Structure):
    _fields_ = [
        *((name, _I64) for name in ("D", "N", "K", "H", "F", "V", "L")), ("type", _I32), ("threads", _I32),
        ("eps", _F), ("unused", _I32), ("layers", _P), ("norm", _P), ("embedding", _Weight), ("head", _Weight),
    ]  # fmt: skip


class _Cache(ctypes.Structure):
    _fields_ = [
        ("type", _I32), ("unused", _I32), ("slots", _P), ("keys", _P), ("values", _P), ("key_scales", _P),
        ("value_scales", _P),
    ]  # fmt: skip


class _Tokens(ctypes.Structure):
    _fields_ = [
        ("B", _I64), ("T", _I64), ("ids", _P), ("order", _P), ("length", _P), ("cos", _P), ("sin", _P),
        ("query_scale", _P), ("every", _I64),
    ]  # fmt: skip


@functools.cache
def _step() -> Any:
    """The function of C, or None where there is no compiler."""
    code, _ = library.bound(SOURCE, ())
    if code is None:
        return None
    code.mistral_step.argtypes = [_P] * 5
    return code.mistral_step


def available() -> bool:
    """Whether there is a compiled step; the first call compiles it."""
    return _step() is not None


class Decoder:
    """A language model's weights as C reads them, and its step. They are read where they are: keep them unchanged."""

    def __init__(
        self, config: MistralConfig, weights: Mapping[str, np.ndarray | PackedMatrix], *,
        activations: Mapping[str, str | None], dtype: str, threads: int = 0, parallel: int | None = None,
    ) -> None:  # fmt: skip
        """`weights` are a language model's by canonical name, packed or floats of `dtype`; a tied head has none.

        `activations` says of packed ones how what they multiply is rounded. `parallel` is the address of another
        library's threads, `rows.c`'s own without it.
        """
        self.config, self._parallel = config, parallel
        self._table, self._scaling = rotary_table(config), query_scaling(config)
        self._frequency = np.array(self._table.inverse_frequency, np.float32)
        self._kept: list[Any] = []
        layers = (_Layer * config.num_hidden_layers)()
        for index, window in enumerate(config.layer_windows):
            prefix, layer = f"model.layers.{index}.", layers[index]
            layer.input_norm = self._floats(weights[f"{prefix}input_layernorm.weight"])
            layer.post_norm = self._floats(weights[f"{prefix}post_attention_layernorm.weight"])
            layer.window = -1 if window is None else window
            for name, module in _MATRICES.items():
                full = f"{prefix}{module}.weight"
                setattr(layer, name, self._weight(weights[full], activations.get(full)))
        embedding = self._weight(weights["model.embed_tokens.weight"], None)
        head = self._weight(weights[LM_HEAD], activations.get(LM_HEAD)) if LM_HEAD in weights else embedding
        self._model = _Model(
            config.hidden_size, config.num_attention_heads, config.num_key_value_heads, config.head_dim,
            config.intermediate_size, config.vocab_size, config.num_hidden_layers, TYPES[dtype], threads,
            config.rms_norm_eps, 0, ctypes.addressof(layers), self._floats(weights["model.norm.weight"]),
            embedding, head,
        )  # fmt: skip
        self._kept.append(layers)

    def takes(self, slots: Sequence[int], batch: int, columns: int, capacity: int | None) -> bool:
        """Whether a step of so many columns is computed here: few tokens, and none that another must still see lost."""
        if batch * columns > MOST_TOKENS or capacity is None:
            return False
        windows = self.config.layer_windows
        return not any(
            overwrites_visible(size, size, columns, window, capacity)
            for size, window in zip(slots, windows, strict=True)
        )

    def step(
        self, ids_BT: np.ndarray, mask_BT: np.ndarray, length_B: np.ndarray, *, slots: Sequence[int], dtype: str,
        keys: Sequence[int], values: Sequence[int], key_scales: Sequence[int] = (), value_scales: Sequence[int] = (),
        every: bool = False,
    ) -> np.ndarray:  # fmt: skip
        """Logits [B, T, V], or [B, 1, V] of the last column, float32, of new tokens after `length_B` of each row.

        `keys` and `values` are addresses of each layer's ring [B, R, K, H] of `dtype`, into which the new ones are
        written; with int8 `key_scales` and `value_scales` are those of its scales [B, R, K]. `slots` are R.
        Raises InputError for an id that is none, and MemoryError.
        """
        B, T = ids_BT.shape
        length_B = np.ascontiguousarray(length_B, np.int64)
        order_BT = np.where(mask_BT != 0, length_B[:, None] + np.cumsum(mask_BT, 1) - 1, -1).astype(np.int64)
        position_BT = np.maximum(order_BT, 0)
        angle = position_BT.astype(np.float32)[..., None] * self._frequency
        factor = np.float32(self._table.attention_factor)
        cos, sin = np.cos(angle) * factor, np.sin(angle) * factor
        scale_BT = None
        if self._scaling is not None:
            turns_BT = (position_BT // self._scaling.original_length).astype(np.float32)
            scale_BT = (1 + np.float32(self._scaling.beta) * np.log(1 + turns_BT)).astype(np.float32)
        ids_BT = np.ascontiguousarray(ids_BT, np.int64)
        sizes = np.array(slots, np.int64)
        pointers = [_addresses(each) for each in (keys, values, key_scales, value_scales)]
        cache = _Cache(CACHE_TYPES[dtype], 0, sizes.ctypes.data, *map(ctypes.addressof, pointers))
        tokens = _Tokens(
            B, T, ids_BT.ctypes.data, order_BT.ctypes.data, length_B.ctypes.data, cos.ctypes.data, sin.ctypes.data,
            None if scale_BT is None else scale_BT.ctypes.data, int(every),
        )  # fmt: skip
        logits = np.empty((B, T if every else 1, self.config.vocab_size), np.float32)
        given = (ctypes.byref(each) for each in (self._model, cache, tokens))
        library.check(_step()(*given, logits.ctypes.data, self._parallel))
        return logits

    def _floats(self, array: np.ndarray | PackedMatrix) -> int:
        """The address of a vector as float32."""
        assert isinstance(array, np.ndarray)
        wide = np.ascontiguousarray(array, np.float32)
        self._kept.append(wide)
        return wide.ctypes.data

    def _weight(self, given: np.ndarray | PackedMatrix, activations: str | None) -> _Weight:
        if isinstance(given, PackedMatrix):
            kind, rows, columns, high, wide, rounded = library._numbers(given, activations)
            arrays, addresses = library._arrays(given)
            self._kept.append(arrays)
            codes, scale, scale_type, zero = addresses
            return _Weight(kind, scale_type, rounded, 0, codes, scale, zero, rows, columns, high, wide)
        array = np.ascontiguousarray(given)
        self._kept.append(array)
        rows, columns = array.shape
        number = library.TYPES[array.dtype.name]
        return _Weight(library.FLOATS, number, 0, 0, array.ctypes.data, None, None, rows, columns, 1, max(columns, 1))


def _addresses(each: Sequence[int]) -> Any:
    return (_P * max(len(each), 1))(*each)


def wanted(config: MistralConfig, architecture: str = "MistralForCausalLM") -> list[str]:
    """The canonical names of the weights that a `Decoder` takes."""
    return [name for name, _ in parameters(config, architecture)]
