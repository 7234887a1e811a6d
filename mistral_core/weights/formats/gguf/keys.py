"""Numbers in the keys of a GGUF file: typed as they are read, exact as they are written.

Numbers are float32 there: what was meant is the shortest decimal that rounds to the same float32.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np

from ....errors import CorruptCheckpointError, UnsupportedFeatureError
from ...containers.gguf.file import GgufFile


class Keys(NamedTuple):
    """The keys of a file that begin with the name of its architecture; without one, all."""

    file: GgufFile
    architecture: str = ""

    def name(self, key: str) -> str:
        """The key as the file has it."""
        return f"{self.architecture}.{key}" if self.architecture else key

    def get(self, key: str) -> Any:
        """The value, None where there is none."""
        return self.file.values.get(self.name(key))

    def has(self, key: str) -> bool:
        """Whether the file says it."""
        return self.name(key) in self.file.values

    def told(self, key: str) -> str:
        """Where the key stands, for an error."""
        return f"{self.file.path}: {self.name(key)}"

    def integer(self, key: str) -> int:
        """An integer, or the one number of an array with one for each layer; raises CorruptCheckpointError."""
        value = self.get(key)
        if isinstance(value, np.ndarray) and value.dtype.kind in "iu" and len(value):
            if len(set(value.tolist())) > 1:
                raise UnsupportedFeatureError(
                    f"{self.told(key)} differs from layer to layer; a Mistral's are the same."
                )
            value = value[0]
        if not isinstance(value, np.integer):
            raise CorruptCheckpointError(f"{self.told(key)} must be an integer, got {str(value)[:40]!a}.")
        return int(value)

    def number(self, key: str) -> float:
        """The number that was meant by a float; raises CorruptCheckpointError."""
        value = self.get(key)
        if not isinstance(value, np.floating):
            raise CorruptCheckpointError(f"{self.told(key)} must be a number, got {str(value)[:40]!a}.")
        return decimal(value)


def decimal(value: np.floating) -> float:
    """The float64 that was meant by a float32."""
    return float(str(value))


def unsigned(name: str, value: Any) -> np.uint32:
    """A whole number as GGUF has it; raises UnsupportedFeatureError."""
    if isinstance(value, float) and value.is_integer():
        value = int(value)
    if not isinstance(value, int) or not 0 <= value < 2**32:
        raise UnsupportedFeatureError(f"gguf: {name} must be an integer of 0 to 2^32-1, got {value}; change it.")
    return np.uint32(value)


def exact(name: str, value: float) -> np.float32:
    """A number as GGUF has it; raises UnsupportedFeatureError where another would come back."""
    with np.errstate(over="ignore", under="ignore"):
        number = np.float32(value)
    if decimal(number) != value:
        raise UnsupportedFeatureError(
            f"gguf: {name} is {value!r}, which is {decimal(number)!r} as float32; round it, or convert to hf."
        )
    return number
