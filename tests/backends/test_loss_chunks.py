"""The loss of a language model from chunks of its logits: the same loss, the same gradients, no whole logits."""

from __future__ import annotations

import numpy as np
import pytest

from conformance import adapters
from conformance.pieces import weights
from mistral_core import loss_chunks
from mistral_core.config.presets import TINY
from mistral_core.errors import InputError
from mistral_core.loss_chunks import CHUNK, MANY, chunk_rows

CONFIG = TINY.replace(num_hidden_layers=1, layer_types=None)
V = CONFIG.vocab_size
IDS = np.random.default_rng(0).integers(3, V, (3, 9))
LABELS = np.where(np.arange(9) < np.array([[9], [2], [5]]), IDS, -100)
CAUSAL = "MistralForCausalLM"
EACH = [pytest.param(name, marks=pytest.mark.xdist_group(name)) for name in adapters.NAMES]


def built(backend, *, config=CONFIG, dtype="float32", quantized=None):
    """An adapter of the conformance suite, a model, and the inputs of a call with labels."""
    pytest.importorskip({"torch": "torch", "flax": "flax", "tf": "tensorflow"}[backend])
    adapter = adapters.get(backend)
    model = adapter.model(CAUSAL, config, weights(config, CAUSAL, dtype), dtype, "eager")
    if quantized:
        model = adapter.package.quantize(model, quantized, head="int8")
    return adapter, model, {"input_ids": adapter.array(IDS), "labels": adapter.array(LABELS)}


def loss_and_gradients(adapter, model, inputs):
    """Those of the adapter; in Keras of what trains, for a packed model has no variable for each name."""
    if adapter.name != "tf":
        return adapter.loss_and_gradients(model, inputs)
    import tensorflow as tf

    with tf.GradientTape() as tape:
        loss = model(**inputs).loss
    gradients = tape.gradient(loss, model.trainable_variables)
    names = [variable.path for variable in model.trainable_variables]
    return loss.numpy(), {n: adapter.numpy(tf.convert_to_tensor(g)) for n, g in zip(names, gradients, strict=True)}


def small(monkeypatch, tokens=4):
    """Let no logits be few enough to be whole, and a chunk have so many tokens."""
    monkeypatch.setattr(loss_chunks, "MANY", 1)
    monkeypatch.setattr(loss_chunks, "CHUNK", tokens * V)


def test_the_size_is_chosen_in_training_from_256_mib_on():
    assert MANY * 4 == 256 << 20
    assert chunk_rows(None, 512, 131072, training=True) == 128
    assert chunk_rows(None, 511, 131072, training=True) == 0
    assert chunk_rows(None, 4096, 131072, training=False) == 0
    assert chunk_rows(None, None, 32768, training=True) == 512, "as many tokens as TOKENS"
    assert chunk_rows(None, None, 32000, training=True) == 0
    assert chunk_rows(None, 1 << 20, 2 * CHUNK, training=True) == 1
    assert [chunk_rows(each, 1, V, training=False) for each in (0, 1, np.int64(300))] == [0, 1, 300]
    for wrong in (-1, True, 2.0, "8"):
        with pytest.raises(InputError, match="loss_chunk must be a number of tokens"):
            chunk_rows(wrong, 1, V, training=True)


@pytest.mark.parametrize("backend", EACH)
@pytest.mark.parametrize(
    ("dtype", "tied", "quantized"),
    [("float32", False, None), ("float32", True, None), ("bfloat16", True, None), ("float32", False, "int8")],
    ids=["plain", "tied", "bfloat16", "packed head"],
)
def test_loss_and_gradients_are_those_of_whole_logits(backend, dtype, tied, quantized):
    """Of few and of too many rows, of a part of a step; the output's logits are what they were."""
    config = CONFIG.replace(tie_word_embeddings=tied)
    adapter, model, inputs = built(backend, config=config, dtype=dtype, quantized=quantized)
    eps = 2.0**-7 if dtype == "bfloat16" else 2e-6
    for options in ({}, {"num_items_in_batch": 11}):
        wanted, gradients = loss_and_gradients(adapter, model, {**inputs, **options, "loss_chunk": 0})
        assert any("embed_tokens" in name and np.abs(g).max() > 1e-3 for name, g in gradients.items())
        for rows in (4, 1000):
            loss, found = loss_and_gradients(adapter, model, {**inputs, **options, "loss_chunk": rows})
            assert np.allclose(loss, wanted, rtol=2e-7)
            assert found.keys() == gradients.keys()
            for name, gradient in gradients.items():
                here, there = (np.asarray(g, np.float64) for g in (found[name], gradient))
                assert np.abs(here - there).max() <= eps * np.abs(there).max(), (name, rows)
    for kept in (0, 2):
        whole, chunked = (
            adapter.numpy(adapter.call(model, **inputs, logits_to_keep=kept, loss_chunk=rows).logits) for rows in (0, 4)
        )
        assert np.allclose(whole, chunked, atol=1e-6)
        assert chunked.shape == (3, kept or 9, V)


# What logits are in that mode, and who asks for them


