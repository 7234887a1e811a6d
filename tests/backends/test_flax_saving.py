"""Every way in which Flax and Orbax save and restore a model gives every tensor back, bit for bit."""

from __future__ import annotations

import copy
import pickle

import jax
import numpy as np
import pytest
from flax import nnx, serialization

import mistral_flax
from mistral_core.config.presets import TINY
from mistral_core.parameters import HEADS
from mistral_flax import FlaxMistralForCausalLM, MistralForCausalLM
from mistral_flax.scan import scan_layers

pytestmark = pytest.mark.feature("Saving in the framework's own format")

CONFIG = TINY.replace(num_hidden_layers=2, num_labels=3)


def filled(kind, config=CONFIG, dtype="float32"):
    """A model of random bits: denormals, infinities and NaNs with a payload among them."""
    model = kind(config, dtype=dtype, param_dtype=dtype)
    random = np.random.default_rng(1)
    for name, array in list(model.named_arrays()):
        bits = random.integers(0, 256, array.nbytes, np.uint8)
        model.set_parameter(name, bits.view(array.dtype).reshape(array.shape))
    return model


def bits(model):
    return {name: array.tobytes() for name, array in model.named_arrays()}


def like(model):
    return type(model)(model.config, dtype=model.dtype, param_dtype=model.param_dtype)


def with_state(model, pure):
    """A model like this one with the arrays of a plain nested dictionary."""
    other = like(model)
    state = nnx.state(other)
    nnx.replace_by_pure_dict(state, pure)
    nnx.update(other, state)
    return other


def orbax_state(model, folder):
    ocp = pytest.importorskip("orbax.checkpoint")
    with ocp.StandardCheckpointer() as checkpointer:
        checkpointer.save(folder / "state", nnx.state(model))
        checkpointer.wait_until_finished()
        graph, shapes = nnx.split(nnx.eval_shape(lambda: like(model)))
        return nnx.merge(graph, checkpointer.restore(folder / "state", shapes))


def orbax_plain_dictionary(model, folder):
    ocp = pytest.importorskip("orbax.checkpoint")
    with ocp.StandardCheckpointer() as checkpointer:
        checkpointer.save(folder / "state", nnx.to_pure_dict(nnx.state(model)))
        checkpointer.wait_until_finished()
        return with_state(model, checkpointer.restore(folder / "state"))


def orbax_manager(model, folder):
    ocp = pytest.importorskip("orbax.checkpoint")
    other = like(model)
    with ocp.CheckpointManager(folder) as manager:
        manager.save(0, args=ocp.args.StandardSave(nnx.state(model)))
        manager.wait_until_finished()
        nnx.update(other, manager.restore(0, args=ocp.args.StandardRestore(nnx.state(other))))
    return other


def orbax_params(model, folder):
    ocp = pytest.importorskip("orbax.checkpoint")
    with ocp.StandardCheckpointer() as checkpointer:
        checkpointer.save(folder / "params", model.params)
        checkpointer.wait_until_finished()
        return like(model).bind(checkpointer.restore(folder / "params", jax.eval_shape(lambda: model.params)))


def split_and_merge(model, folder):
    graph, parameters, rest = nnx.split(nnx.clone(model), nnx.Param, ...)
    return nnx.merge(graph, parameters, rest)


def flat_state(model, folder):
    return with_state(model, nnx.to_pure_dict(nnx.from_flat_state(nnx.to_flat_state(nnx.state(model)))))


def pickled(model, folder):
    return pickle.loads(pickle.dumps(model))


def pickled_state(model, folder):
    return nnx.merge(*pickle.loads(pickle.dumps(nnx.split(model))))


def deep_copy(model, folder):
    return copy.deepcopy(model)


def msgpack_of_params(model, folder):
    return like(model).bind(serialization.from_bytes(like(model).params, serialization.to_bytes(model.params)))


def msgpack_of_state(model, folder):
    data = serialization.msgpack_serialize(nnx.to_pure_dict(nnx.state(model)))
    return with_state(model, serialization.msgpack_restore(data))


def state_dict(model, folder):
    other = like(model)
    nnx.update(other, serialization.from_state_dict(nnx.state(other), serialization.to_state_dict(nnx.state(model))))
    return other


def safetensors_own(model, folder):
    safetensors = pytest.importorskip("safetensors.flax")
    safetensors.save_file(model.params, folder / "model.safetensors")
    return like(model).bind(safetensors.load_file(folder / "model.safetensors"))


WAYS = (orbax_state, orbax_plain_dictionary, orbax_manager, orbax_params, split_and_merge, flat_state, pickled,
        pickled_state, deep_copy, msgpack_of_params, msgpack_of_state, state_dict, safetensors_own)  # fmt: skip


@pytest.fixture(scope="module", params=[False, True], ids=["float32", "tied-bfloat16"])
def model(request):
    dtype = "bfloat16" if request.param else "float32"
    return filled(MistralForCausalLM, CONFIG.replace(tie_word_embeddings=request.param), dtype)


@pytest.mark.parametrize("way", WAYS)
def test_every_tensor_comes_back(model, way, tmp_path):
    before = bits(model)
    other = way(model, tmp_path)
    assert bits(other) == before
    assert (other.dtype, other.param_dtype, other.config) == (model.dtype, model.param_dtype, model.config)
    assert (other.lm_head is None) == model.config.tie_word_embeddings
    other.config.rope_theta = 7.0
    other.set_parameter("model.norm.weight", np.zeros(CONFIG.hidden_size, model.param_dtype))
    assert bits(model) == before, "the copy's tensors are its own"
    assert model.config.rope_theta == CONFIG.rope_theta


@pytest.mark.parametrize("head", HEADS)
@pytest.mark.parametrize("way", [orbax_state, pickled_state, msgpack_of_state])
def test_every_class(head, way, tmp_path):
    model = filled(getattr(mistral_flax, head))
    assert bits(way(model, tmp_path)) == bits(model)


@pytest.mark.parametrize("way", [pickled, pickled_state, split_and_merge, deep_copy])
def test_stacked_layers(way, tmp_path):
    model = filled(MistralForCausalLM)  # in bfloat16 XLA quiets signalling NaNs where it stacks
    stacked = scan_layers(nnx.clone(model))
    assert bits(way(stacked, tmp_path)) == bits(model)


def test_a_linen_module_s_variables(model):
    linen = nnx.bridge.to_linen(MistralForCausalLM, model.config, dtype=model.dtype, param_dtype=model.param_dtype)
    empty = jax.eval_shape(linen.init, jax.random.key(0), np.ones((1, 2), np.int32))
    variables = {**empty, "params": nnx.to_pure_dict(nnx.state(model, nnx.Param))}
    restored = serialization.from_bytes(empty, serialization.to_bytes(variables))
    assert bits(with_state(model, restored["params"])) == bits(model)


@pytest.mark.parametrize("copied", [copy.deepcopy, lambda model: pickle.loads(pickle.dumps(model))])
def test_a_model_by_transformers_name(copied):
    model = FlaxMistralForCausalLM(CONFIG)
    assert bits(copied(model).module) == bits(model.module)
    restored = serialization.from_bytes(model.params, serialization.to_bytes(model.params))
    assert all(np.array_equal(restored[name], array) for name, array in model.params.items())
