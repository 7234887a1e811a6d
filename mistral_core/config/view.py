"""A config whose fields can be assigned, for code that does so: a model's own, and AutoConfig's."""

from __future__ import annotations

import functools
from collections.abc import Mapping
from typing import Any, Self

from ..errors import ConfigError
from .config import MistralConfig

BUILT_IN = (
    "vocab_size",
    "hidden_size",
    "intermediate_size",
    "num_hidden_layers",
    "num_attention_heads",
    "num_key_value_heads",
    "head_dim",
    "rms_norm_eps",
    "tie_word_embeddings",
    "attention_dropout",
    "num_labels",
    "layer_windows",
)
"""What a model takes from its config when it is made; everything else it asks when it is called."""


class AssignableConfig(MistralConfig):
    """A view of a MistralConfig, its `value`: an assignment makes another one, with all checks, and shows that.

    So training loops write `model.config.use_cache = False`, and code for transformers
    `config = AutoConfig.from_pretrained(path); config.num_labels = 3`. A model's own view refuses what the model is
    built of. A view equals what it shows and, as it changes, has no hash. Raises ConfigError.
    """

    # To type checkers the fields of a value are read-only; these can be assigned in a model's view too.
    max_position_embeddings: int
    initializer_range: float
    use_cache: bool
    pad_token_id: int | None
    bos_token_id: int | None
    eos_token_id: int | tuple[int, ...] | None
    rope_theta: float
    rope_scaling: Mapping[str, Any] | None
    id2label: Mapping[int, str] | None
    label2id: Mapping[str, int] | None
    problem_type: str | None
    classifier_dropout: float
    dtype: str | None
    output_attentions: bool
    output_hidden_states: bool
    return_dict: bool
    architectures: tuple[str, ...] | None
    extra: Mapping[str, Any]

    _value: MistralConfig
    _is_built: bool

    @functools.wraps(MistralConfig.__init__)  # type: ignore[misc]  # mypy knows no decorated constructor
    def __init__(self, *values: Any, **fields: Any) -> None:
        self._show(MistralConfig(*values, **fields), is_built=False)

    @classmethod
    def showing(cls, config: MistralConfig, *, is_built: bool = False) -> Self:
        """A view of a config; `is_built` where it is a model's, which is built of it."""
        view = cls.__new__(cls)
        view._show(config, is_built)
        return view

    @property
    def value(self) -> MistralConfig:
        """The config that is shown now, frozen and hashable."""
        return self._value

    def __setattr__(self, name: str, value: Any) -> None:
        self.become(self.value.replace(**{name: value}))

    def become(self, config: MistralConfig) -> None:
        """Show another config; raises ConfigError where a model is built of this one and cannot have the other."""
        values = {name: (getattr(self, name), getattr(config, name)) for name in BUILT_IN if self._is_built}
        differ = [
            f"{name}={would!r}, but it was built with {was!r}" for name, (was, would) in values.items() if was != would
        ]
        if differ:
            raise ConfigError(f"the model's config: {'; '.join(differ)}. Make or load a model with what you want.")
        self._show(config, self._is_built)

    def rebuilt(self, config: MistralConfig) -> None:
        """Show another config that the model was changed to by the caller."""
        self._show(config, self._is_built)

    def _show(self, config: MistralConfig, is_built: bool) -> None:
        shown = {**vars(config.value), "_facts": config._facts, "_value": config.value, "_is_built": is_built}
        for name in vars(self).keys() - shown.keys():
            del vars(self)[name]
        vars(self).update(shown)  # of the same size, if only values change: clients assign while they go through it

    def replace(self, **changes: Any) -> AssignableConfig:
        """A view that no model is built of, of the config with some fields changed."""
        return AssignableConfig.showing(self.value.replace(**changes))

    def __eq__(self, other: object) -> bool:
        return isinstance(other, MistralConfig) and self.value == other.value
