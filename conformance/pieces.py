"""What is compared, from small to large: each function runs one kind of piece on one backend and yields comparisons."""

from __future__ import annotations

import contextlib
import functools
from collections import Counter
from collections.abc import Iterator, Mapping
from typing import Any
from unittest import mock

import ml_dtypes
import numpy as np

from mistral_core.arrays import Array
from mistral_core.config import MistralConfig
from mistral_core.config.presets import TINY
from mistral_core.reference import engine, heads, model, ops, quantized
from mistral_core.reference import gradients as reference_gradients
from mistral_core.reference.cache import KVCache, int8_codes, slot_order
from mistral_core.reference.gradients import Gradients

from . import packed
from .adapters import Adapter
from .cases import CAUSAL, INT8, LENGTHS, PACKED, ROUNDED, Case, T, padded, token_ids
from .compare import Comparison, compare
from .tolerances import Tolerance, eps_of, rounds_elsewhere, tolerance
from .weights import random_parameters

REFERENCE: dict[str, Any] = {
    "MistralForCausalLM": heads.causal_lm,
    "MistralForSequenceClassification": heads.sequence_classification,
    "MistralForTokenClassification": heads.token_classification,
    "MistralForQuestionAnswering": heads.question_answering,
}
ALWAYS_FLOAT32 = ("logits", "start_logits", "end_logits", "loss")
BODY_LAYER = 1
GREEDY_TOKENS = 24
CHUNKINGS = ((1,) * T, (T,), (7, 1, 3, T - 11))  # 7 is the window and two more


def cast(array: Array, dtype: str) -> Array:
    """Floats in a dtype, ml_dtypes' bfloat16 among them."""
    return array.astype(ml_dtypes.bfloat16 if dtype == "bfloat16" else dtype)


@functools.cache
def weights(config: MistralConfig, architecture: str, dtype: str) -> dict[str, Array]:
    """The parameters of a case, in the dtype a model has them."""
    return {name: cast(array, dtype) for name, array in random_parameters(config, architecture).items()}


@functools.cache
def matrices(case_name: str, dtype: str) -> dict[str, packed.PackedMatrix]:
    """The packed matrices of a case, of floats of a dtype."""
    case = by_name(case_name)
    return packed.matrices(case.packing, case.config, weights(case.config, case.architecture, dtype))


def parameters_of(case: Case, dtype: str, exact: bool = True) -> Mapping[str, Array]:
    """The parameters as the specification takes them; not `exact`: packed ones as floats of the model's dtype."""
    floats = weights(case.config, case.architecture, dtype)
    if not case.packing:
        return floats
    found = quantized.parameters(floats, matrices(case.name, dtype))
    return found if exact else {name: cast(array, dtype) for name, array in found.items()}


@functools.cache
def expected(case_name: str, dtype: str, exact: bool) -> Any:
    """What the specification returns for a case, rounded as the dtype's contract says or exact."""
    case = by_name(case_name)
    inputs = dict(case.inputs)
    if "inputs_embeds" in inputs:
        inputs["inputs_embeds"] = cast(inputs["inputs_embeds"], dtype).astype(np.float64)
    exact = exact or dtype == "float32"
    rounds = ops.exact if exact else ops.rounding(dtype)
    return REFERENCE[case.architecture](case.config, parameters_of(case, dtype, exact), **inputs, round=rounds)


@functools.cache
def expected_gradients(case_name: str) -> Gradients:
    """The loss of a case and its gradient by canonical parameter name, as the specification has them."""
    case = by_name(case_name)
    inputs = {name: array.astype(np.float64) if _is_float(array) else array for name, array in case.inputs.items()}
    return reference_gradients.OF[case.architecture](case.config, parameters_of(case, "float32"), **inputs)


def _is_float(array: Any) -> bool:
    return array is not None and array.dtype.kind == "f"


