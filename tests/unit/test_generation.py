from __future__ import annotations

import io

import numpy as np
import pytest
from PIL import Image

from malib.viz.images import open_image


def test_a_picture_is_turned_flattened_and_cropped(tmp_path) -> None:
    """A transparent, sideways picture of 40 x 20: left half red, right half clear; EXIF 6 turns it clockwise."""
    pixels = np.zeros((20, 40, 4), dtype=np.uint8)
    pixels[:, :20] = (255, 0, 0, 255)
    exif = Image.Exif()
    exif[0x0112] = 6
    path = tmp_path / "star.png"
    Image.fromarray(pixels, "RGBA").save(path, exif=exif)
    found = open_image(path, (32, 16))
    assert found.shape == (1, 32, 16, 3) and found.dtype == np.uint8
    assert (found[0, :14] == (255, 0, 0)).all() and (found[0, 18:] == 255).all()
    assert (open_image(path.read_bytes(), (32, 16)) == found).all()
    square = open_image(path, (16, 16))
    assert (square[0, :6] == (255, 0, 0)).all() and (square[0, 10:] == 255).all()


@pytest.mark.parametrize("mode", ["L", "P", "LA", "I;16", "CMYK"])
def test_any_mode_becomes_colours(mode: str) -> None:
    buffer = io.BytesIO()
    Image.new(mode, (9, 7)).save(buffer, "TIFF")
    assert open_image(buffer.getvalue(), (8, 8)).shape == (1, 8, 8, 3)


def test_what_is_no_picture_gets_one_sentence(tmp_path) -> None:
    buffer = io.BytesIO()
    Image.fromarray(np.random.default_rng(0).integers(0, 255, (64, 64, 3), dtype=np.uint8)).save(buffer, "PNG")
    for broken in (b"", b"no picture", buffer.getvalue()[:2000], tmp_path / "missing.png"):
        with pytest.raises(ValueError, match="give a complete PNG") as error:
            open_image(broken, (8, 8))
        assert "\n" not in str(error.value) and "0x" not in str(error.value)


def test_a_broken_exif_does_not_cost_the_picture() -> None:
    buffer, pixels = io.BytesIO(), np.full((8, 8, 3), 200, np.uint8)
    Image.fromarray(pixels).save(buffer, "PNG", exif=b"Exif\x00\x00II*\x00\xff\xff\xff\xff")
    assert (open_image(buffer.getvalue(), (8, 8)) == 200).all()
