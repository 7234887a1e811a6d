"""Gradients of the losses of the four heads, by going back from the loss (reverse mode).

A function here is the derivative of its namesake in `ops`, `model` and `heads`. Where that makes y of x, this takes x
and dy, the gradient of the loss with respect to y, and gives dx, one for each input: dx[j] is the sum over i of dy[i]
times the derivative of y[i] by x[j] (the chain rule). Each layer computes its pass forward again, from its input.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import numpy as np

from ..arrays import Array
from ..config import MistralConfig
from . import heads, model, ops
from .model import Parameters, Step, _Exact

EMBEDDING = "model.embed_tokens.weight"


class Gradients(NamedTuple):
    """A loss, and what it changes by with each parameter."""

    loss: Array
    by_name: dict[str, Array]
    """Canonical name -> the gradient, of the parameter's shape; zeros where the loss does not hang on it."""


# Of each formula


def linear(x: Array, weight: Array, dy: Array) -> tuple[Array, Array]:
    """dx = dy W, and dW = dy^T x, summed over all rows: y[r, o] = sum over i of W[o, i] x[r, i]."""
    return dy @ weight, dy.reshape(-1, dy.shape[-1]).T @ x.reshape(-1, x.shape[-1])


def rms_norm(x_BTD: Array, weight_D: Array, eps: float, dy_BTD: Array) -> tuple[Array, Array]:
    """dx = (dn - n mean(dn n)) / rms and dw = dy n, n being x / rms and dn = dy w.

    By x[j] rms = sqrt(mean(x^2) + eps) has the derivative n[j] / D, and so n[i] has ((i = j) - n[i] n[j] / D) / rms.
    """
    rms = np.sqrt(np.mean(x_BTD**2, axis=-1, keepdims=True) + eps)
    n_BTD, dn_BTD = x_BTD / rms, dy_BTD * weight_D
    dx_BTD = (dn_BTD - n_BTD * np.mean(dn_BTD * n_BTD, axis=-1, keepdims=True)) / rms
    return dx_BTD, (dy_BTD * n_BTD).sum(axis=(0, 1))


def rotate(cos_BTH: Array, sin_BTH: Array, dy_BTNH: Array) -> Array:
    """Turned back: the transpose of a rotation is the one by the negative angle, whose cosine is the same."""
    return ops.rotate(dy_BTNH, cos_BTH, -sin_BTH)


def softmax(weights: Array, dweights: Array) -> Array:
    """p (dp - sum(dp p)), for p[i] has the derivative p[i] ((i = j) - p[j]); 0 where nothing is visible."""
    return weights * (dweights - (dweights * weights).sum(axis=-1, keepdims=True))


def attend(q_BTNH: Array, k_BSKH: Array, v_BSKH: Array, weights_BNTS: Array, do_BTNH: Array) -> tuple[Array, ...]:
    """dq, dk, dv: each product's by the other factor; a key/value head has the sum of those of its G query heads."""
    B, S, K, H = k_BSKH.shape
    groups = q_BTNH.shape[2] // K
    k_BSNH, v_BSNH = np.repeat(k_BSKH, groups, axis=2), np.repeat(v_BSKH, groups, axis=2)
    dweights_BNTS = np.einsum("BTNH,BSNH->BNTS", do_BTNH, v_BSNH)
    dscores_BNTS = softmax(weights_BNTS, dweights_BNTS) / np.sqrt(H)
    dq_BTNH = np.einsum("BNTS,BSNH->BTNH", dscores_BNTS, k_BSNH)
    dk_BSNH = np.einsum("BNTS,BTNH->BSNH", dscores_BNTS, q_BTNH)
    dv_BSNH = np.einsum("BNTS,BTNH->BSNH", weights_BNTS, do_BTNH)
    dk_BSKH, dv_BSKH = (d.reshape(B, S, K, groups, H).sum(axis=3) for d in (dk_BSNH, dv_BSNH))
    return dq_BTNH, dk_BSKH, dv_BSKH


def silu(x: Array, dy: Array) -> Array:
    """dy s (1 + x (1 - s)), s the logistic function: of x s by the product rule, with s' = s (1 - s)."""
    s = logistic(x)
    return dy * s * (1 + x * (1 - s))


def logistic(x: Array) -> Array:
    """1 / (1 + exp(-x)), written so that nothing overflows."""
    return np.where(x >= 0, 1, np.exp(np.minimum(x, 0))) / (1 + np.exp(-np.abs(x)))


