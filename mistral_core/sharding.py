"""Which part of each array a device of a mesh holds: rules from axis letters to mesh axes, over the table.

A mesh is its axes' sizes by name, `{"data": 2, "tensor": 4}`; a framework's own mesh of devices has the same two facts.
A rule says which mesh axes cut a letter. Nothing here knows a framework: parts are slices and tuples of names.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

from .config import MistralConfig
from .errors import MeshError
from .parameters import Parameter, axis_sizes, parameters, shape_of

Rules = Mapping[str, str | Sequence[str] | None]
"""Letter -> the mesh axes that cut it, one, several or none, as a user says it."""

Spec = tuple[tuple[str, ...], ...]
"""For each axis of an array the mesh axes that cut it, the first one coarsest; none: every device has all of it."""

RULES: Mapping[str, tuple[str, ...]] = {
    "B": ("data", "fsdp"),
    "N": ("tensor",),
    "K": ("tensor",),
    "F": ("tensor",),
    "V": ("tensor",),
    "D": ("fsdp",),
}
"""Letter -> mesh axes where nothing else is asked for: rows of a batch over `data` and `fsdp`, heads, the MLP and the
vocabulary over `tensor` (Megatron, arXiv 1909.08053), what is left of each parameter over `fsdp` (ZeRO, 1910.02054)."""

LETTERS = {
    "B": "rows of the batch",
    "N": "query heads",
    "K": "key/value heads",
    "F": "intermediate size",
    "V": "vocabulary",
    "D": "hidden size",
}
"""The letters that a rule may cut, in words; the size of B is known in a call alone."""

ACTIVATIONS = "D"
"""What rules cut in parameters only: an activation's hidden size is whole wherever a norm reads it."""


