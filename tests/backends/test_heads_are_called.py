"""A head is a module that is called: what is put in its place, around it or on it counts everywhere."""

from __future__ import annotations

import functools
import importlib

import numpy as np
import pytest
from frameworks import METHODS
from scripted import Characters

from conformance.weights import random_parameters
from mistral_core.config.presets import TINY

CONFIG = TINY.replace(num_hidden_layers=1, layer_types=None)
PARAMETERS = random_parameters(CONFIG, "MistralForCausalLM")
IDS = np.random.default_rng(0).integers(3, TINY.vocab_size, (2, 9))
FAVOURED = 50
LIKES_IT = np.where(np.arange(CONFIG.vocab_size) == FAVOURED, 1e4, 0).astype(np.float32)


def model_of(backend, config=CONFIG):
    model = backend.MistralForCausalLM(config).load_arrays(PARAMETERS)
    return model.eval() if backend.__name__ == "mistral_torch" else model


def favouring(backend, head):
    """A head around a head, whose token is always the same one."""
    if backend.__name__ == "mistral_torch":
        import torch

        class Favouring(torch.nn.Module):
            def __init__(self):
                super().__init__()
                self.head = head

            def forward(self, x):
                return self.head(x) + torch.from_numpy(LIKES_IT)
    elif backend.__name__ == "mistral_flax":
        from flax import nnx

        class Favouring(nnx.Module):
            def __init__(self):
                self.head = head

            def __call__(self, x):
                scores = self.head(x)
                return scores + np.broadcast_to(LIKES_IT, scores.shape)
    else:
        import keras

        class Favouring(keras.layers.Layer):
            def __init__(self):
                super().__init__()
                self.head = head

            def call(self, x):
                return self.head(x) + LIKES_IT

    return Favouring()


WAYS = {
    "greedy": {},
    "not compiled": {"compile": "off"},
    "beams": {"num_beams": 2},
    "guesses": {"prompt_lookup_num_tokens": 2},
    "loop": {"on_device_loop": True},
}


@pytest.fixture(scope="module")
def replaced(backend):
    """A model that has generated before its head was replaced, so that what was compiled then must not be taken."""
    model = model_of(backend)
    options = {} if backend.__name__ == "mistral_torch" else {"on_device_loop": True}
    assert not (np.asarray(model.generate(IDS, max_new_tokens=3, **options))[:, 9:] == FAVOURED).all()
    model.set_output_embeddings(favouring(backend, model.get_output_embeddings()))
    return model


def test_a_forward_pass_calls_what_replaces_the_head(backend, replaced):
    logits = replaced(IDS).logits
    assert (np.asarray(logits.detach() if backend.__name__ == "mistral_torch" else logits).argmax(-1) == FAVOURED).all()


@pytest.mark.parametrize("way", WAYS)
def test_generate_calls_what_replaces_the_head(backend, replaced, way):
    if way == "loop" and backend.__name__ == "mistral_torch":
        pytest.skip("PyTorch has no loop on the device")
    out = replaced.generate(IDS, max_new_tokens=3, eos_token_id=None, **WAYS[way])
    assert (np.asarray(out)[:, 9:] == FAVOURED).all()


def test_an_assistant_s_replaced_head_is_called(backend, replaced):
    out = replaced.generate(IDS, max_new_tokens=3, eos_token_id=None, assistant_model=replaced)
    assert (np.asarray(out)[:, 9:] == FAVOURED).all()


def test_stream_calls_what_replaces_the_head(replaced):
    tokenizer = Characters()
    text = "".join(replaced.stream(IDS[:1], tokenizer=tokenizer, max_new_tokens=3, eos_token_id=None))
    assert text == tokenizer.decode([FAVOURED] * 3)


def test_a_tied_head_that_is_replaced(backend):
    model = model_of(backend, CONFIG.replace(tie_word_embeddings=True))
    other = model_of(backend)
    model.set_output_embeddings(favouring(backend, other.get_output_embeddings()))
    assert (np.asarray(model.generate(IDS, max_new_tokens=2, eos_token_id=None))[:, 9:] == FAVOURED).all()


@pytest.mark.parametrize("into", ["class", "head"])
def test_what_is_put_into_a_head_or_its_class_is_called(backend, monkeypatch, into):
    """As libraries do that patch a model's classes: what C computes, and losses in chunks, call no head otherwise."""
    model = model_of(backend)
    kind, method = type(model.get_output_embeddings()), METHODS[backend.__name__]
    written = getattr(kind, method)

    def loss(chunk):
        found = model(IDS, labels=IDS, loss_chunk=chunk).loss
        return float(found.detach() if backend.__name__ == "mistral_torch" else found)

    plain = loss(4)

    def favour(self, x):
        scores = written(self, x)
        return scores + importlib.import_module(f"{backend.__name__}.arrays").from_numpy(LIKES_IT[None, None])

    if into == "class":
        monkeypatch.setattr(kind, method, favour)
    elif backend.__name__ == "mistral_flax":
        pytest.skip("Python calls what a class has, not what an object of it has")
    else:
        head = model.get_output_embeddings()
        setattr(head, method, functools.partial(favour, head))
    assert (np.asarray(model.generate(IDS, max_new_tokens=3, eos_token_id=None))[:, 9:] == FAVOURED).all()
    assert abs(loss(4) - loss(0)) <= 1e-6 * loss(0)
    assert loss(0) > 100 * plain


