"""What ways to compute the contrast cost: steps of EDSR-light x4 (batch 2, 48 x 48 input) with 4 negatives, in turns.

    python -m tests.benchmarks.bench_contrast [--rounds 5] [--batch 2] [--side 48] [--json]

`as it is`: the restored image's features once, those of the negatives in inference mode, NHWC, the gradient as they go
by. Each other row changes one thing; the last two are for scale. Before it is timed each way must give the value and
the gradient that `as it is` gives. On a CPU times are this process's own."""

import argparse
import json
import statistics
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from copy import deepcopy

import torch
from torch import Tensor
from torch.nn import functional as F

from mcir.archs import build
from mcir.objective import distance
from mcir.objective.spn import SPN

EDSR = {"name": "edsr", "scale": 4}
NUM_NEGATIVES = 4
TOLERANCE = 1e-2
"""Of a gradient, as a share of its norm: where two features are all but equal, rounding decides the sign."""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--batch", type=int, default=2)
    parser.add_argument("--side", type=int, default=48)
    parser.add_argument("--json", action="store_true")
    given = parser.parse_args()
    rounds, side = given.rounds, given.side
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    torch.manual_seed(0)
    net, spn = build(EDSR).to(device), SPN(weights="random").to(device)
    negatives = [build(EDSR).to(device).requires_grad_(False) for _ in range(NUM_NEGATIVES)]
    degraded = torch.rand(given.batch, 3, side, side, device=device)
    clean = torch.rand(given.batch, 3, 4 * side, 4 * side, device=device)
    optimizer = torch.optim.Adam(net.parameters(), 1e-9, fused=True)
    compiled = SPN(weights="random").to(device)
    compiled.features.forward = torch.compile(compiled.features.forward, fullgraph=True, dynamic=False)
    nhwc = [deepcopy(negative).to(memory_format=torch.channels_last) for negative in negatives]
    take_in, compiled_take_in = distance.take_in, torch.compile(distance.take_in, dynamic=False)

    def nchw(image: Tensor) -> list[Tensor]:
        x, taps = (image - spn.features.mean) / spn.features.std, []
        for i, layer in enumerate(spn.features.layers):
            x = layer(x)
            if i in spn.features.taps:
                taps.append(x)
        return taps

    @torch.inference_mode()
    def past(nets=negatives) -> list[Tensor]:
        return [negative(degraded) for negative in nets]

    def summed(observe: Callable[[Tensor], list[Tensor]], restored: Tensor, again: bool) -> Tensor:
        """By autograd; `again`: the restored image's features for each negative."""
        total, anchor = restored.new_zeros(()), observe(restored)
        for negative in negatives:
            with torch.no_grad():
                features = observe(negative(degraded))
            for weight, a, p in zip(
                spn.features.tap_weights, observe(restored) if again else anchor, features, strict=True
            ):
                total = total + spn.weight / NUM_NEGATIVES * weight * F.l1_loss(a, p)
        return total

    def batched(restored: Tensor) -> Tensor:
        with torch.inference_mode():
            together = spn.features(torch.cat(past()))
            pasts = zip(*(tap.chunk(NUM_NEGATIVES) for tap in together), strict=True)
        found = distance.summed(spn.features(restored), pasts, [spn.weight / NUM_NEGATIVES] * NUM_NEGATIVES)
        return (found * spn.features.layer_weights).sum()

    def in_nchw(restored: Tensor) -> Tensor:
        spn.features.layers.to(memory_format=torch.contiguous_format)
        value = summed(nchw, restored, again=False)
        spn.features.layers.to(memory_format=torch.channels_last)
        return value

    def reference(restored: Tensor) -> Tensor:
        spn.features.layers.to(memory_format=torch.contiguous_format)
        value = summed(nchw, restored, again=True)
        spn.features.layers.to(memory_format=torch.channels_last)
        return value

    def in_one_kernel(restored: Tensor) -> Tensor:
        distance.take_in = compiled_take_in
        value = spn(restored, past())
        distance.take_in = take_in
        return value

    ways: dict[str, Callable[[Tensor], Tensor]] = {
        "as it is": lambda restored: spn(restored, past()),
        "the K feature passes as one batch": batched,
        "pass over the layers compiled": in_one_kernel,
        "features compiled": lambda restored: compiled(restored, past()),
        "negatives in NHWC too": lambda restored: spn(restored, past(nhwc)),
        "gradient left to autograd": lambda restored: summed(spn.features, restored, again=False),
        "that, and features in NCHW": in_nchw,
        "that, and restored features for each negative": reference,
        "no negatives": lambda restored: restored.new_zeros(()),
    }
    with exact_convolutions():
        differ = differences(ways, net(degraded).detach())
    taken: dict[str, list[float]] = {name: [] for name in ways}
    clock = time.perf_counter if device.type == "cuda" else time.process_time
    for i in range(rounds + 1):
        for name, contrast in ways.items():
            start = clock()
            restored = net(degraded)
            (F.l1_loss(restored, clean) - contrast(restored)).backward()
            optimizer.step()
            optimizer.zero_grad()
            if device.type == "cuda":
                torch.cuda.synchronize()
            taken[name] += [clock() - start] if i else []
    median = {name: statistics.median(times) for name, times in taken.items()}
    if given.json:
        print(json.dumps({"ms": {name: 1e3 * took for name, took in median.items()}, "differ": differ}))
        return
    print("| contrast | ms/step | / as it is | / no negatives |\n|---|--:|--:|--:|")
    for name, took in median.items():
        print(f"| {name} | {1e3 * took:.0f} | {took / median['as it is']:.2f} | {took / median['no negatives']:.2f} |")


@contextmanager
def exact_convolutions() -> Iterator[None]:
    """Without TF32, which rounds otherwise in another layout."""
    before, torch.backends.cudnn.allow_tf32 = torch.backends.cudnn.allow_tf32, False
    yield
    torch.backends.cudnn.allow_tf32 = before


def differences(ways: dict[str, Callable[[Tensor], Tensor]], restored: Tensor) -> dict[str, float]:
    """How far the gradient of each way is from the first one's, as a share of its norm. RuntimeError where one computes
    something else."""
    expected, differ = None, dict[str, float]()
    for name, contrast in ways.items():
        if name == "no negatives":
            continue
        leaf = restored.clone().requires_grad_()
        value = contrast(leaf)
        (gradient,) = torch.autograd.grad(value, leaf)
        expected = expected or (value.detach(), gradient)
        differ[name] = float((gradient - expected[1]).norm() / expected[1].norm())
        if differ[name] > TOLERANCE or not torch.allclose(value, expected[0], rtol=1e-4):
            raise RuntimeError(
                f"{name}: {value.item()} and not {expected[0].item()}, gradient off by {differ[name]:.1e}"
            )
    return differ


if __name__ == "__main__":
    main()
