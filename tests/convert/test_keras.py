"""What Keras saves of our own models: its names are held in place here, and every bit goes both ways."""

import shutil
import warnings
import zipfile
from pathlib import Path

import numpy as np
import pytest
from crossed import crossed
from samples import CAUSAL, CONFIGS, any_bits, assert_same, bits, read, write

from mistral_core import TINY
from mistral_core.errors import (
    CorruptCheckpointError,
    LimitExceededError,
    MistralError,
    TruncatedFileError,
    UnsafeFileError,
    UnsupportedFeatureError,
)
from mistral_core.parameters import HEADS
from mistral_core.weights.checkpoint import load
from mistral_core.weights.formats import detect
from mistral_core.weights.opening import Checkpoint

# Keras reads its variables so when it saves them
pytestmark = pytest.mark.filterwarnings("ignore:__array__ implementation doesn't accept a copy keyword")

GOLDEN = [
    "layers/head/vars/0",
    "layers/mistral_model/decoder_layers/decoder_layer/input_layernorm/vars/0",
    "layers/mistral_model/decoder_layers/decoder_layer/mlp/down_proj/vars/0",
    "layers/mistral_model/decoder_layers/decoder_layer/mlp/gate_proj/vars/0",
    "layers/mistral_model/decoder_layers/decoder_layer/mlp/up_proj/vars/0",
    "layers/mistral_model/decoder_layers/decoder_layer/post_attention_layernorm/vars/0",
    "layers/mistral_model/decoder_layers/decoder_layer/self_attn/k_proj/vars/0",
    "layers/mistral_model/decoder_layers/decoder_layer/self_attn/o_proj/vars/0",
    "layers/mistral_model/decoder_layers/decoder_layer/self_attn/q_proj/vars/0",
    "layers/mistral_model/decoder_layers/decoder_layer/self_attn/v_proj/vars/0",
    "layers/mistral_model/embed_tokens/vars/0",
    "layers/mistral_model/layers/rms_norm/vars/0",
]


@pytest.mark.parametrize(("name", "dtype"), crossed(CONFIGS, "bfloat16", "float32", "float16"))
def test_every_bit_comes_back(tmp_path, name, dtype):
    config = CONFIGS[name]
    arrays = any_bits(config, dtype)
    path = write(tmp_path / "model", "keras", arrays, config, texts={"tokenizer.json": b"{}"}, limit=1)
    assert detect(path) == ["keras"]
    assert_same(read(path), arrays)
    assert Checkpoint.open(path).config == config.replace(architectures=(CAUSAL,), dtype=dtype)
    assert Checkpoint.open(path).texts["tokenizer.json"]() == b"{}"


@pytest.mark.parametrize("architecture", HEADS)
def test_every_class(tmp_path, architecture):
    arrays = any_bits(TINY, architecture=architecture)
    assert_same(read(write(tmp_path / "model", "keras", arrays, architecture=architecture)), arrays)


# With Keras


@pytest.fixture(scope="module")
def mistral_tf():
    return pytest.importorskip("mistral_tf")


def with_bits(mistral_tf, architecture, config=TINY, dtype="bfloat16"):
    model = getattr(mistral_tf, architecture)(config, dtype=dtype)
    return model.load_arrays(any_bits(config, dtype, architecture))


def test_the_names_that_keras_gives_are_frozen(tmp_path, mistral_tf):
    h5py = pytest.importorskip("h5py")
    mistral_tf.MistralForCausalLM(TINY.replace(num_hidden_layers=1)).save_weights(tmp_path / "model.weights.h5")
    found = []
    with h5py.File(tmp_path / "model.weights.h5") as file:
        file.visititems(lambda name, item: found.append(name) if isinstance(item, h5py.Dataset) else None)
    assert found == GOLDEN


@pytest.mark.parametrize("architecture", HEADS)
@pytest.mark.parametrize("suffix", [".keras", ".weights.h5"])
def test_what_keras_saved_is_read(tmp_path, mistral_tf, architecture, suffix):
    model = with_bits(mistral_tf, architecture)
    path = tmp_path / f"any{suffix}"
    model.save(path) if suffix == ".keras" else model.save_weights(path)
    model.config.save_pretrained(tmp_path)
    assert detect(path) == detect(tmp_path) == ["keras"]
    arrays = any_bits(TINY, architecture=architecture)
    assert_same(read(path), arrays)
    assert_same(read(tmp_path), arrays)
    if suffix == ".keras":
        assert Checkpoint.open(path).config.architectures == (architecture,)
        assert b"max_new_tokens" in Checkpoint.open(path).texts["generation_config.json"]()


@pytest.mark.sweep
def test_an_optimizer_in_the_archive_is_left_out(tmp_path, mistral_tf):
    model = mistral_tf.MistralForCausalLM(TINY)
    model.compile("adam")
    ids = np.ones((2, 4), np.int32)
    model.fit({"input_ids": ids, "labels": ids}, verbose=0)
    model.save(tmp_path / "model.keras")
    assert_same(read(tmp_path), dict(model.named_arrays()))
    load(tmp_path)


