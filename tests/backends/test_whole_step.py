"""A step of decoding in one call of C: the framework's own tokens and logits, and only where the model is its own."""

from __future__ import annotations

import functools
import importlib
import types
from types import SimpleNamespace

import numpy as np
import pytest
from frameworks import METHODS

from conformance.weights import random_parameters
from mistral_core.config.presets import TINY
from mistral_core.errors import InputError
from mistral_core.native import whole_step
from mistral_core.parameters import LM_HEAD
from mistral_core.reference import engine
from mistral_core.weights.loading import dtype_of

needs_compiler = pytest.mark.skipif(not whole_step.available(), reason="no compiler for C is here")
EPS = {"float32": float(np.finfo(np.float32).eps), "bfloat16": 2.0**-8}
STEPS_OF_ROUNDING = {"float32": 16, "bfloat16": 8}
"""The most that logits may differ, in eps of the largest: 9.7 and 4.5 were seen on an AMD EPYC."""
NEW = 14
TIED = TINY.replace(
    hidden_size=128, intermediate_size=96, num_attention_heads=4, num_key_value_heads=1, head_dim=32,
    sliding_window=None, tie_word_embeddings=True, num_hidden_layers=2,
)  # fmt: skip
MIXED = TINY.replace(num_hidden_layers=2, layer_types=("full_attention", "sliding_attention"), head_dim=10)
YARN = TINY.replace(
    model_type="ministral3", sliding_window=None, num_hidden_layers=1, rope_scaling={
        "rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 4, "llama_4_scaling_beta": 0.1,
    },
)  # fmt: skip
CONFIGS = {"window": TINY, "tied": TIED, "mixed": MIXED, "scaled queries": YARN}


@pytest.fixture(scope="module")
def native(backend):
    return importlib.import_module(f"{backend.__name__}.native")


def model_of(backend, config, dtype="float32"):
    parameters = random_parameters(config, "MistralForCausalLM")
    if backend.__name__ == "mistral_torch":
        made = backend.MistralForCausalLM(config).load_arrays(parameters)
        return made.to(getattr(importlib.import_module("torch"), dtype)).eval()
    arrays = {name: array.astype(dtype_of(dtype)) for name, array in parameters.items()}
    return backend.MistralForCausalLM(config, dtype=dtype).load_arrays(arrays)


def texts(model, compile, rows=2, **options):
    """Tokens and logits [new, B, V] of a ragged batch."""
    ids = np.random.default_rng(1).integers(3, 90, (rows, 7))
    mask = np.ones_like(ids)
    mask[0, :3] = 0
    given = {"attention_mask": mask, "max_new_tokens": NEW, "eos_token_id": None, "output_logits": True, **options}
    out = model.generate(ids, compile=compile, return_dict_in_generate=True, **given)
    logits = [x.float() if hasattr(x, "float") else x for x in out.logits]
    return np.asarray(out.sequences), np.stack([np.asarray(x, np.float32) for x in logits])


def counted(monkeypatch):
    """How many steps C computes from now on."""
    steps = []
    of_c = whole_step.WholeStep.step

    def step(self, ids_BT, *others, **options):
        steps.append(ids_BT.shape)
        return of_c(self, ids_BT, *others, **options)

    monkeypatch.setattr(whole_step.WholeStep, "step", step)
    return steps


def reference_of(config, rows=2, **options):
    """The same by the specification in float64."""
    return texts(SimpleNamespace(generate=functools.partial(_by_specification, config)), "off", rows, **options)


def _by_specification(config, ids, *, compile, return_dict_in_generate, **options):
    return engine.generate(config, random_parameters(config, "MistralForCausalLM"), ids, **options)


def assert_same(model, dtype, steps, expected=None, **options):
    """As the framework's own operations have it, or as expected."""
    tokens, logits = texts(model, "auto", **options)
    assert len(steps) >= 2
    wanted, exact = texts(model, "off", **options) if expected is None else expected
    most = STEPS_OF_ROUNDING[dtype] * EPS[dtype] * np.abs(exact).max()
    assert np.abs(logits - exact).max() <= most
    if dtype == "float32":
        assert np.array_equal(tokens, wanted)


@needs_compiler
@pytest.mark.parametrize("name", CONFIGS)
def test_logits_and_tokens_are_those_of_the_specification(backend, monkeypatch, name):
    steps = counted(monkeypatch)
    assert_same(model_of(backend, CONFIGS[name]), "float32", steps, reference_of(CONFIGS[name]))


