import pytest
import torch
import torch.nn.functional as F

from mcir.archs import build
from mcir.archs.nafnet_network import LocalAverage
from tests.archs.golden_weights import assert_equal_to_official


@pytest.mark.parametrize("tlc", [False, True])  # the golden image is smaller than the pooling windows
def test_equals_the_official_network(tlc):
    assert_equal_to_official(build({"name": "nafnet", "tlc": tlc}), "nafnet_w32.safetensors")


@pytest.mark.parametrize(("width", "parameters"), [(32, 17_111_907), (64, 67_888_835)])  # FACTS.md A.1
def test_parameter_counts(width, parameters):
    with torch.device("meta"):
        net = build({"name": "nafnet", "width": width, "tlc": True})
    assert sum(p.numel() for p in net.parameters()) == parameters
    assert len(net.state_dict()) == 664


def test_blocks_start_as_identity():
    net = build({"name": "nafnet", "width": 8})
    assert net.encoders[0][0].beta.abs().max() == 0
    assert net.encoders[0][0].gamma.abs().max() == 0


@pytest.mark.parametrize(("shape", "size"), [((12, 17), 5), ((12, 17), 6), ((4, 17), 6), ((9, 3), 4)])
def test_local_average_is_the_mean_of_a_window_moved_inside(shape, size):
    x = torch.rand(2, 3, *shape)
    rows, cols = min(size, shape[0]), min(size, shape[1])
    # Reference: every window by average pooling, its result repeated over the border.
    valid = F.avg_pool2d(x, (rows, cols), stride=1)
    at = [
        (torch.arange(side) - (window - 1) // 2).clamp(0, side - window)
        for side, window in zip(shape, (rows, cols), strict=True)
    ]
    assert torch.allclose(LocalAverage(size)(x), valid[:, :, at[0]][:, :, :, at[1]], atol=1e-6)


def test_local_average_of_a_small_map_is_global():
    x = torch.rand(2, 3, 5, 7)
    assert torch.allclose(LocalAverage(7)(x), F.adaptive_avg_pool2d(x, 1))


def test_tlc_acts_beyond_its_size_only_and_keeps_the_keys():
    small = {"name": "nafnet", "width": 4, "num_encoder_blocks": (1, 1), "num_decoder_blocks": (1, 1), "tlc_size": 32}
    plain, local = build(small), build({**small, "tlc": True})
    with torch.no_grad():
        for p in plain.parameters():  # away from the zeros that make a fresh block the identity
            p.copy_(torch.randn_like(p))
    local.load_state_dict(plain.state_dict())
    # 1.5 x the crop at each scale: 32, 16 and in the middle 8 (published: 384, 192, 96, 48 and 24).
    sizes = {name: m.size for name, m in local.named_modules() if isinstance(m, LocalAverage)}
    assert sizes == {
        "encoders.0.0.sca.0": 32,
        "encoders.1.0.sca.0": 16,
        "middle_blks.0.sca.0": 8,
        "decoders.0.0.sca.0": 16,
        "decoders.1.0.sca.0": 32,
    }
    with torch.no_grad():
        crop, photo = torch.rand(1, 3, 32, 29), torch.rand(1, 3, 48, 32)
        assert torch.allclose(plain(crop), local(crop), rtol=1e-4, atol=1e-4)
        assert local(photo).shape == photo.shape
        assert (plain(photo) - local(photo)).abs().mean() > 0.01 * plain(photo).abs().mean()
