"""Packed matrices as they are written: every scheme there and back, the config beside them, and what is refused."""

from __future__ import annotations

import json
import warnings

import ml_dtypes
import numpy as np
import pytest
from samples import any_bits, bits, store

from conformance.weights import random_parameters
from mistral_core import TINY, MistralConfig, errors
from mistral_core.cli import main
from mistral_core.data import TINY_CHECKPOINT
from mistral_core.quantization import request, rounding, schemes, storage
from mistral_core.quantization.matrix import dequantised
from mistral_core.quantization.request import Quantization
from mistral_core.weights import manifest
from mistral_core.weights.convert import convert
from mistral_core.weights.loading import load_pretrained
from mistral_core.weights.opening import Checkpoint
from mistral_core.weights.saving import save

CONFIG = TINY.replace(
    num_hidden_layers=1, hidden_size=128, intermediate_size=384, num_attention_heads=2, num_key_value_heads=1,
    head_dim=64, vocab_size=40, dtype="bfloat16",
)  # fmt: skip
ASKED = {
    "int8": Quantization("int8"),
    "int8 by 32": Quantization("int8", group_size=32),
    "int8 asymmetric": Quantization("int8", symmetric=False, head="int8"),
    "int4 by 128": Quantization("int4"),
    "int4 by 16": Quantization("int4", group_size=16, head="off"),
    "int4 by row": Quantization("int4", group_size=-1),
    "int4 asymmetric": Quantization("int4", group_size=64, symmetric=False),
    "nf4": Quantization("nf4"),
    "nf4 double": Quantization("nf4", group_size=32, double_quant=True),
}


@pytest.fixture(scope="module")
def source(tmp_path_factory):
    """A checkpoint of bfloat16 with a head of its own."""
    directory = tmp_path_factory.mktemp("floats") / "model"
    tensors = random_parameters(CONFIG)
    save(directory, CONFIG, ((name, array.astype(ml_dtypes.bfloat16)) for name, array in tensors.items()))
    return directory


def packed_of(directory):
    """Canonical name -> matrix, of those that are packed."""
    checkpoint = Checkpoint.open(directory)
    found = {name: checkpoint.packed(name) for name in checkpoint.tensors}
    return {name: packed.matrix() for name, packed in found.items() if packed is not None}


@pytest.mark.parametrize("name", ASKED)
def test_there_and_back(tmp_path, source, name):
    """What is written says the same as what was packed; told bytes are the file's; a second copy has equal bytes."""
    asked = ASKED[name].resolved(CONFIG, "MistralForCausalLM")
    report = convert(source, tmp_path / "packed", to="hf", quantization=ASKED[name])
    floats, found = Checkpoint.open(source), packed_of(tmp_path / "packed")
    assert set(found) == set(asked.matrices(CONFIG, "MistralForCausalLM"))
    assert ("lm_head.weight" in found) == (asked.head == "int8")
    for matrix_name, matrix in found.items():
        wanted = asked.quantise(matrix_name, floats.read(matrix_name))
        assert matrix._replace(codes=0, scale=0, zero=0) == wanted._replace(codes=0, scale=0, zero=0)
        pairs = [(matrix.codes, wanted.codes), (matrix.scale, wanted.scale), (matrix.zero, wanted.zero)]
        for stored, made in pairs:
            assert (stored is None) == (made is None or not made.any())
            assert stored is None or (stored.dtype == made.dtype and bits(stored) == bits(made))
    for other in set(floats.tensors) - set(found):
        assert bits(Checkpoint.open(tmp_path / "packed").read(other)) == bits(floats.read(other))
    sizes = [
        info.nbytes for shard in Checkpoint.open(tmp_path / "packed").shards.values() for info in shard.tensors.values()
    ]
    assert sum(sizes) == report.bytes
    manifest.verify(tmp_path / "packed")
    convert(tmp_path / "packed", tmp_path / "again", to="hf")
    first, second = ((tmp_path / each / "model.safetensors").read_bytes() for each in ("packed", "again"))
    assert first == second


