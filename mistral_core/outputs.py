"""What a model returns: a name for each field, and a tuple of those that are there.

A name always answers, with None where there is nothing: `out.loss`, `out["loss"]`. Index, slice, iteration and `len`
see only the fields that are there, as `to_tuple()`, in Hugging Face's order: `model(ids)[0]` are the logits and
`model(ids, labels=ids)[0]` is the loss. `keys`, `items`, `get` and `in` are about the names of these.

An instance is a named tuple of exactly the fields that are there, of a class below the one named here, so that it is a
pytree in JAX and a nest in TensorFlow as it is. PyTorch's are dictionaries too (`mistral_torch.outputs`).
"""

from __future__ import annotations

import functools
from collections import namedtuple
from collections.abc import ItemsView, Iterable, Iterator, KeysView, ValuesView
from typing import Any, Self, cast

from .arrays import AnyArray


class Output:
    """The fields of an output, by name whether there or not, and as a tuple of those that are there."""

    __slots__ = ()
    _fields: tuple[str, ...] = ()
    """All names of a class; of an instance those that are there."""
    _whole: type[Output]
    """The class of an instance that names all fields."""

    def __init_subclass__(cls, **options: Any) -> None:
        super().__init_subclass__(**options)
        if "_fields" not in vars(cls):
            cls._whole = cls
            cls._fields = tuple(vars(cls).get("__annotations__", ())) or cls._fields

    def __new__(cls, *values: Any, **named: Any) -> Self:
        """The output of these fields, in the order of the class or by name; None is a field that is not there."""
        given = fields_given(cls, values, named)
        return made(cls, tuple(given), given.values())

    def __getattr__(self, name: str) -> Any:
        if name in type(self)._whole._fields:
            return None  # what is there is found before this is asked
        raise AttributeError(f"{type(self).__name__} has no field {name!r}; it has {', '.join(self._whole._fields)}.")

    def __getitem__(self, key: Any) -> Any:
        if not isinstance(key, str):
            return self._tuple()[key]
        if key in self._whole._fields:
            return getattr(self, key)
        raise KeyError(f"{type(self).__name__} has no field {key!r}; it has {', '.join(self._whole._fields)}.")

    def __contains__(self, key: Any) -> bool:
        return key in self._asdict()

    def __reduce__(self) -> Any:
        return made, (self._whole, self._fields, self.to_tuple())

    def get(self, name: str, default: Any = None) -> Any:
        """A field, or a default where it is not there."""
        return self._asdict().get(name, default)

    def keys(self) -> KeysView[str]:
        """The names of the fields that are there."""
        return self._asdict().keys()

    def values(self) -> ValuesView[Any]:
        """The fields that are there."""
        return self._asdict().values()

    def items(self) -> ItemsView[str, Any]:
        """The fields that are there, with their names."""
        return self._asdict().items()

    def to_tuple(self) -> tuple[Any, ...]:
        """The fields that are there."""
        return self._tuple()

    def _asdict(self) -> dict[str, Any]:
        """Name -> field, of those that are there."""
        return dict(zip(self._fields, self.to_tuple(), strict=True))

    def _replace(self, **named: Any) -> Self:
        """The same output with other fields; None takes one away."""
        return cast(Any, self._whole)(**{**self._asdict(), **named})

    # An instance is a tuple

    def __len__(self) -> int:
        return tuple.__len__(cast(tuple[Any, ...], self))

    def __iter__(self) -> Iterator[Any]:
        return tuple.__iter__(cast(tuple[Any, ...], self))

    def _tuple(self) -> tuple[Any, ...]:
        return tuple.__getitem__(cast(tuple[Any, ...], self), slice(None))


def fields_given(cls: type[Output], values: Iterable[Any], named: dict[str, Any]) -> dict[str, Any]:
    """Name -> field in the order of the class, of those that are not None; raises TypeError for others."""
    by_place = dict(zip(cls._fields, values, strict=False))
    given = {**by_place, **named}
    if len(given) < len(by_place) + len(named) or not given.keys() <= set(cls._fields):
        raise TypeError(f"{cls.__name__} must be given each of {', '.join(cls._fields)} once, got {sorted(named)}.")
    return {name: given[name] for name in cls._fields if given.get(name) is not None}


