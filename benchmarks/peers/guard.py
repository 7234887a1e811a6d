"""Our own generate in one backend, all that the guard compares, in turn; option: backend.

All models are held at once and each round asks every one, with the limits of the machine among them: what is compared
was measured within seconds, for a machine that is shared is another one a minute later.
"""

from __future__ import annotations

import statistics
from collections.abc import Callable
from typing import Any

from benchmarks.common import Stamps, prompt_ids, say, task, timed
from benchmarks.peers import limits, ours
from benchmarks.quantized import SCHEMES
from mistral_core import MistralConfig


def soonest(function: Callable[[], Any]) -> float:
    """The least seconds of three calls: what was not read for a second is read up to twice as slowly at first."""
    return min(timed(function) for _ in range(3))


def speaking(model: Any, asked: dict[str, Any]) -> Callable[[], dict[str, float]]:
    """Calls of generate, greedy: the time to the first token, and, to the last one, a step's."""
    ids, options = prompt_ids(asked), {"do_sample": False, "eos_token_id": None}

    def call() -> dict[str, float]:
        stamps = Stamps()
        first = soonest(lambda: model.generate(ids, max_new_tokens=1, **options))
        model.generate(ids, max_new_tokens=asked["new"], streamer=stamps, **options)
        return {"first": first, "step": statistics.median(stamps.steps)}

    return call


def measurements(backend: str, asked: dict[str, Any]) -> dict[str, Callable[[], Any]]:
    """Name -> what measures it once: a dtype or scheme with its batch, or a limit's seconds."""
    config, found = MistralConfig(**asked["sizes"]), {}
    for name in asked["models"]:
        dtype, quantization = (name, None) if name == "float32" else ("bfloat16", SCHEMES[name])
        model = ours.made(backend, config, dtype, quantization)
        if name in asked["reads"]:
            read = limits.numpy_reader(asked["reads"][name])
            found[f"read beside {name}"] = lambda read=read: soonest(read)
        for batch in asked["batches"] if quantization is None else (1,):
            rows = {"batch": batch, "prompt": asked["prompt"] // batch}  # as many tokens in all
            found[f"{name} {batch}"] = speaking(model, {**asked, **rows})
        if quantization is None:
            product = limits.product(backend, dtype)
            found[f"matmul {dtype}"] = lambda product=product: soonest(product)
    return found


def main() -> None:
    asked = task()
    backend = asked["options"]["backend"]
    found = measurements(backend, asked)
    rounds = [{name: measure() for name, measure in found.items()} for _ in range(asked["calls"] + 1)]
    say({"rounds": rounds[1:]}, ours.FRAMEWORKS[backend])  # the first one compiles


if __name__ == "__main__":
    main()
