"""Encoding: what a tokenizer returns, the keyword arguments of a model call."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np

from ..errors import TokenizerError

FRAMEWORKS = {"pt": "torch", "jax": "flax", "tf": "tf"}
"""`return_tensors` as transformers spells it -> the backend whose arrays it means."""


class Encoding(dict[str, Any]):
    """`input_ids` and `attention_mask` by key and by attribute; `model(**encoding)` takes them."""

    def __getattr__(self, name: str) -> Any:
        try:
            return self[name]
        except KeyError:
            raise AttributeError(f"Encoding has {', '.join(self)}, not {name!r}.") from None

    def to(self, device: Any) -> Encoding:
        """The same on a device; arrays of frameworks that place them by themselves stay where they are."""
        return Encoding({key: value.to(device) if hasattr(value, "to") else value for key, value in self.items()})


def as_arrays(rows: Mapping[str, list[list[int]]], return_tensors: str) -> Encoding:
    """Rows of equal lengths as arrays [B, T] of a framework: "np", "pt", "jax" or "tf".

    Raises TokenizerError for rows of several lengths or another name, MissingExtraError without the framework.
    """
    lengths = sorted({len(row) for row in next(iter(rows.values()))})
    if len(lengths) > 1:
        raise TokenizerError(f"texts of {lengths[0]} to {lengths[-1]} tokens make no array; pass padding=True.")
    arrays = {key: np.array(value, np.int64).reshape(len(value), *lengths or [0]) for key, value in rows.items()}
    if return_tensors == "np":
        return Encoding(arrays)
    if return_tensors not in FRAMEWORKS:
        names = ", ".join(("np", *FRAMEWORKS))
        raise TokenizerError(f"return_tensors: {return_tensors!r}; None or one of {names} was expected.")
    from ..backend import get

    backend = get(FRAMEWORKS[return_tensors])
    kind = np.int64 if return_tensors == "pt" else np.int32  # ids of JAX and TensorFlow are int32
    return Encoding({key: backend.from_numpy(value.astype(kind)) for key, value in arrays.items()})