def made(cls: type[Output], fields: tuple[str, ...], values: Iterable[Any]) -> Any:
    """An output of a class with exactly these fields, whatever their values."""
    return _kind(cast(Any, cls), fields)._make(values)


@functools.cache
def _kind(cls: type[Output], fields: tuple[str, ...]) -> Any:
    """The class of the outputs that have exactly these fields."""
    kind = namedtuple(cls.__name__, fields)  # type: ignore[misc]

    def new(own: Any, *values: Any) -> Any:
        if len(values) == 1 and isinstance(values[0], Iterator):  # as libraries make a tuple like another one
            values = tuple(values[0])
        return kind.__new__(own, *values)

    names = {"_fields": fields, "_whole": cls, "__new__": new, "__slots__": (), "__module__": cls.__module__}
    return type(cls.__name__, (cls, kind), names)


class ModelOutput(Output):
    """Of MistralModel."""

    __slots__ = ()

    last_hidden_state: AnyArray
    """[B, T, D], after the final norm."""
    past_key_values: Any
    hidden_states: tuple[AnyArray, ...] | None
    """L + 1 arrays [B, T, D]: the embeddings, then each layer's output, the last one after the final norm."""
    attentions: tuple[AnyArray, ...] | None
    """L arrays [B, N, T, S]: each layer's attention weights."""


class CausalLMOutput(Output):
    """Of MistralForCausalLM."""

    __slots__ = ()

    loss: AnyArray | None
    """Scalar float32: mean cross entropy of the next token where its label is not -100."""
    logits: AnyArray | None
    """[B, T, V] float32."""
    past_key_values: Any
    hidden_states: tuple[AnyArray, ...] | None
    attentions: tuple[AnyArray, ...] | None


class SequenceClassifierOutput(Output):
    """Of MistralForSequenceClassification."""

    __slots__ = ()

    loss: AnyArray | None
    logits: AnyArray | None
    """[B, C] float32, read at the last real token."""
    past_key_values: Any
    hidden_states: tuple[AnyArray, ...] | None
    attentions: tuple[AnyArray, ...] | None


class TokenClassifierOutput(Output):
    """Of MistralForTokenClassification."""

    __slots__ = ()

    loss: AnyArray | None
    logits: AnyArray | None
    """[B, T, C] float32."""
    hidden_states: tuple[AnyArray, ...] | None
    attentions: tuple[AnyArray, ...] | None


class QuestionAnsweringOutput(Output):
    """Of MistralForQuestionAnswering."""

    __slots__ = ()

    loss: AnyArray | None
    start_logits: AnyArray | None
    """[B, T] float32."""
    end_logits: AnyArray | None
    """[B, T] float32."""
    hidden_states: tuple[AnyArray, ...] | None
    attentions: tuple[AnyArray, ...] | None


class GenerateOutput(Output):
    """Of `generate(return_dict_in_generate=True)`; as the next call's past_key_values it continues where this ended."""

    __slots__ = ()

    sequences: AnyArray
    """[B, T + new]: prompt and continuation, ended rows padded; B rows, or num_return_sequences for each of them.
    After inputs_embeds alone, only what is new."""
    sequences_scores: AnyArray | None
    """[B] float32: of beams, the sum of log-probabilities over length ** length_penalty."""
    scores: tuple[AnyArray, ...] | None
    """[B, V] float32 for each new token: what it was chosen from, -inf for what could not come; of beams, a row for
    each beam that was running."""
    logits: tuple[AnyArray, ...] | None
    """[B, V] float32 for each new token: the model's own."""
    beam_indices: AnyArray | None
    """[B, new]: of beams, the row of `scores` that each new token was chosen from, -1 after the end."""
    attentions: tuple[tuple[AnyArray, ...], ...] | None
    """For each new token, L arrays: [B, N, T, T] of the prompt, then [B, N, 1, T + 1] and so on."""
    hidden_states: tuple[tuple[AnyArray, ...], ...] | None
    """For each new token, L + 1 arrays: [B, T, D] of the prompt, then [B, 1, D]."""
    past_key_values: Any
    """The cache of all tokens but the last of each row; None of beams."""
    attention_mask: AnyArray | None
    """[B, T + new]: 1 for real tokens."""
