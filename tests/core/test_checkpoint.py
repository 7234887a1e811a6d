"""Checkpoints: hostile headers and indexes, exact bits, matching to a class, saving, the manifest."""

import json
import os
import subprocess
import sys
import tracemalloc
import warnings
from pathlib import Path

import ml_dtypes
import numpy as np
import pytest
import safetensors.numpy
from hypothesis import given, settings
from hypothesis import strategies as st

from mistral_core import TINY, errors
from mistral_core.parameters import BASE_PREFIX, HEADS, initial_value, parameters
from mistral_core.weights import manifest, safetensors_file, shards
from mistral_core.weights.checkpoint import Checkpoint, cast, load, save
from mistral_core.weights.safetensors_file import DTYPES, SafetensorsFile

BF16 = np.dtype(ml_dtypes.bfloat16)
CAUSAL, SEQUENCE, TOKEN = (
    "MistralForCausalLM",
    "MistralForSequenceClassification",
    "MistralForTokenClassification",
)
EMBEDDING, HEAD = "model.embed_tokens.weight", "lm_head.weight"
TIED = TINY.replace(tie_word_embeddings=True)


def weights(architecture=CAUSAL, config=TINY, dtype=BF16) -> dict[str, np.ndarray]:
    return {name: initial_value(name, row, config).astype(dtype) for name, row in parameters(config, architecture)}


def bits(array: np.ndarray) -> bytes:
    return np.ascontiguousarray(array).tobytes()


def assert_same(found, expected) -> None:
    found = dict(found)
    assert list(found) == list(expected)
    for name, array in expected.items():
        assert (found[name].dtype, found[name].shape) == (array.dtype, array.shape), name
        assert bits(found[name]) == bits(array), name


def foreign(directory: Path, tensors, config=TINY, **changes) -> Path:
    """A checkpoint as others write it: with the safetensors library and without a manifest."""
    directory.mkdir(exist_ok=True)
    safetensors.numpy.save_file(dict(tensors), directory / "model.safetensors", metadata={"format": "pt"})
    config.replace(**changes).save_pretrained(directory)
    return directory


def raw(path: Path, header: object, data: bytes = b"", length: int | None = None) -> Path:
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    path.write_bytes((len(text) if length is None else length).to_bytes(8, "little") + text + data)
    return path


def entry(start=0, end=8, dtype="F32", shape=(2,)) -> dict:
    return {"dtype": dtype, "shape": list(shape), "data_offsets": [start, end]}


# Headers

CORRUPT, LIMIT, DTYPE = errors.CorruptCheckpointError, errors.LimitExceededError, errors.DtypeMismatchError

HEADERS = {
    "leading space": (b' {"a":1}', b"", CORRUPT, "begins"),
    "list": (b"[]", b"", CORRUPT, "begins"),
    "empty": (b"", b"", CORRUPT, "begins"),
    "not UTF-8": (b'{"\xff":1}', b"", CORRUPT, "UTF-8"),
    "trailing NUL": (b"{}\0", b"", CORRUPT, "JSON"),
    "5000 digits": (b'{"a":' + b"9" * 5000 + b"}", b"", CORRUPT, "JSON"),
    "deep": (b'{"a":' + b"[" * 100_000 + b"}", b"", CORRUPT, "JSON"),
    "twice": (b'{"a":{},"b":{},"a":{}}', b"", CORRUPT, "'a' twice"),
    "million": (b"{" + b'"a":0,' * 300_000 + b"}", b"", LIMIT, "20000"),
    "20001": ({f"t{i}": entry(0, 0, shape=[0]) for i in range(20_001)}, b"", LIMIT, "20001"),
    "no object": ({"a": 7}, b"", CORRUPT, "'a'"),
    "extra key": ({"a": {**entry(), "code": "x"}}, bytes(8), CORRUPT, "exactly"),
    "dtype list": ({"a": entry(dtype=["F32"])}, bytes(8), DTYPE, "'a'"),
    "dtype F99": ({"a": entry(dtype="F99")}, bytes(8), DTYPE, "F99.*F64, F32, BF16, F16"),
    "float offset": ({"a": entry(0.0, 8)}, bytes(8), CORRUPT, "integers"),
    "bool shape": ({"a": entry(0, 4, shape=[True])}, bytes(8), CORRUPT, "integers"),
    "NaN": (b'{"a":{"dtype":"F32","shape":[NaN],"data_offsets":[0,8]}}', b"", CORRUPT, "a"),
    "negative": ({"a": entry(-8, 0)}, bytes(8), CORRUPT, "integers"),
    "reversed": ({"a": entry(8, 0)}, bytes(8), CORRUPT, "takes 8"),
    "wrong size": ({"a": entry(0, 12)}, bytes(12), CORRUPT, "takes 8"),
    "overlap": ({"a": entry(), "b": entry(4, 12)}, bytes(12), CORRUPT, "'b' overlaps 'a'"),
    "same bytes": ({"a": entry(), "b": entry()}, bytes(8), CORRUPT, "overlaps"),
    "hole": ({"a": entry(), "b": entry(12, 20)}, bytes(20), CORRUPT, "'b' leaves a hole"),
    "late start": ({"a": entry(4, 12)}, bytes(12), CORRUPT, "hole after the header"),
    "out of file": ({"a": entry()}, bytes(7), errors.TruncatedFileError, "expected"),
    "beyond 2^63": ({"a": entry(2**64, 2**64 + 8)}, bytes(8), CORRUPT, "hole"),
    "rest": ({"a": entry()}, bytes(9), CORRUPT, "1 bytes belong to no tensor"),
    "overflow": ({"a": entry(shape=[2**32, 2**32])}, bytes(8), LIMIT, "2\\^60"),
    "hidden overflow": ({"a": entry(0, 0, shape=[0, 2**62])}, b"", LIMIT, "2\\^60"),
    "rank": ({"a": entry(0, 4, shape=[1] * 5)}, bytes(4), LIMIT, "rank 4"),
    "metadata": ({"__metadata__": {"a": 1}}, b"", CORRUPT, "strings"),
}  # fmt: skip


