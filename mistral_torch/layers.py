"""The pieces of a Mistral in the order of use; letters are those of `mistral_core.config`.

A function does mathematics, a module holds parameters. Numbers: the contract of `mistral_core.reference.ops`.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mistral_core import MistralConfig
from mistral_core.config.rope import query_scaling, rotary_table

from .attention import attend, check_implementation
from .between import in_one_pass
from .cache import remember
from .products import product
from .step import Step, look
from .tiles import in_tiles, learnt_in_tiles


class RMSNorm(nn.Module):
    """x / sqrt(mean(x^2) + eps) in float32, cast to the dtype of x, then times the weight [D]."""

    def __init__(self, size: int, eps: float) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(size))
        self.eps = eps

    def forward(self, x_BTD: Tensor) -> Tensor:
        return rms_norm(x_BTD, self.weight, self.eps)


@in_one_pass
@learnt_in_tiles
def rms_norm(x_BTD: Tensor, weight_D: Tensor, eps: float) -> Tensor:
    """The formula of `RMSNorm`, of which a model may hold the weight in another way."""
    h = x_BTD.float()
    h = h * torch.rsqrt(h.pow(2).mean(-1, keepdim=True) + eps)
    return h.to(x_BTD.dtype) * weight_D


def token_order(attention_mask_BT: Tensor, past_length_B: Tensor) -> Tensor:
    """[B, T]: the number of real tokens before each token of its row, -1 for padding."""
    order = past_length_B[:, None] + attention_mask_BT.cumsum(1) - 1
    return torch.where(attention_mask_BT != 0, order, -1)


def token_positions(attention_mask_BT: Tensor, past_length_B: Tensor, document_ids_BT: Tensor | None = None) -> Tensor:
    """[B, T]: the position each token is rotated by; each packed document counts anew."""
    position = torch.clamp(past_length_B[:, None] + attention_mask_BT.cumsum(1) - 1, min=0)
    if document_ids_BT is None:
        return position
    same = document_ids_BT[:, 1:] == document_ids_BT[:, :-1]
    starts = torch.cat([torch.ones_like(same[:, :1]), ~same], dim=1)
    return position - torch.where(starts, position, 0).cummax(1).values


def rotary(position_BT: Tensor, config: MistralConfig) -> tuple[Tensor, Tensor]:
    """cos and sin [B, T, H/2] in float32, whatever the dtype of the model."""
    table = rotary_table(config)
    inverse_frequency = torch.tensor(table.inverse_frequency, dtype=torch.float32, device=position_BT.device)
    angle = position_BT.float()[..., None] * inverse_frequency
    return angle.cos() * table.attention_factor, angle.sin() * table.attention_factor


@in_one_pass
def rotate(x_BTNH: Tensor, cos_BTH: Tensor, sin_BTH: Tensor) -> Tensor:
    """Turn the pairs (x_i, x_{i+H/2}) by their angles, in float32."""
    first, second = x_BTNH.float().chunk(2, dim=-1)
    cos, sin = cos_BTH[:, :, None, :], sin_BTH[:, :, None, :]
    # first cos - second sin and second cos + first sin, in half as many passes over memory
    turned = torch.addcmul(first * cos, second, sin, value=-1), torch.addcmul(second * cos, first, sin)
    return torch.cat(turned, dim=-1).to(x_BTNH.dtype)


def query_scale(position_BT: Tensor, config: MistralConfig) -> Tensor | None:
    """[B, T]: what the rotated queries are multiplied by, float32 in every model; None: by nothing."""
    scaling = query_scaling(config)
    if scaling is None:
        return None
    turns_BT = position_BT // scaling.original_length
    return 1 + scaling.beta * torch.log(1 + turns_BT.float())


def scale_queries(q_BTNH: Tensor, scale_BT: Tensor | None) -> Tensor:
    """The rotated queries, each times its scale, in float32."""
    return q_BTNH if scale_BT is None else (q_BTNH.float() * scale_BT[:, :, None, None]).to(q_BTNH.dtype)


class Attention(nn.Module):
    """Grouped-query attention: project, rotate, remember, attend, project back."""

    def __init__(self, config: MistralConfig, window: int | None, implementation: str) -> None:
        super().__init__()
        D, N, H = config.hidden_size, config.num_attention_heads, config.head_dim
        K = config.num_key_value_heads
        self.q_proj = nn.Linear(D, N * H, bias=False)
        self.k_proj = nn.Linear(D, K * H, bias=False)
        self.v_proj = nn.Linear(D, K * H, bias=False)
        self.o_proj = nn.Linear(N * H, D, bias=False)
        self.head_dim = H
        self.window = window
        self.implementation = check_implementation(implementation)
        self.dropout = config.attention_dropout

    def forward(
        self, x_BTD: Tensor, step: Step, past: tuple[Tensor, ...] | None = None
    ) -> tuple[Tensor, Tensor | None, tuple[Tensor, ...] | None]:
        B, T, _ = x_BTD.shape
        q_BTNH = rotate(self.q_proj(x_BTD).view(B, T, -1, self.head_dim), *step.cos_sin)
        q_BTNH = scale_queries(q_BTNH, step.query_scale_BT)
        k_BTKH = rotate(self.k_proj(x_BTD).view(B, T, -1, self.head_dim), *step.cos_sin)
        v_BTKH = self.v_proj(x_BTD).view(B, T, -1, self.head_dim)
        where, visibility = step.sight or look(step, self.window, past)
        k_BSKH, v_BSKH, kept = remember(k_BTKH, v_BTKH, past, where)
        o_BTNH, weights = attend(
            q_BTNH,
            k_BSKH,
            v_BSKH,
            visibility,
            implementation="eager" if step.output_attentions else self.implementation,
            dropout=self.dropout if self.training else 0.0,
        )
        return self.o_proj(o_BTNH.reshape(B, T, -1)), weights, kept


class MLP(nn.Module):
    """SwiGLU: down(silu(gate(x)) * up(x))."""

    def __init__(self, config: MistralConfig) -> None:
        super().__init__()
        self.gate_proj = nn.Linear(config.hidden_size, config.intermediate_size, bias=False)
        self.up_proj = nn.Linear(config.hidden_size, config.intermediate_size, bias=False)
        self.down_proj = nn.Linear(config.intermediate_size, config.hidden_size, bias=False)

    @in_tiles
    def forward(self, x_BTD: Tensor) -> Tensor:
        return self.down_proj(gated(self.gate_proj(x_BTD), self.up_proj(x_BTD)))


@in_one_pass
@learnt_in_tiles
def gated(gate_BTF: Tensor, up_BTF: Tensor) -> Tensor:
    """silu(gate) up, rounded after each."""
    return F.silu(gate_BTF) * up_BTF


class DecoderLayer(nn.Module):
    """x + attention(norm(x)), then x + mlp(norm(x))."""

    def __init__(self, config: MistralConfig, window: int | None, implementation: str) -> None:
        super().__init__()
        self.input_layernorm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.self_attn = Attention(config, window, implementation)
        self.post_attention_layernorm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.mlp = MLP(config)

    def forward(
        self, x_BTD: Tensor, step: Step, past: tuple[Tensor, ...] | None = None
    ) -> tuple[Tensor, Tensor | None, tuple[Tensor, ...] | None]:
        h, weights, kept = self.self_attn(self.input_layernorm(x_BTD), step, past)
        x_BTD = x_BTD + h
        return x_BTD + self.mlp(self.post_attention_layernorm(x_BTD)), weights, kept


class Head(nn.Linear):
    """A Linear whose product is accumulated and returned in float32."""

    def forward(self, x: Tensor) -> Tensor:
        return product(x, self.weight, self.bias, dtype=torch.float32)

    @property
    def factor(self) -> Tensor | None:
        """The W of x W^T, where a call is nothing else; None where it is."""
        return self.weight if type(self) is Head and self.bias is None else None


def last_token(attention_mask_BT: Tensor) -> Tensor:
    """[B]: the column of each row's last real token, 0 where a row has none."""
    column = torch.arange(attention_mask_BT.shape[1], device=attention_mask_BT.device)
    return torch.where(attention_mask_BT != 0, column, 0).max(1).values
