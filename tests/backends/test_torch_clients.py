"""PyTorch models in the hands of transformers, accelerate and peft; tests/clients has what takes more."""

from __future__ import annotations

import copy
import functools
import pickle
import re
import sys

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

import mistral_torch
from conformance.weights import random_parameters
from mistral_core.config.presets import TINY
from mistral_core.errors import (
    ConfigError,
    InputError,
    MissingExtraError,
    MissingTensorsError,
    UnknownFieldError,
    UnsupportedFeatureError,
)

transformers = pytest.importorskip("transformers")
accelerate = pytest.importorskip("accelerate")

CONFIG = TINY.replace(num_hidden_layers=2)
IDS = torch.from_numpy(np.random.default_rng(0).integers(3, TINY.vocab_size, (3, 10)))
TIED = pytest.mark.parametrize("tied", [False, True])
CLASSES = [
    name
    for name in mistral_torch.__all__
    if name.startswith("Mistral") and hasattr(getattr(mistral_torch, name), "forward")
]


def make(architecture="MistralForCausalLM", *, tied=False):
    config = CONFIG.replace(tie_word_embeddings=tied)
    model = getattr(mistral_torch, architecture)(config)
    return model.load_arrays(random_parameters(config, architecture)).eval()


def same(model, other):
    return all(torch.equal(a, other.get_parameter(name)) for name, a in model.named_parameters())


# What a model is for a client


@pytest.mark.parametrize("architecture", CLASSES)
def test_a_model_is_seen_as_a_pretrained_model(architecture):
    model = make(architecture)
    own = getattr(mistral_torch, architecture)
    assert isinstance(model, transformers.PreTrainedModel)
    assert isinstance(model, own)
    assert not isinstance(model, transformers.GPT2PreTrainedModel)
    assert type(model) is own
    assert model.__class__.__name__ == architecture
    assert model.__class__.from_pretrained.__func__ is own.from_pretrained.__func__
    assert not issubclass(own, transformers.PreTrainedModel)


@pytest.mark.parametrize(
    "copied", [copy.copy, copy.deepcopy, *(lambda m, p=p: pickle.loads(pickle.dumps(m, p)) for p in (0, 2, 5))]
)
def test_a_model_that_is_seen_so_is_copied_and_pickled(copied):
    model = make()
    again = copied(model)
    assert type(again) is type(model)
    assert same(model, again)


def test_a_model_given_another_class_has_it():
    """As PyTorch's FSDP does: it derives a class from `__class__` and assigns it."""
    model = make()
    model.__class__ = type("Wrapped", (model.__class__,), {})
    assert type(model).__name__ == "Wrapped"
    assert isinstance(model, mistral_torch.MistralForCausalLM)
    assert model(IDS).logits.shape == (*IDS.shape, CONFIG.vocab_size)


TOLD = (
    "_is_stateful", "_keep_in_fp32_modules", "_keys_to_ignore_on_load_missing", "_keys_to_ignore_on_load_unexpected",
    "_keys_to_ignore_on_save", "_no_split_modules", "_skip_keys_device_placement", "_supports_attention_backend",
    "_supports_flash_attn", "_supports_flex_attn", "_supports_sdpa", "_tied_weights_keys", "all_tied_weights_keys",
    "base_model", "base_model_prefix", "config", "device", "dtype", "generation_config", "input_modalities",
    "is_activation_checkpointing", "is_gradient_checkpointing", "main_input_name", "model_tags", "name_or_path",
    "supports_gradient_checkpointing", "warnings_issued",
)  # fmt: skip


@pytest.mark.parametrize("architecture", CLASSES)
def test_what_clients_read_is_there(architecture):
    model = make(architecture)
    for name in TOLD:
        getattr(model, name)
    assert model.can_generate() == (architecture == "MistralForCausalLM")
    assert model.main_input_name == "input_ids"
    assert model.framework == "pt"
    assert model.get_decoder() is model.base_model
    layers = {type(module).__name__ for module in model.modules()}
    assert set(model._no_split_modules) <= layers
    model.warnings_issued["estimate_tokens"] = True
    assert model.warnings_issued == {"estimate_tokens": True}
    assert make(architecture).warnings_issued == {}
    model.add_model_tags("trl")
    model.add_model_tags(["sft"])
    assert model.model_tags == ["trl", "sft"]
    assert type(model).model_tags is None