@needs_compiler
def test_a_short_prompt_is_computed_whatever_width_it_is_given(backend, monkeypatch):
    """JAX and TensorFlow pad it, to compile for few widths: in C nothing is compiled, and no padding computed."""
    steps = counted(monkeypatch)
    assert_same(model_of(backend, TIED), "float32", steps, reference_of(TIED))
    assert steps[0] == (2, 7)


@needs_compiler
@pytest.mark.parametrize(
    "options",
    [
        {"cache_dtype": "int8", "max_new_tokens": 6}, {"cache": "full"}, {"rows": 5},
        {"prompt_lookup_num_tokens": 3, "max_matching_ngram_size": 1}, {"do_sample": True, "seed": 3, "top_k": 20},
    ],
    ids=lambda options: next(iter(options)),
)  # fmt: skip
def test_with_every_cache_batch_guess_and_choice(backend, monkeypatch, options):
    steps = counted(monkeypatch)
    assert_same(model_of(backend, TINY), "float32", steps, reference_of(TINY, **options), **options)
    if "prompt_lookup_num_tokens" in options:
        assert any(columns > 1 for _, columns in steps)


@needs_compiler
def test_in_bfloat16_it_rounds_where_the_framework_does(backend, monkeypatch):
    assert_same(model_of(backend, TINY, "bfloat16"), "bfloat16", counted(monkeypatch), max_new_tokens=3)


@needs_compiler
@pytest.mark.parametrize(
    ("scheme", "options"),
    [("int8", {"head": "int8"}), ("int4", {"group_size": 32}), ("nf4", {}), ("int4", {"activations": "int8"})],
    ids=str,
)
def test_of_packed_weights(backend, monkeypatch, scheme, options):
    config = TINY.replace(
        hidden_size=128, intermediate_size=256, num_attention_heads=2, num_key_value_heads=1, head_dim=64,
        num_hidden_layers=1,
    )  # fmt: skip
    model = backend.quantize(model_of(backend, config), scheme, **options)
    assert_same(model, "float32", counted(monkeypatch))


@needs_compiler
def test_what_was_changed_between_two_calls_is_seen(backend):
    model = model_of(backend, TIED)
    before = texts(model, "auto")[1]
    name = "model.layers.0.mlp.up_proj.weight"
    model.set_parameter(name, np.asarray(dict(random_parameters(TIED, "MistralForCausalLM"))[name]) * 2)
    after, wanted = texts(model, "auto")[1], texts(model, "off")[1]
    assert np.abs(after - before).max() > 0.01
    assert np.abs(after - wanted).max() <= 16 * EPS["float32"] * np.abs(wanted).max()


@needs_compiler
@pytest.mark.parametrize("count", [1, 6])
def test_a_cache_that_is_continued_is_the_caller_s_own(backend, count):
    model, ids = model_of(backend, TINY), np.arange(3, 3 + count)[None]
    first = model.generate(ids, max_new_tokens=4, return_dict_in_generate=True, eos_token_id=None)
    before = [np.array(np.asarray(x)) for x in first.past_key_values.keys]
    longer = np.concatenate([np.asarray(first.sequences), ids], axis=1)
    out = model.generate(longer, past_key_values=first, max_new_tokens=5, eos_token_id=None)
    alone = model.generate(longer, max_new_tokens=5, eos_token_id=None, compile="off")
    assert np.array_equal(np.asarray(out), np.asarray(alone))
    if backend.__name__ != "mistral_torch":  # where a cache is a value; PyTorch's says that its memory is reused
        assert all(np.array_equal(x, np.asarray(y)) for x, y in zip(before, first.past_key_values.keys, strict=True))


@needs_compiler
def test_it_is_not_for_what_the_model_is_not(backend, native):
    assert native.whole_step_of(model_of(backend, TIED)) is not None
    assert native.whole_step_of(model_of(backend, TIED, "float16")) is None
    replaced = model_of(backend, TIED)
    mlp = first_mlp(replaced)
    mlp.__class__ = type("Other", (type(mlp),), {"__module__": __name__})
    assert native.whole_step_of(replaced) is None


@needs_compiler
@pytest.mark.parametrize("what", ["MLP", "norm", "matrix"])
def test_it_is_not_for_a_class_into_which_another_method_was_put(backend, native, monkeypatch, what):
    """As libraries do that patch a model's classes; what they put there is called."""
    model = model_of(backend, TIED)
    part = {"MLP": first_mlp(model), "norm": model.model.norm, "matrix": first_mlp(model).up_proj}[what]
    kind, method = type(part), METHODS[backend.__name__]
    before, written, called = texts(model, "auto")[0], getattr(kind, method), []

    def patched(self, x):
        called.append(type(self))
        return written(self, x)

    monkeypatch.setattr(kind, method, patched)
    assert native.whole_step_of(model) is None
    assert np.array_equal(texts(model, "auto")[0], before)
    assert kind in called
    monkeypatch.undo()
    assert native.whole_step_of(model) is not None


