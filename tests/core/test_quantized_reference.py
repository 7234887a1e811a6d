"""`mistral_core.quantization` against the specification bit for bit, and against what the libraries make."""

from __future__ import annotations

from pathlib import Path

import ml_dtypes
import numpy as np
import pytest

from mistral_core.errors import MeshError
from mistral_core.quantization import matrix as packed
from mistral_core.quantization import request, rounding, storage
from mistral_core.quantization.matrix import KINDS, PackedMatrix
from mistral_core.reference import quantized
from mistral_core.weights.containers.safetensors import SafetensorsFile

DTYPES = {"float32": np.float32, "bfloat16": ml_dtypes.bfloat16, "float16": np.float16}
INTEGERS = [("int8", True), ("int8", False), ("int4", True), ("int4", False)]
ROWS, COLUMNS = 7, 96
TINY = 2.0**-140
"""Of float32 a denormal, of the other two nothing."""


def matrices():
    random = np.random.default_rng(0)
    normal = random.normal(size=(ROWS, COLUMNS))
    far = normal.copy()
    far[:, 5] = 5e4
    yield "normal", normal
    yield "zeros", np.where(np.arange(COLUMNS) // 32 == 1, 0, normal)  # one block of each row, or two, or six
    yield "nothing", np.zeros((ROWS, COLUMNS))
    yield "one value far from the others", far
    yield "halves", (np.arange(COLUMNS) % 32 - 15.5)[None] / 2 * 2.0 ** np.arange(ROWS)[:, None]
    yield (
        "halves of eight bits",
        np.concatenate([random.integers(-255, 256, (ROWS, COLUMNS - 1)) / 2, [[127.5]] * ROWS], 1),
    )
    yield "denormals", normal * TINY
    yield "denormals beside others", normal * 2.0 ** random.integers(-150, 1, (ROWS, COLUMNS))
    yield "one sign", -np.abs(normal)


MATRICES = dict(matrices())


def cast(name, dtype):
    with np.errstate(over="ignore", under="ignore"):
        return MATRICES[name].astype(DTYPES[dtype])


def same(actual, expected):
    """Equal as numbers; zeros and denormals too."""
    np.testing.assert_array_equal(np.asarray(actual).astype(np.float64), expected)


# How floats become codes


@pytest.mark.parametrize("name", MATRICES)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("group", [16, 32, COLUMNS])
@pytest.mark.parametrize(("kind", "symmetric"), INTEGERS)
def test_integers(name, dtype, group, kind, symmetric):
    w, bits = cast(name, dtype), KINDS[kind].bits
    scale, zero = rounding.scales(w, kind, group, symmetric=symmetric, dtype=w.dtype)
    found = rounding.nearest(w, kind, group, scale, zero)
    wanted, wanted_zero = quantized.integer_scales(w, bits, group, symmetric, w.dtype)
    assert scale.dtype == w.dtype
    same(scale, wanted)
    assert (zero is None) == symmetric
    if zero is not None:
        same(zero, wanted_zero)
    codes = quantized.integer_codes(w, bits, group, wanted, wanted_zero)
    same(quantized.unsigned_codes(found), codes)
    same(packed.unsigned(found), codes)


@pytest.mark.parametrize("name", MATRICES)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("group", [16, 32])
def test_nf4(name, dtype, group):
    w = cast(name, dtype)
    scale, _ = rounding.scales(w, "nf4", group)
    wanted = quantized.nf4_scales(w, group)
    same(scale, wanted)
    found = rounding.nearest(w, "nf4", group, scale)
    same(quantized.unsigned_codes(found), quantized.nf4_codes(w, group, wanted))


@pytest.mark.parametrize("size", [1, 2, 255, 256, 257, 1000])
def test_doubled_scales(size):
    scale = np.abs(np.random.default_rng(size).normal(size=size)).astype(np.float32)
    codes, outer, offset = rounding.nested(scale)
    wanted = quantized.nested(scale.astype(np.float64))
    for found, expected in zip((codes, outer, offset), wanted, strict=True):
        same(found, expected)
    same(rounding.unnested(codes, outer, offset), quantized.unnested(*wanted))


def test_equal_scales_are_doubled_to_themselves():
    codes, outer, offset = rounding.nested(np.full((3, 5), 0.125, np.float32))
    same(rounding.unnested(codes, outer, offset), np.full(15, 0.125))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(
    "asked",
    [
        request.Quantization("int8", group_size=-1),
        request.Quantization("int4", group_size=32),
        request.Quantization("int4", group_size=32, symmetric=False),
        request.Quantization("nf4", group_size=32, double_quant=True),
    ],
    ids=str,
)
def test_a_request_is_the_specification(asked, dtype):
    w = cast("normal", dtype)
    found = asked.quantise("a", w)
    group = COLUMNS if asked.group_size == -1 else asked.group_size
    if asked.scheme == "nf4":
        scale, zero = quantized.nf4_scales(w, group), None
        codes = quantized.nf4_codes(w, group, scale)
        scale = quantized.unnested(*quantized.nested(scale)).reshape(scale.shape)
    else:
        bits = KINDS[asked.scheme].bits
        scale, zero = quantized.integer_scales(w, bits, group, asked.symmetric, w.dtype)
        codes = quantized.integer_codes(w, bits, group, scale, zero)
    same(found.scale, scale)
    same(quantized.unsigned_codes(found), codes)
    assert (found.zero is None) == (zero is None)


# What codes mean


def some_codes(kind, rows, columns, block, *, zero=False, dtype=np.float32):
    random = np.random.default_rng(rows * columns)
    numbers = random.integers(0, len(KINDS[kind].values), (rows, columns)).astype(np.uint8)
    if kind == "fp8":
        numbers = np.where((numbers & 0x7F) == 0x7F, np.uint8(3), numbers)
    down, across = -(-rows // block[0]), -(-columns // block[1])
    scale = random.uniform(0.001, 0.02, (down, across)).astype(dtype)
    zeros = random.integers(-8, 8, (down, across)).astype(np.int8) if zero else None
    return numbers, PackedMatrix(kind, packed.packed_codes(kind, numbers), scale, zeros, (rows, columns), block)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("zero", [False, True])
@pytest.mark.parametrize(
    ("shape", "block"),
    [((7, 33), (1, 33)), ((7, 96), (1, 32)), ((1, 1), (1, 1)), ((300, 16), (128, 16)), ((9, 70), (4, 32))],
)  # fmt: skip
def test_what_codes_mean(kind, dtype, zero, shape, block):
    numbers, matrix = some_codes(kind, *shape, block, zero=zero and kind.startswith("int"), dtype=DTYPES[dtype])
    same(quantized.unsigned_codes(matrix), numbers)
    same(packed.unsigned(matrix), numbers)
    same(packed.dequantised(matrix), quantized.dequantised(matrix).astype(np.float32))


@pytest.mark.parametrize("kind", KINDS)
def test_values(kind):
    np.testing.assert_array_equal(KINDS[kind].values.astype(np.float64), quantized.values(kind))


def test_values_of_doubled_scales():
    same(rounding.nested_map(), quantized.nested_values())


@pytest.mark.parametrize(("kind", "symmetric"), INTEGERS)
@pytest.mark.parametrize("columns", [16, 24, 33])
def test_words_of_a_file(kind, symmetric, columns):
    numbers, matrix = some_codes(kind, 11, columns, (1, columns), zero=not symmetric)
    bits = KINDS[kind].bits
    parts = storage.parts_of(matrix, "float32")
    same(quantized.codes_of_words(parts["weight_packed"], bits, columns), numbers)
    if matrix.zero is not None:
        stored = quantized.codes_of_words(parts["weight_zero_point"].T, bits, 11).T
        same(stored - 2 ** (bits - 1), matrix.zero)


def test_bytes_of_an_nf4_file():
    numbers, matrix = some_codes("nf4", 5, 64, (1, 16))
    parts = storage.parts_of(matrix, "float32")
    same(quantized.codes_of_pairs(parts["weight"], (5, 64)), numbers)
    same(parts["weight.absmax"].reshape(5, 4), matrix.scale)


def test_a_product_is_that_of_the_numbers():
    _, matrix = some_codes("int4", 7, 96, (1, 32), zero=True)
    x = np.random.default_rng(1).normal(size=(2, 3, 96))
    wanted = np.zeros((2, 3, 7))
    for r in range(2):
        for t in range(3):
            for o in range(7):
                for i in range(96):
                    code = int(matrix.codes[o, i // 2]) >> (4 if i % 2 else 0) & 15
                    number = code - 8 - int(matrix.zero[o, i // 32])
                    wanted[r, t, o] += x[r, t, i] * number * float(matrix.scale[o, i // 32])
    np.testing.assert_allclose(quantized.product(x, matrix), wanted, rtol=1e-13, atol=1e-14)


# Activations of eight bits


def test_rows_rounded_to_eight_bits():
    x = np.random.default_rng(0).normal(size=(3, 300)).astype(np.float32)
    x[1, 128:256] = 0
    x[2, 256:] *= np.float32(1e-42)
    found = quantized.rounded_rows(x)
    for row, rounded in zip(x, found, strict=True):
        for start in (0, 128, 256):
            block, got = row[start : start + 128], rounded[start : start + 128]
            scale = np.float32(np.abs(block).max() / np.float32(127))
            if scale < np.finfo(np.float32).tiny:
                assert not got.any()
                continue
            codes = got / np.float64(scale)
            assert set(np.unique(codes)) <= set(range(-127, 128))
            assert np.abs(codes).max() == 127
            assert np.abs(block - got).max() <= scale * 0.50001


def test_halves_of_activations_go_to_the_even_number():
    x = np.zeros((1, 128), np.float32)
    x[0, :6] = 127, 0.5, 1.5, 2.5, -0.5, -3.5
    assert quantized.rounded_rows(x)[0, :6].tolist() == [127, 0, 2, 2, 0, -4]


# What the libraries have made: tests/data/foreign/make_rounded.py

_FILE = SafetensorsFile(Path(__file__).parents[1] / "data" / "foreign" / "rounded.safetensors")
THEIRS = {name: _FILE.read_packed(name) for name in _FILE.tensors}
GIVEN = ["plain float32", "plain bfloat16", "plain float16", "odd float32", "odd bfloat16", "odd float16"]


@pytest.mark.parametrize("given", GIVEN)
def test_bitsandbytes_has_the_same_nf4(given):
    w = THEIRS[f"{given}/matrix"]
    scale, _ = rounding.scales(w, "nf4", 32)
    found = rounding.nearest(w, "nf4", 32, scale)
    parts = storage.parts_of(found, "float32")
    assert parts["weight"].tobytes() == THEIRS[f"{given} nf4/bytes"].tobytes()
    assert parts["weight.absmax"].tobytes() == THEIRS[f"{given} nf4/absmax"].tobytes()
    same(packed.dequantised(found).astype(w.dtype), THEIRS[f"{given} nf4/dense"].astype(np.float64))


def test_bitsandbytes_doubles_scales_to_the_same():
    assert rounding.nested_map().tobytes() == THEIRS["nested values"].tobytes()
    codes, outer, offset = rounding.nested(THEIRS["many/scales"])
    assert abs(offset - THEIRS["many/offset"]) <= 2 * np.spacing(offset)  # the order of a sum in float32
    found = rounding.unnested(codes, outer, offset)
    away = np.abs(found - THEIRS["many/nested"])
    # it looks codes up in a table of 2^16 entries, which holds no middle exactly
    assert (away > 4 * np.spacing(offset)).sum() <= 2
    error, theirs = (np.abs(each - THEIRS["many/scales"]) for each in (found, THEIRS["many/nested"]))
    assert error.mean() <= theirs.mean()


@pytest.mark.parametrize("given", GIVEN)
@pytest.mark.parametrize("group", [32, None])
@pytest.mark.parametrize(("kind", "symmetric"), INTEGERS)
def test_compressed_tensors_has_the_same_integers(given, group, kind, symmetric):
    w, bits = THEIRS[f"{given}/matrix"], KINDS[kind].bits
    name = f"{given} {kind} {group or 'row'} {'symmetric' if symmetric else 'asymmetric'}"
    scale, zero = rounding.scales(w, kind, group or w.shape[1], symmetric=symmetric, dtype=w.dtype)
    found = rounding.nearest(w, kind, group or w.shape[1], scale, zero)
    words = THEIRS[f"{name}/weight_packed"]
    if w.dtype == np.float32:
        parts = storage.parts_of(found, "float32")
        assert scale.tobytes() == THEIRS[f"{name}/weight_scale"].tobytes()
        same(packed.dequantised(found), THEIRS[f"{name}/dense"].astype(np.float64))
        blank = np.zeros(w.shape, bool)
        if not symmetric:  # it divides 0 by 0 for the zero point of a block of zeros
            blank = np.repeat(np.abs(w).reshape(*scale.shape, -1).max(-1) == 0, group or w.shape[1], axis=1)
        codes = (quantized.codes_of_words(given, bits, w.shape[1]) for given in (parts["weight_packed"], words))
        assert (np.equal(*codes) | blank).all()
    elif symmetric:
        assert scale.tobytes() == THEIRS[f"{name}/weight_scale"].tobytes()
        same(quantized.unsigned_codes(found) - 2 ** (bits - 1), THEIRS[f"{name}/codes"])


@pytest.mark.parametrize("zero", [False, True])
@pytest.mark.parametrize("block", [(1, 16), (1, 96), (8, 96), (4, 8), (1, 7)])
@pytest.mark.parametrize("kind", KINDS)
def test_a_part_is_what_the_whole_has_there(kind, block, zero):
    random, shape = np.random.default_rng(0), (8, 96)
    grid = -(-shape[0] // block[0]), -(-shape[1] // block[1])
    numbers = random.integers(0, 100 if kind == "fp8" else 2 ** KINDS[kind].bits, shape).astype(np.uint8)
    whole = PackedMatrix(
        kind, packed.packed_codes(kind, numbers), random.uniform(0.5, 2, grid).astype(np.float32),
        random.integers(-3, 4, grid).astype(np.int8) if zero else None, shape, block,
    )  # fmt: skip
    taken = 0
    for rows in (slice(0, 8), slice(0, 4), slice(4, 8), slice(3, 4)):
        for columns in (slice(0, 96), slice(48, 96), slice(16, 48), slice(14, 28), slice(84, 96), slice(3, 5)):
            step = block[1] if columns.start // block[1] != (columns.stop - 1) // block[1] else 1
            step = np.lcm(step, 1 if KINDS[kind].bits == 8 else 2)
            high = block[0] if rows.start // block[0] != (rows.stop - 1) // block[0] else 1
            fits = [x % n == 0 or x == size for n, cut, size in ((step, columns, 96), (high, rows, 8))
                    for x in (cut.start, cut.stop)]  # fmt: skip
            if not all(fits):
                with pytest.raises(MeshError, match="matrix: (rows|columns) .* must begin and end at a multiple of"):
                    packed.part_of(whole, (rows, columns))
                continue
            part, taken = packed.part_of(whole, (rows, columns)), taken + 1
            assert part.codes.shape[0] == part.shape[0] == rows.stop - rows.start
            assert part.nbytes <= whole.nbytes
            assert np.array_equal(packed.dequantised(part), packed.dequantised(whole)[rows, columns])
    assert taken >= 4


@pytest.mark.parametrize("block", [(1, 16), (1, 96), (4, 8), (8, 96)])
@pytest.mark.parametrize("kind", KINDS)
def test_parts_make_the_whole(kind, block):
    random, shape = np.random.default_rng(0), (8, 96)
    grid = -(-shape[0] // block[0]), -(-shape[1] // block[1])
    numbers = random.integers(0, 100 if kind == "fp8" else 2 ** KINDS[kind].bits, shape).astype(np.uint8)
    scale, zero = random.uniform(0.5, 2, grid).astype(np.float32), random.integers(-3, 4, grid).astype(np.int8)
    whole = PackedMatrix(kind, packed.packed_codes(kind, numbers), scale, zero, shape, block)
    for rows, columns in ((2, 1), (1, 2), (2, 3), (1, 1)):
        cuts = [
            (slice(8 // rows * i, 8 // rows * (i + 1)), slice(96 // columns * j, 96 // columns * (j + 1)))
            for i in range(rows) for j in range(columns)
        ]  # fmt: skip
        parts = [(cut, packed.part_of(whole, cut)) for cut in [*cuts, cuts[0]]]
        found = packed.whole_of(parts, shape, block)
        assert (found.kind, found.shape, found.block) == (whole.kind, shape, block)
        for name in ("codes", "scale", "zero"):
            assert getattr(found, name).tobytes() == getattr(whole, name).tobytes(), name
