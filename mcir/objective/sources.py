"""How a run of several sources fares on each of them.

A step's samples are of any sources, on any rank: what is averaged over steps and ranks are sums over a source's samples
and their number, each divided by the size of the batch. Their quotient is the mean over the samples, without a host
synchronisation before the log step.
"""

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

PREFIX = "source/"


@torch.no_grad()
def by_source(losses: Tensor, restored: Tensor, clean: Tensor, source: Tensor, num_sources: int) -> dict[str, Tensor]:
    """`losses` (B,) and PSNR in dB of the images, clamped to [0, 1], added up for each source; `source` (B,)."""
    error = (restored.float().clamp(0, 1) - clean).square().flatten(1).mean(1)
    psnr = -10 * torch.log10(error.clamp(min=1e-10))  # 100 dB at most
    of_source = torch.nn.functional.one_hot(source, num_sources).float()  # (B, S)
    columns = {"share": torch.ones_like(psnr), "loss": losses.detach(), "psnr": psnr}
    sums = {name: (of_source * values[:, None]).mean(0) for name, values in columns.items()}
    return {f"{PREFIX}{i}/{name}": values[i] for name, values in sums.items() for i in range(num_sources)}


def read_sources(values: Mapping[str, float], labels: Sequence[str]) -> dict[str, dict[str, float]]:
    """Label -> `share`, mean `loss` and `psnr` of its samples, from the means over steps and ranks of `by_source`;
    without sources that had no sample."""
    read = {}
    for i, label in enumerate(labels):
        share, loss, psnr = (values.get(f"{PREFIX}{i}/{name}", 0.0) for name in ("share", "loss", "psnr"))
        if share:
            read[label] = {"share": share, "loss": loss / share, "psnr": psnr / share}
    return read
