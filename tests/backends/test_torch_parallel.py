"""What torch's own ways to use several devices do with a model and its outputs, the devices being pretended."""

from __future__ import annotations

import sys

import numpy as np
import pytest
import torch
from torch import nn
from torch.distributed.utils import _apply_to_tensors
from torch.nn.parallel import replicate, scatter_gather
from torch.nn.parallel.distributed import DistributedDataParallel, _find_tensors
from torch.utils import _pytree as pytree

import mistral_torch
from mistral_core.config.presets import TINY
from mistral_core.errors import UnsupportedFeatureError
from mistral_core.parameters import HEADS

CONFIG = TINY.replace(num_hidden_layers=2, layer_types=None, sliding_window=4, tie_word_embeddings=True)
IDS = torch.from_numpy(np.random.default_rng(0).integers(3, CONFIG.vocab_size, (4, 9)))
EVERYTHING = {"output_hidden_states": True, "output_attentions": True}


def make(architecture="MistralForCausalLM"):
    torch.manual_seed(0)
    return getattr(mistral_torch, architecture)(CONFIG).eval()


@pytest.fixture
def data_parallel(monkeypatch):
    """`nn.DataParallel` on two devices, which are the CPU: what goes from one to another stays where it is."""

    def copies(tensors, devices, detach=False):
        return [[tensor.view_as(tensor) for tensor in tensors] for _ in devices]

    def together(device, dim, *tensors):
        return torch.cat([tensor[None] if tensor.ndim == 0 else tensor for tensor in tensors], dim)

    modules = sys.modules
    monkeypatch.setattr(modules["torch.nn.parallel.replicate"], "_broadcast_coalesced_reshape", copies)
    monkeypatch.setattr(modules["torch.nn.parallel.replicate"], "_get_device_index", lambda device, *_: device)
    monkeypatch.setattr(
        scatter_gather.Scatter, "apply", lambda devices, _, dim, tensor: tensor.chunk(len(devices), dim)
    )
    monkeypatch.setattr(scatter_gather.Gather, "apply", together)

    def parallel(module):
        def called(*inputs, **options):
            inputs, options = scatter_gather.scatter_kwargs(inputs, options, [0, 1])
            replicas = replicate(module, [0, 1])
            each = zip(replicas, inputs, options, strict=True)
            return scatter_gather.gather([replica(*i, **o) for replica, i, o in each], 0)

        return called

    return parallel


def same(one, other):
    """Two outputs with the same fields; of the scalars, which torch does not average, the mean is compared."""
    assert type(one) is type(other)
    assert list(one.keys()) == list(other.keys())
    ones, others = (pytree.tree_leaves(each) for each in (one, other))
    for x, y in zip(ones, others, strict=True):
        torch.testing.assert_close(x if x is None or x.shape == y.shape else x.mean(), y)


@pytest.mark.parametrize("architecture", HEADS)
def test_data_parallel(data_parallel, architecture):
    model = make(architecture)
    labels = {
        "MistralForCausalLM": {"labels": IDS},
        "MistralForTokenClassification": {"labels": IDS % CONFIG.num_labels},
        "MistralForSequenceClassification": {"labels": IDS[:, 0] % CONFIG.num_labels},
        "MistralForQuestionAnswering": {"start_positions": IDS[:, 0] % 9, "end_positions": IDS[:, 1] % 9},
    }.get(architecture, {})
    alone, parallel = model(IDS, **labels, **EVERYTHING), data_parallel(model)(IDS, **labels, **EVERYTHING)
    same(parallel, alone)
    assert tuple(map(id, parallel)) == tuple(map(id, parallel.to_tuple()))
    same(model(IDS), data_parallel(model)(IDS))
    in_order = data_parallel(model)(IDS, **labels, return_dict=False)
    for x, y in zip(in_order, model(IDS, **labels).to_tuple(), strict=True):
        assert type(x) is type(y)


