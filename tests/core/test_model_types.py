"""The model types: what absent fields mean, which class names files have, and configs that come back as they were."""

from __future__ import annotations

import copy
import json
import pickle

import pytest

import mistral_core
from mistral_core import Ministral3Config, MinistralConfig, MistralConfig
from mistral_core.config import model_types, params_json, rope
from mistral_core.config.presets import PRESETS, TINY
from mistral_core.errors import ConfigError, UnknownFieldError, UnsupportedFeatureError
from mistral_core.parameters import parameter_count

SCALING = {
    "rope_type": "yarn", "factor": 16.0, "original_max_position_embeddings": 16384, "beta_fast": 32.0, "beta_slow": 1.0,
    "mscale": 1.0, "mscale_all_dim": 1.0, "llama_4_scaling_beta": 0.1,
}  # fmt: skip
TEXT = {
    "attention_dropout": 0.0, "head_dim": 16, "hidden_act": "silu", "hidden_size": 48, "initializer_range": 0.02,
    "intermediate_size": 80, "max_position_embeddings": 262144, "model_type": "ministral3", "num_attention_heads": 6,
    "num_hidden_layers": 3, "num_key_value_heads": 2, "rms_norm_eps": 1e-05, "sliding_window": None, "use_cache": True,
    "vocab_size": 97, "rope_parameters": {**SCALING, "rope_theta": 1e6},
}  # fmt: skip
# the keys of Ministral-3-3B-Instruct-2512's config.json, with small sizes
WHOLE = {
    "architectures": ["Mistral3ForConditionalGeneration"], "dtype": "bfloat16", "image_token_index": 10,
    "model_type": "mistral3", "multimodal_projector_bias": False, "projector_hidden_act": "gelu",
    "spatial_merge_size": 2, "text_config": {**TEXT, "tie_word_embeddings": True},
    "transformers_version": "5.0.0.dev0", "vision_feature_layer": -1,
    "vision_config": {
        "attention_dropout": 0.0, "head_dim": 64, "hidden_act": "silu", "hidden_size": 1024, "image_size": 1540,
        "initializer_range": 0.02, "intermediate_size": 4096, "model_type": "pixtral", "num_attention_heads": 16,
        "num_channels": 3, "num_hidden_layers": 24, "patch_size": 14, "rope_parameters": {"rope_theta": 10000.0},
    },
}  # fmt: skip
MINISTRAL3 = {**TEXT, "architectures": ["Ministral3ForCausalLM"], "bos_token_id": 1, "eos_token_id": 2}
MINISTRAL = {
    **{key: value for key, value in MINISTRAL3.items() if key != "rope_parameters"},
    "model_type": "ministral", "architectures": ["MinistralForSequenceClassification"], "sliding_window": 5,
    "layer_types": ["full_attention", "sliding_attention", "sliding_attention"],
    "rope_parameters": {"rope_type": "default", "rope_theta": 1e8},
}  # fmt: skip
# the keys of Ministral 3's params.json, with small sizes
RAW = {
    "dim": 48, "n_layers": 3, "head_dim": 16, "hidden_dim": 80, "n_heads": 6, "n_kv_heads": 2, "rope_theta": 1e6,
    "norm_eps": 1e-05, "vocab_size": 97, "tied_embeddings": False, "max_position_embeddings": 262144,
    "llama_4_scaling": {"original_max_position_embeddings": 16384, "beta": 0.1}, "q_lora_rank": None,
    "qk_rope_head_dim": None, "qk_nope_head_dim": None, "kv_lora_rank": None, "v_head_dim": None,
    "yarn": {"original_max_position_embeddings": 16384, "factor": 16, "apply_scale": False, "beta": 32, "alpha": 1},
    "vision_encoder": {"image_token_id": 10, "hidden_size": 1024, "add_pre_mm_projector_layer_norm": True},
}  # fmt: skip


