"""Attention in C as an operation of JAX and of TensorFlow: the formula, its gradients, and no part of a file."""

from __future__ import annotations

import importlib
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
import tensorflow as tf

import mistral_tf
from conformance.weights import random_parameters
from mistral_core.config.presets import TINY
from mistral_core.native import attention as in_c
from mistral_core.native import library
from mistral_core.reference import ops

T, H, HEADS = 100, 32, (6, 2)
EPS = {"float32": 2**-23, "bfloat16": 2**-7}
OUTPUT = {"float32": 4, "bfloat16": 1}
"""The most that an output may differ, in eps of the largest value: 2.03 and 0.61 were seen on an Intel Xeon."""
GRADIENT = {"float32": 8, "bfloat16": 2}
"""The same of gradients, which sum over many, and of theirs: 5.4 and 1.7 were seen."""
OF_A_MODEL = {"float32": 40, "bfloat16": 10}
"""The same of gradients of a model of two layers: 25.3 and 5.1 were seen."""
LOSS = {"float32": 2, "bfloat16": 0.25}
"""The same of its loss: 0.72 and 0.03 were seen."""
NAMES = {"flax": "dot_product", "tf": "sdpa"}


@pytest.fixture(params=["float32", "bfloat16"])
def dtype(request):
    if not in_c.available(library.TYPES[request.param], H):
        pytest.skip("attention in C needs a compiler and AVX-512, in bfloat16 AMX")
    return request.param


def modules(name):
    """The modules of a backend that attend; it is skipped where it has no kernels."""
    names = ("attention", "arrays", "blocks", "native")
    found = SimpleNamespace(name=name, **{each: importlib.import_module(f"mistral_{name}.{each}") for each in names})
    if not found.native.available():
        pytest.skip(found.native.why())
    return found


@pytest.fixture(params=list(NAMES))
def backend(request):
    return modules(request.param)


def ordered(mask, past=0):
    return np.where(mask, past + mask.cumsum(1) - 1, -1).astype(np.int32)


def plain(past=0):
    query = np.broadcast_to(np.arange(past, past + T, dtype=np.int32), (2, T))
    return query, np.broadcast_to(np.arange(past + T, dtype=np.int32), (2, past + T))


def padded():
    mask = np.ones((3, T), bool)
    mask[0, :30] = mask[0, 50:53] = mask[1, 70:] = mask[2] = False
    return ordered(mask), ordered(mask)


def rolled():
    """A ring of 64 keys in the slots of their orders, and beside it the new tokens."""
    slots, length = 64, np.array([[150], [10]])
    kept = np.maximum(length - 1 - (length - 1 - np.arange(slots)) % slots, -1)
    query = length + np.arange(T)
    return query.astype(np.int32), np.concatenate([kept, query], 1).astype(np.int32)


SIGHTS = {"alone": plain(), "after some keys": plain(70), "padded": padded(), "beside a ring": rolled()}


def numbers(orders, seed=0):
    rng = np.random.default_rng(seed)
    (B, queries), S = orders[0].shape, orders[1].shape[1]
    shapes = (B, queries, HEADS[0], H), (B, S, HEADS[1], H), (B, S, HEADS[1], H)
    return [rng.standard_normal(shape, np.float32) for shape in shapes]


def given(backend, dtype, orders, seed=0):
    kind = np.float32 if dtype == "float32" else ml_dtypes.bfloat16
    return [backend.arrays.from_numpy(x.astype(kind)) for x in numbers(orders, seed)]


def attended(backend, arrays, orders, window, documents=None, implementation=None):
    """The output as it is by default, prepared as a model does."""
    implementation = implementation or NAMES[backend.name]
    who = [backend.arrays.from_numpy(np.array(x)) for x in orders]
    documents = None if documents is None else backend.arrays.from_numpy(documents)
    visibility = backend.attention.Visibility(*who, window, documents)
    visibility = backend.attention.prepared(visibility, implementation)
    return backend.attention.attend(*arrays, visibility, implementation=implementation)[0]


