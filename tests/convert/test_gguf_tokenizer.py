"""Tokenizers to GGUF's keys and back: the same ids, from every kind of file that Mistral has published."""

import base64
import contextlib
import json
import struct
import warnings
from pathlib import Path

import numpy as np
import pytest
from samples import any_bits, write
from tokenizers import Tokenizer

from mistral_core import TINY, MistralTokenizer, convert
from mistral_core.disk.names import TEXT_FILES
from mistral_core.errors import CorruptCheckpointError, TokenizerError
from mistral_core.text import sentencepiece
from mistral_core.text.bpe import byte_characters
from mistral_core.text.tekken import PATTERN as TEKKEN
from mistral_core.weights.containers.gguf import file as gguf_file
from mistral_core.weights.containers.gguf.file import GgufFile
from mistral_core.weights.formats.base import Outline
from mistral_core.weights.formats.gguf import texts as gguf_texts
from mistral_core.weights.formats.gguf import tokenizer as gguf_tokenizer
from mistral_core.weights.opening import Checkpoint

EMBEDDED = Path(__file__).parents[2] / "mistral_core" / "data" / "tiny"
TEXTS = [
    "Hello world", " a leading space", "  two  between   words ", "emoji 😀🎉, 中文 and \x07", "new\nlines\n\n and\ta",
    "naïve café Æsop", "", "a", "1234567890 3.14 x=y+z; def f(x): return x**2", "aaaaaaaaaaa bbbbb aaa", "日本語",
    "don't won't I'LL", "\u00a0\u2003spaces\r\n",
]  # fmt: skip


def config(size):
    return TINY.replace(vocab_size=size, bos_token_id=1, eos_token_id=2, pad_token_id=None, sliding_window=None)


def keys(texts, size, **changes):
    return gguf_tokenizer.keys(Outline(config(size).replace(**changes), "MistralForCausalLM", {}, texts))


def there_and_back(path, texts, size):
    """The texts that a GGUF file alone gives."""
    gguf_file.create(path, keys(texts, size) | {"tokenizer.ggml.bos_token_id": np.uint32(1)}, {})
    return {name: read() for name, read in gguf_texts.texts(GgufFile(path)).items()}


def ids(whole):
    tokenizer = Tokenizer.from_str(whole.decode())
    return [tokenizer.encode(text).ids for text in TEXTS]


def mistral_data(name):
    common = pytest.importorskip("mistral_common")
    return Path(common.__file__).parent / "data" / name


# SentencePiece


def wire(number, content):
    if isinstance(content, float):
        return bytes([number << 3 | 5]) + struct.pack("<f", content)
    if isinstance(content, int):
        return bytes([number << 3, content])
    return bytes([number << 3 | 2, len(content)]) + content


def model_of(pieces, model_type=2, prefix=1):
    messages = [wire(1, wire(1, text.encode()) + wire(2, score) + wire(3, kind)) for text, score, kind in pieces]
    return b"".join(messages) + wire(2, wire(3, model_type)) + wire(3, wire(3, prefix))


PIECES = [("<unk>", 0.0, 2), ("<s>", 0.0, 3), ("</s>", 0.0, 3), ("<0x0A>", 0.0, 6), ("▁a", -1.0, 1), ("▁▁", 0.0, 4),
          ("▁", -9.0, 1), ("a", -8.0, 1)]  # fmt: skip


def test_a_sentencepiece_model_is_read():
    model = sentencepiece.parse(model_of(PIECES), "tokenizer.model")
    assert model == (PIECES, True, False, True, False)
    assert sentencepiece.parse(model_of(PIECES, 1, 0), "x")[1:] == (False, False, False, False)
    assert sentencepiece.parse(wire(1, wire(1, b"a")) + b"\x79" + bytes(8), "x").pieces == [("a", 0.0, 1)]


