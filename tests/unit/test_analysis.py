from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch
import xarray as xr

from malib import analysis
from malib.analysis import Estimate
from malib.miniflux import rendering, scenes

from ..closeness import assert_close


def test_bootstrap_matches_the_normal_interval_and_covers() -> None:
    rng = np.random.default_rng(0)
    values = rng.normal(2, 3, size=400)
    found = analysis.bootstrap(values)
    half = 1.96 * values.std() / np.sqrt(400)
    assert found.mean == pytest.approx(values.mean())
    assert found.low == pytest.approx(values.mean() - half, abs=0.1) and found.high == pytest.approx(
        values.mean() + half, abs=0.1
    )
    intervals = [analysis.bootstrap(rng.normal(0, 1, 100), 500, i) for i in range(1000)]
    coverage = np.mean([i.low < 0 < i.high for i in intervals])
    assert 0.925 <= coverage <= 0.97  # three standard errors of 1,000 repetitions around 95 %, and a little below


def test_interval_agrees_with_bootstrap_on_every_entry() -> None:
    values = xr.DataArray(np.random.default_rng(1).normal(size=(60, 2, 3)), dims=("prompt", "layer", "rank"))
    found = analysis.interval(values.transpose("layer", "prompt", "rank"))
    one = analysis.bootstrap(values.values[:, 1, 2])
    at = found.isel(layer=1, rank=2)
    assert float(at["mean"]) == pytest.approx(one.mean)
    assert float(at.low) == pytest.approx(one.low, abs=0.03) and float(at.high) == pytest.approx(one.high, abs=0.03)


def test_resample_takes_any_statistic() -> None:
    values = np.arange(50.0)
    found = analysis.resample(lambda chosen: float(np.median(values[chosen])), 50)
    assert found.mean == 24.5 and found.low < 24.5 < found.high and found.n == 50


def test_pairwise_has_the_width_of_a_mean_over_pairs() -> None:
    """J(i, j) = (a_i + a_j) / 2 has the mean of a over pairs, so the interval must be that of the mean of a."""
    a = np.random.default_rng(3).normal(size=80)
    found, plain = analysis.pairwise((a[:, None] + a) / 2), analysis.bootstrap(a)
    assert found.mean == pytest.approx(plain.mean)
    assert found.high - found.low == pytest.approx(plain.high - plain.low, rel=0.1)


@pytest.mark.parametrize("bad", [[], [1.0, np.nan], [[1.0]]])
def test_bootstrap_refuses_what_has_no_mean(bad) -> None:
    with pytest.raises(ValueError, match="vector of numbers"):
        analysis.bootstrap(np.array(bad))


def test_verdicts_need_the_whole_interval() -> None:
    assert analysis.load_claims()["few_channels"]["rule"] == {"at_least": 10.0}
    assert analysis.verdict("few_channels", Estimate(20, 11, 30, 5)) == "holds"
    assert analysis.verdict("few_channels", Estimate(20, 9, 30, 5)) == "undecided"
    assert analysis.verdict("few_channels", Estimate(5, 4, 9.9, 5)) == "does not hold"
    assert analysis.verdict("few_channels", Estimate(20, 19, 21, 4)) == "undecided"


@pytest.mark.parametrize(
    ("dose", "good", "bad"),
    [
        (1.0, "holds", "does not hold"),
        (0.6, "no fair control", "does not hold"),
        (1.6, "holds", "no fair control"),
        ([0.6, 1.4], "no fair control", "no fair control"),
        (np.nan, "no fair control", "no fair control"),
    ],
)
def test_a_control_speaks_only_where_it_changed_as_much(dose: float | list[float], good: str, bad: str) -> None:
    """One that changed less is no evidence for the massive channels, one that changed more none against them."""
    assert analysis.verdict("more_than_norm", Estimate(0.2, 0.1, 0.3, 9), dose) == good
    assert analysis.verdict("more_than_norm", Estimate(-0.2, -0.3, -0.1, 9), dose) == bad
    assert analysis.verdict("more_than_norm", Estimate(0, -0.3, 0.1, 9), dose) == "undecided"