@pytest.mark.xdist_group("torch")
def test_logits_are_computed_when_they_are_read_torch(monkeypatch):
    torch = pytest.importorskip("torch")
    from torch.utils._python_dispatch import TorchDispatchMode

    class Largest(TorchDispatchMode):
        """The most numbers of a tensor with a last axis of the vocabulary, the head's own matrix left out."""

        most = 0

        def __torch_dispatch__(self, function, types, args=(), kwargs=None):
            out = function(*args, **(kwargs or {}))
            tensors = [x for x in torch.utils._pytree.tree_leaves(out) if torch.is_tensor(x)]
            logits = [x for x in tensors if x.shape[-1:] == (V,) and len(x) != CONFIG.hidden_size]
            self.most = max([self.most, *(x.numel() for x in logits)])
            return out

    small(monkeypatch)
    _, model, inputs = built("torch")
    assert model(**inputs).keys() >= {"loss", "logits"}
    with Largest() as evaluated:
        model(**inputs)
    assert evaluated.most == 27 * V, "in evaluation nothing is another"
    model.train()
    with Largest() as trained:
        out = model(**inputs)
        out.loss.backward()
        again = type(out)(dict(out.items()))  # as accelerate makes outputs anew
    assert trained.most == 4 * V
    assert "computed when read" in repr(again)
    assert len(again) == len(out)
    with torch.no_grad():
        loss, logits = again[:2]
    assert loss is out.loss
    assert torch.equal(logits, model(**inputs, loss_chunk=0).logits)
    assert again.logits is again["logits"] is again.get("logits") is again.to_tuple()[1] is logits
    model(**inputs).logits.sum().backward()
    torch.optim.SGD(model.parameters(), 0.1).step()
    with pytest.raises(InputError, match="head has changed since the call"):
        _ = out.logits


@pytest.mark.xdist_group("torch")
@pytest.mark.filterwarnings("ignore")  # those of torch's compiler, and of peft
def test_a_head_that_is_more_than_its_matrix_is_called_torch(monkeypatch):
    torch = pytest.importorskip("torch")
    import mistral_torch.lora
    from mistral_torch import heads

    calls = []
    taken = heads.chunked_cross_entropy
    monkeypatch.setattr(heads, "chunked_cross_entropy", lambda *a, **k: calls.append(1) or taken(*a, **k))

    def chunked(change):
        _, model, inputs = built("torch")
        made = change(model)
        model = model if made is None else made
        calls.clear()
        model(**inputs, loss_chunk=4).loss.backward()
        return bool(calls)

    def wrapped(model):
        model.lm_head = torch.nn.Sequential(model.lm_head)

    def compiled(model):
        model.lm_head = torch.compile(model.lm_head, backend="eager")

    def lora(model):
        mistral_torch.lora.add_adapter(model, mistral_torch.lora.LoraConfig(target_modules=["lm_head"]))

    def patched(model):
        model.lm_head.forward = model.lm_head.forward

    def peft(model):
        peft = pytest.importorskip("peft")
        return peft.get_peft_model(model, peft.LoraConfig(target_modules=["lm_head", "q_proj"], task_type="CAUSAL_LM"))

    def saved_by_peft(model):
        peft = pytest.importorskip("peft")
        config = peft.LoraConfig(target_modules=["q_proj"], modules_to_save=["lm_head"], task_type="CAUSAL_LM")
        return peft.get_peft_model(model, config)

    assert chunked(lambda model: None)
    assert not any(map(chunked, (wrapped, compiled, lora, patched, peft, saved_by_peft)))
    assert not chunked(lambda model: model.lm_head.compile(backend="eager"))
    assert not chunked(lambda model: (model.lm_head.register_forward_hook(lambda *a: None), None)[1])
    assert not chunked(lambda model: (model.lm_head.register_forward_pre_hook(lambda *a: None), None)[1])
    assert not chunked(lambda model: mistral_torch.quantize(model, "int8", head="int8", activations="int8"))
    assert not chunked(lambda model: torch.compile(model, backend="eager"))


@pytest.mark.xdist_group("torch")
@pytest.mark.feature("transformers' Trainer")
@pytest.mark.filterwarnings("ignore")  # theirs
@pytest.mark.parametrize("bf16", [False, True], ids=["float32", "autocast"])
def test_the_trainer_trains_the_same_and_reads_no_logits_torch(monkeypatch, tmp_path, bf16):
    transformers = pytest.importorskip("transformers")
    torch = pytest.importorskip("torch")
    import mistral_torch
    from mistral_torch import heads

    rows = [{"input_ids": row, "labels": labels} for row, labels in zip(IDS, LABELS, strict=True)]
    made, read, models = [], [], []

    class Watched(heads.Later):
        def __init__(self, compute):
            made.append(1)
            super().__init__(lambda: read.append(1) or compute())

    for chunked in (False, True):
        if chunked:
            small(monkeypatch)
            monkeypatch.setattr(heads, "Later", Watched)
        torch.manual_seed(0)
        model = mistral_torch.MistralForCausalLM(CONFIG)
        arguments = transformers.TrainingArguments(
            tmp_path, per_device_train_batch_size=2, gradient_accumulation_steps=2, num_train_epochs=2, seed=0,
            learning_rate=1e-2, max_grad_norm=0, bf16=bf16, report_to=[], use_cpu=True, disable_tqdm=True,
            save_strategy="no", dataloader_pin_memory=False, per_device_eval_batch_size=3,
        )  # fmt: skip
        trainer = transformers.Trainer(model, arguments, train_dataset=rows, eval_dataset=rows)
        trainer.train()
        assert trainer.predict(rows).predictions.shape == (3, 9, V)
        models.append(torch.cat([p.detach().flatten() for p in model.parameters()]))
    assert made
    assert not read
    assert torch.allclose(*models, atol=2e-3 if bf16 else 1e-4)  # Adam divides by small gradients


