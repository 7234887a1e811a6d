"""Which part of each array a device holds: every number once, heads whole, and what does not fit is told."""

import itertools
import math
import re

import numpy as np
import pytest

from mistral_core import PRESETS, MistralConfig
from mistral_core.config.presets import TINY
from mistral_core.errors import MeshError
from mistral_core.parameters import axis_sizes, parameters, shape_of
from mistral_core.sharding import LETTERS, RULES, Sharding

SMALL = TINY.replace(
    vocab_size=96, hidden_size=48, intermediate_size=80, num_attention_heads=8, num_key_value_heads=4, head_dim=6
)
MESHES = [
    {"data": 2}, {"tensor": 4}, {"fsdp": 2}, {"fsdp": 2, "tensor": 4}, {"tensor": 2, "fsdp": 4},
    {"data": 2, "fsdp": 3, "tensor": 2}, {"data": 1, "tensor": 8}, {"tensor": 1},
]  # fmt: skip


def rows_of(config):
    return dict(parameters(config))


def numbered(row, config):
    shape = shape_of(row, config)
    return np.arange(math.prod(shape)).reshape(shape)


@pytest.mark.parametrize("mesh", MESHES, ids=str)
def test_devices_hold_every_number_of_every_parameter_equally_often(mesh):
    sharding = Sharding.of(SMALL, mesh)
    for name, row in rows_of(SMALL).items():
        whole = numbered(row, SMALL)
        count = np.zeros(whole.size, int)
        for place in sharding.coordinates():
            part = sharding.part(row, place)
            assert whole[part].shape == sharding.shape(row), name
            count[whole[part]] += 1
        assert count.min() == count.max() > 0, name
        cut = math.prod(mesh[axis] for axes in sharding.parameter(row) for axis in axes)
        if sharding.repeats == 1:
            assert math.prod(sharding.shape(row)) * cut == whole.size, name


@pytest.mark.parametrize("mesh", MESHES, ids=str)
def test_large_parameters_are_cut_by_every_axis_that_is_theirs(mesh):
    sharding = Sharding.of(SMALL, mesh)
    wanted = {axis for axis in ("fsdp", "tensor") if axis in mesh}
    for name, row, spec in sharding.table():
        if row.kind != "norm" and not (sharding.repeats > 1 and "KH" in row.axes):
            assert {axis for axes in spec for axis in axes} == wanted, name


