"""The model that ships: it opens, it draws what the caption says, and it has massive activations."""

from __future__ import annotations

import hashlib
import subprocess
import sys

import pytest

import malib
from malib import analysis
from malib.miniflux import evaluator, scenes
from malib.presets import data_folder


@pytest.fixture(scope="module")
def dit() -> malib.DiT:
    return malib.load(cache=False, device="cpu")


@pytest.mark.slow
def test_plain_diffusers_opens_it_without_malib() -> None:
    code = (
        "import sys; from diffusers import DiffusionPipeline; "
        f"p = DiffusionPipeline.from_pretrained({str(data_folder() / 'mini-flux')!r}); "
        "assert type(p).__name__ == 'FluxPipeline' and 'malib' not in sys.modules"
    )
    subprocess.run([sys.executable, "-c", code], check=True)


def test_data_is_small_enough_to_clone() -> None:
    assert sum(p.stat().st_size for p in data_folder().rglob("*") if p.is_file()) <= 40e6


def test_every_file_has_its_checksum() -> None:
    listed = dict(line.split("  ./")[::-1] for line in (data_folder() / "SHA256SUMS").read_text().splitlines())
    files = [p for p in data_folder().rglob("*") if p.is_file() and p.name != "SHA256SUMS"]
    found = {p.relative_to(data_folder()).as_posix(): hashlib.sha256(p.read_bytes()).hexdigest() for p in files}
    assert found == listed, "a file in data/ has changed; if on purpose, run make checksums"


@pytest.mark.slow
def test_images_follow_the_caption(dit: malib.DiT) -> None:
    """On captions of unseen combinations the evaluator finds position and colours in nearly all images."""
    chosen = [scenes.sample_scene(3_000_000_000 + i, subjects=1, unseen=True) for i in range(24)]
    hits = evaluator.prompt_adherence(evaluator.predict(dit.generate([s.caption for s in chosen], steps=10).images), chosen)
    assert all(hits[name].mean() >= 0.8 for name in ("position", "background", "colour"))


def test_its_top_channel_towers_over_the_median(dit: malib.DiT) -> None:
    stats = dit.generate(
        scenes.captions(4), steps=4, record=[malib.ChannelStats(branches="cond", top=0)]
    ).records.channel_stats
    lead = analysis.top_ratios(stats.score.mean(("sample", "step")), (1, 192)).squeeze("branch")
    assert float(lead.sel(rank=1).max()) > 10 and float(lead.sel(rank=192).max()) < 1.1


def test_an_unknown_word_is_named(dit: malib.DiT) -> None:
    with pytest.warns(UserWarning, match="'giraffe'"):
        dit.generate("a red giraffe on the left", steps=1)


def test_comparison_shows_one_column_a_generation(dit: malib.DiT) -> None:
    base = dit.generate("a red star", steps=1)
    hurt = dit.generate("a red star", steps=1, edits=[malib.Disrupt(malib.TopK(8))])
    html = (base | hurt | base)._repr_html_()
    assert html.count("<th ") == 3 and html.count("<img") == 3
    assert html.count("unedited") == 2 and "Disrupt(channels=TopK(k=8))" in html
    other = dit.generate("a blue ring", steps=1, edits=[malib.Disrupt(malib.TopK(8), layers=(0, 1, 2), mode="mean")])
    html = (base | dit.generate("a blue ring", steps=1) | other)._repr_html_()
    assert "unedited" not in html and html.count(">a red star<") == html.count(">a blue ring<") == 1
    assert "Disrupt(layers=0-2, channels=TopK(k=8), mode=mean)" in html
    three = malib.Transport(malib.TopK(2), ["a star", "a ring", "a cross"], strength=1 / 3)
    html = dit.generate(["a circle"] * 3, steps=1, edits=[three])._repr_html_()
    assert "source=a star, a ring, a cross, strength=0.333" in html


@pytest.mark.parametrize("bad", ["no/such/model/here", "./nowhere"])
def test_a_missing_model_gets_one_sentence(bad: str) -> None:
    with pytest.raises(FileNotFoundError, match="could not be opened"):
        malib.load(bad)
    with pytest.raises(ValueError, match="dtype"):
        malib.load(dtype="int8")
