"""MaxText's tree: stacked or not, its divided queries exact where they can be and told of where they cannot."""

import json
import shutil
import sys
from pathlib import Path

import ml_dtypes
import numpy as np
import pytest
from samples import CONFIGS, any_bits, assert_same, bits, read, write

from mistral_core import TINY, errors
from mistral_core.parameters import parameters, shape_of
from mistral_core.weights import checkpoint, formats, manifest
from mistral_core.weights.containers.tensor_file import CODES
from mistral_core.weights.formats import maxtext
from mistral_core.weights.formats.base import Outline
from mistral_core.weights.loading import dtype_of
from mistral_core.weights.opening import Checkpoint
from mistral_core.weights.writing import write_checkpoint

FOREIGN = Path(__file__).parents[1] / "data" / "foreign"
sys.path.append(str(FOREIGN))
import make_orbax  # noqa: E402

DTYPES = ["bfloat16", "float32", "float64"]
QUERY = "model.layers.{}.self_attn.q_proj.weight"
EXACT = {name: config for name, config in CONFIGS.items() if config.head_dim in (4, 16, 64, 256)}
ROUNDED = {name: config for name, config in CONFIGS.items() if name not in EXACT}


def dividable(config=TINY, dtype="bfloat16"):
    """Arbitrary bits, but for queries too small to be divided."""
    arrays = any_bits(config, dtype)
    for layer in range(config.num_hidden_layers):
        query = arrays[QUERY.format(layer)]
        tiny = np.abs(wide(query)) < 1e3 * float(ml_dtypes.finfo(query.dtype).smallest_normal)
        query[tiny & (wide(query) != 0)] = 1
    return arrays


def wide(array):
    with np.errstate(invalid="ignore"):
        return array.astype(np.float64)


def outline_of(arrays, config, **options):
    codes = {name: CODES[array.dtype] for name, array in arrays.items()}
    return Outline(config, "MistralForCausalLM", codes, options=options)


def write_with(directory, arrays, config=TINY, **options):
    directory.mkdir()
    write_checkpoint(directory, "maxtext", outline_of(arrays, config, **options), arrays.items(), limit=1)
    return directory


@pytest.fixture(scope="module")
def once(tmp_path_factory) -> Path:
    return write(tmp_path_factory.mktemp("maxtext") / "model", "maxtext", dividable())


@pytest.fixture
def written(once, tmp_path) -> Path:
    return shutil.copytree(once, tmp_path / "model")


def raises(error: type, path: Path, *parts: str, config=None) -> None:
    with pytest.raises(errors.MistralError) as caught:
        Checkpoint.open(path, format="maxtext", config=config)
    assert type(caught.value) is error, caught.value
    assert all(part in str(caught.value) for part in (path.name, *parts)), caught.value


# Round trips


def test_the_samples_have_both_kinds():
    assert len(EXACT) > 5
    assert len(ROUNDED) > 1


@pytest.mark.parametrize(
    "dtype", [pytest.param(each, marks=[] if each == "bfloat16" else pytest.mark.sweep) for each in DTYPES]
)
@pytest.mark.parametrize("config", EXACT.values(), ids=EXACT)
def test_every_bit_comes_back_where_the_scale_is_a_power_of_two(tmp_path, config, dtype):
    arrays = dividable(config, dtype)
    assert not maxtext.lossy(outline_of(arrays, config))
    path = write(tmp_path / "model", "maxtext", arrays, config)
    for place in (path, path / "0", path / "0" / "items"):
        assert formats.detect(place) == ["maxtext"]
        assert_same(read(place), arrays)
        opened = Checkpoint.open(place)
        assert opened.config.replace(architectures=None, dtype=None) == config.replace(dtype=None)
        assert not opened.losses
    assert_same(read(write_with(tmp_path / "apart", arrays, config, maxtext_scanned="no")), arrays)


@pytest.mark.parametrize("scanned", ["yes", "no"])
def test_layers_are_one_stack_or_trees_of_their_own(tmp_path, scanned):
    path = write_with(tmp_path / "model", dividable(), maxtext_scanned=scanned)
    names = {entry.name for entry in (path / "0" / "items").iterdir()}
    stack = path / "0" / "items" / "params.params.decoder.layers.self_attention.query.kernel"
    assert ("params.params.decoder.layers_1.mlp.wo.kernel" in names) == (scanned == "no")
    assert stack.exists() == (scanned == "yes")
    if scanned == "yes":
        assert json.loads((stack / ".zarray").read_bytes())["shape"] == [48, 3, 6, 16]
        assert sorted(entry.name for entry in stack.iterdir()) == [".zarray", "0.0.0.0", "0.1.0.0", "0.2.0.0"]


