"""KerasHub presets: every bit comes back, in one file and in shards, and what KerasHub itself wrote is read."""

import json
from pathlib import Path

import ml_dtypes
import numpy as np
import pytest
from crossed import crossed
from samples import CAUSAL, CONFIGS, INEXPRESSIBLE, any_bits, assert_same, read, write

from mistral_core import TINY
from mistral_core.errors import (
    CheckpointIndexError,
    ConfigError,
    MissingTensorsError,
    ShardMissingError,
    UnsafeFileError,
    UnsupportedFeatureError,
)
from mistral_core.weights.checkpoint import load
from mistral_core.weights.formats import detect
from mistral_core.weights.opening import Checkpoint

FOREIGN = Path(__file__).parents[1] / "data" / "foreign" / "keras_hub"
LAYER_ORDER = ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj", "self_attn.o_proj", "input_layernorm",
               "mlp.up_proj", "mlp.gate_proj", "mlp.down_proj", "post_attention_layernorm")  # fmt: skip


@pytest.mark.parametrize(
    ("name", "dtype"), crossed(sorted(CONFIGS.keys() - INEXPRESSIBLE["keras-hub"]), "bfloat16", "float32", "float16")
)
def test_every_bit_comes_back(tmp_path, name, dtype):
    config = CONFIGS[name]
    arrays = any_bits(config, dtype)
    path = write(tmp_path / "model", "keras-hub", arrays, config)
    assert detect(path) == ["keras-hub"]
    assert_same(read(path), arrays)
    assert Checkpoint.open(path).config == config.replace(architectures=(CAUSAL,), dtype=dtype)


@pytest.mark.parametrize("name", sorted(INEXPRESSIBLE["keras-hub"]))
def test_what_a_preset_cannot_say_is_refused_before_writing(tmp_path, name):
    with pytest.raises(UnsupportedFeatureError, match="keras-hub: has no"):
        write(tmp_path / "model", "keras-hub", any_bits(CONFIGS[name]), CONFIGS[name])
    assert not any((tmp_path / "model").iterdir())


def test_heads_are_refused(tmp_path):
    arrays = any_bits(TINY, architecture="MistralModel")
    with pytest.raises(UnsupportedFeatureError, match="language models only"):
        write(tmp_path / "model", "keras-hub", arrays, architecture="MistralModel")


def test_linear_scaling(tmp_path):
    config = TINY.replace(rope_scaling={"rope_type": "linear", "factor": 4.0})
    path = write(tmp_path / "model", "keras-hub", any_bits(config), config)
    (path / "mistral_manifest.json").unlink()
    assert Checkpoint.open(path).config.rope_scaling == {"rope_type": "linear", "factor": 4.0}


def test_scaled_queries_are_refused_whatever_the_scaling_of_rotations(tmp_path):
    linear = {"rope_type": "linear", "factor": 2.0, "llama_4_scaling_beta": 0.25, "original_max_position_embeddings": 8}
    config = TINY.replace(model_type="ministral3", rope_scaling=linear)
    with pytest.raises(UnsupportedFeatureError, match="keras-hub: has no queries scaled by their position"):
        write(tmp_path / "model", "keras-hub", any_bits(config), config)


@pytest.mark.parametrize("limit", [1, 40_000])
def test_shards(tmp_path, limit):
    arrays = any_bits(TINY)
    path = write(tmp_path / "model", "keras-hub", arrays, limit=limit)
    assert (path / "model_00000.weights.h5").exists()
    assert not (path / "model.weights.h5").exists()
    assert detect(path) == ["keras-hub"]
    assert_same(read(path), arrays)
    (path / "model_00001.weights.h5").rename(tmp_path / "elsewhere")
    with pytest.raises(ShardMissingError, match="model_00001"):
        Checkpoint.open(path)


@pytest.mark.parametrize(
    ("changed", "error"),
    [
        ({"/layers/reversible_embedding/vars": "../model_00000.weights.h5"}, UnsafeFileError),
        ({"/layers/reversible_embedding/vars": "model.safetensors"}, UnsafeFileError),
        ({"/layers/reversible_embedding/vars": 3}, CheckpointIndexError),
        ({"/layers/nothing/vars": "model_00000.weights.h5"}, CheckpointIndexError),
        (None, CheckpointIndexError),
    ],
)
def test_44_to_48_a_bad_index(tmp_path, changed, error):
    path = write(tmp_path / "model", "keras-hub", any_bits(TINY), limit=40_000)
    index = json.loads((path / "model.weights.json").read_text())
    index["weight_map"] = changed and {**index["weight_map"], **changed}
    (path / "model.weights.json").write_text(json.dumps(index))
    with pytest.raises(error):
        Checkpoint.open(path)


