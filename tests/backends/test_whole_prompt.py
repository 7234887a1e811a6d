"""Prompts and products by tiles: those of the framework, in bfloat16 on processors that have none too."""

from __future__ import annotations

import ctypes
import importlib
import itertools
from types import SimpleNamespace

import ml_dtypes
import numpy as np
import pytest
from test_native import random_matrix
from test_whole_step import EPS, NEW, counted, model_of, texts

from conformance.weights import random_parameters
from mistral_core.config.presets import TINY
from mistral_core.errors import InputError
from mistral_core.native import attention, build, library, whole_step
from mistral_core.quantization import matrix as matrices

BFLOAT16 = ml_dtypes.bfloat16
SHAPES = ((2, 64, 32), (3, 96, 160), (16, 2080, 64), (17, 64, 96), (31, 2112, 64), (300, 2176, 288), (530, 64, 160))
"""R, I and O: few rows and many, columns that are taken at once and not, parts that are no whole block."""
STEPS_OF_ROUNDING = {"float32": 24, "bfloat16": 8}
"""The most that logits may differ, in eps of the dtype of the largest: 14.1 and 4.2 were seen on an Intel Xeon."""
SIZES = 4.0
"""Steps of float32 that a sum may lose, of the sum of its parts' sizes."""
GIVEN = {"max_new_tokens": 1, "eos_token_id": None, "return_dict_in_generate": True, "output_logits": True}
WHOLE = TINY.replace(
    hidden_size=128, intermediate_size=160, num_attention_heads=6, num_key_value_heads=2, head_dim=32, vocab_size=96,
    num_hidden_layers=2, sliding_window=None,
)  # fmt: skip
"""All sizes are whole tiles, and a block of queries ends within a token's heads."""
CONFIGS = {
    "all keys": WHOLE,
    "window": WHOLE.replace(sliding_window=40),
    "mixed": WHOLE.replace(sliding_window=7, layer_types=("full_attention", "sliding_attention")),
    "wide heads": WHOLE.replace(head_dim=64, num_attention_heads=1, num_key_value_heads=1, tie_word_embeddings=True),
    "a query that ends before its block": WHOLE.replace(
        head_dim=64, num_attention_heads=1, num_key_value_heads=1, sliding_window=240
    ),
    "scaled queries": WHOLE.replace(
        model_type="ministral3", rope_scaling={
            "rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 4, "llama_4_scaling_beta": 0.1,
        },
    ),
}  # fmt: skip


OWN = "bfloat16" if "amx_bf16" in build._facts().get("flags", "") else "bfloat16 emulated"
"""How bfloat16 is multiplied here: a framework asks C for the same whichever it is."""


@pytest.fixture(scope="module", params=["float32", "bfloat16", "bfloat16 emulated"])
def tiles(request):
    """The dtype of kernels that multiply tiles: by vectors, by the processor's own, or by emulated ones."""
    flags, (dtype, *emulated) = build.FLAGS, request.param.split()
    cached = (build._tried, library._loaded, whole_step._step, whole_step.prompts, attention._gradients)
    if emulated:
        build.FLAGS = (*flags, "-DEMULATED_TILES")
        for each in cached:
            each.cache_clear()
    there = whole_step.prompts(whole_step.TYPES[dtype]) is not None
    if there:
        yield dtype
    build.FLAGS = flags
    if emulated:
        for each in cached:
            each.cache_clear()
    if not there:
        pytest.skip("tiles need a compiler and AVX-512, and those of the processor a processor that has them")


@pytest.fixture
def prompts(tiles, monkeypatch):
    """The shapes of prompts that C computes from now on, in chunks of some tokens."""
    seen, of_c = [], whole_step.WholeStep.prompt

    def prompt(self, ids_BT, *others):
        seen.append(ids_BT.shape)
        return of_c(self, ids_BT, *others)

    monkeypatch.setattr(whole_step.WholeStep, "prompt", prompt)
    for chunk in ("CHUNK", "LARGE_CHUNK"):
        monkeypatch.setattr(whole_step, chunk, 48)
    return seen


def product(x, weight, dtype, *, packed=None):
    """x w^T by C, of floats or of a packed matrix."""
    y, types = np.zeros((len(x), len(weight)), dtype), library.TYPES
    if packed is None:
        number = types[weight.dtype.name]
        given = (library.FLOATS, weight.ctypes.data, None, number, None, *weight.shape, 1, weight.shape[1])
    else:
        kept = library._arrays(packed)
        given = (library.KINDS[packed.kind], *kept[1], *weight.shape, *packed.block)
    code = library.kernels().product(
        *given, x.ctypes.data, types[x.dtype.name], y.ctypes.data, types[y.dtype.name], len(x), 0, 0
    )
    assert code == 0
    return y.astype(np.float64)


