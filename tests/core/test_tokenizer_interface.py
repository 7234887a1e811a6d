"""The methods that transformers documents for Mistral's tokenizers: equal to transformers' own, option by option."""

from __future__ import annotations

import copy
import itertools
import pickle
import warnings

import numpy as np
import pytest

from mistral_core.data import TINY_CHECKPOINT
from mistral_core.errors import TokenizerError
from mistral_core.text.interface import Tokenizer
from mistral_core.text.mistral_common import MistralCommonTokenizer
from mistral_core.text.tokenizer import MistralTokenizer

TEXTS = ["Emma Woodhouse, handsome, clever, and rich", "It was", "", "a truth universally acknowledged </s> x"]
OURS = MistralTokenizer.from_pretrained(TINY_CHECKPOINT)

PADDINGS = [{}, {"padding": True}, {"padding": "max_length"}, {"padding": "longest", "pad_to_multiple_of": 8}]
TRUNCATIONS = [{}, {"truncation": True}, {"truncation": "do_not_truncate"}]
SIDES = list(itertools.product(("left", "right"), ("left", "right")))


@pytest.fixture(scope="module")
def theirs():
    transformers = pytest.importorskip("transformers")
    return transformers.PreTrainedTokenizerFast.from_pretrained(
        TINY_CHECKPOINT, pad_token="</s>", split_special_tokens=True, model_max_length=64
    )


@pytest.fixture
def ours():
    return MistralTokenizer.from_pretrained(TINY_CHECKPOINT, model_max_length=64)


@pytest.fixture(scope="module")
def common():
    """(ours over mistral-common, that of transformers) for SentencePiece and Tekken, and while finetuning."""
    pytest.importorskip("mistral_common")
    module = pytest.importorskip("transformers.tokenization_mistral_common")
    from mistral_common_files import FILES

    return [
        (MistralCommonTokenizer(FILES[name], mode), module.MistralCommonBackend(FILES[name], mode=mode))
        for name, mode in (("v3", "test"), ("tekken", "test"), ("v3", "finetuning"))
    ]


def plain(encoding):
    """The content of an encoding of either library."""
    return {key: value for key, value in encoding.items() if key != "token_type_ids"}


@pytest.mark.filterwarnings("ignore:`max_length` is ignored")  # theirs
@pytest.mark.parametrize("sides", SIDES, ids="-".join)
@pytest.mark.parametrize("truncation", TRUNCATIONS, ids=str)
@pytest.mark.parametrize("padding", PADDINGS, ids=str)
def test_calls(ours, theirs, padding, truncation, sides):
    ours.padding_side, ours.truncation_side = theirs.padding_side, theirs.truncation_side = sides
    options = {**padding, **truncation, "return_special_tokens_mask": True, "return_offsets_mapping": True}
    for length, texts in itertools.product((None, 8, 40), (TEXTS[0], TEXTS)):
        limit = {} if length is None else {"max_length": length}
        if limit and not truncation:
            limit["truncation"] = False
        expected = plain(theirs(texts, **options, **limit))
        assert ours(texts, **options, **limit) == expected
        alone = plain(theirs(texts, add_special_tokens=False, **options, **limit))
        assert ours(texts, add_special_tokens=False, **options, **limit) == alone


@pytest.mark.parametrize("strategy", ["longest_first", "only_first", "only_second"])
def test_pairs_that_are_cut(ours, theirs, strategy):
    theirs.truncation_side = ours.truncation_side = "right"
    for length in (10, 12, 17):
        options = {"truncation": strategy, "max_length": length, "return_offsets_mapping": True}
        try:
            expected = plain(theirs(TEXTS[0], TEXTS[3], **options))["input_ids"]
        except BaseException:  # tokenizers panics where there is not enough to remove
            expected = None
        if expected is None or len(expected) > length:
            with pytest.raises(TokenizerError, match="max_length"):
                ours(TEXTS[0], TEXTS[3], **options)
            continue
        found = ours(TEXTS[0], TEXTS[3], **options)
        assert len(found["input_ids"]) == len(found["offset_mapping"]) == length
        if strategy != "longest_first":  # of two equally long texts, tokenizers may cut the other one
            assert found["input_ids"] == expected


