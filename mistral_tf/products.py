"""Rows times a matrix: all that is known about what is fast on which processor.

A matrix is [out, in], as in every checkpoint.
"""

from __future__ import annotations

from typing import Any

import tensorflow as tf
from tensorflow import Tensor

_XLA_COLUMNS = 2048
"""The longest contraction that XLA on CPU does from bfloat16 weights as they are; for others it copies to float32."""


def product(x: Tensor, weight: Tensor, bias: Tensor | None = None, *, dtype: Any = None) -> Tensor:
    """x W^T + b over the last axis of x, accumulated in float32, in `dtype`: by default that of x."""
    dtype = tf.as_dtype(dtype or x.dtype)
    x_RI = tf.reshape(x, [-1, weight.shape[1]])
    y_RO = _rows(x_RI, tf.convert_to_tensor(weight), dtype if bias is None else tf.float32)
    y = tf.reshape(y_RO, tf.concat([tf.shape(x)[:-1], [weight.shape[0]]], 0))
    return y if bias is None else tf.cast(y + tf.cast(bias, tf.float32), dtype)


def _rows(x_RI: Tensor, weight_OI: Tensor, dtype: Any) -> Tensor:
    """x W^T in `dtype`, as is fastest for these dtypes and this number of rows, where tracing knows it."""
    on_cpu = all(device.device_type == "CPU" for device in tf.config.list_logical_devices())
    if on_cpu and x_RI.shape[0] == 1 and x_RI.dtype == weight_OI.dtype == tf.bfloat16:
        # twice the reading is faster than a float32 copy, which a float32 result needs otherwise
        readings = -(-weight_OI.shape[1] // _XLA_COLUMNS)
        if readings <= (2 if dtype == tf.float32 else 1) and weight_OI.shape[1] % readings == 0:
            return tf.cast(_xla_row(x_RI, weight_OI, readings), dtype)
    x_RI, weight_OI = tf.cast(x_RI, dtype), tf.cast(weight_OI, dtype)
    if on_cpu and x_RI.shape[0] != 1:  # in float32 MatMul takes up to 4 times as long as BatchMatMul
        return tf.matmul(x_RI[None], weight_OI[None], transpose_b=True)[0]
    return tf.matmul(x_RI, weight_OI, transpose_b=True)


@tf.function(jit_compile=True, autograph=False)
def _xla_row(x_1I: Tensor, weight_OI: Tensor, readings: int) -> Tensor:
    """x W^T [1, O] of bfloat16 in float32: each piece of x meets all of W, seen as rows of the piece's length."""
    out, columns = weight_OI.shape
    rows = tf.cast(tf.reshape(weight_OI, [out * readings, columns // readings]), tf.float32)
    pieces = tf.split(tf.cast(x_1I, tf.float32), readings, axis=1)
    return tf.add_n([tf.matmul(x, rows, transpose_b=True)[:, i::readings] for i, x in enumerate(pieces)])
