"""HDF5: places are found without the HDF5 library, and what is not plain numbers in plain places is refused."""

import errno
import os
import resource
import signal

import ml_dtypes
import numpy as np
import pytest

from mistral_core.errors import (
    CheckpointNotFoundError,
    CorruptCheckpointError,
    LimitExceededError,
    MistralError,
    TruncatedFileError,
    UnsafeFileError,
    UnsupportedFeatureError,
)
from mistral_core.weights.containers import tensor_file
from mistral_core.weights.containers.hdf5 import structure as hdf5_structure
from mistral_core.weights.containers.hdf5.file import Hdf5File, create, root_names

h5py = pytest.importorskip("h5py")

ARRAYS = {
    "a/weight:0": np.arange(600, dtype=np.float32).reshape(20, 30),
    "a/b/vars/0": np.arange(10, dtype=np.float64),
    "a/b/vars/1": np.arange(10, dtype=np.float16).reshape(5, 2),
    "c": np.arange(6).astype(ml_dtypes.bfloat16).reshape(1, 2, 3),
}


@pytest.fixture
def path(tmp_path):
    """A file as h5py and Keras write it."""
    path = tmp_path / "model.h5"
    with h5py.File(path, "w") as file:
        file.attrs["layer_names"] = [b"a", "\N{GREEK SMALL LETTER BETA}".encode()]
        file.attrs["fixed"] = np.array([b"one", b"three"])
        file.attrs["numbers"] = np.arange(3)
        file.attrs["nothing"] = h5py.Empty("f4")
        file.create_group("a").attrs["name"] = "text"
        file.create_group("empty")
        for name, array in ARRAYS.items():
            file.create_dataset(name, data=array)
        file["c"].attrs["dtype"] = "bfloat16"
    return path


def same(file):
    for name, array in ARRAYS.items():
        found = file.read(name)
        assert (found.dtype, found.shape, found.tobytes()) == (array.dtype, array.shape, array.tobytes())
    return set(file.tensors) == set(ARRAYS)


def test_what_h5py_wrote_is_read(path):
    file = Hdf5File(path)
    assert same(file)
    assert file.attributes[""] == {
        "layer_names": ("a", "\N{GREEK SMALL LETTER BETA}"), "fixed": ("one", "three"), "numbers": (), "nothing": (),
    }  # fmt: skip
    assert file.texts("a", "name") == ("text",)
    assert root_names(path) >= {"layer_names", "a", "empty", "a/b/vars"}


def test_a_file_inside_another(path, tmp_path):
    data = path.read_bytes()
    (tmp_path / "outer").write_bytes(b"x" * 123 + data + b"y" * 45)
    assert same(Hdf5File(tmp_path / "outer", start=123, size=len(data)))


def test_what_is_made_is_read_by_h5py_and_by_us(tmp_path):
    names = [f"{number:05}/{'x' * 50}" for number in range(3000)]  # more than one attribute holds
    specs = {name: (tensor_file.CODES[array.dtype], array.shape) for name, array in ARRAYS.items()}
    infos = create(tmp_path / "new.h5", specs, {"": {"layer_names": names}, "a/b": {"name": "text"}})
    for name, array in ARRAYS.items():
        tensor_file.write(infos[name], array)
    file = Hdf5File(tmp_path / "new.h5")
    assert same(file)
    assert file.texts("", "layer_names") == tuple(names)
    assert "layer_names" in root_names(tmp_path / "new.h5")
    with h5py.File(tmp_path / "new.h5") as read:
        assert read["a/b"].attrs["name"] == "text"
        assert read["c"].attrs["dtype"] == "bfloat16"
        for name, array in ARRAYS.items():
            assert np.asarray(read[name]).tobytes() == array.tobytes()


def test_a_file_that_is_there_is_not_overwritten(path):
    with pytest.raises(OSError, match="exists"):
        create(path, {"a": ("F32", (1,))})


