"""GGUF headers that lie: each refused with a typed error, fast and in little memory."""

import re
import struct
import tracemalloc
from pathlib import Path

import numpy as np
import pytest

from mistral_core.errors import (
    CheckpointNotFoundError,
    CorruptCheckpointError,
    DtypeMismatchError,
    LimitExceededError,
    TruncatedFileError,
    UnsafeFileError,
    UnsupportedFeatureError,
)
from mistral_core.weights.containers.gguf import file as gguf_file
from mistral_core.weights.containers.gguf.file import GgufFile
from mistral_core.weights.containers.gguf.scan import Strings

U32, F32, BOOL, STRING, ARRAY = 4, 6, 7, 8, 9


def text(value):
    data = value if isinstance(value, bytes) else value.encode()
    return struct.pack("<Q", len(data)) + data


def key(name, kind, content):
    return text(name) + struct.pack("<I", kind) + content


def tensor(name="t", shape=(4, 2), kind=0, offset=0):
    return text(name) + struct.pack(f"<I{len(shape)}QIQ", len(shape), *shape, kind, offset)


ONE = (tensor(),)


def made(path, *, keys=(), tensors=ONE, data=32, version=3, magic=b"GGUF", counts=None, alignment=32):
    """A file with the pieces of its header as they are given."""
    head = magic + struct.pack("<IQQ", version, *(counts or (len(tensors), len(keys)))) + b"".join((*keys, *tensors))
    path.write_bytes(head + bytes(-len(head) % alignment + data))
    return path


@pytest.fixture
def at(tmp_path):
    return tmp_path / "x.gguf"


def test_a_small_file_is_read(at):
    keys = (
        key("a", 0, b"\x01"),
        key("b", 3, struct.pack("<h", -2)),
        key("c", BOOL, b"\x01"),
        key("d", ARRAY, struct.pack("<IQ", STRING, 2) + text("é") + text("")),
        key("e", ARRAY, struct.pack("<IQ2f", F32, 2, 1, 2)),
        key("f", 12, struct.pack("<d", 0.1)),
        key("g", ARRAY, struct.pack("<IQ", BOOL, 1) + b"\x01"),
    )
    for version in (2, 3):
        values = GgufFile(made(at, keys=keys, version=version)).values
        assert (values["a"], values["b"], values["c"], values["f"]) == (1, -2, True, 0.1)
        assert values["d"].decoded() == ["é", ""]
        assert values["e"].tolist() == [1, 2]
        assert values["g"].tolist() == [True]
    assert GgufFile(at).tensors["t"].shape == (2, 4)


@pytest.mark.parametrize("size", [0, 1, 3, 4, 8, 23, 40, 80])
def test_25_truncated(at, size):
    at.write_bytes(made(at).read_bytes()[:size])
    with pytest.raises(TruncatedFileError, match="must have"):
        GgufFile(at)


def test_26_27_pointers_and_pages(at):
    at.write_bytes(b"version https://git-lfs.github.com/spec/v1\n")
    with pytest.raises(CorruptCheckpointError, match="git lfs pull"):
        GgufFile(at)
    at.write_bytes(b"<html>not found</html>" * 10)
    with pytest.raises(CorruptCheckpointError, match="must begin with b'GGUF', got b'<html>not"):
        GgufFile(at)


def test_49_66_what_is_no_file(tmp_path):
    with pytest.raises(UnsafeFileError):
        GgufFile(tmp_path)
    with pytest.raises(CheckpointNotFoundError):
        GgufFile(tmp_path / "none.gguf")


@pytest.mark.parametrize("version", [0, 1, 4, 99])
def test_62_other_versions(at, version):
    with pytest.raises(UnsupportedFeatureError, match=f"{at}: version {version} of GGUF; little-endian 2 and 3"):
        GgufFile(made(at, version=version))


def test_65_big_endian(at):
    with pytest.raises(UnsupportedFeatureError, match="big-endian"):
        GgufFile(made(at, version=struct.unpack("<I", struct.pack(">I", 3))[0]))