@functools.cache
def expected_cache(case_name: str, rolling: bool) -> KVCache:
    """The specification's cache after a case's whole text."""
    case = by_name(case_name)
    inputs = {name: value for name, value in case.inputs.items() if name != "labels"}
    empty = KVCache.allocate(case.config, len(case.mask), T, rolling=rolling)
    parameters = parameters_of(case, "float32")
    cache: KVCache = heads.causal_lm(case.config, parameters, **inputs, past_key_values=empty).past_key_values
    return cache


@functools.cache
def expected_rounded() -> Any:
    """What the specification returns where each product rounds its rows to eight bits."""

    def linear(x: Array, weight: Array, bias: Array | None = None, *, round: ops.Round = ops.exact) -> Array:
        return exact(quantized.rounded_rows(x), weight, bias, round=round)

    exact, parameters = ops.linear, parameters_of(ROUNDED, "float32")
    with mock.patch.object(ops, "linear", linear):
        return heads.causal_lm(ROUNDED.config, parameters, **ROUNDED.inputs)


@functools.cache
def expected_int8(rolling: bool) -> Any:
    """What the specification returns for the whole text of the int8 case, and its cache."""
    empty = KVCache.allocate(INT8.config, len(LENGTHS), T, rolling=rolling, dtype="int8")
    parameters = weights(INT8.config, INT8.architecture, "float32")
    return heads.causal_lm(INT8.config, parameters, **INT8.inputs, past_key_values=empty)


def by_name(name: str) -> Case:
    """The case of a name."""
    from .cases import HEADS, LONG

    return next(case for case in (*CAUSAL, *HEADS, LONG, *PACKED, ROUNDED) if case.name == name)


class Subject:
    """One backend with one attention implementation in one dtype."""

    def __init__(self, adapter: Adapter, implementation: str, dtype: str) -> None:
        self.adapter, self.implementation, self.dtype = adapter, implementation, dtype
        self.key = adapter.name, implementation, dtype
        self.models: dict[Any, Any] = {}

    def model(self, case: Case) -> Any:
        """The case's model, for a check that only calls it: all of them share it, as making one costs more than a call.

        `models` holds them by class, config and, where matrices are packed, case.
        """
        key = case.architecture, case.config, case.packing and case.name
        if key not in self.models:
            self.models[key] = self.own_model(case)
        return self.models[key]

    def own_model(self, case: Case) -> Any:
        """The case's model, for a check that changes it, or the way that it is compiled."""
        parameters = weights(case.config, case.architecture, self.dtype)
        model = self.adapter.model(case.architecture, case.config, parameters, self.dtype, self.implementation)
        return self.adapter.pack(model, matrices(case.name, self.dtype)) if case.packing else model

    def inputs(self, case: Case) -> dict[str, Any]:
        """The case's inputs, embeddings in the model's dtype."""
        inputs = dict(case.inputs)
        if "inputs_embeds" in inputs:
            inputs["inputs_embeds"] = self.adapter.array(inputs["inputs_embeds"], self.dtype)
        return inputs

    def compare(
        self, case: str, piece: str, actual: Any, wanted: Array, exact: Array | None = None, *, packed: bool = False
    ) -> Comparison:
        """Compare an array of the framework; `exact` measures what rounding does, to weights too where `packed`."""
        actual = actual if isinstance(actual, np.ndarray) else self.adapter.numpy(actual)
        measured = 0.0
        if exact is not None:
            scale = float(np.abs(wanted).max(initial=0)) or 1.0
            measured = float(np.abs(wanted - exact).max(initial=0)) / (eps_of(self.dtype) * scale)
            if rounds_elsewhere(self.dtype, self.implementation, packed):
                wanted = exact
        bound = tolerance(piece, self.dtype, self.implementation, measured=measured, packed=packed)
        kind = "float32" if piece.partition(" ")[0] in ALWAYS_FLOAT32 else self.dtype
        return compare(self.key, case, piece, actual, wanted, bound, dtype_is=kind)


