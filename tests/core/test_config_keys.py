"""No key of a config file is dropped in silence: each is read, told of, refused, or in a table with the reason."""

from __future__ import annotations

import warnings

import ml_dtypes
import numpy as np
import pytest

from mistral_core import AutoConfig, MistralConfig
from mistral_core.config import other_keys, params_json
from mistral_core.config.presets import TINY
from mistral_core.disk import limits
from mistral_core.errors import ConfigError, UnknownFieldError, UnsupportedFeatureError
from mistral_core.quantization import schemes

# key -> another value than the base's; MistralConfig and PretrainedConfig of transformers 4.56.2 and 5.23
HUGGING_FACE = {
    "vocab_size": 98, "hidden_size": 96, "intermediate_size": 81, "num_hidden_layers": 2, "num_attention_heads": 4,
    "num_key_value_heads": 1, "head_dim": 18, "hidden_act": "gelu", "max_position_embeddings": 99,
    "initializer_range": 0.1, "rms_norm_eps": 1e-4, "use_cache": False, "pad_token_id": 5, "bos_token_id": 6,
    "eos_token_id": 7, "tie_word_embeddings": True, "rope_theta": 5e5, "sliding_window": 7, "attention_dropout": 0.5,
    "rope_scaling": {"type": "linear", "factor": 2.0}, "rope_parameters": {"rope_type": "default", "rope_theta": 7.0},
    "layer_types": ["full_attention"] * 3, "return_dict": False, "output_hidden_states": True,
    "output_attentions": True, "torchscript": True, "dtype": "float16", "torch_dtype": "float16",
    "use_bfloat16": True, "tf_legacy_loss": True, "pruned_heads": {"0": [1]}, "chunk_size_feed_forward": 3,
    "is_encoder_decoder": True, "is_decoder": True, "cross_attention_hidden_size": 8, "add_cross_attention": True,
    "tie_encoder_decoder": True, "architectures": ["MistralForQuestionAnswering"], "finetuning_task": "x",
    "id2label": {"0": "a"}, "label2id": {"a": 0}, "num_labels": 3, "task_specific_params": {"x": {}},
    "problem_type": "regression", "tokenizer_class": "LlamaTokenizer", "prefix": "x", "sep_token_id": 4,
    "decoder_start_token_id": 3, "name_or_path": "x", "_name_or_path": "x", "_commit_hash": "x",
    "attn_implementation": "sdpa", "_attn_implementation": "sdpa", "transformers_version": "4.0.0",
    "gradient_checkpointing": True, "auto_map": {"AutoModel": "x.Y"}, "model_type": "gpt2",
    "quantization_config": {"quant_method": "aqlm"}, "experts_implementation": "x", "per_layer_config": {"0": {}},
    "tie_last_hidden_states": False, "attention_bias": True, "mlp_bias": True, "partial_rotary_factor": 0.5,
    "max_length": 7, "min_length": 3, "do_sample": True, "early_stopping": True, "num_beams": 2, "num_beam_groups": 2,
    "diversity_penalty": 0.5, "temperature": 0.5, "top_k": 3, "top_p": 0.5, "typical_p": 0.5,
    "repetition_penalty": 2.0, "length_penalty": 2.0, "no_repeat_ngram_size": 2, "encoder_no_repeat_ngram_size": 2,
    "bad_words_ids": [[3]], "num_return_sequences": 2, "output_scores": True, "return_dict_in_generate": True,
    "forced_bos_token_id": 3, "forced_eos_token_id": 3, "remove_invalid_values": True,
    "exponential_decay_length_penalty": [3, 1.1], "suppress_tokens": [3], "begin_suppress_tokens": [3],
    # of other architectures that call themselves mistral
    "attn_logit_softcapping": 50.0, "final_logit_softcapping": 30.0, "use_qk_norm": True, "logit_scale": 0.5,
    "hidden_activation": "gelu", "rope_interleaved": True, "num_local_experts": 8, "text_config": {"vocab_size": 9},
    "vision_config": {"a": 1}, "nobody_knows": 1,
}  # fmt: skip
RAW = {
    "dim": 48, "n_layers": 4, "head_dim": 16, "hidden_dim": 80, "n_heads": 6, "n_kv_heads": 2, "norm_eps": 1e-05,
    "sliding_window": 5, "vocab_size": 97,
}  # fmt: skip
# of Mistral's and mistral-inference's params.json
OF_PARAMS = {
    "dim": 64, "n_layers": 5, "head_dim": 18, "hidden_dim": 81, "n_heads": 4, "n_kv_heads": 1, "norm_eps": 1e-4,
    "sliding_window": 6, "vocab_size": 98, "rope_theta": 5e5, "tied_embeddings": True, "activation": "gelu",
    "dtype": "float16", "max_position_embeddings": 99, "max_seq_len": 99, "max_batch_size": 2,
    "model_type": "mamba", "moe": {"num_experts": 8}, "lora": {"rank": 4}, "vision_encoder": {"a": 1},
    "multimodal": {"a": 1}, "q_lora_rank": 4, "kv_lora_rank": 4, "qk_nope_head_dim": 4, "llama_4_scaling": {"a": 1},
    "quantization": {"qformat_weight": "int3"}, "yarn": {"factor": 2.0, "original_max_position_embeddings": 64},
    "causal": False, "use_biases": True, "rope_scaling": {"factor": 2.0}, "norm_type": "layernorm", "qk_norm": True,
    "model_parallel": 2, "nobody_knows": 1,
}  # fmt: skip


