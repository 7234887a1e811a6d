"""Adapters are the same in every framework: one file, the same logits, gradients and text, and the base untouched."""

from __future__ import annotations

import functools
import importlib
import re

import numpy as np
import pytest

from conformance.weights import random_parameters
from mistral_core.config.presets import TINY
from mistral_core.errors import ConfigError, NonFiniteWeightsError, UnsupportedFeatureError
from mistral_core.lora import adapter as files
from mistral_core.lora.adapter import Adapter, LoraWeights
from mistral_core.lora.config import LoraConfig
from mistral_core.parameters import parameters, shape_of
from mistral_core.reference import heads
from mistral_core.weights.checkpoint import save

CONFIG = TINY.replace(num_hidden_layers=2, layer_types=None)
CAUSAL, TOKENS = "MistralForCausalLM", "MistralForTokenClassification"
IDS = np.arange(3, 23).reshape(2, 10)
WAYS = {
    "plain": {"target_modules": ["q_proj", "v_proj", "up_proj"]},
    "dora, rslora": {"target_modules": ["q_proj", "down_proj"], "use_dora": True, "use_rslora": True},
    "patterns": {
        "target_modules": "all-linear", "rank_pattern": {"q_proj": 2}, "alpha_pattern": {"layers.1.mlp.up_proj": 5},
    },
    "embedding and head": {"target_modules": ["embed_tokens", "lm_head", "k_proj"]},
    "saved whole": {"target_modules": ["q_proj"], "modules_to_save": ["lm_head", "embed_tokens", "1.mlp.up_proj"]},
    "a head with a bias, dora": {"target_modules": ["score", "o_proj"], "use_dora": True},
}  # fmt: skip
READ = [
    *((way, "peft") for way in WAYS if "score" not in WAYS[way]["target_modules"]),  # which it saves whole
    # transformers 5.23 leaves DoRA's magnitudes behind, of files of peft too
    *((way, "transformers") for way, fields in WAYS.items() if not fields.get("use_dora")),
]
"""(way, who reads it)"""
EPS = float(np.finfo(np.float32).eps)


def architecture_of(way):
    return TOKENS if way == "a head with a bias, dora" else CAUSAL


