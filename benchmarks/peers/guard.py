"""Our own generate in one backend, all that the guard compares; option: backend.

One process makes the models after each other, for the import of a framework takes longer than most of them. What each
gives stands under its dtype or scheme and its batch, the framework's large product under its dtype, and, where the
backend is torch, the read bandwidth.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from benchmarks.common import prompt_ids, say, streamed, task, timed
from benchmarks.peers import limits, ours
from benchmarks.quantized import SCHEMES
from mistral_core import MistralConfig


def rate(function: Callable[[], Any], amount: float, calls: int) -> float:
    """What is done in a second, in the fastest call: a limit is what the machine can do undisturbed."""
    function()
    return amount / min(timed(function) for _ in range(calls))


def generator(model: Any, asked: dict[str, Any]) -> Callable[[Any], Any]:
    """The model's generate as a user calls it, greedy, to the last token."""
    ids, options = prompt_ids(asked), {"max_new_tokens": asked["new"], "do_sample": False, "eos_token_id": None}
    return lambda streamer: model.generate(ids, streamer=streamer, **options)


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
            found[f"{name} {batch}"] = streamed(generator(model, {**asked, "batch": batch}), asked["calls"])
    say(found, ours.FRAMEWORKS[backend])


if __name__ == "__main__":
    main()
