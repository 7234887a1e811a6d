"""tf_model.h5: every bit comes back, in one file and in shards, and what transformers itself wrote is read."""

from pathlib import Path

import numpy as np
import pytest
from crossed import crossed
from samples import CAUSAL, CONFIGS, any_bits, assert_same, ordinary, read, write

from mistral_core import TINY
from mistral_core.errors import ChecksumMismatchError, CorruptCheckpointError
from mistral_core.parameters import shapes
from mistral_core.weights import manifest
from mistral_core.weights.formats import detect
from mistral_core.weights.opening import Checkpoint

FOREIGN = Path(__file__).parents[1] / "data" / "foreign" / "tensorflow"


@pytest.mark.parametrize(("name", "dtype"), crossed(CONFIGS, "bfloat16", "float32", "float16"))
def test_every_bit_comes_back(tmp_path, name, dtype):
    config = CONFIGS[name]
    arrays = any_bits(config, dtype)
    path = write(tmp_path / "model", "tf-h5", arrays, config)
    assert detect(path) == ["tf-h5"]
    assert_same(read(path), arrays)
    assert Checkpoint.open(path).config == config.replace(architectures=(CAUSAL,), dtype=dtype)


@pytest.mark.parametrize("limit", [1, 40_000])
@pytest.mark.parametrize("dtype", ["bfloat16", "float32"])
def test_shards(tmp_path, limit, dtype):
    arrays = any_bits(TINY, dtype)
    path = write(tmp_path / "model", "tf-h5", arrays, limit=limit)
    assert len(list(path.glob("tf_model-*.h5"))) > 1
    assert_same(read(path), arrays)


@pytest.mark.parametrize("architecture", ["MistralModel", "MistralForSequenceClassification"])
def test_other_classes(tmp_path, architecture):
    arrays = any_bits(TINY, "float32", architecture)
    path = write(tmp_path / "model", "tf-h5", arrays, architecture=architecture)
    assert_same(read(path), arrays)


def test_dtypes_may_differ_and_texts_travel(tmp_path):
    arrays = any_bits(TINY, "bfloat16")
    arrays["model.norm.weight"] = any_bits(TINY, "float32")["model.norm.weight"]
    path = write(tmp_path / "model", "tf-h5", arrays, texts={"tokenizer.json": b"{}"})
    assert_same(read(path), arrays)
    assert Checkpoint.open(path).texts["tokenizer.json"]() == b"{}"


@pytest.mark.parametrize("folder", ["single", "sharded"])
def test_transformers_own_files(folder):
    checkpoint = Checkpoint.open(FOREIGN / folder)
    assert checkpoint.format == "tf-h5"
    config = checkpoint.config
    assert (config.num_hidden_layers, config.hidden_size, config.sliding_window) == (2, 16, 3)
    generator = np.random.default_rng(0)  # as make_tensorflow.py draws them
    put_in = {n: generator.standard_normal(shape).astype(np.float32) for n, shape in shapes(config).items()}
    assert_same(read(FOREIGN / folder), put_in)


def test_a_value_that_is_no_bfloat16_any_more_is_not_cut(tmp_path):
    path = write(tmp_path / "model", "tf-h5", any_bits(TINY))
    checkpoint = Checkpoint.open(path)
    with (path / "tf_model.h5").open("r+b") as file:
        file.seek(checkpoint.tensors["model.norm.weight"].start)
        file.write(np.float32(1.2345678).tobytes())
    with pytest.raises(CorruptCheckpointError, match="was widened from bfloat16"):
        Checkpoint.open(path).read("model.norm.weight")


def test_a_changed_bit_that_leaves_no_tensor_is_found(tmp_path):
    """The root's tree has one entry; the bit says that it has none."""
    file = write(tmp_path / "model", "tf-h5", ordinary(TINY)) / "tf_model.h5"
    data = bytearray(file.read_bytes())
    count = data.index(b"TREE") + 6
    assert data[count] == 1
    data[count] = 0
    file.write_bytes(data)
    assert not Checkpoint.open(file).tensors
    with pytest.raises(ChecksumMismatchError, match="tf_model.h5"):
        manifest.verify(tmp_path / "model", "full")
