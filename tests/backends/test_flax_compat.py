"""transformers' Flax classes by their names: its own decode loops, masks and params handling, over our numbers."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import mistral_flax
from conformance.weights import random_parameters
from mistral_core.config.presets import TINY
from mistral_core.errors import GenerationConfigError, InputError, MissingTensorsError, UnsupportedFeatureError
from mistral_core.parameters import shapes
from mistral_flax import FlaxAutoModel, FlaxAutoModelForCausalLM, FlaxMistralForCausalLM, FlaxMistralModel

CONFIG = TINY.replace(num_hidden_layers=1)
NEW = CONFIG.sliding_window + 2
IDS = jnp.asarray(np.random.default_rng(0).integers(3, CONFIG.vocab_size, (2, 9)), jnp.int32)
MASK = jnp.ones_like(IDS).at[0, :3].set(0)
PARAMS = {name: jnp.asarray(array) for name, array in random_parameters(CONFIG, "MistralForCausalLM").items()}

pytestmark = pytest.mark.feature("transformers 4.x classes: FlaxMistral*, TFMistral*")


@pytest.fixture(scope="module")
def model():
    model = FlaxMistralForCausalLM(CONFIG)
    model.params = PARAMS
    return model


@pytest.fixture(scope="module")
def checkpoint(model, tmp_path_factory):
    directory = tmp_path_factory.mktemp("checkpoint")
    model.save_pretrained(directory, params=model.to_bf16(model.params))
    return directory


def close(a, b):
    return np.allclose(np.asarray(a), np.asarray(b), atol=2e-5)


@pytest.mark.parametrize("name", ["FlaxMistralModel", "FlaxMistralForCausalLM"])
def test_numbers_are_the_class_s_own(name):
    ours = getattr(mistral_flax, name.removeprefix("Flax"))(CONFIG)
    theirs = getattr(mistral_flax, name)(CONFIG)
    theirs.params = ours.params
    expected = ours(IDS, MASK, output_hidden_states=True, output_attentions=True, use_cache=False)
    out = theirs(IDS, MASK, output_hidden_states=True, output_attentions=True)
    assert jax.tree.structure(out) == jax.tree.structure(expected)
    assert jax.tree.all(jax.tree.map(lambda a, b: (a == b).all(), out, expected))
    assert len(theirs(IDS, MASK, return_dict=False)) == 1
    assert theirs.num_params() == theirs.num_parameters() == ours.num_parameters()


def test_a_decode_loop_with_the_mask_of_all_columns(model):
    """As transformers' documentation writes it: one static mask, positions counted on."""
    total = IDS.shape[1] + NEW
    inputs = model.prepare_inputs_for_generation(IDS, total, MASK)
    assert inputs["attention_mask"].shape == (2, total)
    step = jax.jit(lambda params, token, inputs: model(token, params=params, **inputs))
    token, sequences, logits = IDS, IDS, []
    for _ in range(NEW):
        out = step(model.params, token, inputs)
        inputs = model.update_inputs_for_generation(out, inputs)
        token = out.logits[:, -1:].argmax(-1).astype(jnp.int32)
        sequences = jnp.concatenate([sequences, token], axis=1)
        logits.append(out.logits[:, -1])
    uncached = model(sequences[:, :-1], inputs["attention_mask"][:, : total - 1]).logits
    assert close(jnp.stack(logits, axis=1), uncached[:, IDS.shape[1] - 1 :])
    assert np.array_equal(sequences, model.generate(IDS, attention_mask=MASK, max_length=total).sequences)


def test_the_same_loop_uncompiled_and_in_a_while_loop(model):
    total = IDS.shape[1] + NEW
    prompt = model.prepare_inputs_for_generation(IDS, total, MASK)
    out = model(IDS, **prompt)
    prompt = model.update_inputs_for_generation(out, prompt)
    first = out.logits[:, -1:].argmax(-1).astype(jnp.int32)
    second = model(first, **prompt).logits

    def body(state):
        sequences, token, inputs, column = state
        out = model(token, **inputs)
        sequences = jax.lax.dynamic_update_slice(sequences, token, (0, column))
        token = out.logits[:, -1:].argmax(-1).astype(jnp.int32)
        return sequences, token, model.update_inputs_for_generation(out, inputs), column + 1

    start = jnp.pad(IDS, ((0, 0), (0, NEW))), first, prompt, jnp.int32(IDS.shape[1])
    sequences, *_ = jax.lax.while_loop(lambda state: state[3] < total, body, start)
    assert np.array_equal(sequences, model.generate(IDS, attention_mask=MASK, max_new_tokens=NEW).sequences)
    assert np.array_equal(sequences[:, IDS.shape[1] + 1], second[:, -1].argmax(-1))