@pytest.mark.parametrize("name", ASKED)
def test_what_is_announced_is_what_comes(name):
    """Dtypes and shapes are known before there is a number."""
    asked = ASKED[name]
    matrix = np.random.default_rng(0).standard_normal((33, 128)).astype(ml_dtypes.bfloat16)
    made = asked.quantise("model.layers.0.mlp.up_proj.weight", matrix)
    announced = asked.arrangement("model.layers.0.mlp.up_proj.weight", (33, 128), "bfloat16")
    assert announced == storage.arrangement_of(made)
    parts = storage.parts_of(made, "bfloat16")
    assert storage.specs_of(announced, "bfloat16") == {part: (a.dtype, a.shape) for part, a in parts.items()}


def test_the_config_says_which_matrices_are_packed(tmp_path, source):
    """By the ends of their names where there are two groups, else all but those that are ignored."""
    convert(source, tmp_path / "both", to="hf", quantization="int4")
    told = json.loads((tmp_path / "both" / "config.json").read_text())["quantization_config"]
    groups = told["config_groups"]
    assert told["ignore"] == []
    assert told["quantization_status"] == "compressed"
    assert (
        groups["group_0"]["weights"] | {"num_bits": 4, "strategy": "group", "group_size": 128}
        == groups["group_0"]["weights"]
    )
    assert groups["group_1"]["weights"] | {"num_bits": 8, "strategy": "channel"} == groups["group_1"]["weights"]
    assert groups["group_1"]["targets"] == ["re:.*lm_head$"]
    assert "re:.*q_proj$" in groups["group_0"]["targets"]
    convert(source, tmp_path / "one", to="hf", quantization=Quantization("int4", head="off"))
    told = json.loads((tmp_path / "one" / "config.json").read_text())["quantization_config"]
    assert told["ignore"] == ["lm_head"]
    assert told["config_groups"]["group_0"]["targets"] == ["Linear"]
    convert(source, tmp_path / "nf4", to="hf", quantization="nf4")
    told = json.loads((tmp_path / "nf4" / "config.json").read_text())["quantization_config"]
    assert told["quant_method"] == "bitsandbytes"
    assert told["llm_int8_skip_modules"] == ["lm_head"]
    for directory in ("both", "one", "nf4"):
        MistralConfig.from_pretrained(tmp_path / directory)


def test_kinds_that_no_file_holds_together():
    arrangements = {
        "a.weight": storage.Arrangement("nf4", (8, 64), (1, 64), "float32", True),
        "b.weight": storage.Arrangement("int8", (8, 64), (1, 64), "bfloat16", True),
    }
    with pytest.raises(errors.UnsupportedFeatureError, match="int8 and nf4 cannot stand in one file"):
        storage.config_of(arrangements, list(arrangements), "bfloat16")


def test_floats_hold_integers_times_short_scales_exactly(tmp_path, source):
    """Converting to float32 loses nothing and says so; to bfloat16 it does, and asks; nf4 rounds anyway."""
    convert(source, tmp_path / "int4", to="hf", quantization="int4")
    report = convert(tmp_path / "int4", tmp_path / "wide", to="hf", dtype="float32")
    assert report.moves == {"dequantised exactly": 8}
    assert not report.losses
    found, wide = packed_of(tmp_path / "int4"), Checkpoint.open(tmp_path / "wide")
    for name, matrix in found.items():
        exact = dequantised(matrix).astype(np.float64)
        assert (wide.read(name) == exact).all()
    with pytest.raises(errors.LossyConversionError, match="dequantised from compressed-tensors int"):
        convert(tmp_path / "int4", tmp_path / "narrow", to="hf", dtype="bfloat16")
    with pytest.raises(errors.LossyConversionError, match="dequantised"):
        convert(tmp_path / "int4", tmp_path / "gguf", to="gguf")
    convert(source, tmp_path / "nf4", to="hf", quantization="nf4")
    with pytest.raises(errors.LossyConversionError, match="dequantised from bitsandbytes nf4"):
        convert(tmp_path / "nf4", tmp_path / "wide nf4", to="hf", dtype="float32")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["int4", "nf4", "wide"]


