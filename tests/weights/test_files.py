import argparse
import json
import os
import pickle
import stat
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import nn

from mcir.archs import build, parse
from mcir.archs.state_dict import read_state_dict
from mcir.errors import UserError
from mcir.weights.files import build_from, load_into, save_weights

SMALL = {"name": "edsr", "scale": 2, "num_features": 8, "num_blocks": 2}


def small(**changes):
    return build({**SMALL, **changes})


def equal(a, b):
    return a.keys() == b.keys() and all(torch.equal(a[k], b[k]) for k in a)


# How each training code saves (FACTS.md A.3).
def bare(sd):
    return sd


def basicsr(sd):
    return {"params": sd, "params_ema": {k: v + 1 for k, v in sd.items()}}


def only_ema(sd):
    return {"params_ema": sd}


def ffa(sd):  # keeps its validation history, numpy numbers among it
    sd = {f"module.{k}": v for k, v in sd.items()}
    return {
        "step": 1,
        "max_psnr": np.float64(30),
        "max_ssim": 0.9,
        "ssims": [np.float32(1)],
        "losses": [0.1],
        "model": sd,
    }


def dehazeformer(sd):
    return {"state_dict": {f"module.{k}": v for k, v in sd.items()}}


def data_parallel(sd):
    return {f"module.{k}": v for k, v in sd.items()}


def lightning(sd):
    return {"epoch": 3, "state_dict": {f"model._orig_mod.{k}": v for k, v in sd.items()}, "lr_schedulers": []}


@pytest.mark.parametrize(
    ("saved", "suffix", "entry"),
    [
        (bare, "pt", ""),
        (basicsr, "pth", "params"),
        (only_ema, "pth", "params_ema"),
        (ffa, "pk", "model"),
        (dehazeformer, "pth", "state_dict"),
        (data_parallel, "pth", ""),
        (lightning, "ckpt", "state_dict"),
    ],
)
def test_reads_what_each_repository_saves(tmp_path, saved, suffix, entry):
    source, net = small(), small()
    torch.save(saved(source.state_dict()), tmp_path / f"net.{suffix}")
    report = load_into(net, tmp_path / f"net.{suffix}", strict=True)
    assert equal(net.state_dict(), source.state_dict())
    assert report.complete
    assert report.entry == entry
    assert len(report.matched) == len(source.state_dict())


def test_reads_the_old_pickle_format_and_safetensors(tmp_path):
    sd = small().state_dict()
    torch.save(dehazeformer(sd), tmp_path / "old.pth", _use_new_zipfile_serialization=False)
    assert equal(read_state_dict(tmp_path / "old.pth"), sd)
    save_file(sd, tmp_path / "net.safetensors")
    assert equal(read_state_dict(tmp_path / "net.safetensors"), sd)


def test_prefers_averaged_weights_when_asked(tmp_path):
    sd = small().state_dict()
    torch.save(basicsr(sd), tmp_path / "both.pth")
    assert equal(read_state_dict(tmp_path / "both.pth", prefer="params"), sd)
    assert equal(read_state_dict(tmp_path / "both.pth", prefer="ema"), {k: v + 1 for k, v in sd.items()})


