"""Our modules against those that their authors published (spandrel's), the same weights: forward and backward, and
forward alone as a negative goes, in turns, on one thread.

    python -m tests.benchmarks.bench_networks [--rounds 5]

Processor time is what a busy machine changes least."""

import argparse
import statistics
import time

import torch
from torch import nn

from mcir.bench.bench import as_published
from tests.benchmarks.report import NETWORKS, config_of


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=5)
    rounds = parser.parse_args().rounds
    torch.set_num_threads(1)
    print("| a network | published, ms | ours, ms | ratio | forward alone | differs by |\n|---|--:|--:|--:|--:|--:|")
    for name in ("SwinIR-light x4", "NAFNet-32"):
        arguments, _, smaller, batch_size = NETWORKS[name]
        config = config_of(*arguments, *smaller, f"batch_size={batch_size}")
        side = config.data.crop_size // config.arch.descriptor.scale
        image = torch.rand(batch_size, 3, side, side, generator=torch.Generator().manual_seed(0))
        ours = config.arch.build().eval()  # without drop path: the same is computed
        both = as_published(ours).eval(), ours
        taken: list[list[tuple[float, float]]] = [[], []]
        for i in range(rounds + 1):
            for net, times in zip(both, taken, strict=True):
                took = milliseconds(net, image)
                times += [took] if i else []  # the first warms up
        (whole, forward), (our_whole, our_forward) = (
            [statistics.median(t[kind] for t in times) for kind in (0, 1)] for times in taken
        )
        with torch.inference_mode():
            difference = float((both[0](image) - both[1](image)).abs().max())
        ratios = f"{our_whole / whole:.2f} | {our_forward / forward:.2f}"
        size = f"batch {batch_size}, {side} x {side}"
        print(f"| {name}, {size} | {whole:.0f} | {our_whole:.0f} | {ratios} | {difference:.0e} |")


def milliseconds(net: nn.Module, image: torch.Tensor) -> tuple[float, float]:
    """Processor time of a forward and backward pass, and of a forward pass without gradients."""
    start = time.process_time()
    net(image).abs().mean().backward()
    middle = time.process_time()
    with torch.inference_mode():
        net(image)
    end = time.process_time()
    net.zero_grad()
    return 1e3 * (middle - start), 1e3 * (end - middle)


if __name__ == "__main__":
    main()
