"""GenerationConfig and the decode loop, with a stand-in for a backend."""

from __future__ import annotations

import copy
import itertools
import json
import math
import pickle

import numpy as np
import pytest

from mistral_core import GenerationConfig
from mistral_core.config.presets import TINY
from mistral_core.errors import GenerationConfigError, InputError, MistralError, NonFiniteInputError
from mistral_core.generation import driver
from mistral_core.generation.engine import pieces
from mistral_core.generation.preparing import prepare
from mistral_core.reference.cache import KVCache

PROMPT = np.array([[5, 2, 6], [7, 8, 9]])


class Script:
    """A stand-in for a backend's engine, which writes given rows whatever it is fed."""

    fixed_prompts = fixed_caches = False
    config = TINY

    def __init__(self, rows):
        self.rows, self.calls = np.array(rows), 0

    def allocate(self, batch, capacity, *, rolling, lookback, dtype):
        return KVCache.allocate(TINY, batch, capacity, rolling=rolling, lookback=lookback)

    def step(self, cache, ids_BT, mask_BT, rule, values):
        self.calls += 1
        cache = cache._replace(length=cache.length + mask_BT.sum(1))
        return driver.Chosen(self.rows[np.arange(len(self.rows)), values.step][:, None]), cache

    def stops(self, here):
        return here

    def random_seed(self):
        raise AssertionError("a seed was drawn although one was given")


def generated(rows, **options):
    """What the driver makes of a backend that would write these rows; and how many steps it took."""
    engine = Script(rows)
    given = {"max_new_tokens": len(rows[0]), "seed": 0, **options}
    prompt = driver.prepare(TINY, PROMPT, None, GenerationConfig(), given)
    out = driver.generate(engine, prompt)
    return out.sequences[:, PROMPT.shape[1] :].tolist(), engine.calls


def test_rows_end_one_by_one_and_the_loop_with_the_last():
    rows, steps = generated([[4, 2, 9, 9, 9], [3, 3, 3, 2, 9]], eos_token_id=2, pad_token_id=0)
    assert rows == [[4, 2, 0, 0], [3, 3, 3, 2]]
    assert steps == 4


def test_an_end_in_the_prompt_does_not_end_a_row():
    rows, _ = generated([[4, 5], [3, 3]], eos_token_id=2)  # 103: the first prompt holds a 2
    assert rows == [[4, 5], [3, 3]]


def test_an_end_as_the_first_token():
    rows, steps = generated([[2, 9], [2, 9]], eos_token_id=2)
    assert rows == [[2], [2]]
    assert steps == 1


def test_several_ends_and_none():
    assert generated([[4, 3, 9], [1, 9, 9]], eos_token_id=(1, 3), pad_token_id=0)[0] == [[4, 3], [1, 0]]
    assert generated([[2, 2], [2, 2]], eos_token_id=None)[0] == [[2, 2], [2, 2]]


def test_padding_falls_back_to_the_end():  # 104
    assert generated([[2, 9], [4, 4]], eos_token_id=2)[0] == [[2, 2], [4, 4]]


def test_no_new_tokens_calls_nothing():  # 101
    assert generated([[9], [9]], max_new_tokens=0) == ([[], []], 0)


def test_a_token_that_could_not_be_chosen_is_an_error():  # 108, 109
    with pytest.raises(NonFiniteInputError, match="row 1, new token 1"):
        generated([[4, 4, 4], [4, -1, 4]], eos_token_id=None)
    assert generated([[4, 4, 4], [2, -1, -1]], eos_token_id=2)[0] == [
        [4, 4, 4],
        [2, 2, 2],
    ]  # an ended row's is nobody's


def test_time_that_runs_out_ends_with_what_there_is(monkeypatch):  # 113
    clock = itertools.count()
    monkeypatch.setattr(driver.time, "monotonic", lambda: next(clock))
    assert generated([[4] * 9, [3] * 9], eos_token_id=None, max_time=3.5)[0] == [[4] * 4, [3] * 4]


