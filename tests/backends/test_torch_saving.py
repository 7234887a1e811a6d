"""Every way in which PyTorch saves, copies and sends a model gives every tensor back, bit for bit."""

from __future__ import annotations

import copy
import multiprocessing.reduction
import pickle

import numpy as np
import pytest
import torch
import torch.distributed.checkpoint as dcp
from torch import nn
from torch.distributed.checkpoint.state_dict import (
    get_model_state_dict,
    get_state_dict,
    set_model_state_dict,
    set_state_dict,
)

import mistral_torch
from mistral_core.config.presets import TINY
from mistral_core.parameters import HEADS
from mistral_torch import MistralForCausalLM

pytestmark = [
    # there is one process
    pytest.mark.filterwarnings("ignore:torch.distributed is disabled, unavailable or uninitialized"),
    pytest.mark.feature("Saving in the framework's own format"),
]

CONFIG = TINY.replace(num_hidden_layers=2, num_labels=3)


def filled(kind, config=CONFIG, dtype=torch.float32):
    """A model of random bits: denormals, infinities and NaNs with a payload among them."""
    model = kind(config).to(dtype)
    random = np.random.default_rng(1)
    for name, array in list(model.named_arrays()):
        bits = random.integers(0, 256, array.nbytes, np.uint8)
        model.set_parameter(name, bits.view(array.dtype).reshape(array.shape))
    model.tie_weights()
    return model


def bits(model):
    return {name: array.tobytes() for name, array in model.named_arrays()}


def like(model, device="cpu"):
    with torch.device(device):
        return type(model)(model.config).to(model.dtype)


def loaded(model, state, **options):
    model.load_state_dict(state, **options)
    return model


def a_saved_model(model, folder):
    torch.save(model, folder / "model.pt")
    return torch.load(folder / "model.pt", weights_only=False)


def a_saved_state(model, folder):
    torch.save(model.state_dict(), folder / "model.pt")
    return loaded(like(model), torch.load(folder / "model.pt", weights_only=True))


def a_mapped_state(model, folder):
    torch.save(model.state_dict(), folder / "model.pt")
    return loaded(like(model, "meta"), torch.load(folder / "model.pt", weights_only=True, mmap=True), assign=True)


def a_state_inside_another(model, folder):
    torch.save(nn.ModuleDict({"inside": model}).state_dict(), folder / "model.pt")
    outer = nn.ModuleDict({"inside": like(model, "meta")})
    return loaded(outer, torch.load(folder / "model.pt"), assign=True)["inside"]


def a_distributed_checkpoint(model, folder):
    dcp.save(model.state_dict(), checkpoint_id=folder)
    other = like(model, "meta").to_empty(device="cpu")
    state = other.state_dict()
    dcp.load(state, checkpoint_id=folder)
    return loaded(other, state)


def a_distributed_checkpoint_of_the_module(model, folder):
    other = like(model)
    dcp.save({"model": model}, checkpoint_id=folder)
    dcp.load({"model": other}, checkpoint_id=folder)
    return other


def a_distributed_model_state(model, folder):
    other = like(model)
    dcp.save(get_model_state_dict(model), checkpoint_id=folder)
    state = get_model_state_dict(other)
    dcp.load(state, checkpoint_id=folder)
    set_model_state_dict(other, state)
    return other


def safetensors_own(model, folder):
    safetensors = pytest.importorskip("safetensors.torch")
    other = like(model)
    safetensors.save_model(model, folder / "model.safetensors")
    safetensors.load_model(other, folder / "model.safetensors")
    return other


def pickled(model, folder):
    return pickle.loads(pickle.dumps(model))


def deep_copy(model, folder):
    return copy.deepcopy(model)


def averaged(model, folder):
    return torch.optim.swa_utils.AveragedModel(model).module


WAYS = (a_saved_model, a_saved_state, a_mapped_state, a_state_inside_another, a_distributed_checkpoint,
        a_distributed_checkpoint_of_the_module, a_distributed_model_state, safetensors_own, pickled, deep_copy,
        averaged)  # fmt: skip


@pytest.fixture(scope="module", params=[False, True], ids=["float32", "tied-bfloat16"])
def model(request):
    dtype = torch.bfloat16 if request.param else torch.float32
    return filled(MistralForCausalLM, CONFIG.replace(tie_word_embeddings=request.param), dtype)


