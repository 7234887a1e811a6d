"""Attention alone, forward, in bfloat16: one implementation over texts of growing length, with a window and without.

Options: implementation (torch sdpa, torch flex, flax dot_product, jax cudnn). The last is JAX's own call of cuDNN's
kernel, which knows a local window but no padding: a measurement of what is to be had, not something we offer.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from benchmarks.common import task

from .device import forget_peak, peak, problem, seconds, tell

Sizes = tuple[int, int, int]
"""Query heads, key/value heads, numbers of a head."""


Measured = tuple[Callable[[], Any], Callable[[], int]]
"""What is timed, and the most bytes that it has had on the device."""


def torch_call(implementation: str, length: int, window: int | None, sizes: Sizes, device: str) -> Measured:
    """Our attention in PyTorch over one text without padding."""
    import torch

    from mistral_torch import attention

    N, K, H = sizes
    q, k, v = (torch.randn(1, length, heads, H, dtype=torch.bfloat16, device=device) for heads in (N, K, K))
    order_BT = torch.arange(length, device=device)[None]
    visibility = attention.prepared(attention.Visibility(order_BT, order_BT, window), implementation)

    def call() -> Any:
        with torch.no_grad():
            return attention.attend(q, k, v, visibility, implementation=implementation)[0]

    return call, lambda: peak("torch")


def jax_call(implementation: str, length: int, window: int | None, sizes: Sizes, device: str) -> Measured:
    """Our attention in Flax, or cuDNN's by JAX, over one text without padding."""
    import jax
    import jax.numpy as jnp

    from mistral_flax import attention

    N, K, H = sizes
    keys = jax.random.split(jax.random.key(0), 3)
    qkv = [
        jax.random.normal(key, (1, length, heads, H), jnp.bfloat16) for key, heads in zip(keys, (N, K, K), strict=True)
    ]
    order_BT = jnp.arange(length, dtype=jnp.int32)[None]

    def own(q: Any, k: Any, v: Any) -> Any:
        visibility = attention.prepared(attention.Visibility(order_BT, order_BT, window), implementation)
        return attention.attend(q, k, v, visibility, implementation=implementation)[0]

    def cudnn(q: Any, k: Any, v: Any) -> Any:
        local = None if window is None else (window - 1, 0)
        return jax.nn.dot_product_attention(q, k, v, is_causal=True, local_window_size=local, implementation="cudnn")

    compiled = jax.jit(cudnn if implementation == "cudnn" else own).lower(*qkv).compile()
    plan = compiled.memory_analysis()  # the peak of a process would be that of the largest call so far
    size = sum(getattr(plan, f"{kind}_size_in_bytes", 0) for kind in ("temp", "argument", "output"))
    return lambda: compiled(*qkv), lambda: size


def main() -> None:
    asked = task()
    framework, _, implementation = asked["options"]["implementation"].partition(" ")
    call_of = torch_call if framework == "torch" else jax_call
    for window in (asked["window"], None):
        for length in asked["lengths"]:
            row = {"implementation": asked["options"]["implementation"], "length": length, "window": window}
            try:
                forget_peak()
                call, most = call_of(implementation, length, window, tuple(asked["heads"]), asked["device"])
                took = seconds(call)
            except Exception as error:  # a longer text would not fit either
                tell(**row, problem=problem(error))
                break
            tell(**row, seconds=took, peak=most())


if __name__ == "__main__":
    main()
