"""`mistral diff A B`: two checkpoints of any formats, tensor by tensor, and with --layers where they part."""

from __future__ import annotations

import argparse
import json

import numpy as np

from ..text.tokenizer import MistralTokenizer
from ..weights import difference
from ..weights.opening import Checkpoint
from . import put

SHOWN_TENSORS = 20


def arguments(command: argparse.ArgumentParser) -> None:
    """What the command takes."""
    command.add_argument("first", help="a checkpoint directory, a file of weights, or a hub id")
    command.add_argument("second", help="another one, of any format")
    command.add_argument("--layers", metavar="PROMPT", help="run both and show the first layer where they part")


def run(options: argparse.Namespace) -> int:
    """Print what differs; 0 where every bit is the same, 1 where not."""
    first, second = (Checkpoint.open(path) for path in (options.first, options.second))
    found = list(difference.tensors(first, second))
    states = []
    if options.layers is not None:
        ids = np.array([MistralTokenizer.from_pretrained(first.directory).encode(options.layers)])
        states = list(difference.layers(first, second, ids))
    different = [item for item in found if not item.same_bits]
    if options.json:
        facts = {"tensors": [item._asdict() for item in found], "layers": [state._asdict() for state in states]}
        put(json.dumps(facts, indent=1))
        return int(bool(different))
    put(f"{len(found) - len(different)} of {len(found)} tensors have the same bits")
    for item in different[:SHOWN_TENSORS]:
        put(f"{item.name}: {_told(item)}")
    if len(different) > SHOWN_TENSORS:
        put(f"... and {len(different) - SHOWN_TENSORS} more (--json lists all)")
    for state in states:
        put(f"after {state.layer}: max |difference| {state.max_abs:.3g}, relative {state.relative:.3g}")
    parted = next((state.layer for state in states if state.max_abs > 0), None)
    if states:
        put(f"they part at {parted}" if parted else "every hidden state is the same")
    return int(bool(different))


def _told(item: difference.TensorDifference) -> str:
    if item.what:
        return item.what
    kinds = " and ".join(dict.fromkeys(item.dtypes))
    if not item.changed:
        return f"the same numbers in other bits ({kinds})"
    return f"{item.changed} numbers differ, by at most {item.max_abs:.3g} ({item.max_ulp:.3g} ulp; {kinds})"
