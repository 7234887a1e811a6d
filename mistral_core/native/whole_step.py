"""One step of decoding in one call of C: few new tokens through all layers of a model on a CPU, and into its cache.

What a framework runs as a hundred operations a layer takes longer to call than to compute, for one token.
`whole_step.c` computes the same formulas from the same memory: weights and caches are a framework's own arrays.
"""

from __future__ import annotations

import ctypes
import functools
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np

from ..config import MistralConfig
from ..config.rope import query_scaling, rotary_table
from ..generation.cache_layout import overwrites_visible
from ..parameters import LM_HEAD, parameters
from ..quantization.matrix import PackedMatrix
from . import library

SOURCE = "whole_step.c"
TYPES = {"float32": 0, "bfloat16": 1}
"""The dtypes of models that are computed."""
CACHE_TYPES = {**TYPES, "int8": 3}
FEW_TOKENS = 16
"""The most new tokens of all rows together that are faster here than in a framework's products of many rows."""

_I32, _I64, _P, _F = ctypes.c_int32, ctypes.c_int64, ctypes.c_void_p, ctypes.c_float


class _StepWeight(ctypes.Structure):
    _fields_ = [
        ("kind", _I32), ("scale_type", _I32), ("rounded", _I32), ("unused", _I32),
        ("codes", _P), ("scale", _P), ("zero", _P), ("O", _I64), ("I", _I64), ("high", _I64), ("wide", _I64),
    ]  # fmt: skip


_MATRICES = {
    "q": "self_attn.q_proj", "k": "self_attn.k_proj", "v": "self_attn.v_proj", "o": "self_attn.o_proj",
    "gate": "mlp.gate_proj", "up": "mlp.up_proj", "down": "mlp.down_proj",
}  # fmt: skip


class _StepLayer(ctypes.Structure):
    _fields_ = [
        ("input_norm", _P), ("post_norm", _P), *((name, _StepWeight) for name in _MATRICES), ("window", _I64),
    ]  # fmt: skip


class _StepModel(ctypes.Structure):
    _fields_ = [
        *((name, _I64) for name in ("D", "N", "K", "H", "F", "V", "L")), ("type", _I32), ("threads", _I32),
        ("eps", _F), ("unused", _I32), ("layers", _P), ("norm", _P), ("embedding", _StepWeight), ("head", _StepWeight),
    ]  # fmt: skip


class _StepCache(ctypes.Structure):
    _fields_ = [
        ("type", _I32), ("unused", _I32), ("slots", _P), ("keys", _P), ("values", _P), ("key_scales", _P),
        ("value_scales", _P),
    ]  # fmt: skip


class _StepTokens(ctypes.Structure):
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


