"""Packed weights in PyTorch's own ways: modules, state dicts, casts, adapters, gradients, compilation."""

from __future__ import annotations

import copy
import functools
import gc
import weakref

import pytest

torch = pytest.importorskip("torch")

from conformance.weights import random_parameters  # noqa: E402
from mistral_core import TINY, errors  # noqa: E402
from mistral_torch import MistralForCausalLM, dequantize, quantize  # noqa: E402
from mistral_torch.quantize import QuantizedLinear  # noqa: E402

CONFIG = TINY.replace(
    num_hidden_layers=1, hidden_size=64, intermediate_size=128, num_attention_heads=2, num_key_value_heads=1,
    head_dim=32, vocab_size=64,
)  # fmt: skip
IDS = torch.arange(1, 8)[None]


def model(quantization="int4", **options):
    made = MistralForCausalLM(CONFIG).load_arrays(random_parameters(CONFIG)).eval()
    return quantize(made, quantization, **options) if quantization else made


@torch.no_grad()
def logits(of):
    return of(IDS).logits


def test_a_quantized_linear_is_a_linear():
    """What looks for linears finds it, with floats that can be read and not be written."""
    made = model()
    linear = made.model.layers[0].mlp.up_proj
    assert isinstance(linear, torch.nn.Linear)
    assert linear.weight.shape == (128, 64)
    assert linear.bias is None
    assert not list(linear.parameters())
    assert {name for name, _ in linear.named_buffers()} == {"weight_packed", "weight_scale"}
    assert "int4" in repr(linear)
    for write in (
        lambda: setattr(linear.weight, "data", linear.weight * 2),
        lambda: setattr(linear, "weight", None),
        lambda: setattr(linear, "weight", torch.nn.Parameter(torch.zeros(128, 64))),
    ):
        with pytest.raises(errors.UnsupportedFeatureError, match="call mistral_torch.dequantize"):
            write()


def test_state_dicts_travel_between_packed_models():
    """Strict, with packed bytes by names of their own; floats do not fit."""
    first, second = model(), model()
    for name, buffer in second.named_buffers():
        if name.endswith("weight_packed"):
            buffer.zero_()
    assert not torch.equal(logits(first), logits(second))
    second.load_state_dict(first.state_dict())
    assert torch.equal(logits(first), logits(second))
    with pytest.raises(RuntimeError, match="weight_packed"):
        second.load_state_dict(model(None).state_dict())


@pytest.mark.parametrize("cast", ["half", "bfloat16", "double"])
def test_casts_leave_packed_bytes_and_scales_alone(cast):
    made = model("nf4")
    before = {name: buffer.clone() for name, buffer in made.named_buffers() if "weight_" in name}
    getattr(made, cast)()
    after = {name: buffer for name, buffer in made.named_buffers() if "weight_" in name}
    assert made.model.norm.weight.dtype != torch.float32
    for name, buffer in before.items():
        assert after[name].dtype == buffer.dtype, name
        assert torch.equal(after[name], buffer), name
    assert logits(made).dtype == torch.float32
    made.float()
    other = model("nf4")
    for parameter in other.parameters():
        parameter.data = getattr(parameter.data, cast)().float()
    assert torch.equal(logits(made), logits(other))


def test_copies_and_devices():
    made = model()
    again = copy.deepcopy(made)
    assert torch.equal(logits(made), logits(again))
    assert all(buffer.is_meta for buffer in copy.deepcopy(made).to("meta").buffers())
    assert torch.equal(logits(made.to("cpu")), logits(again))


def test_gradients_of_inputs_are_those_of_the_floats():
    """And nothing is kept for them but the packed bytes: no float matrix lives between forward and backward."""
    made = model("int4", group_size=16)
    x = torch.randn(3, 64, generator=torch.Generator().manual_seed(0))
    linear = made.model.layers[0].mlp.up_proj
    given = x.clone().requires_grad_()
    kept = []

    def keep(tensor):
        kept.append(tensor)
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        out = linear(given)
    assert not [tensor for tensor in kept if tensor.is_floating_point() and tensor.numel() >= linear.weight.numel()]
    out.square().sum().backward()
    plain = x.clone().requires_grad_()
    torch.nn.functional.linear(plain, linear.weight).square().sum().backward()
    torch.testing.assert_close(given.grad, plain.grad)


