"""Calibration of a whole model: its forward pass, what a matrix is calibrated by, texts, and what the report counts."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Mapping
from pathlib import Path

import ml_dtypes
import numpy as np
import pytest

from conformance.weights import random_parameters
from mistral_core.config.presets import TINY
from mistral_core.errors import (
    CheckpointNotFoundError,
    EmptyInputError,
    InputError,
    LimitExceededError,
    NonFiniteInputError,
    NonFiniteWeightsError,
    TemplateError,
    TokenIdError,
)
from mistral_core.quantization import calibration, forward, gptq, texts
from mistral_core.quantization.matrix import dequantised
from mistral_core.quantization.report import Quality, quality
from mistral_core.quantization.request import Quantization
from mistral_core.reference import heads, model, ops
from mistral_core.text.tokenizer import MistralTokenizer
from mistral_core.weights import lazy
from mistral_core.weights.opening import Checkpoint

EMBEDDED = Path(calibration.__file__).parents[1] / "data" / "tiny"
SCALED_QUERIES = {
    "rope_type": "yarn", "factor": 16.0, "original_max_position_embeddings": 5, "beta_fast": 32.0, "beta_slow": 1.0,
    "mscale": 1.0, "mscale_all_dim": 1.0, "llama_4_scaling_beta": 0.1,
}  # fmt: skip
LLAMA3 = {
    "rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
    "original_max_position_embeddings": 64,
}  # fmt: skip
CONFIGS = {
    "window": TINY,
    "full": TINY.replace(sliding_window=None),
    "ministral3": TINY.replace(model_type="ministral3", rope_scaling=SCALED_QUERIES, sliding_window=None),
    "alternating": TINY.replace(
        model_type="ministral", layer_types=("full_attention", "sliding_attention", "sliding_attention")
    ),
    "llama3": TINY.replace(rope_scaling=LLAMA3),
    "tied": TINY.replace(tie_word_embeddings=True),
}
LENGTH = 23
SAME_FUNCTION = 128 * float(np.finfo(np.float64).eps)
"""Of the largest |value|: the same sums in another order, as in test_golden.py. Measured: 9 eps at most."""


def drawn_ids(count=8, *, seed=0, length=LENGTH):
    return np.random.default_rng(seed).integers(0, TINY.vocab_size, (count, length))


def in_bfloat16(config, seed=0):
    return {name: each.astype(ml_dtypes.bfloat16) for name, each in random_parameters(config, seed=seed).items()}


def resolved(config, *arguments, **fields):
    return Quantization(*arguments, **fields).resolved(config, "MistralForCausalLM")


def replaced(parameters, packed):
    """The parameters in float64, those that are packed as their codes say."""
    result = {name: each.astype(np.float64) for name, each in parameters.items()}
    return result | {name: dequantised(matrix).astype(np.float64) for name, matrix in packed.items()}


# The forward pass


@pytest.mark.parametrize("queries", [4, 256])
@pytest.mark.parametrize("name", CONFIGS)
def test_a_layer_is_that_of_the_reference(name, queries, monkeypatch):
    monkeypatch.setattr(forward, "QUERIES", queries)
    config, ids = CONFIGS[name], drawn_ids(3)
    parameters = {each: array.astype(np.float64) for each, array in random_parameters(config).items()}
    states = model.forward(config, parameters, ids).hidden_states
    wanted = [*states[:-1], None]
    for dtype, bound in ((np.float64, SAME_FUNCTION), (np.float32, 32 * float(np.finfo(np.float32).eps))):
        step = forward.step_of(config, LENGTH, dtype)
        narrow = {each: array.astype(dtype) for each, array in parameters.items()}
        for layer in range(config.num_hidden_layers - 1):
            x_BTD = wanted[layer].astype(dtype)
            found = forward.decoder_layer(config, forward.weights_of(narrow, layer), layer, x_BTD, step)
            assert found.dtype == dtype
            assert np.abs(found - wanted[layer + 1]).max() < bound * np.abs(wanted[layer + 1]).max()


def test_texts_go_through_in_batches_that_cover_them_all(monkeypatch):
    monkeypatch.setattr(forward, "TOKENS", 50)
    assert forward.batches_of(5, 20) == [slice(0, 2), slice(2, 4), slice(4, 5)]
    assert forward.batches_of(2, 51) == [slice(0, 1), slice(1, 2)]


# Calibration


class Counted(Mapping):
    """Parameters that count how often each is read."""

    def __init__(self, parameters):
        self.parameters, self.reads = parameters, Counter()

    def __getitem__(self, name):
        self.reads[name] += 1
        return self.parameters[name]

    def __iter__(self):
        return iter(self.parameters)

    def __len__(self):
        return len(self.parameters)


@pytest.mark.parametrize("name", ["window", "ministral3", "tied"])
def test_each_matrix_is_calibrated_by_its_inputs_in_the_model_as_it_is_packed_so_far(name, monkeypatch):
    config, ids = CONFIGS[name], drawn_ids()
    monkeypatch.setattr(forward, "TOKENS", 3 * LENGTH)
    parameters, hessians = in_bfloat16(config), {}

    def factors(hessian, *, name):
        hessians.update(dict.fromkeys(name.split(" and "), hessian))
        return real(hessian, name=name)

    real = gptq.factors
    monkeypatch.setattr(gptq, "factors", factors)
    quantization = resolved(config, "int4", 16)
    packed = dict(calibration.packed(config, parameters, ids, quantization))

    # the reference on the packed model: what stands before a matrix in the table is what its inputs are made by
    full = replaced(parameters, packed)
    of_weight, seen = {id(array): each for each, array in full.items()}, {}

    def linear(x, weight, bias=None, *, round=ops.exact):
        seen[of_weight[id(weight)]] = x.reshape(-1, x.shape[-1])
        return real_linear(x, weight, bias, round=round)

    real_linear = ops.linear
    monkeypatch.setattr(ops, "linear", linear)
    monkeypatch.setattr(model, "_Exact", lambda source: source)
    model.forward(config, full, ids)
    assert list(hessians) == [each for each in packed if each != "lm_head.weight"]
    for each, hessian in hessians.items():
        wanted = seen[each].T @ seen[each]
        np.testing.assert_allclose(hessian, wanted, rtol=0, atol=1e-5 * np.abs(wanted).max(), err_msg=each)


@pytest.mark.parametrize("asked", [("int4", 16), ("int4", 16, False), ("int4", -1), ("int8",), ("nf4", 16)], ids=str)
def test_every_matrix_comes_once_in_the_order_of_the_table_with_scales_in_its_dtype(asked):
    config, parameters = TINY, Counted(in_bfloat16(TINY))
    quantization = resolved(config, *asked)
    calls = []
    found = list(
        calibration.packed(config, parameters, drawn_ids(), quantization, progress=lambda *told: calls.append(told))
    )
    names = list(quantization.matrices(config, "MistralForCausalLM"))
    assert [name for name, _ in found] == names
    read = {*names, "model.embed_tokens.weight", *(name for name in parameters if "layernorm" in name)}
    assert parameters.reads == dict.fromkeys(read, 1)
    for name, matrix in found:
        nearest = quantization.quantise(name, parameters.parameters[name])
        assert (matrix.kind, matrix.shape, matrix.block) == (nearest.kind, nearest.shape, nearest.block), name
        assert matrix.scale.dtype == nearest.scale.dtype
        assert (matrix.zero is None) == (nearest.zero is None)
        assert (matrix.codes.tobytes() == nearest.codes.tobytes()) == (name == "lm_head.weight")
    assert [call[:2] for call in calls] == [(count + 1, len(names)) for count in range(len(names))]
    assert all(call[2] > 0 for call in calls[:-1])
    assert calls[-1][2] == 0


def test_the_same_arguments_give_the_same_bytes():
    first, second = (
        [(name, matrix.codes.tobytes(), matrix.scale.tobytes()) for name, matrix in calibration.packed(
            TINY, in_bfloat16(TINY), drawn_ids(), resolved(TINY, "int4", 16)
        )]
        for _ in range(2)
    )  # fmt: skip
    assert first == second


def test_scales_of_nf4_are_those_that_double_quantisation_keeps():
    once, twice = (
        dict(calibration.packed(TINY, in_bfloat16(TINY), drawn_ids(), resolved(TINY, "nf4", 16, double_quant=double)))
        for double in (False, True)
    )
    name = "model.layers.0.self_attn.q_proj.weight"
    assert len(np.unique(twice[name].scale)) < 200 < len(np.unique(once[name].scale))
    np.testing.assert_allclose(twice[name].scale, once[name].scale, rtol=0.1)


def test_a_checkpoint_is_read_by_the_names_of_the_table():
    with_prefix = lazy.arrays(Checkpoint.open(EMBEDDED))
    assert len(with_prefix) == len(list(with_prefix)) == 47
    assert with_prefix["model.norm.weight"].dtype == ml_dtypes.bfloat16


@pytest.mark.parametrize("asked", [("int4", 16), ("int4", 16, False), ("int4", -1), ("int8",), ("nf4", 16)], ids=str)
def test_a_calibrated_model_is_nearer_to_the_floats_than_a_rounded_one(asked):
    config, parameters = CONFIGS["tied"], in_bfloat16(CONFIGS["tied"])
    quantization = resolved(config, *asked)
    rounded = {
        name: quantization.quantise(name, parameters[name])
        for name in quantization.matrices(config, "MistralForCausalLM")
    }
    calibrated = dict(calibration.packed(config, parameters, drawn_ids(24), quantization))
    unseen = drawn_ids(12, seed=1)
    nearest, found = (quality(config, parameters, each, unseen) for each in (rounded, calibrated))
    assert found.kl < 0.8 * nearest.kl


def test_few_tokens_are_told():
    with pytest.warns(UserWarning, match="69 tokens calibrate matrices of 96 columns; take a text of more than 96"):
        next(calibration.packed(TINY, in_bfloat16(TINY), drawn_ids(3), resolved(TINY, "int8")))


def test_bytes_that_are_kept_are_those_of_the_states_and_the_widest_inputs():
    assert calibration.kept_bytes(TINY, 10) == 10 * (48 + 96) * 4
    assert calibration.kept_bytes(TINY.replace(intermediate_size=112), 10) == 10 * (48 + 112) * 4


@pytest.mark.parametrize(
    "name",
    ["model.embed_tokens.weight", "model.layers.1.input_layernorm.weight", "model.layers.1.mlp.up_proj.weight",
     "lm_head.weight"],
)  # fmt: skip
def test_weights_that_are_not_finite_are_named(name):
    parameters = random_parameters(TINY)
    parameters[name].reshape(-1)[::5] = np.nan
    with pytest.raises(NonFiniteWeightsError, match=name):
        list(calibration.packed(TINY, parameters, drawn_ids(), resolved(TINY, "int4", 16)))


def test_inputs_that_are_not_finite_name_the_matrices_that_meet_them():
    parameters = random_parameters(TINY)
    parameters["model.layers.1.input_layernorm.weight"][:] = 3e38
    wanted = r"model.layers.1.self_attn.q_proj.weight and model.layers.1.self_attn.k_proj.weight and .*must be finite"
    with pytest.raises(NonFiniteInputError, match=wanted):
        list(calibration.packed(TINY, parameters, drawn_ids(), resolved(TINY, "int4", 16)))


@pytest.mark.parametrize(
    ("ids", "error", "told"),
    [
        (np.zeros((2, 3)), InputError, r"integers \[N, T\], got float64"),
        (np.zeros(3, int), InputError, r"integers \[N, T\], got int64 \[3\]"),
        (np.zeros((0, 3), int), EmptyInputError, r"hold a token, got \[0, 3\]"),
        (np.full((1, 3), 97), TokenIdError, r"in \[0, 97\), got 97 to 97"),
        (np.full((1, 3), -1), TokenIdError, r"in \[0, 97\), got -1 to -1"),
    ],
)
def test_ids_that_are_none_are_refused(ids, error, told):
    parameters = random_parameters(TINY)
    with pytest.raises(error, match=told):
        list(calibration.packed(TINY, parameters, ids, resolved(TINY, "int8")))
    with pytest.raises(error, match=told):
        quality(TINY, parameters, {}, ids)


# Texts


@pytest.fixture(scope="module")
def tokenizer():
    return MistralTokenizer.from_pretrained(EMBEDDED, mode="finetuning")


LINES = [f"Chapter {number}: it was a truth universally acknowledged, number {number} of many." for number in range(90)]


def test_a_text_is_cut_into_pieces_that_begin_as_a_text_does(tmp_path, tokenizer):
    path = tmp_path / "text.txt"
    path.write_text("\n".join(LINES), encoding="utf-8-sig")
    ids = tokenizer.encode("\n".join(LINES), add_special_tokens=False)
    pieces = texts.texts(path, tokenizer, length=32, most=1000)
    assert pieces.dtype == np.int64
    assert (pieces[:, 0] == tokenizer.bos_token_id).all()
    assert pieces[:, 1:].reshape(-1).tolist() == ids[: 31 * len(pieces)]
    assert len(ids) - 31 * len(pieces) < 31
    few = texts.texts(path, tokenizer, length=32, most=30)
    assert len(pieces) > 60
    assert few.tolist() == [pieces[index * len(pieces) // 30].tolist() for index in range(30)]


def test_of_a_long_text_only_so_much_is_encoded_and_from_all_over_it(tmp_path, tokenizer):
    path = tmp_path / "text.txt"
    path.write_text("\n".join(f"line {number}" for number in range(30_000)))

    class Counting:
        frame, characters = tokenizer.frame, 0

        def encode(self, text, **options):
            Counting.characters += len(text)
            assert text.startswith("line ")
            return tokenizer.encode(text, **options)

    pieces = texts.texts(path, Counting(), length=64, most=5)
    assert pieces.shape == (5, 64)
    assert Counting.characters <= 5 * 64 * texts.CHARACTERS_PER_TOKEN
    numbers = [int(tokenizer.decode(piece.tolist()).split("line ")[1].split("\n")[0]) for piece in pieces]
    assert numbers == sorted(numbers)
    assert numbers[0] < 1000
    assert numbers[-1] > 20_000


def test_a_long_text_without_lines_is_cut_all_over_too(tmp_path, tokenizer):
    path = tmp_path / "text.txt"
    path.write_text(" ".join(str(number) for number in range(30_000)))
    pieces = texts.texts(path, tokenizer, length=64, most=5)
    assert len({tuple(piece) for piece in pieces.tolist()}) == len(pieces) == 5
    assert tokenizer.decode(pieces[-1].tolist()).split()[2] > "24000"


CHAT = [{"role": "user", "content": "Who is she?"}, {"role": "assistant", "content": "A lady of the county."}]


def test_lines_of_json_are_conversations_and_texts(tmp_path, tokenizer):
    path = tmp_path / "chats.jsonl"
    rows = [{"messages": CHAT, "id": 3}, {"text": "It was the first of May. \u2028 So it was."}] * 5
    path.write_text("\n".join(json.dumps(row, ensure_ascii=False) for row in rows) + "\n\n", encoding="utf-8-sig")
    chat, text = tokenizer.apply_chat_template(CHAT), tokenizer.encode(rows[1]["text"])
    assert chat[-1] == tokenizer.eos_token_id
    length = len(chat) + len(text)
    assert texts.texts(path, tokenizer, length=length, most=9).tolist() == [chat + text] * 5
    first, second, *_ = texts.texts(path, tokenizer, length=len(chat) + 2, most=99).tolist()
    assert first == chat + text[:2]
    assert second[:4] == [tokenizer.bos_token_id, *text[2:5]]
    few = texts.texts(path, tokenizer, length=8, most=2).tolist()
    assert len(few) == 2


@pytest.mark.parametrize(
    ("name", "content", "error", "told"),
    [
        (
            "a.txt",
            "Too little.",
            EmptyInputError,
            r"a\.txt must have 64 tokens at least, .* got \d+; take more text, or a",
        ),
        ("a.txt", " \n", EmptyInputError, r"must have 64 tokens at least, .* got 0"),
        ("a.jsonl", "\n", EmptyInputError, r"must have 64 tokens at least, .* got 0"),
        ("a.txt", b"caf\xe9", InputError, r"a\.txt must be UTF-8, got another byte at 3"),
        (
            "a.jsonl",
            '{"text": "a"}\n\n{"text": 3}',
            InputError,
            r'a\.jsonl, line 3 must have "messages", a list, or "text"',
        ),
        ("a.jsonl", '{"text": "a"}\n[1]', InputError, r"a\.jsonl, line 2: the top level must be a JSON object"),
        ("a.jsonl", '{"messages": [{"role": "king", "content": ""}]}', TemplateError, r"a\.jsonl, line 1: .*king"),
    ],
)
def test_files_that_are_no_texts_are_refused(tmp_path, tokenizer, name, content, error, told):
    path = tmp_path / name
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    with pytest.raises(error, match=told):
        texts.texts(path, tokenizer, length=64, most=2)


def test_no_file_too_large_a_one_and_no_number(tmp_path, tokenizer, monkeypatch):
    with pytest.raises(CheckpointNotFoundError):
        texts.texts(tmp_path / "none.txt", tokenizer, length=64, most=2)
    (tmp_path / "a.txt").write_text("word " * 100)
    for numbers in ({"length": 0, "most": 2}, {"length": 8, "most": True}, {"length": 8.0, "most": 2}):
        with pytest.raises(InputError, match="must be a positive integer, got"):
            texts.texts(tmp_path / "a.txt", tokenizer, **numbers)
    monkeypatch.setattr("mistral_core.disk.limits.TEXT_BYTES", 100)
    with pytest.raises(LimitExceededError, match="500 bytes of text; at most 100"):
        texts.texts(tmp_path / "a.txt", tokenizer, length=8, most=2)


# The report


@pytest.mark.parametrize("name", ["window", "tied"])
def test_the_report_is_that_of_logits_in_float64(name, monkeypatch):
    config, parameters, ids = CONFIGS[name], in_bfloat16(CONFIGS[name]), drawn_ids(5, seed=2)
    monkeypatch.setattr("mistral_core.quantization.report.PREDICTIONS", 7)
    monkeypatch.setattr(forward, "TOKENS", 2 * LENGTH)
    quantization = resolved(config, "int4", 16)
    packed = {
        each: quantization.quantise(each, parameters[each])
        for each in quantization.matrices(config, "MistralForCausalLM")
    }
    assert ("lm_head.weight" in packed) == (name == "window")
    layers = []
    found = quality(config, parameters, packed, ids, progress=lambda *told: layers.append(told))
    assert layers == [(1, 3), (2, 3), (3, 3)]

    logits = [heads.causal_lm(config, each, ids).logits[:, :-1] for each in (parameters, replaced(parameters, packed))]
    own, other = (each - np.log(np.exp(each).sum(-1, keepdims=True)) for each in logits)
    labels = ids[:, 1:, None]
    wanted = Quality(
        tokens=5 * (LENGTH - 1),
        loss=-np.take_along_axis(own, labels, -1).mean(),
        packed_loss=-np.take_along_axis(other, labels, -1).mean(),
        kl=(np.exp(own) * (own - other)).sum(-1).mean(),
        changed=(own.argmax(-1) != other.argmax(-1)).mean(),
    )
    assert found.changed == wanted.changed > 0
    assert wanted.kl > 1e-3
    assert found.to_dict() == pytest.approx(wanted.to_dict(), rel=2e-5)
    assert found.to_dict()["perplexity"] == pytest.approx(np.exp(wanted.loss), rel=2e-5)
    assert found.packed_perplexity == pytest.approx(np.exp(wanted.packed_loss), rel=2e-5)

    # a mapping of all parameters of another checkpoint, its head and embeddings too
    other = {each: array.astype(np.float32) for each, array in replaced(parameters, packed).items()}
    other["model.embed_tokens.weight"] = other["model.embed_tokens.weight"] * np.float32(1.5)
    whole = quality(config, parameters, other, ids)
    assert whole.loss == found.loss
    direct = heads.causal_lm(config, other, ids, labels=ids).loss
    assert whole.packed_loss == pytest.approx(float(direct), rel=2e-5)


def test_floats_beside_themselves_cost_nothing():
    found = quality(TINY, random_parameters(TINY), {}, drawn_ids(2))
    assert (found.kl, found.changed, found.loss) == (0, 0, found.packed_loss)


def test_a_text_of_one_token_predicts_nothing():
    with pytest.raises(EmptyInputError, match="two tokens a text at least"):
        quality(TINY, random_parameters(TINY), {}, drawn_ids(2, length=1))


def test_the_table_says_what_is_better():
    assert Quality(16368, 3.52145, 3.52354, 0.00518, 0.0521).table().splitlines() == [
        "                    floats    packed   16368 tokens predicted",
        "loss                3.5215    3.5235   +0.0021 nats per token",
        "perplexity          33.833    33.904   +0.071",
        "KL divergence                 0.0052   nats per token; 0 is the same",
        "likeliest token                 5.2%   changed",
    ]
