"""What a backend gives the decode driver, and how rows of tokens get into its cache.

An engine takes ids with a mask; what is padding lives nowhere. Prompts are cut into pieces, so that memory is bounded,
and where shapes are compiled the pieces and the caches come in few sizes.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple, Protocol

import numpy as np

from ..arrays import Array
from ..config import MistralConfig
from ..errors import InputError
from ..outputs import GenerateOutput
from ..reference import sampling
from .cache_layout import cache_dtype, grown_layout
from .hooks import Hooks
from .options import GenerationConfig
from .sampling import Rule, Values, numbers

LOG = logging.getLogger("mistral.decoding")
CHUNK_TOKENS = 512
"""Columns of a prompt that are computed at once where nothing else is asked for, each number of them compiled."""
PLAIN_CHUNK_TOKENS = 2048
"""The same of an engine that compiles nothing: products of more rows are faster, and less is attended to beside."""
CAPACITY_TOKENS = 512
"""The smallest cache of an engine that compiles for each shape; larger ones are powers of two."""
LOOKBACK_TOKENS = 64
"""Tokens that a rolling cache can go back, for a turn that takes some of the last one back, and for guesses."""


class Chosen(NamedTuple):
    """What an engine's step gives: `mistral_core.reference.sampling.Choice`, on the host."""

    token: Array
    """[B, T] or, where the rule asks for the last column only, [B, 1]."""
    scores: Array | None = None
    candidates: tuple[Array, Array, Array] | None = None
    logits: Array | None = None
    """Beside `token`, where the rule asks: the model's own [B, T, V] or [B, 1, V] float32."""

    @classmethod
    def of(cls, choice: Any, to_numpy: Callable[[Any], Array]) -> Chosen:
        """A backend's choice on the host."""
        scores, logits = (None if x is None else to_numpy(x) for x in (choice.scores, choice.logits))
        candidates = None
        if choice.candidates is not None:
            noisy, scored, tokens = map(to_numpy, choice.candidates)
            candidates = noisy, scored, tokens
        return cls(to_numpy(choice.token), scores, candidates, logits)

    @classmethod
    def likeliest(cls, logits: Array, values: Values) -> Chosen:
        """The likeliest token of each place of logits [B, T, V], as the reference chooses it."""
        return cls(sampling.choose(logits, Rule(), values).token.astype(np.int32))


class Engine(Protocol):
    """A model's step, compiled or not, with NumPy at its border; the cache is the backend's own."""

    config: MistralConfig
    fixed_prompts: bool
    """Whether each number of columns costs a compilation: then prompts are padded to few."""
    fixed_caches: bool
    """Whether each size of the cache costs one: then it comes in few."""

    def allocate(self, batch: int, capacity: int, *, rolling: bool, lookback: int, dtype: str) -> Any:
        """An empty cache; its dtype "auto" is the model's."""

    def step(self, cache: Any, ids_BT: Array, mask_BT: Array, rule: Rule, values: Values) -> tuple[Chosen, Any]:
        """The tokens chosen after the last column, or each, and the cache with the new ones in it.

        `ids_BT` may be embeddings [B, T, D] instead.
        """

    def loop(
        self, cache: Any, token_B: Array, ended_B: Array, rule: Rule, values: Values, ends: tuple[int, ...],
        steps: int,
    ) -> tuple[Array, Any]:  # fmt: skip
        """The tokens [B, steps] of so many steps in one compiled loop, which ends early when every row has."""

    def stops(self, here: bool) -> bool:
        """Whether the decoding ends after a step: because it does here, or in a process that computes the same rows.

        Every such process asks after each step, so that what only one of them knows, its clock or that its caller has
        enough, ends all of them at the same token.
        """

    def random_seed(self) -> int:
        """A seed from the framework's own generator, where it has one; asked before anything is computed."""

    def look(self, ids_BT: Array, mask_BT: Array, embeds_BED: Array | None) -> tuple[tuple[Any, ...], tuple[Any, ...]]:
        """Hidden states and attention weights of a text, without a cache, as the framework's arrays.

        Embeddings stand before the ids.
        """

    def array(self, x: Array) -> Any:
        """An array of the framework, on the model's device."""

    def numpy(self, x: Any) -> Array:
        """What the framework, or Python, calls an array, in NumPy."""


