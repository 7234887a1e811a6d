"""The text part of a model that also sees: read by the table's names, while nothing else of the files is touched."""

from __future__ import annotations

import json
import os
import warnings

import ml_dtypes
import numpy as np
import pytest
from samples import any_bits, assert_same, bits, store, stored
from wholes import (
    CONFIG,
    NESTINGS,
    RAW_VISION,
    VISION,
    VISION_ENCODER,
    in_shards,
    text,
    write,
    write_raw,
)

from mistral_core import MistralConfig, errors
from mistral_core.cli.info import describe
from mistral_core.parameters import parameters
from mistral_core.weights import formats, layouts, towers
from mistral_core.weights.checkpoint import load
from mistral_core.weights.loading import load_pretrained
from mistral_core.weights.opening import Checkpoint

TIED = CONFIG.replace(tie_word_embeddings=True)
FP8 = np.dtype(ml_dtypes.float8_e4m3fn)
random = np.random.Generator(np.random.PCG64(2))


@pytest.fixture
def quiet():
    """Every warning is an error."""
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        yield


def loaded(path, architecture="MistralForCausalLM"):
    """What loading gives, without the warning of what is left out."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        config, tensors = load(path, architecture)
        return config, dict(tensors)


# Names


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("nesting", NESTINGS)
def test_every_nesting_has_the_names_of_the_table(tmp_path, quiet, nesting, tied):
    nesting, config = NESTINGS[nesting], TIED if tied else CONFIG
    expected = write(tmp_path, config, nesting)
    checkpoint = Checkpoint.open(tmp_path)
    assert_same({name: checkpoint.read(name) for name in checkpoint.tensors}, expected)
    assert {name: tensor.name for name, tensor in checkpoint.tensors.items()} == {
        name: nesting.text(name) for name in expected
    }
    assert set(checkpoint.skipped) == {nesting.vision + name for name in VISION}
    assert checkpoint.config.tie_word_embeddings is tied
    bare = nesting.architecture == "Mistral3Model"
    assert checkpoint.config.architectures == ("MistralModel" if bare else "MistralForCausalLM",)
    assert_same(loaded(tmp_path, checkpoint.config.architectures[0])[1], expected)


@pytest.mark.parametrize("instead", [None, "", "model.model."])
@pytest.mark.parametrize("prefix", towers.WHOLES["hf"].text)
def test_a_prefix_stripped_wrongly_is_found(tmp_path, monkeypatch, prefix, instead):
    """Planted errors, each seen in the names of some nesting: a prefix that stays, one stripped whole, one replaced."""
    whole = towers.WHOLES["hf"]
    text = {before: after for before, after in {**whole.text, prefix: instead}.items() if after is not None}
    monkeypatch.setitem(towers.WHOLES, "hf", whole._replace(text=text))
    right = []
    for number, nesting in enumerate(NESTINGS.values()):
        expected = write(tmp_path / str(number), CONFIG, nesting)
        try:
            right.append(set(Checkpoint.open(tmp_path / str(number)).tensors) == set(expected))
        except errors.MistralError:
            right.append(False)
    assert not all(right)


@pytest.mark.parametrize("skipped_first", [True, False])
def test_raw_names(tmp_path, quiet, skipped_first):
    """The format is told by the names in a file of any name, whichever stands first."""
    expected = write_raw(tmp_path)
    if not skipped_first:
        tensors = stored(tmp_path / "consolidated.safetensors")
        store(tmp_path / "consolidated.safetensors", dict(reversed(tensors.items())))
    (tmp_path / "consolidated.safetensors").rename(tmp_path / "another.safetensors")
    assert formats.detect(tmp_path / "another.safetensors") == ["raw"]
    checkpoint = Checkpoint.open(tmp_path / "another.safetensors")
    assert (checkpoint.format, set(checkpoint.skipped)) == ("raw", set(RAW_VISION))
    assert_same({name: checkpoint.read(name) for name in checkpoint.tensors}, expected)


def test_the_warning_names_what_is_not_read_once(tmp_path):
    write(tmp_path)
    with warnings.catch_warnings(record=True) as told:
        warnings.simplefilter("always")
        load_pretrained(tmp_path, "MistralForCausalLM")
    (message,) = (str(each.message) for each in told)
    left_out = "5 tensors of vision_tower, multi_modal_projector are not read"
    assert message == f"{tmp_path}: {left_out}: this is the text part of a model that also sees."


def test_without_other_towers_there_is_nothing_to_tell(tmp_path, quiet):
    """A text part that was saved alone keeps what the config said of the whole."""
    expected = write(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    store(tmp_path / "model.safetensors", expected)
    assert load_pretrained(tmp_path, "MistralForCausalLM").config.extra["mistral3"]["vision_config"]
    assert not Checkpoint.open(tmp_path).skipped
    assert config["model_type"] == "mistral3"


@pytest.mark.parametrize("nesting", NESTINGS)
def test_a_plain_mistral_has_no_towers(tmp_path, nesting):
    write(tmp_path, CONFIG, NESTINGS[nesting])
    (tmp_path / "config.json").write_text(json.dumps(CONFIG.to_dict()))
    with pytest.raises(errors.TensorMismatchError, match="vision_tower"):
        loaded(tmp_path)


def test_a_plain_mistral_has_no_towers_in_raw(tmp_path):
    write_raw(tmp_path, vision_encoder=None)
    with pytest.raises(errors.UnexpectedTensorsError, match="vision_encoder"):
        loaded(tmp_path)


def test_files_without_a_config_are_opened_as_they_are(tmp_path):
    write(tmp_path)
    (tmp_path / "config.json").unlink()
    assert set(VISION) < set(Checkpoint.open(tmp_path).tensors)


def test_one_tensor_by_two_names_is_refused(tmp_path):
    arrays = {NESTINGS["as transformers writes it"].text(name): each for name, each in any_bits(CONFIG).items()}
    write(tmp_path, tensors={**arrays, "model.language_model.norm.weight": arrays["language_model.model.norm.weight"]})
    with pytest.raises(errors.CorruptCheckpointError, match=r"language_model\.norm\.weight.* are one tensor"):
        Checkpoint.open(tmp_path)


# Ties


@pytest.mark.parametrize(
    ("of_text", "of_whole", "head", "expected"),
    [
        (None, None, False, True),
        (None, None, True, False),
        (None, True, False, True),
        (False, True, True, False),
        (True, None, False, True),
    ],
)
def test_whether_the_head_is_tied(tmp_path, of_text, of_whole, head, expected):
    """What transformers 5 writes into a whole is its default; a file that says nothing and has no head is tied."""
    config = {key: value for key, value in CONFIG.to_dict().items() if key != "tie_word_embeddings"}
    if of_text is not None:
        config["tie_word_embeddings"] = of_text
    nesting = NESTINGS["as transformers writes it"]
    arrays = any_bits(CONFIG if head else TIED)
    named = {nesting.text(name): each for name, each in arrays.items()}
    write(tmp_path, tensors=named, text_config=config, tie_word_embeddings=of_whole)
    config, tensors = loaded(tmp_path)
    assert config.tie_word_embeddings is expected
    assert_same(tensors, arrays)


def test_a_missing_head_is_missed_where_the_config_says_untied(tmp_path):
    nesting = NESTINGS["as transformers writes it"]
    write(tmp_path, tensors={nesting.text(name): each for name, each in any_bits(TIED).items()})
    with pytest.raises(errors.MissingTensorsError, match=r"lm_head\.weight"):
        loaded(tmp_path)


# What is read of the files


class Spy:
    """The ranges of bytes that are read by any of the system's calls, by inode."""

    def __init__(self, monkeypatch):
        self.ranges = []
        for name in ("pread", "preadv", "read"):
            monkeypatch.setattr(os, name, self._watched(name, getattr(os, name)))

    def _watched(self, name, real):
        def call(descriptor, what, offset=None, *more):
            start = os.lseek(descriptor, 0, os.SEEK_CUR) if offset is None else offset
            found = real(descriptor, what) if offset is None else real(descriptor, what, offset, *more)
            size = found if isinstance(found, int) else len(found)
            self.ranges.append((os.fstat(descriptor).st_ino, start, start + size))
            return found

        return call

    def touched(self, tensor):
        inode, end = os.stat(tensor.file).st_ino, tensor.start + tensor.nbytes
        return any(file == inode and start < end and stop > tensor.start for file, start, stop in self.ranges)


