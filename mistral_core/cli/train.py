"""`mistral train MODEL DATA.jsonl --out RUN`: fine-tune a model, or an adapter beside it, in any framework."""

from __future__ import annotations

import argparse
import contextlib
import json
import signal
import time
import warnings
from collections.abc import Callable, Iterator
from typing import Any

from .. import backend as backends
from .._version import __version__
from ..config import MistralConfig
from ..errors import ConfigError, InputError, UnsupportedFeatureError
from ..hub import download
from ..learning import Examples, Feed, kind_of_file, label_names
from ..learning.examples import LABELLED
from ..lora.adapter import is_adapter
from ..lora.config import ALL_LINEAR, LoraConfig
from ..text.tokenizer import MistralTokenizer
from ..training import TrainingResult, TrainingSettings, check_new, train
from . import backend_argument, loading, loading_arguments, progress, put, quantization_argument

ARCHITECTURES = {"classification": "MistralForSequenceClassification", "tokens": "MistralForTokenClassification"}
"""Kinds of examples -> what learns them; others are learnt by a language model."""
RATES = {True: 2e-4, False: 2e-5}
"""The highest learning rate by default, with an adapter and without."""
TOLD_SECONDS = 5.0
"""Seconds between two words of progress."""
SETTINGS = {
    "epochs": (int, "how often every example is learnt from; default 1"),
    "rate": (float, "the highest learning rate; default 2e-5, with --lora 2e-4"),
    "schedule": (str, "constant, linear or cosine; default cosine"),
    "warmup": (float, "the share of steps in which the rate rises; default 0.03"),
    "floor": (float, "the share of the rate that the last step has; default 0"),
    "weight-decay": (float, "of matrices; default 0"),
    "clip": (float, "the most that the norm of the gradients may be; default 1"),
    "beta": (float, "--dpo: how far preferences pull; default 0.1"),
    "seed": (int, "of the order, of new weights and of dropout; default 0"),
    "evaluate-every": (int, "steps between two measures of --validation; default: an epoch"),
    "save-every": (int, "steps between two states to resume; default: as often as it is measured, else an epoch"),
    "patience": (int, "end after so many measures without a lower loss; default: never"),
}
"""Options that are fields of `TrainingSettings`."""


def arguments(command: argparse.ArgumentParser) -> None:
    """What the command takes."""
    command.add_argument("model", help="a checkpoint directory or a hub id")
    command.add_argument("data", help="a .jsonl: chats, texts, completions, preferences, or texts or words with labels")
    command.add_argument("--out", required=True, metavar="RUN", help="a new directory for the weights and the record")
    command.add_argument(
        "--validation", metavar="FILE", help="a .jsonl whose loss is measured, to keep the best weights"
    )
    command.add_argument(
        "--resume", action="store_true", help="go on with the run in RUN where it was stopped or killed"
    )
    backend_argument(command)
    loading_arguments(command)
    quantization_argument(command)
    command.add_argument("--lora", type=int, metavar="R", help="learn an adapter of this rank; default: all weights")
    command.add_argument(
        "--lora-alpha", type=float, help="what it is scaled by, over its rank; default: twice the rank"
    )
    command.add_argument("--lora-targets", help="ends of names of matrices, with commas between; default: all-linear")
    command.add_argument("--lora-dropout", type=float, help="the share of inputs that are dropped; default 0")
    command.add_argument("--dora", action="store_true", help="learn the lengths of rows beside the adapter")
    command.add_argument("--rslora", action="store_true", help="scale by alpha over the root of the rank")
    command.add_argument("--dpo", action="store_true", help="learn preferences: prompt, chosen, rejected; with --lora")
    command.add_argument("--length", type=int, help="tokens of a row; default: 1024, or the model's most")
    command.add_argument("--rows", type=int, default=8, help="rows of a batch; default 8")
    command.add_argument("--accumulate", type=int, default=1, help="batches of a step; default 1")
    command.add_argument("--no-pack", action="store_true", help="one example a row")
    command.add_argument(
        "--template", help="how chats are written: a built-in version such as v3; default: the model's"
    )
    command.add_argument("--gradient-checkpointing", action="store_true", help="compute layers twice and keep less")
    for name, (kind, text) in SETTINGS.items():
        command.add_argument(f"--{name}", type=kind, help=text)