def first_mlp(model):
    """What holds the matrices of the first layer's MLP."""
    body = model.model
    layers = getattr(body, "decoder_layers", None) or body.layers
    return (layers["0"] if "0" in layers else layers[0]).mlp


@needs_compiler
def test_hooks_autocast_and_other_forwards_are_pytorch_s():
    torch = pytest.importorskip("torch")
    import mistral_torch
    from mistral_torch import native

    model = model_of(mistral_torch, TIED)
    handle = model.model.layers[0].mlp.register_forward_hook(lambda *_: None)
    assert native.whole_step_of(model) is None
    handle.remove()
    assert native.whole_step_of(model) is not None
    with torch.autocast("cpu", torch.bfloat16):
        assert native.whole_step_of(model) is None
    model.model.norm.forward = types.MethodType(type(model.model.norm).forward, model.model.norm)
    assert native.whole_step_of(model) is None


@needs_compiler
def test_stacked_layers_are_jax_s():
    pytest.importorskip("jax")
    import mistral_flax
    from mistral_flax import native, scan

    assert native.whole_step_of(scan.scan_layers(model_of(mistral_flax, TIED))) is None


@needs_compiler
def test_an_id_that_is_none_is_refused():
    config = TIED
    weights = random_parameters(config, "MistralForCausalLM")
    step = whole_step.WholeStep(config, weights, activations={}, dtype="float32")
    assert LM_HEAD not in weights
    kept = [[np.zeros((1, 9, 1, 32), np.float32) for _ in range(2)] for _ in range(2)]
    one, zero = np.ones((1, 1), np.int64), np.zeros(1, np.int64)
    assert np.isfinite(step.step(one, one, zero, [*kept, (), ()])).all()
    for wrong in (-1, config.vocab_size):
        with pytest.raises(InputError):
            step.step(one * wrong, one, zero, [*kept, (), ()])


def test_few_tokens_and_rings_in_one_piece_are_taken():
    step = whole_step.WholeStep(
        TINY, random_parameters(TINY, "MistralForCausalLM"), activations={}, dtype="float32"
    )  # fmt: skip
    ring = [np.zeros((1, 7, 2, 16), np.float32) for _ in range(3)]  # a window of 5 and a token that may be forgotten
    assert step.takes(np.ones((1, 1)), [ring, ring], 100)
    assert step.takes(np.ones((1, 2)), [ring, ring], 100)
    assert not step.takes(np.ones((1, 3)), [ring, ring], 100)  # the third overwrites what the first must see
    assert step.takes(np.ones((1, 3)), [ring, ring], 6)
    assert not step.takes(np.ones((1, 1)), [ring, ring], None)
    assert not step.takes(np.ones((17, 1)), [ring, ring], 100)
    assert not step.takes(np.ones((1, 1, 48)), [ring, ring], 100)
    assert not step.takes(np.ones((1, 1)), [[x[:, :, ::-1] for x in ring], ring], 100)
    assert not step.takes(np.ones((1, 1)), [[x.astype(np.float16) for x in ring], ring], 100)


@needs_compiler
@pytest.mark.parametrize("length", [80, 130])
def test_keys_that_no_window_shows_are_not_read(length):
    """Of a cache that keeps all tokens, or has rolled on, C reads what the window shows: numbers elsewhere are any."""
    slots, window = 120, TINY.sliding_window
    weights = {name: array.astype(np.float32) for name, array in random_parameters(TINY, "MistralForCausalLM").items()}
    step = whole_step.WholeStep(TINY, weights, activations={}, dtype="float32")
    order = length - 1 - (length - 1 - np.arange(slots)) % slots
    # slots are read 32 at a time, and those of the newest token always
    hidden = (order < length - window - 64) & (np.arange(slots) // 32 != (length + 1) % slots // 32)
    assert hidden.any()
    shape = (TINY.num_hidden_layers, 1, slots, TINY.num_key_value_heads, TINY.head_dim)
    found = []
    for poison in (0.0, np.nan):
        rng = np.random.default_rng(0)
        kept = [list(rng.standard_normal(shape).astype(np.float32)) for _ in range(2)]
        for arrays in kept:
            for array in arrays:
                array[:, hidden] += poison
        found.append(step.step(np.array([[7, 8]]), np.ones((1, 2), int), np.array([length]), kept))
    assert np.isfinite(found[0]).all()
    assert np.array_equal(*found)