BOMBS = {
    "2^40 tensors": ({"counts": (2**40, 0)}, "1099511627776 tensors"),
    "2^40 keys": ({"counts": (0, 2**40)}, "1099511627776 keys"),
    "a string of 2^63 bytes": ({"keys": (struct.pack("<Q", 2**63),)}, "a string of 9223372036854775808"),
    "a value of 2^63 bytes": (
        {"keys": (text("a") + struct.pack("<IQ", STRING, 2**63),)},
        "a string of 9223372036854775808",
    ),
    "an array of 2^33 strings": (
        {"keys": (key("a", ARRAY, struct.pack("<IQ", STRING, 2**33)),)},
        "an array of 8589934592",
    ),
    "an array of 2^33 numbers": (
        {"keys": (key("a", ARRAY, struct.pack("<IQ", U32, 2**33)),)},
        "an array of 8589934592",
    ),
    "2^32 dimensions": ({"tensors": (text("t") + struct.pack("<I", 2**32 - 1),)}, "'t' has 4294967295 dimensions"),
    "no dimensions": ({"tensors": (text("t") + struct.pack("<IIQ", 0, 0, 0),)}, "'t' has 0 dimensions"),
    "dimensions that overflow": ({"tensors": (tensor(shape=(2**62, 2**62)),)}, "beyond 2^60"),
    "a long name": ({"tensors": (tensor("t" * 300),)}, "a string of 300 bytes"),
}


@pytest.mark.parametrize("what", BOMBS)
def test_62_bombs(at, what):
    pieces, message = BOMBS[what]
    made(at, **pieces)
    tracemalloc.start()
    with pytest.raises(LimitExceededError, match=re.escape(message)):
        GgufFile(at)
    assert tracemalloc.get_traced_memory()[1] < 4 << 20
    tracemalloc.stop()


def test_62_a_header_beyond_the_limit(at, monkeypatch):
    monkeypatch.setattr("mistral_core.weights.containers.gguf.scan.MAX_HEADER_BYTES", 1 << 19)
    keys = (key("a", ARRAY, struct.pack("<IQ", STRING, 1000) + text("x" * 1000) * 1000),)
    with pytest.raises(LimitExceededError, match="a header beyond"):
        GgufFile(made(at, keys=keys))


CORRUPT = {
    "magic": ({"magic": b"GGML"}, "must begin with b'GGUF'"),
    "an array of arrays": ({"keys": (key("a", ARRAY, struct.pack("<IQ", ARRAY, 1)),)}, "must be of numbers or strings"),
    "a type of values": ({"keys": (key("a", 13, b"\0" * 8),)}, "the type of a value must be 0 to 12, got 13"),
    "a truth value": ({"keys": (key("a", BOOL, b"\x02"),)}, "a truth value must be 0 or 1, got 2"),
    "a string in an array beyond the file": (
        {"keys": (key("a", ARRAY, struct.pack("<IQQ", STRING, 1, 2**63)),)},
        "must have",
    ),
    "more strings than bytes": ({"keys": (key("a", ARRAY, struct.pack("<IQ", STRING, 10**6)),)}, "must have"),
    "text": ({"keys": (key("a", STRING, text(b"\xff")),)}, "not UTF-8"),
    "the name of a key": ({"keys": (text(b"\xff"),)}, "not UTF-8"),
    "a key twice": ({"keys": (key("a", BOOL, b"\0"), key("a", BOOL, b"\0"))}, "'a' appears twice"),
    "a tensor twice": ({"tensors": (tensor(), tensor(offset=32)), "data": 64}, "'t' appears twice"),
    "alignment 0": ({"keys": (key("general.alignment", U32, struct.pack("<I", 0)),)}, "a power of two"),
    "alignment 3": ({"keys": (key("general.alignment", U32, struct.pack("<I", 3)),)}, "a power of two"),
    "alignment 2^31": ({"keys": (key("general.alignment", U32, struct.pack("<I", 2**31)),)}, "a power of two"),
    "alignment of another type": ({"keys": (key("general.alignment", STRING, text("32")),)}, "a power of two"),
    "offset past the end": ({"tensors": (tensor(), tensor("u", offset=2**40))}, "'u' leaves a hole after 't'"),
    "an unaligned offset": ({"tensors": (tensor(offset=8),)}, "offset 8 is no multiple of 32"),
    "a hole": ({"tensors": (tensor(), tensor("u", offset=64)), "data": 128}, "'u' leaves a hole after 't'"),
    "an overlap": ({"tensors": (tensor(shape=(8, 2)), tensor("u", offset=32)), "data": 128}, "'u' overlaps 't'"),
    "data cut off": ({"data": 16}, "must have"),
    "data left over": ({"data": 96}, "64 bytes at the end"),
    "no values": ({"tensors": (tensor(shape=(0, 2)),)}, "must be blocks of 1,"),
    "half a block": ({"tensors": (tensor(shape=(40, 2), kind=8),), "data": 96}, "must be blocks of 32,"),
}


