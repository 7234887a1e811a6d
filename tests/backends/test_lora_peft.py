"""Adapters in PyTorch beside real peft: the same files, the same numbers, bit for bit where both compute alike."""

from __future__ import annotations

import json

import numpy as np
import pytest
import torch

import mistral_torch
from mistral_core.config.presets import TINY
from mistral_core.errors import CheckpointNotFoundError, ConfigError, NonFiniteWeightsError, UnsupportedFeatureError
from mistral_core.lora import adapter as files
from mistral_torch import lora

peft = pytest.importorskip("peft")
pytestmark = pytest.mark.filterwarnings("ignore::UserWarning:peft")  # of embeddings that it writes, of tied ones

CONFIG = TINY.replace(num_hidden_layers=2, layer_types=None)
IDS = torch.arange(3, 23).reshape(2, 10)
WAYS = {
    "plain": {"target_modules": ["q_proj", "v_proj", "up_proj"]},
    "dora, rslora": {"target_modules": ["q_proj", "down_proj"], "use_dora": True, "use_rslora": True},
    "patterns": {
        "target_modules": "all-linear", "rank_pattern": {"q_proj": 2}, "alpha_pattern": {"layers.1.mlp.up_proj": 5},
    },
    "embedding and head": {"target_modules": ["embed_tokens", "lm_head", "k_proj"]},
    "one layer": {"target_modules": ["q_proj"], "layers_to_transform": [1]},
    "head saved whole": {"target_modules": ["q_proj"], "modules_to_save": ["lm_head"]},
}  # fmt: skip


def make(architecture="MistralForCausalLM", dtype=torch.float32, **config):
    torch.manual_seed(0)
    return getattr(mistral_torch, architecture)(CONFIG.replace(**config)).to(dtype).eval()


def theirs(way, model=None, **options):
    """A model of peft with random adapters."""
    fields = {"r": 4, "lora_alpha": 16, "task_type": "CAUSAL_LM", "init_lora_weights": False, **WAYS[way], **options}
    found = peft.get_peft_model(make() if model is None else model, peft.LoraConfig(**fields)).eval()
    with torch.no_grad():
        for name, parameter in found.named_parameters():
            if "magnitude" in name or "modules_to_save" in name:
                parameter.mul_(1.1)
    return found


def logits(model, **options):
    with torch.no_grad():
        return model(input_ids=IDS, **options).logits


@pytest.mark.client("peft", "adapters of peft load into our own LoRA and back: every field, the same bits")
@pytest.mark.parametrize("way", WAYS)
def test_an_adapter_of_peft_computes_the_same_and_goes_back(way, tmp_path):
    adapted, base = theirs(way), logits(make())
    adapted.save_pretrained(tmp_path / "theirs")
    model = lora.load_adapter(make(), tmp_path / "theirs")
    wanted = logits(adapted)
    assert not torch.allclose(wanted, base, atol=1e-3)
    assert torch.equal(logits(model), wanted)
    lora.save_adapter(model, tmp_path / "ours")
    again = peft.PeftModel.from_pretrained(make(), tmp_path / "ours").eval()
    assert torch.equal(logits(again), wanted)
    configs = [json.loads((tmp_path / who / "adapter_config.json").read_text()) for who in ("theirs", "ours")]
    for each in configs:
        each["target_modules"].sort()
    assert configs[0] == configs[1]
    if way != "embedding and head":  # where peft writes the base too
        files = [(tmp_path / who / "adapter_model.safetensors").read_bytes() for who in ("theirs", "ours")]
        assert files[0] == files[1]
    with lora.disable_adapter(model):
        assert torch.equal(logits(model), base)
    assert torch.equal(logits(model), wanted)
    options = {"max_new_tokens": 6, "eos_token_id": None}
    assert torch.equal(model.generate(IDS, **options), adapted.generate(input_ids=IDS, **options))
    lora.merge(model)
    assert (logits(model) - wanted).abs().max() < 3e-6, "1.2e-6 seen"
    model.save_pretrained(tmp_path / "merged")
    loaded = mistral_torch.MistralForCausalLM.from_pretrained(tmp_path / "merged")
    assert torch.equal(logits(loaded), logits(model))
    lora.unmerge(model)
    assert torch.equal(logits(model), wanted)


