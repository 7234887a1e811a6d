"""The kernels in C: the product of the dequantised matrix in every framework, or a reason why there are none."""

from __future__ import annotations

import importlib
import os
import subprocess
import sys
import threading
from pathlib import Path

import ml_dtypes
import numpy as np
import pytest

from conformance import adapters
from mistral_core.errors import InputError, MissingExtraError
from mistral_core.native import build, library
from mistral_core.quantization import matrix as matrices
from mistral_core.quantization.blocks import blocks
from mistral_core.quantization.matrix import KINDS, PackedMatrix, packed_codes, whole_block
from mistral_core.reference import quantized

needs_compiler = pytest.mark.skipif(not library.available(), reason=f"no kernels in C: {library.why()}")
ROWS = (1, 2, 3, 5, 8, 17)
SHAPES = ((5, 7), (37, 176), (33, 1030), (18, 513))
BLOCKS = ((1, 16), (1, 32), (1, 64), (1, 128), (1, 256), (1, None), (1, 24), (3, 48), (128, 128), (None, None))
EPS = float(np.finfo(np.float32).eps)
SIZES = 2.0
"""Steps of float32 that a sum may lose, of the sum of its parts' sizes; 1.5 was the most that was seen."""


def random_matrix(
    kind: str, shape: tuple[int, int], block: tuple[int | None, int | None], *, zero: bool = False, seed: int = 0
) -> PackedMatrix:
    """Every code of a kind but those that are no number, and scales of one of the three dtypes."""
    rng = np.random.default_rng(seed)
    codes = rng.integers(0, 1 << KINDS[kind].bits, shape).astype(np.uint8)
    if kind == "fp8":
        codes[codes & 127 == 127] = 1
    whole = whole_block(block, shape)
    grid = blocks(shape, whole)
    scale = rng.uniform(0.5, 1.5, grid).astype([np.float32, np.float16, ml_dtypes.bfloat16][seed % 3])
    zeros = rng.integers(-8, 8, grid).astype(np.int8) if zero else None
    return PackedMatrix(kind, np.ascontiguousarray(packed_codes(kind, codes)), scale, zeros, shape, whole)


def assert_product(found: np.ndarray, x: np.ndarray, weight: np.ndarray, *what: object) -> None:
    """Within some steps of float32, of the sizes of what was added."""
    x, weight = x.astype(np.float64), weight.astype(np.float64)
    most = SIZES * EPS * (np.abs(x) @ np.abs(weight.T))
    assert (np.abs(found.astype(np.float64) - x @ weight.T) <= most).all(), what


