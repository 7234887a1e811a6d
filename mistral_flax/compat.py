"""transformers' Flax classes by name and interface, thinly adapted: code written for them migrates by its import line.

Names, order and defaults of arguments are those of transformers 4.56. An argument that means nothing here is taken
with the value that changes nothing, and refused with advice otherwise.
"""

from __future__ import annotations

import dataclasses
import os
from dataclasses import dataclass
from typing import Any, NamedTuple, Self

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax import Array

from mistral_core import GenerationConfig, MistralConfig
from mistral_core.compat.clients import path_by_either_name
from mistral_core.config import AssignableConfig
from mistral_core.errors import InputError, MissingTensorsError
from mistral_core.generation.hooks import with_length

from .arrays import as_dtype, is_traced
from .auto import AutoModel
from .cache import KVCache
from .heads import MistralForCausalLM
from .model import MistralModel
from .weights import OWN, PreTrainedModel

Params = dict[str, Array]
"""Hugging Face name -> array."""


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class FlaxCache:
    """What `init_cache` returns: a KVCache, and how many columns it was given, padding included."""

    cache: KVCache
    columns: Array
    """Scalar int32."""

    def mask_so_far(self, attention_mask: Any, new: int) -> Any:
        """Of a mask [B, max_length] over all columns to come, those up to the `new` ones; another mask as it is."""
        if attention_mask is None:
            return None
        mask = jnp.atleast_2d(jnp.asarray(attention_mask))
        if mask.shape[1] != self.cache.capacity:
            return mask
        if is_traced(self.columns):  # no number to cut at: the new columns alone
            return jax.lax.dynamic_slice_in_dim(mask, self.columns, new, axis=1)
        return mask[:, : int(self.columns) + new]


class FlaxGenerateOutput(NamedTuple):
    """What `generate` returns."""

    sequences: Array
    """[B, max_length] int32: prompt, new tokens, padding."""

    def __getitem__(self, key: Any) -> Any:
        return getattr(self, key) if isinstance(key, str) else tuple.__getitem__(self, key)


