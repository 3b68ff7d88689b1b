"""The section `compute`."""

from typing import Literal

from pydantic import PositiveInt

from mcir.section import Section

Precision = Literal["fp32", "tf32", "bf16", "fp16"]


class ComputeConfig(Section):
    """How the same arithmetic is carried out. The strategy (ddp, fsdp2, zero2, zero3) is the launch file's, not the
    run's."""

    precision: Precision | None = None
    """What target, negatives and features compute in; weights and their averages are fp32 always. `fp32`: 23 bits
    everywhere, on a GPU as on a CPU. `tf32`: products of 10 bits on a GPU's tensor cores (Ampere or later), sums of
    23. `bf16`: autocast. `fp16`: autocast with a dynamic loss scale, for GPUs without bf16 (V100, T4). By default what
    the launch file's mixed_precision says (bf16 in the files for GPUs; `no` is fp32), and without one fp32."""
    compile: bool = False
    """torch.compile of the network's repeated blocks, shared by target and negatives; on a GPU of the features too."""
    checkpoint_activations: bool = False
    """Compute the activations of the target's repeated blocks again in the backward pass instead of keeping them."""
    channels_last: bool | None = None
    """By default what pays on the network, on a GPU."""
    cudnn_benchmark: bool = False
    """Whether cuDNN times its algorithms on the first steps and takes the fastest (GPUs). Another start may choose
    another one, so resuming is then no longer exact to the bit."""
    cuda_graphs: bool = False
    """Whether target, negatives and features are each recorded once for each shape and replayed as one launch (GPUs,
    single and ddp): for networks that wait for their launches, and best together with `compile`. What a network draws
    or decides on the host stays as it was recorded; the memory of all that is recorded is kept, beside the plan."""
    timeout_s: PositiveInt = 1800
    """A collective that a peer has not reached after so long ends the run."""
