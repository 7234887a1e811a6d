"""Flax's own ways: NNX transforms, states and optimizers, orbax, Linen, and the config that lives in a graph."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx

import mistral_flax
from conformance.weights import random_parameters
from mistral_core.config.presets import TINY
from mistral_core.errors import ConfigError, UnsupportedFeatureError
from mistral_core.parameters import HEADS
from mistral_flax import AutoConfig, MistralForCausalLM, MistralModel

CONFIG = TINY.replace(num_hidden_layers=1)
IDS = np.random.default_rng(0).integers(3, CONFIG.vocab_size, (2, 9))
PARAMETERS = random_parameters(CONFIG, "MistralForCausalLM")


def make(config=CONFIG, **options):
    return MistralForCausalLM(config, **options).load_arrays(PARAMETERS)


def next_token_loss(model):
    return model(IDS, labels=IDS).loss


def close(a, b):
    return np.allclose(np.asarray(a), np.asarray(b), atol=2e-5)


def same(a, b):
    assert jax.tree.structure(a) == jax.tree.structure(b)
    return jax.tree.all(jax.tree.map(close, a, b))


@pytest.fixture(scope="module")
def gradients():
    return jax.jit(jax.grad(lambda params: make()(IDS, params=params, labels=IDS).loss))(make().params)


# Construction


def test_a_model_is_drawn_from_rngs():
    first, again, other = (MistralModel(CONFIG, rngs=nnx.Rngs(params=seed)) for seed in (1, 1, 2))
    assert same(nnx.state(first), nnx.state(again))
    assert not close(first.params["model.embed_tokens.weight"], other.params["model.embed_tokens.weight"])


@pytest.mark.parametrize("architecture", HEADS)
def test_dtypes_are_said_at_construction(architecture):
    model = getattr(mistral_flax, architecture)(CONFIG, dtype=jnp.bfloat16, param_dtype=jnp.float32)
    assert (model.dtype, model.param_dtype) == (jnp.bfloat16, jnp.float32)
    assert {leaf.dtype for leaf in jax.tree.leaves(nnx.state(model))} == {jnp.dtype("float32")}
    assert getattr(mistral_flax, architecture)(CONFIG, dtype="bfloat16").param_dtype == jnp.bfloat16


@pytest.mark.feature("AutoModelFor*, AutoTokenizer, AutoConfig")
@pytest.mark.parametrize("architecture", HEADS)
def test_auto_classes(architecture, tmp_path):
    kind = getattr(mistral_flax, architecture)
    auto = getattr(mistral_flax, architecture.replace("Mistral", "Auto", 1).replace("AutoFor", "AutoModelFor"))
    fresh = auto.from_config(CONFIG, num_labels=4, dtype="bfloat16", param_dtype="float32", rngs=nnx.Rngs(3))
    assert (type(fresh), fresh.dtype, fresh.config.num_labels) == (kind, jnp.bfloat16, 4)
    fresh.save_pretrained(tmp_path)
    loaded = auto.from_pretrained(tmp_path, torch_dtype="float32", device_map="cpu")
    assert (type(loaded), loaded.dtype) == (kind, jnp.float32)
    assert same(loaded.params, fresh.params)
    assert AutoConfig.from_pretrained(tmp_path).num_labels == 4
    with pytest.raises(UnsupportedFeatureError, match="from_pretrained"):
        auto()


# The config in the graph


@pytest.mark.feature("Assignable config fields")
def test_an_assignment_to_the_config_is_checked_and_stays_with_the_model():
    model = MistralModel(CONFIG)
    graph, state = nnx.split(model)
    model.config.rope_theta = 2.0
    assert CONFIG.rope_theta == TINY.rope_theta, "the config given is not the model's"
    merged = nnx.merge(graph, state)
    assert merged.config.rope_theta == TINY.rope_theta, "nor is the one of a graph made before"
    merged.config.rope_theta = 3.0
    assert (model.config.rope_theta, nnx.merge(graph, state).config.rope_theta) == (2.0, TINY.rope_theta)
    with pytest.raises(ConfigError, match="rope_theta"):
        model.config.rope_theta = -1.0


@pytest.mark.feature("Assignable config fields")
def test_an_assignment_to_the_config_retraces():
    traced = []

    @nnx.jit
    def hidden(model):
        traced.append(model.config.rope_theta)
        return model(IDS).last_hidden_state

    model = MistralModel(CONFIG)
    before = hidden(model)
    model.config.rope_theta = 2.0
    after = hidden(model)
    assert not close(after, before)
    model.config = model.config.replace(rope_theta=CONFIG.rope_theta)
    assert close(hidden(model), before)
    assert traced == [CONFIG.rope_theta, 2.0], "a config seen before is not compiled again"


def test_a_merged_model_has_a_config_of_its_own():
    model = make()
    copy = nnx.clone(model)
    copy.config.use_cache = False
    assert model.config.use_cache
    assert model(IDS).past_key_values is not None
    assert copy(IDS).past_key_values is None
    assert copy.config is copy.model.config


# Transforms


@pytest.mark.feature("nnx.jit, nnx.grad, nnx.value_and_grad")
def test_jit_and_grad(gradients):
    model = make()
    loss, found = nnx.jit(nnx.value_and_grad(next_token_loss))(model)
    assert close(loss, next_token_loss(model))
    assert same(model.bind(gradients).params, gradients)
    assert same(found, nnx.state(model.bind(gradients)))
    assert same(nnx.jit(nnx.grad(next_token_loss))(model), found)


@pytest.mark.feature("nnx.remat")
def test_remat(gradients):
    found = nnx.jit(nnx.grad(nnx.remat(next_token_loss)))(make())
    assert same(found, nnx.state(make().bind(gradients)))


@pytest.mark.feature("nnx.vmap (an ensemble)")
def test_vmap_over_models():
    models = nnx.vmap(lambda key: MistralForCausalLM(CONFIG, rngs=nnx.Rngs(params=key)))(
        jax.random.split(jax.random.key(0), 3)
    )
    assert models.lm_head.weight.shape == (3, CONFIG.vocab_size, CONFIG.hidden_size)
    logits = nnx.jit(nnx.vmap(lambda model, ids: model(ids).logits, in_axes=(0, None)))(models, jnp.asarray(IDS))
    assert not close(logits[0], logits[1])
    graph, state = nnx.split(models)
    last = nnx.merge(graph, jax.tree.map(lambda leaf: leaf[2], state))
    assert close(logits[2], last(IDS).logits)


@pytest.mark.feature("nnx.state, nnx.split, nnx.merge, nnx.update")
def test_state_split_and_merge():
    model, other = make(), MistralForCausalLM(CONFIG, rngs=nnx.Rngs(9))
    graph, state = nnx.split(model)
    assert hash(graph) == hash(nnx.graphdef(make()))
    assert close(nnx.merge(graph, state)(IDS).logits, model(IDS).logits)
    nnx.update(other, state)
    assert close(other(IDS).logits, model(IDS).logits)
    names = {".".join(map(str, path)) for path, _ in nnx.to_flat_state(nnx.state(model, nnx.Param))}
    assert names == set(model.params), "the paths of a state are the names of a checkpoint"


# Training


@pytest.mark.feature("Training step")
@pytest.mark.lenient_jax("optax's correction of bias takes a float to the power of an integer")
def test_an_nnx_optimizer_lowers_the_loss():
    model = make()
    optimizer = nnx.Optimizer(model, optax.adamw(1e-2), wrt=nnx.Param)

    @nnx.jit
    def step(model, optimizer):
        loss, gradients = nnx.value_and_grad(next_token_loss)(model)
        optimizer.update(model, gradients)
        return loss

    losses = [float(step(model, optimizer)) for _ in range(8)]
    assert losses[-1] < losses[0] / 2


@pytest.mark.feature("nnx.scan (steps of training in one program)")
def test_steps_in_a_scan_are_the_steps_of_a_loop():
    def step(carry, ids):
        model, optimizer = carry
        loss, gradients = nnx.value_and_grad(lambda m: m(ids, labels=ids).loss)(model)
        optimizer.update(model, gradients)
        return carry, loss

    def start():
        model = make()
        return model, nnx.Optimizer(model, optax.sgd(1e-2), wrt=nnx.Param)

    batches = jnp.asarray(np.random.default_rng(1).integers(3, CONFIG.vocab_size, (3, 2, 9)))
    scanned, looped, one = start(), start(), nnx.jit(step)
    _, losses = nnx.jit(nnx.scan(step, in_axes=(nnx.Carry, 0), out_axes=(nnx.Carry, 0)))(scanned, batches)
    for index, ids in enumerate(batches):
        assert close(one(looped, ids)[1], losses[index])
    assert same(scanned[0].params, looped[0].params)


# Files and other libraries


@pytest.mark.feature("Saving in the framework's own format")
def test_a_state_through_orbax_keeps_its_bits(tmp_path):
    ocp = pytest.importorskip("orbax.checkpoint")
    model = make(dtype="bfloat16")
    model.load_arrays({name: array.astype("bfloat16") for name, array in PARAMETERS.items()})
    with ocp.StandardCheckpointer() as checkpointer:
        checkpointer.save(tmp_path / "state", nnx.state(model))
        checkpointer.wait_until_finished()
        graph, shapes = nnx.split(nnx.eval_shape(lambda: MistralForCausalLM(CONFIG, dtype="bfloat16")))
        restored = nnx.merge(graph, checkpointer.restore(tmp_path / "state", shapes))
    for name, array in restored.named_arrays():
        assert array.tobytes() == PARAMETERS[name].astype("bfloat16").tobytes(), name
    assert np.array_equal(restored(IDS).logits, model(IDS).logits)


@pytest.mark.feature("Linen, through flax.nnx.bridge")
@pytest.mark.lenient_jax("optax's correction of bias takes a float to the power of an integer")
def test_a_linen_module_trains():
    linen = nnx.bridge.to_linen(MistralForCausalLM, CONFIG)
    params = linen.init(jax.random.key(0), IDS)["params"]
    assert params["model"]["layers"]["0"]["mlp"]["up_proj"]["weight"].shape == (CONFIG.intermediate_size, 48)
    optimizer = optax.adamw(1e-2)

    def loss(params):
        return linen.apply({"params": params}, IDS, labels=IDS).loss

    @jax.jit
    def step(params, state):
        value, gradients = jax.value_and_grad(loss)(params)
        updates, state = optimizer.update(gradients, state, params)
        return optax.apply_updates(params, updates), state, value

    state, losses = optimizer.init(params), []
    for _ in range(8):
        params, state, value = step(params, state)
        losses.append(float(value))
    assert losses[-1] < losses[0] / 1.5
    # the same numbers as the model itself
    model = MistralForCausalLM(CONFIG)
    nnx.update(model, nnx.State(jax.tree.map(lambda leaf: nnx.Param(leaf), params)))
    assert close(linen.apply({"params": params}, IDS).logits, model(IDS).logits)