@pytest.fixture
def anew(monkeypatch, tmp_path):
    """Nothing has been tried, and the cache is empty."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.delenv("CC", raising=False)
    for function in (build._tried, library._loaded):
        function.cache_clear()
    yield tmp_path / "cache"
    for function in (build._tried, library._loaded):
        function.cache_clear()


NATIVE = build.PROCESSORS
PROCESSORS = {
    "this one": ((), NATIVE),
    "another maker's": (("-O1", f"-DIS_INTEL={int(not build.is_intel())}"), NATIVE),
    "with AVX2": (("-O1", "-mno-avx512f"), NATIVE),
    "any": (("-O1",), ((),)),
}
"""Flags of the compiler, and how it is told of the processor: this one, one that Intel did not make or did, and those
that can do less, compiled in half the time."""


@pytest.fixture(scope="module", params=PROCESSORS)
def processor(request):
    """Kernels as they are on this processor, or on another one."""
    cached, before = (build._tried, library._loaded), (build.FLAGS, build.PROCESSORS)
    flags, processors = PROCESSORS[request.param]
    if "-mno-avx512f" in flags and "avx512f" not in build._facts().get("flags", "").split():
        pytest.skip("this processor has no AVX-512")
    build.FLAGS, build.PROCESSORS = (*build.FLAGS, *flags), processors
    for function in cached:
        function.cache_clear()
    yield
    build.FLAGS, build.PROCESSORS = before
    for function in cached:
        function.cache_clear()


# What they compute


@needs_compiler
@pytest.mark.parametrize("zero", [False, True], ids=["symmetric", "zero points"])
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.usefixtures("processor")
def test_a_product_is_that_of_the_dequantised_matrix(kind, zero):
    rng = np.random.default_rng(0)
    for seed, (shape, block) in enumerate((shape, block) for shape in SHAPES for block in BLOCKS):
        matrix = random_matrix(kind, shape, block, zero=zero, seed=seed)
        weight = matrices.dequantised(matrix)
        assert np.array_equal(library.dequantised(matrix), weight), (shape, block)
        rounded = library.dequantised(matrix, ml_dtypes.bfloat16)
        assert np.array_equal(rounded, weight.astype(ml_dtypes.bfloat16)), (shape, block)
        for rows in ROWS:
            x = rng.normal(size=(rows, shape[1])).astype(np.float32)
            assert_product(library.product(x, matrix), x, weight, shape, block, rows)
            short = x.astype(ml_dtypes.bfloat16).astype(np.float32)  # there are kernels for such numbers alone
            assert_product(library.product(short, matrix), short, weight, shape, block, rows)


@needs_compiler
@pytest.mark.parametrize("dtype", [ml_dtypes.bfloat16, np.float32], ids=["bfloat16", "float32"])
@pytest.mark.parametrize("zero", [False, True], ids=["symmetric", "zero points"])
@pytest.mark.parametrize("kind", ["int8", "int4"])
@pytest.mark.usefixtures("processor")
def test_small_numbers_beside_a_large_one_count(kind, zero, dtype):
    """Where x is digits to one scale in a block, what is lost is 2^-22 of the largest of bfloat16, 2^-30 of float32.

    The large ones meet weights of 0, so that the sum is of the small ones alone.
    """
    rng = np.random.default_rng(0)
    for power, block in ((0, (1, None)), (12, (1, 128)), (12, (1, 16)), (20, (1, None))):
        matrix = random_matrix(kind, (37, 512), block, zero=zero)
        codes, means_zero = matrices.unsigned(matrix), np.full((37, 512), KINDS[kind].values.size // 2)
        if zero:
            means_zero += np.repeat(matrix.zero, matrix.block[1], axis=1)
        codes[:, ::128] = means_zero[:, ::128]
        matrix = matrix._replace(codes=np.ascontiguousarray(packed_codes(kind, codes)))
        weight = matrices.dequantised(matrix).astype(np.float64)
        x = rng.normal(size=(3, 512)).astype(dtype)
        x[:, ::128] = 2.0**power
        found = library.product(x.astype(np.float32), matrix).astype(np.float64)
        exact = x.astype(np.float64)
        lost = 2.0 ** (power - (30 if dtype is np.float32 else 22))
        most = SIZES * EPS * (np.abs(exact) @ np.abs(weight.T)) + lost * np.abs(weight).sum(1)
        assert (np.abs(found - exact @ weight.T) <= most).all(), (power, block)


@needs_compiler
@pytest.mark.parametrize("zero", [False, True], ids=["symmetric", "zero points"])
@pytest.mark.parametrize("kind", ["int8", "int4"])
@pytest.mark.usefixtures("processor")
def test_activations_are_rounded_in_blocks_of_128(kind, zero):
    rng = np.random.default_rng(0)
    for seed, (shape, block) in enumerate((shape, block) for shape in SHAPES for block in BLOCKS):
        matrix = random_matrix(kind, shape, block, zero=zero, seed=seed)
        for rows in ROWS:
            x = rng.normal(size=(rows, shape[1])).astype(np.float32)
            x[-1, :128] = 0
            near = quantized.rounded_rows(x)
            assert np.abs(near - x).max() <= np.abs(x).max() / 127 * 0.51
            found = library.product(x, matrix, activations="int8")
            assert_product(found, near, matrices.dequantised(matrix), shape, block, rows)


@needs_compiler
@pytest.mark.parametrize("dtype", [np.float32, ml_dtypes.bfloat16], ids=["float32", "bfloat16"])
@pytest.mark.usefixtures("processor")
def test_a_product_with_floats_is_a_sum_in_float32(dtype):
    rng = np.random.default_rng(0)
    number = library.TYPES[np.dtype(dtype).name]
    for (height, width), rows in ((shape, rows) for shape in (*SHAPES, (64, 31), (3, 1)) for rows in ROWS):
        w, x = rng.normal(size=(height, width)).astype(dtype), rng.normal(size=(rows, width)).astype(np.float32)
        short = x.astype(ml_dtypes.bfloat16).astype(np.float32)  # there are kernels for such numbers alone
        for given in (x, short):
            found = np.full((rows, height), np.nan, np.float32)
            code = library.kernels().product(
                library.FLOATS, w.ctypes.data, None, number, None, height, width, 1, width, given.ctypes.data, 0,
                found.ctypes.data, 0, rows, 0, 2,
            )  # fmt: skip
            assert code == 0
            assert_product(found, given, w.astype(np.float32), height, width, rows)


@needs_compiler
@pytest.mark.parametrize("rows", [1, 3])
def test_bfloat16_is_rounded_once_at_the_end(rows):
    matrix = random_matrix("int4", (37, 176), (1, 16))
    x = np.random.default_rng(0).normal(size=(rows, 176)).astype(ml_dtypes.bfloat16)
    wide = library.product(x.astype(np.float32), matrix)
    assert np.array_equal(library.product(x, matrix), wide.astype(ml_dtypes.bfloat16))


@needs_compiler
@pytest.mark.parametrize("rows", [1, 3])
@pytest.mark.parametrize("activations", [None, "int8"])
@pytest.mark.usefixtures("processor")
def test_what_is_no_number_stays_none(rows, activations):
    matrix = random_matrix("int8", (20, 300), (1, 64))
    for value in (np.nan, np.inf, -np.inf):
        x = np.ones((rows, 300), np.float32)
        x[0, 299] = value
        with np.errstate(invalid="ignore"):
            wanted = np.isfinite(x.astype(np.float64) @ matrices.dequantised(matrix).T)
        found = np.isfinite(library.product(x, matrix, activations=activations))
        assert not found[0][~wanted[0]].any()
        assert found[1:].all()
    fp8 = random_matrix("fp8", (20, 300), (128, 128))
    fp8.codes[3, 5], fp8.codes[4, 299] = 0x7F, 0xFF
    found = library.product(np.ones((rows, 300), np.float32), fp8)
    assert np.isnan(found[:, 3:5]).all()
    assert np.isfinite(np.delete(found, [3, 4], axis=1)).all()
    assert np.array_equal(library.dequantised(fp8), matrices.dequantised(fp8), equal_nan=True)


@needs_compiler
@pytest.mark.parametrize("count", [0, 7, 64, 513, 65536, 65601, 200003])
def test_every_word_of_memory_is_read_once(count):
    words = np.random.default_rng(count).integers(0, 1 << 60, count).astype(np.uint64)
    assert library.kernels().read(words.ctypes.data, count, 2) == int(words.sum(dtype=np.uint64))


@needs_compiler
def test_empty_arrays_have_empty_products():
    matrix = random_matrix("int8", (5, 64), (1, 32))
    assert library.product(np.zeros((0, 64), np.float32), matrix).shape == (0, 5)
    assert library.product(np.zeros((2, 0, 64), np.float32), matrix).shape == (2, 0, 5)


@needs_compiler
def test_many_threads_call_at_once():
    matrix = random_matrix("int4", (512, 1024), (1, 128))
    x = np.random.default_rng(0).normal(size=(2, 1024)).astype(np.float32)
    wanted, found = library.product(x, matrix, threads=1), []

    def call() -> None:
        found.extend(library.product(x, matrix, threads=4) for _ in range(50))

    threads = [threading.Thread(target=call) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(found) == 200
    assert all(np.array_equal(each, wanted) for each in found)


FORKED = """
import os, sys
import numpy as np
from mistral_core.native import library
from mistral_core.quantization.matrix import PackedMatrix

