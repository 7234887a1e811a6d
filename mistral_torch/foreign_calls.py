"""What transformers' clients hand to `generate`: a cache of theirs, and inputs that peft prepares in its own way."""

from __future__ import annotations

import functools
from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from mistral_core.errors import InputError, UnsupportedFeatureError
from mistral_core.generation import driver
from mistral_core.generation.mixin import Generates
from mistral_core.outputs import GenerateOutput

from .arrays import integers
from .foreign_cache import given_back, is_foreign, own_cache
from .generate import without_dropout
from .layers import token_order
from .processes import in_step, is_fsdp

if TYPE_CHECKING:
    from .heads import MistralForCausalLM


def _prepared(
    model: MistralForCausalLM, input_ids: Any, attention_mask: Any, options: dict[str, Any]
) -> tuple[Any, Any, dict[str, Any]]:
    """Ids, mask and options of a call, with the embeddings that a client puts before the prompt.

    peft's prompt tuning sets a `prepare_inputs_for_generation` of its own on the model that it tunes.
    """
    ids, made, options = _adapted(model, input_ids, attention_mask, options)
    if made is None or made.get("inputs_embeds") is None:
        return input_ids if made is None else ids, attention_mask, options
    if options.get("max_length") is not None:  # which counts the embeddings too
        options["max_length"] += made["attention_mask"].shape[1] - ids.shape[1]
    return ids, made["attention_mask"], {**options, "inputs_embeds": made["inputs_embeds"]}


def _with_prefixes(generate: Any) -> Any:
    """`generate` where an adapter may fill the cache beforehand, as peft's prefix tuning does."""

    @functools.wraps(generate)
    def after_prefix(model: MistralForCausalLM, input_ids: Any = None, **options: Any) -> Any:
        ids, made, rest = _adapted(model, input_ids, options.get("attention_mask"), options)
        if made is None or made.get("past_key_values") is None:
            return generate(model, input_ids, **options)
        mask = made["attention_mask"].long()
        before = mask.shape[1] - ids.shape[1]
        # the cache holds the prefix; as its ids stands one of the row's own, so that no other counts as repeated
        ids = torch.cat([ids[:, -1:].expand(-1, before), ids], dim=1)
        rest |= {"attention_mask": mask, "past_key_values": made["past_key_values"]}
        if rest.get("max_length") is not None:
            rest["max_length"] += before
        adapter = vars(model).pop("prepare_inputs_for_generation")
        try:
            out = generate(model, ids, **rest)
        finally:
            model.prepare_inputs_for_generation = adapter
        if isinstance(out, torch.Tensor):
            return out[:, before:]
        return out._replace(sequences=out.sequences[:, before:], attention_mask=out.attention_mask[:, before:])

    return after_prefix


def _in_step(model: MistralForCausalLM, pieces: Iterator[str]) -> Iterator[str]:
    with in_step(model):
        yield from pieces


def _adapted(
    model: MistralForCausalLM, input_ids: Any, attention_mask: Any, options: dict[str, Any]
) -> tuple[Any, dict[str, Any] | None, dict[str, Any]]:
    """The ids, what an adapter makes of them, None where there is no adapter, and the other options."""
    own = vars(model).get("prepare_inputs_for_generation")
    if own is None or getattr(own, "__func__", None) is type(model).prepare_inputs_for_generation:
        return input_ids, None, options
    options = dict(options)
    given = options.pop("inputs", None) if input_ids is None else input_ids
    ids = integers("input_ids", given, model.device)
    if ids is None:
        raise InputError("generate: give input_ids; the model's adapter puts its own embeddings before them.")
    mask = torch.ones_like(ids) if attention_mask is None else torch.as_tensor(attention_mask, device=ids.device)
    tasks = {"task_ids": options.pop("task_ids")} if "task_ids" in options else {}
    with torch.no_grad():
        return ids, own(ids, attention_mask=mask, past_key_values=None, use_cache=True, **tasks), options


