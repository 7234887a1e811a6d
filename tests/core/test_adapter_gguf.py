"""Adapters for llama.cpp: what its file says is the adapter to the bit or to one rounding, or it is not written."""

from __future__ import annotations

import errno
import json

import numpy as np
import pytest

from conformance.weights import random_parameters
from mistral_core.cli import main
from mistral_core.config.presets import TINY
from mistral_core.errors import (
    ConfigError,
    NonFiniteWeightsError,
    NoSpaceError,
    OutputExistsError,
    ShapeMismatchError,
    UnsupportedFeatureError,
)
from mistral_core.lora import adapter as files
from mistral_core.lora import gguf
from mistral_core.lora.config import LoraConfig
from mistral_core.parameters import layer_of, shape_of
from mistral_core.weights import layouts
from mistral_core.weights.checkpoint import save
from mistral_core.weights.containers import safetensors, tensor_file
from mistral_core.weights.containers.gguf.file import GgufFile
from mistral_core.weights.convert import convert
from mistral_core.weights.formats.gguf import config as gguf_config

CONFIG = TINY.replace(num_hidden_layers=2, layer_types=None, sliding_window=None)
CAUSAL = "MistralForCausalLM"
WAYS = {
    "plain": {"target_modules": "all-linear"},
    "rslora": {"target_modules": ["q_proj", "down_proj"], "use_rslora": True},
    "patterns": {
        "target_modules": "all-linear", "rank_pattern": {"q_proj": 2, "layers.1.mlp.up_proj": 5},
        "alpha_pattern": {"v_proj": 3, "layers.0.mlp.down_proj": 0},
    },
    "no alpha": {"target_modules": ["k_proj"], "lora_alpha": 0, "alpha_pattern": {"layers.1.self_attn.k_proj": 7}},
    "an alpha beyond float32": {
        "target_modules": ["k_proj"], "lora_alpha": 1e39, "alpha_pattern": {"k_proj": 0.1},
    },
    "embedding and head": {"target_modules": ["embed_tokens", "lm_head", "k_proj"]},
}  # fmt: skip


def base(folder, architecture=CAUSAL, **config):
    config = CONFIG.replace(**config)
    arrays = random_parameters(config, architecture)
    save(folder, config, arrays.items(), architecture=architecture)
    return arrays


def adapter(folder, config=CONFIG, architecture=CAUSAL, **fields):
    """An adapter of random numbers, written."""
    lora = LoraConfig(**{"r": 4, "lora_alpha": 10, **fields}).for_model(config, architecture)
    random, weights = np.random.default_rng(3), {}
    for name, target in lora.targets(config, architecture).items():
        rows, columns = shape_of(target.row, config)
        a, b = (random.normal(size=shape).astype(np.float32) for shape in ((target.r, columns), (rows, target.r)))
        weights[name] = files.LoraWeights(a, b, np.ones(rows, np.float32) if lora.use_dora else None)
    saved = {name: np.ones(shape_of(row, config), np.float32) for name, row in lora.saved(config, architecture)}
    made = files.Adapter(lora, weights, saved)
    files.save(folder, made, config, architecture)
    return made


def computed(file, row, name):
    """What llama.cpp adds to a matrix, in float64 and its own layout: alpha, where it is not 0, over the rank of B."""
    stem = row.gguf.format(layer_of(name))
    a, b = (file.read(f"{stem}.lora_{each}").astype(np.float64) for each in "ab")
    alpha = float(file.values["adapter.lora.alpha"])
    scaling = alpha / b.shape[1] if alpha else 1.0
    return scaling * (a @ b.T if name == "model.embed_tokens.weight" else b @ a)


@pytest.mark.parametrize("way", WAYS)
def test_llama_cpp_s_arithmetic_gives_what_the_adapter_adds(way, tmp_path):
    base(tmp_path / "base")
    made = adapter(tmp_path / "adapter", **WAYS[way])
    path = gguf.write(tmp_path / "base", tmp_path / "adapter", tmp_path / "out")
    assert path == tmp_path / "out" / "adapter.gguf"
    file = GgufFile(path)
    assert len(file.tensors) == 2 * len(made.weights)
    assert all(info.dtype == "F32" for info in file.tensors.values())
    for name, target in made.config.targets(CONFIG, CAUSAL).items():
        low = made.weights[name]
        wanted = target.scaling * (low.b.astype(np.float64) @ low.a.astype(np.float64))
        wanted = layouts.to_stored(wanted, target.row, CONFIG, layouts.rotary_pairs(target.row))
        found = computed(file, target.row, name)
        assert found.shape == wanted.shape, name
        # one rounding of alpha and one of each number of B
        assert np.abs(found - wanted).max() <= 2.0**-22 * np.abs(wanted).max(), name
        assert np.abs(wanted).max() > 0 or target.scaling == 0, name


