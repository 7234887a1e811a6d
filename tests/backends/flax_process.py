"""One of two processes of `jax.distributed` that hold a model together: `test_flax_sharding_processes.py` starts both.

    python tests/backends/flax_process.py TASK RANK PORT DIRECTORY

It prints what it found as JSON, and on stderr how far it came. A task is "everything", or one in which a process is
killed: "steps 1", "loading 1", "saving 0".
"""

from __future__ import annotations

import json
import os
import signal
import sys
import time
from pathlib import Path

import jax
import numpy as np
import optax
from flax import nnx
from jax.experimental.multihost_utils import process_allgather, sync_global_devices
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

from conformance.bounded_memory import share_dialects
from conformance.weights import random_parameters
from mistral_core.config.presets import TINY
from mistral_core.weights import loading
from mistral_flax import MistralForCausalLM
from mistral_flax.scan import scan_layers

CONFIG = TINY.replace(
    vocab_size=96, hidden_size=48, intermediate_size=80, num_attention_heads=8, num_key_value_heads=4, head_dim=6,
    num_hidden_layers=1, eos_token_id=None,
)  # fmt: skip
IDS = np.random.default_rng(0).integers(1, 96, (4, 9))
MASK = np.ones_like(IDS)
MASK[1, :3] = 0
LABELS = np.where(MASK == 0, -100, IDS)
LABELS[2:, 1:6] = -100
WAYS = {
    "left pads": {"attention_mask": MASK},
    "sampled": {"do_sample": True, "seed": 5, "top_k": 20},
    "guessed": {"prompt_lookup_num_tokens": 3, "max_matching_ngram_size": 1},
    "loop": {"on_device_loop": True},
    "beams": {"num_beams": 2},
    "global": {},
}
STARTED = time.monotonic()


def tell(what):
    print(f"{time.monotonic() - STARTED:.1f} s: {what}", file=sys.stderr, flush=True)


def apart(a, b):
    a, b = np.asarray(a, np.float64), np.asarray(b, np.float64)
    return float(np.abs(a - b).max() / max(np.abs(b).max(), 1e-30))


def whole(array):
    return process_allgather(array, tiled=True)


class Asked:
    """Ends a text after so many columns."""

    def __init__(self, columns):
        self.left = columns + 1  # the prompt first

    def put(self, column):
        self.left -= 1
        return self.left <= 0

    def end(self):
        pass


def loss_of(model, ids=IDS, mask=MASK, labels=LABELS):
    return model(ids, mask, labels=labels, use_cache=False).loss


@nnx.jit
def trained(model, optimizer):
    loss, gradients = nnx.value_and_grad(loss_of)(model)
    optimizer.update(model, gradients)
    return loss, gradients


def flat(state):
    return {".".join(map(str, path)): leaf.get_value() for path, leaf in nnx.to_flat_state(state)}


def furthest(given, expected):
    return max(apart(whole(given[name]), expected[name]) for name in expected)


def raised(call):
    try:
        call()
    except Exception as error:
        return type(error).__name__


def killed_at(count, call):
    """The call, but the process is gone instead of it the `count`th time."""
    calls = iter(range(1, count))

    def killed(*arguments, **options):
        if next(calls, None) is None:
            os.kill(os.getpid(), signal.SIGKILL)
        return call(*arguments, **options)

    return killed


def learnt(model):
    """The losses of three steps, and the weights after them."""
    optimizer = nnx.Optimizer(model, optax.adamw(1e-2, eps=1e-6), wrt=nnx.Param)
    return [float(trained(model, optimizer)[0]) for _ in range(3)], flat(nnx.state(model, nnx.Param))


def alone(one):
    """What one device says, chooses and learns, as lists."""
    logits = one(IDS, MASK).logits
    texts = {name: one.generate(IDS, max_new_tokens=12, **options) for name, options in WAYS.items()}
    loss, gradients = nnx.value_and_grad(loss_of)(one)
    losses, weights = learnt(MistralForCausalLM(CONFIG).load_arrays(one.params))
    found = logits, texts, loss, flat(gradients), losses, weights
    return jax.tree.map(lambda array: np.asarray(array).tolist(), found)