class GeneratesForClients(Generates[Tensor]):
    """A model that continues text, also for clients that bring caches and adapters of their own."""

    @functools.wraps(Generates._generate)
    def _generate(self, *inputs: Any, **options: Any) -> Any:
        with in_step(self):
            return _with_prefixes(Generates._generate)(self, *inputs, **options)

    def _engines(self, assistant: Any, prompt: driver.Prompt) -> tuple[driver.Engine, Any]:
        if assistant is not None and is_fsdp(assistant):
            raise UnsupportedFeatureError(
                "assistant_model: FSDP2 cuts it, and processes may ask it for different numbers of guesses; give a "
                "whole one, or one that parallelize cuts over an axis tensor alone."
            )
        return super()._engines(assistant, prompt)

    @functools.wraps(Generates.stream)
    def stream(self, *inputs: Any, **options: Any) -> Iterator[str]:
        pieces = super().stream(*inputs, **options)
        return _in_step(self, pieces)

    def _prompt(
        self, input_ids: Any, attention_mask: Any, generation_config: Any, options: Mapping[str, Any]
    ) -> driver.Prompt:
        ids, mask, options = _prepared(self, input_ids, attention_mask, dict(options))
        return super()._prompt(ids, mask, generation_config, options)

    def _own_past(self, prompt: driver.Prompt, past: Any) -> tuple[driver.Prompt, Any]:
        """The prompt and a KVCache of what a cache of transformers holds; anything else as it is. Raises InputError."""
        if not is_foreign(past):
            return prompt, past
        generation, columns = prompt.generation, int(past.get_seq_length())
        if generation.num_beams > 1 or generation.num_return_sequences > 1 or prompt.embeds is not None:
            raise InputError(
                "past_key_values: a cache of transformers is taken with one sequence a row and input_ids; leave it out."
            )
        batch, tokens = prompt.ids.shape
        if columns >= tokens:
            raise InputError(
                f"past_key_values: it holds {columns} of {tokens} columns; give the ids of all, and new ones."
            )
        prompt = prompt._replace(generation=generation.replace(cache="full"))
        if not columns:
            return prompt, None
        like = torch.empty(0, dtype=self.dtype, device=self.device)
        mask = torch.from_numpy(prompt.mask)
        return prompt, own_cache(self.config, past, mask, tokens - columns, batch=batch, like=like)

    @torch.no_grad()
    def _given_back(self, out: GenerateOutput, past: Any) -> GenerateOutput:
        """What was generated with a cache of transformers: theirs, with all columns but the last."""
        cache, columns = out.past_key_values, out.sequences.shape[1] - 1
        if not is_foreign(past) or cache is None or columns <= past.get_seq_length() or not bool(cache.length.any()):
            return out
        device = cache.length.device
        ids, mask = (torch.from_numpy(x).to(device)[:, :columns] for x in (out.sequences, out.attention_mask))
        order = token_order(mask, torch.zeros_like(cache.length))
        missing = (order >= cache.length[:, None]).long()  # the end of a row that ended before the others
        if missing.any():
            with without_dropout(self):
                cache = self(
                    ids, attention_mask=missing, past_key_values=cache, logits_to_keep=1, return_dict=True
                ).past_key_values
        return out._replace(past_key_values=given_back(past, cache, order[:, past.get_seq_length() :]))

    def prepare_inputs_for_generation(
        self, input_ids: Tensor, *, past_key_values: Any = None, attention_mask: Any = None, **options: Any
    ) -> dict[str, Any]:
        """The arguments of the next call of a decode loop written for transformers: with a past, the last ids alone."""
        ids = input_ids
        if is_foreign(past_key_values):
            ids = input_ids[:, past_key_values.get_seq_length() :]
        elif past_key_values is not None and past_key_values.get_seq_length():
            ids = input_ids[:, -1:]
        return {
            "input_ids": ids,
            "past_key_values": past_key_values,
            "attention_mask": attention_mask,
            "use_cache": True,
            **options,
        }
