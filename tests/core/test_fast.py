"""The fast encoder gives the ids of `tokenizers` for any text, and is not made where it would not."""

from __future__ import annotations

import copy
import json
import pickle
import random
import sys

import pytest

from mistral_core.errors import MissingExtraError, TokenizerError
from mistral_core.text import fast, tekken
from mistral_core.text.bpe import byte_characters, merges_by_score
from mistral_core.text.decoder import BYTE_TOKENS
from mistral_core.text.tokenizer import MistralTokenizer

pytest.importorskip("kitoken")
pytest.importorskip("mistral_common")

import published_files
from mistral_common_files import FILES
from tokenizers import Regex, Tokenizer, models, normalizers, pre_tokenizers

ODD = [
    *("</s>", "<s>", "<unk>", "[INST]", "[/INST]", "[TOOL_CALLS]", "<0x0A>", "[control_9]"),
    *(" ", "  ", "   ", "\n", "\t", "\u2581", "\u2581\u2581", "\u00a0", "\ufeff", "\0", "\u0301", "ก็", "你好"),
]  # fmt: skip
BYTES = tuple(byte_characters())
LETTERS = [chr(code) for code in (*range(0xD800), *range(0xE000, 0x110000))]


def random_texts(tokens, count, seed=0):
    """Odd things, whole tokens, letters of all of Unicode and of English, mixed in all proportions."""
    rng = random.Random(seed)
    kinds = (ODD, tokens, LETTERS, "etaoin shrdlu.,()[]0123456789ABC_")
    for _ in range(count):
        shares = [rng.random() for _ in kinds]
        yield "".join(rng.choice(kind) for kind in rng.choices(kinds, shares, k=rng.randrange(40)))


def sweep(all, quick):
    """All of them, most in the sweep only."""
    return [each if each in quick else pytest.param(each, marks=pytest.mark.sweep) for each in all]


@pytest.fixture(scope="module", params=sweep(FILES, ("v3", "tekken")))
def both(request):
    """One tokenizer that encodes as it is and one that encodes fast."""
    return [MistralTokenizer.from_pretrained(FILES[request.param], fast=fast) for fast in (False, True)]


def agree(both, texts):
    slow, quick = ([each._coder.encode(texts, prefix=prefix) for prefix in (None, "never")] for each in both)
    assert slow == quick


def test_any_text_has_the_ids_of_tokenizers(both):
    agree(both, list(random_texts(list(both[0].get_vocab()), 1000)))


@pytest.mark.sweep
@pytest.mark.parametrize("seed", range(1, 11))
def test_many_texts_have_the_ids_of_tokenizers(both, seed):
    agree(both, list(random_texts(list(both[0].get_vocab()), 20000, seed)))


@pytest.mark.parametrize("every", sweep((1, 16), (16,)))
def test_single_tokens(both, every):
    agree(both, list(both[0].get_vocab())[::every])


