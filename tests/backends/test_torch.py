"""PyTorch's own ways: compile, precision that survives casts, state dicts, training."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from conformance.weights import random_parameters
from mistral_core.parameters import shapes
from mistral_core.presets import TINY
from mistral_torch import MistralForCausalLM

IDS = np.random.default_rng(0).integers(3, TINY.vocab_size, (2, 17))


def make(config=TINY, **options):
    parameters = random_parameters(config, "MistralForCausalLM")
    return MistralForCausalLM(config, **options).load_arrays(parameters).eval()


@pytest.mark.parametrize("implementation", ["eager", "sdpa"])
def test_compiles_without_a_graph_break(implementation):
    model = make(attn_implementation=implementation)
    ids, mask = torch.from_numpy(IDS), torch.ones(2, 17, dtype=torch.long)
    mask[0, :3] = 0
    with torch.no_grad():
        plain = model(ids, mask, labels=ids)
        compiled = torch.compile(model, fullgraph=True, backend="aot_eager")(ids, mask, labels=ids)
    assert torch.allclose(plain.logits, compiled.logits, atol=1e-5)
    assert torch.allclose(plain.loss, compiled.loss)


@pytest.mark.parametrize("cast", [torch.float16, torch.bfloat16])
def test_casts_leave_rotary_tables_exact(cast):
    from mistral_torch.layers import rotary

    model = make().to(cast)
    assert {p.dtype for p in model.parameters()} == {cast}
    assert not list(model.buffers()), "a buffer would be cast with the model"
    cos, _ = rotary(torch.tensor([[32767, 131071]]), model.config)
    assert cos.dtype == torch.float32


def test_state_dict_has_the_table_s_names_and_shapes():
    assert {name: tuple(t.shape) for name, t in make().state_dict().items()} == shapes(TINY)


def test_a_long_context_takes_no_memory_for_tables():
    config = TINY.replace(max_position_embeddings=131072)
    model = MistralForCausalLM(config)
    held = sum(t.numel() for t in (*model.parameters(), *model.buffers()))
    assert held == sum(int(np.prod(shape)) for shape in shapes(config).values())


def test_dropout_works_in_training_only():
    model = make(TINY.replace(attention_dropout=0.5), attn_implementation="eager")
    once, twice = (model(IDS).logits for _ in range(2))
    assert torch.equal(once, twice)
    model.train()
    once, twice = (model(IDS).logits for _ in range(2))
    assert not torch.equal(once, twice)


def test_a_few_steps_of_training_lower_the_loss():
    model = make().train()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    losses = []
    for _ in range(8):
        loss = model(IDS, labels=IDS).loss
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < losses[0] / 2


def test_the_cache_is_a_value_where_gradients_flow():
    model = make()
    past = model(IDS[:, :9], use_cache=True).past_key_values
    before = [k.clone() for k in past.keys]
    model(IDS[:, 9:10], past_key_values=past)
    assert all(torch.equal(a, b) for a, b in zip(before, past.keys, strict=True))
