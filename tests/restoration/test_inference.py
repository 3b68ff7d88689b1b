import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from mcir.archs import build, parse
from mcir.archs.base import Descriptor
from mcir.errors import UserError
from mcir.restoration.inference import infer


class Nearest(nn.Module):
    """The identity at scale 1; refuses what the descriptor says the network refuses, and remembers what it saw."""

    def __init__(self, descriptor: Descriptor, most_pixels: int = 10**9) -> None:
        super().__init__()
        self.descriptor, self.most_pixels = descriptor, most_pixels
        self.seen: list[tuple[int, ...]] = []

    def forward(self, x: Tensor) -> Tensor:
        height, width = x.shape[2:]
        if len(x) * height * width > self.most_pixels:
            raise torch.OutOfMemoryError(f"Tried to allocate room for {x.shape}")
        assert height % self.descriptor.size_multiple == 0 == width % self.descriptor.size_multiple
        assert min(height, width) >= self.descriptor.min_size
        assert {height, width} == {self.descriptor.fixed_size} or self.descriptor.fixed_size is None
        assert height == width or not self.descriptor.square
        self.seen.append(tuple(x.shape))
        return x.repeat_interleave(self.descriptor.scale, 2).repeat_interleave(self.descriptor.scale, 3)


def upscaled(x: Tensor, scale: int) -> Tensor:
    return x.repeat_interleave(scale, 2).repeat_interleave(scale, 3)


def seeded_convolutions(num_layers: int) -> nn.Module:
    """Receptive radius = num_layers."""
    torch.manual_seed(0)
    layers: list[nn.Module] = []
    for i in range(num_layers):
        layers += [nn.Conv2d(3 if i == 0 else 8, 8 if i < num_layers - 1 else 3, 3, padding=1), nn.Tanh()]
    return nn.Sequential(*layers[:-1]).eval()


descriptors = st.builds(
    Descriptor,
    scale=st.sampled_from([1, 2, 3]),
    size_multiple=st.sampled_from([1, 4, 8]),
    pad_mode=st.sampled_from(["reflect", "flip"]),
    min_size=st.sampled_from([1, 13, 28]),
    fixed_size=st.sampled_from([None, None, 16]),
    tile_overlap=st.sampled_from([0, 5]),
    square=st.booleans(),
)


@settings(max_examples=200, deadline=None)
@given(
    descriptor=descriptors,
    shape=st.tuples(st.integers(1, 2), st.just(3), st.integers(1, 70), st.integers(1, 70)),
    tile=st.sampled_from([None, "auto", 32, 48]),
    overlap=st.sampled_from([None, 0, 1, 7]),
    ensemble=st.booleans(),
)
def test_identity_network_returns_its_input_whatever_the_sizes(descriptor, shape, tile, overlap, ensemble):
    if descriptor.fixed_size:
        descriptor = Descriptor(scale=descriptor.scale, fixed_size=16, tile_overlap=descriptor.tile_overlap)
        tile = tile if isinstance(tile, str) else None
    degraded = torch.rand(shape)
    restored = infer(Nearest(descriptor).eval(), descriptor, degraded, tile, overlap, ensemble)
    torch.testing.assert_close(restored, upscaled(degraded, descriptor.scale), rtol=0, atol=0)


@pytest.mark.parametrize("overlap", [16, 24])
def test_tiles_of_a_convolutional_network_equal_the_whole(overlap):
    net = seeded_convolutions(4)  # radius 4, a quarter of 16
    degraded = torch.rand(2, 3, 101, 75)
    whole = infer(net, Descriptor(), degraded)
    torch.testing.assert_close(whole, net(degraded).detach(), rtol=0, atol=0)
    tiled = infer(net, Descriptor(), degraded, tile=48, overlap=overlap)
    torch.testing.assert_close(tiled, whole, rtol=0, atol=1e-5)
    seams = infer(net, Descriptor(), degraded, tile=48, overlap=0)  # the comparison can fail
    assert (seams - whole).abs().max() > 1e-3


def test_tiles_of_a_super_resolution_network_equal_the_whole():
    torch.manual_seed(0)
    arch = parse({"name": "edsr", "scale": 3, "num_features": 8, "num_blocks": 1})
    net = build(arch).eval()  # radius: 5 layers before the upsampling, 1 after
    degraded = torch.rand(1, 3, 50, 61)
    tiled = infer(net, arch.descriptor, degraded, tile=32, overlap=16)
    whole = infer(net, arch.descriptor, degraded)
    assert tiled.shape == (1, 3, 150, 183)
    torch.testing.assert_close(tiled[:, :, 20:-20], whole[:, :, 20:-20], rtol=0, atol=2e-3)
    tiled = infer(net, arch.descriptor, degraded, tile=48, overlap=24)
    torch.testing.assert_close(tiled, whole, rtol=0, atol=1e-5)