@pytest.mark.parametrize("chunk", [1, 2, 5, 100, 512])
def test_pieces_are_of_few_kinds_and_waste_little(chunk):
    kinds = {1, max(chunk // 16, 1), max(chunk // 4, 1), chunk}
    for columns in range(1, 1200):
        widths = pieces(columns, chunk)
        padding = sum(widths) - columns
        assert set(widths) <= kinds
        assert 0 <= padding < widths[0]
        assert padding < max(columns, chunk // 16, 1)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"max_new_tokens": -1}, "max_new_tokens"),
        ({"max_new_tokens": 1.0}, "max_new_tokens"),
        ({"max_new_tokens": True}, "max_new_tokens"),
        ({"eos_token_id": 97}, "eos_token_id"),
        ({"eos_token_id": (2, -1)}, "eos_token_id"),
        ({"pad_token_id": 97}, "pad_token_id"),
        ({"cache": "ring"}, "cache"),
        ({"compile": "yes"}, "compile"),
        ({"min_new_tokens": 30}, "min_new_tokens: 30 are more than max_new_tokens"),
        ({"temperature": -1.0}, "temperature"),
        ({"temperature": math.nan}, "temperature"),
        ({"temperature": math.inf}, "temperature"),
        ({"temperature": "hot"}, "temperature"),
        ({"top_p": 0.0}, "top_p"),
        ({"top_p": 1.1}, "top_p"),
        ({"top_p": -0.1}, "top_p"),
        ({"top_p": math.nan}, "top_p"),
        ({"top_k": -1}, "top_k"),
        ({"top_k": 1.5}, "top_k"),
        ({"min_p": 1.5}, "min_p"),
        ({"typical_p": 0}, "typical_p"),
        ({"repetition_penalty": 0}, "repetition_penalty"),
        ({"repetition_penalty": -1.0}, "repetition_penalty"),
        ({"repetition_penalty": math.nan}, "repetition_penalty"),
        ({"no_repeat_ngram_size": -1}, "no_repeat_ngram_size"),
        ({"bad_words_ids": [[]]}, "bad_words_ids"),
        ({"bad_words_ids": [5]}, "bad_words_ids"),
        ({"bad_words_ids": [[97]]}, "bad_words_ids must be 0 to 96, got 97"),
        ({"logit_bias": {97: 1.0}}, "logit_bias must be 0 to 96, got 97"),
        ({"logit_bias": {5: math.inf}}, "logit_bias"),
        ({"stop_strings": ["a", ""]}, "stop_strings"),
        ({"seed": -1}, "seed"),
        ({"seed": 2**64}, "seed"),
        ({"seed": []}, "seed"),
        ({"num_beams": 0}, "num_beams"),
        ({"early_stopping": "soon"}, "early_stopping"),
        ({"num_return_sequences": 2}, "num_return_sequences: 2 equal"),
        ({"num_return_sequences": 2, "do_sample": True, "temperature": 0}, "num_return_sequences: 2 equal"),
        ({"num_return_sequences": 3, "num_beams": 2}, "num_return_sequences: 3 of 2"),
        ({"num_beams": 2, "prompt_lookup_num_tokens": 2}, "prompt_lookup_num_tokens"),
        ({"prompt_lookup_num_tokens": 0}, "prompt_lookup_num_tokens"),
        ({"prefill_chunk_size": 0}, "prefill_chunk_size"),
        ({"max_time": 0}, "max_time"),
        ({"on_device_loop": True, "repetition_penalty": 1.5}, "on_device_loop"),
        ({"do_sample": 1}, "do_sample"),
        ({"min_length": -1}, "min_length"),
        ({"suppress_tokens": [97]}, "suppress_tokens must be 0 to 96, got 97"),
        ({"begin_suppress_tokens": [-5]}, "begin_suppress_tokens must be 0 to 96, got -5"),
        ({"forced_bos_token_id": 97}, "forced_bos_token_id must be 0 to 96, got 97"),
        ({"forced_eos_token_id": "x"}, "forced_eos_token_id"),
        ({"sequence_bias": [[[5, 97], 1.0]]}, "sequence_bias must be 0 to 96, got 97"),
        ({"sequence_bias": [[[5], math.nan]]}, "sequence_bias"),
        ({"sequence_bias": 5}, "sequence_bias"),
        ({"exponential_decay_length_penalty": [1]}, "exponential_decay_length_penalty"),
        ({"exponential_decay_length_penalty": [1, 0.0]}, "exponential_decay_length_penalty"),
        ({"epsilon_cutoff": 1.0}, "epsilon_cutoff"),
        ({"output_logits": "yes"}, "output_logits"),
        ({"on_device_loop": True, "suppress_tokens": [5]}, "on_device_loop"),
        ({"on_device_loop": True, "exponential_decay_length_penalty": [1, 1.5]}, "on_device_loop"),
        ({"logit_bias": {"\u00b2": 1.0}}, "logit_bias"),
    ],
)
def test_values_that_mean_nothing(options, message):
    with pytest.raises(GenerationConfigError, match=message):
        GenerationConfig(**options).check(TINY)


def test_all_that_is_wrong_is_said_at_once():
    with pytest.raises(GenerationConfigError, match=r"max_new_tokens.*cache"):
        GenerationConfig(max_new_tokens=-1, cache="ring").check(TINY)


def test_24_a_file_keeps_what_it_does_not_know(tmp_path):
    data = {"eos_token_id": [2, 5], "temperature": 0, "do_sample": False, "transformers_version": "4.56.2"}
    (tmp_path / "generation_config.json").write_text(json.dumps(data))
    config = GenerationConfig.from_pretrained(tmp_path)
    assert config.eos_token_ids == (2, 5)
    assert {key: config.to_dict()[key] for key in data} == data
    hash(config)


def test_minus_one_is_no_end_of_sequence():
    config = GenerationConfig(eos_token_id=-1)
    config.check(TINY)
    assert config.eos_token_ids == ()


def test_without_a_prompt_a_text_begins_with_bos():
    assert prepare(TINY, None, None, GenerationConfig(bos_token_id=3), {}).ids.tolist() == [[3]]
    with pytest.raises(InputError, match="there is no bos_token_id"):
        prepare(TINY, None, None, GenerationConfig(), {"bos_token_id": None})


def test_a_file_s_keys_of_ids_are_ids_and_others_stay_wrong():
    assert GenerationConfig.from_dict({"logit_bias": {"5": 1.0}}).logit_bias == {5: 1.0}
    for key in ("\u00b2", "-5", "5.0", "9" * 5000, ""):
        with pytest.raises(GenerationConfigError, match="logit_bias"):
            GenerationConfig.from_dict({"logit_bias": {key: 1.0}}).check(TINY)


# What a file may cost


@pytest.mark.filterwarnings("ignore:generation_config.json. every answer")
@pytest.mark.parametrize(
    "options",
    [
        {"num_beams": 10**6},
        {"num_return_sequences": 5 * 10**6, "do_sample": True},
        {"num_assistant_tokens": 10**9},
        {"prompt_lookup_num_tokens": 10**9},
        {"eos_token_id": [2] * 10**5},
        {"stop_strings": ["a"] * 10**5},
        {"stop_strings": "a" * 10**5},
        {"bad_words_ids": [[5]] * 10**5},
        {"bad_words_ids": [[5] * 10**4]},
        {"sequence_bias": [[[5], 1.0]] * 10**5},
        {"suppress_tokens": [5] * 10**5},
        {"length_penalty": 1e300},
        {"temperature": 1e300},
        {"max_new_tokens": 10**12},
        *({name: 10**400} for name in ("top_k", "temperature", "repetition_penalty", "max_time", "num_beams")),
    ],
    ids=lambda options: next(iter(options)),
)
def test_what_would_exhaust_the_machine_is_an_error(options):
    with pytest.raises(MistralError) as caught:
        driver.prepare(TINY, PROMPT, None, GenerationConfig.from_dict(options), {})
    assert next(iter(options)) in str(caught.value) or "max_position_embeddings" in str(caught.value)
    assert len(str(caught.value)) < 600


def test_a_long_chunk_is_no_reason_to_pad_a_short_prompt():
    class Compiled(Script):
        fixed_prompts = fixed_caches = True

        def step(self, cache, ids_BT, *rest):
            assert ids_BT.shape[1] <= 512
            return super().step(cache, ids_BT, *rest)

    engine = Compiled([[4], [4]])
    prompt = driver.prepare(
        TINY, PROMPT, None, GenerationConfig(max_new_tokens=1, prefill_chunk_size=10**9), {"seed": 0}
    )
    driver.generate(engine, prompt)


# Options that are none


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"temperatur": 1.0}, "nearest is 'temperature'"),
        ({"max_tokens": 5}, "nearest is 'max_new_tokens'|nearest is 'max_time'"),
        ({"stopping_criterion": []}, "nearest is 'stopping_criteria'"),
        ({"qqqqqqqq": 1}, "no 'qqqqqqqq'; leave it out"),
        ({"guidance_scale": 2.0}, "guidance_scale is not here: a logits_processor"),
        ({"cache_implementation": "quantized"}, "cache_implementation is not here: cache_dtype='int8' keeps"),
        ({"penalty_alpha": 0.6}, "penalty_alpha"),
        ({"num_beam_groups": 2, "diversity_penalty": 1.0}, "num_beam_groups.*diversity_penalty"),
        ({"custom_generate": "somebody/code"}, "no code is fetched"),
    ],
)
def test_an_option_that_is_none_names_the_nearest(options, message):
    with pytest.raises(GenerationConfigError, match=message) as caught:
        GenerationConfig().replace(**options)
    assert len(str(caught.value)) < 300