def test_overflow(ours):
    ids = ours.encode(TEXTS[0], add_special_tokens=False)
    found = ours(TEXTS[0], truncation=True, max_length=6, stride=2, return_overflowing_tokens=True, return_length=True)
    assert found["input_ids"] == [1, *ids[:5]]
    assert found["overflowing_tokens"] == ids[3:]
    assert found["num_truncated_tokens"] == len(ids) - 5
    assert found["length"] == 6
    ours.truncation_side = "left"
    found = ours(TEXTS[0], truncation=True, max_length=6, stride=2, return_overflowing_tokens=True)
    assert found["input_ids"] == [1, *ids[-5:]]
    assert found["overflowing_tokens"] == ids[:-3]
    batch = ours(
        TEXTS, truncation=True, max_length=6, return_overflowing_tokens=True, padding=True, return_tensors="np"
    )
    assert batch["input_ids"].shape == (4, 6)
    assert batch["overflowing_tokens"][1] == []


def test_pad(ours, theirs):
    theirs.padding_side = ours.padding_side = "left"
    rows = [ours(text) for text in TEXTS]
    for options in ({}, {"padding": "max_length", "max_length": 30}, {"pad_to_multiple_of": 16}, {"padding": False}):
        expected = plain(theirs.pad([dict(row) for row in rows], **options))
        assert ours.pad(rows, **options) == expected
        together = {"input_ids": [row["input_ids"] for row in rows]}
        assert ours.pad(together, **options) == expected
    assert ours.pad(rows[0], padding="max_length", max_length=40, padding_side="right")["attention_mask"][-1] == 0
    arrays = ours.pad(rows, return_tensors="np")
    assert arrays["input_ids"].shape == arrays["attention_mask"].shape == (4, max(len(r["input_ids"]) for r in rows))
    assert ours.pad({"input_ids": []}) == {"input_ids": [], "attention_mask": []}
    with pytest.raises(TokenizerError, match="no input_ids"):
        ours.pad({"ids": [1]})


def test_prepare_for_model(ours):
    assert ours.prepare_for_model([5, 6, 7]) == {"input_ids": [1, 5, 6, 7], "attention_mask": [1] * 4}
    assert ours.prepare_for_model([5, 6], add_special_tokens=False)["input_ids"] == [5, 6]
    assert ours.prepare_for_model([5], prepend_batch_axis=True)["input_ids"] == [[1, 5]]
    assert ours.prepare_for_model([5, 6], [7])["input_ids"] == [1, 5, 6, 1, 7]
    assert ours.prepare_for_model([], return_special_tokens_mask=True)["special_tokens_mask"] == [1]
    assert ours.prepare_for_model([5, 6], return_tensors="np")["input_ids"].shape == (3,)
    assert ours.prepare_for_model([5, 6], return_tensors="np", prepend_batch_axis=True)["input_ids"].shape == (1, 3)
    assert ours.prepare_for_model([5] * 9, truncation=True, max_length=4)["input_ids"] == [1, 5, 5, 5]


def test_over_mistral_common(common):
    texts = ["Hello world", "", " two  words\n", "[INST] </s>", "x" * 40]
    for ours, theirs in common:
        for text in texts:
            assert ours.encode(text) == theirs.encode(text)
            assert ours.encode(text, add_special_tokens=False) == theirs.encode(text, add_special_tokens=False)
            assert ours.tokenize(text) == theirs.tokenize(text)
            ids = ours.encode(text)
            assert ours.convert_ids_to_tokens(ids) == theirs.convert_ids_to_tokens(ids)
            assert ours.decode(ids) == theirs.decode(ids)
            assert ours.decode(ids, skip_special_tokens=True) == theirs.decode(ids, skip_special_tokens=True)
            assert ours.get_special_tokens_mask(ids, already_has_special_tokens=True) == theirs.get_special_tokens_mask(
                ids, already_has_special_tokens=True
            )
            assert ours.get_special_tokens_mask(ids) == theirs.get_special_tokens_mask(ids)
        for options in (
            {}, {"padding": True}, {"padding": "max_length", "max_length": 9, "truncation": True},
            {"padding": True, "pad_to_multiple_of": 4}, {"truncation": True, "max_length": 3, "padding_side": "right"},
        ):  # fmt: skip
            assert ours(texts, **options) == plain(theirs(texts, **options))
        assert ours.truncate_sequences([1, 2, 3, 4], num_tokens_to_remove=2, stride=1) == ([1, 2], None, [2, 3, 4])
        assert theirs.truncate_sequences([1, 2, 3, 4], num_tokens_to_remove=2, stride=1) == ([1, 2], None, [2, 3, 4])
        assert ours.truncate_sequences([1, 2], num_tokens_to_remove=5) == ([], None, [1, 2])
        vocabulary = ours.get_vocab()
        assert all(vocabulary[token] == each for token, each in theirs.get_vocab().items() if "\ufffd" not in token)


