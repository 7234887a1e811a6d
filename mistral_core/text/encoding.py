"""Encoding: what a tokenizer returns, the keyword arguments of a model call."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np

from .. import backend as backends
from ..errors import TokenizerError

FRAMEWORKS = {"pt": "torch", "jax": "flax", "tf": "tf"}
"""`return_tensors` as transformers spells it -> the backend whose arrays it means."""


OVERFLOWING = "overflowing_tokens"
"""An output whose rows have lengths of their own."""


class Encoding(dict[str, Any]):
    """`input_ids` and `attention_mask` by key and by attribute; `model(**encoding)` takes them."""

    def __getattr__(self, name: str) -> Any:
        try:
            return self[name]
        except KeyError:
            raise AttributeError(f"Encoding has {', '.join(self)}, not {name!r}.") from None

    @property
    def data(self) -> dict[str, Any]:
        """The same as a dict and no more, as callers of transformers ask for it."""
        return dict(self)

    def to(self, device: Any, **options: Any) -> Encoding:
        """The same on a device; arrays of frameworks that place them by themselves stay where they are.

        `options` are those of torch's `to`, such as `non_blocking`.
        """
        moved = {key: value.to(device, **options) if hasattr(value, "to") else value for key, value in self.items()}
        return Encoding(moved)


def as_arrays(columns: Mapping[str, list[Any]], return_tensors: str) -> Encoding:
    """Rows of equal lengths as arrays [B, T] of a framework: "np", "pt", "jax" or "tf"; overflowing tokens stay lists.

    Raises TokenizerError for rows of several lengths or another name, MissingExtraError without the framework.
    """
    return_tensors = getattr(return_tensors, "value", return_tensors)  # an enum of transformers
    if return_tensors != "np" and return_tensors not in FRAMEWORKS:
        names = ", ".join(("np", *FRAMEWORKS))
        raise TokenizerError(f"return_tensors must be None or one of {names}, got {return_tensors!r}.")
    lengths = sorted({len(row) for row in columns["input_ids"]})
    if len(lengths) > 1:
        raise TokenizerError(f"texts of {lengths[0]} to {lengths[-1]} tokens make no array; pass padding=True.")
    empty = (len(columns["input_ids"]), *(lengths or [0]))
    arrays = {
        name: np.array(rows, np.int64) if np.size(rows) else np.zeros(empty, np.int64)
        for name, rows in columns.items()
        if name != OVERFLOWING
    }
    lists = {name: rows for name, rows in columns.items() if name == OVERFLOWING}
    if return_tensors == "np":
        return Encoding({**arrays, **lists})
    backend = backends.get(FRAMEWORKS[return_tensors])
    kind = np.int64 if return_tensors == "pt" else np.int32  # ids of JAX and TensorFlow are int32
    return Encoding({**{name: backend.from_numpy(each.astype(kind)) for name, each in arrays.items()}, **lists})
