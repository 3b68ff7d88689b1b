"""A run computes in what it says, or is refused."""

import pytest
import torch

from mcir.errors import UserError
from mcir.parallel.accelerator import autocast, build_accelerator, precision_of


@pytest.mark.parametrize(
    ("launched", "asked", "got"),
    [
        (None, None, "fp32"),
        ("no", None, "fp32"),
        ("no", "bf16", "bf16"),
        ("bf16", None, "bf16"),
        ("bf16", "bf16", "bf16"),
        ("fp16", None, "fp16"),
        ("bf16", "fp32", "make them agree"),
        ("fp16", "bf16", "make them agree"),
        ("bf16", "tf32", "make them agree"),
        ("fp8", None, "mixed_precision is fp8"),
    ],
)
def test_config_and_launch_file_agree_or_one_of_them_decides(launched, asked, got, monkeypatch):
    if launched:
        monkeypatch.setenv("ACCELERATE_MIXED_PRECISION", launched)
    if " " in got:
        with pytest.raises(UserError, match=got):
            build_accelerator(precision=asked)
        return
    accelerator = build_accelerator(precision=asked)
    assert precision_of(accelerator) == got
    with autocast(accelerator):
        product = torch.ones(2, 2, device=accelerator.device) @ torch.ones(2, 2, device=accelerator.device)
    assert product.dtype == {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}[got]


@pytest.mark.skipif(torch.cuda.is_available(), reason="a GPU computes in TF32")
def test_tf32_is_refused_on_the_cpu():
    with pytest.raises(UserError, match="tf32 is a GPU's"):
        build_accelerator(precision="tf32")


@pytest.mark.gpu
def test_fp32_is_fp32_on_a_gpu_and_tf32_is_not():
    """Products of numbers with 23 bits: TF32 keeps 10 of them."""
    torch.manual_seed(0)
    a, image = torch.rand(256, 256, dtype=torch.float64), torch.rand(4, 64, 48, 48, dtype=torch.float64)
    kernel = torch.rand(64, 64, 3, 3, dtype=torch.float64)
    for precision, least, most in (("fp32", 0.0, 2e-6), ("tf32", 2e-5, 2e-3)):
        build_accelerator(precision=precision)
        product = a.float().cuda() @ a.float().cuda()
        convolved = torch.conv2d(image.float().cuda(), kernel.float().cuda())
        pairs = {"product": (product, a @ a), "convolution": (convolved, torch.conv2d(image, kernel))}
        for name, (got, expected) in pairs.items():
            error = float(((got.cpu().double() - expected).abs() / expected.abs().max()).max())
            assert least <= error <= most, f"{precision}, {name}"
