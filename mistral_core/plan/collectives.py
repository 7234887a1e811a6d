"""What devices send each other in a step: which collectives, how many, of how many bytes.

Tensor parallelism: Megatron (arXiv 1909.08053, section 3). Each block of a layer ends in an all-reduce, and begins with
one in backward, for which Megatron adds up the partial sums of the block's matrices before they are sent. XLA on CPU
sends them side by side in one operation, and so they are counted here: two of the MLP (gate, up), three of attention
(q, k, v). A compiler that adds them first sends a half and a third of these.
Fully sharded data: ZeRO stage 3 (arXiv 1910.02054, section 7.2.2): parameters are gathered for forward and again for
backward, gradients are reduced and scattered. Only the embedding stays where it is: each device looks up its columns
for the rows of others, and columns are exchanged for rows. Scalars (the loss, counts, the norm of gradients) and ids
are left out.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass

from ..parameters import BODY
from .workload import DTYPES, FLOAT, Held, Workload

LOSS = 3
"""All-reduces of a cross entropy over a cut vocabulary: the largest logit, the sum of exponentials, the label's."""
EMBEDDING = BODY[0].name


@dataclass(frozen=True)
class Collective:
    """Equal collectives of a step."""

    kind: str
    """all-reduce | all-gather | reduce-scatter | all-to-all"""
    what: str
    phase: str
    """forward | backward, or prefill | decode, whose step is one token of each row"""
    axes: tuple[str, ...]
    """The mesh axes over which they go."""
    devices: int
    """How many devices take part in one."""
    count: int
    """How many there are in a step."""
    nbytes: int
    """Bytes of one on a device: of what is reduced or exchanged, or of all that is gathered or is to be scattered."""

    @property
    def sent(self) -> int:
        """Bytes that a device sends in a step if devices form a ring: (n - 1) / n of them, twice in an all-reduce.

        Patarasuk and Yuan, Bandwidth optimal all-reduce algorithms for clusters of workstations, 2009.
        """
        turns = 2 if self.kind == "all-reduce" else 1
        return turns * self.count * self.nbytes * (self.devices - 1) // self.devices


_Row = tuple[str, str, tuple[str, ...], int, int]
"""Kind, what, axes, count, bytes."""


def collectives(work: Workload) -> tuple[Collective, ...]:
    """All collectives of a step of training, or of the prefill and of one step of decoding."""
    length = work.sequence
    phases: dict[str, Iterable[_Row]]
    if work.trains:
        phases = {
            "forward": [*_weights(work), *_columns(work, length), *_blocks(work, length), *_loss(work)],
            "backward": [
                *_weights(work),
                *_again(work),
                *_of_loss(work),
                *_inputs(work),
                *_keys_values(work),
                *_of_columns(work),
                *_gradients(work),
            ],
        }
    else:
        phases = {
            "prefill": [*_weights(work), *_columns(work, length), *_blocks(work, length), *_logits(work)],
            "decode": [*_weights(work), *_columns(work, 1), *_blocks(work, 1), *_logits(work)],
        }  # fmt: skip
    return tuple(
        Collective(kind, what, phase, axes, work.devices(axes), count, nbytes)
        for phase, rows in phases.items()
        for kind, what, axes, count, nbytes in rows
        if axes and count and nbytes
    )


# Over the axes that cut heads, the MLP and the vocabulary


def _hidden(work: Workload, tokens: int) -> int:
    """Bytes of hidden states [B, T, D] on a device."""
    return work.rows * tokens * work.config.hidden_size * DTYPES[work.dtype]


def _low_rank(work: Workload, tokens: int) -> int:
    """Bytes of A x [B, T, rank] on a device, of one adapter."""
    return work.rows * tokens * (work.lora or 0) * FLOAT


def _blocks(work: Workload, tokens: int) -> Iterator[_Row]:
    """The sums in which the embedding, attention and the MLP end, and those of A x where A multiplies what is cut."""
    layers, size = work.config.num_hidden_layers, _hidden(work, tokens)
    yield "all-reduce", "embeddings", work.axes("V"), 1, size
    yield "all-reduce", "output of attention", work.axes("N"), layers, size
    yield "all-reduce", "output of the MLP", work.axes("F"), layers, size
    yield from _adapters(work, tokens)


def _adapters(work: Workload, tokens: int) -> Iterator[_Row]:
    layers, size = work.config.num_hidden_layers, _low_rank(work, tokens)
    yield "all-reduce", "A x of o_proj", work.axes("N"), layers, size
    yield "all-reduce", "A x of down_proj", work.axes("F"), layers, size


def _loss(work: Workload) -> Iterator[_Row]:
    """Of log softmax over a cut vocabulary, [B, T - 1] in float32 (Megatron, section 3)."""
    if work.has_logits:
        yield "all-reduce", "parts of the loss", work.axes("V"), LOSS, work.rows * (work.sequence - 1) * FLOAT


def _of_loss(work: Workload) -> Iterator[_Row]:
    """The gradient of log softmax: the sum of its logits' gradients."""
    if work.has_logits:
        yield "all-reduce", "gradients of the loss", work.axes("V"), 1, work.rows * (work.sequence - 1) * FLOAT