@TIED
def test_tied_tensors_are_named(tied):
    model = make(tied=tied)
    assert model._tied_weights_keys == ({"lm_head.weight": "model.embed_tokens.weight"} if tied else {})
    bytes_of_one = model.lm_head.weight.numel() * 4
    assert make(tied=False).get_memory_footprint() - make(tied=True).get_memory_footprint() == bytes_of_one


def test_the_decoder_is_replaced():
    model, other = make(tied=True), mistral_torch.MistralModel(CONFIG.replace(tie_word_embeddings=True))
    model.set_decoder(other)
    assert model.get_decoder() is other
    assert model.lm_head.weight is other.embed_tokens.weight


@pytest.mark.parametrize(("given", "told"), [(None, "sdpa"), ("eager", "eager"), ("flex", "flex_attention")])
def test_what_clients_read_of_a_config(given, told, tmp_path):
    make().save_pretrained(tmp_path)
    written = (tmp_path / "config.json").read_bytes()
    model = mistral_torch.MistralForCausalLM.from_pretrained(tmp_path, attn_implementation=given)
    config = model.config
    assert config._attn_implementation == model.base_model.config._attn_implementation == told
    assert model.name_or_path == config.name_or_path == config._name_or_path == str(tmp_path)
    assert config.is_encoder_decoder is False
    assert config.get_text_config() is config
    assert config.use_return_dict is True
    config.use_cache = False
    assert config._attn_implementation == told
    with pytest.raises(UnknownFieldError):
        config.use_chache = False
    config.use_cache = True
    model.save_pretrained(tmp_path)  # nothing of it is written
    assert (tmp_path / "config.json").read_bytes() == written


def test_a_fresh_model_comes_from_nowhere():
    model = make()
    assert model.name_or_path == model.config.name_or_path == ""


# Saving, as the Trainer, accelerate and FSDP call it


@TIED
def test_another_state_is_saved(tied, tmp_path):
    model, other = make(tied=tied), make(tied=tied)
    with torch.no_grad():
        for parameter in other.parameters():
            parameter.mul_(2)
    model.save_pretrained(tmp_path, state_dict=other.state_dict(), is_main_process=True, save_function=torch.save)
    assert same(other, mistral_torch.MistralForCausalLM.from_pretrained(tmp_path))
    state = other.state_dict()
    del state["model.norm.weight"]
    with pytest.raises(MissingTensorsError, match="model.norm.weight"):
        model.save_pretrained(tmp_path, state_dict=state)


def test_another_process_than_the_main_one_writes_nothing(tmp_path):
    make().save_pretrained(tmp_path / "model", is_main_process=False)
    assert not (tmp_path / "model").exists()


@TIED
def test_a_saved_file_is_a_whole_state_dict(tied, tmp_path):
    model = make(tied=tied)
    model.save_pretrained(tmp_path)
    again = mistral_torch.MistralForCausalLM(model.config)
    state = load_file(tmp_path / "model.safetensors")
    again.load_state_dict(state)
    assert same(model, again)
    del state["model.embed_tokens.weight"]
    with pytest.raises(RuntimeError, match="embed_tokens"):
        again.load_state_dict(state)


# accelerate


@pytest.mark.client("accelerate", "init_empty_weights, load_checkpoint_and_dispatch, tied or not")
@TIED
def test_empty_weights_are_loaded(tied, tmp_path):
    model = make(tied=tied)
    model.save_pretrained(tmp_path)
    with accelerate.init_empty_weights():
        empty = mistral_torch.AutoModelForCausalLM.from_config(mistral_torch.AutoConfig.from_pretrained(tmp_path))
    assert empty.device.type == "meta"
    with pytest.raises(InputError, match="embed_tokens.weight.*meta"):
        empty.save_pretrained(tmp_path / "empty")
    loaded = accelerate.load_checkpoint_and_dispatch(empty, tmp_path, device_map={"": "cpu"})
    assert same(model, loaded)
    assert (loaded.lm_head.weight is loaded.model.embed_tokens.weight) == tied
    assert torch.equal(loaded(IDS).logits, model(IDS).logits)


# Packing