def test_data_parallel_trains_the_model_that_it_copies(data_parallel):
    model = make().train()
    grads = []
    for run in (model, data_parallel(model)):
        model.zero_grad()
        run(IDS, labels=IDS).loss.mean().backward()
        grads.append({name: parameter.grad.clone() for name, parameter in model.named_parameters()})
    torch.testing.assert_close(*grads)


def test_data_parallel_with_a_cache(data_parallel):
    model = make().requires_grad_(False)
    parallel = data_parallel(model)
    past = parallel(IDS).past_key_values
    assert isinstance(past, mistral_torch.KVCache)
    same(parallel(IDS[:, :3], past_key_values=past), model(IDS[:, :3], past_key_values=model(IDS).past_key_values))
    limited = mistral_torch.KVCache.allocate(CONFIG, 4, 20)
    with pytest.raises(UnsupportedFeatureError, match="past_key_values: a KVCache with a capacity, which DataParallel"):
        parallel(IDS, past_key_values=limited)
    assert isinstance(next(iter(model(IDS))), torch.Tensor), "the model itself yields fields as before"


class Wrapper(nn.Module):
    """A user's own module around a model."""

    def __init__(self, model):
        super().__init__()
        self.model = model

    def forward(self, ids):
        return {"outputs": self.model(ids, labels=ids), "ids": ids}


def test_data_parallel_of_what_holds_a_model(data_parallel):
    model = make()
    found = data_parallel(Wrapper(model))(IDS)
    same(found["outputs"], model(IDS, labels=IDS))
    assert torch.equal(found["ids"], IDS)


def test_an_output_is_scattered(data_parallel):
    output = make().requires_grad_(False)(IDS, **EVERYTHING)
    first, second = scatter_gather.scatter(output, [0, 1])
    for part, rows in ((first, slice(2)), (second, slice(2, 4))):
        same(part, pytree.tree_map_only(torch.Tensor, lambda x, rows=rows: x[rows], output))


@pytest.mark.parametrize(
    "again",
    [
        lambda output: pytree.tree_map(lambda x: x, output),
        lambda output: pytree.tree_map_only(torch.Tensor, torch.clone, output),
        lambda output: _apply_to_tensors(torch.clone, output),
    ],
    ids=["tree_map", "tree_map_only", "FSDP1"],
)
@pytest.mark.parametrize("options", [{}, {"labels": IDS}, {"labels": IDS, **EVERYTHING}], ids=len)
def test_outputs_are_taken_apart_and_made_again(again, options):
    output = make().requires_grad_(False)(IDS, **options)
    same(again(output), output)
    tensors = [x for x in pytree.tree_leaves(output) if isinstance(x, torch.Tensor)]
    assert [*map(id, _find_tensors(output))] == [*map(id, tensors)]


@pytest.fixture
def one_process(tmp_path):
    torch.distributed.init_process_group("gloo", init_method=f"file://{tmp_path}/store", rank=0, world_size=1)
    yield
    torch.distributed.destroy_process_group()


@pytest.mark.filterwarnings("ignore")  # that nothing is unused
@pytest.mark.parametrize("options", [{"find_unused_parameters": True}, {"static_graph": True}, {}], ids=str)
def test_distributed_data_parallel(one_process, options):
    model = make()
    parallel = DistributedDataParallel(model, **options)  # backward asks for it too
    wanted, found = model(IDS, labels=IDS), parallel(IDS, labels=IDS)
    same(found, wanted)
    found.loss.backward()
    assert all(parameter.grad is not None for parameter in model.parameters())


@pytest.mark.filterwarnings("ignore")
def test_fully_sharded(one_process):
    from torch.distributed.fsdp import fully_shard

    model = make()
    wanted = model(IDS, labels=IDS, **EVERYTHING)
    mesh = torch.distributed.init_device_mesh("cpu", (1,))
    for layer in model.model.layers:
        fully_shard(layer, mesh=mesh)
    fully_shard(model, mesh=mesh)
    found = model(IDS, labels=IDS, **EVERYTHING)
    same(found, wanted)
    found.loss.backward()
    assert all(parameter.grad is not None for parameter in model.parameters())