@pytest.mark.parametrize("case", HEADERS)
def test_bad_headers(tmp_path, case):
    header, data, error, message = HEADERS[case]
    with pytest.raises(error, match=message) as caught:
        SafetensorsFile(raw(tmp_path / "f.safetensors", header, data))
    assert "f.safetensors" in str(caught.value)


@pytest.mark.parametrize("length", [2**63, 2**64 - 1, 100_000_001, 25_000_001])
def test_header_length_bombs(tmp_path, length):
    with pytest.raises(errors.LimitExceededError):
        SafetensorsFile(raw(tmp_path / "f", {"a": entry()}, bytes(8), length))


def test_largest_header_is_not_allocated_before_its_length_is_compared_with_the_file(tmp_path):
    tracemalloc.start()
    with pytest.raises(errors.TruncatedFileError):
        SafetensorsFile(raw(tmp_path / "f", b"{}", length=25_000_000))
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 1 << 20


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"version https://git-lfs.github.com/spec/v1\noid sha256:00\nsize 1\n", "git lfs pull"),
        (b"<!DOCTYPE html><html>\x1b[31mnot found</html>", r"text.*<!DOCTYPE html><html>\\x1b"),
        (b'{"error":"Repository not found"}', "text"),
    ],
)
def test_other_things_saved_as_weights(tmp_path, content, message):
    (tmp_path / "f").write_bytes(content)
    with pytest.raises(errors.CorruptCheckpointError, match=message):
        SafetensorsFile(tmp_path / "f")


def test_every_truncation_of_a_file_is_noticed(tmp_path):
    whole = raw(tmp_path / "f", {"a": entry()}, bytes(8)).read_bytes()
    for length in range(len(whole)):
        (tmp_path / "f").write_bytes(whole[:length])
        with pytest.raises(errors.TruncatedFileError):
            SafetensorsFile(tmp_path / "f")
    (tmp_path / "f").write_bytes(b"\xff" * 7)
    with pytest.raises(errors.TruncatedFileError):
        SafetensorsFile(tmp_path / "f")


def test_every_flipped_header_byte_is_harmless_or_a_typed_error(tmp_path):
    whole = raw(tmp_path / "f", {"__metadata__": {"format": "pt"}, "a": entry(), "b": entry(8, 16)}, bytes(16))
    original = whole.read_bytes()
    for position in range(len(original) - 16):
        for flip in (1, 8, 128):
            changed = bytearray(original)
            changed[position] ^= flip
            whole.write_bytes(changed)
            try:
                file = SafetensorsFile(whole)
            except errors.CheckpointError:
                continue
            assert len(file.tensors) == 2


def test_names_in_messages_are_escaped_and_short(tmp_path):
    name = "\x1b[31m\u202e../" + "x" * 100_000
    with pytest.raises(errors.CorruptCheckpointError) as caught:
        SafetensorsFile(raw(tmp_path / "f", {name: 7}))
    assert str(caught.value).isascii()
    assert str(caught.value).isprintable()
    assert len(str(caught.value)) < 600


def test_paths_that_are_not_files(tmp_path):
    os.mkfifo(tmp_path / "fifo")
    os.symlink("loop", tmp_path / "loop")
    os.symlink("/dev/zero", tmp_path / "zero")
    (tmp_path / "file").write_bytes(b"")
    for name in ("fifo", "zero", "."):
        with pytest.raises(errors.UnsafeFileError):
            SafetensorsFile(tmp_path / name)
    with pytest.raises(errors.CheckpointNotFoundError):
        SafetensorsFile(tmp_path / "absent")
    for name in ("loop", "file/below"):
        with pytest.raises(errors.CheckpointError) as caught:
            SafetensorsFile(tmp_path / name)
        assert caught.value.errno


def test_symlink_to_a_file_is_read_as_in_the_hub_cache(tmp_path):
    raw(tmp_path / "blob", {"a": entry()}, bytes(8))
    os.symlink("blob", tmp_path / "f")
    assert SafetensorsFile(tmp_path / "f").read("a").tolist() == [0, 0]


# Reading


