"""GGUF by llama.cpp and by gguf's own reader and writer, for the exchange of checkpoints.

    PYTHON exchange_llama.py read gguf PATH IDS.npy OUT.npz
    PYTHON exchange_llama.py write gguf WEIGHTS.npz CONFIG.json OUT_DIR
    PYTHON exchange_llama.py tokenize gguf PATH TEXTS.json OUT.json
    PYTHON exchange_llama.py adapt gguf PATH ADAPTER.gguf IDS.npy TOKENS OUT.npz

`read` saves llama.cpp's logits [B, T, V] and, as `tensor:NAME` under Hugging Face names and in their layout, what gguf
reads; bfloat16 as uint16 bits. `write` does what llama.cpp's converter does with a Llama and with a ministral3: names,
rows of q and k in pairs, vectors as float32. `tokenize` gives the ids of texts. `adapt` saves the logits [B, T, V] of a
model beside an adapter, and so many likeliest tokens after each prompt. This file runs without any package of ours.
"""

import json
import sys
from pathlib import Path

import gguf
import numpy as np

LAYER = {
    "attn_norm": "input_layernorm",
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj",
    "ffn_norm": "post_attention_layernorm",
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
}
OTHERS = {"token_embd": "model.embed_tokens", "output_norm": "model.norm", "output": "lm_head"}
WRITTEN = {"float32": np.float32, "float16": np.float16}


def hugging_face_name(name):
    stem = name.removesuffix(".weight")
    if stem in OTHERS:
        return OTHERS[stem] + ".weight"
    _, layer, part = stem.split(".")
    return f"model.layers.{layer}.{LAYER[part]}.weight"


def file_of(path):
    return path / "model.gguf" if path.is_dir() else path


def llama(path, length, **options):
    import llama_cpp

    plain = llama_cpp.GGML_TYPE_F32  # keys and values, which llama.cpp rounds to float16 unless told otherwise
    sizes = {"n_ctx": max(length, 8), "n_batch": max(length, 8), "n_ubatch": max(length, 8), "n_threads": 1}
    of_file = dict.fromkeys(("yarn_ext_factor", "yarn_attn_factor", "yarn_beta_fast", "yarn_beta_slow"), -1.0)
    return llama_cpp.Llama(
        str(file_of(path)),
        logits_all=True,
        verbose=False,
        type_k=plain,
        type_v=plain,
        flash_attn=False,
        **sizes,
        **options,
        **of_file,  # without it the Python package says numbers of its own
    )


