"""What the Mistral classes of every framework share beside the mathematics: config, files, vocabulary, questions."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Mapping
from typing import Any, Self

import numpy as np

from ..compat.arguments import check_saving
from ..config import AssignableConfig, MistralConfig
from ..disk.files import PathLike
from ..errors import UnsupportedFeatureError
from ..generation import GenerationConfig
from ..parameters import BASE_PREFIX, HEADS, parameters, shapes
from ..quantization.matrix import PackedMatrix
from ..quantization.storage import Arrangement, arrangement_of
from . import push, saving
from .processes import Processes, written_by_first
from .resizing import VOCABULARY, resized_config, resized_rows


class Saved:
    """A model with a config, which is saved, pushed, asked and given another vocabulary.

    The class of a backend says how one array of it is read, set and given other rows, and what its parameters are:
    the methods that raise NotImplementedError here.
    """

    architecture: str
    """The name of the Mistral class that this one is, or extends."""
    generation_config: GenerationConfig

    def __init_subclass__(cls, **options: Any) -> None:
        super().__init_subclass__(**options)
        if cls.__name__ in HEADS:
            cls.architecture = cls.__name__

    # What a backend says

    def set_parameter(self, name: str, array: np.ndarray[Any, Any]) -> None:
        """Let the parameter of this canonical name hold an array."""
        raise NotImplementedError

    def _array(self, name: str) -> np.ndarray[Any, Any]:
        """What the parameter of this canonical name holds."""
        raise NotImplementedError

    def _with_adapter(self, path: PathLike) -> Self:
        """The model with the adapter of a directory."""
        raise NotImplementedError

    def _resize(self, name: str, rows: np.ndarray[Any, Any]) -> None:
        """Let a parameter hold another number of rows."""
        raise NotImplementedError

    def _parameters_of(self, only_trainable: bool) -> Iterable[Any]:
        """The parameters, each once."""
        raise NotImplementedError

    def _module(self, name: str) -> Any:
        """The part of the model that holds the tensor of this canonical name."""
        raise NotImplementedError

    def _own_name(self, name: str) -> str:
        """The bare model's own names lack the `model.` in front."""
        return name.removeprefix(BASE_PREFIX) if self.architecture == "MistralModel" else name

    def _replace_part(self, owner: Any, name: str, part: Any) -> None:
        setattr(owner, name, part)

    def _keep_config(self, config: AssignableConfig) -> None:
        self.base_model._config = config

    def _processes(self) -> Processes | None:
        """The processes that hold the model together; None where this one holds all of it."""
        return None

    # Matrices of few bits, each in a part that has a `matrix` in the place of a weight

    def packed_parts(self) -> Iterator[tuple[str, Any]]:
        """Yield (canonical name, part of the model) of every matrix of few bits, in table order."""
        for name, row in parameters(self.config, self.architecture):
            if row.is_linear and self._is_packed(name):
                yield name, self._module(name)

    def arrangements(self) -> dict[str, Arrangement]:
        """Canonical name -> how each matrix of few bits is packed."""
        return {name: arrangement_of(part.matrix) for name, part in self.packed_parts()}

    def _is_packed(self, name: str) -> bool:
        return hasattr(type(self._module(name)), "matrix")

    def _refuse_floats(self, name: str) -> None:
        """Raise UnsupportedFeatureError where a packed matrix would have to take floats."""
        if self._is_packed(name):
            raise UnsupportedFeatureError(
                f"{name} must be floats to be set, and is packed; call dequantize(model) first."
            )

    def _refuse_adapters(self, action: str) -> None:
        """Raise UnsupportedFeatureError where matrices would change under adapters (lora.py)."""
        names = dict(getattr(self, "peft_configs", None) or {})
        if names:
            raise UnsupportedFeatureError(
                f"{action}: the model has the adapter {', '.join(names)}, made for its matrices as they are; do it to "
                "a model without adapters, and add them afterwards."
            )

    # Config

    @property
    def config(self) -> AssignableConfig:
        """Sizes and numbers, the model's own view of them; an assignment to a field is checked."""
        view: AssignableConfig = self.base_model._config
        return view

    @config.setter
    def config(self, config: MistralConfig) -> None:
        config = MistralConfig.of(config)
        if hasattr(self.base_model, "_config"):
            self.config.become(config)
        else:
            self._keep_config(AssignableConfig.showing(config, is_built=True))

    @property
    def base_model(self) -> Any:
        """The MistralModel inside, or itself."""
        return getattr(self, "model", self)

    def as_tuple_if_asked(self, output: Any, return_dict: bool | None) -> Any:
        """The output as asked for: by name, or as a plain tuple without the Nones."""
        return output if (self.config.return_dict if return_dict is None else return_dict) else output.to_tuple()

    # Files

    def save_pretrained(
        self,
        directory: PathLike,
        *,
        max_shard_size: str | int = "5GB",
        overwrite: bool = True,
        **options: Any,
    ) -> None:
        """Write config, generation config and safetensors in one atomic step, verified before the swap.

        Files of other kinds that are already there stay. `options` are transformers' (safe_serialization=True); what
        they ask for and is not here raises UnsupportedFeatureError. Raises ConversionError and its kind.
        """
        check_saving(options)
        self._write(directory, self.named_tensors(), max_shard_size, overwrite, self._processes())

    def _write(
        self,
        directory: PathLike,
        tensors: Iterable[tuple[str, np.ndarray[Any, Any] | PackedMatrix]],
        max_shard_size: str | int,
        overwrite: bool,
        processes: Processes | None,
    ) -> None:
        def write(stream: Iterable[tuple[str, np.ndarray[Any, Any] | PackedMatrix]]) -> None:
            saving.save_pretrained(
                directory,
                self.config.value,
                stream,
                packed=arrangements,
                architecture=self.architecture,
                generation_config=self.generation_config,
                max_shard_size=max_shard_size,
                overwrite=overwrite,
            )

        arrangements = self.arrangements()
        if processes is None:
            write(tensors)
        else:
            written_by_first(processes, tensors, write)

    def push_to_hub(
        self,
        repo_id: str,
        *,
        private: bool | None = None,
        commit_message: str | None = None,
        revision: str | None = None,
        token: str | bool | None = None,
        create_pr: bool = False,
        max_shard_size: str | int = "5GB",
    ) -> str:
        """Upload what save_pretrained writes in one commit, and return its address.

        The repository, and the branch `revision`, are made if they are not there. Raises HubError and its kinds, and
        UnsupportedFeatureError where several processes hold the model.
        """
        if self._processes() is not None:
            raise UnsupportedFeatureError(
                "push_to_hub: several processes hold this model; call save_pretrained(directory) in all of them, then "
                "`mistral push` in one."
            )
        return push.save_and_push(
            lambda directory: self.save_pretrained(directory, max_shard_size=max_shard_size),
            repo_id,
            private=private,
            commit_message=commit_message,
            revision=revision,
            token=token,
            create_pr=create_pr,
        )

    def named_tensors(self) -> Iterator[tuple[str, np.ndarray[Any, Any] | PackedMatrix]]:
        """Yield (canonical name, NumPy array or matrix of few bits) of every tensor of the model, in table order."""
        packed = dict(self.packed_parts())
        for name, _ in parameters(self.config, self.architecture):
            yield name, packed[name].matrix if name in packed else self._array(name)

    def named_arrays(self) -> Iterator[tuple[str, np.ndarray[Any, Any]]]:
        """Yield (canonical name, NumPy array) of every tensor of the model, in table order, packed ones as floats."""
        for name, _ in parameters(self.config, self.architecture):
            yield name, self._array(name)

    def load_arrays(self, arrays: Mapping[str, Any]) -> Self:
        """Set every parameter from a mapping of canonical names to NumPy arrays."""
        for name, _ in parameters(self.config, self.architecture):
            self.set_parameter(name, np.array(arrays[name]))
        self.tie_weights()
        return self

    # What scripts written for transformers call

    @classmethod
    def can_generate(cls) -> bool:
        """Whether the class has `generate`."""
        return hasattr(cls, "generate")

    def num_parameters(self, *, only_trainable: bool = False, exclude_embeddings: bool = False) -> int:
        """How many numbers the model has; tied ones count once."""
        embedding = self.get_input_embeddings().weight
        floats = sum(
            math.prod(parameter.shape)
            for parameter in self._parameters_of(only_trainable)
            if not (exclude_embeddings and parameter is embedding)
        )
        return floats if only_trainable else floats + sum(math.prod(part.shape) for _, part in self.packed_parts())

    def get_input_embeddings(self) -> Any:
        """The embedding of token ids."""
        return self.base_model.embed_tokens

    def set_input_embeddings(self, value: Any) -> None:
        """Replace the embedding of token ids."""
        self._replace_part(self.base_model, "embed_tokens", value)
        self.tie_weights()

    def get_output_embeddings(self) -> Any:
        """The projection to the vocabulary; None where the class has none."""
        head = getattr(self, "lm_head", None)
        return self.get_input_embeddings() if head is None and hasattr(self, "lm_head") else head

    def set_output_embeddings(self, value: Any) -> None:
        """Replace the projection to the vocabulary."""
        self._replace_part(self, "lm_head", value)

    def resize_token_embeddings(self, new_num_tokens: int | None = None, pad_to_multiple_of: int | None = None) -> Any:
        """Give embedding and head rows for another number of tokens: old rows keep their bits, new ones are their mean.

        None keeps the number, to be rounded up to a multiple. Changes `config.vocab_size`; optimizers made before
        hold the old parameters. Raises ConfigError, UnsupportedFeatureError where the head is packed.
        """
        config = resized_config(self.config.value, new_num_tokens, pad_to_multiple_of)
        if config.vocab_size != self.config.vocab_size:
            self._refuse_adapters("resize_token_embeddings")
            names = VOCABULARY & shapes(config, self.architecture).keys()
            for name in names:
                self._refuse_floats(name)
            for name in names:
                self._resize(name, resized_rows(self._array(name), config.vocab_size))
            self.config.rebuilt(config)
            self.tie_weights()
        return self.get_input_embeddings()

    def tie_weights(self) -> None:
        """Make tied tensors one; where they always are, there is nothing to do."""

    def gradient_checkpointing_disable(self) -> None:
        """Keep activations again."""
        self.base_model.gradient_checkpointing = None
