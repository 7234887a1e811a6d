"""Tokenizer files that would panic, hang, or make gigabytes of a short text: a typed error, before they do."""

from __future__ import annotations

import base64
import json

import pytest

from mistral_core.disk import limits
from mistral_core.errors import LimitExceededError, MistralError, TokenizerError
from mistral_core.text import patterns, tekken
from mistral_core.text.guarded import typed
from mistral_core.text.templates.marks import Marks, unused_characters
from mistral_core.text.tokenizer import MistralTokenizer

TWICE = {"type": "Replace", "pattern": {"Regex": "."}, "content": "aa"}
LETTERS = {letter: number for number, letter in enumerate("abcdehlo ")}


def charsmap(trie: bytes, written: bytes = b"") -> str:
    return base64.b64encode(len(trie).to_bytes(4, "little") + trie + written).decode()


def json_file(**parts):
    model = {"type": "BPE", "vocab": LETTERS, "merges": []}
    empty = {"normalizer": None, "pre_tokenizer": None, "post_processor": None, "decoder": None}
    return json.dumps({"version": "1.0", "added_tokens": [], **empty, "model": model, **parts})


def replaced(regex, content="a"):
    return {"type": "Replace", "pattern": {"Regex": regex}, "content": content}


def template(single, ids=1):
    token = {"id": "<s>", "ids": [0] * ids, "tokens": ["a"] * ids}
    pair = [{"Sequence": {"id": "A", "type_id": 0}}, {"Sequence": {"id": "B", "type_id": 1}}]
    return {"type": "TemplateProcessing", "single": single, "pair": pair, "special_tokens": {"<s>": token}}


A, BOS = {"Sequence": {"id": "A", "type_id": 0}}, {"SpecialToken": {"id": "<s>", "type_id": 0}}
REFUSED = {
    "a charsmap that is none": {"normalizer": {"type": "Precompiled", "precompiled_charsmap": None}},
    "a charsmap shorter than it says": {"normalizer": {"type": "Precompiled", "precompiled_charsmap": "/////w=="}},
    "a trie that leads out of itself": {
        "normalizer": {"type": "Precompiled", "precompiled_charsmap": charsmap(b"\xff" * 16)}
    },
    "merges that lack their prefix": {
        "model": {"type": "BPE", "vocab": {"a": 0, "b": 1, "ab": 2}, "merges": [["a", "b"]],
                  "continuing_subword_prefix": "éé"}
    },
    "an unknown token that is none": {"model": {"type": "BPE", "vocab": LETTERS, "merges": [], "unk_token": "z"}},
    "words without an unknown one": {"model": {"type": "WordLevel", "vocab": {"a": 0}, "unk_token": "z"}},
    "Unigram without an unknown one": {"model": {"type": "Unigram", "vocab": [["a", 0.0]], "unk_id": None}},
    "dropout": {"model": {"type": "BPE", "vocab": LETTERS, "merges": [], "dropout": 0.5}},
    "pieces of no length": {"pre_tokenizer": {"type": "FixedLength", "length": 0}},
    "a pattern that backtracks": {"pre_tokenizer": {"type": "Split", "pattern": {"Regex": "(a|a)*b"},
                                                    "behavior": "Isolated", "invert": False}},
    "a decoder's pattern that backtracks": {"decoder": replaced("(a*)*b")},
    "a text written twice": {"post_processor": template([A, A])},
    "added tokens with a gap": {
        "added_tokens": [{"id": 99, "content": "<x>", "special": True, "normalized": False, "lstrip": False,
                          "rstrip": False, "single_word": False}]
    },
    "added tokens that are no list": {"added_tokens": {"<x>": 1}},
    "added tokens that are no objects": {"added_tokens": [7]},
    "an added token without an id": {"added_tokens": [{"content": "<x>", "special": True}]},
    "a token that is a list": {"added_tokens": [{"id": 9, "content": ["<x>"]}]},
    "an id that is an object": {"model": {"type": "BPE", "vocab": {"a": {}}, "merges": []}},
    "an id below 0": {"model": {"type": "WordLevel", "vocab": {"a": 0, "b": -1}, "unk_token": "a"}},
    "a vocabulary that is a number": {"model": {"type": "BPE", "vocab": 7, "merges": []}},
    "a step whose type is a list": {"normalizer": {"type": ["NFC"]}},
    "an unknown token that is a list": {"model": {"type": "BPE", "vocab": LETTERS, "merges": [], "unk_token": ["a"]}},
    "a special token that is an object": {"post_processor": template([{"SpecialToken": {"id": {}}}, A])},
    "no model": {"model": None},
}  # fmt: skip
TOO_MUCH = {
    "normalizers that double": {"normalizer": {"type": "Sequence", "normalizers": [TWICE] * 13}},
    "normalizers in each other": {
        "normalizer": {"type": "Sequence", "normalizers": [{"type": "Sequence", "normalizers": [TWICE] * 4}] * 4}
    },
    "a long text for a letter": {"normalizer": replaced("a", "b" * 5000)},
    "a long text before each": {"normalizer": {"type": "Prepend", "prepend": "b" * 5000}},
    "a charsmap that writes long texts": {
        "normalizer": {"type": "Precompiled", "precompiled_charsmap": charsmap(b"\0" * 4, b"b" * 5000 + b"\0")}
    },
    "bytes of bytes": {
        "pre_tokenizer": {"type": "Sequence", "pretokenizers": [
            {"type": "ByteLevel", "add_prefix_space": True, "use_regex": True, "trim_offsets": True}] * 7}
    },
    "decoders that double": {"decoder": {"type": "Sequence", "decoders": [TWICE] * 13}},
    "many special tokens around": {"post_processor": template([BOS, A], ids=2000)},
    "many times a special token": {
        "post_processor": {"type": "Sequence", "processors": [template([*[BOS] * 300, A], ids=1)] * 4}
    },
    "steps without end": {"normalizer": {"type": "Sequence", "normalizers": [{"type": "NFC"}] * 100}},
    "long words": {
        "model": {"type": "WordPiece", "vocab": {"a": 0}, "unk_token": "a", "max_input_chars_per_word": 10**6,
                  "continuing_subword_prefix": "##"}
    },
    "an id to which the library would count": {"model": {"type": "BPE", "vocab": {"a": 0, "b": 2**31}, "merges": []}},
    "a long token": {"model": {"type": "BPE", "vocab": {"a" * 5000: 0}, "merges": []}},
    "many added tokens": {"added_tokens": [{"id": each, "content": f"<{each}>"} for each in range(20_000)]},
}  # fmt: skip


