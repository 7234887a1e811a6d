"""An adapter merged on the way: the bits that a framework makes of it, in any format; and the command of adapters."""

from __future__ import annotations

import json

import numpy as np
import pytest

from conformance.weights import random_parameters
from mistral_core.cli import main
from mistral_core.config.presets import TINY
from mistral_core.errors import (
    LossyConversionError,
    MissingTensorsError,
    UnsupportedFeatureError,
)
from mistral_core.lora import adapter as files
from mistral_core.lora.config import LoraConfig
from mistral_core.weights.checkpoint import load, save
from mistral_core.weights.containers import safetensors, tensor_file
from mistral_core.weights.convert import convert

CONFIG = TINY.replace(num_hidden_layers=2, layer_types=None, sliding_window=None)
CAUSAL = "MistralForCausalLM"
WAYS = {
    "plain": {"target_modules": "all-linear"},
    "dora": {"target_modules": ["q_proj", "down_proj"], "use_dora": True},
    "embedding and head": {"target_modules": ["embed_tokens", "lm_head", "k_proj"]},
    "head saved whole": {"target_modules": ["q_proj"], "modules_to_save": ["lm_head"]},
}


def base(folder, dtype=np.float32, **config):
    config = CONFIG.replace(**config)
    arrays = {name: x.astype(np.float32).astype(dtype) for name, x in random_parameters(config, CAUSAL).items()}
    save(folder, config, arrays.items())
    return arrays


def adapter(folder, config=CONFIG, seed=0, **fields):
    lora = LoraConfig(**{"r": 4, "lora_alpha": 16, **fields}).for_model(config, CAUSAL)
    random, weights = np.random.default_rng(seed), {}
    for name, target in lora.targets(config, CAUSAL).items():
        fresh = files.initial_weights(target, config, lora, seed=seed)
        lengths = random.uniform(1, 2, len(fresh.b)).astype(np.float32) if lora.use_dora else None
        b = random.normal(size=fresh.b.shape).astype(np.float32) / 4
        weights[name] = files.LoraWeights(fresh.a, b, lengths)
    shape = (config.vocab_size, config.hidden_size)
    saved = {name: random.normal(size=shape).astype(np.float32) for name, _ in lora.saved(config, CAUSAL)}
    made = files.Adapter(lora, weights, saved)
    files.save(folder, made, config, CAUSAL)
    return made


def expected(arrays, made, config=CONFIG):
    """The formula, in float64, rounded once."""
    found = dict(arrays)
    for name, target in made.config.targets(config, CAUSAL).items():
        a, b, m = (None if x is None else x.astype(np.float64) for x in made.weights[name])
        wide = arrays[name].astype(np.float64) + target.scaling * (b @ a)
        if m is not None:
            wide *= (m / np.sqrt((wide**2).sum(1)))[:, None]
        found[name] = wide.astype(arrays[name].dtype)
    return found | {name: array.astype(arrays[name].dtype) for name, array in made.saved.items()}


@pytest.mark.parametrize("to", ["hf", "raw", "gguf"])
@pytest.mark.parametrize("way", WAYS)
def test_a_base_with_an_adapter_folded_in(way, to, tmp_path):
    arrays = base(tmp_path / "base")
    made = adapter(tmp_path / "adapter", **WAYS[way])
    report = convert(tmp_path / "base", tmp_path / "out", to=to, adapter=tmp_path / "adapter", verify="logits")
    changed = len({*made.weights, *made.saved})
    assert report.moves["merged with the adapter into the base"] == changed
    assert not report.losses
    found = dict(load(tmp_path / "out")[1])
    wanted = expected(arrays, made)
    assert found.keys() == wanted.keys()
    for name, array in wanted.items():
        assert np.abs(found[name].astype(np.float64) - array).max() <= np.spacing(np.abs(array).max()), name
        assert np.array_equal(found[name], arrays[name]) == (name not in {*made.weights, *made.saved}), name


@pytest.mark.parametrize("way", WAYS)
def test_a_framework_makes_the_same_bits(way, tmp_path):
    pytest.importorskip("torch")
    from mistral_torch import MistralForCausalLM, lora

    base(tmp_path / "base")
    adapter(tmp_path / "adapter", **WAYS[way])
    for dtype in ("float32", "bfloat16"):
        model = MistralForCausalLM.from_pretrained(tmp_path / "base", dtype=dtype)
        lora.merge(lora.load_adapter(model, tmp_path / "adapter")).save_pretrained(tmp_path / "torch")
        convert(tmp_path / "torch", tmp_path / "there", to="hf", overwrite=True)
        MistralForCausalLM.from_pretrained(tmp_path / "base", dtype=dtype).save_pretrained(tmp_path / "cast")
        convert(tmp_path / "cast", tmp_path / "here", to="hf", adapter=tmp_path / "adapter", overwrite=True)
        there, here = (dict(load(tmp_path / where)[1]) for where in ("there", "here"))
        assert all(there[name].tobytes() == here[name].tobytes() for name in there), dtype