@pytest.mark.parametrize("dtype", DTYPES.values(), ids=str)
def test_bits_are_read_exactly(tmp_path, dtype):
    every = np.arange(65536, dtype=np.uint16)  # all values of 16 bits: NaN payloads, -0, denormals
    expected = np.resize(every, 65536 * dtype.itemsize // 2).view(dtype).reshape(256, 256)
    safetensors.numpy.save_file({"a": expected, "b": expected[:3, :5].copy()}, tmp_path / "f")
    file = SafetensorsFile(tmp_path / "f")
    for name, array in (("a", expected), ("b", expected[:3, :5])):
        assert (file.read(name).dtype, file.read(name).shape) == (dtype, array.shape)
        assert bits(file.read(name)) == bits(array)
    assert file.read("a").flags.writeable


@pytest.mark.parametrize("dtype", ["I8", "U8", "BOOL", "I64", "F8_E4M3", "F8_E5M2"])
def test_other_dtypes_are_known_but_refused_as_weights(tmp_path, dtype):
    size = 8 if dtype == "I64" else 1
    file = SafetensorsFile(raw(tmp_path / "f", {"a": entry(0, size, dtype, [1])}, bytes(size)))
    with pytest.raises(errors.DtypeMismatchError, match=dtype):
        file.read("a")


def test_short_reads_are_continued(tmp_path, monkeypatch):
    read = os.preadv
    monkeypatch.setattr(os, "preadv", lambda fd, views, offset: read(fd, [views[0][:3]], offset))
    file = SafetensorsFile(raw(tmp_path / "f", {"a": entry()}, np.arange(2, dtype="<f4").tobytes()))
    assert file.read("a").tolist() == [0, 1]


@pytest.mark.parametrize("change", ["truncated", "rewritten", "replaced"])
def test_a_file_that_changes_is_noticed(tmp_path, change):
    path = raw(tmp_path / "f", {"a": entry()}, bytes(8))
    file = SafetensorsFile(path)
    content = path.read_bytes()
    if change == "truncated":
        os.truncate(path, len(content) - 4)
    elif change == "rewritten":
        path.write_bytes(content)
        os.utime(path, ns=(1, 1))
    else:
        (tmp_path / "g").write_bytes(content)
        status = path.stat()
        os.utime(tmp_path / "g", ns=(status.st_atime_ns, status.st_mtime_ns))
        os.replace(tmp_path / "g", path)
    with pytest.raises(errors.CorruptCheckpointError, match="changed"):
        file.read("a")


# Directories and indexes


@pytest.fixture
def sharded(tmp_path) -> Path:
    save(tmp_path / "sharded", TINY, weights().items(), max_shard_size=20_000)
    (tmp_path / "sharded" / manifest.NAME).unlink()
    return tmp_path / "sharded"


def edit(directory: Path, change) -> None:
    path = directory / shards.INDEX
    index = json.loads(path.read_text())
    path.write_text(json.dumps(change(index) or index))


def test_directory_index_and_single_file_open_alike(tmp_path, sharded):
    single = foreign(tmp_path / "single", weights())
    for path in (sharded, sharded / shards.INDEX, single, single / shards.SINGLE, bytes(single), str(single)):
        checkpoint = Checkpoint.open(path)
        assert set(checkpoint.tensors) == set(weights())
        assert checkpoint.metadata == {"format": "pt"}
        assert bits(checkpoint.read(EMBEDDING)) == bits(weights()[EMBEDDING])


def test_raw_weights_and_adapters_beside_the_model_are_ignored(tmp_path):
    directory = foreign(tmp_path / "a", weights())
    for name in ("consolidated.safetensors", "adapter_model.safetensors"):
        (directory / name).write_bytes(b"not even safetensors")
    assert_same(load(directory)[1], weights())


@pytest.mark.parametrize(
    ("name", "what"),
    [
        ("consolidated.safetensors", "raw Mistral"),
        ("consolidated.00.pth", "raw Mistral"),
        ("pytorch_model.bin", "pickle"),
        ("tf_model.h5", "TensorFlow"),
        ("flax_model.msgpack", "Flax"),
        ("m.gguf", "GGUF"),
    ],
)
def test_foreign_formats_are_named(tmp_path, name, what):
    (tmp_path / name).write_bytes(b"")
    with pytest.raises(errors.UnsupportedFeatureError, match=f"{name}.*{what}.*only Hugging Face safetensors"):
        Checkpoint.open(tmp_path)


def test_nothing_there(tmp_path):
    for path in (tmp_path, tmp_path / "absent"):
        with pytest.raises(errors.CheckpointNotFoundError):
            Checkpoint.open(path)


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        (lambda i: [1], errors.CheckpointIndexError, "object"),
        (lambda i: {"metadata": {}}, errors.CheckpointIndexError, "weight_map"),
        (lambda i: {"weight_map": {}}, errors.CheckpointIndexError, "weight_map"),
        (lambda i: i["weight_map"].update(x=7), errors.CheckpointIndexError, "'x'.*int"),
        (lambda i: i["weight_map"].update(x="../f.safetensors"), errors.UnsafeFileError, "bare"),
        (lambda i: i["weight_map"].update(x="..\\f.safetensors"), errors.UnsafeFileError, "bare"),
        (lambda i: i["weight_map"].update(x="/etc/passwd"), errors.UnsafeFileError, "bare"),
        (lambda i: i["weight_map"].update(x="C:f.safetensors"), errors.UnsafeFileError, "bare"),
        (lambda i: i["weight_map"].update(x="f.bin"), errors.UnsafeFileError, "not safetensors"),
        (
            lambda i: i["weight_map"].update(x="b.safetensors", y="a.safetensors"),
            errors.ShardMissingError,
            "'a.safetensors', 'b.safetensors'",
        ),
        (
            lambda i: i["weight_map"].pop(EMBEDDING) and None,
            errors.CheckpointIndexError,
            f"disagree on '{EMBEDDING}'",
        ),
        (
            lambda i: i["weight_map"].update(x=i["weight_map"][EMBEDDING]),
            errors.CheckpointIndexError,
            "disagree on 'x'",
        ),
        (
            lambda i: i["weight_map"].update({f"t{n}": f"{n}.safetensors" for n in range(1001)}),
            errors.LimitExceededError,
            "1000",
        ),
    ],
)
def test_bad_indexes(sharded, change, error, message):
    edit(sharded, change)
    with pytest.raises(error, match=message):
        Checkpoint.open(sharded)


