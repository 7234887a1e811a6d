"""What comes out of arrays and tables as plain Python: the numbers of NumPy, PyTorch, JAX and TensorFlow, paths."""

from __future__ import annotations

import math
import operator
import os
from collections.abc import Mapping
from typing import Any

import numpy as np


def plain(value: Any) -> Any:
    """A number, text, path or array, or a list or mapping of them, as Python's own; anything else as it is.

    Subclasses become their base (`numpy.str_` is a str), arrays numbers or lists, ranges tuples, paths texts. Under
    tracing an array has no value and stays one.
    """
    if value is None or type(value) in (bool, int, float, str):
        return value
    for kind in (int, float, str):
        if isinstance(value, kind):
            return getattr(kind, f"__{kind.__name__}__")(value) if kind is not str else str.__str__(value)
    if isinstance(value, Mapping):
        return {plain(key): plain(each) for key, each in value.items()}
    if isinstance(value, list):
        return [plain(each) for each in value]
    if type(value) in (tuple, range):
        return tuple(map(plain, value))
    if isinstance(value, os.PathLike):
        return os.fspath(value)
    return _of_array(value) if hasattr(value, "dtype") and hasattr(value, "shape") else value


def _of_array(value: Any) -> Any:
    """The numbers of an array of any framework; itself where it cannot be looked at."""
    if isinstance(value, np.generic) and value.dtype.kind == "V":  # bfloat16 and its kind
        return float(value)
    try:
        if hasattr(value, "tolist"):
            return value.tolist()
        return value.numpy().tolist()  # TensorFlow
    except Exception:  # what each framework raises where there is no value yet
        return value


def plain_int(value: Any) -> Any:
    """An integer of any kind as Python's, through `__index__`; anything else, bools too, as it is."""
    value = plain(value)
    try:
        return value if isinstance(value, bool) else operator.index(value)
    except TypeError:
        return value


def dtype_name(dtype: Any) -> Any:
    """The name of a dtype of any framework, as configs have it: "bfloat16" for torch.bfloat16; a text is one already.

    None, "auto" and what is no dtype stay as they are.
    """
    if dtype is None or isinstance(dtype, str):
        return dtype if dtype is None else str.__str__(dtype).removeprefix("torch.")
    for name in (getattr(dtype, "name", None), getattr(getattr(dtype, "dtype", None), "name", None)):
        if isinstance(name, str):
            return name
    if isinstance(dtype, type):
        return dtype.__name__ if dtype is not float else "float64"
    text = str(dtype)
    return text.removeprefix("torch.") if text.startswith("torch.") else dtype


def is_int(value: Any) -> bool:
    """An int that is not a bool."""
    return isinstance(value, int) and not isinstance(value, bool)


def is_number(value: Any) -> bool:
    """An int or float that float64 holds and that is not a bool, infinity or NaN."""
    if not is_int(value):
        return isinstance(value, float) and math.isfinite(value)
    return bool(abs(value) < 1 << 1023)
