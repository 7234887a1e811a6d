"""What makes the options of `generate` valid: types, ranges, agreement; and what becomes of options that are none."""

from __future__ import annotations

import difflib
import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

from ..arrays import Array
from ..config import MistralConfig
from ..disk import limits
from ..errors import EmptyInputError, GenerationConfigError, SequenceTooLongError
from ..plain import is_int, is_number

if TYPE_CHECKING:
    from .options import GenerationConfig

IGNORED: Mapping[str, tuple[Any, ...] | None] = {
    "use_cache": None,
    "cache_implementation": (
        "static",
        "dynamic",
        "dynamic_full",
        "offloaded",
        "offloaded_static",
        "sliding_window",
        "hybrid",
        "hybrid_chunked",
        "paged",
        None,
    ),
    "cache_config": None,
    "max_cache_len": None,
    "return_legacy_cache": None,
    "compile_config": None,
    "disable_compile": None,
    "low_memory": None,
    "synced_gpus": None,
    "trust_remote_code": None,
    "tokenizer_name": None,
    "decoder_start_token_id": None,
    "is_assistant": None,
    "num_assistant_tokens_schedule": None,
    "assistant_confidence_threshold": None,
    "assistant_early_exit": None,
    "assistant_lookbehind": None,
    "target_lookbehind": None,
    "speculation_type": None,
    "continuous_batching_config": None,
    "use_mtp": None,
    "cache_position": None,
    "transformers_version": None,
    "encoder_no_repeat_ngram_size": (0, None),
    "encoder_repetition_penalty": (1.0, None),
    "guidance_scale": (1.0, None),
    "negative_prompt_ids": (None,),
    "negative_prompt_attention_mask": (None,),
    "num_beam_groups": (1, None),
    "diversity_penalty": (0.0, None),
    "penalty_alpha": (None, 0.0),
    "dola_layers": (None,),
    "constraints": (None,),
    "force_words_ids": (None,),
    "remove_invalid_values": (False, None),
    "token_healing": (False, None),
    "top_h": (None,),
    "watermarking_config": (None,),
    "assistant_ensemble_weight": (None,),
    "assistant_tokenizer": (None,),
    "custom_generate": (None,),
    "num_logits_to_keep": None,
    "logits_to_keep": None,
}
"""transformers' options of `generate` that are none here -> their values that change no token; None: every value."""

ADVICE: Mapping[str, str] = {
    "cache_implementation": "cache_dtype='int8' keeps the cache in eight bits",
    "encoder_no_repeat_ngram_size": "a logits_processor can do it",
    "encoder_repetition_penalty": "a logits_processor can do it",
    "guidance_scale": "a logits_processor that calls the model on the other prompt can do it",
    "num_beam_groups": "num_beams without groups is there",
    "diversity_penalty": "num_beams with do_sample=True gives beams that differ",
    "penalty_alpha": "use do_sample=True, or top_k and top_p",
    "constraints": "prefix_allowed_tokens_fn or a logits_processor says what may come",
    "force_words_ids": "prefix_allowed_tokens_fn or a logits_processor says what may come",
    "remove_invalid_values": "logits that are no numbers are an error; look at the weights",
    "top_h": "use top_p or min_p",
    "watermarking_config": "transformers' WatermarkLogitsProcessor can be given as logits_processor",
    "assistant_tokenizer": "the assistant must have the same vocabulary",
    "custom_generate": "no code is fetched; write a loop over the model's forward pass",
    "token_types": "Mistral has no token types; leave token_type_ids out",
}
"""Option -> what to do instead."""

ARGUMENTS = (
    "input_ids", "inputs", "inputs_embeds", "attention_mask", "generation_config", "past_key_values", "assistant_model",
    "streamer", "tokenizer", "logits_processor", "stopping_criteria", "prefix_allowed_tokens_fn", "use_model_defaults",
)  # fmt: skip
"""What `generate` takes besides options."""
COMPILE = ("auto", "off", "on", "max")
CACHE = ("auto", "full", "rolling")
CACHE_DTYPE = ("auto", "int8")


