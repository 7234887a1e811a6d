"""What the three frameworks say and refuse alike of models with adapters: numbers to begin with, names, merges."""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, NoReturn

from ..errors import ConfigError, UnsupportedFeatureError
from .adapter import Adapter, initial_weights, row_norms
from .config import LoraConfig


def fresh(model: Any, config: LoraConfig | None, *, seed: int) -> Adapter:
    """A new adapter of a model, which changes nothing yet; raises ConfigError, UnsupportedFeatureError."""
    lora = (config or LoraConfig()).for_model(model.config.value, model.architecture)
    if lora.base_model_name_or_path is None:
        lora = dataclasses.replace(lora, base_model_name_or_path=model.config.name_or_path or None)
    weights = {}
    for name, target in lora.targets(model.config.value, model.architecture).items():
        weights[name] = initial_weights(target, model.config.value, lora, seed=seed)
        if lora.use_dora:
            weights[name] = weights[name]._replace(magnitude=row_norms(model._array(name)))
    saved = {name: model._array(name) for name, _ in lora.saved(model.config.value, model.architecture)}
    return Adapter(lora, weights, saved)


def check_new(name: str, configs: Mapping[str, LoraConfig]) -> None:
    """Raise ConfigError for what is no name of one more adapter."""
    if not name.isidentifier():
        raise ConfigError(f"name must be a word, letters and digits and _, got {name!r}.")
    if name in configs:
        raise ConfigError(f"name must be new, got {name!r}; the model has an adapter of that name.")


def named(name: str, configs: Mapping[str, LoraConfig]) -> LoraConfig:
    """The config of an adapter; raises ConfigError for a name that is not there."""
    if name not in configs:
        there = ", ".join(configs) or "none"
        raise ConfigError(f"name must be that of an adapter, got {name!r}; the model has {there}.")
    return configs[name]


@contextlib.contextmanager
def disabled(parts: Sequence[Any]) -> Iterator[None]:
    """A context in which no part with adapters adds any; raises ConfigError where one is merged."""
    refuse_merged(parts)
    active = [part.active for part in parts]
    for part in parts:
        part.active = ()
    try:
        yield
    finally:
        for part, before in zip(parts, active, strict=True):
            part.active = before


def refuse_merged(parts: Sequence[Any]) -> None:
    """Raise ConfigError where an adapter is merged, before anything is changed."""
    for part in parts:
        if part.merged:
            raise ConfigError(f"the adapter {', '.join(part.merged)} is merged; call unmerge(model) first.")


def refuse_part(name: str, part: Any) -> NoReturn:
    """Raise UnsupportedFeatureError for a part that is not one of ours."""
    raise UnsupportedFeatureError(
        f"{name}: adapters go to the modules that models here are made of, got {type(part).__name__}; add them before "
        "anything wraps it."
    )


def refuse_merging(model: Any, name: str, part: Any, *, is_packed: bool, is_embedding: bool) -> None:
    """Raise UnsupportedFeatureError for a packed matrix, and for an embedding that is the head too."""
    if is_packed:
        raise UnsupportedFeatureError(
            f"merge: {name} is packed, and a change smaller than its steps would vanish; load the base as floats, "
            "with quantization='dequantize', or load the one that it was made of."
        )
    is_head_too = is_embedding and model.config.tie_word_embeddings and model.get_output_embeddings() is not None
    if is_head_too and any(each in part.lora or each in part.saved for each in part.active):
        raise UnsupportedFeatureError(
            "merge: embed_tokens is the head too, which the adapter leaves alone; load the base with "
            "tie_word_embeddings=False, or leave the adapter beside the model."
        )
