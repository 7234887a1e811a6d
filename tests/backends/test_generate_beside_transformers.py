"""generate beside transformers' own, on the same weights: options, functions, and what is told of each step."""

from __future__ import annotations

import numpy as np
import pytest
from frameworks import REQUESTED

from conformance.weights import random_parameters
from mistral_core import GenerationConfig
from mistral_core.config.presets import TINY
from mistral_core.errors import GenerationConfigError, InputError

if "torch" not in REQUESTED:
    pytest.skip("torch was not asked for", allow_module_level=True)
torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")
mistral_torch = pytest.importorskip("mistral_torch")

CONFIG = TINY.replace(num_hidden_layers=2, sliding_window=None)
IDS = torch.from_numpy(np.random.default_rng(0).integers(3, TINY.vocab_size, (2, 9)))
MASK = torch.tensor([[0, 0, 0, 0, 1, 1, 1, 1, 1], [1] * 9])
PAD = 1  # not 0, for which transformers' beams write the end
ENDS = [20, 21, 22, 30, 31, 40, 41, 50]


@pytest.fixture(scope="module")
def ours():
    return mistral_torch.MistralForCausalLM(CONFIG).load_arrays(random_parameters(CONFIG, "MistralForCausalLM")).eval()


@pytest.fixture(scope="module")
def theirs(ours, tmp_path_factory):
    path = tmp_path_factory.mktemp("tiny")
    ours.save_pretrained(path)
    model = transformers.AutoModelForCausalLM.from_pretrained(path, attn_implementation="eager", dtype=torch.float32)
    model.generation_config = transformers.GenerationConfig()
    return model


def both(ours, theirs, ids=IDS, **options):
    options = {"max_new_tokens": 8, "pad_token_id": PAD, "eos_token_id": ENDS, "attention_mask": MASK, **options}
    fresh = {name: value() if name in ("logits_processor", "stopping_criteria") else value
             for name, value in options.items()}  # fmt: skip
    return ours.generate(ids, **fresh), theirs.generate(
        ids, **{name: value() if name in ("logits_processor", "stopping_criteria") else value
                for name, value in options.items()}
    )  # fmt: skip


def alike(one, other):
    """Equal but for columns of padding at the end, of which transformers may keep some."""
    columns = min(one.shape[1], other.shape[1])
    rest = torch.cat([one[:, columns:], other[:, columns:]], 1)
    return torch.equal(one[:, :columns], other[:, :columns]) and bool((rest == PAD).all())


TOP = {"suppress_tokens": [13, 60, 61, 62], "begin_suppress_tokens": [7, 8, 9, 35]}
OPTIONS = {
    "suppress_tokens": TOP,
    "min_length": {"min_length": 15},
    "min_new_tokens": {"min_new_tokens": 5},
    "forced_eos": {"forced_eos_token_id": 21},
    "sequence_bias": {"sequence_bias": [[[5], 3.0], [[35, 7], 9.0], [[13], -4.0]]},
    "sequence_bias of a dictionary": {"sequence_bias": {(5,): 3.0, (9, 7): 9.0}},
    "bias and penalty": {"sequence_bias": [[[5], 6.0]], "repetition_penalty": 1.8},
    "no_repeat": {"no_repeat_ngram_size": 1},
    "bad words": {"bad_words_ids": [[13], [35], [7, 8]]},
    "decay": {"exponential_decay_length_penalty": (2, 1.9)},
    "renormalize": {"renormalize_logits": True},
    "max_length": {"max_length": 14, "max_new_tokens": None},
}


@pytest.mark.parametrize("beams", [1, 3])
@pytest.mark.parametrize("name", OPTIONS)
def test_options_choose_the_tokens_that_theirs_choose(ours, theirs, name, beams):
    options = {"num_beams": beams, "return_dict_in_generate": True, "output_scores": True, **OPTIONS[name]}
    # its repetition penalty counts padding, and ours real tokens: one row then
    ids, mask = (IDS[1:], MASK[1:]) if name == "bias and penalty" else (IDS, MASK)
    one, other = both(ours, theirs, ids, **{"attention_mask": mask, **options})
    assert alike(one.sequences, other.sequences)
    if beams > 1:
        assert torch.allclose(one.sequences_scores, other.sequences_scores, atol=1e-4)
    plain = ours.generate(ids, attention_mask=mask, max_new_tokens=8, pad_token_id=PAD, eos_token_id=ENDS)
    assert name == "renormalize" or beams > 1 or not torch.equal(one.sequences, plain)