def test_conversations_over_mistral_common(common):
    chat = [{"role": "system", "content": "Be kind."}, {"role": "user", "content": "Hi </s>"}]
    continued = [*chat, {"role": "assistant", "content": "Well"}]
    for ours, theirs in common:
        finetuning = ours.mode == "finetuning"
        for messages, options in ((chat, {}), (continued, {"continue_final_message": True}), (continued, {})):
            try:
                expected = list(theirs.apply_chat_template(messages, return_dict=False, **options))
            except Exception:
                expected = None
            if expected is None:
                with pytest.raises(ValueError, match='refused by mistral-common .* mode="finetuning"'):
                    ours.apply_chat_template(messages, **options)
            else:
                assert ours.apply_chat_template(messages, **options) == expected
        assert finetuning or ours.apply_chat_template([chat, chat], return_tensors="np").shape[0] == 2


def test_what_mistral_common_does_not_take(common):
    ours = common[0][0]
    assert isinstance(ours, Tokenizer)
    for call in (
        lambda: ours("a", "b"), lambda: ours("a", text_target="b"), lambda: ours("a", is_split_into_words=True),
        lambda: ours("a", return_token_type_ids=True), lambda: ours("a", truncation="only_first", max_length=3),
        lambda: ours.encode("a", parse_special=True), lambda: ours("a", return_offsets_mapping=True),
        lambda: ours.truncate_sequences([1], [2]), lambda: ours.tokenize("a", pair="b"),
        lambda: ours.apply_chat_template([{"role": "user", "content": "a"}], documents=[]),
        lambda: ours.apply_chat_template([]), lambda: ours.add_tokens(["x"]), lambda: ours.decode([1], False, True),
        lambda: ours([["a"]]), lambda: ours(["a", "b c"], return_tensors="np"),
        lambda: ours.apply_chat_template([{"role": "user", "content": [{"type": "image_url", "image_url": "file:///x"}]}]),
    ):  # fmt: skip
        with pytest.raises(ValueError, match="."):
            call()


# Errors and warnings


@pytest.mark.parametrize("options", [
    {"padding": "left"}, {"padding": 1}, {"truncation": "first"}, {"max_length": -1}, {"max_length": True},
    {"max_length": "4"}, {"stride": -1}, {"pad_to_multiple_of": 0}, {"padding_side": "top"}, {"return_tensors": "mlx"},
    {"paddding": True}, {"text_target": "x"},
    {"padding": True, "truncation": True, "max_length": 7, "pad_to_multiple_of": 4},
], ids=str)  # fmt: skip
def test_options_that_make_no_sense(options):
    with pytest.raises(TokenizerError, match=next(iter(options)).replace("padding", "p.dding|max_length")):
        OURS("a text", **options)


def test_a_length_that_nobody_says(ours):
    ours.model_max_length = 10**30
    for options in ({"truncation": True}, {"padding": "max_length"}):
        with pytest.raises(TokenizerError, match="max_length: None"):
            ours("a text", **options)
    with pytest.warns(UserWarning, match="truncation=True"):
        assert len(OURS("It was a truth", max_length=2)["input_ids"]) == 2
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        OURS("It was a truth", max_length=2, verbose=False)


@pytest.mark.parametrize("text", [b"bytes", None, 3, ["a", b"b"], ["a", None], "\ud800", ["\udfff"]], ids=ascii)
def test_117_what_is_no_text(text):
    with pytest.raises(TokenizerError, match="text"):
        OURS(text)


@pytest.mark.parametrize("ids", [[2048], [-1], [1, 99999]], ids=str)
def test_ids_beyond_the_vocabulary_are_an_index_error_too(ids):
    for call in (OURS.decode, OURS.convert_ids_to_tokens, OURS.prepare_for_model, OURS):
        with pytest.raises(IndexError, match="take the tokenizer of the model"):
            call(ids)


# Tokens, special tokens, arrays


