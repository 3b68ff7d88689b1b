"""The section `compute`."""

from typing import Literal

from pydantic import PositiveInt

from mcir.section import Section


class ComputeConfig(Section):
    """How the same arithmetic is carried out. The strategy (ddp, fsdp2, zero2, zero3) is the launch file's, not the
    run's."""

    precision: Literal["fp32", "bf16"] | None = None
    """By default what the launch file's mixed_precision says."""
    compile: bool = False
    """torch.compile of the network's repeated blocks, shared by target and negatives."""
    checkpoint_activations: bool = False
    """Compute the activations of the target's repeated blocks again in the backward pass instead of keeping them."""
    channels_last: bool | None = None
    """By default what pays on the network, on a GPU."""
    timeout_s: PositiveInt = 1800
    """A collective that a peer has not reached after so long ends the run."""
