"""Configs: every fault of a file is a typed error, dialects survive the round trip, presets are the published ones."""

from __future__ import annotations

import json

import pytest

from mistral_core import MistralConfig
from mistral_core.config.presets import PRESETS, TINY
from mistral_core.errors import (
    CheckpointNotFoundError,
    ConfigError,
    LimitExceededError,
    UnknownFieldError,
    UnsupportedFeatureError,
)
from mistral_core.parameters import parameter_count

RAW = {
    "dim": 4096, "n_layers": 32, "head_dim": 128, "hidden_dim": 14336, "n_heads": 32, "n_kv_heads": 8,
    "norm_eps": 1e-05, "sliding_window": 4096, "vocab_size": 32000,
}  # fmt: skip


def read(tmp_path, text, name="config.json"):
    data = text if isinstance(text, bytes) else (text if isinstance(text, str) else json.dumps(text)).encode()
    (tmp_path / name).write_bytes(data)
    return MistralConfig.from_pretrained(tmp_path)


def test_01_missing_file(tmp_path):
    with pytest.raises(CheckpointNotFoundError, match="config.json nor params.json"):
        MistralConfig.from_pretrained(tmp_path)
    with pytest.raises(CheckpointNotFoundError):
        MistralConfig.from_pretrained(tmp_path / "nowhere" / "at" / "all")


@pytest.mark.parametrize("text", ["", '{"vocab_size": 3', '{"vocab_size": 3} x'])
def test_02_broken_json_is_told_by_line_and_column(tmp_path, text):
    with pytest.raises(ConfigError, match=r"config.json.*line 1, column"):
        read(tmp_path, text)


def test_03_encodings(tmp_path):
    assert read(tmp_path, b"\xef\xbb\xbf" + TINY.to_json_string().encode()) == TINY
    with pytest.raises(ConfigError, match="UTF-8"):
        read(tmp_path, TINY.to_json_string().encode("utf-16"))
    with pytest.raises(ConfigError, match="surrogate"):
        read(tmp_path, '{"vocab_size": 100, "x": "\\ud800"}')


def test_04_deep_nesting(tmp_path):
    with pytest.raises(ConfigError, match="nested deeper"):
        read(tmp_path, '{"a": ' + "[" * 20000 + "]" * 20000 + "}")


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ('{"vocab_size": ' + "9" * 5000 + "}", "digits"),  # 5
        ('{"vocab_size": 3, "vocab_size": 4}', "twice"),  # 6
        ('{"rms_norm_eps": NaN}', "NaN"),  # 7
        ('{"rms_norm_eps": 1e999}', "beyond"),
        ("[1]", "object"),  # 8
        ("null", "object"),
    ],
)
def test_05_to_08_values_json_allows_and_we_do_not(tmp_path, text, message):
    with pytest.raises(ConfigError, match=message):
        read(tmp_path, text)