rng = np.random.default_rng(0)
scale = np.ones((512, 1), np.float32)
matrix = PackedMatrix("int8", rng.integers(-128, 128, (512, 1024), np.int8), scale, None, (512, 1024), (1, 1024))
x = np.ones((1, 1024), np.float32)
wanted = library.product(x, matrix, threads=3)
child = os.fork()
if child == 0:
    os._exit(0 if np.array_equal(library.product(x, matrix, threads=3), wanted) else 3)
print(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]), np.array_equal(library.product(x, matrix, threads=3), wanted))
"""


@needs_compiler
def test_a_forked_process_has_threads_of_its_own():
    done = subprocess.run([sys.executable, "-c", FORKED], capture_output=True, text=True, timeout=600)
    assert done.stdout == "0 True\n", done.stderr


@needs_compiler
def test_wrong_arrays_are_told():
    matrix = random_matrix("int4", (5, 64), (1, 32))
    x = np.ones((1, 64), np.float32)
    for wrong, message in (
        (matrix._replace(codes=matrix.codes[:4]), r"codes must be \[5, 32\] for int4 of \[5, 64\], got \[4, 32\]"),
        (matrix._replace(scale=matrix.scale[:, :1]), r"scale and zero must be \[5, 2\]"),
        (matrix._replace(kind="int5"), "kind must be one of int8, int4, nf4, fp8, got 'int5'"),
        (matrix._replace(scale=matrix.scale.astype(np.float64)), "scale must be of float32, bfloat16, float16"),
    ):
        with pytest.raises(InputError, match=message):
            library.product(x, wrong)
    with pytest.raises(InputError, match=r"x must be float32 or bfloat16 \[..., 64\], got float32 \[1, 63\]"):
        library.product(x[:, 1:], matrix)
    with pytest.raises(InputError, match="activations are rounded for int8 and int4 only, got nf4"):
        library.product(x, matrix._replace(kind="nf4"), activations="int8")


# In the frameworks


def compiled(name: str, function, plain: bool):
    """A function as users compile it in a framework."""
    if plain:
        return function
    if name == "torch":
        import torch

        return torch.no_grad()(torch.compile(function))
    if name == "flax":
        import jax

        return jax.jit(function)
    import tensorflow as tf

    return tf.function(function)


def exact(name: str, array: np.ndarray):
    """An array with its bits in a framework."""
    if name == "torch":
        import torch

        if array.dtype == ml_dtypes.bfloat16:
            return torch.from_numpy(array.view(np.int16)).view(torch.bfloat16)
        return torch.from_numpy(array)
    if name == "flax":
        import jax.numpy as jnp

        return jnp.asarray(array)
    import tensorflow as tf

    return tf.constant(array)


@needs_compiler
@pytest.mark.parametrize("plain", [True, False], ids=["eager", "compiled"])
def test_a_framework_has_the_kernels(backend, plain):
    name = backend.__name__.removeprefix("mistral_")
    native = importlib.import_module(f"{backend.__name__}.native")
    if not native.available():
        pytest.skip(f"no kernels in C for {name}: {native.why()}")
    adapter = adapters.get(name)
    for kind in KINDS:
        for zero in (False, True) if plain else (kind == "int4",):
            matrix = random_matrix(kind, (37, 176), (1, 16), zero=zero, seed=2)
            weight = matrices.dequantised(matrix)
            given = [exact(name, array) for array in matrix[1:4] if array is not None]
            like = {"kind": kind, "shape": matrix.shape, "block": matrix.block}

            def both(x, *arrays, like=like):
                return native.product(x, *arrays, **like), native.dequantised(*arrays, **like)

            x = np.random.default_rng(0).normal(size=(2, 3, 176)).astype(np.float32)
            product, matrix_again = compiled(name, both, plain)(exact(name, x), *given)
            assert np.array_equal(adapter.numpy(matrix_again), weight)
            assert_product(adapter.numpy(product), x, weight, kind)
            assert np.array_equal(adapter.numpy(product), library.product(x, matrix))
            if not plain:
                continue
            half = native.product(exact(name, x.astype(ml_dtypes.bfloat16)), *given, **like)
            wanted = library.product(x.astype(ml_dtypes.bfloat16), matrix)
            assert np.array_equal(adapter.numpy(half), wanted)
            if kind in ("int8", "int4"):
                rounded = native.product(exact(name, x), *given, activations="int8", **like)
                assert np.array_equal(adapter.numpy(rounded), library.product(x, matrix, activations="int8"))
    with pytest.raises(InputError, match="codes must be"):
        native.product(exact(name, x), given[0][:3], *given[1:], **like)
    with pytest.raises(InputError, match="x must be"):
        native.product(exact(name, x[..., :3]), *given, **like)


@needs_compiler
def test_jax_maps_and_tensorflow_knows_shapes(backend):
    name = backend.__name__.removeprefix("mistral_")
    native = importlib.import_module(f"{backend.__name__}.native")
    matrix = random_matrix("int8", (20, 48), (1, 16))
    given = [exact(name, array) for array in matrix[1:3]]
    like = {"kind": "int8", "shape": matrix.shape, "block": matrix.block}
    x = np.random.default_rng(0).normal(size=(3, 48)).astype(np.float32)
    if name == "flax":
        import jax

        found = jax.vmap(lambda row: native.product(row, *given, **like))(x)
        assert_product(np.asarray(found), x, matrices.dequantised(matrix))
    elif name == "tf":
        import tensorflow as tf

        traced = tf.function(lambda x: native.product(x, *given, **like))
        shapes = traced.get_concrete_function(tf.TensorSpec([None, 1, 48])).output_shapes
        assert shapes.as_list() == [None, 1, 20]
    else:
        import torch

        with pytest.raises(InputError, match="x must need no gradient"):
            native.product(torch.ones(1, 48, requires_grad=True), *given, **like)


# How they are made


def test_without_a_compiler_there_is_a_reason(anew, monkeypatch, tmp_path):
    monkeypatch.setenv("PATH", str(tmp_path))
    assert build.library("rows.c") is None
    assert build.why("rows.c") == "no C compiler (cc, gcc, clang) is there; install one to have the kernels in C."
    assert not library.available()
    with pytest.raises(MissingExtraError, match="no C compiler"):
        library.product(np.ones((1, 64), np.float32), random_matrix("int8", (5, 64), (1, 32)))
    monkeypatch.setenv("CC", "no-such-compiler -m64")
    build._tried.cache_clear()
    assert "CC is no-such-compiler, which is not there" in build.why("rows.c")


def test_they_can_be_switched_off(anew, monkeypatch):
    monkeypatch.setenv("MISTRAL_NATIVE", "off")
    assert not library.available()
    assert library.why() == "MISTRAL_NATIVE is off; unset it to have the kernels in C."
    assert not anew.exists()


def program(path: Path, text: str) -> Path:
    """A shell script in a compiler's place."""
    path.write_text(f"#!/bin/sh\n{text}\n")
    path.chmod(0o755)
    return path


