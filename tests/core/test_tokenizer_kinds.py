"""Tokenizers of every kind of file: equal to sentencepiece and mistral-common, id for id, for any text and any ids.

tests/data/tokenizer_cases.json holds facts of the behaviour of mistral-common 1.13.1.
"""

from __future__ import annotations

import json
import random
import shutil
import warnings
from pathlib import Path

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from mistral_core.errors import MistralError, TemplateError, TokenizerError, UnsupportedFeatureError
from mistral_core.text import tekken
from mistral_core.text.coder import Coder
from mistral_core.text.mistral_common import MistralCommonTokenizer
from mistral_core.text.stream import TextStream
from mistral_core.text.tokenizer import MistralTokenizer

pytest.importorskip("mistral_common")

import published_files
import tokenizers
from mistral_common_files import FILES, RELEASED_7B, newer_tekken, oracle

DATA = Path(__file__).parents[1] / "data"
CASES = json.loads((DATA / "tokenizer_cases.json").read_text())["cases"]
NAMES = (*FILES, "v3_7b")
PIECES = ("v1", "v2", "v3", "v7")
"""Those of SentencePiece."""

CONTROLS = ["</s>", "<s>", "[INST]", "[/INST]", "[TOOL_CALLS]", "[REF]", "[REFERENCE_DOC_3]", "<0x0A>", "[control_9]"]
ODD = [
    *CONTROLS,
    " ",
    "  ",
    "\n",
    "\t",
    "\u2581",
    "\u00a0",
    "\ufeff",
    "\0",
    "\u0301",
    "\U0001f468\u200d\U0001f469",
    "ก็",
    "你好",
]
TEXTS = st.lists(st.sampled_from(ODD) | st.text(st.characters(exclude_categories=["Cs"]), max_size=8)).map("".join)


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """name -> (ours, ours over mistral-common, mistral-common's own encoder)."""
    directory = tmp_path_factory.mktemp("tokenizers")
    found = {}

    def make(name):
        if name not in found:
            file = FILES.get(name) or Path(shutil.copy(RELEASED_7B, directory / "tokenizer.model.v3"))
            own = oracle(name, directory).instruct_tokenizer.tokenizer
            found[name] = MistralTokenizer.from_pretrained(file), MistralCommonTokenizer.from_pretrained(file), own
        return found[name]

    return make


@pytest.fixture(scope="module")
def published(tmp_path_factory):
    """The directory with the published tokenizer.json files, each in a directory of its own."""
    directory = tmp_path_factory.mktemp("published")
    for name in published_files.PUBLISHED:
        (directory / name).mkdir()
        (directory / name / "tokenizer.json").write_bytes(published_files.published(name))
    return directory


def small_tekken(version):
    """The content of a tekken.json of 300 words."""
    content = newer_tekken(version)
    config = {**content["config"], "default_vocab_size": 1300}
    return {**content, "vocab": content["vocab"][:300], "config": config}


def cases(kind):
    return [pytest.param(case, id=case["name"]) for case in CASES if case["kind"] == kind]


# The vectors


def test_encode_vectors(made):
    for case in (case for case in CASES if case["kind"] == "encode"):
        for name, expected in case["expected"].items():
            for ours in made(name)[:2]:
                ids = ours.encode(case["text"], add_special_tokens=False)
                ids = [ours.bos_token_id] * case["add_bos"] + ids + [ours.eos_token_id] * case["add_eos"]
                assert ids == expected, (case["name"], name)


def test_decode_vectors(made):
    for case in (case for case in CASES if case["kind"] == "decode" and case["policy"] != "raise"):
        ours, common, _ = made(case["tokenizer"])
        expected = case["expected"].get("text")
        if expected is None or min(case["ids"], default=0) < 0:  # mistral-common takes -1 for nothing at times
            for tokenizer in (ours, common):
                with pytest.raises(IndexError):
                    tokenizer.decode(case["ids"])
            continue
        skip = case["policy"] == "ignore"
        assert common.decode(case["ids"], skip_special_tokens=skip) == expected, case["name"]
        if skip or case["tokenizer"] == "tekken":
            assert ours.decode(case["ids"], skip_special_tokens=skip) == expected, case["name"]


