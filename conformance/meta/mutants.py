"""The planted errors: each a change of source text, which must stand exactly as often as it says, and the check that must go red.

Most are the same text in all three backends, which are mirrors; where a framework spells it differently, `edits` goes by backend.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import NamedTuple

BACKENDS = ("torch", "flax", "tf")


class Edit(NamedTuple):
    """Replace `old` by `new` in one file of a backend; `old` appears `times` times."""

    file: str
    old: str
    new: str
    times: int = 1


class Mutant(NamedTuple):
    """One planted error."""

    name: str
    check: str
    """The name of the check (conformance.suite.CHECKS) that must fail."""
    edits: Mapping[str, Edit]
    """By backend."""
    dtype: str = "float32"
    implementation: str = "eager"
    raises: bool = False
    """Whether the error may show as an exception instead of a wrong number."""


class Everywhere(dict[str, Edit]):
    """The same text in all three backends: what finds it in one finds it in the others, which are mirrors."""


def everywhere(file: str, old: str, new: str, times: int = 1) -> dict[str, Edit]:
    """The same edit in all three."""
    return Everywhere(dict.fromkeys(BACKENDS, Edit(file, old, new, times)))


def spelled(file: str, **edits: tuple[str, str]) -> dict[str, Edit]:
    """An edit of the same file, spelled by backend."""
    return {backend: Edit(file, *pair) for backend, pair in edits.items()}


def core(file: str, old: str, new: str) -> dict[str, Edit]:
    """An edit of a module of `mistral_core.quantization`."""
    return {"core": Edit(file, old, new)}


_WINDOW = "query - key < window"
_SWIGLU = ("silu(self.gate_proj(x_BTD)) * self.up_proj(x_BTD)", "silu(self.up_proj(x_BTD)) * self.gate_proj(x_BTD)")

MUTANTS = (
    # Masks and windows
    Mutant("a block's window + 1", "whole window", spelled(
        "mask.py", torch=(_WINDOW, "query - key <= window"), flax=(_WINDOW, "query - key <= window"),
        tf=(_WINDOW, "query - key <= window")), implementation="blocked"),
    Mutant("a block's first keys left out", "whole window", spelled(
        "blocks.py", torch=("begin + keys - queries - window + 1", "begin + keys - queries - window + 2"),
        flax=("loop.blocks, _span(window))", "loop.blocks, _span(window) - 1)"),
        tf=("loop.blocks, _span(window))", "loop.blocks, _span(window) - 1)")), implementation="blocked", raises=True),
    Mutant("a block's last keys left out", "whole window-none", spelled(
        "blocks.py", torch=("end + keys - queries))", "end + keys - queries - 1))"),
        flax=("(count - end) * COLUMNS)", "(count - end + 1) * COLUMNS)"),
        tf=("(count - end) * COLUMNS)", "(count - end + 1) * COLUMNS)")), implementation="blocked", raises=True),
    Mutant("blocks of a text that is not in order", "whole holes", spelled(
        "blocks.py", torch=("return in_order, all_real", "return True, all_real"),
        flax=("return (most <= least).all()", "return (most <= least).all() | True"),
        tf=("return tf.reduce_all(most <= least)", "return tf.constant(True)")), implementation="blocked"),
    Mutant("window + 1", "whole window", everywhere("mask.py", _WINDOW, "query - key <= window")),
    Mutant("window - 1", "whole window", everywhere("mask.py", _WINDOW, "query - key < window - 1")),
    Mutant("window None taken as 0", "whole window-none",
           everywhere("mask.py", "if window is not None:\n        visible = visible & (query - key < window)",
                      "visible = visible & (query - key <= (window - 1 if window else 0))")),
    Mutant("no window", "whole window", everywhere("mask.py", "if window is not None:", "if False:")),
    Mutant("window 1 taken as none", "whole window-1",
           everywhere("mask.py", _WINDOW, "(query - key < window) | (window == 1)")),
    Mutant("layer_types shifted by one", "whole layer-types",
           everywhere("model.py", "(step, config.layer_windows,", "(step, config.layer_windows[1:] + config.layer_windows[:1],")),
    Mutant("documents see each other", "whole documents",
           everywhere("mask.py", "if documents is not None:", "if False:")),
    Mutant("documents see each other in a block mask", "whole documents", spelled(
        "attention.py", torch=("seen if document_ids_BT is None else seen & (document_ids_BT[b, t] == document_ids_BT[b, s])", "seen"),
    ), implementation="flex"),
    Mutant("positions that begin again taken for one text", "whole begin-again",
           everywhere("arrays.py", "    if told:\n", "    if False:\n")),
    Mutant("a document of one token seen by the next", "whole begin-again",
           everywhere("arrays.py", "position_BT[:, 1:] <= position_BT[:, :-1]", "position_BT[:, 1:] < position_BT[:, :-1]")),
    Mutant("not causal", "whole window", everywhere("mask.py", "(key <= query)", "(key <= query + 1)")),
    Mutant("padding mask ignored", "whole holes",
           everywhere("layers.py", "attention_mask_BT != 0, order", "attention_mask_BT != 2, order")),
    Mutant("padding mask inverted", "whole left-padding",
           everywhere("layers.py", "attention_mask_BT != 0, order", "attention_mask_BT == 0, order")),
    Mutant("positions from the column", "whole holes",
           everywhere("model.py", "token_positions(mask_BT,", "token_positions(mask_BT * 0 + 1,")),
    Mutant("a row that sees nothing sees everything", "whole all-padding", spelled(
        "attention.py",
        torch=("weights.masked_fill(~visible, 0).to(v_BSKH.dtype)", "weights.to(v_BSKH.dtype)"),
        flax=("jnp.where(visible, weights, 0).astype(v_BSKH.dtype)", "weights.astype(v_BSKH.dtype)"),
        tf=("tf.cast(tf.where(visible, weights, 0), v_BSKH.dtype)", "tf.cast(weights, v_BSKH.dtype)"),
    )),
    Mutant("mean of v for a row that sees nothing", "whole all-padding", spelled(
        "attention.py", flax=("return jnp.where(visible_BTS.any(-1)[:, :, None, None], o, 0), None", "return o, None"),
    ), implementation="dot_product"),
    # Rotary embeddings
    Mutant("theta 1e4", "whole theta",
           everywhere("model.py", "rotary(position_BT, config)", "rotary(position_BT, config.replace(rope_theta=1e4))")),
    Mutant("rotary pairs side by side", "whole window", spelled(
        "layers.py",
        torch=("x_BTNH.float().chunk(2, dim=-1)", "(x_BTNH.float()[..., ::2], x_BTNH.float()[..., 1::2])"),
        flax=("jnp.split(x_BTNH.astype(jnp.float32), 2, axis=-1)",
              "(x_BTNH.astype(jnp.float32)[..., ::2], x_BTNH.astype(jnp.float32)[..., 1::2])"),
        tf=("tf.split(tf.cast(x_BTNH, tf.float32), 2, axis=-1)",
            "(tf.cast(x_BTNH, tf.float32)[..., ::2], tf.cast(x_BTNH, tf.float32)[..., 1::2])"),
    )),
    Mutant("rotation backwards", "functions", spelled(
        "layers.py",
        torch=("second, sin, value=-1), torch.addcmul(second * cos, first, sin)",
               "second, sin), torch.addcmul(second * cos, first, sin, value=-1)"),
        flax=("first * cos - second * sin, second * cos + first * sin",
              "first * cos + second * sin, second * cos - first * sin"),
        tf=("first * cos - second * sin, second * cos + first * sin",
            "first * cos + second * sin, second * cos - first * sin"),
    )),
    Mutant("attention factor forgotten", "whole rope-yarn",
           everywhere("layers.py", "table.attention_factor", "1.0", 2)),
    Mutant("rope scaling forgotten", "whole rope-linear",
           everywhere("model.py", "rotary(position_BT, config)", "rotary(position_BT, config.replace(rope_scaling=None))")),
    Mutant("angles in bfloat16", "functions", spelled(
        "layers.py",
        torch=("position_BT.float()[..., None] * inverse_frequency",
               "(position_BT.float()[..., None] * inverse_frequency).bfloat16().float()"),
        flax=("position_BT.astype(jnp.float32)[..., None] * inverse_frequency_H[None, None]",
              "(position_BT.astype(jnp.float32)[..., None] * inverse_frequency_H[None, None]).astype(jnp.bfloat16).astype(jnp.float32)"),
        tf=("tf.expand_dims(tf.cast(position_BT, tf.float32), -1) * inverse_frequency",
            "tf.cast(tf.cast(tf.expand_dims(tf.cast(position_BT, tf.float32), -1) * inverse_frequency, tf.bfloat16), tf.float32)"),
    )),
    Mutant("positions given but not used", "whole far-positions",
           everywhere("model.py", "position_BT = inputs.position_ids\n", "position_BT = None\n")),
    # The scale of queries
    Mutant("scale before the rotation", "blocks query-scale", spelled(
        "layers.py",
        torch=("rotate(self.q_proj(x_BTD).view(B, T, -1, self.head_dim), *step.cos_sin)\n        q_BTNH = scale_queries(q_BTNH, step.query_scale_BT)",
               "rotate(scale_queries(self.q_proj(x_BTD).view(B, T, -1, self.head_dim), step.query_scale_BT), *step.cos_sin)"),
        flax=("rotate(self.q_proj(x_BTD).reshape(B, T, -1, self.head_dim), *step.cos_sin)\n        q_BTNH = scale_queries(q_BTNH, step.query_scale_BT)",
              "rotate(scale_queries(self.q_proj(x_BTD).reshape(B, T, -1, self.head_dim), step.query_scale_BT), *step.cos_sin)"),
        tf=("rotate(tf.reshape(self.q_proj(x_BTD), [B, T, self.heads, self.head_dim]), *step.cos_sin)\n        q_BTNH = scale_queries(q_BTNH, step.query_scale_BT)",
            "rotate(scale_queries(tf.reshape(self.q_proj(x_BTD), [B, T, self.heads, self.head_dim]), step.query_scale_BT), *step.cos_sin)"),
    ), dtype="bfloat16"),
    Mutant("scale in the model's precision", "blocks query-scale", spelled(
        "layers.py",
        torch=("(q_BTNH.float() * scale_BT[:, :, None, None]).to(q_BTNH.dtype)", "q_BTNH * scale_BT[:, :, None, None].to(q_BTNH.dtype)"),
        flax=("(q_BTNH.astype(jnp.float32) * scale_BT[:, :, None, None]).astype(q_BTNH.dtype)",
              "q_BTNH * scale_BT[:, :, None, None].astype(q_BTNH.dtype)"),
        tf=("tf.cast(tf.cast(q_BTNH, tf.float32) * scale_BT[:, :, None, None], q_BTNH.dtype)",
            "q_BTNH * tf.cast(scale_BT[:, :, None, None], q_BTNH.dtype)"),
    ), dtype="bfloat16"),
    Mutant("floor of the scale missing", "whole query-scale",
           everywhere("layers.py", "position_BT // scaling.original_length", "position_BT / scaling.original_length")),
    Mutant("original length replaced by the maximum", "whole query-scale",
           everywhere("layers.py", "scaling.original_length", "config.max_position_embeddings")),
    Mutant("beta 0", "whole query-scale", everywhere("layers.py", "scaling.beta *", "0 *")),
    Mutant("keys scaled too", "whole query-scale",
           everywhere("layers.py", "        v_BTKH = ", "        k_BTKH = scale_queries(k_BTKH, step.query_scale_BT)\n        v_BTKH = ")),
    Mutant("scale of the order, not of the position that rotates", "whole query-scale-far",
           everywhere("model.py", "query_scale(position_BT, config)", "query_scale(token_order(mask_BT, length_B), config)")),
    Mutant("scale of the position in this call", "cached query-scale 7+1+3+6",
           everywhere("model.py", "query_scale(position_BT, config)", "query_scale(token_positions(mask_BT, length_B * 0), config)")),
    # Attention, MLP, norm
    Mutant("key/value heads tiled", "whole window", spelled(
        "attention.py",
        torch=("q_BTNH.reshape(B, T, K, N // K, H)", "q_BTNH.reshape(B, T, N // K, K, H).swapaxes(2, 3)"),
        flax=("q_BTNH.reshape(B, T, K, N // K, H)", "q_BTNH.reshape(B, T, N // K, K, H).swapaxes(2, 3)"),
        tf=("tf.reshape(tf.cast(q_BTNH, tf.float32), [B, T, K, N // K, H])",
            "tf.transpose(tf.reshape(tf.cast(q_BTNH, tf.float32), [B, T, N // K, K, H]), [0, 1, 3, 2, 4])"),
    )),
    Mutant("scale of hidden_size / heads", "whole window", everywhere("attention.py", "* H**-0.5\n", "* (H / 2) ** -0.5\n")),
    Mutant("gate and up swapped", "whole window",
           spelled("layers.py", torch=("gated(self.gate_proj(x_BTD), self.up_proj(x_BTD))", "gated(self.up_proj(x_BTD), self.gate_proj(x_BTD))"),
                   flax=_SWIGLU, tf=_SWIGLU)),
    Mutant("eps 1e-6", "whole eps", everywhere("layers.py", "self.eps = eps", "self.eps = 1e-6")),
    Mutant("norm times weight before the cast", "blocks", spelled(
        "layers.py",
        torch=("h.to(x_BTD.dtype) * weight_D", "(h * weight_D.float()).to(x_BTD.dtype)"),
        flax=("h.astype(x_BTD.dtype) * weight.astype(x_BTD.dtype)", "(h * weight.astype(jnp.float32)).astype(x_BTD.dtype)"),
        tf=("tf.cast(h, x_BTD.dtype) * tf.cast(self.weight, x_BTD.dtype)",
            "tf.cast(h * tf.cast(self.weight, tf.float32), x_BTD.dtype)"),
    ), dtype="bfloat16"),
    Mutant("softmax in bfloat16", "blocks", spelled(
        "attention.py",
        torch=("        # the lowest float", "        scores = scores.to(v_BSKH.dtype)\n        # the lowest float"),
        flax=("    # the lowest float", "    scores = scores.astype(v_BSKH.dtype)\n    # the lowest float"),
        tf=("    # the lowest float", "    scores = tf.cast(scores, v_BSKH.dtype)\n    # the lowest float"),
    ), dtype="bfloat16"),
    Mutant("second norm skipped", "whole window",
           everywhere("layers.py", "self.mlp(self.post_attention_layernorm(x_BTD))", "self.mlp(x_BTD)")),
    # Weights and heads
    Mutant("weights through float16", "whole window",
           everywhere("weights.py", "from_numpy(array)", 'from_numpy(array.astype("float16").astype(array.dtype))')),
    Mutant("tied head not tied", "whole tied", spelled(
        "heads.py",
        torch=("if self.config.tie_word_embeddings:", "if False:"),
        flax=("tied = config.tie_word_embeddings", "tied = False"),
        tf=("tied = config.tie_word_embeddings", "tied = False"),
    ), raises=True),
    Mutant("logits in the model's dtype", "whole window", spelled(
        "layers.py",
        torch=("self.weight, self.bias, dtype=torch.float32)", "self.weight, self.bias)"),
        flax=("self.bias[...], dtype=jnp.float32)", "self.bias[...])"),
        tf=("self.weight, self.bias, dtype=tf.float32)", "self.weight, self.bias)"),
    ), dtype="bfloat16"),
    Mutant("labels not shifted", "whole window",
           everywhere("heads.py", "cross_entropy(logits[:, :-1], labels[:, 1:])", "cross_entropy(logits, labels)")),
    Mutant("-100 counted", "whole window", spelled(
        "losses.py",
        torch=("labels, ignore).sum(), (labels != ignore).sum()", "labels, ignore).sum(), torch.ones_like(labels).sum()"),
        flax=("labels, ignore).sum(), (labels != ignore).sum()", "labels, ignore).sum(), jnp.ones_like(labels).sum()"),
        tf=("(losses), tf.reduce_sum(tf.cast(labels != ignore, tf.float32))",
            "(losses), tf.cast(tf.size(labels), tf.float32)"),
    )),
    Mutant("a part of a step divided by its own count", "parts window", everywhere(
        "heads.py", "cross_entropy(logits[:, :-1], labels[:, 1:]), num_items_in_batch)",
        "cross_entropy(logits[:, :-1], labels[:, 1:]))",
    )),
    Mutant("labels of chunks not shifted", "chunked window",
           everywhere("heads.py", "pad(labels[:, 1:],", "pad(labels[:, :-1],")),
    Mutant("of a matrix the gradient of one chunk", "chunked window", spelled(
        "losses.py",
        torch=("dw_VD.addmm_(d_logits.T, x_RD[part].float())", "dw_VD.addmm_(d_logits.T, x_RD[part].float(), beta=0)"),
        flax=("return total + cross_entropy(", "return cross_entropy("),
        tf=("else dw_VD + _matmul(", "else _matmul("),
    )),
    # Gradients, of numbers that are right
    Mutant("length of the norm a constant to gradients", "gradients window", spelled(
        "layers.py", torch=("torch.rsqrt(h.pow(2)", "torch.rsqrt(h.detach().pow(2)"),
        flax=("jax.lax.rsqrt(jnp.square(h)", "jax.lax.rsqrt(jnp.square(jax.lax.stop_gradient(h))"),
        tf=("tf.math.rsqrt(tf.reduce_mean(tf.square(h)", "tf.math.rsqrt(tf.reduce_mean(tf.square(tf.stop_gradient(h))"),
    )),
    Mutant("gradient of the values in bfloat16", "gradients window", spelled(
        "layers.py", torch=(
            "        where, visibility =",
            "        _ = v_BTKH.requires_grad and v_BTKH.register_hook(lambda d: d.bfloat16().float())\n        where, visibility =",
        ),
    )),
    Mutant("lengths of DoRA's rows learn", "gradients of adapters", spelled(
        "lora.py", torch=("        with torch.no_grad():", "        with torch.enable_grad():"),
        flax=("jax.lax.stop_gradient(jnp.linalg.norm(changed, axis=1))", "jnp.linalg.norm(changed, axis=1)"),
        tf=("tf.stop_gradient(tf.norm(changed, axis=1))", "tf.norm(changed, axis=1)"),
    )),
    Mutant("gradient through a packed matrix rounded to bfloat16", "gradients of adapters", spelled(
        "products.py", torch=("gradient @ _floats(ctx.weight, gradient.dtype)",
                              "gradient @ _floats(ctx.weight, torch.bfloat16).to(gradient.dtype)"),
        flax=("_rounded(_rows(weight, start, size), gradient.dtype)]",
              "(each.astype(gradient.dtype) for each in _rounded(_rows(weight, start, size), jnp.bfloat16))]"),
        tf=("tf.matmul(upstream_RO, _made_floats(upstream_RO, weight, upstream_RO.dtype))",
            "tf.matmul(upstream_RO, tf.cast(_made_floats(upstream_RO, weight, tf.bfloat16), upstream_RO.dtype))"),
    )),
    Mutant("the base of an adapter learns too", "gradients of adapters", spelled(
        "lora.py", torch=("model.requires_grad_(False)", "model.requires_grad_(True)"),
    )),
    Mutant("classifier reads one token early", "whole sequence-right",
           everywhere("heads.py", "column_B = last_token(", "column_B = -1 + last_token(")),
    Mutant("classifier ignores the mask", "whole sequence-right",
           everywhere("heads.py", "if attention_mask is not None:", "if False:")),
    Mutant("classifier prefers the pad id", "whole sequence-mask-wins",
           everywhere("heads.py", "if attention_mask is not None:",
                      "if attention_mask is not None and self.config.pad_token_id is None:")),
    Mutant("start and end swapped", "whole question",
           everywhere("heads.py", "= logits[..., 0], logits[..., 1]", "= logits[..., 1], logits[..., 0]")),
    Mutant("a span beyond the text counts", "whole question",
           everywhere("losses.py", "ignore=length", "ignore=-1", 2), raises=True),
    Mutant("bias of a head forgotten", "whole token", spelled(
        "layers.py",
        torch=("self.weight, self.bias, dtype=torch.float32)", "self.weight, dtype=torch.float32)"),
        flax=("None if self.bias is None else self.bias[...], dtype", "None, dtype"),
        tf=("self.weight, self.bias, dtype=tf.float32)", "self.weight, dtype=tf.float32)"),
    )),
    Mutant("head never called", "modules window", spelled(
        "heads.py",
        torch=("logits = self.lm_head(", "logits = (lambda x: x.float() @ self.lm_head.weight.float().T)("),
        flax=("if self.lm_head is None else self.lm_head\n", "if self.lm_head is None else lambda x: x @ self.lm_head.weight.T\n"),
        tf=("if self.lm_head is None else self.lm_head\n",
            "if self.lm_head is None else lambda x: x @ tf.transpose(self.lm_head.weight)\n"),
    )),
    Mutant("head never called by generate", "modules window", spelled(
        "generate.py", torch=("if _is_plain(model) and _is_plain(model.lm_head) else None", "if True else None"),
    )),
    Mutant("scores never called", "modules token", spelled(
        "heads.py",
        torch=("self.score(x_BTD)", "F.linear(x_BTD.float(), self.score.weight, self.score.bias)"),
        flax=("self.score(x_BTD)", "x_BTD @ self.score.weight.T + self.score.bias[None, None]"),
        tf=("self.score(x_BTD)", "x_BTD @ tf.transpose(self.score.weight) + self.score.bias"),
    )),
    # Cache
    Mutant("cache slot + 1", "cached window by ones",
           everywhere("cache.py", "order_BT % slots, next", "(order_BT + 1) % slots, next")),
    Mutant("empty slots seen as token 0", "cached left-padding by ones", spelled(
        "cache.py", torch=("order.clamp(min=-1)", "order.clamp(min=0)"),
        flax=("jnp.maximum(order, -1)", "jnp.maximum(order, 0)"),
        tf=("tf.maximum(order, -1)", "tf.maximum(order, 0)"),
    )),
    Mutant("long chunks overwrite what they still need", "cached window 7+1+3+6",
           everywhere("cache.py", "beside = not fresh and", "beside = False and")),
    Mutant("long chunks leave their oldest tokens", "cached window 7+1+3+6",
           everywhere("cache.py", "(order_BT > next_length_B[:, None] - slots)", "(order_BT < length_B[:, None] + slots)")),
    Mutant("padding written into the ring", "cached holes by ones",
           everywhere("cache.py", "next_length_B[:, None] % slots", "length_B[:, None] * 0")),
    Mutant("padding counted as length", "cached right-padding 7+1+3+6", spelled(
        "cache.py",
        torch=("self.length + (order_BT >= 0).sum(1)", "self.length + order_BT.shape[1]"),
        flax=("self.length + (order_BT >= 0).sum(1)", "self.length + order_BT.shape[1]"),
        tf=("self.length + tf.reduce_sum(tf.cast(order_BT >= 0, tf.int32), 1)", "self.length + tf.shape(order_BT)[1]"),
    )),
    Mutant("int8: largest code 128", "int8 codes", everywhere("cache.py", "/ LARGEST_CODE", "/ (LARGEST_CODE + 1)")),
    Mutant("int8: rounded down", "int8 codes", spelled(
        "cache.py", torch=("torch.round(", "torch.floor("), flax=("jnp.round(", "jnp.floor("), tf=("tf.round(", "tf.floor("),
    )),
    Mutant("int8: halves away from 0", "int8 codes", spelled(
        "cache.py",
        torch=("torch.round(", "(lambda x: x.sign() * (x.abs() + 0.5).floor())("),
        flax=("jnp.round(", "(lambda x: jnp.sign(x) * jnp.floor(jnp.abs(x) + 0.5))("),
        tf=("tf.round(", "(lambda x: tf.sign(x) * tf.floor(tf.abs(x) + 0.5))("),
    )),
    Mutant("int8: a scale for all heads", "cached int8 17", spelled(
        "cache.py",
        torch=("x_BTKH.abs().amax(-1)", "x_BTKH.abs().amax((-2, -1))[..., None].expand(x_BTKH.shape[:-1])"),
        flax=("jnp.abs(x_BTKH).max(-1)", "jnp.broadcast_to(jnp.abs(x_BTKH).max((-2, -1))[..., None], x_BTKH.shape[:-1])"),
        tf=("tf.reduce_max(tf.abs(x_BTKH), -1)",
            "tf.broadcast_to(tf.reduce_max(tf.abs(x_BTKH), (-2, -1))[..., None], x_BTKH.shape[:-1])"),
    )),
    Mutant("int8: scale of the next head", "cached int8 by ones", spelled(
        "cache.py", torch=("* scale[..., None]", "* scale.roll(1, -1)[..., None]"),
        flax=("* scale[..., None]", "* jnp.roll(scale, 1, -1)[..., None]"),
        tf=("* tf.expand_dims(scale, -1)", "* tf.expand_dims(tf.roll(scale, 1, -1), -1)"),
    )),
    Mutant("int8: scales of keys and values swapped", "cached int8 7+1+3+6",
           everywhere("cache.py", "return keys, values, key_scales, value_scales", "return keys, values, value_scales, key_scales")),
    Mutant("int8: a prompt sees itself unrounded", "cached int8 17", spelled(
        "cache.py", torch=("seen = new\n", "seen = (k_BTKH, v_BTKH)\n"),
    )),
    Mutant("int8 not asked for by generate", "greedy int8",
           everywhere("generate.py", 'if dtype == "auto" else dtype', 'if dtype != "" else dtype')),
    Mutant("prefill reads the first column", "greedy", spelled(
        "generate.py",
        torch=("out.last_hidden_state[:, -1:]", "out.last_hidden_state[:, :1]"),
        flax=("keep = 0 if rule.every else 1", "keep = 0 if rule.every else [0]"),
        tf=("keep = 0 if rule.every else 1", "keep = 0 if rule.every else [0]"),
    )),
    # Choosing tokens
    Mutant("rotations of another block", "noise",
           everywhere("sampling.py", "_ROTATIONS[block % 2]", "_ROTATIONS[(block + 1) % 2]")),
    Mutant("words swapped", "noise", spelled(
        "sampling.py",
        torch=("torch.cat(words", "torch.cat(words[::-1]"),
        flax=("jnp.concatenate(words", "jnp.concatenate(words[::-1]"),
        tf=("tf.concat(words", "tf.concat(words[::-1]"),
    )),
    Mutant("a step late", "choice temperature", spelled(
        "sampling.py",
        torch=("torch.arange(logits.shape[1], device=logits.device)", "1 + torch.arange(logits.shape[1])"),
        flax=("jnp.arange(logits.shape[1])", "1 + jnp.arange(logits.shape[1])"),
        tf=("tf.range(tf.shape(logits)[1])", "1 + tf.range(tf.shape(logits)[1])"),
    )),
    Mutant("top_k of k + 1", "choice top_k", spelled(
        "sampling.py",
        torch=("scores.shape[-1]) - 1)", "scores.shape[-1]))"),
        flax=("scores.shape[-1]) - 1", "scores.shape[-1])"),
        tf=("scores.shape[-1]) - 1", "scores.shape[-1])"),
    )),
    Mutant("top_p without the token that crosses p", "choice top_p",
           everywhere("sampling.py", "before < mass", "before + probability < mass")),
    Mutant("filters before the penalty", "choice all",
           everywhere("sampling.py", "for name in rule.filters:", "for name in reversed(rule.filters):")),
    Mutant("penalty rewards what is below 0", "choice repetition_penalty",
           everywhere("sampling.py", "scores * penalty", "scores / penalty")),
    Mutant("NaN is token 0", "nothing to choose", spelled(
        "sampling.py",
        torch=("torch.where(best.isfinite(), token, -1)", "torch.where(best.isfinite(), token, 0)"),
        flax=("noisy.argmax(-1), -1)", "noisy.argmax(-1), 0)"),
        tf=("tf.where(fine, tf.argmax(noisy, -1, tf.int32), -1)", "tf.where(fine, tf.argmax(noisy, -1, tf.int32), 0)"),
    )),
    # Matrices of few bits
    Mutant("nibbles swapped", "packed-product without kernels", spelled(
        "products.py", torch=("[weight.codes & 15, weight.codes >> 4]", "[weight.codes >> 4, weight.codes & 15]"),
        flax=("[slice(0, None, 2), slice(1, None, 2)]", "[slice(1, None, 2), slice(0, None, 2)]"),
        tf=("(slice(0, None, 2), codes & 15)", "(slice(0, None, 2), tf.bitwise.right_shift(codes, 4))"),
    )),
    Mutant("zero point off by one", "packed-product without kernels", spelled(
        "products.py", torch=("_spread(weight.zero.float(), weight)", "_spread(weight.zero.float() + 1, weight)"),
        flax=("_spread(zero, weight, columns)", "_spread(zero + 1, weight, columns)"),
        tf=("_spread(weight.zero, weight, columns)", "_spread(weight.zero + 1, weight, columns)"),
    )),
    Mutant("zero point left out", "packed-product without kernels", spelled(
        "products.py", torch=("return numbers if weight.zero is None else", "return numbers if True else"),
    )),
    Mutant("middle of four bits 7", "packed-product without kernels", spelled(
        "products.py", torch=("codes.float() - 8 if", "codes.float() - 7 if"),
    )),
    Mutant("scale of the next group", "packed-product without kernels", spelled(
        "products.py", torch=("_spread(weight.scale.float(), weight)", "_spread(weight.scale.float().roll(-1, 1), weight)"),
        flax=("_spread(weight.scale.astype(jnp.float32)", "_spread(jnp.roll(weight.scale, -1, 1).astype(jnp.float32)"),
        tf=("numbers * _spread(weight.scale,", "numbers * _spread(tf.roll(weight.scale, -1, 1),"),
    )),
    Mutant("scale of the next row", "packed-product without kernels", spelled(
        "products.py", torch=("_spread(weight.scale.float(), weight)", "_spread(weight.scale.float().roll(-1, 0), weight)"),
    )),
    Mutant("scales in half precision", "packed-product without kernels", spelled(
        "products.py", torch=("_spread(weight.scale.float(), weight)", "_spread(weight.scale.half().float(), weight)"),
        flax=("_spread(weight.scale.astype(jnp.float32)", "_spread(weight.scale.astype(jnp.float16).astype(jnp.float32)"),
        tf=("numbers * _spread(weight.scale,", "numbers * _spread(tf.cast(weight.scale, tf.float16),"),
    )),
    Mutant("numbers of a packed matrix in bfloat16", "packed-product without kernels", spelled(
        "products.py", torch=("return dequantised(weight, dtype)", "return dequantised(weight, torch.bfloat16).to(dtype)"),
    )),
    Mutant("rows not rounded where that is asked for", "packed-product of rounded rows without kernels", spelled(
        "products.py", torch=("if weight.activations is not None:\n        x = rounded(x)", "if False:\n        x = rounded(x)"),
    )),
    Mutant("rows rounded by 256 columns", "packed-product of rounded rows without kernels", spelled(
        "products.py", torch=("split(ROUNDED_COLUMNS,", "split(2 * ROUNDED_COLUMNS,"),
    )),
    Mutant("rows rounded in steps of 1/128", "packed-product of rounded rows without kernels", spelled(
        "products.py", torch=("keepdim=True) / 127", "keepdim=True) / 128"),
    )),
    Mutant("a packed head in the model's dtype", "packed int4 32", spelled(
        "quantize.py", torch=("dtype=torch.float32 if self.is_head else None", "dtype=None"),
        flax=("dtype=jnp.float32 if self.is_head else None", "dtype=None"),
        tf=("dtype=tf.float32 if self.is_head else None", "dtype=None"),
    ), dtype="bfloat16"),
    Mutant("scaling of an adapter: alpha for alpha / r", "adapters",
           everywhere("lora.py", "target.scaling", "target.scaling * target.r")),
    Mutant("scaling of an embedding's adapter left out", "adapters", everywhere("lora.py", " * low.scaling", "")),
    Mutant("DoRA by the lengths of the base's rows", "adapters", spelled(
        "lora.py", torch=("wide + self.scaling * (self.b @ self.a)", "wide"),
        flax=("wide + self.scaling * product(b, a.T)", "wide"),
        tf=("wide + self.scaling * product(b, tf.transpose(a))", "wide"),
    )),
    Mutant("an adapter's dropout outside of training", "adapters", spelled(
        "lora.py", torch=("self.dropout, self.training)", "self.dropout, True)"),
        flax=("_KEY.get() if self.dropout", "jax.random.key(0) if self.dropout"),
        tf=("drawn_seed(self.number, training)", "drawn_seed(self.number, True)"),
    )),
    Mutant("a merged adapter added once more", "adapters", everywhere(
        "lora.py", "for name in self.active if name not in self.merged", "for name in self.active",
    )),
)  # fmt: skip

PACKED = (
    Mutant("rows as they are", "packed-rounded",
           core("models.py", "activations if KINDS[part.kind].is_integer else None", "None")),
    Mutant("/7 for /7.5", "packed-codes of bfloat16", core("rounding.py", "np.float32(steps / 2)", "np.float32(steps // 2)")),
    Mutant("zero point off by one where it is chosen", "packed-codes of float32",
           core("rounding.py", "low - least / scale", "1 + low - least / scale")),
    Mutant("zero point off by one where codes are chosen", "packed-codes of float32",
           core("rounding.py", "numbers += zero[..., None]", "numbers += zero[..., None] + 1")),
    Mutant("codes by the scale of the next group", "packed-codes of float32",
           core("rounding.py", "factor = scale.astype(np.float32)[..., None]",
                "factor = np.roll(scale, 1, axis=1).astype(np.float32)[..., None]")),
    Mutant("offset of doubled scales left out", "packed-codes of float32",
           core("rounding.py", "// _NESTED] + offset", "// _NESTED]")),
    Mutant("doubled scales all of the first block", "packed-codes of float32",
           core("rounding.py", "outer[np.arange(numbers.size) // _NESTED]", "outer[numbers * 0]")),
    Mutant("scales rounded after the codes are chosen", "packed-codes of bfloat16", core(
        "request.py",
        "symmetric=symmetric, dtype=matrix.dtype)\n        rounding.check_finite(name, scale)\n"
        "        packed = rounding.nearest(matrix, kind, group, scale, zero)",
        "symmetric=symmetric)\n        packed = rounding.nearest(matrix, kind, group, scale, zero)\n"
        "        packed = packed if kind == 'nf4' else packed._replace(scale=scale.astype(matrix.dtype))",
    )),
    Mutant("sign of int8 flipped", "packed-codes of bfloat16",
           core("matrix.py", "return (numbers ^ np.uint8(0x80)).view(np.int8)", "return numbers.view(np.int8)")),
    Mutant("nibbles swapped where they are packed", "packed-codes of float32",
           core("matrix.py", "numbers[:, 0::2] | numbers[:, 1::2] << 4", "numbers[:, 1::2] | numbers[:, 0::2] << 4")),
    Mutant("sign of int8 flipped in a file", "packed-files",
           core("storage.py", "else unsigned(matrix)", "else matrix.codes.view(np.uint8)")),
    Mutant("zero point off by one in a file", "packed-files",
           core("storage.py", "(1 << bits - 1)).astype(np.uint8).T", "(1 << bits - 1) - 1).astype(np.uint8).T")),
    Mutant("nibbles of nf4 swapped in a file", "packed-files",
           core("storage.py", "swapped(matrix.codes)", "matrix.codes")),
)  # fmt: skip
"""Errors of core's packing (`mistral_core.quantization`), which the check must find in every backend."""

CORE = (
    Edit("ending.py", "else padding for row in made", "else 1 for row in made"),
    Edit("ending.py", "or row[-1] in self.ids", "or False"),
    Edit("ending.py", "return self.most - self.made(index, row)", "return self.most + 1 - self.made(index, row)"),
)
"""Errors of core's decode loop, which every backend's greedy check must find: wrong padding, rows that never stop, or late."""
