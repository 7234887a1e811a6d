"""The learning rate of each step: the formulas, the ends, and the same numbers in PyTorch, optax and Keras."""

from __future__ import annotations

import math

import numpy as np
import pytest

from mistral_core.errors import ConfigError
from mistral_core.learning import Schedule

KINDS = ("constant", "linear", "cosine")


def test_a_rise_and_a_fall():
    rates = [Schedule(2.0, 9, "linear", warmup=4)(step) for step in range(11)]
    assert rates == [0.5, 1.0, 1.5, 2.0, 2.0, 1.5, 1.0, 0.5, 0.0, 0.0, 0.0]
    rates = [Schedule(2.0, 5, "cosine", floor=0.1)(step) for step in range(5)]
    assert np.allclose(rates, [2 * (0.1 + 0.9 * (1 + math.cos(math.pi * k / 4)) / 2) for k in range(5)])
    assert Schedule(3.0, 7, "constant", warmup=1)(0) == Schedule(3.0, 7, "constant")(99) == 3.0
    assert Schedule(3.0, 2, "linear", warmup=2)(1) == 3.0
    assert Schedule(3.0, 1, "cosine")(0) == 3.0


@pytest.mark.parametrize("kind", KINDS)
def test_frameworks_set_the_same_rate(kind):
    torch = pytest.importorskip("torch")
    optax = pytest.importorskip("optax")
    schedule = Schedule(0.01, 12, kind, warmup=3)
    optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=1.0)
    scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, schedule)
    rates = []
    for _ in range(14):
        rates.append(optimizer.param_groups[0]["lr"])
        optimizer.step()
        scheduler.step()
    assert rates == [schedule(step) for step in range(14)]
    table = np.array([schedule(step) for step in range(14)], np.float32)
    state = optax.scale_by_schedule(lambda count: table[int(count)]).init({"w": np.zeros(1, np.float32)})
    update = optax.scale_by_schedule(lambda count: table[int(count)]).update
    for step in range(14):
        moved, state = update({"w": np.ones(1, np.float32)}, state)
        assert moved["w"] == table[step]


@pytest.mark.parametrize(
    ("fields", "told"),
    [
        ({"kind": "polynomial"}, "kind must be one of constant, linear, cosine"),
        ({"peak": -1.0}, "peak must be a number from 0 on"),
        ({"peak": math.nan}, "peak must be a number"),
        ({"steps": 0}, "steps must be an integer from 1 on"),
        ({"warmup": 11}, "warmup must be an integer from 0 to 10"),
        ({"floor": 1.5}, "floor must be from 0 to 1"),
    ],
)
def test_what_is_no_schedule(fields, told):
    with pytest.raises(ConfigError, match=told):
        Schedule(**{"peak": 1.0, "steps": 10, **fields})
