"""What a backend is to the core and the command line, and where it is found: the entry points `mistral.backends`.

A fourth backend is a package that registers an object of this protocol there and passes conformance.
"""

from __future__ import annotations

import importlib.metadata
import importlib.util
from collections.abc import Iterator
from contextlib import AbstractContextManager
from typing import Any, Protocol

from .errors import MissingExtraError

GROUP = "mistral.backends"


class Backend(Protocol):
    """One implementation of Mistral in one framework."""

    name: str
    framework: str
    """The package whose version is reported."""
    attention_implementations: tuple[str, ...]
    fixed_shapes: bool
    """Whether each shape of a call costs a compilation: then rows are padded to few."""

    def model_class(self, architecture: str) -> Any:
        """The class of this name: MistralModel, MistralForCausalLM, ..."""

    def to_numpy(self, array: Any) -> Any:
        """A framework's array as NumPy, bits kept."""

    def from_numpy(self, array: Any) -> Any:
        """A NumPy array as the framework's own."""

    def token_order(self, attention_mask_BT: Any, past_length_B: Any) -> Any:
        """[B, T]: the number of real tokens before each token of its row, -1 for padding."""

    def attention_mask(
        self, query_order_BT: Any, key_order_BS: Any, window: int | None, *, document_ids_BT: Any = None
    ) -> Any:
        """[B, T, S] bool: which keys each query sees; the function that attention itself calls."""

    def inference(self, model: Any) -> AbstractContextManager[None]:
        """What a call that nothing is learned from runs in: no gradients, no dropout."""

    def forward(self, model: Any, **arrays: Any) -> Any:
        """What such a call with NumPy arrays that are right returns, compiled where the framework would for each op."""


def names() -> list[str]:
    """The registered backends, installed framework or not."""
    return sorted({point.name for point in importlib.metadata.entry_points(group=GROUP)})


def get(name: str) -> Backend:
    """Import a backend; raises MissingExtraError naming the extra when its framework is not installed."""
    points = {point.name: point for point in importlib.metadata.entry_points(group=GROUP)}
    if name not in points:
        raise MissingExtraError(f"backend {name!r} is not registered; known are {sorted(points)}.")
    try:
        backend: Backend = points[name].load()
    except ImportError as cause:
        if cause.name is not None and cause.name.partition(".")[0].startswith("mistral"):
            raise
        raise MissingExtraError(
            f"backend {name!r} needs {cause.name or cause}; pip install 'mistral-frameworks[{name}]'."
        ) from cause
    return backend


def version(backend: Backend) -> str:
    """Framework and version, as reports print it."""
    return f"{backend.framework} {importlib.metadata.version(backend.framework)}"


def installed() -> Iterator[str]:
    """Yield the registered backends that can be imported, one import at a time."""
    for name in names():
        try:
            get(name)
        except MissingExtraError:
            continue
        yield name
