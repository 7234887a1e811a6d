"""What scripts written for transformers call, the same in every backend."""

from __future__ import annotations

import importlib
import inspect
import warnings

import numpy as np
import pytest

from conformance.weights import random_parameters
from mistral_core import AutoConfig
from mistral_core.compat import arguments
from mistral_core.config.presets import TINY
from mistral_core.errors import ConfigError, ConversionError, InputError, TokenizerError, UnsupportedFeatureError
from mistral_core.generation import GenerationConfig
from mistral_core.parameters import HEADS, shapes
from mistral_core.text.encoding import Encoding
from mistral_core.weights import saving
from mistral_core.weights.checkpoint import Checkpoint

CONFIG = TINY.replace(num_hidden_layers=1)
IDS = np.random.default_rng(0).integers(3, CONFIG.vocab_size, (2, 9))
BACKENDS = ("torch", "flax", "tf")


def model_of(backend, architecture="MistralForCausalLM", config=CONFIG):
    model = getattr(backend, architecture)(config).load_arrays(random_parameters(config, architecture))
    return model.eval() if backend.__name__ == "mistral_torch" else model


def numpy(backend, array):
    return importlib.import_module(f"{backend.__name__}.arrays").to_numpy(array)


@pytest.fixture
def checkpoint(tmp_path):
    arrays = random_parameters(CONFIG, "MistralForCausalLM")
    saving.save_pretrained(tmp_path / "model", CONFIG, arrays.items(), architecture="MistralForCausalLM",
                           generation_config=GenerationConfig())  # fmt: skip
    return tmp_path / "model"


# Auto classes

AUTO = {
    "AutoModel": "MistralModel",
    "AutoModelForCausalLM": "MistralForCausalLM",
    "AutoModelForSequenceClassification": "MistralForSequenceClassification",
    "AutoModelForTokenClassification": "MistralForTokenClassification",
    "AutoModelForQuestionAnswering": "MistralForQuestionAnswering",
}


@pytest.mark.feature("AutoModelFor*, AutoTokenizer, AutoConfig")
@pytest.mark.parametrize("auto", AUTO)
def test_auto_classes(backend, checkpoint, auto):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # new heads
        loaded = getattr(backend, auto).from_pretrained(checkpoint)
    config = backend.AutoConfig.from_pretrained(checkpoint, num_labels=3)
    fresh = getattr(backend, auto).from_config(config, rope_theta=7.0)
    assert type(loaded) is type(fresh) is getattr(backend, AUTO[auto])
    assert (fresh.config.num_labels, fresh.config.rope_theta, config.rope_theta) == (3, 7.0, CONFIG.rope_theta)
    with pytest.raises(UnsupportedFeatureError, match=rf"{auto}.from_pretrained\(path\)"):
        getattr(backend, auto)()


@pytest.mark.feature("AutoModelFor*, AutoTokenizer, AutoConfig")
def test_auto_names(backend):
    assert backend.AutoConfig is AutoConfig
    assert issubclass(backend.AutoConfig, backend.MistralConfig)
    assert backend.AutoTokenizer is backend.MistralTokenizer


@pytest.mark.feature("Assignable config fields")
def test_a_config_is_changed_before_a_model_is_made_of_it(backend, checkpoint):
    config = backend.AutoConfig.from_pretrained(checkpoint)
    config.num_labels = 3
    config.sliding_window = None
    model = backend.AutoModelForSequenceClassification.from_config(config)
    assert (model.config, model.config.layer_windows[0]) == (config, None)
    config.num_labels = 4
    assert model.config.num_labels == 3


SEEN = {
    "generate": ("input_ids", "attention_mask", "generation_config", "past_key_values", "assistant_model", "streamer"),
    "stream": ("input_ids", "tokenizer", "attention_mask"),
    "save_pretrained": ("directory", "max_shard_size", "overwrite"),
    "push_to_hub": ("repo_id", "private", "commit_message", "revision", "token", "create_pr"),
    "resize_token_embeddings": ("new_num_tokens", "pad_to_multiple_of"),
}


@pytest.mark.parametrize("method", SEEN)
def test_an_editor_sees_what_a_method_takes(backend, method):
    found = getattr(backend.MistralForCausalLM, method)
    assert {*SEEN[method]} <= inspect.signature(found).parameters.keys()
    assert inspect.getdoc(found)


# from_pretrained and save_pretrained


def test_arguments_by_their_older_names(backend, checkpoint):
    model = backend.MistralForCausalLM.from_pretrained(
        checkpoint, torch_dtype="bfloat16", device_map="cpu", low_cpu_mem_usage=True, use_safetensors=True,
        trust_remote_code=False, revision="main", cache_dir=None, token=None, local_files_only=True, sliding_window=5,
        attn_implementation="eager", from_pt=True,
    )  # fmt: skip
    assert model.config.dtype == "bfloat16"
    assert model.config.sliding_window == 5
    assert {array.dtype.name for _, array in model.named_arrays()} == {"bfloat16"}