@pytest.mark.parametrize("groups", ["one file", "a shard of its own"])
def test_no_byte_of_the_other_towers_is_read(tmp_path, monkeypatch, groups):
    expected = write(tmp_path)
    if groups == "a shard of its own":
        in_shards(tmp_path, [[f"language_model.{name}" for name in expected], VISION])
    spy = Spy(monkeypatch)
    assert_same(loaded(tmp_path)[1], expected)
    checkpoint = Checkpoint.open(tmp_path)
    assert sorted(checkpoint.skipped) == sorted(VISION)
    assert [name for name, tensor in checkpoint.skipped.items() if spy.touched(tensor)] == []
    assert all(spy.touched(tensor) for tensor in checkpoint.tensors.values())
    for name, tensor in checkpoint.skipped.items():  # they can be read all the same
        assert bits(tensor.load(None, True)) == bits(VISION[name])
        assert spy.touched(tensor)


# FP8


def packed(shape, block, scale_dtype):
    """A matrix of every kind of eight-bit float but NaN, its scales, and their product in float64."""
    values = random.integers(0, 256, shape).astype(np.uint8)
    values[values & 0x7F == 0x7F] = 0x38
    down, across = (1, 1) if block is None else (-(-shape[0] // block[0]), -(-shape[1] // block[1]))
    scales = random.uniform(1e-3, 2e-3, (down, across)).astype(scale_dtype)
    high, wide = shape if block is None else block
    spread = np.array([[scales[i // high, j // wide] for j in range(shape[1])] for i in range(shape[0])])
    product = values.view(FP8).astype(np.float64) * spread.astype(np.float64)
    return values.view(FP8), scales[0, 0] if block is None else scales, product


def write_fp8(directory, block, scale_dtype, config, **more):
    """A whole with packed layers, and more tensors; gives the matrices in float64."""
    named, expected = dict(more), {}
    for name, array in any_bits(config).items():
        stored_as = f"language_model.{name}"
        if "_proj" not in name:
            named[stored_as] = array
            continue
        weight, scales, expected[name] = packed(array.shape, block, scale_dtype)
        base = stored_as.removesuffix("weight")
        named |= {stored_as: weight, f"{base}weight_scale_inv": scales, f"{base}activation_scale": np.float32(0.5)}
    kept = ["model.vision_tower", "model.multi_modal_projector", "lm_head"]
    quantization = {
        "activation_scheme": "static",
        "dequantize": False,
        "modules_to_not_convert": kept + kept,
        "quant_method": "fp8",
        "weight_block_size": block,
    }
    write(directory, config, tensors=named, quantization_config=quantization)
    return expected


WIDE = CONFIG.replace(num_hidden_layers=1, hidden_size=144, intermediate_size=272)


@pytest.mark.parametrize(("scale_dtype", "dtype"), [(ml_dtypes.bfloat16, "bfloat16"), (np.float32, "float32")])
@pytest.mark.parametrize("block", [None, [128, 128]], ids=str)
def test_fp8_as_it_is_published(tmp_path, quiet, block, scale_dtype, dtype):
    config = WIDE.replace(dtype=dtype)
    expected = write_fp8(tmp_path, block, np.dtype(scale_dtype), config)
    checkpoint = Checkpoint.open(tmp_path)
    assert set(checkpoint.tensors) == {name for name, _ in parameters(config)}
    assert checkpoint.losses == ("dequantised from FP8",)
    for name, product in expected.items():
        assert bits(checkpoint.read(name)) == bits(product.astype(np.float32).astype(dtype)), name
    assert sorted(checkpoint.skipped) == sorted(VISION)
    assert all(bits(tensor.load(None, True)) == bits(VISION[name]) for name, tensor in checkpoint.skipped.items())


def test_what_another_tower_is_packed_by_is_nobodys(tmp_path, quiet):
    """A scale beside numbers that it does not fit is not looked at."""
    more = {"vision_tower.odd.weight": np.zeros((2, 2), np.int8), "vision_tower.odd.weight_scale_inv": np.ones(3)}
    expected = write_fp8(tmp_path, None, np.dtype(np.float32), WIDE, **more)
    checkpoint = Checkpoint.open(tmp_path)
    assert set(checkpoint.skipped) == {*VISION, *more}
    assert {name for name in checkpoint.tensors if checkpoint.packed(name)} == set(expected)


def test_a_packed_matrix_as_the_files_have_it(tmp_path):
    write_fp8(tmp_path, [128, 128], np.dtype(np.float32), WIDE)
    checkpoint, tensors = Checkpoint.open(tmp_path), stored(tmp_path / "model.safetensors")
    name = "model.layers.0.mlp.up_proj.weight"
    found = checkpoint.packed(name)
    assert (found.scheme.label, found.scheme.block, set(found.parts.infos)) == (
        "FP8",
        (128, 128),
        {"weight", "weight_scale_inv"},
    )
    for part, info in found.parts.infos.items():
        array = tensors[f"language_model.{name.removesuffix('weight')}{part}"]
        assert (found.parts.read(part).dtype, info.shape) == (array.dtype, array.shape)
        assert bits(found.parts.read(part)) == bits(array)
    assert found.nbytes == 272 * 144 + 3 * 2 * 4
    assert checkpoint.packed("model.norm.weight") is None
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        weights = {weight.name: weight.matrix() for weight in load_pretrained(tmp_path, "MistralForCausalLM").weights}
    assert {each for each, matrix in weights.items() if matrix is not None} == {
        each for each in weights if "_proj" in each
    }
    assert weights[name].kind == "fp8"
    assert bits(weights[name].codes) == bits(found.parts.read("weight").view(np.uint8))


def test_info_tells_of_packed_matrices_and_other_towers(tmp_path):
    write_fp8(tmp_path / "packed", [128, 128], np.dtype(np.float32), WIDE)
    told = describe(str(tmp_path / "packed"))
    shapes = [row for name, row in Checkpoint.open(tmp_path / "packed").tensors.items() if "_proj" in name]
    size = sum(h * w + 4 * -(-h // 128) * -(-w // 128) for h, w in (row.shape for row in shapes))
    assert told["packed"] == {"scheme": "FP8", "matrices": 7, "bytes": size}
    assert told["not_read"] == {"vision_tower": 3, "multi_modal_projector": 2}
    store(tmp_path / "model.safetensors", any_bits(CONFIG))
    (tmp_path / "config.json").write_text(json.dumps(CONFIG.to_dict()))
    assert not {"packed", "not_read"} & set(describe(str(tmp_path)))


RAW_SCHEMES = {
    "its own words": ({"qformat_weight": "fp8_e4m3", "qscheme_act": "TENSOR"}, "qscale_weight", "qscale_act"),
    "no scales of activations": ({"qformat_weight": "fp8_e4m3", "qscheme_act": "NO_SCALES"}, "qscale_weight", None),
    "the words of Hugging Face": (
        {
            "quant_method": "compressed-tensors",
            "format": "float-quantized",
            "config_groups": {
                "group_0": {"targets": ["Linear"], "weights": {"type": "float", "num_bits": 8, "strategy": "tensor"}}
            },
            "ignore": ["lm_head", "re:vision_encoder.*"],
        },
        "weight_scale",
        "input_scale",
    ),
}


@pytest.mark.parametrize("scheme", RAW_SCHEMES)
def test_raw_fp8(tmp_path, quiet, scheme):
    quantization, scale, of_activations = RAW_SCHEMES[scheme]
    plain = write_raw(tmp_path, dtype="bfloat16", quantization=quantization)
    tensors, expected = stored(tmp_path / "consolidated.safetensors"), {}
    rows = {row.raw.format(name.split(".")[2]): (name, row) for name, row in parameters(CONFIG) if "_proj" in name}
    for raw, (name, row) in rows.items():
        base = raw.removesuffix("weight")
        tensors[raw], tensors[base + scale], product = packed(tensors[raw].shape, None, np.float32)
        if of_activations:
            tensors[base + of_activations] = np.float32(0.5)
        product = product.astype(np.float32).astype(ml_dtypes.bfloat16)
        expected[name] = layouts.to_canonical(product, row, CONFIG, layouts.rotary_pairs(row))
    store(tmp_path / "consolidated.safetensors", tensors)
    checkpoint = Checkpoint.open(tmp_path)
    assert_same({name: checkpoint.read(name) for name in checkpoint.tensors}, {**plain, **expected})
    assert set(checkpoint.skipped) == set(RAW_VISION)


# Pickles, and the whole in transformers


def test_pickles_have_the_same_names(tmp_path):
    torch = pytest.importorskip("torch")
    expected = write(tmp_path)
    tensors = stored(tmp_path / "model.safetensors")
    (tmp_path / "model.safetensors").unlink()
    floats = {name: torch.from_numpy(each.astype(np.float32)) for name, each in tensors.items()}
    torch.save(floats, tmp_path / "pytorch_model.bin")
    found = Checkpoint.open(tmp_path)
    assert (found.format, set(found.skipped)) == ("hf-bin", set(VISION))
    assert_same(loaded(tmp_path)[1], {name: each.astype(np.float32) for name, each in expected.items()})


def test_raw_config_keeps_what_is_said_of_the_encoder(tmp_path):
    write_raw(tmp_path)
    assert MistralConfig.from_pretrained(tmp_path).extra["params.json"]["vision_encoder"] == VISION_ENCODER
    assert text(CONFIG).keys() == loaded(tmp_path)[1].keys()