def test_tokens_and_ids():
    ids = OURS.encode("Emma", add_special_tokens=False)
    assert OURS.convert_tokens_to_ids(OURS.tokenize("Emma")) == ids
    assert OURS.convert_tokens_to_ids(["no such token", "<s>"]) == [0, 1]
    assert OURS.convert_ids_to_tokens([1, *ids, 2], skip_special_tokens=True) == OURS.tokenize("Emma")
    assert OURS.get_vocab()["</s>"] == 2
    assert list(OURS.get_vocab().values()) == list(range(2048))
    assert OURS.all_special_tokens == ["<unk>", "<s>", "</s>"]
    with pytest.raises(TokenizerError, match="special token"):
        OURS.convert_ids_to_tokens(1, skip_special_tokens=True)


def test_the_padding_token_can_be_chosen(ours):
    assert ours.pad_token is None
    assert ours(["a", "a b c d"], padding=True)["input_ids"][0][0] == ours.eos_token_id
    ours.pad_token = ours.unk_token
    assert ours.pad_token_id == 0
    assert ours(["a", "a b c d"], padding=True)["input_ids"][0][0] == 0
    ours.pad_token_id = ours.bos_token_id
    assert ours.pad_token == "<s>"
    with pytest.raises(IndexError):
        ours.pad_token_id = 2048
    ours.pad_token = "<nothing>"
    with pytest.raises(TokenizerError, match="pad_token: '<nothing>'"):
        ours(["a", "b"], padding=True)


def test_settings_are_saved(ours, tmp_path):
    ours.pad_token, ours.padding_side, ours.truncation_side = "<unk>", "right", "left"
    ours.save_pretrained(tmp_path)
    again = MistralTokenizer.from_pretrained(tmp_path)
    assert (again.pad_token, again.padding_side, again.truncation_side, again.model_max_length) == (
        "<unk>",
        "right",
        "left",
        64,
    )
    assert MistralTokenizer.from_pretrained(tmp_path, padding_side="left").padding_side == "left"
    assert MistralTokenizer.from_pretrained(tmp_path, use_fast=True, legacy=False).pad_token == "<unk>"
    with pytest.raises(TokenizerError, match="use_fast"):
        MistralTokenizer.from_pretrained(tmp_path, use_fast=False)


def test_finetuning_ends_a_text():
    tokenizer = MistralTokenizer.from_pretrained(TINY_CHECKPOINT, mode="finetuning")
    assert tokenizer.encode("Emma") == [*OURS.encode("Emma"), 2]
    assert len(tokenizer("Emma is rich", truncation=True, max_length=3)["input_ids"]) == 3
    with pytest.raises(TokenizerError, match="mode"):
        MistralTokenizer.from_pretrained(TINY_CHECKPOINT, mode="train")


@pytest.mark.parametrize("kind", ["np", "pt", "jax", "tf"])
def test_arrays_of_every_framework(kind):
    for module in {"pt": ["torch"], "jax": ["jax"], "tf": ["tensorflow"]}.get(kind, []):
        pytest.importorskip(module)
    options = {"return_offsets_mapping": True, "return_length": True, "return_special_tokens_mask": True}
    found = OURS(TEXTS, padding=True, return_tensors=kind, **options)
    lists = OURS(TEXTS, padding=True, **options)
    assert {name: np.asarray(array).tolist() for name, array in found.items()} == {
        name: np.array(rows).tolist() for name, rows in lists.items()
    }
    assert OURS.encode("Emma", return_tensors=kind).shape == (1, 2)
    assert np.asarray(OURS([], return_tensors=kind)["input_ids"]).shape == (0, 0)
    assert OURS.decode(OURS.encode("Emma", return_tensors=kind)[0]) == "<s> Emma"
    assert OURS.batch_decode(found["input_ids"], skip_special_tokens=True)[:2] == TEXTS[:2]


def test_what_clients_read(ours, theirs):
    transformers = pytest.importorskip("transformers")
    assert isinstance(ours, transformers.PreTrainedTokenizerBase)
    assert isinstance(ours, transformers.PreTrainedTokenizer)
    assert not isinstance(ours, transformers.PreTrainedTokenizerFast)
    assert type(ours) is MistralTokenizer
    assert ours.get_added_vocab() == ours.added_tokens_encoder == theirs.get_added_vocab()
    assert ours.vocab == ours.get_vocab()
    assert ours.special_tokens_map == {"bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>"}
    assert str(TINY_CHECKPOINT) in ours.name_or_path
    assert (ours.is_fast, ours.mask_token) == (False, None)
    again = pickle.loads(pickle.dumps(copy.deepcopy(ours)))
    assert type(again) is MistralTokenizer
    assert again(TEXTS) == ours(TEXTS)
