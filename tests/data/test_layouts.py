import pytest

from mcir.data.layouts import LAYOUTS, find_pairs, recognise, whose_degraded_half
from mcir.data.pairs import pair_folders
from mcir.errors import UserError


def same_names(layout, split, clean, degraded):
    return layout, split, None, [clean, degraded], [("7", clean, degraded)]


# layout, split, scale, files on disk, (key, clean, degraded) expected. Names as the published archives have them.
TREES = [
    (
        "div2k",
        "train",
        4,
        ["DIV2K_train_HR/0001.png", "DIV2K_train_LR_bicubic/X4/0001x4.png", "DIV2K_train_LR_bicubic/X2/0001x2.png"],
        [("0001", "DIV2K_train_HR/0001.png", "DIV2K_train_LR_bicubic/X4/0001x4.png")],
    ),
    (
        "div2k",
        "valid",
        2,
        ["DIV2K_valid_HR/0801.png", "DIV2K_valid_LR_bicubic/X2/0801x2.png", "DIV2K_train_HR/0001.png"],
        [("0801", "DIV2K_valid_HR/0801.png", "DIV2K_valid_LR_bicubic/X2/0801x2.png")],
    ),
    ("div2k", "train", None, ["DIV2K_train_HR/0001.png"], [("0001", "DIV2K_train_HR/0001.png", None)]),
    (
        "df2k",
        "train",
        3,
        [
            "DIV2K_train_HR/0800.png",
            "DIV2K_train_LR_bicubic/X3/0800x3.png",
            "Flickr2K/Flickr2K_HR/000001.png",
            "Flickr2K/Flickr2K_LR_bicubic/X3/000001x3.png",
        ],
        [
            ("0800", "DIV2K_train_HR/0800.png", "DIV2K_train_LR_bicubic/X3/0800x3.png"),
            ("000001", "Flickr2K/Flickr2K_HR/000001.png", "Flickr2K/Flickr2K_LR_bicubic/X3/000001x3.png"),
        ],
    ),
    (
        "df2k",
        "train",
        None,
        ["DIV2K_train_HR/0800.png", "Flickr2K_HR/000001.png"],
        [("0800", "DIV2K_train_HR/0800.png", None), ("000001", "Flickr2K_HR/000001.png", None)],
    ),
    *(
        (name, None, 2, ["HR/a_b.png", "LR_bicubic/X2/a_bx2.png"], [("a_b", "HR/a_b.png", "LR_bicubic/X2/a_bx2.png")])
        for name in ("set5", "set14", "b100", "urban100", "manga109")
    ),
    ("set5", None, 4, ["GTmod12/baby.png", "LRbicx4/baby.png"], [("baby", "GTmod12/baby.png", "LRbicx4/baby.png")]),
    (
        "reside-its",
        None,
        None,
        ["clear/1.png", "clear/10.png", "hazy/1_1_0.90179.png", "hazy/1_2_0.97842.png", "hazy/10_1_0.9.png"],
        [
            ("10_1_0.9", "clear/10.png", "hazy/10_1_0.9.png"),
            ("1_1_0.90179", "clear/1.png", "hazy/1_1_0.90179.png"),
            ("1_2_0.97842", "clear/1.png", "hazy/1_2_0.97842.png"),
        ],
    ),
    (
        "reside-ots",
        None,
        None,
        ["clear/0025.jpg", "hazy/0025_0.8_0.1.jpg", "hazy/0025_1_0.2.jpg"],
        [
            ("0025_0.8_0.1", "clear/0025.jpg", "hazy/0025_0.8_0.1.jpg"),
            ("0025_1_0.2", "clear/0025.jpg", "hazy/0025_1_0.2.jpg"),
        ],
    ),
    (
        "sots-indoor",
        None,
        None,
        ["gt/1400.png", "hazy/1400_1.png", "hazy/1400_10.png"],
        [("1400_1", "gt/1400.png", "hazy/1400_1.png"), ("1400_10", "gt/1400.png", "hazy/1400_10.png")],
    ),
    (
        "sots-outdoor",
        None,
        None,
        ["clear/0001.png", "hazy/0001_0.8_0.2.jpg"],
        [("0001_0.8_0.2", "clear/0001.png", "hazy/0001_0.8_0.2.jpg")],
    ),
    *(
        (
            name,
            split,
            None,
            [f"{split}/GT/7_1.png", f"{split}/hazy/7_1.png"],
            [("7_1", f"{split}/GT/7_1.png", f"{split}/hazy/7_1.png")],
        )
        for name in ("reside-in", "reside-out", "reside-6k")
        for split in ("train", "test")
    ),
    *(
        (name, None, None, ["target/1.png", "input/1.png"], [("1", "target/1.png", "input/1.png")])
        for name in ("rain100l", "rain100h")
    ),
    *(
        (
            name,
            None,
            None,
            ["groundtruth/norain-1.png", "groundtruth/norain-12.png", "input/rain-1.png", "input/rain-12.png"],
            [
                ("rain-1", "groundtruth/norain-1.png", "input/rain-1.png"),
                ("rain-12", "groundtruth/norain-12.png", "input/rain-12.png"),
            ],
        )
        for name in ("rain200l", "rain200h")
    ),
    ("did", None, None, ["groundtruth/1.jpg", "input/1.jpg"], [("1", "groundtruth/1.jpg", "input/1.jpg")]),
    (
        "ddn",
        None,
        None,
        ["groundtruth/1.jpg", "groundtruth/11.jpg", "input/1_1.jpg", "input/1_14.jpg", "input/11_2.jpg"],
        [
            ("11_2", "groundtruth/11.jpg", "input/11_2.jpg"),
            ("1_1", "groundtruth/1.jpg", "input/1_1.jpg"),
            ("1_14", "groundtruth/1.jpg", "input/1_14.jpg"),
        ],
    ),
    ("spa", None, None, ["groundtruth/1.png", "input/1.png"], [("1", "groundtruth/1.png", "input/1.png")]),
    (
        "gopro",
        "test",
        None,
        [
            f"test/GOPR0854_11_0{scene}/{half}/000010.png"
            for scene in (0, 1)
            for half in ("blur", "blur_gamma", "sharp")
        ],
        [
            ("GOPR0854_11_00/000010", "test/GOPR0854_11_00/sharp/000010.png", "test/GOPR0854_11_00/blur/000010.png"),
            ("GOPR0854_11_01/000010", "test/GOPR0854_11_01/sharp/000010.png", "test/GOPR0854_11_01/blur/000010.png"),
        ],
    ),
    (
        "gopro",
        "train",
        None,
        ["train/target/a.png", "train/input/a.png"],
        [("a", "train/target/a.png", "train/input/a.png")],
    ),
    (
        "gopro",
        "train",
        None,
        ["train/sharp_crops/a_s001.png", "train/blur_crops/a_s001.png"],
        [("a_s001", "train/sharp_crops/a_s001.png", "train/blur_crops/a_s001.png")],
    ),
    (
        "reside-ots",
        None,
        None,
        ["original/0025.jpg", "synthetic/part1/0025_0.8_0.1.jpg"],
        [("part1/0025_0.8_0.1", "original/0025.jpg", "synthetic/part1/0025_0.8_0.1.jpg")],
    ),
    *(
        (
            "rain13k",
            None,
            None,
            [f"{root}/target/7.jpg", f"{root}/input/7.jpg"],
            [("7", f"{root}/target/7.jpg", f"{root}/input/7.jpg")],
        )
        for root in ("train/Rain13K", "Rain13K/train", "train")
    ),
    *(
        (
            name,
            None,
            None,
            [f"{root}target/1.png", f"{root}input/1.png"],
            [("1", f"{root}target/1.png", f"{root}input/1.png")],
        )
        for name, title in (
            ("test100", "Test100"),
            ("test1200", "Test1200"),
            ("test2800", "Test2800"),
            ("hide", "HIDE"),
            ("realblur-j", "RealBlur_J"),
            ("realblur-r", "RealBlur_R"),
        )
        for root in ("", f"test/{title}/")
    ),
    *(
        (
            "sidd",
            "train",
            None,
            [f"{root}/0001_S6/{n}{half}_SRGB_01{i}.PNG" for half in ("GT", "NOISY") for i in (0, 1)],
            [
                (
                    f"0001_S6/{n}NOISY_SRGB_01{i}",
                    f"{root}/0001_S6/{n}GT_SRGB_01{i}.PNG",
                    f"{root}/0001_S6/{n}NOISY_SRGB_01{i}.PNG",
                )
                for i in (0, 1)
            ],
        )
        for root, n in (("Data", ""), ("SIDD_Medium_Srgb/Data", "0001_"))
    ),
    (
        "sidd",
        "val",
        None,
        ["val/gt_crops/1_1.png", "val/input_crops/1_1.png", "Data/a/GT_SRGB_010.PNG", "Data/a/NOISY_SRGB_010.PNG"],
        [("1_1", "val/gt_crops/1_1.png", "val/input_crops/1_1.png")],
    ),
    *(
        (
            "lol",
            split,
            None,
            [f"{root}/high/2.png", f"{root}/low/2.png"],
            [("2", f"{root}/high/2.png", f"{root}/low/2.png")],
        )
        for split, root in (("train", "our485"), ("test", "eval15"))
    ),
    (
        "lol",
        "test",
        None,
        ["Test/target/1.png", "Test/input/1.png", "Train/target/2.png", "Train/input/2.png"],
        [("1", "Test/target/1.png", "Test/input/1.png")],
    ),
    (
        "lol-v2-real",
        "test",
        None,
        [
            f"Real_captured/{split}/{name}.png"
            for split in ("Test", "Train")
            for name in ("Low/low00690", "Normal/normal00690")
        ],
        [("low00690", "Real_captured/Test/Normal/normal00690.png", "Real_captured/Test/Low/low00690.png")],
    ),
    (
        "lol-v2-synthetic",
        "train",
        None,
        ["Synthetic/Train/Low/r1.png", "Synthetic/Train/Normal/r1.png"],
        [("r1", "Synthetic/Train/Normal/r1.png", "Synthetic/Train/Low/r1.png")],
    ),
    (
        "bsd400-wed",
        None,
        None,
        ["BSD400/100075.jpg", "WED/00001.bmp"],
        [("100075", "BSD400/100075.jpg", None), ("00001", "WED/00001.bmp", None)],
    ),
    ("bsd400-wed", None, None, ["Denoise/00001.bmp"], [("00001", "Denoise/00001.bmp", None)]),
    (
        "dfwb",
        None,
        None,
        ["DIV2K/0001.png", "Flickr2K/000001.png", "WaterlooED/00001.bmp", "BSD400/2018.jpg"],
        [
            ("0001", "DIV2K/0001.png", None),
            ("000001", "Flickr2K/000001.png", None),
            ("00001", "WaterlooED/00001.bmp", None),
            ("2018", "BSD400/2018.jpg", None),
        ],
    ),
]