def outcome(base, key, value):
    """ "changed", "warned" or "refused", or "kept" where only `extra` differs."""
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        try:
            before, after = (MistralConfig.from_dict(data) for data in (base, {**base, key: value}))
        except ConfigError:
            return "refused"
    if caught:
        return "warned"
    return "kept" if before.replace(extra={}) == after.replace(extra={}) else "changed"


@pytest.mark.parametrize("key", HUGGING_FACE)
def test_no_key_of_config_json_is_silent(key):
    said_in_v5 = key in ("dtype", "rope_parameters")
    base = {k: v for k, v in TINY.to_dict().items() if v is not None}
    if said_in_v5:
        base = {k: v for k, v in base.items() if k not in ("torch_dtype", "rope_theta")}
    found = outcome(base, key, HUGGING_FACE[key])
    assert found in ("changed", "warned", "refused") or (found == "kept" and other_keys.CARRIED[key])
    if found == "kept":
        assert MistralConfig.from_dict({**base, key: HUGGING_FACE[key]}).to_dict()[key] == HUGGING_FACE[key]


@pytest.mark.parametrize("key", OF_PARAMS)
def test_no_key_of_params_json_is_silent(key):
    found = outcome(RAW, key, OF_PARAMS[key])
    assert found in ("changed", "warned", "refused") or (found == "kept" and params_json.CARRIED[key])


def test_transformers_own_configs_have_no_key_that_is_not_listed_here():
    transformers = pytest.importorskip("transformers")
    own = transformers.MistralConfig()
    assert set(own.to_dict()) - {"transformers_version"} <= set(HUGGING_FACE)


def test_every_key_of_a_scaling_is_read_or_refused():
    for kind in ("default", "linear", "yarn", "llama3"):
        with pytest.raises(UnsupportedFeatureError, match="nobody_knows"):
            MistralConfig(rope_scaling={"rope_type": kind, "factor": 2.0, "nobody_knows": 1})


def test_theta_in_rope_scaling_is_read():
    assert MistralConfig.from_dict({"rope_scaling": {"rope_type": "default", "rope_theta": 1e6}}).rope_theta == 1e6
    with pytest.raises(ConfigError, match="disagree"):
        MistralConfig.from_dict({"rope_theta": 1e4, "rope_scaling": {"rope_type": "default", "rope_theta": 1e6}})


@pytest.mark.parametrize("name", ["rope_parameters", "rope_scaling"])
def test_rotations_by_type_of_layer_are_refused_as_such(name):
    each = {"rope_type": "default", "rope_theta": 1e6}
    with pytest.raises(UnsupportedFeatureError, match="by type of layer"):
        MistralConfig.from_dict({name: {"full_attention": each, "sliding_attention": {**each, "rope_theta": 1e4}}})


