"""Presets as KerasHub writes them: run it where keras-hub is installed.

    python make_keras_hub.py

keras_hub/single is a whole model in bfloat16 with a tokenizer, keras_hub/sharded a backbone in float32 in shards.
"""

import io
import os
import shutil
from pathlib import Path

os.environ.update(KERAS_BACKEND="tensorflow", TF_CPP_MIN_LOG_LEVEL="3", CUDA_VISIBLE_DEVICES="")
import keras_hub
import numpy as np
import sentencepiece

HERE = Path(__file__).parent / "keras_hub"
SIZES = {
    "vocabulary_size": 24, "num_layers": 2, "num_query_heads": 4, "num_key_value_heads": 2, "hidden_dim": 16,
    "intermediate_dim": 12, "head_dim": 6, "sliding_window": 3, "layer_norm_epsilon": 1e-5,
    "rope_max_wavelength": 1e6, "rope_scaling_factor": 2.0,
}  # fmt: skip
SHARD_GIB = 4000 / 1024**3


def tokenizer():
    model = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(["a bad cab"]), model_writer=model, vocab_size=24, hard_vocab_limit=False,
        model_type="bpe", normalization_rule_name="identity", unk_id=0, bos_id=1, eos_id=2, minloglevel=2,
    )  # fmt: skip
    return keras_hub.models.MistralTokenizer(model.getvalue())


def main():
    shutil.rmtree(HERE, ignore_errors=True)
    for folder, dtype in (("single", "bfloat16"), ("sharded", "float32")):
        backbone = keras_hub.models.MistralBackbone(**SIZES, dtype=dtype)
        generator = np.random.default_rng(0)
        for variable in backbone.weights:  # in the order of creation, as its test draws them
            variable.assign(generator.standard_normal(variable.shape).astype(np.float32))
        if folder == "sharded":
            backbone.save_to_preset(HERE / folder, max_shard_size=SHARD_GIB)
            continue
        preprocessor = keras_hub.models.MistralCausalLMPreprocessor(tokenizer(), sequence_length=16)
        keras_hub.models.MistralCausalLM(backbone=backbone, preprocessor=preprocessor).save_to_preset(HERE / folder)
    print([(variable.path, tuple(variable.shape)) for variable in backbone.weights])


if __name__ == "__main__":
    main()
