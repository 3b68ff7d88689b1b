"""Distances in feature space between one anchor and several others, differentiated by the anchor alone.

d_l(a, b) = mean |a_l - b_l| over batch, channels and places of tap l, or of each sample by itself. Others are given as
an iterable of feature lists and looked at once, as they go by: what the gradient needs of them, a sum of signs, is
taken at once and nothing of them is kept for the backward pass, where autograd would keep all. Sums are in fp32, of
float64 in float64.
"""

from collections.abc import Iterable, Sequence
from typing import Any

import torch
from torch import Tensor


def summed(
    anchor: Sequence[Tensor],
    others: Iterable[Sequence[Tensor]],
    weights: Sequence[float],
    per_sample: bool = False,
) -> Tensor:
    """(L,) or (L, B): sum_k weights_k * d_l(anchor, others_k)."""
    return _Summed.apply(weights, per_sample, others, *anchor)


def soft_nearest(
    anchor: Sequence[Tensor], others: Iterable[Sequence[Tensor]], temperature: float, per_sample: bool = False
) -> Tensor:
    """(L,) or (L, B): log sum_k exp(-d_l(anchor, others_k) / temperature), safe for distances of any size."""
    return _SoftNearest.apply(temperature, per_sample, others, *anchor)


class _Summed(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, weights: Sequence[float], per_sample: bool, others: Iterable[Sequence[Tensor]], *anchor: Tensor
    ) -> Tensor:
        uniform = len(set(weights)) == 1  # then the sums of signs are whole numbers, exact in bf16 too
        signs = [torch.zeros_like(a, dtype=None if uniform else _wide(a)) for a in anchor]
        sums = list(_zeros(anchor, per_sample))
        for weight, other in zip(weights, others, strict=True):
            for total, a, o, sign in zip(sums, anchor, other, signs, strict=True):
                difference = a.to(_wide(a)) - o
                total += weight * total.numel() / a.numel() * _norm(difference, per_sample)
                sign.add_(difference.sign_(), alpha=1 if uniform else weight)
        ctx.factor = weights[0] if uniform else 1.0
        ctx.save_for_backward(*signs)
        return torch.stack(sums)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        (gradient,) = gradients
        pairs = zip(gradient, ctx.saved_tensors, strict=True)
        return (
            None,
            None,
            None,
            *(sign * _across(g * (ctx.factor * g.numel() / sign.numel()), sign) for g, sign in pairs),
        )


class _SoftNearest(torch.autograd.Function):
    """The gradient is a mean of signs by softmax weights, which are known when the last of the others has gone by:
    until then by weights relative to the largest so far."""

    @staticmethod
    def forward(
        ctx: Any, temperature: float, per_sample: bool, others: Iterable[Sequence[Tensor]], *anchor: Tensor
    ) -> Tensor:
        signs = [torch.zeros_like(a, dtype=_wide(a)) for a in anchor]
        total = _zeros(anchor, per_sample)
        largest = torch.full_like(total, -torch.inf)
        for other in others:
            differences = [a.to(_wide(a)) - o for a, o in zip(anchor, other, strict=True)]
            distances = [
                _norm(d, per_sample) * (n.numel() / d.numel()) for d, n in zip(differences, total, strict=True)
            ]
            score = torch.stack(distances) / -temperature
            before, largest = largest, torch.maximum(largest, score)
            kept, added = (before - largest).exp(), (score - largest).exp()
            total = total * kept + added
            for sign, difference, old, new in zip(signs, differences, kept, added, strict=True):
                sign.mul_(_across(old, sign)).add_(difference.sign_().mul_(_across(new, sign)))
        ctx.temperature = temperature
        ctx.save_for_backward(total, *signs)
        return largest + total.log()

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        (gradient,) = gradients
        total, *signs = ctx.saved_tensors
        factors = gradient / (-ctx.temperature * total)
        pairs = zip(factors, signs, strict=True)
        return None, None, None, *(sign * _across(f * (f.numel() / sign.numel()), sign) for f, sign in pairs)


def _zeros(anchor: Sequence[Tensor], per_sample: bool) -> Tensor:
    """(L,) or (L, B)"""
    shape = (len(anchor), len(anchor[0])) if per_sample else (len(anchor),)
    return torch.zeros(shape, dtype=_wide(anchor[0]), device=anchor[0].device)


def _norm(difference: Tensor, per_sample: bool) -> Tensor:
    dims = tuple(range(1, difference.ndim)) if per_sample else None
    return torch.linalg.vector_norm(difference, 1, dims)


def _across(values: Tensor, tensor: Tensor) -> Tensor:
    """() or (B,) -> what multiplies `tensor` (B, C, H, W)."""
    return values if values.ndim == 0 else values.view(-1, *[1] * (tensor.ndim - 1))


def _wide(tensor: Tensor) -> torch.dtype:
    return torch.promote_types(tensor.dtype, torch.float32)