def test_where_alpha_is_the_adapter_s_own_no_bit_changes(tmp_path):
    base(tmp_path / "base")
    made = adapter(tmp_path / "adapter", target_modules="all-linear", r=3, rank_pattern={"v_proj": 7}, lora_alpha=0.1)
    file = GgufFile(gguf.write(tmp_path / "base", tmp_path / "adapter", tmp_path / "out"))
    for name, target in made.config.targets(CONFIG, CAUSAL).items():
        stem, low = target.row.gguf.format(layer_of(name)), made.weights[name]
        found = {each: file.read(f"{stem}.lora_{each}") for each in "ab"}
        assert np.array_equal(found["a"], low.a), name
        assert np.array_equal(np.sort(found["b"], 0), np.sort(low.b, 0)), name
        assert np.array_equal(found["b"], low.b) == (not target.row.rotary), name


@pytest.mark.parametrize("source", ["hf", "gguf", "gguf of mistral3"])
def test_the_keys_are_those_that_llama_cpp_asks_for(source, tmp_path, monkeypatch):
    import gguf as peer

    base(tmp_path / "base", tie_word_embeddings=True)
    adapter(tmp_path / "adapter", CONFIG.replace(tie_word_embeddings=True))
    asked, architecture = tmp_path / "base", "llama"
    if source != "hf":
        if "mistral3" in source:  # as llama.cpp's converter writes the text part of a model that also sees
            architecture = "mistral3"
            monkeypatch.setattr(gguf_config, "architecture", lambda config: architecture)
        convert(tmp_path / "base", tmp_path / "converted", to="gguf")
        monkeypatch.undo()
        asked = (tmp_path / "converted" / "model.gguf").rename(tmp_path / "alone.gguf")
    reader = peer.GGUFReader(gguf.write(asked, tmp_path / "adapter", tmp_path / "out"))
    found = {name: field.contents() for name, field in reader.fields.items() if not name.startswith("GGUF.")}
    assert found == {
        "general.architecture": architecture,
        "general.type": "adapter",
        "general.name": "Mistral",
        "general.file_type": peer.LlamaFileType.ALL_F32,
        "general.alignment": 32,
        peer.Keys.Adapter.TYPE: "lora",
        peer.Keys.Adapter.LORA_ALPHA: 10.0,
    }
    assert {tensor.name for tensor in reader.tensors} == {
        f"blk.{layer}.attn_{each}.weight.lora_{side}" for layer in (0, 1) for each in "qv" for side in "ab"
    }