def test_a_malformed_sentencepiece_model_at_every_byte():
    whole = model_of(PIECES)
    for size in range(len(whole)):
        for data in (whole[:size], whole[:size] + bytes([whole[size] ^ 0xFF]) + whole[size + 1 :]):
            with contextlib.suppress(TokenizerError):  # and nothing else
                sentencepiece.parse(data, "tokenizer.model")


@pytest.mark.parametrize("missing", [1, 2, 5])
def test_a_sentencepiece_model_that_is_cut(missing):
    with pytest.raises(TokenizerError, match="bytes at byte"):
        sentencepiece.parse(model_of(PIECES)[:-4][:-missing], "tokenizer.model")


def test_sentencepiece_as_keys():
    found = keys({"tokenizer.model": model_of(PIECES)}, 10)
    assert found["tokenizer.ggml.model"] == "llama"
    assert found["tokenizer.ggml.tokens"] == [*(text for text, _, _ in PIECES[:5]), "  ", "▁", "a", "[PAD8]", "[PAD9]"]
    assert found["tokenizer.ggml.token_type"].tolist() == [2, 3, 3, 6, 1, 4, 1, 1, 5, 5]
    assert found["tokenizer.ggml.scores"].tolist() == [0, 0, 0, 0, -1, 0, -9, -8, 0, 0]
    assert (found["tokenizer.ggml.add_space_prefix"], found["tokenizer.ggml.add_bos_token"]) == (True, True)
    assert found["tokenizer.ggml.unknown_token_id"] == 0
    assert keys({"tokenizer.model": model_of(PIECES)}, 10, bos_token_id=None)["tokenizer.ggml.add_bos_token"] is False


@pytest.mark.parametrize("version", ["tokenizer.model.v1", "mistral_instruct_tokenizer_240323.model.v3"])
def test_mistrals_own_sentencepiece(tmp_path, version):
    spm = pytest.importorskip("sentencepiece")
    path = mistral_data(version)
    original = spm.SentencePieceProcessor(model_file=str(path))
    size = original.vocab_size() + 3
    found = there_and_back(tmp_path / "x.gguf", {"tokenizer.model.v3": path.read_bytes()}, size)
    expected = [[1, *original.encode(text)] for text in TEXTS]
    assert ids(found["tokenizer.json"]) == expected
    # and from Hugging Face's file, whose merges are ranks
    again = there_and_back(tmp_path / "y.gguf", {"tokenizer.json": found["tokenizer.json"]}, size)
    assert ids(again["tokenizer.json"]) == expected


# tokenizer.json


def test_the_embedded_tokenizer(tmp_path):
    whole = (EMBEDDED / "tokenizer.json").read_bytes()
    kinds = keys({"tokenizer.json": whole}, 2048)["tokenizer.ggml.token_type"].tolist()
    assert [kinds.count(kind) for kind in (1, 2, 3, 6)] == [2048 - 259, 1, 2, 256]
    found = there_and_back(tmp_path / "x.gguf", {"tokenizer.json": whole}, 2048)
    assert ids(found["tokenizer.json"]) == ids(whole)
    settings = json.loads(found["tokenizer_config.json"])
    assert (settings["bos_token"], settings["eos_token"], settings["unk_token"]) == ("<s>", "</s>", "<unk>")
    assert settings["add_bos_token"] is True
    assert settings["model_input_names"] == ["input_ids", "attention_mask"]
    tokenizer, original = (Tokenizer.from_str(each.decode()) for each in (found["tokenizer.json"], whole))
    assert [tokenizer.decode(row) for row in ids(whole)] == [original.decode(row) for row in ids(whole)]