def test_index_too_large(sharded):
    (sharded / shards.INDEX).write_bytes(b" " * (shards.MAX_INDEX_BYTES + 1))
    with pytest.raises(errors.LimitExceededError):
        Checkpoint.open(sharded)


def test_wrong_total_size_is_a_warning_and_missing_metadata_nothing(sharded):
    edit(sharded, lambda i: i["metadata"].update(total_size=1))
    with pytest.warns(UserWarning, match="total_size is 1"):
        Checkpoint.open(sharded)
    edit(sharded, lambda i: i.pop("metadata") and None)
    Checkpoint.open(sharded)


def test_single_file_beside_an_index(tmp_path, sharded):
    foreign(sharded, weights())
    assert Checkpoint.open(sharded).tensors[EMBEDDING].file.name == shards.SINGLE
    foreign(sharded, weights(SEQUENCE))
    with pytest.raises(errors.CheckpointIndexError, match="stale"):
        Checkpoint.open(sharded)


# Matching


@pytest.mark.parametrize("architecture", HEADS)
def test_each_class_loads_what_it_saved(tmp_path, architecture):
    expected = weights(architecture)
    save(tmp_path / "a", TINY, expected.items(), architecture=architecture)
    config, stream = load(tmp_path / "a", architecture, verify="full")
    assert (config.architectures, config.dtype) == ((architecture,), "bfloat16")
    assert_same(stream, expected)


def test_stream_is_in_table_order_whatever_the_file_order_and_config_may_be_given(tmp_path):
    directory = foreign(tmp_path / "a", reversed(weights().items()))
    (directory / "config.json").unlink()
    assert_same(load(directory, config=TINY)[1], weights())


def test_bare_model_names_and_rotary_buffers(tmp_path):
    tensors = {n.removeprefix(BASE_PREFIX): a for n, a in weights("MistralModel").items()}
    tensors["layers.0.self_attn.rotary_emb.inv_freq"] = np.ones(3, np.float32)
    directory = foreign(tmp_path / "a", tensors)
    assert_same(load(directory, "MistralModel")[1], weights("MistralModel"))


def mismatch(directory, architecture=CAUSAL, **arguments):
    with pytest.raises(errors.TensorMismatchError) as caught:
        load(directory, architecture, **arguments)
    return type(caught.value), str(caught.value)


def test_missing_are_all_listed(tmp_path):
    tensors = weights()
    for name in ("model.norm.weight", "model.layers.1.mlp.up_proj.weight"):
        del tensors[name]
    kind, text = mismatch(foreign(tmp_path / "a", tensors))
    assert kind is errors.MissingTensorsError
    assert "2 missing: model.layers.1.mlp.up_proj.weight, model.norm.weight" in text


def test_unexpected_are_all_listed_and_escaped(tmp_path):
    tensors = {**weights(), "z\x1b": np.ones(1, BF16), "model.y": np.ones(1, BF16)}
    kind, text = mismatch(foreign(tmp_path / "a", tensors))
    assert kind is errors.UnexpectedTensorsError
    assert "2 unexpected: 'model.y', 'z\\x1b'" in text


def test_misshapen_are_all_listed(tmp_path):
    name = "model.layers.0.self_attn.o_proj.weight"
    tensors = {**weights(), name: weights()[name].T.copy(), "model.norm.weight": np.ones(1, BF16)}
    kind, text = mismatch(foreign(tmp_path / "a", tensors))
    assert kind is errors.ShapeMismatchError
    assert "2 of another shape" in text
    assert f"{name} is {list(tensors[name].shape)}, the config says {list(weights()[name].shape)}" in text


def test_integers_are_no_weights_even_with_a_cast(tmp_path):
    name = "model.layers.0.mlp.up_proj.weight"
    directory = foreign(tmp_path / "a", {**weights(), name: np.ones(weights()[name].shape, np.int8)})
    kind, text = mismatch(directory, dtype="float32")
    assert kind is errors.DtypeMismatchError
    assert f"{name} is I8" in text