def test_a_mask_that_denies_what_the_cache_holds_is_an_error(model):
    inputs = model.prepare_inputs_for_generation(IDS, 20, MASK)
    inputs = model.update_inputs_for_generation(model(IDS, **inputs), inputs)
    with pytest.raises(InputError, match="real tokens before"):
        model(IDS[:, :1], **{**inputs, "attention_mask": jnp.ones((2, 20), jnp.int32)})
    with pytest.raises(InputError, match="init_cache"):
        model(IDS, past_key_values=inputs["past_key_values"].cache)


def test_generate_pads_to_max_length_and_takes_their_arguments(model):
    expected = model.module.generate(IDS, max_new_tokens=2, eos_token_id=None)
    ends = int(expected[0, 10])
    out = model.generate(
        IDS[:1], params=model.params, max_length=14, eos_token_id=ends, pad_token_id=1, do_sample=False
    )
    assert out["sequences"].shape == (1, 14)
    assert np.array_equal(out.sequences[0, :11], expected[0, :11])
    assert (out.sequences[0, 11:] == 1).all()
    assert np.array_equal(model.generate(IDS, max_length=10, trace=False).sequences, expected[:, :10])


class FlaxLogitsProcessorList(list):
    """transformers' own: a list, called with ids, scores and how many ids there are."""

    def __call__(self, input_ids, scores, cur_len, **kwargs):
        raise AssertionError("each of its functions is called, by what it takes")


def test_generate_takes_their_logits_processors_and_ours(model):
    seen = []

    def theirs(input_ids, scores, cur_len):
        seen.append((input_ids.shape, cur_len))
        return jnp.where(jnp.arange(scores.shape[-1])[None] == 5 + cur_len, jnp.zeros_like(scores), -jnp.inf)

    class Ours:
        def __call__(self, input_ids, scores, **kwargs):
            return jnp.roll(scores, 1, axis=-1)

    new = {"max_new_tokens": 2, "eos_token_id": None}
    assert model.generate(IDS, logits_processor=theirs, **new).sequences[:, 9:].tolist() == [[14, 15]] * 2
    assert seen == [((2, 9), 9), ((2, 10), 10)]
    both = model.generate(IDS, logits_processor=FlaxLogitsProcessorList([theirs, Ours()]), **new)
    assert both.sequences[:, 9:].tolist() == [[15, 16]] * 2
    beams = model.generate(IDS, logits_processor=[theirs], num_beams=2, **new)
    assert beams.sequences[:, 9:].tolist() == [[14, 15]] * 2
    with pytest.raises(GenerationConfigError, match="logits_processor must be a list of functions, got int"):
        model.generate(IDS, logits_processor=[7])


def test_generate_pads_whatever_else_the_call_says(model):
    stop = model.generate(
        IDS, max_new_tokens=4, eos_token_id=None, pad_token_id=1, stopping_criteria=[lambda ids, scores: True],
        return_dict_in_generate=True,
    )  # fmt: skip
    assert stop.sequences.shape == (2, 13)
    assert (stop.sequences[:, 10:] == 1).all()


def test_a_model_without_parameters_of_its_own(model):
    empty = FlaxMistralForCausalLM(CONFIG, _do_init=False)
    assert all(isinstance(leaf, jax.ShapeDtypeStruct) for leaf in jax.tree.leaves(empty.module.params))
    assert {name: leaf.shape for name, leaf in empty.params_shape_tree.items()} == shapes(CONFIG)
    params = jax.jit(empty.init_weights, static_argnums=1)(jax.random.PRNGKey(1), (1, 1))
    assert close(params["lm_head.weight"], FlaxMistralForCausalLM(CONFIG, seed=1).params["lm_head.weight"])
    assert not close(params["lm_head.weight"], FlaxMistralForCausalLM(CONFIG, seed=2).params["lm_head.weight"])
    filled = empty.init_weights(jax.random.PRNGKey(1), (1, 1), PARAMS)
    assert close(empty(IDS, params=filled).logits, model(IDS).logits)
    assert np.array_equal(
        empty.generate(IDS, params=PARAMS, max_length=11).sequences, model.generate(IDS, max_length=11).sequences
    )
    with pytest.raises(InputError, match="_do_init"):
        empty(IDS)
    with pytest.raises(InputError, match="_do_init"):
        empty.params = PARAMS


