"""Which tensors of a checkpoint make a model of a class, with all that is wrong said at once."""

from __future__ import annotations

import difflib
from collections.abc import Callable, Mapping

import numpy as np

from ..config import MistralConfig
from ..disk import limits
from ..errors import (
    DtypeMismatchError,
    MissingTensorsError,
    ShapeMismatchError,
    TensorMismatchError,
    UnexpectedTensorsError,
)
from ..parameters import BASE_PREFIX, BODY, HEADS, LM_HEAD, parameters, shape_of
from ..telling import warn
from .containers.tensor_file import DTYPES, quoted
from .contents import StoredTensor

EMBEDDING = BODY[0].name

_HEAD_NAMES = {architecture: {row.name for row in rows} for architecture, rows in HEADS.items()}
_ALL_HEADS = frozenset().union(*_HEAD_NAMES.values())
_RAW_EMBEDDING = BODY[0].raw


def match(
    tensors: Mapping[str, StoredTensor],
    config: MistralConfig,
    architecture: str,
    *,
    read: Callable[[str], np.ndarray],
    where: str,
) -> dict[str, str | None]:
    """Canonical name -> name in the file, or None for a head to be initialised, in table order.

    Raises MissingTensorsError, UnexpectedTensorsError, ShapeMismatchError, DtypeMismatchError, or for several
    kinds at once TensorMismatchError; warns of an initialised head and of a dropped `lm_head`.
    """
    rows = dict(parameters(config, architecture))
    sources = canonical_names(tensors)
    own = own_class(config, sources)
    fresh = _fresh_head(rows, sources, own, architecture)
    dropped = _dropped_head(rows, sources)
    expected = {name: shape_of(row, config) for name, row in rows.items()}
    infos = {name: tensors[source] for name, source in sources.items() if name not in dropped}
    _check(infos, {name: shape for name, shape in expected.items() if name not in fresh}, own, where)
    if dropped and architecture == "MistralForCausalLM":
        _check_tied(read, sources, where)
    elif dropped:
        warn(f"{where}: {LM_HEAD} is not used by {architecture} and dropped.")
    if fresh:
        names = ", ".join(sorted(fresh))
        message = f"{where}: holds a {own}; {names} of {architecture} are initialised: train them before use."
        warn(message)
    return {name: None if name in fresh else sources[name] for name in rows}


def canonical_names(tensors: Mapping[str, StoredTensor]) -> dict[str, str]:
    """Canonical name -> name in the file: a bare model gets its prefix, rotary buffers are left out."""
    kept = [name for name in tensors if not name.endswith(".rotary_emb.inv_freq")]
    if any(name.startswith(BASE_PREFIX) for name in kept):
        return {name: name for name in kept}
    return {name if name in _ALL_HEADS else BASE_PREFIX + name: name for name in kept}


def own_class(config: MistralConfig, names: Mapping[str, str]) -> str:
    """The class a checkpoint was saved as: what its config says, else what its head looks like."""
    if config.architectures and config.architectures[0] in HEADS:
        return config.architectures[0]
    present = _ALL_HEADS & set(names)
    has_prefix = any(source.startswith(BASE_PREFIX) for source in names.values())  # which a bare model's names have not
    if not present and has_prefix and config.tie_word_embeddings:
        return "MistralForCausalLM"
    fitting = [architecture for architecture, head in _HEAD_NAMES.items() if head and head <= present]
    return max(fitting, key=lambda architecture: len(_HEAD_NAMES[architecture]), default="MistralModel")


def _fresh_head(rows: Mapping[str, object], names: Mapping[str, str], own: str, architecture: str) -> set[str]:
    """The head to initialise: only as a whole, and only where the file was saved as another class."""
    head = _HEAD_NAMES[architecture] & set(rows)
    return set() if own == architecture or head & set(names) else head


def _dropped_head(rows: Mapping[str, object], names: Mapping[str, str]) -> set[str]:
    return {LM_HEAD} & set(names) - set(rows)


def _check(infos: Mapping[str, StoredTensor], expected: Mapping[str, tuple[int, ...]], own: str, where: str) -> None:
    """Compare names, shapes and dtypes, and raise all differences as one error."""
    missing = sorted(set(expected) - set(infos))
    unexpected = sorted(set(infos) - set(expected))
    common = sorted(set(expected) & set(infos))
    wanted = {name: infos[name].wanted or expected[name] for name in common}
    misshapen = [
        f"{name} is {list(infos[name].shape)}, the config says {list(wanted[name])}"
        for name in common
        if infos[name].shape != wanted[name]
    ]
    untyped = [f"{name} is {infos[name].dtype}" for name in common if infos[name].dtype not in DTYPES]
    kinds: list[tuple[type[TensorMismatchError], str, list[str]]] = [
        (MissingTensorsError, "missing", missing),
        (UnexpectedTensorsError, "unexpected", [quoted(infos[name].name) for name in unexpected]),
        (ShapeMismatchError, "of another shape", misshapen),
        (DtypeMismatchError, f"of a dtype that is not {', '.join(DTYPES)}", untyped),
    ]
    wrong = [(error, kind, lines) for error, kind, lines in kinds if lines]
    if not wrong:
        return
    lists = "; ".join(f"{len(lines)} {kind}: {_listed(lines)}" for _, kind, lines in wrong)
    error = wrong[0][0] if len(wrong) == 1 else TensorMismatchError
    raise error(f"{where}: {lists}. {_hint(missing, unexpected, infos, own)}")


def _listed(lines: list[str]) -> str:
    """Lines in one, but no more than a reader reads."""
    more = len(lines) - limits.LISTED
    return ", ".join(lines[: limits.LISTED]) + (f" and {more} more" if more > 0 else "")


def _hint(missing: list[str], unexpected: list[str], infos: Mapping[str, StoredTensor], own: str) -> str:
    """One thing to do, from the names that nearly match."""
    names = [infos[name].name for name in unexpected]
    if unexpected and set(unexpected) <= _ALL_HEADS:
        return f"The file holds a {own}: load it with that class."
    if _RAW_EMBEDDING in names:
        return "These are the names of a raw Mistral checkpoint: open it as the format 'raw'."
    for name in missing:
        longer = next((other for other in names if other.endswith("." + name)), None)
        if longer:
            return f"The names carry the prefix {quoted(longer.removesuffix(name))}: remove it."
        shorter = next((other for other in names if name.endswith("." + other)), None)
        if shorter:
            return f"The names lack the prefix {quoted(name.removesuffix(shorter))}: add it."
    close = difflib.get_close_matches(missing[0], names[:1000], 1) if missing else []
    if close:
        return f"Is {quoted(close[0])} meant to be {missing[0]}?"
    return "Check that config.json and the weights belong together."


def _check_tied(read: Callable[[str], np.ndarray], sources: Mapping[str, str], where: str) -> None:
    """A head stored beside a tied embedding must be that embedding, bit for bit."""
    head, embedding = read(sources[LM_HEAD]), read(sources[EMBEDDING])
    same = head.dtype == embedding.dtype and head.shape == embedding.shape
    if not (same and np.array_equal(head.reshape(-1).view(np.uint8), embedding.reshape(-1).view(np.uint8))):
        raise TensorMismatchError(
            f"{where}: tie_word_embeddings is true, but {LM_HEAD} is not the embedding; should it be false?"
        )