@pytest.mark.client("transformers", "DataCollatorWithFlattening: rows are apart")
def test_rows_of_the_flattening_collator_are_apart():
    rows = [{"input_ids": ids.tolist(), "labels": ids.tolist()} for ids in (IDS[0, :4], IDS[1], IDS[2, :7])]
    collator = transformers.DataCollatorWithFlattening(return_flash_attn_kwargs=True, return_seq_idx=True)
    model = make()
    packed = collator(rows)
    assert {"cu_seq_lens_q", "max_length_q", "seq_idx"} <= set(packed)
    alone = torch.cat([model(torch.tensor([row["input_ids"]])).logits for row in rows], dim=1)
    for left_out in ({"seq_idx"}, {"cu_seq_lens_q", "cu_seq_lens_k"}, set()):
        given = {name: value for name, value in packed.items() if name not in {*left_out, "labels"}}
        assert torch.allclose(model(**given).logits, alone, atol=1e-4)


# transformers' caches


def theirs(config):
    fields = {key: value for key, value in config.to_dict(dialect="v5").items() if key != "architectures"}
    return transformers.MistralConfig(**fields, attn_implementation="eager")


CACHES = {
    "dynamic": lambda config: transformers.DynamicCache(),
    "dynamic, by config": lambda config: transformers.DynamicCache(config=theirs(config)),
    "static": lambda config: transformers.StaticCache(theirs(config.replace(sliding_window=None)), max_cache_len=16),
}
LEFT = torch.ones_like(IDS)
LEFT[0, :3] = 0


def windowed(window):
    config = CONFIG.replace(sliding_window=window)
    model = mistral_torch.MistralForCausalLM(config)
    return model.load_arrays(random_parameters(config, "MistralForCausalLM")).eval()


@pytest.mark.client("transformers", "DynamicCache and StaticCache in and out of the forward pass")
@pytest.mark.parametrize("kind", CACHES)
@pytest.mark.parametrize("window", [None, 4, 7])
@pytest.mark.parametrize("cuts", [(10,), (4, 5, 6, 10), (8, 9, 10)])
def test_their_cache_gives_what_ours_gives(kind, window, cuts):
    model = windowed(window)
    cache, logits, start = CACHES[kind](model.config), [], 0
    for cut in cuts:
        out = model(IDS[:, start:cut], LEFT[:, :cut], past_key_values=cache)
        assert out.past_key_values is cache
        assert cache.get_seq_length() == cut
        logits.append(out.logits)
        start = cut
    assert torch.allclose(torch.cat(logits, 1)[LEFT == 1], model(IDS, LEFT).logits[LEFT == 1], atol=1e-4)


@pytest.mark.client("transformers", "a cache filled by their model and read by ours, and the reverse")
@pytest.mark.parametrize("kind", CACHES)
@pytest.mark.parametrize("window", [None, 4])
def test_a_cache_goes_between_our_model_and_theirs(kind, window):
    model = windowed(window)
    other = transformers.MistralForCausalLM(theirs(model.config)).eval()
    other.load_state_dict(model.state_dict())
    positions = (LEFT.cumsum(1) - 1).clamp(min=0)
    ours, hers = CACHES[kind](model.config), CACHES[kind](model.config)
    with torch.no_grad():
        model(IDS[:, :8], LEFT[:, :8], past_key_values=ours)
        other(IDS[:, :8], attention_mask=LEFT[:, :8], position_ids=positions[:, :8], past_key_values=hers)
        for mine, yours in zip(ours.layers, hers.layers, strict=True):
            real = LEFT[:, :8][:, -mine.keys.shape[2] :][:, :, None, None]
            kept = slice(None) if kind != "static" else slice(8)
            for a, b in ((mine.keys, yours.keys), (mine.values, yours.values)):
                assert torch.allclose(
                    a[:, :, kept].transpose(1, 2) * real, b[:, :, kept].transpose(1, 2) * real, atol=1e-4
                )
        expected = model(IDS, LEFT).logits[:, 8:]
        found = model(IDS[:, 8:], LEFT, past_key_values=hers).logits
    assert torch.allclose(found, expected, atol=1e-4)


