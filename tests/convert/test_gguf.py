"""GGUF: every bit comes back, the config too, gguf reads what we write, and what gguf wrote is read."""

import json
import shutil
import warnings
from pathlib import Path

import gguf
import numpy as np
import pytest
from crossed import crossed
from samples import CONFIGS, any_bits, assert_same, bits, ordinary, read, write

from mistral_core import TINY, convert
from mistral_core.config import rope
from mistral_core.errors import (
    ConversionError,
    CorruptCheckpointError,
    LossyConversionError,
    MissingExtraError,
    NonFiniteWeightsError,
    ShapeMismatchError,
    UnsupportedFeatureError,
)
from mistral_core.parameters import parameters, shapes
from mistral_core.weights import formats
from mistral_core.weights.casting import narrowed, widened
from mistral_core.weights.containers.gguf import file as gguf_file
from mistral_core.weights.containers.gguf.file import GgufFile
from mistral_core.weights.containers.gguf.kinds import KINDS, QUANTISED, nbytes
from mistral_core.weights.containers.tensor_file import CODES, DTYPES, write_bytes
from mistral_core.weights.formats import gguf as our_format
from mistral_core.weights.formats.base import Outline
from mistral_core.weights.opening import Checkpoint

FOREIGN = Path(__file__).parents[1] / "data" / "foreign" / "gguf"
PLAIN = TINY.replace(sliding_window=None)
YARN = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 64}
pytestmark = pytest.mark.filterwarnings("ignore:.*sliding_window")


def outline(config=PLAIN, dtype="F32", **options):
    return Outline(config, "MistralForCausalLM", {name: dtype for name, _ in parameters(config)}, {}, options)


def same_model(found, expected):
    """The same in all that GGUF can say."""
    for name in (
        "vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads",
        "num_key_value_heads", "head_dim", "max_position_embeddings", "rms_norm_eps", "rope_theta", "rope_scaling",
        "tie_word_embeddings", "layer_windows", "bos_token_id", "eos_token_id", "pad_token_id",
    ):  # fmt: skip
        assert getattr(found, name) == getattr(expected, name), name


def normal(config, dtype="float32"):
    generator = np.random.default_rng(0)
    return {
        name: generator.standard_normal(shape).astype(np.float32).astype(dtype)
        for name, shape in shapes(config).items()
    }


@pytest.mark.parametrize(("name", "dtype"), crossed(CONFIGS, "bfloat16", "float16", "float32"))
def test_every_bit_and_the_config_come_back(tmp_path, name, dtype):
    config, arrays = CONFIGS[name], any_bits(CONFIGS[name], dtype)
    if len(set(config.layer_windows)) > 1:
        with pytest.raises(UnsupportedFeatureError, match="one window for all layers"):
            write(tmp_path / "model", "gguf", arrays, config)
        assert not list((tmp_path / "model").iterdir())
        return
    path = write(tmp_path / "model", "gguf", arrays, config)
    assert formats.detect(path) == ["gguf"]
    assert_same(read(path), arrays)
    assert Checkpoint.open(path).config == config.replace(architectures=("MistralForCausalLM",))


@pytest.mark.parametrize("config", [PLAIN, TINY, CONFIGS["tied"], CONFIGS["yarn"].replace(rope_theta=5e5)])
def test_a_file_alone_says_what_matters(tmp_path, config):
    config = config.replace(rms_norm_eps=1e-5, eos_token_id=(2, 4), pad_token_id=3)
    path = write(tmp_path / "model", "gguf", any_bits(config, "bfloat16"), config)
    alone = shutil.copy(path / "model.gguf", tmp_path / "x.gguf")
    assert formats.detect(alone) == formats.detect(tmp_path) == ["gguf"]
    checkpoint = Checkpoint.open(alone)
    same_model(checkpoint.config, config)
    assert_same(read(alone), any_bits(config, "bfloat16"))
    assert_same(read(tmp_path), any_bits(config, "bfloat16"))
    shutil.copy(alone, tmp_path / "y.gguf")
    with pytest.raises(ConversionError, match="x.gguf.*y.gguf"):
        our_format.open(tmp_path, None)


