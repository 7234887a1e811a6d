"""Packed weights in every backend: on the fly, a finished model and a packed file are one model, with one text."""

from __future__ import annotations

import functools
import warnings
from types import SimpleNamespace

import ml_dtypes
import numpy as np
import pytest

from conformance.weights import random_parameters
from mistral_core import TINY, errors
from mistral_core.data import TINY_CHECKPOINT
from mistral_core.quantization.matrix import dequantised
from mistral_core.quantization.request import Quantization
from mistral_core.reference import heads, quantized
from mistral_core.weights import saving
from mistral_core.weights.convert import convert

CONFIG = TINY.replace(
    num_hidden_layers=1, hidden_size=128, intermediate_size=256, num_attention_heads=2, num_key_value_heads=1,
    head_dim=64, vocab_size=64, eos_token_id=None,
)  # fmt: skip
IDS = np.arange(1, 14)[None] % CONFIG.vocab_size
ASKED = {
    "int8": Quantization("int8"),
    "int8 by 32, head": Quantization("int8", group_size=32, head="int8"),
    "int4": Quantization("int4"),
    "int4 asymmetric by 16": Quantization("int4", group_size=16, symmetric=False),
    "nf4": Quantization("nf4"),
}
EPS = float(np.finfo(np.float32).eps)


@pytest.fixture(scope="module")
def source(tmp_path_factory):
    """A checkpoint of float32."""
    directory = tmp_path_factory.mktemp("floats") / "model"
    saving.save(directory, CONFIG, random_parameters(CONFIG).items())
    return directory


@functools.cache
def expected(name, *, tied=False):
    """The logits of the specification with the weights that the packed ones say."""
    config = CONFIG.replace(tie_word_embeddings=tied)
    asked = ASKED[name].resolved(config, "MistralForCausalLM")
    parameters = random_parameters(config)
    for each in asked.matrices(config, "MistralForCausalLM"):
        parameters[each] = dequantised(asked.quantise(each, parameters[each]))
    return heads.causal_lm(config, {key: value.astype(np.float64) for key, value in parameters.items()}, IDS).logits


def loaded(backend, path, **options):
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message=".*packed")
        return backend.MistralForCausalLM.from_pretrained(path, dtype=options.pop("dtype", "float32"), **options)


def logits(backend, model):
    return numpy_of(backend, model(IDS).logits)


def called(backend, model, ids, mask=None, past=None):
    """A call, compiled as a whole in JAX: operations alone take longer to compile for every new shape."""
    if backend.__name__ != "mistral_flax":
        return model(ids, attention_mask=mask, past_key_values=past)
    from flax import nnx

    return nnx.jit(lambda model, ids, mask, past: model(ids, attention_mask=mask, past_key_values=past))(
        model, ids, mask, past
    )


def numpy_of(backend, array):
    from mistral_core import backend as backends

    return backends.get(backend.__name__.removeprefix("mistral_")).to_numpy(array)


@pytest.mark.feature("int8, int4 and nf4 weights")
@pytest.mark.parametrize("name", ASKED)
def test_the_same_logits_however_it_was_packed(backend, source, tmp_path, name):
    """Packed as it is loaded, when it is finished, in a file; saved, the files are equal to the byte."""
    model = loaded(backend, source, quantization=ASKED[name])
    found, wanted = logits(backend, model), expected(name)
    assert np.abs(found - wanted).max() <= 32 * EPS * np.abs(wanted).max()
    finished = backend.quantize(loaded(backend, source), ASKED[name])
    assert np.array_equal(logits(backend, finished), found)
    model.save_pretrained(tmp_path / "saved")
    convert(source, tmp_path / "core", to="hf", quantization=ASKED[name])
    again = loaded(backend, tmp_path / "core")
    assert np.array_equal(logits(backend, again), found)
    again.save_pretrained(tmp_path / "again")
    files = [(tmp_path / each / "model.safetensors").read_bytes() for each in ("saved", "core", "again")]
    assert files[0] == files[1] == files[2]
    assert model.num_parameters() == sum(array.size for array in random_parameters(CONFIG).values())


@pytest.mark.parametrize("name", ["int8", "int4 asymmetric by 16", "nf4"])
def test_floats_again(backend, source, tmp_path, name):
    """In float32 they are the numbers that the packed matrices say, and so are `named_arrays`."""
    model = loaded(backend, source, quantization=ASKED[name])
    found, arrays = logits(backend, model), dict(model.named_arrays())
    assert not list(backend.dequantize(model).packed_parts())
    after = logits(backend, model)
    assert np.abs(found - after).max() <= 32 * EPS * np.abs(found).max()
    for key, array in model.named_arrays():
        assert np.array_equal(array, arrays[key]), key
    model.save_pretrained(tmp_path / "floats")
    assert "quantization_config" not in (tmp_path / "floats" / "config.json").read_text()
    loaded(backend, source, quantization=ASKED[name]).save_pretrained(tmp_path / "packed")
    again = loaded(backend, tmp_path / "packed", quantization="dequantize")
    assert np.array_equal(logits(backend, again), after)


