"""Each contrast against the numbers of the official code (tests/golden, where the metadata says what they are of)."""

import json
import math
import zlib

import pytest
import torch
from safetensors.torch import save_file
from torchvision import models

from mcir.objective.distance import soft_nearest, summed
from mcir.objective.features import FeaturesConfig
from mcir.objective.infonce import InfoNCEConfig
from mcir.objective.objective import Objective, ObjectiveConfig
from mcir.objective.pcl import PCLConfig, blurred, dual, haar, info_nce, sharpened
from mcir.objective.ratio import RatioConfig
from tests.golden import at_places, read

CR_LAYERS = {"relu1_1": 1 / 32, "relu2_1": 1 / 16, "relu3_1": 1 / 8, "relu4_1": 1 / 4, "relu5_1": 1.0}
RESNET_LAYERS = {"layer1": 1 / 16, "layer2": 1 / 8, "layer3": 1 / 4, "layer4": 1.0}


def features_file(folder, network: str) -> str:
    """torchvision's network with the golden files' `fill`."""
    with torch.device("meta"):
        net = models.get_model(network, weights=None)
    prefix = "" if network == "resnet152" else "features."
    layers = (net if not prefix else net.features).to_empty(device="cpu")
    state = {}
    for key, value in layers.state_dict().items():
        name = prefix + key
        n = torch.randn(value.shape, generator=torch.Generator().manual_seed(zlib.crc32(name.encode())))
        if value.dim() >= 2:
            state[name] = n * math.sqrt(2 / value[0].numel())
        elif "running" in key or "num_batches" in key:
            state[name] = torch.ones_like(value) if "var" in key else torch.zeros_like(value)
        else:
            state[name] = 1 + 0.1 * n if key.endswith("weight") else 0.1 * n
    path = folder / f"{network}.safetensors"
    save_file(state, path)
    return str(path)


@pytest.fixture(scope="module")
def vgg19(tmp_path_factory) -> FeaturesConfig:
    path = features_file(tmp_path_factory.mktemp("vgg19"), "vgg19")
    return FeaturesConfig(network="vgg19", layers=CR_LAYERS, normalise="none", weights=path)


def case(name):
    meta, tensors = read(name)
    return meta, {key: value.double() for key, value in tensors.items()}


def assert_golden(config, clean, degraded, past, restored, value, t=None, best_psnr=0.0):
    """The contrast in fp32, and in float64 with its gradient, where `t` has it: in fp32 a difference of features that
    is almost zero may get the other sign, and its place another gradient."""
    objective = Objective(ObjectiveConfig(contrast=config)).train()  # which must not reach the features
    if best_psnr:
        objective.validated(best_psnr)
    for dtype in (torch.float32, torch.float64):
        objective.to(dtype)
        x = restored.to(dtype, copy=True).requires_grad_()
        clean, degraded, past = clean.to(dtype), degraded.to(dtype), [image.to(dtype) for image in past]
        found = objective(x, clean, degraded, past)["contrast"]
        assert found.item() == pytest.approx(float(value), rel=1e-6 if dtype == torch.float64 else 1e-5)
        if dtype == torch.float64 and t is not None:
            found.backward()
            assert_gradient(x.grad, t)


def assert_gradient(found, t):
    assert (at_places(found, "grad", t) - t["grad"]).abs().max() <= 2e-5 * t["grad"].abs().max()


def images(t, prefix="n."):
    return [t[f"{prefix}{k}"] for k in range(sum(key.startswith(prefix) for key in t))]


def test_cr(vgg19):
    _, t = case("contrast_cr.safetensors")
    config = RatioConfig(features=vgg19, negatives=(), degraded=True, weight=1.0)
    assert_golden(config, t["y"], t["x"], [], t["J"], t["loss"], t)


def test_ccr_and_its_curriculum(vgg19):
    meta, t = case("contrast_ccr.safetensors")
    constants = json.loads(meta["constants"])
    config = RatioConfig(
        features=vgg19,
        negatives=(),
        columns=tuple("abcdef"),
        degraded=True,
        degraded_weight=6,
        average=True,
        curriculum={"gamma": constants["gamma"], "thresholds": constants["thresholds"]},
        weight=1.0,
    )
    contrast = config.build()
    for best, weights in zip(t["best_psnr"].tolist(), t["weights"], strict=True):
        contrast.best_psnr.fill_(best)
        assert contrast.weights() == pytest.approx(weights.tolist(), rel=1e-6)
    for state in (0, constants["at"]):
        with_gradient = t if state == constants["at"] else None
        best, value = float(t["best_psnr"][state]), t["loss.states"][state]
        assert_golden(config, t["y"], t["x"], images(t), t["J"], value, with_gradient, best)


