import io
import math

import pytest
from PIL import Image

from mcir.evaluation.plots import differences_png, draw_differences, figure, label_rows
from mcir.evaluation.report import Report, difference
from tests.evaluation.test_report import REPORT, scores


def test_each_difference_is_where_it_belongs():
    values, reference = [1.0, 1.0, 1.0, 1.0, math.inf], [0.0, 2.0, 1.0, 1.0, 1.0]
    _, ((panel,),) = figure(1, 1, 2)
    draw_differences(
        panel, 0, [a - b for a, b in zip(values, reference, strict=True)], difference(values[:4], reference[:4])
    )
    label_rows(panel, ["b - a"])
    bar, dots, mean, zero = (list(line.get_xdata()) for line in panel.lines)
    half = 3.182446 * math.sqrt(2 / 3) / 2  # t of 3 degrees, s = sqrt(2 / 3), n = 4
    assert bar == pytest.approx([-half, half], rel=1e-6)
    assert dots == [1, -1, 0, 0]
    assert (mean, zero) == ([0], [0, 0])
    assert [label.get_text() for label in panel.get_yticklabels()] == ["b - a"]


def test_the_plot_is_a_picture_with_a_row_for_each_set_and_pair():
    sizes = []
    for report in (REPORT, Report({"s": {"a": scores([1], [1]), "b": scores([0], [1])}}, False, {})):
        picture = Image.open(io.BytesIO(differences_png(report)))
        assert len(picture.convert("RGB").getcolors(2**16)) > 2
        sizes.append(picture.size)
    assert sizes[0][0] == sizes[1][0]
    assert sizes[0][1] > sizes[1][1]
