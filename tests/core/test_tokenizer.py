"""MistralTokenizer and TextStream on the embedded checkpoint's tokenizer."""

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

import mistral_core
from mistral_core.errors import ChecksumMismatchError, TokenizerError
from mistral_core.text.stream import REPLACEMENT, TextStream
from mistral_core.text.tokenizer import MistralTokenizer
from mistral_core.weights import manifest

TINY = Path(mistral_core.__file__).parent / "data" / "tiny"
TOKENIZER = MistralTokenizer.from_pretrained(TINY)

# U+2581 is how Mistral's tokenizers write a space: it comes back as one.
TEXTS = st.text(st.characters(exclude_categories=["Cs"], exclude_characters="\u2581"))


def byte_ids(data):
    return [TOKENIZER.convert_tokens_to_ids(f"<0x{byte:02X}>") for byte in data]


def streamed(ids, **options):
    stream = TextStream(TOKENIZER, **options)
    return [*(stream.push(each) for each in ids), stream.end()]


# Encoding and decoding


@given(TEXTS)
def test_any_text_round_trips(text):
    ids = TOKENIZER.encode(text)
    assert ids[0] == TOKENIZER.bos_token_id
    assert all(0 <= each < TOKENIZER.vocab_size for each in ids)
    assert TOKENIZER.decode(ids, skip_special_tokens=True) == text


@given(TEXTS, st.sampled_from(["</s>", "<s>", "<unk>", "<s></s>"]), TEXTS)
def test_text_never_yields_control_ids(before, control, after):
    text = before + control + after
    ids = TOKENIZER.encode(text, add_special_tokens=False)
    assert not set(ids) & {0, 1, 2}
    assert TOKENIZER.decode(ids, skip_special_tokens=True) == text


def test_control_tokens_are_parsed_on_request():
    ids = TOKENIZER.encode("Emma</s>", parse_special=True)
    assert (ids[0], ids[-1]) == (1, 2)
    assert TOKENIZER.decode(ids, skip_special_tokens=True) == "Emma"
    assert TOKENIZER.decode(ids) == "<s> Emma</s>"


def test_ids_and_sizes():
    assert (TOKENIZER.unk_token_id, TOKENIZER.bos_token_id, TOKENIZER.eos_token_id) == (0, 1, 2)
    assert TOKENIZER.pad_token_id is None
    assert TOKENIZER.vocab_size == len(TOKENIZER) == 2048
    assert byte_ids(b"\x00\xff") == [3, 258]
    assert TOKENIZER.convert_ids_to_tokens(258) == "<0xFF>"
    assert TOKENIZER.encode("") == [1]
    assert TOKENIZER.decode([]) == ""


def test_tokens_make_the_text_of_their_ids():
    ids = TOKENIZER.encode("Emma’s friend")
    assert TOKENIZER.convert_tokens_to_string(TOKENIZER.convert_ids_to_tokens(ids)) == TOKENIZER.decode(ids)
    assert [TOKENIZER._convert_id_to_token(each) for each in ids] == TOKENIZER.convert_ids_to_tokens(ids)


def test_english_is_made_of_words():
    assert len(TOKENIZER.encode("She had been a friend and companion such as few possessed.")) < 20


@pytest.mark.parametrize("wrap", [list, tuple, np.array, iter], ids=["list", "tuple", "array", "iterator"])
def test_decode_takes_any_sequence(wrap):
    assert TOKENIZER.decode(wrap(TOKENIZER.encode("It was")), skip_special_tokens=True) == "It was"


@pytest.mark.parametrize("ids", [2048, -1, [5, 2048], [True], [1.0], ["a"], np.array([[1, 2]]), [[1], [2, 3]]], ids=str)
def test_decode_refuses_what_is_no_id(ids):
    with pytest.raises(TokenizerError, match="ids"):
        TOKENIZER.decode(ids)


@pytest.mark.parametrize("text", ["\ud800", b"bytes", None, ["list"]], ids=ascii)
def test_encode_refuses_what_is_no_text(text):
    with pytest.raises(TokenizerError, match="text"):
        TOKENIZER.encode(text)


# Batches


def test_call_of_one_text_and_of_several():
    one, several = TOKENIZER("Emma"), TOKENIZER(["Emma", "It was a truth"])
    assert one == {"input_ids": TOKENIZER.encode("Emma"), "attention_mask": [1, 1]}
    assert several["input_ids"][0] == one["input_ids"]
    assert [len(row) for row in several["attention_mask"]] == [len(row) for row in several["input_ids"]]


@pytest.mark.parametrize("side", ["left", "right"])
def test_padding(side):
    batch = TOKENIZER(["Emma", "It was a truth"], padding=True, padding_side=side, return_tensors="np")
    ids, mask = batch["input_ids"], batch["attention_mask"]
    assert ids.dtype == mask.dtype == np.int64
    assert ids.shape == mask.shape
    assert list(ids[0][mask[0] == 1]) == TOKENIZER.encode("Emma")
    assert mask[0][-1 if side == "right" else 0] == 0
    assert mask[1].all()


def test_arrays():
    assert TOKENIZER("Emma", return_tensors="np")["input_ids"].shape == (1, 2)
    assert TOKENIZER([], return_tensors="np")["input_ids"].shape == (0, 0)
    with pytest.raises(TokenizerError, match="padding=True"):
        TOKENIZER(["a", "a longer one"], return_tensors="np")
    with pytest.raises(TokenizerError, match="return_tensors must be .* np, pt, jax, tf, got 'mlx'"):
        TOKENIZER("a", return_tensors="mlx")
    with pytest.raises(TokenizerError, match="padding_side"):
        TOKENIZER("a", padding_side="middle")