def test_a_tied_embedding_that_is_adapted_parts_from_the_head(tmp_path):
    arrays = base(tmp_path / "base", tie_word_embeddings=True)
    config = CONFIG.replace(tie_word_embeddings=True)
    made = adapter(tmp_path / "adapter", config, target_modules=["embed_tokens"])
    convert(tmp_path / "base", tmp_path / "out", to="hf", adapter=tmp_path / "adapter")
    config, stream = load(tmp_path / "out")
    found = dict(stream)
    assert not config.tie_word_embeddings
    assert np.array_equal(found["lm_head.weight"], arrays["model.embed_tokens.weight"])
    wanted = expected(arrays, made, CONFIG.replace(tie_word_embeddings=True))["model.embed_tokens.weight"]
    assert np.allclose(found["model.embed_tokens.weight"], wanted, atol=1e-6)
    # what changes no embedding leaves them tied
    adapter(tmp_path / "other", CONFIG.replace(tie_word_embeddings=True), target_modules=["q_proj"])
    convert(tmp_path / "base", tmp_path / "out", to="hf", adapter=tmp_path / "other", overwrite=True)
    assert load(tmp_path / "out")[0].tie_word_embeddings


def test_a_packed_base_becomes_the_floats_that_it_means(tmp_path):
    base(tmp_path / "base")
    convert(tmp_path / "base", tmp_path / "packed", to="hf", quantization="int8", allow_lossy=True)
    made = adapter(tmp_path / "adapter", target_modules=["q_proj"])
    with pytest.raises(LossyConversionError, match="changes numbers"):
        convert(tmp_path / "packed", tmp_path / "out", to="hf", adapter=tmp_path / "adapter")
    report = convert(tmp_path / "packed", tmp_path / "out", to="hf", adapter=tmp_path / "adapter", allow_lossy=True)
    assert report.moves["merged with the adapter into the dequantised base"] == 2
    with pytest.warns(UserWarning, match="dequantised from compressed-tensors int8"):
        found, floats = (dict(load(tmp_path / where)[1]) for where in ("out", "packed"))
    wanted = expected(floats, made)
    assert all(np.allclose(found[name], wanted[name], atol=1e-5) for name in wanted)
    # and packed again where that is asked for
    convert(
        tmp_path / "base", tmp_path / "again", to="hf", adapter=tmp_path / "adapter", quantization="int8",
        allow_lossy=True,
    )  # fmt: skip
    with pytest.warns(UserWarning, match="dequantised from compressed-tensors int8"):
        again, plain = (dict(load(tmp_path / where)[1]) for where in ("again", "packed"))
    assert not np.array_equal(again["model.layers.0.self_attn.q_proj.weight"],
                              plain["model.layers.0.self_attn.q_proj.weight"])  # fmt: skip


def test_an_adapter_that_is_not_of_the_base_writes_nothing(tmp_path):
    base(tmp_path / "base")
    adapter(tmp_path / "other", CONFIG.replace(num_hidden_layers=1, layer_types=None))
    with pytest.raises(MissingTensorsError):
        convert(tmp_path / "base", tmp_path / "out", to="hf", adapter=tmp_path / "other")
    made = adapter(tmp_path / "adapter")
    fields = json.loads((tmp_path / "adapter" / files.CONFIG_FILE).read_text())
    (tmp_path / "adapter" / files.CONFIG_FILE).write_text(json.dumps({**fields, "task_type": "SEQ_CLS"}))
    with pytest.raises(UnsupportedFeatureError, match="load the adapter with MistralForSequenceClassification"):
        convert(tmp_path / "base", tmp_path / "out", to="hf", adapter=tmp_path / "adapter")
    assert not (tmp_path / "out").exists()
    assert made.weights


# The command


def test_the_command_tells_merges_and_compares(tmp_path, capsys):
    arrays = base(tmp_path / "base")
    made = adapter(tmp_path / "a", use_rslora=True, rank_pattern={"q_proj": 2})
    adapter(tmp_path / "b", use_rslora=True, rank_pattern={"q_proj": 2}, seed=1)
    paths = {name: str(tmp_path / name) for name in ("base", "a", "b", "out")}
    assert main(["lora", "info", paths["a"]]) == 0
    told = capsys.readouterr().out
    for line in (
        "kind         LoRA, rank-stabilized",
        "r            4",
        "targets      q_proj, v_proj",
        "tensors      8",
    ):
        assert line in told
    assert main(["lora", "info", paths["a"], "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["other ranks"] == {"q_proj": 2}
    assert main(["lora", "merge", paths["base"], paths["a"], paths["out"]]) == 0
    assert "merged with the adapter into the base" in capsys.readouterr().out
    name = "model.layers.1.self_attn.v_proj.weight"
    assert np.allclose(dict(load(tmp_path / "out")[1])[name], expected(arrays, made)[name], atol=1e-6)
    assert main(["lora", "diff", paths["a"], paths["a"]]) == 0
    assert capsys.readouterr().out == "the same\n"
    assert main(["lora", "diff", paths["a"], paths["b"]]) == 1
    assert "q_proj.lora_A.weight: " in capsys.readouterr().out
    path = tmp_path / "b" / files.WEIGHTS_FILE
    stored = safetensors.SafetensorsFile(tmp_path / "a" / files.WEIGHTS_FILE)
    arrays_of_a = {name.removeprefix(files.PREFIX): stored.read(name) for name in stored.tensors}
    path.unlink()
    for name, info in safetensors.create(path, {name: ("F32", x.shape) for name, x in arrays_of_a.items()}).items():
        tensor_file.write(info, arrays_of_a[name])
    assert main(["lora", "diff", paths["a"], paths["b"]]) == 0, "peft's prefix is no difference"
    capsys.readouterr()
    assert main(["convert", paths["base"], paths["out"], "--to", "hf", "--adapter", paths["a"], "--overwrite"]) == 0
    capsys.readouterr()
    assert main(["lora", "merge", paths["base"], paths["a"]]) == 2
    assert "lora merge: give BASE ADAPTER DST, got 2 paths" in capsys.readouterr().err
