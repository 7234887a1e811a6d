"""GGUF of the architecture mistral3: what llama.cpp's converter writes, and what llama.cpp computes from it."""

import json
import math
import shutil
import warnings

import gguf
import numpy as np
import pytest
from crossed import crossed
from samples import any_bits, assert_same, bits, read, write

from mistral_core import TINY, MistralConfig, convert
from mistral_core.config import Ministral3Config, rope
from mistral_core.errors import ConfigError, CorruptCheckpointError, LossyConversionError, UnsupportedFeatureError
from mistral_core.parameters import parameters, shapes
from mistral_core.weights.containers.gguf import file as gguf_file
from mistral_core.weights.formats import gguf as our_format
from mistral_core.weights.formats.base import Outline
from mistral_core.weights.opening import Checkpoint

YARN = {
    "rope_type": "yarn", "factor": 16.0, "original_max_position_embeddings": 32, "beta_fast": 32.0, "beta_slow": 1.0,
    "mscale": 1.0, "mscale_all_dim": 1.0, "llama_4_scaling_beta": 0.1,
}  # fmt: skip
"""As Ministral 3 has it, but for a shorter original length."""
OF_DEVSTRAL_2 = YARN | {"beta_fast": 4.0, "factor": 64.0, "mscale_all_dim": 0.0, "llama_4_scaling_beta": 0.0}
SHORT = {name: YARN[name] for name in ("rope_type", "factor", "original_max_position_embeddings")}
BETA = {"llama_4_scaling_beta": 0.1}
PLAIN = TINY.replace(
    model_type="ministral3", sliding_window=None, rope_scaling=YARN, max_position_embeddings=512, num_labels=2
)
CONFIGS = {
    "Ministral 3": PLAIN,
    "tied": PLAIN.replace(tie_word_embeddings=True),
    "Devstral 2": PLAIN.replace(rope_scaling=OF_DEVSTRAL_2),
    "beta alone": PLAIN.replace(rope_scaling=SHORT | BETA),
    "mscale without its partner": PLAIN.replace(rope_scaling=SHORT | BETA | {"mscale_all_dim": 1.0}),
    "attention_factor": PLAIN.replace(rope_scaling=SHORT | BETA | {"attention_factor": 0.9}),
    "attention_factor beside mscale": PLAIN.replace(rope_scaling=YARN | {"attention_factor": 1.25}),
    "no rotation scaled": PLAIN.replace(
        rope_scaling={"rope_type": "default", "original_max_position_embeddings": 16, **BETA}
    ),
    "linear": PLAIN.replace(
        rope_scaling={"rope_type": "linear", "factor": 2.5, "original_max_position_embeddings": 16, **BETA}
    ),
    "one head, 14B's theta": PLAIN.replace(num_key_value_heads=1, rope_theta=1e9),
    "window": PLAIN.replace(sliding_window=5),
}
pytestmark = pytest.mark.filterwarnings("ignore:.*sliding_window")


@pytest.mark.parametrize(("name", "dtype"), crossed(CONFIGS, "bfloat16", "float16", "float32"))
def test_every_bit_and_the_config_come_back(tmp_path, name, dtype):
    config, arrays = CONFIGS[name], any_bits(CONFIGS[name], dtype)
    source = write(tmp_path / "hf", "hf", arrays, config)
    convert(source, tmp_path / "gguf", to="gguf", check_finite=False)
    convert(tmp_path / "gguf", tmp_path / "back", to="hf", check_finite=False)
    assert_same(read(tmp_path / "gguf"), arrays)
    assert_same(read(tmp_path / "back"), arrays)
    expected = Checkpoint.open(source).config
    assert Checkpoint.open(tmp_path / "gguf").config == Checkpoint.open(tmp_path / "back").config == expected
    assert expected.model_type == "ministral3"


