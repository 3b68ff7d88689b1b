import io
import math
import os
import threading
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from rich.console import Console
from torch import nn

from mcir.archs.base import Descriptor
from mcir.errors import UserError
from mcir.restoration import restore as module
from mcir.restoration.restore import find, plan, restore

CPU = torch.device("cpu")
rng = np.random.default_rng(0)


class Inverting(nn.Module):
    """1 - x, repeated `scale` times; remembers the shapes it saw; out of memory above `most_pixels`."""

    def __init__(self, scale=1, most_pixels=10**9):
        super().__init__()
        self.scale, self.most_pixels, self.seen = scale, most_pixels, []

    def forward(self, x):
        if x.shape[0] * x.shape[2] * x.shape[3] > self.most_pixels:
            raise torch.OutOfMemoryError("Tried to allocate")
        self.seen.append(tuple(x.shape))
        return 1 - x.repeat_interleave(self.scale, 2).repeat_interleave(self.scale, 3)


def save(path, size=(9, 6), mode="RGB"):
    path.parent.mkdir(parents=True, exist_ok=True)
    pixels = rng.integers(0, 256, (size[1], size[0], 3), np.uint8)
    Image.fromarray(pixels).convert(mode).save(path)
    return path


def pixels(path):
    with Image.open(path) as image:
        return np.asarray(image)


def quiet():
    return Console(file=io.StringIO(), width=200)


def run(inputs, output_dir, net=None, descriptor=None, device=CPU, **options):
    return restore(
        [str(path) for path in inputs],
        net or Inverting(),
        descriptor or Descriptor(),
        output_dir,
        device=device,
        **{"console": quiet()} | options,
    )


def test_folders_files_and_patterns(tmp_path):
    tree = [save(tmp_path / "in" / name) for name in ("a.png", "b/c.PNG", "b/d/e.png")]
    single, matched = save(tmp_path / "one" / "single.png"), save(tmp_path / "many" / "x" / "[1].png")
    (tmp_path / "in" / "notes.txt").write_text("no picture")
    save(tmp_path / "in" / ".hidden.png")
    out = tmp_path / "out"
    assert run([tmp_path / "in", single, tmp_path / "many" / "**" / "*.png"], out) == []
    written = {path.relative_to(out).as_posix(): path for path in out.rglob("*") if path.is_file()}
    sources = {"a.png": tree[0], "b/c.PNG": tree[1], "b/d/e.png": tree[2], "single.png": single, "x/[1].png": matched}
    assert written.keys() == sources.keys()
    for name, source in sources.items():
        assert (pixels(written[name]) == 255 - pixels(source)).all()
    assert list(find(str(matched), out)) == [(matched, matched.relative_to(matched.parent))]  # a name like a pattern


def test_super_resolution_of_all_kinds(tmp_path):
    for mode in ("L", "RGB", "LA", "RGBA"):
        save(tmp_path / "in" / f"{mode}.png", mode=mode)
    assert run([tmp_path / "in"], tmp_path / "out", Inverting(3), Descriptor(scale=3)) == []
    for mode in ("L", "RGB", "LA", "RGBA"):
        with Image.open(tmp_path / "out" / f"{mode}.png") as image:
            assert (image.mode, image.size) == (mode, (27, 18))


def test_existing_outputs_are_skipped_unless_overwritten(tmp_path):
    save(tmp_path / "in" / "a.png"), save(tmp_path / "in" / "b.png")
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "a.png").write_bytes(b"mine")
    console = quiet()
    net = Inverting()
    run([tmp_path / "in"], tmp_path / "out", net, console=console)
    assert (tmp_path / "out" / "a.png").read_bytes() == b"mine"
    assert "1 of 2 exist" in console.file.getvalue()
    assert len(net.seen) == 1
    run([tmp_path / "in"], tmp_path / "out", overwrite=True)
    assert (pixels(tmp_path / "out" / "a.png") == 255 - pixels(tmp_path / "in" / "a.png")).all()


