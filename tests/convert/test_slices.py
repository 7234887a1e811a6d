"""A part of a tensor is the whole tensor cut, in every format; of files in the table's layout nothing else is read."""

from __future__ import annotations

import os

import numpy as np
import pytest
from samples import any_bits, bits, ordinary, write

from mistral_core import TINY
from mistral_core.weights import formats
from mistral_core.weights.containers import tensor_file
from mistral_core.weights.opening import Checkpoint

FORMATS = tuple(name for name, row in formats.FORMATS.items() if row.written)
INDEXES = [
    slice(3, 7),
    slice(None),
    slice(-5, None),
    slice(4, 4),
    slice(6, 2),
    slice(2, 10_000),
    slice(1, 9, 2),
    slice(None, None, -1),
    (slice(2, 8), slice(1, 5)),
    (slice(0, 8, 3), slice(None, None, 2)),
    (),
]
CONFIG = TINY.replace(head_dim=16)  # a power of four: MaxText's scale is exact


@pytest.mark.parametrize("format", FORMATS)
def test_a_part_is_the_whole_cut(tmp_path, format):
    config = CONFIG.replace(sliding_window=None) if format == "gguf" else CONFIG
    write(tmp_path / "a", format, ordinary(CONFIG) if format == "maxtext" else any_bits(CONFIG), config)
    checkpoint = Checkpoint.open(tmp_path / "a")
    for name in checkpoint.tensors:
        whole = checkpoint.read(name)
        for index in INDEXES:
            if isinstance(index, slice) or len(index) <= whole.ndim:
                part = checkpoint.read(name, index)
                assert (part.dtype, part.shape) == (whole.dtype, whole[index].shape), (name, index)
                assert bits(part) == bits(whole[index]), (name, index)


def test_only_the_rows_that_are_asked_for_are_read(tmp_path, monkeypatch):
    write(tmp_path / "a", "hf", any_bits())
    checkpoint = Checkpoint.open(tmp_path / "a")
    name, read = "model.embed_tokens.weight", []
    preadv = os.preadv
    monkeypatch.setattr(tensor_file.os, "preadv", lambda *a: read.append(preadv(*a)) or read[-1])
    part = checkpoint.read(name, (slice(10, 14), slice(0, 3)))
    assert part.shape == (4, 3)
    assert sum(read) == 4 * TINY.hidden_size * 2
    assert np.array_equal(part.view(np.uint16), any_bits()[name][10:14, :3].view(np.uint16))
