"""What the suite found: one line a piece of each subject with its worst case, as a table or as JSON."""

from __future__ import annotations

import json
import math
from collections.abc import Iterable

from .compare import Comparison


def worst(comparisons: Iterable[Comparison]) -> list[Comparison]:
    """The comparison with the least headroom for each subject and kind of piece, failures all."""
    least: dict[tuple[str, ...], Comparison] = {}
    failures = []
    for item in comparisons:
        key = (item.backend, item.implementation, item.dtype, item.piece.partition(" ")[0])
        if not item.passed:
            failures.append(item)
        elif key not in least or item.headroom < least[key].headroom:
            least[key] = item
    return [*failures, *(least[key] for key in sorted(least))]


def table(comparisons: Iterable[Comparison]) -> str:
    """Lines of subject, piece, worst case, difference, bound, headroom."""
    head = (
        "backend",
        "attention",
        "dtype",
        "piece",
        "worst case",
        "max |diff|",
        "ulp",
        "bound",
        "equal",
        "argmax",
        "",
    )
    rows = [
        (
            item.backend, item.implementation, item.dtype, item.piece, item.case, f"{item.max_abs:.2e}",
            f"{item.ulp:.2f}", f"{item.tolerance.ulp:.2f}", f"{item.equal:.1%}", f"{item.argmax:.1%}",
            "ok" if item.passed else f"FAILED: {item.problem}",
        )
        for item in comparisons
    ]  # fmt: skip
    widths = [max(len(row[i]) for row in (head, *rows)) for i in range(len(head))]
    return "\n".join(
        "  ".join(cell.ljust(w) for cell, w in zip(row, widths, strict=True)).rstrip() for row in (head, *rows)
    )


def as_json(comparisons: Iterable[Comparison]) -> str:
    """Every comparison with all its fields."""
    rows = [{**item._asdict(), "passed": item.passed} for item in comparisons]
    # JSON has no infinity: what could not be measured is null
    finite = [{k: None if v == math.inf else v for k, v in row.items()} for row in rows]
    return json.dumps(finite, indent=1, allow_nan=False)