def everything(rank, directory, mesh, one, expected):
    """What the model says, chooses, saves and learns, beside one device."""
    logits, texts, expected_loss, expected_gradients, expected_losses, expected_weights = expected
    found = {}
    # loading: each process reads what its devices hold, and no more
    read, cast = [], loading.cast
    loading.cast = lambda array, *others: read.append(array.nbytes) or cast(array, *others)
    cut = MistralForCausalLM.from_pretrained(directory / "one", mesh=mesh)
    loading.cast = cast
    parts = [{str(part.index): part.data.nbytes for part in array.addressable_shards} for array in cut.params.values()]
    found["read"] = [
        sum(read),
        sum(sum(each.values()) for each in parts),
        sum(array.nbytes for array in one.params.values()),
    ]
    tell("loaded")

    # calls outside of jit, of NumPy on every process and of global arrays
    rows = NamedSharding(mesh, P("fsdp"))
    share = slice(2 * rank, 2 * rank + 2)
    given = {
        name: jax.make_array_from_process_local_data(rows, np.asarray(array[share], np.int32))
        for name, array in (("ids", IDS), ("mask", MASK), ("labels", LABELS))
    }
    found["eager"] = apart(whole(cut(IDS, MASK).logits), logits)
    found["refused"] = raised(lambda: cut(IDS + 96))
    loss, gradients = nnx.value_and_grad(loss_of)(cut)
    found["loss"] = apart(float(loss), expected_loss)
    found["global loss"] = apart(float(loss_of(cut, **given)), expected_loss)
    found["gradients"] = furthest(flat(gradients), expected_gradients)
    tell("eager calls")

    # text
    said = {
        name: cut.generate(given["ids"] if name == "global" else IDS, max_new_tokens=12, **options)
        for name, options in WAYS.items()
    }
    found["text"] = {name: bool(np.array_equal(text, texts[name])) for name, text in said.items()}
    found["unseeded"] = np.asarray(cut.generate(IDS, max_new_tokens=6, do_sample=True)).tolist()
    late = cut.generate(IDS, max_new_tokens=6, max_time=1000 if rank else 1e-9)
    asked = cut.generate(IDS, max_new_tokens=6, streamer=Asked(3) if rank else None)
    found["columns"] = [late.shape[1] - 9, asked.shape[1] - 9]
    tell("text")

    # saving: by the first process; where it cannot, all say so
    cut.save_pretrained(directory / "again")
    found["no overwriting"] = raised(lambda: cut.save_pretrained(directory / "again", overwrite=False))
    packed = MistralForCausalLM.from_pretrained(directory / "one", quantization="int8", mesh=mesh)
    packed.save_pretrained(directory / "packed")
    scan_layers(MistralForCausalLM.from_pretrained(directory / "one", mesh=mesh)).save_pretrained(directory / "stacked")
    for name in ("again", "stacked"):
        again = MistralForCausalLM.from_pretrained(directory / name)
        found[f"saved {name}"] = all(np.array_equal(again.params[key], array) for key, array in one.params.items())
    again = MistralForCausalLM.from_pretrained(directory / "packed")
    plain = MistralForCausalLM.from_pretrained(directory / "one", quantization="int8")
    found["saved packed"] = all(
        np.array_equal(a.matrix.codes, b.matrix.codes) and np.array_equal(a.matrix.scale, b.matrix.scale)
        for (_, a), (_, b) in zip(again.packed_parts(), plain.packed_parts(), strict=True)
    )
    found["left"] = sorted(path.name for path in directory.iterdir())
    tell("saved")

    # steps of training
    losses, weights = learnt(cut)
    found["steps"] = [apart(losses, expected_losses), furthest(weights, expected_weights)]
    tell("trained")
    return found


def killed(task, lost, rank, directory, mesh, one):
    """A step, a load or a save in which the process `lost` is killed; the other one says how it ended."""
    if task == "loading" and rank == lost:
        loading.cast = killed_at(3, loading.cast)
    cut = MistralForCausalLM.from_pretrained(directory / "one", mesh=mesh)
    optimizer = nnx.Optimizer(cut, optax.sgd(1e-2), wrt=nnx.Param)
    step = killed_at(3, trained) if task == "steps" and rank == lost else trained
    if task == "saving" and rank == lost:
        cut._array = killed_at(3, cut._array)
    tell("started")
    try:
        if task == "saving":
            cut.save_pretrained(directory / "one")
        while True:
            jax.block_until_ready(step(cut, optimizer))
    except Exception as error:
        tell(f"{type(error).__name__}: {error}")
        raise


def main():
    share_dialects()
    task, rank, port, directory = sys.argv[1], int(sys.argv[2]), sys.argv[3], Path(sys.argv[4])
    patience = {} if task == "everything" else {"heartbeat_timeout_seconds": 10}
    jax.distributed.initialize(f"127.0.0.1:{port}", 2, rank, **patience)
    mesh = jax.make_mesh((2, 2), ("fsdp", "tensor"), axis_types=(AxisType.Auto,) * 2)
    one = MistralForCausalLM(CONFIG).load_arrays(random_parameters(CONFIG, "MistralForCausalLM"))
    told = directory.with_suffix(".json")
    if rank == 0:
        one.save_pretrained(directory / "one")
        if task == "everything":  # once, and read by both
            told.write_text(json.dumps(alone(one)))
    sync_global_devices("saved")
    if task == "everything":
        print(json.dumps(everything(rank, directory, mesh, one, json.loads(told.read_text()))))
    else:
        task, lost = task.split()
        killed(task, int(lost), rank, directory, mesh, one)


if __name__ == "__main__":
    main()
