"""`mistral demo`: the same checkpoint through NumPy, PyTorch, Flax and TensorFlow, cached and in one pass."""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Iterator, Mapping
from types import MappingProxyType
from typing import Any, NamedTuple

import numpy as np

from .. import backend as backends
from ..data import TINY_CHECKPOINT
from ..errors import InputError, MissingExtraError
from ..generation import GenerationConfig, driver
from ..hub import download
from ..reference import heads
from ..text.tokenizer import MistralTokenizer
from ..weights.loading import load_pretrained
from . import backends_argument, loading, loading_arguments, progress, put

PROMPT = "Elizabeth was surprised"
BOUND_ULPS = 32.0
"""float32 ulp of the largest logit: what the conformance suite promises."""


class DemoRow(NamedTuple):
    """What one framework did."""

    framework: str
    text: str
    max_abs: float
    """Largest |logit - reference| over the whole text in one pass."""
    ulp: float
    """The same in units of float32 eps times the largest logit."""
    argmax: float
    """Fraction of positions whose likeliest token is the reference's."""
    cached_is_one_pass: bool
    """Whether the tokens written one by one from the cache are the likeliest ones of the one pass."""
    tokens_per_second: float
    load_seconds: float
    differs: tuple[str, ...] = ()
    """What is not as the reference has it, a phrase each."""

    @property
    def agrees(self) -> bool:
        """Whether nothing differs."""
        return not self.differs


class Expected(NamedTuple):
    """What the reference says of prompt and continuation."""

    tokens: np.ndarray
    logits: np.ndarray
    prompt: int


def arguments(command: argparse.ArgumentParser) -> None:
    """What the command takes."""
    command.add_argument("path", nargs="?", help="a checkpoint directory or a hub id; default: the embedded one")
    backends_argument(command)
    loading_arguments(command, dtype="float32, which is what is compared")
    command.add_argument("--prompt", help="the text to continue")
    command.add_argument("--max-new-tokens", type=int, default=256)


def run(options: argparse.Namespace) -> int:
    """Run the demo; 0 where every framework agrees with the reference."""
    path = download.held(options.path or TINY_CHECKPOINT)
    if options.dtype not in (None, "auto", "float32"):
        raise InputError(f"--dtype: {options.dtype!r}; float32 is compared here. Other dtypes: mistral check --dtype.")
    given = {**loading(options), "dtype": "float32"}
    found = list(_backends(options.backend))
    tokenizer = MistralTokenizer.from_pretrained(path)
    prompt = PROMPT if options.prompt is None else options.prompt
    ids = np.array([tokenizer.encode(prompt)])
    progress(f"numpy: {options.max_new_tokens} tokens from the cache, then all in one pass, in float64")
    row, expected = _reference(path, ids, options.max_new_tokens, tokenizer)
    rows = [row]
    for backend in found:
        progress(f"{backends.version(backend)}: the same in float32")
        rows.append(_framework(backend, path, expected, tokenizer, given))
    agree = all(row.agrees for row in rows) and len(rows) > 1
    if options.json:
        reports = [{**row._asdict(), "agrees": row.agrees} for row in rows]
        put(json.dumps({"prompt": prompt, "agree": agree, "frameworks": reports}, indent=1))
    else:
        _print(prompt, rows, agree)
    return 0 if agree else 1


def _backends(wanted: list[str] | None) -> Iterator[backends.Backend]:
    """Yield those asked for, none of which may be missing, or else all that are installed."""
    for name in wanted or backends.names():
        try:
            yield backends.get(name)
        except MissingExtraError as error:
            if wanted:
                raise
            progress(str(error))


def _reference(path: Any, ids: np.ndarray, new: int, tokenizer: MistralTokenizer) -> tuple[DemoRow, Expected]:
    started = time.perf_counter()
    loaded = load_pretrained(path, "MistralForCausalLM", dtype="float32")
    driver.prepare(loaded.config, ids, None, GenerationConfig(), {"max_new_tokens": new})  # a typed error, at once
    parameters = {name: array.astype(np.float64) for name, array in loaded.tensors}
    loaded_at = time.perf_counter()
    written = heads.greedy(loaded.config, parameters, ids, max_new_tokens=new)
    seconds = time.perf_counter() - loaded_at
    tokens = np.concatenate([ids, written], axis=1)
    logits = heads.causal_lm(loaded.config, parameters, tokens).logits
    assert logits is not None
    expected = Expected(tokens, logits, ids.shape[1])
    text = tokenizer.decode(tokens[0], skip_special_tokens=True)
    differs = tuple(_differences(tokens, logits, expected, 0.0))
    row = DemoRow(
        f"numpy {np.__version__}", text, 0.0, 0.0, 1.0, _one_pass(tokens, logits, expected), new / seconds,
        loaded_at - started, differs,
    )  # fmt: skip
    return row, expected


