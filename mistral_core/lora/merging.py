"""An adapter folded into its base as the base is read: one matrix at a time, rounded once."""

from __future__ import annotations

import os
from collections.abc import Mapping

import numpy as np

from ..arrays import Array
from ..config import MistralConfig
from ..errors import UnsupportedFeatureError
from ..parameters import LM_HEAD, parameters
from .adapter import Adapter, folded, load
from .config import TASK_OF, TASKS, LoraTarget

EMBEDDING = "model.embed_tokens.weight"


class Merging:
    """The tensors of a base with an adapter folded in, by canonical name."""

    def __init__(self, path: str | os.PathLike[str], config: MistralConfig, architecture: str) -> None:
        """Read the adapter; raises what `adapter.load` raises, UnsupportedFeatureError for one of another class."""
        self.adapter: Adapter = load(path, config, architecture)
        asked = self.adapter.config.task_type
        if asked not in (None, TASKS[architecture]):
            raise UnsupportedFeatureError(
                f"{path}: its task_type is {asked}, and the base is a {architecture}; load the adapter with "
                f"{TASK_OF.get(asked, 'its own class')}, merge and save the model."
            )
        self.targets: Mapping[str, LoraTarget] = self.adapter.config.targets(config, architecture)
        self.changed = frozenset({*self.targets, *self.adapter.saved, *self.adapter.base})
        tied = config.tie_word_embeddings and LM_HEAD not in dict(parameters(config, architecture))
        self.unties = tied and architecture == "MistralForCausalLM" and EMBEDDING in self.changed
        self.config = config.replace(tie_word_embeddings=False) if self.unties else config

    def tensor(self, name: str, array: Array, dtype: np.dtype) -> Array:
        """A tensor of the merged model in a dtype, of that of the base; one that nothing changes as it is."""
        if name not in self.changed:
            return array
        array = self.adapter.saved.get(name, self.adapter.base.get(name, array))
        if name in self.targets:
            return folded(array, self.adapter.weights[name], self.targets[name].scaling, dtype)
        return array.astype(dtype)