def _logits(work: Workload) -> Iterator[_Row]:
    """Of the last token, [B, V] in float32, for the choice of the next one."""
    if work.has_logits:
        yield "all-gather", "logits", work.axes("V"), 1, work.rows * work.config.vocab_size * FLOAT


def _again(work: Workload) -> Iterator[_Row]:
    """What is summed again where layers are computed again: what the MLP gives is not needed for gradients."""
    if work.remat:
        layers, size = work.config.num_hidden_layers, _hidden(work, work.sequence)
        yield "all-reduce", "output of attention, again", work.axes("N"), layers, size
        for kind, what, axes, count, nbytes in _adapters(work, work.sequence):
            yield kind, f"{what}, again", axes, count, nbytes


def _inputs(work: Workload) -> Iterator[_Row]:
    """The gradients of what heads, MLPs and attentions read: a sum over devices for each cut matrix that reads it.

    Below the first layer's adapters nothing trains.
    """
    layers, size, low = work.config.num_hidden_layers, _hidden(work, work.sequence), _low_rank(work, work.sequence)
    cut = 1 if work.sharding.repeats > 1 else 3
    if work.has_logits:
        yield "all-reduce", "gradients of the head's input", work.axes("V"), 1, size
    yield "all-reduce", "gradients of the MLP's input", work.axes("F"), layers, 2 * size
    yield "all-reduce", "gradients of A x of the MLP", work.axes("F"), layers, 2 * low
    yield "all-reduce", "gradients of attention's input", work.axes("N"), layers - bool(work.lora), cut * size
    yield "all-reduce", "gradients of A x of attention", work.axes("N"), layers, cut * low


def _keys_values(work: Workload) -> Iterator[_Row]:
    """Where devices repeat key/value heads: their gradients, computed head by head.

    The first go over as many devices as repeat a head, and so somewhat less is sent than over all.
    """
    if work.sharding.repeats > 1:
        config, axes, layers = work.config, work.axes("K"), work.config.num_hidden_layers
        head = work.rows * work.sequence * config.head_dim * DTYPES[work.dtype]
        yield "all-reduce", "gradients of a key and a value head", axes, layers, 2 * head
        yield "all-gather", "gradients of keys, of values", axes, 2 * layers, config.num_key_value_heads * head


# Over the axes that cut the batch and what is left of the parameters


def _weights(work: Workload) -> Iterator[_Row]:
    """Parameters of which devices hold parts of the hidden size, a layer at a time."""
    found: dict[tuple[bool, tuple[str, ...]], int] = {}
    for held in work.tensors:
        if _is_looked_up(work, held):
            continue
        key = held.is_of_layer, work.gathered_over(held)
        found[key] = found.get(key, 0) + work.nbytes(held, gathered=True)
    for (is_of_layer, axes), size in found.items():
        yield "all-gather", f"weights of {_WHERE[is_of_layer]}", axes, _times(work, is_of_layer), size


def _gradients(work: Workload) -> Iterator[_Row]:
    """Gradients of the rows of several devices: scattered as the parameters are, summed where these are whole."""
    found: dict[tuple[str, bool, tuple[str, ...]], int] = {}
    for held in work.tensors:
        if held.trains:
            for kind, axes, size in _sums(work, held):
                key = kind, held.is_of_layer, axes
                found[key] = found.get(key, 0) + size
    for (kind, is_of_layer, axes), size in found.items():
        yield kind, f"gradients of {_WHERE[is_of_layer]}", axes, _times(work, is_of_layer), size


def _sums(work: Workload, held: Held) -> Iterator[tuple[str, tuple[str, ...], int]]:
    """The collectives of one gradient over the devices that compute other rows of the batch."""
    cut = work.gathered_over(held)
    scattered = tuple(axis for axis in cut if axis in work.batch_axes)
    if not _is_looked_up(work, held):
        yield "reduce-scatter", scattered, work.nbytes(held, gathered=True)
    yield "all-reduce", tuple(axis for axis in work.batch_axes if axis not in cut), work.nbytes(held)


def _is_looked_up(work: Workload, held: Held) -> bool:
    """Whether rows of it are picked and nothing else is done with it: an embedding that is no head too."""
    is_head = work.has_logits and work.config.tie_word_embeddings
    return held.row.name == EMBEDDING and not is_head


def _columns(work: Workload, tokens: int) -> Iterator[_Row]:
    """The embeddings of other devices' rows in the columns that are here, for those of its own rows that are there.

    A device that computes all rows needs all columns of them.
    """
    (embedding,) = (held for held in work.tensors if held.row.name == EMBEDDING)
    axes, size = work.gathered_over(embedding), _hidden(work, tokens)
    yield "all-to-all", "columns of embeddings", tuple(x for x in axes if x in work.batch_axes), 1, size
    yield "all-gather", "columns of embeddings", tuple(x for x in axes if x not in work.batch_axes), 1, size


def _of_columns(work: Workload) -> Iterator[_Row]:
    """The gradients of the embeddings on their way back."""
    if any(held.trains for held in work.tensors if held.row.name == EMBEDDING):
        for kind, what, axes, count, size in _columns(work, work.sequence):
            if kind == "all-to-all":
                yield kind, f"gradients of {what}", axes, count, size


_WHERE = {True: "a layer", False: "the rest"}


def _times(work: Workload, is_of_layer: bool) -> int:
    return work.config.num_hidden_layers if is_of_layer else 1
