"""Attention inside windows, for the networks that attend: as one fused kernel, or as a CPU has it fastest."""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

FUSED_MULTIPLE = 8  # features a head that the fused kernels ask for


def attend(q: Tensor, k: Tensor, v: Tensor, bias: Tensor) -> Tensor:
    """softmax(q k^T / sqrt(D) + bias) v. q, k, v: (B, windows, heads, N, D), bias: (windows or 1, heads, N, N) -> same
    as q.

    `bias` is all that is added to the scores, masks of windows included.
    """
    return attend_plainly(q, k, v, bias) if q.device.type == "cpu" else attend_fused(q, k, v, bias)


def attend_plainly(q: Tensor, k: Tensor, v: Tensor, bias: Tensor) -> Tensor:
    """With every product's short side, the D features, in its rows: MKL takes four times as long for a result of
    N x 10 as for one of 10 x N. The fused kernel of the CPU knows no gradient of the bias."""
    q, k, v = (t.mT.contiguous() for t in (q * q.shape[-1] ** -0.5, k, v))
    if torch.is_grad_enabled():
        return _Attention.apply(q, k, v, bias).mT
    return (v @ _probabilities(q, k, bias).to(v.dtype).mT).mT  # also under torch.vmap


def _probabilities(q: Tensor, k: Tensor, bias: Tensor) -> Tensor:
    return (q.mT @ k).float().add_(bias).softmax(-1)


class _Attention(torch.autograd.Function):
    """q, k, v (..., D, N), q scaled, and bias (..., N, N) -> (..., D, N). Probabilities are fp32 in any precision."""

    @staticmethod
    def forward(ctx: Any, q: Tensor, k: Tensor, v: Tensor, bias: Tensor) -> Tensor:
        probabilities = _probabilities(q, k, bias)
        ctx.save_for_backward(q, k, v, probabilities)
        ctx.bias_shape, ctx.bias_dtype = bias.shape, bias.dtype
        return v @ probabilities.to(v.dtype).mT

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, ...]:
        (gradient,), (q, k, v, probabilities) = gradients, ctx.saved_tensors
        scores = torch._softmax_backward_data((gradient.mT @ v).float(), probabilities, -1, torch.float32)
        bias = scores.sum_to_size(ctx.bias_shape).to(ctx.bias_dtype)
        scores = scores.to(q.dtype)
        return k @ scores.mT, q @ scores, gradient @ probabilities.to(v.dtype), bias


def attend_fused(q: Tensor, k: Tensor, v: Tensor, bias: Tensor) -> Tensor:
    """By `scaled_dot_product_attention`, scores never written out: windows and heads as one dimension, over which the
    bias differs, and zeros after the features up to a multiple that the kernels take."""
    num_windows, num_heads, _, dim = q.shape[1:]
    bias = bias.expand(num_windows, -1, -1, -1).flatten(0, 1).to(q.dtype)  # (windows * heads, N, N)
    q, k, v = (F.pad(t, (0, -dim % FUSED_MULTIPLE)).flatten(1, 2) for t in (q, k, v))
    out = F.scaled_dot_product_attention(q, k, v, bias, scale=dim**-0.5)
    return out[..., :dim].unflatten(1, (num_windows, num_heads))