def test_a_cache_of_theirs_with_padding_in_between():
    model, mask = windowed(5), torch.ones_like(IDS)
    mask[1, 3:6] = 0
    cache = transformers.DynamicCache()
    model(IDS[:, :8], mask[:, :8], past_key_values=cache)
    found = model(IDS[:, 8:], mask, past_key_values=cache).logits
    assert torch.allclose(found, model(IDS, mask).logits[:, 8:], atol=1e-4)
    cache = transformers.DynamicCache(config=theirs(model.config))  # which has dropped what row 1 still sees
    model(IDS[:, :8], mask[:, :8], past_key_values=cache)
    with pytest.raises(InputError, match="dropped"):
        model(IDS[:, 8:], mask, past_key_values=cache)


def test_gradients_flow_through_a_cache_of_theirs():
    model = make()
    _, H, K = CONFIG.hidden_size, CONFIG.head_dim, CONFIG.num_key_value_heads
    prefix = [torch.randn(3, K, 2, H, requires_grad=True) for _ in range(2 * CONFIG.num_hidden_layers)]
    cache = transformers.DynamicCache(zip(prefix[::2], prefix[1::2], strict=True))
    mask = torch.ones(3, 12, dtype=torch.int64)
    model(IDS, mask, past_key_values=cache, labels=IDS).loss.backward()
    assert all(part.grad.abs().max() > 0 for part in prefix)


def test_a_decode_loop_with_a_cache_of_theirs():
    model, cache, ids, mask = make(), transformers.DynamicCache(), IDS, LEFT
    with torch.no_grad():
        for _ in range(4):
            inputs = model.prepare_inputs_for_generation(ids, past_key_values=cache, attention_mask=mask)
            out = model(**inputs)
            cache = out.past_key_values
            ids = torch.cat([ids, out.logits[:, -1:].argmax(-1)], dim=1)
            mask = torch.nn.functional.pad(mask, (0, 1), value=1)
    assert cache.get_seq_length() == 13
    assert torch.equal(ids, model.generate(IDS, attention_mask=LEFT, max_new_tokens=4, eos_token_id=None))


def test_a_cache_of_theirs_that_does_not_fit():
    model, cache = make(), transformers.DynamicCache()
    model(IDS, past_key_values=cache)
    with pytest.raises(InputError, match=r"\[2, 2, columns, 16\]"):
        model(IDS[:2], past_key_values=cache)
    with pytest.raises(InputError, match="3 layers, the model has 2"):
        model(IDS, past_key_values=transformers.DynamicCache(config=theirs(CONFIG.replace(num_hidden_layers=3))))
    with pytest.raises(UnsupportedFeatureError, match="StaticSlidingWindowLayer"):
        cache = transformers.StaticCache(theirs(CONFIG.replace(sliding_window=4)), max_cache_len=16)
        for _ in range(2):
            model(IDS, past_key_values=cache)


# Offloading


def cpu_offload(model, tmp_path):
    return accelerate.cpu_offload(model, execution_device="cpu")


def disk_offload(model, tmp_path):
    return accelerate.disk_offload(model, tmp_path / "offload", execution_device="cpu")


def load_and_dispatch(model, tmp_path):
    model.save_pretrained(tmp_path / "model")
    with accelerate.init_empty_weights():
        empty = type(model)(model.config)
    empty.tie_weights()
    sizes = {"cpu": 200_000}
    split = accelerate.infer_auto_device_map(empty, sizes, no_split_module_classes=empty._no_split_modules)
    assert {*split.values()} == {"cpu", "disk"}
    return accelerate.load_checkpoint_and_dispatch(
        empty, tmp_path / "model", device_map=split, offload_folder=tmp_path / "offload"
    )


@pytest.mark.client(
    "accelerate", "cpu_offload, disk_offload, infer_auto_device_map and dispatch: logits, generate, save_pretrained"
)
@TIED
@pytest.mark.parametrize("offload", [cpu_offload, disk_offload, load_and_dispatch])
def test_an_offloaded_model_computes_generates_and_is_saved(offload, tied, tmp_path):
    model = make(tied=tied)
    there = offload(make(tied=tied), tmp_path).eval()
    assert any(parameter.is_meta for parameter in there.parameters())
    assert there.device.type == "cpu"
    with torch.no_grad():
        assert torch.equal(there(IDS).logits, model(IDS).logits)
        assert torch.equal(there.generate(IDS, max_new_tokens=3), model.generate(IDS, max_new_tokens=3))
    there.save_pretrained(tmp_path / "saved")
    assert same(model, mistral_torch.MistralForCausalLM.from_pretrained(tmp_path / "saved"))