def lost(before, after, path=""):
    """What of a dictionary is not in another one, by the path of its key."""
    for key, value in before.items():
        if key not in after:
            yield path + key
        elif isinstance(value, dict) and isinstance(after[key], dict):
            yield from lost(value, after[key], f"{path}{key}.")
        elif after[key] != value:
            yield f"{path}{key}={value!r}"


@pytest.mark.parametrize("data", [MINISTRAL, MINISTRAL3, WHOLE], ids=["ministral", "ministral3", "mistral3"])
@pytest.mark.parametrize("dialect", ["v4", "v5"])
def test_every_key_comes_back(data, dialect):
    whole = data is WHOLE
    config = MistralConfig.from_dict(data, strict=True)
    written = config.to_dict(dialect=dialect, with_vision=whole)
    assert MistralConfig.from_dict(written) == config
    assert MistralConfig.from_dict(config.to_dict(dialect=dialect)) == config
    assert not list(lost(data, MistralConfig.from_dict(written).to_dict(dialect="v5", with_vision=whole)))
    if dialect == "v5":
        assert not list(lost(data, written))


def test_a_type_that_only_transformers_5_has_is_written_for_it():
    assert "rope_parameters" in MistralConfig.from_dict(MINISTRAL3).to_dict()
    assert "rope_theta" in TINY.to_dict()


def test_the_text_part_of_a_whole_is_a_config_of_its_own():
    config = MistralConfig.from_dict(WHOLE)
    assert (config.model_type, config.architectures, config.dtype) == (
        "ministral3",
        ("MistralForCausalLM",),
        "bfloat16",
    )
    assert config.tie_word_embeddings
    assert config.to_dict()["architectures"] == ["Ministral3ForCausalLM"]
    assert "text_config" not in config.to_dict()


@pytest.mark.parametrize(
    ("of_text", "of_whole", "tied"), [(None, None, False), (None, True, True), (False, True, False), (True, None, True)]
)
def test_the_text_part_says_whether_the_head_is_tied(of_text, of_whole, tied):
    text = TEXT if of_text is None else {**TEXT, "tie_word_embeddings": of_text}
    whole = {**WHOLE, "text_config": text} | ({} if of_whole is None else {"tie_word_embeddings": of_whole})
    assert MistralConfig.from_dict(whole).tie_word_embeddings is tied


def test_a_whole_without_a_text_part_is_transformers_default():
    config = MistralConfig.from_dict({"model_type": "mistral3", "vision_config": {}})
    assert config.replace(extra={}, dtype="bfloat16", architectures=None) == PRESETS["mistral-small-3.2-24b"].replace(
        pad_token_id=None
    )


def test_wrong_parts_of_a_whole_are_named():
    with pytest.raises(ConfigError, match="text_config must be an object, got 5"):
        MistralConfig.from_dict({**WHOLE, "text_config": 5})
    with pytest.raises(ConfigError, match="text part of a model that also sees"):
        TINY.to_dict(with_vision=True)


def test_raw_params_of_a_model_that_also_sees():
    config = MistralConfig.from_dict(RAW, strict=True)
    assert (config.model_type, rope.query_scaling(config)) == ("ministral3", (0.1, 16384))
    assert rope.rotary_table(config).attention_factor == 1.0
    written = params_json.write(config, with_vision=True)
    assert not list(lost(RAW, written))
    assert "vision_encoder" not in params_json.write(config)
    of_file = MistralConfig.from_dict({**MINISTRAL3, "tie_word_embeddings": False})
    assert rope.rotary_table(of_file) == rope.rotary_table(config)


def test_raw_params_with_yarn_alone_scale_no_queries():  # as Devstral 2's
    data = {key: value for key, value in RAW.items() if key not in ("llama_4_scaling", "vision_encoder")}
    config = MistralConfig.from_dict({**data, "yarn": {**RAW["yarn"], "apply_scale": True}})
    assert (config.model_type, rope.query_scaling(config)) == ("ministral3", None)
    assert rope.rotary_table(config).attention_factor > 1.2
    assert "llama_4_scaling" not in params_json.write(config)