@pytest.mark.parametrize("name", CONFIGS)
def test_a_file_alone_says_what_matters(tmp_path, name):
    config = CONFIGS[name]
    path = write(tmp_path / "model", "gguf", any_bits(config), config)
    found = Checkpoint.open(shutil.copy(path / "model.gguf", tmp_path / "x.gguf")).config
    assert rope.rotary_table(found) == rope.rotary_table(config)
    assert rope.query_scaling(found) == rope.query_scaling(config)
    if name != "mscale without its partner":  # of which nothing is used
        assert found.rope_scaling == config.rope_scaling
    said = ("rope_scaling", "architectures", "extra", "dtype")
    assert found.replace(**{each: getattr(config, each) for each in said}) == config


def keys_of(path):
    """The keys of a file below its architecture, as gguf reads them."""
    fields = gguf.GGUFReader(path).fields.items()
    return {name.removeprefix("mistral3."): field.contents() for name, field in fields if name.startswith("mistral3.")}


OF_CONVERTER = {
    "context_length": 512, "embedding_length": 48, "block_count": 3, "feed_forward_length": 80, "vocab_size": 97,
    "attention.head_count": 6, "attention.head_count_kv": 2, "attention.key_length": 16, "attention.value_length": 16,
    "attention.layer_norm_rms_epsilon": np.float32(1e-5), "attention.temperature_scale": np.float32(0.1),
    "rope.dimension_count": 16, "rope.freq_base": 1e6, "rope.scaling.type": "yarn", "rope.scaling.factor": 16.0,
    "rope.scaling.original_context_length": 32, "rope.scaling.yarn_beta_fast": 32.0,
    "rope.scaling.yarn_beta_slow": 1.0, "rope.scaling.yarn_log_multiplier": 1.0,
}  # fmt: skip
"""What llama.cpp's converter writes of PLAIN."""


def test_the_keys_are_those_of_the_converter(tmp_path):
    path = write(tmp_path / "model", "gguf", any_bits(PLAIN), PLAIN) / "model.gguf"
    assert gguf.GGUFReader(path).get_field("general.architecture").contents() == "mistral3"
    assert keys_of(path) == OF_CONVERTER
    assert not [name for name in gguf.GGUFReader(path).fields if name.startswith("llama.")]


@pytest.mark.parametrize(
    ("scaling", "written", "absent"),
    [
        (OF_DEVSTRAL_2, {"yarn_log_multiplier": 0.0, "yarn_beta_fast": 4.0}, ["attn_factor"]),
        (SHORT | BETA, {"factor": 16.0}, ["yarn_log_multiplier", "attn_factor", "yarn_beta_fast"]),
        (SHORT | BETA | {"attention_factor": 1.0}, {"attn_factor": np.float32(1 / (1 + 0.1 * math.log(16)))}, []),
        (YARN | {"attention_factor": 1.25}, {"attn_factor": 1.25, "yarn_log_multiplier": 1.0}, []),
        ({"rope_type": "default", "original_max_position_embeddings": 16, **BETA}, {}, ["type", "factor"]),
    ],
)
def test_the_keys_of_other_scalings(tmp_path, scaling, written, absent):
    config = PLAIN.replace(rope_scaling=scaling)
    found = keys_of(write(tmp_path / "model", "gguf", any_bits(config), config) / "model.gguf")
    assert {name: found[f"rope.scaling.{name}"] for name in written} == written
    assert not [name for name in absent if f"rope.scaling.{name}" in found]
    assert found["attention.temperature_scale"] == np.float32(scaling["llama_4_scaling_beta"])


def test_mistral_and_ministral_stay_llama(tmp_path):
    for model_type, window in (("mistral", None), ("ministral", 5)):
        config = TINY.replace(model_type=model_type, sliding_window=window)
        path = write(tmp_path / model_type, "gguf", any_bits(config), config)
        assert gguf.GGUFReader(path / "model.gguf").get_field("general.architecture").contents() == "llama"
        assert Checkpoint.open(path).config.model_type == model_type


