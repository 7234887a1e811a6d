"""Orbax checkpoints as Orbax itself writes them: run it where orbax-checkpoint is installed, in this directory.

    JAX_PLATFORMS=cpu python make_orbax.py

orbax/ holds a Flax model's parameters, maxtext/ the trees that MaxText's converter makes of the same weights.
"""

import json
import shutil
from pathlib import Path

import ml_dtypes
import numpy as np

HERE = Path(__file__).parent
CONFIG = {
    "architectures": ["MistralForCausalLM"],
    "model_type": "mistral",
    "vocab_size": 11,
    "hidden_size": 8,
    "intermediate_size": 12,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 4,
    "sliding_window": 3,
    "rms_norm_eps": 1e-05,
    "torch_dtype": "bfloat16",
}
SHAPES = {
    "model.embed_tokens.weight": (11, 8),
    **{
        f"model.layers.{layer}.{name}.weight": shape
        for layer in range(2)
        for name, shape in {
            "input_layernorm": (8,),
            "self_attn.q_proj": (16, 8),
            "self_attn.k_proj": (8, 8),
            "self_attn.v_proj": (8, 8),
            "self_attn.o_proj": (8, 16),
            "post_attention_layernorm": (8,),
            "mlp.gate_proj": (12, 8),
            "mlp.up_proj": (12, 8),
            "mlp.down_proj": (8, 12),
        }.items()
    },
    "model.norm.weight": (8,),
    "lm_head.weight": (11, 8),
}


def weights():
    """Hugging Face name -> array, always the same."""
    generator = np.random.default_rng(0)
    return {name: generator.standard_normal(shape).astype(ml_dtypes.bfloat16) for name, shape in SHAPES.items()}


def nested(arrays):
    """The tree of `nnx.state`: a module is a level, and under it `value`."""
    tree = {}
    for name, array in arrays.items():
        node = tree
        for part in name.split("."):
            node = node.setdefault(part, {})
        node["value"] = array
    return tree


def stacked(arrays):
    """The same names, the layers' arrays being one along a new first axis."""
    rest = {name: array for name, array in arrays.items() if ".layers." not in name}
    firsts = [name for name in arrays if ".layers.0." in name]
    return rest | {
        name.replace(".0.", "."): np.stack([arrays[name], arrays[name.replace(".0.", ".1.")]]) for name in firsts
    }


def maxtext_layer(arrays, layer):
    """What MaxText's converter does to a layer of 4 query heads and 2 key/value heads of 4."""
    get = {name.removeprefix(f"model.layers.{layer}."): array for name, array in arrays.items()}
    kernel = {name: np.ascontiguousarray(array.T) for name, array in get.items() if array.ndim == 2}
    return {
        "pre_self_attention_layer_norm": {"scale": get["input_layernorm.weight"]},
        "self_attention": {
            "query": {"kernel": (kernel["self_attn.q_proj.weight"] / 2).astype(ml_dtypes.bfloat16).reshape(8, 4, 4)},
            "key": {"kernel": kernel["self_attn.k_proj.weight"].reshape(8, 2, 4)},
            "value": {"kernel": kernel["self_attn.v_proj.weight"].reshape(8, 2, 4)},
            "out": {"kernel": kernel["self_attn.o_proj.weight"].reshape(4, 4, 8)},
        },
        "post_self_attention_layer_norm": {"scale": get["post_attention_layernorm.weight"]},
        "mlp": {
            "wi_0": {"kernel": kernel["mlp.gate_proj.weight"]},
            "wi_1": {"kernel": kernel["mlp.up_proj.weight"]},
            "wo": {"kernel": kernel["mlp.down_proj.weight"]},
        },
    }


def maxtext(arrays, *, scanned):
    """MaxText's train state without an optimizer's."""
    import jax

    layers = [maxtext_layer(arrays, layer) for layer in range(2)]
    if scanned:
        of_layers = {"layers": jax.tree.map(lambda *each: np.stack(each, axis=1), *layers)}
    else:
        of_layers = {f"layers_{index}": layer for index, layer in enumerate(layers)}
    decoder = {
        **of_layers,
        "decoder_norm": {"scale": arrays["model.norm.weight"]},
        "logits_dense": {"kernel": np.ascontiguousarray(arrays["lm_head.weight"].T)},
    }
    params = {"token_embedder": {"embedding": arrays["model.embed_tokens.weight"]}, "decoder": decoder}
    return {"step": 0, "params": {"params": jax.tree.map(jax.numpy.asarray, params)}, "opt_state": {}}


def main():
    """Write everything anew."""
    import jax
    import orbax.checkpoint as ocp

    arrays = jax.tree.map(jax.numpy.asarray, weights())
    trees = {
        "orbax/flat": (arrays, {}),
        "orbax/nested": (nested(arrays), {"use_zarr3": True}),
        "orbax/stacked": (stacked(arrays), {"use_ocdbt": False}),
        "orbax/stacked3": (stacked(arrays), {"use_ocdbt": False, "use_zarr3": True}),
        "maxtext/scanned": (maxtext(weights(), scanned=True), {"use_zarr3": True}),
        "maxtext/layers": (maxtext(weights(), scanned=False), {}),
    }
    for name, (tree, options) in trees.items():
        directory = HERE / name
        shutil.rmtree(directory, ignore_errors=True)
        target = directory / ("params" if name.startswith("orbax") else "0/items")
        target.parent.mkdir(parents=True)
        if name == "orbax/flat":
            checkpointer = ocp.StandardCheckpointer()
            checkpointer.save(target.absolute(), tree)
            checkpointer.wait_until_finished()
        else:
            ocp.PyTreeCheckpointer(**options).save(target.absolute(), tree)
        (target / "commit_success.txt").unlink()  # names a path of the machine
        (directory / "config.json").write_text(json.dumps(CONFIG, indent=2) + "\n")


if __name__ == "__main__":
    main()