@pytest.mark.parametrize("dtype", [*DTYPES, "float16"])
@pytest.mark.parametrize("config", ROUNDED.values(), ids=ROUNDED)
def test_only_queries_are_rounded_and_it_is_said(tmp_path, config, dtype):
    arrays = any_bits(config, dtype)
    queries = {QUERY.format(layer) for layer in range(config.num_hidden_layers)}
    assert set(maxtext.lossy(outline_of(arrays, config))) == queries
    path = write(tmp_path / "model", "maxtext", arrays, config)
    assert "undone by rounding" in Checkpoint.open(path).losses[0]
    found = read(path)
    assert_same({n: a for n, a in found.items() if n not in queries}, {n: arrays[n] for n in set(arrays) - queries})
    for name in queries:
        numbers, kind = wide(arrays[name]), f"u{arrays[name].itemsize}"
        finite = np.isfinite(numbers)
        assert (found[name].view(kind)[~finite] == arrays[name].view(kind)[~finite]).all()
        normal = finite & (np.abs(numbers) > 1e3 * float(ml_dtypes.finfo(dtype).smallest_normal))
        ratio = wide(found[name])[normal] / numbers[normal]
        assert np.abs(ratio[np.isfinite(ratio)] - 1).max() <= 4 * float(ml_dtypes.finfo(dtype).eps)


@pytest.mark.parametrize("dtype", DTYPES)
def test_numbers_too_small_to_be_divided_are_an_error(tmp_path, dtype):
    arrays = any_bits(dtype=dtype)
    with pytest.raises(errors.LossyConversionError, match="q_proj.weight: holds numbers too small to be divided by 4"):
        write_with(tmp_path / "model", arrays)
    found = read(write_with(tmp_path / "allowed", arrays, allow_lossy="yes"))
    different = {name for name in arrays if bits(found[name]) != bits(arrays[name])}
    assert different == {QUERY.format(layer) for layer in range(TINY.num_hidden_layers)}


def test_float16_cannot_divide_its_small_numbers():
    arrays = any_bits(dtype="float16")
    assert set(maxtext.lossy(outline_of(arrays, TINY))) == {QUERY.format(layer) for layer in range(3)}


@pytest.mark.parametrize("dtype", [*DTYPES, "float16"])
@pytest.mark.parametrize("scale", [2.0, 8.0, 128**0.5])
def test_division_is_rounded_once(dtype, scale):
    kind = dtype_of(dtype)
    array = np.random.default_rng(0).standard_normal((1025, 1025)).astype(kind)
    expected = (wide(array) / scale).astype(kind)
    assert maxtext.divided(array, scale).tobytes() == expected.tobytes()
    assert maxtext.multiplied(array, scale).shape == array.shape


@pytest.mark.parametrize(("head_dim", "exact"), [(4, True), (16, True), (64, True), (128, False), (36, False)])
def test_which_scales_are_exact(head_dim, exact):
    """36 has a whole root, and dividing by 6 rounds all the same."""
    config = TINY.replace(head_dim=head_dim)
    outline = Outline(config, "MistralForCausalLM", {name: "BF16" for name, _ in parameters(config)})
    assert (not maxtext.lossy(outline)) == exact


def test_other_classes_have_no_place(tmp_path):
    arrays = any_bits(architecture="MistralForTokenClassification")
    with pytest.raises(errors.UnsupportedFeatureError, match="maxtext"):
        write(tmp_path / "model", "maxtext", arrays, architecture="MistralForTokenClassification")
    assert not list((tmp_path / "model").iterdir())


# The library's own


@pytest.mark.parametrize("name", ["scanned", "layers"])
def test_what_orbax_wrote_of_maxtext_is_read(name):
    path = FOREIGN / "maxtext" / name
    assert formats.detect(path) == formats.detect(path / "0" / "items") == ["maxtext"]
    assert_same(read(path), make_orbax.weights())


def test_a_stack_in_one_chunk_is_read_layer_by_layer_in_any_order():
    opened = Checkpoint.open(FOREIGN / "maxtext" / "scanned")
    for name in reversed(opened.tensors):
        assert bits(opened.read(name)) == bits(make_orbax.weights()[name])


@pytest.mark.parametrize("scanned", ["yes", "no"])
def test_orbax_restores_what_is_written_as_maxtext_asks_it_to(tmp_path, scanned):
    jax = pytest.importorskip("jax")
    ocp = pytest.importorskip("orbax.checkpoint")
    arrays = dividable()
    path = write_with(tmp_path / "model", arrays, maxtext_scanned=scanned)
    place = jax.sharding.SingleDeviceSharding(jax.devices("cpu")[0])
    plain = ocp.PyTreeCheckpointer().restore(path / "0" / "items")
    shapes = jax.tree.map(lambda a: jax.ShapeDtypeStruct(a.shape, a.dtype, sharding=place), plain["params"])
    reader = ocp.Checkpointer(ocp.PyTreeCheckpointHandler(use_ocdbt=True, use_zarr3=True))
    arguments = {"params": ocp.checkpoint_utils.construct_restore_args(shapes)}
    restored = reader.restore(
        path / "0" / "items", item={"params": shapes}, transforms={}, restore_args=arguments
    )["params"]["params"]  # fmt: skip
    for name, row in parameters(TINY):
        *inner, leaf = row.maxtext.format("{}").split("/")
        node, layer = restored, name.split(".")[2] if ".layers." in name else None
        for part in inner:
            node = node["layers" if scanned == "yes" else f"layers_{layer}"] if part == "{}" else node[part]
        found = np.asarray(node[leaf])
        found = found[:, int(layer)] if layer and scanned == "yes" else found
        expected = maxtext.divided(arrays[name], 4.0) if ".q_proj." in name else arrays[name]
        flat = expected.T if expected.ndim == 2 and row.is_linear else expected
        assert found.tobytes() == np.ascontiguousarray(flat).tobytes(), name
        assert found.size == np.prod(shape_of(row, TINY))