def test_dcr(vgg19):
    _, t = case("contrast_dcr.safetensors")
    config = RatioConfig(features=vgg19, negatives=({"views": 5},), weight=0.1)
    assert_golden(config, t["y"], t["y"], images(t), t["J"], t["loss"], t)


def test_pne(vgg19):
    _, t = case("contrast_pne.safetensors")
    whole = InfoNCEConfig(features=vgg19, negatives=({},) * 3, weight=1.0, per_sample=False)
    assert_golden(whole, t["y"], t["y"], images(t), t["J"], t["loss"], t)
    each = InfoNCEConfig(features=vgg19, negatives=({},) * 3, weight=1.0)
    assert_golden(each, t["y"], t["y"], images(t), t["J"], t["loss.samples"].mean())
    for i, expected in enumerate(t["loss.samples"]):
        of_one = [image[i : i + 1] for image in (t["y"], t["J"], *images(t))]
        assert_golden(each, of_one[0], of_one[0], of_one[2:], of_one[1], expected)


def test_the_cr_of_mixdehazenet(tmp_path):
    _, t = case("contrast_cr_resnet152.safetensors")
    path = features_file(tmp_path, "resnet152")
    for normalise, key in (("minus_one_to_one", "loss"), ("none", "loss.unit_range")):
        features = FeaturesConfig(network="resnet152", layers=RESNET_LAYERS, normalise=normalise, weights=path)
        config = RatioConfig(features=features, negatives=(), degraded=True, weight=1.0)
        assert_golden(config, t["y"], t["x"], [], t["J"], t[key], t if key == "loss" else None)


@pytest.mark.parametrize("per_sample", [False, True])
def test_a_mean_of_millions_is_exact(per_sample):
    torch.manual_seed(0)
    a, b = (torch.randn(2, 64, 192, 192).to(memory_format=torch.channels_last) for _ in range(2))
    expected = (a.double() - b).abs().mean((1, 2, 3) if per_sample else None)
    (found,) = summed([a], [[b]], [1.0], per_sample)
    assert torch.allclose(found.double(), expected, rtol=1e-6, atol=0)
    (found,) = -soft_nearest([a], [[b]], 1.0, per_sample)
    assert torch.allclose(found.double(), expected, rtol=1e-6, atol=0)


def test_distances_and_their_gradients_are_autograd_s():
    """Unequal weights, and distances at which exp underflows."""
    torch.manual_seed(0)
    anchor = [torch.randn(2, 3, 4, 5, requires_grad=True), torch.randn(2, 6, 2, 2, requires_grad=True)]
    others = [[10**k * torch.randn_like(a) for a in anchor] for k in range(4)]
    weights = [0.5, 2.0, 1.0, 0.25]
    distances = torch.stack(
        [torch.stack([(a - o).abs().mean() for a, o in zip(anchor, other, strict=True)]) for other in others]
    )
    expected = [
        (distances * torch.tensor(weights)[:, None]).sum(0),
        torch.logsumexp(-distances / 0.5, 0),
        torch.logsumexp(-distances[2:] / 0.5, 0),  # -2000 at the least
    ]
    found = [
        summed(anchor, iter(others), weights),
        soft_nearest(anchor, iter(others), 0.5),
        soft_nearest(anchor, iter(others[:1:-1]), 0.5),  # the order does not matter
    ]
    each = torch.stack(
        [
            torch.stack([(a - o).abs().flatten(1).mean(1) for a, o in zip(anchor, other, strict=True)])
            for other in others
        ]
    )  # (K, L, B)
    expected += [(each * torch.tensor(weights)[:, None, None]).sum(0), torch.logsumexp(-each / 0.5, 0)]
    found += [summed(anchor, iter(others), weights, True), soft_nearest(anchor, iter(others), 0.5, True)]
    for a, b in zip(found, expected, strict=True):
        assert torch.allclose(a, b, rtol=1e-5)
        scale = torch.tensor([1.0, -3.0]) if a.ndim == 1 else torch.tensor([[1.0, -3.0], [2.0, 0.5]])
        gradients = [torch.autograd.grad((x * scale).sum(), anchor, retain_graph=True) for x in (a, b)]
        for own, reference in zip(*gradients, strict=True):
            assert torch.allclose(own, reference, rtol=1e-4, atol=1e-7)


def test_an_anchor_attracts_and_a_negative_repels():
    """One step down the gradient of the contrast alone."""
    torch.manual_seed(0)
    features = {"layers": {"relu1_1": 1.0}, "weights": "random"}
    restored, clean, past, anchor = torch.rand(4, 1, 3, 16, 16)
    for name in ("spn", "ratio", "infonce"):
        schedules = [{"role": "negative"}, {"role": "anchor"}]
        config = ObjectiveConfig.model_validate(
            {"contrast": {"name": name, "features": features, "negatives": schedules, "weight": 1.0}}
        )
        objective = Objective(config)
        x = restored.clone().requires_grad_()
        objective(x, clean, clean, [past, anchor])["contrast"].backward()
        see = objective.contrast.features

        def distance(image, other, see=see):
            return float((see(image)[0] - see(other)[0]).abs().mean())

        moved = restored - 1e-3 * x.grad / x.grad.abs().max()
        assert distance(moved, past) > distance(restored, past), name
        assert distance(moved, anchor) < distance(restored, anchor), name


