"""Checkpoints that transformers 4.56.2 reads and writes through torch, Flax and TensorFlow, for
`conformance.exchange` and `conformance.directories`.

    PYTHON -P exchange_transformers4.py read FORMAT PATH IDS.npy OUT.npz
    PYTHON -P exchange_transformers4.py write FORMAT WEIGHTS.npz CONFIG.json OUT_DIR
    PYTHON -P exchange_transformers4.py run FRAMEWORK JOB.json OUT_DIR

This file runs without any package of ours.
"""

import json
import os
import sys
from collections.abc import Callable

os.environ.update(TF_USE_LEGACY_KERAS="1", TF_CPP_MIN_LOG_LEVEL="3", CUDA_VISIBLE_DEVICES="", JAX_PLATFORMS="cpu")
import numpy as np

TOLERANCE = 1e-5
"""How far apart, relative to the largest logit, the three classes may be that read the same file."""


def hf_name(path):
    """(Hugging Face name, whether the matrix is [in, out]) of a Flax path or a TensorFlow variable."""
    *path, leaf = ".".join(path).removesuffix(":0").split(".")
    return ".".join([*path, "weight"]), leaf == "kernel"


def bits(array):
    array = np.asarray(array)
    return array.view(np.uint16) if array.dtype.name == "bfloat16" else array


def flax_tensors(model):
    from flax.traverse_util import flatten_dict

    for path, value in flatten_dict(model.params).items():
        name, is_kernel = hf_name(path)
        yield name, bits(np.asarray(value).T if is_kernel else value)


def tf_tensors(model):
    for variable in model.weights:
        name, is_kernel = hf_name(variable.name.split("/")[1:])
        yield name, variable.numpy().T if is_kernel else variable.numpy()


def with_torch(path, ids):
    import torch
    from transformers import MistralForCausalLM

    model, info = MistralForCausalLM.from_pretrained(
        path, torch_dtype="auto", attn_implementation="eager", output_loading_info=True
    )
    assert not any(info[key] for key in ("missing_keys", "unexpected_keys", "mismatched_keys")), info
    with torch.no_grad():
        logits = model(torch.from_numpy(ids)).logits.float().numpy()
    halves = {torch.bfloat16: torch.int16}
    state = {name: value.view(halves.get(value.dtype, value.dtype)) for name, value in model.state_dict().items()}
    return logits, {name: value.numpy() for name, value in state.items()}


def with_flax(path, ids, **options):
    from transformers import FlaxMistralForCausalLM

    model = FlaxMistralForCausalLM.from_pretrained(path, **options)
    return np.asarray(model(ids).logits, np.float32), dict(flax_tensors(model))


def with_tf(path, ids, **options):
    import tensorflow as tf
    from transformers import TFMistralForCausalLM

    model, info = TFMistralForCausalLM.from_pretrained(path, output_loading_info=True, **options)
    assert not any(info.values()), info
    return model(tf.constant(ids)).logits.numpy(), dict(tf_tensors(model))


def read(format, path, ids, out):
    ids = np.load(ids)
    if format == "hf":
        results = [with_torch(path, ids), with_flax(path, ids, from_pt=True), with_tf(path, ids, from_pt=True)]
    else:
        results = [(with_flax if format.startswith("flax") else with_tf)(path, ids)]
    logits, tensors = results[0]
    for others, _ in results[1:]:
        assert np.abs(others - logits).max() < TOLERANCE * np.abs(logits).max(), "Flax or TensorFlow differ from torch"
    np.savez(out, logits=logits, **{f"tensor:{name}": array for name, array in tensors.items()})


def write(format, weights, config, out):
    from transformers import MistralConfig

    with np.load(weights) as file:
        arrays = {name: file[name] for name in file.files}
    with open(config, encoding="utf-8") as file:
        config = MistralConfig.from_dict(json.load(file))
    if format == "hf":
        import torch
        from transformers import MistralForCausalLM

        model = MistralForCausalLM(config)
        model.load_state_dict({name: torch.from_numpy(array) for name, array in arrays.items()}, strict=True)
        model.save_pretrained(out)
    elif format.startswith("flax"):
        from flax.traverse_util import flatten_dict, unflatten_dict
        from transformers import FlaxMistralForCausalLM

        model = FlaxMistralForCausalLM(config)
        params = {}
        for path in flatten_dict(model.params):
            name, is_kernel = hf_name(path)
            # a transposed view would be written in the order of its memory
            params[path] = np.ascontiguousarray(arrays[name].T if is_kernel else arrays[name])
        model.save_pretrained(out, params=unflatten_dict(params), safe_serialization=format == "flax-safetensors")
    else:
        import tensorflow as tf
        from transformers import TFMistralForCausalLM

        model = TFMistralForCausalLM(config)
        model(tf.constant([[1, 2]]))
        for variable in model.weights:
            name, is_kernel = hf_name(variable.name.split("/")[1:])
            variable.assign(arrays[name].T if is_kernel else arrays[name])
        model.save_pretrained(out, safe_serialization=format == "tf-safetensors")


def run(framework, job, out):
    """The prompts' and the likeliest tokens of each directory, and the logits they follow from."""
    from importlib.metadata import version

    packages = ("transformers", {"tf": "tensorflow"}.get(framework, framework))
    with open(f"{out}/versions.json", "w", encoding="utf-8") as file:
        json.dump({package: version(package) for package in packages}, file)
    with open(job, encoding="utf-8") as file:
        given = json.load(file)
    for key, path in given["folders"].items():
        try:
            found = generated(framework, path, given["texts"], given["new"])
        except Exception as error:  # one that does not load says nothing of the others
            found = {"error": f"{type(error).__name__}: {' '.join(str(error).split())[:150]}"}
        np.savez(f"{out}/{key}.npz", **found)


def generated(framework, path, texts, new):
    """Tokens and logits of each text, as a user of this framework asks for them."""
    import transformers

    auto, tensors, loading = {
        "torch": (transformers.AutoModelForCausalLM, "pt", {"torch_dtype": "float32"}),
        "flax": (transformers.FlaxAutoModelForCausalLM, "np", {}),
        "tf": (transformers.TFAutoModelForCausalLM, "tf", {}),
    }[framework]
    # without it Flax and TensorFlow do not load what transformers' own torch model saved
    kept = [f"{path}/model.safetensors{index}" for index in ("", ".index.json")]
    told = {"from_pt": True} if framework != "torch" and any(map(os.path.exists, kept)) else {}
    tokenizer, model = transformers.AutoTokenizer.from_pretrained(path), auto.from_pretrained(path, **loading, **told)
    end, found = model.config.eos_token_id, {}
    for at, text in enumerate(texts):
        inputs = tokenizer(text, return_tensors=tensors)
        tokens = model.generate(**inputs, max_new_tokens=new, do_sample=False, pad_token_id=end)
        tokens = np.asarray(getattr(tokens, "sequences", tokens))[0].tolist()
        length = np.asarray(inputs["input_ids"]).shape[1]
        written = tokens[length:]
        # Flax fills up to max_new_tokens
        found[f"tokens:{at}"] = tokens[:length] + (written[: written.index(end) + 1] if end in written else written)
        logits = model(**inputs).logits
        found[f"logits:{at}"] = np.asarray(logits.detach() if framework == "torch" else logits, np.float32)[0, -1]
    return found


if __name__ == "__main__":
    commands: dict[str, Callable[..., None]] = {"read": read, "write": write, "run": run}
    commands[sys.argv[1]](*sys.argv[2:])