@pytest.mark.parametrize("what", CORRUPT)
def test_62_corrupt(at, what):
    pieces, message = CORRUPT[what]
    with pytest.raises(CorruptCheckpointError, match=f"x.gguf.*{re.escape(message)}"):
        GgufFile(made(at, **pieces))


@pytest.mark.parametrize("kind", [4, 5, 31, 36, 42, 2**31])
def test_62_unknown_and_removed_types(at, kind):
    with pytest.raises(DtypeMismatchError, match=f"'t' is of type {kind}, unknown or removed"):
        GgufFile(made(at, tensors=(tensor(kind=kind),)))


def test_41_names_are_data(at):
    with pytest.raises(CorruptCheckpointError) as caught:
        GgufFile(made(at, tensors=(tensor("../\u202e\x00", offset=8),)))
    assert str(caught.value).isprintable()


def test_strings_that_are_not_utf8_are_told_when_they_are_read(at):
    keys = (key("a", ARRAY, struct.pack("<IQ", STRING, 2) + text("x") + text(b"\xff")),)
    strings = GgufFile(made(at, keys=keys)).values["a"]
    with pytest.raises(CorruptCheckpointError, match="string 1"):
        strings.decoded()


def test_50_a_file_that_changes(at):
    file = GgufFile(made(at))
    made(at, data=48)
    with pytest.raises(CorruptCheckpointError, match="changed while it was read"):
        file.read("t")


def test_integers_are_no_weights(at):
    with pytest.raises(DtypeMismatchError, match="'t' is I32"):
        GgufFile(made(at, tensors=(tensor(kind=26),))).read("t")


def test_what_create_writes_is_what_the_scan_finds(tmp_path):
    values = {
        "s": "é", "t": True, "u": np.uint64(2**63), "f": np.float32(1e-5), "d": np.float64(0.1),
        "n": np.array([1, -2], np.int32), "w": ["a", "", "ü"],
    }  # fmt: skip
    specs = {"x": ("BF16", (3, 5)), "y": ("Q8_0", (2, 64)), "z": ("F32", (7,))}
    infos = gguf_file.create(tmp_path / "x.gguf", values, specs)
    file = GgufFile(tmp_path / "x.gguf")
    assert file.tensors == infos
    assert file.values["w"] == Strings(3, file.values["w"].data)
    assert file.values["w"].decoded() == values["w"]
    assert file.values["n"].tolist() == [1, -2]
    assert {k: type(v) for k, v in file.values.items() if k in "stufd"} == {k: type(values[k]) for k in "stufd"}
    assert {k: file.values[k] for k in "stufd"} == {k: values[k] for k in "stufd"}
    again = gguf_file.create(Path(tmp_path / "y.gguf"), file.values, specs)
    assert (tmp_path / "y.gguf").read_bytes() == (tmp_path / "x.gguf").read_bytes()
    assert [info.start for info in again.values()] == [info.start for info in infos.values()]