def fill_embedding(embedding):
    """The golden file's weights: its features.{2 i}.0 and .1 are unit i, classifier.1 the head."""
    with torch.no_grad():
        for name, p in embedding.named_parameters():
            if name.startswith("head."):
                official = name.replace("head", "classifier.1")
            else:
                _, unit, part = name.split(".", 2)
                official = f"features.{2 * int(unit)}.{part}"
            n = torch.randn(p.shape, generator=torch.Generator().manual_seed(zlib.crc32(official.encode())))
            if p.dim() >= 2:
                p.copy_(n * math.sqrt(2 / p[0].numel()))
            else:
                p.copy_(1 + 0.1 * n if name.endswith("weight") else 0.1 * n)


def test_pcl_and_a_step_of_its_embedding():
    """The positives y, n.3, n.4, n.5, and low, n.0, n.1, n.2 as negatives."""
    _, t = case("contrast_pcl.safetensors")
    roles = ["negative"] * 3 + ["anchor"] * 3
    config = PCLConfig(negatives=[{"role": role} for role in roles], degraded=True, weight=1.0)
    objective = Objective(ObjectiveConfig(contrast=config)).double()
    fill_embedding(objective.contrast.embedding)
    restored = t["J"].clone().requires_grad_()
    value = objective.eval()(restored, t["y"], t["low"], images(t))["contrast"]
    assert value.item() == pytest.approx(float(t["loss"]), rel=1e-6)
    value.backward()  # and it does reach the restored image
    assert_gradient(restored.grad, t)
    stepped = objective.train()(restored, t["y"], t["low"], images(t))["contrast"]
    assert stepped.item() == pytest.approx(float(t["step.loss"]), rel=1e-5)
    assert float(t["step.loss"]) != pytest.approx(float(t["loss"]), rel=1e-5)
    assert not any(p.requires_grad for p in objective.parameters())


def test_pcl_s_losses_of_given_embeddings():
    _, t = case("contrast_pcl.safetensors")
    given = t["given.J"].clone().requires_grad_()
    value = info_nce(given, images(t, "given.positive."), images(t, "given.negative."))
    value.backward()
    assert value.item() == pytest.approx(float(t["given.loss"]), rel=1e-6)
    assert torch.allclose(given.grad, t["given.grad"], rtol=1e-6, atol=1e-12)
    real, fake = (t[f"given.{kind}"].clone().requires_grad_() for kind in ("real", "fake"))
    value = dual(real, fake)
    value.backward()
    assert value.item() == pytest.approx(float(t["given.dual"]), rel=1e-6)
    assert torch.allclose(real.grad, t["given.dual.grad_real"], rtol=1e-6, atol=1e-12)
    assert torch.allclose(fake.grad, t["given.dual.grad_fake"], rtol=1e-6, atol=1e-12)


def test_pcl_s_copies_of_the_clean_image():
    """Both keep flat images and the mean; sharpening raises the details, blurring lowers them."""
    torch.manual_seed(0)
    flat, image = torch.full((8, 3, 16, 16), 0.3), 0.4 + 0.2 * torch.rand(8, 3, 16, 16)
    for made in (sharpened, blurred):
        assert torch.allclose(made(flat), flat, atol=1e-6)
        assert float(made(image).mean()) == pytest.approx(float(image.mean()), rel=0.02)
    assert (haar(blurred(image)).square().mean((1, 2, 3)) <= haar(image).square().mean((1, 2, 3)) * 1.0001).all()
    details = haar(sharpened(image)).square().mean((1, 2, 3)) / haar(image).square().mean((1, 2, 3))
    assert float(details.max()) > 1.5


def test_the_embedding_takes_no_step_on_what_is_no_number():
    config = PCLConfig(negatives=[{}], weight=1.0)
    objective = Objective(ObjectiveConfig(contrast=config))
    restored, clean, past = torch.rand(3, 2, 3, 16, 16)
    objective(restored, clean, clean, [past])
    before = {name: tensor.clone() for name, tensor in objective.state().items()}
    assert any(float(tensor.sum()) == 1 for name, tensor in before.items() if name.endswith("/step"))
    objective(restored * math.nan, clean, clean, [past])
    assert all(torch.equal(tensor, before[name]) for name, tensor in objective.state().items())
