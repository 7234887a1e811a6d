"""AdamW is one formula in PyTorch, optax and Keras: 20 steps beside float64, gradients of 1e-9 to 1e-1."""

from __future__ import annotations

import numpy as np
import pytest

from mistral_core.learning import Schedule
from mistral_core.reference.optim import AdamW, Moments, adamw_step, clipped, global_norm

STEPS, RULE = 20, AdamW(decay=0.01)
RANDOM = np.random.default_rng(0)
WEIGHTS = {name: (RANDOM.normal(size=(7, 5)) / 10).astype(np.float32) for name in ("matrix", "norm")}
GRADIENTS = [
    {name: (RANDOM.normal(size=(7, 5)) * 10.0 ** RANDOM.uniform(-9, -1, (7, 5))).astype(np.float32) for name in WEIGHTS}
    for _ in range(STEPS)
]
RATE = Schedule(1e-3, STEPS, "cosine", warmup=4)
MOST = 0.05
"""The common length of gradients; some steps are above it and some below."""


def reference():
    parameters, moments = WEIGHTS, Moments.zeros(WEIGHTS)
    for step, gradients in enumerate(GRADIENTS):
        parameters, moments = adamw_step(
            parameters, clipped(gradients, MOST), moments, rate=RATE(step), rule=RULE, without_decay={"norm"}
        )
    return parameters


def torch():
    import torch

    parameters = {name: torch.nn.Parameter(torch.from_numpy(array.copy())) for name, array in WEIGHTS.items()}
    groups = [{"params": [parameters["matrix"]]}, {"params": [parameters["norm"]], "weight_decay": 0.0}]
    optimizer = torch.optim.AdamW(groups, 1.0, (RULE.b1, RULE.b2), RULE.eps, RULE.decay)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, RATE)
    for gradients in GRADIENTS:
        for name, parameter in parameters.items():
            parameter.grad = torch.from_numpy(gradients[name].copy())
        torch.nn.utils.clip_grad_norm_(parameters.values(), MOST)
        optimizer.step()
        schedule.step()
    return {name: parameter.detach().numpy() for name, parameter in parameters.items()}


def optax():
    import jax
    import jax.numpy as jnp
    import optax

    rates = jnp.array([RATE(step) for step in range(STEPS)])
    transform = optax.chain(
        optax.clip_by_global_norm(MOST),
        optax.adamw(
            lambda count: rates[count], RULE.b1, RULE.b2, RULE.eps, weight_decay=RULE.decay,
            mask={"matrix": True, "norm": False},
        ),
    )  # fmt: skip
    parameters = jax.tree.map(jnp.asarray, WEIGHTS)
    state = transform.init(parameters)
    step = jax.jit(transform.update)
    for gradients in GRADIENTS:
        updates, state = step(gradients, state, parameters)
        parameters = optax.apply_updates(parameters, updates)
    return {name: np.asarray(array) for name, array in parameters.items()}


def keras():
    import tensorflow as tf

    from mistral_tf.optimizers import AdamW as Optimizer

    parameters = {name: _variable(name) for name in WEIGHTS}
    optimizer = Optimizer(
        1.0, beta_1=RULE.b1, beta_2=RULE.b2, epsilon=RULE.eps, weight_decay=RULE.decay, global_clipnorm=MOST
    )
    optimizer.exclude_from_weight_decay(var_list=[parameters["norm"]])
    optimizer.build(list(parameters.values()))
    for step, gradients in enumerate(GRADIENTS):
        optimizer.learning_rate = RATE(step)
        optimizer.apply([tf.constant(gradients[name]) for name in parameters], list(parameters.values()))
    return {name: variable.numpy() for name, variable in parameters.items()}


def _variable(name):
    import keras

    return keras.Variable(WEIGHTS[name], name=name)


@pytest.mark.lenient_jax("optax's Adam mixes dtypes")
@pytest.mark.parametrize(("optimizer", "needs"), [(torch, "torch"), (optax, "optax"), (keras, "tensorflow")])
def test_an_optimizer_is_the_formula(optimizer, needs):
    pytest.importorskip(needs)
    wanted, found = reference(), optimizer()
    moved = max(np.abs(wanted[name] - WEIGHTS[name]).max() for name in WEIGHTS)
    assert moved > 5e-3
    for name in WEIGHTS:
        assert np.abs(found[name] - wanted[name]).max() < 2e-7, f"{needs} {name}: 7e-8 seen; with Keras' own 5e-4"


def test_steps_are_clipped_and_are_not():
    norms = [global_norm(gradients) for gradients in GRADIENTS]
    assert min(norms) < MOST < max(norms)
    for gradients, norm in zip(GRADIENTS, norms, strict=True):
        assert np.isclose(global_norm(clipped(gradients, MOST)), min(norm, MOST))


@pytest.mark.parametrize("clip", ["clipnorm", "global_clipnorm"])
def test_an_embedding_s_gradient_is_clipped_as_the_sum_of_its_rows(clip):
    """A token that is there twice has two rows, [3, 0] and [4, 0]: together they are 7 long, by themselves 5."""
    tensorflow = pytest.importorskip("tensorflow")
    import keras

    from mistral_tf.optimizers import AdamW as Optimizer

    moments = []
    for sparse in (True, False):
        table = keras.Variable(np.zeros((3, 2), np.float32))
        optimizer = Optimizer(1e-3, weight_decay=0.0, **{clip: 1.4})
        optimizer.build([table])
        rows = tensorflow.constant([[3.0, 0.0], [4.0, 0.0]])
        gradient = tensorflow.IndexedSlices(rows, tensorflow.constant([1, 1]), tensorflow.constant([3, 2]))
        optimizer.apply([gradient if sparse else tensorflow.convert_to_tensor(gradient)], [table])
        moments.append(np.asarray(optimizer._momentums[0]))
    assert np.allclose(moments[0], moments[1])
    assert np.isclose(moments[0][1, 0], 0.1 * 1.4)