def test_piece_and_size_vectors(made):
    for case in (case for case in CASES if case["kind"] == "pieces"):
        ours, common, _ = made(case["tokenizer"])
        assert common.convert_ids_to_tokens(case["ids"]) == case["expected"]
        assert common.get_special_tokens_mask(case["ids"], already_has_special_tokens=True) == case["special"]
        if case["tokenizer"] != "tekken":  # there transformers' tokenizer.json has bytes where mistral-common has text
            assert ours.convert_ids_to_tokens(case["ids"]) == case["expected"]
            assert ours.convert_tokens_to_ids(case["expected"]) == case["ids"]
    for case in (case for case in CASES if case["kind"] == "meta"):
        expected = case["expected"]
        for ours in made(case["tokenizer"])[:2]:
            assert len(ours) == ours.vocab_size == expected["n_words"]
            assert [ours.bos_token_id, ours.eos_token_id, ours.unk_token_id] == [1, 2, 0]
            assert ours.pad_token_id == (expected["pad"] if expected["pad"] >= 0 else None)
        assert len(ours.get_vocab()) == expected["vocab_unique"]
        assert len(ours.all_special_ids) == expected["num_special"]
        assert made(case["tokenizer"])[0].version == expected["version"]


@pytest.mark.parametrize("case", cases("fim"))
def test_fill_in_the_middle_vectors(made, case):
    for name, expected in case["expected"].items():
        ours = made(name)[0]
        if name in ("v1", "v2", "v3_7b"):  # sentencepiece answers the unknown token for those that v2 has not
            with pytest.raises((TokenizerError, TemplateError)):
                ours.encode_fim(case["prompt"], case["suffix"])
        else:
            assert ours.encode_fim(case["prompt"], case["suffix"]) == expected["ids"]


# Any text, any ids


def agree_on_text(tokenizers_of_one_file, text):
    ours, common, own = tokenizers_of_one_file
    expected = own.encode(text, bos=False, eos=False)
    assert ours.encode(text, add_special_tokens=False) == expected
    assert ours.tokenize(text) == ours.convert_ids_to_tokens(expected)
    assert common.encode(text, add_special_tokens=False) == expected
    assert ours(text, add_special_tokens=False, return_offsets_mapping=True)["input_ids"] == expected
    assert not set(expected) & ours.all_special_ids
    decoded = ours.decode(expected)
    assert decoded == common.decode(expected, skip_special_tokens=True)
    pieces = hasattr(own, "_model") and hasattr(own._model, "piece_to_id")
    assert decoded == (text.replace("\u2581", " ") if pieces else text)


def agree_on_ids(tokenizers_of_one_file, ids):
    ours, common, _ = tokenizers_of_one_file
    assert ours.decode(ids, skip_special_tokens=True) == common.decode(ids, skip_special_tokens=True)


@pytest.mark.parametrize("name", FILES)
@settings(max_examples=60, deadline=None)
@example(text="[REF]</s>[REF]")  # what stands between two user-defined pieces is no control token
@example(text="[REF][/REF] [REFERENCE_DOC_19]x")
@given(text=TEXTS)
def test_any_text(made, name, text):
    agree_on_text(made(name), text)


@pytest.mark.parametrize("name", FILES)
@settings(max_examples=60, deadline=None)
@given(data=st.data())
def test_any_ids(made, name, data):
    size = made(name)[0].vocab_size
    low = st.integers(0, 1030) | st.integers(0, size - 1)  # control tokens and bytes are the first
    agree_on_ids(made(name), data.draw(st.lists(low)))


@pytest.mark.parametrize("name", FILES)
@settings(max_examples=30, deadline=None)
@given(prompt=TEXTS, text=TEXTS)
def test_any_text_as_it_comes(made, name, prompt, text):
    ours = made(name)[0]
    before, ids = ours.encode(prompt), ours.encode(text, add_special_tokens=False)
    stream = TextStream(ours, after=before)
    pieces = [*(stream.push(each) for each in ids), stream.end()]
    whole = ours.decode(before + ids, skip_special_tokens=True)
    assert ours.decode(before, skip_special_tokens=True) + "".join(pieces) == whole
    assert "\ufffd" not in "".join(pieces) or "\ufffd" in text  # half a character is never shown


