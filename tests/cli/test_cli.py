"""The commands as a user types them: results on the screen and in files; every mistake one sentence and exit code 1."""

import csv
import json
import subprocess
import sys

import numpy as np
import pytest
import torch
from PIL import Image

from mcir import __version__
from mcir.archs import build
from mcir.cli import main
from mcir.data import decode
from mcir.data.resize import imresize
from mcir.weights.files import save_weights
from tests.distributed.launch import write_config
from tests.runs import tiny_config

ARCH = {"name": "edsr", "scale": 2, "num_features": 4, "num_blocks": 1}


def run(monkeypatch, capsys, *arguments) -> tuple[int, str, str]:
    """Exit code, stdout, stderr of `mcir ARGUMENTS`."""
    monkeypatch.setattr(sys, "argv", ["mcir", *map(str, arguments)])
    with pytest.raises(SystemExit) as error:
        main()
    captured = capsys.readouterr()
    return int(error.value.code or 0), captured.out, captured.err


@pytest.fixture
def folder(tmp_path):
    """Weights a and b, and three photographs of two sizes."""
    rng = np.random.default_rng(0)
    (tmp_path / "Set3").mkdir()
    for name, size in (("one", (31, 44)), ("two", (40, 40)), ("three", (31, 44))):
        coarse = Image.fromarray(rng.integers(0, 256, (6, 6, 3), dtype=np.uint8))
        coarse.resize(size[::-1], Image.Resampling.BICUBIC).save(tmp_path / "Set3" / f"{name}.png")
    for name in "ab":
        torch.manual_seed(ord(name))
        net = build(ARCH)
        save_weights(tmp_path / f"{name}.safetensors", net.state_dict(), {"arch": json.dumps(ARCH), "step": "7"})
    return tmp_path


