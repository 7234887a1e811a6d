"""trl's trainers: our model and tokenizer, and as a measure transformers' own model on the same rows."""

from __future__ import annotations

import math

import datasets
import peft
import pytest
import torch
import trl

import mistral_torch

pytestmark = pytest.mark.filterwarnings("ignore")  # theirs

TEXTS = datasets.Dataset.from_dict({"text": ["Emma was happy", "It was a long story about her", "Mr. Knightley"] * 4})
CHAT = [{"role": "user", "content": "Who was Emma?"}, {"role": "assistant", "content": "She was happy."}]
PREFERENCES = datasets.Dataset.from_dict(
    {"prompt": ["Emma was"] * 8, "chosen": [" happy"] * 8, "rejected": [" sad and gone"] * 8}
)


def made(make, model, config, tmp_path, **options):
    """A trainer of two steps."""
    given = config.pop("config")(
        output_dir=str(tmp_path), max_steps=2, logging_steps=1, report_to=[], use_cpu=True, disable_tqdm=True,
        bf16=False, per_device_train_batch_size=2, learning_rate=1e-3, save_strategy="no", **config,
    )  # fmt: skip
    return make(model, args=given, **options)


def trained(make, model, config, tmp_path, **options):
    """The losses of two steps, and the trainer."""
    trainer = made(make, model, config, tmp_path, **options)
    trainer.train()
    losses = [row["loss"] for row in trainer.state.log_history if "loss" in row]
    assert len(losses) == 2
    assert all(math.isfinite(float(loss)) for loss in losses)
    return [float(loss) for loss in losses], trainer


def same_losses(make, model, their_model, tmp_path, config, **options):
    ours, trainer = trained(make, model, dict(config), tmp_path / "ours", **options)
    theirs, _ = trained(make, their_model, dict(config), tmp_path / "theirs", **options)
    assert ours == pytest.approx(theirs, rel=1e-3)
    return ours, trainer


@pytest.mark.client("trl", "SFTTrainer, our tokenizer as processing_class: the losses of transformers' model")
def test_supervised_fine_tuning(model, their_model, tokenizer, tmp_path):
    options = {"train_dataset": TEXTS, "processing_class": tokenizer}
    _, trainer = same_losses(trl.SFTTrainer, model, their_model, tmp_path, {"config": trl.SFTConfig}, **options)
    trainer.save_model(tmp_path / "saved")
    type(model).from_pretrained(tmp_path / "saved")


@pytest.mark.client("trl", "SFTTrainer(packing=True): loss and gradients are those of the documents one by one")
def test_packing(path, model, tokenizer, tmp_path):
    config = {"config": trl.SFTConfig, "packing": True, "max_length": 64}
    trainer = made(trl.SFTTrainer, model, config, tmp_path, train_dataset=TEXTS, processing_class=tokenizer)
    batch = next(iter(trainer.get_train_dataloader()))
    (ids,), (position,) = batch["input_ids"], batch["position_ids"]
    documents = ids.tensor_split((position == 0).nonzero().flatten()[1:].tolist())
    # trl writes the end of a text into it, and what is written in a text is text to our tokenizer
    texts = sorted(f"{text}{tokenizer.eos_token}" for text in TEXTS["text"])
    assert sorted(tokenizer.decode(each, skip_special_tokens=True) for each in documents) == texts

    alone, targets = type(model).from_pretrained(path).train(), len(ids) - len(documents)
    wanted = [alone(each[None], labels=each[None], num_items_in_batch=targets).loss for each in documents]
    sum(wanted).backward()
    loss = trainer.compute_loss(model, dict(batch))
    loss.backward()
    torch.testing.assert_close(loss, sum(wanted), rtol=1e-5, atol=0)
    for (name, parameter), other in zip(model.named_parameters(), alone.parameters(), strict=True):
        difference = (parameter.grad - other.grad).abs().max()
        assert difference <= 1e-5 * other.grad.abs().max(), name

    seeing = trainer.compute_loss(model, {"input_ids": ids[None], "labels": batch["labels"]})
    assert abs(seeing - loss) > 0.01 * loss, "documents that see each other have another loss"


@pytest.mark.client("trl", "DPOTrainer without ref_model: begins at ln 2, the losses of transformers' model")
def test_direct_preference_optimization(model, their_model, tokenizer, tmp_path):
    options = {"train_dataset": PREFERENCES, "processing_class": tokenizer}
    losses, _ = same_losses(trl.DPOTrainer, model, their_model, tmp_path, {"config": trl.DPOConfig}, **options)
    assert losses[0] == pytest.approx(math.log(2), abs=1e-4)


@pytest.mark.client("trl", "GRPOTrainer: generates by our generate, and trains")
def test_group_relative_policy_optimization(model, tokenizer, tmp_path):
    def reward(completions, **_):
        return [float(len(text)) for text in completions]

    before = [parameter.clone() for parameter in model.parameters()]
    config = {"config": trl.GRPOConfig, "num_generations": 2, "max_completion_length": 4, "temperature": 1.0}
    options = {"reward_funcs": reward, "processing_class": tokenizer}
    _, trainer = trained(
        trl.GRPOTrainer, model, config, tmp_path, train_dataset=PREFERENCES.select_columns("prompt"), **options
    )
    assert any(row.get("reward", 0) > 0 for row in trainer.state.log_history)
    assert any((old != new).any() for old, new in zip(before, model.parameters(), strict=True))


@pytest.mark.client(
    "trl", "SFTTrainer(assistant_only_loss=True), our tokenizer in mode 'finetuning': labels are the answers alone"
)
def test_assistant_only_loss(path, model, tmp_path):
    tokenizer = mistral_torch.AutoTokenizer.from_pretrained(path, mode="finetuning")
    config = {"config": trl.SFTConfig, "assistant_only_loss": True}
    rows = datasets.Dataset.from_dict({"messages": [CHAT] * 8})
    _, trainer = trained(trl.SFTTrainer, model, config, tmp_path, train_dataset=rows, processing_class=tokenizer)
    batch = next(iter(trainer.get_train_dataloader()))
    labels = batch["labels"][0]
    assert tokenizer.decode(labels[labels != -100], skip_special_tokens=True).strip() == CHAT[1]["content"]
    assert (labels == tokenizer.eos_token_id).any()


@pytest.mark.client("trl", "SFTTrainer with a peft LoRA config: adapters train, the folder loads")
def test_lora(path, model, tokenizer, tmp_path):
    before = {name: parameter.clone() for name, parameter in model.named_parameters()}
    adapter = peft.LoraConfig(task_type="CAUSAL_LM", r=2, target_modules="all-linear")
    options = {"train_dataset": TEXTS, "processing_class": tokenizer, "peft_config": adapter}
    _, trainer = trained(trl.SFTTrainer, model, {"config": trl.SFTConfig}, tmp_path, **options)
    trainer.save_model(tmp_path / "adapter")
    loaded = peft.PeftModel.from_pretrained(type(model).from_pretrained(path), tmp_path / "adapter")
    assert all(torch.equal(p, before[name]) for name, p in type(model).from_pretrained(path).named_parameters())
    changed = [name for name, p in loaded.named_parameters() if "lora_B" in name and p.abs().max() > 0]
    assert len(changed) == 7 * model.config.num_hidden_layers  # every linear but the head
