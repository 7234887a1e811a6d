"""A caller's functions in the decode loop, embeddings, and what is told of each step: over the float64 reference."""

from __future__ import annotations

import gc
import itertools
import weakref

import numpy as np
import pytest

from conformance.weights import random_parameters
from mistral_core import GenerationConfig, LogitsProcessorList, StoppingCriteriaList
from mistral_core.config.presets import TINY
from mistral_core.errors import GenerationConfigError, InputError, NonFiniteInputError
from mistral_core.generation import driver
from mistral_core.reference import engine, heads
from mistral_core.reference.sampling import log_softmax

PARAMETERS = random_parameters(TINY, "MistralForCausalLM")
EMBEDDING = PARAMETERS["model.embed_tokens.weight"]
IDS = np.random.default_rng(0).integers(3, TINY.vocab_size, (2, 9))
MASK = np.array([[0, 0, 0, 0, 1, 1, 1, 1, 1], [1] * 9])
ENDLESS = {"eos_token_id": None, "max_new_tokens": 6}
SAMPLED = {"do_sample": True, "seed": 3, "temperature": 0.9}


def written(ids=IDS, mask=None, *, assistant=None, streamer=None, tokenizer=None, past=None, **options):
    prompt = driver.prepare(TINY, ids, mask, GenerationConfig(), {**ENDLESS, **options})
    subject = engine.Engine(TINY, PARAMETERS)
    return driver.generate(subject, prompt, past=past, assistant=assistant, streamer=streamer, tokenizer=tokenizer)


class Asked:
    """A processor that remembers what it was asked and forbids what it is told to."""

    def __init__(self, *forbidden):
        self.forbidden, self.ids, self.scores = list(forbidden), [], []

    def __call__(self, input_ids, scores):
        self.ids.append(input_ids.copy())
        self.scores.append(scores.copy())
        scores[:, self.forbidden] = -np.inf  # in place, as many of them do
        return scores


# Processors


@pytest.mark.parametrize("options", [{}, SAMPLED, {**SAMPLED, "num_return_sequences": 2, "top_k": 5}, {"num_beams": 3}])
def test_a_processor_that_changes_nothing_changes_nothing(options):
    plain = written(mask=MASK, **options)
    found = written(mask=MASK, logits_processor=[lambda ids, scores: scores], **options)
    assert np.array_equal(found.sequences, plain.sequences)


def test_a_processor_sees_each_row_with_its_padding_and_all_that_was_made():
    asked = Asked()
    out = written(mask=MASK, logits_processor=[asked], eos_token_id=int(written(mask=MASK).sequences[1, 11]))
    for step, ids in enumerate(asked.ids):
        assert np.array_equal(ids, out.sequences[:, : 9 + step])
    row = out.sequences[0][out.attention_mask[0] != 0][:-1]
    wanted = heads.causal_lm(TINY, PARAMETERS, row[None]).logits[0]
    assert np.allclose([scores[0] for scores in asked.scores], wanted[-len(asked.scores) :], atol=1e-4)


@pytest.mark.parametrize("options", [{}, SAMPLED, {"num_beams": 3, "num_return_sequences": 2}])
def test_what_a_processor_forbids_does_not_come(options):
    forbidden = sorted(set(written(**options).sequences[:, 9:].flat))
    found = written(logits_processor=[Asked(*forbidden)], **options).sequences[:, 9:]
    assert not set(found.flat) & set(forbidden)
    by_option = written(suppress_tokens=forbidden, **options).sequences[:, 9:]
    assert np.array_equal(found, by_option)


def test_processors_come_after_our_options_and_before_the_filters():
    first, second = Asked(), Asked()
    written(logits_processor=[first, second], logit_bias={5: 50.0}, repetition_penalty=2.0, **SAMPLED)
    assert (first.scores[0].argmax(1) == 5).all()
    assert np.isfinite(second.scores[0]).all()  # nothing is filtered yet
    assert np.array_equal(first.scores[0], second.scores[0])


def test_beams_give_log_probabilities_to_processors():
    asked = Asked()
    written(num_beams=3, logits_processor=[asked])
    assert asked.ids[0].shape == (6, 9)
    assert asked.ids[2].shape == (6, 11)
    assert np.allclose(np.exp(asked.scores[1]).sum(1), 1, atol=1e-4)