def test_an_argument_under_two_names(backend, checkpoint):
    with pytest.raises(ConfigError, match="dtype='float32' and torch_dtype='bfloat16' are one argument"):
        backend.MistralModel.from_pretrained(checkpoint, dtype="float32", torch_dtype="bfloat16")


SAVING = {
    "create_pr", "is_main_process", "push_to_hub", "safe_serialization", "save_peft_format", "saved_model",
    "signatures", "state_dict", "variant", "version",
}  # fmt: skip
TAKEN_BY_TORCH = {"is_main_process", "state_dict"}


@pytest.mark.feature("Names of transformers that are not here say what to use")
@pytest.mark.parametrize("name", sorted(arguments.ADVICE))
def test_what_is_not_here_says_what_to_use(backend, checkpoint, name):
    if backend.__name__ == "mistral_torch" and name in TAKEN_BY_TORCH:
        pytest.skip("torch takes it: test_torch_clients.py")
    harmless = arguments.NO_EFFECT[name][0]
    saves = name in SAVING
    model = model_of(backend)
    call = model.save_pretrained if saves else type(model).from_pretrained
    call(checkpoint, **{name: harmless})
    with pytest.raises(UnsupportedFeatureError, match=f"{name}='something': "):
        call(checkpoint, **{name: "something"})


def test_unknown_arguments_of_save_pretrained(backend, tmp_path):
    with pytest.raises(ConversionError, match=r"save_pretrained has no argument \['max_shard_sise'\]"):
        model_of(backend).save_pretrained(tmp_path / "out", max_shard_sise="1MB")
    assert not (tmp_path / "out").exists()


@pytest.mark.feature("Device placement")
@pytest.mark.parametrize("device", ["cpu", "auto", {"": "cpu"}])
def test_devices(backend, checkpoint, device):
    model = backend.MistralForCausalLM.from_pretrained(checkpoint, device_map=device)
    assert "CPU" in str(model.device).upper()


def test_devices_that_are_not_there(backend, checkpoint):
    is_torch = backend.__name__ == "mistral_torch"  # which puts parts of a model on several devices
    error, told = (ConfigError, "not here") if is_torch else (UnsupportedFeatureError, "a model is on one device")
    with pytest.raises(error, match=told):
        backend.MistralModel.from_pretrained(checkpoint, device_map={"model.layers.0": 7, "model.layers.1": 8})
    if backend.__name__ != "mistral_torch":  # which has its own error
        with pytest.raises(ConfigError, match="device: 'gpu:7' is not here"):
            backend.MistralModel.from_pretrained(checkpoint, device="gpu:7")


# The model's own config


def test_a_model_owns_its_config(backend):
    config = CONFIG.replace()
    model = backend.MistralForCausalLM(config)
    model.config.pad_token_id = 2
    assert model.model.config.pad_token_id == 2
    assert config.pad_token_id != 2
    with pytest.raises(ConfigError, match="pad_token_id"):
        model.config.pad_token_id = CONFIG.vocab_size
    model.config = model.config.replace(use_cache=False)
    assert not model.model.config.use_cache


BUILT = [
    ("sliding_window", 3),
    ("attention_dropout", 0.5),
    ("vocab_size", 50),
    ("rms_norm_eps", 1e-4),
    ("num_labels", 5),
]


@pytest.mark.parametrize(("field", "value"), BUILT)
def test_what_a_model_is_built_of_cannot_be_assigned(backend, field, value):
    model = backend.MistralForCausalLM(CONFIG)
    with pytest.raises(ConfigError, match=rf"{'layer_windows' if field == 'sliding_window' else field}=.*built with"):
        setattr(model.config, field, value)
    with pytest.raises(ConfigError, match="Make or load a model with what you want"):
        model.config = CONFIG.replace(**{field: value})
    assert getattr(model.config, field) == getattr(CONFIG, field)


@pytest.mark.feature("Assignable config fields")
def test_a_changed_config_is_used(backend):
    model = model_of(backend)
    assert model(IDS).past_key_values is not None
    model.config.use_cache = False
    assert model(IDS).past_key_values is None
    model.config.output_hidden_states = True
    assert len(model(IDS).hidden_states) == CONFIG.num_hidden_layers + 1


@pytest.mark.parametrize("one", [np.int64(1), np.array(1), np.uint8(1)], ids=repr)
def test_a_number_of_an_array_is_a_number(backend, one):
    model = model_of(backend)
    kept = numpy(backend, model(IDS, logits_to_keep=one).logits)
    assert np.array_equal(kept, numpy(backend, model(IDS, logits_to_keep=1).logits))


