"""Logits of transformers 4.56.2's own torch, Flax and TensorFlow Mistral, for `conformance.foreign`.

    PYTHON transformers4.py IN.npz OUT.npz

IN holds `config` (the JSON of a v4 config), `input_ids`, optional `attention_mask` and `position_ids`, and every
parameter under its Hugging Face name; OUT the logits under torch, flax and tf, or the error under NAME_error.
This file runs without any package of ours.
"""

import json
import os
import sys

os.environ.update(TF_USE_LEGACY_KERAS="1", TF_CPP_MIN_LOG_LEVEL="3", CUDA_VISIBLE_DEVICES="", JAX_PLATFORMS="cpu")
import numpy as np

INPUTS = ("input_ids", "attention_mask", "position_ids")


def config(data):
    from transformers import MistralConfig

    return MistralConfig.from_dict(json.loads(str(data["config"])), attn_implementation="eager")


def put(name, kernel_name, array, shape):
    """A Dense kernel is [in, out]: the transpose."""
    array = array.T if kernel_name == "kernel" else array
    if tuple(shape) != array.shape:
        raise ValueError(f"{name}: the model has {tuple(shape)}, the weights {array.shape}")
    return array


def run_torch(data, params, inputs):
    import torch
    from transformers import MistralForCausalLM

    torch.manual_seed(0)
    model = MistralForCausalLM(config(data)).eval()
    missing, unexpected = model.load_state_dict({k: torch.from_numpy(v) for k, v in params.items()}, strict=False)
    assert not unexpected, unexpected
    tied = {"lm_head.weight"} if model.config.tie_word_embeddings else set()
    with torch.no_grad():
        return model(**{k: torch.from_numpy(v) for k, v in inputs.items()}).logits.numpy(), sorted(set(missing) - tied)


def run_flax(data, params, inputs):
    from flax.traverse_util import flatten_dict, unflatten_dict
    from transformers import FlaxMistralForCausalLM

    settings = config(data)  # its causal mask is max_position_embeddings squared: 17 GB for 131072
    settings.max_position_embeddings = min(settings.max_position_embeddings, 2048)
    model = FlaxMistralForCausalLM(settings, seed=0)
    flat, missing = flatten_dict(model.params), []
    for path, value in flat.items():
        name = ".".join((*path[:-1], "weight"))
        if name not in params:
            missing.append(name)
            continue
        flat[path] = put(name, path[-1], params[name], value.shape)
    return np.asarray(model(**inputs, params=unflatten_dict(flat)).logits), missing


def run_tf(data, params, inputs):
    import tensorflow as tf
    from transformers import TFMistralForCausalLM

    tf.random.set_seed(0)
    model = TFMistralForCausalLM(config(data))
    model(tf.constant([[1, 2]]))
    missing = []
    for variable in model.weights:
        path = variable.name.split(":")[0].split("/")[1:]
        name = ".".join((*path[:-1], "weight"))
        if name not in params:
            missing.append(name)
            continue
        variable.assign(put(name, path[-1], params[name], variable.shape))
    return model(**{k: tf.constant(v) for k, v in inputs.items()}).logits.numpy(), missing


def main(source, target):
    with np.load(source) as file:
        data = {key: file[key] for key in file.files}
    params = {k: v.astype(np.float32) for k, v in data.items() if k.endswith((".weight", ".bias"))}
    inputs = {key: data[key] for key in INPUTS if key in data}
    out = {}
    for name, run in (("torch", run_torch), ("flax", run_flax), ("tf", run_tf)):
        try:
            out[name], _ = run(data, params, dict(inputs))
        except Exception as error:  # whatever it is belongs in the table
            out[f"{name}_error"] = f"{type(error).__name__}: {error}"
    np.savez_compressed(target, **out)


if __name__ == "__main__":
    main(*sys.argv[1:])
