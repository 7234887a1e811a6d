"""Training in PyTorch: loops as people write them, mixed precision, checkpointing, peft, transformers' Trainer."""

from __future__ import annotations

import copy

import numpy as np
import pytest
import torch
import torch.nn.functional as F

import mistral_torch
from conformance.weights import random_parameters
from mistral_core.config.presets import TINY
from mistral_core.errors import UnsupportedFeatureError
from mistral_torch.attention import Visibility, attend

CONFIG = TINY.replace(num_hidden_layers=2)
IDS = torch.from_numpy(np.random.default_rng(0).integers(3, TINY.vocab_size, (4, 12)))
MASK = torch.ones_like(IDS)
MASK[0, :4], MASK[1, 9:] = 0, 0
IMPLEMENTATIONS = pytest.mark.parametrize("implementation", ["eager", "sdpa", "flex"])


def make(architecture="MistralForCausalLM", config=CONFIG, **options):
    model = getattr(mistral_torch, architecture)(config, **options)
    return model.load_arrays(random_parameters(config, architecture)).eval()


def gradients(model, **options):
    model.zero_grad()
    torch.manual_seed(0)
    model(IDS, attention_mask=MASK, labels=IDS, **options).loss.backward()
    return {name: p.grad for name, p in model.named_parameters()}


def falls(losses):
    return losses[-1] < losses[0] / 2 and all(np.isfinite(losses))


# Loops


def decay_groups(model):
    """Weight decay for matrices only, told by name as everybody does."""
    named = list(model.named_parameters())
    plain = [p for name, p in named if "norm" in name or name.endswith(".bias")]
    decayed = [p for name, p in named if not ("norm" in name or name.endswith(".bias"))]
    assert len(plain) == 2 * CONFIG.num_hidden_layers + 1
    return [{"params": decayed, "weight_decay": 0.1}, {"params": plain, "weight_decay": 0.0}]


@pytest.mark.feature("Training step")
@pytest.mark.parametrize("packed", [False, True])
def test_supervised_fine_tuning(packed):
    """Prompts masked with -100; gradients accumulated and clipped; a schedule; rows padded, or two packed in one."""
    model = make().train()
    model.config.use_cache = False
    labels = torch.where(MASK == 1, IDS, -100)
    labels[:, :3] = -100
    batch = {"input_ids": IDS, "attention_mask": MASK, "labels": labels}
    if packed:
        batch = {"input_ids": IDS.view(2, 24), "labels": labels.view(2, 24)}
        batch["document_ids"] = torch.arange(4).repeat_interleave(12).view(2, 24)
    optimizer = torch.optim.AdamW(decay_groups(model), lr=3e-2)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 1 - step / 10)
    losses = []
    for _ in range(8):
        for part in zip(*(array.chunk(2) for array in batch.values()), strict=True):
            loss = model(**dict(zip(batch, part, strict=True))).loss / 2
            loss.backward()
        losses.append(2 * loss.item())
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        optimizer.zero_grad()
    assert falls(losses)


@pytest.mark.feature("Training step")
def test_accumulated_gradients_are_those_of_the_whole_batch():
    whole = gradients(make(), use_cache=False)
    model = make()
    for rows in (slice(0, 2), slice(2, 4)):
        part = model(IDS[rows], attention_mask=MASK[rows], labels=IDS[rows]).loss / 2
        part.backward()
    assert all(torch.allclose(p.grad, whole[name], atol=1e-6) for name, p in model.named_parameters())


def log_probability(model, ids, answer):
    logits = model(ids).logits[:, :-1].log_softmax(-1)
    each = logits.gather(-1, ids[:, 1:, None])[..., 0]
    return each[:, answer:].sum(-1)