def test_several_kinds_come_as_one_error(tmp_path):
    tensors = {**weights(), "model.norm.weight": np.ones(1, BF16), "x": np.ones(1, BF16)}
    del tensors[EMBEDDING]
    kind, text = mismatch(foreign(tmp_path / "a", tensors))
    assert kind is errors.TensorMismatchError
    assert all(part in text for part in ("1 missing", "1 unexpected", "1 of another shape"))


@pytest.mark.parametrize(
    ("rename", "hint"),
    [
        (lambda n: "language_model." + n, "carry the prefix 'language_model.'"),
        (lambda n: n.replace("embed_tokens", "embed_token"), "'model.embed_token.weight' meant"),
        (lambda n: n.replace("model.embed_tokens", "tok_embeddings"), "raw Mistral"),
        (lambda n: n if "embed" not in n else n.removeprefix("model."), "lack the prefix 'model.'"),
    ],
)
def test_near_misses_are_explained(tmp_path, rename, hint):
    directory = foreign(tmp_path / "a", {rename(n): a for n, a in weights().items()})
    assert hint in mismatch(directory)[1]


def test_tied_head_is_not_needed_or_must_be_the_embedding(tmp_path):
    tensors = weights(config=TIED)
    assert HEAD not in tensors
    assert_same(load(foreign(tmp_path / "a", tensors, TIED))[1], tensors)
    same = {**tensors, HEAD: tensors[EMBEDDING]}
    assert_same(load(foreign(tmp_path / "b", same, TIED))[1], tensors)
    other = tensors[EMBEDDING].copy()
    other[-1, -1] = -other[-1, -1]
    kind, text = mismatch(foreign(tmp_path / "c", {**tensors, HEAD: other}, TIED))
    assert kind is errors.TensorMismatchError
    assert "tie_word_embeddings" in text


def test_untied_language_model_without_its_head_is_an_error(tmp_path):
    tensors = weights("MistralModel")
    kind, text = mismatch(foreign(tmp_path / "a", tensors, architectures=(CAUSAL,)))
    assert (kind, "1 missing: lm_head.weight" in text) == (errors.MissingTensorsError, True)


@pytest.mark.parametrize("named", [True, False])
def test_classifier_from_a_language_model_gets_a_seeded_head_with_one_warning(tmp_path, recwarn, named):
    directory = foreign(tmp_path / "a", weights(), architectures=(CAUSAL,) if named else None)
    stream = dict(load(directory, TOKEN, seed=3)[1])
    texts = [str(w.message) for w in recwarn]
    assert len([t for t in texts if "score.bias, score.weight of" in t and "initialised" in t]) == 1
    assert len([t for t in texts if "lm_head.weight is not used" in t]) == len(texts) - 1 == 1
    assert all(w.filename == __file__ for w in recwarn)
    row = dict(parameters(TINY, TOKEN))["score.weight"]
    assert bits(stream["score.weight"]) == bits(initial_value("score.weight", row, TINY, seed=3).astype(BF16))
    assert_same(((n, a) for n, a in stream.items() if not n.startswith("score")), weights("MistralModel"))


def test_head_is_never_initialised_for_the_file_s_own_class_nor_in_part(tmp_path):
    directory = foreign(tmp_path / "a", weights("MistralModel"), architectures=(SEQUENCE,))
    assert mismatch(directory, SEQUENCE)[0] is errors.MissingTensorsError
    directory = foreign(tmp_path / "b", weights(SEQUENCE))
    assert "1 missing: score.bias" in mismatch(directory, TOKEN)[1]


@pytest.mark.parametrize(
    ("own", "asked"),
    [(SEQUENCE, "MistralModel"), (TOKEN, SEQUENCE), ("MistralForQuestionAnswering", "MistralModel")],
)
def test_foreign_heads_are_refused_and_the_right_class_named(tmp_path, own, asked):
    kind, text = mismatch(foreign(tmp_path / "a", weights(own)), asked)
    assert kind is errors.UnexpectedTensorsError
    assert f"holds a {own}: load it with that class" in text


def test_unused_language_head_is_dropped_with_one_warning(tmp_path):
    directory = foreign(tmp_path / "a", weights())
    with pytest.warns(UserWarning, match="lm_head.weight is not used by MistralModel") as caught:
        stream = load(directory, "MistralModel")[1]
    assert len(caught) == 1
    assert_same(stream, weights("MistralModel"))


def test_unknown_class_and_dtype(tmp_path):
    with pytest.raises(errors.UnsupportedFeatureError, match="MistralForCausalLM"):
        load(tmp_path, "LlamaForCausalLM")
    with pytest.raises(errors.DtypeMismatchError, match="bfloat16"):
        load(tmp_path, dtype="int8")


def test_config_of_another_size_is_a_shape_mismatch_before_anything_is_read(tmp_path, monkeypatch):
    directory = foreign(tmp_path / "a", weights())
    monkeypatch.setattr(SafetensorsFile, "read", None)
    with pytest.raises(errors.TensorMismatchError):
        load(directory, config=TINY.replace(num_hidden_layers=TINY.num_hidden_layers + 1))


