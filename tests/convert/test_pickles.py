"""pytorch_model.bin and consolidated.00.pth: the same bits as torch reads, and nothing that a pickle could do."""

from __future__ import annotations

import collections
import importlib
import io
import json
import os
import pickle
import subprocess
import sys
import warnings
import zipfile
from pathlib import Path

import numpy as np
import pytest
from crossed import crossed
from samples import CONFIGS, any_bits, assert_same, read

from mistral_core import TINY, errors
from mistral_core.config import params_json
from mistral_core.parameters import layer_of, parameters
from mistral_core.weights import formats, layouts
from mistral_core.weights.checkpoint import load
from mistral_core.weights.formats.base import Outline
from mistral_core.weights.opening import Checkpoint

torch = pytest.importorskip("torch")
arrays = pytest.importorskip("mistral_torch.arrays")
FOREIGN = Path(__file__).parents[1] / "data" / "foreign" / "torch-bin"


def tensors_of(found):
    return {name: arrays.from_numpy(array.copy()) for name, array in found.items()}


def save_hf(directory, config=TINY, dtype="bfloat16", **state):
    """A checkpoint as torch users wrote it; returns the arrays in it."""
    directory.mkdir(exist_ok=True)
    config.save_pretrained(directory)
    found = any_bits(config, dtype)
    torch.save({**tensors_of(found), **state}, directory / "pytorch_model.bin")
    return found


@pytest.fixture
def path(tmp_path):
    return tmp_path / "pytorch_model.bin"


def refused(path, error, match):
    for format in (None, "hf-bin"):
        with pytest.raises(error, match=match):
            Checkpoint.open(path, format=format)


# The same bits


@pytest.mark.parametrize(("name", "dtype"), crossed(CONFIGS, "bfloat16", "float16", "float32", "float64"))
def test_hugging_face_names(tmp_path, name, dtype):
    found = save_hf(tmp_path / "a", CONFIGS[name], dtype)
    assert formats.detect(tmp_path / "a") == ["hf-bin"]
    assert_same(read(tmp_path / "a"), found)
    assert_same(read(tmp_path / "a" / "pytorch_model.bin"), found)
    assert Checkpoint.open(tmp_path / "a").config == CONFIGS[name]


@pytest.mark.parametrize("name", CONFIGS)
def test_raw_names(tmp_path, name):
    config, state = CONFIGS[name], {}
    found = any_bits(config)
    for full, row in parameters(config):
        stored = layouts.to_stored(found[full], row, config, layouts.rotary_pairs(row))
        state[row.raw.format(layer_of(full))] = arrays.from_numpy(stored)
    torch.save(state, tmp_path / "consolidated.00.pth")
    (tmp_path / "params.json").write_text(json.dumps(params_json.write(config)))
    assert formats.detect(tmp_path) == ["raw-pth"]
    assert_same(read(tmp_path), found)


def test_shards_and_index(tmp_path):
    found, weight_map = any_bits(), {}
    for number in range(3):
        file = f"pytorch_model-{number + 1:05d}-of-00003.bin"
        names = list(found)[number::3]
        torch.save(tensors_of({name: found[name] for name in names}), tmp_path / file)
        weight_map |= dict.fromkeys(names, file)
    index = {"metadata": {}, "weight_map": weight_map}
    (tmp_path / "pytorch_model.bin.index.json").write_text(json.dumps(index))
    assert_same(read(tmp_path), found)
    index["weight_map"][next(iter(found))] = "model.safetensors"
    (tmp_path / "pytorch_model.bin.index.json").write_text(json.dumps(index))
    refused(tmp_path, errors.UnsafeFileError, "does not end with .bin")  # 48


def test_parameters_views_shared_storages_and_a_gpu(tmp_path, path, monkeypatch):
    both = torch.arange(24.0).reshape(4, 6)
    state = collections.OrderedDict(
        top=both[:2], rest=both[2:], again=both[:2], parameter=torch.nn.Parameter(torch.ones(3)), one=both[0:1, 0:1]
    )
    del state["one"]
    state._metadata = collections.OrderedDict({"": {"version": 1}})
    monkeypatch.setattr(torch.serialization, "location_tag", lambda _: "cuda:7")
    torch.save(state, path)
    checkpoint = Checkpoint.open(path)
    for name, value in state.items():
        assert np.array_equal(checkpoint.read(name), value.detach().numpy()), name


@pytest.mark.parametrize("options", [{"compute_crc32": False}, {"alignment": 4096}])
def test_the_ways_torch_lays_out_a_file(tmp_path, options):
    config = torch.utils.serialization.config.save
    old = config.storage_alignment
    before = torch.serialization.get_crc32_options()
    try:
        torch.serialization.set_crc32_options(options.get("compute_crc32", True))
        config.storage_alignment = options.get("alignment", old)
        found = save_hf(tmp_path / "a")
    finally:
        torch.serialization.set_crc32_options(before)
        config.storage_alignment = old
    assert_same(read(tmp_path / "a"), found)


