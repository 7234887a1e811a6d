"""One step of decoding in one call of C: new tokens through all layers of a model on a CPU, and into its cache.

What a framework runs as a hundred operations a layer takes longer to call than to compute, for one token.
`whole_step.c` computes the same formulas from the same memory: weights and caches are a framework's own arrays. A
prompt is `whole_prompt.c`'s: in float32 on a processor with AVX-512, in bfloat16 on one with AMX.
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
from ..parameters import LM_HEAD, shapes
from ..quantization.matrix import PackedMatrix
from . import library

SOURCE, PROMPTS = "whole_step.c", "whole_prompt.c"
TYPES = {"float32": 0, "bfloat16": 1}
"""The dtypes of models that are computed."""
CACHE_TYPES = {**TYPES, "int8": 3}
FEW_TOKENS = 16
"""The most new tokens of all rows together that are faster here than in a framework's products of many rows."""
SEVERAL_TOKENS = 64
"""The same where products are by tiles; of one new token a row there may be any number of rows."""
CHUNK = 512
"""About how many tokens of a prompt go through all layers at once: what is between them stays in the caches."""
LARGE_CHUNK = 2048
"""The same where another library multiplies, which gains by more rows than caches hold."""
TALL = 32
"""What the sizes of a model are multiples of where tiles compute it."""

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
        ("gemm", _P),
    ]  # fmt: skip


class _StepCache(ctypes.Structure):
    _fields_ = [
        ("type", _I32), ("unused", _I32), ("slots", _P), ("keys", _P), ("values", _P), ("key_scales", _P),
        ("value_scales", _P),
    ]  # fmt: skip


class _StepTokens(ctypes.Structure):
    _fields_ = [
        ("B", _I64), ("T", _I64), ("ids", _P), ("order", _P), ("length", _P), ("cos", _P), ("sin", _P),
        ("query_scale", _P), ("begin", _P), ("every", _I64),
    ]  # fmt: skip