def functions(subject: Subject) -> Iterator[Comparison]:
    """The functions without parameters: rotary tables, rotation, masks."""
    adapter, dtype = subject.adapter, subject.dtype
    positions = np.array([[0, 1, 2, 4095], [32766, 32767, 131070, 131071]])
    for case in CAUSAL:
        if case.name == "window" or case.config.rope_scaling is not None:
            tables = ops.rotary(positions, case.config)
            for actual, table in zip(adapter.rotary(positions, case.config), tables, strict=True):
                bound = tolerance("rotary", dtype, subject.implementation)
                yield compare(subject.key, case.name, "rotary", actual, table, bound, dtype_is="float32")
            scale = ops.query_scale(positions, case.config)
            if scale is not None:
                actual = adapter.query_scale(positions, case.config)
                yield compare(subject.key, case.name, "rotary", actual, scale, bound, dtype_is="float32")
    x = cast(np.random.default_rng(3).normal(size=(2, 4, 3, TINY.head_dim)), dtype)
    cos, sin = (table.astype(np.float32) for table in ops.rotary(positions, TINY))
    rounds = ops.exact if dtype == "float32" else ops.rounding(dtype)
    wanted = ops.rotate(x.astype(np.float64), cos.astype(np.float64), sin.astype(np.float64), round=rounds)
    bound = tolerance("rotate", dtype, subject.implementation)
    yield compare(subject.key, "window", "rotate", adapter.rotate(x, cos, sin, dtype), wanted, bound)
    for side in ("left", "right", "holes"):
        order = ops.token_order(padded(side), np.zeros(len(LENGTHS), int))
        for window in (None, 1, 2, 5, T, T + 1):
            wanted = ops.attention_mask(order, order, window)
            actual = adapter.mask(order, order, window, None)
            yield compare(subject.key, f"{side}, window {window}", "mask", actual, wanted, Tolerance(0.0, 1.0))


def blocks(subject: Subject, case: Case) -> Iterator[Comparison]:
    """The parts of one decoder layer on random input: norm, MLP, attention, layer."""
    adapter, dtype = subject.adapter, subject.dtype
    config, parameters = case.config, parameters_of(case, dtype)
    layer = adapter.layer(subject.model(case), BODY_LAYER)
    rounds = ops.exact if dtype == "float32" else ops.rounding(dtype)
    x = cast(np.random.default_rng(4).normal(size=(len(LENGTHS), T, config.hidden_size)), dtype)
    wide = x.astype(np.float64)
    order = ops.token_order(case.mask, np.zeros(len(LENGTHS), int))
    position = np.maximum(order, 0)
    cos_sin = tuple(t.astype(np.float32) for t in ops.rotary(position, config))
    scale = ops.query_scale(position, config)
    scale = None if scale is None else scale.astype(np.float32).astype(np.float64)
    given = adapter.array(x, dtype)
    tables = tuple(adapter.array(t, "float32") for t in cos_sin)
    given_scale = None if scale is None else adapter.array(scale, "float32")
    step = adapter.layers.Step(tables, adapter.array(order), query_scale_BT=given_scale)
    exact_tables: Any = tuple(t.astype(np.float64) for t in cos_sin)

    def weight(name: str) -> Array:
        return parameters[f"model.layers.{BODY_LAYER}.{name}.weight"].astype(np.float64)

    norm = ops.rms_norm(wide, weight("input_layernorm"), config.rms_norm_eps, round=rounds)
    yield subject.compare(case.name, "rms_norm", layer.input_layernorm(given), norm)
    mlp = ops.swiglu(wide, *(weight(f"mlp.{part}_proj") for part in ("gate", "up", "down")), round=rounds)
    yield subject.compare(case.name, "mlp", layer.mlp(given), mlp)
    reference: Any = (config, model._Exact(parameters), BODY_LAYER, wide, model.Step(exact_tables, order, scale))
    specs: Any = (
        ("attention", layer.self_attn, model.attention),
        ("layer", layer, model.decoder_layer),
    )
    for piece, call, spec in specs:
        wanted = spec(*reference, round=rounds)[0]
        exact = spec(*reference)[0]
        actual = call(given, step=step)[0]
        yield subject.compare(case.name, piece, actual, wanted, exact)


