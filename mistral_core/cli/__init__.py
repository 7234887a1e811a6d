"""`mistral ...`: one module per command, imported when it is called."""

from __future__ import annotations

import argparse
import importlib
import importlib.metadata
import os
import signal
import sys
import traceback
import warnings
from typing import Any, NamedTuple

from .. import backend as backends
from .._version import __version__
from ..errors import MistralError
from ..telling import printable

GROUP = "mistral.commands"


class Command(NamedTuple):
    """What `--help` says of a command, and the module with its `arguments` and `run`, imported when it is called."""

    summary: str
    module: str


_OWN = {
    "demo": "the embedded checkpoint in every installed framework, compared with the float64 reference",
    "info": "what a checkpoint, or a published size, is: sizes, memory, window, files",
    "plan": "what a model needs on devices that are not here: bytes of each, collectives, the smallest mesh",
    "generate": "continue a prompt",
    "chat": "talk with a model; text through a pipe is answered once",
    "tokenize": "the tokens of a text, ids and pieces",
    "mask": "which tokens see which: the attention mask of a text or a chat",
    "attention": "the attention weights of a text, from any backend, as a picture",
    "convert": "write a checkpoint as another format, bit for bit",
    "quantize": "write a checkpoint whose matrices take 8 or 4 bits a number",
    "train": "fine-tune a model, or a LoRA adapter beside it, on a .jsonl of examples",
    "lora": "what a LoRA adapter is, how far two are apart, and a base with one folded in",
    "verify": "compare a checkpoint with the SHA-256 sums of its manifest",
    "push": "upload a checkpoint to the hub in one commit",
    "diff": "compare two checkpoints of any formats tensor by tensor",
}


def commands() -> dict[str, Command]:
    """The commands of the core, and those that other packages register as entry points `mistral.commands`."""
    own = {name: Command(summary, f"{__name__}.{name}") for name, summary in _OWN.items()}
    points = sorted(importlib.metadata.entry_points(group=GROUP), key=lambda point: point.name)
    return {**own, **{point.name: point.load() for point in points if point.name not in own}}


def main(argv: list[str] | None = None) -> int:
    """Run a command; 0 is success, 1 a failed check, 2 an error, 130 Ctrl-C, 141 a closed pipe, 143 SIGTERM."""
    options = _options(sys.argv[1:] if argv is None else argv)
    backends.be_polite()
    before = signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # so that what is half written is removed
    words = warnings.formatwarning
    warnings.formatwarning = lambda message, *_, **__: f"mistral: warning: {printable(str(message))}\n"
    try:
        status = int(importlib.import_module(options.module).run(options))
        print(end="", flush=True)  # a closed pipe shows here, not at exit
        return status
    except MistralError as error:
        if options.verbose:
            _trace()
        progress(str(error))
        return 2
    except KeyboardInterrupt:
        return 130
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # or Python complains at exit
        return 141
    except Exception:  # a fault of ours, or of a library: told whole, but to no terminal raw
        _trace()
        return 1
    finally:
        signal.signal(signal.SIGTERM, before)
        warnings.formatwarning = words


def _options(argv: list[str]) -> argparse.Namespace:
    """The command, its module and its arguments, options before, between and after the others."""
    known = commands()
    parser = argparse.ArgumentParser(prog="mistral", description="One Mistral for PyTorch, JAX and Keras.")
    parser.add_argument("--version", action="version", version=__version__)
    listed = parser.add_subparsers(dest="command", required=True, metavar="command")
    for name, command in known.items():
        listed.add_parser(name, help=command.summary, add_help=False)
    name = parser.parse_known_args(argv[:1])[0].command
    parser = argparse.ArgumentParser(prog=f"mistral {name}", description=known[name].summary)
    parser.add_argument("-v", "--verbose", action="store_true", help="show the traceback of an error")
    parser.add_argument("--json", action="store_true", help="print JSON")
    module = known[name].module
    importlib.import_module(module).arguments(parser)  # the others need not be imported
    return parser.parse_intermixed_args(argv[1:], argparse.Namespace(command=name, module=module))


ONE_BACKEND = f"{', '.join(backends.ORDER)}; default: the first of them that is installed"


def backend_argument(command: argparse.ArgumentParser, text: str = ONE_BACKEND) -> None:
    """Let the user say which backend is used."""
    command.add_argument("--backend", "--framework", help=text)


def backends_argument(command: argparse.ArgumentParser) -> None:
    """Let the command be limited to some backends."""
    command.add_argument(
        "--backend", "--framework", action="append", help="only this one; may be repeated; default: all installed ones"
    )


def loading_arguments(command: argparse.ArgumentParser, dtype: str = "auto, the checkpoint's own") -> None:
    """How a model is loaded, in every command that loads one, in both spellings that other tools have."""
    command.add_argument(
        "--dtype", "--torch-dtype", "--torch_dtype", dest="dtype",
        help=f"float32, bfloat16, float16 or auto; default: {dtype}",
    )  # fmt: skip
    command.add_argument("--device", help="cpu or -1, a GPU's number, cuda:1, auto; default: the framework's own")
    command.add_argument(
        "--attn-implementation", "--attn_implementation", dest="attn_implementation",
        help="eager, sdpa, flash_attention_2 or another of the backend's; default: the backend's own",
    )  # fmt: skip


def quantization_argument(command: argparse.ArgumentParser) -> None:
    """How matrices are packed, in commands that run a model for its text."""
    command.add_argument(
        "--quantization",
        help="int8, int4 or nf4: matrices are packed as they are loaded; dequantize: packed ones become floats",
    )


def loading(options: argparse.Namespace) -> dict[str, Any]:
    """What was given of `loading_arguments` and `quantization_argument`, as `from_pretrained` takes it."""
    names = ("dtype", "device", "attn_implementation", "quantization")
    given = {name: getattr(options, name, None) for name in names}
    return {name: value for name, value in given.items() if value is not None}


def put(text: object = "", *, end: str = "\n") -> None:
    """Write what a command answers to stdout.

    Texts of models and files may hold characters that a terminal obeys: there they are written as escapes. A file or a
    pipe gets them as they are, because another program reads them as data.
    """
    print(printable(str(text)) if sys.stdout.isatty() else text, end=end, flush=True)


def put_painted(text: str) -> None:
    """The same of a text that is printable and that colours of ours were put around."""
    print(text)


def progress(text: str) -> None:
    """Say on stderr what is being done, or what is wrong."""
    print(f"mistral: {printable(text)}", file=sys.stderr, flush=True)


def _trace() -> None:
    """The traceback of what is being handled, whose messages quote what they like."""
    print(printable(traceback.format_exc()), end="", file=sys.stderr)