def test_many_members_of_one_group(tmp_path):
    """Their table is a tree of several levels."""
    with h5py.File(tmp_path / "many.h5", "w") as file:
        for number in range(3000):
            file[f"group/{number}"] = np.float32([number])
    file = Hdf5File(tmp_path / "many.h5")
    assert all(file.read(f"group/{number}") == number for number in range(0, 3000, 211))
    assert len(file.tensors) == 3000


# Faults

OTHERS = {
    "soft link": (UnsafeFileError, lambda file: file.__setitem__("x", h5py.SoftLink("/c"))),
    "link to a file": (UnsafeFileError, lambda file: file.__setitem__("x", h5py.ExternalLink("/etc/passwd", "/c"))),
    "second name": (UnsafeFileError, lambda file: file.__setitem__("x", file["c"])),
    "loop": (UnsafeFileError, lambda file: file["a"].__setitem__("x", file["/"])),
    "numbers elsewhere": (
        UnsafeFileError, lambda file: file.create_dataset("x", (8,), "f4", external=[("/etc/passwd", 0, 32)])
    ),
    "virtual": (UnsafeFileError, lambda file: virtual(file)),
    "compound": (UnsafeFileError, lambda file: file.create_dataset("x", (2,), [("a", "f4"), ("b", "i4")])),
    "variable length": (UnsafeFileError, lambda file: file.create_dataset("x", data=["text"])),
    "reference": (UnsafeFileError, lambda file: file.create_dataset("x", data=file["c"].ref)),
    "region": (
        UnsafeFileError,
        lambda file: file.create_dataset("x", data=file["c"].regionref[:], dtype=h5py.regionref_dtype),
    ),
    "enumeration": (UnsafeFileError, lambda file: file.create_dataset("x", data=np.array([True]))),
    "gzip bomb": (
        UnsupportedFeatureError,
        lambda file: file.create_dataset("x", (2**30, 2**20), "f4", chunks=(2**10, 2**10), compression="gzip"),
    ),
    "chunks": (UnsupportedFeatureError, lambda file: file.create_dataset("x", (8,), "f4", maxshape=(None,))),
    "big-endian": (UnsupportedFeatureError, lambda file: file.create_dataset("x", data=np.zeros(2, ">f4"))),
    "named type": (UnsupportedFeatureError, lambda file: file.__setitem__("x", np.dtype("f4"))),
    "newer group": (UnsupportedFeatureError, lambda file: file.create_group("x", track_order=True)),
    "shape bomb": (CorruptCheckpointError, lambda file: file.create_dataset("x", (2**40, 2**20), "f4")),
    "never written": (CorruptCheckpointError, lambda file: file.create_dataset("x", (8,), "f4")),
    "nothing": (CorruptCheckpointError, lambda file: file.create_dataset("x", data=h5py.Empty("f4"))),
    "rank": (LimitExceededError, lambda file: file.create_dataset("x", data=np.zeros((1,) * 5, "f4"))),
    "depth": (LimitExceededError, lambda file: file.create_group("/".join("x" * 20))),
}  # fmt: skip


def virtual(file):
    layout = h5py.VirtualLayout((4,), "f4")
    layout[:] = h5py.VirtualSource("/etc/passwd", "x", (4,))
    file.create_virtual_dataset("x", layout)


@pytest.mark.parametrize("what", OTHERS)
def test_33_57_58_only_plain_numbers_in_plain_places(path, what):
    error, add = OTHERS[what]
    with h5py.File(path, "r+") as file:
        add(file)
    with pytest.raises(error, match=rf"model\.h5.*{'never written' if what == 'never written' else ''}"):
        Hdf5File(path)


def test_58_a_newer_file_is_refused_by_name(tmp_path):
    with h5py.File(tmp_path / "new.h5", "w", libver="latest") as file:
        file["x"] = np.zeros(3, "f4")
    with pytest.raises(UnsupportedFeatureError, match="superblock 3"):
        Hdf5File(tmp_path / "new.h5")


