import io
import itertools
import os
import subprocess
import sys
import time
from collections import Counter
from contextlib import closing
from itertools import islice

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from PIL import Image

from mcir.config import validate
from mcir.data.loader import Loader
from mcir.data.resize import imresize
from mcir.data.sources import ParquetSource
from mcir.data.stages import Stage
from mcir.data.stream import DataConfig, SampleStream
from mcir.data.workers import decoded
from mcir.errors import UserError
from tests.runs import png, tiny_config, write_dataset

BICUBIC = {"name": "bicubic", "scale": 2}


def config(folder, **overrides) -> DataConfig:
    source = {"format": "parquet", "path": str(folder)}
    train = [{"source": source, "degradation": BICUBIC}]
    return DataConfig.model_validate(
        {"train": train, "crop_size": 16, "num_workers": 0, "shuffle_buffer": 8} | overrides
    )


def loader(data, batch_size=4, rank=0, world_size=1, position=0, scale=2) -> Loader:
    made = Loader(data, scale=scale, batch_size=batch_size, seed=3, rank=rank, world_size=world_size)
    made.position = position
    return made


def samples(data, num_batches, world_size=1, position=0, batch_size=12) -> list[tuple[str, bytes]]:
    """(key, pixels) in the order of the global batches, from `world_size` ranks."""
    ranks = [iter(loader(data, batch_size, rank, world_size, position)) for rank in range(world_size)]
    taken = []
    for _ in range(num_batches):
        shares = [next(rank) for rank in ranks]
        for share in shares:
            taken += zip(share.key, (image.numpy().tobytes() for image in share.clean), strict=True)
    return taken


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return write_dataset(tmp_path_factory.mktemp("loader"), num_rows=31, num_shards=4)  # 31: divides by nothing


def test_each_epoch_holds_every_sample_once(folder):
    batches = iter(loader(config(folder), batch_size=1))
    keys = [next(batches).key[0] for _ in range(3 * 31)]
    for epoch in range(3):
        assert Counter(keys[epoch * 31 : (epoch + 1) * 31]) == Counter(f"{i:03d}" for i in range(31))
    assert keys[:31] != keys[31:62]


@pytest.mark.parametrize("num_workers", [0, 1, 2, 3])
@pytest.mark.parametrize("world_size", [1, 2, 3, 4])
def test_the_same_samples_for_any_workers_and_world_size_from_any_position(folder, num_workers, world_size):
    """Kill and resume at any step with another number of processes and workers: exactly what was not yet seen."""
    expected = samples(config(folder), 8)
    for stop in (0, 1, 5):
        data = config(folder, num_workers=num_workers)
        assert samples(data, 8 - stop, world_size, position=stop * 12) == expected[stop * 12 :]
        if num_workers and stop:
            break  # starting worker processes is slow


def test_kept_images_give_the_same_samples(folder, tmp_path):
    """In each of three epochs. Every image, degraded ones and further columns too, has an equal share of `keep_mib`."""
    assert samples(config(folder), 8) == samples(config(folder, keep_mib=0), 8)
    train = [{"source": {"format": "parquet", "path": str(folder)}, "degradation": BICUBIC}]
    pairs = write_dataset(tmp_path, num_rows=10, scale=2, extra=["haze"])
    train.append({"source": {"format": "parquet", "path": str(pairs)}})
    assert SampleStream(config(folder, train=train, keep_mib=2), 2, 3, 4).kept_bytes == 2**21 // (31 + 2 * 10)
    assert SampleStream(config(pairs, train=train[1:], keep_mib=2), 2, 3, 4, ["haze"]).kept_bytes == 2**21 // 30


def test_crops_are_aligned_and_equal_the_degraded_whole(folder):
    """The degraded crop is a window of the whole image resized, and its clean crop the matching window."""
    originals = {row.key: row for row in ParquetSource(path=str(folder)).open()}
    from mcir.data.decode import decode

    batch = next(iter(loader(config(folder, augment="none"), batch_size=12)))
    for key, degraded, clean in zip(batch.key, batch.degraded, batch.clean, strict=True):
        whole = decode(originals[key].clean, key)
        small = imresize(whole, 1 / 2)
        windows = [
            (y, x)
            for y, x in itertools.product(range(9), range(9))
            if torch.equal(small[:, y : y + 8, x : x + 8] / 255, degraded)
        ]
        assert any(torch.equal(whole[:, 2 * y : 2 * y + 16, 2 * x : 2 * x + 16] / 255, clean) for y, x in windows)


