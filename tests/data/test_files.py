"""One rule for which files take part, for folders, Parquet, tars and patterns alike."""

import io
import tarfile

import pytest

from mcir.data.files import LeftOut, files_at, files_below
from mcir.data.pairs import pair_folders
from mcir.data.sources import FolderSource, ParquetSource, TarSource
from mcir.restoration.restore import find
from tests.runs import write_dataset

LEFT_OVER = [
    ".ipynb_checkpoints/a-checkpoint{}", ".Trash-1000/files/b{}", "@eaDir/a{}/SYNOPHOTO_THUMB_XL{}", "__MACOSX/._a{}",
    "._a{}", "night/._c{}", "$RECYCLE.BIN/x{}", "lost+found/y{}", "#recycle/z{}",
]  # fmt: skip


def plant(root, names, data=b"x"):
    for name in names:
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_bytes(data)


def test_what_is_left_over_takes_no_part_in_any_source(tmp_path):
    plant(tmp_path / "photos", ["a.png", "night/c.png", *(name.format(".png", ".png") for name in LEFT_OVER)])
    folders = FolderSource(format="folders", clean=str(tmp_path / "photos")).open()
    assert [row.key for row in folders] == ["a", "night/c"]
    assert [str(name) for _, name in find(str(tmp_path / "photos"), tmp_path / "out")] == ["a.png", "night/c.png"]

    shards = write_dataset(tmp_path / "shards", num_rows=4, num_shards=1)
    plant(shards, [name.format(".parquet", ".parquet") for name in LEFT_OVER])
    parquet = ParquetSource(path=str(shards)).open()
    assert len(list(parquet)) == len(list(ParquetSource(path=f"{shards}/**/*.parquet").open())) == 4

    plant(tmp_path / "tars", [name.format(".tar", ".tar") for name in LEFT_OVER])
    with tarfile.open(tmp_path / "tars/0.TAR", "w") as archive:
        for name in ("a.clean.png", "night/c.CLEAN.PNG", *(name.format(".png", ".png") for name in LEFT_OVER)):
            info = tarfile.TarInfo(name)
            info.size = 1
            archive.addfile(info, io.BytesIO(b"x"))
    tars = TarSource(format="tars", path=str(tmp_path / "tars")).open()
    assert [row.key for row in tars] == ["a", "night/c"]
    for units, expected in ((folders, len(LEFT_OVER)), (parquet, len(LEFT_OVER)), (tars, 2 * len(LEFT_OVER))):
        assert units.left_out.counts == {"hidden, or left over by a file manager": expected}


def test_a_folder_that_is_hidden_itself_is_read_when_it_is_named(tmp_path):
    plant(tmp_path / ".cache/data", ["a.png"])
    assert len(pair_folders(tmp_path / ".cache/data").samples) == 1
    plant(tmp_path / ".cache/data", ["0.parquet"])
    assert len(files_at(f"{tmp_path}/.cache/data/*.parquet", ".parquet")) == 1
    assert len(files_at(f"{tmp_path}/.*/data/*.parquet", ".parquet")) == 1


@pytest.mark.parametrize("suffix", [".PNG", ".jfif", ".jp2", ".JPEG", ".jpe", ".pgm"])
def test_images_of_every_common_suffix_take_part(tmp_path, suffix):
    plant(tmp_path, [f"a{suffix}"])
    assert [pair.key for pair in pair_folders(tmp_path).samples] == ["a"]


def test_what_is_of_another_kind_is_counted_with_the_first_examples(tmp_path):
    plant(tmp_path, ["a.png", "b.heic", "notes", "README.md", *(f"{i}.TXT" for i in range(5))])
    left_out = LeftOut()
    assert [path.name for path in files_below(tmp_path, [".png"], left_out)] == ["a.png"]
    kinds = sorted(left_out.lines())
    assert kinds[0] == f"1 of a kind that is not read, .heic ({tmp_path}/b.heic)"
    assert kinds[1] == f"1 of a kind that is not read, without a suffix ({tmp_path}/notes)"
    assert kinds[2].startswith("5 of a kind that is not read, .txt (")
    assert kinds[2].endswith(", ...)")
    assert len(kinds) == 3
