"""Checkpoints: hostile indexes, matching to a class, casts."""

import json
import os
from pathlib import Path

import ml_dtypes
import numpy as np
import pytest
import safetensors.numpy

from mistral_core import TINY, errors
from mistral_core.disk.into import MANIFEST
from mistral_core.parameters import BASE_PREFIX, HEADS, initial_value, parameters
from mistral_core.weights import contents
from mistral_core.weights.checkpoint import Checkpoint, load, save
from mistral_core.weights.containers import shards
from mistral_core.weights.containers.safetensors import SafetensorsFile
from mistral_core.weights.loading import cast, load_pretrained

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


def test_tensors_come_in_the_order_of_the_files(tmp_path):
    save(tmp_path, TINY, weights().items(), max_shard_size="100KB")
    opened = Checkpoint.open(tmp_path)
    _, stream = load(tmp_path)
    places = [opened.place(name) for name, _ in stream]
    assert len({file for file, _ in places}) > 1
    assert places == sorted(places)


def test_arrays_begin_where_frameworks_take_them_over(tmp_path):
    save(tmp_path, TINY, weights().items())
    _, stream = load(tmp_path)
    assert {array.ctypes.data % 64 for _, array in stream} == {0}


@pytest.mark.skipif(not hasattr(os, "posix_fadvise"), reason="macOS keeps what it likes")
@pytest.mark.parametrize("room", [False, True])
def test_the_system_keeps_no_copy_for_which_there_is_no_room(tmp_path, monkeypatch, room):
    save(tmp_path, TINY, weights().items())
    size = sum(array.nbytes for array in weights().values())
    monkeypatch.setattr(contents, "memory", lambda: 2 * size if room else 2 * size - 2)
    forgotten = []
    monkeypatch.setattr(os, "posix_fadvise", lambda *arguments: forgotten.append(arguments[1:]))
    assert_same(load(tmp_path)[1], weights())
    infos = [] if room else Checkpoint.open(tmp_path).tensors.values()
    assert sorted(forgotten) == sorted((info.start, info.nbytes, os.POSIX_FADV_DONTNEED) for info in infos)


def foreign(directory: Path, tensors, config=TINY, **changes) -> Path:
    """A checkpoint as others write it: with the safetensors library and without a manifest."""
    directory.mkdir(exist_ok=True)
    safetensors.numpy.save_file(dict(tensors), directory / "model.safetensors", metadata={"format": "pt"})
    config.replace(**changes).save_pretrained(directory)
    return directory


# Directories and indexes


@pytest.fixture
def sharded(tmp_path) -> Path:
    save(tmp_path / "sharded", TINY, weights().items(), max_shard_size=20_000)
    (tmp_path / "sharded" / MANIFEST).unlink()
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
        (lambda i: i["weight_map"].update(x="f.bin"), errors.UnsafeFileError, "does not end with .safetensors"),
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


def test_51_single_file_beside_an_index(tmp_path, sharded):
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


def test_38_and_41_unexpected_are_all_listed_and_escaped(tmp_path):
    tensors = {**weights(), "z\x1b": np.ones(1, BF16), "model.y": np.ones(1, BF16)}
    kind, text = mismatch(foreign(tmp_path / "a", tensors))
    assert kind is errors.UnexpectedTensorsError
    assert "2 unexpected: 'model.y', 'z\\x1b'" in text


def test_36_misshapen_are_all_listed(tmp_path):
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


def test_22_config_of_another_size_is_a_shape_mismatch_before_anything_is_read(tmp_path, monkeypatch):
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


def test_nan_and_infinity_come_as_stored(tmp_path):
    tensors = weights()
    tensors["model.norm.weight"].view(np.uint16)[2] = 0x7F81  # a signalling NaN
    tensors[HEAD][1, 3] = np.inf
    assert_same(load(foreign(tmp_path / "a", tensors))[1], tensors)


def test_a_cast_keeps_of_a_nan_what_fits(tmp_path):
    tensors = weights(dtype=np.float32)
    tensors["model.norm.weight"].view(np.uint32)[:2] = 0x7FA50001, 0xFFC10000
    loaded = dict(load(foreign(tmp_path / "a", tensors), dtype="bfloat16")[1])
    assert loaded["model.norm.weight"].view(np.uint16)[:2].tolist() == [0x7FA5, 0xFFC1]


@pytest.mark.parametrize("shards", [1, 3])
def test_each_header_is_read_once(tmp_path, monkeypatch, shards):
    """From what is downloaded and which format it is to the last tensor, a file is understood once."""
    arrays = weights()
    size = sum(array.nbytes for array in arrays.values())
    save(tmp_path / "a", TINY, arrays.items(), max_shard_size=10 * size if shards == 1 else size // 2)
    read = []
    init = SafetensorsFile.__init__

    def counted(self, path):
        read.append(path.name)
        init(self, path)

    monkeypatch.setattr(SafetensorsFile, "__init__", counted)
    loaded = load_pretrained(tmp_path / "a", "MistralForCausalLM")
    assert len(dict(loaded.tensors)) == len(arrays)
    assert sorted(read) == sorted(path.name for path in (tmp_path / "a").glob("*.safetensors"))
    assert len(read) >= shards


@pytest.mark.filterwarnings("ignore:.*not used by")
@pytest.mark.parametrize("dtype", [None, "float32"])
def test_a_part_of_a_weight_is_the_whole_cut(tmp_path, dtype):
    """Of stored tensors and of a new head alike, cast or as they are."""
    save(tmp_path / "a", TINY, weights().items())
    with pytest.warns(UserWarning, match="initialised"):
        loaded = load_pretrained(tmp_path / "a", SEQUENCE, dtype=dtype)
    seen = []
    for weight in loaded.weights:
        whole, index = weight.read(), (slice(1, 2),)
        seen.append(weight.name)
        assert whole.shape == weight.shape
        assert bits(weight.read(index)) == bits(whole[index])
        assert weight.read(index).dtype == np.dtype(dtype or "bfloat16")
    assert "score.weight" in seen
