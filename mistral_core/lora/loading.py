"""A model by the directory of an adapter: its base, and the adapter put into it."""

from __future__ import annotations

import functools
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeVar, cast

from ..errors import CheckpointNotFoundError, ConfigError
from .adapter import is_adapter, read_config

F = TypeVar("F", bound=Callable[..., Any])


def with_adapters(function: F) -> F:
    """A `from_pretrained` that also takes the directory of an adapter: it loads the base, then the adapter.

    The base is the argument `base`, a path or hub id, else the directory that the adapter's config names; a hub id that
    a file names is not fetched. Raises ConfigError for a base of what is no adapter, CheckpointNotFoundError.
    """

    @functools.wraps(function)
    def called(cls: Any, path: Any, **options: Any) -> Any:
        base = options.pop("base", None)
        if not isinstance(path, str | os.PathLike) or not is_adapter(path):
            if base is not None:
                raise ConfigError(f"base: {path} is no directory of an adapter; leave it out.")
            return function(cls, path, **options)
        model = function(cls, base_of(path) if base is None else base, **options)
        return model._with_adapter(path)

    return cast(F, called)


def base_of(path: str | os.PathLike[str]) -> Path:
    """The directory of an adapter's base, as its config names it; raises CheckpointNotFoundError."""
    named = read_config(Path(path)).base_model_name_or_path
    if named and Path(named).is_dir():
        return Path(named)
    told = f"{named} is no directory here" if named else "is not named"
    raise CheckpointNotFoundError(
        f"{path}: an adapter, whose base {told}; say where it is with base=, a path or a hub id."
    )
