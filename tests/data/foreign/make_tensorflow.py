"""tf_model.h5 as transformers 4.56.2 writes it: run it where transformers and TensorFlow are installed.

    python make_tensorflow.py

tensorflow/single holds one file, tensorflow/sharded the same weights in shards.
"""

import os
import shutil
from pathlib import Path

os.environ.update(TF_USE_LEGACY_KERAS="1", TF_CPP_MIN_LOG_LEVEL="3", CUDA_VISIBLE_DEVICES="")
import numpy as np
import tensorflow as tf
from transformers import MistralConfig, TFMistralForCausalLM

HERE = Path(__file__).parent / "tensorflow"
CONFIG = MistralConfig(
    vocab_size=11, hidden_size=16, intermediate_size=12, num_hidden_layers=2, num_attention_heads=4,
    num_key_value_heads=2, sliding_window=3, max_position_embeddings=64,
)  # fmt: skip
LAYER = {
    "input_layernorm": (16,),
    "self_attn.q_proj": (16, 16),
    "self_attn.k_proj": (8, 16),
    "self_attn.v_proj": (8, 16),
    "self_attn.o_proj": (16, 16),
    "post_attention_layernorm": (16,),
    "mlp.gate_proj": (12, 16),
    "mlp.up_proj": (12, 16),
    "mlp.down_proj": (16, 12),
}
SHAPES = {
    "model.embed_tokens": (11, 16),
    **{f"model.layers.{layer}.{name}": shape for layer in range(2) for name, shape in LAYER.items()},
    "model.norm": (16,),
    "lm_head": (11, 16),
}


def main():
    generator = np.random.default_rng(0)
    arrays = {name: generator.standard_normal(shape).astype(np.float32) for name, shape in SHAPES.items()}
    model = TFMistralForCausalLM(CONFIG)
    model(tf.constant([[1, 2]]))
    for variable in model.weights:
        *path, leaf = variable.name.removesuffix(":0").split("/")[1:]
        array = arrays[".".join(path)]
        variable.assign(array.T if leaf == "kernel" else array)
    shutil.rmtree(HERE, ignore_errors=True)
    for folder, size in (("single", "10GB"), ("sharded", 4000)):
        model.save_pretrained(HERE / folder, safe_serialization=False, max_shard_size=size)
        (HERE / folder / "generation_config.json").unlink()


if __name__ == "__main__":
    main()