def test_a_forced_beginning_follows_one_token(ours, theirs):
    one, other = both(ours, theirs, IDS[:, :1], attention_mask=None, forced_bos_token_id=33, num_beams=2)
    assert alike(one, other)
    assert (one[:, 1] == 33).all()
    assert not (ours.generate(IDS, forced_bos_token_id=33, max_new_tokens=1)[:, -1] == 33).any()


@pytest.mark.parametrize(
    ("option", "value", "kind"),
    [
        ("epsilon_cutoff", 0.02, "EpsilonLogitsWarper"),
        ("eta_cutoff", 0.05, "EtaLogitsWarper"),
        ("typical_p", 0.6, "TypicalLogitsWarper"),
    ],
)
def test_cutoffs_leave_what_theirs_leave(ours, option, value, kind):
    options = {"do_sample": True, "top_k": 0, "seed": 1, "max_new_tokens": 3, "return_dict_in_generate": True}
    out = ours.generate(IDS, output_scores=True, output_logits=True, **{option: value}, **options)
    warper = getattr(transformers, kind, None) or getattr(transformers.generation.logits_process, kind)
    for scores, logits in zip(out.scores, out.logits, strict=True):
        wanted = warper(value)(None, logits)
        assert torch.equal(torch.isinf(scores), torch.isinf(wanted))
        assert torch.isinf(wanted).any()
        assert torch.allclose(scores[scores > -torch.inf], wanted[scores > -torch.inf], atol=1e-4)


PROCESSORS = {
    "none": list,
    "a penalty": lambda: transformers.LogitsProcessorList([transformers.RepetitionPenaltyLogitsProcessor(1.7)]),
    "n-grams": lambda: [transformers.NoRepeatNGramLogitsProcessor(2)],
    "several": lambda: [
        transformers.SuppressTokensLogitsProcessor([13, 35]),
        transformers.TemperatureLogitsWarper(0.5),
        lambda ids, scores: scores + 0.1 * (ids.shape[1] % 3) * torch.arange(scores.shape[1]) / 97,
    ],
    "a prefix": lambda: [
        transformers.PrefixConstrainedLogitsProcessor(lambda row, ids: list(range(5 + row, 90, 1 + len(ids) % 3)), 1)
    ],
}


@pytest.mark.parametrize("beams", [1, 2])
@pytest.mark.parametrize("name", PROCESSORS)
def test_their_processors(ours, theirs, name, beams):
    if name == "a prefix" and beams > 1:
        pytest.skip("it is told how many beams there are")
    assert alike(*both(ours, theirs, logits_processor=PROCESSORS[name], num_beams=beams))


def test_a_prefix_function(ours, theirs):
    def allowed(row, ids):
        return list(range(5 + row, 90, 1 + len(ids) % 3))

    for beams in (1, 3):
        assert alike(*both(ours, theirs, prefix_allowed_tokens_fn=allowed, num_beams=beams))


CRITERIA = {
    "length": lambda: transformers.StoppingCriteriaList([transformers.MaxLengthCriteria(12)]),
    "rows": lambda: [lambda ids, scores, **kwargs: (ids[:, -1] % 2 == 0) & (ids.shape[1] > 10)],
    "one answer": lambda: [lambda ids, scores, **kwargs: ids.shape[1] > 12],
    "an end": lambda: [transformers.EosTokenCriteria([13, 35])],
}


@pytest.mark.parametrize("beams", [1, 3])
@pytest.mark.parametrize("name", CRITERIA)
def test_their_criteria(ours, theirs, name, beams):
    if name == "one answer" and beams > 1:
        pytest.skip("theirs asks for an answer of each row")
    ends = None if name == "an end" else ENDS  # of two criteria of one class theirs takes the caller's alone
    assert alike(*both(ours, theirs, stopping_criteria=CRITERIA[name], num_beams=beams, eos_token_id=ends))


