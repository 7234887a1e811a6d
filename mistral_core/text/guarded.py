"""Calls of the library `tokenizers`, whose panics and bare Exceptions become TokenizerErrors here and nowhere else.

A panic of Rust is a BaseException of Python, so that `except Exception` does not see it. What a user or the system
raises, such as KeyboardInterrupt or MemoryError, passes.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING

from ..errors import MistralError, TokenizerError

if TYPE_CHECKING:
    from tokenizers import Tokenizer

LONGEST_MESSAGE = 300
PANIC = "PanicException"
"""The class that pyo3 raises; it cannot be imported."""


@contextmanager
def typed(where: str, problem: str) -> Iterator[None]:
    """Raise TokenizerError, `where: problem (what the library says); fetch it again.`, for what the library raises."""
    try:
        yield
    except MemoryError:
        raise
    except BaseException as cause:
        if isinstance(cause, MistralError) or not (isinstance(cause, Exception) or type(cause).__name__ == PANIC):
            raise
        said = ascii(str(cause))[1:-1][:LONGEST_MESSAGE]
        raise TokenizerError(f"{where}: {problem} ({said}); fetch it again.") from cause


def load(text: str, where: str) -> Tokenizer:
    """The tokenizer that the text of a tokenizer.json describes; raises TokenizerError where it is none."""
    from tokenizers import Tokenizer

    with typed(where, "not a tokenizer.json"):
        return Tokenizer.from_str(text)
