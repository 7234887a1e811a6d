"""How our generation shapes scores, under the names and arguments of transformers' processors of logits."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import torch

from mistral_core import GenerationConfig
from mistral_core.generation.history import limits
from mistral_core.generation.hooks import Chooser, Hooks
from mistral_core.generation.sampling import Rule, Values, numbers
from mistral_torch.generate import Engine
from mistral_torch.sampling import choose

ALONE = {"filter_value": -torch.inf, "min_tokens_to_keep": 1, "prompt_ignore_length": None}
"""Arguments that no option of generate has -> the values that change nothing."""


class Border(Engine):
    """The border between NumPy and torch, without a model."""

    def __init__(self) -> None:
        pass

    def array(self, x: Any) -> Any:
        return torch.from_numpy(np.asarray(x))


class Processor:
    """(ids [B, T], scores [B, V]) -> scores, as generate computes them with some options."""

    names: tuple[str, ...] = ()
    """transformers' arguments, in their order."""
    options: Callable[..., dict[str, Any]]
    """The options of generate that mean the same as these arguments."""

    def __init__(self, *values: Any, device: Any = None, **named: Any) -> None:
        given = {**dict(zip(self.names, values, strict=False)), **named}
        self.__dict__.update(given)
        for name, value in given.items():
            if name in ALONE and value != ALONE[name]:
                raise NotImplementedError(f"{name}={value!r} is no option of generate")
        self.given = {name: value for name, value in given.items() if name not in ALONE}

    def __call__(self, input_ids: Any, scores: torch.Tensor) -> torch.Tensor:
        batch, size = scores.shape
        rows = [[0]] * batch if input_ids is None else input_ids.tolist()
        options = {"do_sample": True, "top_k": 0, "output_scores": True, **type(self).options(self.given, rows)}
        hooks = Hooks(allowed=options.pop("allowed", None))
        made = [len(rows[0]) - options.pop("columns", len(rows[0]))] * batch
        generation = GenerationConfig(max_new_tokens=1000).replace(**options).for_prompt(len(rows[0]) - made[0])
        bias, seen = limits(generation, size, rows, made, [[]] * batch, [False] * batch, columns=1)
        rule = Rule.of(generation)._replace(sample=False)
        values = Values(numbers(generation), np.zeros((batch, 2), np.uint32), np.array(made, np.int32), bias, seen)
        chooser = Chooser(Border(), generation, hooks, rule)
        if chooser.is_here:
            return torch.from_numpy(chooser(scores[:, None].numpy(), values, np.array(rows)).scores[:, 0]).float()
        arrays = Values(*(None if x is None else torch.from_numpy(np.asarray(x)) for x in values))
        return choose(scores[:, None], rule, arrays).scores[:, 0]


def _processor(names: str, options: Callable[[dict[str, Any], list[list[int]]], dict[str, Any]]) -> type[Processor]:
    return type("Processor", (Processor,), {"names": tuple(names.split()), "options": staticmethod(options)})


def _named(option: str, name: str, *more: str) -> type[Processor]:
    return _processor(" ".join((name, *more)), lambda given, rows: {option: given[name]})


_WARPED = ("filter_value", "min_tokens_to_keep")
PROCESSORS = {
    "TemperatureLogitsWarper": _named("temperature", "temperature"),
    "TopKLogitsWarper": _named("top_k", "top_k", *_WARPED),
    "TopPLogitsWarper": _named("top_p", "top_p", *_WARPED),
    "MinPLogitsWarper": _named("min_p", "min_p", *_WARPED),
    "TypicalLogitsWarper": _named("typical_p", "mass", *_WARPED),
    "EpsilonLogitsWarper": _named("epsilon_cutoff", "epsilon", *_WARPED),
    "EtaLogitsWarper": _named("eta_cutoff", "epsilon", *_WARPED),
    "RepetitionPenaltyLogitsProcessor": _named("repetition_penalty", "penalty", "prompt_ignore_length"),
    "NoRepeatNGramLogitsProcessor": _named("no_repeat_ngram_size", "ngram_size"),
    "SequenceBiasLogitsProcessor": _processor(
        "sequence_bias", lambda given, rows: {"sequence_bias": [[[*k], v] for k, v in given["sequence_bias"].items()]}
    ),
    "NoBadWordsLogitsProcessor": _processor(
        "bad_words_ids eos_token_id",
        lambda given, rows: {"bad_words_ids": given["bad_words_ids"], "eos_token_id": given["eos_token_id"]},
    ),
    "MinLengthLogitsProcessor": _processor(
        "min_length eos_token_id",
        lambda given, rows: {
            "min_new_tokens": max(0, given["min_length"] - len(rows[0])), "eos_token_id": given["eos_token_id"],
        },
    ),
    "MinNewTokensLengthLogitsProcessor": _processor(
        "prompt_length_to_skip min_new_tokens eos_token_id",
        lambda given, rows: {
            "columns": given["prompt_length_to_skip"], "min_new_tokens": given["min_new_tokens"],
            "eos_token_id": given["eos_token_id"],
        },
    ),
    "ForcedBOSTokenLogitsProcessor": _processor(
        "bos_token_id", lambda given, rows: {"forced_bos_token_id": given["bos_token_id"], "columns": 1}
    ),
    "ForcedEOSTokenLogitsProcessor": _processor(
        "max_length eos_token_id",
        lambda given, rows: {
            "max_new_tokens": given["max_length"] - 1, "forced_eos_token_id": given["eos_token_id"], "columns": 1,
        },
    ),
    "ExponentialDecayLengthPenalty": _processor(
        "exponential_decay_length_penalty eos_token_id input_ids_seq_length",
        lambda given, rows: {
            "exponential_decay_length_penalty": given["exponential_decay_length_penalty"],
            "eos_token_id": given["eos_token_id"], "columns": given["input_ids_seq_length"],
        },
    ),
    "LogitNormalization": _processor("", lambda given, rows: {"renormalize_logits": True}),
    "PrefixConstrainedLogitsProcessor": _processor(
        "prefix_allowed_tokens_fn num_beams", lambda given, rows: {"allowed": given["prefix_allowed_tokens_fn"]}
    ),
}  # fmt: skip
"""transformers' name -> ours."""