@pytest.mark.parametrize(
    ("bounds", "architecture"),
    [
        ({}, "llama"),
        ({"beta_fast": 32, "beta_slow": 1.0}, "llama"),
        ({"beta_fast": 40.0}, "llama"),  # no pair turns so often in the original length
        ({"beta_slow": 0.1}, "mistral3"),
        ({"beta_fast": 0.5, "beta_slow": 0.25, "mscale": 1.0, "mscale_all_dim": 1.0}, "mistral3"),
    ],
)
def test_a_mistral_is_a_mistral3_where_bounds_matter(tmp_path, bounds, architecture):
    config = PLAIN.replace(model_type="mistral", rope_scaling=SHORT | bounds)
    path = write(tmp_path / "model", "gguf", any_bits(config), config)
    assert gguf.GGUFReader(path / "model.gguf").get_field("general.architecture").contents() == architecture
    assert "attention.temperature_scale" not in keys_of(path / "model.gguf")
    assert Checkpoint.open(path).config.rope_scaling == config.rope_scaling
    alone = Checkpoint.open(shutil.copy(path / "model.gguf", tmp_path / "x.gguf")).config
    assert (alone.model_type, rope.rotary_table(alone)) == ("mistral", rope.rotary_table(config))


def test_rows_are_in_pairs_and_vectors_float32(tmp_path):
    arrays = any_bits(PLAIN, "bfloat16")
    path = write(tmp_path / "model", "gguf", arrays, PLAIN)
    by_name = {tensor.name: tensor for tensor in gguf.GGUFReader(path / "model.gguf").tensors}
    assert by_name["blk.1.attn_norm.weight"].tensor_type == gguf.GGMLQuantizationType.F32
    for ours, theirs in (("q_proj", "attn_q"), ("k_proj", "attn_k")):
        rows = arrays[f"model.layers.1.self_attn.{ours}.weight"].view(np.uint16)
        assert bits(by_name[f"blk.1.{theirs}.weight"].data[1]) == bits(rows[PLAIN.head_dim // 2])


@pytest.mark.parametrize("kind", ["Q8_0", "Q4_0"])
def test_quantised_writing(tmp_path, kind):
    config = PLAIN.replace(hidden_size=64)
    arrays = {name: np.ones(shape, np.float32) for name, shape in shapes(config).items()}
    source = write(tmp_path / "hf", "hf", arrays, config)
    with pytest.raises(LossyConversionError, match=f"quantised to {kind}"):
        convert(source, tmp_path / "q", to="gguf", dtype=kind)
    convert(source, tmp_path / "q", to="gguf", dtype=kind, allow_lossy=True)
    assert Checkpoint.open(tmp_path / "q").config == Checkpoint.open(source).config
    assert {tensor.tensor_type.name for tensor in gguf.GGUFReader(tmp_path / "q" / "model.gguf").tensors} >= {kind}


def test_the_template_goes_with_it(tmp_path):
    texts = {"chat_template.jinja": "{{ '[INST]' }}é".encode()}
    path = write(tmp_path / "model", "gguf", any_bits(PLAIN), PLAIN, texts=texts) / "model.gguf"
    assert gguf.GGUFReader(path).get_field("tokenizer.chat_template").contents() == "{{ '[INST]' }}é"
    alone = Checkpoint.open(shutil.copy(path, tmp_path / "x.gguf"))
    assert alone.texts["chat_template.jinja"]() == texts["chat_template.jinja"]


def test_the_window_is_told(tmp_path):
    with warnings.catch_warnings(record=True) as found:
        warnings.simplefilter("always")
        write(tmp_path / "a", "gguf", any_bits(PLAIN), PLAIN)
        assert not found
        write(tmp_path / "b", "gguf", any_bits(CONFIGS["window"]), CONFIGS["window"])
    assert ["ignores sliding_window 5" in str(each.message) for each in found] == [True]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"rope_scaling": YARN | {"mscale": 0.707}}, "cannot say rope_scaling"),
        ({"rope_scaling": YARN | {"mscale_all_dim": -0.5}}, "cannot say rope_scaling"),
        ({"rope_scaling": YARN | {"attention_factor": 1.123456789}}, "cannot say rope_scaling"),
        ({"rope_scaling": YARN | {"truncate": False, "factor": 3.0}, "head_dim": 32}, "cannot say rope_scaling"),
        ({"rope_scaling": YARN | {"llama_4_scaling_beta": 0.123456789}}, "llama_4_scaling_beta is 0.123456789"),
        ({"rope_scaling": YARN | {"mscale_all_dim": 1 / 3}}, "mscale_all_dim is 0.333"),
        ({"rope_scaling": YARN | {"original_max_position_embeddings": 2**33}}, "original_max_position_embeddings must"),
        ({"rope_scaling": YARN | {"beta_fast": 1e-50}}, "beta_fast is 1e-50"),
        (
            {"layer_types": ("full_attention", "sliding_attention", "full_attention"), "sliding_window": 5},
            "one window for all layers of a mistral3",
        ),
        (
            {
                "model_type": "ministral", "rope_scaling": None, "sliding_window": 5,
                "layer_types": ("full_attention", "sliding_attention", "full_attention"),
            },
            "one window for all layers of a llama",
        ),
        (
            {
                "rope_scaling": {
                    "rope_type": "llama3", "factor": 8.0, "original_max_position_embeddings": 64,
                    "low_freq_factor": 1.0, "high_freq_factor": 4.0, **BETA,
                }
            },
            "cannot say rope_scaling",
        ),
    ],
)  # fmt: skip
def test_what_gguf_cannot_say(changes, message):
    config = PLAIN.replace(**changes)
    dtypes = {name: "F32" for name, _ in parameters(config)}
    with pytest.raises(UnsupportedFeatureError, match=f"gguf: .*{message}"):
        our_format.check(Outline(config, "MistralForCausalLM", dtypes))