@pytest.mark.parametrize("beams", [1, 3])
def test_what_is_told_of_each_step_has_their_shapes_and_values(ours, theirs, beams):
    told = ("output_scores", "output_logits", "output_hidden_states", "output_attentions")
    options = dict.fromkeys(told, True)
    one, other = both(ours, theirs, IDS[:, :6], attention_mask=None, num_beams=beams, eos_token_id=None,
                      max_new_tokens=3, return_dict_in_generate=True, **options)  # fmt: skip
    for name in ("scores", "logits"):
        for mine, wanted in zip(one[name], other[name], strict=True):
            assert torch.allclose(mine, wanted, atol=1e-4), name
    for name in ("hidden_states", "attentions"):
        for step, (mine, wanted) in enumerate(zip(one[name], other[name], strict=True)):
            assert [x.shape for x in mine] == [x.shape for x in wanted], (name, step)
            assert all(torch.allclose(a, b, atol=1e-4) for a, b in zip(mine, wanted, strict=True)), (name, step)
    if beams > 1:
        assert torch.equal(one.beam_indices.long(), other.beam_indices.long())
        indices = {"beam_indices": one.beam_indices}
    else:
        indices = {}
    for normalize in (False, True):
        mine = ours.compute_transition_scores(one.sequences, one.scores, normalize_logits=normalize, **indices)
        wanted = theirs.compute_transition_scores(one.sequences, other.scores, normalize_logits=normalize, **indices)
        assert torch.allclose(mine, wanted, atol=1e-4)
    assert one.to_tuple()[0] is one.sequences
    assert (one.to_tuple()[1] is one.scores) is (beams == 1)


def test_embeddings(ours, theirs):
    embeds = ours.get_input_embeddings()(IDS).detach()
    options = {"max_new_tokens": 5, "eos_token_id": None, "pad_token_id": PAD, "attention_mask": MASK}
    for ids in ({}, {"input_ids": IDS}):
        mine = ours.generate(inputs_embeds=embeds, **ids, **options)
        assert torch.equal(mine, theirs.generate(inputs_embeds=embeds, **ids, **options))


# GenerationConfig


def test_their_generation_config_is_laid_over_the_checkpoint_s(ours, theirs):
    theirs_config = transformers.GenerationConfig(max_new_tokens=4, suppress_tokens=[13, 35])
    ours.generation_config, before = ours.generation_config.replace(eos_token_id=ENDS, pad_token_id=PAD), None
    try:
        found = ours.generate(IDS, generation_config=theirs_config)
        assert torch.equal(found, ours.generate(IDS, max_new_tokens=4, suppress_tokens=[13, 35]))
        alone = ours.generate(IDS, generation_config=theirs_config, use_model_defaults=False)
        assert torch.equal(alone, ours.generate(IDS, max_new_tokens=4, suppress_tokens=[13, 35], eos_token_id=None))
        own = GenerationConfig(max_new_tokens=4, suppress_tokens=[13, 35])
        assert torch.equal(ours.generate(IDS, generation_config=own), found)
        assert found.shape[1] < 13 or (found == PAD).any() or np.isin(found.numpy(), ENDS).any()
    finally:
        ours.generation_config = before or GenerationConfig.from_model_config(CONFIG)
    for name, value in (("guidance_scale", 2.0), ("watermarking_config", {"bias": 2.0}), ("token_healing", True)):
        with pytest.raises(GenerationConfigError, match=name):
            ours.generate(IDS, generation_config=transformers.GenerationConfig(**{name: value}))
    with pytest.raises(GenerationConfigError, match="must be a GenerationConfig, got int"):
        ours.generate(IDS, generation_config=5)


def test_every_option_of_theirs_is_here_ignored_or_refused():
    from mistral_core.generation.checks import IGNORED

    known = {*GenerationConfig().__dict__, *IGNORED}
    assert {name for name in transformers.GenerationConfig().to_dict() if not name.startswith("_")} <= known


# Dropout


def test_generate_draws_no_dropout_and_leaves_the_mode_as_it_was(ours):
    config = CONFIG.replace(attention_dropout=0.9)
    model = mistral_torch.MistralForCausalLM(config).load_arrays(random_parameters(config, "MistralForCausalLM"))
    wanted = model.eval().generate(IDS, max_new_tokens=6, eos_token_id=None)
    model.train()
    model.model.layers[0].eval()
    modes = [module.training for module in model.modules()]
    for options in ({}, {"num_beams": 2, "num_return_sequences": 1}, {"return_dict_in_generate": True,
                                                                    "output_hidden_states": True}):  # fmt: skip
        out = model.generate(IDS, max_new_tokens=6, eos_token_id=None, **options)
        assert "num_beams" in options or torch.equal(out if not isinstance(out, tuple) else out.sequences, wanted)
        assert [module.training for module in model.modules()] == modes
    with pytest.raises(ZeroDivisionError):
        model.generate(IDS, logits_processor=[lambda ids, scores: 1 / 0])
    assert [module.training for module in model.modules()] == modes