def test_added_tokens_and_frames(tmp_path):
    whole = json.loads((EMBEDDED / "tokenizer.json").read_bytes())
    plain = {"single_word": False, "lstrip": False, "rstrip": False, "normalized": False}
    whole["added_tokens"] += [
        {"id": 2048, "content": "[INST]", **plain, "special": True},
        {"id": 2049, "content": "<tool>", **plain, "special": False},
    ]
    whole["post_processor"] = None
    texts = {
        "tokenizer.json": json.dumps(whole).encode(),
        "tokenizer_config.json": json.dumps({"add_bos_token": False, "add_eos_token": True}).encode(),
    }
    found = there_and_back(tmp_path / "x.gguf", texts, 2050)
    tokenizer = Tokenizer.from_str(found["tokenizer.json"].decode())
    assert tokenizer.encode("a[INST]b<tool>").ids[-1:] == [2]
    assert [each for each in tokenizer.encode("a[INST]b<tool>").ids if each >= 2048] == [2048, 2049]
    assert not tokenizer.get_added_tokens_decoder()[2049].special


# Tekken


def cut_tekken(count=3000):
    data = json.loads(mistral_data("tekken_240718.json").read_bytes())
    data["vocab"] = data["vocab"][: count + 50]
    data["config"] |= {"default_vocab_size": 1000 + count, "num_vocab_tokens": count + 50}
    return data


@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning")
def test_tekken(tmp_path):
    data = cut_tekken()
    (tmp_path / "tekken.json").write_text(json.dumps(data))
    from mistral_common.tokens.tokenizers.tekken import Tekkenizer

    original = Tekkenizer.from_file(tmp_path / "tekken.json")
    expected = [original.encode(text, bos=True, eos=False) for text in TEXTS]
    found = there_and_back(tmp_path / "x.gguf", {"tekken.json": json.dumps(data).encode()}, 4002)
    assert ids(found["tokenizer.json"]) == expected
    vocabulary = Tokenizer.from_str(found["tokenizer.json"].decode()).get_vocab()
    assert [vocabulary[original.id_to_piece(each)] for each in range(20)] == list(range(20))
    again = there_and_back(tmp_path / "y.gguf", {"tokenizer.json": found["tokenizer.json"]}, 4002)
    assert ids(again["tokenizer.json"]) == expected


def test_the_alphabet_of_bytes():
    from tokenizers.pre_tokenizers import ByteLevel

    assert sorted(byte_characters()) == sorted(ByteLevel.alphabet())
    assert [byte_characters()[byte] for byte in (0, 32, 33, 173, 255)] == ["Ā", "Ġ", "!", "Ń", "ÿ"]


# What is not known, and what is broken


WORDS = json.dumps({"model": {"type": "WordPiece", "vocab": {"a": 0}}}).encode()


@pytest.mark.parametrize(
    ("texts", "size", "message"),
    [
        ({"tokenizer.json": WORDS}, 5, "no tokenizer of a kind"),
        ({"tokenizer.model": model_of(PIECES, model_type=1)}, 10, "no tokenizer of a kind"),
        ({"tokenizer.model": model_of(PIECES)}, 7, "has token 7, the config says vocab_size 7"),
        ({"tokenizer.model": model_of([*PIECES, ("a", 0.0, 1)])}, 10, "not all different"),
    ],
)
def test_a_tokenizer_that_llama_cpp_cannot_have_is_told(texts, size, message):
    with pytest.warns(UserWarning, match=message):
        assert keys(texts, size) == {"tokenizer.ggml.model": "no_vocab"}


def test_no_tokenizer_is_no_loss():
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert keys({"generation_config.json": b"{}"}, 10) == {"tokenizer.ggml.model": "no_vocab"}


def bpe(**changes):
    whole = {
        "model": {"type": "BPE", "byte_fallback": True, "vocab": {"a": 0}, "merges": []} | changes.pop("model", {})
    }
    return json.dumps(whole | changes).encode()


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("tokenizer.json", b"{"),
        ("tokenizer.json", b"[]"),
        ("tokenizer.json", b"[" * 100_000),
        ("tokenizer.json", bpe(model={"merges": [1]})),
        ("tokenizer.json", bpe(model={"merges": ["ab"]})),
        ("tokenizer.json", bpe(model={"vocab": {"a": "x"}})),
        ("tokenizer.json", bpe(model={"vocab": []})),
        ("tokenizer.json", bpe(added_tokens=[{"id": 1}])),
        ("tokenizer.model", b"\x0a\x7f"),
        ("tokenizer.model", b""),
        ("tekken.json", b"{}"),
        ("tekken.json", json.dumps({"config": {"default_num_special_tokens": 0, "default_vocab_size": 1},
                                    "vocab": [{"token_bytes": "?"}]}).encode()),
        ("chat_template.jinja", b"\xff"),
        ("tokenizer_config.json", b"\xff"),
    ],
)  # fmt: skip
def test_malformed_files(name, content):
    with pytest.raises(TokenizerError, match=name):
        keys({name: content}, 10)


