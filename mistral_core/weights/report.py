"""What a conversion tells of itself."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from . import towers


@dataclass
class Report:
    """What a conversion did, or with `dry_run` would do."""

    source: str
    source_format: str
    destination: str
    format: str
    architecture: str
    tensors: int
    bytes: int
    """Of the numbers, before a format quantises them, and of towers that are kept."""
    dtypes: dict[str, int]
    """Dtype code -> how many tensors have it."""
    moves: dict[str, int]
    """What is done to tensors on their way -> how many it is done to."""
    texts: list[str]
    """The tokenizer and generation files that travel along."""
    kept: dict[str, int] = field(default_factory=dict)
    """Other tower -> how many of its tensors travel along, as they are."""
    left_out: dict[str, int] = field(default_factory=dict)
    """Other tower -> how many of its tensors do not."""
    packed: dict[str, int] = field(default_factory=dict)
    """How matrices of few bits are packed -> how many are."""
    losses: dict[str, str] = field(default_factory=dict)
    """Tensor, or `source`, -> what it lost."""
    seconds: float = 0.0
    logits: dict[str, Any] | None = None
    """The fingerprint of `verify="logits"`."""

    def __str__(self) -> str:
        moves = "; ".join(f"{count} {move}" for move, count in self.moves.items()) or "nothing moves"
        lines = [
            f"{self.source} ({self.source_format}) -> {self.destination} ({self.format})",
            f"{self.architecture}: {self.tensors} tensors, {self.bytes:,} bytes, " + told(self.dtypes),
            f"moves: {moves}",
            f"files that travel along: {', '.join(self.texts) or 'none'}",
            *([f"packed: {told(self.packed)}"] if self.packed else []),
            *([f"kept as they are: {towers.told(self.kept)}"] if self.kept else []),
            *([f"left out: {towers.told(self.left_out)}"] if self.left_out else []),
            *(f"lost in {name}: {loss}" for name, loss in self.losses.items()),
        ]
        return "\n".join(lines)


def told(counts: dict[str, int]) -> str:
    """Names with their counts in words: 35 int4 by 128, 1 int8 by row."""
    return ", ".join(f"{count} {name}" for name, count in counts.items())
