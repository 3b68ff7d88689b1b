import importlib.util
import json

import pytest
import torch
from safetensors import SafetensorError
from spandrel import ModelLoader
from torch import nn

from mcir.archs import build, parse
from mcir.errors import UserError
from mcir.weights.export import OFFICIAL, export
from mcir.weights.files import build_from, load_into, save_weights
from mcir.weights.trained import open_trained

SMALL = {
    "edsr": {"name": "edsr", "scale": 2, "num_features": 8, "num_blocks": 2},
    "swinir": {"name": "swinir", "variant": "light", "scale": 2, "depths": (2,), "num_heads": (6,), "image_size": 16},
    "ffanet": {"name": "ffanet", "dim": 16, "num_blocks": 1},
    "dehazeformer": {"name": "dehazeformer", "variant": "t", "depths": (1, 1, 2, 1, 1)},
    "idt": {"name": "idt", "embed_dim": 16, "mlp_ratio": 0.25},
    "nafnet": {"name": "nafnet", "width": 8, "num_encoder_blocks": (1, 1), "num_decoder_blocks": (1, 1)},
}
NAFNET = "{name: nafnet, width: 8, num_encoder_blocks: [1, 1], num_decoder_blocks: [1, 1]}"
HAT = {
    "upscale": 2,
    "img_size": 16,
    "window_size": 8,
    "embed_dim": 12,
    "depths": [2],
    "num_heads": [2],
    "squeeze_factor": 4,
}


def randomised(arch):
    """Away from what any fresh network has (NAFNet's blocks start as identity)."""
    net = build(arch).eval()
    with torch.no_grad():
        for p in net.parameters():
            p.add_(0.02 * torch.randn_like(p))
    return net


def saved(folder, arch, **metadata):
    net = randomised(arch)
    save_weights(folder / "model.safetensors", net.state_dict(), {"arch": parse(arch).model_dump_json(), **metadata})
    return net


def opened(place, **options):
    return open_trained([str(place)], **options)[0]


def equal(a, b):
    return a.keys() == b.keys() and all(torch.equal(a[k], b[k]) for k in a)


# How the repositories' test scripts read their files (FACTS.md A.3).
def params(path):
    return torch.load(path, weights_only=True)["params"]


def ffa(path):
    content = torch.load(path, weights_only=True)
    assert {"step", "max_psnr", "max_ssim", "ssims", "psnrs", "losses"} <= content.keys()  # read when it resumes
    parallel = nn.Module()
    parallel.module = build(SMALL["ffanet"])
    parallel.load_state_dict(content["model"])
    return parallel.module.state_dict()


def without_seven_characters(path):
    return {k[7:]: v for k, v in torch.load(path, weights_only=True)["state_dict"].items()}


def data_parallel(path):
    parallel = nn.Module()
    parallel.module = build(SMALL["idt"])
    parallel.load_state_dict(torch.load(path, weights_only=True))
    return parallel.module.state_dict()


READERS = {"ffanet": ffa, "dehazeformer": without_seven_characters, "idt": data_parallel}


@pytest.mark.parametrize("name", SMALL)
def test_official_repositories_and_basicsr_read_it(tmp_path, name):
    net = saved(tmp_path, SMALL[name])
    official = export(opened(tmp_path), "official", tmp_path / "out" / "official.pth")
    assert equal(READERS.get(name, params)(official), net.state_dict())
    assert equal(params(export(opened(tmp_path), "basicsr", tmp_path / "basicsr.pth")), net.state_dict())
    # And back: what we write for others we read.
    assert load_into(build(SMALL[name]), official, strict=True).complete


@pytest.mark.parametrize(
    ("arch", "architecture"),
    [
        (SMALL["swinir"], "SwinIR"),
        (SMALL["nafnet"], "NAFNet"),
        ({"name": "zoo", "architecture": "HAT", "parameters": HAT}, "HAT"),
    ],
)
def test_spandrel_detects_and_runs_it(tmp_path, arch, architecture):
    net = saved(tmp_path, arch)
    image = torch.rand(1, 3, 16, 16)
    for path in (export(opened(tmp_path), "basicsr", tmp_path / "net.pth"), tmp_path / "model.safetensors"):
        found = ModelLoader().load_from_file(path)
        assert found.architecture.id == architecture
        with torch.no_grad():
            assert torch.allclose(found.model.eval()(image), net(image), atol=1e-6)


onnx = pytest.mark.skipif(
    not all(map(importlib.util.find_spec, ("onnx", "onnxscript", "onnxruntime"))),
    reason="needs onnx, onnxscript and onnxruntime",
)


@onnx
@pytest.mark.slow
@pytest.mark.parametrize("name", SMALL)
def test_onnx_runtime_gives_what_torch_gives(tmp_path, name):
    import onnxruntime

    net = saved(tmp_path, SMALL[name])
    descriptor = parse(SMALL[name]).descriptor
    any_size = name in ("edsr", "ffanet", "nafnet")
    own = (128, 128) if descriptor.fixed_size else (64, 48)
    path = export(
        opened(tmp_path), "onnx", tmp_path / "net.onnx", size=None if any_size or descriptor.fixed_size else own
    )
    session = onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])
    for size in [(1, 3, *own), (3, 3, 21, 34)] if any_size else [(1, 3, *own)]:
        image = torch.rand(size)
        restored = session.run(["restored"], {"degraded": image.numpy()})[0]
        with torch.no_grad():
            assert torch.allclose(torch.from_numpy(restored), net(image), atol=1e-5)


