"""Draw which tokens see which, ask why one is not seen, and find what a token attends to most.

Prints:

    'surpr' (position 4) does not see 'Emma' (position 1), 3 tokens back: outside the window of 3 (itself included).
    layer 0, head 0: 'ised' gives 0.95 of its attention to '<s>'
    layer 0, head 1: 'ised' gives 0.48 of its attention to '<s>'
    layer 0, head 2: 'ised' gives 0.68 of its attention to '<s>'
    layer 0, head 3: 'ised' gives 0.95 of its attention to '▁surpr'
    layer 0, head 4: 'ised' gives 0.84 of its attention to '▁surpr'
    layer 0, head 5: 'ised' gives 0.23 of its attention to '▁not'
"""

from __future__ import annotations

from mistral_core import AttentionMaskVisualizer, AttentionVisualizer
from mistral_core.data import TINY_CHECKPOINT as path  # or "mistralai/Mistral-7B-v0.1"

TEXT = "Emma was not surprised"

if __name__ == "__main__":
    mask = AttentionMaskVisualizer(path, sliding_window=3).picture(TEXT)
    mask.html("mask.html")  # a page on which each cell explains itself
    print(mask.explain(4, 1))

    attention = AttentionVisualizer(path, backend="torch").picture(TEXT, layer=0, head="all")  # or "flax", or "tf"
    attention.png("heads.png")
    labels = [token.label for token in attention.texts[0]]
    for head, panel in enumerate(attention.panels):
        weights = attention.weights(head)
        assert weights is not None
        most = weights[-1].argmax()
        print(f"{panel.title}: {labels[-1]!r} gives {weights[-1, most]:.2f} of its attention to {labels[most]!r}")