# Their caches, and peft's prompts


@pytest.mark.parametrize("ends", [None, ENDS])
def test_their_cache_is_filled_as_they_fill_it(ours, theirs, ends):
    mine, wanted = transformers.DynamicCache(), transformers.DynamicCache()
    options = {"max_new_tokens": 6, "eos_token_id": ends, "pad_token_id": PAD, "attention_mask": MASK}
    first = ours.generate(IDS, past_key_values=mine, return_dict_in_generate=True, **options)
    assert first.past_key_values is mine
    assert torch.equal(first.sequences, theirs.generate(IDS, past_key_values=wanted, **options))
    real = first.attention_mask[:, :-1].bool()
    for one, other in zip(mine.layers, wanted.layers, strict=True):
        assert one.keys.shape == other.keys.shape
        for a, b in ((one.keys, other.keys), (one.values, other.values)):
            assert torch.allclose(a.transpose(1, 2)[real], b.transpose(1, 2)[real], atol=1e-4)
    ids = torch.cat([first.sequences, IDS[:, :3]], 1)
    options["attention_mask"] = torch.cat([first.attention_mask, torch.ones(2, 3, dtype=torch.int64)], 1)
    plain = ours.generate(ids, **options)
    assert torch.equal(ours.generate(ids, past_key_values=mine, **options), plain)
    assert mine.get_seq_length() == plain.shape[1] - 1
    mask, past = options["attention_mask"][:1], row_of(wanted, first, theirs)
    tokens = ours.stream(
        ids[:1], tokenizer=Numbers(), past_key_values=past, max_new_tokens=2, eos_token_id=None, attention_mask=mask
    )
    assert "".join(tokens) == Numbers().decode(plain[0, ids.shape[1] : ids.shape[1] + 2].tolist())
    for wrong in ({"num_beams": 2}, {"num_return_sequences": 2, "do_sample": True}):
        with pytest.raises(InputError, match="past_key_values"):
            ours.generate(ids, past_key_values=transformers.DynamicCache(), **wrong)
    with pytest.raises(InputError, match="it holds"):
        ours.generate(IDS, past_key_values=mine)


class Numbers:
    def decode(self, ids, skip_special_tokens=False):
        return "".join(f"{int(each)}," for each in ids)


def row_of(cache, out, model):
    """A cache of theirs with the first row of one that the real tokens of a call filled."""
    row = transformers.DynamicCache()
    mask = out.attention_mask[:1, :-1]
    with torch.no_grad():
        model(out.sequences[:1, :-1], attention_mask=mask, position_ids=(mask.cumsum(1) - 1).clamp(min=0),
              past_key_values=row)  # fmt: skip
    return row


def test_a_tuned_prompt_stands_before_the_text(ours):
    peft = pytest.importorskip("peft")
    model = mistral_torch.MistralForCausalLM(CONFIG).load_arrays(random_parameters(CONFIG, "MistralForCausalLM"))
    config = peft.PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=4)
    tuned = peft.get_peft_model(model, config).eval()
    with torch.no_grad():
        tuned.prompt_encoder.default.embedding.weight.normal_(generator=torch.Generator().manual_seed(3))
        ids = IDS
        for _ in range(4):
            mask = torch.cat([MASK, torch.ones(2, ids.shape[1] - 9, dtype=torch.int64)], 1)
            logits = tuned(input_ids=ids, attention_mask=mask).logits[:, -1]
            ids = torch.cat([ids, logits.argmax(-1, keepdim=True)], 1)
    options = {"max_new_tokens": 4, "eos_token_id": None, "attention_mask": MASK}
    assert torch.equal(tuned.generate(input_ids=IDS, **options), ids)
    assert not torch.equal(ours.generate(IDS, **options), ids)
    assert torch.equal(model.generate(IDS, **options), ours.generate(IDS, **options))  # peft is gone again
