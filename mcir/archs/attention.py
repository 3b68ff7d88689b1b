"""Attention inside windows, for the networks that attend: as one fused kernel, or as a CPU has it fastest."""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

FUSED_MULTIPLE = 8  # features a head that the fused kernels ask for
FUSED_AT_ONCE = 1 << 14  # windows times heads: the kernels' limit is 65,535, and bias and mask are written out for each


def attend(qkv: Tensor, bias: Tensor, mask: Tensor) -> Tensor:
    """softmax(q k^T / sqrt(D) + bias + mask) v. qkv: (3, B, windows, heads, N, D), bias: (heads, N, N), mask:
    (windows, N, N), without a gradient -> (B, windows, heads, N, D)."""
    return attend_plainly(qkv, bias, mask) if qkv.device.type == "cpu" else attend_fused(qkv, bias, mask)


def attend_plainly(qkv: Tensor, bias: Tensor, mask: Tensor) -> Tensor:
    """With every product's short side, the D features, in its rows: MKL takes four times as long for a result of
    N x 10 as for one of 10 x N. The fused kernel of the CPU knows no gradient of the bias."""
    q, k, v = qkv.mT.contiguous().flatten(1, 3)  # each (B * windows * heads, D, N)
    q = q * qkv.shape[-1] ** -0.5
    if torch.is_grad_enabled():
        out = _Attention.apply(q, k, v, bias, mask)
    else:
        out = torch.bmm(v, _probabilities(q, k, bias, mask).to(v.dtype).mT)
    return out.unflatten(0, qkv.shape[1:4]).mT


def _probabilities(q: Tensor, k: Tensor, bias: Tensor, mask: Tensor) -> Tensor:
    scores = torch.bmm(q.mT, k).float()
    scores.unflatten(0, (-1, len(mask), len(bias))).add_(bias + mask.to(bias.dtype)[:, None])
    return scores.softmax(-1)


class _Attention(torch.autograd.Function):
    """q, k, v (B * windows * heads, D, N), q scaled -> as q. Probabilities are fp32 in any precision."""

    @staticmethod
    def forward(ctx: Any, q: Tensor, k: Tensor, v: Tensor, bias: Tensor, mask: Tensor) -> Tensor:
        probabilities = _probabilities(q, k, bias, mask)
        ctx.save_for_backward(q, k, v, probabilities)
        ctx.bias_shape, ctx.bias_dtype = bias.shape, bias.dtype
        return torch.bmm(v, probabilities.to(v.dtype).mT)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        (gradient,), (q, k, v, probabilities) = gradients, ctx.saved_tensors
        scores = torch._softmax_backward_data(torch.bmm(gradient.mT, v).float(), probabilities, -1, torch.float32)
        bias = scores.view(-1, *ctx.bias_shape).sum(0).to(ctx.bias_dtype)
        scores = scores.to(q.dtype)
        value = torch.bmm(gradient, probabilities.to(v.dtype))
        return torch.bmm(k, scores.mT), torch.bmm(q, scores), value, bias, None


def attend_fused(qkv: Tensor, bias: Tensor, mask: Tensor) -> Tensor:
    """By `scaled_dot_product_attention`, scores never written out: windows and heads as one dimension, over which bias
    and mask differ, and zeros after the features up to a multiple that the kernels take."""
    most = FUSED_AT_ONCE // len(bias)
    if len(mask) > most:
        parts = zip(qkv.split(most, 2), mask.split(most), strict=True)
        return torch.cat([attend_fused(part, bias, of_part) for part, of_part in parts], 1)
    dim = qkv.shape[-1]
    added = (bias + mask.to(bias.dtype)[:, None]).flatten(0, 1).to(qkv.dtype)  # (windows * heads, N, N)
    q, k, v = F.pad(qkv, (0, -dim % FUSED_MULTIPLE)).flatten(2, 3)
    out = F.scaled_dot_product_attention(q, k, v, added, scale=dim**-0.5)
    return out[..., :dim].unflatten(1, qkv.shape[2:4])
