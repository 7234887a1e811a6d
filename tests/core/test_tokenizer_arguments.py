"""What comes out of arrays, tables and paths is taken wherever Python's own numbers, lists and names are."""

from __future__ import annotations

import warnings
from pathlib import Path

import numpy as np
import pytest

from mistral_core.data import TINY_CHECKPOINT
from mistral_core.errors import TokenizerError
from mistral_core.text.tokenizer import MistralTokenizer

TEXT = "Emma was there"


@pytest.fixture(scope="module")
def tokenizer():
    return MistralTokenizer.from_pretrained(Path(TINY_CHECKPOINT))


def of_jax(values):
    return pytest.importorskip("jax.numpy").asarray(values)


def of_torch(values):
    return pytest.importorskip("torch").as_tensor(values)


KINDS = {
    "list": list,
    "tuple": tuple,
    "numpy": np.asarray,
    "int32": lambda ids: np.asarray(ids, np.int32),
    "uint64": lambda ids: np.asarray(ids, np.uint64),
    "numbers of numpy": lambda ids: list(map(np.int64, ids)),
    "torch": of_torch,
    "numbers of torch": lambda ids: list(of_torch(ids)),
    "jax": of_jax,
    "numbers of jax": lambda ids: list(of_jax(ids)),
}


@pytest.mark.parametrize("kind", KINDS)
def test_ids_of_every_kind(tokenizer, kind):
    ids = tokenizer.encode(TEXT)
    given = KINDS[kind](ids)
    assert tokenizer.decode(given) == tokenizer.decode(ids)
    assert tokenizer.decode(given[0]) == tokenizer.decode(ids[0])
    assert tokenizer.convert_ids_to_tokens(given) == tokenizer.convert_ids_to_tokens(ids)
    assert tokenizer.convert_ids_to_tokens(given[1]) == tokenizer.convert_ids_to_tokens(ids[1])
    assert tokenizer.encode(given) == ids
    assert tokenizer(given, add_special_tokens=False)["input_ids"] == ids
    assert tokenizer.batch_decode([given, given]) == [tokenizer.decode(ids)] * 2
    assert tokenizer.get_special_tokens_mask(given, already_has_special_tokens=True)[0] == 1
    assert tokenizer.prepare_for_model(given, add_special_tokens=False)["input_ids"] == ids
    longer = ids + ids[:2]
    found = tokenizer.pad([{"input_ids": given}, {"input_ids": KINDS[kind](longer)}])
    assert found["input_ids"][0][2:] == ids
    assert found["input_ids"][1] == longer
    assert found["attention_mask"][0] == [0, 0] + [1] * len(ids)
    assert tokenizer.pad({"input_ids": given})["input_ids"] == ids


@pytest.mark.parametrize("kind", ["tuple", "numpy", "column"])
def test_texts_of_every_kind(tokenizer, kind):
    texts = [TEXT, "who?"]
    pandas = pytest.importorskip("pandas") if kind == "column" else None
    given = {"tuple": tuple, "numpy": np.asarray, "column": pandas.Series if pandas else None}[kind](texts)
    assert tokenizer(given) == tokenizer(texts)
    assert tokenizer(given[0]) == tokenizer(TEXT)


def test_lengths_of_numpy(tokenizer):
    found = tokenizer(
        TEXT, padding="max_length", max_length=np.int64(12), pad_to_multiple_of=np.int32(4), truncation=True,
        stride=np.int8(0),
    )  # fmt: skip
    assert len(found["input_ids"]) == 12
    assert type(found["input_ids"][0]) is int


def test_numbers_of_numpy_in_a_conversation(tokenizer):
    template = "{{ messages[0].content }} {{ temperature }} {{ messages[0].place }} {{ on }}"
    chat = [{"role": "user", "content": "a", "place": np.int64(7)}]
    shown = tokenizer.apply_chat_template(
        chat, chat_template=template, tokenize=False, temperature=np.float64(0.5), on=np.bool_(True)
    )
    assert shown == "a 0.5 7 True"


@pytest.mark.parametrize("wrong", [True, np.bool_(True), 1.5, np.float32(1), "1", None, [1.5], [True], [[1]], object()])
def test_what_is_no_id_is_a_typed_error(tokenizer, wrong):
    with pytest.raises(TokenizerError):
        tokenizer.decode(wrong)


def test_unknown_arguments_name_the_nearest(tokenizer):
    for call, name, near in (
        (lambda: tokenizer(TEXT, max_lenght=3), "max_lenght", "max_length"),
        (lambda: MistralTokenizer.from_pretrained(TINY_CHECKPOINT, paddingside="left"), "paddingside", "padding_side"),
    ):
        with pytest.raises(TokenizerError, match=f"{name}.*{near}"):
            call()


def test_an_encoding_has_what_callers_of_transformers_read(tokenizer):
    torch = pytest.importorskip("torch")
    found = tokenizer([TEXT], return_tensors="pt")
    assert found.data == dict(found)
    assert type(found.data) is dict
    moved = found.to("cpu", non_blocking=True)
    assert torch.equal(moved.input_ids, found["input_ids"])


def test_warnings_stand_at_the_callers_line(tokenizer):
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        tokenizer(TEXT, max_length=3)
    assert [each.filename for each in caught] == [__file__]