def test_a_config_of_megabytes_is_refused(tmp_path):
    with pytest.raises(LimitExceededError):
        read(tmp_path, "{" + " " * (1 << 20) + "}")


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"vocab_size": "32000"}, "vocab_size"),  # 9
        ({"vocab_size": 32000.0}, "vocab_size"),
        ({"num_hidden_layers": True}, "num_hidden_layers"),
        ({"tie_word_embeddings": 1}, "tie_word_embeddings"),
        ({"rms_norm_eps": "1e-5"}, "rms_norm_eps"),
        ({"vocab_size": 0}, "vocab_size"),  # 10
        ({"num_hidden_layers": -1}, "num_hidden_layers"),
        ({"hidden_size": 2**40}, "hidden_size"),
        ({"hidden_size": 2**20, "intermediate_size": 2**20, "head_dim": 128}, "parameters"),
        ({"num_attention_heads": 6, "num_key_value_heads": 4, "head_dim": 8}, "multiple"),  # 11
        ({"head_dim": 7}, "odd"),  # 12
        ({"head_dim": 0}, "head_dim"),
        ({"num_attention_heads": 24, "hidden_size": 100}, "head_dim"),
        ({"rms_norm_eps": 0.0}, "rms_norm_eps"),  # 13
        ({"rms_norm_eps": 1.0}, "rms_norm_eps"),
        ({"sliding_window": 0}, "sliding_window"),  # 14
        ({"sliding_window": -3}, "sliding_window"),
        ({"sliding_window": "4096"}, "sliding_window"),
        ({"sliding_window": [1, 2]}, "sliding_window"),
        ({"layer_types": ["full_attention"]}, "layer_types"),
        ({"num_hidden_layers": 1, "layer_types": ["local"]}, "layer_types"),
        ({"num_hidden_layers": 1, "layer_types": ["sliding_attention"], "sliding_window": None}, "window"),
        ({"rope_theta": 1e4, "rope_parameters": {"rope_theta": 1e6}}, "disagree"),  # 15
        ({"rope_scaling": {"type": "linear", "factor": 2.0}, "rope_parameters": {"rope_type": "default"}}, "disagree"),
        ({"rope_scaling": {"type": "yarn", "factor": 2.0}}, "original_max_position_embeddings"),  # 16
        ({"rope_theta": 0}, "rope_theta"),
        ({"eos_token_id": 32000}, "eos_token_id"),
        ({"eos_token_id": []}, "eos_token_id"),
        ({"dtype": "int8"}, "dtype"),
        ({"problem_type": "guess"}, "problem_type"),
        ({"attention_dropout": 1.0}, "attention_dropout"),
    ],
)
def test_09_to_16_wrong_values(fields, message):
    with pytest.raises(ConfigError, match=message):
        MistralConfig.from_dict(fields)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"rope_scaling": {"type": "longrope", "factor": 2.0}}, "longrope"),  # 16
        ({"rope_scaling": {"type": "linear", "factor": 2.0, "twist": 1}}, "twist"),
        ({"rope_scaling": {"type": "dynamic", "factor": 2.0}}, "dynamic"),
        ({"hidden_act": "gelu"}, "gelu"),  # 17
        ({"model_type": "mixtral"}, "mixtral"),  # 18
        ({"model_type": "mistral4"}, "mistral4"),
        ({"model_type": "mistral3", "text_config": {"model_type": "mistral4"}}, "mistral4"),
        ({"model_type": "pixtral"}, "pixtral"),
        ({"attention_bias": True}, "attention_bias"),
        ({"quantization_config": {"quant_method": "awq"}}, "awq"),  # 20
        ({"vision_config": {}}, "vision"),
        ({**RAW, "moe": {"num_experts": 8}}, "mixture"),
        ({**RAW, "multimodal": {"a": 1}}, "multimodal"),
        ({**RAW, "sliding_window": [None, 8, 16, 8]}, "several sizes"),
    ],
)
def test_16_to_20_features_that_are_not_a_dense_mistral(fields, message):
    with pytest.raises(UnsupportedFeatureError, match=message):
        MistralConfig.from_dict(fields)


def test_19_fields_that_would_choose_code_are_only_carried():
    code = {"auto_map": {"AutoModel": "evil.Model"}, "_attn_implementation": "../x", "trust_remote_code": True}
    config = MistralConfig.from_dict(code)
    assert config.replace(extra={}) == MistralConfig()
    assert {key: config.to_dict()[key] for key in code} == code


def test_21_unknown_keys_warn_once_are_kept_and_strict_refuses_them():
    with pytest.warns(UserWarning, match="colour") as caught:
        config = MistralConfig.from_dict({"colour": "red"})
    assert len(caught) == 1
    assert config.to_dict()["colour"] == "red"
    with pytest.raises(UnknownFieldError, match="colour"):
        MistralConfig.from_dict({"colour": "red"}, strict=True)


def test_23_two_files_that_disagree(tmp_path):
    (tmp_path / "params.json").write_text(json.dumps(RAW))
    same = MistralConfig.from_dict(RAW)
    assert read(tmp_path, same.to_dict()).hidden_size == 4096
    with pytest.raises(ConfigError, match="rope_theta.*disagree|disagree.*rope_theta"):
        read(tmp_path, same.replace(rope_theta=1e6).to_dict())


def test_all_that_is_wrong_is_said_at_once():
    with pytest.raises(ConfigError, match=r"vocab_size.*head_dim.*rms_norm_eps"):
        MistralConfig(vocab_size=-1, head_dim="x", rms_norm_eps=None)