@pytest.mark.parametrize("parts", REFUSED.values(), ids=REFUSED)
def test_what_would_panic_or_hang_is_a_typed_error(parts):
    with pytest.raises(TokenizerError):
        MistralTokenizer(json_file(**parts)).encode("hello a")


@pytest.mark.parametrize("parts", TOO_MUCH.values(), ids=TOO_MUCH)
def test_what_is_out_of_proportion_is_refused_unread(parts):
    with pytest.raises(LimitExceededError):
        MistralTokenizer(json_file(**parts))


def test_a_long_text_of_an_unusual_normalizer_is_refused(monkeypatch):
    monkeypatch.setattr(limits, "EXPANDED_TEXT", 1000)
    steps = {"normalizer": {"type": "Sequence", "normalizers": [replaced("a", "bb")] * 3}}
    tokenizer = MistralTokenizer(json_file(**steps))
    assert tokenizer.encode("a" * 37, add_special_tokens=False) == [1, 1] * 37
    for call in (tokenizer.encode, lambda text: tokenizer(text, return_offsets_mapping=True)):
        with pytest.raises(LimitExceededError):
            call("a" * 38)


PUBLISHED = [
    tekken.PATTERN,
    tekken.LLAMA_PATTERN,
    r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+",
    r"[^\r\n\p{L}\p{N}]?[\p{Lu}\p{M}]*[\p{Ll}\p{M}]+(?i:'s|'t|'re)?|\p{N}{1,3}| ?[^\s\p{L}]+[\r\n/]*|\s*[\r\n]+|\s+",
    r"\d{1,3}(?=(?:\d{3})*\b)",
    r"[!\"#$%&'()*+,\-./:;<=>?@\[\\\]^_`{|}~][A-Za-z]+|[一-龥぀-ゟ゠-ヿ]+",
    r" ?[^(\s|[.,!?…。，、।۔،])]+",
    r"\[REF\]|\[/REF\]| {2,}",
    "(?i)abc|def",
]
ENDLESS = [
    "(a|a)*b", "(a*)*b", "(?:a+)+$", "a*a*b", "(x+x+)+y", r"(a)\1", r"(?<n>a\g<n>?b)", "a{0,100}b",
    "a?" * 30 + "a" * 30, "(a|a)" * 30 + "b", "a{2}+", "(?x)a # )(\n", "(" * 100 + ")" * 100, "(?i)a*(?:a*b)",
    "(", ")", "[a", "(?~a)", "(?:a|b)+", "(?=a*)*", "a{5000}", r"\k<a>", "(*FAIL)",
]  # fmt: skip


