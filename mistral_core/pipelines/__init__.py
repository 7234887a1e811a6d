"""From text to results in one call: `pipeline("text-generation", model=PATH)("Emma was")`, as in transformers."""

from __future__ import annotations

import importlib
import os
from collections.abc import Mapping
from typing import Any

from .. import backend as backends
from ..config import MistralConfig
from ..errors import InputError
from ..hub import download
from ..telling import shown
from ..text.tokenizer import MistralTokenizer
from .base import LOADING, Pipeline

TASKS: Mapping[str, tuple[str, str]] = {
    "text-generation": ("MistralForCausalLM", "text_generation.TextGenerationPipeline"),
    "text-classification": ("MistralForSequenceClassification", "text_classification.TextClassificationPipeline"),
    "token-classification": ("MistralForTokenClassification", "token_classification.TokenClassificationPipeline"),
    "question-answering": ("MistralForQuestionAnswering", "question_answering.QuestionAnsweringPipeline"),
}
"""Task -> the class of its model, and its pipeline."""
ALIASES = {"sentiment-analysis": "text-classification", "ner": "token-classification"}


def pipeline(
    task: str | None = None,
    model: Any = None,
    *,
    tokenizer: Any = None,
    backend: str | None = None,
    framework: str | None = None,
    batch_size: int = 1,
    model_kwargs: Mapping[str, Any] | None = None,
    **options: Any,
) -> Pipeline:
    """What turns texts into results: a task, and a model by its path, hub id or as an object.

    Without `task`, it is the one that the model was saved for. `backend` is "torch", "flax" or "tf" (`framework`
    "pt", "jax" or "tf"), by default the one whose dtype or device is given, or else the first that is installed; a
    model object has its own. A path brings its tokenizer; to an object, give one or its path.
    `revision`, `token`, `cache_dir`, `local_files_only`, `config`, `dtype`, `device`, `attn_implementation` and
    `model_kwargs` go to `from_pretrained`; all other options are those of a call: see help(type(pipeline(...))).
    Raises InputError for what does not exist, and what `from_pretrained` raises.
    """
    loading = {name: options.pop(name) for name in LOADING if name in options}
    if model is None:
        raise InputError("model: none given, and there is no default; give the path or hub id of a checkpoint.")
    if isinstance(model, str | os.PathLike):
        loading |= model_kwargs or {}
        hub = {name: loading[name] for name in download.ARGUMENTS if name in loading}
        path, model = model, download.held(model)  # config, model and tokenizer are of one moment
        tokenizer = model if tokenizer in (None, path) else tokenizer
        task = _task(task or _task_of(_own_architecture(model, loading.get("config"), hub)))
        found = backends.get(backends.chosen(backend, framework=framework, given=loading.values()))
        model = found.model_class(TASKS[task][0]).from_pretrained(model, **loading)
    else:
        hub = {}
        task = _task(task or _task_of(getattr(model, "architecture", None)))
        found = backends.get(_backend_of(model, backend, framework))
        _check_object(model, task, [*loading, *(model_kwargs or {})])
    if isinstance(tokenizer, str | os.PathLike):
        tokenizer = MistralTokenizer.from_pretrained(tokenizer, **hub)
    if tokenizer is None:
        raise InputError("tokenizer: a model object brings none; give a tokenizer, or its path.")
    module, _, name = TASKS[task][1].partition(".")
    made: Pipeline = getattr(importlib.import_module(f".{module}", __name__), name)(
        model, tokenizer, found, batch_size=batch_size, **options
    )
    return made


def _task(name: str) -> str:
    task = ALIASES.get(name, name)
    if task not in TASKS:
        raise InputError(f"task must be one of {', '.join((*TASKS, *ALIASES))}, got {shown(name)}.")
    return task


def _task_of(architecture: str | None) -> str:
    tasks = {own: task for task, (own, _) in TASKS.items()}
    if architecture not in tasks:
        raise InputError(f"task: a model of {architecture} has none; give one of {', '.join(TASKS)}.")
    return tasks[architecture]


def _own_architecture(path: Any, config: Any, hub: Mapping[str, Any]) -> str | None:
    config = MistralConfig.from_pretrained(path, **hub) if config is None else config
    return (config.architectures or ("MistralForCausalLM",))[0]


def _backend_of(model: Any, backend: str | None, framework: str | None) -> str:
    """The backend that a model's class comes from, or extends, or that is named for it."""
    if backends.owner(model) is None and backend is None and framework is None:
        raise InputError(
            f"model must be a path, or a model of a backend, got {type(model).__name__}; or give backend=."
        )
    return backends.chosen(backend, framework=framework, model=model)


def _check_object(model: Any, task: str, loading: list[str]) -> None:
    expected, own = TASKS[task][0], getattr(model, "architecture", None)
    if own != expected:
        raise InputError(f"model must be a {expected} for {task}, got a {own or type(model).__name__}.")
    if loading:
        raise InputError(f"{', '.join(loading)}: for a model that is to be loaded; leave out what this one is already.")