def test_bad_files_are_reported_and_the_rest_is_done(tmp_path):
    good = [save(tmp_path / "in" / f"{i}.png", size=(60, 50)) for i in range(3)]
    data = good[1].read_bytes()
    good[1].write_bytes(data[: len(data) // 2])
    (tmp_path / "in" / "text.jpg").write_text("no picture")
    failures = run([tmp_path / "in"], tmp_path / "out")
    assert [failure.partition(": ")[0] for failure in failures] == [str(good[1]), str(tmp_path / "in" / "text.jpg")]
    assert "corrupt" in failures[0]
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == ["0.png", "2.png"]


def test_a_network_that_diverged_is_a_failure_of_each_picture(tmp_path):
    class Nan(nn.Module):
        def forward(self, x):
            return x * math.nan

    source = save(tmp_path / "a.png")
    (failure,) = run([source], tmp_path / "out", Nan())
    assert failure.startswith(str(source))
    assert "not finite" in failure
    assert not (tmp_path / "out").exists()


def test_pictures_of_one_size_are_batched_also_turned_ones(tmp_path, monkeypatch):
    monkeypatch.setattr(module, "pixels_at_once", lambda device: 3 * 54 + 1)
    sources = [save(tmp_path / "in" / f"{i}.png", size=(9, 6)) for i in range(4)]
    sources += [save(tmp_path / "in" / f"z{i}.png", size=(6, 9)) for i in range(2)]
    tags = Image.Exif()
    tags[0x0112] = 6
    Image.open(sources[1]).save(sources[1], exif=tags)
    net = Inverting()
    assert run([tmp_path / "in"], tmp_path / "out", net) == []
    assert sorted(net.seen) == [(1, 3, 6, 9), (1, 3, 9, 6), (2, 3, 6, 9), (2, 3, 9, 6)]
    for source in sources:
        assert (pixels(tmp_path / "out" / source.name) == 255 - pixels(source)).all()


def test_a_batch_that_does_not_fit_is_halved(tmp_path, monkeypatch):
    monkeypatch.setattr(module, "pixels_at_once", lambda device: 10**6)
    sources = [save(tmp_path / "in" / f"{i}.png") for i in range(4)]
    big = save(tmp_path / "in" / "big.png", size=(40, 30))
    net = Inverting(most_pixels=2 * 54)
    failures = run([tmp_path / "in"], tmp_path / "out", net, tile=None)
    assert net.seen == [(2, 3, 6, 9)] * 2
    assert failures == [
        f"{big}: 30 x 40 pixels do not fit into memory: give --tile auto, smaller tiles or a smaller --overlap"
    ]
    assert all((tmp_path / "out" / source.name).exists() for source in sources)
    assert run([big], tmp_path / "out", Inverting(most_pixels=33 * 33), tile="auto") == []


def test_mistakes_are_said_before_anything_starts(tmp_path):
    a, b = save(tmp_path / "in" / "a.png"), save(tmp_path / "other" / "a.png")
    (tmp_path / "empty").mkdir()
    notes = tmp_path / "notes.txt"
    notes.write_text("")
    for inputs, output, message in [
        ([a, b], "out", "would both become"),
        ([tmp_path / "nothing.png"], "out", "no such file or folder"),
        ([tmp_path / "*.bmp"], "out", "no picture found"),
        ([a, tmp_path / "empty"], "out", "no picture found"),
        ([notes], "out", "not one of .png"),
        ([a], "in", "would replace the input"),
        ([tmp_path / "in"], "in", "would replace the input"),
    ]:
        with pytest.raises(UserError, match=message):
            run(inputs, tmp_path / output, overwrite=True)
    with pytest.raises(UserError, match="multiple of 8"):
        run([a], tmp_path / "out", descriptor=Descriptor(size_multiple=8), tile=30)
    assert not (tmp_path / "out").exists()
    assert run([a, tmp_path / "in", a], tmp_path / "out") == []  # the same picture thrice is one


def test_an_output_folder_inside_the_input_is_no_input(tmp_path):
    a = save(tmp_path / "a.png")
    for _ in range(2):
        assert run([tmp_path], tmp_path / "out", overwrite=True) == []
    assert plan([str(tmp_path)], tmp_path / "out") == [(a, tmp_path / "out" / "a.png")]
    assert [path.name for path in (tmp_path / "out").rglob("*")] == ["a.png"]


def test_a_disk_that_takes_nothing_ends_the_run_in_a_sentence(tmp_path, monkeypatch):
    source = save(tmp_path / "a.png")
    (tmp_path / "out").write_text("a file where the folder should be")
    with pytest.raises(UserError, match="cannot be written"):
        run([source], tmp_path / "out")


def test_what_the_format_cannot_hold_is_a_failure_of_that_picture(tmp_path):
    source, other = save(tmp_path / "in" / "long.webp", size=(6000, 2)), save(tmp_path / "in" / "ok.png")
    failures = run([tmp_path / "in"], tmp_path / "out", Inverting(3), Descriptor(scale=3))  # WebP ends at 16383
    assert len(failures) == 1
    assert failures[0].startswith(f"{source}: cannot be written as long.webp")
    assert (tmp_path / "out" / other.name).exists()


def test_progress_shows_rate_and_time_left(tmp_path):
    for i in range(3):
        save(tmp_path / "in" / f"{i}.png")
    console = Console(file=io.StringIO(), width=120, force_terminal=True)
    run([tmp_path / "in"], tmp_path / "out", console=console)
    shown = console.file.getvalue()
    assert "3/3" in shown
    assert "images/s" in shown
    assert "0:00:00" in shown


def test_threads_are_gone_afterwards_and_no_temporary_file_stays(tmp_path):
    save(tmp_path / "in" / "a.png")
    before = set(threading.enumerate())
    run([tmp_path / "in"], tmp_path / "out")
    left = set(threading.enumerate()) - before
    for thread in left:  # the progress bar's is told to end and not waited for
        thread.join(timeout=10)
    assert not any(thread.is_alive() for thread in left)
    assert os.listdir(tmp_path / "out") == ["a.png"]


def test_names_as_long_as_they_get(tmp_path):
    longest = save(tmp_path / "in" / f"{'n' * 251}.png")
    assert run([tmp_path / "in"], tmp_path / "out") == []
    assert (pixels(tmp_path / "out" / longest.name) == 255 - pixels(longest)).all()
    with pytest.raises(UserError, match="no such file or folder"):
        run([tmp_path / ("n" * 300)], tmp_path / "out")


def test_an_output_whose_path_is_too_long_is_a_failure_of_that_picture(tmp_path, monkeypatch):
    """Of a tree that fits where it lies, and not deeper."""
    good, deep = save(tmp_path / "in" / "a.png"), Path("in", *["d" * 200] * 18)
    monkeypatch.chdir(tmp_path)
    save(deep / "b.png")
    out = Path(*["o" * 200] * 3)
    (failure,) = run(["in"], out)
    assert failure.startswith(f"{deep / 'b.png'}: cannot be written: the path of its output")
    assert (pixels(out / "a.png") == 255 - pixels(good)).all()


def test_what_is_left_out_is_said_once_at_the_end(tmp_path):
    save(tmp_path / "in" / "a.png")
    for name in ("b.bmp", "c.bmp", "d.GIF"):
        save(tmp_path / "in" / name)
    (tmp_path / "in" / "e.png").symlink_to(tmp_path / "gone.png")
    for place in (tmp_path / "in", tmp_path / "in" / "*"):
        console = Console(file=io.StringIO(), width=2000)
        assert run([place], tmp_path / "out", overwrite=True, console=console) == []
        assert [path.name for path in (tmp_path / "out").iterdir()] == ["a.png"]
        *_, line = console.file.getvalue().splitlines()
        assert line.startswith("left out: 1 behind a broken link (")
        for part in ("e.png)", "2 of a kind that is not read, .bmp (", "c.bmp", "1 of a kind that is not read, .gif ("):
            assert part in line


def test_a_folder_in_the_place_of_an_output_is_a_mistake(tmp_path):
    save(tmp_path / "in" / "a.png")
    (tmp_path / "out" / "a.png").mkdir(parents=True)
    for overwrite in (False, True):
        with pytest.raises(UserError, match=r"a.png: is a folder where .* would be written"):
            run([tmp_path / "in"], tmp_path / "out", overwrite=overwrite)


def test_names_are_shown_as_they_are(tmp_path):
    save(tmp_path / "in" / "a.png"), save(tmp_path / "in" / "[red]:smile:.bmp")
    run([tmp_path / "in"], tmp_path / "o[red]")
    console = Console(file=io.StringIO(), width=2000)
    run([tmp_path / "in"], tmp_path / "o[red]", console=console)
    assert "o[red]: skipped" in console.file.getvalue()
    assert "[red]:smile:.bmp" in console.file.getvalue()