def test_a_train_state_is_more_than_parameters(tmp_path):
    """What is not under `params`, an optimizer's numbers for one, is not looked at."""
    ocp = pytest.importorskip("orbax.checkpoint")
    tree = make_orbax.maxtext(make_orbax.weights(), scanned=True)
    tree["opt_state"] = {"mu": np.ones((3, 3), np.float32)}
    ocp.PyTreeCheckpointer().save(tmp_path / "0" / "items", tree)
    (tmp_path / "config.json").write_text(json.dumps(make_orbax.CONFIG))
    assert_same(read(tmp_path), make_orbax.weights())
    bare = tmp_path / "bare"
    ocp.PyTreeCheckpointer().save(bare / "0" / "items", tree["params"]["params"])
    (bare / "config.json").write_text(json.dumps(make_orbax.CONFIG))
    assert_same(read(bare), make_orbax.weights())


# What is wrong


def test_no_config(written):
    (written / "config.json").unlink()
    raises(errors.CheckpointNotFoundError, written, "no config.json", "config=")
    assert_same(
        {n: a for n, a in checkpoint.load(written, config=TINY, verify="off")[1]}, dividable()  # noqa: C416
    )  # fmt: skip


def test_61_steps(written):
    (written / "0" / "items" / "config.json").write_text("{}")
    raises(errors.CheckpointNotFoundError, written / "0" / "items" / "config.json", "0/items/_METADATA", config=TINY)
    (written / "0" / "items" / "config.json").unlink()
    shutil.copytree(written / "0", written / "100")
    raises(errors.ConversionError, written, "0, 100", "one of them")
    assert_same(read(written / "100"), dividable())
    shutil.rmtree(written / "0")
    assert_same(read(written, "maxtext"), dividable())
    (written / "100" / "items").rename(written / "100" / "items.orbax-checkpoint-tmp-1")
    raises(errors.CorruptCheckpointError, written, "never finished")
    shutil.rmtree(written / "100")
    raises(errors.CheckpointNotFoundError, written, "0/items/_METADATA")


def test_61_a_missing_layer_is_not_read_as_zeros(written):
    (written / "0" / "items" / "params.params.decoder.layers.mlp.wi_0.kernel" / "0.1.0").unlink()
    with pytest.raises(errors.CorruptCheckpointError, match="wi_0.kernel"):
        read(written)


def test_61_a_flipped_bit_is_found_by_the_manifest(written):
    file = written / "0" / "items" / "params.params.decoder.layers.mlp.wi_0.kernel" / "0.1.0"
    data = bytearray(file.read_bytes())
    data[-1] ^= 1
    file.write_bytes(data)
    with pytest.raises(errors.ChecksumMismatchError, match=r"layers.1.mlp.gate_proj.weight"):
        manifest.verify(written)


def test_61_another_model(written):
    for config, error in (
        (TINY.replace(num_hidden_layers=2), errors.UnexpectedTensorsError),
        (TINY.replace(num_hidden_layers=4), errors.MissingTensorsError),
        (TINY.replace(num_attention_heads=4, hidden_size=72), errors.ShapeMismatchError),
    ):
        with pytest.raises(error):
            checkpoint.load(written, config=config, verify="off")


def test_61_our_own_tree_is_not_maxtext(tmp_path):
    path = write(tmp_path / "model", "orbax", any_bits())
    with pytest.raises(errors.TensorMismatchError, match="missing"):
        checkpoint.load(shutil.copytree(path / "params", tmp_path / "0" / "items").parents[1], config=TINY)


def test_39_a_head_beside_tied_embeddings_must_be_the_embedding(tmp_path):
    arrays = dividable()
    path = write(tmp_path / "model", "maxtext", arrays)
    tied = TINY.replace(tie_word_embeddings=True)
    with pytest.raises(errors.TensorMismatchError, match="tie_word_embeddings is true"):
        checkpoint.load(path, config=tied)
    arrays["lm_head.weight"] = arrays["model.embed_tokens.weight"]
    path = write(tmp_path / "same", "maxtext", arrays)
    assert "lm_head.weight" not in dict(checkpoint.load(path, config=tied)[1])
