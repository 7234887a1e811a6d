"""Quantised checkpoints against loops written from the definitions, one number at a time."""

from __future__ import annotations

import json
import math
import warnings
from pathlib import Path

import ml_dtypes
import numpy as np
import pytest
from samples import any_bits, bits, store, stored

from mistral_core import TINY, MistralConfig, errors
from mistral_core.config import params_json
from mistral_core.parameters import layer_of, parameters
from mistral_core.quantization.matrix import NF4, dequantised
from mistral_core.weights import layouts
from mistral_core.weights.checkpoint import load
from mistral_core.weights.loading import load_pretrained
from mistral_core.weights.opening import Checkpoint

CONFIG = TINY.replace(num_hidden_layers=1, hidden_size=32, intermediate_size=160, dtype="bfloat16")
ROWS = {name: row for name, row in parameters(CONFIG) if row.kind in ("attention", "mlp")}
random = np.random.default_rng(0)


def write(directory, pack, quantization, config=CONFIG, **more):
    """A checkpoint in which every matrix of a layer is packed; returns what each should be read as, in float32."""
    directory.mkdir(exist_ok=True)
    tensors, expected = any_bits(config), {}
    for name in ROWS:
        parts, expected[name] = pack(tensors.pop(name).shape)
        base = name.removesuffix(".weight")
        tensors |= {f"{base}.{part}": array for part, array in parts.items()}
    tensors |= more
    data = {**config.to_dict(), "quantization_config": quantization}
    (directory / "config.json").write_text(json.dumps(data))
    store(directory / "model.safetensors", tensors)
    return expected


def assert_read(directory, expected, label, dtype="bfloat16", plain=None, kept=True):
    """Floats, and matrices of few bits that say the same, unless their blocks are none of ours (`kept` False)."""
    checkpoint = Checkpoint.open(directory)
    assert set(checkpoint.tensors) == {name for name, _ in parameters(CONFIG)}
    plain = plain or any_bits(CONFIG)
    for name, tensor in checkpoint.tensors.items():
        found = checkpoint.read(name)
        assert bits(checkpoint.read(name, slice(5, 22))) == bits(found[5:22])
        want = np.asarray(expected[name]).astype(dtype) if name in expected else plain[name]
        assert (found.shape, found.dtype, tensor.shape) == (want.shape, want.dtype, want.shape), name
        assert bits(found) == bits(want), name
        if name in expected:
            matrix = checkpoint.packed(name).matrix()
            assert kept is None or (matrix is not None) == kept, name
            assert matrix is None or bits(dequantised(matrix)) == bits(np.asarray(expected[name], np.float32)), name
        assert tensor.loss == (f"dequantised from {label}" if name in expected else ""), name
    assert checkpoint.losses == (f"dequantised from {label}",)
    assert "quantization_config" not in checkpoint.config.to_dict()


def words(numbers, bits_each, places=None):
    """Integers into 32-bit words, as the definition says: number i at bit bits_each * place(i), low bits first."""
    each = 32 // bits_each
    found = []
    for start in range(0, len(numbers), each):
        word = 0
        for i, number in enumerate(numbers[start : start + each]):
            word |= int(number) << bits_each * (places[i] if places else i)
        found.append(word)
    return np.array(found, np.uint32).view(np.int32)


def columns(matrix, bits_each, places=None):
    return np.stack([words(row, bits_each, places) for row in matrix])


def some_scales(*shape):
    return random.uniform(0.001, 0.02, shape).astype(np.float16)


# AWQ

AWQ = {"quant_method": "awq", "bits": 4, "group_size": 16, "zero_point": True, "version": "gemm"}


