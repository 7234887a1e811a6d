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
    "mistral-small-24b-3.2-text": _SMALL_24B.replace(rope_theta=1e9, max_position_embeddings=131072),
    "mistral-large-123b-2407": _LARGE,
    "mistral-large-123b-2411": _LARGE,
    "ministral-8b-2410": _7B_V03.replace(
        vocab_size=131072, num_hidden_layers=36, intermediate_size=12288, rope_theta=1e8, sliding_window=32768,
        layer_types=("full_attention", "sliding_attention", "sliding_attention", "sliding_attention") * 9,
        max_position_embeddings=131072,
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
