"""Continue many prompts in batches: of like lengths, so that little is padding, and in the order they came.

Prints:

    Emma was not at all pleased. She was not
    It was a truth universally acknowledged, that a single man, who had been in love with the
    The evening was not very unpleasant to
    Mr. Knightley had no objection to hear the subject of his
    Her father was not very happy to be in the room.
"""

from __future__ import annotations

from collections.abc import Iterator

from mistral_core.data import TINY_CHECKPOINT as path  # or "mistralai/Mistral-7B-v0.1"
from mistral_torch import MistralForCausalLM, MistralTokenizer  # or mistral_flax, or mistral_tf

PROMPTS = [
    "Emma was",
    "It was a truth universally acknowledged, that a single man",
    "The evening",
    "Mr. Knightley had no",
    "Her father was not",
]


def continued(prompts: list[str], *, batch_size: int = 2, max_new_tokens: int = 8) -> Iterator[tuple[int, str]]:
    """Yield (number, text) of each prompt, the shortest first."""
    tokenizer = MistralTokenizer.from_pretrained(path, padding_side="left")
    model = MistralForCausalLM.from_pretrained(path, dtype="float32")
    order = sorted(range(len(prompts)), key=lambda number: len(prompts[number]))
    for start in range(0, len(order), batch_size):
        numbers = order[start : start + batch_size]
        batch = tokenizer([prompts[number] for number in numbers], padding=True, return_tensors="np")
        out = model.generate(**batch, max_new_tokens=max_new_tokens)
        yield from zip(numbers, tokenizer.batch_decode(out, skip_special_tokens=True), strict=True)


if __name__ == "__main__":
    for _, text in sorted(continued(PROMPTS)):
        print(text)