def tekken_of(*words):
    config = {"default_num_special_tokens": 3, "default_vocab_size": 3 + len(words), "pattern": TEKKEN}
    return {"config": config, "vocab": [{"token_bytes": base64.b64encode(word).decode()} for word in words]}


def test_merges_are_every_pair_in_the_order_of_ranks():
    data = tekken_of(b"a", b"b", b" ", b"ab", b"ba", b"aba")
    found = keys({"tekken.json": json.dumps(data).encode()}, 9)
    assert found["tokenizer.ggml.merges"] == ["a b", "b a", "a ba", "ab a"]
    assert found["tokenizer.ggml.tokens"] == ["<unk>", "<s>", "</s>", "a", "b", "Ġ", "ab", "ba", "aba"]
    assert found["tokenizer.ggml.pre"] == "tekken"
    other = tekken_of(b"a")
    other["config"]["pattern"] = ".*"
    with pytest.warns(UserWarning, match="no tokenizer of a kind"):
        keys({"tekken.json": json.dumps(other).encode()}, 9)


def test_a_word_that_merges_do_not_reach(tmp_path):
    whole = there_and_back(
        tmp_path / "x.gguf", {"tekken.json": json.dumps(tekken_of(b"a", b"b", b"c", b"abc")).encode()}, 9
    )
    assert Tokenizer.from_str(whole["tokenizer.json"].decode()).encode("abc").ids == [1, 6]
    pieces = [("<unk>", 0.0, 2), ("<s>", 0.0, 3), ("a", -1.0, 1), ("b", -1.0, 1), ("c", -1.0, 1), ("abc", 0.0, 1)]
    whole = there_and_back(tmp_path / "y.gguf", {"tokenizer.model": model_of(pieces, prefix=0)}, 9)
    tokenizer = Tokenizer.from_str(whole["tokenizer.json"].decode())
    assert tokenizer.encode("abc").ids == [1, 2, 3, 4]
    assert tokenizer.get_vocab_size() == len(pieces)  # the rows beyond are no tokens


TOKENS = {
    "tokenizer.ggml.model": "llama",
    "tokenizer.ggml.tokens": ["<unk>", "<s>", "</s>", "a"],
    "tokenizer.ggml.token_type": np.array([2, 3, 3, 1], np.int32),
    "tokenizer.ggml.scores": np.zeros(4, np.float32),
}


@pytest.mark.parametrize(
    "changes",
    [
        {"tokenizer.ggml.tokens": np.zeros(4, np.float32)},
        {"tokenizer.ggml.tokens": ["a", "b", "c", "d" * 2000]},
        {"tokenizer.ggml.token_type": np.zeros(3, np.int32)},
        {"tokenizer.ggml.scores": "x"},
        {"tokenizer.ggml.model": "gpt2", "tokenizer.ggml.pre": "tekken"},
    ],
)
def test_malformed_keys(tmp_path, changes):
    gguf_file.create(tmp_path / "x.gguf", TOKENS | changes, {})
    with pytest.raises(CorruptCheckpointError, match=r"tokenizer\.ggml\."):
        gguf_texts.texts(GgufFile(tmp_path / "x.gguf"))["tokenizer.json"]()


