"""generate: the reference's tokens in every backend, whatever the options; compilations are few, errors come early."""

from __future__ import annotations

import importlib
import itertools
from functools import partial

import numpy as np
import pytest
from frameworks import REQUESTED

from conformance.weights import random_parameters
from mistral_core import GenerationConfig
from mistral_core.config.presets import TINY
from mistral_core.data import TINY_CHECKPOINT
from mistral_core.errors import (
    EmptyInputError,
    GenerationConfigError,
    InputError,
    NonFiniteInputError,
    SequenceTooLongError,
    TokenIdError,
    UnsupportedFeatureError,
)
from mistral_core.reference import engine, heads
from mistral_core.text.tokenizer import MistralTokenizer

CONFIG = TINY.replace(num_hidden_layers=1)
NEW = 2 * CONFIG.sliding_window + 3
PARAMETERS = random_parameters(CONFIG, "MistralForCausalLM")
IDS = np.random.default_rng(0).integers(3, CONFIG.vocab_size, (2, 9))
EXPECTED = heads.greedy(CONFIG, PARAMETERS, IDS, max_new_tokens=NEW)


@pytest.fixture(scope="module")
def model(backend):
    return backend.MistralForCausalLM(CONFIG).load_arrays(PARAMETERS)


def new_tokens(out):
    return np.asarray(out)[:, IDS.shape[1] :]


@pytest.mark.parametrize(("compile", "cache"), [("off", "auto"), ("off", "full"), ("on", "auto")])
def test_tokens_are_the_reference_s(model, compile, cache):
    out = model.generate(IDS, max_new_tokens=NEW, compile=compile, cache=cache, eos_token_id=None)
    assert np.array_equal(new_tokens(out), EXPECTED)
    assert np.array_equal(np.asarray(out)[:, : IDS.shape[1]], IDS)


def test_each_row_equals_the_row_alone(model):
    mask = np.ones_like(IDS)
    mask[0, :4] = 0
    batch = new_tokens(model.generate(IDS, attention_mask=mask, max_new_tokens=NEW, eos_token_id=None))
    alone = np.asarray(model.generate(IDS[:1, 4:], max_new_tokens=NEW, eos_token_id=None))[:, 5:]
    assert np.array_equal(batch[:1], alone)


def test_a_list_of_end_tokens_ends_rows_one_by_one(model):
    ends = (int(EXPECTED[0, 2]), int(EXPECTED[1, 4]))
    out = new_tokens(model.generate(IDS, max_new_tokens=NEW, eos_token_id=ends, pad_token_id=1))
    for row, wanted in zip(out, EXPECTED, strict=True):
        stop = next(i for i, token in enumerate(wanted) if token in ends) + 1
        assert np.array_equal(row[:stop], wanted[:stop])
        assert (row[stop:] == 1).all()


def test_no_new_tokens_gives_the_prompt_back(model):
    assert np.array_equal(np.asarray(model.generate(IDS, max_new_tokens=0)), IDS)


def test_options_come_before_the_config_and_the_config_before_the_checkpoint_s(model):
    config = GenerationConfig(max_new_tokens=3)
    assert np.asarray(model.generate(IDS, generation_config=config)).shape[1] == IDS.shape[1] + 3
    assert np.asarray(model.generate(IDS, generation_config=config, max_new_tokens=2)).shape[1] == IDS.shape[1] + 2


@pytest.mark.parametrize(
    ("error", "inputs", "options"),
    [
        (GenerationConfigError, [[1]], {"top_p": 0.0}),
        (GenerationConfigError, [[1]], {"seed": [1, 2], "do_sample": True}),
        (GenerationConfigError, [[1]], {"stop_strings": "x"}),
        (GenerationConfigError, [[1]], {"num_beams": 2, "num_return_sequences": 3}),
        (GenerationConfigError, [[1]], {"prompt_lookup_num_tokens": 2, "on_device_loop": True}),
        (TokenIdError, [[1, CONFIG.vocab_size]], {}),
        (EmptyInputError, [[]], {}),
        (EmptyInputError, [[1, 2]], {"attention_mask": [[0, 0]]}),
        (GenerationConfigError, [[1]], {"max_new_tokens": -1}),
        (GenerationConfigError, [[1]], {"max_new_tokens": True}),
        (GenerationConfigError, [[1]], {"temperatur": 1.0}),
        (GenerationConfigError, [[1]], {"eos_token_id": CONFIG.vocab_size}),
        (SequenceTooLongError, [[1]], {"max_new_tokens": CONFIG.max_position_embeddings}),
    ],
)
def test_errors_come_before_any_work(model, error, inputs, options):
    with pytest.raises(error):
        model.generate(inputs, **options)


