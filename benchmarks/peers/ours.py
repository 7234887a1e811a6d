"""Our own generate, in any backend; options: backend, compile, what to measure (generate, windows, overhead).

And quantization: the fields of a `Quantization`, where matrices are packed as they come.
"""

from __future__ import annotations

import importlib
import statistics
from collections.abc import Iterator
from typing import Any

import ml_dtypes
import numpy as np

from benchmarks.common import Stamps, peak_memory, prompt_ids, random_weights, say, streamed, task, timed
from mistral_core import MistralConfig
from mistral_core.parameters import parameters, shape_of
from mistral_core.quantization import request
from mistral_core.quantization.models import round_activations

FRAMEWORKS = {"torch": "torch", "flax": "jax", "tf": "tensorflow"}
WARM_CALLS, OVERHEAD_CALLS = 5, 100


def weights(config: MistralConfig, dtype: str) -> Iterator[tuple[str, np.ndarray]]:
    """Every tensor of the model: norms 1, the others random."""
    rng = np.random.default_rng(0)
    for name, row in parameters(config):
        shape = shape_of(row, config)
        if row.kind == "norm":
            yield name, np.ones(shape, dtype)
        else:
            array = random_weights(shape, dtype, rng)
            yield name, array.view(ml_dtypes.bfloat16) if dtype == "bfloat16" else array


def made(backend: str, config: MistralConfig, dtype: str, quantization: dict[str, Any] | None = None) -> Any:
    """A model that holds each of its tensors once from the beginning."""
    if backend == "torch":
        import torch

        from mistral_torch import MistralForCausalLM

        with torch.device("meta"):
            model = MistralForCausalLM(config).eval()
    elif backend == "flax":
        from flax import nnx

        from mistral_flax import MistralForCausalLM

        model = nnx.eval_shape(lambda: MistralForCausalLM(config, dtype=dtype))
    else:
        from mistral_tf import MistralForCausalLM

        model = MistralForCausalLM(config, dtype=dtype, initializer="zeros")
    asked = request.of(quantization)
    asked = None if asked is None else asked.resolved(config, "MistralForCausalLM")
    packed = set() if asked is None else set(asked.matrices(config, "MistralForCausalLM"))
    guest = importlib.import_module(f"mistral_{backend}.quantize")
    for name, array in weights(config, dtype):
        if asked is not None and name in packed:
            guest.put(model, name, asked.quantise(name, array))
        else:
            model.set_parameter(name, array)
    return round_activations(model, None if asked is None else asked.activations)


def windows(stamps: Stamps, asked: dict[str, Any]) -> dict[str, list[float]]:
    """Of each window of text: the median step that is still within it, and the peak memory at its end."""
    window = asked["sizes"]["sliding_window"]
    ends = range(window, asked["prompt"] + asked["new"] + 1, window)
    at = [end - asked["prompt"] for end in ends]  # the token that fills the window
    return {
        "step": [statistics.median(stamps.steps[max(end - window, 0) : end - 1]) for end in at],
        "peak": [stamps.peaks[end] for end in at],
    }


def compilations(backend: str) -> list[str]:
    """A list that grows as JAX compiles; empty elsewhere."""
    found: list[str] = []
    if backend == "flax":
        import jax

        def note(event: str, duration: float, **details: Any) -> None:
            if event.endswith("backend_compile_duration"):
                found.append(event)

        jax.monitoring.register_event_duration_secs_listener(note)
    return found


def main() -> None:
    asked = task()
    options = asked["options"]
    backend = options["backend"]
    compiled, after = compilations(backend), []
    model = made(backend, MistralConfig(**asked["sizes"]), asked["dtype"], options.get("quantization"))
    ids = prompt_ids(asked)

    def generate(streamer: Any = None) -> None:
        model.generate(
            ids,
            max_new_tokens=asked["new"],
            do_sample=False,
            eos_token_id=None,
            compile=options["compile"],
            streamer=streamer,
        )
        after.append(len(compiled))

    if options["measure"] == "windows":
        stamps = Stamps()
        generate(stamps)
        result: dict[str, Any] = windows(stamps, asked)
    elif options["measure"] == "overhead":
        for _ in range(WARM_CALLS):
            generate()
        result = {"one": statistics.median(timed(generate) for _ in range(OVERHEAD_CALLS)), "peak": peak_memory()}
    else:
        result = streamed(generate, asked["calls"])
        result["compilations"] = after[-1] - after[0]  # in the calls after the first
    say(result, FRAMEWORKS[backend])


if __name__ == "__main__":
    main()
