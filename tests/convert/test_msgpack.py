"""flax_model.msgpack: the bytes are Flax' own, and what is no such file is said to be none."""

import json

import ml_dtypes
import msgpack
import numpy as np
import pytest
from samples import CONFIGS, any_bits, assert_same, read, write

from mistral_core import TINY, errors
from mistral_core.weights import formats
from mistral_core.weights.containers.msgpack import file as msgpack_file
from mistral_core.weights.containers.msgpack import writing as msgpack_writing
from mistral_core.weights.containers.msgpack.file import MsgpackFile

FILE = "flax_model.msgpack"


@pytest.fixture
def flax():
    return pytest.importorskip("flax.serialization")


def leaf(array, **changes):
    shape, dtype, data = (
        changes.get("shape", array.shape),
        changes.get("dtype", array.dtype.name),
        changes.get("data", array.tobytes()),
    )
    return msgpack.ExtType(changes.get("code", 1), msgpack.packb((shape, dtype, data), use_bin_type=True))


ONE = np.arange(3, dtype=np.float32)


def opened(tmp_path, data):
    (tmp_path / FILE).write_bytes(data if isinstance(data, bytes) else msgpack.packb(data))
    return MsgpackFile(tmp_path / FILE)


@pytest.mark.parametrize("dtype", ["bfloat16", "float16", "float32", "float64"])
def test_the_bytes_are_those_of_flax(tmp_path, flax, dtype):
    raw = (write(tmp_path / "a", "flax-msgpack", any_bits(dtype=dtype)) / FILE).read_bytes()
    tree = flax.msgpack_restore(raw)
    assert flax.msgpack_serialize(tree) == raw
    assert tree["model"]["layers"]["0"]["mlp"]["up_proj"]["kernel"].shape == (TINY.hidden_size, TINY.intermediate_size)


def test_large_arrays_are_chunked_as_flax_does(tmp_path, flax, monkeypatch):
    monkeypatch.setattr(msgpack_writing, "CHUNK_BYTES", 1000)
    monkeypatch.setattr(flax, "MAX_CHUNK_SIZE", 1000)
    arrays = any_bits()
    raw = (write(tmp_path / "a", "flax-msgpack", arrays) / FILE).read_bytes()
    assert flax.msgpack_serialize(flax.msgpack_restore(raw)) == raw
    assert_same(read(tmp_path / "a"), arrays)
    file = MsgpackFile(tmp_path / "a" / FILE)
    assert len(file.tensors["model/embed_tokens/embedding"].extents) > 5


def test_what_flax_writes_is_read_bit_for_bit(tmp_path, flax):
    tree = {"a": {"b": any_bits()["lm_head.weight"]}, "c": np.float32([[1, 2]]), "empty": np.zeros((0,), np.float32)}
    file = opened(tmp_path, flax.msgpack_serialize(tree))
    assert set(file.tensors) == {"a/b", "c", "empty"}
    assert file.read("a/b").tobytes() == tree["a"]["b"].tobytes()
    assert file.read("a/b").dtype == ml_dtypes.bfloat16


def test_shards_hold_parts_of_the_tree_and_the_index_joins_paths(tmp_path, flax):
    path = write(tmp_path / "a", "flax-msgpack", any_bits(), limit=20_000)
    index = json.loads((path / f"{FILE}.index.json").read_text())
    assert len(set(index["weight_map"].values())) > 3
    for name, shard in index["weight_map"].items():
        node = flax.msgpack_restore((path / shard).read_bytes())
        for part in name.split("/"):
            node = node[part]
        assert isinstance(node, np.ndarray)
    assert_same(read(path), any_bits())


def test_bare_model_lacks_the_model_level(tmp_path):
    arrays = any_bits(architecture="MistralModel")
    path = write(tmp_path / "a", "flax-msgpack", arrays, architecture="MistralModel")
    assert "embed_tokens/embedding" in MsgpackFile(path / FILE).tensors
    assert_same(read(path), arrays)