def test_flip_padding_is_swinirs():
    """Official test: cat([img, flip(img)])[: (h // 8 + 1) * 8] on both axes, also when 8 divides the side."""
    seen = []

    class Spy(nn.Module):
        def forward(self, x):
            seen.append(x)
            return x

    degraded = torch.rand(1, 3, 16, 21)
    infer(Spy().eval(), Descriptor(size_multiple=8, pad_mode="flip"), degraded)
    expected = torch.cat([degraded, degraded.flip(2)], 2)[:, :, :24]
    expected = torch.cat([expected, expected.flip(3)], 3)[..., :24]
    assert torch.equal(seen[0], expected)

    infer(Spy().eval(), Descriptor(size_multiple=8), degraded)
    assert torch.equal(seen[1], nn.functional.pad(degraded, (0, 3, 0, 0), mode="reflect"))


def test_fixed_size_is_merged_with_the_official_weights():
    """IDT's test_full_size.py on two tiles: crop 128, stride 108, weighted 1 / sqrt(d^2 + 1e-3) to pixel 64."""

    class Position(nn.Module):
        def forward(self, x):
            return x + torch.linspace(0, 1, 128)

    degraded = torch.rand(1, 3, 128, 200)
    distance = (torch.arange(128) - 64.0).square()
    weight = 1 / (distance[:, None] + distance + 1e-3).sqrt()
    merged, total = torch.zeros(1, 3, 128, 200), torch.zeros(128, 200)
    for start in (0, 72):
        merged[..., start : start + 128] += weight * Position()(degraded[..., start : start + 128])
        total[:, start : start + 128] += weight
    restored = infer(Position().eval(), Descriptor(fixed_size=128, tile_overlap=20), degraded)
    torch.testing.assert_close(restored, merged / total, rtol=0, atol=1e-5)


def test_ensemble_makes_any_network_equivariant():
    net = seeded_convolutions(2)
    degraded = torch.rand(1, 3, 20, 27)
    mean = infer(net, Descriptor(), degraded, ensemble=True)
    expected = torch.stack([
        net(pose(degraded)) if k == 0 else unpose(net(pose(degraded)))
        for k, (pose, unpose) in enumerate(
            (lambda x, r=r, f=f: (x.flip(3) if f else x).rot90(r, (2, 3)),
             lambda x, r=r, f=f: x.rot90(-r, (2, 3)).flip(3) if f else x.rot90(-r, (2, 3)))
            for r in range(4) for f in (False, True)
        )
    ]).mean(0)  # fmt: skip
    torch.testing.assert_close(mean, expected.detach(), rtol=0, atol=1e-5)
    for turn in (lambda x: x.flip(2), lambda x: x.mT, lambda x: x.rot90(1, (2, 3))):
        turned = infer(net, Descriptor(), turn(degraded), ensemble=True)
        torch.testing.assert_close(turned, turn(mean), rtol=0, atol=1e-5)
        plain = infer(net, Descriptor(), turn(degraded)) - turn(infer(net, Descriptor(), degraded))
        assert plain.abs().max() > 1e-3


def test_auto_takes_fewer_images_then_smaller_tiles():
    descriptor = Descriptor(scale=2, size_multiple=8)
    degraded = torch.rand(4, 3, 96, 120)
    for most_pixels, first in [
        (10**9, (4, 3, 96, 120)),
        (3 * 96 * 120, (2, 3, 96, 120)),
        (96 * 120, (1, 3, 96, 120)),
        (60 * 60, (1, 3, 56, 56)),
        (40 * 40, (1, 3, 32, 32)),
    ]:
        net = Nearest(descriptor, most_pixels).eval()
        assert torch.equal(infer(net, descriptor, degraded, tile="auto"), upscaled(degraded, 2))
        assert net.seen[0] == first
    with pytest.raises(torch.OutOfMemoryError, match="Tried to allocate"):
        infer(Nearest(descriptor, 31 * 31).eval(), descriptor, degraded, tile="auto")
    with pytest.raises(torch.OutOfMemoryError):
        infer(Nearest(descriptor, 96 * 119).eval(), descriptor, degraded)