@functools.cache
def prompts(type: int) -> Any:
    """The functions of C for many tokens of models of a type, or None where there is no compiler, or it has no way."""
    code, _ = library.bound(PROMPTS, ())
    if code is None or not code.mistral_takes_prompts(type):
        return None
    code.mistral_prompt.argtypes = [_P, _P, _P, _I64, _P, _P]
    code.mistral_layers.argtypes = [_P, _P, _P, _I64, _P, _P, _P]
    code.mistral_attend.argtypes = [_P, _P]
    return code


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
        threads: int = 0, parallel: int | None = None, gemm: int | None = None,
    ) -> None:  # fmt: skip
        """`weights` are a language model's by canonical name, packed or floats of `dtype`; a tied head has none.

        `activations` says of packed ones how what they multiply is rounded. `memory` gives that of a cache's arrays.
        `parallel` is the address of another library's threads, `rows.c`'s own without it; `gemm` that of a BLAS' sgemm
        that multiplies many rows faster, where the model is in float32.
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
            embedding, head, gemm if dtype == "float32" else None,
        )  # fmt: skip
        self._kept.append(layers)
        sizes = (
            config.hidden_size, config.head_dim, config.intermediate_size, config.vocab_size,
            config.num_key_value_heads * config.head_dim,
        )  # fmt: skip
        whole = not any(size % TALL for size in sizes) and not any(activations.values())
        self._dtype, self._is_of_tiles = dtype, whole

    def takes(
        self, ids_BT: np.ndarray, kept: Sequence[Sequence[np.ndarray]], capacity: int | None, *, every: bool = False
    ) -> bool:
        """Whether a step of these ids is computed here: few, into rings as C has them, and none that one of them must
        still see is overwritten. `kept` is what `step` takes.
        """
        if ids_BT.size > FEW_TOKENS and not self._takes_several(ids_BT, every):
            return False
        if not self._is_laid_out(ids_BT, kept, capacity):
            return False
        return not any(
            overwrites_visible(x.shape[1], x.shape[1], ids_BT.shape[1], window, capacity)
            for x, window in zip(kept[0], self.config.layer_windows, strict=True)
        )

    def _takes_several(self, ids_BT: np.ndarray, every: bool) -> bool:
        """Whether more than few ids are a step: of one token a row, or of which all logits are wanted."""
        is_step = ids_BT.shape[1] == 1 or (every and ids_BT.size <= SEVERAL_TOKENS)
        return is_step and self.is_by_tiles()

    def takes_prompt(self, ids_BT: np.ndarray, kept: Sequence[Sequence[np.ndarray]], capacity: int | None) -> bool:
        """Whether a prompt of these ids is computed here: of a model of whole tiles, and into a cache of its dtype."""
        if not self.is_by_tiles() or not self._is_laid_out(ids_BT, kept, capacity) or ids_BT.shape[1] == 1:
            return False  # a token of each row would pay for the order of tiles of all keys
        return kept[0][0].dtype.name == self._dtype

    def is_by_tiles(self) -> bool:
        """Whether many rows are multiplied here by tiles: of a model of whole ones, on a processor that has a way."""
        return self._is_of_tiles and prompts(TYPES[self._dtype]) is not None

    def _is_laid_out(self, ids_BT: np.ndarray, kept: Sequence[Sequence[np.ndarray]], capacity: int | None) -> bool:
        """Whether the arrays of a cache are as C has them."""
        arrays = [x for xs in kept for x in xs]
        if ids_BT.ndim != 2 or capacity is None or arrays[0].dtype.name not in CACHE_TYPES:
            return False
        return all(x.flags.c_contiguous for x in arrays)

    def tried(self, ids_BT: np.ndarray, mask_BT: np.ndarray, cache: Any, *, every: bool) -> np.ndarray | None:
        """What `step` or `prompt` gives, with the new tokens in the memory of a backend's cache; None where neither
        takes them.

        Columns of padding in front are left out: a prompt is computed here, whatever width it was given.
        """
        if not every:
            first = int(mask_BT.any(axis=0).argmax())
            ids_BT, mask_BT = ids_BT[:, first:], mask_BT[:, first:]
        kept = [[self._memory(x) for x in xs] for xs in cache._kept()]
        if self.takes(ids_BT, kept, cache.capacity, every=every):
            return self.step(ids_BT, mask_BT, self._memory(cache.length), kept, every=every)
        if not every and self.takes_prompt(ids_BT, kept, cache.capacity):
            return self.prompt(ids_BT, mask_BT, self._memory(cache.length), kept)
        return None

    def prompt(
        self, ids_BT: np.ndarray, mask_BT: np.ndarray, length_B: np.ndarray, kept: Sequence[Sequence[np.ndarray]]
    ) -> np.ndarray:
        """Logits [B, 1, V] of the last column, float32, of many new tokens after `length_B` of each row.

        The rest is `step`'s; what a ring has no room for any more is seen by the new tokens that must, and then gone.
        """
        B, T = ids_BT.shape
        count = min(-(-B * T // self._chunk()), T)
        pieces = zip(*(np.array_split(x, count, axis=1) for x in (ids_BT, mask_BT)), strict=True)
        chunks, length_B = [], np.asarray(length_B, np.int64)
        for ids, mask in pieces:
            chunks.append(self._tokens(ids, mask, length_B, every=False))
            length_B = length_B + (mask != 0).sum(1)
        cache, arrays = _cache(kept)
        tokens = (_StepTokens * len(chunks))(*(each for each, _ in chunks))
        logits = np.empty((B, 1, self.config.vocab_size), np.float32)
        library.check(
            prompts(TYPES[self._dtype]).mistral_prompt(
                ctypes.byref(self._model), ctypes.byref(cache), tokens, len(chunks), logits.ctypes.data, self._parallel
            )
        )
        del arrays
        return logits

    def layers(
        self, x_BTD: np.ndarray, order_BT: np.ndarray, length_B: np.ndarray, cos_BTH: np.ndarray, sin_BTH: np.ndarray,
        query_scale_BT: np.ndarray | None, begin_BT: np.ndarray | None, kept: Sequence[Sequence[np.ndarray]],
        states: Sequence[np.ndarray] = (),
    ) -> None:  # fmt: skip
        """Hidden states [B, T, D] of many new tokens through all layers, in place, where `is_by_tiles`.

        `order_BT` int64 is the number of real tokens before each in its row, -1 for padding; `length_B` is how many of
        them are in the rings. cos and sin [B, T, H/2] and the scales of queries are float32. `begin_BT` int64 is the
        order of the first token of the document of each, of packed ones. `kept` is `step`'s, of the model's dtype:
        layers may share one ring where nothing in it is to stay. What each layer but the last one gives is written into
        `states` [B, T, D], where there are any. Raises MemoryError.
        """
        B, T, _ = x_BTD.shape
        rows, count = max(self._chunk() // T, 1), -(-T // self._chunk())
        for some in (slice(begin, begin + rows) for begin in range(0, B, rows)):
            cache, arrays = _cache([[x[some] for x in xs] for xs in kept])
            chunks, length = [], np.asarray(length_B[some], np.int64)
            for columns in np.array_split(np.arange(T), count):
                part = some, slice(columns[0], columns[-1] + 1)
                scale, begin = (None if x is None else x[part] for x in (query_scale_BT, begin_BT))
                order, cos, sin = (x[part] for x in (order_BT, cos_BTH, sin_BTH))
                chunks.append(_told(None, order, length, cos, sin, scale, begin, every=False))
                length = length + np.sum(order >= 0, axis=1)
            tokens = (_StepTokens * len(chunks))(*(each for each, _ in chunks))
            to = (_P * len(states))(*(x[some].ctypes.data for x in states)) if states else None
            library.check(
                prompts(TYPES[self._dtype]).mistral_layers(
                    ctypes.byref(self._model), ctypes.byref(cache), tokens, len(chunks), x_BTD[some].ctypes.data,
                    to, self._parallel,
                )
            )  # fmt: skip
            del arrays

    def _chunk(self) -> int:
        """About how many tokens go through layers at once."""
        return LARGE_CHUNK if self._model.gemm else CHUNK

    def step(
        self, ids_BT: np.ndarray, mask_BT: np.ndarray, length_B: np.ndarray, kept: Sequence[Sequence[np.ndarray]],
        *, every: bool = False,
    ) -> np.ndarray:  # fmt: skip
        """Logits [B, T, V], or [B, 1, V] of the last column, float32, of new tokens after `length_B` of each row.

        `kept` are each layer's keys and values [B, R, K, H], and of int8 their scales [B, R, K]: the new tokens' are
        written into their memory. Raises InputError for an id that is none, and MemoryError.
        """
        B, T = ids_BT.shape
        tokens, of_tokens = self._tokens(ids_BT, mask_BT, length_B, every=every)
        cache, of_cache = _cache(kept)
        logits = np.empty((B, T if every else 1, self.config.vocab_size), np.float32)
        given = (ctypes.byref(each) for each in (self._model, cache, tokens))
        library.check(_step()(*given, logits.ctypes.data, self._parallel))
        del of_tokens, of_cache
        return logits

    def _tokens(
        self, ids_BT: np.ndarray, mask_BT: np.ndarray, length_B: np.ndarray, *, every: bool
    ) -> tuple[_StepTokens, list[np.ndarray | None]]:
        """New tokens as C is told of them, and the arrays to keep meanwhile."""
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
        return _told(np.ascontiguousarray(ids_BT, np.int64), order_BT, length_B, cos, sin, scale_BT, None, every=every)

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


def _told(
    ids_BT: np.ndarray | None, order_BT: np.ndarray, length_B: np.ndarray, cos_BTH: np.ndarray, sin_BTH: np.ndarray,
    query_scale_BT: np.ndarray | None, begin_BT: np.ndarray | None, *, every: bool,
) -> tuple[_StepTokens, list[np.ndarray | None]]:  # fmt: skip
    """New tokens as C is told of them, and the arrays to keep meanwhile."""
    arrays = [
        None if x is None else np.ascontiguousarray(x)
        for x in (ids_BT, order_BT, length_B, cos_BTH, sin_BTH, query_scale_BT, begin_BT)
    ]
    addresses = (None if x is None else x.ctypes.data for x in arrays)
    return _StepTokens(*order_BT.shape, *addresses, int(every)), arrays


def _cache(kept: Sequence[Sequence[np.ndarray]]) -> tuple[_StepCache, list[Any]]:
    """A cache as C is told of it, and what to keep meanwhile."""
    sizes = np.array([x.shape[1] for x in kept[0]], np.int64)
    pointers = [(_P * max(len(arrays), 1))(*(x.ctypes.data for x in arrays)) for arrays in kept]
    type = CACHE_TYPES[kept[0][0].dtype.name]
    return _StepCache(type, 0, sizes.ctypes.data, *map(ctypes.addressof, pointers)), [sizes, pointers]


def of_model(
    model: Any, *, dtype: str, array: Callable[[str], np.ndarray], memory: Callable[[Any], np.ndarray],
    threads: int = 0, parallel: int | None = None, gemm: int | None = None,
) -> WholeStep | None:  # fmt: skip
    """The step of a language model, or the layers of any, that is made of its own parts alone; None where its arrays
    are not as C has them.

    `array` gives the memory of a parameter by its canonical name, `memory` that of an array of the framework.
    """
    if dtype not in TYPES or not available():
        return None
    packed = {name: part.packed for name, part in model.packed_parts()}
    weights: dict[str, np.ndarray | PackedMatrix] = {}
    for name, wanted in shapes(model.config, model.architecture).items():
        if name in packed:
            codes, scale, zero, kind, shape, block, _ = packed[name]
            zero = None if zero is None else memory(zero)
            weights[name] = PackedMatrix(kind, memory(codes), memory(scale), zero, shape, block)
        else:
            weights[name] = found = array(name)
            if found.dtype.name != dtype or not found.flags.c_contiguous:
                return None
        if tuple(weights[name].shape) != wanted:  # somebody has cut it smaller
            return None
    rounded = {name: part.activations for name, part in packed.items()}
    return WholeStep(
        model.config, weights, activations=rounded, dtype=dtype, memory=memory, threads=threads, parallel=parallel,
        gemm=gemm,
    )  # fmt: skip
