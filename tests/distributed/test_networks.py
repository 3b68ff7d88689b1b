"""Each of our networks and one of spandrel's, sharded, in the layout that a GPU takes by default."""

import json
import math

import pytest
from safetensors.torch import load_file

from mcir.archs import parse
from tests.archs.test_training import OWN, ZOO
from tests.distributed.launch import ROOT, run, write_config
from tests.runs import tiny_config, write_dataset

NETWORKS = OWN | {"compact": ({"name": "zoo", "architecture": "Compact", "parameters": ZOO["Compact"][0]}, 16)}


@pytest.mark.slow
@pytest.mark.parametrize("num_negatives", [0, 1])
def test_weights_that_blocks_share_under_fsdp2(tmp_path, num_negatives):
    """A block that is passed through again and again is one to FSDP2, and trains. Blocks that share a parameter would
    each train a copy of their own: that is one sentence, before there is a run."""
    for name in ("Recursive", "Tied"):
        arch = {"name": "import", "target": f"tests.standins:{name}", "blocks": ["Block"]}
        values = tiny_config(tmp_path / name, name=name, arch=arch, steps=2)
        values["data"]["train"][0]["degradation"] = {"name": "noise"}
        values["objective"]["contrast"]["negatives"] = [{"update_every": 1}] * num_negatives
        if not num_negatives:
            values["objective"]["contrast"] = None
        process = run("fsdp2_cpu", "train", str(write_config(tmp_path / f"{name}.yaml", values)))
        if name == "Recursive":
            assert process.returncode == 0, process.stdout
            (checkpoint,) = (tmp_path / name / "runs" / name / "checkpoints").iterdir()
            assert {key for key in load_file(checkpoint / "model.safetensors") if "body" in key} == {
                "body.0.conv.weight",
                "body.0.conv.bias",
            }
        else:
            assert process.returncode != 0
            split = "mcir: FSDP2 split body.1.conv.weight from the parameter it is shared with: train this network with"
            assert split in process.stdout, process.stdout
            assert not (tmp_path / name / "runs").exists()


def own(folder, network, **changes):
    """A config of a network of tests.standins, with one negative."""
    arch = {"name": "import", "target": f"tests.standins:{network}", "unused_parameters": network == "Unused"}
    values = tiny_config(folder, arch=arch, steps=4, checkpoint={"every": 2}, **changes)
    values["data"]["train"][0]["degradation"] = {"name": "noise"}
    values["objective"]["contrast"]["negatives"] = [{"update_every": 2}]
    return str(write_config(folder / "config.yaml", values))


def trained(folder, name):
    step = folder / "runs" / name / "checkpoints" / "step-00000004"
    return {
        f"{file.name} {key}": value for file in step.glob("*.safetensors") for key, value in load_file(file).items()
    }


@pytest.mark.parametrize(
    ("network", "launch_file", "precision", "moved"),
    [
        ("Running", "ddp_cpu", "fp32", "mean"),
        pytest.param("Spectral", "zero3_cpu", "bf16", "conv.weight_u", marks=pytest.mark.slow),
    ],
)
def test_networks_that_move_more_than_their_weights_resume_to_the_bit(tmp_path, network, launch_file, precision, moved):
    """Each rank would go on with a mean of its own, and a resumed run with the first one's. DeepSpeed would compute a
    spectral norm from rounded weights, but for those that were just loaded."""
    config = own(tmp_path, network, compute={"precision": precision})
    for arguments in (["name=whole"], ["name=half", "steps=2"], ["name=half", "--resume", "auto"]):
        process = run(launch_file, "train", config, *arguments)
        assert process.returncode == 0, process.stdout
    whole, half = (trained(tmp_path, name) for name in ("whole", "half"))
    assert whole.keys() == half.keys()
    assert all(tensor.equal(half[key]) for key, tensor in whole.items())
    assert whole[f"model.safetensors {moved}"].abs().sum() > 0


@pytest.mark.slow
def test_a_parameter_without_gradients_goes_on_under_zero(tmp_path):
    """Others write no moments of it."""
    config = own(tmp_path, "Unused")
    single = run("single", "train", config, "name=single")
    assert single.returncode == 0, single.stdout
    middle = str(tmp_path / "runs" / "single" / "checkpoints" / "step-00000002")
    zero = run("zero2_cpu", "train", config, "name=zero", "--resume", middle)
    assert zero.returncode == 0, zero.stdout
    one, other = trained(tmp_path, "single"), trained(tmp_path, "zero")
    for key in ("model.safetensors unused", "model.safetensors conv.weight"):
        assert one[key].allclose(other[key], rtol=1e-5, atol=1e-6)
    decayed = run("zero2_cpu", "train", config, "optim.optimizer={name: adamw, lr: 1e-3}")
    assert decayed.returncode != 0
    assert "optim.optimizer.weight_decay: under ZeRO it would shrink the parameters" in decayed.stdout


@pytest.mark.slow
def test_a_single_number_is_no_shard(tmp_path):
    config = own(tmp_path, "Gain")
    assert run("ddp_cpu", "train", config, "steps=1").returncode == 0
    sharded = run("fsdp2_cpu", "train", config, "steps=1")
    assert sharded.returncode != 0
    assert "mcir: the network's gain is a single number, of which FSDP2 makes no shards" in sharded.stdout


QUICK = ("edsr", "swinir", "nafnet", "compact")


@pytest.mark.parametrize(
    ("strategy", "names"),
    [
        pytest.param("fsdp2", QUICK, marks=pytest.mark.slow),
        pytest.param("fsdp2", sorted(NETWORKS.keys() - set(QUICK)), marks=pytest.mark.slow),
        pytest.param("zero2", sorted(NETWORKS), marks=pytest.mark.slow),
        pytest.param("zero3", sorted(NETWORKS), marks=pytest.mark.slow),
    ],
)
def test_networks_train_sharded_in_channels_last(tmp_path, strategy, names):
    configs = []
    for name in names:
        arch, size = NETWORKS[name]
        folder = tmp_path / name
        scale = parse(arch).descriptor.scale
        data = write_dataset(folder / "pairs", num_rows=4, num_shards=1, side=size * scale, scale=scale)
        values = tiny_config(folder, name=name, arch=arch, steps=2, batch_size=2, compute={"channels_last": True})
        values["data"] |= {"train": [{"source": {"format": "parquet", "path": str(data)}}], "crop_size": size * scale}
        values["objective"]["contrast"]["negatives"] = [{"update_every": 1, "decay": 0.5, "start": 0.1}]
        configs.append(str(write_config(tmp_path / f"{name}.yaml", values)))
    script = str(ROOT / "tests" / "distributed" / "train_networks.py")
    process = run(f"{strategy}_cpu", str(tmp_path), *configs, script=script)
    assert process.returncode == 0, process.stdout
    for name in names:
        first, second = (json.loads((tmp_path / f"{name}-{rank}.json").read_text()) for rank in range(2))
        assert first["strategy"] == strategy
        for parts in first["parts"]:
            assert all(math.isfinite(value) for value in parts.values()), name
            assert parts["skipped"] == 0, name
            assert parts["contrast"] < 0, name
        assert len(first["still"]) < 5, name  # FFA-Net's small attentions have ReLUs that are shut
        assert first["checksums"][0] == first["checksums"][1], name
        assert first["accumulate"] == second["accumulate"], name
        assert first["resumed"], name
        assert second["resumed"], name
        assert first["exported"], name
        assert "False" in first["layouts"], name  # NHWC: the negatives are whole