def whole(subject: Subject, case: Case) -> Iterator[Comparison]:
    """One pass: hidden states, attention weights, scores, loss."""
    wanted, exact = expected(case.name, subject.dtype, False), expected(case.name, subject.dtype, True)
    instance, inputs = subject.model(case), subject.inputs(case)
    out = subject.adapter.call(instance, **inputs, output_hidden_states=True, output_attentions=True)
    plain = subject.adapter.call(instance, **inputs)
    for index, states in enumerate(zip(out.hidden_states, wanted.hidden_states, exact.hidden_states, strict=True)):
        yield subject.compare(case.name, f"hidden_states {index}", *states)
    for index, attention in enumerate(zip(out.attentions, wanted.attentions, exact.attentions, strict=True)):
        yield subject.compare(case.name, f"attentions {index}", *attention)
    for field in ("logits", "start_logits", "end_logits", "loss"):
        if getattr(wanted, field, None) is not None:
            values = getattr(plain, field), getattr(wanted, field), getattr(exact, field)
            yield subject.compare(case.name, field, *values)


def cached(subject: Subject, case: Case, chunking: tuple[int, ...], *, rolling: bool = True) -> Iterator[Comparison]:
    """The logits and the cache of the same text given in chunks."""
    one_pass = [expected(case.name, subject.dtype, exact).logits for exact in (False, True)]
    past = subject.adapter.allocate(case.config, len(case.mask), T, subject.dtype, rolling=rolling)
    logits, past = _in_chunks(subject, case, chunking, past)
    name = f"cached {_told(chunking, rolling)}"
    yield subject.compare(case.name, f"logits {name}", logits, *one_pass, packed=bool(case.packing))
    if subject.dtype == "float32":
        yield from _contents(subject, case, past, name, rolling)


def cached_int8(subject: Subject, chunking: tuple[int, ...], *, rolling: bool = True) -> Iterator[Comparison]:
    """The logits, codes and scales of a text given in chunks to a cache in int8, padded on the left."""
    wanted = expected_int8(rolling)
    past = subject.adapter.allocate(INT8.config, len(LENGTHS), T, "int8", rolling=rolling)
    logits, past = _in_chunks(subject, INT8, chunking, past)
    name = f"cached int8 {_told(chunking, rolling)}"
    yield subject.compare(INT8.name, f"logits {name}", logits, wanted.logits)
    bound = tolerance("logits", subject.dtype, subject.implementation)
    for layer, window in enumerate(INT8.config.layer_windows):
        for kind in ("key", "value"):
            codes, scale = int8_codes(getattr(wanted.past_key_values, f"{kind}s")[layer])
            seen = _seen(wanted.past_key_values, layer, window)
            found = (getattr(past, f"{kind}s")[layer], getattr(past, f"{kind}_scales")[layer])
            codes_found, scale_found = map(subject.adapter.numpy, found)
            piece = f"{kind} {layer} {name}"
            actual, target = (np.where(seen[:, :, None, None], x, 0) for x in (codes_found, codes))
            yield compare(subject.key, INT8.name, f"codes {piece}", actual, target, Tolerance(0.0, 1.0))
            actual, target = (np.where(seen[:, :, None], x, 0) for x in (scale_found, scale))
            yield compare(subject.key, INT8.name, f"scales {piece}", actual, target, bound, dtype_is="float32")