@pytest.mark.parametrize("name", CONFIGS)
def test_every_config(tmp_path, name):
    path = write(tmp_path / "a", "flax-msgpack", any_bits(CONFIGS[name]), CONFIGS[name])
    assert formats.detect(path) == ["flax-msgpack"]
    assert_same(read(path), any_bits(CONFIGS[name]))


CHUNKED = {
    "__msgpack_chunked_array__": True,
    "shape": {"0": 3},
    "chunks": {"0": leaf(ONE[:2]), "1": leaf(ONE[2:])},
}


def test_60_chunks_are_one_array(tmp_path):
    assert opened(tmp_path, {"a": CHUNKED}).read("a").tolist() == [0, 1, 2]


@pytest.mark.parametrize(
    ("data", "error", "match"),
    [
        (b"", errors.TruncatedFileError, "must have 1 bytes, got 0"),
        (msgpack.packb({"a": leaf(ONE)})[:-1], errors.TruncatedFileError, "copy or download"),
        (msgpack.packb({"a": leaf(ONE)}) + b"\0", errors.CorruptCheckpointError, "1 bytes after the tree"),
        (b"\x82" + (msgpack.packb("a") + msgpack.packb(leaf(ONE))) * 2, errors.CorruptCheckpointError, "'a' twice"),
        ([leaf(ONE)], errors.CorruptCheckpointError, "must be a map, got array"),
        ({1: leaf(ONE)}, errors.CorruptCheckpointError, "does not write"),
        ({"a": 1}, errors.CorruptCheckpointError, "does not write"),
        ({"a": leaf(ONE, shape=(-1,))}, errors.CorruptCheckpointError, "a size must be 0 or more"),
        ({"a": leaf(ONE, shape=(4,))}, errors.CorruptCheckpointError, r"must be float32 \[4\]"),
        ({"a": leaf(ONE, shape=(2**60,))}, errors.LimitExceededError, "the shape"),
        ({"a": leaf(ONE, shape=(1,) * 5)}, errors.CorruptCheckpointError, "at most 4 sizes"),
        ({"a": leaf(ONE, dtype="object")}, errors.DtypeMismatchError, "'object'"),
        ({"a": leaf(ONE, dtype="int32")}, errors.DtypeMismatchError, "'int32'"),
        ({"a": leaf(ONE, data=b"12")}, errors.CorruptCheckpointError, "bin of 2 bytes"),
        ({"a": leaf(ONE, code=2)}, errors.CorruptCheckpointError, "an extension must be .* got 2"),
        ({"a": {**CHUNKED, "shape": {"0": 4}}}, errors.CorruptCheckpointError, "its shape is"),
        (
            {"a": {**CHUNKED, "chunks": {"0": leaf(ONE), "2": leaf(ONE)}}},
            errors.CorruptCheckpointError,
            "the key in 'a' must be 1, got '2'",
        ),
        ({"a": {**CHUNKED, "chunks": {}}}, errors.CorruptCheckpointError, "not one array"),
        ({"a": {**CHUNKED, "__msgpack_chunked_array__": 1}}, errors.CorruptCheckpointError, "does not write"),
        (b"\xdf\xff\xff\xff\xff", errors.TruncatedFileError, "must have"),
        (b"\x81\xdb\xff\xff\xff\xff", errors.CorruptCheckpointError, "a name of at most 256"),
        (b"\x81\xa1a" * 40 + b"\x80", errors.LimitExceededError, "deeper than 16"),
        (b"version https://git-lfs.github.com", errors.CorruptCheckpointError, "git lfs pull"),
        (b"<html>", errors.CorruptCheckpointError, "does not write|must be a map"),
    ],
)
def test_60_malformed_files(tmp_path, data, error, match):
    with pytest.raises(error, match=match):
        opened(tmp_path, data)


def test_60_many_tensors(tmp_path, monkeypatch):
    monkeypatch.setattr(msgpack_file, "MAX_TENSORS", 3)
    with pytest.raises(errors.LimitExceededError, match="more than 3 tensors"):
        opened(tmp_path, {str(i): leaf(ONE) for i in range(4)})