def test_a_file_s_options_that_are_not_here_are_told_of_once():
    with pytest.warns(UserWarning, match=r"guidance_scale is not here.*temperatur.*nearest is 'temperature'") as said:
        config = GenerationConfig.from_dict({"guidance_scale": 2.0, "temperatur": 1.0, "top_k": 5})
    assert len(said) == 1
    assert config.extra == {"guidance_scale": 2.0, "temperatur": 1.0}
    GenerationConfig.from_dict({"guidance_scale": 1.0, "use_cache": True, "_from_model_config": True})
    with pytest.warns(UserWarning, match="every answer is shaped by suppress_tokens, min_length"):
        GenerationConfig.from_dict({"min_length": 5, "suppress_tokens": [3]})


# Lengths


@pytest.mark.parametrize(
    ("base", "options", "new"),
    [
        ({}, {"max_length": 10}, 7),
        ({"max_length": 10}, {}, 7),
        ({"max_length": 10}, {"max_new_tokens": 4}, 4),
        ({"max_new_tokens": 4}, {"max_length": 10}, 7),
        ({"max_length": 10}, {"max_length": None}, 20),
        ({"max_new_tokens": 4}, {"max_new_tokens": None}, 20),
    ],
)
def test_how_many_new_tokens_there_may_be(base, options, new):
    assert GenerationConfig(**base).replace(**options).for_prompt(3).max_new_tokens == new