def test_a_factor_of_the_default_type_is_no_scaling_or_refused():
    assert MistralConfig(rope_scaling={"rope_type": "default", "factor": 1.0}).rope_scaling is None
    with pytest.raises(UnsupportedFeatureError, match="factor"):
        MistralConfig.from_dict({"rope_parameters": {"rope_theta": 1e4, "factor": 8.0}})


def test_names_and_their_number_that_disagree_are_told():
    with pytest.warns(UserWarning, match="num_labels is 3"):
        assert MistralConfig.from_dict({"num_labels": 3, "id2label": {"0": "a", "1": "b"}}).num_labels == 2


@pytest.mark.parametrize(
    "given",
    [
        {"quant_method": "awq", "bits": 4, "zero_point": True, "group_size": 64},
        {"quant_method": "gptq", "bits": 4, "group_size": 64},
        {"quant_method": "fp8", "weight_block_size": [128, 128]},
        {"quant_method": "bitsandbytes", "load_in_4bit": True, "bnb_4bit_quant_type": "nf4"},
        {
            "quant_method": "compressed-tensors", "format": "int-quantized",
            "config_groups": {"group_0": {"weights": {"num_bits": 8}}},
        },
    ],
)  # fmt: skip
def test_unknown_keys_of_quantization_are_told(given):
    schemes.check(given, where="x")
    with pytest.warns(UserWarning, match="twist"):
        schemes.check({**given, "twist": 1}, where="x")
    if "config_groups" in given:
        deep = {"group_0": {"weights": {"num_bits": 8, "twist": 1}}}
        with pytest.warns(UserWarning, match=r"config_groups.group_0.weights.twist"):
            schemes.check({**given, "config_groups": deep}, where="x")


def test_conversion_keeps_the_keys_of_both_dialects():
    given = {**RAW, "max_batch_size": 4, "moe": None, "causal": True}
    config = MistralConfig.from_dict(given)
    again = MistralConfig.from_dict(config.to_dict())
    assert again == config
    raw = params_json.write(again)
    assert {key: raw[key] for key in given} == given


def test_keys_kept_of_params_json_decide_nothing():
    config = MistralConfig.from_dict({**TINY.to_dict(), "params.json": {"tied_embeddings": True, "yarn": {}, "x": 1}})
    raw = params_json.write(config)
    assert "tied_embeddings" not in raw
    assert "yarn" not in raw
    assert raw["x"] == 1
    assert params_json.write(config.replace(extra={"params.json": 5}))["dim"] == TINY.hidden_size


# Limits


@pytest.mark.parametrize(
    "fields",
    [
        {"num_labels": 2**31 - 1, "id2label": None, "label2id": None},
        {"num_hidden_layers": 10**9, "layer_types": None},
        {"num_hidden_layers": 5 * 10**6},
        {"rope_theta": 10**400},
        {"rms_norm_eps": 10**400},
        {"vocab_size": 10**5000},
        {"rope_scaling": {"rope_type": ["linear"], "factor": 2.0}},
        {"rope_scaling": {"rope_type": "linear", "factor": 10**400}},
        {"rope_scaling": {"rope_type": "yarn", "factor": 1e300, "original_max_position_embeddings": 64}},
        {"label2id": ["a"]},
        {"label2id": {"a": []}},
        {"id2label": ["a"]},
        {"id2label": 5},
        {"id2label": dict.fromkeys(range(limits.LABELS + 1), "x")},
        {"layer_types": ["full_attention"] * (limits.LAYERS + 1)},
        {"layer_types": [["full_attention"]] * 3},
        {"architectures": [["x"]]},
        {"eos_token_id": [[2]]},
        {"head_dim": limits.HEAD_DIM + 2},
        {"num_attention_heads": limits.HEADS * 2},
        {"vocab_size": limits.VOCABULARY + 1},
        {"sliding_window": 2**31},
        {"max_position_embeddings": 2**31},
        {"problem_type": ["regression"]},
        {"dtype": ["float32"]},
        {"extra": 5},
    ],
    ids=lambda fields: next(iter(fields)),
)
def test_numbers_beyond_the_limits_are_typed_errors(fields):
    with pytest.raises(ConfigError):
        hash(TINY.replace(**fields))
    with pytest.raises(ConfigError):
        hash(MistralConfig(**fields))


