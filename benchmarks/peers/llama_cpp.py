"""llama.cpp by its C interface: the prompt in batches of 512 tokens at most, then a token of each row a step."""

from __future__ import annotations

import multiprocessing
import os
from pathlib import Path
from typing import Any

import gguf
import llama_cpp
import numpy as np

from benchmarks.common import ROOT, prompt_ids, random_weights, say, streamed, task

BATCH = 512
ONE_BY_ONE = ("q8_0", "q4_0")
"""Types of which several rows at once die of an illegal instruction in guests that hide half of AMX (0.3.36)."""


def file(asked: dict[str, Any]) -> Path:
    """A GGUF file of random weights under build/, written the first time and kept."""
    sizes, dtype = asked["sizes"], asked["dtype"]
    path = ROOT / "build" / f"random-{'-'.join(map(str, sizes.values()))}-{dtype}.gguf"
    if not path.exists():
        path.parent.mkdir(exist_ok=True)
        partial = path.with_suffix(".part")
        writer = multiprocessing.get_context("spawn").Process(target=write, args=(partial, sizes, dtype))
        writer.start()  # a process of its own, for its memory is not llama.cpp's
        writer.join()
        partial.rename(path)
    return path


def matrices(sizes: dict[str, Any]) -> dict[str, tuple[int, int]]:
    """llama.cpp's name -> shape of every matrix."""
    D, F, V, H = (sizes[name] for name in ("hidden_size", "intermediate_size", "vocab_size", "head_dim"))
    query, key = sizes["num_attention_heads"] * H, sizes["num_key_value_heads"] * H
    layer = {
        "attn_q": (query, D),
        "attn_k": (key, D),
        "attn_v": (key, D),
        "attn_output": (D, query),
        "ffn_gate": (F, D),
        "ffn_up": (F, D),
        "ffn_down": (D, F),
    }
    layers = range(sizes["num_hidden_layers"])
    return {
        "token_embd": (V, D),
        **{f"blk.{index}.{name}": shape for index in layers for name, shape in layer.items()},
        "output": (V, D),
    }


def write(path: Path, sizes: dict[str, Any], dtype: str) -> None:
    """A model of llama's architecture without a vocabulary."""
    writer = gguf.GGUFWriter(path, "llama")
    writer.add_tokenizer_model("no_vocab")
    writer.add_vocab_size(sizes["vocab_size"])
    writer.add_context_length(sizes["max_position_embeddings"])
    writer.add_embedding_length(sizes["hidden_size"])
    writer.add_block_count(sizes["num_hidden_layers"])
    writer.add_feed_forward_length(sizes["intermediate_size"])
    writer.add_head_count(sizes["num_attention_heads"])
    writer.add_head_count_kv(sizes["num_key_value_heads"])
    writer.add_key_length(sizes["head_dim"])
    writer.add_value_length(sizes["head_dim"])
    writer.add_rope_dimension_count(sizes["head_dim"])
    writer.add_layer_norm_rms_eps(1e-6)
    norms = [f"blk.{layer}.{name}" for layer in range(sizes["num_hidden_layers"]) for name in ("attn_norm", "ffn_norm")]
    for name in (*norms, "output_norm"):
        writer.add_tensor(f"{name}.weight", np.ones(sizes["hidden_size"], np.float32))
    rng = np.random.default_rng(0)
    kind = {
        "float32": gguf.GGMLQuantizationType.F32,
        "bfloat16": gguf.GGMLQuantizationType.BF16,
        "q8_0": gguf.GGMLQuantizationType.Q8_0,
        "q4_0": gguf.GGMLQuantizationType.Q4_0,
    }[dtype]
    for name, shape in matrices(sizes).items():
        array = random_weights(shape, "bfloat16" if dtype == "bfloat16" else "float32", rng)
        if dtype == "bfloat16":
            array = array.view(np.uint8)
        elif dtype != "float32":
            array = gguf.quants.quantize(array, kind)
        writer.add_tensor(f"{name}.weight", array, raw_dtype=kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


class Rows:
    """A context in which every row of a batch is a sequence."""

    def __init__(self, path: Path, asked: dict[str, Any]) -> None:
        self.vocabulary = asked["sizes"]["vocab_size"]
        self.model = llama_cpp.llama_model_load_from_file(str(path).encode(), llama_cpp.llama_model_default_params())
        options = llama_cpp.llama_context_default_params()
        room = -(-(asked["prompt"] + asked["new"]) // 256) * 256  # of a row, in llama.cpp's multiples
        options.n_ctx, options.n_seq_max = room * asked["batch"], asked["batch"]
        self.most = 1 if asked["dtype"] in ONE_BY_ONE else BATCH
        options.n_batch = options.n_ubatch = self.most
        options.n_threads = options.n_threads_batch = os.cpu_count() or 1
        self.context = llama_cpp.llama_init_from_model(self.model, options)
        self.batch = llama_cpp.llama_batch_init(BATCH, 0, 1)

    def forget(self) -> None:
        """Empty the cache."""
        llama_cpp.llama_memory_clear(llama_cpp.llama_get_memory(self.context), True)

    def next(self, ids_BT: np.ndarray, past: int) -> np.ndarray:
        """The most likely token [B] after the ids at positions from `past` on."""
        B, T = ids_BT.shape
        fed = [(b, t) for b in range(B) for t in range(T)]
        token_B = np.zeros(B, np.int64)
        for start in range(0, len(fed), self.most):
            part = fed[start : start + self.most]
            self.batch.n_tokens = len(part)
            for i, (b, t) in enumerate(part):
                self.batch.token[i], self.batch.pos[i] = int(ids_BT[b, t]), past + t
                self.batch.n_seq_id[i], self.batch.seq_id[i][0] = 1, b
                self.batch.logits[i] = t == T - 1
            if llama_cpp.llama_decode(self.context, self.batch):
                raise RuntimeError("llama_decode failed")
            for i, (b, t) in enumerate(part):
                if t == T - 1:
                    logits = llama_cpp.llama_get_logits_ith(self.context, i)
                    token_B[b] = np.ctypeslib.as_array(logits, (self.vocabulary,)).argmax()
        return token_B


def main() -> None:
    asked = task()
    rows = Rows(file(asked), asked)
    ids = prompt_ids(asked)

    def generate(streamer: Any) -> None:
        rows.forget()
        streamer.put(ids)
        token_B, past = rows.next(ids, 0), ids.shape[1]
        streamer.put(token_B)
        for _ in range(asked["new"] - 1):
            token_B, past = rows.next(token_B[:, None], past), past + 1
            streamer.put(token_B)

    say(streamed(generate, asked["calls"]), "llama-cpp-python")


if __name__ == "__main__":
    main()