@dataclass(frozen=True)
class Sharding:
    """A model's config on a mesh under rules, checked: every letter that is cut divides, heads as heads."""

    config: MistralConfig
    mesh: Mapping[str, int]
    rules: Mapping[str, tuple[str, ...]]

    @classmethod
    def of(
        cls,
        config: MistralConfig,
        mesh: Mapping[str, int],
        rules: Rules | None = None,
    ) -> Sharding:
        """The sharding of a config on a mesh; `rules` replace `RULES` letter by letter, None or () cuts nothing.

        Where fewer key/value heads than parts are there, and they divide the parts, several devices hold the same ones.
        Raises MeshError for a size that does not divide, with those that would; for a mesh axis that no rule uses and
        a rule of one that is not there.
        """
        asked = {letter: _names(axes) for letter, axes in (rules or {}).items()}
        _check_rules(asked, mesh)
        chosen = {letter: tuple(axis for axis in axes if axis in mesh) for letter, axes in RULES.items()} | asked
        unused = [axis for axis, size in mesh.items() if size > 1 and axis not in set().union(*chosen.values())]
        if unused:
            raise MeshError(
                f"mesh axes must be named by a rule, got {_sizes(mesh)} and rules "
                f"{ {letter: axes for letter, axes in chosen.items() if axes} }; name them data, fsdp and tensor, or "
                f"give rules that use {', '.join(unused)}."
            )
        sharding = cls(config, dict(mesh), chosen)
        sharding._check_sizes()
        return sharding

    def parts(self, letter: str) -> int:
        """Into how many parts a letter is cut."""
        return math.prod(self.mesh[axis] for axis in self.rules.get(letter, ()))

    @property
    def repeats(self) -> int:
        """How many devices beside each other, of those that share out query heads, hold the same key/value heads."""
        return max(1, self.parts("K") // self.config.num_key_value_heads)

    def parameter(self, row: Parameter) -> Spec:
        """How a parameter is cut; key/value heads that are fewer than their parts are named as whole."""
        return self._spec([axis[0] for axis in row.axes])

    def activation(self, letters: str, sizes: Mapping[str, int] | None = None) -> Spec:
        """How an activation of these axis letters is cut: `"BTD"`, `"BTNH"`, or `"BRKH"` for a cache.

        A batch that its parts do not divide, by `sizes`, is whole on every device.
        """
        spec = self._spec(["" if letter in ACTIVATIONS else letter for letter in letters])
        whole = sizes is not None and sizes["B"] % self.parts("B")
        return tuple(() if letter == "B" and whole else axes for letter, axes in zip(letters, spec, strict=True))

    def shape(self, row: Parameter) -> tuple[int, ...]:
        """The shape of what one device holds of a parameter."""
        return tuple(part.stop - part.start for part in self.part(row, {}))

    def part(self, row: Parameter, coordinates: Mapping[str, int]) -> tuple[slice, ...]:
        """Which slice of each axis the device at these coordinates of the mesh (0 where none are given) holds."""
        letters = [axis[0] for axis in row.axes]
        index = []
        for letter, axes, size in zip(letters, self._cuts(letters), shape_of(row, self.config), strict=True):
            count, place = self._place(axes, coordinates)
            if letter == "K":
                count, place = count // self.repeats, place // self.repeats
            index.append(slice(place * size // count, (place + 1) * size // count))
        return tuple(index)

    def coordinates(self) -> Iterator[dict[str, int]]:
        """The coordinates of every device, the last mesh axis fastest."""
        for number in range(math.prod(self.mesh.values())):
            place = {}
            for axis, size in reversed(list(self.mesh.items())):
                number, place[axis] = divmod(number, size)
            yield place

    def table(self, architecture: str = "MistralForCausalLM") -> Iterator[tuple[str, Parameter, Spec]]:
        """Yield (full name, row, how it is cut) of every parameter of a class."""
        return ((name, row, self.parameter(row)) for name, row in parameters(self.config, architecture))

    def _spec(self, letters: Sequence[str]) -> Spec:
        """The mesh axes that cut each letter evenly: key/value heads that several devices repeat are whole."""
        whole = self.repeats > 1
        return tuple(
            () if letter == "K" and whole else axes for letter, axes in zip(letters, self._cuts(letters), strict=True)
        )

    def _cuts(self, letters: Sequence[str]) -> Spec:
        """The mesh axes of each letter; a mesh axis cuts an array once, for the first letter that asks."""
        taken: set[str] = set()
        cuts = []
        for letter in letters:
            axes = tuple(axis for axis in self.rules.get(letter, ()) if axis not in taken)
            taken.update(axes)
            cuts.append(axes)
        return tuple(cuts)

    def _place(self, axes: tuple[str, ...], coordinates: Mapping[str, int]) -> tuple[int, int]:
        """Into how many parts mesh axes cut, and which of them is at some coordinates."""
        place = 0
        for axis in axes:
            place = place * self.mesh[axis] + coordinates.get(axis, 0)
        return math.prod(self.mesh[axis] for axis in axes), place

    def _check_sizes(self) -> None:
        sizes = axis_sizes(self.config)
        cut = [letter for letter in LETTERS if letter in sizes]
        wrong = [letter for letter in cut if not _divides(letter, sizes[letter], self.parts(letter))]
        if wrong:
            told = ", ".join(
                f"{letter}={sizes[letter]} ({LETTERS[letter]}) by {self.parts(letter)}" for letter in wrong
            )
            raise MeshError(
                f"mesh must divide what it cuts, got {_sizes(self.mesh)}, which cuts {told}; {self._advice(wrong)}"
            )

    def _advice(self, wrong: Sequence[str]) -> str:
        """What would fit, axis by axis, and what else can be done."""
        advice = []
        for axis in {axis: None for letter in wrong for axis in self.rules[letter]}:
            fitting = [str(size) for size in range(1, 257) if self._fits(axis, size)]
            advice.append(f"{axis} may be {', '.join(fitting)}")
        if "V" in wrong:
            advice.append(
                f"model.resize_token_embeddings({self.config.vocab_size}, pad_to_multiple_of={self.parts('V')}) makes "
                "the vocabulary fit, and the rule {'V': None} leaves it whole"
            )
        return "; ".join(advice) + "."

    def _fits(self, axis: str, size: int) -> bool:
        """Whether all that an axis cuts would divide if it had another size and the others theirs."""
        sizes, mesh = axis_sizes(self.config), {**self.mesh, axis: size}
        return all(
            _divides(letter, sizes[letter], math.prod(mesh[other] for other in axes))
            for letter, axes in self.rules.items()
            if axis in axes and letter in sizes
        )


def _divides(letter: str, size: int, parts: int) -> bool:
    """Whether a letter can be cut: key/value heads also into more parts than there are, so many to a head."""
    return size % parts == 0 or (letter == "K" and parts % size == 0)


def _check_rules(rules: Mapping[str, tuple[str, ...]], mesh: Mapping[str, int]) -> None:
    for letter, axes in rules.items():
        if letter not in LETTERS:
            raise MeshError(f"rules must be of the letters {', '.join(LETTERS)}, got {letter!r}.")
        missing = [axis for axis in axes if axis not in mesh]
        if missing:
            raise MeshError(
                f"rules must name axes of the mesh, got {letter!r} over {', '.join(missing)}; the mesh is "
                f"{_sizes(mesh)}."
            )
        if len(set(axes)) < len(axes):
            raise MeshError(f"a rule must name a mesh axis once, got {letter!r} over {axes}.")


def _names(axes: str | Sequence[str] | None) -> tuple[str, ...]:
    return () if axes is None else (axes,) if isinstance(axes, str) else tuple(axes)


def _sizes(mesh: Mapping[str, int]) -> str:
    return ",".join(f"{axis}={size}" for axis, size in mesh.items())
