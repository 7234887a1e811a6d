"""GenerationConfig and the decode loop, with a stand-in for a backend."""

from __future__ import annotations

import json

import numpy as np
import pytest

from mistral_core import GenerationConfig, decoding
from mistral_core.errors import GenerationConfigError
from mistral_core.presets import TINY

PROMPT = np.array([[5, 2, 6], [7, 8, 9]])


def generated(rows, **options):
    """What the loop makes of a backend that would write these rows; and how many steps it took."""
    steps = np.array(rows).T
    taken = []

    def step(state):
        taken.append(state)
        return steps[state], state + 1

    config = GenerationConfig(max_new_tokens=steps.shape[0], **options)
    out = decoding.generate(lambda ids, mask: step(0), step, PROMPT, np.ones_like(PROMPT), config)
    return out[:, PROMPT.shape[1] :].tolist(), len(taken)


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
    def never(*_):
        raise AssertionError

    config = GenerationConfig(max_new_tokens=0)
    assert np.array_equal(decoding.generate(never, never, PROMPT, np.ones_like(PROMPT), config), PROMPT)


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