AUTO = {"device_map": "auto", "max_memory": {"cpu": 200_000}}
MAP = {"model.embed_tokens": "cpu", "model.layers": "disk", "model.norm": "cpu", "lm_head": "cpu"}


@pytest.mark.client("accelerate", "from_pretrained(device_map=, max_memory=, offload_folder=): memory and disk")
@TIED
@pytest.mark.parametrize("asked", [AUTO, {**AUTO, "device_map": "sequential"}, {"device_map": MAP}], ids=str)
def test_parts_of_a_model_go_where_there_is_room(asked, tied, tmp_path, caplog):
    model = make(tied=tied)
    model.save_pretrained(tmp_path / "model")
    with caplog.at_level("INFO", "mistral.torch"):
        there = mistral_torch.MistralForCausalLM.from_pretrained(
            tmp_path / "model", offload_folder=tmp_path / "offload", **asked
        )
    sizes = r"device_map: cpu \d+\.\d\d MB, disk \d+\.\d\d MB"
    assert [r.levelname for r in caplog.records if re.fullmatch(sizes, r.getMessage())] == ["WARNING"]
    assert set(map(str, there.hf_device_map.values())) == {"cpu", "disk"}
    on_disk = {name for name, parameter in there.named_parameters() if parameter.is_meta}
    assert {path.stem for path in (tmp_path / "offload").glob("*.dat")} == on_disk
    assert on_disk
    with torch.no_grad():
        assert torch.equal(there(IDS).logits, model(IDS).logits)
        assert torch.equal(there.generate(IDS, max_new_tokens=3), model.generate(IDS, max_new_tokens=3))
    there.save_pretrained(tmp_path / "saved")
    assert same(model, mistral_torch.MistralForCausalLM.from_pretrained(tmp_path / "saved"))


def test_parts_that_go_nowhere(tmp_path, monkeypatch):
    make().save_pretrained(tmp_path / "model")
    load = functools.partial(mistral_torch.MistralForCausalLM.from_pretrained, tmp_path / "model")
    with pytest.raises(ConfigError, match="device_map must say where 'lm_head.weight' goes, got 'model'"):
        load(device_map={"model": "cpu"})
    with pytest.raises(ConfigError, match="offload_folder: parts of the model go to disk; say in which directory"):
        load(device_map=MAP)
    with pytest.raises(UnsupportedFeatureError, match="proj.weight is packed, and packed matrices stay in memory"):
        load(device_map=MAP, offload_folder=tmp_path / "offload", quantization="int8")
    with pytest.raises(UnsupportedFeatureError, match="max_memory"):
        load(max_memory={"cpu": 1})
    packed = load(device_map={"model": "cpu", "lm_head": "cpu"}, quantization="int8")
    assert packed(IDS).logits.shape == (*IDS.shape, CONFIG.vocab_size)
    assert load(device_map="auto", offload_folder=tmp_path / "none").device.type == "cpu"
    monkeypatch.setitem(sys.modules, "accelerate", None)
    with pytest.raises(
        MissingExtraError, match=r"device_map='auto' needs accelerate; pip install 'mistral-frameworks\[o"
    ):
        load(**AUTO, offload_folder=tmp_path / "offload")
    assert not (tmp_path / "none").exists()


# Generation


def test_the_options_we_write_leave_theirs_in_force(tmp_path):
    """To transformers a file's max_new_tokens counts more than a call's max_length, so no default is written."""
    make().save_pretrained(tmp_path)
    written = transformers.GenerationConfig.from_pretrained(tmp_path)
    assert written.max_new_tokens is None
    other = transformers.MistralForCausalLM.from_pretrained(tmp_path)
    assert other.generate(IDS, max_length=13, do_sample=False, eos_token_id=None).shape == (3, 13)


@pytest.mark.client("transformers", "generate(past_key_values=DynamicCache())")
@pytest.mark.parametrize("window", [None, 4])
def test_generate_continues_and_fills_a_cache_of_theirs(window):
    model, cache = windowed(window), transformers.DynamicCache()
    options = {"max_new_tokens": 3, "eos_token_id": None}
    whole = model.generate(IDS, attention_mask=LEFT, max_new_tokens=6, eos_token_id=None)
    first = model.generate(IDS, attention_mask=LEFT, past_key_values=cache, **options)
    assert cache.get_seq_length() == 12
    mask = torch.nn.functional.pad(LEFT, (0, 3), value=1)
    out = model.generate(first, attention_mask=mask, past_key_values=cache, return_dict_in_generate=True, **options)
    assert torch.equal(out.sequences, whole)
    assert out.past_key_values is cache
    assert cache.get_seq_length() == 15


