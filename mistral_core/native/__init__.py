"""Kernels in C for CPUs: compiled on first use by the user's compiler, absent without one.

`build` compiles a source and keeps what it made, `library` calls `rows.c`, few rows times a matrix, with NumPy's arrays
or with addresses; `xla.c` and `tf.c` hand the same functions to JAX and TensorFlow, whose side is `native.py` of each
backend. `whole_step` computes a step of decoding, or a prompt by a processor's tiles, in one call, `between` what is
between the products of a prompt.
"""
