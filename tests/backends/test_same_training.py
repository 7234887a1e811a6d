"""Twenty steps from one checkpoint, the same packed rows in the same order: losses and weights are the reference's."""

from __future__ import annotations

import dataclasses
import functools
import importlib
import json
from typing import NamedTuple

import numpy as np
import pytest

from conformance.weights import random_parameters
from mistral_core.config.presets import TINY
from mistral_core.data import TINY_CHECKPOINT
from mistral_core.learning import Examples, Feed, Schedule
from mistral_core.lora import adapter as files
from mistral_core.lora.adapter import Adapter, LoraWeights
from mistral_core.lora.config import LoraConfig
from mistral_core.parameters import shape_of
from mistral_core.reference import adapters, gradients
from mistral_core.reference.optim import AdamW, Moments, adamw_step, clipped, global_norm
from mistral_core.text.tokenizer import MistralTokenizer

ARCHITECTURE = "MistralForCausalLM"
CONFIG = TINY.replace(vocab_size=2048, num_hidden_layers=2, layer_types=None, sliding_window=8)
WEIGHTS = {name: array.astype(np.float32) for name, array in random_parameters(CONFIG, ARCHITECTURE).items()}
STEPS = 20
RULE = AdamW(eps=1e-6, decay=0.01)  # with a smaller eps, gradients of rounding's size move weights by the rate
LORA = LoraConfig(r=4, lora_alpha=8, target_modules=("q_proj", "v_proj", "down_proj"))


class Way(NamedTuple):
    """What learns, and how."""

    lora: LoraConfig | None
    """None: all parameters."""
    rate: Schedule
    longest: float
    """The common length of gradients, below that of some steps and above that of others."""
    apart: float
    """How far what learns may be from the reference's at the end, of the way that it has come."""


WAYS = {
    "full": Way(None, Schedule(1e-3, STEPS, "cosine", warmup=3), 4.0, 5e-4),  # 1.3e-4 seen
    "LoRA": Way(LORA, Schedule(1e-2, STEPS, "cosine", warmup=3), 1.6, 2e-5),  # 7.9e-6 seen, and of DoRA 9.3e-6
    "DoRA": Way(dataclasses.replace(LORA, use_dora=True), Schedule(1e-2, STEPS, "cosine", warmup=3), 1.6, 2e-5),
}


@pytest.fixture(scope="module")
def steps(tmp_path_factory):
    """The batches of each step: rows of several documents, two batches added up."""
    words = [
        "Emma",
        "was",
        "not",
        "at",
        "all",
        "pleased",
        "with",
        "what",
        "Harriet",
        "had",
        "said",
        "of",
        "the",
        "evening",
        "at",
        "Highbury",
    ]
    random = np.random.default_rng(0)
    path = tmp_path_factory.mktemp("data") / "texts.jsonl"
    texts = [" ".join(random.choice(words, size)) for size in random.integers(2, 14, 40)]
    path.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    examples = Examples(path, MistralTokenizer.from_pretrained(TINY_CHECKPOINT), length=32)
    found = list(Feed(examples, rows=2, accumulate=2, seed=0, pack=True).steps(epochs=20))[:STEPS]
    assert len(found) == STEPS
    assert any(batch.document_ids.max() > 1 for step in found for batch in step.batches)
    return found


@functools.cache
def adapter(way):
    """An adapter of a seed, or None where all parameters learn."""
    if WAYS[way].lora is None:
        return None
    lora = WAYS[way].lora.for_model(CONFIG, ARCHITECTURE)
    random, weights = np.random.default_rng(3), {}
    for name, target in lora.targets(CONFIG, ARCHITECTURE).items():
        rows, columns = shape_of(target.row, CONFIG)
        a, b = (0.1 * random.normal(size=shape).astype(np.float32) for shape in ((target.r, columns), (rows, target.r)))
        weights[name] = LoraWeights(a, b, files.row_norms(WEIGHTS[name]) if lora.use_dora else None)
    return Adapter(lora, weights)


def begin(way):
    """What learns, by names."""
    return WEIGHTS if adapter(way) is None else adapters.numbers(adapter(way))


def reference(way, steps):
    """Losses and what is learned, in float64."""
    learned, losses = {name: array.astype(np.float64) for name, array in begin(way).items()}, []
    moments, lengths = Moments.zeros(learned), []
    for number, step in enumerate(steps):
        parts = []
        for batch in step.batches:
            inputs = {**batch.arguments(), "num_items_in_batch": step.num_items_in_batch}
            if adapter(way) is None:
                parts.append(gradients.causal_lm(CONFIG, learned, **inputs))
            else:
                now = adapters.with_numbers(adapter(way), learned)
                parts.append(adapters.adapter_gradients(CONFIG, WEIGHTS, ARCHITECTURE, now, **inputs))
        found = {name: sum(part.by_name[name] for part in parts) for name in learned}
        lengths.append(global_norm(found))
        learned, moments = adamw_step(
            learned, clipped(found, WAYS[way].longest), moments, rate=WAYS[way].rate(number), rule=RULE
        )
        losses.append(float(sum(part.loss for part in parts)))
    assert min(lengths) < WAYS[way].longest < max(lengths)
    return losses, learned


def made(package, folder):
    """A model, which learns all its parameters or those of the adapter of a folder."""
    model = package.MistralForCausalLM(CONFIG).load_arrays(WEIGHTS)
    if folder is not None:
        importlib.import_module(f"{package.__name__}.lora").load_adapter(model, folder, is_trainable=True)
    return model


