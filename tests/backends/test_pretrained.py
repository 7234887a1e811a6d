"""from_pretrained and save_pretrained of every backend: the same bits everywhere."""

from __future__ import annotations

import importlib
import warnings

import ml_dtypes
import numpy as np
import pytest

from conformance.weights import random_parameters
from mistral_core import GenerationConfig, MistralConfig
from mistral_core.config.presets import TINY
from mistral_core.errors import MissingTensorsError, UnknownArgumentError, UnknownFieldError
from mistral_core.parameters import HEADS, parameters
from mistral_core.weights import checkpoint, saving
from mistral_core.weights.checkpoint import Checkpoint

ARCHITECTURES = tuple(HEADS)


def save(directory, architecture="MistralForCausalLM", *, dtype="bfloat16", config=TINY):
    kind = ml_dtypes.bfloat16 if dtype == "bfloat16" else dtype
    arrays = {name: array.astype(kind) for name, array in random_parameters(config, architecture).items()}
    saving.save_pretrained(
        directory,
        config,
        arrays.items(),
        architecture=architecture,
        generation_config=GenerationConfig(max_new_tokens=7, eos_token_id=5),
    )
    return arrays


def bits(array):
    return np.ascontiguousarray(array).view(np.uint8)


@pytest.mark.parametrize("architecture", ARCHITECTURES)
@pytest.mark.parametrize("tied", [False, True])
def test_every_class_loads_and_saves_the_same_bits(backend, architecture, tied, tmp_path):
    config = TINY.replace(tie_word_embeddings=tied)
    arrays = save(tmp_path / "in", architecture, config=config)
    model = getattr(backend, architecture).from_pretrained(tmp_path / "in")
    model.save_pretrained(tmp_path / "out")
    saved = Checkpoint.open(tmp_path / "out")
    prefix = "model." if architecture == "MistralModel" else ""
    assert {prefix + name for name in saved.tensors} == set(arrays)
    for name, array in arrays.items():
        read = saved.read(name.removeprefix(prefix))
        assert read.dtype == array.dtype
        assert np.array_equal(bits(read), bits(array)), name
    again = MistralConfig.from_pretrained(tmp_path / "out")
    assert again.architectures == (architecture,)
    assert again.dtype == "bfloat16"
    assert GenerationConfig.from_pretrained(tmp_path / "out") == model.generation_config
    assert model.generation_config.max_new_tokens == 7


def test_weights_travel_through_all_three_backends(tmp_path):
    arrays = save(tmp_path / "0")
    nan = arrays["lm_head.weight"].view(np.uint16)
    nan[0, :6] = [0x7FC1, 0xFFAA, 0x8000, 0x0001, 0x7F80, 0x8003]  # NaN payloads, -0, denormals, infinity
    checkpoint.save(tmp_path / "0", TINY, arrays.items())
    for index, name in enumerate(("torch", "flax", "tf")):
        package = importlib.import_module(f"mistral_{name}")
        package.MistralForCausalLM.from_pretrained(tmp_path / str(index)).save_pretrained(tmp_path / str(index + 1))
    last = Checkpoint.open(tmp_path / "3")
    for name, array in arrays.items():
        assert np.array_equal(bits(last.read(name)), bits(array)), name


def test_a_cast_on_request(backend, tmp_path):
    arrays = save(tmp_path)
    model = backend.MistralForCausalLM.from_pretrained(tmp_path, dtype="float32")
    for name, array in model.named_arrays():
        assert array.dtype == np.float32
        assert np.array_equal(array, arrays[name].astype(np.float32))


def test_a_classifier_from_a_language_model_warns_once_and_starts_equal_everywhere(tmp_path):
    save(tmp_path, dtype="float32")
    heads = []
    for name in ("torch", "flax", "tf"):
        package = importlib.import_module(f"mistral_{name}")
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            model = package.MistralForSequenceClassification.from_pretrained(tmp_path, num_labels=3, seed=11)
        messages = [str(w.message) for w in caught]
        assert sum("score.weight" in m for m in messages) == 1
        assert sum("lm_head.weight" in m for m in messages) == 1
        heads.append(dict(model.named_arrays())["score.weight"])
    assert heads[0].shape == (3, TINY.hidden_size)
    assert heads[0].std() > 0
    assert np.array_equal(heads[0], heads[1])
    assert np.array_equal(heads[0], heads[2])


