"""torch.compile, torch.export and torch.func: one graph for all sizes, and the same numbers."""

from __future__ import annotations

import functools
import io
import subprocess
import sys
import time

import numpy as np
import pytest
import torch
from torch._dynamo.testing import CompileCounterWithBackend
from torch._subclasses import FakeTensorMode
from torch.export import Dim
from torch.func import functional_call, grad, stack_module_state, vmap

from conformance.weights import random_parameters
from mistral_core.config.presets import TINY
from mistral_core.errors import GenerationConfigError
from mistral_torch import KVCache, MistralForCausalLM, blocks, native
from mistral_torch.compiled import FROZEN, _kept, fingerprint
from mistral_torch.compiled import compiled as compiled_for_generate
from mistral_torch.generate import IN_C, Engine, _step

CONFIG = TINY.replace(num_hidden_layers=2)
SHALLOW = CONFIG.replace(num_hidden_layers=1)
PARAMETERS = random_parameters(CONFIG, "MistralForCausalLM")
IMPLEMENTATIONS = pytest.mark.parametrize("implementation", ["eager", "sdpa"])
SIZES = [(2, 3), (3, 5), (2, 9), (5, 17), (2, 130)]


def make(config=CONFIG, **options):
    return MistralForCausalLM(config, **options).load_arrays(PARAMETERS).eval()