def pack_awq(shape, group=16):
    out, width = shape
    groups = math.ceil(width / group)
    numbers = random.integers(0, 16, (width, out))
    zeros, scales = random.integers(0, 16, (groups, out)), some_scales(groups, out)
    places = [0, 4, 1, 5, 2, 6, 3, 7]  # output 1 stands in the fifth nibble: the order is 0 2 4 6 1 3 5 7
    expected = np.empty(shape, np.float32)
    for o in range(out):
        for i in range(width):
            zero, scale = zeros[i // group, o], np.float32(scales[i // group, o])
            expected[o, i] = np.float32(numbers[i, o] - zero) * scale
    return {"qweight": columns(numbers, 4, places), "qzeros": columns(zeros, 4, places), "scales": scales}, expected


def test_awq(tmp_path):
    assert_read(tmp_path, write(tmp_path, pack_awq, AWQ), "AWQ int4")


def test_awq_one_group(tmp_path):
    expected = write(tmp_path, lambda shape: pack_awq(shape, shape[1]), {**AWQ, "group_size": -1, "version": "GEMM"})
    assert_read(tmp_path, expected, "AWQ int4")


@pytest.mark.parametrize("dtype", ["float16", "float32", None])
def test_the_configs_dtype_is_what_comes(tmp_path, dtype):
    expected = write(tmp_path, pack_awq, AWQ, CONFIG.replace(dtype=dtype))
    assert_read(tmp_path, expected, "AWQ int4", dtype or "float32")


# GPTQ

GPTQ = {"quant_method": "gptq", "bits": 4, "group_size": 16, "sym": True, "desc_act": False}


def gptq(bits_each=4, *, symmetric=True, minus_one=True, group=16, order=False, more=()):
    def pack(shape):
        out, width = shape
        groups = math.ceil(width / group)
        top = 1 << bits_each
        numbers = random.integers(0, top, (width, out))
        zeros = np.full((groups, out), top // 2) if symmetric else random.integers(1, top, (groups, out))
        scales = some_scales(groups, out)
        group_of = random.permutation(np.arange(width) // group) if order else np.arange(width) // group
        expected = np.empty(shape, np.float32)
        for o in range(out):
            for i in range(width):
                zero, scale = zeros[group_of[i], o], np.float32(scales[group_of[i], o])
                expected[o, i] = np.float32(numbers[i, o] - zero) * scale
        parts = {
            "qweight": columns(numbers.T, bits_each).T,
            "qzeros": columns(zeros - minus_one, bits_each),
            "scales": scales,
            "g_idx": group_of.astype(np.int32),
        }
        if "g_idx" not in more:
            return parts, expected
        del parts["g_idx"]
        return {**parts, "bias": np.zeros(out, np.float16)}, expected

    return pack


@pytest.mark.parametrize(
    ("options", "config"),
    [
        ({}, {}),
        ({"bits_each": 8}, {"bits": 8}),
        ({"bits_each": 2}, {"bits": 2}),
        ({"group": 32, "order": True}, {"group_size": 32, "desc_act": True}),
        ({"symmetric": False}, {"sym": False}),
        ({"symmetric": False, "minus_one": False}, {"sym": False, "checkpoint_format": "gptq_v2"}),
        ({"minus_one": False}, {"checkpoint_format": "gptq_v2"}),
        ({"minus_one": False}, {"checkpoint_format": "gptq"}),  # mislabelled, vllm#26092
        ({"minus_one": False}, {}),
        ({"minus_one": False}, {"sym": None}),
        ({}, {"checkpoint_format": "gptq_v2"}),
        ({"more": ("g_idx",)}, {}),
    ],
)
def test_gptq(tmp_path, options, config):
    config = {**GPTQ, **config}
    kept = None if options.get("order") else config["bits"] > 2  # a matrix of one group is in order anyway
    assert_read(tmp_path, write(tmp_path, gptq(**options), config), f"GPTQ int{config['bits']}", kept=kept)


@pytest.mark.parametrize(
    ("options", "config", "count"),
    [({}, {}, 0), ({"bits_each": 2}, {"bits": 2}, 1), ({"group": 32, "order": True}, {"desc_act": True}, 1)],
)
def test_what_cannot_stay_packed_is_told_once(tmp_path, options, config, count):
    """Kept packed where that can be; what becomes floats takes their memory, so a warning names the first of it."""
    write(tmp_path, gptq(**options), {**GPTQ, **config, "group_size": options.get("group", 16)})
    with warnings.catch_warnings(record=True) as told:
        warnings.simplefilter("always")
        kept = [weight.name for weight in load_pretrained(tmp_path, "MistralForCausalLM").weights if weight.matrix()]
    texts = [str(warning.message) for warning in told if "cannot stay packed" in str(warning.message)]
    assert len(texts) == count
    assert all("model.layers.0." in text and "becomes floats" in text for text in texts)
    assert (len(kept) == len(ROWS)) == (count == 0)


def reading(directory, error, match):
    """The error on opening or reading a matrix."""
    with pytest.raises(error, match=match):
        Checkpoint.open(directory).read("model.layers.0.mlp.up_proj.weight")


def changed(pack, **parts):
    """A packing with other parts; a function changes a part, None removes it."""

    def other(shape):
        found, expected = pack(shape)
        for name, change in parts.items():
            old = found.pop(name, None)
            if change is not None:
                found[name] = change(old, shape)
        return found, expected

    return other


def test_gptq_zero_points_that_tell_nothing_are_refused(tmp_path):
    write(tmp_path / "a", gptq(symmetric=False), GPTQ)
    reading(tmp_path / "a", errors.CorruptCheckpointError, "symmetric")
    write(tmp_path / "b", changed(gptq(symmetric=False), qzeros=lambda z, _: z | 15), {**GPTQ, "sym": False})
    reading(tmp_path / "b", errors.UnsupportedFeatureError, "gptq_v2")
    write(tmp_path / "c", changed(gptq(), bias=lambda _, s: np.ones(s[0], np.float16)), GPTQ)
    reading(tmp_path / "c", errors.UnsupportedFeatureError, "bias")
    write(tmp_path / "d", changed(gptq(), g_idx=lambda g, _: g + 1), GPTQ)
    reading(tmp_path / "d", errors.CorruptCheckpointError, "g_idx")


# bitsandbytes

BNB = {"quant_method": "bitsandbytes", "load_in_4bit": True, "load_in_8bit": False, "bnb_4bit_quant_type": "nf4"}
STATE = "weight.quant_state.bitsandbytes__nf4"


def nf4(block=64, nested=False, table=None, **changes):
    def pack(shape):
        size = math.prod(shape)
        numbers, values = random.integers(0, 16, size), random.standard_normal(16).astype(np.float32)
        values = values if table is None else table
        blocks = math.ceil(size / block)
        state = {"quant_type": "nf4", "blocksize": block, "dtype": "bfloat16", "shape": list(shape)}
        parts = {"weight.quant_map": values}
        if nested:
            indices = random.integers(0, 256, blocks).astype(np.uint8)
            map_ = random.standard_normal(256).astype(np.float32)
            outer = random.uniform(0, 1, math.ceil(blocks / 256)).astype(np.float32)
            largest = [np.float32(map_[n] * outer[b // 256]) + np.float32(0.25) for b, n in enumerate(indices)]
            parts |= {"weight.absmax": indices, "weight.nested_quant_map": map_, "weight.nested_absmax": outer}
            state |= {"nested_blocksize": 256, "nested_dtype": "float32", "nested_offset": 0.25}
        else:
            largest = random.uniform(0, 1, blocks).astype(np.float32)
            parts |= {"weight.absmax": largest}
        expected = np.array([values[n] * largest[i // block] for i, n in enumerate(numbers)], np.float32)
        packed = [numbers[i] << 4 | numbers[i + 1] for i in range(0, size, 2)]
        parts["weight"] = np.array(packed, np.uint8).reshape(-1, 1)
        parts[STATE] = np.frombuffer(json.dumps({**state, **changes}).encode(), np.uint8)
        return parts, expected.reshape(shape)

    return pack


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"nested": True},
        {"block": 4096},
        {"block": 48, "nested": True},
        {"table": NF4},  # blocks of 64 run over the ends of rows of 32 and 160
        {"table": NF4, "block": 32},
        {"table": NF4, "block": 16, "nested": True},
    ],
)
def test_nf4(tmp_path, options):
    kept = "table" in options and options.get("block", 64) <= 32
    assert_read(tmp_path, write(tmp_path, nf4(**options), BNB), "bitsandbytes nf4", kept=kept)


@pytest.mark.parametrize(
    "state",
    [
        {"quant_type": "fp4"},
        {"shape": [1 << 40, 1]},
        {"shape": [5]},
        {"shape": [32, 160, 1]},
        {"shape": "big"},
        {"blocksize": 0},
        {"blocksize": True},
        {"blocksize": None},
        {"shape": [1 << 30, 1 << 30]},
    ],
)
def test_nf4_states_that_mean_nothing(tmp_path, state):
    write(tmp_path, nf4(**state), BNB)
    with pytest.raises(errors.CheckpointError, match=r"model\.safetensors"):
        Checkpoint.open(tmp_path)


@pytest.mark.parametrize("state", [{"nested_blocksize": 1 << 30}, {"nested_offset": "x"}, {"nested_blocksize": -1}])
def test_nf4_nested_states_that_mean_nothing(tmp_path, state):
    write(tmp_path, nf4(nested=True, block=4, **state), BNB)
    with pytest.raises(errors.CheckpointError, match=r"model\.safetensors"):
        Checkpoint.open(tmp_path)


@pytest.mark.parametrize("text", [b"", b"{", b"[]", b'{"a": NaN}', b"\xff", b"{}" + b" " * 5000])
def test_nf4_states_that_are_no_json(tmp_path, text):
    write(tmp_path, changed(nf4(), **{STATE: lambda *_: np.frombuffer(text, np.uint8)}), BNB)
    with pytest.raises(errors.CorruptCheckpointError, match="nf4"):
        Checkpoint.open(tmp_path)


# compressed-tensors


def compressed(form, **weights):
    group = {"targets": ["Linear"], "weights": {"symmetric": True, **weights}, "input_activations": None}
    return {
        "quant_method": "compressed-tensors", "format": form, "quantization_status": "compressed",
        "config_groups": {"group_0": group}, "ignore": ["lm_head"], "sparsity_config": {},
    }  # fmt: skip


def block_sizes(shape, strategy):
    return {"tensor": shape, "channel": (1, shape[1]), "group": (1, 16), "block": (32, 16)}[strategy]


def expand(shape, block, numbers, zeros, scales, group_of=None):
    expected = np.empty(shape, np.float32)
    for o in range(shape[0]):
        for i in range(shape[1]):
            at = o // block[0], i // block[1] if group_of is None else group_of[i]
            expected[o, i] = (np.float32(numbers[o, i]) - np.float32(zeros[at])) * np.float32(scales[at])
    return expected


def packed(bits_each, strategy, *, symmetric=True, order=False, plain_zeros=False):
    def pack(shape):
        block = block_sizes(shape, strategy)
        down, across = math.ceil(shape[0] / block[0]), math.ceil(shape[1] / block[1])
        middle = 1 << bits_each - 1
        numbers = random.integers(-middle, middle, shape)
        zeros = np.zeros((down, across), int) if symmetric else random.integers(-middle, middle, (down, across))
        scales = random.uniform(0.001, 0.01, (down, across)).astype(ml_dtypes.bfloat16)
        group_of = random.permutation(np.arange(shape[1]) // block[1]) if order else None
        parts = {
            "weight_packed": columns(numbers + middle, bits_each),
            "weight_scale": scales,
            "weight_shape": np.array(shape, np.int64),
        }
        if not symmetric:
            whole = columns((zeros + middle).T, bits_each).T
            parts["weight_zero_point"] = zeros.astype(np.int8) if plain_zeros else whole
        if order:
            parts["weight_g_idx"] = group_of.astype(np.int32)
        return parts, expand(shape, block, numbers, zeros, scales, group_of)

    return pack


@pytest.mark.parametrize(
    ("options", "weights"),
    [
        ({"bits_each": 4, "strategy": "group"}, {"group_size": 16}),
        ({"bits_each": 4, "strategy": "group", "order": True}, {"group_size": 16, "actorder": "group"}),
        ({"bits_each": 4, "strategy": "group", "symmetric": False}, {"group_size": 16, "symmetric": False}),
        ({"bits_each": 8, "strategy": "channel"}, {}),
        ({"bits_each": 8, "strategy": "channel", "symmetric": False}, {"symmetric": False}),
        ({"bits_each": 8, "strategy": "tensor", "symmetric": False, "plain_zeros": True}, {"symmetric": False}),
        ({"bits_each": 4, "strategy": "channel", "symmetric": False}, {"symmetric": False}),
    ],
)
def test_compressed_tensors_packed(tmp_path, options, weights):
    number, strategy = options["bits_each"], options["strategy"]
    config = compressed("pack-quantized", num_bits=number, type="int", strategy=strategy, **weights)
    expected = write(tmp_path, packed(**options), config)
    assert_read(tmp_path, expected, f"compressed-tensors int{number}", kept=not options.get("order"))


def test_packed_where_columns_fill_no_whole_word(tmp_path):
    narrow = CONFIG.replace(hidden_size=28)
    config = compressed("pack-quantized", num_bits=4, type="int", strategy="channel")
    expected = write(tmp_path, packed(4, "channel"), config, narrow)
    assert_read(tmp_path, expected, "compressed-tensors int4", plain=any_bits(narrow))


@pytest.mark.parametrize("shape", [[1 << 40, 32], [160, 1 << 40], [160, 0], [-1, 32], [160, 25]])
def test_packed_shapes_that_cannot_be(tmp_path, shape):
    config = compressed("pack-quantized", num_bits=4, type="int", strategy="channel")
    wrong = changed(packed(4, "channel"), weight_shape=lambda *_: np.array(shape))
    write(tmp_path, wrong, config)
    with pytest.raises(errors.CheckpointError, match="words cannot be"):
        Checkpoint.open(tmp_path)


def scaled(kind, scale, strategy, *, symmetric=True, squeeze=False, more=None):
    def pack(shape):
        block = block_sizes(shape, strategy)
        down, across = math.ceil(shape[0] / block[0]), math.ceil(shape[1] / block[1])
        numbers = random.standard_normal(shape) * 60
        stored = numbers.astype(np.float32).astype(kind)
        zeros = random.integers(-9, 9, (down, across)) if not symmetric else np.zeros((down, across), int)
        scales = random.uniform(0.001, 0.01, (down, across)).astype(np.float32)
        parts = {"weight": stored, scale: scales.squeeze() if squeeze else scales, **(more or {})}
        if not symmetric:
            parts["weight_zero_point"] = zeros.astype(np.int8)
        return parts, expand(shape, block, stored.astype(np.float32), zeros, scales)

    return pack


FP8, INT8 = ml_dtypes.float8_e4m3fn, np.int8
ONE = np.ones(1, np.float32)


@pytest.mark.parametrize("strategy", ["tensor", "channel", "block"])
@pytest.mark.parametrize("form", ["float-quantized", "naive-quantized"])
def test_compressed_tensors_floats(tmp_path, form, strategy):
    config = compressed(form, num_bits=8, type="float", strategy=strategy, block_structure=[32, 16])
    pack = scaled(FP8, "weight_scale", strategy, squeeze=strategy == "tensor", more={"input_scale": ONE})
    assert_read(tmp_path, write(tmp_path, pack, config), "compressed-tensors float8")


@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize("strategy", ["channel", "group"])
def test_compressed_tensors_integers(tmp_path, strategy, symmetric):
    config = compressed("int-quantized", num_bits=8, type="int", strategy=strategy, group_size=16, symmetric=symmetric)
    pack = scaled(INT8, "weight_scale", strategy, symmetric=symmetric)
    assert_read(tmp_path, write(tmp_path, pack, config), "compressed-tensors int8")


@pytest.mark.parametrize("strategy", ["tensor", "channel", "block"])
def test_hugging_face_fp8(tmp_path, strategy):
    size = [32, 16] if strategy == "block" else None
    config = {"quant_method": "fp8", "activation_scheme": "static", "weight_block_size": size}
    pack = scaled(FP8, "weight_scale_inv", strategy, squeeze=strategy != "block", more={"activation_scale": ONE})
    more = {"model.layers.0.self_attn.k_scale": ONE}
    assert_read(tmp_path, write(tmp_path, pack, config, **more), "FP8")


@pytest.mark.parametrize("strategy", ["tensor", "channel"])
def test_raw_fp8(tmp_path, strategy):
    """Scales of rows belong to the rows as the file has them, in rotary pairs."""
    tensors, expected, plain = {}, {}, any_bits(CONFIG)
    for name, row in parameters(CONFIG):
        raw, layout = row.raw.format(layer_of(name)), layouts.rotary_pairs(row)
        if name not in ROWS:
            tensors[raw] = plain[name]
            continue
        parts, values = scaled(FP8, "qscale_weight", strategy, squeeze=True)(plain[name].shape)
        tensors |= {raw.removesuffix("weight") + part: array for part, array in parts.items()}
        tensors[raw.removesuffix("weight") + "qscale_act"] = ONE
        expected[name] = layouts.to_canonical(values, row, CONFIG, layout)
    store(tmp_path / "consolidated.safetensors", tensors)
    quantization = {"qformat_weight": "fp8_e4m3", "qscheme_act": "TENSOR"}
    params = {**params_json.write(CONFIG), "dtype": "bfloat16", "quantization": quantization}
    (tmp_path / "params.json").write_text(json.dumps(params))
    assert_read(tmp_path, expected, "FP8")


def test_every_eight_bit_float():
    assert [float(x) for x in np.arange(256, dtype=np.uint8).view(FP8)[[0, 1, 8, 0x38, 0x7E, 0x80, 0xFE]]] == [
        0, 2**-9, 2**-6, 1, 448, 0, -448,
    ]  # fmt: skip


# What is refused


@pytest.mark.parametrize(
    ("given", "match"),
    [
        ({"quant_method": "hqq"}, "hqq"),
        ({"quant_method": "mxfp4"}, "mxfp4"),
        ({"quant_method": "modelopt"}, "modelopt"),
        ({"quant_method": "quanto"}, "quanto"),
        ({"quant_method": "fbgemm_fp8"}, "fbgemm_fp8"),
        ({"quant_method": "torchao"}, "torchao"),
        ({"bits": 4}, "None"),
        ({**AWQ, "version": "gemv"}, "gemv"),
        ({**AWQ, "version": "marlin"}, "marlin"),
        ({**AWQ, "version": "exllama"}, "exllama"),
        ({**AWQ, "bits": 8}, "bits"),
        ({**AWQ, "zero_point": False}, "zero_point"),
        ({**AWQ, "backend": "llm-awq"}, "llm-awq"),
        ({**GPTQ, "bits": 3}, "bits"),
        ({**GPTQ, "is_marlin_format": True}, "marlin"),
        ({**GPTQ, "checkpoint_format": "marlin"}, "marlin"),
        ({**GPTQ, "dynamic": {"-:x": {}}}, "dynamic"),
        ({**BNB, "bnb_4bit_quant_type": "fp4"}, "fp4"),
        ({**BNB, "load_in_8bit": True}, "load_in_8bit"),
        ({**BNB, "bnb_4bit_quant_storage": "bfloat16"}, "storage"),
        ({"load_in_8bit": True}, "load_in_8bit"),
        (compressed("marlin-24", num_bits=4), "marlin-24"),
        (compressed("nvfp4-pack-quantized", num_bits=4, type="float"), "nvfp4"),
        (compressed("mxfp4-pack-quantized", num_bits=4, type="float"), "mxfp4"),
        (compressed("mixed-precision", num_bits=4), "format is None"),
        (compressed("pack-quantized", num_bits=3), "num_bits"),
        (compressed("pack-quantized", num_bits=4, type="float"), "type"),
        (compressed("float-quantized", num_bits=4, type="float"), "num_bits"),
        (compressed("pack-quantized", num_bits=4, strategy="tensor_group"), "tensor_group"),
        ({**compressed("pack-quantized", num_bits=4), "sparsity_config": {"format": "sparse-24-bitmask"}}, "sparse"),
        ({**compressed("pack-quantized", num_bits=4), "transform_config": {"config_groups": {"a": 1}}}, "transform"),
        ({"quant_method": "fp8", "scale_fmt": "ue8m0"}, "ue8m0"),
    ],
)
def test_20_81_other_ways_of_packing_are_refused_by_name(given, match):
    with pytest.raises(errors.UnsupportedFeatureError, match=match):
        MistralConfig.from_dict({**CONFIG.to_dict(), "quantization_config": given})


@pytest.mark.parametrize(
    "given",
    [
        "awq",
        [],
        {**AWQ, "group_size": 0},
        {**AWQ, "group_size": "128"},
        {**GPTQ, "group_size": True},
        {"quant_method": "fp8", "weight_block_size": [128]},
        {"quant_method": "fp8", "weight_block_size": [0, 1]},
        {"quant_method": "compressed-tensors", "format": "pack-quantized", "config_groups": {}},
        {"quant_method": "compressed-tensors", "format": "pack-quantized", "config_groups": {"a": 1}},
        compressed("float-quantized", num_bits=8, type="float", strategy="block"),
    ],
)
def test_quantization_configs_that_mean_nothing(given):
    with pytest.raises(errors.ConfigError):
        MistralConfig.from_dict({**CONFIG.to_dict(), "quantization_config": given})


@pytest.mark.parametrize(
    "given", [{"qformat_weight": "nvfp4"}, {"qformat_weight": "fp8_e4m3", "qscheme_act": "X"}, {"quant_method": "x"}]
)
def test_20_raw_quantization_of_another_kind(given):
    with pytest.raises(errors.UnsupportedFeatureError, match="quantization"):
        MistralConfig.from_dict({**params_json.write(CONFIG), "quantization": given})


@pytest.mark.parametrize("pack", [pack_awq, gptq(), nf4(), scaled(INT8, "weight_scale", "channel")])
def test_35_packed_numbers_are_never_weights(tmp_path, pack):
    """Without a config that says how, or with one of another method, they stay what they are."""
    write(tmp_path, pack, None)
    with pytest.raises(errors.TensorMismatchError):
        load(tmp_path)
    other = {"quant_method": "fp8", "activation_scheme": "dynamic"}
    (tmp_path / "config.json").write_text(json.dumps({**CONFIG.to_dict(), "quantization_config": other}))
    with pytest.raises(errors.TensorMismatchError):
        load(tmp_path)


@pytest.mark.parametrize(
    ("pack", "config", "part"),
    [
        (pack_awq, AWQ, "qweight"),
        (pack_awq, AWQ, "qzeros"),
        (pack_awq, AWQ, "scales"),
        (gptq(), GPTQ, "qzeros"),
        (gptq(), GPTQ, "scales"),
        (nf4(), BNB, "weight.absmax"),
        (nf4(), BNB, "weight.quant_map"),
        (nf4(), BNB, "weight"),
        (nf4(nested=True), BNB, "weight.nested_quant_map"),
        (packed(4, "channel"), compressed("pack-quantized", num_bits=4, strategy="channel"), "weight_shape"),
        (packed(4, "channel"), compressed("pack-quantized", num_bits=4, strategy="channel"), "weight_scale"),
        (scaled(FP8, "weight_scale_inv", "tensor"), {"quant_method": "fp8"}, "weight_scale_inv"),
        (scaled(FP8, "weight_scale_inv", "tensor"), {"quant_method": "fp8"}, "weight"),
    ],
)
@pytest.mark.parametrize("fault", ["missing", "another shape", "another dtype"])
def test_parts_that_are_missing_or_wrong(tmp_path, pack, config, part, fault):
    changes = {
        "missing": None,
        "another shape": lambda a, _: np.concatenate([a.reshape(-1)] * 3),
        "another dtype": lambda a, _: np.ones(a.shape, np.float64),
    }
    write(tmp_path, changed(pack, **{part: changes[fault]}), config)
    with pytest.raises(errors.TensorMismatchError), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        load(tmp_path)


@pytest.mark.parametrize(
    ("pack", "form", "number"), [(packed(4, "channel"), "pack", 4), (scaled(INT8, "weight_scale", "channel"), "int", 8)]
)
@pytest.mark.parametrize("zero", [0, 1])
def test_zero_points_beside_a_symmetric_config(tmp_path, pack, form, number, zero):
    config = compressed(f"{form}-quantized", num_bits=number, type="int", strategy="channel")
    pack = changed(pack, weight_zero_point=lambda _, shape: np.full((shape[0], 1), zero, np.int8))
    expected = write(tmp_path, pack, config)
    if zero:
        reading(tmp_path, errors.CorruptCheckpointError, "symmetric")
    else:
        assert_read(tmp_path, expected, f"compressed-tensors int{number}")


def test_packed_and_plain_at_once(tmp_path):
    name = next(iter(ROWS))
    write(tmp_path, pack_awq, AWQ, **{name: np.ones(3, np.float32)})
    with pytest.raises(errors.CorruptCheckpointError, match="both"):
        Checkpoint.open(tmp_path)


def test_values_beyond_float16(tmp_path):
    huge = changed(scaled(FP8, "weight_scale", "tensor"), weight_scale=lambda *_: np.full((1, 1), 1e30, np.float32))
    config = compressed("float-quantized", num_bits=8, type="float", strategy="tensor")
    write(tmp_path, huge, config, CONFIG.replace(dtype="float16"))
    reading(tmp_path, errors.LossyConversionError, "float16")


# Models


def test_loading_warns_once_of_what_was_dequantised(tmp_path):
    expected = write(tmp_path, pack_awq, AWQ)
    with pytest.warns(UserWarning, match="dequantised from AWQ int4") as caught:
        config, tensors = load(tmp_path)
    assert len(caught) == 1
    assert "quantization_config" not in config.to_dict()
    found = dict(tensors)
    assert all(bits(found[name]) == bits(value.astype("bfloat16")) for name, value in expected.items())


def test_mixed_checkpoints_and_left_over_configs(tmp_path):
    """Some matrices as they are, as modules_to_not_convert says, and none packed at all."""
    plain = any_bits(CONFIG)
    kept = [name for name in ROWS if "attn" in name]
    expected = write(tmp_path, lambda shape: pack_awq(shape), AWQ)
    tensors = {name: array for name, array in stored(tmp_path / "model.safetensors").items() if "attn" not in name}
    store(tmp_path / "model.safetensors", {**tensors, **{name: plain[name] for name in kept}})
    checkpoint = Checkpoint.open(tmp_path)
    for name in ROWS:
        want = plain[name] if name in kept else expected[name].astype("bfloat16")
        assert bits(checkpoint.read(name)) == bits(want)
    store(tmp_path / "model.safetensors", plain)
    assert Checkpoint.open(tmp_path).losses == ()


def test_parts_in_several_shards(tmp_path):
    expected = write(tmp_path, pack_awq, AWQ)
    tensors = stored(tmp_path / "model.safetensors")
    (tmp_path / "model.safetensors").unlink()
    weight_map = {}
    for number in range(3):
        names = list(tensors)[number::3]
        file = f"model-{number + 1:05d}-of-00003.safetensors"
        store(tmp_path / file, {name: tensors[name] for name in names})
        weight_map |= dict.fromkeys(names, file)
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))
    assert_read(tmp_path, expected, "AWQ int4")


FOREIGN = Path(__file__).parents[1] / "data" / "foreign" / "quantized"


@pytest.mark.parametrize(
    ("name", "label"),
    [
        ("awq", "AWQ int4"),
        ("gptq4", "GPTQ int4"),
        ("gptq8", "GPTQ int8"),
        ("nf4", "bitsandbytes nf4"),
        ("nf4-nested", "bitsandbytes nf4"),
        ("int4", "compressed-tensors int4"),
        ("int4-zeros", "compressed-tensors int4"),
        ("int8", "compressed-tensors int8"),
        ("float8", "compressed-tensors float8"),
    ],
)
def test_what_the_libraries_themselves_dequantise_to(name, label):
    """Written by make_quantized.py with AutoAWQ, AutoGPTQ, bitsandbytes and compressed-tensors."""
    with pytest.warns(UserWarning, match=label):
        _, tensors = load(FOREIGN / name)
    found = dict(tensors)
    for key, expected in stored(FOREIGN / name / "beside.safetensors").items():
        assert found[key].dtype == expected.dtype
        assert np.array_equal(found[key].astype(np.float32), expected.astype(np.float32)), key
