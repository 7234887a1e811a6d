"""Orbax without jax: our trees and Orbax's own, read and written to the last bit, and all that can be wrong."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from crossed import crossed
from samples import CAUSAL, CONFIGS, any_bits, assert_same, bits, read, write

from mistral_core import TINY, MistralConfig, errors
from mistral_core.parameters import HEADS
from mistral_core.weights import checkpoint, formats, manifest
from mistral_core.weights.containers.zarr import tree as zarr_tree
from mistral_core.weights.opening import Checkpoint

FOREIGN = Path(__file__).parents[1] / "data" / "foreign"
sys.path.append(str(FOREIGN))
import make_orbax  # noqa: E402

WRITTEN_BY_ORBAX = ("flat", "nested", "stacked", "stacked3")


@pytest.fixture(scope="module")
def once(tmp_path_factory) -> Path:
    return write(tmp_path_factory.mktemp("orbax") / "model", "orbax", any_bits())


@pytest.fixture
def written(once, tmp_path) -> Path:
    return shutil.copytree(once, tmp_path / "model")


@pytest.fixture
def foreign(tmp_path):
    return lambda name: shutil.copytree(FOREIGN / "orbax" / name, tmp_path / name)


def raises(error: type, path: Path, *parts: str) -> None:
    """Opening and reading a path raises exactly this error, which names the path and the parts."""
    with pytest.raises(errors.MistralError) as caught:
        read(path, "orbax")
    assert type(caught.value) is error, caught.value
    assert all(part in str(caught.value) for part in (path.name, *parts)), caught.value


def edited(path: Path, change) -> None:
    data = json.loads(path.read_bytes())
    change(data)
    path.write_text(json.dumps(data))


# Round trips


@pytest.mark.parametrize(("name", "dtype"), crossed(CONFIGS, "bfloat16", "float32", "float16", "float64"))
def test_every_bit_comes_back(tmp_path, name, dtype):
    config = CONFIGS[name]
    arrays = any_bits(config, dtype)
    path = write(tmp_path / "model", "orbax", arrays, config)
    assert formats.detect(path) == formats.detect(path / "params") == ["orbax"]
    for place in (path, path / "params"):
        assert_same(read(place), arrays)
        found = Checkpoint.open(place).config
        assert found.replace(architectures=None, dtype=None) == config.replace(dtype=None)


@pytest.mark.parametrize("architecture", HEADS)
def test_every_class(tmp_path, architecture):
    arrays = any_bits(architecture=architecture)
    path = write(tmp_path / "model", "orbax", arrays, architecture=architecture)
    assert_same(read(path), arrays)
    config, stream = checkpoint.load(path, architecture)
    assert config.architectures == (architecture,)
    assert_same(dict(stream), arrays)


def test_texts_travel_along(tmp_path):
    path = write(tmp_path / "model", "orbax", any_bits(), texts={"tokenizer.json": b"{}", "LICENSE": b"free"})
    assert {name: text() for name, text in Checkpoint.open(path / "params").texts.items()} == {
        "tokenizer.json": b"{}",
        "LICENSE": b"free",
    }


def test_no_jax_is_needed(once):
    code = (
        f"from mistral_core.weights.opening import Checkpoint; import sys\n"
        f"c = Checkpoint.open({str(once)!r}); [c.read(name) for name in c.tensors]\n"
        "print(*{name.partition('.')[0] for name in sys.modules} & {'jax', 'orbax', 'flax'})"
    )
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert not run.stdout.strip()


def test_plain_chunks_are_read_without_tensorstore_and_give_the_same_bits(written, monkeypatch):
    opened = Checkpoint.open(written)
    found = {name: bits(opened.read(name)) for name in opened.tensors}
    with monkeypatch.context() as patched:
        patched.setattr(zarr_tree.ZarrTree, "_result", None)  # where tensorstore is waited for
        assert {name: bits(opened.read(name)) for name in opened.tensors} == found
    monkeypatch.setattr(zarr_tree.ZarrTree, "_plain", lambda *_: None)
    assert {name: bits(opened.read(name)) for name in opened.tensors} == found


# The library's own


@pytest.mark.parametrize("name", WRITTEN_BY_ORBAX)
def test_what_orbax_wrote_is_read(name):
    path = FOREIGN / "orbax" / name
    assert formats.detect(path) == ["orbax"]
    assert_same(read(path), make_orbax.weights())
    config, stream = checkpoint.load(path)
    assert config == MistralConfig.from_pretrained(path)
    assert_same(dict(stream), make_orbax.weights())


@pytest.fixture(scope="module")
def ocp():
    pytest.importorskip("jax")
    return pytest.importorskip("orbax.checkpoint")


@pytest.mark.parametrize("target", [False, True])
@pytest.mark.parametrize("checkpointer", ["StandardCheckpointer", "PyTreeCheckpointer"])
def test_orbax_restores_what_is_written(once, ocp, checkpointer, target):
    import jax

    expected = any_bits()
    arguments = ()
    if target and checkpointer == "StandardCheckpointer":
        place = jax.sharding.SingleDeviceSharding(jax.devices("cpu")[0])
        arguments = ({n: jax.ShapeDtypeStruct(a.shape, a.dtype, sharding=place) for n, a in expected.items()},)
    restored = getattr(ocp, checkpointer)().restore(once / "params", *arguments)
    assert not arguments or all(isinstance(array, jax.Array) for array in restored.values())
    assert_same({name: np.asarray(array) for name, array in restored.items()}, expected)


@pytest.mark.parametrize("kind", ["params", "state", "pure", "scanned state", "scanned params", "bare"])
def test_every_tree_of_our_flax_models(tmp_path, ocp, kind):
    nnx = pytest.importorskip("flax.nnx")
    import mistral_flax
    from mistral_flax.scan import scan_layers

    model = (mistral_flax.MistralModel if kind == "bare" else mistral_flax.MistralForCausalLM)(TINY)
    expected = {name: np.array(array) for name, array in model.named_arrays()}
    if "scanned" in kind:
        scan_layers(model)
    state = nnx.state(model, nnx.Param)
    tree = {"pure": nnx.to_pure_dict(state), "state": state, "scanned state": state, "bare": state}.get(kind)
    checkpointer = ocp.StandardCheckpointer()
    checkpointer.save(tmp_path / "params", tree or model.params)
    checkpointer.wait_until_finished()
    TINY.save_pretrained(tmp_path)
    _, stream = checkpoint.load(tmp_path, model.architecture)
    assert_same(dict(stream), expected)


# 61: what is wrong


def test_61_an_unfinished_directory(written):
    unfinished = (written / "params").rename(written / "params.orbax-checkpoint-tmp-17")
    raises(errors.CorruptCheckpointError, written, "never finished", "save it again")
    raises(errors.CorruptCheckpointError, unfinished, "never finished")


def test_61_no_description(written):
    (written / "params" / "_METADATA").unlink()
    raises(errors.CheckpointNotFoundError, written, "_METADATA")
    shutil.rmtree(written / "params")
    raises(errors.CheckpointNotFoundError, written, "params/_METADATA")


def test_61_no_database(foreign):
    path = foreign("flat")
    (path / "params" / "manifest.ocdbt").unlink()
    raises(errors.CorruptCheckpointError, path, "manifest.ocdbt is not there")


@pytest.mark.parametrize("part", ["ocdbt.process_0", "d"])
def test_61_a_part_of_the_database_is_missing(tmp_path, ocp, part):
    tree = {"big": np.arange(10**5, dtype=np.float32)}  # smaller ones lie in the root itself
    ocp.PyTreeCheckpointer().save(tmp_path / "params", tree)
    shutil.rmtree(tmp_path / "params" / part)
    tensors = "missing here"
    with pytest.raises(errors.CorruptCheckpointError, match="'big' cannot be read"):
        tensors = zarr_tree.ZarrTree(tmp_path / "params").read("big")
    assert tensors == "missing here"


@pytest.mark.parametrize("name", [".zarray", "0.0"])
def test_61_a_missing_file_is_not_read_as_zeros(written, name):
    (written / "params" / "lm_head.weight" / name).unlink()
    raises(errors.CorruptCheckpointError, written, "lm_head.weight", "copy or download it again")


def test_61_truncated_numbers(written):
    os.truncate(written / "params" / "lm_head.weight" / "0.0", 100)
    raises(errors.CorruptCheckpointError, written, "lm_head.weight")


def test_61_a_flipped_bit_is_found_by_the_manifest(written):
    file = written / "params" / "lm_head.weight" / "0.0"
    data = bytearray(file.read_bytes())
    data[1000] ^= 4
    file.write_bytes(data)
    with pytest.raises(errors.ChecksumMismatchError, match="lm_head.weight"):
        manifest.verify(written)


@pytest.mark.parametrize(
    "tree",
    [[], {}, {"tree_metadata": 5}, {"tree_metadata": {"a": {}}}, {"tree_metadata": {"a": {"key_metadata": [1]}}}],
)
def test_61_descriptions_that_describe_nothing(written, tree):
    (written / "params" / "_METADATA").write_text(json.dumps(tree))
    raises(errors.CorruptCheckpointError, written, "_METADATA")


def entry(name: str) -> dict:
    return {
        "key_metadata": [{"key": name, "key_type": 2}],
        "value_metadata": {"value_type": "np.ndarray", "skip_deserialize": False},
    }


@pytest.mark.parametrize("name", ["../../secret", "/etc", "a/b", "C:\\x", "..", "a\0", "x" * 300])
def test_61_names_are_no_paths(written, name):
    edited(written / "params" / "_METADATA", lambda data: data["tree_metadata"].update(x=entry(name)))
    raises(errors.UnsafeFileError, written, "not a bare file name")


def test_61_a_name_that_stands_there_twice(written):
    edited(written / "params" / "_METADATA", lambda data: data["tree_metadata"].update(x=entry("lm_head.weight")))
    raises(errors.CorruptCheckpointError, written, "twice")


def test_61_too_many_arrays(written):
    many = {str(i): entry(f"a{i}") for i in range(zarr_tree.MAX_TENSORS + 1)}
    edited(written / "params" / "_METADATA", lambda data: data["tree_metadata"].update(many))
    raises(errors.LimitExceededError, written, "20031 arrays")


def test_61_another_tree(written):
    edited(written / "params" / "_METADATA", lambda data: data["tree_metadata"].update(x=entry("other")))
    shutil.copytree(written / "params" / "lm_head.weight", written / "params" / "other")
    with pytest.raises(errors.UnexpectedTensorsError, match="1 unexpected: 'other'"):
        checkpoint.load(written, verify="off")
    with pytest.raises(errors.UnexpectedTensorsError, match="no place for 'other'"):
        Checkpoint.open(written).read("other")
    edited(written / "params" / "_METADATA", lambda data: data.update(tree_metadata={"x": entry("other")}))
    with pytest.raises(errors.TensorMismatchError, match="missing"):
        checkpoint.load(written, verify="off")


def test_61_a_shape_that_the_config_does_not_have_is_never_allocated(written):
    edited(written / "params" / "lm_head.weight" / ".zarray", lambda data: data.update(shape=[1 << 40, 48]))
    with pytest.raises(errors.ShapeMismatchError, match=r"lm_head.weight is \[1099511627776, 48\]"):
        checkpoint.load(written, verify="off")
    raises(errors.ShapeMismatchError, written, "lm_head.weight")


def test_61_chunks_larger_than_the_array(written):
    edited(written / "params" / "lm_head.weight" / ".zarray", lambda data: data.update(chunks=[1 << 40, 48]))
    raises(errors.CorruptCheckpointError, written, "larger than its shape")


def test_61_a_stack_of_too_many_layers(foreign):
    path = foreign("stacked")
    array = path / "params" / "model.layers.input_layernorm.weight" / ".zarray"
    edited(array, lambda data: data.update(shape=[1 << 40, 8]))
    raises(errors.LimitExceededError, path, "layers; at most")


def test_35_integers_are_no_weights(written):
    edited(written / "params" / "lm_head.weight" / ".zarray", lambda data: data.update(dtype="<i2"))
    with pytest.raises(errors.DtypeMismatchError, match="lm_head.weight is int16"):
        checkpoint.load(written, verify="off")


@pytest.mark.parametrize("kind", ["pipe", "linked directory", "dangling link"])
def test_49_only_files_and_directories(written, tmp_path, kind):
    place = written / "params" / "x"
    if kind == "pipe":
        os.mkfifo(place)
    else:
        place.symlink_to(tmp_path if kind == "linked directory" else tmp_path / "absent")
    raises(errors.UnsafeFileError, written)


def test_50_a_file_that_changes_while_it_is_read(written):
    opened = Checkpoint.open(written)
    os.utime(written / "params" / "lm_head.weight" / "0.0", (1, 1))
    with pytest.raises(errors.CorruptCheckpointError, match="changed while it was read"):
        opened.read("model.norm.weight")
    with pytest.raises(errors.CorruptCheckpointError, match="changed while it was read"):
        opened.check_unchanged()


def test_without_the_library(once, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "tensorstore", None)
    with pytest.raises(errors.MissingExtraError, match=r"mistral-frameworks\[orbax\]"):
        read(once)
    with pytest.raises(errors.MissingExtraError, match=r"mistral-frameworks\[orbax\]"):
        write(tmp_path / "model", "orbax", any_bits())
    assert not list((tmp_path / "model").iterdir())


@pytest.mark.sweep
@pytest.mark.parametrize("name", WRITTEN_BY_ORBAX)
def test_a_changed_byte_gives_the_same_numbers_or_an_error_of_ours(foreign, name):
    path = foreign(name)
    expected = {tensor: bits(array) for tensor, array in read(path).items()}
    for file in sorted(each for each in (path / "params").rglob("*") if each.is_file()):
        data = file.read_bytes()
        for position in range(len(file.name), len(data), 307):
            for changed in (data[position] ^ 0x10).to_bytes(1), b"", data[position : position + 1] * 2:
                file.write_bytes(data[:position] + changed + data[position + 1 :])
                try:
                    found = {tensor: bits(array) for tensor, array in read(path, "orbax").items()}
                except errors.MistralError:
                    continue
                assert found == expected or file.name[0].isdigit()  # raw numbers: only a manifest could tell
        file.write_bytes(data)


def test_one_class_is_named_by_its_config(written):
    assert Checkpoint.open(written).config.architectures == (CAUSAL,)
