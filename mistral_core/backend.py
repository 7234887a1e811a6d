"""What a backend is to the core and the command line, and where it is found: the entry points `mistral.backends`.

A fourth backend is a package that registers an object of this protocol there and passes conformance.
"""

from __future__ import annotations

import importlib.metadata
import importlib.util
import logging
import os
from collections.abc import Iterable, Iterator, Mapping
from contextlib import AbstractContextManager
from typing import TYPE_CHECKING, Any, Protocol

from . import extras
from .errors import InputError, MissingExtraError
from .telling import nearest, shown

if TYPE_CHECKING:
    from .lora.config import LoraConfig
    from .training import Learner, TrainingSettings

GROUP = "mistral.backends"
ORDER = ("torch", "flax", "tf")
"""In which one is looked for where nothing says which is meant; others after them, by name."""
ALIASES = {"pt": "torch", "pytorch": "torch", "jax": "flax", "tensorflow": "tf", "keras": "tf"}
"""What a backend is called elsewhere -> here."""
OWNERS: Mapping[str, str] = {
    "torch": "torch", "mistral_torch": "torch", "jax": "flax", "jaxlib": "flax", "flax": "flax", "mistral_flax": "flax",
    "tensorflow": "tf", "keras": "tf", "mistral_tf": "tf",
}  # fmt: skip
"""The package that a dtype, a device, an array or a model comes from -> the backend that it means."""
POLITE = {
    "XLA_PYTHON_CLIENT_PREALLOCATE": "false",
    "TF_FORCE_GPU_ALLOW_GROWTH": "true",
    "TF_CPP_MIN_LOG_LEVEL": "2",
}
"""Environment variables by which one GPU serves three frameworks and TensorFlow starts without its log."""
_LOGGER = logging.getLogger("mistral")


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

    def learner(self, model: Any, settings: TrainingSettings, *, objective: str = "labels") -> Learner:
        """The model as one that learns, by labels or by preferences."""

    def add_adapter(self, model: Any, config: LoraConfig, *, seed: int = 0) -> Any:
        """The model with a fresh adapter, which alone learns."""


def be_polite() -> None:
    """Set the variables of `POLITE` that the user has not set; of effect before a framework is imported."""
    for variable, value in POLITE.items():
        os.environ.setdefault(variable, value)


def names() -> list[str]:
    """The registered backends, installed framework or not, in the order in which they are looked for."""
    found = {point.name for point in importlib.metadata.entry_points(group=GROUP)}
    return [*(name for name in ORDER if name in found), *sorted(found - set(ORDER))]


def get(name: str) -> Backend:
    """Import a backend by its name or an alias; raises MissingExtraError with the extra that brings its framework."""
    points = {point.name: point for point in importlib.metadata.entry_points(group=GROUP)}
    name = ALIASES.get(name, name)
    if name not in points:
        raise MissingExtraError(f"backend {shown(name)} is not registered; known are {names()}{nearest(name, points)}.")
    try:
        backend: Backend = points[name].load()
    except ImportError as cause:
        if cause.name is not None and cause.name.partition(".")[0].startswith("mistral"):
            raise
        if isinstance(cause, MissingExtraError):
            raise
        raise extras.missing(f"backend {name!r}", cause.name or str(cause), name) from cause
    return backend


def lacking(extra: str, *packages: str) -> MissingExtraError | None:
    """The error of a backend whose packages are not all installed, before an import of them says something else."""
    missing = [name for name in packages if importlib.util.find_spec(name) is None]
    if not missing:
        return None
    return extras.missing(f"mistral_{extra}", " and ".join(missing), extra)


def chosen(backend: Any = None, *, framework: Any = None, model: Any = None, given: Iterable[Any] = ()) -> str:
    """The name of the backend that is meant.

    It is the one named by `backend` or `framework`, or whose `model`, dtype, device or array is `given`, or else the
    first that is installed, which is said once. Raises InputError where two are meant, MissingExtraError.
    """
    named = {_named(each) for each in (backend, framework) if each is not None}
    if len(named) > 1:
        raise InputError(f"backend={shown(backend)} and framework={shown(framework)} are two; give one.")
    if named:
        return named.pop()
    owners = {name for each in (model, *given) if (name := owner(each)) is not None}
    if len(owners) > 1:
        raise InputError(f"what is given belongs to {' and '.join(sorted(owners))}; give what is of one, or backend=.")
    if owners:
        return owners.pop()
    name = next(installed(), None)
    if name is None:
        raise none_installed()
    _say_once(f"backend: {name}, the first that is installed of {', '.join(names())}; `backend` chooses another")
    return name


def none_installed() -> MissingExtraError:
    """The error where there is no backend to choose."""
    return MissingExtraError("no framework is installed; pip install 'mistral-frameworks[torch]' (or flax, or tf).")


def owner(value: Any) -> str | None:
    """The backend whose framework a model, dtype, device or array comes from; None for what any of them takes."""
    if isinstance(value, Mapping):  # a device_map
        return next(filter(None, map(owner, value.values())), None)
    own = {_package(point.module): point.name for point in importlib.metadata.entry_points(group=GROUP)}
    packages = {**own, **OWNERS}
    kinds = (value, type(value)) if isinstance(value, type) else (type(value),)
    bases = (_package(base.__module__) for kind in kinds for base in kind.__mro__)
    return next((packages[base] for base in bases if base in packages), None)


def _package(module: str) -> str:
    return module.partition(".")[0]


def _named(name: Any) -> str:
    if not isinstance(name, str):
        raise InputError(f"backend must be one of {', '.join(names())}, got {shown(name)}.")
    return ALIASES.get(name, name)


_SAID: set[str] = set()


def _say_once(text: str) -> None:
    if text not in _SAID:
        _SAID.add(text)
        _LOGGER.warning(text)


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
