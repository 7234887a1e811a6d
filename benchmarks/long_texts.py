"""The price of long texts: time a token and peak memory from one window of text to many, in every framework.

    python -m benchmarks.long_texts [--backend torch,flax,tf] [--what score,prefill,train,attend]
        [--layout plain,padded,packed] [--windows 1,2,4,8,16,32]
        [--window 1024] [--dtype float32] [--rounds 1] [--full] [--write]

Scoring is a loss without gradients, prefill `generate` of one token, training a loss and all gradients with gradient
checkpointing, attend the attention of one layer alone, of plain texts. Padded is two rows, each half of the tokens,
of which the first begins late; packed are documents of five eighths of a window. Each point is a process of its own:
calls after the first are timed, its peak is what it takes beyond the model. Flat is a token's time of at most 1.15
times that at 4 windows of a row, which the first of them make cheaper: they see less.
`--full` takes the same texts without a window too, whose tokens cost more the longer they are.
"""

from __future__ import annotations

import argparse
import itertools
import shlex
import statistics
import sys
import tempfile
from typing import Any

from mistral_core import MistralConfig

from .common import keep, listed, machine, report, shown, table_row, versions
from .compare import attempt
from .decode import task

CONFIG = MistralConfig(
    hidden_size=512, num_hidden_layers=8, num_attention_heads=8, num_key_value_heads=4, head_dim=64,
    intermediate_size=1408, vocab_size=5120, max_position_embeddings=1 << 20,
)  # fmt: skip
"""A vocabulary that is no number of tokens: where it is, XLA for CPUs lays the logits out the wrong way round."""
BASE = 4
"""Windows of a row from which on a token must cost the same."""
ROWS = {"plain": 1, "padded": 2, "packed": 1}
"""Of how many rows a text is."""
FLAT = 1.15


def main() -> int:
    """Measure, print, and with --write keep."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--backend", type=listed, default=["torch", "flax", "tf"])
    parser.add_argument("--what", type=listed, default=["score", "prefill", "train"])
    parser.add_argument("--layout", type=listed, default=["plain", "padded", "packed"])
    parser.add_argument("--windows", type=listed, default=["1", "2", "4", "8", "16", "32"])
    parser.add_argument("--window", type=int, default=1024)
    parser.add_argument("--dtype", default="float32")
    parser.add_argument("--rounds", type=int, default=1)
    parser.add_argument("--full", action="store_true", help="without a window too")
    parser.add_argument("--write", action="store_true", help="keep the table in benchmarks/results")
    arguments = parser.parse_args()
    windows = [int(text) for text in arguments.windows]
    kinds = [
        (*kind, full)
        for kind in itertools.product(arguments.backend, arguments.what, arguments.layout)
        for full in ((False, True) if arguments.full else (False,))
        if kind[1:] not in (("prefill", "packed"), ("attend", "padded"), ("attend", "packed"))  # a prompt is one text
    ]
    found: dict[Any, list[Any]] = {}
    with tempfile.TemporaryDirectory() as scratch:
        for _, kind, count in itertools.product(range(arguments.rounds), kinds, windows):
            report(f"{', '.join(map(str, kind))}, {count} windows")
            found.setdefault((*kind, count), []).append(measured(arguments, kind, count, scratch))
    page, flat = table(arguments, kinds, windows, found)
    print(page)
    if arguments.write:
        keep("long_texts.md", page)
    return 0 if flat else 1


def measured(arguments: argparse.Namespace, kind: tuple[Any, ...], count: int, scratch: str) -> dict[str, Any] | None:
    """What a point gave; None where it failed."""
    backend, what, layout, full = kind
    config = CONFIG.replace(sliding_window=None if full else arguments.window)
    asked = task(
        config, dtype=arguments.dtype, tokens=count * arguments.window, window=arguments.window,
        options={"backend": backend, "what": what, "layout": layout, "rows": ROWS[layout]},
    )  # fmt: skip
    return attempt("long_texts", asked, sys.executable, scratch)


def table(
    arguments: argparse.Namespace, kinds: list[Any], windows: list[int], found: dict[Any, list[Any]]
) -> tuple[str, bool]:
    """The page, and whether every windowed text is flat."""
    head = [
        "",
        "",
        *(f"{count * arguments.window} tokens" for count in windows),
        "most / first from 4 windows of a row on",
    ]
    lines = [table_row(head), table_row(["---"] * len(head))]
    flat = True
    for kind in kinds:
        backend, what, layout, full = kind
        name = f"{backend}, {what}, {layout}" + (", no window" if full else "")
        for key, unit in (("seconds", "us a token"), ("peak", "bytes a token")):
            values = []
            for count in windows:
                results = [each for each in found[*kind, count] if each]
                tokens = count * arguments.window
                each = statistics.median(r[key] for r in results) / tokens if results else None
                values.append(each if each is None or key == "peak" else 1e6 * each)
            later = [v for v, count in zip(values, windows, strict=True) if count >= BASE * ROWS[layout] and v]
            ratio = max(later) / later[0] if later else None
            if key == "seconds" and not full:
                flat &= ratio is not None and ratio <= FLAT and None not in values
            cells = ["failed" if v is None else shown(float(v)) for v in values]
            lines.append(table_row([name, unit, *cells, "" if ratio is None else f"{ratio:.2f}"]))
    results = [each for several in found.values() for each in several if each]
    page = f"""# Long texts

Windows of {arguments.window}, hidden size {CONFIG.hidden_size}, {CONFIG.num_hidden_layers} layers, {arguments.dtype},
medians of {arguments.rounds} rounds, each point in a process of its own; the peak is what it takes beyond the model.
{machine()}; {versions(results)}.
Flat is at most {FLAT} from {BASE} windows of a row on; padded texts are two rows.
Repeat: `python -m benchmarks.long_texts {shlex.join(sys.argv[1:])}`.

{chr(10).join(lines)}
"""
    return page, flat


if __name__ == "__main__":
    sys.exit(main())