@pytest.mark.parametrize("scheme", ["int8", "int4", "nf4"])
def test_an_adapter_beside_a_packed_base(scheme, tmp_path):
    packed = mistral_torch.quantize(make(), scheme)
    adapted = theirs("plain", mistral_torch.quantize(make(), scheme))
    adapted.save_pretrained(tmp_path)
    model = lora.load_adapter(packed, tmp_path, is_trainable=True)
    assert torch.equal(logits(model), logits(adapted))
    names = {name for name, p in model.named_parameters() if p.requires_grad}
    assert names
    assert all(".lora.default." in name for name in names)
    for each in (model, adapted):
        each.train()(input_ids=IDS, labels=IDS).loss.backward()
    for name, parameter in adapted.named_parameters():
        if parameter.grad is not None:
            own = name.removeprefix("base_model.model.").replace(".lora_A.default.weight", ".lora.default.a")
            own = own.replace(".lora_B.default.weight", ".lora.default.b")
            torch.testing.assert_close(model.get_parameter(own).grad, parameter.grad, rtol=1e-5, atol=1e-6)
    with pytest.raises(UnsupportedFeatureError, match="is packed, and a change smaller than its steps would vanish"):
        lora.merge(model)


def of_peft(written):
    """The name in a model of peft of a tensor that it writes by another."""
    for kind in ("lora_A", "lora_B"):
        written = written.replace(f".{kind}.weight", f".{kind}.default.weight")
    for kind in ("lora_embedding_A", "lora_embedding_B"):
        written = written.replace(f".{kind}", f".{kind}.default")
    return files.PREFIX + written.replace(".lora_magnitude_vector", ".lora_magnitude_vector.default.weight")


@pytest.mark.parametrize("way", WAYS)
def test_gradients_are_those_of_peft(way, tmp_path):
    adapted = theirs(way)
    adapted.save_pretrained(tmp_path)
    adapted.train()(input_ids=IDS, labels=IDS).loss.backward()
    model = lora.load_adapter(make(), tmp_path, is_trainable=True).train()
    model(IDS, labels=IDS).loss.backward()
    config, compared = files.read_config(tmp_path), 0
    for name, target in config.targets(CONFIG, "MistralForCausalLM").items():
        low = model._module(name).lora["default"]
        for field, written in files.names_of(target, "MistralForCausalLM", dora=config.use_dora).items():
            wanted = adapted.get_parameter(of_peft(written)).grad
            wanted = wanted.T if target.row.kind == "embedding" else wanted
            torch.testing.assert_close(getattr(low, field).grad, wanted, rtol=1e-5, atol=1e-6)
            compared += 1
    for name, _ in config.saved(CONFIG, "MistralForCausalLM"):
        wanted = adapted.get_parameter(f"{files.PREFIX}lm_head.modules_to_save.default.weight").grad
        found = model._module(name).saved["default"].weight.grad
        torch.testing.assert_close(found, wanted, rtol=1e-5, atol=1e-6)
        compared += 1
    assert compared == sum(p.grad is not None for p in adapted.parameters())
    assert compared == sum(p.grad is not None for p in model.parameters())


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_adapters_compute_in_float32_beside_a_base_of_few_bits(dtype, tmp_path):
    adapted = theirs("plain", make(dtype=dtype))
    adapted.save_pretrained(tmp_path)
    model = lora.load_adapter(make(dtype=dtype), tmp_path)
    assert {p.dtype for n, p in model.named_parameters() if ".lora." in n} == {torch.float32}
    assert torch.equal(logits(model), logits(adapted))


def test_a_fresh_adapter_changes_nothing_and_alone_trains():
    model = lora.add_adapter(make(), lora.LoraConfig(r=2, target_modules="all-linear"))
    assert torch.equal(logits(model), logits(make()))
    trains = [name for name, p in model.named_parameters() if p.requires_grad]
    assert len(trains) == 2 * 7 * 2
    other = lora.add_adapter(make(), lora.LoraConfig(r=2, target_modules="all-linear"))
    assert all(torch.equal(model.get_parameter(name), other.get_parameter(name)) for name in trains)
    third = lora.add_adapter(make(), lora.LoraConfig(r=2, target_modules="all-linear"), seed=1)
    assert not all(torch.equal(model.get_parameter(name), third.get_parameter(name)) for name in trains)


@pytest.mark.parametrize("reentrant", [False, True])
def test_gradients_reach_every_adapter_of_a_frozen_base_that_is_checkpointed(reentrant):
    model = lora.add_adapter(make(), lora.LoraConfig(r=2, target_modules="all-linear")).train()
    model.gradient_checkpointing_enable({"use_reentrant": reentrant})
    if reentrant:
        model.enable_input_require_grads()
    optimizer = torch.optim.AdamW((p for p in model.parameters() if p.requires_grad), lr=1e-2)
    for _ in range(2):
        model(IDS, labels=IDS).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    found = lora.adapter_of(model)
    assert all(np.abs(weights.b).max() > 0 for weights in found.weights.values())