def test_auto_of_a_fixed_size_takes_fewer_tiles():
    descriptor = Descriptor(fixed_size=16, tile_overlap=4)
    degraded = torch.rand(1, 3, 70, 80)
    net = Nearest(descriptor, 3 * 16 * 16).eval()
    assert torch.equal(infer(net, descriptor, degraded, tile="auto"), degraded)
    assert net.seen[0] == (2, 3, 16, 16)


def test_auto_knows_a_cpu_out_of_memory_and_nothing_else():
    class Hungry(nn.Module):
        def forward(self, x):
            if x.shape[3] > 50:
                torch.empty(10**17)  # the CPU allocator's own error
            return x

    degraded = torch.rand(1, 3, 40, 80)
    assert torch.equal(infer(Hungry().eval(), Descriptor(), degraded, tile="auto"), degraded)

    class Broken(nn.Module):
        def forward(self, x):
            raise RuntimeError("mat1 and mat2 shapes cannot be multiplied")

    with pytest.raises(RuntimeError, match="mat1 and mat2"):
        infer(Broken().eval(), Descriptor(), degraded, tile="auto")


def test_a_cache_filled_by_inference_serves_training():
    class Caching(nn.Module):
        def __init__(self):
            super().__init__()
            self.weight, self.cache = nn.Parameter(torch.ones(1)), None

        def forward(self, x):
            if self.cache is None:
                self.cache = torch.full((1,), 2.0)
            return x * (self.weight * self.cache)

    net = Caching().eval()
    assert not infer(net, Descriptor(), torch.rand(1, 3, 8, 8)).requires_grad
    net(torch.rand(1, 3, 8, 8)).sum().backward()


@pytest.mark.parametrize(
    ("descriptor", "tile", "overlap", "message"),
    [
        (Descriptor(size_multiple=8), 100, None, "multiple of 8"),
        (Descriptor(min_size=28), 16, None, "at least 28"),
        (Descriptor(), 0, None, "at least 1"),
        (Descriptor(), "whole", None, '"auto"'),
        (Descriptor(fixed_size=128), 64, None, "only tiles of 128"),
        (Descriptor(), 64, 33, "half the tile, 32"),
        (Descriptor(), None, -1, "from 0"),
    ],
)
def test_wrong_tiles_are_the_users_error(descriptor, tile, overlap, message):
    with pytest.raises(UserError, match=message):
        infer(nn.Identity().eval(), descriptor, torch.rand(1, 3, 200, 200), tile, overlap)


def test_wrong_input_and_wrong_descriptor_are_errors():
    net = nn.Identity().eval()
    for degraded in (torch.rand(3, 8, 8), torch.rand(1, 1, 8, 8), torch.zeros(1, 3, 8, 8, dtype=torch.uint8)):
        with pytest.raises(ValueError, match="degraded must be"):
            infer(net, Descriptor(), degraded)
    with pytest.raises(ValueError, match="descriptor promises"):
        infer(net, Descriptor(scale=2), torch.rand(1, 3, 8, 8))
    with pytest.raises(AssertionError, match="eval"):
        infer(nn.Identity(), Descriptor(), torch.rand(1, 3, 8, 8))


def test_the_network_runs_in_full_fp32_and_nothing_else_does():
    seen = []

    class Looking(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            seen.append((torch.get_float32_matmul_precision(), torch.backends.cudnn.allow_tf32))
            return x

    torch.set_float32_matmul_precision("high")
    try:
        infer(Looking().eval(), Descriptor(), torch.rand(1, 3, 4, 4))
        assert (torch.get_float32_matmul_precision(), torch.backends.cudnn.allow_tf32) == ("high", True)
    finally:
        torch.set_float32_matmul_precision("highest")
    assert seen == [("highest", False)]


def test_auto_takes_no_tiles_that_the_overlap_does_not_fit():
    descriptor, degraded = Descriptor(), torch.rand(1, 3, 100, 100)
    net = Nearest(descriptor, 60 * 60).eval()
    assert torch.equal(infer(net, descriptor, degraded, tile="auto", overlap=20), degraded)
    assert net.seen[0][2:] == (50, 50)
    net = Nearest(descriptor, 60 * 60).eval()
    with pytest.raises(torch.OutOfMemoryError):
        infer(net, descriptor, degraded, tile="auto", overlap=31)
    assert not net.seen