# Sampling

SAMPLED = {
    "do_sample": True, "temperature": 0.8, "top_k": 40, "top_p": 0.95, "min_p": 0.01, "repetition_penalty": 1.1,
    "seed": 5, "eos_token_id": None,
}  # fmt: skip
MASK = np.array([[0, 0, 0, 0, 1, 1, 1, 1, 1], [1] * 9])


def reference(**options):
    return engine.generate(CONFIG, PARAMETERS, IDS, **options)


@pytest.mark.feature("Sampling: the same seed, the same tokens in every framework")
def test_128_tokens_of_one_seed_are_the_reference_s(model):
    out = model.generate(IDS, attention_mask=MASK, max_new_tokens=128, **SAMPLED)
    assert np.array_equal(out, reference(attention_mask=MASK, max_new_tokens=128, **SAMPLED).sequences)


def test_a_row_with_a_seed_of_its_own_is_the_row_alone(model):
    options = {**SAMPLED, "max_new_tokens": 9}
    batch = new_tokens(model.generate(IDS, attention_mask=MASK, **{**options, "seed": [3, 4]}))
    alone = np.asarray(model.generate(IDS[:1, 4:], **{**options, "seed": [3]}))[:, 5:]
    assert np.array_equal(batch[:1], alone)
    copies = model.generate(IDS, **{**options, "seed": [3, 4]}, num_return_sequences=2)
    assert np.array_equal(copies, reference(**{**options, "seed": [3, 4]}, num_return_sequences=2).sequences)


def test_the_framework_s_seed_decides_where_none_is_given(backend, model):
    name = backend.__name__
    if name == "mistral_flax":
        pytest.skip("JAX has no generator of its own")
    if name == "mistral_torch":
        seed = importlib.import_module("torch").manual_seed
    else:
        seed = importlib.import_module("keras").utils.set_random_seed
    options = {**SAMPLED, "seed": None, "max_new_tokens": 9}
    seed(1)
    first = np.asarray(model.generate(IDS, **options))
    assert not np.array_equal(first, model.generate(IDS, **options))
    seed(1)
    assert np.array_equal(first, model.generate(IDS, **options))


@pytest.mark.feature("Beam search")
@pytest.mark.parametrize(
    "options", [{"num_return_sequences": 2}, {"do_sample": True, "seed": 2, "early_stopping": True}]
)
def test_beams_are_the_reference_s(model, options):
    options = {"num_beams": 3, "max_new_tokens": 7, "eos_token_id": (20, 30, 40), "pad_token_id": 0, **options}
    out = model.generate(IDS, attention_mask=MASK, **options, return_dict_in_generate=True)
    wanted = reference(attention_mask=MASK, **options)
    assert np.array_equal(out.sequences, wanted.sequences)
    assert np.allclose(out.sequences_scores, wanted.sequences_scores, atol=1e-4)


def test_options_that_look_back_are_the_reference_s(model):
    options = {
        "no_repeat_ngram_size": 2, "bad_words_ids": [[17], [3, 90]], "logit_bias": {5: 2.0}, "min_new_tokens": 5,
        "eos_token_id": (3, 22), "max_new_tokens": 12,
    }  # fmt: skip
    assert np.array_equal(model.generate(IDS, **options), reference(**options).sequences)