def test_a_tied_head_stays_the_embedding(backend, tmp_path):
    config = CONFIG.replace(tie_word_embeddings=True)
    saving.save(tmp_path / "tied", config, random_parameters(config).items())
    model = loaded(backend, tmp_path / "tied", quantization="int4")
    wanted = expected("int4", tied=True)
    assert np.abs(logits(backend, model) - wanted).max() <= 32 * EPS * np.abs(wanted).max()
    assert "lm_head.weight" not in dict(model.packed_parts())
    with pytest.raises(errors.ConfigError, match="head must be off: the head is tied"):
        backend.quantize(loaded(backend, tmp_path / "tied"), "int8", head="int8")


@pytest.mark.parametrize("name", ["int8", "int4"])
def test_rounded_activations(backend, source, name):
    """One row and many, in whatever way they are multiplied, are the specification's; off, they are exact again."""
    model = loaded(backend, source, quantization=Quantization(name, activations="int8"))
    exact = logits(backend, loaded(backend, source, quantization=name))
    found = logits(backend, model)
    assert 1e-4 < np.abs(found - exact).max() / np.abs(exact).max() < 0.1
    linear = dict(model.packed_parts())["model.layers.0.mlp.down_proj.weight"]
    x = np.random.default_rng(0).standard_normal((40, CONFIG.intermediate_size)).astype(np.float32)
    wanted = quantized.product(x, linear.matrix, activations="int8")
    for rows in (1, 3, 40):
        given = np.ascontiguousarray(x[:rows]) if backend.__name__ != "mistral_torch" else torch_of(x[:rows])
        found = numpy_of(backend, linear(given))
        assert np.abs(found - wanted[:rows]).max() <= 32 * EPS * np.abs(wanted).max(), rows
    assert np.array_equal(logits(backend, backend.quantize(model, name)), exact)


def torch_of(array):
    import torch

    return torch.from_numpy(array.copy())


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_half_precision_computes_with_the_same_bytes(backend, source, dtype):
    """The codes are those of float32's scales rounded; the logits are as near as the dtype allows."""
    model = loaded(backend, source, quantization="int4", dtype=dtype)
    scale = dict(model.packed_parts())["model.layers.0.mlp.up_proj.weight"].matrix.scale
    assert scale.dtype == (ml_dtypes.bfloat16 if dtype == "bfloat16" else dtype)
    found = logits(backend, model)
    assert found.dtype == np.float32
    floats = logits(backend, backend.dequantize(model))
    eps = float(ml_dtypes.finfo(dtype).eps)
    assert np.abs(found - floats).max() <= 8 * eps * np.abs(floats).max()


@pytest.mark.parametrize("compile", ["off", "auto"])
def test_the_same_text_in_every_framework(backend, source, compile):
    """Sampled with a seed, and cached steps of one row equal one pass over many; auto compiles in JAX and Keras."""
    model = loaded(backend, source, quantization="int4")
    options = {"max_new_tokens": 12, "do_sample": True, "temperature": 0.9, "seed": 5, "compile": compile}
    written = numpy_of(backend, model.generate(IDS, **options))
    assert written.tolist() == [TEXT]
    greedy = numpy_of(backend, model.generate(IDS, max_new_tokens=8, compile=compile))
    one_pass = numpy_of(backend, called(backend, model, greedy).logits).argmax(-1)
    assert (one_pass[:, IDS.shape[1] - 1 : -1] == greedy[:, IDS.shape[1] :]).all()


TEXT = [*IDS[0].tolist(), 5, 17, 56, 47, 14, 16, 57, 59, 57, 49, 27, 16]


def test_rows_of_a_batch_and_chunks_of_a_prompt(backend, source):
    """Padding on the left, two rows, a prompt in pieces: nothing depends on how many rows are multiplied at once."""
    model = loaded(backend, source, quantization="nf4")
    one = numpy_of(backend, model(IDS).logits)
    padded = np.concatenate([np.zeros((2, 3), int), np.repeat(IDS, 2, 0)], 1)
    mask = np.array([[0] * 3 + [1] * IDS.shape[1], [1] * (3 + IDS.shape[1])])
    two = numpy_of(backend, called(backend, model, padded, mask).logits)
    assert np.abs(two[0, 3:] - one[0]).max() <= 32 * EPS * np.abs(one).max()
    first = called(backend, model, IDS[:, :8])
    rest = numpy_of(backend, called(backend, model, IDS[:, 8:], past=first.past_key_values).logits)
    assert np.abs(rest - one[:, 8:]).max() <= 32 * EPS * np.abs(one).max()


