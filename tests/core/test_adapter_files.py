"""Adapters in peft's files: what a config means is what peft makes of it, and a file is wholly used or refused."""

from __future__ import annotations

import json
import re

import numpy as np
import pytest

from mistral_core.config.presets import TINY
from mistral_core.errors import (
    CheckpointNotFoundError,
    ConfigError,
    ConversionError,
    MissingTensorsError,
    NonFiniteWeightsError,
    ShapeMismatchError,
    UnexpectedTensorsError,
    UnsafeFileError,
    UnsupportedFeatureError,
)
from mistral_core.lora import adapter as files
from mistral_core.lora.config import LoraConfig, module_of
from mistral_core.parameters import HEADS, parameters
from mistral_core.weights.containers import safetensors, tensor_file

CONFIG = TINY.replace(num_hidden_layers=12, layer_types=None)
SMALL = TINY.replace(num_hidden_layers=2, layer_types=None)
CAUSAL = "MistralForCausalLM"
WAYS = {
    "ends": {"target_modules": ["q_proj", "v_proj"]},
    "an end of two parts": {"target_modules": ["mlp.up_proj", "self_attn.o_proj"]},
    "a layer": {"target_modules": ["layers.1.mlp.up_proj"]},
    "a whole name": {"target_modules": ["model.layers.11.self_attn.k_proj"]},
    "a pattern": {"target_modules": r"model\.layers\.(1|11)\.mlp\.(up|down)_proj"},
    "a pattern of ends": {"target_modules": r".*\.self_attn\.(q|k)_proj"},
    "left out": {"target_modules": ["q_proj", "up_proj"], "exclude_modules": ["layers.0.self_attn.q_proj"]},
    "left out by a pattern": {"target_modules": ["q_proj", "up_proj"], "exclude_modules": r".*layers\.1\..*"},
    "one layer": {"target_modules": ["q_proj", "up_proj"], "layers_to_transform": 3},
    "some layers": {"target_modules": ["q_proj", "up_proj"], "layers_to_transform": [1, 10]},
    "layers by pattern": {"target_modules": ["q_proj"], "layers_to_transform": [2], "layers_pattern": "layers"},
    "saved whole": {"target_modules": ["q_proj", "lm_head"], "modules_to_save": ["lm_head"]},
    "embedding and head": {"target_modules": ["embed_tokens", "lm_head"]},
    "ranks": {"target_modules": ["q_proj", "up_proj"], "rank_pattern": {"layers.1.mlp.up_proj": 2, "up_proj": 3}},
    "alphas": {"target_modules": ["q_proj"], "alpha_pattern": {r"layers\.\d+\.self_attn.q_proj": 5, "q_proj": 7}},
    "both, rslora": {
        "target_modules": ["q_proj", "up_proj"], "use_rslora": True, "rank_pattern": {"q_proj": 2},
        "alpha_pattern": {"1.self_attn.q_proj": 3},
    },
}  # fmt: skip


@pytest.mark.parametrize("way", WAYS)
def test_a_config_means_what_peft_makes_of_it(way):
    peft = pytest.importorskip("peft")
    from peft.tuners.tuners_utils import check_target_module_exists
    from peft.utils.other import get_pattern_key

    fields = {"r": 8, "lora_alpha": 20, **WAYS[way]}
    theirs, ours = peft.LoraConfig(**fields), LoraConfig(**fields)
    found = ours.targets(CONFIG, CAUSAL)
    assert found
    for name, row in parameters(CONFIG, CAUSAL):
        if len(row.axes) < 2:
            continue
        module = module_of(name, CAUSAL)
        hit = check_target_module_exists(theirs, module)
        assert (name in found) == (bool(hit) and "Excluded" not in type(hit).__name__), name
        if name in found:
            rank = theirs.rank_pattern.get(get_pattern_key([*theirs.rank_pattern], module), theirs.r)
            alpha = theirs.alpha_pattern.get(get_pattern_key([*theirs.alpha_pattern], module), theirs.lora_alpha)
            assert found[name].r == rank
            assert found[name].scaling == alpha / (rank**0.5 if theirs.use_rslora else rank)