# peft

TUNERS = {
    "prompt tuning": lambda peft: peft.PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=5),
    "p-tuning": lambda peft: peft.PromptEncoderConfig(
        task_type="CAUSAL_LM", num_virtual_tokens=5, encoder_hidden_size=8
    ),
    "prefix tuning": lambda peft: peft.PrefixTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=5),
}


@pytest.mark.client("peft", "prompt tuning, p-tuning, prefix tuning: train, generate, save and load")
@pytest.mark.parametrize("kind", TUNERS)
@pytest.mark.parametrize("window", [None, 12])
def test_virtual_tokens_count(kind, window, tmp_path):
    peft = pytest.importorskip("peft")
    torch.manual_seed(0)
    tuned = peft.get_peft_model(windowed(window), TUNERS[kind](peft))
    with torch.no_grad():
        for parameter in tuned.parameters():
            if parameter.requires_grad:
                parameter.normal_()
    tuned(input_ids=IDS, attention_mask=LEFT, labels=IDS).loss.backward()
    assert all(p.grad.abs().max() > 0 for p in tuned.parameters() if p.requires_grad)
    tuned.eval()
    ids, mask = IDS, LEFT
    with torch.no_grad():
        for _ in range(3):
            token = tuned(input_ids=ids, attention_mask=mask).logits[:, -1:].argmax(-1)
            ids, mask = torch.cat([ids, token], 1), torch.nn.functional.pad(mask, (0, 1), value=1)
        options = {"attention_mask": LEFT, "max_new_tokens": 3, "eos_token_id": None}
        assert torch.equal(tuned.generate(input_ids=IDS, **options), ids)
        assert torch.equal(tuned.generate(IDS, attention_mask=LEFT, max_length=13, eos_token_id=None), ids)
        assert torch.equal(tuned.generate(input_ids=IDS, return_dict_in_generate=True, **options).sequences, ids)
        plain = tuned.get_base_model().generate(IDS, **options)
        assert not torch.equal(plain, ids)
        assert torch.equal(plain, windowed(window).generate(IDS, **options))
        tuned.save_pretrained(tmp_path)
        loaded = peft.PeftModel.from_pretrained(windowed(window), tmp_path).eval()
        assert torch.equal(loaded.generate(input_ids=IDS, **options), ids)


# transformers' Trainer


@pytest.mark.client("transformers", "Trainer: checkpoints of tied models, resume, load_best_model_at_end, predict")
@pytest.mark.filterwarnings("ignore")  # theirs
@TIED
def test_trainer_saves_resumes_and_loads_the_best(tied, tmp_path):
    rows = [{"input_ids": ids, "attention_mask": torch.ones_like(ids), "labels": ids} for ids in IDS]
    arguments = transformers.TrainingArguments(
        str(tmp_path), max_steps=4, save_steps=2, eval_steps=2, eval_strategy="steps", load_best_model_at_end=True,
        per_device_train_batch_size=3, learning_rate=1e-3, report_to=[], use_cpu=True, disable_tqdm=True,
    )  # fmt: skip
    model = make(tied=tied)
    trainer = transformers.Trainer(model, arguments, train_dataset=rows, eval_dataset=rows)
    trainer.train()
    best = type(model).from_pretrained(trainer.state.best_model_checkpoint)
    assert same(best, model)
    assert (model.lm_head.weight is model.model.embed_tokens.weight) == tied
    resumed = make(tied=tied)
    again = transformers.Trainer(resumed, arguments, train_dataset=rows, eval_dataset=rows)
    again.train(resume_from_checkpoint=str(tmp_path / "checkpoint-2"))
    assert all(torch.allclose(a, b, atol=1e-6) for a, b in zip(resumed.parameters(), model.parameters(), strict=True))
    predicted = trainer.predict(rows)
    assert predicted.predictions.shape == (*IDS.shape, CONFIG.vocab_size)
    trainer.save_model(str(tmp_path / "saved"))
    assert same(model, type(model).from_pretrained(tmp_path / "saved"))