@pytest.mark.feature("SFT and DPO loops as trl writes them")
def test_direct_preference_optimization():
    policy = make()
    reference = copy.deepcopy(policy).requires_grad_(False)
    policy.train()
    chosen, rejected = IDS[:2], torch.cat([IDS[:2, :5], IDS[2:, 5:]], dim=1)
    optimizer = torch.optim.AdamW(policy.parameters(), lr=1e-3)
    losses = []
    for _ in range(6):
        margin = sum(
            sign * (log_probability(policy, ids, 4) - log_probability(reference, ids, 4))
            for sign, ids in ((1, chosen), (-1, rejected))
        )
        loss = -F.logsigmoid(0.5 * margin).mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[0] == pytest.approx(np.log(2), abs=1e-5)
    assert falls(losses)
    untouched = make()
    assert all(torch.equal(a, b) for a, b in zip(reference.parameters(), untouched.parameters(), strict=True))


@pytest.mark.feature("Training step")
def test_generated_text_can_be_trained_on():
    model = make().train()
    text = model.generate(IDS, attention_mask=MASK, max_new_tokens=3)
    model(text, labels=text).loss.backward()
    assert model.lm_head.weight.grad.abs().max() > 0


# Mixed precision


@pytest.mark.feature("Mixed precision")
@IMPLEMENTATIONS
def test_training_under_autocast(implementation):
    model = make(attn_implementation=implementation).train()
    expected = gradients(model)
    with torch.autocast("cpu", torch.bfloat16):
        out = model(IDS, attention_mask=MASK, labels=IDS)
        found = gradients(model)
    assert out.logits.dtype == out.loss.dtype == torch.float32
    for name, gradient in expected.items():
        assert found[name].dtype == torch.float32
        assert (found[name] - gradient).norm() < 0.05 * gradient.norm(), name


@pytest.mark.feature("Mixed precision")
def test_autocast_leaves_the_softmax_exact():
    arrays = torch.randn(3, 2, 9, 2, 16, generator=torch.Generator().manual_seed(0))
    order = torch.arange(9).expand(2, 9)
    visibility = Visibility(order, order)
    exact, weights = attend(*arrays, visibility, implementation="eager")
    with torch.autocast("cpu", torch.bfloat16):
        found, found_weights = attend(*arrays, visibility, implementation="eager")
    assert torch.equal(found, exact)
    assert torch.equal(found_weights, weights)


@pytest.mark.feature("Mixed precision")
@IMPLEMENTATIONS
def test_autocast_with_a_cache(implementation):
    model = make(attn_implementation=implementation)
    with torch.no_grad():
        exact = model(IDS, MASK).logits[MASK == 1]
        with torch.autocast("cpu", torch.bfloat16):
            past = model(IDS[:, :8], MASK[:, :8]).past_key_values
            later = model(IDS[:, 8:], MASK[:, 8:], past_key_values=past).logits
            whole = model(IDS, MASK).logits
    assert 1e-4 < (whole[MASK == 1] - exact).abs().max() / exact.abs().max() < 0.03
    assert torch.allclose(later[MASK[:, 8:] == 1], whole[:, 8:][MASK[:, 8:] == 1], atol=0.05)
    assert past.keys[0].dtype == torch.float32


# Gradient checkpointing


def kept(model):
    """How many numbers the forward pass keeps for gradients, parameters apart."""
    parameters, sizes = {p.untyped_storage().data_ptr() for p in model.parameters()}, {}

    def pack(x):
        if x.untyped_storage().data_ptr() not in parameters:
            sizes[x.untyped_storage().data_ptr()] = x.numel()
        return x

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda x: x):
        loss = model(IDS, attention_mask=MASK, labels=IDS).loss  # alive, so that no address comes twice
    assert loss.requires_grad
    return sum(sizes.values())


