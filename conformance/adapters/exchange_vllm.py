"""vLLM on a CPU; run by its own interpreter, see conformance/exchange_vllm.py.

It gives no logits but log-probabilities, here of the whole vocabulary at every position of a prompt after the first.
"""

import os
import sys

# one process without a tokenizer, a server's threads and the hub
os.environ |= {
    "VLLM_ENABLE_V1_MULTIPROCESSING": "0",
    "VLLM_CPU_KVCACHE_SPACE": "1",
    "VLLM_CPU_OMP_THREADS_BIND": "nobind",
    "HF_HUB_OFFLINE": "1",
}

import numpy as np
from vllm import LLM, SamplingParams


def read(dtype, path, ids, tokens, out):
    """Log-probabilities [B, T-1, V] of each next token of the prompts, and so many likeliest tokens after them."""
    model = LLM(
        path,
        dtype=dtype,
        skip_tokenizer_init=True,
        enforce_eager=True,
        max_model_len=64,
        max_num_seqs=4,
        max_logprobs=-1,
    )
    asked = SamplingParams(temperature=0, max_tokens=int(tokens), prompt_logprobs=-1, detokenize=False, ignore_eos=True)
    prompts = [{"prompt_token_ids": row} for row in np.load(ids).tolist()]
    found = model.generate(prompts, asked, use_tqdm=False)
    rows = [[[at[token].logprob for token in range(len(at))] for at in each.prompt_logprobs[1:]] for each in found]
    np.savez(out, logprobs=np.array(rows), tokens=np.array([each.outputs[0].token_ids for each in found]))


if __name__ == "__main__":
    read(*sys.argv[1:])
