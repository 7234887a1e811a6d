"""What a model returns in PyTorch: the outputs of `mistral_core.outputs` as dictionaries of the fields that are there.

Trainers, pipelines and wrappers written for transformers ask `isinstance(outputs, dict)` and take an output apart by
its `items()`, leaving out the cache. Index, slice, iteration and `len` are those of a tuple all the same. A field may
be one that is computed when it is read: by name, by place, or in a tuple; `items()` and `values()` hand it on unread,
so that what wraps a model and makes its outputs anew does not read what nobody asks for.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any, Self

from torch.utils import _pytree as pytree

from mistral_core import outputs
from mistral_core.outputs import fields_given


class Later:
    """A field that is computed when it is read, and kept from then on."""

    def __init__(self, compute: Callable[[], Any]) -> None:
        self.compute = compute

    def __repr__(self) -> str:
        return "computed when read"


class Dictionary(OrderedDict[str, Any]):
    """The fields that are there by name; a field that is not there is None."""

    _fields: tuple[str, ...]
    _yields_names = False
    """Whether iteration gives the names, as a dictionary's does: so torch's `gather` takes a replica's output apart."""

    def __new__(cls, *values: Any, **named: Any) -> Self:
        return OrderedDict.__new__(cls)

    def __init__(self, *values: Any, **named: Any) -> None:
        """The output of these fields, in the order of the class, by name, or of one mapping or its items."""
        super().__init__()
        if len(values) == 1 and _is_mapping(values[0]) and not named:  # as libraries make one anew
            values, named = (), dict(values[0])
        for name, value in fields_given(type(self), values, named).items():
            super().__setitem__(name, value)

    def __init_subclass__(cls, **options: Any) -> None:
        super().__init_subclass__(**options)
        pytree.register_pytree_node(
            cls,
            lambda output: (list(output.values()), list(output.keys())),
            lambda values, names: cls._made(names, values),
            serialized_type_name=f"{cls.__module__}.{cls.__qualname__}",
            flatten_with_keys_fn=lambda output: (
                [(pytree.MappingKey(name), value) for name, value in output.items()],
                list(output.keys()),
            ),
        )

    @classmethod
    def _made(cls, names: Iterable[str], values: Iterable[Any]) -> Self:
        output = cls()
        for name, value in zip(names, values, strict=True):
            output[name] = value
        return output

    def __getattr__(self, name: str) -> Any:
        if name in type(self)._fields:
            return self.get(name)
        raise AttributeError(f"{type(self).__name__} has no field {name!r}; it has {', '.join(self._fields)}.")

    def __setattr__(self, name: str, value: Any) -> None:
        if name not in type(self)._fields:
            super().__setattr__(name, value)
        elif value is None:
            self.pop(name, None)
        else:
            self[name] = value

    def __getitem__(self, key: Any) -> Any:
        if not isinstance(key, str):
            return self.to_tuple()[key]
        if key in self._fields:
            return self.get(key)
        raise KeyError(f"{type(self).__name__} has no field {key!r}; it has {', '.join(self._fields)}.")

    def __iter__(self) -> Iterator[Any]:
        return iter(self.keys() if self._yields_names else self.to_tuple())

    def __repr__(self) -> str:
        return f"{type(self).__name__}({', '.join(f'{name}={value!r}' for name, value in self.items())})"

    def get(self, name: str, default: Any = None) -> Any:
        """A field, or a default where it is not there."""
        value = super().get(name, default)
        if isinstance(value, Later):
            value = self[name] = value.compute()
        return value

    def to_tuple(self) -> tuple[Any, ...]:
        """The fields that are there."""
        return tuple(self.get(name) for name in self.keys())

    def _asdict(self) -> dict[str, Any]:
        """Name -> field, of those that are there."""
        return dict(self.items())

    def _replace(self, **named: Any) -> Self:
        """The same output with other fields; None takes one away."""
        return type(self)(**{**self._asdict(), **named})


def _is_mapping(value: Any) -> bool:
    """Whether it is a mapping, or its items: an iterator of them, or a tuple of pairs that begin with a name."""
    if isinstance(value, tuple) and value:
        return all(isinstance(item, tuple) and len(item) == 2 and isinstance(item[0], str) for item in value)
    return isinstance(value, Mapping | Iterator)


class ModelOutput(Dictionary, outputs.ModelOutput):
    """Of MistralModel."""


class CausalLMOutput(Dictionary, outputs.CausalLMOutput):
    """Of MistralForCausalLM."""


class SequenceClassifierOutput(Dictionary, outputs.SequenceClassifierOutput):
    """Of MistralForSequenceClassification."""


class TokenClassifierOutput(Dictionary, outputs.TokenClassifierOutput):
    """Of MistralForTokenClassification."""


class QuestionAnsweringOutput(Dictionary, outputs.QuestionAnsweringOutput):
    """Of MistralForQuestionAnswering."""
