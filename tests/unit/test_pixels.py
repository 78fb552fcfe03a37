"""Images are brought to the shape that the model takes, as other libraries would."""

from __future__ import annotations

import numpy as np
import pytest

from gradstore.adapters.images.pixels import Preparation
from gradstore.errors import DataError
from tests.pictures import draw


@pytest.mark.parametrize("shape", [(5, 6), (5, 6, 1), (1, 5, 6), (5, 6, 3), (3, 5, 6)])
def test_channels_come_first_and_nothing_else_changes(shape: tuple[int, ...]) -> None:
    (pixels,), _ = draw(1, shape)

    found = Preparation()(pixels, "x")

    expected = pixels[None] if pixels.ndim == 2 else pixels if shape[0] in (1, 3) else np.moveaxis(pixels, 2, 0)
    np.testing.assert_array_equal(found, expected)
    assert found.flags.owndata
    assert found.flags.c_contiguous


def test_colours_become_gray_as_pillow_has_it_and_gray_becomes_three_equal_channels() -> None:
    from PIL import Image

    (pixels,), _ = draw(1, (20, 30, 3))
    gray = np.asarray(Image.fromarray(pixels).convert("L"))

    np.testing.assert_array_equal(Preparation(channels=1)(pixels, "x")[0], gray)
    np.testing.assert_array_equal(Preparation(channels=3)(gray, "x"), np.stack([gray] * 3))


@pytest.mark.parametrize("size", [(7, 5), (40, 61), (20, 30)])
def test_a_resized_image_is_pillows_within_its_rounding(size: tuple[int, int]) -> None:
    from PIL import Image

    (pixels,), _ = draw(1, (20, 30, 3))

    found = Preparation(size=size)(pixels, "x")

    expected = np.asarray(Image.fromarray(pixels).resize(size[::-1], Image.Resampling.BILINEAR))
    assert found.shape == (3, *size)
    # Pillow rounds to bytes between its two passes.
    assert np.abs(found.astype(int) - np.moveaxis(expected, 2, 0).astype(int)).max() <= 1


@pytest.mark.parametrize(
    ("pixels", "message"),
    [
        (np.zeros((4, 4), np.float32), r"x holds float32; images are uint8, from 0 to 255"),
        (np.zeros((4, 4, 2), np.uint8), r"x has shape \[4, 4, 2\]; an image is"),
        (np.zeros((4,), np.uint8), r"x has shape \[4\]; an image is"),
        (np.zeros((3, 8, 3), np.uint8), r"x has shape \[3, 8, 3\], whose channels may be the first or the last"),
    ],
)
def test_what_is_no_image_is_refused(pixels: np.ndarray, message: str) -> None:
    with pytest.raises(DataError, match=message):
        Preparation()(pixels, "x")