@pytest.mark.parametrize(("K", "tensor"), [(1, 2), (1, 8), (2, 2), (2, 4), (2, 8), (4, 2), (4, 4), (4, 8), (8, 8)])
def test_a_device_holds_the_key_value_heads_that_its_query_heads_read(K, tensor):
    config = SMALL.replace(num_key_value_heads=K)
    sharding, rows = Sharding.of(config, {"tensor": tensor}), rows_of(config)
    N, H = config.num_attention_heads, config.head_dim
    q, k, o = (rows[f"model.layers.0.self_attn.{name}_proj.weight"] for name in "qko")
    for place in sharding.coordinates():
        (queries, _), (keys, _), (_, outputs) = (sharding.part(row, place) for row in (q, k, o))
        assert queries == outputs
        query_heads = range(queries.start // H, queries.stop // H)
        assert [keys.start % H, keys.stop % H, queries.start % H, queries.stop % H] == [0] * 4
        key_heads = list(range(keys.start // H, keys.stop // H))
        # local pairing, as attention does it, is the pairing of the whole model
        group = len(query_heads) // len(key_heads)
        assert [key_heads[index // group] for index in range(len(query_heads))] == [n // (N // K) for n in query_heads]
    assert sharding.repeats == max(1, tensor // K)
    assert sharding.parameter(k) == (((), ()) if tensor > K else (("tensor",), ()))
    assert sharding.activation("BRKH") == ((), (), () if tensor > K else ("tensor",), ())


def test_a_mesh_axis_cuts_an_array_once():
    sharding = Sharding.of(
        SMALL, {"data": 2, "fsdp": 2, "tensor": 2}, {"D": ("tensor", "fsdp"), "V": ("fsdp", "tensor")}
    )
    rows = rows_of(SMALL)
    assert sharding.parameter(rows["lm_head.weight"]) == (("fsdp", "tensor"), ())
    assert sharding.parameter(rows["model.layers.0.mlp.down_proj.weight"]) == (("tensor", "fsdp"), ())
    assert sharding.parameter(rows["model.layers.0.mlp.up_proj.weight"]) == (("tensor",), ("fsdp",))
    assert sharding.activation("BTD") == (("data", "fsdp"), (), ())
    assert sharding.activation("BTV") == (("data", "fsdp"), (), ("tensor",))
    assert sharding.activation("BTNH", {"B": 6}) == ((), (), ("tensor",), ())
    assert sharding.activation("BTNH", {"B": 8}) == (("data", "fsdp"), (), ("tensor",), ())


@pytest.mark.parametrize("preset", PRESETS)
def test_published_sizes_fit_the_meshes_of_one_host(preset):
    config = PRESETS[preset]
    for fsdp, tensor in itertools.product((1, 2, 4, 8), (1, 2, 4, 8)):
        fits = config.vocab_size % tensor == 0
        if not fits:
            with pytest.raises(MeshError, match="resize_token_embeddings"):
                Sharding.of(config, {"fsdp": fsdp, "tensor": tensor})
        sharding = Sharding.of(config, {"fsdp": fsdp, "tensor": tensor}, None if fits else {"V": None})
        size = sum(math.prod(sharding.shape(row)) for _, row in parameters(config))
        whole = sum(math.prod(shape_of(row, config)) for _, row in parameters(config))
        assert size * fsdp * tensor >= whole
        if fits and config.num_key_value_heads % tensor == 0:
            assert size * fsdp * tensor <= whole * 1.001  # norms are not cut by `tensor`


@pytest.mark.parametrize(
    ("mesh", "rules", "says"),
    [
        ({"tensor": 3}, None, r"got tensor=3, which cuts N=8 \(query heads\) by 3, K=4 .*F=80 .*may be 1, 2, 4, 8\."),
        ({"tensor": 16}, None, r"N=8 \(query heads\) by 16; tensor may be 1, 2, 4, 8\."),
        ({"fsdp": 5}, None, r"D=48 \(hidden size\) by 5; fsdp may be 1, 2, 3, 4, 6, 8, 12, 16, 24, 48\."),
        ({"fsdp": 2, "tensor": 2}, {"V": ("fsdp", "tensor"), "F": None, "N": "tensor", "D": None, "K": None}, None),
        ({"x": 2}, None, r"must be named by a rule, got x=2 .* give rules that use x"),
        ({"data": 2}, {"N": "tensor"}, r"rules must name axes of the mesh, got 'N' over tensor; the mesh is data=2"),
        ({"data": 2}, {"Q": "data"}, r"rules must be of the letters B, N, K, F, V, D, got 'Q'"),
        ({"data": 2}, {"T": "data"}, r"got 'T'"),
        ({"data": 2}, {"D": ("data", "data")}, r"must name a mesh axis once"),
    ],
    ids=str,
)  # fmt: skip
def test_what_does_not_fit_is_told(mesh, rules, says):
    if says is None:
        Sharding.of(SMALL, mesh, rules)
        return
    with pytest.raises(MeshError, match=says):
        Sharding.of(SMALL, mesh, rules)


def test_heads_are_counted_as_heads_and_not_by_their_product_with_the_head_dimension():
    config = SMALL.replace(num_attention_heads=6, num_key_value_heads=6, head_dim=8)  # 6 * 8 divides by 4
    with pytest.raises(MeshError, match=r"N=6 .*K=6 .*tensor may be 1, 2\."):
        Sharding.of(config, {"tensor": 4})


def test_an_odd_vocabulary_is_told_how_to_fit():
    with pytest.raises(MeshError) as error:
        Sharding.of(SMALL.replace(vocab_size=97), {"tensor": 4})
    assert "V=97 (vocabulary) by 4; tensor may be 1; " in str(error.value)
    assert "resize_token_embeddings(97, pad_to_multiple_of=4)" in str(error.value)
    Sharding.of(SMALL.replace(vocab_size=97), {"tensor": 4}, {"V": None})


def test_what_is_offered_fits(capsys):
    for mesh in ({"tensor": 7}, {"fsdp": 7}, {"fsdp": 5, "tensor": 2}):
        with pytest.raises(MeshError) as error:
            Sharding.of(SMALL, mesh)
        axis, sizes = re.search(r"(\w+) may be ([\d, ]+)", str(error.value)).groups()
        for size in map(int, sizes.split(", ")):
            Sharding.of(SMALL, {**mesh, axis: size})


def test_the_default_rules_know_every_letter_of_the_table():
    letters = {letter for _, row in parameters(MistralConfig()) for axis in row.axes for letter in axis}
    assert letters - {"H"} <= RULES.keys() <= LETTERS.keys()
    assert letters <= axis_sizes(MistralConfig()).keys()