def test_a_compiler_that_fails_is_asked_once(anew, monkeypatch, tmp_path):
    calls = tmp_path / "calls"
    failing = program(tmp_path / "failing", f"echo called >> {calls}; echo 'x.c:1: error: no such thing' >&2; exit 1")
    monkeypatch.setenv("CC", str(failing))
    assert not library.available()
    assert library.why() == f"{failing} does not compile rows.c: x.c:1: error: no such thing"
    count = len(calls.read_text().splitlines())
    assert count == len(build.PROCESSORS)
    assert not library.available()
    assert len(calls.read_text().splitlines()) == count
    assert not list(anew.rglob("*.so"))


def test_a_compiler_that_hangs_is_ended(anew, monkeypatch, tmp_path):
    monkeypatch.setenv("CC", str(program(tmp_path / "hanging", "exec sleep 600")))
    monkeypatch.setattr(build, "SECONDS", 0.05)
    assert "it took more than 0.05 seconds" in build.why("rows.c")


def test_what_is_no_library_is_no_kernel(anew, monkeypatch, tmp_path):
    writing = program(tmp_path / "writing", 'while [ "$1" != -o ]; do shift; done; echo nothing > "$2"')
    monkeypatch.setenv("CC", str(writing))
    assert not library.available()
    assert "cannot be loaded" in library.why()