class FlaxMistralPreTrainedModel:
    """What the two models share.

    `params` is flat, Hugging Face name -> array [out, in]: `params["model.layers.0.self_attn.q_proj.weight"]`, where
    transformers had nested dicts of kernels [in, out],
    `params["model"]["layers"]["0"]["self_attn"]["q_proj"]["kernel"]`. `module` is the nnx.Module inside. Without
    positions, they come from the mask. With `_do_init=False` the model has shapes only and every call needs `params`.
    """

    model_class: type[PreTrainedModel]
    framework = "flax"
    main_input_name = "input_ids"
    base_model_prefix = "model"
    config_class = AssignableConfig

    def __init__(
        self,
        config: MistralConfig,
        input_shape: tuple[int, ...] = (1, 1),
        seed: int = 0,
        dtype: Any = jnp.float32,
        _do_init: bool = True,
        **options: Any,
    ) -> None:
        self.key, self.input_shape = jax.random.PRNGKey(seed), input_shape
        self._is_initialized = _do_init

        def build() -> PreTrainedModel:
            given = {"param_dtype": jnp.float32, "rngs": nnx.Rngs(self.key), **options}
            return self.model_class(config, dtype=dtype, **given)

        self.module = build() if _do_init else nnx.eval_shape(build)

    @classmethod
    @path_by_either_name
    def from_pretrained(
        cls,
        path: str | os.PathLike[str],
        dtype: Any = jnp.float32,
        *,
        config: MistralConfig | str | os.PathLike[str] | None = None,
        input_shape: tuple[int, ...] = (1, 1),
        seed: int = 0,
        _do_init: bool = True,
        **options: Any,
    ) -> Self | tuple[Self, Params]:
        """Load a checkpoint to compute in `dtype`; parameters keep the file's. Without `_do_init`, (model, params).

        Options and errors are those of the class's own `from_pretrained`.
        """
        if isinstance(config, str | os.PathLike):
            config = MistralConfig.from_pretrained(config)
        module = cls.model_class.from_pretrained(path, config=config, seed=seed, **options)
        module.base_model.embed_tokens.dtype = as_dtype(dtype)
        model = cls(module.config, input_shape, seed, dtype, _do_init=False)
        model._is_initialized = _do_init
        if _do_init:
            model.module = module
            return model
        graph, state, others = nnx.split(module, OWN, ...)  # packed matrices are no parameters, and stay
        model.module = nnx.merge(graph, jax.eval_shape(lambda: state), others)
        return model, module.params

    def save_pretrained(
        self, save_directory: str | os.PathLike[str], params: Params | None = None, *, token: Any = None, **options: Any
    ) -> None:
        """Write these parameters, or the model's own; options and errors are those of the class's `save_pretrained`."""
        self._over(params).save_pretrained(save_directory, **options)

    def init_weights(self, rng: Array, input_shape: tuple[int, ...] = (1, 1), params: Params | None = None) -> Params:
        """Fresh parameters, those given in their places; `input_shape` changes nothing."""
        build = {"dtype": self.dtype, "param_dtype": self.module.param_dtype, "rngs": nnx.Rngs(rng)}
        return {**self.model_class(self.config, **build).params, **(params or {})}

    def init_cache(self, batch_size: int, max_length: int) -> FlaxCache:
        """An empty cache for `max_length` columns; windowed layers keep their window only."""
        cache = KVCache.allocate(self.config, batch_size, max_length, dtype=self.dtype)
        return FlaxCache(cache, jnp.zeros((), jnp.int32))

    def __call__(
        self,
        input_ids: Any,
        attention_mask: Any = None,
        position_ids: Any = None,
        params: Params | None = None,
        past_key_values: FlaxCache | None = None,
        dropout_rng: Array | None = None,
        train: bool = False,
        output_attentions: bool | None = None,
        output_hidden_states: bool | None = None,
        return_dict: bool | None = None,
    ) -> Any:
        """The outputs of the module; `attention_mask` is [B, T], or [B, max_length] with a cache of `init_cache`.

        With `train`, dropout is on where the config has any. Raises InputError and its kinds.
        """
        past = past_key_values
        if past is not None and not isinstance(past, FlaxCache):
            raise InputError(f"past_key_values must be what init_cache returns, got {type(past).__name__}.")
        if train and dropout_rng is None and self.config.attention_dropout:
            raise InputError("dropout_rng must be a key where train=True asks for dropout, got None.")
        if position_ids is not None:  # in transformers' loops padding is at -1
            position_ids = jnp.maximum(jnp.asarray(position_ids), 0)
        columns = jnp.shape(input_ids)[-1]
        out = self._over(params)(
            input_ids,
            attention_mask if past is None else past.mask_so_far(attention_mask, columns),
            position_ids,
            None if past is None else past.cache,
            use_cache=past is not None,
            rngs=dropout_rng if train else None,
            output_attentions=output_attentions,
            output_hidden_states=output_hidden_states,
            return_dict=True,
        )
        if past is not None:
            out = out._replace(past_key_values=FlaxCache(out.past_key_values, past.columns + columns))
        return self.module.as_tuple_if_asked(out, return_dict)

    @property
    def params(self) -> Params:
        """The parameters; without `_do_init` the model has none and this raises InputError."""
        return self._over(None).params

    @params.setter
    def params(self, params: Params) -> None:
        self._over(None)
        self.module = self._over(params)

    @property
    def required_params(self) -> set[str]:
        """The names that `params` must have."""
        return set(self.module.params)

    @property
    def params_shape_tree(self) -> dict[str, jax.ShapeDtypeStruct]:
        """Name -> shape and dtype."""
        return jax.eval_shape(lambda: self.module.params)

    @property
    def config(self) -> AssignableConfig:
        """Sizes and numbers; an assignment to a field is checked."""
        return self.module.config

    @property
    def dtype(self) -> Any:
        """The dtype of the computation."""
        return self.module.dtype

    def num_parameters(self, **options: Any) -> int:
        """How many numbers the model has; tied ones count once."""
        return self.module.num_parameters(**options)

    num_params = num_parameters

    def enable_gradient_checkpointing(self) -> None:
        """Keep only each layer's input and compute the layer again for its gradients."""
        self.module.gradient_checkpointing_enable()

    def can_generate(self) -> bool:
        """Whether the model has `generate`."""
        return hasattr(self, "generate")

    def to_bf16(self, params: Params, mask: Any = None) -> Params:
        """New params in bfloat16; `mask` is a dict of the same names with True where to cast."""
        return _cast(params, jnp.bfloat16, mask)

    def to_fp16(self, params: Params, mask: Any = None) -> Params:
        """New params in float16; `mask` is a dict of the same names with True where to cast."""
        return _cast(params, jnp.float16, mask)

    def to_fp32(self, params: Params, mask: Any = None) -> Params:
        """New params in float32; `mask` is a dict of the same names with True where to cast."""
        return _cast(params, jnp.float32, mask)

    def _over(self, params: Params | None) -> Any:
        """The module over these parameters, or over its own; raises InputError, MissingTensorsError."""
        if params is None:
            if not self._is_initialized:
                raise InputError("params: the model was made with _do_init=False and has none; give params=.")
            return self.module
        missing = sorted(self.required_params - set(params))
        if missing:
            raise MissingTensorsError(
                "params must be a flat dict of Hugging Face names, as model.params, init_weights and from_pretrained "
                f"give it; {len(missing)} are missing, {missing[0]!r} among them."
            )
        return self.module.bind(params)


