"""Splash attention against the formula, layers in a scan against layers in turn, and what gradients keep."""

from __future__ import annotations

import jax
import jax.ad_checkpoint
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from conformance.weights import random_parameters
from mistral_core.config.presets import TINY
from mistral_core.errors import ConfigError, UnsupportedFeatureError
from mistral_flax import KVCache, MistralForCausalLM, attention
from mistral_flax.attention import Visibility, attend
from mistral_flax.scan import scan_layers, unscan_layers

CONFIG = TINY.replace(num_hidden_layers=2)
IDS = np.random.default_rng(0).integers(3, CONFIG.vocab_size, (3, 12))
MASK = np.ones_like(IDS)
MASK[0, :5], MASK[1, 9:], MASK[2, [2, 3, 7]] = 0, 0, 0
MASKS = {"none": np.ones_like(IDS), "left, right and holes": MASK}
PARAMETERS = random_parameters(TINY, "MistralForCausalLM")

splash_feature = pytest.mark.feature("Splash attention", note="unverified on a TPU: ran in Pallas' interpreter")


def make(config=CONFIG, **options):
    return MistralForCausalLM(config, **options).load_arrays(PARAMETERS)


def close(a, b):
    return np.allclose(np.asarray(a), np.asarray(b), atol=2e-5)


def same(a, b):
    assert jax.tree.structure(a) == jax.tree.structure(b)
    return jax.tree.all(jax.tree.map(close, a, b))


def call(model, *inputs, **options):
    return nnx.jit(lambda model, *inputs: model(*inputs, **options))(model, *inputs)


# Splash


@pytest.fixture
def interpreter(monkeypatch):
    monkeypatch.setattr(attention, "INTERPRET", True)


def qkv(batch, queries, keys):
    rng = np.random.default_rng(1)
    shapes = (batch, queries, 6, 16), (batch, keys, 2, 16), (batch, keys, 2, 16)
    return [jnp.asarray(rng.normal(size=shape), jnp.float32) for shape in shapes]


def order_of(mask):
    return jnp.asarray(np.where(mask, mask.cumsum(1) - 1, -1))


def both(arrays, *who):
    def run(implementation):
        return jax.jit(lambda q, k, v: attend(q, k, v, Visibility(*who), implementation=implementation)[0])(*arrays)

    return run("splash"), run("eager")


@splash_feature
@pytest.mark.parametrize(
    ("padding", "window"),
    [("none", None), ("left, right and holes", 5), ("left, right and holes", 1),
     *(pytest.param("none", window, marks=pytest.mark.slow) for window in (5, 1)),
     pytest.param("left, right and holes", None, marks=pytest.mark.slow)],
)  # fmt: skip
def test_splash_is_the_formula(interpreter, padding, window):
    order = order_of(MASKS[padding])
    splash, eager = both(qkv(*IDS.shape, IDS.shape[1]), order, order, window)
    assert close(splash, eager)
    assert (np.asarray(splash)[MASKS[padding] == 0] == 0).all()


@splash_feature
@pytest.mark.parametrize(("queries", "keys"), [(700, 700), (12, 300)])
def test_splash_over_several_blocks_skips_what_the_window_hides(interpreter, queries, keys):
    order = jnp.arange(keys)[None]
    splash, eager = both(qkv(1, queries, keys), order[:, keys - queries :], order, 9)
    assert close(splash, eager)


@splash_feature
@pytest.mark.parametrize("window", [None, 5])
def test_splash_keeps_packed_documents_apart(interpreter, window):
    documents = jnp.asarray([[0] * 4 + [1] * 8, [3] * 9 + [3] * 3, [5, 5, 5, 2, 2, 2, 2, 2, 2, 2, 0, 0]])
    order = order_of(MASK)
    splash, eager = both(qkv(3, 12, 12), order, order, window, documents)
    apart, _ = both(qkv(3, 12, 12), order, order, window)
    assert close(splash, eager)
    assert not close(splash, apart)


@splash_feature
@pytest.mark.parametrize(
    ("rolling", "prompt"),
    [(True, 8), (False, 3), *(pytest.param(*case, marks=pytest.mark.slow) for case in ((True, 3), (False, 8)))],
)
def test_splash_after_caches_of_several_lengths(interpreter, prompt, rolling):
    """Prompts shorter and longer than the window, in rings and in full caches, then a chunk and a token."""
    config = TINY.replace(num_hidden_layers=1)
    splash, eager = (make(config, attn_implementation=name) for name in ("splash", "eager"))
    mask = MASKS["left, right and holes"]
    expected = call(eager, IDS, mask).logits
    past, logits = KVCache.allocate(config, 3, 12, rolling=rolling), []
    for start, stop in ((0, prompt), (prompt, 11), (11, 12)):
        out = call(splash, IDS[:, start:stop], mask[:, start:stop], None, past)
        past = out.past_key_values
        logits.append(out.logits)
    assert close(jnp.concatenate(logits, axis=1), expected)


@splash_feature
def test_gradients_of_splash(interpreter):
    order = order_of(MASK)

    def gradients(implementation):
        def loss(q, k, v):
            o, _ = attend(q, k, v, Visibility(order, order, window=5), implementation=implementation)
            return jnp.square(o).sum()

        return jax.jit(jax.grad(loss, argnums=(0, 1, 2)))(*qkv(*IDS.shape, IDS.shape[1]))

    assert same(gradients("splash"), gradients("eager"))