def plant(root, files):
    for file in files:
        (root / file).parent.mkdir(parents=True, exist_ok=True)
        (root / file).touch()


@pytest.mark.parametrize(
    ("layout", "split", "scale", "files", "expected"), TREES, ids=[f"{i}-{tree[0]}" for i, tree in enumerate(TREES)]
)
def test_each_published_tree_is_read(tmp_path, layout, split, scale, files, expected):
    plant(tmp_path, files)
    plant(
        tmp_path, ["README.txt", files[0].rsplit("/", 1)[0] + "/Thumbs.db", files[0].rsplit("/", 1)[0] + "/.hidden.png"]
    )
    pairs = find_pairs(layout, tmp_path, split, scale)
    found = [
        (p.key, p.clean.relative_to(tmp_path).as_posix(), p.degraded and p.degraded.relative_to(tmp_path).as_posix())
        for p in pairs.samples
    ]
    assert found == expected
    assert pairs.scale == (scale or 1)
    assert pairs.centre_crop == (layout in ("reside-its", "sots-indoor"))
    if LAYOUTS[layout].published:
        assert f"found {len(expected)}" in pairs.note


def test_every_layout_is_tried_above():
    assert {tree[0] for tree in TREES} == set(LAYOUTS)


def test_the_published_count_leaves_no_note(tmp_path):
    plant(tmp_path, [f"{half}/{i}.png" for half in ("HR",) for i in range(5)])
    plant(tmp_path, [f"LR_bicubic/X2/{i}x2.png" for i in range(5)])
    assert find_pairs("set5", tmp_path, scale=2).note == ""