def test_pairs():
    question, text = "Who was Emma?", "Emma was rich"
    both = TOKENIZER(question, text)["input_ids"]
    assert both == TOKENIZER.encode(question, text)
    assert both[: len(TOKENIZER.encode(question))] == TOKENIZER.encode(question)
    assert both[-len(TOKENIZER.encode(text, add_special_tokens=False)) :] == TOKENIZER.encode(
        text, add_special_tokens=False
    )
    assert TOKENIZER([question, text], [text, question])["input_ids"][0] == both
    with pytest.raises(TokenizerError, match="text_pair must be 2 texts, one beside each text, got 1"):
        TOKENIZER([question, text], [text])
    with pytest.raises(TokenizerError, match="text_pair must be a str .* got bytes"):
        TOKENIZER.encode(question, b"bytes")


# Files


def test_save_pretrained_keeps_the_bytes(tmp_path):
    TOKENIZER.save_pretrained(tmp_path)
    assert (tmp_path / "tokenizer.json").read_bytes() == (TINY / "tokenizer.json").read_bytes()
    again = MistralTokenizer.from_pretrained(tmp_path)
    assert again.encode("It was") == TOKENIZER.encode("It was")
    assert again.bos_token_id == 1


def test_tokenizer_json_alone_is_enough(tmp_path):
    shutil.copy(TINY / "tokenizer.json", tmp_path)
    for path in (tmp_path, tmp_path / "tokenizer.json"):
        assert MistralTokenizer.from_pretrained(path).eos_token_id == 2


@pytest.mark.parametrize("content", [b"", b"{}", b"\xff", b"[1"], ids=repr)
def test_malformed_files(tmp_path, content):
    with pytest.raises(TokenizerError, match=r"no tokenizer\.json"):
        MistralTokenizer.from_pretrained(tmp_path)
    (tmp_path / "tokenizer.json").write_bytes(content)
    with pytest.raises(TokenizerError, match=r"tokenizer\.json"):
        MistralTokenizer.from_pretrained(tmp_path)


@pytest.mark.parametrize("token", ["<end>", 3, {"content": "<end>"}], ids=str)
def test_a_special_token_must_exist(tmp_path, token):
    shutil.copy(TINY / "tokenizer.json", tmp_path)
    (tmp_path / "tokenizer_config.json").write_text(json.dumps({"eos_token": token}))
    with pytest.raises(TokenizerError, match="eos_token"):
        MistralTokenizer.from_pretrained(tmp_path)


def test_116_a_tokenizer_whose_ids_were_swapped_is_found_by_the_manifest(tmp_path):
    mistral_core.convert(TINY, tmp_path / "copy", to="hf")
    path = tmp_path / "copy" / "tokenizer.json"
    tokens = json.loads(path.read_text())["model"]["vocab"]
    yes, no = (f"{json.dumps(token, ensure_ascii=False)}: {tokens[token]}" for token in ("\u2581good", "\u2581poor"))
    text = path.read_text()
    assert text.count(yes) == text.count(no) == 1
    swapped = {yes: yes.replace(str(tokens["\u2581good"]), str(tokens["\u2581poor"])),
               no: no.replace(str(tokens["\u2581poor"]), str(tokens["\u2581good"]))}  # fmt: skip
    for old, new in swapped.items():
        text = text.replace(old, new)
    path.write_text(text)
    assert MistralTokenizer.from_pretrained(tmp_path / "copy").encode("good") == TOKENIZER.encode("poor")
    with pytest.raises(ChecksumMismatchError, match=r"tokenizer\.json"):
        manifest.verify(tmp_path / "copy", "full")


# Streams


@given(TEXTS)
def test_a_stream_adds_up_and_never_shows_half_a_character(text):
    parts = streamed(TOKENIZER.encode(text))
    assert "".join(parts) == text
    if REPLACEMENT not in text:
        assert not any(REPLACEMENT in part for part in parts)


@given(TEXTS, TEXTS)
def test_a_stream_after_a_prompt_adds_up(prompt, text):
    prompt_ids, ids = TOKENIZER.encode(prompt), TOKENIZER.encode(text, add_special_tokens=False)
    expected = TOKENIZER.decode(prompt_ids + ids, skip_special_tokens=True)[len(prompt) :]
    assert "".join(streamed(ids, after=prompt_ids)) == expected


@given(st.lists(st.integers(0, TOKENIZER.vocab_size - 1)))
def test_any_ids_stream(ids):
    whole = TOKENIZER.decode(ids, skip_special_tokens=True)
    parts = streamed(ids)
    assert "".join(parts).replace(REPLACEMENT, "") == whole.replace(REPLACEMENT, "") or REPLACEMENT in whole


def test_a_character_comes_with_its_last_byte():
    assert streamed(byte_ids("\U0001f600\u20ac".encode())) == ["", "", "", "\U0001f600", "", "", "\u20ac", ""]


def test_a_control_token_inside_a_character_does_not_break_it():
    first, *rest = byte_ids("\u20ac".encode())
    assert "".join(streamed([first, *rest, 2, first, *rest])) == "\u20ac\u20ac"


def test_an_unfinished_character_comes_out_at_the_end():
    assert streamed(byte_ids(b"\xe2\x82")) == ["", "", REPLACEMENT * 2]


def test_bytes_that_are_no_character_are_not_held_for_ever():
    assert any(streamed(byte_ids(b"\xff" * 8))[:-1])


def test_the_first_word_keeps_its_space_after_a_prompt():
    prompt, word = TOKENIZER.encode("It"), TOKENIZER.encode("was", add_special_tokens=False)
    assert "".join(streamed(word)) == "was"
    assert "".join(streamed(word, after=prompt)) == " was"
