"""`mistral quantize SRC DST`: a checkpoint whose matrices take 8 or 4 bits a number."""

from __future__ import annotations

import argparse
import dataclasses
import json
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import numpy as np

from ..hub import download
from ..quantization import calibration
from ..quantization import report as reports
from ..quantization.request import SCHEMES, Quantization
from ..quantization.texts import texts
from ..text.tokenizer import MistralTokenizer
from ..weights import lazy
from ..weights.convert import convert
from ..weights.opening import Checkpoint
from ..weights.sources import resolve_checkpoint
from . import progress, put
from .convert import bar

LENGTH = 512
"""Tokens of a text that is calibrated on, or that the report is of."""


def arguments(command: argparse.ArgumentParser) -> None:
    """What the command takes."""
    command.add_argument("source", help="a checkpoint directory, a file of weights, or a hub id")
    command.add_argument("destination", help="the directory to write")
    command.add_argument("--scheme", required=True, choices=SCHEMES, help="int8, int4 or nf4")
    command.add_argument("--group-size", type=int, metavar="N",
                         help="columns that share a scale, -1 a whole row; default: int8 a row; int4 the first of 128, "
                         "64, 32, 16 that divides every matrix, nf4 of 64, 32, 16")  # fmt: skip
    command.add_argument("--head", choices=("int8", "off"), help="the head too; default: int8 with int4, if not tied")
    command.add_argument("--asymmetric", action="store_true",
                         help="zero points of their own; transformers 5.23 does not load such files")  # fmt: skip
    command.add_argument("--double-quant", action="store_true", help="nf4: scales rounded to 8 bits, as bitsandbytes")
    command.add_argument("--calibrate", metavar="FILE",
                         help="choose codes by GPTQ on a text: a .txt, or a .jsonl of chats or texts")  # fmt: skip
    command.add_argument("--texts", type=int, default=128, metavar="N",
                         help=f"texts of {LENGTH} tokens to calibrate on, or to report of; default: 128")  # fmt: skip
    command.add_argument("--report", metavar="FILE",
                         help="afterwards, how far predictions of another text are from the floats'")  # fmt: skip
    command.add_argument("--dtype", help="of scales and all else: bfloat16, float16, float32; default: as stored")
    command.add_argument("--max-shard-size", default="5GB", help="default: 5GB")
    command.add_argument("--overwrite", action="store_true", help="replace the destination")
    command.add_argument("--dry-run", action="store_true", help="print the plan and write nothing")
    command.add_argument("--revision", help="branch, tag or commit of a hub id")


def run(options: argparse.Namespace) -> int:
    """Pack one matrix after another, with a bar on stderr, and print what was done and what it costs."""
    asked = Quantization(
        options.scheme,
        group_size=options.group_size,
        symmetric=not options.asymmetric,
        head=options.head,
        double_quant=options.double_quant,
    )
    source = resolve_checkpoint(download.held(options.source), revision=options.revision)
    floats = Checkpoint.open(source) if options.calibrate or options.report else None
    calibrate, held_out = _ids(floats, options.calibrate, options.report, most=options.texts)
    if floats is not None and calibrate is not None:
        megabytes = calibration.kept_bytes(floats.config, calibrate.size) / 1e6
        progress(f"calibrating on {calibrate.size} tokens, whose states take {megabytes:.1f} MB of memory")
    quiet = options.json or options.dry_run
    with bar(quiet=quiet or calibrate is not None) as told, _matrices(quiet=quiet or calibrate is None) as calibrated:
        report = convert(
            source,
            options.destination,
            to="hf",
            dtype=options.dtype,
            max_shard_size=options.max_shard_size,
            overwrite=options.overwrite,
            allow_lossy=True,
            dry_run=options.dry_run,
            progress=told,
            quantization=asked,
            calibrate=calibrate,
            calibrated=calibrated,
        )
    found = None
    if floats is not None and held_out is not None and not options.dry_run:
        progress("the report: both models read a text, a layer after the other")
        packed = lazy.matrices(Checkpoint.open(options.destination))
        found = reports.quality(floats.config, lazy.arrays(floats), packed, held_out)
    if options.json:
        facts = dataclasses.asdict(report) | ({} if found is None else {"quality": found.to_dict()})
        put(json.dumps(facts, indent=1))
        return 0
    put(report)
    if found is not None:
        put(f"\n{options.report}:")
        put(found.table())
    return 0


def _ids(checkpoint: Checkpoint | None, *files: str | None, most: int) -> list[np.ndarray | None]:
    """Token ids of the texts there are, by the checkpoint's own tokenizer; raises what reading them raises."""
    if checkpoint is None:
        return [None for _ in files]
    length = min(LENGTH, checkpoint.config.max_position_embeddings)
    tokenizer = MistralTokenizer.from_pretrained(checkpoint.directory)
    return [None if file is None else texts(file, tokenizer, length=length, most=most) for file in files]


@contextmanager
def _matrices(*, quiet: bool) -> Iterator[Callable[[int, int, float], None] | None]:
    """A bar of matrices with the time left, where stderr is a terminal."""
    if quiet:
        yield None
        return
    from tqdm import tqdm

    with tqdm(unit=" matrices", disable=None, leave=False) as shown:

        def calibrated(done: int, total: int, seconds: float) -> None:
            shown.total = total
            shown.set_postfix_str(f"{seconds:.0f} s left")
            shown.update(done - shown.n)

        yield calibrated