def test_what_a_dataset_is_for(tmp_path):
    """The name that its shards get: test sets say test, halves without a name by the published count or the folder."""
    plant(tmp_path, ["s/HR/a.png", "r/target/1.png", "r/input/1.png", "g/test/target/1.png", "g/test/input/1.png"])
    assert find_pairs("set5", tmp_path / "s").split == "test"
    assert find_pairs("test100", tmp_path / "r").split == "test"
    assert find_pairs("rain13k", tmp_path / "r").split == "train"
    assert find_pairs("did", plant_pairs(tmp_path / "did", 3)).split == "train"
    assert find_pairs("did", plant_pairs(tmp_path / "did/test", 3)).split == "test"
    assert find_pairs("rain200l", plant_pairs(tmp_path / "l", 200, "rain-", "norain-")).split == "test"
    assert find_pairs("gopro", tmp_path / "g", "test").split == "test"
    plant(tmp_path, ["DIV2K_valid_HR/0801.png"])
    assert find_pairs("div2k", tmp_path, "valid").split == "validation"


def plant_pairs(root, count, degraded="", clean=""):
    plant(
        root, [f"groundtruth/{clean}{i}.png" for i in range(count)] + [f"input/{degraded}{i}.png" for i in range(count)]
    )
    return root


def test_published_folders_are_recognised(tmp_path):
    plant(tmp_path, ["Set5/HR/a.png", "Set5/LR_bicubic/X2/ax2.png", "Set5/LR_bicubic/X4/ax4.png"])
    ((place, pairs),) = recognise(tmp_path / "Set5", 4).items()
    assert (place, pairs.scale, [pair.degraded.name for pair in pairs.samples]) == (("set5", None), 4, ["ax4.png"])
    assert recognise(tmp_path / "Set5", 3) == recognise(tmp_path / "Set5", 1) == recognise(tmp_path, 2) == {}
    plant(tmp_path / "Set14", [f"HR/{i}.png" for i in range(14)] + [f"LR_bicubic/X2/{i}x2.png" for i in range(14)])
    assert list(recognise(tmp_path / "Set14", 2)) == [("set14", None)]
    plant(tmp_path / "GoPro", [f"{s}/{h}/1.png" for s in ("train", "test") for h in ("input", "target")])
    assert {("gopro", "train"), ("gopro", "test")} <= set(recognise(tmp_path / "GoPro", 1))


