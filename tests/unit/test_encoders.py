"""Text encoders: the loss, the labels of the nouns, and what a short training learns."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from malib.miniflux import encoders, scenes

from ..closeness import assert_close


def test_the_contrastive_loss_is_that_of_a_loop() -> None:
    texts, images = torch.randn(2, 5, 8, generator=torch.Generator().manual_seed(0))
    total = 0.0
    for a, b in ((texts, images), (images, texts)):
        for i in range(5):
            scores = torch.stack([3.0 * torch.cosine_similarity(a[i], b[j], dim=0) for j in range(5)])
            total += float(-scores.log_softmax(0)[i]) / 10
    found = encoders.contrastive_loss(texts, images, torch.tensor(3.0).log())
    assert_close(found, total)


def test_the_nouns_of_a_caption_are_found_in_the_order_of_the_subjects() -> None:
    caption = "a small donut on the left and a large woven red plus, on a speckled blue background"
    words = caption.replace(",", " ,").split()
    subjects, background = encoders.noun_positions(encoders.tokens([caption, "a star"], bos=False))
    assert subjects.tolist() == [[words.index("donut"), words.index("plus")], [1, -1]]
    assert background.tolist() == [words.index("background"), -1]


def test_an_attribute_that_the_caption_does_not_name_is_no_target() -> None:
    subject = scenes.Subject("star", "red", "large", "left", "brick")
    scene = scenes.Scene((subject,), "woven", "blue")
    table = encoders.labels([scene], [{"shape", "colour", "texture", "pattern"}])
    assert table["shape"].tolist() == [[scenes.SHAPES.index("star"), -100]]
    assert table["texture"].tolist() == [[3, -100]] and table["pattern"].tolist() == [4]
    assert table["size"].tolist() == [[-100, -100]] and table["background"].tolist() == [-100]


def test_a_paraphrase_names_what_it_says_that_it_names() -> None:
    """Every named attribute is in the words or their synonyms; no attribute that is left out is."""
    for i in range(400):
        scene = scenes.sample_scene(i, 1, textured=True)
        text, named = scenes.paraphrase_and_names(scene, np.random.default_rng(i))
        words, subject = set(text.replace(",", " ").split()), scene.subjects[0]
        for name in ("shape", "colour", "size", "position"):
            assert bool(words & set(scenes.names_of(getattr(subject, name)))) == (name in named), (text, name)
        assert bool(words & set(scenes.names_of(scene.background))) == ("background" in named)
        if scene.pattern != subject.texture:
            assert bool(words & set(scenes.names_of(scene.pattern))) == ("pattern" in named)


@pytest.mark.slow
def test_a_short_training_of_t5_learns_the_attributes() -> None:
    """The real training reaches .98 everywhere; 150 small steps are far above chance already."""
    encoder = encoders.train_t5(steps=150, batch=64)
    table = encoders.read_out(encoders.build_clip().eval(), encoder, count=600)["noun"]
    assert min(table["shape"], table["size"], table["position"]) > 0.95
    assert table["background"] > 0.5 and table["texture"] > 0.5