def effective(options: Mapping[str, Any]) -> dict[str, Any]:
    """Those of some options that are none here which might change a token."""
    return {
        name: value
        for name, value in options.items()
        if not name.startswith("_")
        and not (name in IGNORED and (IGNORED[name] is None or any(_same(value, v) for v in IGNORED[name] or ())))
    }


def _same(value: Any, other: Any) -> bool:
    return value is other or (isinstance(value, int | float) and other is not None and value == other)


def explained(options: Mapping[str, Any], known: Iterable[str]) -> str:
    """What is to be done about options that are none: instead of each, or the nearest name."""
    return "; ".join(_explained(name, [*known, *ARGUMENTS]) for name in list(options)[:8])


def _explained(name: str, known: list[str]) -> str:
    if name in IGNORED:
        return f"{name} is not here: {ADVICE.get(name, 'leave it out')}"
    near = difflib.get_close_matches(name[:80], known, n=1)
    return f"there is no {name[:80]!r}" + (f", the nearest is {near[0]!r}" if near else "; leave it out")


def several(value: Any) -> tuple[Any, ...]:
    """None, one or several as a tuple."""
    if value is None:
        return ()
    return tuple(value) if isinstance(value, Sequence) and not isinstance(value, str) else (value,)


def _one_of(*choices: Any) -> tuple[Callable[[Any], bool], str]:
    return lambda v: any(v is c or (v == c and type(v) is type(c)) for c in choices), f"one of {choices}"


def _integer(low: int, high: int = 2**31 - 1, *, or_none: bool = False) -> tuple[Callable[[Any], bool], str]:
    def is_right(v: Any) -> bool:
        return (or_none and v is None) or (is_int(v) and low <= v <= high)

    return is_right, f"an integer from {low} to {high}{' or None' if or_none else ''}"


def _number(
    is_right: Callable[[float], bool], what: str, *, or_none: bool = False
) -> tuple[Callable[[Any], bool], str]:
    return lambda v: (or_none and v is None) or (_is_float32(v) and is_right(v)), what


def _is_float32(value: Any) -> bool:
    """Whether a number is finite, in float32 too."""
    return is_number(value) and abs(value) < 2.0**127 and math.isfinite(value)


def _are_ids(value: Any, most: int) -> bool:
    ids = several(value)
    return len(ids) <= most and all(is_int(token) for token in ids)


def _is_list_of_words(value: Any) -> bool:
    return value is None or (
        isinstance(value, tuple)
        and len(value) <= limits.WORDS
        and all(isinstance(w, tuple) and 0 < len(w) <= limits.WORD_IDS for w in value)
    )


def biases(value: Any) -> list[tuple[tuple[int, ...], float]]:
    """The pairs of a `sequence_bias`, {ids: number} or [[ids, number], ...]; raises TypeError, ValueError."""
    pairs = value.items() if isinstance(value, Mapping) else (value or ())
    return [(tuple(ids), number) for ids, number in pairs]


def _is_sequence_bias(value: Any) -> bool:
    try:
        pairs = biases(value)
    except (TypeError, ValueError):
        return False
    return _is_list_of_words(tuple(ids for ids, _ in pairs)) and all(is_number(number) for _, number in pairs)


def _is_decay(value: Any) -> bool:
    if value is None:
        return True
    return isinstance(value, tuple) and len(value) == 2 and is_int(value[0]) and _is_float32(value[1]) and value[1] > 0


def _are_stops(value: Any) -> bool:
    stops = several(value)
    return len(stops) <= limits.STOP_STRINGS and all(
        isinstance(s, str) and 0 < len(s) <= limits.STOP_CHARACTERS for s in stops
    )


def _is_bias(value: Any) -> bool:
    return value is None or (isinstance(value, Mapping) and all(is_number(x) for x in value.values()))