def test_several_adapters_by_name(tmp_path):
    for seed, way in enumerate(("plain", "patterns")):
        torch.manual_seed(seed)
        theirs(way).save_pretrained(tmp_path / way)
    model = lora.load_adapter(make(), tmp_path / "plain", name="one")
    one = logits(model)
    lora.load_adapter(model, tmp_path / "patterns", name="two")
    two = logits(model)
    assert torch.equal(two, logits(lora.load_adapter(make(), tmp_path / "patterns")))
    lora.set_adapter(model, "one")
    assert torch.equal(logits(model), one)
    lora.set_adapter(model, ["one", "two"])
    both = logits(model)
    assert not torch.allclose(both, one, atol=1e-3)
    assert not torch.allclose(both, two, atol=1e-3)
    lora.save_adapter(model, tmp_path / "again", name="one")
    assert torch.equal(logits(lora.load_adapter(make(), tmp_path / "again")), one)
    with pytest.raises(ConfigError, match="name must be new, got 'one'"):
        lora.load_adapter(model, tmp_path / "plain", name="one")
    with pytest.raises(ConfigError, match="got 'three'; the model has one, two"):
        lora.set_adapter(model, "three")
    with pytest.raises(ConfigError, match="name must be a word"):
        lora.add_adapter(model, name="a.b")
    lora.merge(model)
    with pytest.raises(ConfigError, match="is merged; call unmerge"):
        lora.set_adapter(model, "one")


@pytest.mark.parametrize(
    "architecture", ["MistralForSequenceClassification", "MistralForTokenClassification", "MistralForQuestionAnswering"]
)
def test_the_head_of_a_classifier_is_trained_and_saved_with_the_adapter(architecture, tmp_path):
    model = lora.add_adapter(make(architecture), lora.LoraConfig(r=2, target_modules="all-linear"))
    head = [name for name, p in model.named_parameters() if ".saved." in name and p.requires_grad]
    assert head
    with torch.no_grad():
        for name in head:
            model.get_parameter(name).add_(0.25)
        lora.save_adapter(model, tmp_path)
        again = peft.PeftModel.from_pretrained(make(architecture), tmp_path).eval()
        assert torch.equal(again(input_ids=IDS)[0], model(IDS)[0])
        assert not torch.allclose(model(IDS)[0], make(architecture)(IDS)[0])
        lora.merge(model)
        assert torch.allclose(again(input_ids=IDS)[0], model(IDS)[0], atol=1e-6)


def test_the_bare_model_has_peft_s_names(tmp_path):
    model = lora.add_adapter(make("MistralModel"), lora.LoraConfig(init_lora_weights=False))
    lora.save_adapter(model, tmp_path)
    again = peft.PeftModel.from_pretrained(make("MistralModel"), tmp_path).eval()
    with torch.no_grad():
        assert torch.equal(again(input_ids=IDS)[0], model(IDS)[0])


def test_a_tied_head_is_left_alone_and_not_merged(tmp_path):
    model = make(tie_word_embeddings=True)
    adapted = theirs("plain", make(tie_word_embeddings=True), target_modules=["embed_tokens"])
    adapted.save_pretrained(tmp_path)
    lora.load_adapter(model, tmp_path)
    assert torch.equal(logits(model), logits(adapted))
    assert model.lm_head.weight is model.model.embed_tokens.weight
    with pytest.raises(UnsupportedFeatureError, match="embed_tokens is the head too"):
        lora.merge(model)


def test_what_something_else_wraps_gets_no_adapter(tmp_path):
    with pytest.raises(UnsupportedFeatureError, match=r"q_proj.weight: adapters go to the modules that models here"):
        lora.add_adapter(theirs("plain").base_model.model)
    model = lora.add_adapter(make())
    with torch.no_grad():
        next(p for n, p in model.named_parameters() if ".lora." in n).fill_(torch.nan)
    with pytest.raises(NonFiniteWeightsError):
        lora.save_adapter(model, tmp_path / "none")
    assert not (tmp_path / "none").exists()


def test_a_model_is_loaded_by_its_adapter(tmp_path):
    make().save_pretrained(tmp_path / "base")
    load = mistral_torch.MistralForCausalLM.from_pretrained
    model = lora.add_adapter(load(tmp_path / "base"), lora.LoraConfig(init_lora_weights=False))
    lora.save_adapter(model, tmp_path / "adapter")
    assert torch.equal(logits(load(tmp_path / "adapter")), logits(model))
    (tmp_path / "base").rename(tmp_path / "moved")
    with pytest.raises(CheckpointNotFoundError, match=r"base is no directory here; say where it is"):
        load(tmp_path / "adapter")
    assert torch.equal(logits(load(tmp_path / "adapter", base=tmp_path / "moved")), logits(model))
    packed = load(tmp_path / "adapter", base=tmp_path / "moved", quantization="int8")
    assert (logits(packed) - logits(model)).abs().max() < 0.1
    with pytest.raises(ConfigError, match="base: .* is no directory of an adapter; leave it out"):
        load(tmp_path / "moved", base=tmp_path / "moved")