# What others publish


SMALL = TINY.replace(
    vocab_size=7, hidden_size=8, intermediate_size=6, num_hidden_layers=1, num_attention_heads=2, num_key_value_heads=1,
    head_dim=4, sliding_window=None, rms_norm_eps=1e-5, pad_token_id=None, rope_theta=1e6, max_position_embeddings=64,
    num_labels=2,
)  # fmt: skip
SIZES = {
    "mistral3.block_count": np.uint32(1),
    "mistral3.context_length": np.uint32(64),
    "mistral3.embedding_length": np.uint32(8),
    "mistral3.feed_forward_length": np.uint32(6),
    "mistral3.attention.head_count": np.uint32(2),
    "mistral3.attention.head_count_kv": np.uint32(1),
    "mistral3.attention.layer_norm_rms_epsilon": np.float32(1e-5),
    "mistral3.attention.key_length": np.uint32(4),
    "mistral3.attention.value_length": np.uint32(4),
    "mistral3.rope.dimension_count": np.uint32(4),
    "mistral3.rope.freq_base": np.float32(1e6),
    "mistral3.vocab_size": np.uint32(7),
}
IN_YARN = {
    "mistral3.rope.scaling.type": "yarn",
    "mistral3.rope.scaling.factor": np.float32(16),
    "mistral3.rope.scaling.original_context_length": np.uint32(32),
    "mistral3.rope.scaling.yarn_beta_fast": np.float32(32),
    "mistral3.rope.scaling.yarn_beta_slow": np.float32(1),
    "mistral3.rope.scaling.yarn_log_multiplier": np.float32(1),
}
TEMPERATURE = {"mistral3.attention.temperature_scale": np.float32(0.1)}
OF_MINISTRAL_3 = SIZES | IN_YARN | TEMPERATURE