def test_a_file_of_the_kind_llama_that_names_nothing_has_llamas_special_tokens(tmp_path):
    gguf_file.create(tmp_path / "x.gguf", TOKENS, {})
    found = gguf_texts.texts(GgufFile(tmp_path / "x.gguf"))
    assert Tokenizer.from_str(found["tokenizer.json"]().decode()).encode("a").ids[0] == 1
    assert json.loads(found["tokenizer_config.json"]())["eos_token"] == "</s>"


def test_scores_that_are_integers(tmp_path):
    """llama.cpp's converter writes them of a tekken.json, all 0."""
    of_tekken = {"model": "gpt2", "pre": "tekken", "tokens": ["<unk>", "<s>", "a", "b", "ab"], "merges": ["a b"]}
    values = {f"tokenizer.ggml.{name}": value for name, value in of_tekken.items()}
    values["tokenizer.ggml.token_type"] = np.array([2, 3, 1, 1, 1], np.int32)
    gguf_file.create(tmp_path / "x.gguf", values | {"tokenizer.ggml.scores": np.zeros(5, np.int32)}, {})
    found = gguf_texts.texts(GgufFile(tmp_path / "x.gguf"))
    assert Tokenizer.from_str(found["tokenizer.json"]().decode()).encode("ab").ids == [4]


def test_an_unknown_kind_gives_no_tokenizer(tmp_path):
    for values in ({"tokenizer.ggml.model": "bert"}, {"tokenizer.ggml.model": "gpt2", "tokenizer.ggml.pre": "qwen2"}):
        gguf_file.create(tmp_path / "x.gguf", values, {})
        assert gguf_texts.texts(GgufFile(tmp_path / "x.gguf")) == {}
        (tmp_path / "x.gguf").unlink()


# Templates, and files that lie beside


@pytest.mark.parametrize(
    "texts",
    [
        {"chat_template.jinja": b"T", "tokenizer_config.json": b'{"chat_template": "other"}'},
        {"chat_template.json": b'{"chat_template": "T"}'},
        {"tokenizer_config.json": b'{"chat_template": "T"}'},
        {"tokenizer_config.json": json.dumps({"chat_template": [
            {"name": "tool_use", "template": "x"}, {"name": "default", "template": "T"}]}).encode()},
    ],
)  # fmt: skip
@pytest.mark.filterwarnings("ignore:.*no tokenizer of a kind")
def test_chat_templates(tmp_path, texts):
    found = there_and_back(tmp_path / "x.gguf", texts, 10)
    assert found == {"chat_template.jinja": b"T"}


def test_files_beside_go_before(tmp_path):
    texts = {name: (EMBEDDED / name).read_bytes() for name in TEXT_FILES if (EMBEDDED / name).exists()}
    small = config(2048)
    path = write(tmp_path / "model", "gguf", any_bits(small), small, texts=texts)
    assert {name: read() for name, read in Checkpoint.open(path).texts.items()} == texts
    (path / "tokenizer.json").rename(path / "tekken.json")
    assert "tokenizer.json" not in Checkpoint.open(path).texts  # there is another one
    (path / "tekken.json").unlink()
    found = {name: read() for name, read in Checkpoint.open(path).texts.items()}
    assert sorted(found) == sorted(texts)
    assert ids(found["tokenizer.json"]) == ids(texts["tokenizer.json"])
    assert found["tokenizer_config.json"] == texts["tokenizer_config.json"]


@pytest.mark.filterwarnings("ignore:gguf. llama.cpp ignores sliding_window")
def test_a_tokenizer_in_a_gguf_file_is_read(tmp_path):
    path = tmp_path / "gguf"
    convert(EMBEDDED, path, to="gguf")
    for name in ("tokenizer.json", "tokenizer_config.json"):
        (path / name).unlink()
    text = "Emma was not </s> rich"
    expected = MistralTokenizer.from_pretrained(EMBEDDED).encode(text)
    for place in (path, path / "model.gguf"):
        tokenizer = MistralTokenizer.from_pretrained(place)
        assert tokenizer.encode(text) == expected
        assert tokenizer.decode(expected, skip_special_tokens=True) == text
