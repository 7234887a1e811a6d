"""Kinds of checkpoints that are not read here: each is told as what it is, by the names of its files."""

from __future__ import annotations

from collections.abc import Collection
from fnmatch import fnmatchcase
from typing import NamedTuple


class Unread(NamedTuple):
    """Names that only one kind of checkpoint has."""

    patterns: tuple[str, ...]
    what: str
    advice: str


_SAFETENSORS = "take the model's safetensors, or export them with the tool that made it"

KINDS = (
    Unread(("adapter_config.json", "adapter_model.*"), "an adapter of PEFT, not a model",
         "load the model that it was trained on, then peft.PeftModel.from_pretrained(model, this directory)"),
    Unread(("weights.npz", "weights.*.safetensors"), "a checkpoint of MLX",
         "write it with mlx_lm.convert --dequantize, as model.safetensors"),
    Unread(("*.onnx", "*.onnx_data", "onnx/*"), "a graph of ONNX", _SAFETENSORS),
    Unread(("saved_model.pb", "keras_metadata.pb"), "a SavedModel of TensorFlow",
         "load it with tf.saved_model.load, and save its weights as model.safetensors"),
    Unread(("*.ckpt.index", "ckpt-*.index", "*.data-?????-of-?????"), "a checkpoint of tf.train.Checkpoint",
         "restore it into its model there, and save that with save_pretrained"),
    Unread(("output.safetensors", "output-?????-of-?????.safetensors", "cal_data.safetensors"), "a checkpoint of EXL2",
         _SAFETENSORS),
    Unread(("zero_to_fp32.py", "zero_pp_rank_*", "*_model_states.pt", "*_optim_states.pt", "global_step*"),
         "a checkpoint of DeepSpeed, cut over its ranks", "run its zero_to_fp32.py, with --safe_serialization"),
    Unread((".metadata", "*.distcp"),
         "a distributed checkpoint of PyTorch, whose metadata is a pickle that is never read",
         "re-save it as safetensors"),
    Unread(("latest_checkpointed_iteration.txt",), "a checkpoint of Megatron", "convert it with Megatron's own tools"),
    Unread(("*.nemo",), "a checkpoint of NeMo", "convert it with NeMo's own tools"),
    Unread(("rank*.engine", "*.engine"), "an engine of TensorRT", _SAFETENSORS),
    Unread(("openvino_model.*",), "a model of OpenVINO", _SAFETENSORS),
    Unread(("*.mlpackage", "*.mlmodel", "*.mlmodelc"), "a model of Core ML", _SAFETENSORS),
    Unread(("*.tflite", "*.task", "*.litertlm"), "a model of TensorFlow Lite", _SAFETENSORS),
    Unread(("ggml-model*.bin", "*.ggml", "*.ggmlv?.*"), "a GGML file, of before GGUF", "take the model's GGUF"),
    Unread(("*.llamafile",), "a llamafile", "take the model's GGUF"),
    Unread(("rust_model.ot", "*.ot"), "a checkpoint of rust-bert", _SAFETENSORS),
    Unread(("*.zip", "*.tar", "*.tar.gz", "*.tgz", "*.7z", "*.zst"), "an archive", "unpack it first"),
    Unread(("checkpoint-*",), "a directory of a training run", "give the path of one of its checkpoints"),
    Unread(("*.bin", "*.pth", "*.pt", "*.ckpt"), "a PyTorch pickle under a name that no format has",
         "re-save it as safetensors"),
)  # fmt: skip
"""The first that fits is told."""


def kind_of(names: Collection[str]) -> tuple[str, Unread] | None:
    """The name that shows a kind which is not read, and the kind."""
    for kind in KINDS:
        for name in sorted(names):
            if any(fnmatchcase(name, pattern) for pattern in kind.patterns):
                return name, kind
    return None


def advice(names: Collection[str]) -> str | None:
    """What files are, where they are of a kind that is not read, and what to do."""
    found = kind_of(names)
    return found and f"{found[0][:100]!a} is {found[1].what}; {found[1].advice}"


def is_mlx(names: Collection[str]) -> bool:
    """Whether tensors are packed as MLX packs them: beside a weight there are scales and biases."""
    return any(name.endswith(".scales") and f"{name.removesuffix('.scales')}.biases" in names for name in names)
