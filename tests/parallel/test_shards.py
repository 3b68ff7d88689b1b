"""What strategies share is tested by tests/distributed; here is what no launch on a CPU meets."""

from types import SimpleNamespace
from typing import Any, cast

from accelerate import DistributedType
from torch import nn

from mcir.parallel.shards import unwrapped


def test_one_gpu_that_was_launched_as_several_has_no_wrapper():
    """Accelerate (1.15) puts no DDP around the network of a single process."""
    accelerator = cast(Any, SimpleNamespace(distributed_type=DistributedType.MULTI_GPU, num_processes=1))
    net = nn.Linear(1, 1)
    assert unwrapped(accelerator, net) is net
