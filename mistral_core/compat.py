"""How an object of ours answers isinstance questions about transformers' classes, without importing transformers.

Clients ask `isinstance(model, PreTrainedModel)` before they save a model, find its layers or freeze it, and
`isinstance(tokenizer, PreTrainedTokenizerBase)` before they take a tokenizer. Python asks an object's type first, and
then its attribute `__class__`, which may name another class: so do proxies and mocks.
"""

from __future__ import annotations

import copyreg
import functools
import sys
from typing import Any


class SeenAs:
    """An object that is also seen as an instance of another library's class, where that library is loaded.

    `type(x)` is what it was and nothing is inherited: what a client calls, our class must have.
    """

    seen_as: tuple[str, str]
    """The module and the name of the other class."""

    def __reduce_ex__(self, protocol: Any) -> Any:
        """What pickle and copy make it from; as usual, without their check that `__class__` is the type."""
        made: Any = super().__reduce_ex__(max(protocol, 2))
        return (_make, *made[1:]) if made[0] is copyreg.__newobj__ else made  # type: ignore[attr-defined]

    @property
    def __class__(self) -> Any:
        module, name = self.seen_as
        other = getattr(sys.modules.get(module), name, None)
        own: Any = type(self)
        return own if other is None else _both(own, other)

    @__class__.setter
    def __class__(self, own: type) -> None:
        object.__dict__["__class__"].__set__(self, own)


@functools.cache
def _both(own: type, other: type) -> type:
    """A class below both, of which there is never an instance, with the name of the first."""
    return type(own)(own.__name__, (own, other), {"__module__": own.__module__, "__qualname__": own.__qualname__})


def _make(cls: type, *arguments: Any) -> Any:
    return cls.__new__(cls, *arguments)