@pytest.mark.parametrize("architecture", HEADS)
def test_all_linear_is_every_matrix_of_the_layers_and_saves_the_head_of_a_classifier(architecture):
    lora = LoraConfig(target_modules="all-linear").for_model(SMALL, architecture)
    assert len(lora.targets(SMALL, architecture)) == 14
    head = {row.name for row in HEADS[architecture]} - {"lm_head.weight"}
    assert {name for name, _ in lora.saved(SMALL, architecture)} == head
    assert len(lora.target_modules) == 14, "whole names are written, as peft does"


def test_without_targets_they_are_peft_s_own():
    lora = LoraConfig().for_model(SMALL, CAUSAL)
    assert lora.target_modules == ("q_proj", "v_proj")
    assert lora.task_type == "CAUSAL_LM"


def test_a_config_is_written_as_peft_writes_it():
    peft = pytest.importorskip("peft")
    fields = {"r": 4, "lora_alpha": 9, "target_modules": ["q_proj"], "task_type": "CAUSAL_LM", "use_dora": True}
    theirs, ours = peft.LoraConfig(**fields).to_dict(), LoraConfig(**fields).to_dict()
    assert {**theirs, "target_modules": ["q_proj"], "peft_type": "LORA"} == ours
    assert LoraConfig.from_dict(ours) == LoraConfig(**fields)


@pytest.mark.parametrize(
    ("fields", "error", "told"),
    [
        ({"r": 0}, ConfigError, "r must be a positive integer, got 0"),
        ({"r": True}, ConfigError, "r must be a positive integer"),
        ({"rank_pattern": {"q_proj": -1}}, ConfigError, "rank_pattern"),
        ({"rank_pattern": []}, None, ""),
        ({"rank_pattern": [1]}, ConfigError, "rank_pattern must be an object"),
        ({"lora_alpha": "4"}, ConfigError, "lora_alpha must be a finite number"),
        ({"alpha_pattern": {"q_proj": float("inf")}}, ConfigError, "alpha_pattern"),
        ({"lora_dropout": 1.0}, ConfigError, "lora_dropout must be from 0 to below 1"),
        ({"bias": "some"}, ConfigError, "bias must be none, all or lora_only"),
        ({"bias": "all"}, None, ""),
        ({"target_modules": "("}, ConfigError, "must be a regular expression"),
        ({"target_modules": "(a+)+b"}, ConfigError, "may take for ever"),
        ({"rank_pattern": {".*.*.*.*.*x": 2}}, ConfigError, "may take for ever"),
        ({"target_modules": "q_proj", "layers_to_transform": [1]}, ConfigError, "goes with a list of target_modules"),
        ({"init_lora_weights": "pissa"}, UnsupportedFeatureError, "path_initial_model_for_weight_conversion"),
        ({"init_lora_weights": "gaussian"}, None, ""),
        ({"fan_in_fan_out": True}, UnsupportedFeatureError, "fan_in_fan_out"),
        ({"fan_in_fan_out": None}, None, ""),
        ({"lora_bias": True}, UnsupportedFeatureError, "no bias to merge"),
        ({"layer_replication": [[0, 1]]}, UnsupportedFeatureError, "layer_replication"),
        ({"target_parameters": ["x"]}, UnsupportedFeatureError, "give target_modules"),
        ({"trainable_token_indices": [1]}, UnsupportedFeatureError, "modules_to_save"),
        ({"use_qalora": True}, UnsupportedFeatureError, "not LoRA's"),
        ({"peft_type": "IA3"}, UnsupportedFeatureError, "adapters of the type LORA"),
        ({"of_the_future": None, "another": {}, "more": False}, None, ""),
        ({"of_the_future": 3}, UnsupportedFeatureError, "of_the_future=3: nothing here knows it"),
    ],
    ids=str,
)
def test_a_value_that_would_change_the_arithmetic_is_refused(fields, error, told):
    if error is None:
        assert LoraConfig.from_dict(fields) == LoraConfig(**{k: v for k, v in fields.items() if k in ("bias",)} | (
            {"init_lora_weights": "gaussian"} if "init_lora_weights" in fields else {}
        ))  # fmt: skip
        return
    with pytest.raises(error, match=re.escape(told)):
        LoraConfig.from_dict(fields)


