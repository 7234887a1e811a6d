"""The formats of weights: one row each, found by name and content, never by guessing."""

from .detection import FORMATS, GROUP, PICKLES, Row, detect, module_of, open_checkpoint, several

__all__ = ["FORMATS", "GROUP", "PICKLES", "Row", "detect", "module_of", "open_checkpoint", "several"]