def test_params_are_flat_and_complete(model):
    other = FlaxMistralForCausalLM(CONFIG)
    other.params = model.params
    assert close(other(IDS).logits, model(IDS).logits)
    nested = {"model": {"embed_tokens": {"embedding": jnp.ones((CONFIG.vocab_size, CONFIG.hidden_size))}}}
    with pytest.raises(MissingTensorsError, match="flat dict"):
        other.params = nested


def test_casts(model):
    half = model.to_bf16(model.params)
    assert {array.dtype for array in half.values()} == {jnp.dtype("bfloat16")}
    assert {array.dtype for array in model.to_fp32(model.to_fp16(half)).values()} == {jnp.dtype("float32")}
    norms = {name: "norm" not in name for name in model.params}
    assert model.to_bf16(model.params, norms)["model.norm.weight"].dtype == jnp.float32
    assert model.to_bf16(model.params, norms)["lm_head.weight"].dtype == jnp.bfloat16
    other = FlaxMistralForCausalLM(CONFIG)
    other.params = half
    assert other.dtype == jnp.float32, "params in another dtype leave the computation's"
    assert 0 < np.abs(other(IDS).logits - model(IDS).logits).max() < 1


@pytest.mark.parametrize("kind", [FlaxMistralForCausalLM, FlaxAutoModelForCausalLM])
def test_from_pretrained_computes_in_dtype_and_keeps_the_file_s_parameters(kind, checkpoint, model):
    loaded = kind.from_pretrained(checkpoint, from_pt=True)
    assert (loaded.dtype, loaded.params["lm_head.weight"].dtype) == (jnp.float32, jnp.bfloat16)
    halves = model.to_fp32(model.to_bf16(model.params))
    assert close(loaded(IDS).logits, model(IDS, params=halves).logits)
    assert kind.from_pretrained(checkpoint, jnp.bfloat16)(IDS, output_hidden_states=True).hidden_states[0].dtype == (
        jnp.bfloat16
    )
    empty, params = kind.from_pretrained(checkpoint, _do_init=False)
    assert close(empty(IDS, params=params).logits, loaded(IDS).logits)
    with pytest.raises(InputError, match="_do_init"):
        empty(IDS)


def test_auto_classes(checkpoint):
    with pytest.warns(UserWarning, match="lm_head.weight is not used"):
        assert isinstance(FlaxAutoModel.from_pretrained(checkpoint), FlaxMistralModel)
    assert FlaxAutoModelForCausalLM.from_config(CONFIG, seed=1, dtype=jnp.bfloat16).dtype == jnp.bfloat16
    with pytest.raises(UnsupportedFeatureError, match=r"FlaxAutoModel\.from_pretrained"):
        FlaxAutoModel()


def test_training_with_dropout(model):
    dropping = FlaxMistralForCausalLM(CONFIG.replace(attention_dropout=0.5))

    def logits(key, train=True):
        return dropping(IDS, params=PARAMS, train=train, dropout_rng=jax.random.PRNGKey(key)).logits

    assert close(logits(0), logits(0))
    assert not close(logits(0), logits(1))
    assert close(logits(0, train=False), model(IDS).logits)
    with pytest.raises(InputError, match="dropout_rng"):
        dropping(IDS, train=True)

    def loss(params):
        out = model(IDS, params=params, train=True, dropout_rng=jax.random.PRNGKey(0)).logits
        return -jax.nn.log_softmax(out[:, :-1])[..., 0].mean()

    model.enable_gradient_checkpointing()
    recomputed = jax.jit(jax.grad(loss))(PARAMS)
    model.module.gradient_checkpointing_disable()
    plain = jax.jit(jax.grad(loss))(PARAMS)
    assert all(close(recomputed[name], plain[name]) for name in plain)