def assert_near(found, x, weight, steps=0.0):
    """As exact as sums in float32, and rounded once more by so many steps of the result."""
    x, weight = x.astype(np.float64), weight.astype(np.float64)
    exact, sizes = x @ weight.T, np.abs(x) @ np.abs(weight.T)
    assert (np.abs(found - exact) <= SIZES * EPS["float32"] * sizes + steps * np.abs(exact)).all()


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_a_product_by_tiles_is_the_product(tiles, shape):
    rows, columns, out = shape
    rng = np.random.default_rng(0)
    x, weight = (rng.standard_normal((size, columns)).astype(tiles) for size in (rows, out))
    for given in (x, x.astype(np.float32), x.astype(BFLOAT16)):
        assert_near(product(given, weight, np.float32), given, weight)
        assert_near(product(given, weight, BFLOAT16), given, weight, steps=2.0**-8)


def test_numbers_that_are_no_bfloat16_are_multiplied_as_they_are(tiles):
    rng = np.random.default_rng(0)
    x, weight = rng.standard_normal((40, 64)).astype(np.float32), rng.standard_normal((32, 64)).astype(tiles)
    assert_near(product(x, weight, np.float32), x, weight)


def test_what_is_no_number_spoils_its_row_alone(tiles):
    x, weight = np.ones((20, 64), tiles), np.ones((32, 64), tiles)
    x[3, 5], x[7, 9] = np.nan, np.inf
    found = product(x, weight, tiles)
    assert np.isnan(found[3]).all()
    assert np.isposinf(found[7]).all()
    assert (np.delete(found, (3, 7), axis=0) == 64).all()


@pytest.mark.parametrize("kind", matrices.KINDS)
def test_of_packed_matrices_too(tiles, kind):
    """Many rows meet the numbers that a framework would make of the matrix, and few the codes."""
    for seed, block in enumerate(((1, 32), (1, None), (16, 64))):
        packed = random_matrix(kind, (96, 2112), block, zero=seed == 0 and kind != "fp8", seed=seed)
        weight = matrices.dequantised(packed).astype(tiles)
        x = np.random.default_rng(seed).standard_normal((35, 2112)).astype(tiles)
        assert_near(product(x, weight, np.float32, packed=packed), x, weight)