def learned(package, model, folder):
    """What a model has learned, by the names of `begin`; an adapter's base stays to the bit what it was."""
    base = dict(model.named_arrays())
    if folder is None:
        return base
    assert all(np.array_equal(array, WEIGHTS[name]) for name, array in base.items())
    return adapters.numbers(importlib.import_module(f"{package.__name__}.lora").adapter_of(model))


def torch(way, steps, folder):
    import torch

    import mistral_torch

    model = made(mistral_torch, folder).train()
    parameters = [each for each in model.parameters() if each.requires_grad]
    optimizer = torch.optim.AdamW(parameters, 1.0, (RULE.b1, RULE.b2), RULE.eps, RULE.decay)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, WAYS[way].rate)
    losses = []
    for step in steps:
        parts = [model(**b.arguments(), num_items_in_batch=step.num_items_in_batch).loss for b in step.batches]
        sum(parts).backward()
        torch.nn.utils.clip_grad_norm_(parameters, WAYS[way].longest)
        optimizer.step()
        optimizer.zero_grad()
        schedule.step()
        losses.append(float(sum(parts).detach()))
    return losses, learned(mistral_torch, model, folder)


def flax(way, steps, folder):
    import jax
    import jax.numpy as jnp
    import optax
    from flax import nnx

    import mistral_flax

    model, kind = made(mistral_flax, folder), nnx.Param if folder is None else nnx.LoRAParam
    rates = jnp.array([WAYS[way].rate(step) for step in range(STEPS)])
    transform = optax.chain(
        optax.clip_by_global_norm(WAYS[way].longest),
        optax.adamw(lambda count: rates[count], RULE.b1, RULE.b2, RULE.eps, weight_decay=RULE.decay),
    )
    optimizer = nnx.Optimizer(model, transform, wrt=kind)

    @nnx.jit
    def moved(model, optimizer, batches, count):
        def loss(model):
            return sum(model(**batch, num_items_in_batch=count, use_cache=False).loss for batch in batches)

        value, gradients = nnx.value_and_grad(loss, argnums=nnx.DiffState(0, kind))(model)
        optimizer.update(model, gradients)
        return value

    losses = []
    for step in steps:
        batches = [{name: jnp.asarray(x, jnp.int32) for name, x in b.arguments().items()} for b in step.batches]
        losses.append(float(moved(model, optimizer, batches, jnp.float32(step.num_items_in_batch))))
    jax.clear_caches()
    return losses, learned(mistral_flax, model, folder)


def keras(way, steps, folder):
    import tensorflow as tf

    import mistral_tf
    from mistral_tf.optimizers import AdamW as Optimizer

    model = made(mistral_tf, folder)
    optimizer = Optimizer(
        1.0,
        beta_1=RULE.b1,
        beta_2=RULE.b2,
        epsilon=RULE.eps,
        weight_decay=RULE.decay,
        global_clipnorm=WAYS[way].longest,
    )
    optimizer.build(model.trainable_variables)

    @tf.function
    def gradients(batches, count):
        with tf.GradientTape() as tape:
            loss = tf.add_n([model(**batch, num_items_in_batch=count, training=True).loss for batch in batches])
        return loss, tape.gradient(loss, model.trainable_variables)

    losses = []
    for number, step in enumerate(steps):
        batches = [{name: tf.constant(x, tf.int32) for name, x in b.arguments().items()} for b in step.batches]
        loss, found = gradients(batches, tf.constant(step.num_items_in_batch, tf.float32))
        optimizer.learning_rate = WAYS[way].rate(number)
        optimizer.apply(found, model.trainable_variables)
        losses.append(float(loss))
    return losses, learned(mistral_tf, model, folder)


@pytest.mark.lenient_jax("optax's Adam mixes dtypes")
@pytest.mark.parametrize("way", ["full", "LoRA", pytest.param("DoRA", marks=pytest.mark.slow)])
def test_twenty_steps_are_those_of_the_reference(way, steps, tmp_path):
    folder = None
    if adapter(way) is not None:
        folder = tmp_path
        files.save(folder, adapter(way), CONFIG, ARCHITECTURE)
    losses, weights = reference(way, steps)
    assert losses[-1] < 0.8 * losses[0]
    runs = {}
    for run, needs in ((torch, "torch"), (flax, "optax"), (keras, "tensorflow")):
        pytest.importorskip(needs)
        runs[needs] = run(way, steps, folder)
    for needs, (others, found) in runs.items():
        assert np.abs(np.subtract(others, losses) / losses).max() < 4e-6, needs  # 1.6e-6 seen
        assert found.keys() == weights.keys()
        for name, array in weights.items():
            moved = np.sqrt(np.mean((array - begin(way)[name]) ** 2))
            apart = np.sqrt(np.mean((found[name] - array) ** 2))
            assert apart <= WAYS[way].apart * moved, f"{needs} {name}: {apart / moved}"
    if way == "full":
        again = [batch.arguments()["input_ids"] for step in steps for batch in step.batches]
        untouched = np.setdiff1d(np.arange(CONFIG.vocab_size), np.concatenate([ids.ravel() for ids in again]))
        decayed = WEIGHTS["model.embed_tokens.weight"][untouched].astype(np.float64)
        for step in range(STEPS):
            decayed = decayed * (1 - WAYS[way].rate(step) * RULE.decay)
        for needs, (_, found) in runs.items():  # rows that no token names move by decay alone
            assert np.abs(found["model.embed_tokens.weight"][untouched] - decayed).max() < 1e-6, needs