@splash_feature
def test_splash_is_a_tpu_s(monkeypatch):
    assert attention.default() == "dot_product"
    assert make().model.layers["0"].self_attn.implementation == "dot_product"
    assert "splash" not in attention.available()
    with pytest.raises(UnsupportedFeatureError, match="TPU.*cpu.*dot_product"):
        make(attn_implementation="splash")
    monkeypatch.setattr(jax, "default_backend", lambda: "tpu")
    assert make().model.layers["0"].self_attn.implementation == "splash"
    monkeypatch.setattr(jax, "device_count", lambda: 8)
    assert attention.default() == "dot_product"


# Layers in a scan


@pytest.fixture(scope="module")
def scanned():
    return scan_layers(make())


@pytest.fixture(scope="module")
def plain():
    return make()


@pytest.mark.feature("Layers in a scan")
@pytest.mark.parametrize("options", [{"output_hidden_states": True, "output_attentions": True}, {"use_cache": False}])
def test_outputs_of_scanned_layers(scanned, plain, options):
    assert scanned.params["model.layers.mlp.up_proj.weight"].shape == (2, TINY.intermediate_size, TINY.hidden_size)
    assert same(call(scanned, IDS, MASK, **options), call(plain, IDS, MASK, **options))


@pytest.mark.feature("Layers in a scan")
@pytest.mark.parametrize("capacity", [None, 12])
def test_caches_of_scanned_layers(scanned, plain, capacity):
    caches = [KVCache.allocate(CONFIG, 3, capacity) for _ in range(2)]
    for start, stop in ((0, 7), (7, 12)):
        outs = [
            call(model, IDS[:, start:stop], MASK[:, start:stop], None, past)
            for model, past in zip((scanned, plain), caches, strict=True)
        ]
        assert same(*outs)
        caches = [out.past_key_values for out in outs]


@pytest.mark.feature("Layers in a scan")
@pytest.mark.parametrize("dtype", ["auto", "int8"])
def test_generation_with_scanned_layers(scanned, plain, dtype):
    options = {"max_new_tokens": 3, "cache_dtype": dtype}
    assert np.array_equal(scanned.generate(IDS, **options), plain.generate(IDS, **options))


@pytest.mark.feature("Layers in a scan")
def test_gradients_and_dropout_of_scanned_layers():
    config, key = CONFIG.replace(attention_dropout=0.3), jax.random.key(3)
    plain, scanned = make(config), scan_layers(make(config))
    scanned.gradient_checkpointing_enable({"policy": jax.checkpoint_policies.dots_saveable})

    def gradients(model):
        return jax.jit(jax.grad(lambda params: model(IDS, MASK, params=params, labels=IDS, rngs=key).loss))(
            model.params
        )

    assert same(unscan_layers(scanned.bind(gradients(scanned))).params, gradients(plain))


@pytest.mark.feature("Layers in a scan")
def test_checkpoints_of_scanned_layers(tmp_path, plain):
    scanned = scan_layers(MistralForCausalLM(CONFIG, rngs=nnx.Rngs(1)))
    assert scan_layers(scanned) is scanned
    held = scanned.params
    scanned.load_arrays(PARAMETERS)
    assert not any(array.is_deleted() for array in held.values()), "arrays are values"
    assert all(np.array_equal(array, PARAMETERS[name]) for name, array in scanned.named_arrays())
    scanned.save_pretrained(tmp_path)
    loaded = MistralForCausalLM.from_pretrained(tmp_path)
    assert same(loaded.params, plain.params)
    back = unscan_layers(scan_layers(loaded))
    assert same(back.params, plain.params)
    assert back.num_parameters() == plain.num_parameters()
    assert close(call(back, IDS).logits, call(plain, IDS).logits)
    with pytest.raises(UnsupportedFeatureError, match="windows"):
        scan_layers(MistralForCausalLM(CONFIG.replace(layer_types=("full_attention", "sliding_attention"))))


@pytest.mark.feature("Layers in a scan")
def test_a_scanned_program_does_not_grow_with_the_depth():
    def lines(layers, change):
        model = change(MistralForCausalLM(TINY.replace(num_hidden_layers=layers)))
        loss = jax.jit(jax.grad(lambda params: model(IDS, params=params, labels=IDS).loss))
        return len(loss.lower(model.params).as_text().splitlines())

    assert lines(2, scan_layers) == lines(6, scan_layers)
    assert lines(6, unscan_layers) > 2 * lines(2, unscan_layers)


# What gradients keep


@pytest.mark.feature("Gradient checkpointing")
@pytest.mark.parametrize("arranged", [unscan_layers, scan_layers])
def test_policies_say_what_is_kept_for_gradients(capsys, arranged):
    model = arranged(make())

    def loss(params):
        return model(IDS, MASK, params=params, labels=IDS).loss

    def kept():
        jax.ad_checkpoint.print_saved_residuals(loss, model.params)
        return len(capsys.readouterr().out.splitlines())

    counts, expected = [kept()], jax.jit(jax.grad(loss))(model.params)
    for policy in ("dots_saveable", "nothing_saveable"):
        model.gradient_checkpointing_enable({"policy": getattr(jax.checkpoint_policies, policy)})
        counts.append(kept())
    # a new function: the old one is compiled
    assert same(jax.jit(jax.grad(lambda params: loss(params)))(model.params), expected)
    assert counts[0] > counts[1] > counts[2]
    model.gradient_checkpointing_enable({"prevent_cse": True})
    assert kept() == counts[2], "without a policy nothing is kept"
    model.gradient_checkpointing_enable()
    assert kept() <= counts[2], "nor without an option, where a CPU has a way of its own"
    model.gradient_checkpointing_disable()
    assert kept() == counts[0]
    with pytest.raises(ConfigError, match="use_reentrant"):
        model.gradient_checkpointing_enable({"use_reentrant": False})