def test_onnx_refuses_sizes_the_network_does_not_take(tmp_path, monkeypatch):
    monkeypatch.setattr("mcir.weights.export.find_spec", lambda name: True)
    saved(tmp_path, SMALL["idt"])
    with pytest.raises(UserError, match="128 only"):
        export(opened(tmp_path), "onnx", tmp_path / "net.onnx", size=(64, 64))


def test_onnx_names_the_missing_packages(tmp_path, monkeypatch):
    monkeypatch.setattr("mcir.weights.export.find_spec", lambda name: None)
    saved(tmp_path, SMALL["edsr"])
    with pytest.raises(UserError, match=r"onnx and onnxscript: pip install 'mcir\[onnx\]'"):
        export(opened(tmp_path), "onnx", tmp_path / "net.onnx")


def test_hub_folder_has_weights_config_and_card(tmp_path):
    config = {"arch": SMALL["edsr"], "data": {"train": ["DIV2K/*.parquet"]}, "seed": 3}
    (tmp_path / "run").mkdir()
    net = saved(
        tmp_path / "run",
        SMALL["edsr"],
        config=json.dumps(config),
        step="300000",
        metrics=json.dumps({"Set5/psnr (target)": 37.99, "Set5/psnr (ema)": 38.01}),
    )
    folder = export(opened(tmp_path / "run"), "hub-folder", tmp_path / "hub")
    assert {p.name for p in folder.iterdir()} == {"model.safetensors", "config.yaml", "README.md"}
    rebuilt, arch, metadata = build_from(folder)
    assert equal(rebuilt.state_dict(), net.state_dict())
    assert (arch.name, json.loads(metadata["config"])) == ("edsr", config)
    card = (folder / "README.md").read_text()
    header = card.split("---")[1]
    assert "library_name: mcir" in header
    assert "pipeline_tag: image-to-image" in header
    for content in (
        "DIV2K/*.parquet",
        "| Set5/psnr (target) | 37.99 |",
        "step 300000",
        "mcir train config.yaml",
        "num_blocks: 2",
    ):
        assert content in card
    assert "38.01" not in card  # the average's, which are other weights
    assert "seed: 3" in (folder / "config.yaml").read_text()


def test_foreign_weights_with_a_description(tmp_path):
    net = randomised(SMALL["nafnet"])
    torch.save({"params": net.state_dict()}, tmp_path / "foreign.pth")
    with pytest.raises(UserError, match="does not say what network"):
        export(opened(tmp_path / "foreign.pth"), "hub-folder", tmp_path / "hub")
    folder = export(opened(tmp_path / "foreign.pth", archs=[NAFNET]), "hub-folder", tmp_path / "hub")
    assert equal(build_from(folder)[0].state_dict(), net.state_dict())
    with pytest.raises(UserError, match="do not fit"):
        opened(tmp_path / "foreign.pth", archs=[NAFNET.replace("width: 8", "width: 16")])


def test_wrong_requests(tmp_path, monkeypatch):
    saved(tmp_path, SMALL["edsr"])
    with pytest.raises(UserError, match="choose basicsr, official, onnx, hub-folder, hub"):
        export(opened(tmp_path), "torchscript", tmp_path / "x")
    (tmp_path / "file").touch()
    with pytest.raises(UserError, match="give a folder"):
        export(opened(tmp_path), "hub-folder", tmp_path / "file")


def test_a_file_does_not_import_code_unless_allowed(tmp_path, monkeypatch):
    (tmp_path / "own_network.py").write_text(
        "from torch import nn\nclass Net(nn.Conv2d):\n    def __init__(self):\n        super().__init__(3, 3, 1)\n"
    )
    monkeypatch.syspath_prepend(tmp_path)
    saved(tmp_path, {"name": "import", "target": "own_network:Net"})
    with pytest.raises(UserError, match="asks to import own_network:Net"):
        export(opened(tmp_path), "basicsr", tmp_path / "x.pth")
    assert export(opened(tmp_path, allow_import=True), "basicsr", tmp_path / "x.pth").exists()
    with pytest.raises(UserError, match="no published repository"):
        export(opened(tmp_path, allow_import=True), "official", tmp_path / "x.pth")
    assert "import" not in OFFICIAL