def test_generate_whatever_a_call_returns(backend):
    model = model_of(backend)
    tokens = numpy(backend, model.generate(IDS, max_new_tokens=4)).tolist()
    model.config.return_dict = False
    assert numpy(backend, model.generate(IDS, max_new_tokens=4)).tolist() == tokens
    model.generation_config.pad_token_id = 7
    model.generation_config.eos_token_id = tokens[0][9]
    assert numpy(backend, model.generate(IDS, max_new_tokens=4)).tolist()[0][9:] == [tokens[0][9], 7, 7, 7]


CHANGES = {
    "config": lambda model, other: setattr(model.config, "rope_theta", 50.0),
    "resized": lambda model, other: model.resize_token_embeddings(60),
    "replaced": lambda model, other: model.set_input_embeddings(other.get_input_embeddings()),
}


@pytest.mark.parametrize("change", CHANGES)
def test_generate_follows_a_changed_model(backend, change):
    ids, other = IDS % 60, backend.MistralForCausalLM(CONFIG)
    used, fresh = model_of(backend), model_of(backend)
    before = numpy(backend, used.generate(ids, max_new_tokens=6)).tolist()
    for model in (used, fresh):
        CHANGES[change](model, other)
    after = numpy(backend, used.generate(ids, max_new_tokens=6)).tolist()
    assert after == numpy(backend, fresh.generate(ids, max_new_tokens=6)).tolist()
    assert after != before


def test_a_tuple_is_no_cache(backend):
    with pytest.raises(InputError, match=r"past_key_values must be a KVCache"):
        model_of(backend)(IDS, past_key_values=((1, 2), (3, 4)))


def test_classes_can_be_extended(backend, checkpoint, tmp_path):
    class Mine(backend.MistralForCausalLM):
        """What a user adds."""

    model = Mine.from_pretrained(checkpoint)
    assert [name for name, _ in model.named_arrays()] == list(shapes(CONFIG))
    model.save_pretrained(tmp_path / "mine")
    assert backend.MistralForCausalLM.from_pretrained(tmp_path / "mine").config.architectures == ("MistralForCausalLM",)
    bare = type("Bare", (backend.MistralModel,), {})(CONFIG)
    assert next(iter(bare.named_arrays()))[0] == "model.embed_tokens.weight"


def test_a_model_does_not_hold_the_arrays_it_was_given(backend):
    arrays = {}
    for name, array in random_parameters(CONFIG, "MistralForCausalLM").items():
        memory = np.empty(array.nbytes + 64, np.uint8)
        start = -memory.ctypes.data % 64  # where frameworks would take it over
        arrays[name] = memory[start : start + array.nbytes].view(array.dtype).reshape(array.shape)
        arrays[name][...] = array
    model = backend.MistralForCausalLM(CONFIG).load_arrays(arrays)
    before = {name: array.copy() for name, array in model.named_arrays()}
    for array in arrays.values():
        array[...] = 0
    assert all(np.array_equal(array, before[name]) for name, array in model.named_arrays())


# Embeddings and sizes


@pytest.mark.feature("num_parameters, get and set embeddings")
@pytest.mark.parametrize("architecture", HEADS)
def test_num_parameters(backend, architecture):
    for tied in (False, True):
        config = CONFIG.replace(tie_word_embeddings=tied)
        model = model_of(backend, architecture, config)
        total = sum(int(np.prod(shape)) for shape in shapes(config, architecture).values())
        assert model.num_parameters() == total
        assert model.num_parameters(exclude_embeddings=True) == total - CONFIG.vocab_size * CONFIG.hidden_size
        assert model.num_parameters(only_trainable=True) == total


def test_embeddings(backend):
    model = model_of(backend)
    assert model.get_input_embeddings() is model.model.embed_tokens
    assert model.get_output_embeddings() is model.lm_head
    assert model_of(backend, "MistralModel").get_output_embeddings() is None
    assert model.base_model is model.model
    assert model.model.base_model is model.model


def test_embeddings_can_be_replaced(backend):
    model, other = model_of(backend), model_of(backend, config=CONFIG.replace(initializer_range=0.5))
    before = model.num_parameters()
    model.set_input_embeddings(other.get_input_embeddings())
    model.set_output_embeddings(other.get_output_embeddings())
    ours, theirs = dict(model.named_arrays()), dict(other.named_arrays())
    assert np.array_equal(ours["model.embed_tokens.weight"], theirs["model.embed_tokens.weight"])
    assert np.array_equal(ours["lm_head.weight"], theirs["lm_head.weight"])
    assert model.num_parameters() == before
    assert numpy(backend, model(IDS).logits).shape == (*IDS.shape, CONFIG.vocab_size)