class Prompt(NamedTuple):
    """What is to be continued: checked ids, mask and options."""

    ids: Array
    """[B, T] int64; T is 0 where there are embeddings alone."""
    mask: Array
    generation: GenerationConfig
    hooks: Hooks = Hooks()
    embeds: Array | None = None
    """[B, E, D]: what is computed instead of the ids."""
    embeds_mask: Array | None = None
    """[B, E]."""

    @property
    def rows(self) -> list[list[int]]:
        """The real tokens of each row."""
        return [row[real != 0].tolist() for row, real in zip(self.ids, self.mask, strict=True)]

    @property
    def columns(self) -> int:
        """How many columns of the prompt are computed."""
        return int((self.ids if self.embeds is None else self.embeds).shape[1])

    @property
    def context(self) -> list[Any]:
        """What is computed of each row: its tokens, or its embeddings [n, D]."""
        if self.embeds is None or self.embeds_mask is None:
            return list(self.rows)
        return [row[real != 0] for row, real in zip(self.embeds, self.embeds_mask, strict=True)]


def begin(engine: Engine, prompt: Prompt, past: Any) -> tuple[Any, list[Any]]:
    """A cache with room for all that is to come, and what is missing of each row: at least the last token.

    Raises InputError for a cache of another batch, model or dtype, or that has rolled on too far to go back.
    """
    config, generation, context = engine.config, prompt.generation, prompt.context
    dtype = generation.cache_dtype
    capacity = max(map(len, context)) + generation.max_new_tokens
    if engine.fixed_caches:
        capacity = min(max(CAPACITY_TOKENS, 1 << (capacity - 1).bit_length()), config.max_position_embeddings)
    rolling = generation.cache != "full"
    lookback = max(LOOKBACK_TOKENS, generation.prompt_lookup_num_tokens or 0, generation.num_assistant_tokens)
    cache = past.past_key_values if isinstance(past, GenerateOutput) else past
    if cache is not None:
        if prompt.embeds is not None:
            raise InputError("past_key_values: not with inputs_embeds; give the embeddings of the whole text.")
        length, dtype = _checked_lengths(config, cache, len(context)), _checked_dtype(cache, dtype)
        common = [min(len(row) - 1, have) for row, have in zip(context, length, strict=True)]
        if isinstance(past, GenerateOutput):
            common = [
                min(c, common_length(row, old))
                for c, row, old in zip(common, context, _rows(past, length), strict=True)
            ]
        capacity = max(capacity, cache.capacity or 0)
        slots = grown_layout(
            config, [k.shape[1] for k in cache.keys], cache.capacity, capacity, rolling=rolling, lookback=lookback
        )
        try:
            rest = [row[have:] for row, have in zip(context, common, strict=True)]
            return cache.rollback(np.array(length) - common, config).grown(slots, capacity), rest
        except InputError:
            if not isinstance(past, GenerateOutput):  # whose tokens are known, so it can be computed anew
                raise
    return engine.allocate(len(context), capacity, rolling=rolling, lookback=lookback, dtype=dtype), context


def _checked_lengths(config: MistralConfig, cache: Any, rows: int) -> list[int]:
    """How many tokens of each row a cache holds."""
    if not all(hasattr(cache, name) for name in ("keys", "values", "length", "capacity", "dtype", "rollback")):
        raise InputError(
            f"past_key_values must be a KVCache, got {type(cache).__name__}; give one, or what generate returned with "
            "return_dict_in_generate=True."
        )
    found = (len(cache.keys), *(int(cache.keys[0].shape[axis]) for axis in (0, 2, 3)))
    expected = (config.num_hidden_layers, rows, config.num_key_value_heads, config.head_dim)
    if found != expected:
        raise InputError(f"past_key_values: (layers, rows, key/value heads, head_dim) must be {expected}, got {found}.")
    return [int(length) for length in cache.length]


def _checked_dtype(cache: Any, asked: str) -> str:
    """What a cache keeps its tokens in, as the option says it: int8, or auto for floats."""
    found = cache_dtype(cache.dtype)
    if asked == "int8" != found:
        raise InputError(
            f"past_key_values: its cache_dtype must be {asked!r}, got {found}; leave cache_dtype out, or begin without "
            "a cache."
        )
    return "int8" if found == "int8" else "auto"


