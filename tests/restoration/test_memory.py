import pytest
import torch
from torch import nn

from mcir.archs.base import Descriptor
from mcir.restoration import memory
from mcir.restoration.inference import infer, is_out_of_memory


def test_what_a_forward_holds_is_counted():
    """Two convolutions: at most an input and an output of 8 channels are there at once, and the 3 that came in."""
    net = nn.Sequential(nn.Conv2d(3, 8, 3, padding=1), nn.Conv2d(8, 8, 3, padding=1), nn.Conv2d(8, 3, 3, padding=1))
    assert memory.needed_bytes(net, (1, 3, 100, 200)) == 4 * 100 * 200 * (3 + 8 + 8)
    assert all(parameter.device.type == "cpu" for parameter in net.parameters())


class Looks(nn.Module):
    """Cannot run without values."""

    def forward(self, x):
        return x * 2 if float(x.sum()) >= 0 else x


def test_a_network_that_looks_at_values_is_tried_on_a_small_picture():
    needed = memory.needed_bytes(Looks(), (1, 3, 640, 640))
    assert 2 <= needed / (4 * 3 * 640 * 640) < 2.1  # what comes in and what goes out


def test_the_least_limit_counts(tmp_path):
    proc, groups = tmp_path / "proc", tmp_path / "cgroup"
    (proc / "self").mkdir(parents=True)
    (proc / "meminfo").write_text("MemTotal:  9000 kB\nMemAvailable:  8000 kB\n")
    assert memory.available_bytes(proc, groups) == 8000 * 1024
    (proc / "self" / "cgroup").write_text("0::/job/step\n")
    (groups / "job" / "step").mkdir(parents=True)
    for folder, limit in ((groups / "job" / "step", "max"), (groups / "job", "5000000")):
        (folder / "memory.max").write_text(limit)
        (folder / "memory.current").write_text("4000000")
        (folder / "memory.stat").write_text("anon 1\ninactive_file 1000000\n")
    assert memory.available_bytes(proc, groups) == 5000000 - 4000000 + 1000000
    assert memory.available_bytes(tmp_path / "none", groups) is None


def test_a_cpu_takes_the_largest_tiles_that_fit(monkeypatch):
    seen = []

    class Net(nn.Module):
        def forward(self, x):
            if x.device.type == "cpu":
                seen.append(x.shape[-1])
            return x.repeat(1, 4, 1, 1)[:, :3] * 1

    monkeypatch.setattr(memory, "ANY_NETWORK", 2**40)
    outputs = 3 * 4 * 3 * 256 * 256
    monkeypatch.setattr(
        memory, "available_bytes", lambda: int((outputs + 1.5 * 4 * (3 + 12 + 3) * 64 * 64) / 0.9) + 1000
    )
    image = torch.rand(1, 3, 256, 256)
    restored = infer(Net().eval(), Descriptor(), image, tile="auto", overlap=0)
    assert set(seen) == {64}
    assert torch.equal(restored, image)
    for tile in (None, 128):
        with pytest.raises(MemoryError) as error:
            infer(Net().eval(), Descriptor(), image, tile=tile, overlap=0)
        assert is_out_of_memory(error.value)
