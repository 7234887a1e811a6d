"""What is no checkpoint of a format here is told as what it is; paths as paths; nobody sees a temporary name."""

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import safetensors.numpy

from mistral_core import MistralConfig, errors
from mistral_core.compat import unread
from mistral_core.data import TINY_CHECKPOINT
from mistral_core.disk import files
from mistral_core.hub import download
from mistral_core.weights import checkpoint, formats, loading, push, sources
from mistral_core.weights.opening import Checkpoint
from mistral_core.weights.sources import telling_files

NAMES = {
    "adapter_model.safetensors": "an adapter of PEFT.*PeftModel.from_pretrained",
    "weights.npz": "MLX.*--dequantize",
    "model.onnx": "ONNX",
    "saved_model.pb": "SavedModel",
    "ckpt-1.data-00000-of-00001": "tf.train.Checkpoint",
    "output-00001-of-00002.safetensors": "EXL2",
    "mp_rank_00_model_states.pt": "DeepSpeed.*zero_to_fp32",
    "__0_0.distcp": "distributed checkpoint of PyTorch",
    "latest_checkpointed_iteration.txt": "Megatron",
    "m.nemo": "NeMo",
    "rank0.engine": "TensorRT",
    "openvino_model.bin": "OpenVINO",
    "m.tflite": "TensorFlow Lite",
    "ggml-model-q4_0.bin": "GGML",
    "m.llamafile": "llamafile",
    "rust_model.ot": "rust-bert",
    "m.tar.gz": "an archive.*unpack",
    "last.ckpt": "a PyTorch pickle",
}


@pytest.mark.parametrize("name", NAMES)
def test_other_kinds_are_named(tmp_path, name):
    (tmp_path / "README.md").write_bytes(b"")
    (tmp_path / name).write_bytes(b"x")
    for ask in (Checkpoint.open, lambda path: loading.load_pretrained(path, "MistralForCausalLM")):
        with pytest.raises(errors.UnsupportedFeatureError, match=NAMES[name]):
            ask(tmp_path)
    with pytest.raises(errors.CheckpointNotFoundError, match=NAMES[name]):
        MistralConfig.from_pretrained(tmp_path)
    with pytest.raises(errors.FileNotOnHubError, match=NAMES[name]):
        telling_files({"README.md", name}, None, "someone/m")


def test_a_directory_of_a_training_run(tmp_path):
    (tmp_path / "checkpoint-500").mkdir()
    with pytest.raises(errors.UnsupportedFeatureError, match="'checkpoint-500' is a directory of a training run; give"):
        Checkpoint.open(tmp_path)


def test_no_pattern_is_a_file_of_a_format():
    ours = {name for row in formats.FORMATS.values() for name in row.files} | {"config.json", "tokenizer.json"}
    ours -= {row.files[0] for name, row in formats.FORMATS.items() if name in formats.PICKLES}
    assert unread.advice({name for name in ours if not name.endswith("bin.index.json")}) is None


def test_packed_by_mlx(tmp_path):
    shutil.copytree(TINY_CHECKPOINT, tmp_path / "m")
    config = json.loads((tmp_path / "m" / "config.json").read_text())
    config["quantization"] = config["quantization_config"] = {"group_size": 64, "bits": 4}
    (tmp_path / "m" / "config.json").write_text(json.dumps(config))
    name = "model.layers.0.self_attn.q_proj"
    parts = {
        "weight": np.zeros((8, 8), np.uint32),
        "scales": np.zeros((8, 1), np.float16),
        "biases": np.zeros((8, 1), np.float16),
    }
    safetensors.numpy.save_file(
        {f"{name}.{part}": array for part, array in parts.items()}, tmp_path / "m" / "model.safetensors"
    )
    (tmp_path / "m" / "mistral_manifest.json").unlink()
    with pytest.raises(errors.UnsupportedFeatureError, match="packed by MLX"):
        Checkpoint.open(tmp_path / "m")


@pytest.mark.parametrize(
    "text", ["model/", "model.gguf", "no\\such\\thing", "model.safetensors", "someone/m/", "tokenizer.json"]
)
def test_what_looks_like_a_path_is_not_asked_for_on_the_hub(text, monkeypatch):
    monkeypatch.setattr(download, "_download", lambda *_: pytest.fail("asked the hub"))
    with pytest.raises(errors.CheckpointNotFoundError, match="no such file or directory; check the path"):
        sources.resolve_checkpoint(text)


def test_what_may_be_an_id_is_told_as_a_path_too(tmp_path):
    with pytest.raises(errors.OfflineError, match="no such path here"):
        sources.resolve_checkpoint("my-model", cache_dir=tmp_path, local_files_only=True)


# No temporary names


def failing(name: str):
    def save(directory: Path) -> None:
        config, tensors = checkpoint.load(TINY_CHECKPOINT)
        wrong = ((key, array if key != name else array[:1]) for key, array in tensors)
        checkpoint.save(directory, config, wrong)

    return save


@pytest.mark.parametrize("name", ["model.norm.weight"])
def test_messages_have_no_temporary_name(tmp_path, monkeypatch, name):
    with pytest.raises(errors.MistralError) as caught:
        push.save_and_push(failing(name), "someone/m")
    assert "/tmp" not in str(caught.value)
    for error in (errors.CorruptCheckpointError("{}: x"), errors.CheckpointError(5, "{}: x"), OSError(5, "x", "{}/a")):

        def write(error=error) -> None:
            with files.atomic_directory(tmp_path / "model") as temporary:
                parts = [str(each).format(temporary) if isinstance(each, str) else each for each in error.args]
                raise type(error)(*parts, *([f"{temporary}/a"] if type(error) is OSError else []))

        with pytest.raises(errors.MistralError) as caught:
            write()
        assert ".tmp-" not in str(caught.value)
        assert str(tmp_path / "model") in str(caught.value)