class Payload:
    """Runs a command when unpickled carelessly."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return (open, (str(self.path), "w"))


@pytest.mark.parametrize("zipped", [True, False])
def test_never_executes_what_a_file_contains(tmp_path, zipped):
    trap = tmp_path / "executed"
    torch.save(
        {"params": small().state_dict(), "x": Payload(trap)},
        tmp_path / "evil.pth",
        _use_new_zipfile_serialization=zipped,
    )
    with pytest.raises(UserError, match=r"objects besides tensors \(.*open"):
        read_state_dict(tmp_path / "evil.pth")
    assert not trap.exists()


def test_unreadable_files_are_named(tmp_path):
    (tmp_path / "broken.pth").write_bytes(b"PK\x03\x04 cut off")
    (tmp_path / "broken.safetensors").write_bytes(b"\xff" * 20)
    (tmp_path / "empty.pt").write_bytes(b"")
    (tmp_path / "picture.png").write_bytes(b"")
    (tmp_path / "plain.pkl").write_bytes(pickle.dumps([1, 2]))
    torch.save({"optimizer": {"state": {}}}, tmp_path / "other.pth")
    for name in ("broken.pth", "broken.safetensors", "empty.pt", "picture.png", "plain.pkl", "other.pth", "absent.pth"):
        with pytest.raises(UserError, match=name):
            read_state_dict(tmp_path / name)


def test_reports_every_name_that_does_not_fit(tmp_path):
    sd = small(num_features=8).state_dict()
    sd["body.7.weight"] = sd["criterion.weight"] = sd["conv_first.total_ops"] = torch.zeros(2)
    del sd["conv_last.bias"]
    sd["conv_last.weight"] = torch.zeros(5, 8, 3, 3)
    torch.save(sd, tmp_path / "net.pth")
    net = small()
    before = net.conv_last.weight.clone()
    report = load_into(net, tmp_path / "net.pth")
    assert report.missing == ("conv_last.bias",)
    assert report.unexpected == ("body.7.weight",)
    assert set(report.foreign) == {"criterion.weight", "conv_first.total_ops"}
    assert report.mismatched == (("conv_last.weight", (5, 8, 3, 3), (3, 8, 3, 3)),)
    assert torch.equal(net.conv_last.weight, before)
    for fragment in ("conv_last.bias", "body.7.weight", "conv_last.weight [5, 8, 3, 3] -> [3, 8, 3, 3]"):
        assert fragment in str(report)
    with pytest.raises(UserError, match=r"body\.7\.weight"):
        load_into(net, tmp_path / "net.pth", strict=True)


def test_refuses_a_file_that_matches_nothing(tmp_path):
    torch.save(build({"name": "ffanet", "dim": 16, "num_blocks": 1}).state_dict(), tmp_path / "ffa.pth")
    with pytest.raises(UserError, match="none of its"):
        load_into(small(), tmp_path / "ffa.pth")


@pytest.mark.parametrize("scale", [3, 4])
def test_warm_start_from_another_scale(tmp_path, scale):
    source, net = small(scale=2), small(scale=scale)
    torch.save({"params": source.state_dict()}, tmp_path / "x2.pth")
    report = load_into(net, tmp_path / "x2.pth")
    assert torch.equal(net.body[1].conv2.weight, source.body[1].conv2.weight)
    assert all(n.startswith("upsample.") for n in (*report.missing, *(m[0] for m in report.mismatched)))
    assert not report.complete
    assert "only the upsampler differs" in str(report)


class EdsrPytorch(nn.Module):
    """The layout of EDSR-PyTorch on [0, 255], as an independent reference: MeanShift, head, body, tail."""

    def __init__(self, dim, num_blocks, scale, rgb_range=255.0):
        super().__init__()
        conv = lambda i, o: nn.Conv2d(i, o, 3, padding=1)  # noqa: E731
        mean = rgb_range * torch.tensor([0.4488, 0.4371, 0.4040])
        self.sub_mean, self.add_mean = nn.Conv2d(3, 3, 1), nn.Conv2d(3, 3, 1)
        for shift, sign in (self.sub_mean, -1), (self.add_mean, 1):
            shift.weight.data = torch.eye(3).view(3, 3, 1, 1)
            shift.bias.data = sign * mean
        block = lambda: nn.ModuleDict({"body": nn.Sequential(conv(dim, dim), nn.ReLU(), conv(dim, dim))})  # noqa: E731
        self.head = nn.Sequential(conv(3, dim))
        self.body = nn.ModuleList([*[block() for _ in range(num_blocks)], conv(dim, dim)])
        ups = [m for f in ([2, 2] if scale == 4 else [scale]) for m in (conv(dim, dim * f * f), nn.PixelShuffle(f))]
        self.tail = nn.Sequential(nn.Sequential(*ups), conv(dim, 3))

    def forward(self, x):
        x = first = self.head(self.sub_mean(x))
        for block in self.body[:-1]:
            x = x + block["body"](x)
        return self.add_mean(self.tail(self.body[-1](x) + first))


@pytest.mark.parametrize("scale", [2, 3, 4])
def test_edsr_pytorch_weights_give_the_same_images(tmp_path, scale):
    theirs, ours = EdsrPytorch(8, 2, scale), small(scale=scale)
    torch.save(theirs.state_dict(), tmp_path / "edsr.pt")
    assert load_into(ours, tmp_path / "edsr.pt", strict=True).complete
    x = torch.rand(1, 3, 6, 5)
    with torch.no_grad():
        assert torch.allclose(ours(x), theirs(255 * x) / 255, atol=1e-5)


def test_edsr_pytorch_weights_of_another_range_are_refused(tmp_path):
    torch.save(EdsrPytorch(8, 2, 2, rgb_range=1.0).state_dict(), tmp_path / "edsr.pt")
    with pytest.raises(UserError, match="img_range"):
        load_into(small(), tmp_path / "edsr.pt")


def test_our_file_rebuilds_its_network(tmp_path):
    net = small().bfloat16().float()
    metadata = {"arch": json.dumps(SMALL), "config": json.dumps({"seed": 1}), "step": "12"}
    save_weights(tmp_path / "model.safetensors", net.bfloat16().state_dict(), metadata)
    with safe_open(tmp_path / "model.safetensors", "pt") as f:
        assert f.metadata()["format"] == "pt"
        assert f.get_tensor("conv_first.weight").dtype == torch.float32
    for path in (tmp_path, tmp_path / "model.safetensors"):  # a folder, as of a checkpoint or an export, will do
        rebuilt, arch, read = build_from(path)
        assert equal(rebuilt.state_dict(), net.float().state_dict())
        assert (arch.name, arch.num_features, rebuilt.training) == ("edsr", 8, False)
        assert {k: read[k] for k in metadata} == metadata


def test_foreign_and_damaged_files_do_not_rebuild(tmp_path):
    net = small()
    save_file(net.state_dict(), tmp_path / "foreign.safetensors")
    with pytest.raises(UserError, match="describe the network in a config"):
        build_from(tmp_path / "foreign.safetensors")
    sd = net.state_dict()
    sd.pop("conv_last.bias")
    save_weights(tmp_path / "partial.safetensors", sd, {"arch": json.dumps(SMALL)})
    with pytest.raises(UserError, match=r"conv_last\.bias"):
        build_from(tmp_path / "partial.safetensors")
    with pytest.raises(ValueError, match="num_feat"):
        save_weights(tmp_path / "x.safetensors", net.state_dict(), {"arch": json.dumps({**SMALL, "num_feat": 8})})


def test_swinir_takes_weights_trained_on_another_patch_size(tmp_path):
    """Its stored masks have one entry a window of the training patch, so a strict load would fail (FACTS.md A.2)."""
    swinir = {"name": "swinir", "variant": "light", "scale": 2, "depths": (2,), "num_heads": (6,)}
    source, net = build({**swinir, "image_size": 64}).eval(), build({**swinir, "image_size": 48}).eval()
    torch.save({"params": source.state_dict()}, tmp_path / "s64.pth")
    assert load_into(net, tmp_path / "s64.pth", strict=True).complete
    assert net.layers[0].residual_group.blocks[1].attn_mask.shape == (36, 64, 64)
    for side in (48, 64, 56):
        image = torch.rand(1, 3, side, side)
        with torch.no_grad():
            assert torch.allclose(net(image), source(image), atol=1e-6)


def test_a_zoo_network_rebuilds_without_the_file_it_started_from(tmp_path):
    compact = build({"name": "zoo", "architecture": "Compact", "parameters": {"num_feat": 8, "num_conv": 2}})
    torch.save(compact.state_dict(), tmp_path / "start.pth")
    arch = parse({"name": "zoo", "weights": str(tmp_path / "start.pth")})
    save_weights(tmp_path / "model.safetensors", compact.state_dict(), {"arch": arch.model_dump_json()})
    (tmp_path / "start.pth").unlink()
    net, _, _ = build_from(tmp_path)
    assert equal(net.state_dict(), compact.state_dict())


def test_what_is_no_part_of_the_network_is_left_aside_and_said(tmp_path, caplog):
    net = small(num_features=8)
    beside = {"n_averaged": torch.tensor(3), "criterion.vgg.weight": torch.zeros(2), "body.0.total_ops": torch.zeros(1)}
    torch.save(net.state_dict() | beside, tmp_path / "net.pth")
    assert load_into(small(num_features=8), tmp_path / "net.pth", strict=True).complete
    assert "3 beside them are of no part of it" in caplog.text


def test_a_start_from_next_to_nothing_is_refused(tmp_path):
    net = small(num_features=8)
    torch.save({"conv_last.bias": torch.zeros(3)}, tmp_path / "one.pth")
    with pytest.raises(UserError, match=r"init_from: 0\.\d% of the network.*init_share \(50%\)"):
        load_into(net, tmp_path / "one.pth", min_share=0.5)
    share = 3 / sum(t.numel() for t in net.state_dict().values())
    assert load_into(net, tmp_path / "one.pth").share == pytest.approx(share)


def test_values_that_are_not_finite_are_said(tmp_path):
    state = small(num_features=8).state_dict()
    state["conv_last.bias"][1] = torch.nan
    torch.save(state, tmp_path / "net.pth")
    with pytest.raises(UserError, match=r"1 of its tensors hold values that are not finite \(conv_last\.bias"):
        load_into(small(num_features=8), tmp_path / "net.pth")


def test_a_tensor_beside_the_state_dict_and_other_left_overs(tmp_path):
    net = small(num_features=8)
    content = {"model_state_dict": net.state_dict(), "loss": torch.tensor(0.1), "best_psnr": torch.tensor(30.0)}
    more = {"hyper_parameters": argparse.Namespace(lr=1e-4, folder=Path("runs")), "optimizer": {"state": {}}}
    torch.save(content, tmp_path / "a.PTH")
    torch.save(content | more, tmp_path / "b.ckpt")
    for name in ("a.PTH", "b.ckpt"):
        assert equal(read_state_dict(tmp_path / name), net.state_dict())


def test_an_entry_is_named_in_brackets(tmp_path):
    first, second = small(num_features=8), small(num_features=8)
    torch.save({"a": {"weight_entry": first.state_dict()}, "params": second.state_dict()}, tmp_path / "net.pth")
    assert equal(read_state_dict(tmp_path / "net.pth[a.weight_entry]"), first.state_dict())
    assert equal(read_state_dict(tmp_path / "net.pth"), second.state_dict())
    with pytest.raises(UserError, match="has no entry b; there is a, params"):
        read_state_dict(tmp_path / "net.pth[b]")


def test_quantised_weights_are_refused(tmp_path):
    net = small()
    before = {name: tensor.clone() for name, tensor in net.state_dict().items()}
    quantised = {name: (tensor * 100).to(torch.int8) for name, tensor in before.items()}
    save_file(quantised, tmp_path / "int8.safetensors")
    with pytest.raises(UserError, match=r"hold int8 .*quantised weights are not read"):
        load_into(net, tmp_path / "int8.safetensors")
    assert equal(net.state_dict(), before)
    counted = nn.BatchNorm2d(3)  # whole numbers of its own are no fault
    torch.save(counted.state_dict(), tmp_path / "counted.pth")
    assert load_into(nn.BatchNorm2d(3), tmp_path / "counted.pth", strict=True).complete


@pytest.mark.parametrize("umask", [0o022, 0o007])
def test_a_file_has_the_mode_of_an_ordinary_one(tmp_path, umask):
    before = os.umask(umask)
    try:
        save_weights(tmp_path / "a.safetensors", small().state_dict(), {"arch": parse(SMALL).model_dump_json()})
    finally:
        os.umask(before)
    assert stat.S_IMODE((tmp_path / "a.safetensors").stat().st_mode) == 0o666 & ~umask
    assert os.listdir(tmp_path) == ["a.safetensors"]