class WholeStep:
    """A language model's weights as C reads them, and its step. They are read where they are: keep them unchanged."""

    def __init__(
        self, config: MistralConfig, weights: Mapping[str, np.ndarray | PackedMatrix], *,
        activations: Mapping[str, str | None], dtype: str, memory: Callable[[Any], np.ndarray] = np.asarray,
        threads: int = 0, parallel: int | None = None,
    ) -> None:  # fmt: skip
        """`weights` are a language model's by canonical name, packed or floats of `dtype`; a tied head has none.

        `activations` says of packed ones how what they multiply is rounded. `memory` gives that of a cache's arrays.
        `parallel` is the address of another library's threads, `rows.c`'s own without it.
        """
        self.config, self._memory, self._parallel = config, memory, parallel
        self._table, self._scaling = rotary_table(config), query_scaling(config)
        self._frequency = np.array(self._table.inverse_frequency, np.float32)
        self._kept: list[Any] = []
        layers = (_StepLayer * config.num_hidden_layers)()
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
        self._model = _StepModel(
            config.hidden_size, config.num_attention_heads, config.num_key_value_heads, config.head_dim,
            config.intermediate_size, config.vocab_size, config.num_hidden_layers, TYPES[dtype], threads,
            config.rms_norm_eps, 0, ctypes.addressof(layers), self._floats(weights["model.norm.weight"]),
            embedding, head,
        )  # fmt: skip
        self._kept.append(layers)

    def takes(self, ids_BT: np.ndarray, kept: Sequence[Sequence[np.ndarray]], capacity: int | None) -> bool:
        """Whether a step of these ids is computed here: few, into rings as C has them, and none that one of them must
        still see is overwritten. `kept` is what `step` takes.
        """
        if ids_BT.ndim != 2 or ids_BT.size > FEW_TOKENS or capacity is None:
            return False
        arrays = [x for xs in kept for x in xs]
        if not all(x.flags.c_contiguous for x in arrays) or arrays[0].dtype.name not in CACHE_TYPES:
            return False
        return not any(
            overwrites_visible(x.shape[1], x.shape[1], ids_BT.shape[1], window, capacity)
            for x, window in zip(kept[0], self.config.layer_windows, strict=True)
        )

    def tried(self, ids_BT: np.ndarray, mask_BT: np.ndarray, cache: Any, *, every: bool) -> np.ndarray | None:
        """What `step` gives, with the new tokens in the memory of a backend's cache; None where `takes` says no.

        Columns of padding in front are left out: a short prompt is computed here, whatever width it was given.
        """
        if not every:
            first = int(mask_BT.any(axis=0).argmax())
            ids_BT, mask_BT = ids_BT[:, first:], mask_BT[:, first:]
        kept = [[self._memory(x) for x in xs] for xs in cache._kept()]
        if not self.takes(ids_BT, kept, cache.capacity):
            return None
        return self.step(ids_BT, mask_BT, self._memory(cache.length), kept, every=every)

    def step(
        self, ids_BT: np.ndarray, mask_BT: np.ndarray, length_B: np.ndarray, kept: Sequence[Sequence[np.ndarray]],
        *, every: bool = False,
    ) -> np.ndarray:  # fmt: skip
        """Logits [B, T, V], or [B, 1, V] of the last column, float32, of new tokens after `length_B` of each row.

        `kept` are each layer's keys and values [B, R, K, H], and of int8 their scales [B, R, K]: the new tokens' are
        written into their memory. Raises InputError for an id that is none, and MemoryError.
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
        sizes = np.array([x.shape[1] for x in kept[0]], np.int64)
        pointers = [_addresses(each) for each in kept]
        type = CACHE_TYPES[kept[0][0].dtype.name]
        cache = _StepCache(type, 0, sizes.ctypes.data, *map(ctypes.addressof, pointers))
        tokens = _StepTokens(
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

    def _weight(self, given: np.ndarray | PackedMatrix, activations: str | None) -> _StepWeight:
        if isinstance(given, PackedMatrix):
            kind, rows, columns, high, wide, rounded = library._numbers(given, activations)
            arrays, addresses = library._arrays(given)
            self._kept.append(arrays)
            codes, scale, scale_type, zero = addresses
            return _StepWeight(kind, scale_type, rounded, 0, codes, scale, zero, rows, columns, high, wide)
        array = np.ascontiguousarray(given)
        self._kept.append(array)
        rows, columns = array.shape
        number = library.TYPES[array.dtype.name]
        return _StepWeight(
            library.FLOATS, number, 0, 0, array.ctypes.data, None, None, rows, columns, 1, max(columns, 1)
        )


def _addresses(arrays: Sequence[np.ndarray]) -> Any:
    return (_P * max(len(arrays), 1))(*(x.ctypes.data for x in arrays))


def of_model(
    model: Any, *, dtype: str, array: Callable[[str], np.ndarray], memory: Callable[[Any], np.ndarray],
    threads: int = 0, parallel: int | None = None,
) -> WholeStep | None:  # fmt: skip
    """The step of a language model that is made of its own parts alone; None where its arrays are not as C has them.

    `array` gives the memory of a parameter by its canonical name, `memory` that of an array of the framework.
    """
    if dtype not in TYPES or not available():
        return None
    packed = {name: part.packed for name, part in model.packed_parts()}
    weights: dict[str, np.ndarray | PackedMatrix] = {}
    for name, _ in parameters(model.config, "MistralForCausalLM"):
        if name in packed:
            codes, scale, zero, kind, shape, block, _ = packed[name]
            zero = None if zero is None else memory(zero)
            weights[name] = PackedMatrix(kind, memory(codes), memory(scale), zero, shape, block)
            continue
        weights[name] = found = array(name)
        if found.dtype.name != dtype or not found.flags.c_contiguous:
            return None
    rounded = {name: part.activations for name, part in packed.items()}
    return WholeStep(
        model.config, weights, activations=rounded, dtype=dtype, memory=memory, threads=threads, parallel=parallel
    )