def published(path, keys, *, without=(), architecture="mistral3"):
    """A file of zeros with the tensors of SMALL."""
    names = {row.gguf.format(0): shapes(SMALL)[name] for name, row in dict(parameters(SMALL)).items()}
    specs = {name: ("F32", shape) for name, shape in names.items()}
    values = {"general.architecture": architecture, **keys, "tokenizer.ggml.model": "no_vocab"}
    gguf_file.create(path, {key: value for key, value in values.items() if key not in without}, specs)
    return path


def test_what_the_converter_writes_is_read(tmp_path):
    checkpoint = Checkpoint.open(published(tmp_path / "x.gguf", OF_MINISTRAL_3))
    assert checkpoint.config == SMALL.replace(model_type="ministral3", rope_scaling=YARN)
    convert(checkpoint.path, tmp_path / "hf", to="hf")
    written = json.loads((tmp_path / "hf" / "config.json").read_text())
    assert written["model_type"] == "ministral3"
    assert written["architectures"] == ["Ministral3ForCausalLM"]
    assert written["rope_parameters"] == {**YARN, "rope_theta": 1e6}


def test_beta_decides_what_a_mistral3_is(tmp_path):
    plain = Checkpoint.open(published(tmp_path / "plain.gguf", SIZES)).config  # as of Mistral Small 3.1
    assert (plain.model_type, plain.rope_scaling) == ("mistral", None)
    yarn = Checkpoint.open(published(tmp_path / "yarn.gguf", SIZES | IN_YARN)).config
    expected = {name: value for name, value in YARN.items() if name != "llama_4_scaling_beta"}
    assert (yarn.model_type, yarn.rope_scaling) == ("mistral", expected)
    none = {"mistral3.attention.temperature_scale": np.float32(0)}
    zero = Checkpoint.open(published(tmp_path / "zero.gguf", SIZES | IN_YARN | none)).config  # as of Devstral 2
    assert (zero.model_type, zero.rope_scaling["llama_4_scaling_beta"]) == ("ministral3", 0.0)
    assert rope.query_scaling(zero) is None
    alone = Checkpoint.open(published(tmp_path / "alone.gguf", SIZES | TEMPERATURE)).config
    assert alone.rope_scaling == {"rope_type": "default", "original_max_position_embeddings": 64, **BETA}


@pytest.mark.parametrize("factor", [1.0, 16.0, 64.0])
@pytest.mark.parametrize("multiplier", [None, 0.0, 0.5, 1.0, 2.0])
@pytest.mark.parametrize("attention", [None, 1.0, 0.75])
def test_what_llama_cpp_multiplies_cos_and_sin_by(tmp_path, factor, multiplier, attention):
    keys = OF_MINISTRAL_3 | {"mistral3.rope.scaling.factor": np.float32(factor)}
    for name, value in (("yarn_log_multiplier", multiplier), ("attn_factor", attention)):
        keys.pop(f"mistral3.rope.scaling.{name}", None)
        keys |= {} if value is None else {f"mistral3.rope.scaling.{name}": np.float32(value)}
    found = rope.rotary_table(Checkpoint.open(published(tmp_path / "x.gguf", keys)).config).attention_factor
    logarithm = 0.1 * math.log(factor)
    of_yarn = (1 + logarithm) / (1 + (multiplier or 0) * logarithm)
    assert found == pytest.approx(of_yarn * (attention or 1), rel=1e-6)


def test_without_an_original_length_it_is_the_context(tmp_path):
    key = "mistral3.rope.scaling.original_context_length"
    config = Checkpoint.open(published(tmp_path / "x.gguf", OF_MINISTRAL_3, without=(key,))).config
    assert rope.query_scaling(config) == rope.QueryScaling(0.1, 64)
    assert config.rope_scaling["original_max_position_embeddings"] == 64