def _framework(
    backend: backends.Backend,
    path: Any,
    expected: Expected,
    tokenizer: MistralTokenizer,
    given: Mapping[str, Any] = MappingProxyType({"dtype": "float32"}),
) -> DemoRow:
    started = time.perf_counter()
    model = backend.model_class("MistralForCausalLM").from_pretrained(path, **given)
    load_seconds = time.perf_counter() - started
    prompt, new = expected.tokens[:, : expected.prompt], expected.tokens.shape[1] - expected.prompt
    for _ in range(2):  # the first time compiles
        started = time.perf_counter()
        written = backend.to_numpy(model.generate(prompt, max_new_tokens=new, eos_token_id=None))
        seconds = time.perf_counter() - started
    logits = backend.to_numpy(model(expected.tokens).logits)
    difference = float(np.abs(logits - expected.logits).max())
    ulp = difference / (float(np.finfo(np.float32).eps) * float(np.abs(expected.logits).max()))
    argmax = float((logits.argmax(-1) == expected.logits.argmax(-1)).mean())
    text = tokenizer.decode(written[0], skip_special_tokens=True)
    return DemoRow(
        backends.version(backend), text, difference, ulp, argmax, _one_pass(written, logits, expected),
        new / seconds, load_seconds, tuple(_differences(written, logits, expected, ulp)),
    )  # fmt: skip


def _one_pass(written: np.ndarray, logits: np.ndarray, expected: Expected) -> bool:
    """Whether the tokens written from the cache are the likeliest of the one pass."""
    return bool((logits[:, expected.prompt - 1 : -1].argmax(-1) == written[:, expected.prompt :]).all())


def _differences(written: np.ndarray, logits: np.ndarray, expected: Expected, ulp: float) -> Iterator[str]:
    """Phrases of what is not as the reference has it; where it first is, and by how much."""
    for name, found, wanted in (
        ("token written", written, expected.tokens), ("likeliest token", logits.argmax(-1), expected.logits.argmax(-1)),
    ):  # fmt: skip
        others = np.flatnonzero((found != wanted).any(axis=0))
        if others.size:
            at = others[0]
            yield f"{others.size} times another {name}, first {found[0, at]} for {wanted[0, at]} at position {at}"
    if not ulp <= BOUND_ULPS:
        yield f"logits {ulp:.0f} ulp from the reference's"
    if not _one_pass(written, logits, expected):
        yield "the cache and one pass give different tokens"


def _print(prompt: str, rows: list[DemoRow], agree: bool) -> None:
    put(f"prompt: {prompt}\n")
    for row in rows:
        same = row.text == rows[0].text
        put(f"{row.framework} wrote{' the same' if same and row is not rows[0] else ''}:\n{row.text}\n")
    head = (
        "framework", "max |logit - reference|", "ulp", "argmax agreement", "cached = one pass", "tokens/s", "load s",
    )  # fmt: skip
    cells = [
        (
            row.framework, f"{row.max_abs:.2e}", f"{row.ulp:.1f}", f"{row.argmax:.1%}",
            "yes" if row.cached_is_one_pass else "NO", f"{row.tokens_per_second:.0f}", f"{row.load_seconds:.2f}",
        )
        for row in rows
    ]  # fmt: skip
    widths = [max(len(line[i]) for line in (head, *cells)) for i in range(len(head))]
    for line in (head, *cells):
        put("  ".join(cell.ljust(width) for cell, width in zip(line, widths, strict=True)).rstrip())
    verdict = "all agree" if agree else "THEY DISAGREE" if len(rows) > 1 else "no framework is installed"
    put("")
    for row in rows:
        if not row.agrees:
            put(f"{row.framework}: {'; '.join(row.differs)}.")
    put(f"{verdict} (same tokens, same argmax, logits within {BOUND_ULPS:.0f} ulp of the float64 reference)")
