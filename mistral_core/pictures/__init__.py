"""Seeing what the model sees: attention masks and attention weights as pictures for terminal, browser and PNG."""

from __future__ import annotations

from .visualizer import AttentionMaskVisualizer as AttentionMaskVisualizer
from .visualizer import AttentionVisualizer as AttentionVisualizer
