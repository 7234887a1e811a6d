"""The formats of weights: one row each, found by name and content, never by guessing."""

from .detection import FoundFormat, detect, only_format
from .registry import FORMATS, GROUP, PICKLES, Row, format_named

__all__ = ["FORMATS", "GROUP", "PICKLES", "FoundFormat", "Row", "detect", "format_named", "only_format"]
