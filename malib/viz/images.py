"""Image files as arrays."""

from __future__ import annotations

import struct
from contextlib import suppress
from pathlib import Path

import numpy as np


def open_image(source: str | Path | bytes, size: tuple[int, int]) -> np.ndarray:
    """Read an image file: rotated by its EXIF, on white where it is transparent, cropped to the centre.

    Args:
        source: path of a PNG, JPEG, WebP, ... file, or its bytes, as an upload widget gives them.
        size: (height, width) of the result in pixels.

    Returns:
        uint8 (1, height, width, 3).

    Raises:
        ValueError: there is no such file, or it is not an image.
    """
    import io

    from PIL import Image, ImageOps, UnidentifiedImageError

    name = "The image" if isinstance(source, bytes) else f"'{source}'"
    try:
        with Image.open(io.BytesIO(source) if isinstance(source, bytes) else source) as opened:
            opened.load()
            with suppress(struct.error, ValueError, SyntaxError):  # a damaged EXIF block leaves the image intact
                ImageOps.exif_transpose(opened, in_place=True)
            turned = opened.convert("RGBA")
    except (OSError, SyntaxError, ValueError, struct.error, EOFError, Image.DecompressionBombError) as error:
        text = "not a known format" if isinstance(error, UnidentifiedImageError) else str(error)
        reason = (text.splitlines() or [type(error).__name__])[0][:120]
        raise ValueError(
            f"{name} could not be read as an image ({reason}); give a complete PNG, JPEG or WebP file."
        ) from error
    white = Image.new("RGBA", turned.size, "white")
    white.alpha_composite(turned)
    fitted = ImageOps.fit(white.convert("RGB"), (size[1], size[0]), Image.Resampling.LANCZOS)
    return np.asarray(fitted, dtype=np.uint8)[None].copy()
