"""Our own generate in one backend, all that the guard compares; option: backend.

One process makes the models after each other, for the import of a framework takes longer than most of them. What each
gives stands under its dtype or scheme and its batch, the framework's large product under its dtype, and, where the
backend is torch, the read bandwidth.
"""

from __future__ import annotations

from typing import Any

from benchmarks.common import prompt_ids, say, streamed, task, timed
from benchmarks.peers import limits, ours
from benchmarks.quantized import SCHEMES
from mistral_core import MistralConfig


def rate(function: Any, amount: float, calls: int) -> float:
    """What is done in a second, in the fastest call: a limit is what the machine can do undisturbed."""
    function()
    return amount / min(timed(function) for _ in range(calls))


def main() -> None:
    asked = task()
    backend, config = asked["options"]["backend"], MistralConfig(**asked["sizes"])
    found: dict[str, Any] = {}
    if backend == "torch":
        found["read"] = rate(limits.reader(), limits.READ, asked["calls"])
    for dtype in ("float32", "bfloat16"):
        operations = 2 * limits.M * limits.K * limits.N
        found[f"matmul {dtype}"] = rate(limits.product(backend, dtype), operations, asked["calls"])
    for name in asked["models"]:
        dtype, quantization = (name, None) if name == "float32" else ("bfloat16", SCHEMES[name])
        model = ours.made(backend, config, dtype, quantization)
        for batch in asked["batches"] if quantization is None else (1,):
            ids = prompt_ids({**asked, "batch": batch})
            options = {"max_new_tokens": asked["new"], "do_sample": False, "eos_token_id": None}
            found[f"{name} {batch}"] = streamed(
                lambda streamer, model=model, ids=ids: model.generate(ids, streamer=streamer, **options),
                asked["calls"],
            )
    say(found, ours.FRAMEWORKS[backend])


if __name__ == "__main__":
    main()
