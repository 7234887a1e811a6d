"""Presets that KerasHub reads and writes, for `conformance.exchange`.

    PYTHON -P exchange_keras_hub.py read keras-hub PATH IDS.npy OUT.npz
    PYTHON -P exchange_keras_hub.py write keras-hub WEIGHTS.npz CONFIG.json OUT_DIR

This file runs without any package of ours.
"""

import json
import os
import sys

os.environ.update(KERAS_BACKEND="tensorflow", TF_CPP_MIN_LOG_LEVEL="3", CUDA_VISIBLE_DEVICES="")
import keras_hub
import numpy as np

FIELDS = {
    "vocabulary_size": "vocab_size",
    "num_layers": "num_hidden_layers",
    "num_query_heads": "num_attention_heads",
    "hidden_dim": "hidden_size",
    "intermediate_dim": "intermediate_size",
    "rope_max_wavelength": "rope_theta",
    "num_key_value_heads": "num_key_value_heads",
    "sliding_window": "sliding_window",
    "head_dim": "head_dim",
    "layer_norm_epsilon": "rms_norm_eps",
}
NAMES = {
    "token_embedding/embeddings": "model.embed_tokens",
    "token_embedding/reverse_embeddings": "lm_head",
    "sequence_output_layernorm/scale": "model.norm",
    "self_attention/query/kernel": "self_attn.q_proj",
    "self_attention/key/kernel": "self_attn.k_proj",
    "self_attention/value/kernel": "self_attn.v_proj",
    "self_attention/attention_output/kernel": "self_attn.o_proj",
    "self_attention_layernorm/scale": "input_layernorm",
    "feedforward_layernorm/scale": "post_attention_layernorm",
    "feedforward_gate_dense/kernel": "mlp.gate_proj",
    "feedforward_intermediate_dense/kernel": "mlp.up_proj",
    "feedforward_output_dense/kernel": "mlp.down_proj",
}


def variables(backbone):
    """(Hugging Face name, variable, numbers that go into its matrix; 0: it is as it is there) of each variable."""
    for variable in backbone.weights:
        layer, _, rest = variable.path.partition("/")
        if not layer.startswith("transformer_layer_"):
            inputs = backbone.hidden_dim if variable.path.endswith("reverse_embeddings") else 0
            yield f"{NAMES[variable.path]}.weight", variable, inputs
            continue
        name = f"model.layers.{layer.removeprefix('transformer_layer_')}.{NAMES[rest]}.weight"
        inputs = int(np.prod(variable.shape[:2])) if "attention_output" in rest else variable.shape[0]
        yield name, variable, inputs if rest.endswith("kernel") else 0


def read(path, ids, out):
    with open(os.path.join(path, "config.json"), encoding="utf-8") as file:
        policy = json.load(file)["config"]["dtype"]["config"]["name"]
    model = keras_hub.models.MistralCausalLM.from_preset(path, preprocessor=None, dtype=policy)
    ids = np.load(ids)
    logits = np.asarray(model({"token_ids": ids, "padding_mask": np.ones_like(ids)}), np.float32)
    tensors = {}
    for name, variable, inputs in variables(keras_hub.models.Backbone.from_preset(path, dtype=policy)):
        array = np.asarray(variable.value)
        array = array.view(np.uint16) if array.dtype.name == "bfloat16" else array
        tensors[f"tensor:{name}"] = array.reshape(inputs, -1).T if inputs else array
    np.savez(out, allow_pickle=False, logits=logits, **tensors)


def write(weights, config, out):
    with open(config, encoding="utf-8") as file:
        config = json.load(file)
    backbone = keras_hub.models.MistralBackbone(**{key: config[name] for key, name in FIELDS.items()}, dtype="float32")
    with np.load(weights) as arrays:
        for name, variable, inputs in variables(backbone):
            variable.assign((arrays[name].T if inputs else arrays[name]).reshape(variable.shape))
    backbone.save_to_preset(out)


if __name__ == "__main__":
    {"read": read, "write": write}[sys.argv[1]](*sys.argv[3:])
