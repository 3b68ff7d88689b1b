import pytest
import torch

from mcir.archs.attention import attend_fused, attend_plainly


@pytest.mark.parametrize("attend", [attend_plainly, attend_fused])
@pytest.mark.parametrize(("windows", "at_once"), [(3, 1 << 14), (1, 1 << 14), (3, 8)])
def test_equals_the_formula_in_value_and_gradients(attend, windows, at_once, monkeypatch):
    """Also where there are more windows than a kernel takes at once."""
    monkeypatch.setattr("mcir.archs.attention.FUSED_AT_ONCE", at_once)
    torch.manual_seed(0)
    q, k, v = (torch.randn(2, windows, 4, 9, 5, dtype=torch.double) for _ in range(3))  # (B, windows, heads, N, D)
    bias, mask = torch.randn(4, 9, 9, dtype=torch.double), torch.zeros(windows, 9, 9)
    mask[windows // 2, :4, 5:] = -100
    inputs = [t.float().requires_grad_() for t in (q, k, v, bias)]
    reference = [t.requires_grad_() for t in (q, k, v, bias)]
    expected = ((q @ k.mT) * 5**-0.5 + bias + mask[:, None]).softmax(-1) @ v
    out = attend(torch.stack(inputs[:3]), inputs[3], mask)
    gradient = torch.randn_like(expected)
    expected.backward(gradient)
    out.backward(gradient.float())
    assert torch.allclose(out.double(), expected, atol=1e-6)
    for ours, exact in zip(inputs, reference, strict=True):
        assert torch.allclose(ours.grad.double(), exact.grad, atol=1e-5)


@pytest.mark.gpu
def test_more_windows_than_the_fused_kernel_takes():
    qkv = torch.randn(3, 1, 1 << 16, 2, 4, 8, device="cuda")
    bias, mask = torch.randn(2, 4, 4, device="cuda"), torch.zeros(1 << 16, 4, 4, device="cuda")
    torch.testing.assert_close(attend_fused(qkv, bias, mask), attend_plainly(qkv, bias, mask), rtol=1e-4, atol=1e-4)
