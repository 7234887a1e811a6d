"""Every key of a config file that is no field of MistralConfig: why it may be carried, or what its value must say.

A key that is in no table here and read by no dialect is kept with a warning. So no key is dropped in silence.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from ..errors import UnsupportedFeatureError
from ..telling import shown

_WHO = "who wrote the file, or with what"
_CODE = "chooses code or a path, which no config does here: never followed"
_OTHER = "read by something else than the model"

CARRIED: Mapping[str, str] = {
    "transformers_version": _WHO,
    "unsloth_version": _WHO,
    "unsloth_fixed": _WHO,
    "_name_or_path": _WHO,
    "name_or_path": _WHO,
    "_commit_hash": _WHO,
    "finetuning_task": _WHO,
    "auto_map": _CODE,
    "trust_remote_code": _CODE,
    "_attn_implementation": _CODE,
    "_attn_implementation_autoset": _CODE,
    "_attn_implementation_internal": _CODE,
    "attn_implementation": _CODE,
    "experts_implementation": _CODE,
    "_experts_implementation_internal": _CODE,
    "tokenizer_class": "which tokenizer it is, its own files say",
    "is_decoder": "a Mistral sees no later token, whatever this says",
    "chunk_size_feed_forward": "how much is computed at once, which changes no result",
    "use_return_dict": "another word for return_dict that files do not have",
    "original_max_position_embeddings": "a part of the scaling of rotary embeddings, read where there is one",
    "params.json": "keys of a raw checkpoint's file, for the way back",
    "mistral3": "keys of the model that also sees, for the way back",
}
"""Key -> why its value changes nothing here: kept for the way back, never followed, no warning."""

_NO_BIAS = "a Mistral has no biases in its layers"
_NO_CAP = "a Mistral caps no logits"
_NO_NORM = "a Mistral normalises no queries and keys"
_NO_FACTOR = "a Mistral multiplies by no factor here"
_WHOLE = "a Mistral rotates whole heads"
_ONE_TEXT = "this is a model of several towers, not a dense Mistral"
_DECODER = "a Mistral is a decoder only"
_EXPERTS = "this is a mixture of experts, not a dense Mistral"
_LATENT = "this is multi-head latent attention, not a dense Mistral"
_SAME = "all layers of a Mistral are alike"
_NOTHING: tuple[Any, ...] = (None, False)
_ONE: tuple[Any, ...] = (None, 1)

ONLY: Mapping[str, tuple[tuple[Any, ...], str]] = {
    **dict.fromkeys(("attention_bias", "mlp_bias", "qkv_bias", "use_bias", "use_biases", "bias"), (_NOTHING, _NO_BIAS)),
    **dict.fromkeys(("attn_logit_softcapping", "final_logit_softcapping", "logits_soft_cap"), ((None,), _NO_CAP)),
    **dict.fromkeys(("use_qk_norm", "qk_norm", "qk_layernorm"), (_NOTHING, _NO_NORM)),
    **dict.fromkeys(
        ("logit_scale", "logits_scaling", "embedding_multiplier", "attention_multiplier", "residual_multiplier"),
        (_ONE, _NO_FACTOR),
    ),
    **dict.fromkeys(("query_pre_attn_scalar", "attn_temperature_tuning", "llama_4_scaling"), (_NOTHING, _NO_FACTOR)),
    **dict.fromkeys(("partial_rotary_factor", "rotary_pct"), (_ONE, _WHOLE)),
    **dict.fromkeys(
        ("rope_interleaved", "rope_interleave"), (_NOTHING, "a Mistral rotates halves of heads, not pairs")
    ),
    **dict.fromkeys(("no_rope_layers", "no_rope_layer_interval", "per_layer_config"), ((None, {}), _SAME)),
    **dict.fromkeys(("vision_config", "audio_config", "text_config", "vision_encoder"), ((None,), _ONE_TEXT)),
    **dict.fromkeys(
        ("is_encoder_decoder", "add_cross_attention", "tie_encoder_decoder", "cross_attention_hidden_size"),
        (_NOTHING, _DECODER),
    ),
    **dict.fromkeys(("num_local_experts", "num_experts", "n_routed_experts"), ((None, 0), _EXPERTS)),
    **dict.fromkeys(("q_lora_rank", "kv_lora_rank", "qk_nope_head_dim"), ((None, 0), _LATENT)),
    "hidden_activation": ((None, "silu"), "a Mistral has 'silu'"),
    "pruned_heads": ((None, {}), "no heads are pruned here"),
}
"""Key -> the values that say what a Mistral is, and what is told of any other, which is refused."""

_IDLE: Mapping[str, tuple[Any, ...]] = {
    "torchscript": _NOTHING,
    "use_bfloat16": _NOTHING,
    "tf_legacy_loss": _NOTHING,
    "gradient_checkpointing": _NOTHING,
    "tie_last_hidden_states": (None, True),
    "task_specific_params": (None, {}),
    "prefix": (None,),
    "sep_token_id": (None,),
    "decoder_start_token_id": (None,),
}
_GENERATION: Mapping[str, tuple[Any, ...]] = {
    "max_length": (None, 20),
    "min_length": (None, 0),
    "do_sample": _NOTHING,
    "early_stopping": _NOTHING,
    "num_beams": _ONE,
    "num_beam_groups": _ONE,
    "diversity_penalty": (None, 0),
    "temperature": _ONE,
    "top_k": (None, 50),
    "top_p": _ONE,
    "typical_p": _ONE,
    "repetition_penalty": _ONE,
    "length_penalty": _ONE,
    "no_repeat_ngram_size": (None, 0),
    "encoder_no_repeat_ngram_size": (None, 0),
    "bad_words_ids": (None,),
    "num_return_sequences": _ONE,
    "output_scores": _NOTHING,
    "return_dict_in_generate": _NOTHING,
    "forced_bos_token_id": (None,),
    "forced_eos_token_id": (None,),
    "remove_invalid_values": _NOTHING,
    "exponential_decay_length_penalty": (None,),
    "suppress_tokens": (None,),
    "begin_suppress_tokens": (None,),
}
IDLE: Mapping[str, tuple[Any, ...]] = {**_IDLE, **_GENERATION}
"""Key -> the values that ask for nothing; any other is kept with a warning, as an unknown key is.

Among them are the options of generation that configs of transformers 4 repeat: here they are those of
generation_config.json.
"""


def refused(data: Mapping[str, Any]) -> list[str]:
    """What is wrong with the keys that a Mistral has no other value for."""
    return [
        f"{key} is {shown(data[key])}; {why}" for key, (allowed, why) in ONLY.items() if not _is(data, key, allowed)
    ]


def unread(data: Mapping[str, Any], read: frozenset[str]) -> dict[str, Any]:
    """The keys that ask for something and that nobody reads: neither `read` nor known to change nothing."""
    return {
        key: value
        for key, value in data.items()
        if not (key in read or key in CARRIED or key in ONLY or (key in IDLE and _is(data, key, IDLE[key])))
    }


def check(data: Mapping[str, Any], *, where: str) -> None:
    """Raise UnsupportedFeatureError with every key whose value is not a Mistral's."""
    problems = refused(data)
    if problems:
        raise UnsupportedFeatureError(f"{where}: {'; '.join(problems)}.")


def _is(data: Mapping[str, Any], key: str, allowed: tuple[Any, ...]) -> bool:
    """Whether a value is absent or one of some; True is no 1."""
    value = data.get(key)
    return any(value == each and (value is not True or each is True) for each in allowed)
