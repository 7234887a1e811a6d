"""transformers' TensorFlow classes by name and interface: code written for them migrates by its import line.

They are this package's own classes, of which an instance is one in every respect, with the names, the order and the
defaults of the arguments of transformers 4.56. What means nothing here is taken with the value that changes nothing,
and refused with advice otherwise.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from typing import Any, Self

import keras
import tensorflow as tf
from tensorflow import Tensor

from mistral_core import MistralConfig
from mistral_core.compat.clients import path_by_either_name
from mistral_core.config import AssignableConfig
from mistral_core.errors import UnsupportedFeatureError

from .auto import AutoModel
from .heads import MistralForCausalLM, MistralForSequenceClassification
from .model import MistralModel
from .saving import served
from .weights import PreTrainedModel

OWN_LOSS = ("auto", "auto_with_warning", "passthrough")
"""transformers' names of the model's own loss."""


class TFMistralPreTrainedModel(PreTrainedModel):
    """What differs from this package's classes: what `from_pretrained` loads into, and arguments by position."""

    base_model_prefix = "model"
    config_class = AssignableConfig

    @classmethod
    @path_by_either_name
    def from_pretrained(
        cls,
        path: str | os.PathLike[str],
        *,
        config: MistralConfig | str | os.PathLike[str] | None = None,
        dtype: Any = None,
        **options: Any,
    ) -> Self:
        """Load a checkpoint in Keras' global policy, float32 unless it was set; dtype="auto" keeps the file's own.

        Options and errors are those of the class's own `from_pretrained`.
        """
        if isinstance(config, str | os.PathLike):
            config = MistralConfig.from_pretrained(config)
        if dtype is None and options.get("torch_dtype") is None:
            dtype = keras.config.dtype_policy()
        return super().from_pretrained(path, config=config, dtype=dtype, **options)

    def save_pretrained(
        self,
        save_directory: str | os.PathLike[str],
        saved_model: bool = False,
        version: int = 1,
        push_to_hub: bool = False,
        signatures: Any = None,
        max_shard_size: str | int = "5GB",
        create_pr: bool = False,
        safe_serialization: bool = True,
        token: Any = None,
        **options: Any,
    ) -> None:
        """Write config and safetensors as the class's own `save_pretrained` does, with its errors.

        `version` and `signatures` belong to `saved_model`, `create_pr` and `token` to `push_to_hub`, both refused.
        """
        options |= {"saved_model": saved_model, "push_to_hub": push_to_hub, "safe_serialization": safe_serialization}
        super().save_pretrained(save_directory, max_shard_size=max_shard_size, **options)

    @classmethod
    def from_config(cls, config: MistralConfig | Mapping[str, Any], **options: Any) -> Self:
        """A model with fresh weights of a config, or of what `get_config` returned."""
        kept = isinstance(config, Mapping) and "config" in config
        return super().from_config(config, **options) if kept else cls(config, **options)

    def compile(
        self, optimizer: Any = "rmsprop", loss: Any = None, metrics: Any = None, *arguments: Any, **options: Any
    ) -> None:
        """keras.Model.compile; without a loss, and with transformers' names of it, it is the model's own."""
        options |= dict(zip(("loss_weights", "weighted_metrics", "run_eagerly"), arguments, strict=False))
        loss = None if isinstance(loss, str) and loss in OWN_LOSS else loss
        super().compile(optimizer, loss, metrics=metrics, **options)

    def prepare_tf_dataset(self, *arguments: Any, **options: Any) -> Any:
        """Raises UnsupportedFeatureError: the dataset itself does it."""
        raise UnsupportedFeatureError(
            "prepare_tf_dataset: write dataset.to_tf_dataset(columns=['input_ids', 'attention_mask'], "
            "label_cols='labels', batch_size=..., shuffle=..., collate_fn=...), which fit takes."
        )

    def num_parameters(self, only_trainable: bool = False, **options: Any) -> int:
        """How many numbers the model has; tied ones count once."""
        return super().num_parameters(only_trainable=only_trainable, **options)

    @property
    def input_signature(self) -> dict[str, tf.TensorSpec]:
        """Name -> shape [B, T] of any size and dtype of what a call takes at least."""
        return {name: tf.TensorSpec([None, None], tf.int32, name) for name in ("input_ids", "attention_mask")}

    @property
    def dummy_inputs(self) -> dict[str, Tensor]:
        """Token ids [3, 5] to call a model with."""
        return {"input_ids": tf.constant([[7, 6, 0, 0, 1], [1, 2, 3, 0, 0], [0, 0, 0, 4, 5]], tf.int32)}

    def serving_output(self, output: Any) -> dict[str, Tensor]:
        """What a SavedModel gives of an output: named tensors, those of all layers as one, without the cache."""
        return served(output)

    def get_lm_head(self) -> Any:
        """The projection to the vocabulary; None where the class has none."""
        return self.get_output_embeddings()

    def get_bias(self) -> None:
        """None: a Mistral's projection to the vocabulary has no bias."""


class TFMistralModel(TFMistralPreTrainedModel, MistralModel):
    """MistralModel as transformers' TensorFlow class of this name."""


class TFMistralForCausalLM(TFMistralPreTrainedModel, MistralForCausalLM):
    """MistralForCausalLM as transformers' TensorFlow class of this name."""


class TFMistralForSequenceClassification(TFMistralPreTrainedModel, MistralForSequenceClassification):
    """MistralForSequenceClassification as transformers' TensorFlow class of this name."""


class TFAutoModel(AutoModel):
    """TFMistralModel, by `from_pretrained` or `from_config`."""

    model_class = TFMistralModel


class TFAutoModelForCausalLM(AutoModel):
    """TFMistralForCausalLM, by `from_pretrained` or `from_config`."""

    model_class = TFMistralForCausalLM


class TFAutoModelForSequenceClassification(AutoModel):
    """TFMistralForSequenceClassification, by `from_pretrained` or `from_config`."""

    model_class = TFMistralForSequenceClassification
