"""PyTorch's own ways, and those of scripts written for transformers: state dicts, casts, tied weights, copies."""

from __future__ import annotations

import copy
import io
import pickle

import numpy as np
import pytest
import torch
from torch import nn

import mistral_torch
from conformance.weights import random_parameters
from mistral_core.config.presets import TINY
from mistral_core.config.rope import rotary_table
from mistral_core.data import TINY_CHECKPOINT
from mistral_core.errors import ConfigError, UnsupportedFeatureError
from mistral_core.parameters import HEADS, shapes
from mistral_torch import (
    AutoConfig,
    AutoModel,
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    AutoTokenizer,
    MistralForCausalLM,
)
from mistral_torch.layers import RMSNorm, rotary

IDS = torch.from_numpy(np.random.default_rng(0).integers(3, TINY.vocab_size, (2, 17)))
TIED = TINY.replace(tie_word_embeddings=True)
ARCHITECTURES = pytest.mark.parametrize("architecture", HEADS)


def make(config=TINY, architecture="MistralForCausalLM", **options):
    parameters = random_parameters(config, architecture)
    return getattr(mistral_torch, architecture)(config, **options).load_arrays(parameters).eval()


def logits_of(out):
    return next(out[name] for name in ("logits", "start_logits", "last_hidden_state") if name in out._fields)


# Casts


