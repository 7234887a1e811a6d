"""Where in a text the answer to a question stands."""

from __future__ import annotations

import unicodedata
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from ..arrays import Array
from ..errors import EmptyInputError, InputError
from .base import Pipeline, check_count, check_names, encoded, softmax, stitched, windows

ROW_TOKENS = 384
"""Tokens of a row where nothing else is asked for."""
OVERLAP_TOKENS = 128


@dataclass(frozen=True)
class QuestionAnsweringOptions:
    """What a call takes; `doc_stride` is how many tokens rows have in common, by default 128 or half a row."""

    top_k: int = 1
    doc_stride: int | None = None
    max_answer_len: int = 15
    max_seq_len: int | None = None
    max_question_len: int = 64
    handle_impossible_answer: bool = False
    align_to_words: bool = True

    def __post_init__(self) -> None:
        for name in ("top_k", "max_answer_len", "max_question_len"):
            check_count(name, getattr(self, name))
        check_count("doc_stride", self.doc_stride, low=0, or_none=True)
        check_count("max_seq_len", self.max_seq_len, or_none=True)


class QuestionAnsweringPipeline(Pipeline):
    """Answers: `{"score": ..., "start": ..., "end": ..., "answer": ...}`, where `context[start:end]` is the answer.

    Give `question=` and `context=`, a text or a list each, or a dictionary of both, or several of these. `top_k`
    answers come as a list, a single one without. An answer has at most `max_answer_len` tokens and its score is a
    probability; `align_to_words` widens it to whole words, and answers that become one add up. Question and context
    that are longer than `max_seq_len` tokens (384) together are read in rows that have `doc_stride` tokens of the
    context in common; the question's first `max_question_len` tokens count. `handle_impossible_answer` lets the first
    token stand for "no answer", which is then `""` at 0.

    Other than in transformers, the question always comes first: a token sees only what is before it. Of common
    tokens the row counts that sees more before them, and probabilities are those of the whole context: transformers'
    are of each row alone, and an answer found twice gets the sum. Blanks around an answer are left out, words are
    words of tokenizers without a pre-tokenizer too, a list of one gives a list.
    """

    task = "question-answering"
    architecture = "MistralForQuestionAnswering"
    options_class = QuestionAnsweringOptions
    _expected = "a dictionary of question and context"

    def __call__(
        self, inputs: Any = None, *, question: Any = None, context: Any = None, batch_size: int | None = None,
        **options: Any,
    ) -> Any:  # fmt: skip
        """Answers to one question, to a list as a list, or of any other iterable one by one as they come.

        Raises InputError, EmptyInputError, TokenizerError and their kind.
        """
        if (inputs is None) == (question is None and context is None):
            raise InputError("question-answering: give question= and context=, or dictionaries of both.")
        given = _pairs(question, context) if inputs is None else inputs
        return super().__call__(given, batch_size=batch_size, **options)

    def _is_one(self, inputs: Any, options: QuestionAnsweringOptions) -> bool:
        return isinstance(inputs, Mapping)

    def _batch(self, items: list[Any], options: QuestionAnsweringOptions, size: int) -> Iterator[Any]:
        length = options.max_seq_len or min(ROW_TOKENS, self.model.config.max_position_embeddings)
        stride = min(length // 2, OVERLAP_TOKENS) if options.doc_stride is None else options.doc_stride
        texts = [self._text(item, options) for item in items]
        cut = [windows(text, length, stride) for text in texts]
        outputs = self._outputs([part.row for parts in cut for part in parts], ["start_logits", "end_logits"], size)
        for item, text, parts in zip(items, texts, cut, strict=True):
            own, outputs = outputs[: len(parts)], outputs[len(parts) :]
            nothing = [array[0] for array in own[0]] if options.handle_impossible_answer else None
            logits = [stitched(parts, arrays) for arrays in zip(*own, strict=True)]
            answers = best(item["context"], text.spans, logits, nothing, options)
            yield answers[0] if options.top_k == 1 else answers

    def _text(self, item: Any, options: QuestionAnsweringOptions) -> Any:
        if not isinstance(item, Mapping):
            raise InputError(f"{self.task} must be given {self._expected}, got {type(item).__name__}.")
        check_names("a question", item, ("question", "context"))
        for name in ("question", "context"):
            if not isinstance(item.get(name), str):
                raise InputError(f"{name} must be a str, got {type(item.get(name)).__name__}.")
            if not item[name].strip():
                raise EmptyInputError(f"{name}: nothing but blanks; leave this one out.")
        return encoded(
            self.tokenizer, item["context"], question=item["question"], longest_question=options.max_question_len
        )


def _pairs(question: Any, context: Any) -> Any:
    """Dictionaries of questions and contexts; one context may serve several questions."""
    if isinstance(question, str):
        return {"question": question, "context": context}
    if not isinstance(question, list | tuple):
        raise InputError(f"question must be a str or a list of them, got {type(question).__name__}.")
    contexts = [context] * len(question) if isinstance(context, str) else list(context or ())
    if len(contexts) != len(question):
        raise InputError(f"context must be {len(question)} texts, one for each question, got {len(contexts)}.")
    return [{"question": q, "context": c} for q, c in zip(question, contexts, strict=True)]


def best(
    context: str,
    spans: Sequence[tuple[int, int]],
    logits: Sequence[Array],
    nothing: Sequence[Array] | None,
    options: QuestionAnsweringOptions,
) -> list[dict[str, Any]]:
    """The likeliest answers in a context, equal ones in the order of the text.

    `logits` are those [T] of each token as start and as end, `nothing` those of no answer, which then counts too.
    """
    with_nothing = [each if nothing is None else np.append(each, nothing[at]) for at, each in enumerate(logits)]
    start, end = (softmax(each) for each in with_nothing)
    tokens = len(spans)
    begins, ends, scores = candidates(context, spans, start[:tokens], end[:tokens], options)
    order = np.argsort(-scores, kind="stable")[: options.top_k]
    answers = [_answer(context, float(scores[i]), int(begins[i]), int(ends[i])) for i in order]
    if nothing is not None:
        answers.append(_answer(context, float(start[tokens] * end[tokens]), 0, 0))
        answers.sort(key=lambda answer: -answer["score"])
    return answers[: options.top_k]


def _answer(context: str, score: float, begin: int, end: int) -> dict[str, Any]:
    return {"score": score, "start": begin, "end": end, "answer": context[begin:end]}


def candidates(
    context: str, spans: Sequence[tuple[int, int]], start_T: Array, end_T: Array, options: QuestionAnsweringOptions
) -> tuple[Array, Array, Array]:
    """Every answer as characters, in the order of the text: where it begins, where it ends, its probability."""
    lengths = range(min(options.max_answer_len, len(spans)))
    firsts = np.concatenate([np.arange(len(spans) - more) for more in lengths])
    lasts = np.concatenate([np.arange(more, len(spans)) for more in lengths])
    begin_of, end_of = edges(context, words=options.align_to_words)
    places = np.array(spans)
    begins, ends = begin_of[places[firsts, 0]], end_of[places[lasts, 1]]
    solid = begins < ends  # not blanks alone
    keys, which = np.unique(begins[solid] * (len(context) + 1) + ends[solid], return_inverse=True)
    scores = np.bincount(which, weights=(start_T[firsts] * end_T[lasts])[solid], minlength=len(keys))
    return keys // (len(context) + 1), keys % (len(context) + 1), scores


def edges(text: str, *, words: bool) -> tuple[Array, Array]:
    """Where a part of a text begins that begins at each place 0 to len(text), and where one ends that ends there.

    Blanks at its edges are left out, with `words` the rest of a word at its edge taken in.
    """

    def kind(char: str) -> str:
        return "blank" if char.isspace() else "word" if unicodedata.category(char)[0] in "LMN" else "sign"

    kinds = [kind(char) for char in text]
    return _begins(kinds, words), len(kinds) - _begins(kinds[::-1], words)[::-1]


def _begins(kinds: Sequence[str], words: bool) -> Array:
    begins = np.arange(len(kinds) + 1)
    for place in range(len(kinds) - 1, -1, -1):
        if kinds[place] == "blank":
            begins[place] = begins[place + 1]
    for place in range(1, len(kinds)) if words else ():
        if kinds[place] == kinds[place - 1] == "word":
            begins[place] = begins[place - 1]
    return begins