def swiglu(x_BTD: Array, gate_FD: Array, up_FD: Array, down_DF: Array, dy_BTD: Array) -> tuple[Array, ...]:
    """dx, and those of the three matrices: of a product each factor's is dy times the other one."""
    gate_BTF, up_BTF = ops.linear(x_BTD, gate_FD), ops.linear(x_BTD, up_FD)
    dh_BTF, ddown_DF = linear(ops.silu(gate_BTF) * up_BTF, down_DF, dy_BTD)
    from_gate_BTD, dgate_FD = linear(x_BTD, gate_FD, silu(gate_BTF, dh_BTF * up_BTF))
    from_up_BTD, dup_FD = linear(x_BTD, up_FD, dh_BTF * ops.silu(gate_BTF))
    return from_gate_BTD + from_up_BTD, dgate_FD, dup_FD, ddown_DF


def embedding(ids_BT: Array, rows: int, dx_BTD: Array) -> Array:
    """[V, D]: each row's is the sum of those of the places where its token stands."""
    dweight_VD = np.zeros((rows, dx_BTD.shape[-1]))
    np.add.at(dweight_VD, ids_BT, dx_BTD)
    return dweight_VD


# Of losses, each divided by the number of what is counted, or of what the whole step counts


def cross_entropy(logits: Array, labels: Array, num_items_in_batch: Any = None, *, ignore: int = -100) -> Array:
    """softmax(logits), less 1 at the label, of the labels that count: of log(sum exp x) - x[label]."""
    counted = labels != ignore
    probabilities = ops.softmax(logits, np.ones(logits.shape, bool))
    dlogits = probabilities - (np.arange(logits.shape[-1]) == labels[..., None])
    return divided(np.where(counted[..., None], dlogits, 0), counted.sum(), num_items_in_batch)


def binary_cross_entropy(logits: Array, labels: Array, num_items_in_batch: Any = None) -> Array:
    """s(x) - y, s the logistic function: of log(1 + exp x) - x y."""
    return divided(logistic(logits) - labels, labels.size, num_items_in_batch)


def squared_error(predictions: Array, labels: Array, num_items_in_batch: Any = None) -> Array:
    """2 (x - y)."""
    return divided(2 * (predictions - labels), labels.size, num_items_in_batch)


def divided(dtotal: Array, count: Any, num_items_in_batch: Any = None) -> Array:
    """A sum's over its count, or over that of the whole step; nothing counted is 0."""
    count = count if num_items_in_batch is None else num_items_in_batch
    return dtotal / (count if count > 0 else 1)


# Of the model


def attention(
    config: MistralConfig, parameters: Parameters, layer: int, x_BTD: Array, step: Step, dy_BTD: Array
) -> tuple[Array, dict[str, Array]]:
    """dx, and those of the four projections by the ends of their names."""
    names = [f"self_attn.{part}_proj.weight" for part in "qkvo"]
    query, key, value, output = (parameters[f"model.layers.{layer}.{name}"] for name in names)
    q_BTNH, k_BTKH, v_BTKH = model.queries_keys_values(config, parameters, layer, x_BTD, step)
    order_BT, window = step.order_BT, config.layer_windows[layer]
    visible_BTS = ops.attention_mask(order_BT, order_BT, window, document_ids_BT=step.document_ids_BT)
    o_BTNH, weights_BNTS = ops.attend(q_BTNH, k_BTKH, v_BTKH, visible_BTS)

    flat = (*x_BTD.shape[:2], -1)
    do, doutput = linear(o_BTNH.reshape(flat), output, dy_BTD)
    dq_BTNH, dk_BTKH, dv_BTKH = attend(q_BTNH, k_BTKH, v_BTKH, weights_BNTS, do.reshape(o_BTNH.shape))
    dq_BTNH = rotate(*step.cos_sin, ops.scale_queries(dq_BTNH, step.query_scale_BT))
    dk_BTKH = rotate(*step.cos_sin, dk_BTKH)
    from_q, dquery = linear(x_BTD, query, dq_BTNH.reshape(flat))
    from_k, dkey = linear(x_BTD, key, dk_BTKH.reshape(flat))
    from_v, dvalue = linear(x_BTD, value, dv_BTKH.reshape(flat))
    return from_q + from_k + from_v, dict(zip(names, (dquery, dkey, dvalue, doutput), strict=True))


