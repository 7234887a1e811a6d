"""A chat in every backend: three turns read no token twice, and are what the whole conversation gives in one pass."""

from __future__ import annotations

import importlib

import numpy as np
import pytest

from mistral_core.data import TINY_CHECKPOINT
from mistral_core.pipelines.conversation import Conversation
from mistral_core.reference import heads
from mistral_core.text.tokenizer import MistralTokenizer
from mistral_core.weights import loading

TEXTS = ("Emma was", "And Mr. Knightley?", "What did they say?")
NEW = 24
SCORES = {"max_new_tokens": 1, "output_scores": True, "return_dict_in_generate": True}
ULP = 32 * np.finfo(np.float32).eps
"""Of the largest logit: what the conformance suite promises."""


PARAMETERS = {
    name: array.astype(np.float64)
    for name, array in loading.load_pretrained(TINY_CHECKPOINT, "MistralForCausalLM", dtype="float32").tensors
}
TOKENIZER = MistralTokenizer.from_pretrained(TINY_CHECKPOINT)


@pytest.fixture(scope="module")
def model(backend):
    return backend.MistralForCausalLM.from_pretrained(TINY_CHECKPOINT, dtype="float32")


@pytest.fixture
def read(backend, monkeypatch):
    """The ids of all that the model has been given, step by step."""
    engine = importlib.import_module(f"{backend.__name__}.generate").Engine
    step, given = engine.step, []

    def counted(self, cache, ids_BT, mask_BT, rule, values):
        given.extend(ids_BT[mask_BT != 0].tolist())
        return step(self, cache, ids_BT, mask_BT, rule, values)

    monkeypatch.setattr(engine, "step", counted)
    return given


def talked(model, read, **options):
    """A conversation of three turns, each of which read what its stats say, and where its answers are."""
    talk, spans = Conversation(model, TOKENIZER, max_new_tokens=NEW, **options), []
    for text in TEXTS:
        before = len(read)
        talk.say(text)
        turn = talk.last
        assert len(read) - before == turn.prompt_tokens - turn.reused + turn.new_tokens - 1
        spans.append(slice(turn.prompt_tokens, turn.prompt_tokens + turn.new_tokens))
    return talk, spans


@pytest.mark.feature("Chat: a turn computes only what is new")
def test_three_turns_read_no_token_twice_and_equal_one_pass(model, read):
    talk, spans = talked(model, read, template="v1")
    everything = talk._seen
    assert read == everything[:-1]  # each id once, in its place; the last one is still to be read
    assert len(everything) > 100  # more than the window of 80: the cache has rolled
    anew = heads.causal_lm(model.config, PARAMETERS, np.array([everything])).logits[0]
    for span in spans:
        assert anew[span.start - 1 : span.stop - 1].argmax(-1).tolist() == everything[span]
    out = model.generate(np.array([everything]), past_key_values=talk._past(), **SCORES)
    assert np.abs(np.asarray(out.scores[0])[0] - anew[-1]).max() <= ULP * np.abs(anew[-1]).max()


def test_three_turns_of_plain_text_read_no_token_twice(model, read):
    talk, _ = talked(model, read, plain=True)
    assert read == talk._seen[:-1]
    assert TOKENIZER.decode(talk._seen, skip_special_tokens=True) == "".join(
        text if at == 0 or message["role"] == "assistant" else f" {text}"
        for at, message in enumerate(talk.messages)
        for text in [message["content"]]
    )


def test_a_stopped_answer_stays_in_the_conversation_and_in_the_cache(model, read):
    talk = Conversation(model, TOKENIZER, template="v1", max_new_tokens=NEW)
    pieces = []

    def stop(piece):
        pieces.append(piece)
        if len(pieces) == 5:
            talk.stop()

    text = talk.say(TEXTS[0], on_text=stop)
    assert talk.last.ended == "stopped"
    assert text == "".join(pieces) == talk.messages[-1]["content"]
    assert int(talk._cache.length[0]) == len(talk._seen) - 1 == len(read)
    talk.say(TEXTS[1])
    assert read == talk._seen[:-1]
    assert read.count(TOKENIZER.eos_token_id) == 1  # which the template put after the answer that was stopped