@pytest.mark.feature("Gradient checkpointing")
@IMPLEMENTATIONS
@pytest.mark.parametrize("options", [None, {"use_reentrant": False}, {"use_reentrant": True}])
def test_checkpointing_keeps_less_and_changes_no_bit(implementation, options):
    model = make(config=CONFIG.replace(attention_dropout=0.3), attn_implementation=implementation).train()
    expected, before = gradients(model), kept(model)
    model.gradient_checkpointing_enable(options)
    model.enable_input_require_grads()  # what reentrant checkpointing of frozen embeddings needs
    found = gradients(model)
    assert all(torch.equal(found[name], gradient) for name, gradient in expected.items())
    if not (options or {}).get("use_reentrant"):
        assert kept(model) < before / 2
    model.gradient_checkpointing_disable()
    assert kept(model) == before


@pytest.mark.feature("Gradient checkpointing")
@pytest.mark.parametrize("use_reentrant", [False, True])
def test_checkpointing_beside_caches_and_generation(use_reentrant):
    model = make().train()

    def cached():
        model.zero_grad()
        past = model(IDS[:, :8], use_cache=True).past_key_values
        model(IDS[:, 8:], past_key_values=past).logits.square().sum().backward()
        return [p.grad for p in model.parameters()]

    tokens, expected = model.generate(IDS, max_new_tokens=3), cached()
    model.gradient_checkpointing_enable({"use_reentrant": use_reentrant})
    assert torch.equal(model.generate(IDS, max_new_tokens=3), tokens)
    with torch.no_grad():
        model(IDS)
    if use_reentrant:
        with pytest.raises(UnsupportedFeatureError, match="use_cache=False.*use_reentrant=False"):
            cached()
    else:
        assert all(torch.equal(a, b) for a, b in zip(cached(), expected, strict=True))


@pytest.mark.feature("Gradient checkpointing")
@pytest.mark.parametrize("use_reentrant", [False, True])
def test_checkpointing_of_a_frozen_model(use_reentrant):
    model = make().train().requires_grad_(False)
    model.model.layers[0].mlp.up_proj.requires_grad_(True)
    expected = gradients(model)["model.layers.0.mlp.up_proj.weight"].clone()
    model.gradient_checkpointing_enable({"use_reentrant": use_reentrant})
    model.enable_input_require_grads()
    assert torch.equal(gradients(model)["model.layers.0.mlp.up_proj.weight"], expected)
    copy.deepcopy(model).generate(IDS, max_new_tokens=1)


# peft

TASKS = {
    "CAUSAL_LM": ("MistralForCausalLM", {"labels": IDS}),
    "SEQ_CLS": ("MistralForSequenceClassification", {"labels": IDS[:, 0] % CONFIG.num_labels}),
    "TOKEN_CLS": ("MistralForTokenClassification", {"labels": IDS % CONFIG.num_labels}),
    "QUESTION_ANS": ("MistralForQuestionAnswering", {"start_positions": IDS[:, 0] % 5, "end_positions": IDS[:, 1] % 9}),
}
peft_feature = pytest.mark.feature("LoRA with peft")


def adapted(task, model=None, **options):
    peft = pytest.importorskip("peft")
    torch.manual_seed(0)
    return peft.get_peft_model(model or make(TASKS[task][0]), peft.LoraConfig(task_type=task, r=4, **options))


def trained(model, inputs, *, lr=3e-2, steps=10):
    optimizer = torch.optim.AdamW((p for p in model.parameters() if p.requires_grad), lr=lr)
    model.train()
    losses = []
    for _ in range(steps):
        loss = model(input_ids=IDS, attention_mask=MASK, **inputs).loss
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    model.eval()
    return losses