@pytest.mark.parametrize("name", ["tied", "windows by layer", "one layer, odd sizes"])
def test_keras_loads_what_is_written(tmp_path, mistral_tf, name):
    config = CONFIGS[name]
    arrays = any_bits(config)
    path = write(tmp_path / "model", "keras", arrays, config)
    model = mistral_tf.MistralForCausalLM(config, dtype="bfloat16")
    model.load_weights(path / "model.weights.h5")
    for name, array in model.named_arrays():
        assert bits(array) == bits(arrays[name]), name


# Faults


@pytest.fixture(scope="module")
def archive(tmp_path_factory):
    """A .keras file as Keras lays it out, around weights that are ours."""
    directory = tmp_path_factory.mktemp("archive")
    made = write(directory / "model", "keras", any_bits(TINY))
    path = directory / "model.keras"
    config = TINY.to_json_string()
    with zipfile.ZipFile(path, "w") as file:
        file.writestr("metadata.json", "{}")
        file.writestr("config.json", f'{{"class_name": "{CAUSAL}", "config": {{"config": {config}}}}}')
        file.write(made / "model.weights.h5", "model.weights.h5")
    return path


def test_the_archive_itself_is_right(archive):
    assert_same(read(archive), any_bits(TINY))


def changed(archive, path, *, compression=zipfile.ZIP_STORED, leave=(), **more):
    with zipfile.ZipFile(archive) as old, zipfile.ZipFile(path, "w") as new, warnings.catch_warnings():
        warnings.simplefilter("ignore")  # zipfile warns of names that come twice
        for name in old.namelist():
            if name not in leave:
                new.writestr(name, old.read(name), compression)
        for name, content in more.items():
            new.writestr(name, content)
    return path


@pytest.mark.parametrize(
    ("options", "error"),
    [
        ({"compression": zipfile.ZIP_DEFLATED}, UnsafeFileError),
        ({"config.json": b"{}"}, UnsafeFileError),
        ({"../escape": b""}, UnsafeFileError),
        ({"assets/../../escape": b""}, UnsafeFileError),
        ({"/absolute": b""}, UnsafeFileError),
        ({"weights.pkl": b""}, UnsafeFileError),
        ({"leave": ("model.weights.h5",)}, UnsupportedFeatureError),
        ({"leave": ("config.json",)}, MistralError),
        ({f"assets/{i}": b"" for i in range(1001)}, LimitExceededError),
    ],
)
def test_53_57_bad_archives(archive, tmp_path, options, error):
    path = changed(archive, tmp_path / "model.keras", **options)
    with pytest.raises(error, match=r"model\.keras"):
        Checkpoint.open(path)


@pytest.mark.parametrize("config", [b"[]", b'{"class_name": "Functional", "config": {"layers": []}}', b"{"])
def test_56_the_config_is_data(archive, tmp_path, config):
    path = changed(archive, tmp_path / "model.keras", leave=("config.json",), **{"config.json": config})
    with pytest.raises(MistralError, match=r"model\.keras"):
        Checkpoint.open(path)


def test_56_a_lambda_is_never_made(archive, tmp_path):
    config = f'{{"module": "os", "class_name": "Lambda", "config": {{"config": {TINY.to_json_string()}}}}}'
    path = changed(archive, tmp_path / "model.keras", leave=("config.json",), **{"config.json": config.encode()})
    assert_same(read(path), any_bits(TINY))


def test_25_a_cut_archive(archive, tmp_path):
    data = archive.read_bytes()
    path = tmp_path / "model.keras"
    for size in [*range(60), *range(60, len(data), 997), len(data) - 1]:
        path.write_bytes(data[:size])
        with pytest.raises((TruncatedFileError, CorruptCheckpointError, UnsafeFileError)):
            Checkpoint.open(path, format="keras")


def test_59_a_variable_under_another_ones_place(tmp_path):
    h5py = pytest.importorskip("h5py")
    path = write(tmp_path / "model", "keras", any_bits(TINY))
    with h5py.File(path / "model.weights.h5", "r+") as file:
        mlp = file["layers/mistral_model/decoder_layers/decoder_layer/mlp"]
        mlp.move("up_proj", "other")
        mlp.move("gate_proj", "up_proj")
        mlp.move("other", "gate_proj")
    with pytest.raises(CorruptCheckpointError, match="gate_proj"):
        Checkpoint.open(path)


def test_several_loose_files_are_not_guessed_among(archive, tmp_path):
    for name in ("a.keras", "b.keras"):
        shutil.copy(archive, tmp_path / name)
    with pytest.raises(MistralError, match="a.keras"):
        Checkpoint.open(Path(tmp_path))