def repeat_rows(
    engine: Engine, cache: Any, rest: list[Any], generation: GenerationConfig, copies: int
) -> tuple[Any, list[Any]]:
    """The cache and what is missing of it, with each row so many times; all but the last token is computed once."""
    first = [row[:-1] for row in rest]
    if columns := max(map(len, first)):
        nothing = Values(numbers(generation), np.zeros((len(rest), 2), np.uint32), np.zeros(len(rest), np.int32))
        _, cache = feed(engine, cache, first, Rule(), nothing, piece_widths(engine, columns, generation))
    times = np.repeat(np.arange(len(rest)), copies)
    return cache.select_rows(times), [rest[row][-1:] for row in times]


def feed(
    engine: Engine, cache: Any, fed: Sequence[Any], rule: Rule, values: Values, widths: list[int]
) -> tuple[Chosen, Any]:
    """Each row's next tokens or embeddings into the cache, in pieces so wide; what is chosen after the last, or each.

    Rows are padded in front, so that all of them end with the last piece; behind, where something is chosen after each.
    """
    kind = np.asarray(fed[0])
    is_embedded = kind.ndim == 2
    shape = (len(fed), sum(widths), kind.shape[1]) if is_embedded else (len(fed), sum(widths))
    ids_BT = np.zeros(shape, kind.dtype if is_embedded else np.int64)
    mask_BT = np.zeros(shape[:2], np.int64)
    for row, tokens in enumerate(fed):
        where = slice(len(tokens)) if rule.every else slice(sum(widths) - len(tokens), None)
        ids_BT[row, where], mask_BT[row, where] = tokens, 1
    start = 0
    for width in widths:
        part = slice(start, start + width)
        chosen, cache = engine.step(cache, ids_BT[:, part], mask_BT[:, part], rule, values)
        start += width
        if len(widths) > 1:
            LOG.info("prompt: %d of %d columns", start, sum(widths))
    return chosen, cache


def piece_widths(engine: Engine, columns: int, generation: GenerationConfig) -> list[int]:
    """How a prompt of so many columns is cut."""
    if engine.fixed_prompts:
        chunk = generation.prefill_chunk_size or CHUNK_TOKENS
        # a short prompt is not padded to a part of a long chunk
        return pieces(columns, chunk if columns >= chunk else min(chunk, CHUNK_TOKENS))
    chunk = generation.prefill_chunk_size or PLAIN_CHUNK_TOKENS
    whole, last = divmod(columns, chunk)
    return [chunk] * whole + [last] * bool(last)


def pieces(columns: int, chunk: int) -> list[int]:
    """Widths of few kinds that add up to the columns or a little more, the first one padded: (chunk / 16, / 4, / 1).

    What is left is padded to the next kind where that is less than double.
    """
    if columns == 1:
        return [1]
    kinds = sorted({max(chunk // 16, 1), max(chunk // 4, 1), chunk})
    widths: list[int] = []
    while columns > 0:
        above = next((kind for kind in kinds if kind >= columns), None)
        below = max((kind for kind in kinds if kind <= columns), default=None)
        width = above if above is not None and (below is None or 2 * columns > above) else below
        assert width is not None
        widths.append(width)
        columns -= width
    return widths[::-1]


def _rows(past: GenerateOutput, length: list[int]) -> list[list[int]]:
    """The real tokens of each row of an earlier call, whose cache has so many; raises InputError after embeddings."""
    pairs = zip(past.sequences, past.attention_mask, strict=True)  # type: ignore[arg-type]
    rows = [[int(token) for token, real in zip(row, mask, strict=True) if real] for row, mask in pairs]
    if any(have > len(row) for row, have in zip(rows, length, strict=True)):
        raise InputError("past_key_values: of inputs_embeds, whose tokens are not known; give them again instead.")
    return rows


def common_length(row: list[int], old: list[int]) -> int:
    """How many tokens two rows have in common at their beginning."""
    return next((i for i, (a, b) in enumerate(zip(row, old, strict=False)) if a != b), min(len(row), len(old)))
