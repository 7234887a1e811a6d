"""The formats of weights: one row each, found by name and content, never by guessing."""

from .detection import detect, open_checkpoint, several
from .registry import FORMATS, GROUP, PICKLES, Row, format_named

__all__ = ["FORMATS", "GROUP", "PICKLES", "Row", "detect", "format_named", "open_checkpoint", "several"]