def test_a_cache_of_somebody_else_is_refused(anew, monkeypatch, tmp_path):
    monkeypatch.setenv("CC", str(program(tmp_path / "never", "exit 1")))
    monkeypatch.setattr(os, "geteuid", lambda: 12345)
    directory = anew / "mistral-frameworks"
    directory.mkdir(parents=True)
    assert f"{directory} must be this user's own" in build.why("rows.c")


@pytest.mark.parametrize("kind", ["open", "link"])
def test_a_cache_that_others_may_write_is_refused(anew, monkeypatch, tmp_path, kind):
    monkeypatch.setenv("CC", str(program(tmp_path / "never", "exit 1")))
    anew.mkdir()
    if kind == "open":
        (anew / "mistral-frameworks").mkdir()
        (anew / "mistral-frameworks").chmod(0o777)
        assert "must be writable for its owner only, got mode 777" in build.why("rows.c")
    else:
        (tmp_path / "elsewhere").mkdir()
        (anew / "mistral-frameworks").symlink_to(tmp_path / "elsewhere")
        assert "must be no link" in build.why("rows.c")


SMALL = """
import sys
from mistral_core.native import build
build.PROCESSORS = ((),)
build.FLAGS = ("-O0", *build.FLAGS[1:])
print(build.library("rows.c"), build.why("rows.c"))
"""