def test_a_mixture_draws_from_all_sources(folder, tmp_path):
    other = write_dataset(tmp_path / "other", num_rows=10, scale=2)
    train = [
        {"source": {"format": "parquet", "path": str(folder)}, "degradation": BICUBIC, "weight": 3},
        {"source": {"format": "parquet", "path": str(other)}, "weight": 1},
    ]
    data = config(folder, train=train)
    expected = samples(data, 10)
    assert samples(data, 4, world_size=2, position=6 * 12) == expected[6 * 12 :]


@pytest.mark.parametrize(("batch_size", "num_workers"), [(1, 2), (5, 3), (12, 2)])
def test_workers_write_nowhere_that_is_still_read(folder, batch_size, num_workers):
    """An image is a view until the next one is taken, and the workers run ahead as far as they may."""
    stream = SampleStream(config(folder), 2, 3, batch_size)
    expected, ahead = (decoded(stream, 0, 16, batch_size, 0, 1, n) for n in (0, num_workers))
    with closing(ahead):
        for i, (key, *images), (other, *others) in zip(range(12 * batch_size), expected, ahead, strict=False):
            time.sleep(0 if i % batch_size else 0.1)
            assert key == other
            assert all(map(np.array_equal, images, others))


def test_images_of_16_bits_among_those_of_8(tmp_path):
    grey = io.BytesIO()
    Image.fromarray(np.arange(32 * 32, dtype=np.uint16).reshape(32, 32) * 64).save(grey, "PNG")
    data = broken(tmp_path, grey.getvalue())  # beside a black one
    for num_workers in (0, 1):
        batch = next(iter(loader(config(data, num_workers=num_workers, augment="none", crop_size=32), batch_size=2)))
        deep, black = batch.key.index("b"), batch.key.index("a")
        expected = torch.arange(32 * 32).reshape(32, 32) * 64 / 65535
        torch.testing.assert_close(batch.clean[deep], expected.expand(3, -1, -1))
        assert not batch.clean[black].any()


def test_augmentations_are_those_of_their_group(tmp_path):
    """One picture without symmetry: which of its 8 positions come, and how often."""
    pixels = np.random.default_rng(0).integers(0, 256, (16, 16, 3), dtype=np.uint8)
    columns = {"key": [f"{i}" for i in range(800)], "clean": [{"bytes": png(pixels), "path": None}] * 800}
    pq.write_table(pa.table(columns), tmp_path / "0.parquet")
    whole = torch.from_numpy(pixels).permute(2, 0, 1) / 255
    turned = {  # (transposed, upside down, mirrored)
        (t, v, h): torch.flip(whole, [d for d, flip in ((1, v), (2, h)) if flip]).transpose(1, 1 + t)
        for t, v, h in itertools.product((0, 1), repeat=3)
    }
    shares = {
        "none": {(0, 0, 0): 1},
        "hflip": {(0, 0, 0): 1 / 2, (0, 0, 1): 1 / 2},
        "flips": {(0, 0, 0): 1 / 2, (0, 0, 1): 1 / 4, (0, 1, 0): 1 / 4},
        "dihedral": dict.fromkeys(turned, 1 / 8),
    }
    for augment, expected in shares.items():
        batch = next(iter(loader(config(tmp_path, augment=augment), batch_size=800)))
        seen = Counter(next(k for k, v in turned.items() if torch.allclose(v, image)) for image in batch.clean)
        assert seen.keys() == expected.keys()
        for position, share in expected.items():  # within 5 standard deviations
            assert abs(seen[position] - 800 * share) <= 5 * (800 * share * (1 - share)) ** 0.5