def test_evaluate_compares_two_weights_and_bicubic(folder, monkeypatch, capsys):
    out = folder / "out"
    outputs = ["--json", out / "r.json", "--csv", out / "r.csv", "--plot", out / "r.png"]
    outputs += ["--save-images", out / "images", "--divergence", out / "maps"]
    weights = ["--weights", folder / "a.safetensors", folder / "b.safetensors"]
    code, text, _ = run(
        monkeypatch, capsys, "evaluate", *weights, "--data", folder / "Set3", "--baseline", "bicubic", *outputs
    )
    assert code == 0
    assert "bicubic (scale 2), protocol sr" in text
    content = json.loads((out / "r.json").read_text())
    about = content["weights"]["a"]
    assert about["sha256"] == subprocess.check_output(["sha256sum", folder / "a.safetensors"], text=True).split()[0]
    assert (about["step"], about["arch"]["num_features"]) == (7, 4)
    assert {"mcir", "torch", "python"} <= content["versions"].keys()
    assert content["sets"]["Set3"]["degradation"] == {"name": "bicubic", "scale": 2}
    results = content["results"]["Set3"]
    assert list(results) == ["bicubic", "a", "b"]
    for network in results.values():
        psnr = [image["psnr"] for image in network["images"]]
        assert network["mean"]["psnr"] == np.mean(psnr)
        assert f"{np.mean(psnr):.2f}" in text
    rows = list(csv.DictReader((out / "r.csv").open()))
    assert [row["image"] for row in rows[:3]] == ["one", "three", "two"]
    assert float(rows[3]["psnr"]) == results["a"]["images"][0]["psnr"]
    assert {row["weights"] for row in rows if row["agreement"]} == {"b"}
    # the saved picture is what was measured: bicubic of one.png, cropped to 30 x 44
    clean = torch.from_numpy(np.array(Image.open(folder / "Set3" / "one.png"))).permute(2, 0, 1)[:, :30]
    expected = imresize(imresize(clean, 0.5).float() / 255, 2).clamp(0, 1).mul(255).round().byte()
    saved = np.asarray(Image.open(out / "images" / "Set3" / "bicubic" / "one.png"))
    assert (saved == expected.permute(1, 2, 0).numpy()).all()
    assert Image.open(out / "images" / "Set3.png").size == (
        5 * 44,
        30 + 30 + 40 + 3 * (18 + 4 + 24),
    )  # label, line, detail
    assert Image.open(out / "maps" / "Set3" / "two.png").size == (4 * 40, 40)
    assert Image.open(out / "r.png").format == "PNG"
    assert sorted(path.name for path in out.iterdir()) == ["images", "maps", "r.csv", "r.json", "r.png"]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--weights", "{}/missing.pth", "--data", "{}/Set3"], "missing.pth: no such weights file"),
        (
            ["--weights", "{}/Set3/one.png", "--data", "{}/Set3", "--arch", "{{name: edsr, scale: 2}}"],
            "weights are read from",
        ),
        (["--weights", "{}/a.safetensors", "--data", "{}/Set3", "--protocol", "y"], "protocol y: there is sr"),
        (["--weights", "{}/a.safetensors", "--data", "{}/none"], "nothing there that can be read"),
        (["--weights", "{}/a.safetensors", "--data", "x={}/Set3,{}/Set3"], "without a degraded half"),
        (["--weights", "{}/a.safetensors", "--data", "{}/Set3", "--tile", "big"], "--tile big: give a number"),
        (["--weights", "{}/a.safetensors", "--data", "{}/Set3", "--tile", "8", "--overlap", "5"], "overlap 5: from 0"),
        (["--weights", "{}/a.safetensors", "--data", "{}/Set3", "--overlap", "5"], "--overlap is of tiles"),
        (["--weights", "{}/a.safetensors", "--data", "{}/Set3", "--json", "{}/b.safetensors"], "and no .json file"),
        (["--weights", "{}/a.safetensors", "--data", "../x={{source: {{}}}}"], "'../x' is no name"),
        (["--weights", "{}/a.safetensors", "--data", "{}/Set3", "--baseline", "degraded"], "for scale 2 it is bicubic"),
        (["--weights", "{}/a.safetensors", "--data", "{}/Set3", "--divergence", "{}/d"], "give two --weights"),
        (["--weights", "{}/a.safetensors", "--data", "{}/Set3", "--plot", "{}/p.png"], "give two --weights"),
        (["--weights", "{}/a.safetensors", "--data", "{}/Set3", "--json", "{}"], "is a folder"),
        (["--weights", "bicubic={}/a.safetensors", "--data", "{}/Set3", "--baseline", "bicubic"], "cannot be called"),
    ],
)
def test_a_mistake_is_one_sentence_and_writes_nothing(folder, monkeypatch, capsys, arguments, message):
    before = sorted(folder.rglob("*"))
    extra = [] if "--json" in arguments else ["--json", str(folder / "r.json")]
    code, _, said = run(monkeypatch, capsys, "evaluate", *(a.format(folder, folder) for a in arguments), *extra)
    assert code == 1
    assert message in said
    assert said.startswith("mcir: ")
    assert said.count("\n") == 1
    assert sorted(folder.rglob("*")) == before


def test_evaluate_takes_the_further_metrics_of_a_config_over(folder, monkeypatch, capsys):
    sets = {"Set3": {"source": {"format": "folders", "clean": str(folder / "Set3")}, "protocol": "sr"}}
    sets["Set3"]["degradation"] = {"name": "bicubic", "scale": 2}
    (folder / "own_metric.py").write_text("def brightness(restored, clean):\n    return restored.mean()\n")
    monkeypatch.syspath_prepend(folder)
    metric = {"name": "import", "target": "own_metric:brightness", "direction": "lower"}
    validation = {"every": 1, "sets": sets, "metrics": [metric]}
    config = write_config(folder / "config.yaml", tiny_config(folder, validation=validation))
    command = ["evaluate", "--weights", folder / "a.safetensors", "--data", config, "--json", folder / "r.json"]
    code, shown, _ = run(monkeypatch, capsys, *command)
    assert (code, "BRIGHTNESS ↓" in shown) == (0, True)
    assert "brightness" in json.loads((folder / "r.json").read_text())["results"]["Set3"]["a"]["mean"]
    code, shown, _ = run(monkeypatch, capsys, *command, "--metrics", "none")
    assert (code, "BRIGHTNESS" in shown) == (0, False)
    other = validation | {"metrics": [metric | {"direction": "higher"}]}
    sets["more"] = sets.pop("Set3")
    second = write_config(folder / "other.yaml", tiny_config(folder, validation=other))
    code, _, said = run(monkeypatch, capsys, *command[:-2], second)
    assert (code, "the configs mean two metrics by brightness: say which with --metrics" in said) == (1, True)


