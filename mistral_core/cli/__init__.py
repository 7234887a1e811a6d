"""`mistral ...`: one module per command, imported when it is called."""

from __future__ import annotations

import argparse
import importlib
import os
import sys
import traceback
from typing import Any

from ..errors import MistralError

COMMANDS = {
    "demo": "the embedded checkpoint in every installed framework, compared with the float64 reference",
    "info": "what a checkpoint, or a published size, is: sizes, memory, window, files",
    "generate": "continue a prompt",
    "check": "whether the installed backends agree with the reference on a checkpoint",
}

# one GPU for three frameworks: none of them may take it all, and TensorFlow need not tell its life
POLITE = {
    "XLA_PYTHON_CLIENT_PREALLOCATE": "false",
    "TF_FORCE_GPU_ALLOW_GROWTH": "true",
    "TF_CPP_MIN_LOG_LEVEL": "2",
}


def main(argv: list[str] | None = None) -> int:
    """Run a command; 0 is success, 1 a failed check, 2 an error, 130 Ctrl-C, 141 a pipe closed by its reader."""
    from .._version import __version__

    parser = argparse.ArgumentParser(prog="mistral", description="One Mistral for PyTorch, JAX and Keras.")
    parser.add_argument("--version", action="version", version=__version__)
    commands = parser.add_subparsers(dest="command", required=True, metavar="command")
    for name, summary in COMMANDS.items():
        command = commands.add_parser(name, help=summary, description=summary)
        command.add_argument("-v", "--verbose", action="store_true", help="show the traceback of an error")
        command.add_argument("--json", action="store_true", help="print JSON")
        _arguments(command, name)
    options = parser.parse_args(argv)
    for variable, value in POLITE.items():
        os.environ.setdefault(variable, value)
    try:
        status = int(importlib.import_module(f".{options.command}", __name__).run(options))
        print(end="", flush=True)  # a closed pipe shows here, not at exit
        return status
    except MistralError as error:
        if options.verbose:
            traceback.print_exc()
        print(f"mistral: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        return 130
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # or Python complains at exit
        return 141


def _arguments(command: argparse.ArgumentParser, name: str) -> None:
    if name == "info":
        command.add_argument("path", help="a checkpoint directory, a hub id, or the name of a published size")
        return
    default: dict[str, Any] = {"nargs": "?"} if name in ("demo", "check") else {}
    command.add_argument("path", help="a checkpoint directory or a hub id (demo, check: the embedded one)", **default)
    if name == "generate":
        importlib.import_module(".generate", __name__).arguments(command)
    else:
        command.add_argument("--backend", action="append", help="only this one; may be repeated")
    if name == "demo":
        command.add_argument("--prompt", help="the text to continue")
        command.add_argument("--max-new-tokens", type=int, default=256)
    else:
        default_dtype = "the checkpoint's own" if name == "generate" else "float32"
        command.add_argument("--dtype", help=f"float32, bfloat16 or float16; default: {default_dtype}")


def progress(text: str) -> None:
    """Say on stderr what is being done."""
    print(f"mistral: {text}", file=sys.stderr, flush=True)