def test_gguf_reads_what_we_write(tmp_path):
    arrays = any_bits(PLAIN, "bfloat16")
    path = write(tmp_path / "model", "gguf", arrays, PLAIN)
    reader = gguf.GGUFReader(path / "model.gguf")
    assert reader.get_field("general.architecture").contents() == "llama"
    assert reader.get_field("llama.attention.key_length").contents() == PLAIN.head_dim
    by_name = {tensor.name: tensor for tensor in reader.tensors}
    embedding, norm, query = (by_name[f"{n}.weight"] for n in ("token_embd", "output_norm", "blk.1.attn_q"))
    assert bits(embedding.data) == bits(arrays["model.embed_tokens.weight"])
    assert embedding.shape.tolist() == [PLAIN.hidden_size, PLAIN.vocab_size]
    assert norm.tensor_type == gguf.GGMLQuantizationType.F32
    assert bits(norm.data.view(np.uint32) >> 16) == bits(arrays["model.norm.weight"].view(np.uint16).astype(np.uint32))
    rows = arrays["model.layers.1.self_attn.q_proj.weight"].view(np.uint16)
    assert bits(query.data[1]) == bits(rows[PLAIN.head_dim // 2])


@pytest.mark.parametrize("name", ["half", "tied", "quantised"])
def test_what_gguf_wrote_is_read(name):
    checkpoint = Checkpoint.open(FOREIGN / f"{name}.gguf")
    config = checkpoint.config
    assert (config.hidden_size, config.rope_theta, config.rms_norm_eps) == (32, 1e6, 1e-5)
    assert config.tie_word_embeddings == (name == "tied")
    generator = np.random.default_rng(0)  # as make_gguf.py draws them
    drawn = {n: generator.standard_normal(s).astype(np.float32) for n, s in shapes(config).items()}
    types = {tensor.name: tensor.tensor_type for tensor in gguf.GGUFReader(FOREIGN / f"{name}.gguf").tensors}
    expected = {}
    for canonical, array in drawn.items():
        kind = types[checkpoint.tensors[canonical].name]
        code = kind.name if kind.name in DTYPES else "F32"
        if kind.name in QUANTISED:
            array = gguf.quants.dequantize(gguf.quants.quantize(array, kind), kind)
        expected[canonical] = array.astype(DTYPES[code])
    assert_same({n: checkpoint.read(n) for n in checkpoint.tensors}, expected)
    assert bool(checkpoint.losses) == (name == "quantised")


def test_what_gguf_wrote_is_converted(tmp_path):
    with pytest.raises(LossyConversionError, match="dequantised from"):
        convert(FOREIGN / "quantised.gguf", tmp_path / "hf", to="hf")
    report = convert(FOREIGN / "quantised.gguf", tmp_path / "hf", to="hf", allow_lossy=True)
    assert "dequantised from Q8_0" in report.losses["source"]
    convert(FOREIGN / "half.gguf", tmp_path / "raw", to="raw")
    assert_same(read(tmp_path / "raw"), read(FOREIGN / "half.gguf"))


def test_a_tied_file_of_others_is_a_language_model(tmp_path):
    """What llama.cpp writes of tied embeddings has no head and no manifest that says what it is of."""
    config = PLAIN.replace(tie_word_embeddings=True, architectures=("MistralForCausalLM",))
    write(tmp_path / "hf", "hf", ordinary(config), config)
    convert(tmp_path / "hf", tmp_path / "gguf", to="gguf")
    (tmp_path / "gguf" / "mistral_manifest.json").unlink()
    convert(tmp_path / "gguf", tmp_path / "again", to="hf")
    found = json.loads((tmp_path / "again" / "config.json").read_text())
    assert found["architectures"] == ["MistralForCausalLM"]
    assert_same(read(tmp_path / "hf"), read(tmp_path / "again"))


@pytest.mark.parametrize("code", sorted(QUANTISED - {"Q8_1", "Q8_K", "Q1_0"}))
def test_every_type_that_gguf_can_dequantise(tmp_path, code):
    shape = (3, 256)
    data = np.random.default_rng(0).integers(0, 60, nbytes(code, shape), dtype=np.uint8)
    info = gguf_file.create(tmp_path / "x.gguf", {}, {"x": (code, shape)})["x"]
    write_bytes(info, data.data)
    kind = gguf.GGMLQuantizationType[code]
    assert gguf.GGML_QUANT_SIZES[kind] == (KINDS[code].values, KINDS[code].size)
    with np.errstate(all="ignore"):
        expected = gguf.quants.dequantize(data.reshape(3, -1), kind)
    assert bits(GgufFile(tmp_path / "x.gguf").read("x")) == bits(expected)


@pytest.mark.parametrize("code", ["Q8_1", "Q8_K", "Q1_0"])
def test_a_type_that_gguf_cannot_dequantise(tmp_path, code):
    gguf_file.create(tmp_path / "x.gguf", {}, {"x": (code, (1, 256))})
    with pytest.raises(UnsupportedFeatureError, match=code):
        GgufFile(tmp_path / "x.gguf").read("x")


def test_dequantising_needs_gguf(tmp_path, monkeypatch):
    gguf_file.create(tmp_path / "x.gguf", {}, {"x": ("Q8_0", (1, 32))})
    monkeypatch.setitem(__import__("sys").modules, "gguf", None)
    with pytest.raises(MissingExtraError, match=r"mistral-frameworks\[convert\]"):
        GgufFile(tmp_path / "x.gguf").read("x")


@pytest.mark.parametrize("kind", ["Q8_0", "Q4_0"])
@pytest.mark.parametrize("dtype", ["bfloat16", "float32"])
def test_quantised_writing(tmp_path, kind, dtype):
    config = PLAIN.replace(hidden_size=64, intermediate_size=48)  # 48 is no multiple of 32: down_proj stays
    arrays = normal(config, dtype)
    source = write(tmp_path / "hf", "hf", arrays, config)
    with pytest.raises(LossyConversionError, match=f"quantised to {kind}"):
        convert(source, tmp_path / "q", to="gguf", dtype=kind)
    convert(source, tmp_path / "q", to="gguf", dtype=kind, allow_lossy=True)
    found, number = read(tmp_path / "q"), gguf.GGMLQuantizationType[kind]
    for name, array in arrays.items():
        if array.ndim == 2 and array.shape[1] % 32 == 0:
            array = gguf.quants.dequantize(gguf.quants.quantize(array.astype(np.float32), number), number)
        assert (found[name].dtype, bits(found[name])) == (array.dtype, bits(array)), name
    assert gguf.GGUFReader(tmp_path / "q" / "model.gguf").get_field("general.file_type").contents() in (2, 7)


@pytest.mark.parametrize(
    ("value", "error"), [(np.nan, NonFiniteWeightsError), (np.inf, NonFiniteWeightsError), (1e7, LossyConversionError)]
)
def test_what_cannot_be_quantised(tmp_path, value, error):
    config = PLAIN.replace(hidden_size=64)
    arrays = normal(config)
    arrays["model.layers.0.self_attn.v_proj.weight"][3, 5] = value
    source = write(tmp_path / "hf", "hf", arrays, config)
    with pytest.raises(error, match="v_proj|attn_v"):
        convert(source, tmp_path / "q", to="gguf", dtype="Q8_0", allow_lossy=True, check_finite=False)


@np.errstate(invalid="ignore")
def test_vectors_are_widened_and_narrowed_bit_by_bit():
    every = np.arange(1 << 16, dtype=np.uint16)
    for code in ("BF16", "F16"):
        values = every.view(DTYPES[code])
        wide = widened(values)
        numbers = ~np.isnan(wide)
        assert bits(wide[numbers]) == bits(values[numbers].astype(np.float32))
        assert bits(narrowed(wide, DTYPES[code])) == bits(every)
        assert narrowed(np.float32([1, 1.1]), DTYPES[code]) is None
    quiet_only = np.uint16([0x7D01]).view(np.float16)  # signalling: a cast would set its first bit
    assert widened(quiet_only).view(np.uint32)[0] == 0x7FA02000


def test_a_vector_trained_since_stays_float32(tmp_path):
    arrays = any_bits(PLAIN, "bfloat16")
    path = write(tmp_path / "model", "gguf", arrays, PLAIN)
    tensor = Checkpoint.open(path).tensors["model.norm.weight"]
    with (path / "model.gguf").open("r+b") as file:
        file.seek(tensor.start)
        file.write(np.float32(1.1).tobytes())
    found = read(path)["model.norm.weight"]
    assert (found.dtype, found[0]) == (np.float32, np.float32(1.1))
    assert Checkpoint.open(path).tensors["model.layers.0.input_layernorm.weight"].dtype == "BF16"


@pytest.mark.parametrize(
    "changes",
    [
        {"rope_theta": 1234567.891},
        {"rms_norm_eps": 1.00000001e-5},
        {"rope_scaling": {**YARN, "truncate": False, "factor": 3.0}, "head_dim": 32},
        {"rope_scaling": {**YARN, "attention_factor": 1.123456789}},
        {"rope_scaling": {**YARN, "original_max_position_embeddings": 64.5}},
        {"rope_scaling": {"rope_type": "linear", "factor": 1.123456789}},
        {
            "rope_scaling": {
                "rope_type": "llama3", "factor": 8.0, "original_max_position_embeddings": 64,
                "low_freq_factor": 1.0, "high_freq_factor": 4.0,
            }
        },
    ],
)  # fmt: skip
def test_what_gguf_cannot_say(changes):
    with pytest.raises(UnsupportedFeatureError, match="gguf: "):
        our_format.check(outline(PLAIN.replace(**changes)))


@pytest.mark.parametrize("architecture", ["MistralModel", "MistralForTokenClassification"])
def test_other_classes_are_refused(architecture):
    with pytest.raises(UnsupportedFeatureError, match=architecture):
        our_format.check(Outline(PLAIN, architecture, {"x": "F32"}))


def test_float64_and_unknown_types_are_refused():
    with pytest.raises(UnsupportedFeatureError, match="float64"):
        our_format.check(outline(dtype="F64"))
    with pytest.raises(UnsupportedFeatureError, match="'Q3_K'; Q8_0 and Q4_0 are written"):
        our_format.check(outline(gguf_type="Q3_K"))


@pytest.mark.parametrize(
    "scaling",
    [
        {"rope_type": "linear", "factor": 2.5},
        YARN,
        {**YARN, "factor": 1.5, "beta_fast": 16.0, "beta_slow": 2.0},
        {**YARN, "attention_factor": 1.0},
        {**YARN, "attention_factor": 0.9},
        {**YARN, "mscale": 1.0, "mscale_all_dim": 1.0},
    ],
)
def test_rope_scaling_both_ways(tmp_path, scaling):
    config = PLAIN.replace(rope_scaling=scaling, rope_theta=1e6, head_dim=32)
    path = write(tmp_path / "model", "gguf", any_bits(config), config)
    assert Checkpoint.open(path).config.rope_scaling == config.rope_scaling
    (path / "mistral_manifest.json").unlink()
    assert rope.rotary_table(Checkpoint.open(path).config) == rope.rotary_table(config)


def test_the_ignored_window_is_told_once(tmp_path):
    with warnings.catch_warnings(record=True) as found:
        warnings.simplefilter("always")
        write(tmp_path / "a", "gguf", any_bits(TINY), TINY)
        long = TINY.replace(sliding_window=TINY.max_position_embeddings)  # longer than any text
        write(tmp_path / "b", "gguf", any_bits(long), long)
    assert [str(w.message) for w in found if "ignores sliding_window 5" in str(w.message)] == [str(found[0].message)]
    assert len(found) == 1


# What others publish


KEYS = {
    "general.architecture": "llama",
    "general.name": "mistralai_mistral-7b-v0.1",
    "llama.context_length": np.uint32(32768),
    "llama.embedding_length": np.uint32(8),
    "llama.block_count": np.uint32(1),
    "llama.feed_forward_length": np.uint32(6),
    "llama.rope.dimension_count": np.uint32(4),
    "llama.attention.head_count": np.uint32(2),
    "llama.attention.head_count_kv": np.uint32(1),
    "llama.attention.layer_norm_rms_epsilon": np.float32(1e-5),
    "llama.rope.freq_base": np.float32(10000.0),
    "general.file_type": np.uint32(0),
    "tokenizer.ggml.model": "bert",
    "tokenizer.ggml.bos_token_id": np.uint32(1),
    "tokenizer.ggml.eos_token_id": np.uint32(2),
    "tokenizer.ggml.unknown_token_id": np.uint32(0),
}
SMALL = TINY.replace(
    vocab_size=7, hidden_size=8, intermediate_size=6, num_hidden_layers=1, num_attention_heads=2, num_key_value_heads=1,
    head_dim=4, sliding_window=None, max_position_embeddings=32768, bos_token_id=1, eos_token_id=2, rms_norm_eps=1e-5,
    pad_token_id=None, rope_theta=1e4,
)  # fmt: skip


def published(path, keys, *, without=(), more=None):
    """A file of zeros with the tensors of SMALL."""
    rows = dict(parameters(SMALL))
    names = {row.gguf.format(0): shapes(SMALL)[name] for name, row in rows.items()}
    specs = {name: ("F32", shape) for name, shape in names.items()} | (more or {})
    gguf_file.create(path, {key: value for key, value in keys.items() if key not in without}, specs)
    return path


@pytest.mark.parametrize("without", ["llama.rope.freq_base", "general.file_type", "general.name"])
def test_a_published_file_is_read(tmp_path, without):
    keys = KEYS | {"llama.attention.head_count_kv": np.array([1], np.int32), "general.some.extra": np.uint64(2**63)}
    checkpoint = Checkpoint.open(published(tmp_path / "x.gguf", keys, without=(without,)))
    same_model(checkpoint.config, SMALL)
    convert(checkpoint.path, tmp_path / "hf", to="hf")


def test_without_a_count_every_head_has_its_own_keys(tmp_path):
    path = published(tmp_path / "x.gguf", KEYS, without=("llama.attention.head_count_kv",))
    assert Checkpoint.open(path).config.num_key_value_heads == 2
    with pytest.raises(ShapeMismatchError, match=r"k_proj.weight is \[4, 8\], the config says \[8, 8\]"):
        convert(path, tmp_path / "hf", to="hf")


def test_scaling_as_files_of_2023_said_it(tmp_path):
    for factor, scaling in ((1.0, None), (4.0, {"rope_type": "linear", "factor": 4.0})):
        path = published(tmp_path / f"{factor}.gguf", KEYS | {"llama.rope.scale_linear": np.float32(factor)})
        assert Checkpoint.open(path).config.rope_scaling == scaling


@pytest.mark.parametrize(
    ("keys", "message"),
    [
        ({"general.architecture": "mistral4"}, "'mistral4'; 'llama' and 'mistral3' are read"),
        ({"general.architecture": np.uint32(1)}, "'1'; 'llama' and 'mistral3' are read"),
        ({"llama.expert_count": np.uint32(8)}, "mixture of experts"),
        ({"split.count": np.uint16(3)}, "one part of a split file"),
        ({"llama.attention.head_count_kv": np.array([1, 2], np.int32)}, "differs from layer to layer"),
        ({"llama.attention.value_length": np.uint32(8)}, "one head_dim"),
        ({"llama.rope.scaling.type": "longrope"}, "'longrope'; linear and yarn"),
    ],
)
def test_other_models_are_refused_by_name(tmp_path, keys, message):
    with pytest.raises(UnsupportedFeatureError, match=message):
        Checkpoint.open(published(tmp_path / "x.gguf", KEYS | keys))


@pytest.mark.parametrize("key", ["llama.block_count", "llama.embedding_length", "llama.context_length"])
def test_62_missing_and_wrong_architecture_keys(tmp_path, key):
    with pytest.raises(CorruptCheckpointError, match=key):
        Checkpoint.open(published(tmp_path / "x.gguf", KEYS, without=(key,)))
    with pytest.raises(CorruptCheckpointError, match="must be an integer"):
        Checkpoint.open(published(tmp_path / "y.gguf", KEYS | {key: "8"}))
    with pytest.raises(CorruptCheckpointError, match="must be a number"):
        Checkpoint.open(published(tmp_path / "z.gguf", KEYS | {"llama.rope.freq_base": np.uint32(1)}))


def test_62_more_layers_than_tensors(tmp_path):
    with pytest.raises(CorruptCheckpointError, match="4294967295 layers and 12 tensors"):
        Checkpoint.open(published(tmp_path / "x.gguf", KEYS | {"llama.block_count": np.uint32(2**32 - 1)}))


def test_frequency_factors(tmp_path):
    path = published(tmp_path / "x.gguf", KEYS, more={"rope_freqs.weight": ("F32", (2,))})
    with pytest.raises(UnsupportedFeatureError, match="rope_freqs"):
        Checkpoint.open(path)
    write_bytes(GgufFile(path).tensors["rope_freqs.weight"], np.ones(2, np.float32).data.cast("B"))
    assert "rope_freqs.weight" not in Checkpoint.open(path).tensors


@pytest.mark.parametrize(
    "value",
    [np.uint32(1), "[]", "{", json.dumps({"model.norm.weight": "F32"}), json.dumps({"lm_head.weight": "BF16"}),
     json.dumps({"x": "BF16"})],
)  # fmt: skip
def test_a_malformed_list_of_dtypes(tmp_path, value):
    with pytest.raises(CorruptCheckpointError, match=r"mistral\.dtypes"):
        Checkpoint.open(published(tmp_path / "x.gguf", KEYS | {"mistral.dtypes": value}))


def test_the_codes_are_those_of_the_project():
    assert set(CODES.values()) <= set(KINDS)