def expected(arrays, orders, window, documents=None):
    """The reference's output, in float64."""
    q, k, v = (np.asarray(x, np.float64) for x in arrays)
    query, key = (np.asarray(x, np.int64) for x in orders)
    visible = (query[:, :, None] >= 0) & (key[:, None] >= 0) & (key[:, None] <= query[:, :, None])
    if window is not None:
        visible &= key[:, None] > query[:, :, None] - window
    if documents is not None:
        visible &= documents[:, :, None] == documents[:, None]
    return ops.attend(q, k, v, visible)[0]


def floats(x):
    return np.asarray(x.numpy() if hasattr(x, "numpy") else x).astype(np.float64)


def assert_near(found, wanted, scale, dtype, steps=OUTPUT):
    assert found.shape == wanted.shape
    assert np.abs(floats(found) - wanted).max() <= steps[dtype] * EPS[dtype] * np.abs(scale).max()


@pytest.fixture
def calls(monkeypatch):
    """What asked whether C computes its attention, and what it was told."""
    seen = []
    for name in NAMES:
        module = importlib.import_module(f"mistral_{name}.attention")
        asked = module.is_for_c

        def is_for_c(*arrays, asked=asked):
            seen.append(asked(*arrays))
            return seen[-1]

        monkeypatch.setattr(module, "is_for_c", is_for_c)
    return seen


@pytest.mark.parametrize("window", [None, 1, 33, 64, 1000])
@pytest.mark.parametrize("name", SIGHTS)
def test_it_is_the_formula(backend, dtype, calls, name, window):
    if name == "beside a ring" and (window is None or window > 64):
        window = 65
    orders = SIGHTS[name]
    arrays = given(backend, dtype, orders)
    found = attended(backend, arrays, orders, window)
    assert calls == [True]
    assert_near(found, expected(map(floats, arrays), orders, window), floats(arrays[2]), dtype)
    assert (floats(found)[orders[0] < 0] == 0).all()


@pytest.mark.parametrize("window", [None, 12])
@pytest.mark.parametrize("name", ["in order", "some again", "each alone"])
def test_packed_documents_see_themselves(backend, dtype, calls, name, window):
    orders = SIGHTS["padded"]
    documents = {
        "in order": np.searchsorted([1, 41, 44, 100], np.arange(T), side="right"),
        "some again": np.arange(T) // 9 % 4 - 1,
        "each alone": -np.arange(T),
    }[name]
    documents = np.stack([documents, documents[::-1], documents]).astype(np.int32)
    arrays = given(backend, dtype, orders)
    found = attended(backend, arrays, orders, window, documents)
    assert calls == [True]
    assert_near(found, expected(map(floats, arrays), orders, window, documents), floats(arrays[2]), dtype)


def gradients(backend, function, arrays, upstream):
    """The output and the gradients of queries, keys and values, in a compiled program."""
    if backend.name == "flax":

        @jax.jit
        def both(*arrays):
            output, pullback = jax.vjp(function, *arrays)
            return [output, *pullback(upstream.astype(output.dtype))]

        return both(*arrays)

    @tf.function
    def of_tape(*arrays):
        with tf.GradientTape() as tape:
            tape.watch(arrays)
            output = function(*arrays)
        return [output, *tape.gradient(output, list(arrays), tf.cast(upstream, output.dtype))]

    return of_tape(*arrays)


