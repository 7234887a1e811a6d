"""Types: those of the sources hold together, and an editor knows what the public calls of a backend return.

Both are asked of mypy, which reads the sources as an editor does.
"""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
CALLS = """
from typing import assert_type
import mistral_core
import mistral_{name} as package
from mistral_{name} import outputs

model = package.MistralForCausalLM.from_pretrained("path", dtype="float32")
assert_type(model, package.MistralForCausalLM)
assert_type(model([[1]]), outputs.CausalLMOutput)
assert_type(package.AutoModelForCausalLM.from_pretrained("path"), package.MistralForCausalLM)
assert_type(package.AutoModel.from_config(mistral_core.MistralConfig()), package.MistralModel)
assert_type(package.MistralModel.from_pretrained("path")([[1]]), outputs.ModelOutput)
assert_type(package.MistralForTokenClassification.from_pretrained("path")([[1]]), outputs.TokenClassifierOutput)
assert_type(package.MistralForSequenceClassification.from_pretrained("path")([[1]]), outputs.SequenceClassifierOutput)
assert_type(package.MistralForQuestionAnswering.from_pretrained("path")([[1]]), outputs.QuestionAnsweringOutput)
assert_type(package.MistralConfig.from_pretrained("path").vocab_size, int)
assert_type(package.MistralTokenizer.from_pretrained("path"), package.MistralTokenizer)
model.generate([[1]], streamer=None, past_key_values=None, assistant_model=None)
"""


OPTIONS = "[mypy]\nfollow_imports = silent\nignore_missing_imports = true\ncheck_untyped_defs = true\n"
UNREAD = "[mypy-torch.*,jax.*,flax.*,tensorflow.*,keras.*,transformers.*]\nfollow_imports = skip\n"
"""With this a framework's own sources are not read, which takes most of the time, for JAX 25 seconds."""


def mypy(*arguments: str, **options) -> subprocess.CompletedProcess:
    return subprocess.run([sys.executable, "-m", "mypy", *arguments], capture_output=True, text=True, **options)


def test_the_types_of_the_sources_hold_together():
    done = mypy(cwd=ROOT, check=False)
    assert done.returncode == 0, done.stdout


@pytest.mark.parametrize(
    "options", [OPTIONS + UNREAD, pytest.param(OPTIONS, marks=pytest.mark.slow)], ids=["alone", "with-its-framework"]
)
@pytest.mark.parametrize("name", ["torch", "flax", "tf"])
def test_an_editor_knows_what_comes_back(name, options, tmp_path):
    calls = CALLS.format(name=name)
    if name != "torch":  # the outputs of the core, as they are
        calls = calls.replace(f"from mistral_{name} import outputs", "from mistral_core import outputs")
    (tmp_path / "calls.py").write_text(calls)
    (tmp_path / "mypy.ini").write_text(options)
    arguments = "--config-file", "mypy.ini", "--cache-dir", str(ROOT / ".mypy_cache" / "calls"), "calls.py"
    done = mypy(*arguments, cwd=tmp_path, env={"MYPYPATH": str(ROOT)}, check=False)
    assert done.returncode == 0, done.stdout