@pytest.mark.parametrize("pattern", PUBLISHED)
def test_patterns_that_were_published_are_taken(pattern):
    patterns.check(pattern, "here")


@pytest.mark.parametrize("pattern", ENDLESS)
def test_patterns_that_may_try_without_end_are_refused(pattern):
    with pytest.raises(TokenizerError):
        patterns.check(pattern, "here")


def test_the_user_is_not_swallowed_with_a_panic():
    for raised in (KeyboardInterrupt, SystemExit, MemoryError, GeneratorExit):
        with pytest.raises(raised), typed("here", "what"):
            raise raised
    panic = type("PanicException", (BaseException,), {})
    for raised in (Exception, panic):
        with pytest.raises(TokenizerError, match=r"here: what \(\\x1b\[2J\)"), typed("here", "what"):
            raise raised("\x1b[2J")
    with pytest.raises(LimitExceededError), typed("here", "what"):
        raise LimitExceededError


def test_ids_with_gaps_are_all_taken():
    model = {"type": "BPE", "vocab": {"a": 0, "b": 7}, "merges": []}
    tokenizer = MistralTokenizer(json_file(model=model))
    assert tokenizer.vocab_size == 8
    assert tokenizer.decode(tokenizer.encode("b")) == "b"
    assert tokenizer.decode([3]) == ""


def small_tekken(words=(), special=("<unk>", "<s>", "</s>"), pattern=r"\S+|\s+", **config):
    vocabulary = [{"token_bytes": base64.b64encode(word).decode()} for word in (*map(bytes, zip(range(256))), *words)]
    sizes = {"default_vocab_size": len(vocabulary) + len(special), "default_num_special_tokens": len(special)}
    config = {"pattern": pattern, "version": "v3", **sizes, **config}
    specials = [{"rank": rank, "token_str": name} for rank, name in enumerate(special)]
    return json.dumps({"config": config, "vocab": vocabulary, "special_tokens": specials})


@pytest.mark.parametrize(
    "content",
    [
        small_tekken(words=[b"ab" * 5000]),
        small_tekken(special=["<unk>", "<s>", "x" * 5000]),
        small_tekken(pattern="(a|a)*b|.", version="v3"),
        small_tekken(default_num_special_tokens=float("inf")),
        small_tekken(pattern="(?"),
        small_tekken(version="\x1b[2J"),
        small_tekken(special=["<unk>", "<s>", "\ud800"]),
        small_tekken(pattern="\ud800"),
    ],
    ids=[
        "a long word",
        "a long special token",
        "a pattern",
        "endless special tokens",
        "no pattern",
        "a version",
        "half a character",
        "half a pattern",
    ],
)
def test_a_tekken_file_out_of_proportion_is_a_typed_error(tmp_path, content):
    (tmp_path / "tekken.json").write_text(content)
    with pytest.raises(MistralError) as caught:
        MistralTokenizer.from_pretrained(tmp_path)
    assert str(caught.value).isprintable()


def test_a_long_piece_of_a_tokenizer_model_is_a_typed_error(tmp_path):
    text = b"a" * 5000
    piece = b"\x0a" + bytes([len(text) & 127 | 128, len(text) >> 7]) + text
    whole = b"\x0a" + bytes([len(piece) & 127 | 128, len(piece) >> 7]) + piece
    (tmp_path / "tokenizer.model").write_bytes(whole)
    with pytest.raises(LimitExceededError):
        MistralTokenizer.from_pretrained(tmp_path)


def test_marks_of_long_tokens_need_no_more_memory_than_the_tokens():
    import tracemalloc

    tokens = tuple(f"<{number}{'x' * 8000}>" for number in range(5))  # all beginnings of all of them are 160 MB
    tracemalloc.start()
    marks = Marks(tokens, unused_characters(""))
    assert marks.where_needed(f"a <3{'x' * 1000}") != f"a <3{'x' * 1000}"
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 64 << 20