@pytest.mark.parametrize("dialect", ["v4", "v5"])
@pytest.mark.parametrize("name", [*PRESETS, "tiny"])
def test_round_trip(name, dialect):
    config = PRESETS.get(name, TINY)
    assert MistralConfig.from_dict(json.loads(config.to_json_string(dialect=dialect))) == config


def test_defaults_are_the_documented_ones():
    config = MistralConfig.from_dict({})
    assert (config.vocab_size, config.hidden_size, config.intermediate_size) == (32000, 4096, 14336)
    assert (config.num_hidden_layers, config.num_attention_heads, config.num_key_value_heads) == (32, 32, 8)
    assert (config.head_dim, config.max_position_embeddings, config.rms_norm_eps) == (128, 131072, 1e-6)
    assert (config.rope_theta, config.sliding_window, config.tie_word_embeddings) == (1e4, 4096, False)
    assert (config.bos_token_id, config.eos_token_id, config.pad_token_id) == (1, 2, None)


@pytest.mark.parametrize(
    ("fields", "window"), [({}, 4096), ({"sliding_window": None}, None), ({"sliding_window": 32}, 32)]
)
def test_window_absent_null_and_given(fields, window):  # bug 7
    assert MistralConfig.from_dict(fields).layer_windows == (window,) * 32


def test_raw_params():
    config = MistralConfig.from_dict(RAW)
    assert config.rope_theta == 1e4  # v0.1 says none
    assert config.max_position_embeddings == 32768
    assert config.replace(dtype="bfloat16") == PRESETS["mistral-7b-v0.1"]
    with pytest.raises(ConfigError, match="rope_theta"):
        MistralConfig.from_dict({**RAW, "sliding_window": None})
    windows = MistralConfig.from_dict({**RAW, "sliding_window": [None, "64", 64, 64]})
    assert windows.layer_windows == (None, 64, 64, 64) * 8
    yarn = {"factor": 4, "original_max_position_embeddings": 8192, "beta": 32, "alpha": 1, "apply_scale": False}
    assert MistralConfig.from_dict({**RAW, "yarn": yarn}).rope_scaling == {
        "rope_type": "yarn", "factor": 4, "original_max_position_embeddings": 8192, "beta_fast": 32, "beta_slow": 1,
        "attention_factor": 1.0, "llama_4_scaling_beta": 0.0,
    }  # fmt: skip


@pytest.mark.parametrize(
    ("name", "parameters"),
    [
        ("mistral-7b-v0.1", 7_241_732_096),
        ("mistral-7b-v0.3", 7_248_023_552),
        ("mistral-nemo-12b-2407", 12_247_782_400),
        ("mistral-small-24b-2501", 23_572_403_200),
        ("mistral-large-123b-2407", 122_610_069_504),
        ("ministral-8b-2410", 8_019_808_256),
    ],
)
def test_published_parameter_counts(name, parameters):
    assert parameter_count(PRESETS[name]) == parameters


def test_sequence_ids_lists_become_tuples_and_back():
    config = MistralConfig(eos_token_id=[2, 5])
    assert config.eos_token_ids == (2, 5)
    assert config.to_dict()["eos_token_id"] == [2, 5]
    assert hash(config) == hash(MistralConfig(eos_token_id=(2, 5)))


def test_labels():
    assert MistralConfig(num_labels=3).id2label == {0: "LABEL_0", 1: "LABEL_1", 2: "LABEL_2"}
    named = MistralConfig(id2label={0: "no", 1: "yes"})
    assert (named.num_labels, named.label2id) == (2, {"no": 0, "yes": 1})
    assert named.replace(num_labels=3).id2label == {0: "LABEL_0", 1: "LABEL_1", 2: "LABEL_2"}


def test_minus_one_is_no_end_of_sequence():
    assert TINY.replace(eos_token_id=-1).eos_token_ids == ()
    for wrong in ({"bos_token_id": -1}, {"eos_token_id": [2, -1]}):
        with pytest.raises(ConfigError, match="token_id: -1"):
            TINY.replace(**wrong)