@pytest.mark.parametrize(
    "fields",
    [
        {"n_layers": 10**9},
        {"n_layers": 10**9, "sliding_window": [None, 5]},
        {"sliding_window": [5] * 2000, "n_layers": 2000},
        {"sliding_window": [[5], None]},
        {"sliding_window": "9" * 5000},
        {"rope_theta": 10**400},
        {"yarn": {"factor": [2], "original_max_position_embeddings": 64}},
        {"dim": None},
    ],
)
def test_and_so_are_those_of_params_json(fields):
    with pytest.raises(ConfigError):
        MistralConfig.from_dict({**RAW, **fields})


# Arguments


def test_names_of_transformers_constructor_are_taken():
    assert MistralConfig(torch_dtype="bfloat16").dtype == "bfloat16"
    given = MistralConfig(rope_parameters={"rope_type": "linear", "factor": 2.0, "rope_theta": 1e6})
    assert (given.rope_theta, given.rope_scaling) == (1e6, {"rope_type": "linear", "factor": 2.0})
    assert given.replace(rope_parameters={"rope_theta": 1e5}).rope_scaling is None
    assert MistralConfig(transformers_version="4.56.2").to_dict()["transformers_version"] == "4.56.2"
    changed = AutoConfig(sliding_window=None)
    changed.torch_dtype = "float16"
    assert changed.dtype == "float16"
    with pytest.raises(UnsupportedFeatureError, match="encoder"):
        MistralConfig(is_encoder_decoder=True)


def test_an_unknown_argument_names_the_nearest():
    for made in (MistralConfig, TINY.replace):
        with pytest.raises(UnknownFieldError, match="did you mean 'sliding_window'"):
            made(sliding_windw=4)


def test_numbers_of_arrays_and_tables_are_stored_as_plain_python():
    config = MistralConfig(
        vocab_size=np.int64(97), hidden_size=np.array(48), rms_norm_eps=np.float32(0.0078125), bos_token_id=np.int8(1),
        use_cache=np.bool_(False), num_attention_heads=np.uint8(6), num_hidden_layers=np.int32(3),
        eos_token_id=np.array([2, 3]), layer_types=(np.str_("full_attention"),) * 3, dtype=np.dtype("float16"),
        num_key_value_heads=np.int16(2), rope_theta=ml_dtypes.bfloat16(512), id2label={np.int64(0): np.str_("a")},
    )  # fmt: skip
    plain = MistralConfig(
        vocab_size=97, hidden_size=48, rms_norm_eps=0.0078125, use_cache=False, num_attention_heads=6,
        num_hidden_layers=3, eos_token_id=[2, 3], bos_token_id=1, layer_types=["full_attention"] * 3, dtype="float16",
        num_key_value_heads=2, rope_theta=512.0, id2label={0: "a"},
    )  # fmt: skip
    assert config == plain
    for name, value in vars(config).items():
        assert type(value) is type(getattr(plain, name)), name
    assert config.to_json_string() == plain.to_json_string()
    assert MistralConfig(eos_token_id=range(2, 4)).eos_token_id == (2, 3)
    assert MistralConfig(dtype=ml_dtypes.bfloat16).dtype == "bfloat16"


def test_numbers_of_arrays_are_taken_by_tokenizers_pipelines_and_resizing():
    from mistral_core.pipelines.base import _checked_size
    from mistral_core.text.inputs import check_integer
    from mistral_core.weights.resizing import resized_config

    for number in (np.int64(3), np.array(3), np.uint8(3)):
        assert type(check_integer("max_length", number, 0)) is int
        assert type(_checked_size(number)) is int
        assert resized_config(TINY, number, number).vocab_size == 3
