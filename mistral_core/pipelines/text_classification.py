"""Which class a text, or a pair of texts, belongs to."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

from ..arrays import Array
from ..config import MistralConfig
from ..errors import InputError
from .base import Pipeline, check_count, check_names, check_one_of, softmax

FUNCTIONS = ("sigmoid", "softmax", "none")


@dataclass(frozen=True)
class TextClassificationOptions:
    """What a call takes; `top_k` is how many labels to return, None all of them."""

    top_k: int | str | None = ""  # not given: the best one, and not as a list
    function_to_apply: str | None = None
    truncation: bool = False
    max_length: int | None = None

    def __post_init__(self) -> None:
        if self.top_k != "":
            check_count("top_k", self.top_k, or_none=True)
        check_one_of("function_to_apply", self.function_to_apply, (*FUNCTIONS, "default", None))
        check_count("max_length", self.max_length, or_none=True)


class TextClassificationPipeline(Pipeline):
    """Labels with scores: `{"label": ..., "score": ...}` for a text or a pair `{"text": ..., "text_pair": ...}`.

    As in transformers, a single text gives a list of one such dictionary, a single pair the dictionary, a list of
    inputs one for each; with `top_k` given, each is a list of the likeliest labels, None: of all. `function_to_apply`
    is "sigmoid", "softmax" or "none"; by default none for a regression, a sigmoid for a single label or several at
    once, else a softmax. A text that is too long is an error unless `truncation=True`, then to `max_length`.
    """

    task = "text-classification"
    architecture = "MistralForSequenceClassification"
    options_class = TextClassificationOptions
    _expected = "a str or a dictionary of text and text_pair"

    def _is_one(self, inputs: Any, options: TextClassificationOptions) -> bool:
        return isinstance(inputs, str | Mapping)

    def _of_one(self, item: Any, result: Any, options: TextClassificationOptions) -> Any:
        return [result] if isinstance(item, str) and options.top_k == "" else result

    def _batch(self, items: list[Any], options: TextClassificationOptions, size: int) -> list[Any]:
        rows = [self._row(item, options) for item in items]
        logits = [scores for (scores,) in self._outputs(rows, ["logits"], size)]
        return [ranked(self.model.config, each, options) for each in logits]

    def _row(self, item: Any, options: TextClassificationOptions) -> list[int]:
        texts = item if isinstance(item, Mapping) else {"text": item}
        check_names("a pair", texts, ("text", "text_pair"))
        if not isinstance(texts.get("text"), str):
            raise InputError(
                f"{self.task}: {type(texts.get('text')).__name__} for a text; write a pair as "
                '{"text": ..., "text_pair": ...}.'
            )
        if not options.truncation:
            return list(self.tokenizer.encode(texts["text"], texts.get("text_pair")))
        longest = options.max_length or self.model.config.max_position_embeddings
        made = self.tokenizer(texts["text"], texts.get("text_pair"), truncation=True, max_length=longest)
        return list(made["input_ids"])


def ranked(config: MistralConfig, logits_C: Array, options: TextClassificationOptions) -> Any:
    """The labels of one row of logits with their scores, the best first, equal ones in the order of the config."""
    scores = applied(options.function_to_apply or "default", config, logits_C)
    labels = config.id2label or {}
    order = np.argsort(-scores, kind="stable")
    found = [{"label": labels[int(index)], "score": float(scores[index])} for index in order]
    if options.top_k == "":
        return found[0]
    return found[: len(found) if options.top_k is None else int(options.top_k)]


def applied(function: str, config: MistralConfig, logits_C: Array) -> Array:
    """Scores [C] of logits [C], by a function of FUNCTIONS or what "default" means for a config."""
    if function == "default":
        single = config.num_labels == 1
        function = {
            "regression": "none",
            "multi_label_classification": "sigmoid",
            "single_label_classification": "sigmoid" if single else "softmax",
            None: "sigmoid" if single else "softmax",
        }[config.problem_type]
    if function == "sigmoid":
        return np.asarray(np.exp(-np.logaddexp(0, -logits_C)))
    return softmax(logits_C) if function == "softmax" else logits_C
