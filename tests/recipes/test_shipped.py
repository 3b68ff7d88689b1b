"""What a run changes of the recipe that it is made from."""

from pathlib import Path

import pytest

from mcir.config import load
from mcir.recipes.shipped import OVERLAYS, changes, folder, recipe_of

ROOT = Path(__file__).parents[2]
EDSR = ROOT / "configs/sr/edsr_light_x2_div2k.yaml"
PLAIN = ROOT / "configs/contrasts/plain.yaml"


def of(files, *overrides):
    return changes(load(files, overrides), files)


def test_each_override_and_overlay_is_a_line():
    assert of([EDSR]) == []
    assert of([EDSR], "optim.optimizer.lr=5e-4", "data.train.0.source.path=mine", "objective.contrast.weight=0.1") == [
        "what is not as in configs/sr/edsr_light_x2_div2k.yaml:",
        "data.train.0.source.path: data/div2k_x2 -> mine",
        'objective.contrast.weight: {"target_ratio": 0.05, "initial": 0.001} -> 0.1',
        "optim.optimizer.lr: 0.0001 -> 0.0005",
    ]
    assert of([EDSR, PLAIN], "optim.schedule={name: cosine, min_lr: 1e-6}")[1:] == [
        "objective.contrast: spn … -> null",
        "optim.schedule.name: multistep -> cosine",
    ]


def test_a_copy_of_the_same_name_is_compared_and_a_config_of_ones_own_is_not(tmp_path):
    own = tmp_path / "mine.yaml"
    own.write_text(EDSR.read_text().replace("batch_size: 16", "batch_size: 8"))
    assert of([own])[1:] == ["batch_size: 16 -> 8"]
    assert of([own], "name=another") == []


def test_many_changes_are_counted():
    swinir = ROOT / "configs/sr/swinir_light_x2_div2k.yaml"
    lines = changes(load([swinir], ["name=edsr_light_x2_div2k"]), [EDSR])
    assert len(lines) == 1 + 10 + 1
    assert lines[1] == "steps: 300000 -> 500000"
    assert lines[-1].startswith("and ")


RECIPES = sorted(path for path in folder().rglob("*.yaml") if path.parent.name not in OVERLAYS)


@pytest.mark.parametrize("path", RECIPES, ids=lambda path: path.stem)
def test_every_recipe_is_found_by_its_name(path):
    assert recipe_of(["elsewhere.yaml"], load([path]).name) == path