@pytest.mark.parametrize("length", sweep((100_000, 5000), (5000,)))
def test_long_words_and_nothing(both, length):
    agree(both, ["a" * length, " " * length, "\U0001f9ff" * (length // 5), "ab" * (length // 2), "", " "])
    agree(both, [])


def test_no_text_becomes_a_control_token(both):
    special = both[1]._coder.special
    for row in both[1]._coder.encode([*special.values(), "".join(special.values())], prefix="never"):
        assert not special.keys() & set(row)


def test_threads_keep_the_order(both, monkeypatch):
    texts = list(random_texts(ODD, 300)) + [""] * 5 + ["a b" * 5000]
    monkeypatch.setattr(fast, "processors", lambda: 4)
    for alone in (1, 1000, 10_000):
        monkeypatch.setattr(fast, "CHARACTERS_PER_THREAD", alone)
        agree(both, texts)
    agree(both, ["", ""])


# When it is made


def test_it_is_used_where_it_is_asked_for_and_only_there(both, monkeypatch):
    slow, quick = both
    used = []
    monkeypatch.setitem(vars(quick._coder), "_fast", lambda texts: used.append(len(texts)) or [[7]] * len(texts))
    assert quick("Hello", add_special_tokens=False)["input_ids"] == [7]
    assert used == [1]
    slow("a b " * 1000)
    assert "_fast" not in vars(slow._coder)  # however much it has seen: no engine is changed by itself


def test_a_tokenizer_that_has_one_is_copied_and_pickled():
    tokenizer = MistralTokenizer(bpe(["ab", "ba", "aba"]).to_str(), fast=True)
    ids = tokenizer.encode("abab")
    assert vars(tokenizer._coder)["_fast"] is not None
    for copied in (copy.deepcopy(tokenizer), pickle.loads(pickle.dumps(tokenizer))):
        assert "_fast" not in vars(copied._coder)
        assert copied.encode("abab") == ids
        assert vars(copied._coder)["_fast"] is not None


def test_without_its_library_the_extra_is_named(monkeypatch):
    monkeypatch.setitem(sys.modules, "kitoken", None)
    with pytest.raises(MissingExtraError, match=r"fast=True needs kitoken; .*\[fast\]"):
        MistralTokenizer.from_pretrained(FILES["v1"], fast=True)
    slow = MistralTokenizer.from_pretrained(FILES["v1"])
    assert slow.encode("Hello world", add_special_tokens=False) == [22557, 1526]


def test_a_vocabulary_that_would_get_other_ids_is_refused():
    text = bpe(["abba"]).to_str()
    assert MistralTokenizer(text).encode("ab", add_special_tokens=False)
    with pytest.raises(TokenizerError, match="fast=True would give other ids"):
        MistralTokenizer(text, fast=True)


@pytest.mark.parametrize("name", sweep(published_files.PUBLISHED, ("v0.1-current",)))
def test_the_published_files_have_one(tmp_path, name):
    (tmp_path / "tokenizer.json").write_bytes(published_files.published(name))
    assert MistralTokenizer.from_pretrained(tmp_path, fast=True)._coder._is_fast


# Where it is not made: other ids would come


def bpe(tokens, letters="ab\u2581", **changes):
    """A BPE with every merge there can be, changed."""
    vocabulary = {text: number for number, text in enumerate(["<unk>", *BYTE_TOKENS, *tokens, *letters])}
    scores = {text: -float(number) for text, number in vocabulary.items() if number > 256}
    description = json.loads(
        Tokenizer(models.BPE(vocabulary, merges_by_score(scores), unk_token="<unk>", byte_fallback=True)).to_str()
    )
    changes = {name: change(description["model"][name]) for name, change in changes.items()}
    description["model"].update(changes)
    return Tokenizer.from_str(json.dumps(description))


NOT_MADE = {
    "a merge is missing": (lambda: bpe(["ab", "ba", "aba"], merges=lambda all: [["b", "a"], ["a", "ba"]]), "ab"),
    "merges of one token apart": (
        lambda: bpe(["ab", "ba", "aba"], merges=lambda all: [["ab", "a"], ["a", "b"], ["b", "a"], ["a", "ba"]]),
        None,
    ),
    "a token that no merge makes": (lambda: bpe(["abba"]), "abba"),
    "a token over two words": (lambda: bpe(["a\u2581", "a\u2581b"]), "a\u2581b"),
    "no token for a byte": (lambda: bpe([], vocab=lambda all: {t: n for t, n in all.items() if t != "<0xFF>"}), None),
    "no bytes": (lambda: bpe([], byte_fallback=lambda _: False), None),
    "words are taken whole": (lambda: bpe(["abba"], ignore_merges=lambda _: True), None),
    "merges are dropped at random": (lambda: bpe(["ab"], dropout=lambda _: 0.5), None),
}


@pytest.mark.parametrize("model", [models.Unigram([("a", 0.0)]), models.WordLevel({"a": 0}, unk_token="a")])
def test_what_is_no_bpe_has_none(model):
    assert fast.encoder(Tokenizer(model), []) is None


@pytest.mark.parametrize("name", NOT_MADE)
def test_other_models_have_none(name):
    assert fast.encoder(NOT_MADE[name][0](), ["<unk>"]) is None


def test_the_model_that_those_are_changed_from_has_one():
    assert fast.encoder(bpe(["ab", "ba", "aba", "\u2581\u2581", "\u2581a"]), ["<unk>"]) is not None


def byte_level(pattern=tekken.PATTERN, behavior="isolated", letters=BYTES, normalizer=None, **changes):
    """A BPE as Tekken's, with two merges."""
    vocabulary = {text: number for number, text in enumerate([*letters, "in", "ing"])}
    tokenizer = Tokenizer(models.BPE(vocabulary, [("i", "n"), ("in", "g")]))
    as_bytes = pre_tokenizers.ByteLevel(**{"add_prefix_space": False, "use_regex": False} | changes)
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence([pre_tokenizers.Split(Regex(pattern), behavior), as_bytes])
    if normalizer:
        tokenizer.normalizer = normalizer
    return tokenizer


def test_a_byte_level_model_with_the_pattern_of_tekken_has_one():
    tokenizer = byte_level()
    assert fast.encoder(tokenizer, [])(["ing in\n  it"]) == [tokenizer.encode("ing in\n  it").ids]


@pytest.mark.parametrize(
    "changes",
    [
        {"pattern": tekken.LLAMA_PATTERN},
        {"behavior": "removed"},
        {"letters": BYTES[:-1]},
        {"normalizer": normalizers.NFC()},
        {"add_prefix_space": True},
        {"use_regex": True},
    ],
    ids=str,
)
def test_other_byte_level_models_have_none(changes):
    assert fast.encoder(byte_level(**changes), []) is None


@pytest.mark.parametrize("name", [name for name, (_, text) in NOT_MADE.items() if text])
def test_for_those_it_would_give_other_ids(name, monkeypatch):
    make, text = NOT_MADE[name]
    tokenizer = make()
    monkeypatch.setattr(fast, "_has_all_merges", lambda *_: True)
    monkeypatch.setattr(fast, "_makes_all", lambda *_: True)
    assert fast.encoder(tokenizer, ["<unk>"])([text]) != [tokenizer.encode(text).ids]