@pytest.mark.parametrize("options", [{}, {"num_beams": 2}, {**SAMPLED, "num_return_sequences": 2}])
def test_only_what_is_allowed_comes(options):
    asked = []

    def allowed(row, ids):
        asked.append((row, len(ids)))
        return [10 + row, 20 + row] if len(ids) % 2 else [30 + row]

    found = written(prefix_allowed_tokens_fn=allowed, **options).sequences[:, 9:]
    rows = len(found)
    row = np.arange(rows) if "num_return_sequences" in options else np.arange(2).repeat(rows // 2)
    assert np.isin(found[:, ::2] - row[:, None], (10, 20)).all()
    assert (found[:, 1::2] - row[:, None] == 30).all()
    assert {n for _, n in asked} == set(range(9, 15))


def test_a_processor_is_asked_once_a_token_though_guesses_were_wanted():
    for options in ({"prompt_lookup_num_tokens": 3}, {"assistant": engine.Engine(TINY, PARAMETERS)}):
        asked = Asked()
        found = written(np.tile(IDS, 2), logits_processor=[asked], **options)
        assert np.array_equal(found.sequences, written(np.tile(IDS, 2)).sequences)
        assert [ids.shape[1] for ids in asked.ids] == list(range(18, 24))


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"logits_processor": [5]}, GenerationConfigError, "logits_processor must be a list of functions, got int"),
        ({"logits_processor": [lambda i, s: s[:, :5]]}, GenerationConfigError, r"the shape \(2, 97\), got \(2, 5\)"),
        ({"logits_processor": [lambda i, s: s * np.nan]}, NonFiniteInputError, "logits_processor"),
        ({"stopping_criteria": "x"}, GenerationConfigError, "stopping_criteria must be a list of functions, got str"),
        ({"stopping_criteria": [lambda i, s: np.zeros(3)]}, GenerationConfigError, "each of 2 rows, got 3"),
        ({"prefix_allowed_tokens_fn": lambda r, i: []}, GenerationConfigError, "at least one"),
        ({"prefix_allowed_tokens_fn": lambda r, i: [97]}, GenerationConfigError, r"for row 0, got \[97\]"),
        (
            {"prefix_allowed_tokens_fn": 5},
            GenerationConfigError,
            "prefix_allowed_tokens_fn must be a function, got int",
        ),
        ({"logits_processor": [lambda i, s: s], "on_device_loop": True}, GenerationConfigError, "on_device_loop"),
    ],
)
def test_functions_that_are_none_or_answer_nonsense(options, error, message):
    with pytest.raises(error, match=message):
        written(**options)


def test_an_error_in_a_function_is_that_error():
    def broken(ids, scores):
        raise ZeroDivisionError

    for name in ("logits_processor", "stopping_criteria"):
        with pytest.raises(ZeroDivisionError):
            written(**{name: [broken]})


def test_lists_of_functions_are_functions():
    double = LogitsProcessorList([lambda ids, scores: scores + 1, lambda ids, scores: scores * 2])
    assert double(None, 1.0) == 4
    ends = StoppingCriteriaList([lambda ids, scores: False, lambda ids, scores: np.array([True, False])])
    assert ends(None, None).tolist() == [True, False]
    assert np.array_equal(written(logits_processor=double).sequences, written().sequences)
    assert written(stopping_criteria=StoppingCriteriaList([ends])).sequences.shape[1] == 15


# What ends rows


def test_criteria_end_all_rows_or_each():
    assert written(stopping_criteria=[lambda ids, scores: ids.shape[1] >= 11]).sequences.shape == (2, 11)
    out = written(
        stopping_criteria=[lambda ids, scores, **k: np.array([ids.shape[1] >= 11, ids.shape[1] >= 13])], pad_token_id=1
    )
    assert out.attention_mask[:, 9:].sum(1).tolist() == [2, 4]
    assert (out.sequences[0, 11:] == 1).all()
    assert out.past_key_values.length.tolist() == [10, 12]


def test_criteria_are_told_the_scores_where_those_are_asked_for():
    told = []
    written(stopping_criteria=[lambda ids, scores: told.append(scores) or False])
    assert told == [None] * 6
    told.clear()
    written(stopping_criteria=[lambda ids, scores: told.append(scores) or False], output_scores=True)
    assert [len(scores) for scores in told] == [1, 2, 3, 4, 5, 6]
    assert told[0][0].shape == (2, TINY.vocab_size)


class Letters:
    """A tokenizer of which each id is one character."""

    def decode(self, ids, skip_special_tokens=False):
        return "".join(chr(0x4E00 + int(each)) for each in ids)


@pytest.mark.parametrize("way", ["stop_strings", "stopping_criteria"])
def test_what_stops_a_beam_is_like_an_end(way):
    options = {"num_beams": 4, "num_return_sequences": 4, "max_new_tokens": 5, "pad_token_id": 0}
    token = int(written(**options).sequences[0, 10])
    ends = written(**{**options, "eos_token_id": token})
    if way == "stop_strings":
        found = written(stop_strings=chr(0x4E00 + token), tokenizer=Letters(), **options)
    else:
        found = written(stopping_criteria=[lambda ids, scores: ids[:, -1] == token], **options)
    assert np.array_equal(found.sequences, ends.sequences)
    assert np.allclose(found.sequences_scores, ends.sequences_scores)
    assert (found.sequences[:, 9:] == token).any()