@pytest.mark.parametrize(
    ("model", "lora", "told"),
    [
        ({}, {"use_dora": True}, "use_dora must be false, llama.cpp computes no DoRA; fold it in with `mistral lora"),
        ({}, {"modules_to_save": ["lm_head"]}, "modules_to_save must be empty, got lm_head"),
        (
            {"tie_word_embeddings": True},
            {"target_modules": ["embed_tokens"]},
            "must not have embed_tokens where that is the head too",
        ),
        ({"architecture": "MistralForTokenClassification"}, {}, "must be a language model, .* MistralForTokenClass"),
    ],
)
def test_what_llama_cpp_does_not_compute_is_not_written(model, lora, told, tmp_path):
    architecture = model.get("architecture", CAUSAL)
    base(tmp_path / "base", **model)
    config = CONFIG.replace(tie_word_embeddings="tie_word_embeddings" in model)
    adapter(tmp_path / "adapter", config, architecture, **lora)
    with pytest.raises(UnsupportedFeatureError, match=told):
        gguf.write(tmp_path / "base", tmp_path / "adapter", tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_an_adapter_of_another_model_or_class_is_not_written(tmp_path):
    base(tmp_path / "base")
    adapter(tmp_path / "adapter")
    path = tmp_path / "adapter" / files.CONFIG_FILE
    fields = json.loads(path.read_text())
    path.write_text(json.dumps({**fields, "task_type": "SEQ_CLS"}))
    with pytest.raises(UnsupportedFeatureError, match="its task_type is SEQ_CLS"):
        gguf.write(tmp_path / "base", tmp_path / "adapter", tmp_path / "out")
    path.write_text(json.dumps({**fields, "r": 5}))
    with pytest.raises(ShapeMismatchError, match="the adapter is of a model of another size, or its config has"):
        gguf.write(tmp_path / "base", tmp_path / "adapter", tmp_path / "out")
    path.write_text(json.dumps({**fields, "r": 0}))
    with pytest.raises(ConfigError, match="r must be a positive integer"):
        gguf.write(tmp_path / "base", tmp_path / "adapter", tmp_path / "out")
    path.write_text(json.dumps({**fields, "lora_alpha": 1e-30, "alpha_pattern": {"v_proj": 1e30}}))
    with pytest.raises(NonFiniteWeightsError, match=r"v_proj.weight: B times 1e\+60, .* must be finite in float32"):
        gguf.write(tmp_path / "base", tmp_path / "adapter", tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_tensors_of_the_base_that_peft_wrote_too_must_be_those_of_the_base(tmp_path):
    arrays = base(tmp_path / "base")
    adapter(tmp_path / "adapter", target_modules=["embed_tokens"])
    stored = safetensors.SafetensorsFile(tmp_path / "adapter" / files.WEIGHTS_FILE)
    tensors = {name: stored.read(name) for name in stored.tensors}
    for factor in (1, 2):
        table = np.float32(factor) * arrays["model.embed_tokens.weight"]
        tensors[f"{files.PREFIX}model.embed_tokens.base_layer.weight"] = table
        path = tmp_path / "adapter" / files.WEIGHTS_FILE
        path.unlink()
        for name, info in safetensors.create(path, {name: ("F32", x.shape) for name, x in tensors.items()}).items():
            tensor_file.write(info, tensors[name])
        if factor == 1:
            found = GgufFile(gguf.write(tmp_path / "base", tmp_path / "adapter", tmp_path / "out"))
            assert set(found.tensors) == {"token_embd.weight.lora_a", "token_embd.weight.lora_b"}
            continue
        with pytest.raises(UnsupportedFeatureError, match=r"holds model\.embed_tokens\.weight of the base, which must"):
            gguf.write(tmp_path / "base", tmp_path / "adapter", tmp_path / "other")
        assert not (tmp_path / "other").exists()


def test_the_directory_is_the_old_one_or_the_new_one(tmp_path, monkeypatch):
    base(tmp_path / "base")
    adapter(tmp_path / "adapter")
    adapter(tmp_path / "other", lora_alpha=3)
    arguments = tmp_path / "base", tmp_path / "adapter", tmp_path / "out"
    path = gguf.write(*arguments)
    before = path.read_bytes()
    (tmp_path / "out" / "note.txt").write_text("kept")
    with pytest.raises(OutputExistsError, match="is there already"):
        gguf.write(*arguments)
    written, real = [], tensor_file.write

    def full(info, array):
        written.append(info)
        if len(written) == 3:
            raise OSError(errno.ENOSPC, "No space left on device")
        real(info, array)

    monkeypatch.setattr(tensor_file, "write", full)
    with pytest.raises(NoSpaceError, match="free some space, what was there before is untouched"):
        gguf.write(tmp_path / "base", tmp_path / "other", tmp_path / "out", overwrite=True)
    monkeypatch.undo()
    assert path.read_bytes() == before
    assert sorted(each.name for each in tmp_path.iterdir()) == ["adapter", "base", "other", "out"]
    gguf.write(tmp_path / "base", tmp_path / "other", tmp_path / "out", overwrite=True)
    assert GgufFile(path).values["adapter.lora.alpha"] == 3
    assert (tmp_path / "out" / "note.txt").read_text() == "kept"


def test_the_command(tmp_path, capsys):
    base(tmp_path / "base")
    adapter(tmp_path / "adapter")
    arguments = ["lora", "gguf", *(str(tmp_path / name) for name in ("base", "adapter", "out"))]
    assert main(arguments) == 0
    path = tmp_path / "out" / "adapter.gguf"
    assert capsys.readouterr().out == f"written: {path}, to be loaded beside the base's GGUF\n"
    assert main(arguments) == 2
    assert "is there already" in capsys.readouterr().err
    assert main([*arguments, "--overwrite", "--json"]) == 0
    assert json.loads(capsys.readouterr().out) == {"path": str(path)}
    assert main(arguments[:-1]) == 2
    assert "lora gguf: give BASE ADAPTER DST, got 2 paths" in capsys.readouterr().err