@pytest.mark.parametrize("way", WAYS)
def test_every_tensor_comes_back(model, way, tmp_path):
    before = bits(model)
    other = way(model, tmp_path)
    assert bits(other) == before
    assert (other.dtype, other.config) == (model.dtype, model.config)
    tied = other.lm_head.weight is other.model.embed_tokens.weight
    assert tied == model.config.tie_word_embeddings
    other.config.rope_theta = 7.0
    with torch.no_grad():
        for parameter in other.parameters():
            parameter.zero_()
    assert bits(model) == before, "the copy's tensors are its own"
    assert model.config.rope_theta == CONFIG.rope_theta


@pytest.mark.parametrize("head", HEADS)
@pytest.mark.parametrize("way", [a_saved_model, a_saved_state, a_distributed_checkpoint])
def test_every_class(head, way, tmp_path):
    model = filled(getattr(mistral_torch, head))
    assert bits(way(model, tmp_path)) == bits(model)


def test_an_optimizer_goes_on_from_a_distributed_checkpoint(tmp_path):
    def steps(model, optimizer, count):
        for _ in range(count):
            for parameter in model.parameters():
                parameter.grad = torch.ones_like(parameter) / 3
            optimizer.step()

    models = [MistralForCausalLM(CONFIG.replace(tie_word_embeddings=True)) for _ in range(2)]
    optimizers = [torch.optim.AdamW(model.parameters(), lr=1e-2) for model in models]
    steps(models[0], optimizers[0], 2)
    kept, optimizer_kept = get_state_dict(models[0], optimizers[0])
    dcp.save({"model": kept, "optimizer": optimizer_kept}, checkpoint_id=tmp_path)
    state = dict(zip(("model", "optimizer"), get_state_dict(models[1], optimizers[1]), strict=True))
    dcp.load(state, checkpoint_id=tmp_path)
    set_state_dict(models[1], optimizers[1], model_state_dict=state["model"], optim_state_dict=state["optimizer"])
    for model, optimizer in zip(models, optimizers, strict=True):
        steps(model, optimizer, 1)
    assert bits(models[0]) == bits(models[1])


def test_a_model_sent_to_another_process_shares_its_memory(model):
    sent = pickle.loads(bytes(multiprocessing.reduction.ForkingPickler.dumps(model)))  # as torch.multiprocessing does
    assert bits(sent) == bits(model)
    assert (sent.lm_head.weight is sent.model.embed_tokens.weight) == model.config.tie_word_embeddings
    assert all(parameter.is_shared() for parameter in sent.parameters())


def echo(models, answers):
    """Send back the bits of a model, and the model."""
    model = models.get()
    answers.put(bits(model))
    answers.put(model)
    models.get()  # what is sent lies in this process's memory until it is taken


def test_a_model_sent_to_a_spawned_process_and_back():
    model = filled(MistralForCausalLM, CONFIG.replace(tie_word_embeddings=True), torch.bfloat16)
    spawn = torch.multiprocessing.get_context("spawn")
    models, answers = spawn.Queue(), spawn.Queue()
    process = spawn.Process(target=echo, args=(models, answers))
    process.start()
    models.put(model)
    assert answers.get(timeout=600) == bits(model)
    back = answers.get(timeout=600)
    assert bits(back) == bits(model)
    assert back.lm_head.weight is back.model.embed_tokens.weight
    models.put(None)
    process.join(300)
    assert process.exitcode == 0


def test_hooks_of_load_state_dict_run_once_and_survive_copies():
    seen = []
    model = MistralForCausalLM(CONFIG.replace(tie_word_embeddings=True))
    model.register_load_state_dict_pre_hook(lambda module, state, *_: seen.append(("before", len(state))))
    model.register_load_state_dict_post_hook(lambda module, keys: seen.append(("after", *keys.missing_keys)))
    model.register_state_dict_post_hook(lambda module, state, *_: seen.append(("saved", len(state))))
    state = filled(MistralForCausalLM, model.config).state_dict()
    for each in (model, copy.deepcopy(model)):
        seen.clear()
        each.load_state_dict(state)
        assert seen == [("before", len(state)), ("after",)]
        assert each.lm_head.weight is each.model.embed_tokens.weight
        each.state_dict()
        assert seen[2:] == [("saved", len(state))]