def test_runs_and_default_names(tmp_path, monkeypatch):
    """As `mcir evaluate` takes them: a run means its best checkpoint, and the average where there is one."""
    checkpoint = tmp_path / "runs" / "mine" / "checkpoints" / "step-00000004"
    checkpoint.mkdir(parents=True)
    saved(checkpoint, SMALL["edsr"], step="4")
    (checkpoint / "model.safetensors").rename(checkpoint / "target")
    measured = json.dumps({"Set5/psnr (target)": 37.99, "Set5/psnr (ema)": 38.01})
    average = saved(checkpoint, SMALL["edsr"], step="4", metrics=measured)
    (checkpoint / "model.safetensors").rename(checkpoint / "ema.safetensors")
    (checkpoint / "target").rename(checkpoint / "model.safetensors")
    (checkpoint / "state.json").write_text('{"best": null}')
    monkeypatch.chdir(tmp_path)
    path = export(opened("runs/mine"), "basicsr")
    assert path.name == "mine.pth"
    assert equal(params(path), average.state_dict())
    with pytest.raises(UserError, match="give --output"):
        export(opened("runs/mine"), "basicsr")
    card = (export(opened("runs/mine"), "hub-folder") / "README.md").read_text()
    assert "38.01" in card
    assert "37.99" not in card
    assert not equal(params(export(opened("runs/mine", kind="target"), "basicsr", tmp_path / "t.pth")), params(path))


@pytest.mark.parametrize("held", ["run.json", "checkpoints/step-00000002/x", "manifest.json", "state.json"])
def test_a_hub_folder_is_never_written_over_a_run_or_a_checkpoint(tmp_path, held):
    saved(tmp_path, SMALL["edsr"])
    run = tmp_path / "run"
    (run / held).parent.mkdir(parents=True)
    (run / held).write_text("{}")
    (run / "config.yaml").write_text("mine")
    with pytest.raises(UserError, match=f"holds what a run wrote .{held.split('/')[0]}"):
        export(opened(tmp_path), "hub-folder", run)
    assert (run / "config.yaml").read_text() == "mine"
    assert not (run / "model.safetensors").exists()


@pytest.mark.parametrize("to", ["basicsr", "official", "onnx", "hub-folder"])
def test_an_export_never_replaces_the_weights_that_it_is_of(tmp_path, to):
    saved(tmp_path, SMALL["edsr"])
    before = (tmp_path / "model.safetensors").read_bytes()
    (tmp_path / "link").symlink_to(tmp_path)
    output = tmp_path / "link" / ("" if to == "hub-folder" else "model.safetensors")
    with pytest.raises(UserError, match="holds the weights that are exported"):
        export(opened(tmp_path), to, output)
    assert (tmp_path / "model.safetensors").read_bytes() == before


@pytest.mark.parametrize("to", ["basicsr", "official", "onnx", "hub-folder"])
def test_an_output_that_cannot_be_is_said_before_the_work(tmp_path, monkeypatch, to):
    def never(*args, **options):
        raise AssertionError("the output is not looked at first")

    monkeypatch.setattr(torch.onnx, "export", never)
    monkeypatch.setattr("mcir.weights.export.find_spec", lambda name: True)
    saved(tmp_path, SMALL["edsr"])
    (tmp_path / "file").touch()
    (tmp_path / "folder").mkdir()
    wrong = (
        {"file": "no folder; give a"}
        if to == "hub-folder"
        else dict.fromkeys(("folder", "/dev/null"), "no file; give a")
    )
    for output, message in {**wrong, "file/below": "cannot be written", "n" * 300: "cannot be written"}.items():
        with pytest.raises(UserError, match=message):
            export(opened(tmp_path), to, tmp_path / output)


@pytest.mark.parametrize(
    ("to", "writer", "error"),
    [
        ("basicsr", "torch.save", RuntimeError("[enforce fail at inline_container.cc:664] . unexpected pos")),
        ("official", "torch.save", OSError(28, "No space left on device")),
        ("hub-folder", "mcir.weights.files.save_file", SafetensorError("I/O error: No space left on device")),
    ],
)
def test_a_full_disk_leaves_what_was_there(tmp_path, monkeypatch, to, writer, error):
    def full(content, file, **options):
        (file.write if hasattr(file, "write") else file.write_bytes)(b"half of it")
        raise error

    saved(tmp_path, SMALL["edsr"])
    output = tmp_path / "out"
    written = output / "model.safetensors" if to == "hub-folder" else output
    written.parent.mkdir(exist_ok=True)
    written.write_bytes(b"earlier")
    monkeypatch.setattr(writer, full)
    with pytest.raises(UserError, match="cannot be written"):
        export(opened(tmp_path), to, output)
    assert written.read_bytes() == b"earlier"
    assert not list(tmp_path.rglob("*.tmp"))


@onnx
def test_an_onnx_graph_is_written_whole_or_not_at_all(tmp_path, monkeypatch):
    import onnxruntime

    net = saved(tmp_path, SMALL["edsr"])
    path = export(opened(tmp_path), "onnx", tmp_path / "net.onnx", size=(16, 16))
    session, image = onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"]), torch.rand(1, 3, 16, 16)
    restored = torch.from_numpy(session.run(["restored"], {"degraded": image.numpy()})[0])
    assert torch.allclose(restored, net(image).detach(), atol=1e-5)
    before = path.read_bytes()
    monkeypatch.setattr("mcir.weights.export.ONNX_TOLERANCE", -1)
    with pytest.raises(UserError, match="it is not written"):
        export(opened(tmp_path), "onnx", path, size=(16, 16))
    assert path.read_bytes() == before