def decoder_layer(
    config: MistralConfig, parameters: Parameters, layer: int, x_BTD: Array, step: Step, dy_BTD: Array
) -> tuple[Array, dict[str, Array]]:
    """dx, and those of a layer's parameters by the ends of their names; what goes around a block adds its dy."""

    def weight(name: str) -> Array:
        return parameters[f"model.layers.{layer}.{name}.weight"]

    before, after, eps = weight("input_layernorm"), weight("post_attention_layernorm"), config.rms_norm_eps
    matrices = {f"mlp.{part}_proj.weight": weight(f"mlp.{part}_proj") for part in ("gate", "up", "down")}
    h_BTD = ops.rms_norm(x_BTD, before, eps)
    m_BTD = x_BTD + model.attention(config, parameters, layer, h_BTD, step)[0]
    gate, up, down = matrices.values()
    dn_BTD, *dmatrices = swiglu(ops.rms_norm(m_BTD, after, eps), gate, up, down, dy_BTD)
    through_BTD, dafter = rms_norm(m_BTD, after, eps, dn_BTD)
    dm_BTD = dy_BTD + through_BTD
    dh_BTD, found = attention(config, parameters, layer, h_BTD, step, dm_BTD)
    through_BTD, dbefore = rms_norm(x_BTD, before, eps, dh_BTD)
    found |= dict(zip(matrices, dmatrices, strict=True))
    found |= {"input_layernorm.weight": dbefore, "post_attention_layernorm.weight": dafter}
    return dm_BTD + through_BTD, found


def forward(
    config: MistralConfig,
    parameters: Parameters,
    hidden_states: tuple[Array, ...],
    dy_BTD: Array,
    input_ids: Array | None = None,
    attention_mask: Array | None = None,
    position_ids: Array | None = None,
    *,
    inputs_embeds: Array | None = None,
    document_ids: Array | None = None,
) -> dict[str, Array]:
    """Those of the body's parameters, from that of the last hidden states and from all that a call returned."""
    parameters, layers, eps = _Exact(parameters), range(config.num_hidden_layers), config.rms_norm_eps
    step = model.step_of(config, dy_BTD.shape[:2], attention_mask, position_ids, document_ids=document_ids)
    # the last of the hidden states is normed, and what the norm was given is not among them
    x_BTD = model.decoder_layer(config, parameters, layers[-1], hidden_states[-2], step)[0]
    dx_BTD, dnorm = rms_norm(x_BTD, parameters["model.norm.weight"], eps, dy_BTD)
    found = {"model.norm.weight": dnorm}
    for layer in reversed(layers):
        dx_BTD, own = decoder_layer(config, parameters, layer, hidden_states[layer], step, dx_BTD)
        found |= {f"model.layers.{layer}.{name}": gradient for name, gradient in own.items()}
    if inputs_embeds is None:
        found[EMBEDDING] = embedding(np.asarray(input_ids), config.vocab_size, dx_BTD)
    else:
        found[EMBEDDING] = np.zeros((config.vocab_size, config.hidden_size))
    return found


# Of the heads


def causal_lm(
    config: MistralConfig, parameters: Parameters, input_ids: Array | None = None, *, labels: Array,
    num_items_in_batch: Any = None, **inputs: Any,
) -> Gradients:  # fmt: skip
    """Those of a language model; a tied embedding has the sum of what it does at both ends."""
    out: Any = heads.causal_lm(
        config, parameters, input_ids, labels=labels, num_items_in_batch=num_items_in_batch, **inputs
    )
    dlogits_BTV = np.zeros(out.logits.shape)
    dlogits_BTV[:, :-1] = cross_entropy(out.logits[:, :-1], np.asarray(labels)[:, 1:], num_items_in_batch)
    dx_BTD, dhead_VD = linear(out.hidden_states[-1], heads.head_weight(config, parameters), dlogits_BTV)
    found = forward(config, parameters, out.hidden_states, dx_BTD, input_ids, **inputs)
    name = EMBEDDING if config.tie_word_embeddings else "lm_head.weight"
    found[name] = found.get(name, 0) + dhead_VD
    return Gradients(out.loss, found)