@pytest.mark.parametrize("target", ["another tensor", "the structure"])
def test_31_tensors_share_no_byte(path, target):
    tensors = Hdf5File(path).tensors
    place = tensors["a/b/vars/1"].start if target == "another tensor" else 96
    data = path.read_bytes()
    address = tensors["c"].start.to_bytes(8, "little")
    assert data.count(address) == 1
    path.write_bytes(data.replace(address, place.to_bytes(8, "little")))
    with pytest.raises(CorruptCheckpointError, match="overlaps"):
        Hdf5File(path)


def test_67_a_full_disk_keeps_its_errno(tmp_path):
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    handler = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (10_000, before[1]))
    try:
        with pytest.raises(OSError, match="too large") as caught:
            create(tmp_path / "x.h5", {"x": ("F32", (10_000,))})
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
        signal.signal(signal.SIGXFSZ, handler)
    assert caught.value.errno == errno.EFBIG


def test_34_numbers_that_are_no_weights_have_their_own_codes(tmp_path):
    with h5py.File(tmp_path / "x.h5", "w") as file:
        file["i"], file["u"] = np.int64(3), np.zeros(2, np.uint8)
        file["o"], file["f"] = np.zeros(2, "V2"), np.zeros(2, "f4")
        file["f"].attrs["dtype"] = "bfloat16"
    found = {name: tensor.dtype for name, tensor in Hdf5File(tmp_path / "x.h5").tensors.items()}
    assert found == {"i": "I64", "u": "U8", "o": "V2", "f": "F32"}


def test_40_57_more_objects_than_there_can_be(path, monkeypatch):
    monkeypatch.setattr(hdf5_structure, "MAX_OBJECTS", 5)
    with pytest.raises(LimitExceededError, match="objects"):
        Hdf5File(path)


def test_57_structure_without_end(path, monkeypatch):
    monkeypatch.setattr(hdf5_structure, "MAX_BYTES", 2000)
    with pytest.raises(LimitExceededError, match="besides the numbers"):
        Hdf5File(path)


def test_25_every_cut_is_found(path):
    data = path.read_bytes()
    for size in [*range(200), *range(200, len(data), 61), len(data) - 1]:
        path.write_bytes(data[:size])
        with pytest.raises((TruncatedFileError, CorruptCheckpointError)):
            Hdf5File(path)
    path.write_bytes(data + b"\0")
    with pytest.raises(CorruptCheckpointError):
        Hdf5File(path)


def test_26_27_another_file_under_the_name(tmp_path):
    with pytest.raises(CheckpointNotFoundError):
        Hdf5File(tmp_path / "x.h5")
    (tmp_path / "x.h5").write_bytes(b"version https://git-lfs.github.com/spec/v1\n")
    with pytest.raises(CorruptCheckpointError, match="git lfs pull"):
        Hdf5File(tmp_path / "x.h5")
    (tmp_path / "x.h5").write_bytes(b"<!doctype html>" * 20)
    with pytest.raises(CorruptCheckpointError, match="not HDF5"):
        Hdf5File(tmp_path / "x.h5")


def test_58_flipped_bytes_give_the_same_or_an_error(path):
    """Flipped numbers, and tensors small enough to fit into a gap of the structure, are for the manifest to find."""
    data, tensors = path.read_bytes(), Hdf5File(path).tensors
    numbers = {place for tensor in tensors.values() for place in range(tensor.start, tensor.end)}
    with path.open("r+b", buffering=0) as file:
        for place in sorted(set(range(len(data))) - numbers):
            if not any(data[max(place - 40, 0) : place + 40]) and place % 16:
                continue  # nothing is written there
            for flip in (0xFF, 0x01):
                os.pwrite(file.fileno(), bytes([data[place] ^ flip]), place)
                try:
                    found = Hdf5File(path).tensors
                except MistralError:
                    continue
                for name in set(found) & set(tensors):  # one may be renamed, which matching finds
                    assert found[name][2:] == tensors[name][2:] or tensors[name].nbytes < 1024, (place, name)
            os.pwrite(file.fileno(), data[place : place + 1], place)