def test_a_factor_without_a_type_is_linear(tmp_path):
    keys = SIZES | TEMPERATURE | {"mistral3.rope.scaling.factor": np.float32(4)}
    config = Checkpoint.open(published(tmp_path / "x.gguf", keys)).config
    expected = {"rope_type": "linear", "factor": 4.0, "original_max_position_embeddings": 64, **BETA}
    assert config.rope_scaling == expected
    keys["mistral3.rope.scaling.type"] = "none"
    config = Checkpoint.open(published(tmp_path / "y.gguf", keys)).config
    assert config.rope_scaling == {"rope_type": "default", "original_max_position_embeddings": 64, **BETA}


def test_absent_keys_mean_what_llama_cpp_takes_them_for(tmp_path):
    ours = Ministral3Config()
    assert (ours.head_dim, ours.pad_token_id) == (128, 11)  # and not what they mean in a config.json
    without = [f"mistral3.{name}" for name in (
        "attention.key_length", "attention.value_length", "rope.dimension_count", "rope.freq_base", "vocab_size",
    )]  # fmt: skip
    config = Checkpoint.open(published(tmp_path / "x.gguf", OF_MINISTRAL_3, without=without)).config
    assert (config.head_dim, config.pad_token_id, config.rope_theta, config.vocab_size) == (4, None, 1e4, 7)


def test_an_older_architecture_scales_no_queries(tmp_path):
    keys = {name.replace("mistral3.", "llama."): value for name, value in OF_MINISTRAL_3.items()}
    config = Checkpoint.open(published(tmp_path / "x.gguf", keys, architecture="llama")).config
    assert (config.model_type, rope.query_scaling(config)) == ("mistral", None)
    assert rope.rotary_table(config).attention_factor == 1 + 0.1 * math.log(16)


def test_the_file_wins_over_a_manifest(tmp_path):
    written = {}
    for beta in (0.1, 0.25):
        config = PLAIN.replace(rope_scaling=YARN | {"llama_4_scaling_beta": beta})
        written[beta] = write(tmp_path / f"{beta}", "gguf", any_bits(config), config)
    mistral = PLAIN.replace(model_type="mistral", rope_scaling=None)
    written[None] = write(tmp_path / "mistral", "gguf", any_bits(mistral), mistral)
    for beta, other, kind in ((0.1, 0.25, "ministral3"), (None, 0.1, "ministral3"), (0.1, None, "mistral")):
        target = tmp_path / f"{beta} {other}"
        shutil.copytree(written[beta], target)
        shutil.copy(written[other] / "model.gguf", target / "model.gguf")
        config = Checkpoint.open(target).config
        assert (config.model_type, (config.rope_scaling or {}).get("llama_4_scaling_beta")) == (kind, other)


# Faults


@pytest.mark.parametrize("key", ["block_count", "context_length", "attention.head_count"])
def test_62_missing_keys(tmp_path, key):
    with pytest.raises(CorruptCheckpointError, match=rf"lacks the keys mistral3\.{key}; convert it again"):
        Checkpoint.open(published(tmp_path / "x.gguf", OF_MINISTRAL_3, without=(f"mistral3.{key}",)))
    others = {name.replace("mistral3.", "llama."): value for name, value in OF_MINISTRAL_3.items()}
    with pytest.raises(CorruptCheckpointError, match=rf"lacks the keys .*mistral3\.{key}"):
        Checkpoint.open(published(tmp_path / "y.gguf", others))


def test_62_yarn_without_a_factor(tmp_path):
    path = published(tmp_path / "x.gguf", OF_MINISTRAL_3, without=("mistral3.rope.scaling.factor",))
    with pytest.raises(CorruptCheckpointError, match=r"mistral3\.rope\.scaling\.factor must be a number, got 'None'"):
        Checkpoint.open(path)