def sequence_classification(
    config: MistralConfig, parameters: Parameters, input_ids: Array | None = None, *, labels: Array,
    attention_mask: Array | None = None, num_items_in_batch: Any = None, **inputs: Any,
) -> Gradients:  # fmt: skip
    """Those of a classifier of texts, whose loss sees one column of each row."""
    labels = np.asarray(labels)
    out: Any = heads.sequence_classification(
        config, parameters, input_ids, labels=labels, attention_mask=attention_mask,
        num_items_in_batch=num_items_in_batch, **inputs,
    )  # fmt: skip
    x_BTD, score_CD = out.hidden_states[-1], np.asarray(parameters["score.weight"], np.float64)
    pooled = np.arange(len(x_BTD)), heads.last_column(config, x_BTD.shape[:2], input_ids, attention_mask)
    dlogits_BC = classification_loss(config, out.logits, labels, num_items_in_batch)
    dx_BTD = np.zeros(x_BTD.shape)
    dx_BTD[pooled], dscore_CD = linear(x_BTD[pooled], score_CD, dlogits_BC)
    found = forward(config, parameters, out.hidden_states, dx_BTD, input_ids, attention_mask, **inputs)
    return Gradients(out.loss, {**found, "score.weight": dscore_CD})


def classification_loss(config: MistralConfig, logits: Array, labels: Array, num_items_in_batch: Any = None) -> Array:
    """Of the scores of a classifier of texts, by problem_type."""
    kind = config.problem(float_labels=labels.dtype.kind not in "iu")
    if kind == "regression":
        return squared_error(logits.reshape(labels.shape), labels, num_items_in_batch).reshape(logits.shape)
    if kind == "single_label_classification":
        return cross_entropy(logits, labels.reshape(-1), num_items_in_batch)
    return binary_cross_entropy(logits, labels, num_items_in_batch)


def token_classification(
    config: MistralConfig, parameters: Parameters, input_ids: Array | None = None, *, labels: Array,
    num_items_in_batch: Any = None, **inputs: Any,
) -> Gradients:  # fmt: skip
    """Those of a classifier of tokens."""
    out: Any = heads.token_classification(
        config, parameters, input_ids, labels=labels, num_items_in_batch=num_items_in_batch, **inputs
    )
    dlogits_BTC = cross_entropy(out.logits, np.asarray(labels), num_items_in_batch)
    dx_BTD, found = _biased(out.hidden_states[-1], parameters, "score", dlogits_BTC)
    return Gradients(out.loss, forward(config, parameters, out.hidden_states, dx_BTD, input_ids, **inputs) | found)


def question_answering(
    config: MistralConfig, parameters: Parameters, input_ids: Array | None = None, *,
    start_positions: Array, end_positions: Array, num_items_in_batch: Any = None, **inputs: Any,
) -> Gradients:  # fmt: skip
    """Those of a reader of answers, whose loss is the mean of two."""
    out: Any = heads.question_answering(
        config, parameters, input_ids, start_positions=start_positions, end_positions=end_positions,
        num_items_in_batch=num_items_in_batch, **inputs,
    )  # fmt: skip
    length, scores = out.start_logits.shape[1], (out.start_logits, out.end_logits)
    dscores_BT = [
        cross_entropy(each, np.clip(np.asarray(positions).reshape(-1), 0, length), num_items_in_batch, ignore=length)
        for each, positions in zip(scores, (start_positions, end_positions), strict=True)
    ]
    dlogits_BT2 = np.stack(dscores_BT, axis=-1) / 2
    dx_BTD, found = _biased(out.hidden_states[-1], parameters, "qa_outputs", dlogits_BT2)
    return Gradients(out.loss, forward(config, parameters, out.hidden_states, dx_BTD, input_ids, **inputs) | found)


def _biased(x_BTD: Array, parameters: Parameters, name: str, dy: Array) -> tuple[Array, dict[str, Array]]:
    dx_BTD, dweight = linear(x_BTD, np.asarray(parameters[f"{name}.weight"], np.float64), dy)
    return dx_BTD, {f"{name}.weight": dweight, f"{name}.bias": dy.sum(axis=(0, 1))}


OF: Mapping[str, Callable[..., Gradients]] = {
    "MistralForCausalLM": causal_lm,
    "MistralForSequenceClassification": sequence_classification,
    "MistralForTokenClassification": token_classification,
    "MistralForQuestionAnswering": question_answering,
}
"""Class name -> the gradients of its loss."""