def tensors(path):
    """Name -> array in Hugging Face's layout; quantised ones dequantised."""
    reader = gguf.GGUFReader(file_of(path))
    architecture = reader.get_field("general.architecture").contents()
    heads = int(reader.get_field(f"{architecture}.attention.head_count").contents())
    key_heads = int(reader.get_field(f"{architecture}.attention.head_count_kv").contents())
    found = {}
    for tensor in reader.tensors:
        array, kind = tensor.data, tensor.tensor_type.name
        if kind == "BF16":
            array = array.view(np.uint16)
        elif kind not in ("F32", "F16", "F64"):
            array = gguf.quants.dequantize(array, tensor.tensor_type)
        name = hugging_face_name(tensor.name)
        count = heads if "q_proj" in name else key_heads if "k_proj" in name else None
        if count is not None:  # pairs of rows back into halves
            rows, columns = array.shape
            array = array.reshape(count, rows // count // 2, 2, columns).swapaxes(1, 2).reshape(array.shape)
        found[name] = array
    return found


def read(path, ids, out):
    ids = np.load(ids)
    model = llama(path, ids.shape[1])
    logits = []
    for row in ids:
        model.reset()
        model.eval(row.tolist())
        logits.append(np.array(model.scores[: len(row)], np.float32))
    given = {f"tensor:{name}": array for name, array in tensors(path).items()}
    np.savez(out, logits=np.stack(logits), **given)


def adapt(path, adapter, ids, tokens, out):
    ids, tokens, logits, said = np.load(ids), int(tokens), [], []
    length = ids.shape[1]
    model = llama(path, length + tokens, lora_path=adapter)
    for row in ids:
        model.reset()
        model.eval(row.tolist())
        logits.append(np.array(model.scores[:length], np.float32))
        for at in range(length - 1, length + tokens - 1):
            said.append(int(model.scores[at].argmax()))
            model.eval(said[-1:])
    np.savez(out, logits=np.stack(logits), tokens=np.reshape(said, (len(ids), tokens)))


def tokenize(path, texts, out):
    model = llama(path, 8)
    texts = json.loads(Path(texts).read_text())
    ids = [model.tokenize(text.encode(), add_bos=True, special=False) for text in texts]
    Path(out).write_text(json.dumps(ids))


def add_rotary(writer, config):
    """The keys of positions, from a config.json of transformers 4 or 5."""
    scaling = config.get("rope_parameters") or config.get("rope_scaling") or {}
    writer.add_rope_freq_base(scaling.get("rope_theta", config.get("rope_theta")))
    kind = scaling.get("rope_type", scaling.get("type", "default"))
    if kind == "default":
        return
    writer.add_rope_scaling_type(gguf.RopeScalingType(kind))
    writer.add_rope_scaling_factor(scaling["factor"])
    if kind == "yarn":
        writer.add_rope_scaling_orig_ctx_len(scaling["original_max_position_embeddings"])
    if config["model_type"] == "ministral3":
        writer.add_rope_scaling_yarn_beta_fast(scaling["beta_fast"])
        writer.add_rope_scaling_yarn_beta_slow(scaling["beta_slow"])
        writer.add_rope_scaling_yarn_log_mul(scaling["mscale_all_dim"])
        writer.add_attn_temperature_scale(scaling["llama_4_scaling_beta"])


def write(weights, config, out, name="model.gguf"):
    data, config = np.load(weights), json.loads(Path(config).read_text())
    out = Path(out)
    out.mkdir(parents=True, exist_ok=True)
    writer = gguf.GGUFWriter(out / name, "mistral3" if config["model_type"] == "ministral3" else "llama")
    head_dim = config.get("head_dim") or config["hidden_size"] // config["num_attention_heads"]
    heads, key_heads = config["num_attention_heads"], config["num_key_value_heads"]
    writer.add_name("Mistral")
    writer.add_vocab_size(config["vocab_size"])
    writer.add_context_length(config["max_position_embeddings"])
    writer.add_embedding_length(config["hidden_size"])
    writer.add_block_count(config["num_hidden_layers"])
    writer.add_feed_forward_length(config["intermediate_size"])
    writer.add_head_count(heads)
    writer.add_head_count_kv(key_heads)
    writer.add_layer_norm_rms_eps(config["rms_norm_eps"])
    writer.add_rope_dimension_count(head_dim)
    writer.add_key_length(head_dim)
    writer.add_value_length(head_dim)
    add_rotary(writer, config)
    writer.add_tokenizer_model("no_vocab")
    for id_name, add in (("bos", writer.add_bos_token_id), ("eos", writer.add_eos_token_id)):
        if isinstance(config.get(f"{id_name}_token_id"), int):
            add(config[f"{id_name}_token_id"])
    kind = WRITTEN.get(config.get("torch_dtype") or config.get("dtype"), np.float32)
    gguf_names = {hugging_face_name(f"{stem}.weight"): f"{stem}.weight" for stem in OTHERS}
    for layer in range(config["num_hidden_layers"]):
        names = [f"blk.{layer}.{stem}.weight" for stem in LAYER]
        gguf_names |= {hugging_face_name(each): each for each in names}
    for canonical, name in gguf_names.items():
        if canonical == "lm_head.weight" and config.get("tie_word_embeddings"):
            continue
        array = data[canonical]
        count = heads if "q_proj" in canonical else key_heads if "k_proj" in canonical else None
        if count is not None:
            rows, columns = array.shape
            array = array.reshape(count, 2, rows // count // 2, columns).swapaxes(1, 2).reshape(array.shape)
        writer.add_tensor(name, np.ascontiguousarray(array).astype(np.float32 if array.ndim == 1 else kind))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


if __name__ == "__main__":
    command, _, first, *others = sys.argv[1:]
    if command == "adapt":
        adapt(Path(first), *others)
    else:
        {"read": read, "write": write, "tokenize": tokenize}[command](Path(first), *others)