def test_packed_files_are_not_packed_again(tmp_path, source):
    convert(source, tmp_path / "int8", to="hf", quantization="int8")
    with pytest.raises(errors.ConfigError, match=r"packed already \(compressed-tensors int8\)"):
        convert(tmp_path / "int8", tmp_path / "x", to="hf", quantization="int4")
    with pytest.raises(errors.ConfigError, match="packed already"):
        load_pretrained(tmp_path / "int8", "MistralForCausalLM", quantization="int4")
    for options in ({"to": "raw"}, {"to": "hf", "keep_vision": True}):
        with pytest.raises(errors.ConversionError, match="quantization must be None unless to is hf"):
            convert(source, tmp_path / "x", quantization="int4", **options)
    assert not (tmp_path / "x").exists()


def test_a_load_says_what_stays_packed(tmp_path, source):
    convert(source, tmp_path / "int8", to="hf", quantization="int8")
    with pytest.warns(UserWarning, match=r"packed \(compressed-tensors int8\), and kept so; quantization='dequantize'"):
        weights = list(load_pretrained(tmp_path / "int8", "MistralForCausalLM").weights)
    assert sum(weight.matrix() is not None for weight in weights) == 7
    with pytest.warns(UserWarning, match="dequantised from compressed-tensors int8"):
        weights = list(load_pretrained(tmp_path / "int8", "MistralForCausalLM", quantization="dequantize").weights)
    assert all(weight.matrix() is None for weight in weights)


# Bad input


@pytest.mark.parametrize(
    ("given", "match"),
    [
        ({"scheme": "int3"}, "scheme must be one of int8, int4, nf4, got 'int3'"),
        ({"scheme": "int4", "group_size": 0}, "group_size must be a positive integer, -1 or None, got 0"),
        ({"scheme": "int4", "group_size": True}, "group_size must be a positive"),
        ({"scheme": "int4", "head": "int4"}, "head must be one of int8, off, None"),
        ({"scheme": "nf4", "symmetric": False}, "symmetric must be true with nf4"),
        ({"scheme": "nf4", "head": "int8"}, "head must be off with nf4"),
        ({"scheme": "int8", "double_quant": True}, "double_quant must be false with int8"),
        ({"scheme": "int8", "groupsize": 32}, "quantize takes .*, got groupsize"),
        ("gptq", "scheme must be one of"),
        (4, "quantization_config of int is not made here"),
        ({"load_in_4bit": True, "load_in_8bit": True}, "must not both be true"),
        ({"load_in_4bit": True, "bnb_4bit_quant_type": "int4"}, "bnb_4bit_quant_type must be nf4 or fp4"),
        ({"load_in_8bit": True, "llm_int8_skip_modules": ["q_proj"]}, "llm_int8_skip_modules must be None"),
        (
            {"quant_method": "gptq", "bits": 4},
            "quantization_config of 'gptq' is not made here; its nearest scheme is quantization='int4'",
        ),
        ({"quant_method": "quanto"}, "quantization='int8'"),
    ],
)
def test_requests_that_mean_nothing(given, match):
    with pytest.raises(errors.ConfigError, match=match):
        request.of(given)


@pytest.mark.parametrize(
    ("asked", "config", "match"),
    [
        (Quantization("int4", group_size=48), CONFIG, r"128, 384, got 48; these do: 8, 16, 32, 64, 128\."),
        (Quantization("int8", head="int8"), CONFIG.replace(tie_word_embeddings=True), "head is tied to the embedding"),
    ],
)
def test_requests_that_do_not_suit_a_model(tmp_path, source, asked, config, match):
    with pytest.raises(errors.ConfigError, match=match):
        asked.resolved(config, "MistralForCausalLM")


def test_the_default_group_is_the_largest_that_divides():
    """And a tied head stays what it is."""
    of_tiny = Quantization("int4").resolved(TINY, "MistralForCausalLM")
    assert (of_tiny.group_size, of_tiny.head) == (16, "int8")
    tied = CONFIG.replace(tie_word_embeddings=True)
    assert Quantization("int4").resolved(tied, "MistralForCausalLM").head == "off"
    assert Quantization("int4").resolved(CONFIG, "MistralForTokenClassification").head == "off"
    assert Quantization("int4").resolved(CONFIG.replace(intermediate_size=36), "MistralForCausalLM").group_size == -1