@pytest.mark.parametrize(
    ("options", "kinds"),
    [
        ({"quantization_config": SimpleNamespace(quant_method="bitsandbytes", load_in_4bit=True, load_in_8bit=False,
                                                bnb_4bit_quant_type="nf4", bnb_4bit_use_double_quant=False,
                                                bnb_4bit_compute_dtype="bfloat16")}, {"nf4"}),
        ({"quantization_config": {"load_in_4bit": True, "bnb_4bit_quant_type": "nf4"}}, {"nf4"}),
        ({"quantization_config": True}, {"nf4"}),
        ({"quantization": "nf4"}, {"nf4"}),
        ({"load_in_4bit": True}, {"nf4"}),
        ({"load_in_8bit": True}, {"int8"}),
        ({"load_in_8bit": False, "load_in_4bit": False, "quantization_config": None}, set()),
    ],
    ids=["object", "dictionary", "true", "ours", "4bit", "8bit", "nothing"],
)  # fmt: skip
def test_what_transformers_users_write(backend, source, options, kinds):
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="bnb_4bit_quant_type fp4")
        model = loaded(backend, source, **options)
    assert {part.matrix.kind for _, part in model.packed_parts()} == kinds


def test_their_config_by_its_name(backend, source):
    """`BitsAndBytesConfig` of the package, as the documentation writes it, with a framework's dtype."""
    config = backend.BitsAndBytesConfig(
        load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_compute_dtype="bfloat16", bnb_4bit_use_double_quant=True
    )
    model = loaded(backend, source, quantization_config=config)
    assert {part.matrix.kind for _, part in model.packed_parts()} == {"nf4"}
    with pytest.raises(errors.ConfigError, match="must not both be true"):
        backend.BitsAndBytesConfig(load_in_4bit=True, load_in_8bit=True)
    with pytest.raises(ImportError, match="quantization='int4'"):
        backend.GPTQConfig  # noqa: B018
    with pytest.raises(errors.UnsupportedFeatureError, match="its nearest scheme is quantization='int4'"):
        loaded(backend, source, quantization_config={"quant_method": "awq", "bits": 4})


def test_floats_are_not_set_into_packed_matrices(backend, source):
    """Where they would be lost, an error says what to do."""
    model = loaded(backend, source, quantization="int8")
    with pytest.raises(errors.UnsupportedFeatureError, match="is packed; call dequantize"):
        model.set_parameter("model.layers.0.mlp.up_proj.weight", np.zeros((256, 128), np.float32))
    name = "model.norm.weight"
    model.set_parameter(name, np.ones(128, np.float32))
    assert backend.quantize(model, "int4") is model  # what is packed stays as it is, and only the head is left
    kinds = {key: part.matrix.kind for key, part in model.packed_parts()}
    assert kinds.pop("lm_head.weight") == "int8"
    assert set(kinds.values()) == {"int8"}


@pytest.mark.parametrize("architecture", ["MistralModel", "MistralForSequenceClassification"])
def test_other_classes(backend, tmp_path, architecture):
    """Bodies and classifiers are packed, saved and loaded; a classifier's own head stays floats."""
    saving.save(tmp_path / "floats", CONFIG, random_parameters(CONFIG, architecture).items(), architecture=architecture)
    kind = getattr(backend, architecture)
    model = kind.from_pretrained(tmp_path / "floats", dtype="float32", quantization="int4")
    model.save_pretrained(tmp_path / "packed")
    with pytest.warns(UserWarning, match="kept so"):
        again = kind.from_pretrained(tmp_path / "packed", dtype="float32")
    assert [name for name, _ in again.packed_parts()] == [name for name, _ in model.packed_parts()]
    first, second = (numpy_of(backend, each(IDS)[0]) for each in (model, again))
    assert np.array_equal(first, second)


def test_a_published_file_of_a_language_model_gets_a_new_head(backend, source, tmp_path):
    """A packed language model as a classifier: its body stays packed, its head is left out."""
    convert(source, tmp_path / "packed", to="hf", quantization="int4")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model = backend.MistralForSequenceClassification.from_pretrained(tmp_path / "packed", dtype="float32")
    assert len(list(model.packed_parts())) == 7
    assert np.isfinite(numpy_of(backend, model(IDS).logits)).all()


def test_the_embedded_checkpoint_keeps_its_text(backend):
    """int8 says what floats say, in a text long enough to notice."""
    tokenizer = backend.AutoTokenizer.from_pretrained(TINY_CHECKPOINT)
    ids = tokenizer("Emma was", return_tensors="np")["input_ids"]
    texts = []
    for quantization in (None, "int8"):
        model = loaded(backend, TINY_CHECKPOINT, quantization=quantization)
        texts.append(numpy_of(backend, model.generate(ids, max_new_tokens=16)).tolist())
    assert texts[0] == texts[1]
