"""Intervals against published tables and a worked example; the files say what the tables say."""

import csv
import io
import json
import math
import os

import pytest
from rich.console import Console

from mcir.errors import UserError
from mcir.evaluation.evaluate import Scores
from mcir.evaluation.report import (
    Report,
    comparison_table,
    difference,
    require_writable,
    results_table,
    to_csv,
    to_json,
    write_whole,
)


def scores(psnr, ssim):
    return Scores([f"k{i}" for i in range(len(psnr))], {"psnr": list(psnr), "ssim": list(ssim)})


REPORT = Report(
    {
        "Set": {
            "bicubic": scores([30.0, 31.0, 32.0], [0.9, 0.9, 0.9]),
            "plain": scores([31.0, 32.0, 33.0], [0.91, 0.92, 0.93]),
            "spn": scores([31.5, 32.2, 33.8], [0.91, 0.92, 0.93]),
        },
        "One": {
            name: scores([value], [0.5]) for name, value in (("bicubic", 30.0), ("plain", 29.0), ("spn", math.inf))
        },
    },
    True,
    {"versions": {"mcir": "x"}},
)


def shown(table):
    console = Console(width=100, file=io.StringIO())
    console.print(table)
    return console.file.getvalue()


def test_a_paired_difference_and_its_interval():
    """The sleep data of Student (Biometrika 1908), paired: mean 1.58, 95 % interval [0.70, 2.46] (R's t.test)."""
    first = [0.7, -1.6, -0.2, -1.2, -0.1, 3.4, 3.7, 0.8, 0.0, 2.0]
    second = [1.9, 0.8, 1.1, 0.1, -0.1, 4.4, 5.5, 1.6, 4.6, 3.4]
    found = difference(second, first)
    assert found.mean == pytest.approx(1.58)
    assert (found.low, found.high) == pytest.approx((0.7001142, 2.4598858), abs=1e-6)
    assert math.isnan(difference([1.0], [0.5]).low)
    equal = difference([1.5, 2.5], [1.0, 2.0])
    assert (equal.low, equal.mean, equal.high) == (0.5, 0.5, 0.5)


def test_all_are_compared_with_the_first_and_with_the_baseline():
    assert REPORT.pairs == [("spn", "plain"), ("plain", "bicubic"), ("spn", "bicubic")]
    without = Report({"Set": {"a": scores([1], [1]), "b": scores([1], [1])}}, False, {})
    assert without.pairs == [("b", "a")]


def test_published_results_stand_below_the_measured_ones():
    report = Report(REPORT.scores, True, {}, {"One": {"plain": (26.04, 0.7849), "+SPN": (26.12, 0.7878)}})
    lines = [line.split("│")[1:-1] for line in shown(results_table(report)).splitlines() if "│" in line]
    assert [cell.strip() for cell in lines[-1]] == ["", "", "published: +SPN", "26.12", "0.7878"]
    assert [cell.strip() for cell in lines[-2]] == ["", "", "published: plain", "26.04", "0.7849"]
    assert len(lines) == 8


def test_the_tables():
    lines = [line.split("│")[1:-1] for line in shown(results_table(REPORT)).splitlines() if "│" in line]
    assert [cell.strip() for cell in lines[0]] == ["Set", "3", "bicubic", "31.00", "0.9000"]
    assert [cell.strip() for cell in lines[2]] == ["", "", "spn", "32.50", "0.9200"]
    lines = [line.split("│")[1:-1] for line in shown(comparison_table(REPORT)).splitlines() if "│" in line]
    # deltas 0.5, 0.2, 0.8: mean 0.5, standard deviation 0.3, t = 4.302653
    half = 4.302653 * 0.3 / math.sqrt(3)
    assert [cell.strip() for cell in lines[0]] == ["Set", "spn", "plain", f"+0.50 ± {half:.2f}", "+0.0000 ± 0.0000"]
    assert lines[1][3].strip() == "+1.00 ± 0.00 *"
    assert lines[4][3].strip() == "-1.00"  # one image: no interval


def test_csv_holds_every_digit():
    rows = list(csv.DictReader(io.StringIO(to_csv(REPORT))))
    assert len(rows) == 12
    assert rows[5] == {"set": "Set", "weights": "plain", "image": "k2", "psnr": "33.0", "ssim": "0.93"}
    assert float(rows[-1]["psnr"]) == math.inf


def test_json_is_json_and_complete():
    content = json.loads(to_json(REPORT), parse_constant=lambda name: pytest.fail(f"{name} is not JSON"))
    assert content["versions"] == {"mcir": "x"}
    assert content["results"]["Set"]["spn"]["images"][2] == {"key": "k2", "psnr": 33.8, "ssim": 0.93}
    assert content["results"]["One"]["spn"]["mean"]["psnr"] == "inf"
    entry = content["differences"][0]
    assert (entry["set"], entry["weights"], entry["against"], entry["metric"]) == ("Set", "spn", "plain", "psnr")
    assert entry["mean"] == pytest.approx(0.5)


def test_files_are_whole_or_absent(tmp_path):
    (tmp_path / "file").write_text("x")
    for path, folder in ((tmp_path, False), (tmp_path / "file", True), (tmp_path / "file" / "inside.json", False)):
        with pytest.raises(UserError, match=str(tmp_path)):
            require_writable(path, folder)
    require_writable(tmp_path / "new" / "deep" / "x.json")
    assert not (tmp_path / "new").exists()
    write_whole(tmp_path / "new" / "x.json", b"1")
    assert [path.name for path in (tmp_path / "new").iterdir()] == ["x.json"]
    with pytest.raises(UserError, match="cannot be written"):
        write_whole(tmp_path / "file" / "x.json", b"1")
    (tmp_path / "link").symlink_to(tmp_path / "file")
    write_whole(tmp_path / "link", b"2")
    assert (tmp_path / "link").is_symlink()
    assert (tmp_path / "file").read_bytes() == b"2"
    os.mkfifo(tmp_path / "fifo")
    with pytest.raises(UserError, match="no ordinary file"):
        require_writable(tmp_path / "fifo")
    write_whole(tmp_path / ("n" * 250), b"3")