def test_a_stop_string_across_tokens_of_a_beam():
    options = {"num_beams": 3, "max_new_tokens": 5, "pad_token_id": 0}
    best = written(IDS[:1], **options).sequences[0, 9:]
    stop = "".join(chr(0x4E00 + token) for token in best[1:3])
    found = written(IDS[:1], stop_strings=stop, tokenizer=Letters(), **options)
    tokens = found.sequences[0, 9:][found.attention_mask[0, 9:] != 0].tolist()
    assert len(tokens) == 5 or tokens[-2:] == best[1:3].tolist()
    # a beam that ended earlier has a score of its own length
    total = sum(log_softmax(logits(IDS[0].tolist() + tokens[:n]))[token] for n, token in enumerate(tokens))
    assert np.isclose(found.sequences_scores[0], total / len(tokens), atol=1e-5)


def logits(row):
    return heads.causal_lm(TINY, PARAMETERS, np.array([row])).logits[0, -1]


# Embeddings


@pytest.mark.parametrize("options", [{}, SAMPLED, {"num_beams": 3}, {**SAMPLED, "num_return_sequences": 2}])
def test_embeddings_are_their_ids(options):
    plain = written(mask=MASK, **options)
    embeds = EMBEDDING[IDS]
    alone = written(None, MASK, inputs_embeds=embeds, **options)
    assert np.array_equal(alone.sequences, plain.sequences[:, 9:])
    beside = written(IDS, MASK, inputs_embeds=embeds, **options)
    assert np.array_equal(beside.sequences, plain.sequences)
    assert np.array_equal(written(None, MASK, inputs=IDS, **options).sequences, plain.sequences)


def test_options_that_look_back_see_ids_and_not_embeddings():
    first = int(written().sequences[0, 9])
    asked = Asked()
    written(None, inputs_embeds=EMBEDDING[IDS], logits_processor=[asked])
    assert [ids.shape for ids in asked.ids] == [(2, n) for n in range(6)]
    shorter = written(IDS[:, 4:], inputs_embeds=EMBEDDING[IDS])
    assert shorter.sequences.shape == (2, 11)
    assert shorter.sequences[0, 5] == first
    cut = written(None, inputs_embeds=EMBEDDING[IDS], max_length=12, max_new_tokens=None)
    assert cut.sequences.shape == (2, 3)  # counted with the embeddings


@pytest.mark.parametrize(
    ("ids", "options", "message"),
    [
        (None, {}, "give input_ids or inputs_embeds"),
        (IDS, {"inputs": IDS}, "another name of input_ids"),
        (IDS[:1], {"inputs_embeds": EMBEDDING[IDS]}, "as many rows as inputs_embeds, 2, got 1"),
        (None, {"inputs_embeds": EMBEDDING[IDS][..., :5]}, "inputs_embeds must have the shape"),
        (None, {"inputs_embeds": EMBEDDING[IDS], "assistant": engine.Engine(TINY, PARAMETERS)}, "assistant_model"),
        (IDS, {"token_type_ids": np.ones_like(IDS)}, "no token types"),
        (IDS, {"position_ids": np.zeros_like(IDS)}, "position_ids"),
    ],
)
def test_inputs_that_contradict(ids, options, message):
    with pytest.raises((InputError, GenerationConfigError), match=message):
        written(ids, **options)


def test_what_tokenizers_and_old_loops_add_is_taken():
    extra = {
        "token_type_ids": np.zeros_like(IDS), "position_ids": np.maximum(MASK.cumsum(1) - 1, 0), "use_cache": False,
        "cache_position": np.arange(9), "synced_gpus": True, "cache_implementation": "static",
        "use_model_defaults": True,
    }  # fmt: skip
    assert np.array_equal(written(mask=MASK, **extra).sequences, written(mask=MASK).sequences)


def test_a_turn_after_embeddings_is_refused():
    out = written(None, inputs_embeds=EMBEDDING[IDS])
    with pytest.raises(InputError, match="of inputs_embeds"):
        written(np.concatenate([IDS, out.sequences], axis=1), past=out)
    with pytest.raises(InputError, match="not with inputs_embeds"):
        written(None, inputs_embeds=EMBEDDING[IDS], past=written())


# What is told of each step


