"""A model whose answers are written beforehand, and a tokenizer of characters, for the tests of conversations."""

from __future__ import annotations

import numpy as np

from conformance.weights import random_parameters
from mistral_core import GenerationConfig
from mistral_core.config.presets import TINY
from mistral_core.errors import TemplateError
from mistral_core.generation import driver
from mistral_core.reference import engine

BEGIN, END = 1, 2
FIRST, SECOND, TH = 94, 95, 96
"""The two bytes of an e with an acute accent, and "th", which the tokenizer itself writes as two characters."""
PIECES = [b"\n", b"", b"", *(bytes([char]) for char in range(32, 123)), b"\xc3", b"\xa9", b"th"]
PARAMETERS = random_parameters(TINY, "MistralForCausalLM")


class Characters:
    """One token a character; a text begins without its space, as SentencePiece's do.

    Chats are <user> answer END, with the system prompt in the first or the last text of the user.
    """

    all_special_tokens = ("[INST]",)
    eos_token_id = END

    def __init__(self, system="first"):
        self.system = system

    def encode(self, text, add_special_tokens=True):
        pieces = {piece: at for at, piece in enumerate(PIECES) if piece and at != TH}
        return [BEGIN] * add_special_tokens + [pieces[bytes([byte])] for byte in text.encode()]

    def decode(self, ids, skip_special_tokens=True):
        return b"".join(PIECES[each] for each in ids).decode(errors="replace").removeprefix(" ")

    def apply_chat_template(
        self, conversation, *, add_generation_prompt=False, continue_final_message=False, chat_template=None
    ):
        system = [each["content"] for each in conversation if each["role"] == "system"]
        rest = [each for each in conversation if each["role"] != "system"]
        users = [at for at, each in enumerate(rest) if each["role"] == "user"]
        ids = [BEGIN]
        for at, message in enumerate(rest):
            if message["role"] not in ("user", "assistant"):
                raise TemplateError(f"messages[{at}]: role must be user or assistant, got {message['role']!r}.")
            mine = system if users and at == users[0 if self.system == "first" else -1] else []
            text = "".join([*mine, message["content"]])
            if message["role"] == "user":
                if not text:
                    raise TemplateError(f"messages[{at}]: no text; say something.")
                ids += self.encode(f"<{text}>", False)
            else:
                ids += self.encode(text, False) + [END] * (not (continue_final_message and at == len(rest) - 1))
        return ids


class Engine(engine.Engine):
    """The reference, which counts what it reads and says what it is told to."""

    def __init__(self, model):
        super().__init__(model.config, PARAMETERS)
        self.model = model

    def step(self, cache, ids_BT, mask_BT, rule, values):
        self.model.read += ids_BT[mask_BT != 0].tolist()
        chosen, cache = super().step(cache, ids_BT, mask_BT, rule, values)
        if self.model.says:
            chosen = chosen._replace(token=np.full_like(chosen.token, self.model.says.pop(0)))
        return chosen, cache


class Model:
    """`read` gets the ids of all steps; `says` are the tokens to come, and after them what the network says."""

    def __init__(self, says=(), **config):
        self.config = TINY.replace(**{"max_position_embeddings": 400, "sliding_window": None, **config})
        self.generation_config = GenerationConfig(eos_token_id=END)
        self.read, self.says, self.asked = [], list(says), []

    def generate(self, input_ids, *, past_key_values, generation_config, tokenizer, streamer):
        self.asked.append(generation_config)
        prompt = driver.prepare(self.config, input_ids, None, generation_config, {})
        return driver.generate(Engine(self), prompt, past=past_key_values, streamer=streamer, tokenizer=tokenizer)