SIZES = [(CONFIG.vocab_size + 5, None), (CONFIG.vocab_size - 30, None), (CONFIG.vocab_size, None), (None, 64), (101, 8)]


@pytest.mark.feature("Resize token embeddings")
@pytest.mark.parametrize(
    ("size", "multiple", "tied"),
    [*((*size, False) for size in SIZES), *((*size, True) for size in SIZES[:2]),
     *(pytest.param(*size, True, marks=pytest.mark.slow) for size in SIZES[2:])],
)  # fmt: skip
def test_resizing_keeps_the_bits_of_old_rows(backend, size, multiple, tied, tmp_path):
    config = CONFIG.replace(tie_word_embeddings=tied)
    model = model_of(backend, config=config)
    ids = np.minimum(IDS, CONFIG.vocab_size - 31)
    before, logits = dict(model.named_arrays()), numpy(backend, model(ids).logits)
    before = {name: array.copy() for name, array in before.items()}
    embedding = model.resize_token_embeddings(size, pad_to_multiple_of=multiple)
    wanted = -(-(size or CONFIG.vocab_size) // (multiple or 1)) * (multiple or 1)
    kept = min(wanted, CONFIG.vocab_size)
    assert embedding is model.get_input_embeddings()
    assert model.config.vocab_size == model.model.config.vocab_size == wanted
    after = dict(model.named_arrays())
    assert {name: array.shape for name, array in after.items()} == shapes(model.config)
    for name, array in before.items():
        rows = kept if name in ("model.embed_tokens.weight", "lm_head.weight") else len(array)
        assert after[name][:rows].tobytes() == array[:rows].tobytes(), name
        assert np.allclose(after[name][rows:], array.mean(axis=0), atol=1e-7)
    grown = numpy(backend, model(ids).logits)
    assert grown.shape[2] == wanted
    assert np.allclose(grown[..., :kept], logits[..., :kept], atol=1e-5)
    model.save_pretrained(tmp_path)
    assert type(model).from_pretrained(tmp_path).config.vocab_size == wanted


def test_new_rows_are_equal_in_all_three():
    rows = []
    for name in BACKENDS:
        model = model_of(importlib.import_module(f"mistral_{name}"))
        model.resize_token_embeddings(120)
        rows.append(dict(model.named_arrays())["model.embed_tokens.weight"].tobytes())
    assert len(set(rows)) == 1


@pytest.mark.parametrize("size", [0, -1, 3.0, "many"])
def test_no_number_of_tokens(backend, size):
    with pytest.raises(ConfigError, match="new_num_tokens"):
        model_of(backend).resize_token_embeddings(size)


def test_tie_weights_and_checkpointing_are_there(backend):
    model = model_of(backend)
    model.tie_weights()
    model.gradient_checkpointing_enable()
    assert model.model.gradient_checkpointing is not None
    model.gradient_checkpointing_disable()
    assert model.model.gradient_checkpointing is None


# Arrays of tokens


def test_encodings_are_keyword_arguments(backend):
    from mistral_core.data import TINY_CHECKPOINT

    tensors = {"mistral_torch": "pt", "mistral_flax": "jax", "mistral_tf": "tf"}[backend.__name__]
    tokenizer = backend.AutoTokenizer.from_pretrained(TINY_CHECKPOINT)
    batch = tokenizer(["Emma", "It was a truth"], padding=True, return_tensors=tensors)
    assert isinstance(batch, Encoding)
    assert batch.input_ids is batch["input_ids"]
    assert "int" in str(batch.input_ids.dtype)
    assert numpy(backend, batch.to("cpu").attention_mask).tolist() == numpy(backend, batch.attention_mask).tolist()
    model = backend.AutoModelForCausalLM.from_pretrained(TINY_CHECKPOINT)
    ids = model.generate(**batch, max_new_tokens=3)
    texts = tokenizer.batch_decode(ids, skip_special_tokens=True)
    assert [text[:4] for text in texts] == ["Emma", "It w"]
    with pytest.raises(AttributeError, match="input_ids, attention_mask, not 'token_type_ids'"):
        _ = batch.token_type_ids
    with pytest.raises(UnsupportedFeatureError, match="clean_up_tokenization_spaces"):
        tokenizer.batch_decode(ids, clean_up_tokenization_spaces=True)
    with pytest.raises(TokenizerError, match="padding=True"):
        tokenizer(["Emma", "It was a truth"], return_tensors=tensors)


def test_saved_files_are_safetensors(backend, tmp_path):
    model_of(backend).save_pretrained(tmp_path, max_shard_size="100KB", safe_serialization=True)
    assert len(list(tmp_path.glob("*.safetensors"))) > 1
    assert set(Checkpoint.open(tmp_path).tensors) == set(shapes(CONFIG))
