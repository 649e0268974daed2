from __future__ import annotations

import numpy as np
import pytest

from malib.miniflux import rendering, scenes
from malib.miniflux.scenes import Scene, Subject


def test_a_seed_fixes_scene_caption_and_pixels() -> None:
    a, b = (scenes.sample_scene(11) for _ in range(2))
    assert a == b and np.array_equal(rendering.render(a).image, rendering.render(b).image)
    assert scenes.sample_scene(12) != a
    again = scenes.with_seed(a, a.seed + 1)
    assert again.caption == a.caption and not np.array_equal(rendering.render(again).image, rendering.render(a).image)


def test_captions_follow_the_grammar() -> None:
    scene = Scene((Subject("star", "orange", "large", "left"), Subject("ring", "red", "small", "center")), "striped", "blue")
    assert scene.caption == (
        "a large orange star on the left and a small red ring in the center, on a striped blue background"
    )


def test_every_word_that_can_occur_is_in_the_vocabulary() -> None:
    rng = np.random.default_rng(0)
    words = set()
    for seed in range(400):
        scene = scenes.sample_scene(seed)
        for text in (scene.caption, scenes.paraphrase(scene, rng)):
            words |= set(text.replace(",", " , ").split())
    assert words <= set(scenes.VOCABULARY)
    assert len(words) > 0.8 * len(scenes.VOCABULARY)


def test_held_out_combinations_are_never_trained_on_and_one_in_eight() -> None:
    every = [
        Subject(shape, colour, size, position)
        for shape in scenes.SHAPES
        for colour in scenes.COLOURS
        for size in scenes.SIZES
        for position in scenes.POSITIONS
    ]
    assert sum(map(scenes.held_out, every)) * 8 == len(every)
    for seed in range(300):
        assert not any(map(scenes.held_out, scenes.sample_scene(seed).subjects))
        assert all(map(scenes.held_out, scenes.sample_scene(seed, unseen=True).subjects))


@pytest.mark.parametrize("shape", scenes.SHAPES)
@pytest.mark.parametrize("position", scenes.POSITIONS)
def test_masks_are_where_and_as_large_as_the_caption_says(shape: str, position: str) -> None:
    areas = {}
    for size in scenes.SIZES:
        mask = rendering.render(Scene((Subject(shape, "red", size, position),), "plain", "white", 3)).mask
        columns = np.nonzero(mask)[1]
        centre = {"left": 18, "center": 32, "right": 46}[position]
        assert abs(columns.mean() - centre) < 4
        areas[size] = mask.sum()
    assert areas["large"] > 1.8 * areas["small"]


def test_mask_areas_against_closed_forms() -> None:
    """Circle, square and cross at a known radius, drawn by the same distance function as the scenes."""
    for shape, area in {
        "circle": np.pi * 13**2,
        "square": (2 * 0.86 * 13) ** 2,
        "cross": 20 * (0.35 * 13) ** 2,
        "ring": np.pi * 13**2 * (1.02**2 - 0.5**2),
        "triangle": 3 * np.sqrt(3) / 4 * (1.2 * 13) ** 2,
        "star": 10 * 0.5 * 1.2 * 0.5 * 13**2 * np.sin(np.pi / 5),
    }.items():
        inside = (rendering._signed_distance(shape, 32.3, 31.6, 13.0, 0.1) <= 0).sum()
        assert abs(inside - area) < 0.03 * area + 4, shape


def test_the_mask_is_the_subject_and_nothing_else() -> None:
    """Same scene with another subject colour: pixels change inside the mask and its rim, and nowhere else."""
    one = rendering.render(Scene((Subject("star", "red", "large", "center"),), "striped", "blue", 5))
    two = rendering.render(Scene((Subject("star", "green", "large", "center"),), "striped", "blue", 5))
    changed = np.abs(one.image - two.image).max(-1) > 1e-6
    assert np.array_equal(one.labels, two.labels)
    assert changed[one.mask].mean() > 0.95
    grown = one.mask.copy()
    for axis in (0, 1):  # two pixels: a tip of the star may pass between pixel centres
        grown = np.logical_or.reduce([np.roll(grown, shift, axis) for shift in range(-2, 3)])
    assert not (changed & ~grown).any()


def test_two_subjects_have_their_own_labels_and_do_not_overlap() -> None:
    for seed in range(60):
        scene = scenes.sample_scene(seed, subjects=2)
        labels = rendering.render(scene).labels
        alone = rendering.render(Scene(scene.subjects[:1], scene.pattern, scene.background, seed))
        assert set(np.unique(labels)) == {0, 1, 2} and alone.labels.max() == 1
        columns = [np.nonzero(labels == i)[1].mean() for i in (1, 2)]
        order = [scenes.POSITIONS.index(s.position) for s in scene.subjects]
        assert (columns[0] < columns[1]) == (order[0] < order[1])


@pytest.mark.parametrize(
    ("make", "words"),
    [
        (lambda: Subject("blob", "red"), "blob"),
        (lambda: Scene((), "plain", "red"), "one or two"),
        (lambda: Scene((Subject("star", "red"), Subject("ring", "blue")), "plain", "white"), "have the same position"),
        (lambda: Scene((Subject("star", "red"),), "dotted", "white"), "dotted"),
    ],
)
def test_bad_scenes_are_refused(make, words: str) -> None:
    with pytest.raises(ValueError, match=words):
        make()


def test_captions_are_distinct_and_a_longer_list_begins_with_the_shorter() -> None:
    assert scenes.captions(20)[:7] == scenes.captions(7) and len(set(scenes.captions(200))) == 200


def test_pairs_differ_in_every_attribute_and_stay_the_same() -> None:
    found = scenes.pairs(20)
    assert found == scenes.pairs(30)[:20] and found != scenes.pairs(20, seed=1)
    for target, source in found:
        assert all(a != b for a, b in zip(scenes.attributes(target), scenes.attributes(source), strict=True))
        assert source.subjects[0].colour != target.background


@pytest.mark.parametrize("attribute", ["shape", "colour", "size", "position", "background", "pattern"])
def test_variants_differ_in_one_attribute_alone(attribute: str) -> None:
    place = ("shape", "colour", "size", "position", "background", "pattern").index(attribute)
    for target, source in scenes.variants(12, attribute):
        told = [a != b for a, b in zip(scenes.attributes(target), scenes.attributes(source), strict=True)]
        assert told[place] and sum(told) == 1 and target.seed == source.seed
        assert source.subjects[0].colour != source.background
    with pytest.raises(ValueError, match="not an attribute"):
        scenes.variants(1, "mood")
