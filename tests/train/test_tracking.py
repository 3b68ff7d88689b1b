import io
import json
import re
from pathlib import Path

import pytest
from PIL import Image
from rich.console import Console
from rich.progress import Progress
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from mcir.config import validate
from mcir.evaluation.pictures import LABEL
from mcir.train.dashboard import CHARTS
from mcir.train.engine import build_engine
from mcir.train.tracking import columns
from tests.runs import tiny_config, write_dataset


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """(engine, its printed output) of a finished run with two validation sets."""
    folder = tmp_path_factory.mktemp("tracked")
    source = {"format": "parquet", "path": str(write_dataset(folder / "held", num_rows=3, side=48))}
    held = {"source": source, "degradation": {"name": "bicubic", "scale": 2}, "protocol": "sr"}
    validation = {"every": 2, "sets": {"held": held, "rgb": held | {"protocol": "rgb"}}}
    values = tiny_config(folder, validation=validation, checkpoint={"every": 100, "keep_last": 1})
    engine = build_engine(validate(values, "run"))
    assert engine.fit() == 0
    return engine


def events(run_dir: Path) -> EventAccumulator:
    return EventAccumulator(str(run_dir / "tensorboard"), size_guidance={"images": 0}).Reload()


def test_scalars(run):
    seen = events(run.run_dir)
    expected = {"loss/total", "loss/reconstruction", "loss/contrast", "optim/lr", "optim/grad_norm", "optim/skipped"}
    expected |= {"speed/images_per_s", "speed/data_wait", "speed/memory_gib", "data/skipped"}
    expected |= {"speed/save_s", "speed/save_stall_s"}
    expected |= {f"negatives/age_{k}" for k in range(3)}
    expected |= {f"validation/{name}/{metric}" for name in ("held", "rgb") for metric in ("psnr", "ssim")}
    assert expected <= set(seen.Tags()["scalars"])
    assert [event.step for event in seen.Scalars("loss/total")] == [2, 4, 6]
    assert [event.value for event in seen.Scalars("negatives/age_1")] == [2, 1, 0]  # updated every 3 steps
    assert [event.step for event in seen.Scalars("validation/held/psnr")] == [2, 4, 6]
    record = json.loads((run.run_dir / "run.json").read_text())
    for name in ("save_s", "save_stall_s"):
        assert 0 < record[name] == pytest.approx(seen.Scalars(f"speed/{name}")[-1].value)
    best = [event.value for event in seen.Scalars("best/held/psnr")]
    assert best == [max(event.value for event in seen.Scalars("validation/held/psnr")[:n]) for n in (1, 2, 3)]
    assert seen.Scalars("loss/total")[0].value == pytest.approx(
        seen.Scalars("loss/reconstruction")[0].value + seen.Scalars("loss/contrast")[0].value, abs=1e-6
    )


def test_the_dashboard_has_no_empty_chart(run):
    names = events(run.run_dir).Tags()["scalars"]
    patterns = [pattern for charts in CHARTS.values() for patterns in charts.values() for pattern in patterns]
    assert [pattern for pattern in patterns if not any(re.match(pattern, name) for name in names)] == []


def test_picture_rows(run):
    seen = events(run.run_dir)
    tags = [tag for tag in seen.Tags()["images"] if tag.startswith("held/")]
    assert len(tags) == 2  # tracking.num_images
    image = seen.Images(tags[0])[-1]
    height = LABEL + 48 + 4 + 48  # the label, the picture, a line, the detail
    assert (image.height, image.width) == (height, 5 * 48)  # degraded | negative | restored | clean | difference
    assert Image.open(run.run_dir / "held.png").size == (4 * 48, 2 * height)  # degraded | bicubic | restored | clean


@pytest.mark.parametrize("width", [80, 60])
def test_the_bar_shows_step_rate_and_time_left_on_a_narrow_terminal(width):
    console = Console(width=width, force_terminal=True, color_system=None, file=io.StringIO())
    progress = Progress(*columns(), expand=True, console=console, get_time=iter(range(1000)).__next__)
    status = "total 0.01234  reconstruction 0.01234  contrast 0.001234  data wait 3%"
    task = progress.add_task("", total=500_000, completed=123_456, rate="1234.5 images/s", status=status)
    for _ in range(3):
        progress.advance(task)
    console.print(progress.make_tasks_table(progress.tasks))
    (line,) = console.file.getvalue().splitlines()
    assert line.startswith("step 123459/500000 1234.5 images/s left ")
    assert re.search(r"left \d+:\d\d:\d\d ", line)
    assert "total" in line or width < 80
    assert len(line) <= width


def test_the_best_checkpoint_is_kept(run):
    assert run.state.best is not None
    saved = {path.name for path in (run.run_dir / "checkpoints").iterdir()}
    assert saved == {"step-00000006", run.state.best[1]}


def test_the_weights_file_says_what_was_measured(run):
    from mcir.weights.export import model_card
    from mcir.weights.files import build_from

    net, arch, metadata = build_from(run.run_dir / "checkpoints" / "step-00000006" / "ema.safetensors")
    card = model_card(net, arch, metadata)
    assert "| held/psnr (ema) |" in card