@pytest.mark.parametrize(("name", "packed"), [("padded", False), ("padded", True), ("beside a ring", False)])
def test_its_gradients_are_the_formula_s(backend, dtype, calls, name, packed):
    orders = SIGHTS[name]
    documents = (np.arange(3 * T) // 17 % 5).astype(np.int32).reshape(3, T) if packed else None
    arrays = given(backend, dtype, orders)
    upstream = numbers(orders, seed=1)[0]

    def function(*arrays, implementation=None):
        return attended(backend, arrays, orders, 40, documents, implementation=implementation)

    found = gradients(backend, function, arrays, upstream)
    assert calls[:1] == [True]
    assert (floats(found[0]) == floats(function(*arrays))).all(), "to the bit what it is without gradients"
    calls.clear()
    wanted = gradients(backend, lambda *x: function(*x, implementation="eager"), arrays, upstream)
    assert not calls
    for ours, theirs in zip(found, wanted, strict=True):
        assert ours.dtype == theirs.dtype
        assert_near(ours, floats(theirs), floats(theirs), dtype, steps=GRADIENT)


def test_what_it_is_not_asked_for(backend, dtype, calls, monkeypatch):
    """Short texts, other heads and dtypes, and every other way to attend, of which one has blocks of its own."""
    monkeypatch.setattr(backend.blocks, "COLUMNS", 64)
    orders = SIGHTS["padded"]
    arrays = given(backend, dtype, orders)
    wanted = expected(map(floats, arrays), orders, 40)
    for implementation in ("eager", "blocked"):
        found = attended(backend, arrays, orders, 40, implementation=implementation)
        assert_near(found, wanted, floats(arrays[2]), dtype)
    assert not calls
    attended(backend, [x[:, :63] for x in arrays], [x[:, :63] for x in orders], 40)
    attended(backend, [x[..., :24] for x in arrays], orders, 40)
    cast = (lambda x: x.astype(jnp.float16)) if backend.name == "flax" else (lambda x: tf.cast(x, tf.float16))
    attended(backend, [cast(x) for x in arrays], orders, 40)
    assert calls == [False] * 3


def test_a_key_that_is_not_there_is_an_error(backend, dtype):
    query, keys = SIGHTS["after some keys"]
    orders = query, np.where(keys == 60, -1, keys).astype(np.int32)
    with pytest.raises(Exception, match="one is not there, for the cache was rolled back further than it remembers"):
        floats(attended(backend, given(backend, dtype, orders), orders, 40))


def test_jax_maps_it_differentiates_it_forward_and_runs_it_by_operations(dtype):
    backend = modules("flax")
    orders = SIGHTS["padded"]
    arrays = given(backend, dtype, orders)

    def function(*arrays):
        return attended(backend, arrays, orders, 40)

    assert "@mistral_attend(" in jax.jit(function).lower(*arrays).as_text()
    wanted = floats(function(*arrays))
    q, v = jnp.stack([arrays[0]] * 2), jnp.stack([arrays[2]] * 2, axis=2)
    twice = jax.vmap(function, in_axes=(0, None, 2))(q, arrays[1], v)
    for found in twice:
        assert_near(found, wanted, wanted, dtype)
    tangents = given(backend, dtype, orders, seed=2)
    value, tangent = jax.jvp(function, tuple(arrays), tuple(tangents))
    assert_near(value, wanted, wanted, dtype)
    _, expected_tangent = jax.jvp(
        lambda *x: attended(backend, x, orders, 40, implementation="eager"), tuple(arrays), tuple(tangents)
    )
    assert_near(tangent, floats(expected_tangent), floats(expected_tangent), dtype, steps=GRADIENT)
    with jax.disable_jit():
        assert_near(function(*arrays), wanted, wanted, dtype)


def test_jax_has_its_gradients_in_c_and_maps_them(dtype):
    backend = modules("flax")
    orders = SIGHTS["padded"]
    arrays = given(backend, dtype, orders)
    upstream = jnp.asarray(numbers(orders, seed=1)[0]).astype(dtype)

    def back(q, k, v, upstream):
        return jax.vjp(lambda *x: attended(backend, x, orders, 40), q, k, v)[1](upstream)

    assert jax.jit(back).lower(*arrays, upstream).as_text().count("@mistral_attention_gradients(") == 1
    wanted = back(*arrays, upstream)
    q, v = jnp.stack([arrays[0]] * 2), jnp.stack([arrays[2]] * 2, axis=2)
    both = jax.jit(jax.vmap(back, in_axes=(0, None, 2, None)))(q, arrays[1], v, upstream)
    for found, once in zip(both, wanted, strict=True):
        for each in found:
            assert_near(each, floats(once), floats(once), dtype)
    function = jax.jit(lambda *x: back(*x, upstream))
    exported = jax.export.export(function, platforms=["cpu", "tpu"])(*arrays)
    assert "@mistral_attention" not in exported.mlir_module()
    loaded = jax.export.deserialize(exported.serialize()).call(*arrays)
    for found, once in zip(loaded, wanted, strict=True):
        assert_near(found, floats(once), floats(once), dtype, steps=GRADIENT)


def test_jax_has_its_gradients_in_c_outside_of_programs(dtype, monkeypatch):
    from mistral_flax import attention_in_c, programs

    backend, called, call = modules("flax"), [], attention_in_c._call
    monkeypatch.setattr(attention_in_c, "_call", lambda name, *others: called.append(name) or call(name, *others))
    orders = SIGHTS["padded"]
    arrays = given(backend, dtype, orders)
    programs._program.cache_clear()

    def total(*x):
        return attended(backend, x, orders, 41).astype(jnp.float32).sum()

    jax.grad(total)(*arrays)
    assert called == ["mistral_attend", "mistral_attention_gradients"]
    jax.grad(total)(*arrays)
    assert len(called) == 2, "compiled once"


@pytest.mark.parametrize("how", ["backward", "forward"])
def test_jax_differentiates_it_twice(dtype, how):
    backend = modules("flax")
    orders = SIGHTS["padded"]
    arrays, tangents = (given(backend, dtype, orders, seed=seed) for seed in (0, 2))

    def twice(implementation):
        def total(*x):
            o = attended(backend, x, orders, 40, implementation=implementation)
            return (o.astype(jnp.float32) ** 2).sum()

        def size(*x):
            return sum((g.astype(jnp.float32) ** 2).sum() for g in jax.grad(total, argnums=(0, 1, 2))(*x))

        if how == "backward":
            return jax.jit(jax.grad(size, argnums=(0, 1, 2)))(*arrays)
        return jax.jit(lambda *x: jax.jvp(jax.grad(total, argnums=(0, 1, 2)), x, tuple(tangents))[1])(*arrays)

    for found, wanted in zip(twice(NAMES["flax"]), twice("eager"), strict=True):
        assert_near(found, floats(wanted), floats(wanted), dtype, steps=GRADIENT)


@pytest.mark.parametrize("how", ["shard_map", "shard_map without its check", "a mesh"])
def test_jax_has_it_on_a_mesh_of_one_device(dtype, calls, how):
    backend = modules("flax")
    arrays, orders = given(backend, dtype, SIGHTS["alone"]), [jnp.asarray(x) for x in SIGHTS["alone"]]
    wanted = floats(attended(backend, arrays, SIGHTS["alone"], 40))

    def function(*arrays):
        *arrays, query, key = arrays
        visibility = backend.attention.prepared(backend.attention.Visibility(query, key, 40), "dot_product")
        return backend.attention.attend(*arrays, visibility, implementation="dot_product")[0]

    kind = jax.sharding.AxisType.Explicit if how == "a mesh" else jax.sharding.AxisType.Auto
    mesh, spec = jax.make_mesh((1,), ("data",), axis_types=(kind,)), jax.sharding.PartitionSpec("data")
    given_arrays = [jax.device_put(x, jax.NamedSharding(mesh, spec)) for x in (*arrays, *orders)]
    if how == "a mesh":
        with jax.set_mesh(mesh):
            found = jax.jit(function)(*given_arrays)
            assert jax.typeof(found).sharding.spec[0] == "data"
    else:
        check = how == "shard_map"
        mapped = jax.shard_map(function, mesh=mesh, in_specs=spec, out_specs=spec, check_vma=check)
        found = jax.jit(mapped)(*given_arrays)
    assert all(calls)
    assert (floats(found) == wanted).all()


@pytest.mark.parametrize("platform", ["cpu", "tpu"])
def test_a_program_of_jax_for_a_file_knows_no_c(dtype, platform):
    backend = modules("flax")
    orders = SIGHTS["padded"]
    arrays = given(backend, dtype, orders)
    exported = jax.export.export(jax.jit(lambda *x: attended(backend, x, orders, 40)), platforms=[platform])(*arrays)
    assert "@mistral_attend" not in exported.mlir_module()
    assert exported.serialize()
    if platform == "cpu":
        found = jax.export.deserialize(exported.serialize()).call(*arrays)
        assert_near(found, expected(map(floats, arrays), orders, 40), floats(arrays[2]), dtype)


def test_jax_cuts_arrays_over_devices_by_its_own_operations(dtype, calls, monkeypatch):
    backend = modules("flax")
    arrays = given(backend, dtype, SIGHTS["padded"])
    monkeypatch.setattr(jax, "device_count", lambda: 2)
    attended(backend, arrays, SIGHTS["padded"], 40)
    assert calls == [False]


def of_tensorflow(dtype):
    backend = modules("tf")
    arrays = given(backend, dtype, SIGHTS["padded"])
    return arrays, lambda *arrays: attended(backend, arrays, SIGHTS["padded"], 40)


@pytest.mark.parametrize("how", ["around", "within", "a step"])
def test_what_xla_compiles_of_tensorflow_knows_no_c(dtype, calls, how):
    arrays, function = of_tensorflow(dtype)
    if how == "around":
        found = tf.function(function, jit_compile=True)(*arrays)
    elif how == "within":
        inner = tf.function(function)
        found = tf.function(lambda *x: inner(*x), jit_compile=True)(*arrays)
    else:
        found = tf.function(function, jit_compile=True).get_concrete_function(*arrays)(*arrays)
    assert calls == [False]
    assert_near(found, expected(map(floats, arrays), SIGHTS["padded"], 40), floats(arrays[2]), dtype)


@pytest.mark.parametrize("how", ["any size", "portable"])
def test_tensorflow_saves_no_operation_of_ours(dtype, calls, tmp_path, how):
    """A function of any size is of TensorFlow's own operations, one of given sizes where that is asked for."""
    arrays, function = of_tensorflow(dtype)
    module = tf.Module()
    any_size = [tf.TensorSpec([None, None, *x.shape[2:]], x.dtype) for x in arrays]
    given_size = [tf.TensorSpec(x.shape, x.dtype) for x in arrays]
    with mistral_tf.portable(how == "portable"):
        module.call = tf.function(function, input_signature=given_size if how == "portable" else any_size)
        concrete = module.call.get_concrete_function()
        tf.saved_model.save(module, tmp_path / "saved")
    assert set(calls) == {False}
    assert not any("Mistral" in operation.type for operation in concrete.graph.get_operations())
    found = tf.saved_model.load(tmp_path / "saved").call(*arrays)
    assert_near(found, expected(map(floats, arrays), SIGHTS["padded"], 40), floats(arrays[2]), dtype)


def test_tensorflow_has_its_gradients_in_c(dtype):
    arrays, function = of_tensorflow(dtype)

    @tf.function
    def back(*arrays):
        with tf.GradientTape() as tape:
            tape.watch(arrays)
            total = tf.reduce_sum(tf.cast(function(*arrays), tf.float32) ** 2)
        return tape.gradient(total, list(arrays))

    kinds = [operation.type for operation in back.get_concrete_function(*arrays).graph.get_operations()]
    assert kinds.count("MistralAttentionGradients") == 1


@pytest.mark.parametrize("how", ["eager", "traced"])
def test_tensorflow_differentiates_it_twice(dtype, how):
    arrays, function = of_tensorflow(dtype)

    def twice(function):
        with tf.GradientTape() as second:
            second.watch(arrays)
            with tf.GradientTape() as first:
                first.watch(arrays)
                total = tf.reduce_sum(tf.cast(function(*arrays), tf.float32) ** 2)
            gradients = first.gradient(total, arrays)
            size = tf.add_n([tf.reduce_sum(tf.cast(x, tf.float32) ** 2) for x in gradients])
        return second.gradient(size, arrays)

    def by_formula(*arrays):
        return attended(modules("tf"), arrays, SIGHTS["padded"], 40, implementation="eager")

    found = twice(function) if how == "eager" else tf.function(lambda: twice(function))()
    for ours, theirs in zip(found, twice(by_formula), strict=True):
        assert_near(ours, floats(theirs), floats(theirs), dtype, steps=GRADIENT)


CONFIG = TINY.replace(
    hidden_size=64, intermediate_size=96, num_attention_heads=4, num_key_value_heads=2, head_dim=32, vocab_size=96,
    num_hidden_layers=2, sliding_window=40,
)  # fmt: skip


def losses(model, layout):
    """The losses of a text and of what comes after it, as functions of nothing, in a model of either framework."""
    rng = np.random.default_rng(0)
    ids = rng.integers(3, 96, (2, 160))
    mask = np.ones_like(ids)
    mask[0, :20] = 0
    if layout == "packed":
        return model(input_ids=ids, document_ids=np.arange(160)[None].repeat(2, 0) // 23 % 5, labels=ids).loss
    if layout == "padded":
        return model(input_ids=ids, attention_mask=mask, labels=np.where(mask == 0, -100, ids)).loss
    first = model(input_ids=ids[:, :90], attention_mask=mask[:, :90], use_cache=True)
    options = {"attention_mask": mask[:, 90:], "past_key_values": first.past_key_values}
    return model(input_ids=ids[:, 90:], labels=ids[:, 90:], **options).loss


@pytest.mark.parametrize(
    ("layout", "how"), [("after a cache", "plain"), ("padded", "checkpointed"), ("packed", "in a scan")]
)
def test_a_model_of_jax_learns_the_same(dtype, calls, monkeypatch, layout, how):
    from mistral_flax import MistralForCausalLM, attention_in_c
    from mistral_flax.scan import scan_layers

    model = MistralForCausalLM(CONFIG, dtype=dtype, param_dtype="float32")
    model.load_arrays(random_parameters(CONFIG, "MistralForCausalLM"))
    if how == "checkpointed":
        model.gradient_checkpointing_enable()
    if how == "in a scan":
        scan_layers(model)

    def both():
        def loss(params):
            return losses(lambda **given: model(**given, params=params), layout)

        return jax.jit(jax.value_and_grad(loss))(model.params), jax.jit(loss)(model.params)

    (value, found), alone = both()
    assert any(calls)
    assert value == alone or dtype == "bfloat16", "a text that is learnt has the loss of one that is not"
    monkeypatch.setattr(attention_in_c, "LEAST", 1000)
    calls.clear()
    (wanted_value, wanted), _ = both()
    assert not any(calls)
    assert abs(value - wanted_value) <= LOSS[dtype] * EPS[dtype] * abs(wanted_value)
    for ours, theirs in zip(jax.tree.leaves(found), jax.tree.leaves(wanted), strict=True):
        assert_near(ours, floats(theirs), floats(theirs), dtype, steps=OF_A_MODEL)


@pytest.mark.parametrize(
    ("layout", "how"), [("after a cache", "eager"), ("padded", "traced"), ("packed", "checkpointed")]
)
def test_a_model_of_tensorflow_learns_the_same(dtype, calls, monkeypatch, layout, how):
    from mistral_tf import MistralForCausalLM, attention_in_c

    model = MistralForCausalLM(CONFIG, dtype="float32" if dtype == "float32" else "mixed_bfloat16")
    model.load_arrays(random_parameters(CONFIG, "MistralForCausalLM"))
    if how == "checkpointed":
        model.gradient_checkpointing_enable()

    def both():
        def learn():
            with tf.GradientTape() as tape:
                loss = losses(model, layout)
            return loss, [tf.convert_to_tensor(x) for x in tape.gradient(loss, model.trainable_variables)]

        return learn() if how == "eager" else tf.function(learn)()

    value, found = both()
    assert any(calls)
    monkeypatch.setattr(attention_in_c, "LEAST", 1000)
    calls.clear()
    wanted_value, wanted = both()
    assert not any(calls)
    assert abs(value - wanted_value) <= LOSS[dtype] * EPS[dtype] * abs(wanted_value)
    for ours, theirs in zip(found, wanted, strict=True):
        assert_near(ours, floats(theirs), floats(theirs), dtype, steps=OF_A_MODEL)