def _in_chunks(subject: Subject, case: Case, chunking: tuple[int, ...], past: Any) -> tuple[Array, Any]:
    """The logits of a case's text given in chunks after an empty cache, and the cache then."""
    inputs = {k: v for k, v in subject.inputs(case).items() if k != "labels" and v is not None}
    inputs["attention_mask"] = case.mask
    instance, start, logits = subject.model(case), 0, []
    for size in chunking:
        chunk = {name: value[:, start : start + size] for name, value in inputs.items()}
        out = subject.adapter.call(instance, **chunk, past_key_values=past)
        past, start = out.past_key_values, start + size
        logits.append(subject.adapter.numpy(out.logits))
    return np.concatenate(logits, axis=1), past


def _told(chunking: tuple[int, ...], rolling: bool) -> str:
    return f"{'rolling' if rolling else 'full'} {'ones' if len(chunking) > 4 else '+'.join(map(str, chunking))}"


def _contents(subject: Subject, case: Case, past: Any, name: str, rolling: bool) -> Iterator[Comparison]:
    """Keys and values of every slot that a next token could see."""
    wanted = expected_cache(case.name, rolling)
    bound = tolerance("logits", subject.dtype, subject.implementation)
    length = subject.adapter.numpy(past.length)
    yield compare(subject.key, case.name, f"length {name}", length, wanted.length, Tolerance(0.0, 1.0))
    for layer, window in enumerate(case.config.layer_windows):
        seen = _seen(wanted, layer, window)
        for kind in ("keys", "values"):
            actual = subject.adapter.numpy(getattr(past, kind)[layer])
            target = getattr(wanted, kind)[layer]
            if actual.shape == target.shape:
                actual, target = (np.where(seen[:, :, None, None], x, 0) for x in (actual, target))
            yield compare(subject.key, case.name, f"cache {kind} {layer} {name}", actual, target, bound)


def _seen(cache: KVCache, layer: int, window: int | None) -> Array:
    """[B, R]: which slots a next token could see."""
    order = slot_order(cache.length, cache.keys[layer].shape[1])
    seen: Array = (order >= 0) & (order > cache.length[:, None] - (window or T + 1))
    return seen


def codes(subject: Subject) -> Iterator[Comparison]:
    """The codes and scales of vectors in int8: random ones, zeros, halves of codes, the largest number negative."""
    x = np.random.default_rng(14).normal(size=(2, 3, 2, TINY.head_dim))
    x[0, 0, 0] = 0
    x[0, 1, 1] = np.array([-127, *np.arange(TINY.head_dim - 1) - 6.5]) / 8
    x = cast(x, subject.dtype)
    wanted = int8_codes(x.astype(np.float64))
    found = map(subject.adapter.numpy, subject.adapter.cache.int8_codes(subject.adapter.array(x, subject.dtype)))
    for piece, actual, target, kind in zip(("codes", "scales"), found, wanted, ("int8", "float32"), strict=True):
        bound = Tolerance(0.0, 1.0) if piece == "codes" else tolerance("rotary", subject.dtype, subject.implementation)
        yield compare(subject.key, "int8", piece, actual, target, bound, dtype_is=kind)


def turns(subject: Subject, prompt: int) -> Iterator[Comparison]:
    """A prompt of some length, then single tokens past three turns of the window, against one pass over all of it."""
    config = TINY
    window = config.sliding_window or 0
    total = prompt + 3 * window
    case = Case("turns", "9, 10: prompts around the window", config, "MistralForCausalLM", {})
    ids = token_ids(config, seed=5, shape=(2, total))
    parameters = weights(config, case.architecture, subject.dtype)
    rounds = ops.exact if subject.dtype == "float32" else ops.rounding(subject.dtype)
    wanted = heads.causal_lm(config, parameters, ids, round=rounds).logits
    exact = heads.causal_lm(config, parameters, ids).logits
    instance = subject.model(case)
    past, logits = subject.adapter.allocate(config, 2, total, subject.dtype), []
    for start, stop in ((0, prompt), *((t, t + 1) for t in range(prompt, total))):
        out = subject.adapter.call(instance, input_ids=ids[:, start:stop], past_key_values=past)
        past = out.past_key_values
        logits.append(subject.adapter.numpy(out.logits))
    assert wanted is not None
    assert exact is not None
    yield subject.compare(f"prompt of {prompt}", "logits", np.concatenate(logits, axis=1), wanted, exact)