@pytest.mark.parametrize("wrong", [np.nan, np.inf])
def test_weights_that_are_no_numbers_are_not_packed(tmp_path, wrong):
    """Nothing is written, on the way of a file and of a model."""
    tensors = {name: array.astype(ml_dtypes.bfloat16) for name, array in random_parameters(CONFIG).items()}
    tensors["model.layers.0.mlp.up_proj.weight"][3, 5] = wrong
    save(tmp_path / "floats", CONFIG, tensors.items())
    with pytest.raises(errors.NonFiniteWeightsError, match=r"model.layers.0.mlp.up_proj.weight"):
        convert(tmp_path / "floats", tmp_path / "packed", to="hf", quantization="int8")
    assert not (tmp_path / "packed").exists()
    with pytest.raises(errors.NonFiniteWeightsError, match=r"up_proj.weight: holds NaN or infinity"):
        [w.matrix() for w in load_pretrained(tmp_path / "floats", "MistralForCausalLM", quantization="nf4").weights]


def damaged(tmp_path, source, quantization, change):
    """A packed checkpoint whose tensors were changed."""
    convert(source, tmp_path / "whole", to="hf", quantization=quantization)
    shard = next(iter(Checkpoint.open(tmp_path / "whole").shards.values()))
    tensors = {name: shard.read_packed(name).copy() for name in shard.tensors}
    change(tensors, "model.layers.0.self_attn.k_proj.")
    directory = tmp_path / "damaged"
    directory.mkdir()
    (directory / "config.json").write_bytes((tmp_path / "whole" / "config.json").read_bytes())
    store(directory / "model.safetensors", tensors)
    return directory


def _set(part, index, value):
    def change(tensors, base):
        tensors[base + part][index] = value

    return change


def _without(part):
    return lambda tensors, base: tensors.pop(base + part)


def _cut(part):
    def change(tensors, base):
        tensors[base + part] = tensors[base + part][:-1]

    return change


@pytest.mark.parametrize(
    ("quantization", "change", "error", "match"),
    [
        ("int8", _set("weight_scale", (0, 0), 0), errors.CorruptCheckpointError, "k_proj.* and not 0, got 0"),
        ("int4", _set("weight_scale", (0, 0), np.nan), errors.CorruptCheckpointError, "and not 0, got nan"),
        ("nf4", _set("weight.absmax", 0, np.inf), errors.CorruptCheckpointError, "finite numbers, got inf"),
        ("int8", _without("weight_scale"), errors.MissingTensorsError, "lacks its weight_scale"),
        ("nf4", _without("weight.absmax"), errors.MissingTensorsError, r"lacks its weight.absmax"),
        ("int4", _cut("weight_scale"), errors.ShapeMismatchError, "weight_scale must be"),
        ("int4", _cut("weight_packed"), errors.TensorMismatchError, "k_proj"),
    ],
)  # fmt: skip
def test_damaged_files(tmp_path, source, quantization, change, error, match):
    directory = damaged(tmp_path, source, quantization, change)
    with warnings.catch_warnings(), pytest.raises((error, errors.CorruptCheckpointError), match=match):
        warnings.simplefilter("ignore")
        for weight in load_pretrained(directory, "MistralForCausalLM").weights:
            weight.matrix()


def test_an_all_zero_matrix_is_packed(tmp_path):
    """Its scale is the least that is no zero, and its numbers are zeros."""
    for kind, group in (("int8", 32), ("int4", 32), ("nf4", 32)):
        zeros = np.zeros((4, 64), np.float32)
        scale, _ = rounding.scales(zeros, kind, group)
        assert (kind == "nf4") == (not scale.any())
        assert not dequantised(rounding.nearest(zeros, kind, group, scale)).any()


def test_groups_that_contradict():
    group = {"targets": ["Linear"], "weights": {"num_bits": 4, "type": "int", "strategy": "group", "group_size": 32}}
    other = {"targets": ["Linear"], "weights": {"num_bits": 8, "type": "int", "strategy": "channel"}}
    config = {
        "quant_method": "compressed-tensors",
        "format": "pack-quantized",
        "config_groups": {"a": group, "b": other},
    }
    with pytest.raises(errors.ConfigError, match="a and b both say how 'Linear' is packed"):
        schemes.read(config, where="config")