@pytest.mark.sweep
@pytest.mark.parametrize("name", FILES)
def test_many_texts_and_ids(made, name):
    rng = random.Random(0)
    size = made(name)[0].vocab_size
    tokens = made(name)[0].convert_ids_to_tokens(range(size)) if name in PIECES else ODD
    letters = [chr(code) for code in (*range(0xD800), *range(0xE000, 0x110000))]
    for _ in range(20000):
        kinds = (ODD, tokens, letters)
        agree_on_text(made(name), "".join(rng.choice(rng.choice(kinds)) for _ in range(rng.randrange(12))))
        agree_on_ids(made(name), [rng.randrange(rng.choice((1030, size))) for _ in range(rng.randrange(12))])


def mixed_unicode(size):
    """Text of all of Unicode's planes between words, `size` bytes of it."""
    rng = random.Random(1)
    planes = [(0x20, 0x7F)] * 12 + [
        (0xA0, 0x600),
        (0x900, 0xE80),
        (0x3040, 0x9FFF),
        (0xAC00, 0xD7A4),
        (0x1F300, 0x1FAFF),
        (0x10000, 0x110000),
    ]
    parts, length = [], 0
    while length < size:
        first, last = rng.choice(planes)
        word = "".join(chr(rng.randrange(first, last)) for _ in range(rng.randrange(1, 12)))
        parts += [word, rng.choice((" ", " ", " ", "\n", "  ", "\t"))]
        length += len(word.encode()) + 1
    return "".join(parts).replace("\u2581", "_")