def run(options: argparse.Namespace) -> int:
    """Train, tell how it goes on stderr, and print where the weights are."""
    settings, lora = settings_of(options), lora_of(options)
    check_new(options.out, resume=options.resume)
    backend = backends.get(backends.chosen(options.backend))
    path = download.held(options.model)
    if is_adapter(path):
        raise ConfigError(f"{options.model}: an adapter; give its base, or merge it first (mistral lora merge).")
    tokenizer = MistralTokenizer.from_pretrained(path, **({"version": options.template} if options.template else {}))
    config = MistralConfig.from_pretrained(path)
    examples, validation, labels = examples_of(options, tokenizer, config)
    architecture = ARCHITECTURES.get(examples.kind, "MistralForCausalLM")
    progress(f"{options.data}: {examples.kind}, {examples.counts()}")
    progress(f"loading {options.model} in {backends.version(backend)}")
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", ".* are initialised: train them")  # which is what is done here
        load = backend.model_class(architecture).from_pretrained
        model = load(path, seed=settings.seed, **labels, **loading(options))
    if options.gradient_checkpointing:
        model.gradient_checkpointing_enable()
    if lora is not None:
        model = backend.add_adapter(model, lora, seed=settings.seed)
    objective = "preferences" if options.dpo else "labels"
    learner = backend.learner(model, settings, objective=objective)
    pack = False if options.no_pack else None
    feed = Feed(examples, rows=options.rows, accumulate=options.accumulate, seed=settings.seed, pack=pack)
    about = {
        "model": str(options.model), "dtype": options.dtype, "quantization": options.quantization,
        "lora": None if lora is None else lora.to_dict(), "objective": objective, "length": examples.length,
        "pack": feed.pack, "template": options.template, "labels": labels.get("id2label"),
        "gradient_checkpointing": options.gradient_checkpointing,
    }  # fmt: skip
    made_with = {"mistral": __version__, "backend": backends.version(backend)}
    with asked_to_stop() as stop:
        result = train(
            learner, feed, options.out, settings=settings, validation=validation, resume=options.resume, about=about,
            made_with=made_with, told=Teller(), stop=stop,
        )  # fmt: skip
    _answer(options, result, best=validation is not None)
    return 130 if result.ended == "stopped" else 0


def settings_of(options: argparse.Namespace) -> TrainingSettings:
    """The settings that were given; raises ConfigError."""
    given = {name.replace("-", "_"): getattr(options, name.replace("-", "_")) for name in SETTINGS}
    given = {name: value for name, value in given.items() if value is not None}
    if options.beta is not None and not options.dpo:
        raise ConfigError("--beta is of preferences; give --dpo, or leave it out.")
    if options.patience is not None and options.validation is None:
        raise ConfigError("--patience: nothing is measured; give --validation, or leave it out.")
    return TrainingSettings(**{"rate": RATES[options.lora is not None], **given})


def lora_of(options: argparse.Namespace) -> LoraConfig | None:
    """The adapter that was asked for; raises ConfigError, UnsupportedFeatureError."""
    given = {
        "lora_alpha": options.lora_alpha, "target_modules": options.lora_targets, "lora_dropout": options.lora_dropout,
        "use_dora": options.dora or None, "use_rslora": options.rslora or None,
    }  # fmt: skip
    given = {name: value for name, value in given.items() if value is not None}
    if options.lora is None:
        if given or options.dpo:
            names = ", ".join(given) or "--dpo"
            raise ConfigError(f"{names}: of an adapter; give its rank, as in --lora 16.")
        if options.quantization not in (None, "dequantize"):
            raise UnsupportedFeatureError("--quantization: packed matrices do not learn; give --lora 16 too.")
        return None
    targets = str(given.pop("target_modules", ALL_LINEAR))
    if targets != ALL_LINEAR:
        given["target_modules"] = tuple(targets.split(","))
    return LoraConfig(**{"r": options.lora, "lora_alpha": 2 * options.lora, "target_modules": ALL_LINEAR, **given})