@pytest.mark.feature("Scores, cache and sequences as one output")
def test_the_output_object(model):
    out = model.generate(IDS, max_new_tokens=4, eos_token_id=None, return_dict_in_generate=True, output_scores=True)
    wanted = reference(max_new_tokens=4, eos_token_id=None, output_scores=True)
    kind = type(model.generate(IDS, max_new_tokens=0))
    assert isinstance(out.sequences, kind)
    assert np.array_equal(out["sequences"], wanted.sequences)
    assert np.array_equal(out.attention_mask, np.ones((2, 13)))
    assert len(out.scores) == 4
    for one, other in zip(out.scores, wanted.scores, strict=True):
        assert isinstance(one, kind)
        assert np.allclose(one, other, atol=1e-4)


def test_a_caller_s_functions_get_the_framework_s_arrays(model):
    options, kind, asked = {"max_new_tokens": 5, "eos_token_id": None}, type(model.generate(IDS, max_new_tokens=0)), []

    def processor(ids, scores):
        asked.append((isinstance(ids, kind), isinstance(scores, kind), tuple(ids.shape), tuple(scores.shape)))
        return scores * 1

    def criterion(ids, scores):
        return ids[:, -1] != ids[:, -1] if ids.shape[1] < 12 else ids[:, -1] == ids[:, -1]

    for beams in (1, 2):
        asked.clear()
        found = model.generate(
            IDS, attention_mask=MASK, logits_processor=[processor], stopping_criteria=[criterion], num_beams=beams,
            **options,
        )  # fmt: skip
        wanted = reference(attention_mask=MASK, num_beams=beams, **{**options, "max_new_tokens": 3})
        assert np.array_equal(found, wanted.sequences)
        assert asked == [(True, True, (2 * beams, n), (2 * beams, CONFIG.vocab_size)) for n in (9, 10, 11)]


def test_embeddings_and_what_is_told_of_each_step(model):
    options = {"max_new_tokens": 3, "eos_token_id": None, "attention_mask": MASK}
    told = dict.fromkeys(("output_logits", "output_scores", "output_hidden_states", "output_attentions"), True)
    wanted = reference(**options, **told)
    embeds = np.asarray(PARAMETERS["model.embed_tokens.weight"])[IDS].astype(np.float32)
    out = model.generate(inputs_embeds=embeds, inputs=IDS, return_dict_in_generate=True, **options, **told)
    assert np.array_equal(out.sequences, wanted.sequences)
    assert all(np.allclose(a, b, atol=1e-4) for a, b in zip(out.logits, wanted.logits, strict=True))
    for name in ("hidden_states", "attentions"):
        for found, other in zip(out[name], wanted[name], strict=True):
            assert [tuple(x.shape) for x in found] == [x.shape for x in other]
            assert all(np.allclose(a[..., -1, :], b[..., -1, :], atol=1e-3) for a, b in zip(found, other, strict=True))
    scores = model.compute_transition_scores(out.sequences, out.scores, normalize_logits=True)
    assert isinstance(scores, type(out.sequences))
    assert np.asarray(scores).shape == (2, 3)
    assert np.array_equal(model.generate(inputs_embeds=embeds, **options), wanted.sequences[:, 9:])


def test_options_that_no_step_has_are_the_reference_s(model):
    options = {
        "do_sample": True, "seed": 3, "epsilon_cutoff": 0.02, "eta_cutoff": 0.01, "forced_eos_token_id": 5,
        "exponential_decay_length_penalty": (2, 1.3), "eos_token_id": 5, "max_new_tokens": 7,
        "sequence_bias": [[[17, 3], 4.0]],
    }  # fmt: skip
    assert np.array_equal(model.generate(IDS, **options), reference(**options).sequences)