def test_raw_params_with_windows_by_layer_are_a_ministral():  # as Ministral 8B's
    data = {key: value for key, value in RAW.items() if key not in ("llama_4_scaling", "yarn", "vision_encoder")}
    config = MistralConfig.from_dict({**data, "sliding_window": [None, 8, 8]})
    assert (config.model_type, config.layer_windows) == ("ministral", (None, 8, 8))


@pytest.mark.parametrize(
    ("changes", "error", "message"),
    [
        ({"llama_4_scaling": {"beta": 0.1}}, ConfigError, "llama_4_scaling must be an object of beta and"),
        ({"llama_4_scaling": 5}, ConfigError, "llama_4_scaling must be"),
        (
            {"llama_4_scaling": {"beta": 0.1, "original_max_position_embeddings": 8}},
            UnsupportedFeatureError,
            "one original_max_position_embeddings, got 8 and 16384",
        ),
    ],
)
def test_raw_scaling_that_cannot_be_read(changes, error, message):
    with pytest.raises(error, match=message):
        MistralConfig.from_dict({**RAW, **changes})


@pytest.mark.parametrize(
    ("scaling", "message"),
    [
        ({**SCALING, "llama_4_scaling_beta": None}, "llama_4_scaling_beta must be there"),
        ({**SCALING, "llama_4_scaling_beta": -0.1}, "llama_4_scaling_beta must be 0 or more, got -0.1"),
        ({**SCALING, "llama_4_scaling_beta": "x"}, "llama_4_scaling_beta must be a number"),
        ({**SCALING, "original_max_position_embeddings": 8.5}, "original_max_position_embeddings must be an integer"),
        ({"rope_type": "default", "llama_4_scaling_beta": 0.1}, "needs 'original_max_position_embeddings'"),
    ],
)
def test_scaling_of_queries_that_means_nothing(scaling, message):
    with pytest.raises(ConfigError, match=message):
        Ministral3Config(rope_scaling=scaling)


def test_only_ministral3_scales_queries():
    with pytest.raises(ConfigError, match="model_type ministral3 and nowhere else, got model_type mistral"):
        MistralConfig(rope_scaling=SCALING)
    assert rope.query_scaling(Ministral3Config(rope_scaling={**SCALING, "llama_4_scaling_beta": 0})) is None
    default = {"rope_type": "default", "llama_4_scaling_beta": 0.1, "original_max_position_embeddings": 8}
    assert rope.query_scaling(Ministral3Config(rope_scaling=default)) == (0.1, 8)
    assert rope.rotary_table(Ministral3Config(rope_scaling=default)).attention_factor == 1.0


def test_an_unknown_type_is_refused():
    with pytest.raises(UnsupportedFeatureError, match="model_type must be one of mistral, ministral, ministral3, got"):
        MistralConfig(model_type="mistral4")
    for kind in (["mistral"], {}, 5, ""):
        for data in ({"model_type": kind}, {"model_type": "mistral3", "text_config": {"model_type": kind}}):
            with pytest.raises(UnsupportedFeatureError, match="model_type"):
                MistralConfig.from_dict(data)
        with pytest.raises(UnsupportedFeatureError, match="model_type"):
            MistralConfig(model_type=kind)


# The names of the configs


@pytest.mark.parametrize("kind", ["ministral", "ministral3"])
def test_absent_fields_mean_what_transformers_means(kind):
    transformers = pytest.importorskip("transformers")
    name = f"{model_types.TYPES[kind].classes}Config"
    theirs, ours = getattr(transformers, name)(), getattr(mistral_core, name)()
    for field in MINISTRAL.keys() - {"architectures", "rope_parameters", "layer_types", "head_dim"}:
        assert getattr(ours, field) == getattr(theirs, field), field
    repeated = {"type", "max_position_embeddings"}
    their_rope = {key: value for key, value in theirs.rope_parameters.items() if key not in repeated}
    assert ours.rope_parameters == their_rope
    assert (ours.pad_token_id, ours.head_dim) == (theirs.pad_token_id, theirs.head_dim or 128)


