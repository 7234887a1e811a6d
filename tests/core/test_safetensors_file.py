"""One safetensors file: hostile headers are typed errors, bits are exact, changes are noticed."""

import json
import os
import tracemalloc
from pathlib import Path

import numpy as np
import pytest
import safetensors.numpy

from mistral_core import errors
from mistral_core.weights.containers.safetensors import DTYPES, SafetensorsFile


def bits(array: np.ndarray) -> bytes:
    return np.ascontiguousarray(array).tobytes()


def raw(path: Path, header: object, data: bytes = b"", length: int | None = None) -> Path:
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    path.write_bytes((len(text) if length is None else length).to_bytes(8, "little") + text + data)
    return path


def entry(start=0, end=8, dtype="F32", shape=(2,)) -> dict:
    return {"dtype": dtype, "shape": list(shape), "data_offsets": [start, end]}


# Headers

CORRUPT, LIMIT, DTYPE = errors.CorruptCheckpointError, errors.LimitExceededError, errors.DtypeMismatchError

HEADERS = {
    "leading space": (b' {"a":1}', b"", CORRUPT, "must begin with"),
    "list": (b"[]", b"", CORRUPT, "must begin with"),
    "empty": (b"", b"", CORRUPT, "must begin with"),
    "not UTF-8": (b'{"\xff":1}', b"", CORRUPT, "UTF-8"),
    "trailing NUL": (b"{}\0", b"", CORRUPT, "JSON"),
    "5000 digits": (b'{"a":' + b"9" * 5000 + b"}", b"", CORRUPT, "JSON"),
    "deep": (b'{"a":' + b"[" * 100_000 + b"}", b"", CORRUPT, "JSON"),
    "twice": (b'{"a":{},"b":{},"a":{}}', b"", CORRUPT, "'a' twice"),
    "million": (b"{" + b'"a":0,' * 300_000 + b"}", b"", LIMIT, "20000"),
    "20001": ({f"t{i}": entry(0, 0, shape=[0]) for i in range(20_001)}, b"", LIMIT, "20001"),
    "no object": ({"a": 7}, b"", CORRUPT, "'a'"),
    "extra key": ({"a": {**entry(), "code": "x"}}, bytes(8), CORRUPT, "and nothing else"),
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
    "out of file": ({"a": entry()}, bytes(7), errors.TruncatedFileError, "must have"),
    "beyond 2^63": ({"a": entry(2**64, 2**64 + 8)}, bytes(8), CORRUPT, "hole"),
    "rest": ({"a": entry()}, bytes(9), CORRUPT, "1 bytes belong to no tensor"),
    "overflow": ({"a": entry(shape=[2**32, 2**32])}, bytes(8), LIMIT, "2\\^60"),
    "hidden overflow": ({"a": entry(0, 0, shape=[0, 2**62])}, b"", LIMIT, "2\\^60"),
    "rank": ({"a": entry(0, 4, shape=[1] * 5)}, bytes(4), LIMIT, "rank 4"),
    "metadata": ({"__metadata__": {"a": 1}}, b"", CORRUPT, "strings"),
}  # fmt: skip


@pytest.mark.parametrize("case", HEADERS)
def test_29_to_34_bad_headers(tmp_path, case):
    header, data, error, message = HEADERS[case]
    with pytest.raises(error, match=message) as caught:
        SafetensorsFile(raw(tmp_path / "f.safetensors", header, data))
    assert "f.safetensors" in str(caught.value)


@pytest.mark.parametrize("length", [2**63, 2**64 - 1, 100_000_001, 25_000_001])
def test_28_header_length_bombs(tmp_path, length):
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