def rollback(subject: Subject, count: int) -> Iterator[Comparison]:
    """Tokens forgotten around the window leave no trace: the next logits equal those of a cache that never saw them."""
    config, lookback = TINY, 4
    ids, other = token_ids(config, seed=6, shape=(2, 14)), token_ids(config, seed=7, shape=(2, count))
    parameters = weights(config, "MistralForCausalLM", subject.dtype)
    rounds = ops.exact if subject.dtype == "float32" else ops.rounding(subject.dtype)
    wanted = heads.causal_lm(config, parameters, ids, round=rounds).logits
    exact = heads.causal_lm(config, parameters, ids).logits
    case = Case("rollback", "12: rejected speculation stays in the ring", config, "MistralForCausalLM", {})
    instance, call = subject.model(case), subject.adapter.call
    past = subject.adapter.allocate(config, 2, 40, subject.dtype, lookback=lookback)
    past = call(instance, input_ids=ids[:, :12], past_key_values=past).past_key_values
    past = call(instance, input_ids=other, past_key_values=past).past_key_values
    past = past.rollback(subject.adapter.array(np.full(2, count)), config)
    out = call(instance, input_ids=ids[:, 12:], past_key_values=past)
    assert wanted is not None
    assert exact is not None
    yield subject.compare(f"rollback of {count}", "logits", out.logits, wanted[:, 12:], exact[:, 12:])


def greedy(subject: Subject, *, in_c: bool) -> Iterator[Comparison]:
    """Greedy tokens of a ragged batch, padded on either side, and the end of sequence, by the framework or by C."""
    with contextlib.nullcontext() if in_c else subject.adapter.without_whole_steps():
        yield from _greedy(subject)


def _greedy(subject: Subject) -> Iterator[Comparison]:
    config = TINY
    parameters = weights(config, "MistralForCausalLM", subject.dtype)
    case = Case("greedy", "14, 16: padded rows, rows that ended", config, "MistralForCausalLM", {})
    instance = subject.own_model(case)
    ids = token_ids(config)
    rounds = ops.exact if subject.dtype == "float32" else ops.rounding(subject.dtype)
    for side in ("left", "right"):
        mask = padded(side)
        wanted = heads.greedy(config, parameters, ids, mask, max_new_tokens=GREEDY_TOKENS, round=rounds)
        end = int(wanted[1, 5])
        # the last: a row alone, which stops
        for eos, rows in ((None, slice(3)), (end, slice(3)), (end, slice(1, 2))):
            out = subject.adapter.numpy(
                instance.generate(
                    ids[rows],
                    attention_mask=mask[rows],
                    max_new_tokens=GREEDY_TOKENS,
                    eos_token_id=eos,
                    pad_token_id=0,
                )
            )
            target = np.concatenate([ids[rows], ended(wanted[rows], eos)], axis=1)
            bound = Tolerance(0.0, 1.0)
            yield compare(subject.key, f"{side}-padded, eos {eos}", "greedy", out, target, bound)


def greedy_int8(subject: Subject) -> Iterator[Comparison]:
    """Greedy tokens of a ragged batch from a cache in int8, which are others than those from a cache in float32."""
    parameters = weights(INT8.config, INT8.architecture, "float32")
    options: dict[str, Any] = {"attention_mask": INT8.mask, "max_new_tokens": GREEDY_TOKENS, "cache_dtype": "int8"}
    wanted = engine.generate(INT8.config, parameters, INT8.inputs["input_ids"], **options, eos_token_id=None)
    out = subject.model(INT8).generate(INT8.inputs["input_ids"], **options, eos_token_id=None)
    yield compare(subject.key, INT8.name, "greedy", subject.adapter.numpy(out), wanted.sequences, Tolerance(0.0, 1.0))


