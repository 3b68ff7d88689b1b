import pytest
import torch
from torchvision.models import vgg16, vgg19

from mcir.errors import UserError
from mcir.objective import distance
from mcir.objective.features import Features, tap_indices
from mcir.objective.objective import Objective, ObjectiveConfig
from mcir.objective.spn import SPN


@pytest.fixture
def pair():
    generator = torch.Generator().manual_seed(0)
    return torch.rand(2, 3, 16, 20, generator=generator), torch.rand(2, 3, 16, 20, generator=generator)


@pytest.mark.parametrize(("network", "build"), [("vgg16", vgg16), ("vgg19", vgg19)])
def test_features_are_torchvisions(network, build, tmp_path):
    """Taps equal the outputs of torchvision's whole network at the layers of FACTS E, on normalised input."""
    torch.manual_seed(1)
    reference = build(weights=None)
    torch.save(reference.state_dict(), tmp_path / "vgg.pth")
    taps = {"relu1_2": 0.2, "relu3_3": 0.5, "relu2_2": 0.3}
    features = Features(network, taps, str(tmp_path / "vgg.pth"))
    image = torch.rand(1, 3, 32, 32)
    x = (image - torch.tensor([0.485, 0.456, 0.406]).view(1, 3, 1, 1)) / torch.tensor([0.229, 0.224, 0.225]).view(
        1, 3, 1, 1
    )
    expected = [reference.features[: index + 1](x) for index in (3, 8, 15)]
    assert tap_indices("vgg16")["relu3_3"] == 15
    assert tap_indices("vgg19")["relu5_1"] == 29
    for a, b in zip(features(image), expected, strict=True):
        assert torch.allclose(a, b, atol=1e-6)
    assert features.tap_weights == (0.2, 0.3, 0.5)
    assert len(features.layers) == 16  # no deeper than asked


def test_partial_file_and_misfits(shared_data, tmp_path):
    path = str(shared_data / "vgg16_hed_features.safetensors")
    assert len(Features("vgg16", {"relu3_3": 1.0}, path)(torch.rand(1, 3, 16, 16))) == 1
    with pytest.raises(UserError, match=r"does not fit vgg16.*random"):
        Features("vgg16", {"relu4_1": 1.0}, path)
    with pytest.raises(UserError, match=r"no file .*nowhere\.pth"):
        Features("vgg16", {"relu1_1": 1.0}, str(tmp_path / "nowhere.pth"))
    (tmp_path / "bad.pth").write_bytes(b"bad")
    with pytest.raises(UserError, match="cannot be read"):
        Features("vgg16", {"relu1_1": 1.0}, str(tmp_path / "bad.pth"))


def test_a_failed_download_names_both_ways_out(monkeypatch, tmp_path):
    monkeypatch.setenv("TORCH_HOME", str(tmp_path))
    monkeypatch.setenv("https_proxy", "http://127.0.0.1:9")
    with pytest.raises(UserError, match=r"could not be downloaded.*file with torchvision's keys, or to `random`"):
        Features("vgg16", {"relu1_1": 1.0}, "imagenet")


def test_weights_that_cannot_be_had_are_named_with_the_field_that_asks_for_them(tmp_path):
    asked = {"layers": {"relu1_1": 1.0}, "weights": str(tmp_path / "nowhere.pth")}
    perceptual = [{"name": "l1"}, {"name": "perceptual", "features": asked}]
    for objective, field in (
        ({"contrast": {"name": "spn", "features": asked}}, r"objective\.contrast\.features\.weights: no file"),
        ({"contrast": {"name": "infonce", "features": asked}}, r"objective\.contrast\.features\.weights: no file"),
        ({"reconstruction": perceptual}, r"objective\.reconstruction\.1\.features\.weights: no file"),
    ):
        with pytest.raises(UserError, match=f"^{field}"):
            Objective(ObjectiveConfig.model_validate(objective))


def test_random_weights_are_the_same_everywhere():
    a, b = (Features("vgg16", {"relu1_2": 1.0}, "random") for _ in range(2))
    assert all(torch.equal(p, q) for p, q in zip(a.parameters(), b.parameters(), strict=True))


def test_spn_and_its_gradient_are_those_of_the_mean_weighted_feature_distance(pair):
    """Against autograd on the formula."""
    spn = SPN(0.01, layers={"relu1_1": 0.2, "relu1_2": 0.8}, weights="random")
    restored, clean = pair
    past = [clean, clean.flip(-1), restored.clone()]  # one that equals: the distance has no slope there
    restored.requires_grad_()
    value = spn(restored, past)
    value.backward()
    gradient, restored.grad = restored.grad, None
    anchor, *others = (spn.features(x) for x in (restored, *past))
    distances = [
        sum(w * (a - b.detach()).abs().mean() for w, a, b in zip((0.2, 0.8), anchor, other, strict=True))
        for other in others
    ]
    expected = 0.01 * torch.stack(distances).mean()
    expected.backward()
    assert torch.allclose(value, expected, rtol=1e-5)
    assert restored.grad.abs().sum() > 0
    assert torch.allclose(gradient, restored.grad, rtol=1e-4, atol=1e-9)
    assert not any(p.requires_grad for p in spn.parameters())
    assert float(spn(restored, [])) == 0


def test_no_negative_s_features_are_kept_for_the_backward_pass(pair):
    spn = SPN(layers={"relu1_1": 1.0}, weights="random")
    restored = pair[0].requires_grad_()
    num_bytes = []
    for k in (1, 3):
        num_bytes.append(0)

        def keep(tensor):
            num_bytes[-1] += tensor.nbytes
            return tensor

        with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
            spn(restored, [pair[1]] * k).backward()
    assert num_bytes[0] == num_bytes[1]


def test_the_restored_features_are_computed_once_whatever_k(pair):
    """Counted in the network itself: 1 + K passes through the first layer."""
    spn = SPN(layers={"relu1_1": 1.0}, weights="random")
    passes = []
    spn.features.layers[0].register_forward_hook(lambda *_: passes.append(1))
    spn(pair[0], [pair[1]] * 3)
    assert len(passes) == 4


@pytest.mark.slow
def test_compiled_passes_give_the_same(monkeypatch):
    """What a GPU compiles, compiled for the CPU."""
    monkeypatch.setattr(distance, "take_in", distance.take_in)  # restored after this test
    config = ObjectiveConfig.model_validate({"contrast": {"name": "spn", "features": {"weights": "random"}}})
    torch.manual_seed(0)
    image, clean, *past = torch.rand(4, 2, 3, 32, 32)
    found = []
    for compiled in (False, True):
        objective, restored = Objective(config), image.clone().requires_grad_()
        if compiled:
            objective.compile_passes()
        losses = objective(restored, clean, clean, past)
        losses["total"].backward()
        found.append((losses["contrast"].detach(), restored.grad))
    (value, gradient), (other_value, other_gradient) = found
    torch.testing.assert_close(other_value, value, rtol=1e-5, atol=0)
    assert (other_gradient - gradient).norm() < 1e-3 * gradient.norm()