def _is_seed(value: Any) -> bool:
    return value is None or (value != () and all(is_int(s) and 0 <= s < 2**64 for s in several(value)))


FLAGS = (
    "do_sample", "return_dict_in_generate", "output_scores", "output_logits", "output_attentions",
    "output_hidden_states", "on_device_loop", "renormalize_logits",
)  # fmt: skip
CHECKS: Mapping[str, tuple[Callable[[Any], bool], str]] = {
    **dict.fromkeys(FLAGS, _one_of(False, True)),
    "max_new_tokens": _integer(0),
    "min_new_tokens": _integer(0),
    "min_length": _integer(0),
    "max_time": _number(lambda v: v > 0, "seconds above 0 or None", or_none=True),
    "eos_token_id": (lambda v: _are_ids(v, limits.END_IDS), f"an id or up to {limits.END_IDS} or None"),
    "stop_strings": (
        _are_stops,
        f"a text that is not empty, or up to {limits.STOP_STRINGS} of up to {limits.STOP_CHARACTERS} characters,",
    ),
    "temperature": _number(lambda v: v >= 0, "a number of 0 or more (0: the likeliest token)"),
    "top_k": _integer(0, or_none=True),
    "top_p": _number(lambda v: 0 < v <= 1, "a number above 0 and up to 1", or_none=True),
    "min_p": _number(lambda v: 0 <= v <= 1, "a number from 0 to 1", or_none=True),
    "typical_p": _number(lambda v: 0 < v <= 1, "a number above 0 and up to 1", or_none=True),
    "epsilon_cutoff": _number(lambda v: 0 <= v < 1, "a number from 0 and below 1", or_none=True),
    "eta_cutoff": _number(lambda v: 0 <= v < 1, "a number from 0 and below 1", or_none=True),
    "repetition_penalty": _number(lambda v: v > 0, "a number above 0"),
    "no_repeat_ngram_size": _integer(0),
    "bad_words_ids": (_is_list_of_words, "a list of lists of ids, none of them empty,"),
    "suppress_tokens": (lambda v: _are_ids(v, limits.WORDS), "a list of ids"),
    "begin_suppress_tokens": (lambda v: _are_ids(v, limits.WORDS), "a list of ids"),
    "sequence_bias": (_is_sequence_bias, "a list of [ids, finite number], or a dictionary {ids: number},"),
    "exponential_decay_length_penalty": (_is_decay, "(an integer, a number above 0) or None"),
    "forced_bos_token_id": (lambda v: v is None or is_int(v), "an id or None"),
    "forced_eos_token_id": (lambda v: _are_ids(v, limits.END_IDS), "an id, several or None"),
    "logit_bias": (_is_bias, "a dictionary of ids and finite numbers"),
    "seed": (_is_seed, "an integer from 0 to 2^64 - 1, or one for each row,"),
    "num_beams": _integer(1),
    "length_penalty": _number(lambda v: abs(v) <= limits.LENGTH_PENALTY, f"a number up to {limits.LENGTH_PENALTY}"),
    "early_stopping": _one_of(False, True, "never"),
    "num_return_sequences": _integer(1),
    "prompt_lookup_num_tokens": _integer(1, limits.GUESSES, or_none=True),
    "max_matching_ngram_size": _integer(1),
    "num_assistant_tokens": _integer(1, limits.GUESSES),
    "cache": _one_of(*CACHE),
    "cache_dtype": _one_of(*CACHE_DTYPE),
    "prefill_chunk_size": _integer(1, or_none=True),
    "compile": _one_of(*COMPILE),
}
"""Option -> what its values are, and in words."""


def problems(generation: GenerationConfig, config: MistralConfig) -> list[str]:
    """Every option that means nothing, alone, together or for a model."""
    found = [
        f"{name} must be {expected}, got {_short(getattr(generation, name))}"
        for name, (is_right, expected) in CHECKS.items()
        if not is_right(getattr(generation, name))
    ]
    return found or [*_wrong_ids(generation, config), *_contradictions(generation)]


