"""What a GPU records is traced on a CPU too, where it must train the same to the bit. On a GPU this is the test of the
recordings."""

import pytest
import torch
from torch._dynamo.utils import counters

from mcir.config import validate
from mcir.train.engine import build_engine
from tests.runs import tiny_config

NETWORKS = {
    "edsr": {"name": "edsr", "scale": 2, "num_features": 8, "num_blocks": 2},
    "swinir": {  # with draws: drop path
        "name": "swinir",
        "variant": "light",
        "scale": 2,
        "image_size": 16,
        "depths": [2],
        "num_heads": [6],
        "embed_dim": 12,
    },
}


def trained(tmp_path, name, network, steps=6, **changes):
    values = tiny_config(tmp_path, name=name, steps=steps, arch=NETWORKS[network], **changes)
    values["objective"]["contrast"]["negatives"] = [
        {"update_every": 2, "decay": 0.5, "start": 0.1},
        {"update_every": 3, "decay": 0.5, "start": 0.5},
    ]
    torch.compiler.reset()
    counters.clear()
    engine = build_engine(validate(values, name))
    engine.fit()
    return engine


@pytest.mark.parametrize("network", ["edsr", pytest.param("swinir", marks=pytest.mark.slow)])
def test_recorded_networks_train_the_same(tmp_path, network):
    """Over micro-batches, updates of the negatives, which are written in place, and a change of sizes."""
    changes = {"accumulate": 2, "stages": [{"after": 4, "crop_size": 32, "batch_size": 4}]}
    plain = trained(tmp_path, "plain", network, **changes)
    recorded = trained(tmp_path, "recorded", network, compute={"cuda_graphs": True}, **changes)
    # of each of two sizes the target's, that of all negatives, and the features' with and without gradients
    assert counters["stats"]["unique_graphs"] == 8
    on_gpu = plain.accelerator.device.type == "cuda"
    for module, other in ((plain.model, recorded.model), (plain.negatives, recorded.negatives)):
        for (name, a), b in zip(module.named_parameters(), other.parameters(), strict=True):
            assert torch.allclose(a, b, rtol=0, atol=1e-5) if on_gpu else torch.equal(a, b), name
