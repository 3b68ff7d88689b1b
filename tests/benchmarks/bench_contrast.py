"""What ways to compute the contrast cost: steps of EDSR-light x4 (batch 2, 48 x 48 input) with 4 negatives, in turns.

    python -m tests.benchmarks.bench_contrast [--rounds 5]

`as it is`: the restored image's features once, those of the negatives in inference mode, NHWC, the gradient as they go
by. Each other row changes one thing; the last two are for scale."""

import argparse
import statistics
import time
from collections.abc import Callable

import torch
from torch import Tensor
from torch.nn import functional as F

from mcir.archs import build
from mcir.objective.distance import summed as distances
from mcir.objective.spn import SPN

EDSR = {"name": "edsr", "scale": 4}
NUM_NEGATIVES = 4


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=5)
    rounds = parser.parse_args().rounds
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    torch.manual_seed(0)
    net, spn = build(EDSR).to(device), SPN(weights="random").to(device)
    negatives = [build(EDSR).to(device).requires_grad_(False) for _ in range(NUM_NEGATIVES)]
    degraded, clean = torch.rand(2, 3, 48, 48, device=device), torch.rand(2, 3, 192, 192, device=device)
    optimizer = torch.optim.Adam(net.parameters(), 1e-9, fused=True)
    compiled = SPN(weights="random").to(device)
    compiled.features.compile()
    nhwc = [build(EDSR).to(device).to(memory_format=torch.channels_last).requires_grad_(False) for _ in negatives]

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
        found = distances(spn.features(restored), pasts, [spn.weight / NUM_NEGATIVES] * NUM_NEGATIVES)
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

    ways: dict[str, Callable[[Tensor], Tensor]] = {
        "as it is": lambda restored: spn(restored, past()),
        "the K feature passes as one batch": batched,
        "features compiled": lambda restored: compiled(restored, past()),
        "negatives in NHWC too": lambda restored: spn(restored, past(nhwc)),
        "gradient left to autograd": lambda restored: summed(spn.features, restored, again=False),
        "that, and features in NCHW": in_nchw,
        "that, and restored features for each negative": reference,
        "no negatives": lambda restored: restored.new_zeros(()),
    }
    taken: dict[str, list[float]] = {name: [] for name in ways}
    for i in range(rounds + 1):
        for name, contrast in ways.items():
            start = time.perf_counter()
            restored = net(degraded)
            (F.l1_loss(restored, clean) - contrast(restored)).backward()
            optimizer.step()
            optimizer.zero_grad()
            if device.type == "cuda":
                torch.cuda.synchronize()
            taken[name] += [time.perf_counter() - start] if i else []
    median = {name: statistics.median(times) for name, times in taken.items()}
    print("| contrast | ms/step | / as it is | / no negatives |\n|---|--:|--:|--:|")
    for name, took in median.items():
        print(f"| {name} | {1e3 * took:.0f} | {took / median['as it is']:.2f} | {took / median['no negatives']:.2f} |")


if __name__ == "__main__":
    main()