def test_what_a_model_has_not_is_no_target():
    with pytest.raises(ConfigError, match="target_modules must name matrices of the model, got"):
        LoraConfig(target_modules=["w1"]).targets(SMALL, CAUSAL)
    with pytest.raises(ConfigError, match="modules_to_save must name modules of the model, got 'scores'"):
        LoraConfig(modules_to_save=["scores"]).saved(SMALL, CAUSAL)
    with pytest.raises(UnsupportedFeatureError, match="use_dora: not of embed_tokens"):
        LoraConfig(target_modules=["embed_tokens"], use_dora=True).targets(SMALL, CAUSAL)


# Files


def adapter_of(**fields):
    lora = LoraConfig(**{"r": 4, "target_modules": ["q_proj", "embed_tokens"], **fields}).for_model(SMALL, CAUSAL)
    random, weights = np.random.default_rng(0), {}
    for name, target in lora.targets(SMALL, CAUSAL).items():
        fresh = files.initial_weights(target, SMALL, lora)
        weights[name] = fresh._replace(b=random.normal(size=fresh.b.shape).astype(np.float32))
        if lora.use_dora:
            weights[name] = weights[name]._replace(magnitude=random.uniform(1, 2, len(fresh.b)).astype(np.float32))
    saved = {
        name: random.normal(size=[{"V": SMALL.vocab_size, "D": SMALL.hidden_size}[axis] for axis in row.axes]).astype(
            np.float32
        )
        for name, row in lora.saved(SMALL, CAUSAL)
    }
    return files.Adapter(lora, weights, saved)


KINDS = {
    "plain": {},
    "dora": {"target_modules": ["q_proj"], "use_dora": True},
    "saved": {"target_modules": ["q_proj"], "modules_to_save": ["lm_head"]},
}


@pytest.mark.parametrize("kind", KINDS)
def test_what_is_written_is_read(kind, tmp_path):
    (tmp_path / "a").mkdir()
    (tmp_path / "a" / "notes.txt").write_text("kept")
    adapter = adapter_of(**KINDS[kind])
    files.save(tmp_path / "a", adapter, SMALL, CAUSAL)
    found = files.load(tmp_path / "a", SMALL, CAUSAL)
    assert found.config == LoraConfig.from_dict({**adapter.config.to_dict(), "inference_mode": True})
    assert found.weights.keys() == adapter.weights.keys()
    for name, weights in adapter.weights.items():
        for ours, back in zip(weights, found.weights[name], strict=True):
            assert np.array_equal(ours, back) if ours is not None else back is None
    assert all(np.array_equal(array, found.saved[name]) for name, array in adapter.saved.items())
    assert found.saved.keys() == adapter.saved.keys()
    assert (tmp_path / "a" / "notes.txt").read_text() == "kept"
    assert files.is_adapter(tmp_path / "a")
    text = (tmp_path / "a" / files.CONFIG_FILE).read_text()
    assert list(json.loads(text)) == sorted(json.loads(text))


def rewritten(folder, change):
    """The file with its tensors changed: name -> array."""
    path = folder / files.WEIGHTS_FILE
    file = safetensors.SafetensorsFile(path)
    tensors = change({name: file.read(name) for name in file.tensors})
    path.unlink()
    kinds = {"float32": "F32", "float16": "F16"}
    header = {name: (kinds[array.dtype.name], array.shape) for name, array in tensors.items()}
    for name, info in safetensors.create(path, header).items():
        tensor_file.write(info, tensors[name])


def without_prefix(tensors):
    return {name.removeprefix(files.PREFIX): array for name, array in tensors.items()}


def test_names_without_peft_s_prefix_and_half_precision_are_read(tmp_path):
    adapter = adapter_of()
    files.save(tmp_path, adapter, SMALL, CAUSAL)
    rewritten(tmp_path, without_prefix)
    found = files.load(tmp_path, SMALL, CAUSAL)
    assert all(np.array_equal(found.weights[name].a, each.a) for name, each in adapter.weights.items())
    rewritten(tmp_path, lambda tensors: {name: array.astype(np.float16) for name, array in tensors.items()})
    found = files.load(tmp_path, SMALL, CAUSAL)
    assert all(found.weights[name].a.dtype == np.float32 for name in adapter.weights)


def dropped(tensors):
    tensors.popitem()
    return tensors


