"""What is here, and what the parts measure with: waiting for a device, its memory, models of random weights on it.

As a part: the devices that PyTorch and JAX see, and the versions of what is installed.
"""

from __future__ import annotations

import contextlib
import json
import statistics
import time
from collections.abc import Callable
from importlib.metadata import PackageNotFoundError, version
from typing import Any

from benchmarks.common import peak_memory

CPU, CUDA = "cpu", "cuda"
PACKAGES = ("torch", "triton", "jax", "jaxlib", "flax", "transformers", "numpy", "ml_dtypes")
WARM, CALLS = 2, 5
STD = 0.02
"""Of random weights: a text of them stays finite."""


def tell(**result: Any) -> None:
    """Print one result at once: it counts whatever comes after."""
    print(json.dumps(result), flush=True)


def problem(error: BaseException) -> str:
    """An error in a line that a table can hold."""
    text = " ".join(str(error).split()).replace("|", "/")
    return f"{type(error).__name__}: {text[:160]}"


def awaited(value: Any) -> Any:
    """A result of PyTorch or JAX, once the device has computed it."""
    if type(value).__module__.partition(".")[0] == "torch":
        import torch

        if torch.cuda.is_available():
            torch.cuda.synchronize()
        return value
    import jax

    return jax.block_until_ready(value)


def seconds(function: Callable[[], Any], *, calls: int = CALLS) -> float:
    """The median time of a call that is awaited, after calls that warm up."""
    for _ in range(WARM):
        awaited(function())
    times = []
    for _ in range(calls):
        start = time.perf_counter()
        awaited(function())
        times.append(time.perf_counter() - start)
    return statistics.median(times)


def forget_peak() -> None:
    """Let the peak of PyTorch's memory begin anew; JAX and a CPU have one for the whole process."""
    with contextlib.suppress(ImportError):
        import torch

        if torch.cuda.is_available():
            torch.cuda.reset_peak_memory_stats()


def peak(framework: str) -> int:
    """The most bytes that a framework has had on the GPU, or the process in memory where there is none."""
    if framework == "torch":
        import torch

        return torch.cuda.max_memory_allocated() if torch.cuda.is_available() else peak_memory()
    import jax

    stats = jax.local_devices()[0].memory_stats()
    return stats["peak_bytes_in_use"] if stats else peak_memory()


def torch_weights(model: Any, device: str) -> Any:
    """A model made on the meta device, with random weights in bfloat16 on the device: norms 1."""
    import torch

    model = model.to(torch.bfloat16).to_empty(device=device).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.fill_(1) if parameter.ndim == 1 else parameter.normal_(0, STD)
    return model.requires_grad_(False)


def flax_weights(model: Any) -> Any:
    """A model of shapes alone, with random weights in bfloat16 on JAX's own device: norms 1."""
    import functools

    import jax
    import jax.numpy as jnp
    from flax import nnx

    @functools.partial(jax.jit, static_argnums=1)
    def random(key: Any, shape: tuple[int, ...]) -> Any:
        return (STD * jax.random.normal(key, shape)).astype(jnp.bfloat16)

    leaves, tree = jax.tree.flatten(nnx.state(model))
    keys = jax.random.split(jax.random.key(0), len(leaves))
    made = [
        jnp.ones(leaf.shape, jnp.bfloat16) if len(leaf.shape) == 1 else random(key, leaf.shape)
        for key, leaf in zip(keys, leaves, strict=True)
    ]
    nnx.update(model, jax.tree.unflatten(tree, made))
    return model


def installed() -> dict[str, str]:
    """Package -> version of what is here."""
    found = {}
    for name in PACKAGES:
        with contextlib.suppress(PackageNotFoundError):
            found[name] = version(name)
    return found


def torch_device() -> tuple[str, str, float]:
    """PyTorch's device, its name, and its memory in bytes."""
    import torch

    if not torch.cuda.is_available():
        return CPU, "no GPU", 0.0
    found = torch.cuda.get_device_properties(0)
    return CUDA, f"{found.name} (CUDA {torch.version.cuda or 'none'})", float(found.total_memory)


def jax_device() -> tuple[str, str]:
    """JAX's device and its name."""
    import jax

    first = jax.devices()[0]
    return (CPU, "no GPU") if first.platform == "cpu" else (CUDA, first.device_kind)


def main() -> None:
    result: dict[str, Any] = {"torch": CPU, "jax": CPU, "name": "no GPU", "memory": 0.0, "versions": installed()}
    with contextlib.suppress(ImportError):
        result["torch"], result["name"], result["memory"] = torch_device()
    tell(**result)
    with contextlib.suppress(ImportError):
        result["jax"], result["jax name"] = jax_device()
    tell(**result)


if __name__ == "__main__":
    main()