def test_a_language_model_without_its_head_is_an_error(backend, tmp_path):
    arrays = dict(save(tmp_path))
    del arrays["lm_head.weight"]
    # the file says it is a language model and is not tied
    checkpoint.save(tmp_path, TINY.replace(tie_word_embeddings=True), arrays.items())
    with pytest.raises(MissingTensorsError, match="lm_head.weight"):
        backend.MistralForCausalLM.from_pretrained(tmp_path, tie_word_embeddings=False)


def test_config_overrides_and_their_names(backend, tmp_path):
    save(tmp_path)
    model = backend.MistralForCausalLM.from_pretrained(tmp_path, sliding_window=3)
    assert model.config.sliding_window == 3
    with pytest.raises(UnknownFieldError, match="sliding_widow"):
        backend.MistralForCausalLM.from_pretrained(tmp_path, sliding_widow=3)


def test_a_path_has_transformers_name_too(backend, tmp_path):
    save(tmp_path)
    config = MistralConfig.from_pretrained(tmp_path)
    assert MistralConfig.from_pretrained(pretrained_model_name_or_path=tmp_path) == config
    for loader in (backend.MistralForCausalLM, backend.AutoModelForCausalLM):
        assert loader.from_pretrained(pretrained_model_name_or_path=tmp_path).config == config
    for wrong in ((tmp_path,), ()):
        with pytest.raises(UnknownArgumentError, match="are one argument"):
            given = {} if wrong else {"path": tmp_path}
            MistralConfig.from_pretrained(*wrong, **given, pretrained_model_name_or_path=tmp_path)


def test_names_are_hugging_face_s(backend):
    model = backend.MistralForCausalLM(TINY)
    names = [name for name, _ in model.named_arrays()]
    assert names == [name for name, _ in parameters(TINY)]
    assert "model.layers.0.self_attn.q_proj.weight" in names


def test_fresh_models_are_drawn_with_initializer_range(backend):
    model = backend.MistralForCausalLM(TINY.replace(initializer_range=0.5))
    arrays = dict(model.named_arrays())
    assert 0.45 < arrays["model.layers.2.mlp.up_proj.weight"].std() < 0.55
    assert 0.45 < arrays["lm_head.weight"].std() < 0.55
    assert (arrays["model.norm.weight"] == 1).all()


def test_what_clients_of_transformers_models_read(backend, tmp_path):
    save(tmp_path)
    written = (tmp_path / "config.json").read_bytes()
    model = backend.MistralForCausalLM.from_pretrained(tmp_path)
    assert model.name_or_path == model.config.name_or_path == str(tmp_path)
    assert model.main_input_name == "input_ids"
    assert model.framework == {"torch": "pt"}.get(backend.__name__[8:], backend.__name__[8:])
    assert model.can_generate()
    assert not backend.MistralForTokenClassification.can_generate()
    assert model.config.is_encoder_decoder is False
    assert backend.MistralModel(TINY).name_or_path == ""
    model.save_pretrained(tmp_path)
    assert (tmp_path / "config.json").read_bytes() == written


def test_arguments_of_callers_written_for_transformers(backend):
    model = backend.MistralModel(TINY.replace(num_hidden_layers=1))
    ids, starts = np.arange(3, 10)[None], np.array([0, 3, 7])
    plain = np.asarray(backend.arrays.to_numpy(model(ids, document_ids=[[0, 0, 0, 1, 1, 1, 1]]).last_hidden_state))
    told = model(ids, cu_seq_lens_q=starts, cache_position=np.arange(7), token_type_ids=0 * ids)
    assert np.array_equal(backend.arrays.to_numpy(told.last_hidden_state), plain)
    with pytest.raises(UnknownArgumentError, match="use_cache"):
        model(ids, use_chache=True)
