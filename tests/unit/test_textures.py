"""Fine textures: their spectrum is where it should be, and scenes without them are as before."""

from __future__ import annotations

import numpy as np
import pytest

from malib.miniflux import rendering, scenes
from malib.miniflux.textures import CONTRAST, TEXTURES, texture_map


@pytest.mark.parametrize("name", TEXTURES)
def test_the_energy_of_a_texture_is_at_periods_of_two_to_four_pixels(name: str) -> None:
    frequency = np.hypot(np.fft.fftfreq(64)[:, None], np.fft.fftfreq(64))
    for seed in range(5):
        values = texture_map(name, 64, np.random.default_rng(seed))
        power = np.abs(np.fft.fft2(values)) ** 2
        assert values.mean() == pytest.approx(0, abs=1e-12) and values.std() == pytest.approx(1)
        assert power[frequency >= 0.24].sum() / power.sum() > 0.99


def test_each_seed_has_its_own_texture_and_an_unknown_one_is_refused() -> None:
    one, again, other = (texture_map("speckled", 64, np.random.default_rng(s)) for s in (0, 0, 1))
    assert (one == again).all() and abs(np.corrcoef(one.ravel(), other.ravel())[0, 1]) < 0.1
    with pytest.raises(ValueError, match="use woven, speckled, brick"):
        texture_map("mossy", 64, np.random.default_rng(0))
    with pytest.raises(ValueError, match="'mossy' is not one of"):
        scenes.Subject("star", "red", texture="mossy")


def test_textures_change_nothing_else_of_a_scene() -> None:
    for seed in range(40):
        plain, fine = scenes.sample_scene(seed), scenes.sample_scene(seed, textured=True)
        without = [(s.shape, s.colour, s.size, s.position) for s in fine.subjects]
        assert without == [(s.shape, s.colour, s.size, s.position) for s in plain.subjects]
        assert (fine.background, fine.seed) == (plain.background, plain.seed)
        assert fine.pattern in (plain.pattern, *TEXTURES)
        if fine.pattern == plain.pattern:  # another pattern draws other numbers before the subjects
            assert (rendering.render(fine).labels == rendering.render(plain).labels).all()


def test_the_texture_is_known_exactly() -> None:
    """What the texture adds to the luminance is the difference from the same scene with a plain surface."""
    fine = scenes.Scene((scenes.Subject("square", "blue", texture="woven"),), "plain", "green", seed=5)
    plain = scenes.Scene((scenes.Subject("square", "blue"),), "plain", "green", seed=5)
    drawn, bare = rendering.render(fine), rendering.render(plain)
    assert np.allclose((drawn.image - bare.image) @ rendering.LUMINANCE, drawn.texture, atol=1e-6)
    assert not bare.texture.any() and not drawn.texture[drawn.labels == 0][:500].any()
    inside = drawn.texture[drawn.labels > 0]
    assert inside.std() == pytest.approx(CONTRAST, rel=0.15)


def test_captions_name_the_textures_with_known_words() -> None:
    subject = scenes.Subject("star", "red", "large", "left", "woven")
    scene = scenes.Scene((subject,), "speckled", "blue")
    assert scene.caption == "a large woven red star on the left, on a speckled blue background"
    words = {w for c in scenes.captions(300, subjects=None, textured=True) for w in c.replace(",", " ,").split()}
    assert words <= set(scenes.TEXTURED_VOCABULARY) and set(TEXTURES) <= words
    assert scenes.TEXTURED_VOCABULARY[: len(scenes.VOCABULARY)] == scenes.VOCABULARY
    assert not set(TEXTURES) & set(scenes.VOCABULARY)


def test_textures_come_in_the_stated_shares() -> None:
    drawn = [scenes.sample_scene(i, 1, textured=True) for i in range(3000)]
    assert np.mean([s.pattern in TEXTURES for s in drawn]) == pytest.approx(3 / 7, abs=0.03)
    assert np.mean([s.subjects[0].texture != "plain" for s in drawn]) == pytest.approx(3 / 5, abs=0.03)