def added(tensors):
    return {**tensors, "base_model.model.model.layers.0.mlp.up_proj.lora_A.weight": np.ones((4, 64), np.float32)}


def renamed(tensors):
    return {f"base_model.{name}": array for name, array in tensors.items()}


def longer(tensors):
    return {name: np.concatenate([array, array]) for name, array in tensors.items()}


def spoilt(tensors):
    return {name: np.full_like(array, np.nan) for name, array in tensors.items()}


@pytest.mark.parametrize(
    ("change", "error", "told"),
    [
        (dropped, MissingTensorsError, "1 tensors of the adapter are missing"),
        (renamed, MissingTensorsError, "are there that its config does not mean (base_model.base_model"),
        (added, UnexpectedTensorsError, "1 tensors are none of the adapter (model.layers.0.mlp.up_proj.lora_A.weight)"),
        (longer, ShapeMismatchError, "the adapter is of a model of another size, or its config has another r"),
        (spoilt, NonFiniteWeightsError, "holds NaN or infinity"),
    ],
)
def test_a_file_is_used_wholly_or_refused(change, error, told, tmp_path):
    files.save(tmp_path, adapter_of(), SMALL, CAUSAL)
    rewritten(tmp_path, change)
    with pytest.raises(error, match=re.escape(told)):
        files.load(tmp_path, SMALL, CAUSAL)


def test_an_adapter_of_another_model_is_refused(tmp_path):
    files.save(tmp_path, adapter_of(), SMALL, CAUSAL)
    with pytest.raises(MissingTensorsError):
        files.load(tmp_path, SMALL.replace(num_hidden_layers=3, layer_types=None), CAUSAL)
    with pytest.raises(UnexpectedTensorsError):
        files.load(tmp_path, SMALL.replace(num_hidden_layers=1, layer_types=None), CAUSAL)
    with pytest.raises(ShapeMismatchError):
        files.load(tmp_path, SMALL.replace(vocab_size=SMALL.vocab_size + 1), CAUSAL)


def test_pickles_and_empty_folders_are_refused(tmp_path):
    with pytest.raises(CheckpointNotFoundError, match="holds no adapter_config.json"):
        files.load(tmp_path, SMALL, CAUSAL)
    files.save(tmp_path, adapter_of(), SMALL, CAUSAL)
    (tmp_path / files.WEIGHTS_FILE).rename(tmp_path / files.PICKLED_FILE)
    with pytest.raises(UnsafeFileError, match="a pickle, which is not read"):
        files.load(tmp_path, SMALL, CAUSAL)


def test_nothing_is_written_of_what_is_not_finite(tmp_path):
    files.save(tmp_path / "a", adapter_of(), SMALL, CAUSAL)
    before = (tmp_path / "a" / files.WEIGHTS_FILE).read_bytes()
    bad = adapter_of()
    name, weights = next(iter(bad.weights.items()))
    bad = bad._replace(weights={**bad.weights, name: weights._replace(b=weights.b * np.inf)})
    with pytest.raises(NonFiniteWeightsError), np.errstate(invalid="ignore"):
        files.save(tmp_path / "a", bad, SMALL, CAUSAL)
    assert (tmp_path / "a" / files.WEIGHTS_FILE).read_bytes() == before
    (tmp_path / "file").write_text("")
    with pytest.raises(ConversionError):
        files.save(tmp_path / "file", adapter_of(), SMALL, CAUSAL)


def test_a_merged_matrix_is_the_formula():
    random = np.random.default_rng(0)
    weight, a, b = random.normal(size=(5, 7)), random.normal(size=(2, 7)), random.normal(size=(5, 2))
    x, scaling, m = random.normal(size=7), 1.5, random.uniform(1, 2, 5)
    wanted = weight @ x + scaling * (b @ (a @ x))
    assert np.allclose(files.merged(weight, files.LoraWeights(a, b), scaling) @ x, wanted, atol=1e-12)
    rows = np.array([weight[o] + scaling * sum(b[o, r] * a[r] for r in range(2)) for o in range(5)])
    lengths = np.sqrt((rows**2).sum(1))
    found = files.merged(weight, files.LoraWeights(a, b, m), scaling)
    assert np.allclose(found, m[:, None] / lengths[:, None] * rows, atol=1e-12)
    assert np.allclose(np.linalg.norm(found, axis=1), m)
