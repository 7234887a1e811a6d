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
    agrees: bool


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
        put(json.dumps({"prompt": prompt, "agree": agree, "frameworks": [row._asdict() for row in rows]}, indent=1))
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
    cached_is_one_pass = bool((logits[:, ids.shape[1] - 1 : -1].argmax(-1) == written).all())
    text = tokenizer.decode(tokens[0], skip_special_tokens=True)
    row = DemoRow(
        f"numpy {np.__version__}", text, 0.0, 0.0, 1.0, cached_is_one_pass, new / seconds,
        loaded_at - started, cached_is_one_pass,
    )  # fmt: skip
    return row, Expected(tokens, logits, ids.shape[1])


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
    one_pass = logits[:, expected.prompt - 1 : -1].argmax(-1)
    cached_is_one_pass = bool((one_pass == written[:, expected.prompt :]).all())
    agrees = bool((written == expected.tokens).all()) and argmax == 1 and ulp <= BOUND_ULPS and cached_is_one_pass
    text = tokenizer.decode(written[0], skip_special_tokens=True)
    return DemoRow(
        backends.version(backend), text, difference, ulp, argmax, cached_is_one_pass,
        new / seconds, load_seconds, agrees,
    )  # fmt: skip


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
    put(f"\n{verdict} (same tokens, same argmax, logits within {BOUND_ULPS:.0f} ulp of the float64 reference)")