def _wrong_ids(generation: GenerationConfig, config: MistralConfig) -> list[str]:
    ids = {
        "eos_token_id": generation.eos_token_ids,
        "pad_token_id": (generation.padding,),
        "suppress_tokens": several(generation.suppress_tokens),
        "begin_suppress_tokens": several(generation.begin_suppress_tokens),
        "forced_bos_token_id": several(generation.forced_bos_token_id),
        "forced_eos_token_id": several(generation.forced_eos_token_id),
        "bad_words_ids": [token for word in generation.bad_words_ids or () for token in word],
        "sequence_bias": [token for ids, _ in biases(generation.sequence_bias) for token in ids],
        "logit_bias": generation.logit_bias or (),
    }
    return [
        f"{name} must be 0 to {config.vocab_size - 1}, got {_short(token)}"
        for name, tokens in ids.items()
        for token in tokens
        if not is_int(token) or not 0 <= token < config.vocab_size
    ]


def _contradictions(generation: GenerationConfig) -> list[str]:
    sampled, beams = generation.do_sample and generation.temperature != 0, generation.num_beams > 1
    least, most, copies = generation.min_new_tokens, generation.max_new_tokens, generation.num_return_sequences
    guesses = generation.prompt_lookup_num_tokens is not None
    outside = (
        beams or guesses or generation.stops or generation.looks_back or generation.is_chosen_by_core
        or generation.output_scores or generation.output_logits or generation.max_time
    )  # fmt: skip
    found = {
        f"min_new_tokens: {least} are more than max_new_tokens ({most})": least > most,
        f"num_return_sequences: {copies} equal sequences; give do_sample=True or num_beams":
            copies > 1 and not sampled and not beams,
        f"num_return_sequences: {copies} of {generation.num_beams} beams; take more beams":
            beams and copies > generation.num_beams,
        "prompt_lookup_num_tokens: beams are not guessed; use num_beams=1": beams and guesses,
        "on_device_loop: it takes neither beams, stop_strings, max_time, output_scores, output_logits, "
        "prompt_lookup_num_tokens nor options that look back (repetition_penalty, no_repeat_ngram_size, bad_words_ids, "
        "min_new_tokens, sequence_bias, forced and suppressed tokens, exponential_decay_length_penalty) or are applied "
        "to all scores (epsilon_cutoff, eta_cutoff, renormalize_logits); drop one":
            generation.on_device_loop and bool(outside),
    }  # fmt: skip
    return [problem for problem, holds in found.items() if holds]


def _short(value: Any) -> str:
    try:
        text = repr(value)
    except ValueError:  # an integer of more digits than Python writes
        return "a very large number"
    return text if len(text) < 200 else f"{text[:200]}..."


def check_prompt(config: MistralConfig, generation: GenerationConfig, mask_BT: Array) -> None:
    """Every row must hold a token, and what is to come must fit; raises EmptyInputError, SequenceTooLongError."""
    lengths = mask_BT.sum(axis=1)
    empty = [int(row) for row in (lengths == 0).nonzero()[0]]
    if empty:
        raise EmptyInputError(f"attention_mask: rows {empty} are all padding; there is nothing to continue.")
    total = int(lengths.max()) + generation.max_new_tokens
    if total > config.max_position_embeddings:
        raise SequenceTooLongError(
            f"{lengths.max()} tokens and {generation.max_new_tokens} new ones are {total}, max_position_embeddings is "
            f"{config.max_position_embeddings}; ask for fewer new tokens."
        )
    if isinstance(generation.seed, tuple) and len(generation.seed) != len(mask_BT):
        raise GenerationConfigError(
            f"seed: {len(generation.seed)} for {len(mask_BT)} rows; give one int, or one a row."
        )
