"""Data that ships with the package: a small trained Mistral."""

from pathlib import Path

TINY_CHECKPOINT = Path(__file__).parent / "tiny"
"""A real, small Mistral with its tokenizer; see its README.md."""
