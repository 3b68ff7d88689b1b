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

Layers = list[Tensor] | tuple[Tensor, ...]
"""One (B, C_l, H_l, W_l) tensor a tap."""


def summed(
    anchor: Layers,
    others: Iterable[Layers],
    weights: Sequence[float],
    per_sample: bool = False,
) -> Tensor:
    """(L,) or (L, B): sum_k weights_k * d_l(anchor, others_k)."""
    return _Summed.apply(weights, per_sample, others, *anchor)


def soft_nearest(anchor: Layers, others: Iterable[Layers], temperature: float, per_sample: bool = False) -> Tensor:
    """(L,) or (L, B): log sum_k exp(-d_l(anchor, others_k) / temperature), safe for distances of any size."""
    return _SoftNearest.apply(temperature, per_sample, others, *anchor)


class _Summed(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, weights: Sequence[float], per_sample: bool, others: Iterable[Layers], *anchor: Tensor
    ) -> Tensor:
        uniform = len(set(weights)) == 1  # then the sums of signs are whole numbers, exact in bf16 too
        signs = [torch.zeros_like(a, dtype=None if uniform else _wide(a)) for a in anchor]
        sums = _zeros(anchor, per_sample)
        for weight, other in zip(weights, others, strict=True):
            take_in(other, anchor, sums, signs, weight, 1.0 if uniform else weight, per_sample)
        ctx.factor = weights[0] if uniform else 1.0
        ctx.save_for_backward(*signs)
        torch._foreach_mul_(sums, _shares(sums, signs))
        return torch.stack(sums)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        signs = ctx.saved_tensors
        factors = gradients[0].unbind()
        factors = torch._foreach_mul(factors, [ctx.factor * share for share in _shares(factors, signs)])
        return None, None, None, *torch._foreach_mul(signs, _across(factors, signs))


def _take_in(
    other: Layers, anchor: Layers, sums: Layers, signs: Layers, weight: float, factor: float, per_sample: bool
) -> None:
    """Add what one of the others gives to the sums of distances and, `factor` times, of signs, in place."""
    differences = torch._foreach_sub([a.to(_wide(a)) for a in anchor], other)
    torch._foreach_add_(sums, _norms(differences, per_sample), alpha=weight)
    torch._foreach_sign_(differences)
    torch._foreach_add_(signs, differences, alpha=factor)


take_in = _take_in


def compile_pass() -> None:
    """From now on, in this process, `take_in` is as few kernels as torch.compile makes of it."""
    global take_in
    take_in = torch.compile(_take_in, fullgraph=True, dynamic=False)


class _SoftNearest(torch.autograd.Function):
    """The gradient is a mean of signs by softmax weights, which are known when the last of the others has gone by:
    until then by weights relative to the largest so far."""

    @staticmethod
    def forward(ctx: Any, temperature: float, per_sample: bool, others: Iterable[Layers], *anchor: Tensor) -> Tensor:
        wide = [a.to(_wide(a)) for a in anchor]
        signs = [torch.zeros_like(w) for w in wide]
        total = torch.stack(_zeros(anchor, per_sample))
        largest = torch.full_like(total, -torch.inf)
        for other in others:
            differences = torch._foreach_sub(wide, other)
            norms = _norms(differences, per_sample)
            score = torch.stack(torch._foreach_mul(norms, _shares(norms, wide))) / -temperature
            before, largest = largest, torch.maximum(largest, score)
            kept, added = (before - largest).exp(), (score - largest).exp()
            total = total * kept + added
            torch._foreach_sign_(differences)
            torch._foreach_mul_(signs, _across(kept, signs))
            torch._foreach_addcmul_(signs, differences, _across(added, signs))
        ctx.temperature = temperature
        ctx.save_for_backward(total, *signs)
        return largest + total.log()

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        total, *signs = ctx.saved_tensors
        factors = (gradients[0] / (-ctx.temperature * total)).unbind()
        factors = torch._foreach_mul(factors, _shares(factors, signs))
        return None, None, None, *torch._foreach_mul(signs, _across(factors, signs))


def _zeros(anchor: Layers, per_sample: bool) -> tuple[Tensor, ...]:
    """L of () or (B,)"""
    shape = (len(anchor), len(anchor[0])) if per_sample else (len(anchor),)
    return torch.zeros(shape, dtype=_wide(anchor[0]), device=anchor[0].device).unbind()


def _norms(differences: Layers, per_sample: bool) -> Layers:
    """L of () or (B,). Row by row of the image: over all of a tensor torch's norm adds one value after the other on a
    CPU, and of five million is off by 1e-3."""
    rows = [torch.linalg.vector_norm(d, 1, (1, 3)) for d in differences]
    return [row.sum(-1) if per_sample else row.sum() for row in rows]


def _shares(sums: Layers, tensors: Layers) -> list[float]:
    """What makes a mean of each sum over all of a tensor, or over a sample."""
    return [total.numel() / tensor.numel() for total, tensor in zip(sums, tensors, strict=True)]


def _across(values: Iterable[Tensor], tensors: Layers) -> list[Tensor]:
    """L of () or (B,) -> what multiplies each of `tensors` (B, C, H, W)."""
    return [v.view(-1, *[1] * (t.ndim - 1)) if v.ndim else v for v, t in zip(values, tensors, strict=True)]


def _wide(tensor: Tensor) -> torch.dtype:
    return torch.float64 if tensor.dtype == torch.float64 else torch.float32