def test_a_zip_made_anew_is_read_by_its_own_places(path):
    state = {"a": torch.arange(3.0), "b": torch.ones(5)}
    rewritten(path, state, lambda members: members[::-1])
    assert Checkpoint.open(path).read("b").tolist() == [1] * 5


def test_files_of_transformers():
    """Written by make_torch_bin.py with transformers 4.56: in one file, in shards, tied."""
    for directory in (FOREIGN / "single", FOREIGN / "shards", FOREIGN / "tied"):
        expected = load(directory / "beside.safetensors", config=Checkpoint.open(directory).config)[1]
        _, found = load(directory)
        assert_same(dict(found), dict(expected))


def test_the_numbers_are_not_read_on_opening(tmp_path, monkeypatch):
    save_hf(tmp_path / "a")
    checkpoint = Checkpoint.open(tmp_path / "a")
    path = tmp_path / "a" / "pytorch_model.bin"
    info = checkpoint.shards[path].tensors["model.norm.weight"]
    data = bytearray(path.read_bytes())
    data[info.start : info.end] = bytes(info.end - info.start)
    stamp = path.stat()
    path.write_bytes(data)
    os.utime(path, ns=(stamp.st_atime_ns, stamp.st_mtime_ns))
    assert not checkpoint.read("model.norm.weight").astype(np.float32).any()


# What is refused


class Evil:
    def __init__(self, call, *arguments):
        self.call, self.arguments = call, arguments

    def __reduce__(self):
        return self.call, self.arguments


