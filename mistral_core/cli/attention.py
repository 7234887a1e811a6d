"""`mistral attention PATH "text"`: how much of its attention each token gives to each."""

from __future__ import annotations

import argparse

from ..pictures import AttentionVisualizer
from . import ONE_BACKEND, backend_argument, loading, loading_arguments
from .mask import looked_at, number_or_word, overrides, put_out, source


def arguments(command: argparse.ArgumentParser) -> None:
    """What the command takes."""
    looked_at(command)
    backend_argument(command, f"reference, {ONE_BACKEND}, else the reference")
    loading_arguments(command, dtype="float32")
    command.add_argument("--layer", type=number_or_word, default=-1, help="a number, or all; default: the last")
    command.add_argument("--head", type=number_or_word, default="mean", help="a number, mean or all; default: mean")


def run(options: argparse.Namespace) -> int:
    """Print the weights, or write them to files."""
    visualizer = AttentionVisualizer(options.path, backend=options.backend, **overrides(options), **loading(options))
    picture = visualizer.picture(
        source(options),
        layer=options.layer,
        head=options.head,
        padding_side=options.padding_side,
        packed=options.packed,
    )
    return put_out(picture, options)