def test_train_says_what_is_not_as_in_the_recipe_and_what_would_use_all_gpus(tmp_path, monkeypatch, capsys):
    values = tiny_config(tmp_path, name="quickstart", steps=1)
    config = write_config(tmp_path / "config.yaml", values)
    for name in ("WORLD_SIZE", "RANK", "ACCELERATE_MIXED_PRECISION"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr(torch.accelerator, "device_count", lambda: 2)
    code, shown, _ = run(monkeypatch, capsys, "train", config, "batch_size=2")
    assert code == 0
    assert "what is not as in configs/quickstart.yaml:\n" in shown
    assert "\nbatch_size: 8 -> 2\n" in shown
    assert f"--num_processes 2 -m mcir train {config} batch_size=2\n" in shown
    record = json.loads((tmp_path / "runs/quickstart/run.json").read_text())
    assert "batch_size: 8 -> 2" in record["changed"]
    assert record["state"] == "finished"


def test_a_check_of_files_names_the_command_that_takes_overrides(monkeypatch, capsys):
    code, out, err = run(monkeypatch, capsys, "config", "check", "configs/quickstart.yaml", "optim.optimizer.lr=1e-4")
    assert (code, out) == (1, "")
    assert "takes files, each on its own, and no optim.optimizer.lr=1e-4: `mcir config show" in err


def test_init_writes_a_config_that_passes_the_check(folder, monkeypatch, capsys):
    file = folder / "mine.yaml"
    command = ["init", "edsr", "--data", folder / "Set3", "--output", file]
    code, _, said = run(monkeypatch, capsys, *command)
    assert (code, said.startswith("mcir: "), "say --scale, 2, 3, 4" in said) == (1, True, True)
    code, shown, _ = run(monkeypatch, capsys, *command, "--scale", 2)
    assert (code, shown.splitlines()[-1]) == (0, f"mcir train {file}")
    assert run(monkeypatch, capsys, "config", "check", file)[:2] == (0, f"{file}: ok\n")


def test_networks_of_two_scales_are_not_compared(folder, monkeypatch, capsys):
    arch = ARCH | {"scale": 4}
    save_weights(folder / "c.safetensors", build(arch).state_dict(), {"arch": json.dumps(arch)})
    weights = ["--weights", folder / "a.safetensors", folder / "c.safetensors"]
    code, _, said = run(monkeypatch, capsys, "evaluate", *weights, "--data", folder / "Set3")
    assert code == 1
    assert "networks of different scales cannot be compared: a x2, c x4" in said


def test_restore_writes_what_it_can_and_reports_the_rest(folder, monkeypatch, capsys):
    (folder / "Set3" / "broken.png").write_bytes(b"\x89PNG\r\n\x1a\n")
    command = ["restore", folder / "Set3", "--weights", folder / "a.safetensors", "--output", folder / "out"]
    code, _, said = run(monkeypatch, capsys, *command)
    assert code == 1
    assert "1 could not be restored:" in said
    assert "broken.png" in said
    assert {path.name: Image.open(path).size for path in (folder / "out").iterdir()} == {
        "one.png": (88, 62),
        "two.png": (80, 80),
        "three.png": (88, 62),
    }
    (folder / "Set3" / "broken.png").unlink()
    whole = np.asarray(Image.open(folder / "out" / "one.png")).astype(int)
    code, _, said = run(monkeypatch, capsys, *command)
    assert code == 0
    assert "3 of 3 exist" in said
    tiled = [*command, "--overwrite", "--tile", "20", "--overlap", "10", "--ensemble"]
    code, _, said = run(monkeypatch, capsys, *tiled)
    assert code == 0
    assert (np.asarray(Image.open(folder / "out" / "one.png")) != whole).any()  # the ensemble is another estimate
    assert run(monkeypatch, capsys, *command[:-1], folder / "o2", "--tile", "x")[0] == 1
    assert not (folder / "o2").exists()


@pytest.mark.filterwarnings("ignore::PIL.Image.DecompressionBombWarning")
def test_the_limit_on_pixels_is_an_option(folder, monkeypatch, capsys):
    for holder, name in ((decode, "MAX_PIXELS"), (Image, "MAX_IMAGE_PIXELS")):
        monkeypatch.setattr(holder, name, 1000)
    monkeypatch.setenv("_MCIR_MAX_PIXELS", "1000")
    weights = ["--weights", folder / "a.safetensors"]
    for command in (["restore", folder / "Set3", "--output", folder / "out"], ["evaluate", "--data", folder / "Set3"]):
        code, _, said = run(monkeypatch, capsys, *command, *weights)
        assert code == 1
        assert "more than 1,000 pixels (a decompression bomb?); --max-pixels raises the limit" in said
        assert run(monkeypatch, capsys, *command, *weights, "--max-pixels", 20_000)[0] == 0
        script = "from mcir.data.decode import MAX_PIXELS, Image; print(MAX_PIXELS, Image.MAX_IMAGE_PIXELS)"
        child = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
        assert child.stdout == "20000 20000\n"
        decode.allow(1000)


def test_the_version(monkeypatch, capsys):
    assert run(monkeypatch, capsys, "--version")[:2] == (0, f"mcir {__version__}\n")


def test_a_dry_run_plans_for_what_was_launched_and_prints_once(tmp_path, monkeypatch, capsys):
    config = write_config(tmp_path / "config.yaml", tiny_config(tmp_path))
    monkeypatch.setenv("WORLD_SIZE", "4")
    monkeypatch.setenv("RANK", "0")
    _, shown, _ = run(monkeypatch, capsys, "train", config, "--dry-run")
    assert "fsdp2 x 4" in shown
    assert not (tmp_path / "runs").exists()
    _, shown, _ = run(monkeypatch, capsys, "train", config, "--dry-run", "--processes", "4", "--processes", "2")
    assert "fsdp2 x 2" in shown  # the fewest hold most
    code, shown, said = run(monkeypatch, capsys, "train", config, "--dry-run", "--processes", "2", "--processes", "3")
    assert (code, shown) == (1, "")
    assert "batch_size: 4 cannot be shared equally by 3 processes; multiples of 6 can" in said
    monkeypatch.setenv("RANK", "1")
    assert run(monkeypatch, capsys, "train", config, "--dry-run")[:2] == (0, "")
    code, _, said = run(monkeypatch, capsys, "train", config, "--processes", "4")
    assert (code, "--processes is of --dry-run" in said) == (1, True)


def test_an_image_that_cannot_be_measured_costs_no_other(folder, monkeypatch, capsys):
    Image.new("RGB", (8, 8)).save(folder / "Set3" / "small.png")
    weights = ["--weights", folder / "a.safetensors", folder / "b.safetensors"]
    files = ["--csv", folder / "out.csv", "--json", folder / "out.json"]
    code, shown, said = run(monkeypatch, capsys, "evaluate", *weights, "--data", folder / "Set3", *files)
    assert code == 1
    assert "1 could not be measured and are left out:" in said
    assert "small" in said
    assert "Set3" in shown
    assert len((folder / "out.csv").read_text().splitlines()) == 1 + 2 * 3
    assert "small" in json.loads((folder / "out.json").read_text())["results"]["Set3"]["a"]["failed"][0]
    same = ["--csv", folder / "x", "--json", folder / "x"]
    code, _, said = run(monkeypatch, capsys, "evaluate", *weights, "--data", folder / "Set3", *same)
    assert (code, "two outputs are the same" in said) == (1, True)
