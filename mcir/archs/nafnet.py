"""NAFNet (Chen et al., ECCV 2022) as spandrel has it, and the test-time local converter of its published results.

spandrel's class (MIT, as its source megvii-research/NAFNet) has the official keys and gives the official output. The
converter (TLC, Chu et al., ECCV 2022) is ours: a network trained on crops averages its channel attention over a crop,
so on larger images it should average over windows of about that size, not over the whole image. It changes no weight
and no key, and nothing at all up to a side of `tlc_size`; the published recipes have it on in training too.
"""

from typing import TYPE_CHECKING, Literal, Self

import torch
import torch.nn.functional as F
from pydantic import NonNegativeInt, PositiveInt, model_validator
from torch import Tensor, nn

from mcir.archs.base import Arch, Descriptor

if TYPE_CHECKING:
    from spandrel.architectures.NAFNet import NAFNet


def _box_mean(x: Tensor, size: int, dim: int) -> Tensor:
    """Means of all runs of `size` along `dim`, from one running sum whatever the size."""
    sums = torch.cat([torch.zeros_like(x.narrow(dim, 0, 1)), x.cumsum(dim)], dim)
    num = x.shape[dim] - size + 1
    return (sums.narrow(dim, size, num) - sums.narrow(dim, 0, num)) / size


class LocalAverage(nn.Module):
    """The mean of a window around each position; windows are moved inside at the borders. Replaces a global pooling.

    (B, C, H, W) -> same, or (B, C, 1, 1) when the window covers the map.
    """

    def __init__(self, size: int) -> None:
        super().__init__()
        self.size = size

    def forward(self, x: Tensor) -> Tensor:
        height, width = x.shape[2:]
        if height <= self.size and width <= self.size:
            return x.mean((2, 3), keepdim=True)
        rows, cols = min(self.size, height), min(self.size, width)
        mean = _box_mean(_box_mean(x.float(), rows, dim=2), cols, dim=3)  # in bf16 the running sums would be useless
        border = (cols - 1) // 2, cols // 2, (rows - 1) // 2, rows // 2
        return F.pad(mean, border, mode="replicate").to(x.dtype)


def localise(net: "NAFNet", size: int) -> None:
    """Replace every global pooling by a local one over `size` pixels of the input image."""
    for blocks, scale in (
        *((encoder, level) for level, encoder in enumerate(net.encoders)),
        (net.middle_blks, len(net.encoders)),
        *((decoder, level) for level, decoder in zip(reversed(range(len(net.decoders))), net.decoders, strict=True)),
    ):
        for block in blocks:
            block.sca[0] = LocalAverage(max(size >> scale, 1))


class Nafnet(Arch):
    """NAFNet; the defaults are the network of the GoPro deblurring table (17,111,907 parameters at width 32)."""

    name: Literal["nafnet"] = "nafnet"
    width: PositiveInt = 32
    """Features at full resolution; 64 for the larger published network."""
    num_middle_blocks: NonNegativeInt = 1
    num_encoder_blocks: tuple[PositiveInt, ...] = (1, 1, 1, 28)
    num_decoder_blocks: tuple[PositiveInt, ...] = (1, 1, 1, 1)
    tlc: bool = False
    """Whether images larger than `tlc_size` are pooled locally (test-time local converter)."""
    tlc_size: PositiveInt = 384
    """Side of the pooling window in input pixels; published: 1.5 times the training crop of 256."""

    @model_validator(mode="after")
    def _as_many_up_as_down(self) -> Self:
        if len(self.num_encoder_blocks) != len(self.num_decoder_blocks):
            raise ValueError("num_encoder_blocks and num_decoder_blocks must have as many entries")
        return self

    @property
    def descriptor(self) -> Descriptor:
        return Descriptor(blocks=("NAFBlock",), channels_last=True)

    def build(self) -> nn.Module:
        from spandrel.architectures.NAFNet import NAFNet  # imports torchvision, which takes as long as torch

        net = NAFNet(
            img_channel=3,
            width=self.width,
            middle_blk_num=self.num_middle_blocks,
            enc_blk_nums=list(self.num_encoder_blocks),
            dec_blk_nums=list(self.num_decoder_blocks),
        )
        if self.tlc:
            localise(net, self.tlc_size)
        return net
