"""GGUF files written by gguf 0.19's own writer: `PYTHON make_gguf.py`, with a Python that has gguf.

half.gguf: float16, a vocabulary of the kind `llama`. tied.gguf: bfloat16, no output, yarn. quantised.gguf: several
types. Weights are drawn from default_rng(0) in the order of the names, in Hugging Face's layout.
"""

from pathlib import Path

import gguf
import numpy as np

OUT = Path(__file__).parent / "gguf"
VOCABULARY, HIDDEN, INNER, HEADS, KEY_HEADS, HEAD_DIM = 24, 32, 64, 2, 1, 16
LAYER = {
    "attn_norm": (HIDDEN,),
    "attn_q": (HEADS * HEAD_DIM, HIDDEN),
    "attn_k": (KEY_HEADS * HEAD_DIM, HIDDEN),
    "attn_v": (KEY_HEADS * HEAD_DIM, HIDDEN),
    "attn_output": (HIDDEN, HEADS * HEAD_DIM),
    "ffn_norm": (HIDDEN,),
    "ffn_gate": (INNER, HIDDEN),
    "ffn_up": (INNER, HIDDEN),
    "ffn_down": (HIDDEN, INNER),
}
SHAPES = {
    "token_embd": (VOCABULARY, HIDDEN),
    **{f"blk.0.{name}": shape for name, shape in LAYER.items()},
    "output_norm": (HIDDEN,),
    "output": (VOCABULARY, HIDDEN),
}
QUANTISED = ("Q8_0", "Q4_0", "Q4_1", "Q5_0", "Q5_1")
PIECES = ["<unk>", "<s>", "</s>", "<0x0A>", "▁", "a", "b", "▁a", "ab", "▁ab"]


def writer(name):
    made = gguf.GGUFWriter(OUT / f"{name}.gguf", "llama")
    made.add_name("Mistral made by gguf")
    made.add_context_length(128)
    made.add_embedding_length(HIDDEN)
    made.add_block_count(1)
    made.add_feed_forward_length(INNER)
    made.add_head_count(HEADS)
    made.add_head_count_kv(KEY_HEADS)
    made.add_layer_norm_rms_eps(1e-5)
    made.add_rope_dimension_count(HEAD_DIM)
    made.add_rope_freq_base(1e6)
    return made


def weights():
    generator = np.random.default_rng(0)
    for name, shape in SHAPES.items():
        array = generator.standard_normal(shape).astype(np.float32)
        heads = {"attn_q": HEADS, "attn_k": KEY_HEADS}.get(name.rpartition(".")[2])
        if heads:
            array = array.reshape(heads, 2, HEAD_DIM // 2, HIDDEN).swapaxes(1, 2).reshape(shape)
        yield f"{name}.weight", array


def finish(made):
    made.write_header_to_file()
    made.write_kv_data_to_file()
    made.write_tensors_to_file()
    made.close()


def half():
    made = writer("half")
    made.add_tokenizer_model("llama")
    made.add_token_list(PIECES + [f"[PAD{each}]" for each in range(len(PIECES), VOCABULARY)])
    made.add_token_scores([0.0, 0.0, 0.0, 0.0, -5.0, -6.0, -7.0, -1.0, -2.0, -3.0] + [0.0] * (VOCABULARY - len(PIECES)))
    made.add_token_types([2, 3, 3, 6] + [1] * 6 + [5] * (VOCABULARY - len(PIECES)))
    made.add_bos_token_id(1)
    made.add_eos_token_id(2)
    made.add_chat_template("{{ messages }}")
    for name, array in weights():
        made.add_tensor(name, array if array.ndim == 1 else array.astype(np.float16))
    finish(made)


def tied():
    made = writer("tied")
    made.add_tokenizer_model("no_vocab")
    made.add_vocab_size(VOCABULARY)
    made.add_rope_scaling_type(gguf.RopeScalingType.YARN)
    made.add_rope_scaling_factor(4.0)
    made.add_rope_scaling_orig_ctx_len(32)
    made.add_custom_alignment(64)
    kind = gguf.GGMLQuantizationType.BF16
    for name, array in weights():
        if array.ndim == 1:
            made.add_tensor(name, array)
        elif name != "output.weight":
            made.add_tensor(name, gguf.quants.quantize(array, kind), raw_dtype=kind)
    finish(made)


def quantised():
    made = writer("quantised")
    made.add_tokenizer_model("no_vocab")
    made.add_vocab_size(VOCABULARY)
    made.add_quantization_version(2)
    for number, (name, array) in enumerate(weights()):
        if array.ndim == 1:
            made.add_tensor(name, array)
        else:
            kind = gguf.GGMLQuantizationType[QUANTISED[number % len(QUANTISED)]]
            made.add_tensor(name, gguf.quants.quantize(array, kind), raw_dtype=kind)
    finish(made)


if __name__ == "__main__":
    OUT.mkdir(exist_ok=True)
    half()
    tied()
    quantised()