# Values


def test_casts(tmp_path):
    every = np.arange(65536, dtype=np.uint16)
    wide = cast(every.view(BF16), np.dtype("f4"), "x")
    assert bits(wide) == bits(every.astype(np.uint32) << 16)  # NaN payloads too
    ties = np.array([0x3F808000, 0x3F818000, 0x3F808001, 0x80000001], np.uint32).view(np.float32)
    assert cast(ties, BF16, "x").view(np.uint16).tolist() == [0x3F80, 0x3F82, 0x3F81, 0x8000]
    array = np.ones(3, BF16)
    assert cast(array, BF16, "x") is array


@pytest.mark.parametrize(("source", "target"), [(BF16, "f2"), (np.dtype("f4"), "f2"), (np.dtype("f8"), BF16)])
def test_cast_that_would_make_infinity_is_refused(source, target):
    target = np.dtype(target)
    assert np.isinf(cast(np.array([np.inf, 1], source), target, "x")[0])
    noise = np.arange(65536, dtype=np.uint16).view(BF16)[::64]  # signalling NaN among them
    with pytest.raises(errors.LossyConversionError, match="values are beyond float16"):
        cast(noise, np.dtype("f2"), "noise")
    with pytest.raises(errors.LossyConversionError, match="x: 2 values"):
        cast(
            np.array([1e38 if target != BF16 else 1e300, -1e38 if target != BF16 else -1e300, 1], source),
            target,
            "x",
        )


@pytest.mark.parametrize("dtype", ["bfloat16", "float16", "float32", "float64"])
def test_load_casts_everything(tmp_path, dtype):
    directory = foreign(tmp_path / "a", weights(dtype=np.float32))
    assert {array.dtype.name for _, array in load(directory, dtype=dtype)[1]} == {dtype}


def test_mixed_dtypes_come_as_stored(tmp_path):
    tensors = {**weights(), "model.norm.weight": weights(dtype=np.float32)["model.norm.weight"]}
    assert_same(load(foreign(tmp_path / "a", tensors))[1], tensors)


def test_check_finite_lists_all_tensors_and_places(tmp_path):
    tensors = weights()
    tensors["model.norm.weight"].view(np.uint16)[2] = 0x7F81  # a signalling NaN
    tensors[HEAD][1, 3] = np.inf
    directory = foreign(tmp_path / "a", tensors)
    assert_same(load(directory)[1], tensors)
    with pytest.raises(errors.NonFiniteWeightsError) as caught:
        load(directory, check_finite=True)
    assert "'model.norm.weight' first at [2]" in str(caught.value)
    assert f"'{HEAD}' first at [1, 3]" in str(caught.value)


# Saving


def test_file_has_the_bytes_of_the_safetensors_library(tmp_path):
    tensors = {**weights(), "model.norm.weight": weights(dtype=np.float32)["model.norm.weight"]}
    tensors["model.layers.0.mlp.up_proj.weight"] = weights(dtype=np.float16)["model.layers.0.mlp.up_proj.weight"]
    dtypes = {name: array.dtype.name for name, array in tensors.items()}
    save(tmp_path / "a", TINY, tensors.items(), dtypes=dtypes)
    safetensors.numpy.save_file(tensors, tmp_path / "b", metadata={"format": "pt"})
    assert (tmp_path / "a" / shards.SINGLE).read_bytes() == (tmp_path / "b").read_bytes()


@pytest.mark.parametrize("dtype", DTYPES.values(), ids=str)
def test_shards_are_read_by_the_library_and_the_index_is_hugging_face_s(tmp_path, dtype):
    expected = weights(dtype=dtype)
    save(tmp_path / "a", TINY, expected.items(), max_shard_size="30KB")
    index = json.loads((tmp_path / "a" / shards.INDEX).read_text())
    assert (tmp_path / "a" / shards.INDEX).read_text() == json.dumps(index, indent=2, sort_keys=True) + "\n"
    assert index["metadata"] == {
        "total_parameters": sum(a.size for a in expected.values()),
        "total_size": sum(a.nbytes for a in expected.values()),
    }
    found = {}
    for name in sorted(set(index["weight_map"].values())):
        found |= safetensors.numpy.load_file(tmp_path / "a" / name)
    assert {n: bits(a) for n, a in found.items()} == {n: bits(a) for n, a in expected.items()}
    assert_same(load(tmp_path / "a")[1], expected)


@settings(max_examples=50, deadline=None)
@given(st.lists(st.integers(1, 50), min_size=1, max_size=30), st.integers(1, 80))
def test_sharding_is_that_of_huggingface_hub(sizes, limit):
    from huggingface_hub import split_state_dict_into_shards_factory

    sized = {f"t{i}": size for i, size in enumerate(sizes)}
    theirs = split_state_dict_into_shards_factory(
        sized,
        get_storage_size=lambda size: size,
        filename_pattern="model{suffix}.safetensors",
        max_shard_size=limit,
    )
    assert shards.split(sized, limit) == list(theirs.filename_to_tensors.values())