def test_the_gradient_of_the_gradient_is_refused_or_right():
    """A second derivative with respect to the input of a linear map is that of what stands around it."""
    linear = model().model.layers[0].mlp.up_proj
    x = torch.randn(2, 64, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(linear, (x,), eps=1e-3, atol=1e-4)


@pytest.mark.client("peft", "LoRA on packed weights (QLoRA)")
def test_lora_on_packed_weights():
    """peft wraps them, only adapters train, the loss falls; merging is refused by name, and real after dequantize."""
    peft = pytest.importorskip("peft")
    torch.manual_seed(0)
    made = model("nf4")
    config = peft.LoraConfig(r=4, target_modules=["q_proj", "up_proj", "down_proj"], task_type="CAUSAL_LM")
    wrapped = peft.get_peft_model(made, config).train()
    trained = [name for name, parameter in wrapped.named_parameters() if parameter.requires_grad]
    assert trained
    assert all("lora_" in name for name in trained)
    optimizer = torch.optim.Adam([p for p in wrapped.parameters() if p.requires_grad], lr=1e-2)
    losses = []
    for _ in range(8):
        loss = wrapped(IDS, labels=IDS).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    assert losses[-1] < losses[0] - 0.1
    wrapped.eval()
    beside = logits(wrapped)
    for merge in (wrapped.merge_adapter, lambda: wrapped.merge_and_unload(safe_merge=True)):
        with pytest.raises(errors.UnsupportedFeatureError, match="call mistral_torch.dequantize"):
            merge()
    assert torch.equal(logits(wrapped), beside)
    plain = dequantize(model("nf4"))
    again = peft.get_peft_model(plain, config)
    adapters = {name: value for name, value in wrapped.state_dict().items() if "lora_" in name}
    again.load_state_dict(adapters, strict=False)
    merged = again.merge_and_unload()
    torch.testing.assert_close(logits(merged), beside, rtol=1e-4, atol=1e-4)


def test_hooks_and_replacements_take_effect():
    """A hook on a packed head runs in generate; a module in its place is called."""
    made = model("int8", head="int8")
    assert isinstance(made.lm_head, QuantizedLinear)
    calls = []
    made.lm_head.register_forward_hook(lambda *_: calls.append(1))
    made.generate(IDS, max_new_tokens=3)
    assert len(calls) == 3


@pytest.mark.parametrize("compiler", ["aot_eager", pytest.param("inductor", marks=pytest.mark.slow)])
def test_compiled_is_eager(compiler):
    """One graph, the kernels of few rows among its operations; inductor makes a program of a part of it."""
    made = model("int4")
    compiled = torch.compile(made, fullgraph=True, dynamic=False, backend=compiler)
    torch.testing.assert_close(logits(compiled), logits(made), rtol=1e-5, atol=1e-5)
    mlp = made.model.layers[0].mlp
    compiled = torch.compile(mlp, fullgraph=True, dynamic=False)
    x = torch.randn(1, 7, CONFIG.hidden_size, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        torch.testing.assert_close(compiled(x), mlp(x), rtol=1e-5, atol=1e-5)


def test_export_needs_nothing_of_ours():
    """A program of torch's own operators, which computes the same."""
    made = model("int4")
    program = torch.export.export(made, (IDS,), strict=False)
    targets = {str(node.target) for node in program.graph.nodes if node.op == "call_function"}
    assert not [target for target in targets if "mistral" in target]
    torch.testing.assert_close(program.module()(IDS).logits, logits(made), rtol=1e-5, atol=1e-5)


def test_a_packed_model_is_let_go():
    """No cache of kernels keeps a model alive."""
    made = model()
    made.generate(IDS, max_new_tokens=2)
    gone = weakref.ref(made)
    del made
    gc.collect()
    assert gone() is None


def test_checkpointing_and_packed_weights():
    """Gradient checkpointing computes layers again, packed ones too, with equal gradients of the embeddings."""

    @functools.cache
    def gradient(checkpointing):
        made = model("int4").train()
        if checkpointing:
            made.gradient_checkpointing_enable()
        made(IDS, labels=IDS).loss.backward()
        return made.model.embed_tokens.weight.grad

    torch.testing.assert_close(gradient(True), gradient(False))