def test_the_table_of_verdicts_says_what_the_control_changed() -> None:
    found = {"more_than_norm": Estimate(0.2, 0.1, 0.3, 9), "bottom_is_marginal": Estimate(0.01, 0, 0.02, 9)}
    table = analysis.verdicts(found, {"more_than_norm": [0.6, 1.0]}).data
    assert table["control changed"].tolist() == ["0.60 to 1.00", ""]
    assert table["verdict"].tolist() == ["no fair control", "holds"]
    plain = analysis.verdicts(found).data
    assert "control changed" not in plain and plain["verdict"].tolist() == ["holds", "holds"]
    assert plain["rule"].tolist() == ["at least 0", "at most 0.05"]


def test_a_difference_counts_where_the_amount_does_not_explain_it() -> None:
    little, much = Estimate(0.1, 0.05, 0.15, 9), Estimate(-0.3, -0.4, -0.2, 9)
    gap, none = Estimate(0.4, 0.3, 0.5, 9), Estimate(0.4, -0.1, 0.9, 9)
    doses = (0.5, 1.0, 2.0, np.nan)
    assert [analysis.differs_from_control(much, little, gap, x) for x in doses] == [False, True, True, False]
    assert [analysis.differs_from_control(little, much, gap, x) for x in doses] == [True, True, False, False]
    assert not analysis.differs_from_control(much, little, none, 1.0)


@pytest.mark.parametrize(("dose", "told"), [(0.5, "holds"), (1.0, "holds"), (2.0, "no fair control")])
def test_a_control_that_discards_more_proves_nothing_for_the_massive_channels(dose: float, told: str) -> None:
    assert analysis.verdict("ditf_hurt_more_than_energy", Estimate(0.2, 0.1, 0.3, 9), dose) == told


def test_an_unknown_claim_is_named_beside_the_known_ones() -> None:
    with pytest.raises(KeyError, match=r"'all_is_well' is not a claim; .*few_channels"):
        analysis.verdict("all_is_well", Estimate(0, 0, 0, 9))


def test_every_claim_is_complete() -> None:
    for name, claim in analysis.load_claims().items():
        assert {"notebook", "says", "source", "metric", "branch", "rule", "controls"} <= set(claim), name
        assert set(claim["rule"]) <= {"at_least", "at_most"} and len(claim["rule"]) == 1
        assert claim.get("larger_change", "lowers") == "lowers"


def test_detail_of_waves_is_the_closed_form() -> None:
    """A grey wave of amplitude .3: below a quarter cycle a pixel it has no high frequency, above it has .3 / sqrt 2."""
    x = np.arange(64)
    for cycles, expected in ((4, 0.0), (24, 0.3 / np.sqrt(2))):
        wave = 0.5 + 0.3 * np.sin(2 * np.pi * cycles * x / 64)
        image = np.repeat(np.round(255 * wave).astype(np.uint8)[None, None, :, None], 64, 1).repeat(3, 3)
        found = analysis.detail(image)
        assert found["high_frequency"][0] == pytest.approx(expected, abs=2e-3)
    slope = np.repeat(np.arange(64, dtype=np.uint8)[None, None, :, None], 64, 1).repeat(3, 3)
    assert analysis.detail(slope)["edges"][0] == pytest.approx(1 / 255)
    flat = analysis.detail(np.full((2, 64, 64, 3), 90, np.uint8))
    assert all(np.allclose(v, 0, atol=1e-6) for v in flat.values()) and set(flat) == set(analysis.DETAILS)