@pytest.mark.parametrize(("size", "expected"), [("5GB", 5 * 10**9), ("1.5 MB", 1_500_000), ("2GiB", 2**31), (7, 7)])
def test_shard_sizes(size, expected):
    assert shards.shard_bytes(size) == expected


@pytest.mark.parametrize("size", ["", "-1GB", "0", "x", 0, -1, "5XB", "0.1", True])
def test_bad_shard_sizes(tmp_path, size):
    with pytest.raises(errors.ConversionError, match="max_shard_size"):
        save(tmp_path / "a", TINY, weights().items(), max_shard_size=size)
    assert not (tmp_path / "a").exists()


def test_any_strides_and_any_order(tmp_path):
    expected = weights()
    strided = {
        n: np.asfortranarray(a) if i % 2 else np.repeat(a, 2, 0)[::2] for i, (n, a) in enumerate(expected.items())
    }
    assert not strided[HEAD].flags.c_contiguous
    save(tmp_path / "a", TINY, reversed(strided.items()))
    assert_same(load(tmp_path / "a")[1], expected)


def test_bare_model_has_bare_names(tmp_path):
    save(tmp_path / "a", TINY, weights("MistralModel").items(), architecture="MistralModel")
    assert "embed_tokens.weight" in safetensors.numpy.load_file(tmp_path / "a" / shards.SINGLE)


def test_tied_head_is_never_written_and_must_be_the_embedding(tmp_path):
    tensors = weights(config=TIED)
    save(tmp_path / "a", TIED, [(HEAD, tensors[EMBEDDING]), *tensors.items()])
    assert HEAD not in Checkpoint.open(tmp_path / "a").tensors
    with pytest.raises(errors.TensorMismatchError, match="tie_word_embeddings"):
        save(tmp_path / "a", TIED, [(HEAD, -tensors[EMBEDDING]), *tensors.items()])


def without(name):
    return [item for item in weights().items() if item[0] != name]


@pytest.mark.parametrize(
    ("tensors", "error", "message"),
    [
        ([], errors.MissingTensorsError, "single"),
        (without("model.norm.weight"), errors.MissingTensorsError, "model.norm.weight never came"),
        ([*weights().items(), ("x", np.ones(1, BF16))], errors.UnexpectedTensorsError, "'x'"),
        ([*weights().items(), (HEAD, weights()[HEAD])], errors.TensorMismatchError, "twice"),
        ([*without(HEAD), (HEAD, weights()[HEAD].T)], errors.ShapeMismatchError, HEAD),
        ([*without(HEAD), (HEAD, weights(dtype=np.float32)[HEAD])], errors.DtypeMismatchError, HEAD),
        ([(n, a.astype(">f4")) for n, a in weights().items()], errors.DtypeMismatchError, ">f4"),
        ([(n, a.astype(np.int8)) for n, a in weights().items()], errors.DtypeMismatchError, "int8"),
    ],
)
def test_wrong_tensors_leave_the_old_checkpoint(tmp_path, tensors, error, message):
    save(tmp_path / "a", TINY, weights().items())
    before = (tmp_path / "a" / manifest.NAME).read_bytes()
    with pytest.raises(error, match=message):
        save(tmp_path / "a", TINY, tensors)
    assert os.listdir(tmp_path) == ["a"]
    assert (tmp_path / "a" / manifest.NAME).read_bytes() == before
    manifest.verify(tmp_path / "a", "full")


def test_failing_stream_and_existing_output(tmp_path):
    def stream():
        yield from list(weights().items())[:3]
        raise RuntimeError("no more")

    with pytest.raises(RuntimeError):
        save(tmp_path / "a", TINY, stream())
    assert os.listdir(tmp_path) == []
    save(tmp_path / "a", TINY, weights().items())
    with pytest.raises(errors.OutputExistsError):
        save(tmp_path / "a", TINY, weights().items(), overwrite=False)


def test_checkpoint_can_be_rewritten_from_itself(tmp_path):
    save(tmp_path / "a", TINY, weights().items(), max_shard_size="30KB")
    config, stream = load(tmp_path / "a", dtype="float32")
    save(tmp_path / "a", config, stream)
    assert sorted(os.listdir(tmp_path / "a")) == ["config.json", manifest.NAME, shards.SINGLE]
    assert load(tmp_path / "a")[0].dtype == "float32"


def test_other_files_go_in_and_bad_names_do_not(tmp_path):
    save(tmp_path / "a", TINY, weights().items(), other_files={"tokenizer.json": b"{}"})
    assert (tmp_path / "a" / "tokenizer.json").read_bytes() == b"{}"
    assert "tokenizer.json" in json.loads((tmp_path / "a" / manifest.NAME).read_text())["files"]
    with pytest.raises(errors.UnsafeFileError):
        save(tmp_path / "a", TINY, weights().items(), other_files={"../x": b""})
    for name in ("config.json", "model.safetensors", manifest.NAME):
        with pytest.raises(errors.ConversionError, match=name):
            save(tmp_path / "a", TINY, weights().items(), other_files={name: b""})


