"""Saving: the bytes of the library, all or nothing, read back and listed in a manifest."""

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
from mistral_core.disk.into import MANIFEST
from mistral_core.parameters import initial_value, parameters
from mistral_core.weights import manifest
from mistral_core.weights.checkpoint import Checkpoint, load, save
from mistral_core.weights.containers import shards, tensor_file
from mistral_core.weights.containers.safetensors import SafetensorsFile
from mistral_core.weights.containers.tensor_file import DTYPES

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
    assert sorted(found) == sorted(expected)
    for name, array in expected.items():
        assert (found[name].dtype, found[name].shape) == (array.dtype, array.shape), name
        assert bits(found[name]) == bits(array), name


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


def test_79_any_strides_and_any_order(tmp_path):
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


def test_80_tied_head_is_never_written_and_must_be_the_embedding(tmp_path):
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
    before = (tmp_path / "a" / MANIFEST).read_bytes()
    with pytest.raises(error, match=message):
        save(tmp_path / "a", TINY, tensors)
    assert os.listdir(tmp_path) == ["a"]
    assert (tmp_path / "a" / MANIFEST).read_bytes() == before
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
    assert sorted(os.listdir(tmp_path / "a")) == ["config.json", MANIFEST, shards.SINGLE]
    assert load(tmp_path / "a")[0].dtype == "float32"


def test_other_files_go_in_and_bad_names_do_not(tmp_path):
    save(tmp_path / "a", TINY, weights().items(), other_files={"tokenizer.json": b"{}"})
    assert (tmp_path / "a" / "tokenizer.json").read_bytes() == b"{}"
    assert "tokenizer.json" in json.loads((tmp_path / "a" / MANIFEST).read_text())["files"]
    with pytest.raises(errors.UnsafeFileError):
        save(tmp_path / "a", TINY, weights().items(), other_files={"../x": b""})
    for name in ("config.json", "model.safetensors", MANIFEST):
        with pytest.raises(errors.ConversionError, match=name):
            save(tmp_path / "a", TINY, weights().items(), other_files={name: b""})


def test_bytes_that_the_disk_changes_are_noticed_before_the_swap(tmp_path, monkeypatch):
    write = tensor_file.write

    def flipped(info, array):
        result = write(info, array)
        if info.name == HEAD:
            write(info, -array)
        return result

    monkeypatch.setattr(tensor_file, "write", flipped)
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
    description = json.loads((saved / MANIFEST).read_text())
    assert set(description["files"]) == set(os.listdir(saved)) - {MANIFEST}
    assert set(description["tensors"]) == set(weights())
    assert description["tensors"][HEAD]["sha256"] == tensor_file.digest(weights()[HEAD])
    assert description["tool"].startswith("mistral-frameworks ")
    assert manifest.write(saved) == description


def test_43_flipped_bit_is_found_and_its_tensor_named(saved):
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
    description = json.loads((saved / MANIFEST).read_text())
    description["files"]["model-00001-of-00002.safetensors"]["size"] += 1
    (saved / MANIFEST).write_text(json.dumps(description))
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
    (saved / MANIFEST).unlink()
    load(saved)
    with pytest.raises(errors.CheckpointNotFoundError, match=MANIFEST):
        load(saved, verify="full")


@pytest.mark.parametrize(
    "text", ["", "[]", "{}", '{"files": {"a": 1}}', '{"files": {"a": {"size": "1", "sha256": ""}}}']
)
def test_malformed_manifests(saved, text):
    (saved / MANIFEST).write_text(text)
    with pytest.raises(errors.CorruptCheckpointError):
        load(saved)


def test_manifest_cannot_point_outside(saved):
    (saved / MANIFEST).write_text('{"files": {"../x": {"size": 1, "sha256": ""}}}')
    with pytest.raises(errors.UnsafeFileError):
        load(saved)


def test_no_framework_is_imported():
    code = (
        "import sys, mistral_core.weights.checkpoint, mistral_core.hub.download;"
        "print(*{'torch', 'jax', 'tensorflow', 'huggingface_hub'} & set(sys.modules))"
    )
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=600, check=True)
    assert result.stdout.strip() == ""


def test_loading_is_quiet(tmp_path):
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        save(tmp_path / "a", TINY, weights().items())
        for _ in load(tmp_path / "a", dtype="float16")[1]:
            pass
