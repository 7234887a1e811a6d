"""Adapters in Flax's own idiom: LoRAParam filters, functional use, keys for dropout, stacked and sharded layers."""

from __future__ import annotations

import jax
import numpy as np
import optax
import pytest
from flax import nnx
from jax.sharding import AxisType

import mistral_flax
from conformance.weights import random_parameters
from mistral_core.config.presets import TINY
from mistral_core.errors import UnsupportedFeatureError
from mistral_flax import lora, scan, sharding

CONFIG = TINY.replace(num_hidden_layers=2, layer_types=None, sliding_window=None)
IDS = np.arange(3, 23).reshape(2, 10)
LINEAR = {"r": 2, "lora_alpha": 8, "target_modules": ["q_proj", "down_proj", "v_proj"]}


def make(**config):
    changed = CONFIG.replace(**config)
    model = mistral_flax.MistralForCausalLM(changed, attn_implementation="eager")
    return model.load_arrays(random_parameters(changed))


def adapted(**fields):
    return lora.add_adapter(make(), lora.LoraConfig(**{**LINEAR, "init_lora_weights": False, **fields}))


def logits(model, **options):
    return np.asarray(model(IDS, **options).logits)


@nnx.jit
def step(model, optimizer, key=None):
    wrt = nnx.DiffState(0, nnx.LoRAParam)
    loss, gradients = nnx.value_and_grad(lambda model: model(IDS, labels=IDS, rngs=key).loss, argnums=wrt)(model)
    optimizer.update(model, gradients)
    return loss


@pytest.mark.lenient_jax("optax: counts steps in integers")
@pytest.mark.parametrize("how", ["floats", "checkpointed", "nf4"])
def test_an_optimizer_of_lora_params_trains_the_adapter_alone(how):
    base = mistral_flax.quantize(make(), "nf4") if how == "nf4" else make()
    model = lora.add_adapter(base, lora.LoraConfig(**LINEAR, lora_dropout=0.25))
    if how == "checkpointed":
        model.gradient_checkpointing_enable()
    base = dict(model.named_arrays())
    optimizer = nnx.Optimizer(model, optax.adamw(1e-2), wrt=nnx.LoRAParam)
    losses = [float(step(model, optimizer, jax.random.key(number))) for number in range(6)]
    assert losses[-1] < losses[0]
    assert all(np.array_equal(array, base[name]) for name, array in model.named_arrays())
    assert all(np.abs(weights.b).max() > 0 for weights in lora.adapter_of(model).weights.values())


def test_params_and_bind_mean_the_base():
    model, plain = adapted(), make()
    assert model.params.keys() == plain.params.keys()
    params = {name: array * 1.1 for name, array in model.params.items()}
    with lora.disable_adapter(model):
        assert np.array_equal(logits(model, params=params), logits(plain, params=params))
    assert not np.allclose(logits(model, params=params), logits(plain, params=params), atol=1e-3)
    gradients = jax.grad(lambda params: model(IDS, labels=IDS, params=params).loss)(model.params)
    assert gradients.keys() == plain.params.keys()


def test_a_model_taken_apart_keeps_its_adapters(tmp_path):
    model = adapted()
    again = nnx.merge(*nnx.split(model))
    assert np.array_equal(logits(again), logits(model))
    lora.save_adapter(again, tmp_path)
    assert np.array_equal(logits(lora.load_adapter(make(), tmp_path)), logits(model))
    lora.merge(again)
    taken = nnx.merge(*nnx.split(again))
    lora.unmerge(taken)
    assert np.array_equal(logits(taken), logits(model))


def test_what_does_not_train_is_no_lora_param(tmp_path):
    model = adapted()
    lora.save_adapter(model, tmp_path)
    loaded = lora.load_adapter(make(), tmp_path)
    assert not jax.tree.leaves(nnx.state(loaded, nnx.LoRAParam))
    lora.set_adapter(loaded, "default")
    assert len(jax.tree.leaves(nnx.state(loaded, nnx.LoRAParam))) == 2 * 3 * 2
    lora.add_adapter(loaded, lora.LoraConfig(r=3), name="other")
    found = nnx.to_flat_state(nnx.state(loaded, nnx.LoRAParam))
    assert {path[-2] for path, _ in found} == {"other"}