def ended(tokens: Array, eos: int | None) -> Array:
    """Rows padded after their first end of sequence, and no longer than the longest."""
    if eos is None:
        return tokens
    stops = np.where((tokens == eos).any(1), (tokens == eos).argmax(1) + 1, tokens.shape[1])
    column = np.arange(tokens.shape[1])
    return np.where(column < stops[:, None], tokens, 0)[:, : stops.max()]


def gradients(subject: Subject, case: Case, **options: Any) -> Iterator[Comparison]:
    """The loss and each entry of every parameter's gradient, against those of the specification.

    With the options of a call, such as `loss_chunk`, that change no number.
    """
    found = subject.adapter.loss_and_gradients(subject.model(case), {**subject.inputs(case), **options})
    yield from learned(subject, case.name, found, expected_gradients(case.name))


def learned(
    subject: Subject, case: str, found: tuple[Array, Mapping[str, Array]], wanted: Gradients
) -> Iterator[Comparison]:
    """A loss and gradients by name, each of its own largest entry; one that is missing, or too much, has no shape."""
    loss, by_name_ = found
    yield subject.compare(case, "loss in training", loss, wanted.loss, wanted.loss)
    bound = tolerance("gradients", subject.dtype, subject.implementation)
    actual, target = with_biases(by_name_), with_biases(wanted.by_name)
    for name in {**target, **actual}:
        arrays = actual.get(name, np.zeros(0, np.float32)), target.get(name, np.zeros(0))
        yield compare(subject.key, case, f"gradients {name}", *arrays, bound, dtype_is=subject.dtype)


def with_biases(gradients: Mapping[str, Array]) -> dict[str, Array]:
    """Gradients, each bias as one more column of its matrix, whose input is 1.

    The sum over all places of scores before a softmax is 0: a bias may have no scale of its own.
    """
    found = dict(gradients)
    for name in [name for name in gradients if name.endswith(".bias")]:
        matrix = name.removesuffix("bias") + "weight"
        found[matrix] = np.concatenate([found[matrix], found.pop(name)[:, None]], axis=1)
    return found


def parts(subject: Subject, case: Case) -> Iterator[Comparison]:
    """The losses of rows alone, as parts of a step of whose labels they are told the number, add up to the step's."""
    adapter, count = subject.adapter, 7
    parameters = weights(case.config, case.architecture, subject.dtype)
    wanted = REFERENCE[case.architecture](case.config, parameters, **case.inputs, num_items_in_batch=count).loss
    instance, inputs = subject.model(case), subject.inputs(case)
    losses = []
    for row in range(len(LENGTHS)):
        alone = {name: value[row : row + 1] for name, value in inputs.items()}
        losses.append(adapter.numpy(adapter.call(instance, **alone, num_items_in_batch=count).loss))
    yield subject.compare(case.name, "loss of parts", np.array(sum(losses), np.float32), wanted, wanted)


def modules(subject: Subject, case: Case) -> Iterator[Comparison]:
    """How many modules that own a parameter are called, by a call and by `generate`, where each has been replaced."""
    adapter, calls = subject.adapter, Counter[str]()
    instance, inputs = subject.own_model(case), subject.inputs(case)
    names = {name.rpartition(".")[0] for name in weights(case.config, case.architecture, subject.dtype)}
    for name in names:
        adapter.record(instance, name, calls)
    runs: dict[str, Any] = {"call": lambda: adapter.call(instance, **inputs)}
    if case.architecture == "MistralForCausalLM":
        runs["generate"] = lambda: instance.generate(inputs["input_ids"], max_new_tokens=2)
    for run, function in runs.items():
        calls.clear()
        function()
        counted = np.array([len(calls)], np.float32)
        yield compare(subject.key, case.name, f"modules of {run}", counted, np.array([len(names)]), Tolerance(0.0, 1.0))