@functools.cache
def adapter(way, seed=0):
    """An adapter that changes much, by numbers of a seed; magnitudes are near the rows' own."""
    architecture = architecture_of(way)
    lora = LoraConfig(**{"r": 4, "lora_alpha": 16, **WAYS[way]}).for_model(CONFIG, architecture)
    base, random, found = random_parameters(CONFIG, architecture), np.random.default_rng(seed), {}
    for name, target in lora.targets(CONFIG, architecture).items():
        rows, columns = shape_of(target.row, CONFIG)
        a, b = (0.1 * random.normal(size=shape) for shape in ((target.r, columns), (rows, target.r)))
        lengths = files.row_norms(base[name]) * random.uniform(0.8, 1.2, rows).astype(np.float32)
        found[name] = LoraWeights(a.astype(np.float32), b.astype(np.float32), lengths if lora.use_dora else None)
    saved = {name: base[name] * np.float32(1.25) for name, _ in lora.saved(CONFIG, architecture)}
    return Adapter(lora, found, saved)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A directory that holds the adapter of each way."""
    root = tmp_path_factory.mktemp("adapters")
    for way in WAYS:
        files.save(root / way, adapter(way), CONFIG, architecture_of(way))
    return root


@functools.cache
def expected(way):
    """Logits of the float64 specification over merged weights."""
    architecture = architecture_of(way)
    weights = {name: array.astype(float) for name, array in random_parameters(CONFIG, architecture).items()}
    if way is not None:
        for name, array in adapter(way).saved.items():
            weights[name] = array.astype(float)
        for name, target in adapter(way).config.targets(CONFIG, architecture).items():
            weights[name] = files.merged(weights[name], adapter(way).weights[name], target.scaling)
    call = heads.causal_lm if architecture == CAUSAL else heads.token_classification
    return call(CONFIG, weights, input_ids=IDS).logits


def labels_of(model):
    return IDS if model.architecture == CAUSAL else IDS % CONFIG.num_labels


class Side:
    """A backend with NumPy at its border."""

    def __init__(self, package):
        self.package, self.name = package, package.__name__
        self.lora = importlib.import_module(f"{self.name}.lora")
        kind = importlib.import_module(f"conformance.adapters.{self.name.removeprefix('mistral_')}").BackendAdapter
        self.adapter = kind(self.name)

    def make(self, architecture=CAUSAL, dtype="float32", **config):
        changed = CONFIG.replace(**config)
        return self.adapter.model(architecture, changed, random_parameters(changed, architecture), dtype, "eager")

    def logits(self, model, **options):
        if self.name == "mistral_torch":
            import torch

            with torch.no_grad():
                return model(IDS, **options)[0].float().numpy()
        return np.asarray(self.adapter.numpy(model(IDS, **options)[0]), np.float32)

    def text(self, model):
        return np.asarray(
            self.adapter.numpy(model.generate(self.adapter.array(IDS), max_new_tokens=5, eos_token_id=None))
        )

    def gradients(self, model, name="default"):
        """Matrix and field -> the gradient of an adapter's tensor, and those of whole parts; nothing else has one."""
        return getattr(self, f"_{self.name}")(model, name)

    def _mistral_torch(self, model, name):
        model(IDS, labels=labels_of(model))[0].backward()
        found = {each: p.grad.numpy() for each, p in model.named_parameters() if p.grad is not None}
        model.zero_grad()
        return {self._named(each, name): array for each, array in found.items()}

    def _mistral_flax(self, model, name):
        from flax import nnx

        wrt = nnx.DiffState(0, nnx.LoRAParam)
        _, state = nnx.value_and_grad(lambda model: model(IDS, labels=labels_of(model))[0], argnums=wrt)(model)
        found = {".".join(path): np.asarray(leaf.get_value()) for path, leaf in nnx.to_flat_state(state)}
        return {self._named(each, name): array for each, array in found.items()}

    def _mistral_tf(self, model, name):
        import tensorflow as tf

        with tf.GradientTape() as tape:
            loss = model(IDS, labels=labels_of(model))[0]
        variables = model.trainable_variables
        found = tape.gradient(loss, variables)
        paths = [variable.path.rpartition("/")[2] for variable in variables]
        return {
            self._named(each, name): tf.convert_to_tensor(array).numpy()
            for each, array in zip(paths, found, strict=True)
        }

    @staticmethod
    def _named(path, name):
        assert f".lora.{name}." in path or f".saved.{name}." in path, path
        return path


@functools.cache
def side_of(package):
    return Side(package)


@pytest.fixture
def side(backend):
    return side_of(backend)


def oracle():
    return side_of(pytest.importorskip("mistral_torch"))


@functools.cache
def expected_gradients(way, folder):
    torch = oracle()
    return torch.gradients(torch.lora.load_adapter(torch.make(architecture_of(way)), folder / way, is_trainable=True))


def close(found, wanted, eps):
    assert found.shape == wanted.shape
    assert np.abs(found - wanted).max() <= eps * EPS * np.abs(wanted).max()


def same(found, wanted):
    assert found.keys() == wanted.keys()
    assert all(np.array_equal(found[name], wanted[name]) for name in wanted)


@pytest.mark.parametrize("way", WAYS)
def test_one_file_is_the_same_adapter_in_every_framework(way, side, folder, tmp_path):
    lora, model = side.lora, side.make(architecture_of(way))
    base, before = dict(model.named_arrays()), side.logits(model)
    assert lora.load_adapter(model, folder / way, is_trainable=True) is model
    logits = side.logits(model)
    close(logits, expected(way), 32)
    assert np.abs(logits - before).max() > 0.05
    same(dict(model.named_arrays()), base)
    lora.save_adapter(model, tmp_path)
    for name in (files.CONFIG_FILE, files.WEIGHTS_FILE):
        assert (tmp_path / name).read_bytes() == (folder / way / name).read_bytes()
    found, wanted = side.gradients(model), expected_gradients(way, folder)
    assert found.keys() == wanted.keys()
    for name, gradient in wanted.items():
        close(found[name], gradient, 64)
    with lora.disable_adapter(model):
        assert np.array_equal(side.logits(model), before)
    lora.merge(model)
    close(side.logits(model), expected(way), 32)
    model.save_pretrained(tmp_path / "merged")
    loaded = type(model).from_pretrained(tmp_path / "merged", attn_implementation="eager")
    assert np.array_equal(side.logits(loaded), side.logits(model))
    lora.unmerge(model)
    same(dict(model.named_arrays()), base)
    assert np.array_equal(side.logits(model), logits)


