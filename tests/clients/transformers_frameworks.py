"""transformers' own tests of its Flax and TensorFlow Mistral, run on our classes of the same names.

    python tests/clients/transformers_frameworks.py flax|tf TESTS [pytest's arguments, as -k save]

TESTS is the folder `tests` of the sources of a transformers that has them, of the release that is installed: nothing
of it is here, and whoever runs this fetches it. Its Mistral classes and MistralConfig are replaced by ours; what does
not pass is held against the list of reasons in `frameworks_differences.py`. Exit code 0: everything passed or has one.
"""

from __future__ import annotations

import importlib
import os
import sys
import types
from pathlib import Path
from typing import Any

os.environ.update(HF_HUB_OFFLINE="1", RUN_SLOW="1", CUDA_VISIBLE_DEVICES="")

import peers_suite
from frameworks_differences import REASONS

import mistral_core

NOT_MISTRALS = (
    "hidden_act", "hidden_dropout_prob", "attention_probs_dropout_prob", "type_vocab_size", "is_decoder",
    "position_embedding_type",
)  # fmt: skip
"""What the suite sets on every model's config; a Mistral has none of it, and our config says so."""


class Config(mistral_core.AutoConfig):
    """Our config, leaving out what the suite says to every model."""

    def __init__(self, **fields: Any) -> None:
        super().__init__(**{name: value for name, value in fields.items() if name not in NOT_MISTRALS})

    def __setattr__(self, name: str, value: Any) -> None:
        if name not in NOT_MISTRALS:
            super().__setattr__(name, value)


def substitute(folder: Path, framework: str) -> list[Path]:
    """Put our classes and config where the suite looks for transformers'; its file that is to be run."""
    sys.path.insert(0, str(folder.parent))
    # what the suite imports and these tests do not use
    _module("tests.test_pipeline_mixin", PipelineTesterMixin=type("PipelineTesterMixin", (), {}))
    _module("test_module")
    _module("test_module.custom_configuration", CustomConfig=None)
    ours = importlib.import_module(f"mistral_{framework}")
    prefix = {"flax": "Flax", "tf": "TF"}[framework]
    classes = {name: getattr(ours, name) for name in dir(ours) if name.startswith(f"{prefix}Mistral")}
    _module(f"transformers.models.mistral.modeling_{framework}_mistral", **classes)
    importlib.import_module(f"tests.models.mistral.test_modeling_{framework}_mistral").MistralConfig = Config
    common = importlib.import_module(f"tests.test_modeling_{framework}_common")
    heads = {"": "Model", "_FOR_CAUSAL_LM": "ForCausalLM", "_FOR_SEQUENCE_CLASSIFICATION": "ForSequenceClassification"}
    for mapping, head in heads.items():
        found = getattr(ours, f"{prefix}Mistral{head}", None)
        setattr(common, f"{prefix.upper()}_MODEL{mapping}_MAPPING", {} if found is None else {Config: found})
    if framework == "tf":
        import keras

        common.keras = keras  # transformers' models are of Keras 2, ours of 3
        for name in ("TFAutoModel", "TFAutoModelForSequenceClassification"):
            setattr(common, name, getattr(ours, name))
        # what the suite knows of transformers' own layers
        ours.compat.TFMistralPreTrainedModel._get_word_embedding_weight = lambda self, layer: (
            layer and layer.weight.value
        )
    return [folder / "models" / "mistral" / f"test_modeling_{framework}_mistral.py"]


def _module(name: str, **content: Any) -> None:
    module = sys.modules[name] = types.ModuleType(name)
    vars(module).update(content)


def main(arguments: list[str]) -> int:
    """Run the suite of a framework on our classes."""
    framework, path, *rest = arguments if arguments[1:] else sys.exit(__doc__)
    folder = Path(path).resolve()
    if framework not in REASONS or not (folder / "models" / "mistral").is_dir():
        sys.exit(f"{framework} {folder}: flax or tf, and the folder `tests` of transformers' sources, were expected.")
    os.environ.update({"flax": {"USE_TF": "0"}, "tf": {"USE_JAX": "0"}}[framework])
    return peers_suite.run(substitute(folder, framework), REASONS[framework], arguments=rest)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
