"""What is one program: outside of `jax.jit`, JAX compiles each operation by itself, and anew for each shape."""

from __future__ import annotations

import functools

import jax

in_one_program = functools.partial(jax.jit, inline=True)
"""A function of arrays is one program where it is called outside of `jax.jit`, and its own operations within."""