def test_a_linear_layer_adds_its_bias_flax_tf(backend):
    if backend.__name__ == "mistral_torch":
        pytest.skip("PyTorch has a Linear of its own")
    layers = importlib.import_module(f"{backend.__name__}.layers")
    if backend.__name__ == "mistral_flax":
        from flax import nnx

        layer = layers.Linear(6, 4, bias=True, param_dtype="float32", rngs=nnx.Rngs(0), std=1.0)
        layer.bias.set_value(np.arange(4, dtype=np.float32))
        weight = np.asarray(layer.weight[...])
    else:
        layer = layers.Linear(6, 4, bias=True, dtype="float32", initializer="ones")
        layer.bias.assign(np.arange(4))
        weight = np.asarray(layer.weight)
    x = np.random.default_rng(0).normal(size=(2, 6)).astype(np.float32)
    assert np.allclose(np.asarray(layer(x)), x @ weight.T + np.arange(4), atol=1e-6)


# What libraries of PyTorch do


def test_hooks_on_heads_and_on_the_root_run_in_torch(monkeypatch):
    torch = pytest.importorskip("torch")
    import mistral_torch

    compiled = torch.compile  # to graphs that run as they are: what inductor makes of one is test_torch_compile.py's
    as_it_is = {"backend": lambda graph, _: graph, "options": None}
    monkeypatch.setattr(torch, "compile", lambda function, **options: compiled(function, **{**options, **as_it_is}))

    ids, seen = torch.from_numpy(IDS), []
    for architecture, head in (
        ("MistralForCausalLM", "lm_head"),
        ("MistralForSequenceClassification", "score"),
        ("MistralForTokenClassification", "score"),
        ("MistralForQuestionAnswering", "qa_outputs"),
    ):
        model = getattr(mistral_torch, architecture)(CONFIG).eval()
        model.get_submodule(head).register_forward_hook(lambda module, inputs, output, name=head: seen.append(name))
        model(ids)
        assert seen == [head]
        seen.clear()
    model = model_of(mistral_torch)
    for compile in ("off", "on"):
        hook = model.lm_head.register_forward_hook(lambda module, inputs, output: output + torch.from_numpy(LIKES_IT))
        assert (model.generate(ids, max_new_tokens=2, compile=compile)[:, 9:] == FAVOURED).all()
        hook.remove()
        assert not (model.generate(ids, max_new_tokens=2, compile=compile)[:, 9:] == FAVOURED).all()
    model.register_forward_pre_hook(lambda module, inputs: seen.append("root"))  # as FSDP gathers a root's parameters
    model.generate(ids, max_new_tokens=2)
    assert seen == ["root"] * 2


@pytest.mark.feature("LoRA with peft")
@pytest.mark.filterwarnings("ignore:Model has `tie_word_embeddings=True`")  # theirs
@pytest.mark.parametrize("tied", [False, True])
def test_lora_on_the_head_of_torch(tied):
    peft = pytest.importorskip("peft")
    import torch

    import mistral_torch

    ids, base = torch.from_numpy(IDS), model_of(mistral_torch, CONFIG.replace(tie_word_embeddings=tied))
    before = base(ids).logits.detach()
    config = peft.LoraConfig(task_type="CAUSAL_LM", r=4, target_modules=["lm_head"])
    model = peft.get_peft_model(base, config)
    trained = {name: p for name, p in model.named_parameters() if p.requires_grad}
    assert len(trained) == 2
    optimizer = torch.optim.SGD(trained.values(), lr=10.0)
    for _ in range(2):  # the gradient of A is 0 where B is
        model(input_ids=ids, labels=ids).loss.backward()
        optimizer.step()
    assert all(p.grad.abs().max() > 0 for p in trained.values())
    model.eval().to("cpu")
    assert not torch.allclose(model(ids).logits, before, atol=1e-2)
    wanted = ids
    for _ in range(4):
        wanted = torch.cat([wanted, model(wanted).logits[:, -1:].argmax(-1)], 1)
    assert torch.equal(model.generate(input_ids=ids, max_new_tokens=4, eos_token_id=None), wanted)
    assert not torch.equal(model_of(mistral_torch, base.config).generate(ids, max_new_tokens=4), wanted)
    head = base.get_output_embeddings().base_layer
    assert (head.weight is base.get_input_embeddings().weight) == tied
