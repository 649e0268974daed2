from __future__ import annotations

import numpy as np
import pytest
import torch

from malib.miniflux import evaluator, rendering, scenes
from malib.miniflux.scenes import Scene, Subject


def pixels(chosen: list[Scene]) -> np.ndarray:
    return np.stack([(rendering.render(s).image * 255).round().astype(np.uint8) for s in chosen])


@pytest.fixture(scope="module")
def chosen() -> list[Scene]:
    return [scenes.sample_scene(4_000_000_000 + i, unseen=bool(i % 2)) for i in range(200)]


def test_it_reads_renderings_that_it_has_not_seen(chosen: list[Scene]) -> None:
    reading = evaluator.predict(pixels(chosen))
    hits = evaluator.prompt_adherence(reading, chosen)
    for name in ("shape", "colour", "size", "position", "background", "pattern"):
        assert hits[name].mean() >= 0.97, name  # the card has the numbers on 1,000 renderings
    truth = np.stack([rendering.render(s).mask for s in chosen])
    iou = (reading.masks & truth).sum((1, 2)) / (reading.masks | truth).sum((1, 2))
    assert iou.mean() >= 0.9


def test_it_sees_no_subject_where_there_is_none(chosen: list[Scene]) -> None:
    empty = np.stack([(rendering.empty(s) * 255).round().astype(np.uint8) for s in chosen[:40]])
    reading = evaluator.predict(empty)
    assert (reading.words["shape"] == "none").mean() > 0.95 and reading.masks.mean() < 0.01


def test_accuracy_counts_the_right_attributes() -> None:
    """A picture of one scene held against captions that differ in one attribute each."""
    shown = Scene((Subject("star", "red", "large", "left"),), "striped", "blue", 5)
    captions = {
        "shape": Scene((Subject("ring", "red", "large", "left"),), "striped", "blue"),
        "colour": Scene((Subject("star", "white", "large", "left"),), "striped", "blue"),
        "size": Scene((Subject("star", "red", "small", "left"),), "striped", "blue"),
        "background": Scene((Subject("star", "red", "large", "left"),), "striped", "green"),
        "pattern": Scene((Subject("star", "red", "large", "left"),), "checkered", "blue"),
    }
    hits = evaluator.prompt_adherence(evaluator.predict(pixels([shown] * 6)), [shown, *captions.values()])
    assert hits["all"].tolist() == [True] + [False] * 5 and hits["position"].all()
    for i, name in enumerate(captions, 1):
        wrong = [a for a in captions if not hits[a][i]]
        assert wrong == [name]
    two = Scene((shown.subjects[0], Subject("ring", "green", "small", "right")), "striped", "blue")
    assert not evaluator.prompt_adherence(evaluator.predict(pixels([shown])), [two])["position"][0]


def test_the_loss_ignores_what_a_mixture_does_not_show() -> None:
    rng = np.random.default_rng(0)
    images = torch.zeros(64, 64, 64, 3, dtype=torch.uint8)
    labels, words = torch.ones(64, 64, 64, dtype=torch.uint8), torch.zeros(64, 11, dtype=torch.long)
    _, labels, words = evaluator._distorted(images, labels, words, rng)
    mixed = (labels == -100).all((1, 2))
    assert 0 < mixed.sum() < 20
    assert (words[mixed][:, 0:9:3] == len(scenes.SHAPES)).all() and (words[mixed][:, 9:] == -100).all()
    assert (words[~mixed] == 0).all()


def test_a_subject_that_is_not_seen_has_no_colour_and_no_size() -> None:
    """Whatever words the evaluator has for an empty place."""
    scene = Scene((Subject("star", "red", "large", "left"),), "striped", "blue")
    words = {"shape": np.array([["none"] * 3]), "colour": np.array([["red"] * 3]), "size": np.array([["large"] * 3])}
    words |= {"background": np.array(["blue"]), "pattern": np.array(["striped"])}
    hits = evaluator.prompt_adherence(
        evaluator.Prediction(words, {}, np.zeros((1, 64, 64), bool), np.zeros((1, 128))), [scene]
    )
    assert [name for name, hit in hits.items() if hit[0]] == ["background", "pattern"]


def test_other_images_are_refused() -> None:
    with pytest.raises(ValueError, match="the evaluator takes uint8"):
        evaluator.predict(np.zeros((2, 32, 32, 3), np.uint8))


def test_reliability_is_the_closed_form() -> None:
    """Ten answers at .95 of which nine are right, ten at .55 of which eight are: (.05 * 10 + .25 * 10) / 20."""
    confidence, right = np.repeat([0.95, 0.55], 10), np.array([1] * 9 + [0] + [1] * 8 + [0] * 2)
    curve, error = evaluator.reliability(confidence, right)
    assert error == pytest.approx(0.15)
    assert [b["n"] for b in curve] == [10, 10] and [b["right"] for b in curve] == pytest.approx([0.8, 0.9])


def test_its_confidence_is_a_probability_at_the_fitted_temperature() -> None:
    """Fifty times the temperature, less confidence, the same words."""
    images = np.stack(
        [(rendering.render(scenes.sample_scene(4_200_000_000 + i)).image * 255).astype(np.uint8) for i in range(8)]
    )
    fitted, hot = evaluator.predict(images), evaluator.Evaluator()
    hot.load_state_dict(evaluator.load_evaluator().state_dict())
    hot.temperature *= 50
    warm = evaluator.predict(images, hot.eval())
    assert (warm.words["background"] == fitted.words["background"]).all()
    assert (warm.confidence["background"] <= fitted.confidence["background"]).all()
    assert (warm.confidence["background"] < fitted.confidence["background"]).any()


def test_the_outline_of_a_small_subject_weighs_as_much_as_that_of_a_large_one() -> None:
    """1 - IoU in closed form: one subject found by half, another found but with as much again beside it; a mixture apart."""
    labels = torch.zeros(4, 8, 8, dtype=torch.long)
    labels[0, :2, :2], labels[1, :, :4], labels[2] = 1, 2, -100
    found = torch.zeros(4, 8, 8)
    found[0, :1, :2], found[1], found[2] = 1, 1, 1  # IoU 1/2, 1/2; the mixture and the empty scene do not count
    segments = torch.stack([(1 - found) * 100, found * 100, found * 0 - 100, found * 0 - 100], dim=1)
    assert evaluator._outside(segments, labels).item() == pytest.approx(0.5, abs=1e-6)
    segments[0, 0], segments[0, 1:] = 100, -100  # nothing found in the first
    assert evaluator._outside(segments, labels).item() == pytest.approx((1 + 0.5) / 2, abs=1e-6)