@pytest.mark.parametrize("folder", ["single", "sharded"])
def test_kerashubs_own_files(folder):
    config = Checkpoint.open(FOREIGN / folder).config
    assert (config.head_dim, config.sliding_window, config.rope_theta, config.rms_norm_eps) == (6, 3, 1e6, 1e-5)
    assert config.rope_scaling == {"rope_type": "linear", "factor": 2.0}
    generator = np.random.default_rng(0)  # as make_keras_hub.py draws them

    def drawn(*shape):
        array = generator.standard_normal(shape).astype(np.float32)
        return array.astype(ml_dtypes.bfloat16) if folder == "single" else array

    D, F, N, K, H, V = 16, 12, 4, 2, 6, 24
    shapes = ((D, N, H), (D, K, H), (D, K, H), (N, H, D), (D,), (D, F), (D, F), (F, D), (D,))
    expected = {"model.embed_tokens.weight": drawn(V, D), "lm_head.weight": drawn(D, V).T}
    for layer in range(2):
        for name, shape in zip(LAYER_ORDER, shapes, strict=True):
            inputs = N * H if name.endswith("o_proj") else shape[0]
            array = drawn(*shape).reshape(inputs, -1).T
            expected[f"model.layers.{layer}.{name}.weight"] = array[0] if len(shape) == 1 else array
    expected["model.norm.weight"] = drawn(D)
    assert_same(read(FOREIGN / folder), expected)
    load(FOREIGN / folder)


def test_the_tokenizer_and_hugging_faces_texts_travel(tmp_path):
    own = Checkpoint.open(FOREIGN / "single").texts["tokenizer.model"]()
    texts = {"tokenizer.model": own, "tokenizer.json": b'{"version": 1}', "generation_config.json": b"{}"}
    path = write(tmp_path / "model", "keras-hub", any_bits(TINY), texts=texts)
    assert {name: text() for name, text in Checkpoint.open(path).texts.items()} == texts
    written, kerashubs = (json.loads((place / "tokenizer.json").read_text()) for place in (path, FOREIGN / "single"))
    assert set(kerashubs) == set(written)
    assert set(written["config"]) <= set(kerashubs["config"])


@pytest.mark.parametrize(
    ("changes", "error"),
    [
        ({"registered_name": "keras_hub>GemmaBackbone"}, UnsupportedFeatureError),
        ({"config": []}, UnsupportedFeatureError),
        ({"config": {}}, ConfigError),
        ({"config": {"num_layers": "2"}}, ConfigError),
        ({"config": {"dtype": {"class_name": "DTypePolicyMap", "config": {"policy_map": {}, "name": 3}}}},
         UnsupportedFeatureError),
    ],
)  # fmt: skip
def test_another_config(tmp_path, changes, error):
    path = write(tmp_path / "model", "keras-hub", any_bits(TINY))
    data = json.loads((path / "config.json").read_text())
    if changes.get("config"):
        changes = {"config": {**data["config"], **changes["config"]}}
    (path / "config.json").write_text(json.dumps({**data, **changes}))
    with pytest.raises(error, match="config.json|num_hidden_layers"):
        _ = Checkpoint.open(path).config


def test_56_a_class_in_the_config_is_never_imported(tmp_path):
    path = write(tmp_path / "model", "keras-hub", any_bits(TINY))
    data = json.loads((path / "config.json").read_text())
    (path / "config.json").write_text(json.dumps({**data, "module": "no.such.module", "class_name": "Lambda"}))
    assert_same(read(path), any_bits(TINY))


def test_an_absent_window_is_kerashubs_own_default(tmp_path):
    path = write(tmp_path / "model", "keras-hub", any_bits(TINY))
    (path / "mistral_manifest.json").unlink()
    data = json.loads((path / "config.json").read_text())
    del data["config"]["sliding_window"]
    (path / "config.json").write_text(json.dumps(data))
    assert Checkpoint.open(path).config.sliding_window == 512


def test_37_missing_tensors(tmp_path):
    path = write(tmp_path / "model", "keras-hub", any_bits(TINY), limit=1)
    index = json.loads((path / "model.weights.json").read_text())
    index["weight_map"].popitem()
    (path / "model.weights.json").write_text(json.dumps(index))
    with pytest.raises(MissingTensorsError):
        load(path, verify="off")


def test_the_names_of_older_presets(tmp_path):
    h5py = pytest.importorskip("h5py")
    path = write(tmp_path / "model", "keras-hub", any_bits(TINY))
    with h5py.File(path / "model.weights.h5", "r+") as file:
        file.move("layers", "_layer_checkpoint_dependencies")
    assert detect(path) == ["keras-hub"]
    assert_same(read(path), any_bits(TINY))
