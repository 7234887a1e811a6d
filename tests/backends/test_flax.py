"""JAX's own ways: params as a plain pytree of Hugging Face names under jit, grad, vmap and eval_shape."""

from __future__ import annotations

import os
import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx

from conformance.weights import random_parameters
from mistral_core.config.presets import TINY
from mistral_core.errors import ConfigError
from mistral_core.parameters import shapes
from mistral_flax import KVCache, MistralForCausalLM, MistralModel

IDS = np.random.default_rng(0).integers(3, TINY.vocab_size, (2, 9))
CONFIG = TINY.replace(num_hidden_layers=1)
PARAMETERS = random_parameters(CONFIG, "MistralForCausalLM")


@pytest.fixture(scope="module")
def model():
    return MistralForCausalLM(CONFIG).load_arrays(PARAMETERS)


def close(a, b):
    return np.allclose(np.asarray(a), np.asarray(b), atol=2e-5)


@pytest.mark.feature("Parameters as a plain pytree of Hugging Face names")
def test_params_are_a_plain_pytree_with_the_table_s_names(model):
    assert {name: tuple(array.shape) for name, array in model.params.items()} == shapes(CONFIG)
    assert all(isinstance(array, jax.Array) for array in jax.tree.leaves(model.params))


def test_params_given_are_the_ones_used(model):
    other = {name: array * 0.5 for name, array in model.params.items()}
    assert close(model(IDS, params=model.params).logits, model(IDS).logits)
    assert not close(model(IDS, params=other).logits, model(IDS).logits)


@pytest.mark.feature("Compiled forward pass")
def test_jit(model):
    jitted = jax.jit(lambda params, ids: model(ids, params=params))
    assert close(jitted(model.params, IDS).logits, model(IDS).logits)


def test_an_eager_call_is_few_programs(model, caplog):
    """What belongs together is compiled together where nobody compiles the whole: a program takes 30 ms a shape."""
    past, programs = KVCache.allocate(CONFIG, 3, 40), []
    for T in (23, 1, 7):  # shapes of no other test in this file
        caplog.clear()
        with jax.log_compiles():
            past = model(np.full((3, T), 5), past_key_values=past).past_key_values
        programs.append(sum(record.getMessage().startswith("Compiling") for record in caplog.records))
    assert programs[0] > 0
    assert max(programs) <= 45


@pytest.mark.feature("Cache in a compiled step")
def test_jit_with_a_cache_that_goes_in_and_comes_out(model):
    step = jax.jit(lambda params, ids, past: model(ids, params=params, past_key_values=past))
    past, logits = KVCache.allocate(CONFIG, 2, 9), []
    for t in range(9):
        out = step(model.params, jnp.asarray(IDS[:, t : t + 1]), past)
        past = out.past_key_values
        logits.append(out.logits)
    assert step._cache_size() == 1, "one compilation for all steps"
    assert close(jnp.concatenate(logits, axis=1), model(IDS).logits)


@pytest.mark.feature("Donated buffers")
def test_a_donated_cache_is_used_up_by_its_step(model):
    step = jax.jit(lambda params, ids, past: model(ids, params=params, past_key_values=past), donate_argnums=2)
    past = KVCache.allocate(CONFIG, 2, 9)
    out = step(model.params, jnp.asarray(IDS), past)
    assert all(array.is_deleted() for array in jax.tree.leaves(past))
    assert close(out.logits, model(IDS).logits)
    with pytest.raises(RuntimeError, match="deleted"):
        step(model.params, jnp.asarray(IDS[:, :1]), past)


def test_grad_under_jit(model):
    def loss(params):
        return model(IDS, params=params, labels=IDS).loss

    params = model.params
    gradients = jax.jit(jax.grad(loss))(params)
    assert gradients.keys() == params.keys()
    along = jax.jit(lambda params: jax.jvp(loss, (params,), (gradients,))[1])(params)
    assert np.isclose(along, sum(jnp.vdot(g, g) for g in gradients.values())), "forward is reverse"


@pytest.mark.feature("Training step")
@pytest.mark.lenient_jax("optax's correction of bias takes a float to the power of an integer")
def test_a_training_step_with_optax_over_donated_parameters(model):
    optimizer = optax.adamw(1e-2)

    def step(params, state):
        loss, gradients = jax.value_and_grad(lambda p: model(IDS, params=p, labels=IDS).loss)(params)
        updates, state = optimizer.update(gradients, state, params)
        return optax.apply_updates(params, updates), state, loss

    step, losses = jax.jit(step, donate_argnums=(0, 1)), []
    params = jax.tree.map(jnp.copy, model.params)
    state = optimizer.init(params)
    for _ in range(8):
        before = params
        params, state, loss = step(params, state)
        losses.append(float(loss))
        assert all(array.is_deleted() for array in before.values())
    assert losses[-1] < losses[0] / 2
    assert close(model(IDS, params=params, labels=IDS).loss, step(params, state)[2])