def test_of_two_lengths_new_tokens_count():
    with pytest.warns(UserWarning, match="max_length: max_new_tokens is given too"):
        assert GenerationConfig().replace(max_length=9, max_new_tokens=4).for_prompt(3).max_new_tokens == 4
    assert GenerationConfig(min_length=9).for_prompt(3).min_new_tokens == 6
    assert GenerationConfig(min_length=90, max_new_tokens=7).for_prompt(3).min_new_tokens == 7
    assert GenerationConfig(min_length=9).replace(min_new_tokens=2).for_prompt(3).min_new_tokens == 2


# A value that says some things


def test_what_a_config_does_not_say_is_the_checkpoint_s():
    own = GenerationConfig(eos_token_id=5, temperature=0.7, max_length=30)
    for given in (
        GenerationConfig(top_k=3),
        GenerationConfig.from_dict({"top_k": 3}),
        GenerationConfig().replace(top_k=3),
    ):
        over = given.over(own)
        assert (over.eos_token_id, over.temperature, over.top_k, over.max_length) == (5, 0.7, 3, 30)
    assert GenerationConfig(eos_token_id=None, temperature=1.0).over(own).eos_token_id is None
    assert GenerationConfig(max_new_tokens=4).over(own).for_prompt(3).max_new_tokens == 4
    changed = GenerationConfig()
    changed.temperature = 1.0
    for copied in (copy.copy(changed), copy.deepcopy(changed), pickle.loads(pickle.dumps(changed))):
        assert copied.over(own).temperature == 1.0
        assert copied.over(own).eos_token_id == 5
        assert copied == changed
    assert own.over(own) == own


def test_what_clients_do_with_a_config(tmp_path):
    config = GenerationConfig(max_new_tokens=7, sequence_bias={(5, 6): 1.5}, eos_token_id=np.array([2, 5]))
    assert config.eos_token_id == (2, 5)
    assert config.to_diff_dict() == {"max_new_tokens": 7, "sequence_bias": [[[5, 6], 1.5]], "eos_token_id": [2, 5]}
    config.save_pretrained(tmp_path / "new")
    with pytest.warns(UserWarning, match="sequence_bias"):
        read = GenerationConfig.from_pretrained(tmp_path / "new", temperature=0.5)
    assert (read.max_new_tokens, read.temperature, read.eos_token_ids) == (7, 0.5, (2, 5))
    assert read.sequence_bias == (((5, 6), 1.5),)
    assert config.update(top_k=3, unknown=1) == {"unknown": 1}
    assert config.top_k == 3
    with pytest.raises(MistralError):
        config.save_pretrained(tmp_path, "../x.json")


def test_a_config_of_another_library_is_taken():
    class Theirs:
        def to_diff_dict(self):
            return {"max_new_tokens": 3, "transformers_version": "5.23", "guidance_scale": None, "use_cache": True}

    assert GenerationConfig.of(Theirs()).max_new_tokens == 3
    assert GenerationConfig.of({"top_k": 3}).top_k == 3
    with pytest.raises(GenerationConfigError, match="watermarking_config"):
        GenerationConfig.of({"watermarking_config": {"bias": 2.0}})
    for wrong in (5, "x", [1]):
        with pytest.raises(GenerationConfigError, match="must be a GenerationConfig"):
            GenerationConfig.of(wrong)