def test_the_folder_of_a_degraded_half_is_known(tmp_path):
    plant(tmp_path, ["Set5/HR/a.png", "Set5/LR_bicubic/X4/ax4.png", "other/LR_bicubic/X2/a.png", "its/hazy/1_1.png"])
    assert whose_degraded_half(tmp_path / "Set5/LR_bicubic/X4") == ("Set5", tmp_path / "Set5/HR")
    assert whose_degraded_half(tmp_path / "other/LR_bicubic/X2") == ("Set5", tmp_path / "other/HR")  # by its name alone
    assert whose_degraded_half(tmp_path / "Set5/HR") is None
    assert whose_degraded_half(tmp_path / "its/hazy") is None
    plant(tmp_path, ["its/clear/1.png"])
    assert whose_degraded_half(tmp_path / "its/hazy") == ("RESIDE ITS", tmp_path / "its/clear")


def test_another_count_than_the_published_one_is_noted(tmp_path):
    plant(tmp_path, ["DIV2K_valid_HR/0801.png", "DIV2K_train_HR/0001.png"])
    assert find_pairs("div2k", tmp_path, "valid").note == "published with 100, found 1"
    assert find_pairs("div2k", tmp_path, "train").note == "published with 800, found 1"


@pytest.mark.parametrize(
    ("layout", "split", "scale", "files", "message"),
    [
        ("set6", None, None, [], r"there is no layout 'set6'; there are div2k, df2k, set5"),
        ("div2k", None, 2, [], r"layout div2k: give the split, train or valid"),
        ("div2k", "test", 2, [], r"layout div2k: give the split, train or valid, not test"),
        ("set5", "test", 2, [], r"layout set5 has no splits"),
        ("set5", None, 8, [], r"layout set5 has no scale 8: it has 2, 3, 4"),
        ("ddn", None, 2, [], r"layout ddn has no scale 2: its pairs are of one size"),
        ("set5", None, 2, ["hr/a.png"], r"is not laid out as set5: there is no folder HR or GTmod12 in it"),
        ("set5", None, 2, ["HR/a.png"], r"degraded half .*LR_bicubic/X2 is not a folder"),
        ("set5", None, 2, ["HR/a.png", "LR_bicubic/X2/a.png"], r"names that do not read as '\(\.\+\)x2': a\.png"),
        (
            "did",
            None,
            None,
            ["groundtruth/1.jpg", "input/1.jpg", "input/2.jpg", "input/3.jpg"],
            r"without their clean half in .*groundtruth: 2\.jpg, 3\.jpg",
        ),
        (
            "did",
            None,
            None,
            [*(f"groundtruth/{i}.jpg" for i in range(8)), "input/1.jpg"],
            r"without a degraded half in .*input: 0\.jpg, 2\.jpg, 3\.jpg, 4\.jpg, 5\.jpg and 2 more",
        ),
        ("did", None, None, ["groundtruth/1.jpg", "groundtruth/1.png", "input/1.jpg"], r"two images of one name"),
        ("did", None, None, ["groundtruth/notes.txt", "input/1.jpg"], r"groundtruth holds no images"),
        (
            "df2k",
            "train",
            None,
            ["DIV2K_train_HR/0001.png", "Flickr2K_HR/0001.png"],
            r"two samples have the key 0001",
        ),
    ],
)
def test_what_does_not_fit_is_named(tmp_path, layout, split, scale, files, message):
    plant(tmp_path, files)
    with pytest.raises(UserError, match=message):
        find_pairs(layout, tmp_path, split, scale)


def test_plain_folders_pair_by_relative_name(tmp_path):
    plant(tmp_path, ["sharp/a/1.png", "sharp/2.png", "blurred/a/1.jpg", "blurred/2.webp"])
    pairs = pair_folders(tmp_path / "sharp", tmp_path / "blurred", scale=2)
    assert [(p.key, p.clean.suffix, p.degraded.suffix) for p in pairs.samples] == [
        ("2", ".png", ".webp"),
        ("a/1", ".png", ".jpg"),
    ]
    assert pairs.scale == 2
    assert [p.degraded for p in pair_folders(tmp_path / "sharp").samples] == [None, None]
    plant(tmp_path, ["blurred/b.png"])
    with pytest.raises(UserError, match=r"without their clean half in .*sharp: b\.png"):
        pair_folders(tmp_path / "sharp", tmp_path / "blurred")
    with pytest.raises(UserError, match="is not a folder"):
        pair_folders(tmp_path / "none")