@pytest.mark.feature("Mixed precision")
@pytest.mark.parametrize("cast", ["half", "bfloat16", "double"])
def test_casts_leave_rotary_tables_exact(cast):
    config = TINY.replace(rope_scaling={"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 1024})
    model = getattr(make(config), cast)()
    assert not list(model.buffers()), "a buffer would be cast with the model"
    tables = []
    model.model.layers[0].self_attn.register_forward_pre_hook(lambda module, args: tables.extend(args[1].cos_sin))
    positions = torch.tensor([[0, 1, 32767, 131071]])
    assert model(IDS[:1, :4], position_ids=positions).logits.dtype == torch.float32
    core = rotary_table(config)
    angle = np.float32(core.inverse_frequency) * np.float32(positions.numpy())[..., None]
    for table, exact, function in zip(tables, rotary(positions, config), (np.cos, np.sin), strict=True):
        assert table.dtype == torch.float32
        assert torch.equal(table, exact)
        assert np.allclose(table.numpy(), function(angle.astype(np.float64)) * core.attention_factor, atol=2e-7)


@pytest.mark.feature("Mixed precision")
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_the_norm_rounds_once_before_its_weight(dtype):
    norm = RMSNorm(48, 1e-5).to(dtype)
    nn.init.normal_(norm.weight)
    x = 100 * torch.randn(4, 48, generator=torch.Generator().manual_seed(0)).to(dtype)
    exact = x.double() / (x.double().square().mean(-1, keepdim=True) + 1e-5).sqrt()
    assert torch.equal(norm(x), exact.to(dtype) * norm.weight)


@pytest.mark.feature("Mixed precision")
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("implementation", ["eager", "sdpa", "flex"])
def test_half_precision_generates(dtype, implementation):
    model = make(attn_implementation=implementation).to(dtype)
    tokens = model.generate(IDS, max_new_tokens=7, eos_token_id=None)
    assert tokens.shape == (2, 24)
    assert torch.equal(model(tokens[:, :17]).logits[:, -1].argmax(-1), tokens[:, 17])


# State dicts

LAYER = (
    "input_layernorm",
    *(f"self_attn.{letter}_proj" for letter in "qkvo"),
    "post_attention_layernorm",
    *(f"mlp.{name}_proj" for name in ("gate", "up", "down")),
)
BODY = ["embed_tokens.weight", *(f"layers.{i}.{name}.weight" for i in range(3) for name in LAYER), "norm.weight"]
HEAD = {
    "MistralModel": [],
    "MistralForCausalLM": ["lm_head.weight"],
    "MistralForSequenceClassification": ["score.weight"],
    "MistralForTokenClassification": ["score.weight", "score.bias"],
    "MistralForQuestionAnswering": ["qa_outputs.weight", "qa_outputs.bias"],
}
state_feature = pytest.mark.feature("state_dict is transformers' own, both ways")


@state_feature
@ARCHITECTURES
@pytest.mark.parametrize("config", [TINY, TIED], ids=["untied", "tied"])
def test_names_and_shapes_of_a_state_dict(architecture, config):
    prefix = "" if architecture == "MistralModel" else "model."
    state = make(config, architecture).state_dict()
    assert sorted(state) == sorted([prefix + name for name in BODY] + HEAD[architecture])
    for name, shape in shapes(config, architecture).items():
        assert tuple(state[prefix + name.removeprefix("model.") if name.startswith("model.") else name].shape) == shape


@state_feature
@ARCHITECTURES
@pytest.mark.parametrize("config", [TINY, TIED], ids=["untied", "tied"])
def test_state_dicts_go_to_transformers_and_back(architecture, config):
    transformers = pytest.importorskip("transformers")
    ours = make(config, architecture)
    theirs = getattr(transformers, architecture)(transformers.MistralConfig(**config.to_dict(dialect="v5"))).eval()
    assert {n: t.shape for n, t in ours.state_dict().items()} == {n: t.shape for n, t in theirs.state_dict().items()}
    back = getattr(mistral_torch, architecture)(config).eval()
    back.load_state_dict(theirs.state_dict(), strict=True)
    assert torch.equal(back.get_input_embeddings().weight, theirs.get_input_embeddings().weight)
    theirs.load_state_dict(ours.state_dict(), strict=True)
    with torch.no_grad():
        found, expected = logits_of(ours(IDS)), theirs(IDS, use_cache=False)[0]
    assert (found - expected).abs().max() < 64 * torch.finfo(torch.float32).eps * expected.abs().max()


@pytest.mark.feature("Saving in the framework's own format")
@ARCHITECTURES
def test_torch_save_and_load(architecture, tmp_path):
    model = make(TINY, architecture)
    torch.save(model.state_dict(), tmp_path / "model.pt")
    other = getattr(mistral_torch, architecture)(TINY).eval()
    other.load_state_dict(torch.load(tmp_path / "model.pt", weights_only=True))
    assert torch.equal(logits_of(other(IDS)), logits_of(model(IDS)))


@pytest.mark.feature("Saving in the framework's own format")
def test_a_state_dict_that_does_not_fit():
    state = make().state_dict()
    state["lm_head.weigth"] = state.pop("lm_head.weight")
    with pytest.raises(RuntimeError, match=r"lm_head\.weigth"):
        make().load_state_dict(state)
    keys = make().load_state_dict(state, strict=False)
    assert (keys.missing_keys, keys.unexpected_keys) == (["lm_head.weight"], ["lm_head.weigth"])


# One tensor for two names


@pytest.mark.feature("Tied embeddings stay tied: load_state_dict, .to, deepcopy")
@pytest.mark.parametrize(
    "change",
    [
        lambda model: model.half(),
        lambda model: model.to(torch.bfloat16),
        lambda model: model.to("meta"),
        lambda model: model.to("meta").to_empty(device="cpu"),
        lambda model: nn.Sequential(model).to("meta")[0],
        copy.deepcopy,
        lambda model: pickle.loads(pickle.dumps(model)),
        lambda model: model.requires_grad_(False),
        lambda model: model.resize_token_embeddings(101) and model,
        lambda model: model.set_input_embeddings(nn.Embedding(97, 48)) or model,
    ],
)
def test_tied_weights_stay_one_tensor(change):
    model = change(make(TIED))
    assert model.lm_head.weight is model.model.embed_tokens.weight
    assert model.num_parameters() == sum(p.numel() for p in model.parameters())


@pytest.mark.feature("Tied embeddings stay tied: load_state_dict, .to, deepcopy")
def test_assigned_weights_stay_one_tensor():
    state = {name: tensor.clone() for name, tensor in make(TIED).state_dict().items()}
    with torch.device("meta"):
        model = MistralForCausalLM(TIED)
    model.load_state_dict(state, assign=True)
    assert model.lm_head.weight is model.model.embed_tokens.weight
    assert torch.equal(model.eval()(IDS).logits, make(TIED)(IDS).logits)


# Modules like any other


def test_a_long_context_takes_no_memory_for_tables():
    model = MistralForCausalLM(TINY.replace(max_position_embeddings=2**31 - 1))
    held = sum(t.numel() for t in (*model.parameters(), *model.buffers()))
    assert held == sum(int(np.prod(shape)) for shape in shapes(TINY).values())


def test_copies_have_everything_of_their_own():
    model = make()
    other = copy.deepcopy(model)
    assert torch.equal(other(IDS).logits, model(IDS).logits)
    other.config.use_cache = False
    other.lm_head.weight.data.zero_()
    assert model.config.use_cache
    assert model(IDS).logits.abs().max() > 0


def test_head_and_body_have_one_config():
    model = make()
    model.config.output_hidden_states = True
    assert model.model.config is model.config
    assert len(model(IDS).hidden_states) == TINY.num_hidden_layers + 1
    assert TINY.output_hidden_states is False


def test_the_text_of_a_model_and_of_its_file():
    model = make()
    assert "(self_attn): Attention(" in repr(model)
    model.enable_input_require_grads()
    torch.save(model, file := io.BytesIO())
    file.seek(0)
    assert torch.load(file, weights_only=False)(IDS).logits.requires_grad


def test_hooks_see_hidden_states():
    model, seen = make(), []
    model.model.layers[1].register_forward_hook(lambda module, inputs, output: seen.append(output[0]))
    states = model(IDS, output_hidden_states=True).hidden_states
    assert torch.equal(seen[0], states[2])


def test_data_parallel_without_devices_is_the_model():
    model = make()
    assert torch.equal(nn.DataParallel(model)(IDS).logits, model(IDS).logits)


def test_replaced_parameters_keep_whether_they_are_trained():
    model = make()
    model.model.norm.weight.requires_grad_(False)
    array = np.full(48, 2, np.float32)
    array.flags.writeable = False  # as JAX gives them
    model.set_parameter("model.norm.weight", array)
    assert not model.model.norm.weight.requires_grad
    model.model.norm.weight.data.zero_()
    assert (array == 2).all()
    model.set_parameter("lm_head.weight", np.zeros((48, 97), np.float32).T)
    assert model.lm_head.weight.requires_grad
    assert model.lm_head.weight.is_contiguous()


def test_the_cache_is_a_value_where_gradients_flow():
    model = make()
    past = model(IDS[:, :9], use_cache=True).past_key_values
    before = [k.clone() for k in past.keys]
    model(IDS[:, 9:10], past_key_values=past)
    assert all(torch.equal(a, b) for a, b in zip(before, past.keys, strict=True))


# As scripts for transformers write it


@pytest.mark.feature("Resize token embeddings")
def test_resizing_then_training():
    model = make().train()
    old = model.lm_head.weight.detach().clone()
    model.model.embed_tokens.weight.requires_grad_(False)
    assert model.resize_token_embeddings(100, pad_to_multiple_of=8) is model.get_input_embeddings()
    assert model.config.vocab_size == model.lm_head.out_features == model.model.embed_tokens.num_embeddings == 104
    assert torch.equal(model.lm_head.weight[:97], old)
    assert torch.allclose(model.lm_head.weight[97:], old.mean(0), atol=1e-6)
    assert not model.model.embed_tokens.weight.requires_grad
    optimizer = torch.optim.SGD(model.parameters(), lr=1.0)
    text = torch.full_like(IDS, 103)
    model(text, labels=text).loss.backward()
    optimizer.step()
    assert not torch.equal(model.lm_head.weight[103], model.lm_head.weight[102])
    model.resize_token_embeddings(50)
    assert model(IDS % 50).logits.shape[-1] == 50
    with pytest.raises(ConfigError, match="new_num_tokens"):
        model.resize_token_embeddings(0)


def test_counting_parameters():
    model = make()
    embedding = 97 * 48
    assert model.num_parameters(exclude_embeddings=True) == model.num_parameters() - embedding
    model.requires_grad_(False)
    model.lm_head.requires_grad_(True)
    assert model.num_parameters(only_trainable=True) == embedding
    assert make(TIED).num_parameters() == model.num_parameters() - embedding


def test_replacing_embedding_and_head():
    model = make()
    embedding, head = nn.Embedding(97, 48), nn.Linear(48, 97, bias=False)
    model.set_input_embeddings(embedding)
    model.set_output_embeddings(head)
    assert model.get_input_embeddings() is model.model.embed_tokens is embedding
    assert model.get_output_embeddings() is model.lm_head is head
    assert make(TINY, "MistralModel").get_output_embeddings() is None


@pytest.mark.feature("AutoModelFor*, AutoTokenizer, AutoConfig")
@pytest.mark.parametrize(
    "options", [{"device_map": "auto"}, {"device_map": {"": "cpu"}}, {"device_map": "cpu"}, {"device": "cpu"}]
)
def test_a_first_script(options):
    tokenizer = AutoTokenizer.from_pretrained(TINY_CHECKPOINT)
    model = AutoModelForCausalLM.from_pretrained(TINY_CHECKPOINT, torch_dtype="auto", **options)
    assert (model.dtype, model.training) == (torch.bfloat16, False)
    model = model.to(torch.float32)
    inputs = tokenizer("Emma was", return_tensors="pt").to(model.device)
    tokens = model.generate(**inputs, max_new_tokens=5)
    assert tokenizer.decode(tokens[0], skip_special_tokens=True).startswith("Emma was")
    assert tokens.shape[1] == inputs["input_ids"].shape[1] + 5
    assert torch.equal(tokens[:, :-5], inputs["input_ids"])


@pytest.mark.feature("AutoModelFor*, AutoTokenizer, AutoConfig")
def test_auto_classes(tmp_path):
    config = AutoConfig.from_pretrained(TINY_CHECKPOINT)
    model = AutoModelForSequenceClassification.from_config(config, num_labels=3, torch_dtype=torch.bfloat16)
    assert (model.score.out_features, model.dtype, model.config.num_labels) == (3, torch.bfloat16, 3)
    assert config.num_labels == 2
    model.save_pretrained(tmp_path)
    loaded = AutoModelForSequenceClassification.from_pretrained(tmp_path, dtype=torch.float32)
    assert torch.equal(loaded.score.weight, model.score.weight.float())
    assert loaded.dtype == torch.float32
    with pytest.raises(UnsupportedFeatureError, match=r"AutoModel\.from_pretrained"):
        AutoModel()


def test_what_trl_and_the_trainer_ask_for():
    model = make()
    assert model.config.get_text_config() is model.config
    assert model.generation_config.bos_token_id == model.config.bos_token_id
    model.add_model_tags(["trl", "sft"])
    assert not model.is_gradient_checkpointing
    model.activation_checkpointing_enable(activation_checkpointing_kwargs={"use_reentrant": False})
    assert model.is_gradient_checkpointing
    assert model.model.gradient_checkpointing == {"use_reentrant": False}
    model.gradient_checkpointing_disable()
    assert not model.model.gradient_checkpointing
    model.gradient_checkpointing_enable()
    assert model.model.gradient_checkpointing  # clients take it for a flag
    with pytest.raises(UnsupportedFeatureError, match="every_n_layers=2"):
        model.activation_checkpointing_enable(every_n_layers=2)


def test_gradients_reach_the_states_and_weights_that_are_returned():
    out = make().model(torch.tensor([[1, 2, 3]]), output_attentions=True, output_hidden_states=True)
    for x in (*out.hidden_states, *out.attentions):
        x.retain_grad()
    out.last_hidden_state.square().sum().backward()
    assert all(x.grad.abs().sum() > 0 for x in (*out.hidden_states, *out.attentions))
