"""Outputs through each framework's transformations, compilers, copies and the libraries around it."""

from __future__ import annotations

import copy
import io
import pickle

import numpy as np
import pytest

from mistral_core import outputs
from mistral_core.config.presets import TINY

CONFIG = TINY.replace(num_hidden_layers=1, layer_types=None)
IDS = np.random.default_rng(0).integers(3, CONFIG.vocab_size, (2, 9))


@pytest.fixture(scope="module")
def model(backend):
    model = backend.MistralForCausalLM(CONFIG)
    return model.eval() if backend.__name__ == "mistral_torch" else model


def test_what_is_there(model):
    without, full = model(IDS, use_cache=False), model(IDS, labels=IDS)
    assert (len(without), tuple(without[0].shape)) == (1, (2, 9, CONFIG.vocab_size))
    loss, *rest = full
    assert loss is full.loss is full[0] is full["loss"]
    assert [*map(id, full[1:])] == [*map(id, rest)] == [id(full.logits), id(full.past_key_values)]
    assert ("loss" in without, without.loss, without["loss"]) == (False, None, None)
    assert list(full.keys()) == ["loss", "logits", "past_key_values"]
    for output in (without, full):
        assert isinstance(output, outputs.CausalLMOutput)
    assert len(model(IDS, output_hidden_states=True, output_attentions=True, use_cache=False)) == 3


def test_torch_s_are_dictionaries():
    torch = pytest.importorskip("torch")
    import mistral_torch

    model, ids = mistral_torch.MistralForCausalLM(CONFIG).requires_grad_(False), torch.from_numpy(IDS)
    output = model(ids, labels=ids, use_cache=True)
    assert isinstance(output, dict)
    assert dict(output) == {**output} == output._asdict()
    for again in (copy.deepcopy(output), pickle.loads(pickle.dumps(output)), output._replace(logits=output.logits)):
        assert type(again) is type(output)
        assert torch.equal(again.logits, output.logits)
    assert list(output._replace(loss=None).keys()) == ["logits", "past_key_values"]
    copied = copy.copy(output)
    copied.loss, copied["logits"] = None, 5
    assert ("loss" in copied, copied.logits, output.loss is None) == (False, 5, False)
    made = type(output)({"logits": 1}), type(output)(pair for pair in [("logits", 1)])
    assert [tuple(each) for each in made] == [(1,), (1,)]
    assert str(made[0]) == "CausalLMOutput(logits=1)"
    with pytest.raises(KeyError, match="it has loss, logits"):
        output["los"]
    with pytest.raises(AttributeError, match="it has loss, logits"):
        _ = output.los


def test_torch_s_compilers_and_transformations():
    torch = pytest.importorskip("torch")
    import mistral_torch

    model, ids = mistral_torch.MistralForCausalLM(CONFIG, attn_implementation="eager"), torch.from_numpy(IDS)
    output = model.requires_grad_(False).eval()(ids, labels=ids)
    compiled = torch.compile(model, fullgraph=True, backend="eager")(ids, labels=ids)
    assert type(compiled) is type(output)
    assert list(compiled.keys()) == list(output.keys())
    assert torch.allclose(compiled.logits, output.logits, atol=1e-5)
    program, file = torch.export.export(model, (ids,), {"use_cache": False}), io.BytesIO()
    torch.export.save(program, file)
    file.seek(0)
    exported = torch.export.load(file).module()(ids, use_cache=False)
    assert (type(exported), list(exported.keys())) == (type(output), ["logits"])
    mapped = torch.func.vmap(lambda row: model(row[None], use_cache=False))(ids)
    assert (type(mapped), mapped.logits.shape) == (type(output), (2, 1, 9, CONFIG.vocab_size))


def test_libraries_that_take_torch_s_outputs_apart():
    torch = pytest.importorskip("torch")
    operations = pytest.importorskip("accelerate.utils.operations")
    from torch.distributed.utils import _apply_to_tensors  # what FSDP does with a module's output
    from torch.nn.parallel.distributed import _find_tensors  # and DDP

    import mistral_torch

    output = mistral_torch.MistralForCausalLM(CONFIG)(torch.from_numpy(IDS), labels=IDS, use_cache=False)
    for again in (
        operations.recursively_apply(lambda tensor: tensor + 0, output),
        operations.concatenate([output._replace(loss=None)] * 2),
        _apply_to_tensors(lambda tensor: tensor, output),
    ):
        assert type(again) is type(output)
    assert len(list(_find_tensors(output))) == 2


def test_jax_s_transformations():
    jax = pytest.importorskip("jax")
    from flax import nnx

    from mistral_flax import MistralForCausalLM

    model = MistralForCausalLM(CONFIG)
    params = model.params
    output = jax.jit(lambda p, ids: model(ids, labels=ids, params=p))(params, IDS)
    assert (output._fields, type(output)) == (("loss", "logits", "past_key_values"), type(model(IDS, labels=IDS)))

    def loss(p):
        output = model(IDS, labels=IDS, params=p, use_cache=False)
        return output.loss, output

    _, output = jax.jit(jax.grad(loss, has_aux=True))(params)
    assert output._fields == ("loss", "logits")
    mapped = jax.jit(jax.vmap(lambda row: model(row[None], use_cache=False)))(IDS)
    assert (mapped._fields, mapped.logits.shape) == (("logits",), (2, 1, 9, CONFIG.vocab_size))
    assert nnx.jit(lambda m: m(IDS, use_cache=False))(model)[0].shape == (2, 9, CONFIG.vocab_size)
    ((path, _), _) = jax.tree_util.tree_leaves_with_path(output)
    assert str(path) == "(GetAttrKey(name='loss'),)"
    assert jax.tree.map(lambda x: None, output)._fields == ("loss", "logits")
    assert np.array_equal(pickle.loads(pickle.dumps(output)).logits, output.logits)


def test_tensorflow_s_functions():
    tf = pytest.importorskip("tensorflow")
    import keras

    from mistral_tf import MistralForCausalLM

    model, ids = MistralForCausalLM(CONFIG), tf.constant(IDS, tf.int32)
    wanted = model(ids, labels=ids, use_cache=False)
    output = tf.function(lambda ids: model(ids, labels=ids, use_cache=False))(ids)
    assert (type(output), output._fields) == (type(wanted), ("loss", "logits"))
    assert np.allclose(output.logits, wanted[1], atol=1e-5)
    for again in (
        tf.nest.map_structure(tf.identity, wanted),
        keras.tree.map_structure(tf.identity, wanted),
        tf.distribute.MirroredStrategy(["CPU:0"]).run(lambda: model(ids, labels=ids, use_cache=False)),
        tf.cond(tf.constant(True), lambda: wanted, lambda: wanted),
        copy.deepcopy(wanted),
        pickle.loads(pickle.dumps(wanted)),
    ):
        assert type(again) is type(wanted)
    assert model.predict(ids, verbose=0)[0].shape == (2, 9, CONFIG.vocab_size)
