"""Talk with a model, a line a turn, shown as it comes; a turn computes only what is new.

    python examples/chat.py mistralai/Mistral-7B-Instruct-v0.3

Without an argument it is the small model of this project, which continues English of 1815. With "Emma was" and
"Mr. Knightley said" typed in it

Prints:

     not at all pleased. She was not at all pleased with her, and she was not at all pleased with her,
    [0 of 3 tokens were in the cache]
     that she had been so much in the world to be of the party.
    "I am sure," said she,
    [26 of 31 tokens were in the cache]
"""

from __future__ import annotations

import sys

from mistral_core import Conversation
from mistral_core.data import TINY_CHECKPOINT
from mistral_torch import MistralForCausalLM, MistralTokenizer  # or mistral_flax, or mistral_tf


def main() -> None:
    """Load the model, then answer each line of stdin until it ends."""
    path = sys.argv[1] if len(sys.argv) > 1 else TINY_CHECKPOINT
    tokenizer = MistralTokenizer.from_pretrained(path)
    model = MistralForCausalLM.from_pretrained(path, dtype="float32")  # "bfloat16" for a large one
    talk = Conversation(model, tokenizer, plain=path == TINY_CHECKPOINT, max_new_tokens=24)
    for line in sys.stdin:
        talk.say(line.strip(), on_text=lambda piece: print(piece, end="", flush=True))
        turn = talk.last
        assert turn is not None
        print(f"\n[{turn.reused} of {turn.prompt_tokens} tokens were in the cache]")


if __name__ == "__main__":
    main()
