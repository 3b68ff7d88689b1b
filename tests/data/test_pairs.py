"""Which images belong together: names alike, by a pattern, in another Unicode form; and what is said otherwise."""

import unicodedata

import pytest

from mcir.data.layouts import find_pairs
from mcir.data.pairs import Fault, pair_folders
from mcir.errors import UserError
from tests.data.test_layouts import plant


def paired(root, pattern="{key}", clean_pattern="{key}"):
    pairs = pair_folders(root / "hr", root / "lr", pattern=pattern, clean_pattern=clean_pattern).samples
    return {pair.key: (pair.clean.name, pair.degraded.name) for pair in pairs}


@pytest.mark.parametrize(
    ("files", "patterns", "expected"),
    [
        (["hr/0001.png", "lr/0001x4.png"], ["{key}x4.png"], {"0001": ("0001.png", "0001x4.png")}),
        (["hr/1.jpg", "lr/LR_1.png"], ["LR_{key}"], {"1": ("1.jpg", "LR_1.png")}),
        (["hr/norain-1.png", "lr/rain-1.png"], ["rain-{key}", "norain-{key}"], {"1": ("norain-1.png", "rain-1.png")}),
        (
            ["hr/im_1.png", "lr/im_1_s80_a04.png", "lr/im_1_s85_a04.png"],
            ["{key}_s*_a*"],
            {"im_1_s80_a04": ("im_1.png", "im_1_s80_a04.png"), "im_1_s85_a04": ("im_1.png", "im_1_s85_a04.png")},
        ),
        (["hr/a/1.png", "lr/a/1+(b).png"], ["{key}+(b)"], {"a/1": ("1.png", "1+(b).png")}),
        (["hr/s/1.png", "lr/s/s_1.png"], ["{key}_1", "{key}_1"], None),
        (["hr/1/gt/1.png", "lr/1/in/1.png"], ["{key}/in/{key}", "{key}/gt/{key}"], {"1": ("1.png", "1.png")}),
    ],
)
def test_names_fit_a_pattern(tmp_path, files, patterns, expected):
    plant(tmp_path, files)
    if expected is None:
        with pytest.raises(UserError, match="without their clean half"):
            paired(tmp_path, *patterns)
    else:
        assert paired(tmp_path, *patterns) == expected


def test_a_suffix_in_a_pattern_is_asked_for(tmp_path):
    plant(tmp_path, ["hr/1.png", "lr/1x2.jpg"])
    with pytest.raises(UserError, match=r"names that do not read as '\{key\}x2\.png': 1x2\.jpg"):
        paired(tmp_path, "{key}x2.png")
    with pytest.raises(UserError, match="without their clean half"):
        paired(tmp_path, "{key}x2", "{key}.jpg")


@pytest.mark.parametrize(
    ("patterns", "message"),
    [
        (["x4"], r"'x4' of names must hold \{key\}, such as \{key\}x4\.png"),
        (["{key}_{id}"], r"'\{key\}_\{id\}' of names must hold \{key\}, .* and no other \{\}"),
        (["{key}", "{key}_*"], r"leads to one file and holds no \*: \{key\}_\*"),
    ],
)
def test_what_is_no_pattern(tmp_path, patterns, message):
    plant(tmp_path, ["hr/1.png", "lr/1.png"])
    with pytest.raises(UserError, match=message):
        paired(tmp_path, *patterns)
    with pytest.raises(UserError, match="goes with pairs"):
        pair_folders(tmp_path / "hr", pattern="{key}x2")


def test_names_that_differ_in_unicode_form_alone_are_one(tmp_path):
    names = ["Übersicht", "café", "naïve"]
    plant(tmp_path, [f"hr/{unicodedata.normalize('NFC', name)}.png" for name in names])
    plant(tmp_path, [f"lr/{unicodedata.normalize('NFD', name)}x2.png" for name in names])
    assert set(paired(tmp_path, "{key}x2")) == set(names)
    plant(tmp_path, [f"hr/{unicodedata.normalize('NFD', 'café')}.png"])
    with pytest.raises(UserError, match=r"two images of one name \(they differ in Unicode form\)"):
        paired(tmp_path, "{key}x2")


@pytest.mark.parametrize(
    ("files", "hint"),
    [
        (["hr/{}.png", "lr/{}x2.png"], "--pattern '{key}x2' (in a config pattern: '{key}x2') pairs all of them"),
        (["hr/{}.png", "lr/{}_s80_a4.png", "lr/{}_s8_a4.png"], "--pattern '{key}_*_*' (in a config"),
        (["hr/no{}.png", "lr/{}.png"], "--pattern '{key}' --clean-pattern 'no{key}' (in"),
        (["hr/{}_hr.png", "lr/{}_lr.png"], "--pattern '{key}_lr' --clean-pattern '{key}_hr' (in"),
        (["hr/a{}.png", "lr/b{}.png"], "take a pattern, such as --pattern '{key}x4'"),
        (
            ["hr/{}.png", "hr/a{}.png", "lr/{}x2.png"],
            "take a pattern, such as --pattern '{key}x4'",
        ),  # one would be left
    ],
)
def test_a_pattern_that_would_pair_all_is_named(tmp_path, files, hint):
    plant(tmp_path, [file.format(name) for file in files for name in ("00", "17")])
    with pytest.raises(UserError) as caught:
        paired(tmp_path)
    assert hint in str(caught.value)
    assert "a published dataset has a --layout" in str(caught.value)
    assert "\n" not in str(caught.value)


def test_all_faults_are_told_at_once_or_listed(tmp_path):
    plant(tmp_path, [*(f"hr/{i}.png" for i in range(8)), "hr/1.jpg", "lr/1.png", "lr/x.png"])
    (tmp_path / "lr/y.png").symlink_to("nothing")
    with pytest.raises(UserError) as caught:
        paired(tmp_path)
    for part in (
        "two images of one name",
        "leads to no file",
        "clean half in",
        "lr: 0.png, 2.png, 3.png, 4.png, 5.png",
    ):
        assert part in str(caught.value)
    faults: list[Fault] = []
    pairs = pair_folders(tmp_path / "hr", tmp_path / "lr", faults=faults)
    assert [pair.key for pair in pairs.samples] == ["1"]
    lines = [line for fault in faults for line in fault.lines()]
    assert sum("without a degraded half" in line for line in lines) == 7
    assert sum("--pattern" in line for line in lines) == 1


def test_faults_of_a_layout_are_listed_over_all_its_folders(tmp_path):
    plant(tmp_path, ["test/A/sharp/1.png", "test/B/sharp/1.png", "test/B/blur/1.png", "test/B/blur/2.png"])
    plant(tmp_path, ["test/.cache/sharp/1.png"])
    faults: list[Fault] = []
    assert [pair.key for pair in find_pairs("gopro", tmp_path, "test", faults=faults).samples] == ["B/1"]
    assert len(faults) == 2
    with pytest.raises(UserError, match=r"A/blur is not a folder; degraded images without their .*: 2\.png"):
        find_pairs("gopro", tmp_path, "test")
