"""How many questions a model answers to the letter as a .jsonl of conversations has it."""

from __future__ import annotations

import json
from pathlib import Path

from mistral_core import backend as backends
from mistral_core.data import TINY_CHECKPOINT
from mistral_core.text.tokenizer import MistralTokenizer

from ..common import say, task

NEW = 80
"""Tokens of an answer, at most."""
TOGETHER = 50
"""Questions of a batch."""


def main() -> None:
    """Ask each question greedily, and count the right answers."""
    asked = task()
    backend = backends.get(asked["backend"])
    tokenizer = MistralTokenizer.from_pretrained(TINY_CHECKPOINT, version="v1")
    model = backend.model_class("MistralForCausalLM").from_pretrained(asked["path"], dtype="float32")
    chats = [json.loads(line)["messages"] for line in Path(asked["rows"]).read_text().splitlines()]
    right = 0
    for at in range(0, len(chats), TOGETHER):
        some = chats[at : at + TOGETHER]
        questions = [tokenizer.apply_chat_template(chat[:1]) for chat in some]
        batch = tokenizer.pad({"input_ids": questions}, padding_side="left", return_tensors="np")
        rows = backend.to_numpy(model.generate(**batch, max_new_tokens=NEW, do_sample=False))
        answers = rows[:, batch["input_ids"].shape[1] :]
        said = [tokenizer.decode(answer.tolist(), skip_special_tokens=True) for answer in answers]
        right += sum(text == chat[1]["content"] for text, chat in zip(said, some, strict=True))
    say({"right": right / len(chats)}, backend.framework)


if __name__ == "__main__":
    main()
