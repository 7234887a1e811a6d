"""vLLM on a CPU; run by its own interpreter, see conformance/exchange_vllm.py and exchange_adapters.py.

    PYTHON exchange_vllm.py read DTYPE PATH IDS.npy TOKENS OUT.npz
    PYTHON exchange_vllm.py adapt PATH IDS.npy TOKENS MAX_RANK OUT_DIR ADAPTER ...

It gives no logits but log-probabilities, here of the whole vocabulary at every position of a prompt after the first.
`adapt` saves them beside each adapter as OUT_DIR/NAME.npz, or what it says of one that it refuses as NAME.txt.
"""

import os
import sys
from pathlib import Path

# one process without a tokenizer, a server's threads and the hub
os.environ |= {
    "VLLM_ENABLE_V1_MULTIPROCESSING": "0",
    "VLLM_CPU_KVCACHE_SPACE": "1",
    "VLLM_CPU_OMP_THREADS_BIND": "nobind",
    "HF_HUB_OFFLINE": "1",
}

import numpy as np
from vllm import LLM, SamplingParams
from vllm.lora.request import LoRARequest


def opened(dtype, path, **options):
    return LLM(
        path,
        dtype=dtype,
        skip_tokenizer_init=True,
        enforce_eager=True,
        max_model_len=64,
        max_num_seqs=4,
        max_logprobs=-1,
        **options,
    )


def computed(model, ids, tokens, out, adapter=None):
    """Log-probabilities [B, T-1, V] of each next token of the prompts, and so many likeliest tokens after them."""
    asked = SamplingParams(temperature=0, max_tokens=int(tokens), prompt_logprobs=-1, detokenize=False, ignore_eos=True)
    prompts = [{"prompt_token_ids": row} for row in np.load(ids).tolist()]
    found = model.generate(prompts, asked, use_tqdm=False, lora_request=adapter)
    rows = [[[at[token].logprob for token in range(len(at))] for at in each.prompt_logprobs[1:]] for each in found]
    np.savez(out, logprobs=np.array(rows), tokens=np.array([each.outputs[0].token_ids for each in found]))


def read(dtype, path, ids, tokens, out):
    computed(opened(dtype, path), ids, tokens, out)


def adapt(path, ids, tokens, rank, out, *adapters):
    model = opened("float32", path, enable_lora=True, max_lora_rank=int(rank))
    out = Path(out)
    out.mkdir()
    for number, folder in enumerate(map(Path, adapters), 1):
        asked = LoRARequest(folder.name, number, str(folder))
        try:
            model.llm_engine.add_lora(asked)
        except Exception as error:
            (out / f"{folder.name}.txt").write_text(str(error))
            continue
        computed(model, ids, tokens, out / f"{folder.name}.npz", asked)


if __name__ == "__main__":
    command, *arguments = sys.argv[1:]
    if command == "adapt":
        adapt(*arguments)
    else:
        read(*arguments)
