import torch

from mcir.evaluation.pictures import LABEL, detail_window, side_by_side


def test_the_detail_is_where_the_pictures_differ_most():
    first, second = torch.zeros(3, 400, 600), torch.zeros(3, 400, 600)
    second[:, 300:320, 40:60] = 0.1  # little, in a corner that the central part leaves out
    top, left, side = detail_window([first, second])
    assert top <= 300
    assert left <= 40
    assert top + side >= 320
    assert left + side >= 60
    row = side_by_side({"a": first, "b": second}, [first, second])
    assert row.shape[2] == 2 * 384
    detail = row[:, LABEL + 384 + 4 :]
    times = 384 // side
    assert detail.shape[1] == times * side
    assert detail[0, :, 384:].eq(second[0, 310, 50]).sum() == (20 * times) ** 2  # enlarged, each pixel a square
    assert not detail[:, :, : times * side].any()