def test_logits_and_what_is_inside_are_those_of_the_whole_text():
    out = written(mask=MASK, output_logits=True, output_hidden_states=True, output_attentions=True, suppress_tokens=[5])
    whole = heads.causal_lm(TINY, PARAMETERS, out.sequences[:, :-1], attention_mask=out.attention_mask[:, :-1])
    assert [len(x) for x in (out.logits, out.hidden_states, out.attentions)] == [6, 6, 6]
    for step in range(6):
        assert np.allclose(out.logits[step], whole.logits[:, 8 + step], atol=1e-4)
        at = slice(0, 9) if step == 0 else slice(8 + step, 9 + step)
        for one, other in zip(out.hidden_states[step], whole.hidden_states, strict=True):
            assert np.array_equal(one, other[:, at])
        for one, other in zip(out.attentions[step], whole.attentions, strict=True):
            assert np.array_equal(one, other[:, :, at, : at.stop])
    beside = written(None, MASK, inputs_embeds=EMBEDDING[IDS], output_hidden_states=True)
    assert np.allclose(beside.hidden_states[5][-1], written(mask=MASK, output_hidden_states=True).hidden_states[5][-1])


def test_of_beams_each_running_one_is_told():
    out = written(num_beams=3, output_logits=True, output_hidden_states=True, output_attentions=True)
    assert out.logits[0].shape == (6, TINY.vocab_size)
    assert [x[0].shape for x in out.hidden_states] == [(6, 9, TINY.hidden_size)] + [(6, 1, TINY.hidden_size)] * 5
    assert out.attentions[3][0].shape == (6, TINY.num_attention_heads, 1, 12)
    head = heads.head_weight(TINY, PARAMETERS)
    for step in range(6):
        assert np.allclose(out.hidden_states[step][-1][:, -1] @ head.T, out.logits[step], atol=1e-4)


@pytest.mark.parametrize("penalty", [0.0, 1.0])
def test_transition_scores_add_up_to_those_of_beams(penalty):
    ends = tuple(range(20, 60))
    out = written(num_beams=4, num_return_sequences=3, output_scores=True, eos_token_id=ends, length_penalty=penalty)
    found = driver.transition_scores(out.sequences, list(out.scores), out.beam_indices, normalize_logits=False)
    length = (out.beam_indices >= 0).sum(1)
    assert np.allclose(found.sum(1) / length**penalty, out.sequences_scores, atol=1e-5)
    assert (found[out.beam_indices[:, : found.shape[1]] < 0] == 0).all()


def test_transition_scores_of_a_greedy_text():
    out = written(output_scores=True)
    found = driver.transition_scores(out.sequences, list(out.scores), None, normalize_logits=True)
    for row, step in itertools.product(range(2), range(6)):
        wanted = log_softmax(logits(out.sequences[row, : 9 + step].tolist()))
        assert np.isclose(found[row, step], wanted[out.sequences[row, 9 + step]], atol=1e-4)
    with pytest.raises(InputError, match="compute_transition_scores"):
        driver.transition_scores(out.sequences[:1], list(out.scores), None, normalize_logits=False)


# Streams


class Told:
    def __init__(self):
        self.told, self.ended = [], 0

    def put(self, value):
        self.told.append(value.tolist())

    def end(self):
        self.ended += 1


def test_beams_stream_their_best_row_at_the_end():
    streamer = Told()
    out = written(num_beams=3, num_return_sequences=2, streamer=streamer)
    assert streamer.told == [IDS.tolist(), *out.sequences[::2, 9:].T.tolist()]
    assert streamer.ended == 1
    prompt = driver.prepare(TINY, IDS[:1], None, GenerationConfig(), {**ENDLESS, "num_beams": 3})
    pieces = list(driver.stream(engine.Engine(TINY, PARAMETERS), prompt, tokenizer=Letters()))
    assert "".join(pieces) == Letters().decode(written(IDS[:1], num_beams=3).sequences[0, 9:])


def test_a_streamer_is_told_of_every_sequence():
    streamer = Told()
    out = written(IDS[:1], num_return_sequences=2, streamer=streamer, **SAMPLED)
    assert streamer.told == [[IDS[0].tolist()] * 2, *out.sequences[:, 9:].T.tolist()]


def test_a_stream_that_is_closed_holds_nothing():
    class Held(engine.Engine):
        pass

    subject = Held(TINY, PARAMETERS)
    prompt = driver.prepare(TINY, IDS[:1], None, GenerationConfig(), {**ENDLESS, "max_new_tokens": 30})
    pieces = driver.stream(subject, prompt, tokenizer=Letters())
    assert next(pieces)
    gone = weakref.ref(subject)
    del subject
    assert gone() is not None
    pieces.close()
    gc.collect()
    assert gone() is None


def test_several_rows_are_refused_before_the_first_piece():
    prompt = driver.prepare(TINY, IDS, None, GenerationConfig(), {})
    with pytest.raises(InputError, match="one row"):
        driver.stream(engine.Engine(TINY, PARAMETERS), prompt, tokenizer=Letters())