def test_blurring_costs_detail_of_every_kind() -> None:
    from scipy.ndimage import gaussian_filter

    sharp = np.stack([(rendering.render(scenes.sample_scene(i)).image * 255).astype(np.uint8) for i in range(6)])
    soft = gaussian_filter(sharp, (0, 1.5, 1.5, 0))
    before, after = analysis.detail(sharp), analysis.detail(soft)
    assert all((after[name] < before[name]).all() for name in analysis.DETAILS)
    assert analysis.image_distance(sharp, sharp).max() == 0
    assert analysis.image_distance(sharp * 0, sharp * 0 + 255) == pytest.approx(np.ones(6))


def test_frechet_distance_of_normals_is_the_closed_form() -> None:
    """Means 0 and 3, variances 1 and 4 on each of two axes: 9 * 2 + (2 - 1)^2 * 2."""
    rng = np.random.default_rng(0)
    a = rng.normal(size=(200, 2))
    a = (a - a.mean(0)) @ np.linalg.inv(np.linalg.cholesky(np.cov(a, rowvar=False)).T)
    assert analysis.frechet_distance(a, 2 * a + 3) == pytest.approx(20.0)
    assert analysis.frechet_distance(a, a) == pytest.approx(0.0, abs=1e-6)


def test_kernel_distance_is_the_double_loop_and_near_zero_for_one_distribution() -> None:
    rng = np.random.default_rng(1)
    a, b = rng.normal(size=(12, 5)), rng.normal(1, 1, size=(9, 5))

    def k(x, y):
        return (x @ y / 5 + 1) ** 3

    slow = np.mean([k(x, y) for i, x in enumerate(a) for j, y in enumerate(a) if i != j])
    slow += np.mean([k(x, y) for i, x in enumerate(b) for j, y in enumerate(b) if i != j])
    slow -= 2 * np.mean([k(x, y) for x in a for y in b])
    assert analysis.kernel_distance(a, b).mean == pytest.approx(slow)
    same = analysis.kernel_distance(*rng.normal(size=(2, 150, 5)))
    assert same.low < 0 < same.high
    with pytest.raises(ValueError, match="give \\(n, d\\)"):
        analysis.kernel_distance(a, b[:, :4])


@pytest.mark.filterwarnings("ignore:Metric `Kernel")
def test_both_distances_agree_with_torchmetrics() -> None:
    from torchmetrics.image.fid import FrechetInceptionDistance
    from torchmetrics.image.kid import KernelInceptionDistance

    class Flat(torch.nn.Module):
        num_features = 12

        def forward(self, images):
            return images.float().flatten(1)[:, :12] / 255

    rng = np.random.default_rng(2)
    a, b = (rng.integers(0, high, size=(40, 2, 2, 3), dtype=np.uint8) for high in (255, 160))
    theirs = FrechetInceptionDistance(Flat()), KernelInceptionDistance(Flat(), subsets=1, subset_size=40)
    for metric in theirs:
        for images, real in ((a, True), (b, False)):
            metric.update(torch.from_numpy(images).permute(0, 3, 1, 2), real=real)
    ours = [x.transpose(0, 3, 1, 2).reshape(40, 12) / 255.0 for x in (a, b)]
    assert analysis.frechet_distance(*ours) == pytest.approx(float(theirs[0].compute()), rel=1e-4)
    assert analysis.kernel_distance(*ours).mean == pytest.approx(float(theirs[1].compute()[0]), rel=1e-4)


def test_the_bundled_panel_agrees_with_a_rendering_and_with_its_mask() -> None:
    chosen = [scenes.sample_scene(4_100_000_000 + i) for i in range(16)]
    drawn = [rendering.render(s) for s in chosen]
    images = np.stack([(d.image * 255).round().astype(np.uint8) for d in drawn])
    panel = analysis.bundled_evaluators()
    right, wrong = panel.adherence(images, chosen), panel.adherence(images, chosen[::-1])
    assert right.mean() > 0.95 > 0.7 > wrong.mean()
    masks, truth = panel.masks(images), np.stack([d.mask for d in drawn])
    assert (masks == truth).mean() > 0.97 and panel.features(images).shape == (16, 128)


