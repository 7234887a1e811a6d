"""Matrices of few bits, compared: products alone, the codes that floats become, and models of packed matrices."""

from __future__ import annotations

import contextlib
import tempfile
from collections.abc import Iterator, Mapping
from pathlib import Path

import numpy as np

from mistral_core.arrays import Array
from mistral_core.quantization.matrix import PackedMatrix
from mistral_core.quantization.models import round_activations
from mistral_core.reference import quantized
from mistral_core.weights.containers.safetensors import SafetensorsFile

from .cases import EVEN, ROUNDED, Case
from .compare import Comparison, compare
from .packed import ARCHITECTURE, CODES, ODD, PACKINGS, wanted
from .pieces import Subject, blocks, cast, expected, expected_rounded, weights
from .tolerances import Tolerance

SAME = Tolerance(0.0, 1.0)


def products(subject: Subject, activations: str | None = None, *, kernels: bool = True) -> Iterator[Comparison]:
    """Some rows, as they are or rounded to eight bits, times each odd matrix, by the kernels in C or without them."""
    dtype = subject.dtype
    with contextlib.nullcontext() if kernels else subject.adapter.without_kernels():
        for odd in ODD:
            if activations and not odd.kind.startswith("int"):
                continue
            matrix = odd.matrix
            floats = cast(quantized.dequantised(matrix), dtype).astype(np.float64)
            for rows in odd.rows:
                x = cast(np.random.default_rng(rows).normal(size=(rows, odd.shape[1])), dtype)
                exact = quantized.product(x, matrix, activations=activations)
                taken = x.astype(np.float64) if activations is None else quantized.rounded_rows(x.astype(np.float64))
                rounded = cast(cast(taken, dtype).astype(np.float64) @ floats.T, dtype).astype(np.float64)
                actual = subject.adapter.packed_product(x, matrix, dtype, activations)
                case = f"{rows} rows, {odd.kind} {odd.shape[0]} x {odd.shape[1]} by {odd.block[0]} x {odd.block[1]}"
                found = exact if dtype == "float32" else rounded
                yield subject.compare(case, "packed_product", actual, found, exact, packed=True)


def codes(subject: Subject, dtype: str) -> Iterator[Comparison]:
    """What a backend's own `quantize` makes of a model, to the bit: codes, scales, zero points."""
    floats = weights(EVEN, ARCHITECTURE, dtype)
    key = (*subject.key[:2], "float32")
    for packing in CODES[dtype]:
        asked = PACKINGS[packing]
        assert asked is not None
        model = subject.adapter.model(ARCHITECTURE, EVEN, floats, dtype, subject.implementation)
        asked = asked.resolved(EVEN, ARCHITECTURE)
        found = subject.adapter.packed(model, asked)
        names = np.array([name in found for name in asked.matrices(EVEN, ARCHITECTURE)], np.float32)
        yield compare(key, f"{packing} of {dtype}", "packed names", names, np.ones(len(names)), SAME)
        for name, matrix in found.items():
            numbers, scale, zero = wanted(asked, name, floats[name])
            case = f"{packing} of {dtype}, {name}"
            yield compare(key, case, "codes", quantized.unsigned_codes(matrix), numbers, SAME)
            yield compare(key, case, "scales", matrix.scale, scale, SAME)
            if zero is not None:
                assert matrix.zero is not None
                yield compare(key, case, "zero points", matrix.zero, zero, SAME)


def files(subject: Subject) -> Iterator[Comparison]:
    """The tensors that `save_pretrained` writes, read as the libraries whose formats they are read them."""
    floats = weights(EVEN, ARCHITECTURE, "float32")
    for packing in ("int8 row", "int4 asymmetric", "nf4 64"):
        model = subject.adapter.model(ARCHITECTURE, EVEN, floats, "float32", subject.implementation)
        asked = PACKINGS[packing]
        assert asked is not None
        matrices = subject.adapter.packed(model, asked)
        with tempfile.TemporaryDirectory() as folder:
            model.save_pretrained(folder)
            file = SafetensorsFile(Path(folder) / "model.safetensors")
            for name, matrix in matrices.items():
                parts = {part: file.read_packed(part) for part in file.tensors if part.startswith(name)}
                numbers, zero = _in_file(parts, name, matrix)
                case = f"file of {packing}, {name}"
                yield compare(subject.key, case, "codes", numbers, quantized.unsigned_codes(matrix), SAME)
                if matrix.zero is not None:
                    yield compare(subject.key, case, "zero points", zero, matrix.zero, SAME)


def _in_file(parts: Mapping[str, Array], name: str, matrix: PackedMatrix) -> tuple[Array, Array]:
    """The codes, and the zero points, 0 where there are none."""
    rows, columns = matrix.shape
    if matrix.kind == "nf4":
        return quantized.codes_of_pairs(parts[name], matrix.shape), np.zeros(1)
    bits = 8 if matrix.kind == "int8" else 4
    numbers = quantized.codes_of_words(parts[f"{name}_packed"], bits, columns)
    if matrix.zero is None:
        return numbers, np.zeros(1)
    zero = quantized.codes_of_words(parts[f"{name}_zero_point"].T, bits, rows).T
    return numbers, zero - 2 ** (bits - 1)


def rounded_text(subject: Subject) -> Iterator[Comparison]:
    """The logits of a text whose rows each product rounds to eight bits, given at once, and its last token alone."""
    model, ids = round_activations(subject.own_model(ROUNDED), "int8"), ROUNDED.inputs["input_ids"]
    wanted = expected_rounded().logits
    yield subject.compare(ROUNDED.name, "logits", subject.adapter.call(model, input_ids=ids).logits, wanted)
    past = subject.adapter.allocate(ROUNDED.config, 1, ids.shape[1], subject.dtype)
    first = subject.adapter.call(model, input_ids=ids[:, :-1], past_key_values=past)
    last = subject.adapter.call(model, input_ids=ids[:, -1:], past_key_values=first.past_key_values)
    yield subject.compare(ROUNDED.name, "logits of the last token", last.logits, wanted[:, -1:])


def whole(subject: Subject, case: Case) -> Iterator[Comparison]:
    """The parts of one decoder layer, and the logits of a model."""
    if subject.dtype == "float32":
        yield from blocks(subject, case)
    logits = (expected(case.name, subject.dtype, exact).logits for exact in (False, True))
    out = subject.adapter.call(subject.model(case), **subject.inputs(case))
    yield subject.compare(case.name, "logits", out.logits, *logits, packed=True)