DATA_PARALLEL = """
import jax, numpy as np
from functools import partial
from jax.sharding import Mesh, PartitionSpec as P
from mistral_core.config.presets import TINY
from mistral_flax import MistralForCausalLM

mesh = Mesh(np.array(jax.devices()), ("data",))
model = MistralForCausalLM(TINY.replace(num_hidden_layers=1))
ids = np.random.default_rng(0).integers(3, TINY.vocab_size, (4, 9))

@jax.jit
def gradients(params, ids):
    return jax.grad(lambda p: model(ids, params=p, labels=ids).loss)(params)

@jax.jit
@partial(jax.shard_map, mesh=mesh, in_specs=(P(), P("data")), out_specs=P(), check_vma=False)
def parallel(params, ids):
    return jax.tree.map(lambda g: jax.lax.psum(g, "data") / 2, gradients(params, ids))

assert mesh.size == 2
alone, together = gradients(model.params, ids), parallel(model.params, ids)
print(max(float(abs(alone[name] - together[name]).max() / abs(alone[name]).max()) for name in alone))
"""


@pytest.mark.feature("Data parallel over several devices (shard_map)")
def test_gradients_of_two_devices_are_those_of_one():
    flags = os.environ.get("XLA_FLAGS", "") + " --xla_force_host_platform_device_count=2"
    environment = {**os.environ, "JAX_PLATFORMS": "cpu", "XLA_FLAGS": flags}
    result = subprocess.run(
        [sys.executable, "-W", "error", "-c", DATA_PARALLEL],
        env=environment,
        capture_output=True,
        text=True,
        check=False,
    )
    assert result.returncode == 0, result.stderr
    assert float(result.stdout) < 1e-5


@pytest.mark.feature("Export")
def test_export_for_any_batch_and_length(model):
    forward = jax.jit(lambda params, ids: model(ids, params=params, use_cache=False).logits)
    batch, length = jax.export.symbolic_shape("batch, length")
    ids = jax.ShapeDtypeStruct((batch, length), jnp.int32)
    exported = jax.export.export(forward)(jax.eval_shape(lambda: model.params), ids).serialize()
    loaded = jax.export.deserialize(exported)
    for rows, columns in ((1, 3), (2, 9)):
        ids = jnp.asarray(IDS[:rows, :columns], jnp.int32)
        assert close(loaded.call(model.params, ids), model(ids).logits)


def test_vmap_over_rows(model):
    alone = jax.jit(jax.vmap(lambda row: model(row[None]).logits[0]))(jnp.asarray(IDS))
    assert close(alone, model(IDS).logits)


def test_eval_shape_of_a_published_size_takes_no_memory():
    from mistral_core.config.presets import PRESETS

    config = PRESETS["mistral-large-123b-2407"].replace(num_hidden_layers=4)  # each of its layers takes 2.8 GB
    model = nnx.eval_shape(lambda: MistralModel(config, dtype="bfloat16"))
    assert model.layers["3"].mlp.up_proj.weight.shape == (28672, 12288)
    assert all(isinstance(leaf, jax.ShapeDtypeStruct) for leaf in jax.tree.leaves(nnx.state(model, nnx.Param)))


@pytest.mark.feature("Mixed precision")
def test_bfloat16_is_computed_in_and_float32_kept():
    model = MistralForCausalLM(CONFIG, dtype=jnp.bfloat16, param_dtype=jnp.float32)
    assert (model.dtype, model.param_dtype) == (jnp.bfloat16, jnp.float32)
    forward = nnx.jit(lambda model: model(IDS, output_hidden_states=True))
    out = forward(model)
    assert {state.dtype for state in out.hidden_states} == {jnp.dtype("bfloat16")}
    assert out.past_key_values.keys[0].dtype == jnp.bfloat16
    assert out.logits.dtype == jnp.float32
    gradients = jax.jit(jax.grad(lambda params: model(IDS, params=params, labels=IDS).loss))(model.params)
    assert {gradient.dtype for gradient in gradients.values()} == {jnp.dtype("float32")}
    halves = MistralForCausalLM(CONFIG, dtype=jnp.bfloat16).load_arrays(
        {name: array.astype("bfloat16") for name, array in model.named_arrays()}
    )
    assert np.array_equal(forward(halves).logits, out.logits), "weights are rounded where they are used"


@pytest.mark.parametrize("dtype", [None, "int32", object()])
def test_a_dtype_that_no_model_can_have(dtype):
    with pytest.raises(ConfigError, match="dtype"):
        MistralForCausalLM(CONFIG, dtype=dtype)