def test_configs_by_the_name_of_their_type():
    config = Ministral3Config(hidden_size=2048)
    assert type(config) is MistralConfig
    assert (config.model_type, config.head_dim, config.num_hidden_layers) == ("ministral3", 128, 34)
    assert isinstance(config, Ministral3Config)
    assert isinstance(config, MistralConfig)
    assert not isinstance(config, MinistralConfig)
    assert not isinstance(TINY, Ministral3Config)
    assert config == MistralConfig(model_type="ministral3", hidden_size=2048)
    assert MinistralConfig().model_type == "ministral"
    assert MistralConfig(512, model_type="ministral3").vocab_size == 512


def test_a_config_by_the_name_of_its_type_reads_files(tmp_path):
    (tmp_path / "config.json").write_text(json.dumps(MINISTRAL3))
    assert Ministral3Config.from_pretrained(tmp_path) == MistralConfig.from_dict(MINISTRAL3)


def test_published_sizes():
    """Parameters of the text part: recomputed from the published tensors' shapes."""
    counts = {"3b": 3_429_006_336, "8b": 8_489_553_920, "14b": 13_506_073_600}
    for size, count in counts.items():
        assert parameter_count(PRESETS[f"ministral-3-{size}"]) == count
    assert rope.rotary_table(PRESETS["ministral-3-14b"]).attention_factor == 1.0
    assert rope.rotary_table(PRESETS["devstral-2-123b"]).attention_factor == pytest.approx(1.4158883)


# Keyword arguments that nobody knows


def test_unknown_keywords_are_kept():
    config = MistralConfig(output_attentions=True, my_field=1, num_labels=3)
    assert (config.my_field, config.extra, config.output_attentions) == (1, {"my_field": 1}, True)
    assert config.replace(hidden_size=64).my_field == 1
    assert config.replace(my_field=2, other=3).extra == {"my_field": 2, "other": 3}
    with pytest.warns(UserWarning, match="my_field"):  # a file may hold what it should not
        assert MistralConfig.from_dict(config.to_dict()) == config
    assert pickle.loads(pickle.dumps(config)).my_field == copy.deepcopy(config).my_field == 1
    assert not hasattr(config, "another")
    with pytest.raises(AttributeError, match="no attribute 'another'"):
        _ = config.another


def test_unknown_keywords_are_assigned_to_a_view():
    view = mistral_core.AutoConfig(my_field=1)
    view.my_field = 5
    assert (view.my_field, view.value.extra) == (5, {"my_field": 5})


@pytest.mark.parametrize(
    ("name", "meant"),
    [
        ("num_hiden_layers", "num_hidden_layers"),
        ("hidden_sizes", "hidden_size"),
        ("rms_norm_epsilon", "rms_norm_eps"),
        ("torch_dtpe", "torch_dtype"),
        ("rope_parameter", "rope_parameters"),
    ],
)
def test_a_near_miss_is_an_error_that_names_what_is_meant(name, meant):
    with pytest.raises(UnknownFieldError, match=f"'{name}' .did you mean '{meant}'"):
        MistralConfig(**{name: 3})
    with pytest.raises(UnknownFieldError, match=meant):
        TINY.replace(**{name: 3})


def test_calls_take_no_field_that_there_is_not(tmp_path):
    TINY.save_pretrained(tmp_path)
    with pytest.raises(UnknownFieldError, match="no field 'my_field'"):
        MistralConfig.from_pretrained(tmp_path, my_field=1)
    kept = MistralConfig(my_field=1)
    assert kept.overridden(my_field=2, rope_parameters={"rope_theta": 5.0}).my_field == 2
    with pytest.raises(UnknownFieldError, match="no field 'another'"):
        kept.overridden(another=1, use_cache=False)


def test_ids_of_other_tokens_are_no_near_miss():
    assert MistralConfig(boi_token_id=255999).boi_token_id == 255999


def test_a_field_that_is_no_json_cannot_be_written(tmp_path):
    with pytest.raises(ConfigError, match="must be JSON"):
        MistralConfig(my_field=object()).save_pretrained(tmp_path)