def test_inputs_are_dropped_in_training_alone_and_of_each_matrix_others():
    dropping, plain = adapted(lora_dropout=0.5), adapted()
    assert np.array_equal(logits(dropping), logits(plain))
    first, second = (logits(dropping, rngs=jax.random.key(number)) for number in (0, 1))
    assert np.abs(first - second).max() > 1e-3
    assert np.array_equal(logits(dropping, rngs=jax.random.key(0)), first)
    assert np.array_equal(logits(plain, rngs=jax.random.key(0)), logits(plain))
    attention = dropping.model.layers["0"].self_attn
    numbers = {attention.q_proj.lora["default"].number, attention.v_proj.lora["default"].number}
    assert len(numbers) == 2
    last = {"target_modules": ["down_proj"], "layers_to_transform": [1], "lora_alpha": 0.2}
    dropping, change = adapted(lora_dropout=0.5, **last), logits(adapted(**last)) - logits(make())
    changes = np.mean([logits(dropping, rngs=jax.random.key(number)) for number in range(40)], 0) - logits(make())
    assert 0.85 < (changes * change).sum() / np.square(change).sum() < 1.15, "what is kept counts for what is not"
    lora.add_adapter(make(), lora.LoraConfig(target_modules=["lm_head"]))
    with pytest.raises(UnsupportedFeatureError, match=r"lora_dropout must be 0 to train lm_head.weight in JAX"):
        lora.add_adapter(make(), lora.LoraConfig(target_modules=["lm_head"], lora_dropout=0.1))


def test_stacked_layers_compute_with_adapters_and_are_unstacked_to_change_them(tmp_path):
    model = adapted(target_modules="all-linear", use_dora=True, lora_dropout=0.5)
    wanted, dropped = logits(model), logits(model, rngs=jax.random.key(0))
    scan.scan_layers(model)
    assert np.abs(logits(model) - wanted).max() < 1e-5
    assert np.abs(logits(model, rngs=jax.random.key(0)) - dropped).max() < 1e-5
    for refused in (lora.add_adapter, lora.merge, lambda model, **_: lora.save_adapter(model, tmp_path)):
        with pytest.raises(UnsupportedFeatureError, match=r"call unscan_layers\(model\) first"):
            refused(model, **({"name": "new"} if refused is lora.add_adapter else {}))
    scan.unscan_layers(model)
    assert np.array_equal(logits(model), wanted)
    partly = adapted(layers_to_transform=[1])
    with pytest.raises(UnsupportedFeatureError, match="scan_layers: the layers' matrices are packed, or adapted, in"):
        scan.scan_layers(partly)


@pytest.mark.parametrize("first", ["adapters", "mesh"])
def test_adapters_over_a_mesh(first, tmp_path):
    mesh = jax.make_mesh((1,), ("tensor",), axis_types=(AxisType.Auto,))
    asked = lora.LoraConfig(
        **{**LINEAR, "target_modules": ["q_proj", "embed_tokens", "lm_head"]}, init_lora_weights=False
    )
    plain = lora.add_adapter(make(), asked)
    model = make()
    if first == "mesh":
        sharding.shard(model, mesh)
    lora.add_adapter(model, asked)
    if first == "adapters":
        sharding.shard(model, mesh)
    assert np.array_equal(logits(model), logits(plain))
    assert isinstance(model.lm_head, lora.AdaptedHead)
    assert np.array_equal(model.generate(IDS, max_new_tokens=3), plain.generate(IDS, max_new_tokens=3))
    lora.save_adapter(model, tmp_path)
    lora.merge(model)
    lora.merge(plain)
    assert np.array_equal(logits(model), logits(plain))


def test_a_module_of_others_gets_no_adapter():
    model = make()
    model.model.layers["0"].self_attn.q_proj = nnx.Linear(48, 48, rngs=nnx.Rngs(0))
    with pytest.raises(UnsupportedFeatureError, match=r"q_proj.weight: adapters go to the modules that models here"):
        lora.add_adapter(model)