@pytest.mark.parametrize("name", FILES)
@pytest.mark.parametrize("size", [200_000, pytest.param(10_000_000, marks=pytest.mark.sweep)])
def test_mixed_unicode_round_trips(made, name, size):
    ours, _, own = made(name)
    text = mixed_unicode(size)
    documents = [text[at : at + 2000] for at in range(0, len(text), 2000)]
    rows = ours(documents, add_special_tokens=False)["input_ids"]
    assert ours.batch_decode(rows) == documents
    assert rows[: len(rows) // 10] == [own.encode(each, bos=False, eos=False) for each in documents[: len(rows) // 10]]
    if size < 1_000_000:
        assert ours.decode(ours.encode(text), skip_special_tokens=True) == text


def test_117_long_runs_of_one_character(made):
    for text in ("a" * 300_000, " " * 300_000, "\n" * 100_000, "\U0001f600" * 50_000, "\0" * 100_000):
        for name in ("v3", "tekken"):
            ours = made(name)[0]
            assert ours.decode(ours.encode(text), skip_special_tokens=True) == text


# tokenizer.json as it is published


def test_published_files_encode_as_the_library_says(published):
    texts = ["Hello world", " leading", "", "a\n\n b", "</s> [INST] x", "日本語 text", "\u2581 x", "x " * 500]
    for directory in published.iterdir():
        ours = MistralTokenizer.from_pretrained(directory)
        theirs = tokenizers.Tokenizer.from_file(str(directory / "tokenizer.json"))
        assert ours.encode(texts[4], parse_special=True) == theirs.encode(texts[4]).ids
        theirs.encode_special_tokens = True
        assert ours(texts)["input_ids"] == [each.ids for each in theirs.encode_batch(texts)]
        assert ours(texts, texts[::-1])["input_ids"] == [
            theirs.encode(*pair).ids for pair in zip(texts, texts[::-1], strict=True)
        ]


@pytest.mark.parametrize(("name", "version"), [("v0.1-2023", "v1"), ("v0.1-current", "v1"), ("v0.3", "v3")])
def test_published_files_as_sentencepiece(made, published, name, version):
    own = made({"v1": "v1", "v3": "v3_7b"}[version])[2]
    compatible = MistralTokenizer.from_pretrained(published / name, sentencepiece_compat=True)
    plain = MistralTokenizer.from_pretrained(published / name)
    assert plain.version == version
    for text in ("Hello", " leading", "  two", "", "\u2581x", "[INST] a </s>"):
        expected = own.encode(text, bos=True, eos=False)
        assert compatible.encode(text) == expected
        assert (plain.encode(text) == expected) is (name == "v0.1-2023" or not text.startswith((" ", "\u2581")))


# Which file, which version


def test_of_several_files(tmp_path, published):
    shutil.copy(RELEASED_7B, tmp_path / "tokenizer.model")
    assert MistralTokenizer.from_pretrained(tmp_path).version == "v3"  # by its control tokens
    shutil.copy(RELEASED_7B, tmp_path / "tokenizer.model.v2")
    assert MistralTokenizer.from_pretrained(tmp_path).version == "v2"  # by its name
    shutil.copy(published / "v0.3" / "tokenizer.json", tmp_path)
    assert MistralTokenizer.from_pretrained(tmp_path).encode("  x") == [
        1,
        *MistralTokenizer.from_pretrained(published / "v0.3").encode("  x")[1:],
    ]
    assert MistralTokenizer.from_pretrained(tmp_path).version == "v2"
    assert MistralTokenizer.from_pretrained(tmp_path, version="v7").version == "v7"
    (tmp_path / "tekken.json").write_text(json.dumps(small_tekken("v11")))
    assert MistralTokenizer.from_pretrained(tmp_path).version == "v11"
    assert MistralTokenizer.from_pretrained(tmp_path).vocab_size == 1300
    assert MistralTokenizer.from_pretrained(tmp_path / "tokenizer.model").vocab_size == 32768
    with pytest.raises(TokenizerError, match="version must be .* v1, v2, v3, v7.* got 'v9'"):
        MistralTokenizer.from_pretrained(tmp_path, version="v9")


@pytest.mark.parametrize(
    "content", [b"", b"{}", b"\x0a\x03\x0a\x01", b"\xff" * 20, b"[1", b'{"token_bytes": 1'], ids=repr
)
@pytest.mark.parametrize("name", ["tekken.json", "tokenizer.model", "tokenizer.model.v3"])
def test_114_and_115_malformed_files(tmp_path, name, content):
    (tmp_path / name).write_bytes(content)
    for path in (tmp_path, tmp_path / name):
        with pytest.raises(MistralError):
            MistralTokenizer.from_pretrained(path)
        with pytest.raises(MistralError):
            MistralCommonTokenizer.from_pretrained(path)


def test_115_a_model_cut_anywhere_is_refused(tmp_path):
    whole = FILES["v1"].read_bytes()
    (tmp_path / "tokenizer.model").write_bytes(whole)
    for length in (1, 100, 5000, len(whole) // 2, len(whole) - 1):
        (tmp_path / "tokenizer.model").write_bytes(whole[:length])
        with pytest.raises(MistralError):
            MistralTokenizer.from_pretrained(tmp_path)


@pytest.mark.parametrize("change", [
    {"version": "v99"}, {"pattern": None}, {"default_vocab_size": 10**9}, {"default_num_special_tokens": -1},
    {"default_num_special_tokens": "many"}, {"pattern": "("},
], ids=str)  # fmt: skip
def test_114_a_tekken_config_that_makes_no_sense(tmp_path, change):
    content = small_tekken("v7")
    content["config"] |= change
    (tmp_path / "tekken.json").write_text(json.dumps(content))
    with pytest.raises(TokenizerError, match=r"tekken\.json"):
        MistralTokenizer.from_pretrained(tmp_path)


def test_a_model_of_another_kind_is_refused(tmp_path, monkeypatch):
    import sentencepiece

    (tmp_path / "text").write_text("the quick brown fox jumps over the lazy dog\n" * 50)
    sentencepiece.SentencePieceTrainer.train(
        input=str(tmp_path / "text"), model_prefix=str(tmp_path / "tokenizer"), vocab_size=31, model_type="unigram",
        minloglevel=2,
    )  # fmt: skip
    with pytest.raises(UnsupportedFeatureError, match="not a BPE with byte fallback"):
        MistralTokenizer.from_pretrained(tmp_path / "tokenizer.model")


def test_a_tekken_that_cuts_words_as_llama_does(tmp_path, made):
    ours = made("tekken")[0]
    ours.save_pretrained(tmp_path)
    (tmp_path / "tekken.json").unlink()
    path = tmp_path / "tokenizer.json"
    right = path.read_text()
    wrong = right.replace(json.dumps(tekken.PATTERN), json.dumps(tekken.LLAMA_PATTERN))
    assert wrong != right
    path.write_text(wrong)
    text = "हिन्दी भाषा में"
    with pytest.warns(UserWarning, match="fix_mistral_regex"):
        assert MistralTokenizer.from_pretrained(tmp_path).encode(text) != ours.encode(text)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert MistralTokenizer.from_pretrained(tmp_path, fix_mistral_regex=True).encode(text) == ours.encode(text)


# Files that are written


@pytest.fixture(params=[*PIECES, "small tekken", pytest.param("tekken", marks=pytest.mark.sweep)])
def both(request, made, tmp_path):
    """Ours and that over mistral-common."""
    if request.param != "small tekken":
        return made(request.param)[:2]
    (tmp_path / "tekken.json").write_text(json.dumps(small_tekken("v3")))
    return MistralTokenizer.from_pretrained(tmp_path), MistralCommonTokenizer.from_pretrained(tmp_path)


def test_what_is_saved_is_read_again(both, tmp_path):
    ours = both[0]
    text = "[INST] Hi</s> [REF] \u2581 日本\n"
    for tokenizer in both:
        directory = tmp_path / type(tokenizer).__name__
        paths = tokenizer.save_pretrained(directory)
        assert sorted(paths) == sorted(str(path) for path in directory.iterdir())
        again = type(tokenizer).from_pretrained(directory)
        assert again.encode(text) == tokenizer.encode(text)
        assert again.get_vocab() == tokenizer.get_vocab()
        assert again.convert_tokens_to_ids("[INST]") == tokenizer.convert_tokens_to_ids("[INST]")
    assert MistralTokenizer.from_pretrained(tmp_path / "MistralTokenizer").version == ours.version


@pytest.mark.parametrize(("token", "written"), [("b\u2581", "b \u2581"), ("b ", ["b", " "])])
def test_merges_are_saved_as_every_version_reads_them_where_no_token_holds_a_space(token, written):
    vocabulary = {text: number for number, text in enumerate(["<unk>", "b", token[1], token])}
    saved = Coder(tokenizers.Tokenizer(tokenizers.models.BPE(vocabulary, [("b", token[1])]))).to_json()
    assert json.loads(saved)["model"]["merges"] == [written]
    assert tokenizers.Tokenizer.from_str(saved).encode(token).ids == [3]


def test_transformers_loads_what_is_saved(both, tmp_path):
    transformers = pytest.importorskip("transformers")
    ours = both[0]
    ours.save_pretrained(tmp_path)
    theirs = transformers.PreTrainedTokenizerFast.from_pretrained(tmp_path)
    for text in ("Hello world", " leading", "", "a\n\n b", "日本語 [REF] text", "x " * 300):
        assert theirs(text)["input_ids"] == ours.encode(text)
    assert theirs("[INST] x</s>", split_special_tokens=True)["input_ids"] == ours.encode("[INST] x</s>")
    assert theirs("[INST] x</s>")["input_ids"] == ours.encode("[INST] x</s>", parse_special=True)
    assert (theirs.bos_token, theirs.eos_token, theirs.unk_token) == ("<s>", "</s>", "<unk>")


def test_the_vocabulary_of_a_keras_hub_preset(made, tmp_path):
    shutil.copytree(DATA / "foreign" / "keras_hub" / "single", tmp_path / "preset")
    shutil.copy(FILES["v1"], tmp_path / "preset" / "assets" / "tokenizer" / "vocabulary.spm")
    ours = MistralTokenizer.from_pretrained(tmp_path / "preset")
    assert ours.version == "v1"
    assert ours.encode("Emma was </s> 日本") == made("v1")[0].encode("Emma was </s> 日本")
