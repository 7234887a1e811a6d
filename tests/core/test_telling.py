"""Warnings at the caller's line, values in bounded words, names that are missing."""

from __future__ import annotations

import ast
import functools
import subprocess
import sys
import warnings
from pathlib import Path

import pytest

import mistral_core
from mistral_core import MistralConfig, telling
from mistral_core.compat.names import ADVICE
from mistral_core.config.presets import TINY
from mistral_core.errors import MissingExtraError, MissingNameError, UnknownFieldError

ROOT = Path(mistral_core.__file__).parents[1]


def place_of(call):
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        call()
    return {(Path(each.filename).name, each.lineno) for each in caught}


def test_warnings_point_at_the_callers_line(tmp_path):
    def call():
        return MistralConfig.from_dict({"colour": 1})

    line = call.__code__.co_firstlineno + 1
    assert place_of(call) == {("test_telling.py", line)}
    TINY.save_pretrained(tmp_path)
    (tmp_path / "config.json").write_text(TINY.to_json_string().replace("{", '{"colour": 1,', 1))

    def deeper():
        return functools.partial(MistralConfig.from_pretrained, tmp_path)()

    assert place_of(deeper) == {("test_telling.py", deeper.__code__.co_firstlineno + 1)}

    def through_dataclasses():
        return TINY.replace(rms_norm_eps=0.5)

    assert place_of(through_dataclasses) == {("test_telling.py", through_dataclasses.__code__.co_firstlineno + 1)}


def test_no_other_warning_is_given():
    for file in ROOT.glob("mistral_*/**/*.py"):
        for call in ast.walk(ast.parse(file.read_text())):
            if isinstance(call, ast.Call) and ast.unparse(call.func) == "warnings.warn":
                pytest.fail(f"{file.relative_to(ROOT)}:{call.lineno} warns by itself; use telling.warn")


@pytest.mark.parametrize(
    "value", ["x" * 10**6, [1] * 10**6, 10**5000, {"a": "b" * 1000}, b"x" * 1000, "\x1b"], ids=list("abcdef")
)
def test_values_are_shown_in_bounded_words(value):
    assert len(telling.shown(value)) < 3 * telling.LONGEST_CHARACTERS
    assert telling.printable(telling.shown(value)) == telling.shown(value)


def test_the_nearest_name():
    assert telling.nearest("temprature", ["top_k", "temperature"]) == " (did you mean 'temperature'?)"
    assert telling.nearest("zzz", ["top_k"]) == ""
    with pytest.raises(UnknownFieldError, match="did you mean 'attn_implementation'"):
        TINY.replace(attn_implemention="sdpa")


def test_names_of_transformers_are_there_or_explained(backend):
    for name in ADVICE:
        if name in backend.__all__ or hasattr(type(backend), name) or name in vars(backend):
            continue
        with pytest.raises(MissingNameError, match=name):
            getattr(backend, name)
    assert issubclass(backend.MistralForCausalLM, backend.PreTrainedModel)
    with pytest.raises(AttributeError, match="did you mean 'MistralForCausalLM'"):
        _ = backend.MistralForCausualLM


def test_those_of_the_core():
    with pytest.raises(MissingNameError, match="mistral_torch, mistral_flax, mistral_tf"):
        from mistral_core import AutoModelForCausalLM  # noqa: F401
    with pytest.raises(MissingNameError, match="fit"):
        from mistral_core import Trainer  # noqa: F401
    with pytest.raises(ImportError, match="cannot import name 'nothing_such'"):
        from mistral_core import nothing_such  # noqa: F401


@pytest.mark.parametrize(("package", "gone"), [("torch", "torch"), ("flax", "jax"), ("tf", "keras")])
def test_a_missing_framework_names_the_extra(package, gone):
    code = f"import sys; sys.modules[{gone!r}] = None\nimport mistral_{package}"
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    message = result.stderr.strip().splitlines()[-1]
    assert MissingExtraError.__name__ in message
    assert f"needs {gone}" in message
    assert f"pip install 'mistral-frameworks[{package}]'" in message
