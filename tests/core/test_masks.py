"""Masks as pictures: the drawings of `mistral_core.reference.ops`, in the reference and in every backend."""

from __future__ import annotations

import numpy as np
import pytest

from conformance import adapters
from mistral_core.reference import ops

PICTURES = {
    "no window": (None, [0, 1, 2, 3, 4], None, "1.... 11... 111.. 1111. 11111"),
    "window 3": (3, [0, 1, 2, 3, 4], None, "1.... 11... 111.. .111. ..111"),
    "window 1": (1, [0, 1, 2, 3, 4], None, "1.... .1... ..1.. ...1. ....1"),
    "window 5": (5, [0, 1, 2, 3, 4], None, "1.... 11... 111.. 1111. 11111"),
    "first token is padding": (3, [-1, 0, 1, 2, 3], None, "..... .1... .11.. .111. ..111"),
    "a hole": (2, [0, 1, -1, 2, 3], None, "1.... 11... ..... .1.1. ...11"),
    "documents": (None, [0, 1, 2, 3, 4], [0, 0, 1, 1, 1], "1.... 11... ..1.. ..11. ..111"),
}


@pytest.mark.parametrize("name", PICTURES)
def test_the_mask_is_the_picture(name):
    window, order, documents, picture = PICTURES[name]
    order = np.array([order])
    documents = None if documents is None else np.array([documents])
    wanted = np.array([[[mark == "1" for mark in row] for row in picture.split()]])
    assert np.array_equal(ops.attention_mask(order, order, window, document_ids_BT=documents), wanted)
    for backend in adapters.NAMES:
        assert np.array_equal(adapters.get(backend).mask(order, order, window, documents), wanted), backend


def test_order_counts_real_tokens():
    mask = np.array([[0, 0, 1, 1, 1], [1, 1, 0, 1, 0]])
    assert ops.token_order(mask, np.array([0, 7])).tolist() == [[-1, -1, 0, 1, 2], [7, 8, -1, 9, -1]]