def test_what_decode_loops_ask_a_cache(backend, model):
    cache = model(IDS, attention_mask=MASK, use_cache=True).past_key_values
    assert cache.get_seq_length() == 9
    assert cache.get_max_cache_shape() == -1
    assert backend.KVCache.allocate(CONFIG, 2, 30).get_max_cache_shape() == 30
    pair = cache.batch_repeat_interleave(2)
    assert np.asarray(pair.length).tolist() == [5, 5, 9, 9]
    assert np.asarray(pair.reorder_cache(np.array([2, 0])).length).tolist() == [9, 5]
    assert np.asarray(pair.batch_select_indices(np.array([3])).length).tolist() == [9]
    full = backend.KVCache.allocate(CONFIG, 2, 30, rolling=False)
    full = model(IDS, attention_mask=MASK, past_key_values=full).past_key_values
    for cropped in (full.crop(7), full.crop(-2)):
        assert np.asarray(cropped.length).tolist() == [5, 7]
    assert np.asarray(full.length).tolist() == [5, 9]
    again = model(IDS[:, 7:], attention_mask=np.array([[0, 0], [1, 1]]), past_key_values=full.crop(7)).logits
    again, whole = (x.detach() if hasattr(x, "detach") else x for x in (again, model(IDS).logits))
    assert np.allclose(np.asarray(again)[1], np.asarray(whole)[1, 7:], atol=1e-4)
    with pytest.raises(InputError, match="crop"):
        cache.crop(3)  # a window has rolled on


# Guesses, chunks, turns, loops


@pytest.mark.feature("Speculative decoding: prompt lookup, assistant model")
@pytest.mark.parametrize("options", [{"eos_token_id": None}, SAMPLED], ids=["greedy", "sampled"])
def test_guesses_change_no_token(backend, model, options):
    ids, options = np.tile(IDS, 2) % 17 + 3, {"max_new_tokens": NEW, **options}
    wanted = engine.generate(CONFIG, PARAMETERS, ids, **options).sequences
    other = {
        n: (x + 0.02 * np.random.default_rng(3).normal(size=x.shape)).astype(x.dtype) for n, x in PARAMETERS.items()
    }
    assistant = backend.MistralForCausalLM(CONFIG).load_arrays(other)
    found = model.generate(ids, **options, assistant_model=assistant, return_dict_in_generate=True)
    assert np.array_equal(found.sequences, wanted)
    found = model.generate(ids, **options, prompt_lookup_num_tokens=3, max_matching_ngram_size=1)
    assert np.array_equal(found, wanted)


@pytest.mark.feature("Chunked prefill")
def test_a_prompt_in_chunks_is_the_whole_prompt(model):
    long = np.random.default_rng(2).integers(3, CONFIG.vocab_size, (1, 75))
    wanted = engine.generate(CONFIG, PARAMETERS, long, max_new_tokens=5, eos_token_id=None).sequences
    for chunk in (None, 32, 8):
        out = model.generate(long, max_new_tokens=5, eos_token_id=None, prefill_chunk_size=chunk)
        assert np.array_equal(out, wanted), chunk


@pytest.mark.feature("A cache that starts the next turn")
def test_the_next_turn_starts_from_the_cache(model):
    options = {"max_new_tokens": 10, "eos_token_id": None}
    first = model.generate(IDS, attention_mask=MASK, **options, return_dict_in_generate=True)
    ids = np.concatenate([np.asarray(first.sequences), IDS[:, :3]], axis=1)
    mask = np.concatenate([np.asarray(first.attention_mask), np.ones((2, 3), int)], axis=1)
    wanted = engine.generate(CONFIG, PARAMETERS, ids, attention_mask=mask, **options).sequences
    for past in (first, first.past_key_values, first):  # which stay as they are
        assert np.array_equal(model.generate(ids, attention_mask=mask, past_key_values=past, **options), wanted)
    edited = np.concatenate([ids[:, :-7], (ids[:, -7:] + 1) % CONFIG.vocab_size], axis=1)
    wanted = engine.generate(CONFIG, PARAMETERS, edited, attention_mask=mask, **options).sequences
    assert np.array_equal(model.generate(edited, attention_mask=mask, past_key_values=first, **options), wanted)
    with pytest.raises(InputError, match="past_key_values"):
        model.generate(IDS[:1], past_key_values=first, **options)