@pytest.mark.skipif(os.geteuid() != 0, reason="mounting a small /dev/shm takes root")
def test_too_little_shared_memory_is_said_at_the_start(folder):
    code = (
        "import sys\nfrom mcir.data.loader import Loader\nfrom mcir.data.stream import DataConfig\n"
        "from mcir.errors import UserError\n"
        "data = DataConfig.model_validate_json(sys.argv[1])\n"
        "try:\n    next(iter(Loader(data, scale=2, batch_size=600, seed=0)))\n"
        "except UserError as error:\n    print(error)"
    )
    data = config(folder, num_workers=2).model_dump_json()
    mount = 'mount -t tmpfs -o size=1m tmpfs /dev/shm || exit 9; exec "$@"'
    command = ["unshare", "-m", "sh", "-c", mount, "sh", sys.executable, "-c", code, data]
    process = subprocess.run(command, capture_output=True, text=True, timeout=120)
    if process.returncode == 9 or "unshare failed" in process.stderr:
        pytest.skip("a mount namespace of its own is not allowed here")
    assert process.stdout.startswith(
        "data.num_workers: the 2 workers of a rank need 2 MiB of /dev/shm, which has less;"
    )


def broken(folder, clean: bytes, degraded: bytes | None = None):
    folder.mkdir(parents=True, exist_ok=True)
    good = png(np.zeros((32, 32, 3), np.uint8))
    columns = {"key": ["a", "b"], "clean": [{"bytes": good, "path": None}, {"bytes": clean, "path": None}]}
    if degraded:
        half = png(np.zeros((16, 16, 3), np.uint8))
        columns["degraded"] = [{"bytes": half, "path": None}, {"bytes": degraded, "path": None}]
    pq.write_table(pa.table(columns), folder / "0.parquet")
    return folder


@pytest.mark.parametrize("num_workers", [0, 1])
def test_a_truncated_image_stops_the_run_with_file_row_and_reason(tmp_path, num_workers):
    data = config(broken(tmp_path, png(np.zeros((32, 32, 3), np.uint8))[:60]), num_workers=num_workers)
    with pytest.raises(UserError, match=r"0\.parquet, row 1 \(key b\)"):
        next(iter(loader(data, batch_size=2)))


def test_skip_leaves_the_row_out_and_counts_it(tmp_path):
    made = loader(config(broken(tmp_path, b"not an image"), on_error="skip"), batch_size=2)
    batches = [batch for batch, _ in zip(made, range(3), strict=False)]
    assert [batch.key for batch in batches] == [["a"]] * 3
    assert [(len(batch.clean), batch.weight) for batch in batches] == [(1, 0.5)] * 3
    assert made.num_skipped >= 3


@pytest.fixture(scope="module")
def third_bad(tmp_path_factory):
    """24 rows, every third of them no image."""
    folder = write_dataset(tmp_path_factory.mktemp("bad"), num_rows=24, num_shards=1)
    table = pq.read_table(folder / "00000.parquet").to_pylist()
    for row in table[::3]:
        row["clean"]["bytes"] = b"not an image"
    pq.write_table(pa.Table.from_pylist(table), folder / "00000.parquet", row_group_size=4)
    return folder