@pytest.mark.xdist_group("flax")
def test_memory_is_a_quarter_and_less_flax(monkeypatch):
    """Of loss and gradients at 131072 tokens of vocabulary and 2048 of text, as XLA plans it; nothing is run."""
    jax = pytest.importorskip("jax")
    import jax.numpy as jnp
    from flax import nnx

    from mistral_flax import MistralForCausalLM

    config = CONFIG.replace(vocab_size=131072, hidden_size=128)
    model = nnx.eval_shape(lambda: MistralForCausalLM(config))
    ids = jax.ShapeDtypeStruct((1, 2048), jnp.int32)

    def temporaries(**options):
        step = jax.jit(jax.value_and_grad(lambda params, ids: model(ids, labels=ids, params=params, **options).loss))
        return step.lower(model.params, ids).compile().memory_analysis().temp_size_in_bytes

    assert 4 * temporaries() < temporaries(loss_chunk=0)


@pytest.mark.xdist_group("flax")
def test_a_head_that_is_cut_or_of_another_class_is_called_flax():
    pytest.importorskip("flax")
    import jax
    import numpy as np

    from mistral_flax.layers import Head
    from mistral_flax.sharding import shard

    class Own(Head):
        def __call__(self, x):
            return 2 * super().__call__(x)

    _, model, inputs = built("flax")
    wanted = model(**inputs, loss_chunk=0).loss
    assert model.lm_head.factor is not None
    mesh = jax.make_mesh((1,), ("tensor",), axis_types=(jax.sharding.AxisType.Auto,))
    shard(model, mesh)
    assert model.lm_head.factor is None
    assert np.allclose(model(**inputs, loss_chunk=4).loss, wanted)
    _, model, inputs = built("flax")
    model.lm_head.__class__ = Own
    assert model.lm_head.factor is None
    assert np.allclose(model(**inputs, loss_chunk=4).loss, model(**inputs, loss_chunk=0).loss)


@pytest.mark.xdist_group("tf")
@pytest.mark.filterwarnings("ignore")  # Keras'
def test_fit_holds_no_logits_tf(monkeypatch):
    """Weights of rows and of tokens; the same with a metric of logits; without one no step has them whole."""
    tf = pytest.importorskip("tensorflow")
    import keras

    import mistral_tf

    def trained(weight, metrics=None):
        keras.utils.set_random_seed(0)
        model = mistral_tf.MistralForCausalLM(CONFIG)
        model.compile(keras.optimizers.SGD(0.1), metrics=metrics)
        rows = tf.data.Dataset.from_tensor_slices((IDS, LABELS, np.float32(weight))).batch(3)
        history = model.fit(rows, verbose=0, epochs=2).history["loss"]
        step = tf.function(lambda data: model.train_step(data))
        return history, model.get_weights(), lambda: step.get_concrete_function(next(iter(rows)))

    def largest(function):
        """The most numbers of a floating tensor that the step's results need, in its loops too."""
        graph = function.graph.as_graph_def()
        roots = [*(x.op.name for x in function.graph.outputs), *(op.name for op in function.graph.control_outputs)]
        kept = {node.name for node in tf.compat.v1.graph_util.extract_sub_graph(graph, roots).node}
        shapes = [
            output.shape.as_list()
            for graph in (function.graph, *_inner(function.graph))
            for op in graph.get_operations()
            for output in op.outputs
            if (graph is not function.graph or op.name in kept) and output.dtype == tf.float32 and output.shape.rank
        ]
        return max(int(np.prod(shape)) for shape in shapes if shape[-1] == V and None not in shape)

    def _inner(graph):
        for function in graph._functions.values():
            inner = function.graph if hasattr(function, "graph") else None
            if inner is not None:
                yield inner

    by_token = np.linspace(0, 2, IDS.size).reshape(IDS.shape)
    whole = [trained([1, 0.5, 2]), trained(by_token)]
    assert largest(whole[0][2]()) >= 24 * V
    small(monkeypatch)
    chunked = [trained([1, 0.5, 2]), trained(by_token), trained([1, 0.5, 2], ["accuracy"])]
    for (wanted, weights_, _), (found, others, _) in zip((*whole, whole[0]), chunked, strict=True):
        assert np.allclose(wanted, found, rtol=1e-6)
        assert all(np.allclose(a, b, atol=1e-6) for a, b in zip(weights_, others, strict=True))
    assert largest(chunked[0][2]()) < 24 * V