def test_models_of_the_user_sit_on_the_panel() -> None:
    """Tiny transformers models with random weights: shapes, and agreement with the model called by hand."""
    from transformers import (
        BlipConfig,
        BlipForImageTextRetrieval,
        CLIPConfig,
        CLIPModel,
        CLIPVisionConfig,
        CLIPVisionModel,
        CLIPVisionModelWithProjection,
        SegformerConfig,
        SegformerForSemanticSegmentation,
    )

    torch.manual_seed(0)
    small = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 1, "num_attention_heads": 2}
    vision, text = {**small, "image_size": 32, "patch_size": 8}, {**small, "vocab_size": 50, "eos_token_id": 3}
    images = np.random.default_rng(0).integers(0, 255, size=(5, 32, 32, 3), dtype=np.uint8)

    class Batch(dict):
        def to(self, device):
            return self

    def processor(images, text=None, **kwargs):
        found = Batch(pixel_values=torch.from_numpy(np.stack(images)).permute(0, 3, 1, 2).float() / 255)
        if text is not None:
            found["input_ids"] = torch.tensor([[5 + len(t), 3] for t in text])
        return found

    model = CLIPVisionModel(CLIPVisionConfig(**vision)).eval()
    features = analysis.vision_features(model, processor, batch_size=2)(images)
    assert_close(features, model(**processor(list(images))).pooler_output.detach().numpy())

    torch.manual_seed(1)  # with other seeds every cosine can be negative, and every score 0
    clip = CLIPModel(CLIPConfig(text_config=text, vision_config=vision, projection_dim=16)).eval()
    scores = analysis.clip_score(clip, processor, batch_size=3)(images, ["a", "bb", "ccc", "dddd", "eeeee"])
    whole = clip(**processor(list(images), ["a", "bb", "ccc", "dddd", "eeeee"]))
    cosine = torch.nn.functional.cosine_similarity(whole.image_embeds, whole.text_embeds).detach().numpy()
    assert_close(scores, 100 * cosine.clip(0))

    words = {**text, "bos_token_id": 1, "sep_token_id": 2, "pad_token_id": 0}
    blip = BlipForImageTextRetrieval(BlipConfig(text_config=words, vision_config=vision, image_text_hidden_size=8)).eval()
    scores = analysis.blip_score(blip, processor, batch_size=2)(images, ["a", "bb", "ccc", "dddd", "eeeee"])
    one = blip(**processor(list(images[1:2]), ["bb"]), use_itm_head=True).itm_score.softmax(-1)[0, 1]
    assert scores.shape == (5,) and scores[1] == pytest.approx(one.item(), abs=1e-5)

    tower, head = CLIPVisionModelWithProjection(CLIPVisionConfig(**vision, projection_dim=16)).eval(), torch.nn.Linear(16, 1)
    found = analysis.aesthetic_quality(tower, processor, head, batch_size=2)(images)
    embeds = torch.nn.functional.normalize(tower(**processor(list(images))).image_embeds, dim=-1)
    assert_close(found, head(embeds)[:, 0].detach().numpy())
    asked = analysis.edit_effects(images, images, analysis.Evaluators(quality=lambda x: x.mean((1, 2, 3))), [""] * 5)
    assert_close(asked.sel(measure="quality"), images.mean((1, 2, 3)))

    config = SegformerConfig(
        num_labels=1, depths=[1] * 4, hidden_sizes=[8] * 4, num_attention_heads=[1] * 4, decoder_hidden_size=8
    )
    masks = analysis.segmenter_masks(SegformerForSemanticSegmentation(config).eval(), processor)(images)
    assert masks.shape == (5, 32, 32) and masks.dtype == bool


def test_a_pair_metric_of_torchmetrics_gives_one_number_a_pair() -> None:
    from torchmetrics.image import StructuralSimilarityIndexMeasure

    images = np.random.default_rng(0).integers(0, 255, size=(3, 32, 32, 3), dtype=np.uint8)
    found = analysis.torchmetrics_pairs(StructuralSimilarityIndexMeasure(data_range=1.0))(images, images[[0, 2, 1]])
    assert found[0] == pytest.approx(1.0, abs=1e-4) and (found[1:] < 0.5).all()