@pytest.mark.parametrize(("world_size", "num_workers"), [(1, 0), (1, 2), (2, 0), (4, 0), (4, 2)])
def test_every_usable_row_comes_once_an_epoch_whatever_the_number_of_processes(third_bad, world_size, num_workers):
    """One row a rank and batch at 4 ranks, so that some have none; the same after a resume."""
    data = config(third_bad, on_error="skip", num_workers=num_workers)

    def batches(rank: int, position: int, steps: int) -> list[tuple[list[str], float, bytes]]:
        made = loader(data, 4, rank, world_size, position)
        taken = [next(its) for its in [iter(made)] for _ in range(steps)]
        assert made.num_skipped == sum(round((1 - batch.weight) * 4 / world_size) for batch in taken)
        return [(batch.key, batch.weight, batch.clean.numpy().tobytes()) for batch in taken]

    ranks = [batches(rank, 0, 12) for rank in range(world_size)]
    usable = [f"{i:03d}" for i in range(24) if i % 3]
    for epoch in range(2):
        seen = [key for taken in ranks for keys, _, _ in taken[6 * epoch : 6 * epoch + 6] for key in keys]
        assert sorted(seen) == usable
    for rank, taken in enumerate(ranks):
        for keys, weight, images in taken:
            assert weight == len(keys) / (4 // world_size)
            assert len(images) == max(1, len(keys)) * 3 * 16 * 16 * 4
        if not num_workers:
            assert batches(rank, 4 * 5, 7) == taken[5:]
    per_step = [sum(taken[step][1] for taken in ranks) / world_size for step in range(12)]
    assert sum(per_step) == pytest.approx(12 * 16 / 24)  # weights of a step add up to its usable places


def test_parts_of_a_step_are_its_batch(folder):
    """Micro-batches change neither the order nor what a rank takes of it."""
    data = config(folder)
    whole = [batch.key for batch, _ in zip(loader(data, 12), range(3), strict=False)]
    parts = Loader(data, scale=2, batch_size=12, accumulate=3, seed=3)
    taken = [batch.key for batch, _ in zip(parts, range(9), strict=False)]
    assert list(itertools.chain(*taken)) == list(itertools.chain(*whole))
    assert all(len(keys) == 4 for keys in taken)


STAGES = [
    Stage(after=2, crop_size=24, batch_size=8),
    Stage(after=5, crop_size=32, batch_size=4),
]


def taken(batches, num: int) -> list[list[tuple[str, bytes, bytes]]]:
    """(key, pixels) of the samples of so many batches."""
    return [
        [
            (key, low.numpy().tobytes(), high.numpy().tobytes())
            for key, low, high in zip(b.key, b.degraded, b.clean, strict=True)
        ]
        for b, _ in zip(batches, range(num), strict=False)
    ]


@pytest.mark.parametrize("num_workers", [0, 2])
def test_stages_change_crops_and_batches_and_nothing_of_the_order(folder, num_workers):
    """At the step they say, for any number of ranks and from any step on."""

    def staged(rank=0, world_size=1, step=0) -> Loader:
        data = config(folder, num_workers=num_workers)
        made = Loader(data, scale=2, batch_size=12, stages=STAGES, seed=3, rank=rank, world_size=world_size)
        made.position = made.position_after(step)
        return made

    whole = [batch for batch, _ in zip(staged(), range(8), strict=False)]
    sizes = [(len(batch.key), batch.clean.shape[-1], batch.degraded.shape[-1]) for batch in whole]
    assert sizes == [(12, 16, 8)] * 2 + [(8, 24, 12)] * 3 + [(4, 32, 16)] * 3
    keys = [key for batch in whole for key in batch.key]
    assert keys == [key for key, _ in samples(config(folder), len(keys) // 4, batch_size=4)]
    made = staged()
    for step, _ in zip(range(1, 9), made, strict=False):
        assert made.position == made.position_after(step)
    expected = taken(staged(), 8)
    for step in (1, 2, 4, 5, 7) if not num_workers else (2,):
        assert taken(staged(step=step), 8 - step) == expected[step:]
    ranks = [taken(staged(rank, 4), 8) for rank in range(4 if not num_workers else 0)]
    for shares, batch in zip(zip(*ranks, strict=True), expected, strict=False):
        assert sorted(itertools.chain(*shares)) == sorted(batch)


def test_a_chain_of_degradations_is_the_same_for_any_workers_and_after_a_resume(folder):
    source = {"format": "parquet", "path": str(folder)}
    chain = {"name": "chain", "scale": 2, "steps": "real_esrgan"}

    def made(num_workers: int, start: int) -> list[tuple[list[str], bytes, bytes]]:
        data = config(folder, train=[{"source": source, "degradation": chain}], num_workers=num_workers)
        batches = islice(loader(data, position=4 * start), 9 - start)  # into the second epoch
        return [(b.key, b.degraded.numpy().tobytes(), b.clean.numpy().tobytes()) for b in batches]

    expected = made(0, 0)
    assert len({degraded for _, degraded, _ in expected}) == 9
    for num_workers, start in ((0, 3), (1, 0), (2, 0), (2, 3)):
        assert made(num_workers, start) == expected[start:]


@pytest.mark.parametrize("per", ["batch", "sample"])
def test_mixup_blends_each_sample_with_the_one_before_it_in_its_place(folder, per):
    mixup = {"beta": 1.2, "after": 2, "per": per, "probability": 0.7}
    plain = [batch for batch, _ in zip(loader(config(folder), 12), range(9), strict=False)]
    mixed = [batch for batch, _ in zip(loader(config(folder, mixup=mixup), 12), range(9), strict=False)]
    shares = []
    for step, (now, batch) in enumerate(zip(plain, mixed, strict=True)):
        assert batch.key == now.key
        if step < 2:
            assert torch.equal(batch.clean, now.clean)
            continue
        for place in range(12):
            before = plain[step - 1]
            line = now.clean[place] - before.clean[place]
            share = float(((batch.clean[place] - before.clean[place]) * line).sum() / line.square().sum())
            for made, new, old in (
                (batch.clean, now.clean, before.clean),
                (batch.degraded, now.degraded, before.degraded),
            ):
                torch.testing.assert_close(
                    made[place], share * new[place] + (1 - share) * old[place], atol=1e-5, rtol=0
                )
            shares.append(round(share, 4))
    assert 0 <= min(shares) < 0.5
    assert 0.1 < np.mean(np.array(shares) == 1) < 0.6
    assert len(set(shares)) > 30 if per == "sample" else len(set(shares)) <= 7


@pytest.mark.parametrize(("world_size", "accumulate"), [(1, 2), (2, 1), (3, 2)])
def test_mixup_is_the_same_for_any_number_of_ranks_and_after_a_resume(folder, world_size, accumulate):
    data = config(folder, mixup={"probability": 0.7, "per": "sample"})
    expected = samples(data, 6)

    def part(rank: int, step: int) -> list[tuple[str, bytes]]:
        made = Loader(data, scale=2, batch_size=12, accumulate=accumulate, seed=3, rank=rank, world_size=world_size)
        made.position = 12 * step
        parts = [batch for batch, _ in zip(made, range((6 - step) * accumulate), strict=False)]
        return [(key, image.numpy().tobytes()) for b in parts for key, image in zip(b.key, b.clean, strict=True)]

    for step in (0, 3):
        found = sorted(sample for rank in range(world_size) for sample in part(rank, step))
        assert found == sorted(expected[12 * step :])


def test_sources_that_are_repeated_come_in_the_numbers_of_their_rows(folder, tmp_path):
    small = write_dataset(tmp_path, num_rows=5, num_shards=1)
    train = [
        {"source": {"format": "parquet", "path": str(path)}, "degradation": BICUBIC, "repeat": repeat}
        for path, repeat in ((folder, 1), (small, 10))
    ]
    data = config(folder, train=train)
    drawn = samples(data, 81, batch_size=12)
    large = {row.key for row in ParquetSource(path=str(folder)).open()} - {f"{i:03d}" for i in range(5)}
    share = sum(key in large for key, _ in drawn) / len(drawn)
    assert share == pytest.approx(26 / 81, abs=0.02)
    for change, message in (({"repeat": None}, "give this one its own"), ({"weight": 2}, "a weight and a repeat")):
        with pytest.raises(ValueError, match=message):
            config(folder, train=[train[0], train[1] | change])


def test_a_source_with_few_row_groups_for_so_many_processes_is_said_at_the_start(folder, caplog):
    next(iter(loader(config(folder), 48, 0, 4)))
    assert not caplog.records
    next(iter(loader(config(folder), 48, 1, 8)))
    assert not caplog.records  # the first rank speaks
    next(iter(loader(config(folder), 48, 0, 8)))
    assert "data.train.0: each of the 8 processes reads 1.9 times its share" in caplog.text
    assert "only 8 row groups" in caplog.text
    assert "into 32 or more" in caplog.text


def test_a_dataset_without_a_usable_row_ends_the_run(tmp_path):
    made = loader(config(broken(tmp_path, b"not an image"), on_error="skip", crop_size=64), batch_size=2)
    batches = iter(made)
    for _ in range(499):
        batch = next(batches)
        assert (batch.key, batch.weight, len(batch.clean)) == ([], 0, 1)
    with pytest.raises(UserError, match=r"no usable row among 1000, the last: .*0\.parquet, row"):
        next(batches)
    assert made.num_skipped == 1000


@pytest.mark.parametrize("changed", ["seed", "buffer", "rows", "batch", "workers"])
def test_a_position_counts_in_one_order_only(folder, tmp_path, changed):
    before = loader(config(folder))
    next(iter(before))
    rows = write_dataset(tmp_path, num_rows=30, num_shards=4) if changed == "rows" else folder
    overrides = {"buffer": {"shuffle_buffer": 9}, "workers": {"num_workers": 2}}.get(changed, {})
    batch_size = 2 if changed == "batch" else 4
    after = Loader(config(rows, **overrides), scale=2, batch_size=batch_size, seed=4 if changed == "seed" else 3)
    after.position, after.order = before.position, before.order
    if changed == "workers":
        next(iter(after))
    else:
        with pytest.raises(UserError, match="order of the samples is not that of the checkpoint"):
            next(iter(after))


def test_sizes_that_do_not_fit(tmp_path):
    with pytest.raises(UserError, match="smaller than the crop of 64"):
        next(iter(loader(config(write_dataset(tmp_path / "small"), crop_size=64))))
    pair = broken(tmp_path / "pair", png(np.zeros((32, 32, 3), np.uint8)), png(np.zeros((20, 16, 3), np.uint8)))
    train = [{"source": {"format": "parquet", "path": str(pair)}}]
    with pytest.raises(UserError, match="degraded is 20 x 16 and clean 32 x 32"):
        next(iter(loader(config(pair, train=train), batch_size=2)))


def test_datasets_that_cannot_be_opened(tmp_path):
    (tmp_path / "empty").mkdir()
    pq.write_table(pa.table({"image": [1]}), tmp_path / "columns.parquet")
    (tmp_path / "garbage.parquet").write_bytes(b"garbage")
    for path, message in [
        (tmp_path / "empty", "no Parquet files"),
        (tmp_path / "columns.parquet", "no column clean .it has image"),
        (tmp_path / "garbage.parquet", "not a readable Parquet file"),
    ]:
        with pytest.raises(UserError, match=message):
            next(iter(loader(config(path))))


def test_a_source_without_degraded_images_needs_a_degradation(tmp_path):
    values = tiny_config(tmp_path)
    del values["data"]["train"][0]["degradation"]
    with pytest.raises(UserError, match="has no degraded image"):
        next(iter(loader(validate(values, "x").data)))


def test_a_program_that_ends_in_the_middle_of_an_epoch_ends(folder):
    """Its workers ignore the SIGTERM by which multiprocessing ends children that are left."""
    code = (
        "import sys\nfrom mcir.data.loader import Loader\nfrom mcir.data.stream import DataConfig\n"
        "data = DataConfig.model_validate_json(sys.argv[1])\n"
        "batches = iter(Loader(data, scale=2, batch_size=4, seed=0))\n"
        "print(len(next(batches).key))"
    )
    data = config(folder, num_workers=2).model_dump_json()
    process = subprocess.run([sys.executable, "-c", code, data], capture_output=True, text=True, timeout=120)
    assert (process.returncode, process.stdout, process.stderr) == (0, "4\n", "")


@pytest.mark.parametrize("num_workers", [0, 2])
def test_images_of_further_columns_get_the_crop_and_flips_of_the_clean_one(tmp_path, num_workers):
    """The columns hold the clean images' complements."""
    folder = write_dataset(tmp_path / "data", extra=("dcp", "aod"))
    data = config(folder, num_workers=num_workers)
    batches = iter(Loader(data, scale=2, batch_size=4, seed=3, columns=("dcp", "aod")))
    plain = iter(Loader(data, scale=2, batch_size=4, seed=3))
    for _ in range(4):
        batch, without = next(batches), next(plain)
        assert torch.equal(batch.clean, without.clean)
        assert len(batch.extra) == 2
        for image in batch.extra:
            assert torch.allclose(image, 1 - batch.clean, atol=1e-6)


def test_mixup_mixes_images_of_further_columns_with_the_same_factors(tmp_path):
    """The complement of a mix is the mix of the complements."""
    folder = write_dataset(tmp_path / "data", extra=("dcp",))
    data = config(folder, mixup={"probability": 1.0, "per": "sample"})
    mixed = islice(Loader(data, scale=2, batch_size=4, seed=3, columns=("dcp",)), 4)
    plain = islice(Loader(config(folder), scale=2, batch_size=4, seed=3), 4)
    for step, (batch, without) in enumerate(zip(mixed, plain, strict=True)):
        assert torch.equal(batch.clean, without.clean) == (step == 0)
        assert torch.allclose(batch.extra[0], 1 - batch.clean, atol=1e-6)


@pytest.mark.parametrize("num_workers", [0, 2])
def test_haze_takes_its_depth_from_a_column_cut_and_flipped_with_the_clean_image(tmp_path, num_workers):
    """The column holds the clean images' complements, so that d = 1 - red."""
    folder = write_dataset(tmp_path / "data", extra=("depth", "dcp"))
    degradation = {"name": "haze", "beta": 1.4, "airlight": 0.9, "depth": "depth"}
    train = [{"source": {"format": "parquet", "path": str(folder)}, "degradation": degradation}]
    data = config(folder, train=train, num_workers=num_workers)
    for columns in ((), ("dcp", "depth")):
        for batch in islice(Loader(data, scale=1, batch_size=4, seed=3, columns=columns), 4):
            t = torch.exp(-1.4 * (1 - batch.clean[:, :1]))
            torch.testing.assert_close(batch.degraded, batch.clean * t + 0.9 * (1 - t), atol=0.501 / 255, rtol=0)
            assert len(batch.extra) == len(columns)
    missing = config(folder, train=[train[0] | {"degradation": degradation | {"depth": "d"}}])
    with pytest.raises(UserError, match=r"no column d, which data\.train\.0\.degradation names \(it has clean, dcp"):
        next(iter(Loader(missing, scale=1, batch_size=4, seed=3)))


def test_columns_that_are_not_there(tmp_path):
    folder = write_dataset(tmp_path / "data")
    with pytest.raises(UserError, match=r"no column dcp, which objective\.contrast\.columns names \(it has"):
        next(iter(Loader(config(folder), scale=2, batch_size=4, seed=3, columns=("dcp",))))
    (tmp_path / "photos").mkdir()
    source = {"format": "folders", "clean": str(tmp_path / "photos")}
    data = config(folder, train=[{"source": source, "degradation": BICUBIC}])
    with pytest.raises(UserError, match="a source of folders has clean and degraded images alone"):
        next(iter(Loader(data, scale=2, batch_size=4, seed=3, columns=("dcp",))))


@pytest.mark.parametrize("num_workers", [0, 2])
@pytest.mark.parametrize("scale", [2, 3, 4])
def test_the_device_degrades_a_batch_as_the_loader_does_each_image(tmp_path, scale, num_workers):
    """Odd sides, crops at every border, images smaller than the crop."""
    rng = np.random.default_rng(0)
    clean = [png(rng.integers(0, 256, (*sides, 3), np.uint8)) for sides in ((37, 50), (25, 24), (61, 33), (20, 70))]
    table = {"key": list("abcd"), "clean": [{"bytes": image, "path": None} for image in clean]}
    pq.write_table(pa.table(table), tmp_path / "0.parquet")
    bicubic = {"name": "bicubic", "scale": scale}
    train = [{"source": {"format": "parquet", "path": str(tmp_path)}, "degradation": bicubic}]
    both = []
    for degrade_on_device in (False, True):
        values = {"train": train, "crop_size": 24, "small_images": "reflect", "num_workers": num_workers}
        data = DataConfig.model_validate(values | {"degrade_on_device": degrade_on_device})
        device = "cuda" if degrade_on_device and torch.cuda.is_available() else "cpu"
        made = Loader(data, scale=scale, batch_size=4, seed=3, device=device)
        with closing(iter(made)) as batches:
            both.append(list(islice(batches, 12)))
    for one, other in zip(*both, strict=True):
        assert one.key == other.key
        assert torch.equal(one.clean, other.clean.cpu())
        assert torch.equal(one.degraded, other.degraded.cpu())


def test_what_the_device_cannot_degrade_is_refused(folder, tmp_path):
    source = {"source": {"format": "parquet", "path": str(folder)}, "degradation": {"name": "noise", "sigma": 25}}
    with pytest.raises(ValueError, match="degrade_on_device: needs the degradation bicubic of every source"):
        DataConfig.model_validate({"train": [source], "crop_size": 16, "degrade_on_device": True})
    buffer = io.BytesIO()
    Image.fromarray(np.zeros((32, 32), np.uint16)).save(buffer, "PNG")
    table = {"key": ["a"], "clean": [{"bytes": buffer.getvalue(), "path": None}]}
    pq.write_table(pa.table(table), tmp_path / "0.parquet")
    source = {"source": {"format": "parquet", "path": str(tmp_path)}, "degradation": {"name": "bicubic", "scale": 2}}
    data = DataConfig.model_validate({"train": [source], "crop_size": 16, "degrade_on_device": True, "num_workers": 0})
    with pytest.raises(UserError, match=r"has 16 bits, and data.degrade_on_device needs 8"):
        next(iter(loader(data)))