@pytest.mark.parametrize(
    "payload",
    [
        Evil(os.system, "touch pwned"),
        Evil(eval, "open('pwned', 'w')"),
        Evil(getattr, torch.Tensor, "numpy"),
        Evil(bytearray, 1 << 45),
        Evil(torch.nn.Linear, 1, 1),
        collections.Counter(),
    ],
)
@pytest.mark.parametrize("protocol", [2, 4])
def test_52_payloads(tmp_path, path, payload, protocol, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(torch, "load", lambda *_, **__: pytest.fail("was read"))
    torch.save({"a": payload}, path, pickle_protocol=protocol)
    refused(path, errors.UnsafeFileError, "asks for")
    assert not (tmp_path / "pwned").exists()


def test_52_weights_only_is_never_weakened(path, monkeypatch):
    torch.save({"a": torch.ones(1)}, path)
    real, calls = torch.load, []
    monkeypatch.setattr(torch, "load", lambda *a, **k: (calls.append(k), real(*a, **k))[1])
    Checkpoint.open(path)
    assert [call["weights_only"] for call in calls] == [True]


@pytest.mark.parametrize(
    ("state", "match"),
    [
        ({"a": torch.ones(1).expand(1 << 40)}, "strided"),
        ({"a": torch.ones(3, 4).T}, "strided"),
        ({"a": torch.ones(3, 4)[:, :2]}, "strided"),
        ({"a": torch.ones(2, dtype=torch.complex64)}, "ComplexFloatStorage"),
        ({"a": torch.ones(2, 2).to_sparse()}, "sparse"),
        ({"a": torch.ones(2, dtype=torch.int32)}, "IntStorage"),  # 35
        ({"a": torch.ones(2).to(torch.float8_e4m3fn)}, "rebuild_tensor_v3"),
        ({"a": torch.ones(2, dtype=torch.complex64).conj().imag}, "strided"),
        ({"a": torch._neg_view(torch.ones(2))}, "strided"),
        ({"a": {"b": torch.ones(1)}}, "state dict itself"),
        ({"a": 1}, "state dict itself"),
        ({"a": {1, 2}}, "asks for"),
        ({1: torch.ones(1)}, "state dict"),
        ([torch.ones(1)], "state dict"),
        (torch.ones(1), "state dict"),
    ],
)
def test_53_values_that_are_not_dense_floats(path, state, match):
    torch.save(state, path)
    refused(path, errors.UnsafeFileError, match)


def test_53_overlapping_views(path):
    whole = torch.arange(10.0)
    torch.save({"a": whole[:6], "b": whole[5:]}, path)
    refused(path, errors.UnsafeFileError, "part of")


def rewritten(path, state, change, compression=zipfile.ZIP_STORED):
    """A file of torch.save with other members; `change` takes and gives a list of (name, content)."""
    buffer = io.BytesIO()
    torch.save(state, buffer)
    with zipfile.ZipFile(buffer) as archive:
        members = [(name, archive.read(name)) for name in archive.namelist()]
    with zipfile.ZipFile(path, "w", compression) as archive:
        for name, content in change(members):
            archive.writestr(name, content)


ONE = {"a": torch.arange(64.0)}


def replaced(name, content):
    return lambda members: [(n, content if n.endswith(name) else c) for n, c in members]


@pytest.mark.parametrize(
    ("change", "match"),
    [
        (lambda m: [*m, ("archive/data/../../evil", b"")], "no place"),
        (lambda m: [*m, ("../archive/data/9", b"")], "no place"),
        (lambda m: [*m, ("archive/constants.pkl", b"")], "no place"),
        (lambda m: [*m, ("other/data.pkl", b"")], "no place"),
        (lambda m: [(n, c) for n, c in m if not n.endswith("data.pkl")], "without data.pkl"),
        (replaced("data/0", b"short"), "storage of another size"),
        (replaced("data/0", bytes(1000)), "storage of another size"),
        (lambda m: [(n, c) for n, c in m if not n.endswith("data/0")], "broken"),
    ],
)
def test_53_members(path, change, match):
    rewritten(path, ONE, change)
    refused(path, (errors.UnsafeFileError, errors.CorruptCheckpointError), match)


@pytest.mark.filterwarnings("ignore:Duplicate name")
def test_53_duplicate_members(path):
    rewritten(path, ONE, lambda members: [*members, next(m for m in members if m[0].endswith("data/0"))])
    refused(path, errors.UnsafeFileError, "twice")


@pytest.mark.parametrize("compression", [zipfile.ZIP_DEFLATED, zipfile.ZIP_BZIP2, zipfile.ZIP_LZMA])
def test_53_compressed_members(path, compression):
    rewritten(path, {"a": torch.zeros(1 << 20)}, list, compression)
    refused(path, errors.UnsafeFileError, "is compressed")


@pytest.mark.parametrize(("change", "match"), [("inside", "overlaps"), ("longer", "table of contents")])
def test_53_tables_of_contents_that_lie(path, change, match):
    """A member inside another, and one that goes on after the last."""
    buffer = io.BytesIO()
    torch.save(ONE, buffer)
    with zipfile.ZipFile(buffer) as source, zipfile.ZipFile(path, "w") as archive:
        archive.writestr("archive/data.pkl", source.read("archive/data.pkl"))
        inner = io.BytesIO()
        with zipfile.ZipFile(inner, "w") as other:
            other.writestr("archive/data/1", bytes(256))
        archive.writestr("archive/data/0", inner.getvalue())
        outer = archive.getinfo("archive/data/0")
        if change == "inside":
            within = other.getinfo("archive/data/1")
            within.header_offset = outer.header_offset + 30 + len(outer.filename)
            archive.filelist.append(within)
        else:
            outer.file_size = outer.compress_size = outer.file_size + 1
    refused(path, errors.UnsafeFileError, match)


@pytest.mark.parametrize(("shape", "stride"), [(65, 1), (32, 2), (33, 2), (64, 0)])
def test_53_shapes_beyond_the_storage(path, shape, stride):
    def change(members):
        old, new = b"K@\x85q\x08K\x01\x85", bytes([75, shape, 0x85, 113, 8, 75, stride, 0x85])
        assert sum(content.count(old) for _, content in members) == 1
        return [(name, content.replace(old, new)) for name, content in members]

    rewritten(path, ONE, change)
    refused(path, (errors.UnsafeFileError, errors.CorruptCheckpointError), r"pytorch_model\.bin")


def test_53_pickle_bomb(path):
    rewritten(path, ONE, replaced("data.pkl", bytes(9 << 20)))
    refused(path, errors.LimitExceededError, "at most")


def pickled(path: Path, state: bytes) -> Path:
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("x/data.pkl", state)
        archive.writestr("x/version", b"3\n")
    return path


DEEP = {
    "a tuple as a key": b"\x80\x02}K\x01" + b"\x85" * 40 + b"K\x01s.",
    "a tuple of two": b"\x80\x02}" + b"K\x01" * 41 + b"\x86" * 40 + b"K\x01s.",
    "marked tuples": b"\x80\x02}" + b"(" * 40 + b"K\x01" + b"t" * 40 + b"K\x01s.",
    "by the memo": b"\x80\x02}K\x01" + b"".join(b"q%c0h%c\x85" % (i, i) for i in range(40)) + b"K\x01s.",
    "lists": b"\x80\x02" + b"]" * 40 + b"a" * 39 + b".",
}


@pytest.mark.parametrize("state", DEEP.values(), ids=DEEP)
def test_65_containers_nested_deep(path, state):
    refused(pickled(path, state), errors.LimitExceededError, "33 containers within one another; at most 32")


@pytest.mark.parametrize("state", [b"\x80\x02h\x05.", b"\x80\x02\x85.", b"\x80\x02t.", b"\x80\x02}s.", b"q\x00."])
def test_65_a_stack_that_has_too_little(path, state):
    refused(pickled(path, state), errors.CorruptCheckpointError, "no pickle")


def test_a_pickle_of_many_single_steps_is_not_deep(path):
    torch.save({f"a{i}.b": torch.zeros(1) for i in range(1100)}, path)  # in batches of a thousand
    assert len(importlib.import_module("mistral_torch.pickles").PickledFile(path).tensors) == 1100
    items = b"".join(b"U\x02%02dK\x01s" % i for i in range(99))
    refused(pickled(path, b"\x80\x02}" + items + b"."), errors.UnsafeFileError, "save the state dict itself")


def test_53_table_of_contents_as_large_as_the_file(path):
    with zipfile.ZipFile(path, "w") as archive:
        for index in range(20_100):
            archive.writestr(f"archive/data/{index}", b"")
    refused(path, errors.LimitExceededError, "members")


@pytest.mark.parametrize("legacy", ["pickle", "tar"])
def test_54_files_from_before_the_zip(path, legacy):
    torch.save(ONE, path, _use_new_zipfile_serialization=False)
    if legacy == "tar":
        path.write_bytes(b"storages".ljust(257, b"\0") + b"ustar".ljust(255, b"\0"))
    refused(path, errors.UnsupportedFeatureError, "re-save it as safetensors")


def test_55_distributed_checkpoints(tmp_path):
    dcp = pytest.importorskip("torch.distributed.checkpoint")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        dcp.save({"a": torch.ones(3)}, checkpoint_id=tmp_path / "dcp", no_dist=True)
    with pytest.raises(errors.UnsupportedFeatureError, match="distributed"):
        Checkpoint.open(tmp_path / "dcp")


def test_65_big_endian(path):
    rewritten(path, ONE, replaced("byteorder", b"big"))
    refused(path, errors.UnsupportedFeatureError, "little-endian")


@pytest.mark.parametrize(
    ("content", "error"),
    [
        (b"", errors.TruncatedFileError),
        (b"PK\3\4", errors.TruncatedFileError),
        (b"version https://git-lfs.github.com/spec/v1\n", errors.CorruptCheckpointError),
        (b"<!doctype html>", errors.CorruptCheckpointError),
    ],
)
def test_25_to_27_not_weights_at_all(path, content, error):
    path.write_bytes(content)
    refused(path, error, "pytorch_model.bin")


def test_several_parts_of_a_raw_model(tmp_path):
    for number in range(2):
        torch.save(ONE, tmp_path / f"consolidated.{number:02d}.pth")
    with pytest.raises(errors.UnsupportedFeatureError, match=r"consolidated\.01\.pth"):
        Checkpoint.open(tmp_path)


@pytest.mark.parametrize("format", ["hf-bin", "raw-pth"])
def test_pickles_are_not_written(tmp_path, format):
    module = formats.format_named(format)
    outline = Outline(TINY, "MistralForCausalLM", {})
    for call in (lambda: module.check(outline), lambda: module.create(tmp_path, outline, 1)):
        with pytest.raises(errors.UnsupportedFeatureError, match="--to hf"):
            call()


def test_bytes_flipped_and_files_cut(path):
    torch.save({"a": torch.arange(3.0), "b": torch.ones(2, dtype=torch.bfloat16)}, path)
    good = path.read_bytes()
    checkpoint = Checkpoint.open(path)
    found = {name: checkpoint.read(name).shape for name in checkpoint.tensors}
    for place in range(0, len(good), 11):  # `fuzz.py` tries them all
        for bad in (good[:place] + bytes([good[place] ^ 0x41]) + good[place + 1 :], good[:place]):
            path.write_bytes(bad)
            try:
                checkpoint = Checkpoint.open(path)
                shapes = {name: checkpoint.read(name).shape for name in checkpoint.tensors}
            except errors.MistralError:
                continue
            # names, shapes and numbers are data that only a manifest can vouch for
            assert len(shapes) == len(found)


def test_nothing_of_torch_is_imported_before_a_pickle_is_opened():
    code = "import sys, mistral_core.weights.formats as f; f.detect; assert 'torch' not in sys.modules"
    subprocess.run([sys.executable, "-c", code], check=True)


def test_pickled_names_are_checked_without_unpickling(path):
    rewritten(path, ONE, replaced("data.pkl", pickle.dumps({"a": Evil(print, 1)}, protocol=0)))
    refused(path, errors.UnsafeFileError, "asks for")