def test_consequences_of_nothing_and_of_another_picture() -> None:
    chosen = [scenes.sample_scene(4_300_000_000 + i) for i in range(12)]
    images = np.stack([(rendering.render(s).image * 255).round().astype(np.uint8) for s in chosen])
    panel = analysis.bundled_evaluators()
    same = analysis.edit_effects(images, images, panel, chosen)
    assert (same.sel(measure="distance") == 0).all() and (same.sel(measure="layout") == 1).all()
    assert all(np.allclose(same.sel(measure=name), 0) for name in analysis.DETAILS)
    kinds = ["shape", "colour", "size", "position", "background", "pattern"]
    assert_close(same.sel(measure="adherence"), same.sel(measure=kinds).mean("measure"))
    other = analysis.edit_effects(images[::-1], images, panel, chosen)
    assert other.sel(measure="adherence").mean() < 0.6 and other.sel(measure="layout").mean() < 0.6
    bare = analysis.edit_effects(images, images, analysis.Evaluators(), chosen)
    assert list(bare.measure.values) == ["distance", *analysis.DETAILS]


def test_detail_is_a_log_ratio_with_a_floor() -> None:
    """A wave of half the amplitude: log 1/2; a flat picture: its 1e-4 over the wave's .3 / sqrt 2."""
    x = 2 * np.pi * 24 * np.arange(64) / 64
    full, half, flat = (np.round(255 * (0.5 + a * np.sin(x))).astype(np.uint8) for a in (0.3, 0.15, 0.0))
    images = [np.repeat(row[None, None, :, None], 64, 1).repeat(3, 3) for row in (full, half, flat)]
    found = [analysis.edit_effects(image, images[0], analysis.Evaluators(), [""]) for image in images]
    logs = [f.sel(measure="high_frequency").item() for f in found]
    assert logs == pytest.approx([0, np.log(0.5), np.log(1e-4 / (0.3 / np.sqrt(2)))], abs=0.02)


def test_distance_inside_counts_the_region_alone() -> None:
    """Three gray levels off in every channel of half a picture, none in the other half."""
    a = np.zeros((1, 4, 4, 3), np.uint8)
    b, left = a.copy(), np.zeros((1, 4, 4), bool)
    b[:, :, :2], left[:, :, :2] = 3, True
    assert [analysis.distance_inside(a, b, r)[0] for r in (left, ~left)] == [3, 0]
    assert analysis.distance_inside(a, b, np.zeros_like(left))[0] == pytest.approx(np.sqrt(4.5))


def test_moves_name_whose_attribute_a_picture_shows() -> None:
    couples = scenes.pairs(12)
    target, source = (
        np.stack([(rendering.render(c[i]).image * 255).round().astype(np.uint8) for c in couples]) for i in (0, 1)
    )
    for images, value in ((target, 0.0), (source, 1.0)):
        found = analysis.attribute_transfer(images, couples)
        assert (found.toward == value).mean() > 0.97 and (found.subjects == 1).all()
    both = [replace(t, subjects=(t.subjects[0], s.subjects[0])) for t, s in couples]
    two = np.stack([(rendering.render(scene).image * 255).round().astype(np.uint8) for scene in both])
    found = analysis.attribute_transfer(two, couples)
    assert (found.subjects == 2).mean() > 0.9
    assert found.toward.sel(attribute=["shape", "colour", "position"]).isnull().mean() > 0.9
    assert (found.toward.sel(attribute=["background", "pattern"]) == 0).mean() > 0.9