@peft_feature
@pytest.mark.parametrize("task", TASKS)
@pytest.mark.parametrize("options", [{}, {"target_modules": ["q_proj", "v_proj", "down_proj"]}])
def test_lora_trains_saves_loads_and_merges(task, options, tmp_path):
    peft = pytest.importorskip("peft")
    architecture, inputs = TASKS[task]
    model, base = adapted(task, **options), make(architecture)
    losses = trained(model, inputs, lr=1e-2)
    assert losses[-1] < 0.9 * losses[0]
    heads = () if task == "CAUSAL_LM" else ("score", "qa_outputs")  # peft trains new heads too
    for name, parameter in model.named_parameters():
        assert parameter.requires_grad == ("lora_" in name or any(f"{h}.modules_to_save" in name for h in heads)), name
    frozen = dict(model.get_base_model().named_parameters())
    assert torch.equal(frozen["model.embed_tokens.weight"], base.model.embed_tokens.weight)
    expected = model(IDS, attention_mask=MASK)
    model.save_pretrained(tmp_path)
    loaded = peft.PeftModel.from_pretrained(make(architecture), tmp_path).eval()
    merged = peft.PeftModel.from_pretrained(make(architecture), tmp_path).merge_and_unload().eval()
    assert type(merged) is type(base)
    for field in {"logits", "start_logits"} & set(expected._fields):
        assert torch.equal(loaded(IDS, attention_mask=MASK)[field], expected[field])
        assert torch.allclose(merged(IDS, attention_mask=MASK)[field], expected[field], atol=1e-4)
    merged.save_pretrained(tmp_path / "merged")
    again = type(base).from_pretrained(tmp_path / "merged")
    assert all(torch.equal(p, again.get_parameter(name)) for name, p in merged.named_parameters())


@peft_feature
def test_lora_generates():
    model = adapted("CAUSAL_LM")
    trained(model, {"labels": IDS}, steps=3)
    tokens = model.generate(input_ids=IDS, attention_mask=MASK, max_new_tokens=4)
    assert torch.equal(model.merge_and_unload().generate(IDS, attention_mask=MASK, max_new_tokens=4), tokens)


@peft_feature
@pytest.mark.parametrize("use_reentrant", [False, True])
def test_lora_on_a_checkpointed_bfloat16_model(use_reentrant):
    peft = pytest.importorskip("peft")
    model = adapted("CAUSAL_LM", peft.prepare_model_for_kbit_training(make().bfloat16()))
    model.gradient_checkpointing_enable({"use_reentrant": use_reentrant})
    model.enable_input_require_grads()
    losses = trained(model, {"labels": IDS})
    assert losses[-1] < 0.9 * losses[0]
    assert all((p.grad is not None) == ("lora_" in name) for name, p in model.named_parameters())


# transformers' Trainer


@pytest.mark.feature("transformers' Trainer")
@pytest.mark.filterwarnings("ignore")  # theirs
def test_trainer(tmp_path):
    transformers = pytest.importorskip("transformers")
    pytest.importorskip("accelerate")
    rows = [{"input_ids": i, "attention_mask": m, "labels": i} for i, m in zip(IDS, MASK, strict=True)]
    model = make()
    arguments = transformers.TrainingArguments(
        tmp_path,
        max_steps=8,
        per_device_train_batch_size=4,
        learning_rate=3e-2,
        report_to=[],
        use_cpu=True,
        save_steps=4,
        disable_tqdm=True,
    )
    trainer = transformers.Trainer(model, arguments, train_dataset=rows, eval_dataset=rows)
    before = trainer.evaluate()["eval_loss"]
    assert before == pytest.approx(make()(IDS, attention_mask=MASK, labels=IDS).loss.item(), rel=1e-5)
    trainer.train()
    trained_once = [p.clone() for p in model.parameters()]
    assert trainer.evaluate()["eval_loss"] < before / 2
    resumed = make()
    transformers.Trainer(resumed, arguments, train_dataset=rows).train(resume_from_checkpoint=tmp_path / "checkpoint-4")
    assert all(torch.allclose(p, q, atol=1e-6) for p, q in zip(resumed.parameters(), trained_once, strict=True))
    model.config.use_cache = model.config.return_dict = False  # a plain (loss, logits)
    predicted = trainer.predict(rows)
    assert predicted.predictions.shape == (*IDS.shape, CONFIG.vocab_size)
    assert all(torch.equal(a, b) for a, b in zip(trained_once, model.parameters(), strict=True))
