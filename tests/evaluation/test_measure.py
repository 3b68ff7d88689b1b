"""Pictures of measured images: where they may go, and side by side."""

import io

import pytest
import torch
from PIL import Image

from mcir.errors import UserError
from mcir.evaluation.evaluate import Picture
from mcir.evaluation.measure import inside, rows_png
from mcir.evaluation.pictures import LABEL


@pytest.mark.parametrize("key", ["../outside", "a/../../outside", "/etc/outside"])
def test_a_key_of_the_dataset_leads_nowhere_else(tmp_path, key):
    with pytest.raises(UserError, match="is no file name"):
        inside(tmp_path / "set", key)
    assert inside(tmp_path, "scene/1") == tmp_path / "scene" / "1.png"


def test_rows_of_degraded_restored_by_each_and_clean():
    def shown(restored, side):
        return Picture(
            "k", torch.zeros(3, side // 2, side // 2), torch.full((3, side, side), restored), torch.ones(3, side, side)
        )

    first, second = [shown(0.2, 10), shown(0.2, 20)], [shown(0.4, 10), shown(0.4, 20)]
    image = Image.open(io.BytesIO(rows_png({"a": first, "b": second})))
    heights = [LABEL + 2 * side + 4 for side in (10, 20)]  # label, picture, line, detail
    assert image.size == (4 * 20, sum(heights))
    for y in (heights[0] + LABEL + 10, heights[0] + LABEL + 30):
        assert [image.getpixel((20 * i + 10, y))[0] for i in range(4)] == [0, 51, 102, 255]
    assert [image.getpixel((10 * i + 5, LABEL + 5))[0] for i in range(5)] == [0, 51, 102, 255, 255]  # white beside it
    assert min(image.crop((0, heights[0], 20, heights[0] + LABEL)).convert("L").get_flattened_data()) < 100  # letters
