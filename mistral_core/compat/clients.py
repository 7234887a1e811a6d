"""What clients written for transformers expect of any backend, without importing transformers.

Classes: clients ask `isinstance(model, PreTrainedModel)` before they save a model, find its layers or freeze it, and
`isinstance(tokenizer, PreTrainedTokenizerBase)` before they take a tokenizer. Python asks an object's type first, and
then its attribute `__class__`, which may name another class: so do proxies and mocks.
"""

from __future__ import annotations

import copyreg
import difflib
import functools
import sys
from collections.abc import Callable, Mapping
from typing import Any, TypeVar, cast

import numpy as np

from ..errors import UnknownArgumentError

WITHOUT_EFFECT = {
    "cache_position": "a cache knows how many tokens it has",
    "token_type_ids": "a Mistral has no token types",
    "cu_seq_lens_k": "queries and keys are the same tokens",
    "max_length_q": "lengths follow from cu_seq_lens_q",
    "max_length_k": "lengths follow from cu_seq_lens_q",
}
"""Arguments of a forward pass that transformers' callers give -> why they change nothing here."""
F = TypeVar("F", bound=Callable[..., Any])
THEIR_PATH = "pretrained_model_name_or_path"
DOCUMENTS = ("cu_seq_lens_q", "seq_idx")
"""Arguments that say where packed documents begin, or of which document each token is."""


class SeenAs:
    """An object that is also seen as an instance of another library's class, where that library is loaded.

    `type(x)` is what it was and nothing is inherited: what a client calls, our class must have.
    """

    seen_as: tuple[str, ...]
    """The full name of the other class, or several, of which the first that is loaded counts."""

    def __reduce_ex__(self, protocol: Any) -> Any:
        """What pickle and copy make it from; as usual, without their check that `__class__` is the type."""
        made: Any = super().__reduce_ex__(max(protocol, 2))
        return (_make, *made[1:]) if made[0] is copyreg.__newobj__ else made  # type: ignore[attr-defined]

    @property
    def __class__(self) -> Any:
        own: Any = type(self)
        for full_name in self.seen_as:
            module, _, name = full_name.rpartition(".")
            other = getattr(sys.modules.get(module), name, None)
            if other is not None:
                return _both(own, other)
        return own

    @__class__.setter
    def __class__(self, own: type) -> None:
        object.__dict__["__class__"].__set__(self, own)


@functools.cache
def _both(own: type, other: type) -> type:
    """A class below both, of which there is never an instance, with the name of the first."""
    return type(own)(own.__name__, (own, other), {"__module__": own.__module__, "__qualname__": own.__qualname__})


def _make(cls: type, *arguments: Any) -> Any:
    return cls.__new__(cls, *arguments)


def documents_told(others: Mapping[str, Any], document_ids: Any) -> Any:
    """`document_ids`, or where None what transformers' collators for packed rows say instead, as ids [1, T].

    `others` are a forward pass's further arguments; raises UnknownArgumentError for those that nobody knows.
    """
    for name in others:
        if name not in WITHOUT_EFFECT and name not in DOCUMENTS:
            near = difflib.get_close_matches(name, _ARGUMENTS, 1)
            advice = f"did you mean {near[0]}?" if near else "leave it out."
            raise UnknownArgumentError(f"{name}: the model has no such argument; {advice}")
    ends = others.get("cu_seq_lens_q")
    if document_ids is not None or ends is None:
        return others.get("seq_idx") if document_ids is None else document_ids
    ends = np.asarray(ends.cpu() if hasattr(ends, "cpu") else ends).reshape(-1)
    return np.searchsorted(ends[1:], np.arange(ends[-1]), side="right")[None]


_ARGUMENTS = (
    "input_ids", "attention_mask", "position_ids", "past_key_values", "inputs_embeds", "labels", "document_ids",
    "use_cache", "output_attentions", "output_hidden_states", "return_dict", "logits_to_keep", *DOCUMENTS,
)  # fmt: skip


def path_by_either_name(function: F) -> F:
    """A `from_pretrained` whose `path` is also taken as `pretrained_model_name_or_path`, its name in transformers.

    Raises UnknownArgumentError where both are given.
    """

    @functools.wraps(function)
    def called(cls: type, *arguments: Any, **options: Any) -> Any:
        if THEIR_PATH not in options:
            return function(cls, *arguments, **options)
        if arguments or "path" in options:
            raise UnknownArgumentError(f"from_pretrained: path and {THEIR_PATH} are one argument; give one of them.")
        return function(cls, options.pop(THEIR_PATH), *arguments, **options)

    return cast(F, called)
