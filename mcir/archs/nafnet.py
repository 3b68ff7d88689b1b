"""NAFNet (Chen et al., ECCV 2022) as spandrel has it, and the test-time local converter of its published results.

spandrel's class (MIT, as its source megvii-research/NAFNet) has the official keys and gives the official output. The
converter (TLC, Chu et al., ECCV 2022) is ours: a network trained on crops averages its channel attention over a crop,
so on larger images it should average over windows of about that size, not over the whole image. It changes no weight
and no key, and nothing at all up to a side of `tlc_size`; the published recipes have it on in training too.
"""

from typing import Literal, Self

from pydantic import NonNegativeInt, PositiveInt, model_validator
from torch import nn

from mcir.archs.base import Arch, Descriptor


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
        return Descriptor(blocks=("NAFBlock", "Up"), channels_last=True)

    def build(self) -> nn.Module:
        from mcir.archs.nafnet_network import NAFNet, localise

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