def test_bytes_that_the_disk_changes_are_noticed_before_the_swap(tmp_path, monkeypatch):
    write = safetensors_file.write

    def flipped(info, array):
        result = write(info, array)
        if info.name == HEAD:
            write(info, -array)
        return result

    monkeypatch.setattr(safetensors_file, "write", flipped)
    with pytest.raises(errors.CorruptCheckpointError, match=HEAD):
        save(tmp_path / "a", TINY, weights().items())
    assert os.listdir(tmp_path) == []


def test_one_tensor_at_a_time_is_in_memory(tmp_path):
    config = TINY.replace(num_hidden_layers=40)
    rows = dict(parameters(config, CAUSAL))
    largest = max(initial_value(n, r, config).nbytes for n, r in rows.items())
    total = sum(initial_value(n, r, config).nbytes for n, r in rows.items())
    tracemalloc.start()
    save(tmp_path / "a", config, ((n, initial_value(n, r, config)) for n, r in rows.items()))
    for _ in load(tmp_path / "a")[1]:
        pass
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 3 * largest + 2_000_000 < total


# The manifest


@pytest.fixture
def saved(tmp_path) -> Path:
    save(tmp_path / "a", TINY, weights().items(), max_shard_size="100KB")
    return tmp_path / "a"


def flip_last_bit(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[-1] ^= 1
    path.write_bytes(content)


def test_manifest_names_files_tensors_and_the_tool(saved):
    description = json.loads((saved / manifest.NAME).read_text())
    assert set(description["files"]) == set(os.listdir(saved)) - {manifest.NAME}
    assert set(description["tensors"]) == set(weights())
    assert description["tensors"][HEAD]["sha256"] == safetensors_file.digest(weights()[HEAD])
    assert description["tool"].startswith("mistral-frameworks ")
    assert manifest.write(saved) == description


def test_flipped_bit_is_found_and_its_tensor_named(saved):
    shard = saved / "model-00001-of-00002.safetensors"
    assert shard.exists()
    last = max(SafetensorsFile(shard).tensors.values(), key=lambda info: info.end).name
    flip_last_bit(shard)
    load(saved)
    with pytest.raises(errors.ChecksumMismatchError) as caught:
        load(saved, verify="full")
    assert shard.name in str(caught.value)
    assert f"(tensors '{last}')" in str(caught.value)


def test_sizes_are_compared_by_default_and_not_when_off(saved):
    changed = {**weights(), "model.extra": np.ones(1, BF16)}
    safetensors.numpy.save_file(changed, saved / "model-00001-of-00002.safetensors")
    with pytest.raises(errors.CheckpointIndexError):
        load(saved, verify="off")
    with pytest.raises(errors.ChecksumMismatchError):
        manifest.verify(saved, "sizes")
    os.truncate(saved / "model-00001-of-00002.safetensors", 100)
    with pytest.raises(errors.TruncatedFileError):
        manifest.verify(saved, "sizes")
    os.unlink(saved / "model-00001-of-00002.safetensors")
    with pytest.raises(errors.CheckpointNotFoundError):
        manifest.verify(saved, "sizes")
    manifest.verify(saved, "off")


def test_load_verifies_sizes_unless_told_otherwise(saved):
    description = json.loads((saved / manifest.NAME).read_text())
    description["files"]["model-00001-of-00002.safetensors"]["size"] += 1
    (saved / manifest.NAME).write_text(json.dumps(description))
    with pytest.raises(errors.TruncatedFileError):
        load(saved)
    load(saved, verify="off")


def test_config_may_be_edited_but_not_for_full(saved):
    with (saved / "config.json").open("a") as file:
        file.write("\n")
    load(saved)
    with pytest.raises(errors.ChecksumMismatchError, match="config.json"):
        load(saved, verify="full")


def test_full_demands_a_manifest_and_modes_are_known(saved):
    with pytest.raises(ValueError, match="off, sizes, full"):
        load(saved, verify="yes")
    (saved / manifest.NAME).unlink()
    load(saved)
    with pytest.raises(errors.CheckpointNotFoundError, match=manifest.NAME):
        load(saved, verify="full")


@pytest.mark.parametrize(
    "text", ["", "[]", "{}", '{"files": {"a": 1}}', '{"files": {"a": {"size": "1", "sha256": ""}}}']
)
def test_malformed_manifests(saved, text):
    (saved / manifest.NAME).write_text(text)
    with pytest.raises(errors.CorruptCheckpointError):
        load(saved)


def test_manifest_cannot_point_outside(saved):
    (saved / manifest.NAME).write_text('{"files": {"../x": {"size": 1, "sha256": ""}}}')
    with pytest.raises(errors.UnsafeFileError):
        load(saved)


def test_no_framework_is_imported():
    code = (
        "import sys, mistral_core.weights.checkpoint, mistral_core.weights.hub;"
        "print(*{'torch', 'jax', 'tensorflow', 'huggingface_hub'} & set(sys.modules))"
    )
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60, check=True)
    assert result.stdout.strip() == ""


def test_loading_is_quiet(tmp_path):
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        save(tmp_path / "a", TINY, weights().items())
        for _ in load(tmp_path / "a", dtype="float16")[1]:
            pass