def ragged(rows, columns):
    """Ids, and a mask of which rows begin later and one has a hole."""
    ids = np.random.default_rng(1).integers(3, 90, (rows, columns))
    mask = np.ones_like(ids)
    for row in range(1, rows):
        mask[row, : row * columns // (rows + 1)] = 0
    mask[0, columns // 2] = 0
    return {"input_ids": ids, "attention_mask": mask}


def floats(x):
    """An array of any framework."""
    return np.asarray(x.float() if hasattr(x, "float") else x, np.float32)


def spoken(model, compile, **options):
    """The logits of the first new token, and the keys and values that are kept."""
    out = model.generate(
        compile=compile,
        max_new_tokens=1,
        eos_token_id=None,
        output_logits=True,
        return_dict_in_generate=True,
        **options,
    )
    return floats(out.logits[0]), [floats(x) for x in (*out.past_key_values.keys, *out.past_key_values.values)]


def assert_same(dtype, model, prompts, **options):
    """As the framework's own operations have it, in logits and in the cache."""
    most = STEPS_OF_ROUNDING[dtype] * EPS[dtype]
    logits, kept = spoken(model, "auto", **options)
    assert prompts
    wanted, held = spoken(model, "off", **options)
    assert np.abs(logits - wanted).max() <= most * np.abs(wanted).max()
    for (row, tokens), layer in itertools.product(enumerate(lengths(options)), range(len(kept))):
        slots = kept[layer].shape[1]
        window = model.config.layer_windows[layer % (len(kept) // 2)] or tokens
        seen = np.arange(max(tokens - window, 0), tokens) % slots
        found, array = kept[layer][row, seen], held[layer][row, seen]
        assert np.abs(found - array).max() <= most * np.abs(array).max()


def lengths(given):
    """How many tokens each row has."""
    return given["attention_mask"].sum(1)


@pytest.mark.others(tiles=("float32", OWN), name=("all keys", "mixed", "scaled queries"), rows=(3,))
@pytest.mark.parametrize("name", CONFIGS)
@pytest.mark.parametrize("rows", [1, 3])
def test_a_prompt_is_the_framework_s(backend, tiles, prompts, name, rows):
    model = model_of(backend, CONFIGS[name], tiles)
    for columns in (21, 300):
        prompts.clear()
        assert_same(tiles, model, prompts, **ragged(rows, columns))


@pytest.mark.others(tiles=("float32", OWN))
def test_of_more_rows_than_a_chunk_has_tokens(backend, tiles, prompts):
    """Every chunk has a column."""
    ids = np.random.default_rng(3).integers(3, 90, (60, 2))
    model = model_of(backend, CONFIGS["all keys"], tiles)
    assert_same(tiles, model, prompts, input_ids=ids, attention_mask=np.ones_like(ids))
    assert prompts == [(60, 2)]


@pytest.mark.others(tiles=("float32", OWN))
def test_what_comes_after_a_past_sees_it(backend, tiles, prompts):
    """The second prompt is longer than the ring, whose tokens its first ones still see."""
    model = model_of(backend, CONFIGS["window"], tiles)
    ids = np.random.default_rng(2).integers(3, 90, (1, 160))
    found = []
    for compile in ("auto", "off"):
        first = model.generate(ids[:, :90], compile=compile, **GIVEN)
        longer = np.concatenate([np.asarray(first.sequences)[:, :90], ids[:, 90:]], axis=1)
        out = model.generate(longer, past_key_values=first, compile=compile, **GIVEN)
        found.append(floats(out.logits[0]))
    assert prompts == [(1, 90), (1, 70)]
    assert np.abs(found[0] - found[1]).max() <= STEPS_OF_ROUNDING[tiles] * EPS[tiles] * np.abs(found[1]).max()


@pytest.mark.others(tiles=("float32", OWN), scheme=("int4",))
@pytest.mark.parametrize("scheme", ["int8", "int4", "nf4"])
def test_of_packed_weights(backend, tiles, prompts, scheme):
    model = backend.quantize(model_of(backend, CONFIGS["all keys"], tiles), scheme)
    assert_same(tiles, model, prompts, **ragged(2, 70))


@pytest.mark.others(tiles=("float32", OWN))
def test_other_models_caches_and_dtypes_are_the_framework_s(backend, tiles, prompts):
    ids = ragged(1, 40)
    for config in (TINY, WHOLE.replace(head_dim=16), WHOLE.replace(hidden_size=144, head_dim=64)):
        spoken(model_of(backend, config, tiles), "auto", **ids)
    spoken(model_of(backend, WHOLE, "float16"), "auto", **ids)
    spoken(model_of(backend, WHOLE, tiles), "auto", cache_dtype="int8", **ids)
    assert not prompts


@pytest.mark.others(tiles=("float32", OWN))
@pytest.mark.parametrize("config", [WHOLE, TINY], ids=["tiles", "other sizes"])
def test_a_token_of_each_of_many_rows_is_a_step_of_c(backend, tiles, monkeypatch, config):
    model, steps = model_of(backend, config, tiles), counted(monkeypatch)
    ids, logits = texts(model, "auto", rows=20)
    assert steps == ([(20, 1)] * (NEW - 1) if config is WHOLE else [])
    wanted, framework = texts(model, "off", rows=20)
    same = (ids == wanted).all(axis=1)  # a text that has taken another token has other logits
    assert same.sum() >= 10
    most = STEPS_OF_ROUNDING[tiles] * EPS[tiles] * np.abs(framework).max()
    assert np.abs(logits - framework)[:, same].max() <= most


@pytest.mark.parametrize("columns", [17, 64, 65])
def test_several_tokens_whose_logits_are_all_wanted_are_a_step(tiles, columns):
    weights = {name: x.astype(tiles) for name, x in random_parameters(WHOLE, "MistralForCausalLM").items()}
    step = whole_step.WholeStep(WHOLE, weights, activations={}, dtype=tiles)
    kept = [*([np.zeros((1, 80, 2, 32), tiles) for _ in range(2)] for _ in range(2)), (), ()]
    cache = SimpleNamespace(_kept=lambda: kept, capacity=80, length=np.zeros(1, np.int64))
    ids = np.random.default_rng(0).integers(3, 90, (1, columns))
    logits, last = (step.tried(ids, np.ones_like(ids), cache, every=every) for every in (True, False))
    assert (logits is None) == (columns > 64)
    assert last.shape == (1, 1, WHOLE.vocab_size)
    assert not step.takes(ids, kept, 80), "a prompt is faster as one"
    if logits is not None:
        assert logits.shape == (1, columns, WHOLE.vocab_size)
        assert np.abs(logits[:, -1:] - last).max() <= STEPS_OF_ROUNDING[tiles] * EPS[tiles] * np.abs(last).max()


SGEMM = ctypes.CFUNCTYPE(
    None, *[ctypes.c_char_p] * 2, *[ctypes.POINTER(ctypes.c_int64)] * 3, ctypes.POINTER(ctypes.c_float),
    *[ctypes.c_void_p, ctypes.POINTER(ctypes.c_int64)] * 2, ctypes.POINTER(ctypes.c_float), ctypes.c_void_p,
    ctypes.POINTER(ctypes.c_int64),
)  # fmt: skip


@pytest.fixture
def gemm():
    """A BLAS' sgemm by NumPy, and the sizes R, I, O of what it was asked."""
    asked = []

    def floats(address, shape):
        return np.ctypeslib.as_array(ctypes.cast(address, ctypes.POINTER(ctypes.c_float)), shape)

    @SGEMM
    def sgemm(turn_a, turn_b, m, n, k, alpha, a, lda, b, ldb, beta, c, ldc):
        asked.append((n[0], k[0], m[0]))
        of_by_columns = (turn_a, turn_b, alpha[0], lda[0], ldb[0], beta[0], ldc[0])
        if of_by_columns == (b"T", b"N", 1, k[0], k[0], 0, m[0]):
            floats(c, (n[0], m[0]))[:] = floats(b, (n[0], k[0])) @ floats(a, (m[0], k[0])).T

    return sgemm, asked


def first_logits(weights, dtype, columns, **options):
    """Those of a prompt of two rows into an empty cache."""
    step = whole_step.WholeStep(WHOLE, weights, activations=dict.fromkeys(weights), dtype=dtype, **options)
    ids = np.random.default_rng(0).integers(3, 90, (2, columns))
    kept = [[np.zeros((2, columns, 2, 32), dtype) for _ in range(2)] for _ in range(2)]
    return step.prompt(ids, np.ones_like(ids), np.zeros(2, np.int64), [*kept, (), ()])


def test_many_rows_in_float32_are_another_library_s(tiles, gemm, monkeypatch):
    """Of each chunk of 256 rows and more all products, and the same logits; of few rows and of bfloat16 none."""
    monkeypatch.setattr(whole_step, "LARGE_CHUNK", 512)
    sgemm, asked = gemm
    address = ctypes.cast(sgemm, ctypes.c_void_p).value
    weights = {name: x.astype(tiles) for name, x in random_parameters(WHOLE, "MistralForCausalLM").items()}
    of_layer = [(128, 192), (128, 64), (128, 64), (192, 128), (128, 160), (128, 160), (160, 128)]
    for columns, wanted in (
        (127, []),
        (128, [(256, *each) for each in of_layer] * 2),
        (258, [(258, *each) for each in of_layer] * 4),
    ):
        found, own = (first_logits(weights, tiles, columns, **given) for given in ({"gemm": address}, {}))
        assert asked == (wanted if tiles == "float32" else [])
        assert np.abs(found - own).max() <= STEPS_OF_ROUNDING[tiles] * EPS[tiles] * np.abs(own).max()
        asked.clear()


def test_packed_matrices_are_not_another_library_s(tiles, gemm):
    sgemm, asked = gemm
    weights = {name: x.astype(tiles) for name, x in random_parameters(WHOLE, "MistralForCausalLM").items()}
    for name in (name for name in weights if name.endswith("proj.weight")):
        weights[name] = random_matrix("int8", weights[name].shape, (1, None))
    assert np.isfinite(first_logits(weights, tiles, 130, gemm=ctypes.cast(sgemm, ctypes.c_void_p).value)).all()
    assert not asked


@pytest.mark.others(tiles=("float32", OWN))
@pytest.mark.parametrize("vendor", ["GenuineIntel", "AuthenticAMD"])
def test_torch_multiplies_by_mkl_where_it_is_at_home(backend, tiles, prompts, monkeypatch, vendor):
    monkeypatch.setattr(build, "_facts", lambda: {"vendor_id": vendor})
    monkeypatch.setattr(whole_step, "LARGE_CHUNK", 512)
    native, has_one = importlib.import_module(f"{backend.__name__}.native"), False
    if backend.__name__ == "mistral_torch":
        has_one = vendor == "GenuineIntel" and importlib.import_module("torch").backends.mkl.is_available()
        assert (native.sgemm() is not None) == has_one
    model = model_of(backend, WHOLE, tiles)
    assert (native.whole_step_of(model)._model.gemm is not None) == (has_one and tiles == "float32")
    assert_same(tiles, model, prompts, **ragged(2, 300))


def test_an_id_that_is_none_is_refused(tiles):
    weights = {name: x.astype(tiles) for name, x in random_parameters(WHOLE, "MistralForCausalLM").items()}
    step = whole_step.WholeStep(WHOLE, weights, activations={}, dtype=tiles)
    kept = [[np.zeros((1, 60, 2, 32), tiles) for _ in range(2)] for _ in range(2)]
    ids, zero = np.ones((1, 40), np.int64), np.zeros(1, np.int64)
    assert np.isfinite(step.prompt(ids, ids, zero, [*kept, (), ()])).all()
    for wrong in (-1, WHOLE.vocab_size):
        ids[0, 17] = wrong
        with pytest.raises(InputError):
            step.prompt(ids, np.ones_like(ids), zero, [*kept, (), ()])