@pytest.mark.feature("The decode loop on the device")
@pytest.mark.parametrize("framework", ["flax", "tf"])
@pytest.mark.parametrize("options", [{}, {**SAMPLED, "repetition_penalty": 1.0}], ids=["greedy", "sampled"])
def test_a_loop_on_the_device_flax_tf(framework, options):
    if framework not in REQUESTED:
        pytest.skip(f"{framework} was not asked for")
    model = importlib.import_module(f"mistral_{framework}").MistralForCausalLM(CONFIG).load_arrays(PARAMETERS)
    options = {"max_new_tokens": NEW, **options, "eos_token_id": None}
    plain = reference(attention_mask=MASK, **options)
    out = model.generate(IDS, attention_mask=MASK, on_device_loop=True, **options, return_dict_in_generate=True)
    assert np.array_equal(out.sequences, plain.sequences)
    assert np.array_equal(np.asarray(out.past_key_values.length), plain.past_key_values.length)
    end = int(plain.sequences[0, 12])
    options |= {"eos_token_id": end, "pad_token_id": 1}
    out = model.generate(IDS, attention_mask=MASK, on_device_loop=True, **options)
    assert np.array_equal(out, reference(attention_mask=MASK, **options).sequences)


def test_torch_has_no_loop_on_the_device():
    torch = pytest.importorskip("mistral_torch")
    with pytest.raises(UnsupportedFeatureError, match="on_device_loop"):
        torch.MistralForCausalLM(CONFIG).generate(IDS, on_device_loop=True, max_new_tokens=3)


# Text


@pytest.fixture(scope="module")
def writer(backend):
    """The embedded checkpoint, whose text is words; compiled once for the tests of text."""
    return backend.MistralForCausalLM.from_pretrained(TINY_CHECKPOINT, dtype="float32")


@pytest.mark.feature("Streaming: stream, TextStreamer, TextIteratorStreamer")
def test_text_as_it_comes(writer):
    tokenizer, model = MistralTokenizer.from_pretrained(TINY_CHECKPOINT), writer
    prompt = np.array([tokenizer.encode("Emma was")])
    whole = tokenizer.decode(np.asarray(model.generate(prompt, max_new_tokens=20))[0], skip_special_tokens=True)
    pieces = list(model.stream(prompt, tokenizer=tokenizer, max_new_tokens=20))
    assert len(pieces) > 5
    assert "Emma was" + "".join(pieces) == whole
    stop = whole[20:24]
    stopped = "".join(model.stream(prompt, tokenizer=tokenizer, max_new_tokens=20, stop_strings=[stop]))
    assert "Emma was" + stopped == whole[: whole.index(stop, len("Emma was"))]
    ids = np.asarray(model.generate(prompt, max_new_tokens=20, stop_strings=stop, tokenizer=tokenizer))[0]
    assert stop in tokenizer.decode(ids)
    assert stop not in tokenizer.decode(ids[:-1])
    stream = model.stream(prompt, tokenizer=tokenizer, max_new_tokens=2000)
    assert "".join(itertools.islice(stream, 3))  # and no more of it is computed
    stream.close()


def test_stop_strings_end_rows_of_a_batch_one_by_one(writer):
    tokenizer, model = MistralTokenizer.from_pretrained(TINY_CHECKPOINT), writer
    texts = ["Emma was", "Elizabeth was surprised"]
    batch = tokenizer(texts, padding=True, return_tensors="np")
    options = {"max_new_tokens": 24, "stop_strings": [",", "."], "tokenizer": tokenizer, "pad_token_id": 0}
    out = np.asarray(model.generate(**batch, **options))
    for text, row in zip(texts, out, strict=True):
        alone = np.asarray(model.generate(np.array([tokenizer.encode(text)]), **options))[0]
        decode = partial(tokenizer.decode, skip_special_tokens=True)
        assert decode(row[row != 0]) == decode(alone)
        assert decode(alone).endswith((",", "."))


# What may go wrong


def test_logits_that_are_no_numbers_are_an_error(backend):  # 109
    broken = {name: np.array(x) for name, x in PARAMETERS.items()}
    broken["model.norm.weight"][:] = np.nan
    model = backend.MistralForCausalLM(CONFIG).load_arrays(broken)
    for options in ({}, SAMPLED, {"num_beams": 2}):
        with pytest.raises(NonFiniteInputError):
            model.generate(IDS, max_new_tokens=3, **options)


