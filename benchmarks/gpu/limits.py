"""What the device allows: bytes a second of large reads and copies, operations a second of large products in bfloat16.

A decoded token reads each weight once: the fastest of three ways to read counts as the limit of memory.
"""

from __future__ import annotations

from typing import Any

from benchmarks.common import task

from .device import problem, seconds, tell


def torch_limits(device: str, read: int, size: int) -> None:
    """A sum, a copy, a matrix times a vector, and the product of two squares."""
    import torch

    x = torch.ones(read // 4, dtype=torch.float32, device=device)
    y = torch.empty_like(x)
    tell(what="read", way="torch sum", rate=read / seconds(x.sum))
    tell(what="read", way="torch copy, both ways", rate=2 * read / seconds(lambda: y.copy_(x)))
    matrix = torch.randn(read // 2 // size, size, dtype=torch.bfloat16, device=device)
    vector = torch.randn(size, dtype=torch.bfloat16, device=device)
    tell(what="read", way="torch matrix times vector", rate=matrix.numel() * 2 / seconds(lambda: matrix @ vector))
    a, b = (torch.randn(size, size, dtype=torch.bfloat16, device=device) for _ in range(2))
    tell(what="matmul", way="torch", rate=2 * size**3 / seconds(lambda: a @ b.T))


def jax_limits(size: int) -> None:
    """The product of two squares."""
    import jax
    import jax.numpy as jnp

    a, b = (jax.random.normal(jax.random.key(key), (size, size), jnp.bfloat16) for key in range(2))
    multiply = jax.jit(lambda a, b: jnp.einsum("mk,nk->mn", a, b))
    tell(what="matmul", way="jax", rate=2 * size**3 / seconds(lambda: multiply(a, b)))


def main() -> None:
    asked: dict[str, Any] = task()
    for function, arguments in ((torch_limits, (asked["device"], asked["read"])), (jax_limits, ())):
        try:
            function(*arguments, asked["matmul"])
        except Exception as error:  # of one framework; the other is measured all the same
            tell(what=function.__name__, problem=problem(error))


if __name__ == "__main__":
    main()