def test_several_kinds_of_groups_in_one_file(tmp_path, source):
    """Groups of two formats, as `mixed-precision` says; each matrix shows which it is."""
    convert(source, tmp_path / "int4", to="hf", quantization="int4")
    found = packed_of(tmp_path / "int4")
    assert {name: matrix.kind for name, matrix in found.items()} == {
        name: "int8" if name == "lm_head.weight" else "int4" for name in found
    }
    config = json.loads((tmp_path / "int4" / "config.json").read_text())
    config["quantization_config"]["format"] = "mixed-precision"
    (tmp_path / "int4" / "config.json").write_text(json.dumps(config))
    assert packed_of(tmp_path / "int4").keys() == found.keys()


# The command line


def test_the_command(tmp_path, source, capsys):
    assert (
        main(["quantize", str(source), str(tmp_path / "q"), "--scheme", "int4", "--group-size", "32", "--head", "off"])
        == 0
    )
    assert "packed: 7 int4 by 32" in capsys.readouterr().out
    assert main(["quantize", str(source), str(tmp_path / "q"), "--scheme", "int8"]) == 2
    assert "is there already" in capsys.readouterr().err
    assert main(["quantize", str(source), str(tmp_path / "x"), "--scheme", "int8", "--dry-run", "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["packed"] == {"int8 by row": 7}
    assert not (tmp_path / "x").exists()
    assert main(["info", str(tmp_path / "q")]) == 0
    assert "compressed-tensors int4" in capsys.readouterr().out
    assert main(["verify", str(tmp_path / "q")]) == 0
    assert main(["diff", str(tmp_path / "q"), str(source), "--json"]) == 1


def test_the_command_calibrates_and_reports(tmp_path, capsys):
    """Each text is read once, by one tokenizer of one checkpoint; other codes come of it, and the report's numbers."""
    for name, line in (("seen", "Emma was handsome, clever, and rich. "), ("unseen", "He was a great reader. ")):
        (tmp_path / f"{name}.txt").write_text(line * 200)
    source, plain, made = str(TINY_CHECKPOINT), tmp_path / "plain", tmp_path / "made"
    assert main(["quantize", source, str(plain), "--scheme", "int4"]) == 0
    command = ["quantize", source, str(made), "--scheme", "int4", "--texts", "2", "--json"]
    capsys.readouterr()
    texts = [str(tmp_path / f"{name}.txt") for name in ("seen", "unseen")]
    assert main([*command, "--calibrate", texts[0], "--report", texts[1]]) == 0
    answered, told = capsys.readouterr()
    found = json.loads(answered)
    assert "calibrating on 1024 tokens, whose states take 2.6 MB of memory" in told
    assert found["quality"]["tokens"] == 2 * 511
    nearest = packed_of(plain)
    different = {name for name, matrix in packed_of(made).items() if bits(matrix.codes) != bits(nearest[name].codes)}
    assert different == set(nearest)
    assert len(different) == 35


def test_any_bits_travel(tmp_path):
    """Norms and embeddings keep every bit, NaN payloads among them, beside packed matrices."""
    plain = any_bits(CONFIG)
    random = {name: array.astype(ml_dtypes.bfloat16) for name, array in random_parameters(CONFIG).items()}
    odd = {name: plain[name] if "norm" in name or "embed" in name else array for name, array in random.items()}
    store_config = {**CONFIG.to_dict(), "architectures": ["MistralForCausalLM"]}
    (tmp_path / "odd").mkdir()
    (tmp_path / "odd" / "config.json").write_text(json.dumps(store_config))
    store(tmp_path / "odd" / "model.safetensors", odd)
    convert(tmp_path / "odd", tmp_path / "packed", to="hf", quantization="int8", check_finite=False)
    for name in odd:
        if "norm" in name or "embed" in name:
            assert bits(Checkpoint.open(tmp_path / "packed").read(name)) == bits(odd[name])