def test_an_interrupted_call_leaves_the_cache_as_it_was(model):  # 113
    class Interrupt:
        told = 0

        def put(self, value):
            self.told += 1
            if self.told == 4:
                raise KeyboardInterrupt

        def end(self):
            pass

    first = model.generate(IDS, max_new_tokens=8, eos_token_id=None, return_dict_in_generate=True)
    ids = np.asarray(first.sequences)
    wanted = np.asarray(model.generate(ids, max_new_tokens=8, eos_token_id=None))
    with pytest.raises(KeyboardInterrupt):
        model.generate(ids, max_new_tokens=8, eos_token_id=None, past_key_values=first, streamer=Interrupt())
    again = model.generate(ids, max_new_tokens=8, eos_token_id=None, past_key_values=first)
    assert np.array_equal(again, wanted)


# Compilations and memory


@pytest.mark.feature("Few compilations: fixed shapes")
def test_prompts_of_fifty_lengths_are_few_compilations(backend, monkeypatch):
    model = backend.MistralForCausalLM(CONFIG.replace(sliding_window=None)).load_arrays(PARAMETERS)
    counted = counting(backend.__name__, model, monkeypatch)
    ids = np.random.default_rng(0).integers(3, CONFIG.vocab_size, (1, 1000))
    for length in range(1, 1000, 20):
        model.generate(ids[:, :length], max_new_tokens=2, eos_token_id=None, compile="on")
    assert 1 < counted() <= 8


def test_a_setting_that_changes_no_program_compiles_nothing_anew(backend, monkeypatch):
    model = backend.MistralForCausalLM(CONFIG).load_arrays(PARAMETERS)
    counted = counting(backend.__name__, model, monkeypatch)

    def run(**options):
        return model.generate(IDS, **{"max_new_tokens": 3, "eos_token_id": None, "compile": "on", **options})

    run(do_sample=True, temperature=0.9)
    once = counted()
    assert once > 0
    model.config.pad_token_id, model.config.bos_token_id, model.config.eos_token_id = 5, 6, 7
    model.config.id2label, model.config.initializer_range = {i: f"label {i}" for i in range(CONFIG.num_labels)}, 0.5
    model.generation_config.temperature, model.generation_config.pad_token_id = 0.5, 8
    run(do_sample=True, temperature=np.float32(0.7), seed=3, max_new_tokens=np.int64(4), eos_token_id=9)
    assert counted() == once


def counting(name, model, monkeypatch):
    """A function that tells how often a model's step has been compiled since."""
    module = importlib.import_module(f"{name}.generate")
    if name == "mistral_flax":
        nnx = importlib.import_module("flax").nnx
        step, known = module._compiled(nnx.graphdef(module.as_program(model)))[0], module._compiled.cache_info().misses
        return lambda: step._cache_size() + module._compiled.cache_info().misses - known  # another graph is one more
    if name == "mistral_tf":
        traced = {}

        def traces():
            traced.update(
                {id(f): f for f in module._compiled[model]}
            )  # those before stay where others took their place
            return sum(f.experimental_get_tracing_count() for f in traced.values())

        return traces
    torch = importlib.import_module("torch")
    graphs = []

    def backend(graph, _):
        graphs.append(graph)
        return graph

    compile = torch.compile
    torch._dynamo.reset()
    monkeypatch.setattr(torch, "compile", lambda f, **o: compile(f, **{**o, "backend": backend, "options": None}))
    return lambda: len(graphs)


@pytest.mark.feature("Rolling cache: constant memory")
def test_a_window_bounds_the_cache(model):
    sizes = []
    for new in (5, 90):
        out = model.generate(IDS, max_new_tokens=new, eos_token_id=None, return_dict_in_generate=True)
        sizes.append([k.shape[1] for k in out.past_key_values.keys])
    assert set(sizes[1]) == {CONFIG.sliding_window + 1 + 64}  # window, spare slot, lookback
    full = model.generate(IDS, max_new_tokens=5, cache="full", eos_token_id=None, return_dict_in_generate=True)
    assert all(k.shape[1] >= 14 for k in full.past_key_values.keys)
