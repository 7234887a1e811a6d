"""The names that transformers' Flax and TensorFlow models gave the table's tensors."""

from __future__ import annotations

from collections.abc import Callable, Iterable

from ...config import MistralConfig
from ...parameters import HEADS, Parameter, parameters


def flax_name(name: str, row: Parameter) -> str:
    """The path in a Flax tree: model/layers/0/mlp/up_proj/kernel."""
    *path, leaf = name.split(".")
    return "/".join([*path, _leaf(row, leaf, "embedding")])


def tf_name(name: str, row: Parameter) -> str:
    """The variable without the model's own name: model/layers.0/mlp/up_proj/kernel:0."""
    *path, leaf = name.split(".")
    return "/".join([*path, _leaf(row, leaf, "embeddings") + ":0"]).replace("/layers/", "/layers.")


def _leaf(row: Parameter, leaf: str, embedding: str) -> str:
    if row.kind == "embedding":
        return embedding
    return "kernel" if row.is_linear else leaf


def rows_by(
    namer: Callable[[str, Parameter], str | None], config: MistralConfig, *, prefix: str = ""
) -> dict[str, tuple[str, Parameter]]:
    """Name in the file -> (canonical name, row) of every class; `prefix` is what names of a bare model lack."""
    return {
        stored.removeprefix(prefix): (name, row)
        for architecture in HEADS
        for name, row in parameters(config.replace(tie_word_embeddings=False), architecture)
        if (stored := namer(name, row)) is not None
    }


def lacking(prefix: str, names: Iterable[str]) -> str:
    """The prefix where no name has it, as in files of a bare model, else nothing."""
    return "" if any(name.startswith(prefix) for name in names) else prefix
