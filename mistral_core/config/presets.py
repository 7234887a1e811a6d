"""Published sizes by name, and TINY, whose sizes are all different so that no two axes can be confused.

Values: the configs of the published checkpoints (derivative repositories where the official ones are gated).
"""

from __future__ import annotations

from .config import MistralConfig

_7B = MistralConfig(rms_norm_eps=1e-5, max_position_embeddings=32768, dtype="bfloat16")
_7B_V03 = _7B.replace(vocab_size=32768, rope_theta=1e6, sliding_window=None)
_SMALL_22B = _7B_V03.replace(
    hidden_size=6144, num_hidden_layers=56, num_attention_heads=48, head_dim=128, intermediate_size=16384
)
_SMALL_24B = _7B_V03.replace(
    vocab_size=131072,
    hidden_size=5120,
    num_hidden_layers=40,
    head_dim=128,
    intermediate_size=32768,
    rope_theta=1e8,
)
_SMALL_3 = _SMALL_24B.replace(rope_theta=1e9, max_position_embeddings=131072)
_MINISTRAL_3 = MistralConfig(
    model_type="ministral3",
    hidden_size=4096,
    intermediate_size=14336,
    dtype="bfloat16",
)
_YARN = _MINISTRAL_3.rope_scaling or {}
_LARGE = _7B_V03.replace(
    hidden_size=12288, num_hidden_layers=88, num_attention_heads=96, head_dim=128, intermediate_size=28672,
    max_position_embeddings=131072,
)  # fmt: skip

PRESETS: dict[str, MistralConfig] = {
    "mistral-7b-v0.1": _7B,
    "mistral-7b-instruct-v0.1": _7B,
    "mistral-7b-v0.2": _7B.replace(rope_theta=1e6, sliding_window=None),
    "mistral-7b-instruct-v0.2": _7B.replace(rope_theta=1e6, sliding_window=None),
    "mistral-7b-v0.3": _7B_V03,
    "mistral-7b-instruct-v0.3": _7B_V03,
    "mathstral-7b": _7B_V03,
    "mistral-nemo-12b-2407": _7B_V03.replace(
        vocab_size=131072, hidden_size=5120, num_hidden_layers=40, head_dim=128, max_position_embeddings=131072
    ),
    "mistral-small-22b-2409": _SMALL_22B,
    "codestral-22b": _SMALL_22B,
    "mistral-small-24b-2501": _SMALL_24B,
    "mistral-small-24b-3.2-text": _SMALL_3,
    "mistral-small-3.1-24b": _SMALL_3,
    "mistral-small-3.2-24b": _SMALL_3,
    "magistral-small-24b-2509": _SMALL_3,
    "mistral-large-123b-2407": _LARGE,
    "mistral-large-123b-2411": _LARGE,
    "ministral-8b-2410": _7B_V03.replace(
        model_type="ministral", vocab_size=131072, num_hidden_layers=36, intermediate_size=12288, rope_theta=1e8,
        sliding_window=32768,
        layer_types=("full_attention", "sliding_attention", "sliding_attention", "sliding_attention") * 9,
        max_position_embeddings=131072,
    ),
    "ministral-3-3b": _MINISTRAL_3.replace(
        hidden_size=3072, intermediate_size=9216, num_hidden_layers=26, tie_word_embeddings=True
    ),
    "ministral-3-8b": _MINISTRAL_3,
    "ministral-3-14b": _MINISTRAL_3.replace(
        hidden_size=5120, intermediate_size=16384, num_hidden_layers=40, rope_theta=1e9
    ),
    "devstral-small-2-24b": _MINISTRAL_3.replace(
        hidden_size=5120, intermediate_size=32768, num_hidden_layers=40, rope_theta=1e8, max_position_embeddings=393216,
        rope_scaling={**_YARN, "factor": 48.0, "original_max_position_embeddings": 8192},
    ),
    "devstral-2-123b": _MINISTRAL_3.replace(
        hidden_size=12288, intermediate_size=28672, num_hidden_layers=88, num_attention_heads=96,
        rope_scaling={
            **_YARN, "factor": 64.0, "original_max_position_embeddings": 4096, "beta_fast": 4.0, "mscale_all_dim": 0.0,
            "llama_4_scaling_beta": 0.0,
        },
    ),
    "zephyr-7b-beta": _7B.replace(pad_token_id=2),
    "openorca-mistral-7b": _7B.replace(vocab_size=32002, eos_token_id=32000),
    "yarn-mistral-7b-128k": _7B.replace(
        sliding_window=131072,
        max_position_embeddings=131072,
        rope_scaling={
            "rope_type": "yarn", "factor": 16.0, "original_max_position_embeddings": 8192, "finetuned": True,
        },
    ),
}  # fmt: skip

TINY = MistralConfig(
    vocab_size=97,
    hidden_size=48,
    intermediate_size=80,
    num_hidden_layers=3,
    num_attention_heads=6,
    num_key_value_heads=2,
    head_dim=16,
    max_position_embeddings=131072,
    rms_norm_eps=1e-5,
    rope_theta=1e6,
    sliding_window=5,
    num_labels=7,
    pad_token_id=0,
)