@pytest.mark.others(scheme=(None,))  # a packed base has its numbers in test_an_adapter_beside_a_packed_base
@pytest.mark.parametrize("scheme", [None, "int8"])
def test_generate_says_what_the_adapter_says_and_no_program_is_taken_for_another(scheme, side, folder):
    """The steps in C, the compiled programs: each is found by what the model is now."""
    native = importlib.import_module(f"{side.name}.native")
    model = side.make() if scheme is None else side.package.quantize(side.make(), scheme)
    plain = side.text(model)
    has_step = native.whole_step_of(model) is not None
    side.lora.load_adapter(model, folder / "plain", name="one")
    assert native.whole_step_of(model) is None
    one = side.text(model)
    side.lora.load_adapter(model, folder / "patterns", name="two")
    two = side.text(model)
    assert not np.array_equal(one, plain)
    assert not np.array_equal(two, one)
    with side.lora.disable_adapter(model):
        assert (native.whole_step_of(model) is not None) == has_step
        assert np.array_equal(side.text(model), plain)
    assert np.array_equal(side.text(model), two)
    side.lora.set_adapter(model, "one")
    assert np.array_equal(side.text(model), one)
    if scheme is None:
        greedy = one[:, IDS.shape[1] :]
        weights = {name: array.astype(float) for name, array in random_parameters(CONFIG, CAUSAL).items()}
        for name, target in adapter("plain").config.targets(CONFIG, CAUSAL).items():
            weights[name] = files.merged(weights[name], adapter("plain").weights[name], target.scaling)
        logits = heads.causal_lm(CONFIG, weights, input_ids=one).logits
        assert np.array_equal(logits[:, IDS.shape[1] - 1 : -1].argmax(-1), greedy)
        side.lora.merge(model)
        assert (native.whole_step_of(model) is not None) == has_step
        assert np.array_equal(side.text(model), one)


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    """The base, as transformers loads it."""
    path = tmp_path_factory.mktemp("base")
    save(path, CONFIG, random_parameters(CONFIG, CAUSAL).items())
    return path


@pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing`:FutureWarning")  # peft asks transformers' model
@pytest.mark.filterwarnings("ignore::UserWarning:peft")  # of tied embeddings, and of embeddings that it writes
@pytest.mark.parametrize(("way", "reader"), READ)
def test_others_read_beside_their_own_model_what_each_framework_writes(way, reader, side, folder, checkpoint, tmp_path):
    torch, transformers, peft = map(pytest.importorskip, ("torch", "transformers", "peft"))
    side.lora.save_adapter(side.lora.load_adapter(side.make(), folder / way), tmp_path)
    theirs = transformers.MistralForCausalLM.from_pretrained(checkpoint, attn_implementation="eager").eval()
    with torch.no_grad():
        plain = theirs(torch.from_numpy(IDS)).logits.numpy()
        if reader == "peft":
            theirs = peft.PeftModel.from_pretrained(theirs, tmp_path).eval()
        else:
            theirs.load_adapter(str(tmp_path))
        found = theirs(input_ids=torch.from_numpy(IDS)).logits.numpy()
    close(found, expected(way), 32)
    assert np.abs(found - plain).max() > 0.05


def test_a_fresh_adapter_changes_nothing_and_begins_alike(side):
    asked = side.lora.LoraConfig(r=2, target_modules=["q_proj", "embed_tokens"])
    model = side.lora.add_adapter(side.make(), asked, seed=5)
    assert np.array_equal(side.logits(model), side.logits(side.make()))
    found = side.lora.adapter_of(model)
    for name, target in asked.targets(CONFIG, CAUSAL).items():
        fresh = files.initial_weights(target, CONFIG, asked, seed=5)
        assert np.array_equal(found.weights[name].a, fresh.a)
        assert np.array_equal(found.weights[name].b, fresh.b)
    dora = side.lora.add_adapter(side.make(), side.lora.LoraConfig(r=2, use_dora=True))
    close(side.logits(dora), side.logits(side.make()), 32)


def test_several_adapters_by_name(side, folder, tmp_path):
    lora = side.lora
    model = lora.load_adapter(side.make(), folder / "plain", name="one")
    one = side.logits(model)
    lora.load_adapter(model, folder / "embedding and head", name="two", is_trainable=True)
    close(side.logits(model), expected("embedding and head"), 32)
    side.gradients(model, "two")
    lora.set_adapter(model, "one")
    assert np.array_equal(side.logits(model), one)
    side.gradients(model, "one")
    lora.set_adapter(model, ["one", "two"])
    both = side.logits(model)
    assert np.abs(both - one).max() > 0.05
    assert np.abs(both - expected("embedding and head")).max() > 0.05
    lora.save_adapter(model, tmp_path, name="one")
    assert (tmp_path / files.WEIGHTS_FILE).read_bytes() == (folder / "plain" / files.WEIGHTS_FILE).read_bytes()
    with pytest.raises(ConfigError, match="name must be new, got 'one'"):
        lora.load_adapter(model, folder / "plain", name="one")
    with pytest.raises(ConfigError, match="got 'three'; the model has one, two"):
        lora.set_adapter(model, "three")
    with pytest.raises(ConfigError, match="name must be a word"):
        lora.add_adapter(model, name="a.b")
    with pytest.raises(ConfigError, match="got 'default'; the model has none"):
        lora.adapter_of(side.make())
    lora.merge(model)
    close(side.logits(model), both, 64)
    for refused in (lambda: lora.set_adapter(model, "one"), lambda: lora.add_adapter(model, name="three")):
        with pytest.raises(ConfigError, match="is merged; call unmerge"):
            refused()
    with pytest.raises(ConfigError, match="is merged; call unmerge"), lora.disable_adapter(model):
        pass
    lora.unmerge(model)
    assert np.array_equal(side.logits(model), both)


@pytest.mark.others(scheme=("nf4",))  # QLoRA's
@pytest.mark.parametrize("scheme", ["int8", "nf4"])
def test_an_adapter_beside_a_packed_base(scheme, side, folder):
    torch = oracle()
    model, wanted = (each.package.quantize(each.make(), scheme) for each in (side, torch))
    side.lora.load_adapter(model, folder / "dora, rslora", is_trainable=True)
    if model is not wanted:
        torch.lora.load_adapter(wanted, folder / "dora, rslora", is_trainable=True)
    close(side.logits(model), torch.logits(wanted), 32)
    found, gradients = side.gradients(model), torch.gradients(wanted)
    assert found.keys() == gradients.keys()
    for name, gradient in gradients.items():
        close(found[name], gradient, 64)
    told = "is packed, and a change smaller than its steps would vanish"
    with pytest.raises(UnsupportedFeatureError, match=told):
        side.lora.merge(model)


@pytest.mark.parametrize("way", ["plain", "saved whole"])
def test_adapters_compute_in_float32_beside_a_base_of_few_bits(way, side, folder):
    model = side.lora.load_adapter(side.make(dtype="bfloat16"), folder / way)
    logits = side.logits(model)
    assert np.abs(logits - expected(way)).max() < 0.05 * np.abs(expected(way)).max()
    found = side.lora.adapter_of(model)
    same(found.saved, adapter(way).saved)
    side.lora.merge(model)
    assert np.abs(side.logits(model) - logits).max() < 0.05 * np.abs(logits).max()


def test_gradients_reach_every_adapter_of_a_frozen_base_that_is_checkpointed(side, folder):
    model = side.lora.load_adapter(side.make(), folder / "patterns", is_trainable=True)
    wanted = side.gradients(model)
    model.gradient_checkpointing_enable()
    if side.name == "mistral_torch":
        model.train()
    found = side.gradients(model)
    assert found.keys() == wanted.keys()
    for name, gradient in wanted.items():
        assert np.abs(gradient).max() > 0
        close(found[name], gradient, 64)


@pytest.mark.parametrize("lora", [{"target_modules": ["embed_tokens"]}, {"modules_to_save": ["embed_tokens"]}])
def test_a_tied_head_is_left_alone_and_not_merged(lora, side, folder):
    model, before = side.make(tie_word_embeddings=True), None
    before = side.logits(model)
    head = np.array(side.adapter.numpy(model.get_output_embeddings().weight))
    side.lora.add_adapter(model, side.lora.LoraConfig(r=2, init_lora_weights=False, **lora))
    assert np.array_equal(side.adapter.numpy(model.get_output_embeddings().weight), head)
    if "target_modules" in lora:
        assert np.abs(side.logits(model) - before).max() > 1e-3
    with pytest.raises(UnsupportedFeatureError, match="embed_tokens is the head too"):
        side.lora.merge(model)
    with side.lora.disable_adapter(model):
        assert np.array_equal(side.logits(model), before)


def test_the_embedding_of_a_tied_config_without_a_head_is_merged(side):
    model = side.make("MistralForSequenceClassification", tie_word_embeddings=True)
    lora = side.lora.LoraConfig(r=2, init_lora_weights=False, target_modules=["embed_tokens"])
    before = np.array(side.adapter.numpy(model.get_input_embeddings().weight))
    side.lora.merge(side.lora.add_adapter(model, lora))
    assert np.abs(side.adapter.numpy(model.get_input_embeddings().weight) - before).max() > 1e-3
    side.lora.unmerge(model)
    assert np.array_equal(side.adapter.numpy(model.get_input_embeddings().weight), before)


def test_a_model_is_loaded_by_its_adapter(side, tmp_path):
    side.make().save_pretrained(tmp_path / "base")
    kind = getattr(side.package, CAUSAL)
    model = kind.from_pretrained(tmp_path / "base", attn_implementation="eager")
    side.lora.add_adapter(model, side.lora.LoraConfig(init_lora_weights=False))
    side.lora.save_adapter(model, tmp_path / "adapter")
    for options in ({}, {"base": tmp_path / "base"}):
        again = kind.from_pretrained(tmp_path / "adapter", attn_implementation="eager", **options)
        assert np.array_equal(side.logits(again), side.logits(model))


def test_matrices_with_adapters_are_not_replaced(side, folder):
    """A matrix that is packed, unpacked or given other rows is another: its adapter would be lost, or too small."""
    model = side.lora.load_adapter(side.package.quantize(side.make(), "int8"), folder / "plain")
    wanted = side.logits(model)
    for refused in (
        lambda: side.package.quantize(model, "int4"),
        lambda: side.package.dequantize(model),
        lambda: model.resize_token_embeddings(CONFIG.vocab_size + 1),
    ):
        with pytest.raises(UnsupportedFeatureError, match="the model has the adapter default, made for its matrices"):
            refused()
    assert np.array_equal(side.logits(model), wanted)


def test_what_is_not_finite_is_not_saved(side, folder, tmp_path):
    model = side.lora.load_adapter(side.make(), folder / "plain")
    low = model._module("model.layers.0.self_attn.q_proj.weight").lora["default"]
    bad = np.full((4, CONFIG.hidden_size), np.nan, np.float32)
    if side.name == "mistral_torch":
        low.a.data.fill_(np.nan)
    elif side.name == "mistral_flax":
        low.a.set_value(side.adapter.array(bad))
    else:
        low.a.assign(bad)
    with pytest.raises(NonFiniteWeightsError):
        side.lora.save_adapter(model, tmp_path / "none")
    assert not (tmp_path / "none").exists()


def test_every_parameter_that_is_counted(side):
    model = side.lora.add_adapter(side.make(), side.lora.LoraConfig(r=2, target_modules=["q_proj"]))
    rows, columns = shape_of(dict(parameters(CONFIG))["model.layers.0.self_attn.q_proj.weight"], CONFIG)
    assert model.num_parameters(only_trainable=True) == 2 * 2 * (rows + columns)


def test_a_head_of_a_classifier_is_saved_with_the_adapter(side, tmp_path):
    asked = side.lora.LoraConfig(r=2, target_modules="all-linear", init_lora_weights=False)
    model = side.lora.add_adapter(side.make(TOKENS), asked)
    side.lora.save_adapter(model, tmp_path)
    again = side.lora.load_adapter(side.make(TOKENS), tmp_path)
    assert np.array_equal(side.logits(again), side.logits(model))
    assert set(side.lora.adapter_of(model).saved) == {"score.weight", "score.bias"}


def test_an_adapter_of_a_bare_model(side, tmp_path):
    asked = side.lora.LoraConfig(init_lora_weights=False)
    model = side.lora.add_adapter(side.make("MistralModel"), asked)
    side.lora.save_adapter(model, tmp_path)
    text = (tmp_path / files.WEIGHTS_FILE).read_bytes()
    assert re.search(rb'"base_model\.model\.layers\.0', text)
    again = side.lora.load_adapter(side.make("MistralModel"), tmp_path)
    assert np.array_equal(side.logits(again), side.logits(model))