class FlaxMistralModel(FlaxMistralPreTrainedModel):
    """MistralModel as transformers' Flax class of this name; see FlaxMistralPreTrainedModel for what differs."""

    model_class = MistralModel


class FlaxMistralForCausalLM(FlaxMistralPreTrainedModel):
    """MistralForCausalLM as transformers' Flax class of this name; see FlaxMistralPreTrainedModel for what differs."""

    model_class = MistralForCausalLM

    @property
    def generation_config(self) -> GenerationConfig:
        """The options of `generate` where none are given."""
        return self.module.generation_config

    @generation_config.setter
    def generation_config(self, generation_config: GenerationConfig) -> None:
        self.module.generation_config = generation_config

    def generate(
        self,
        input_ids: Any,
        generation_config: GenerationConfig | None = None,
        prng_key: Array | None = None,
        trace: bool = True,
        params: Params | None = None,
        logits_processor: Any = None,
        **options: Any,
    ) -> FlaxGenerateOutput:
        """Continue ids [B, T] to [B, max_length]; options and errors are those of the class's `generate`.

        `trace=False` compiles nothing. `prng_key` stands for `seed`. A `logits_processor` is a function or a list of
        them, of the ids so far [B, T], the scores [B, V] and, where it takes a third, T, as transformers' Flax ones do;
        they are called between the steps, with arrays and never with tracers.
        """
        options["logits_processor"] = with_length(logits_processor)
        if prng_key is not None:
            options.setdefault("seed", _seed(prng_key))
        if not trace:
            options.setdefault("compile", "off")
        module = self._over(params)
        out = module.generate(input_ids, generation_config=generation_config, **options)
        sequences = out if isinstance(out, Array) else out.sequences
        said = {
            field.name: options[field.name] for field in dataclasses.fields(GenerationConfig) if field.name in options
        }
        generation = GenerationConfig.of(generation_config or module.generation_config).replace(**said)
        columns = jnp.shape(input_ids)[-1]
        rest = columns + generation.for_prompt(columns).max_new_tokens - sequences.shape[1]
        return FlaxGenerateOutput(jnp.pad(sequences, ((0, 0), (0, rest)), constant_values=generation.padding))

    def prepare_inputs_for_generation(
        self, input_ids: Array, max_length: int, attention_mask: Array | None = None
    ) -> dict[str, Any]:
        """An empty cache, the mask [B, max_length] and the positions [B, T] of a loop's first call."""
        mask = (
            jnp.ones(input_ids.shape, jnp.int32) if attention_mask is None else jnp.asarray(attention_mask, jnp.int32)
        )
        batch, columns = input_ids.shape
        return {
            "past_key_values": self.init_cache(batch, max_length),
            "attention_mask": jnp.pad(mask, ((0, 0), (0, max_length - columns)), constant_values=1),
            "position_ids": jnp.maximum(mask.cumsum(-1) - 1, 0),
        }

    def update_inputs_for_generation(self, model_outputs: Any, model_kwargs: dict[str, Any]) -> dict[str, Any]:
        """The arguments of the next call, one token further."""
        model_kwargs["past_key_values"] = model_outputs.past_key_values
        model_kwargs["position_ids"] = model_kwargs["position_ids"][:, -1:] + 1
        return model_kwargs


class FlaxAutoModel(AutoModel):
    """FlaxMistralModel, by `from_pretrained` or `from_config`."""

    model_class: Any = FlaxMistralModel

    @classmethod
    @path_by_either_name
    def from_pretrained(cls, path: str | os.PathLike[str], *arguments: Any, **options: Any) -> Any:
        """The model of a checkpoint; options and errors are those of the class's own `from_pretrained`."""
        return cls.model_class.from_pretrained(path, *arguments, **options)

    @classmethod
    def from_config(cls, config: MistralConfig, **options: Any) -> Any:
        """A model with fresh parameters; options are those of the class's own constructor."""
        return cls.model_class(config, **options)


class FlaxAutoModelForCausalLM(FlaxAutoModel):
    """FlaxMistralForCausalLM, by `from_pretrained` or `from_config`."""

    model_class = FlaxMistralForCausalLM


def _seed(key: Array) -> int:
    """The 64 bits of a JAX key as a number."""
    high, low = np.asarray(jax.random.key_data(key), np.uint32).reshape(-1)[-2:].tolist()
    return high << 32 | low


def _cast(params: Params, dtype: Any, mask: Any) -> Params:
    def cast(array: Array, chosen: bool = True) -> Array:
        return array.astype(dtype) if chosen and jnp.issubdtype(array.dtype, jnp.floating) else array

    return jax.tree.map(cast, params) if mask is None else jax.tree.map(cast, params, mask)