def examples_of(
    options: argparse.Namespace, tokenizer: MistralTokenizer, config: MistralConfig
) -> tuple[Examples, Examples | None, dict[str, Any]]:
    """The examples to learn from and to measure, and the classes that the model must have, as fields of its config."""
    length = min(1024, config.max_position_embeddings) if options.length is None else options.length
    kind = kind_of_file(options.data)
    classes: dict[str, Any] = {}
    if kind in LABELLED:
        known = list((config.id2label or {}).values())
        names = label_names(options.data)
        names = known if set(names) <= set(known) else names
        classes = {"labels": names}
    examples = Examples(options.data, tokenizer, length=length, kind=kind, **classes)
    validation = None
    if options.validation is not None:
        validation = Examples(options.validation, tokenizer, length=length, kind=kind, **classes)
    if options.dpo != (examples.kind == "preference"):
        wanted = (
            "prompt, chosen and rejected, as --dpo asks for" if options.dpo else "something else, or --dpo be given"
        )
        raise InputError(f"{options.data} must have lines with {wanted}, got the kind {examples.kind}.")
    fields = {"id2label": dict(enumerate(classes["labels"])), "num_labels": len(classes["labels"])} if classes else {}
    return examples, validation, fields


@contextlib.contextmanager
def asked_to_stop() -> Iterator[Callable[[], bool]]:
    """Whether the user or the system has asked to stop: the first time a step is finished and kept."""
    asked: list[int] = []
    before = {each: signal.getsignal(each) for each in (signal.SIGINT, signal.SIGTERM)}

    def ask(number: int, _: Any) -> None:
        asked.append(number)
        progress("stopping after this step; once more stops now")
        for each, handler in before.items():
            signal.signal(each, handler)

    try:
        for each in before:
            signal.signal(each, ask)
        yield lambda: bool(asked)
    finally:
        for each, handler in before.items():
            signal.signal(each, handler)


class Teller:
    """Tells on stderr how a training goes: each measure, and a step now and then."""

    def __init__(self) -> None:
        self._begun, self._told, self._tokens = time.perf_counter(), 0.0, 0
        self._first: int | None = None

    def __call__(self, line: dict[str, Any]) -> None:
        """Tell of a line of metrics."""
        now = time.perf_counter()
        if "validation_loss" in line:
            right = f", {line['validation_right']:.1%} right" if "validation_right" in line else ""
            progress(f"step {line['step']}: validation loss {line['validation_loss']:.4f}{right}")
            return
        self._first = line["step"] - 1 if self._first is None else self._first
        self._tokens += line["tokens"]
        if now - self._told < TOLD_SECONDS and line["step"] != line["steps"]:
            return
        self._told, seconds = now, now - self._begun
        left = seconds / (line["step"] - self._first) * (line["steps"] - line["step"])
        progress(
            f"step {line['step']} of {line['steps']}, epoch {line['epoch'] + 1}: loss {line['loss']:.4f}, rate "
            f"{line['rate']:.2e}, {self._tokens / seconds:.0f} tokens/s, {_minutes(left)} left"
        )


def _minutes(seconds: float) -> str:
    return f"{seconds / 60:.0f} min" if seconds >= 90 else f"{seconds:.0f} s"


def _answer(options: argparse.Namespace, result: TrainingResult, *, best: bool) -> None:
    if options.json:
        put(json.dumps({"out": str(options.out), **result._asdict()}, indent=1))
        return
    put(f"{result.steps} steps, {result.ended}; the record is in {options.out}")
    if result.ended == "stopped":
        put("go on with the same command and --resume")
        return
    put(f"{options.out}/final: the weights of the last step")
    if best and result.best_loss is not None:
        put(f"{options.out}/best: those of step {result.best_step}, whose validation loss is {result.best_loss:.4f}")
