"""Twenty steps from one checkpoint, the same packed rows in the same order: the same losses and weights everywhere."""

from __future__ import annotations

import json

import numpy as np
import pytest

from conformance.weights import random_parameters
from mistral_core.config.presets import TINY
from mistral_core.data import TINY_CHECKPOINT
from mistral_core.learning import Examples, Feed, Schedule
from mistral_core.reference import heads
from mistral_core.reference.optim import AdamW
from mistral_core.text.tokenizer import MistralTokenizer

CONFIG = TINY.replace(vocab_size=2048, num_hidden_layers=2, layer_types=None, sliding_window=8)
WEIGHTS = {name: array.astype(np.float32) for name, array in random_parameters(CONFIG, "MistralForCausalLM").items()}
STEPS, RULE = (
    20,
    AdamW(eps=1e-6, decay=0.01),
)  # with a smaller eps, gradients of rounding's size move weights by the rate
RATE = Schedule(1e-3, STEPS, "cosine", warmup=3)


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


def torch(steps):
    import torch

    import mistral_torch

    model = mistral_torch.MistralForCausalLM(CONFIG).load_arrays(WEIGHTS).train()
    optimizer = torch.optim.AdamW(model.parameters(), 1.0, (RULE.b1, RULE.b2), RULE.eps, RULE.decay)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, RATE)
    losses = []
    for step in steps:
        parts = [model(**b.arguments(), num_items_in_batch=step.num_items_in_batch).loss for b in step.batches]
        sum(parts).backward()
        optimizer.step()
        optimizer.zero_grad()
        schedule.step()
        losses.append(float(sum(parts).detach()))
    return losses, dict(model.named_arrays())


def flax(steps):
    import jax
    import jax.numpy as jnp
    import optax
    from flax import nnx

    import mistral_flax

    model = mistral_flax.MistralForCausalLM(CONFIG).load_arrays(WEIGHTS)
    rates = jnp.array([RATE(step) for step in range(STEPS)])
    transform = optax.adamw(lambda count: rates[count], RULE.b1, RULE.b2, RULE.eps, weight_decay=RULE.decay)
    optimizer = nnx.Optimizer(model, transform, wrt=nnx.Param)

    @nnx.jit
    def moved(model, optimizer, batches, count):
        def loss(model):
            return sum(model(**batch, num_items_in_batch=count, use_cache=False).loss for batch in batches)

        value, gradients = nnx.value_and_grad(loss)(model)
        optimizer.update(model, gradients)
        return value

    losses = []
    for step in steps:
        batches = [{name: jnp.asarray(x, jnp.int32) for name, x in b.arguments().items()} for b in step.batches]
        losses.append(float(moved(model, optimizer, batches, jnp.float32(step.num_items_in_batch))))
    jax.clear_caches()
    return losses, dict(model.named_arrays())


def keras(steps):
    import tensorflow as tf

    import mistral_tf
    from mistral_tf.optimizers import AdamW as Optimizer

    model = mistral_tf.MistralForCausalLM(CONFIG).load_arrays(WEIGHTS)
    optimizer = Optimizer(1.0, beta_1=RULE.b1, beta_2=RULE.b2, epsilon=RULE.eps, weight_decay=RULE.decay)
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
        optimizer.learning_rate = RATE(number)
        optimizer.apply(found, model.trainable_variables)
        losses.append(float(loss))
    return losses, dict(model.named_arrays())


def reference(weights, step):
    """The loss of a step in float64."""
    parts = [
        heads.causal_lm(CONFIG, weights, **batch.arguments(), num_items_in_batch=step.num_items_in_batch).loss
        for batch in step.batches
    ]
    return float(sum(parts))


@pytest.mark.lenient_jax("optax's Adam mixes dtypes")
def test_twenty_steps_are_the_same(steps):
    runs = {}
    for run, needs in ((torch, "torch"), (flax, "optax"), (keras, "tensorflow")):
        pytest.importorskip(needs)
        runs[needs] = run(steps)
    losses, weights = runs["torch"]
    assert losses[-1] < 0.8 * losses[0]
    assert np.isclose(losses[0], reference(WEIGHTS, steps[0]), rtol=1e-6)
    for needs, (others, found) in runs.items():
        assert np.abs(np.subtract(others, losses) / losses).max() < 4e-6, needs  # 1.6e-6 seen
        for name, array in weights.items():
            moved = np.sqrt(np.mean((array - WEIGHTS[name]) ** 2))
            apart = np.sqrt(np.mean((found[name] - array) ** 2))
            assert apart <= 5e-4 * moved, f"{needs} {name}: 1.7e-4 seen"
    again = [batch.arguments()["input_ids"] for step in steps for batch in step.batches]
    untouched = np.setdiff1d(np.arange(CONFIG.vocab_size), np.concatenate([ids.ravel() for ids in again]))
    decayed = WEIGHTS["model.embed_tokens.weight"][untouched].astype(np.float64)
    for step in range(STEPS):
        decayed = decayed * (1 - RATE(step) * RULE.decay)
    for needs, (_, found) in runs.items():  # rows that no token names move by decay alone
        assert np.abs(found["model.embed_tokens.weight"][untouched] - decayed).max() < 1e-6, needs