def test_the_share_of_the_way_is_that_of_a_blend() -> None:
    rng = np.random.default_rng(0)
    start, goal = (rng.integers(0, 255, size=(3, 8, 8, 3), dtype=np.uint8) for _ in range(2))
    region = np.zeros((3, 8, 8), dtype=bool)
    region[:, 2:5, 2:5] = True
    blend = np.where(region[..., None], np.round(0.25 * start + 0.75 * goal), start).astype(np.uint8)
    assert_close(analysis.share_of_path(blend, start, goal, region), 0.75, 0.02)
    assert (analysis.share_of_path(blend, start, goal, ~region) == 0).all()
    assert_close(analysis.share_of_path(goal, start, goal, region & False), 1)
    assert (analysis.share_of_path(goal, goal, goal, region) == 0).all()
    assert_close(analysis.harmonic_mean(np.array([0.5, 1, -1, 0]), np.array([1, 1, 1, 0])), [2 / 3, 1, 0, 0])


def test_transport_scores_at_both_ends_of_the_way() -> None:
    couples = scenes.pairs(8)
    target, source = (
        np.stack([(rendering.render(c[i]).image * 255).round().astype(np.uint8) for c in couples]) for i in (0, 1)
    )
    figures = tuple(analysis.bundled_evaluators().masks(x) for x in (target, source))
    stayed, went = (analysis.transport_scores(x, target, source, figures, couples).mean("sample") for x in (target, source))
    assert stayed.sel(measure="likeness") < 0.05 and stayed.sel(measure="preservation") > 0.95
    assert went.sel(measure="likeness") > 0.95 and went.sel(measure="preservation") < 0.05
    assert max(float(stayed.sel(measure="composite")), float(went.sel(measure="composite"))) < 0.1
    pixels = analysis.transport_scores(source, target, source, figures)
    recoloured = scenes.variants(8, "colour")
    drawn = [np.stack([(rendering.render(c[i]).image * 255).round().astype(np.uint8) for c in recoloured]) for i in (0, 1)]
    edited = analysis.transport_scores(drawn[1], *drawn, figures, recoloured, ["colour"]).mean("sample")
    assert edited.sel(measure="likeness") > 0.95 and edited.sel(measure="preservation") > 0.95
    assert list(pixels.measure.values) == ["likeness", "preservation", "composite", "near_source", "near_target"]
    assert (pixels.sel(measure="likeness") == 1).all() and (pixels.sel(measure="preservation") == 0).all()


def test_what_is_zero_but_for_rounding_decides_nothing() -> None:
    nothing = np.full(8, 0.1 + 0.2 - 0.3)
    assert nothing.mean() > 0
    found = analysis.bootstrap(nothing)
    assert found.low == found.high == 0 and not analysis.differs_from_control(found, found, found, 1.0)
    assert analysis.verdict("interpolation_beats_random", found) == "undecided"
    ends = analysis.interval(xr.DataArray(nothing, dims="prompt"))
    assert float(ends.low) == float(ends.high) == 0


def test_a_table_of_conditions_becomes_dimensions() -> None:
    rng = np.random.default_rng(0)
    table = {(r, k): xr.DataArray(rng.normal(size=(30, 2)), dims=("sample", "measure")) for r in "ab" for k in (8, 2)}
    found = analysis.grid_intervals(table, "rule", "k")
    assert found["mean"].dims == ("rule", "k", "measure") and found.k.values.tolist() == [8, 2]
    one = analysis.bootstrap(table["b", 2].values[:, 1])
    at = found.sel(rule="b", k=2).isel(measure=1)
    assert float(at["mean"]) == pytest.approx(one.mean) and float(at.low) == pytest.approx(one.low, abs=0.08)
    del table["b", 2]
    with pytest.raises(KeyError):
        analysis.grid_intervals(table, "rule", "k")


def test_the_crude_segmenter_finds_a_disc_on_a_plain_ground() -> None:
    image = np.full((2, 32, 32, 3), (20, 90, 200), np.uint8)
    y, x = np.mgrid[:32, :32]
    disc = np.hypot(y - 15, x - 17) < 8
    image[1, disc] = (240, 200, 30)
    image[0, ~disc] = (240, 200, 30)
    assert (analysis.colour_masks(image) == disc).all()
