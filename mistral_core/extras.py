"""Packages that not everybody needs: imported by what is asked for, or named with the extra that brings them."""

from __future__ import annotations

import importlib
from typing import Any

from .errors import MissingExtraError


def require(module: str, extra: str, *, what: str, package: str | None = None) -> Any:
    """A module of an optional package, as `what` needs it; raises MissingExtraError.

    `package` is what the message calls it, where its name is not the module's.
    """
    try:
        importlib.import_module(module.partition(".")[0])  # a part of a package that is gone may still be known
        return importlib.import_module(module)
    except ImportError as cause:
        raise missing(what, package or cause.name or module, extra) from cause


def missing(what: str, package: str, extra: str) -> MissingExtraError:
    """The error for `what`, which needs a package that an extra brings."""
    return MissingExtraError(f"{what} needs {package}; pip install 'mistral-frameworks[{extra}]'.")
