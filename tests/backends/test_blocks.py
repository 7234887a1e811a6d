"""Attention by blocks of queries, beside the formula: outputs, gradients, and what is cut where."""

import importlib

import numpy as np
import pytest

B, N, K, H = 3, 4, 2, 8
PAST, RING = 9, 13
"""Tokens of the longest row before the call, and slots of a ring that has rolled on or not."""
BLOCK = 5


def mask_of(padding, T):
    mask = np.ones((B, T), np.int64)
    if padding == "left":
        mask[1, :4] = 0
        mask[2] = 0  # a row of padding alone
    if padding == "right":
        mask[1, -4:] = 0
    if padding == "holes":
        mask[1, 2:4] = 0
        mask[0, 5] = 0
    return mask


def orders(padding, T, past):
    """Orders of queries and keys: of tokens that see themselves, or past ones beside, in a ring."""
    length = np.array([past, max(past - 2, 0), past // 2])
    mask = mask_of(padding, T)
    query = np.where(mask != 0, length[:, None] + mask.cumsum(1) - 1, -1)
    if not past:
        return query, query
    newest = length[:, None] - 1
    ring = np.maximum(newest - (newest - np.arange(RING)) % RING, -1)
    return query, np.concatenate([np.roll(ring, 4, axis=1), query], 1)


class Torch:
    def __init__(self):
        import torch

        self.attention, self.module = (importlib.import_module(f"mistral_torch.{n}") for n in ("attention", "blocks"))
        self.array = torch.from_numpy

    def run(self, implementation, visibility, arrays, upstream, **dropped):
        import torch

        arrays = [torch.from_numpy(x).requires_grad_() for x in arrays]
        output = self.attend(implementation, visibility, *arrays, **dropped)
        return [x.detach().numpy() for x in (output, *torch.autograd.grad(output, arrays, self.array(upstream)))]

    def attend(self, implementation, visibility, *arrays, **dropped):
        prepared = self.attention.prepared(visibility, implementation)
        return self.attention.attend(*arrays, prepared, implementation=implementation, **dropped)[0]

    def dropped(self, share, seed):
        """The options of a call that drops weights."""
        import torch

        torch.manual_seed(seed)
        return {"dropout": share}


class Flax(Torch):
    def __init__(self):
        import jax.numpy as jnp

        self.attention, self.module = (importlib.import_module(f"mistral_flax.{n}") for n in ("attention", "blocks"))
        self.array = lambda x: jnp.asarray(x, jnp.int32 if x.dtype.kind == "i" else x.dtype)

    def run(self, implementation, visibility, arrays, upstream, **dropped):
        import jax

        output, back = jax.vjp(lambda *each: self.attend(implementation, visibility, *each, **dropped), *arrays)
        return [np.asarray(x) for x in (output, *back(self.array(upstream)))]

    def dropped(self, share, seed):
        import jax

        return {"dropout": share, "rngs": jax.random.key(seed)}


class Tf(Torch):
    def __init__(self):
        import tensorflow as tf

        self.attention, self.module = (importlib.import_module(f"mistral_tf.{n}") for n in ("attention", "blocks"))
        self.array = lambda x: tf.constant(x, tf.int32 if x.dtype.kind == "i" else x.dtype)

    def run(self, implementation, visibility, arrays, upstream, **dropped):
        import tensorflow as tf

        arrays = [*map(tf.constant, arrays)]
        with tf.GradientTape() as tape:
            tape.watch(arrays)
            output = self.attend(implementation, visibility, *arrays, **dropped)
        return [x.numpy() for x in (output, *tape.gradient(output, arrays, self.array(upstream)))]

    def dropped(self, share, seed):
        import tensorflow as tf

        return {"dropout": share, "seed": tf.constant([seed, 0])}


@pytest.fixture(params=["torch", "flax", "tf"])
def backend(request, monkeypatch):
    made = {"torch": Torch, "flax": Flax, "tf": Tf}[request.param]()
    monkeypatch.setattr(made.module, "COLUMNS", BLOCK)
    return made


CASES = [
    (17, 0, None, "none", False), (17, 0, 3, "none", False), (17, 0, 1, "none", False), (17, 0, 40, "left", False),
    (17, 0, 7, "left", False), (17, 0, None, "left", True), (17, 0, 7, "right", True), (17, 0, 3, "holes", False),
    (17, 0, None, "holes", True), (6, 0, 7, "none", True), (17, PAST, None, "none", False),
    (17, PAST, 3, "left", False), (6, PAST, 7, "holes", False), (17, PAST, 7, "none", False),
    (6, PAST, 1, "right", False), (17, 0, 14, "holes", True), (30, 0, 14, "left", True), (30, PAST, 20, "none", False),
]  # fmt: skip
"""Columns, tokens before them, window, padding, and whether documents are packed."""


@pytest.mark.parametrize(("T", "past", "window", "padding", "packed"), CASES)
def test_blocks_are_the_formula(backend, T, past, window, padding, packed):
    """Outputs and gradients, whatever lies between tokens and wherever a ring begins."""
    rng = np.random.default_rng(0)
    query, key = orders(padding, T, past)
    order = [backend.array(query)] * 2 if query is key else [*map(backend.array, (query, key))]
    documents = backend.array(np.sort(rng.integers(0, 3, (B, T)), 1)) if packed else None
    visibility = backend.attention.Visibility(*order, window, documents)
    S = key.shape[1]
    arrays = [rng.standard_normal(s).astype("f") for s in ((B, T, N, H), (B, S, K, H), (B, S, K, H))]
    upstream = rng.standard_normal(arrays[0].shape).astype("f")
    assert backend.attention.prepared(visibility, "blocked").blocks is not None
    got = backend.run("blocked", visibility, arrays, upstream)
    expected = backend.run("eager", visibility, arrays, upstream)
    for one, other in zip(got, expected, strict=True):
        np.testing.assert_allclose(one, other, atol=4e-6)
    assert not got[0][query < 0].any(), "padding sees nothing"


@pytest.mark.parametrize("window", [3, 7, None])
def test_blocks_drop_weights_as_the_formula_does(backend, window):
    """The share that is told, each block others, and the same again where a gradient computes a block once more.

    Values are the rows of an identity, so that an output is the weights themselves.
    """
    T, share = 17, 0.4
    rng = np.random.default_rng(0)
    order = backend.array(orders("left", T, 0)[0])
    visibility = backend.attention.Visibility(order, order, window)
    values = np.broadcast_to(np.eye(T, dtype="f")[None, :, None], (B, T, K, T)).copy()
    arrays = [*(rng.standard_normal((B, T, heads, T)).astype("f") for heads in (N, K)), values]
    upstream = rng.standard_normal(arrays[0].shape).astype("f")
    weights = backend.run("eager", visibility, arrays, upstream)[0]
    found, _, _, of_values = backend.run("blocked", visibility, arrays, upstream, **backend.dropped(share, 1))
    kept = found != 0
    np.testing.assert_allclose(found[kept], weights[kept] / (1 - share), rtol=2e-5)
    assert abs(1 - kept[weights != 0].mean() - share) < 0.1
    by_group = [x.reshape(B, T, K, N // K, T) for x in (found, upstream)]
    np.testing.assert_allclose(of_values, np.einsum("BTKGS,BTKGH->BSKH", *by_group), atol=1e-5)
    last, before = (kept[0, t, :, t - 2 : t + 1] for t in (T - 1, T - 1 - BLOCK))
    assert (last != before).any(), "the same place of two blocks"
    again, other = (
        backend.run("blocked", visibility, arrays, upstream, **backend.dropped(share, seed))[0] for seed in (1, 2)
    )
    assert np.array_equal(again, found)
    assert ((other != 0) != kept).any()


def test_a_long_text_is_cut_where_that_pays(backend, monkeypatch):
    """Of itself no short text is cut, nor one whose window shows nearly all of it; a mask is then made."""
    monkeypatch.setattr(backend.module, "LONG", 4 * BLOCK)

    def prepared(T, window, implementation):
        order = backend.array(np.arange(T)[None])
        visibility = backend.attention.Visibility(order, order + 0, window)
        return backend.attention.prepared(visibility, implementation)

    default = backend.attention.check_implementation(None)
    long = prepared(8 * BLOCK, BLOCK, default)
    assert long.blocks is not None
    assert long.mask_BTS is None, "no [T, T] is made of a long text"
    assert prepared(8 * BLOCK, None, default).blocks is not None
    short = [(4 * BLOCK - 1, 1)]
    if type(backend) is not Torch:  # whose blocks of a windowed text are all of one size
        short.append((4 * BLOCK, 3 * BLOCK))
        assert prepared(4 * BLOCK, 4 * BLOCK - 1, default).blocks is not None, "its first blocks see no padding"
    for T, window in short:
        assert prepared(T, window, default).blocks is None
        assert prepared(T, window, default).mask_BTS is not None
        assert prepared(T, window, "blocked").blocks is not None
    assert prepared(BLOCK, 1, "blocked").blocks is None, "one block is the whole"
    assert prepared(8 * BLOCK, BLOCK, "eager").blocks is None, "eager is the formula"


def test_a_block_sees_no_more_than_its_window(backend):
    """What is multiplied grows with the text and not with its square."""
    seen = []
    for T in (20 * BLOCK, 40 * BLOCK):
        order = backend.array(np.arange(T)[None])
        blocks = backend.module.cut(order, order, 2 * BLOCK, always=True)
        scores = []

        def attend(q, k, v, mask, *dropped, scores=scores):
            assert tuple(mask.shape[1:]) == (q.shape[1], k.shape[1])
            scores.append(q.shape[1] * k.shape[1])
            return q

        q, k = (backend.array(np.zeros((1, T, heads, H), "f")) for heads in (N, K))
        backend.module.attend_by_blocks(q, k, k, blocks, attend)
        seen.append(max(scores))
        assert max(scores) <= BLOCK * 4 * BLOCK
    assert seen[0] == seen[1]


def test_causal_text_needs_no_mask_in_torch():
    """Where all tokens are real and the window shows all, the kernel is told so: no mask of T x T is made."""
    torch = Torch()
    order = torch.array(np.arange(6)[None])
    causal = torch.attention.prepared(torch.attention.Visibility(order, order, 6), "sdpa")
    assert causal.is_causal
    assert causal.mask_BTS is None
    padded = torch.array(np.array([[-1, 0, 1, 2, 3, 4]]))
    for query, key, window, documents in (
        (padded, padded, None, None), (order, order, 5, None), (order, order, None, order),
        (order, order + 0, None, None),
    ):  # fmt: skip
        made = torch.attention.prepared(torch.attention.Visibility(query, key, window, documents), "sdpa")
        assert not made.is_causal
        assert made.mask_BTS is not None


@pytest.mark.parametrize("kind", ["unknown sizes", "compiled"])
@pytest.mark.parametrize(("window", "padding"), [(7, "left"), (None, "holes")])
def test_a_graph_of_tensorflow_is_the_formula(monkeypatch, kind, window, padding):
    """Traced for any number of columns, of which a short one is the formula itself; and compiled by XLA."""
    import tensorflow as tf

    made = Tf()
    monkeypatch.setattr(made.module, "COLUMNS", BLOCK)
    monkeypatch.setattr(made.module, "LONG", 12)
    rng = np.random.default_rng(0)

    def run(order, *arrays):
        visibility = made.attention.Visibility(order, order, window)
        with tf.GradientTape() as tape:
            tape.watch(arrays)
            output = made.attend("blocked", visibility, *arrays)
        return [output, *tape.gradient(output, arrays, output)]

    sizes = [tf.TensorSpec([None, None, heads, H], tf.float32) for heads in (N, K, K)]
    unknown = {"input_signature": [tf.TensorSpec([None, None], tf.int32), *sizes]}
    program = tf.function(run, **(unknown if kind == "unknown sizes" else {"jit_compile": True}))
    for T in (17, 6) if kind == "unknown sizes" else (17,):
        order = made.array(orders(padding, T, 0)[0])
        arrays = [rng.standard_normal((B, T, heads, H)).astype("f") for heads in (N, K, K)]
        found = [x.numpy() for x in program(order, *map(tf.constant, arrays))]
        expected = made.run("eager", made.attention.Visibility(order, order, window), arrays, found[0])
        for one, other in zip(found, expected, strict=True):
            np.testing.assert_allclose(one, other, atol=1e-5)


@pytest.mark.parametrize("recomputed", [False, True])
def test_layers_of_a_graph_of_tensorflow_share_the_blocks(monkeypatch, recomputed):
    """What is traced of one layer is every layer's that sees alike; outside of a graph nothing is traced."""
    import tensorflow as tf

    made, traced = Tf(), []
    attended = made.module._attended
    monkeypatch.setattr(made.module, "COLUMNS", BLOCK)
    monkeypatch.setattr(made.module, "LONG", 12)
    monkeypatch.setattr(
        made.module,
        "_attended",
        lambda *given, **named: traced.append(tf.executing_eagerly()) or attended(*given, **named),
    )
    package = importlib.import_module("mistral_tf")
    config = package.MistralConfig(
        vocab_size=32, hidden_size=16, intermediate_size=24, num_hidden_layers=4, num_attention_heads=2,
        num_key_value_heads=1, head_dim=8, sliding_window=6, initializer_range=0.5,
    )  # fmt: skip
    importlib.import_module("keras").utils.set_random_seed(0)
    model = package.MistralForCausalLM(config)
    if recomputed:
        model.gradient_checkpointing_enable()
    ids = tf.constant(np.arange(30)[None] % 29, tf.int32)

    def gradients(ids):
        with tf.GradientTape() as tape:
            loss = model(ids, labels=ids, use_cache=False, training=True).loss
        return [tf.convert_to_tensor(x) for x in tape.gradient(loss, model.trainable_variables)]

    expected = gradients(ids)
    assert traced
    assert all(traced), "nothing is traced"
    traced.clear()
    found = tf.function(gradients)(ids)
    assert traced == [False]
    for one, other in zip(found, expected, strict=True):
        np.testing.assert_allclose(one, other, atol=1e-5 * np.abs(other).max())


@pytest.mark.parametrize("backend_name", ["torch", "flax", "tf"])
def test_no_backend_keeps_another_block(backend_name):
    """The numbers are those of all three, so that one text is cut alike."""
    alike = {"torch": ("COLUMNS", "LONG", "PAYS")}
    if backend_name != "torch":  # where each block is its own
        alike["flax"] = ("LOOPS", "FIRST")
    for other, names in alike.items():
        one, another = (importlib.import_module(f"mistral_{name}.blocks") for name in (backend_name, other))
        assert [getattr(one, name) for name in names] == [getattr(another, name) for name in names]


def test_second_derivatives_of_a_long_text_in_jax(monkeypatch):
    """Forward mode and Hessians go through blocks as through the formula."""
    import jax

    made = Flax()
    monkeypatch.setattr(made.module, "COLUMNS", BLOCK)
    rng = np.random.default_rng(0)
    order = made.array(np.arange(11)[None])
    q, k, v, t = (made.array(rng.standard_normal((1, 11, heads, H)).astype("f")) for heads in (N, K, K, N))
    visibility = made.attention.Visibility(order, order, 4)
    for implementation in ("eager", "blocked"):
        f = lambda q: (made.attend(implementation, visibility, q, k, v) ** 2).sum()  # noqa: B023, E731
        found = jax.jvp(jax.grad(f), (q,), (t,))[1]
        if implementation == "eager":
            expected = found
    np.testing.assert_allclose(found, expected, atol=1e-5)


@pytest.mark.parametrize("backend", ["flax", "tf"], indirect=True)
def test_the_first_blocks_of_a_wide_window_see_no_padding(backend):
    """As many loops as FIRST, of which each sees keys up to its last block; a narrow window has one for all."""
    loops = backend.module._loops(10 * BLOCK, 10 * BLOCK, 8 * BLOCK)
    assert [(loop.begin, loop.blocks) for loop in loops] == [(0, 2), (2, 2), (4, 2), (6, 2), (8, 2)]
    assert [loop.keys and loop.keys.stop - loop.keys.start for loop in loops] == [
        *(size * BLOCK for size in (2, 4, 6, 8)), None
    ]  # fmt: skip
    assert backend.module._scores(10 * BLOCK, 10 * BLOCK, 8 * BLOCK) == BLOCK**2 * (2 * (2 + 4 + 6 + 8) + 2 * 9)
    for queries, keys, window in ((10, 10, 3), (10, 17, 8)):  # the second has keys before it
        assert [loop.keys for loop in backend.module._loops(*(n * BLOCK for n in (queries, keys, window)))] == [None]


@pytest.mark.parametrize("backend", ["flax", "tf"], indirect=True)
def test_a_cache_a_little_longer_than_a_text_is_cut_as_the_text_is(backend):
    """Each loop sees the keys before it and those up to its own last query, and no block more."""
    loops = backend.module._loops(4 * BLOCK, 4 * BLOCK + 1, None)
    assert [loop.keys.stop for loop in loops] == [n * BLOCK + 1 for n in (1, 2, 3, 4)]
    loops = backend.module._loops(4 * BLOCK - 1, 4 * BLOCK + 1, None)  # the first query has an empty column before it
    assert [loop.keys.stop for loop in loops] == [n * BLOCK + 2 for n in (1, 2, 3, 4)]


LONG_TEXT = 8192
LAYOUTS = {
    "plain": {},
    "padded": {"attention_mask": np.where(np.arange(LONG_TEXT) < 700, 0, 1)[None]},
    "packed": {"document_ids": (np.arange(LONG_TEXT) // 640)[None]},
    "packed by positions": {"position_ids": (np.arange(LONG_TEXT) % 640)[None]},
}


def made_by_torch(model, given, *, trains=False):
    """The numbers of each array that an operation of torch gives."""
    import torch
    from torch.utils._python_dispatch import TorchDispatchMode

    found = []

    class Told(TorchDispatchMode):
        def __torch_dispatch__(self, function, types, args=(), kwargs=None):
            y = function(*args, **(kwargs or {}))
            found.extend(x.numel() for x in (y if isinstance(y, tuple | list) else (y,)) if isinstance(x, torch.Tensor))
            return y

    with Told():
        model.train(trains)(**{name: torch.from_numpy(x) for name, x in given.items()}).loss.backward()
    return found


def made_by_flax(model, given, *, trains=False):
    """The same of a program of JAX."""
    import jax
    from jax.extend.core import jaxprs_in_params

    def walk(jaxpr):
        for equation in jaxpr.eqns:
            yield from (x.aval.size for x in equation.outvars)
            for inner in jaxprs_in_params(equation.params):
                yield from walk(inner)

    arrays = {name: jax.numpy.asarray(x, "int32") for name, x in given.items()}
    rngs = {"rngs": jax.random.key(0)} if trains else {}
    loss = jax.grad(lambda params, arrays: model(**arrays, params=params, use_cache=False, **rngs).loss)
    return list(walk(jax.make_jaxpr(loss)(model.params, arrays).jaxpr))


def made_by_tf(model, given, *, trains=False):
    """The same of a graph of TensorFlow, and of what it calls."""
    import tensorflow as tf

    def step(arrays):
        with tf.GradientTape() as tape:
            loss = model(**arrays, use_cache=False, training=trains).loss
        return tape.gradient(loss, model.trainable_variables)

    given = {name: tf.TensorSpec(x.shape, tf.int32) for name, x in given.items()}
    graph = tf.function(step).get_concrete_function(given).graph
    graphs = [graph, *(each.graph for each in graph._functions.values() if hasattr(each, "graph"))]
    outputs = (x for each in graphs for operation in each.get_operations() for x in operation.outputs)
    return [x.shape.num_elements() or 0 for x in outputs if x.shape.rank is not None]


def made(name, layout="plain", **options):
    """The same of a small model with one head, of its loss and gradients of a long text."""
    package = importlib.import_module(f"mistral_{name}")
    config = package.MistralConfig(
        vocab_size=32, hidden_size=16, intermediate_size=24, num_hidden_layers=1, num_attention_heads=1,
        num_key_value_heads=1, head_dim=8, max_position_embeddings=LONG_TEXT, **{"sliding_window": 1024, **options},
    )  # fmt: skip
    ids = np.arange(LONG_TEXT)[None] % 29
    given = {"input_ids": ids, "labels": ids, **LAYOUTS[layout]}
    found = globals()[f"made_by_{name}"](package.MistralForCausalLM(config), given, trains=config.attention_dropout > 0)
    assert len(found) > 100
    return found


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("name", ["torch", "flax", "tf"])
def test_nothing_of_a_long_text_is_as_large_as_its_square(name, layout):
    """Whatever tells where rows and documents begin."""
    assert max(made(name, layout)) < LONG_TEXT**2 / 16


@pytest.mark.parametrize("window", [1024, None])
@pytest.mark.parametrize("name", ["torch", "flax", "tf"])
def test_nothing_of_a_long_text_is_as_large_as_its_square_where_weights_are_dropped(name, window):
    """Nor with all tokens in sight: a block's scores are of so many queries."""
    assert max(made(name, sliding_window=window, attention_dropout=0.1)) <= LONG_TEXT**2 / 16
