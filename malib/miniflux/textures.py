"""Fine textures with energy at periods of 2 to 4 pixels, whose exact map and spectrum are known."""

from __future__ import annotations

import numpy as np

TEXTURES = ("woven", "speckled", "brick")
CONTRAST = 0.1
"""Standard deviation of a texture in luminance, of which white has 1."""


def texture_map(name: str, size: int, rng: np.random.Generator) -> np.ndarray:
    """Return a texture of mean 0 and standard deviation 1.

    Args:
        name: one of ``TEXTURES``.
        size: side in pixels.
        rng: decides about phase, period and speckles.

    Returns:
        float64 (size, size). "woven": a product of two waves with periods of 2.6 to 3.6 pixels. "speckled": noise with
        frequencies between 1/4 and 1/2 cycles per pixel. "brick": rows of 4 pixels with joints every 4 pixels, shifted by
        half a brick from row to row.

    Raises:
        ValueError: an unknown name.
    """
    rows, columns = np.mgrid[0:size, 0:size]
    if name == "woven":
        periods, phases = rng.uniform(2.6, 3.6, 2), rng.uniform(0, 2 * np.pi, 2)
        values = np.sin(2 * np.pi * columns / periods[0] + phases[0]) * np.sin(2 * np.pi * rows / periods[1] + phases[1])
    elif name == "speckled":
        spectrum = np.fft.rfft2(rng.standard_normal((size, size)))
        frequency = np.hypot(np.fft.fftfreq(size)[:, None], np.fft.rfftfreq(size))
        values = np.fft.irfft2(spectrum * ((frequency >= 0.25) & (frequency <= 0.5)), (size, size))
    elif name == "brick":
        top, left = rng.integers(4, size=2)
        row = (rows + top) // 4
        joint = ((rows + top) % 4 == 0) | ((columns + left + 2 * (row % 2)) % 4 == 0)
        values = -joint.astype(float)
    else:
        raise ValueError(f"'{name}' is not a texture; use {', '.join(TEXTURES)}.")
    values = values - values.mean()
    return values / values.std()