@pytest.mark.parametrize(
    ("name", "value", "error", "message"),
    [
        ("attention.temperature_scale", np.uint32(1), CorruptCheckpointError, "must be a number, got '1'"),
        ("attention.temperature_scale", "0.1", CorruptCheckpointError, "must be a number, got '0.1'"),
        ("attention.temperature_scale", np.float32(np.nan), ConfigError, "llama_4_scaling_beta must be a number"),
        ("attention.temperature_scale", np.float32(-1), ConfigError, "llama_4_scaling_beta must be 0 or more, got -1"),
        ("rope.scaling.yarn_log_multiplier", np.uint32(1), CorruptCheckpointError, "must be a number, got '1'"),
        ("rope.scaling.yarn_log_multiplier", np.float32(-1), CorruptCheckpointError, r"must be 0 or more, got -1\.0"),
        ("rope.scaling.yarn_log_multiplier", np.float32(np.inf), ConfigError, "mscale_all_dim must be a number"),
        ("rope.scaling.original_context_length", np.float32(32), CorruptCheckpointError, "must be an integer"),
        ("rope.scaling.original_context_length", np.uint32(0), CorruptCheckpointError, "must be 1 or more beside"),
        ("rope.scaling.type", "longrope", UnsupportedFeatureError, "'longrope'; linear and yarn are read"),
        ("rope.scaling.type", np.uint32(2), UnsupportedFeatureError, "'2'; linear and yarn are read"),
        ("rope.scaling.type", np.array([1, 2], np.int32), UnsupportedFeatureError, "linear and yarn are read"),
        ("rope.scaling.factor", np.float32(0.5), ConfigError, "factor must be 1 or more"),
        ("attention.value_length", np.uint32(8), UnsupportedFeatureError, "one head_dim"),
        ("attention.head_count_kv", np.array([1, 2], np.int32), UnsupportedFeatureError, "differs from layer to layer"),
        ("expert_count", np.uint32(8), UnsupportedFeatureError, "is 8: a mixture of experts"),
        ("block_count", np.uint32(2**32 - 1), CorruptCheckpointError, "4294967295 layers and 12 tensors"),
    ],
)
def test_62_wrong_keys(tmp_path, name, value, error, message):
    with pytest.raises(error, match=message):
        Checkpoint.open(published(tmp_path / "x.gguf", OF_MINISTRAL_3 | {f"mistral3.{name}": value}))


@pytest.mark.parametrize("kind", ["linear", "none"])
def test_62_a_factor_of_yarn_without_yarn(tmp_path, kind):
    keys = OF_MINISTRAL_3 | {"mistral3.rope.scaling.type": kind, "mistral3.rope.scaling.attn_factor": np.float32(0.5)}
    with pytest.raises(UnsupportedFeatureError, match=r"attn_factor must be 1 without yarn, got 0\.5"):
        Checkpoint.open(published(tmp_path / "x.gguf", keys))


def test_62_the_names_of_older_ollama(tmp_path):
    keys = OF_MINISTRAL_3 | {"mistral3.rope.scaling_beta": np.float32(0.1)}
    assert Checkpoint.open(published(tmp_path / "both.gguf", keys)).config.rope_scaling == YARN
    path = published(tmp_path / "x.gguf", keys, without=TEMPERATURE)
    with pytest.raises(
        UnsupportedFeatureError, match=r"mistral3\.rope\.scaling_beta is a name that only older versions"
    ):
        Checkpoint.open(path)


def test_62_no_length_at_all(tmp_path):
    keys = SIZES | TEMPERATURE | {"mistral3.context_length": np.uint32(0)}
    with pytest.raises(
        CorruptCheckpointError, match=r"must be 1 or more beside mistral3\.attention\.temperature_scale"
    ):
        Checkpoint.open(published(tmp_path / "x.gguf", keys))


def test_the_default_config_of_a_type_is_written():
    config = MistralConfig(model_type="ministral3", num_hidden_layers=1)
    our_format.check(Outline(config, "MistralForCausalLM", {name: "BF16" for name, _ in parameters(config)}))
