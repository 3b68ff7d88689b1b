import math

import numpy as np
import pytest
import torch
from PIL import Image

from mcir.evaluation.divergence import agreement, difference, save_divergence


def test_models_that_differ_where_it_rained_agree_with_the_rain(tmp_path):
    clean = torch.full((3, 20, 30), 0.5)
    rain = torch.zeros(20, 30)
    rain[:, 10:12] = 0.3
    first, second = clean.clone(), clean + 0.1 * rain
    assert save_divergence(tmp_path / "a.png", clean + rain, clean, first, second) == pytest.approx(1)
    assert save_divergence(tmp_path / "b.png", clean + rain, clean, first, clean + 0.1 * (0.3 - rain)) < -0.99
    picture = np.asarray(Image.open(tmp_path / "a.png"))
    assert picture.shape == (20, 120, 3)
    assert (picture[:, 30:60] == 128).all()  # the first model's output
    for panel in (2, 3):
        columns = picture[:, panel * 30 : panel * 30 + 30].sum((0, 2))
        assert columns[10:12].min() == 20 * 3 * 255  # white where it rained
        assert columns[:10].max() == columns[12:].max() == 0


def test_super_resolution_and_flat_maps(tmp_path):
    clean = torch.rand(3, 24, 36)
    value = save_divergence(tmp_path / "a.png", torch.rand(3, 12, 18), clean, clean, clean)
    assert math.isnan(value)  # two equal models say nothing
    assert np.asarray(Image.open(tmp_path / "a.png")).shape == (24, 144, 3)
    with pytest.raises(ValueError, match="Sizes differ"):
        save_divergence(tmp_path / "b.png", clean, clean, clean, clean[:, 1:])


def test_difference_and_agreement_are_what_they_say():
    first, second = torch.rand(3, 4, 5), torch.rand(3, 4, 5)
    np.testing.assert_allclose(difference(first, second), np.abs(first.numpy() - second.numpy()).mean(0), rtol=1e-6)
    expected = np.corrcoef(first[0].flatten(), second[0].flatten())[0, 1]
    assert agreement(first[0], second[0]) == pytest.approx(expected, abs=1e-6)