@needs_compiler
def test_two_processes_make_one_library(anew):
    environment = {**os.environ, "PYTHONPATH": str(Path(__file__).parents[2])}
    started = [
        subprocess.Popen([sys.executable, "-c", SMALL], stdout=subprocess.PIPE, text=True, env=environment)
        for _ in "12"
    ]
    said = {process.communicate(timeout=600)[0] for process in started}
    made = list(anew.rglob("*.so"))
    assert said == {f"{made[0]} \n"}
    assert len(made) == 1
    assert [entry.name for entry in made[0].parent.iterdir()] == ["rows.so"]
    assert {path.stat().st_mode & 0o777 for path in (made[0], *made[0].parents[:3])} == {0o700}


@needs_compiler
def test_a_library_is_found_again_and_a_new_source_is_not_the_old_one(anew, monkeypatch):
    calls = []

    def compiled_as(text, compiler, flags, made):
        calls.append(text)
        made.write_bytes(b"library")
        made.chmod(0o700)

    monkeypatch.setattr(build, "_compile", compiled_as)
    first = build.library("rows.c")
    build._tried.cache_clear()
    assert build.library("rows.c") == first
    assert len(calls) == 1
    build._tried.cache_clear()
    assert build.library("rows.c", flags=("-DOTHER",)) != first
    assert build.library("xla.c") not in (first, None)
    assert len(calls) == 3


@needs_compiler
@pytest.mark.parametrize(
    "flags", [("-O2",), ("-O3", "-march=native"), ("-O3", "-march=native", "-mno-avx512f")], ids=" ".join
)
def test_it_is_compiled_without_a_warning(flags):
    source = Path(build.__file__).with_name("rows.c")
    command = [*build._compiler(), "-std=gnu11", *flags, "-Wall", "-Wextra", "-Werror", "-fsyntax-only", str(source)]
    assert subprocess.run(command, capture_output=True, text=True, timeout=600).stderr == ""