@pytest.mark.feature("Attention dropout in training")
def test_dropout_is_on_where_rngs_are_given():
    model = MistralForCausalLM(CONFIG.replace(attention_dropout=0.5)).load_arrays(PARAMETERS)
    assert close(model(IDS).logits, model(IDS).logits)
    first, second = (model(IDS, rngs=jax.random.key(seed)).logits for seed in (0, 1))
    assert not close(first, second)
    assert close(first, model(IDS, rngs=jax.random.key(0)).logits)
    assert not close(model(IDS, rngs=nnx.Rngs(0)).logits, model(IDS).logits)


@pytest.mark.feature("Attention dropout in training")
def test_dropout_of_a_fused_kernel_is_the_formula_s():
    config = CONFIG.replace(attention_dropout=0.5)
    fused, eager = (
        MistralForCausalLM(config, attn_implementation=name).load_arrays(PARAMETERS)
        for name in ("dot_product", "eager")
    )
    key = jax.random.key(7)
    assert close(fused(IDS, rngs=key).logits, eager(IDS, rngs=key).logits)


@pytest.mark.feature("Resize token embeddings")
@pytest.mark.parametrize("tied", [False, True])
def test_resized_embeddings(tied):
    config = CONFIG.replace(tie_word_embeddings=tied)
    model = MistralForCausalLM(config, rngs=nnx.Rngs(1))
    before = model(IDS).logits
    assert model.resize_token_embeddings(100, pad_to_multiple_of=8).weight.shape == (104, TINY.hidden_size)
    assert (model.config.vocab_size, model.model.config.vocab_size) == (104, 104)
    assert np.isfinite(model(np.full_like(IDS, 103), labels=np.full_like(IDS, 103)).loss)
    assert np.array_equal(model(IDS).logits[..., : TINY.vocab_size], before)
    assert {name: array.shape for name, array in model.params.items()} == shapes(model.config)
    assert config.vocab_size == TINY.vocab_size, "the config given is not the model's"


@pytest.mark.feature("Saving in the framework's own format")
def test_params_through_orbax_keep_their_bits(model, tmp_path):
    ocp = pytest.importorskip("orbax.checkpoint")
    halves = {name: array.astype(jnp.bfloat16) for name, array in model.params.items()}
    with ocp.StandardCheckpointer() as checkpointer:
        checkpointer.save(tmp_path / "params", halves)
        checkpointer.wait_until_finished()
        restored = checkpointer.restore(tmp_path / "params", jax.eval_shape(lambda: halves))
    assert restored.keys() == halves.keys()
    assert all(np.array_equal(restored[name].view("uint16"), halves[name].view("uint16")) for name in halves)
    assert np.array_equal(model(IDS, params=restored).logits, model(IDS, params=halves).logits)


def test_an_id_out_of_range_under_jit_makes_nan(model):
    jitted = jax.jit(lambda ids: model(ids).logits)
    assert np.isnan(jitted(jnp.full((1, 2), TINY.vocab_size))).all()


def test_generate_compiles_once_for_a_shape_whatever_the_weights(model):
    from mistral_flax.generate import _compiled, as_program

    graph = nnx.graphdef(as_program(model))
    other = MistralForCausalLM(CONFIG, rngs=nnx.Rngs(1))
    ids = np.concatenate([IDS] * 7)  # as many rows as no other test of this process has
    sizes, tokens = [[jitted._cache_size() for jitted in _compiled(graph)]], []
    for each in (model, model, other):
        tokens.append(each.generate(ids, max_new_tokens=5, compile="on"))
        sizes.append([jitted._cache_size() for jitted in _compiled(graph)])
    assert np.array_equal(tokens[0], tokens[1])
    assert not np.array_equal(tokens[0], tokens[2])
    step, loop = sizes[0]
    assert sizes[1:] == [[step + 2, loop]] * 3  # prefill, decode


def test_generate_follows_the_config_and_a_tuple_is_no_hindrance(model):
    changed = MistralForCausalLM(CONFIG).load_arrays(PARAMETERS)
    assert np.array_equal(changed.generate(IDS, max_new_tokens=12), model.generate(IDS, max_new_tokens=12))
    changed.config.rope_theta, changed.config.return_dict = 1.5, False
    expected = MistralForCausalLM(CONFIG.replace(rope_theta=1.5)).load_arrays(PARAMETERS)
    assert np.array_equal(changed.generate(IDS, max_new_tokens=12), expected.generate(IDS, max_new_tokens=12))
    assert not np.array_equal(changed.generate(IDS, max_new_tokens=12), model.generate(IDS, max_new_tokens=12))