def batch(rows, columns):
    ids = torch.from_numpy(np.random.default_rng(rows).integers(3, CONFIG.vocab_size, (rows, columns)))
    mask = torch.ones_like(ids)
    mask[0, : columns // 3] = 0
    return ids, mask


def close(a, b, atol=2e-5):
    return torch.allclose(a, b, atol=atol)


def compiled(model):
    """The model compiled without graph breaks for any size, and a counter of its graphs."""
    torch._dynamo.reset()
    counter = CompileCounterWithBackend("eager")
    return torch.compile(model, fullgraph=True, dynamic=True, backend=counter), counter


# Compiled


@pytest.mark.feature("Compiled forward pass")
@pytest.mark.parametrize(
    ("implementation", "use_cache"),
    [
        ("eager", False),
        ("sdpa", True),
        pytest.param("eager", True, marks=pytest.mark.slow),  # a cache that nobody reads, beside either
        pytest.param("sdpa", False, marks=pytest.mark.slow),
    ],
)
def test_one_graph_for_all_lengths_and_batches(implementation, use_cache):
    model = make(SHALLOW, attn_implementation=implementation)
    fast, counter = compiled(model)
    for size in SIZES:
        ids, mask = batch(*size)
        with torch.no_grad():
            found = fast(ids, attention_mask=mask, labels=ids, use_cache=use_cache)
            expected = model(ids, attention_mask=mask, labels=ids)
        assert close(found.logits, expected.logits)
        assert close(found.loss, expected.loss)
    assert counter.frame_count == 1


@pytest.mark.feature("FlexAttention")
@pytest.mark.filterwarnings("ignore:.*should not be instantiated:DeprecationWarning")  # torch's, of torch's
def test_flex_has_two_graphs():
    """One for all lengths up to its block size of 128 and one for all beyond: a guard of create_block_mask's own."""
    model = make(SHALLOW, attn_implementation="flex")
    fast, counter = compiled(model)
    graphs = []
    for size in [(2, 3), (3, 9), (2, 128), (2, 129), (3, 300)]:
        ids, mask = batch(*size)
        with torch.no_grad():
            assert close(fast(ids, attention_mask=mask).logits, model(ids, attention_mask=mask).logits)
        graphs.append(counter.frame_count)
    assert graphs == [1, 1, 1, 2, 2]


@pytest.mark.feature("Cache in a compiled step")
@IMPLEMENTATIONS
def test_one_graph_for_all_steps_with_a_cache(implementation):
    """Beyond two turns of the window's ring, with ragged rows."""
    model = make(attn_implementation=implementation)
    step, counter = compiled(model)
    ids, mask = batch(2, 18)
    with torch.no_grad():
        expected = model(ids, mask).logits
        cache = model(ids[:, :6], mask[:, :6], past_key_values=KVCache.allocate(CONFIG, 2, capacity=18)).past_key_values
        for t in range(6, 18):
            out = step(ids[:, t : t + 1].clone(), past_key_values=cache)
            cache = out.past_key_values
            assert close(out.logits[:, 0], expected[:, t])
    assert counter.frame_count == 1


@pytest.mark.feature("Training step")
@pytest.mark.parametrize("checkpointing", [False, True])
def test_a_compiled_training_step(checkpointing):
    model, expected = make(SHALLOW).train(), make(SHALLOW).train()
    if checkpointing:
        model.gradient_checkpointing_enable()
    torch._dynamo.reset()
    fast = torch.compile(model, fullgraph=True, dynamic=True, backend="aot_eager")
    for size in [(2, 9), (3, 12)]:
        ids, mask = batch(*size)
        for one in (fast, expected):
            one.zero_grad()
            one(ids, attention_mask=mask, labels=ids).loss.backward()
        for ours, theirs in zip(model.parameters(), expected.parameters(), strict=True):
            assert close(ours.grad, theirs.grad)


# Exported


@functools.cache
def exported(implementation):
    """The bytes of a program for any size."""
    ids, mask = batch(2, 9)
    sizes = {0: Dim("B"), 1: Dim("T")}
    shapes = {"input_ids": sizes, "attention_mask": sizes}
    with torch.no_grad():
        program = torch.export.export(
            make(SHALLOW, attn_implementation=implementation), (ids,), {"attention_mask": mask}, dynamic_shapes=shapes
        )
    file = io.BytesIO()
    torch.export.save(program, file)
    return file.getvalue()


@pytest.mark.feature("Export")
@IMPLEMENTATIONS
def test_an_exported_model_takes_any_size(implementation):
    model = make(SHALLOW, attn_implementation=implementation)
    loaded = torch.export.load(io.BytesIO(exported(implementation))).module()
    for size in [(2, 9), (3, 5), (4, 40)]:
        ids, mask = batch(*size)
        out, expected = loaded(ids, attention_mask=mask), model(ids, attention_mask=mask)
        assert close(out.logits, expected.logits)
        assert type(out) is type(expected)
        assert torch.equal(out.past_key_values.length, expected.past_key_values.length)


@pytest.mark.feature("Export")
def test_an_exported_program_needs_only_the_output_types(tmp_path):
    """In a process of its own, where no model was ever made."""
    (tmp_path / "model.pt2").write_bytes(exported("sdpa"))
    program = "import sys, torch, mistral_torch.arrays\n" + (
        "out = torch.export.load(sys.argv[1]).module()(torch.ones(3, 4, dtype=torch.int64), "
        "attention_mask=torch.ones(3, 4, dtype=torch.int64))\nprint(*out.logits.shape)"
    )
    run = subprocess.run(
        [sys.executable, "-c", program, str(tmp_path / "model.pt2")], capture_output=True, text=True, check=True
    )
    assert run.stdout.split() == ["3", "4", str(CONFIG.vocab_size)]


# torch.func


@pytest.mark.feature("torch.func: functional_call, grad, vmap")
def test_gradients_of_each_example():
    model = make(attn_implementation="eager").train()
    parameters = dict(model.named_parameters())
    ids, _ = batch(3, 9)

    def loss(parameters, row):
        return functional_call(model, parameters, (row[None],), {"labels": row[None]}).loss

    each = vmap(grad(loss), in_dims=(None, 0))(parameters, ids)
    for row in range(3):
        model.zero_grad()
        model(ids[row], labels=ids[row]).loss.backward()
        assert all(close(each[name][row], p.grad) for name, p in model.named_parameters())


@pytest.mark.feature("torch.func: functional_call, grad, vmap")
@pytest.mark.parametrize("implementation", ["eager", "sdpa", "flex"])
def test_functional_gradients(implementation):
    model = make(attn_implementation=implementation)
    ids, mask = batch(2, 9)
    gradients = grad(lambda p: functional_call(model, p, (ids, mask), {"labels": ids}).loss)(
        dict(model.named_parameters())
    )
    model(ids, mask, labels=ids).loss.backward()
    assert all(close(gradients[name], p.grad) for name, p in model.named_parameters())


@pytest.mark.feature("torch.func: functional_call, grad, vmap")
def test_an_ensemble_in_one_call():
    models = [make(attn_implementation="eager"), MistralForCausalLM(CONFIG, attn_implementation="eager").eval()]
    stacked, _ = stack_module_state(models)
    ids, mask = batch(2, 9)
    with torch.no_grad():
        logits = vmap(lambda p: functional_call(models[0], p, (ids, mask)).logits)(stacked)
        assert all(close(each, model(ids, mask).logits) for each, model in zip(logits, models, strict=True))


# Shapes without numbers


@pytest.mark.feature("Meta device and fake tensors")
@pytest.mark.parametrize("implementation", ["eager", "sdpa"])
def test_shapes_cost_nothing(implementation):
    with torch.device("meta"):
        model = MistralForCausalLM(CONFIG, attn_implementation=implementation)
        ids = torch.zeros(2, 9, dtype=torch.int64)
    assert model(ids, labels=ids).logits.shape == (2, 9, CONFIG.vocab_size)
    with FakeTensorMode():
        model = MistralForCausalLM(CONFIG, attn_implementation=implementation)
        ids = torch.zeros(2, 9, dtype=torch.int64)
        assert model(ids, ids, labels=ids).logits.shape == (2, 9, CONFIG.vocab_size)


# The compiled step of generate


IDS = np.random.default_rng(4).integers(3, CONFIG.vocab_size, (1, 7))


def call(module, x):
    return module(x)


def endless(model, ids=IDS, **options):
    return model.generate(ids, max_new_tokens=6, eos_token_id=None, **options)


@pytest.fixture
def shallow():
    return make(SHALLOW)


@torch.no_grad()
def test_kernels_of_frozen_weights_are_tried_and_the_numbers_stay(shallow, capfd):
    """Of one product: each is compiled for every kernel that is tried."""
    product, x_BTD = shallow.model.layers[0].mlp.down_proj, torch.linspace(-1, 1, CONFIG.intermediate_size)[None, None]
    assert close(compiled_for_generate(product, call, frozen=True)(product, x_BTD, kind=()), product(x_BTD))
    assert "AUTOTUNE" not in "".join(capfd.readouterr())  # nothing is told of the trials


@pytest.fixture
def without_c(monkeypatch):
    """No step in C, which else is measured beside the compiled one and kept where it is faster."""
    monkeypatch.setattr("mistral_torch.native.whole_step_of", lambda model: None)


@pytest.mark.slow
@pytest.mark.usefixtures("without_c")
def test_tokens_of_a_step_whose_kernels_are_tried(shallow):
    assert torch.equal(endless(shallow, compile="max"), endless(shallow))


@pytest.mark.feature("generate compiled for an unchanging model (compile='max')")
@pytest.mark.usefixtures("without_c")
def test_frozen_weights_are_never_stale(shallow, caplog, monkeypatch):
    """However the kernels were chosen: none is tried here. A prompt of one token is a step like those after it."""
    monkeypatch.setitem(FROZEN, "max_autotune", False)
    caplog.set_level("INFO", "mistral.torch")
    model, ids = shallow, IDS[:, :1]
    before = endless(model, ids)
    assert torch.equal(endless(model, ids, compile="max"), before)
    frozen = [record for record in caplog.messages if "compiling" in record]
    assert torch.equal(endless(model, ids, compile="max"), endless(model, ids))
    assert [record for record in caplog.messages if "compiling" in record] == frozen  # not compiled anew
    model.model.layers[0].mlp.up_proj.weight.data.mul_(-3)  # which torch's own version counter does not count
    after = endless(model, ids)
    assert not torch.equal(after, before)
    assert torch.equal(endless(model, ids, compile="max"), after)
    assert "the weights have changed since they were frozen" in caplog.messages


@pytest.mark.parametrize(
    "change",
    [
        lambda weight: weight.data.mul_(2),
        lambda weight: weight.data[3, 5].add_(1e-3),
        lambda weight: weight.data.copy_(weight.data.flip(0)),
        lambda weight: weight.data.view(-1)[:2].copy_(weight.data.view(-1)[:2].flip(0)),
        lambda weight: setattr(weight, "data", weight.data.clone()),
    ],
)
def test_a_fingerprint_tells_any_change(change):
    model = MistralForCausalLM(CONFIG).eval()
    before = fingerprint(model)
    assert fingerprint(model) == before
    change(model.model.layers[1].mlp.down_proj.weight)
    assert fingerprint(model) != before


@pytest.mark.skipif(not native.available(), reason=f"no kernels in C: {native.why()}")
@pytest.mark.parametrize("faster", [IN_C, "compiled"])
def test_the_faster_of_two_ways_is_kept(shallow, caplog, monkeypatch, faster):
    """Each is run and timed once for a kind of step, whatever the room of the cache, and the slower one is let go."""
    monkeypatch.setitem(FROZEN, "max_autotune", False)
    caplog.set_level("INFO", "mistral.torch")
    slower = {IN_C: "_in_torch", "compiled": "_in_c"}[faster]
    way, ran = getattr(Engine, slower), []

    def slowed(engine, *given):
        ran.append(given)
        time.sleep(0.1)
        return way(engine, *given)

    ids = IDS[:, :1]  # a prompt of one token is a step like those after it
    expected = endless(shallow, ids)
    monkeypatch.setattr(Engine, slower, slowed)
    assert torch.equal(endless(shallow, ids, compile="max"), expected)
    told = [record for record in caplog.messages if "is kept" in record]
    assert len(told) == 1
    assert told[0].endswith(f"{faster} is kept")
    assert ((_step, True) in _kept[shallow]) == (faster == "compiled")
    ran.clear()
    assert torch.equal(endless(shallow, ids, compile="max"), expected)
    longer = shallow.generate(ids, max_new_tokens=40, eos_token_id=None, compile="max")
    assert torch.equal(longer[:, : expected.shape[1]], expected)
    assert [record for record in caplog.messages if "is kept" in record] == told
    assert not ran


def test_freezing_asks_for_memory_first(monkeypatch):
    monkeypatch.setattr("mistral_torch.compiled._free_memory", lambda: 1000)
    with pytest.raises(GenerationConfigError, match=r"a second copy of the weights.*compile='on'"):
        endless(MistralForCausalLM(CONFIG).eval(), compile="max")


@pytest.mark.parametrize("implementation", ["sdpa", "blocked"])
def test_one_graph_however_long_a_text_is(monkeypatch, implementation):
    """A number of columns that is dynamic stays so beyond the lengths from which on texts are cut into blocks."""
    monkeypatch.setattr(blocks, "COLUMNS", 3)
    monkeypatch.setattr(blocks, "LONG", 6)
    model = make(SHALLOW, attn_implementation=implementation)
    fast, counter = compiled(model)
    for size in SIZES:
        ids, mask = batch(*size)
        with torch.no_grad():
            assert close(fast(ids, attention_mask=mask).logits, model(ids, attention_mask=mask).logits)
    assert counter.frame_count == 1


def test_a_long_text_whose_length_is_known_is_cut_in_a_compiled_program(monkeypatch):
    monkeypatch.setattr(blocks, "COLUMNS", 3)
    monkeypatch.setattr(blocks, "LONG", 6)

    def is_cut(order_BT, window):
        return order_BT * 0 + (0 if blocks.cut(order_BT, order_BT, window) is None else 1)

    torch._dynamo.reset()
    program = torch.compile(is_cut, fullgraph=True, dynamic=False, backend="eager")
    for length, wanted in ((5, 0), (6, 1), (20, 1)):
        assert program(torch.arange(length)[None], 2).unique().tolist() == [wanted]
