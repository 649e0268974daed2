"""Every notebook, run by papermill as the runner does, on the bundled model and on other architectures."""

from __future__ import annotations

import json
from datetime import UTC, datetime
from pathlib import Path

import numpy as np
import pytest
from diffusers import FluxKontextPipeline
from PIL import Image

import malib
from malib import analysis, figures
from malib.analysis import correspondence
from malib.generation import png
from malib.viz import widgets

from .. import architectures

SMALL = ["-p", "prompts=3", "-p", "seeds=2", "-p", "steps=3", "-p", "dumps=2"]


def claims_of(notebook: str) -> set[str]:
    """The claims that data/claims.yaml gives to a notebook."""
    return {name for name, claim in analysis.load_claims().items() if claim["notebook"] == notebook}


def told(document: dict) -> set[str]:
    """The claims that a notebook's table of verdicts holds."""
    assert len(document["weights"]) == 64
    return {row["claim"] for row in document["claims"]}


@pytest.mark.slow
@pytest.mark.parametrize("model", ["mini-flux", "sd3", "sana"])
def test_discovery(model: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys) -> None:
    monkeypatch.setenv("MALIB_CACHE", str(tmp_path / "cache"))
    if model != "mini-flux":
        architectures.save(model, tmp_path / model)
    source = model if model == "mini-flux" else str(tmp_path / model)
    status = figures.main(["--only", "01_discovery", "--model", source, "--out", str(tmp_path / "out"), *SMALL])
    assert status == 0, capsys.readouterr().out
    documents = {p.stem: json.loads(p.read_text()) for p in (tmp_path / "out").glob("*.json")}
    assert told(documents.pop("01_claims")) == claims_of("01_discovery")
    assert set(documents) == {f"01_{figure}" for figure in figures.NOTEBOOKS[0].figures}
    for name, document in documents.items():
        assert (
            document["n"] > 0
            and (name in ("01_birth", "01_sizes") or len(document["weights"]) == 64)
            and document["parameters"]["seeds"] == 2
        ), name
        with Image.open(tmp_path / "out" / f"{name}.png") as plot:
            shades = np.asarray(plot.convert("L"))
        assert min(shades.shape) > 200 and 0.01 < (shades < 200).mean() < 0.9, name  # ink on a light background
        assert document["numbers"]["data_vars"] or document["pictures"], name
    assert documents["01_channels"]["n"] == 6
    shares = documents["01_origin"]["numbers"]["data_vars"]["share"]["data"]
    assert all(sum(row) == pytest.approx(1, abs=1e-3) for row in shares)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("notebook", "model", "given"),
    [
        ("02_disruption", "mini-flux", ["prompts=2", "steps=2", "ks=[2,8]"]),
        ("02_disruption", "sd3", ["prompts=2", "steps=2", "k=2", "ks=[2,4]"]),
        ("02_disruption", "sana", ["prompts=2", "steps=2", "k=2", "ks=[2,4]"]),
        ("03_clustering", "mini-flux", ["pictures=8", "steps=2", "ks=[2,8]"]),
        ("03_clustering", "sd3", ["pictures=8", "steps=2", "k=2", "ks=[2,4]"]),
        ("03_clustering", "sana", ["pictures=8", "steps=2", "k=2", "ks=[2,4]"]),
        ("04_transport", "mini-flux", ["pairs=2", "steps=2", "ks=[2,8]", "strengths=[1.0]"]),
        ("04_transport", "sd3", ["pairs=2", "steps=2", "k=2", "ks=[2,4]"]),
        ("04_transport", "sana", ["pairs=2", "steps=2", "k=2", "ks=[2,4]"]),
        ("04_transport", "dit-xl", ["pairs=2", "steps=2", "k=2", "ks=[2,4]"]),
        ("05_prompt_interpolation", "dit-xl", ["pairs=2", "steps=2", "k=2"]),
        ("05_prompt_interpolation", "mini-flux", ["pairs=2", "steps=2", "strengths=[1.0]"]),
        ("05_prompt_interpolation", "sd3", ["pairs=2", "steps=2", "k=2"]),
        ("05_prompt_interpolation", "sana", ["pairs=2", "steps=2", "k=2"]),
        ("06_subject_driven", "mini-flux", ["pairs=2", "steps=2"]),
        ("06_subject_driven", "sd3", ["pairs=2", "steps=2", "k=2"]),
        ("06_subject_driven", "sana", ["pairs=2", "steps=2", "k=2"]),
        ("07_detail_guidance", "mini-flux", ["prompts=2", "steps=2", "ws=[1.0]"]),
        ("07_detail_guidance", "sd3", ["prompts=2", "steps=2", "ws=[1.0]", "k=2"]),
        ("07_detail_guidance", "sana", ["prompts=2", "steps=2", "ws=[1.0]", "k=2"]),
        ("08_correspondence", "mini-flux", ["pairs=3", "ensemble=1", "sigmas=[0.26]"]),
        ("08_correspondence", "sd3", ["pairs=3", "ensemble=1", "sigmas=[0.26]"]),
        ("08_correspondence", "sana", ["pairs=3", "ensemble=1", "sigmas=[0.26]"]),
        ("09_three_readings", "mini-flux", ["prompts=2", "pairs=2", "steps=2", "ensemble=1", "ks=[8]"]),
        ("09_three_readings", "sd3", ["prompts=2", "pairs=2", "steps=2", "ensemble=1", "k=2", "ks=[2]"]),
        ("09_three_readings", "sana", ["prompts=2", "pairs=2", "steps=2", "ensemble=1", "k=2", "ks=[2]"]),
    ],
)
def test_the_other_notebooks(
    notebook: str, model: str, given: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys
) -> None:
    monkeypatch.setenv("MALIB_CACHE", str(tmp_path / "cache"))
    if model != "mini-flux":
        architectures.save(model, tmp_path / model)
    source = model if model == "mini-flux" else str(tmp_path / model)
    parameters = [word for pair in given for word in ("-p", pair)]
    status = figures.main(["--only", notebook, "--model", source, "--out", str(tmp_path / "out"), *parameters])
    assert status == 0, capsys.readouterr().out
    documents = {p.stem: json.loads(p.read_text()) for p in (tmp_path / "out").glob("*.json")}
    (registered,) = (n for n in figures.NOTEBOOKS if n.name == notebook)
    if registered.has_claims:
        found = told(documents.pop(f"{notebook[:2]}_claims"))
        assert found == claims_of(notebook) if model == "mini-flux" else found <= claims_of(notebook)
    assert set(documents) == {f"{notebook[:2]}_{figure}" for figure in registered.figures}
    assert all(d["n"] > 0 and len(d["weights"]) == 64 for d in documents.values())


@pytest.mark.slow
def test_subjects_are_compared_with_an_editing_pipeline_where_one_is_named(tmp_path: Path, monkeypatch, capsys) -> None:
    monkeypatch.setenv("MALIB_CACHE", str(tmp_path / "cache"))
    architectures.save("flux", tmp_path / "flux")
    tiny = architectures.build("flux")
    FluxKontextPipeline(**tiny.components).save_pretrained(tmp_path / "kontext")
    given = ["pairs=2", "steps=2", "k=2", f'baselines={{"edit_model": "{tmp_path / "kontext"}"}}']
    words = [word for pair in given for word in ("-p", pair)]
    status = figures.main(["--only", "06", "--model", str(tmp_path / "flux"), "--out", str(tmp_path / "out"), *words])
    assert status == 0, capsys.readouterr().out
    sites = json.loads((tmp_path / "out" / "06_methods.json").read_text())["numbers"]["coords"]["site"]["data"]
    assert "edit model" in sites and "IP-Adapter" not in sites


def test_the_disturber_shows_both_pictures_and_says_what_cannot_be(flux_dit: malib.DiT) -> None:
    call = {"steps": 2, "cfg": 2.0, "guidance": None}
    pair = widgets.disrupted(flux_dit, "a red star", 3, "top", 2, (1, 2), (0, 0), "zero", **call)
    by_hand = flux_dit.generate("a red star", 3, edits=[malib.Disrupt(malib.TopK(2), layers=(1, 2), steps=(0,))], **call)
    assert (pair.columns[1].images == by_hand.images).all() and "Disrupt" in pair._repr_html_()
    box = widgets.disrupt(flux_dit, "a red star", steps=2, cfg=2.0)
    text, status = box.children[0], box.children[3]
    text.value = " "
    assert "non-empty text" in status.value


def test_the_clusterer_shows_the_record(flux_dit: malib.DiT) -> None:
    call = {"steps": 2, "cfg": 2.0, "guidance": None}
    figure = widgets.clustered(flux_dit, "a red star", 3, "top", 4, 2, 1, 3, **call)
    record = malib.Clusters(channels=malib.TopK(4), clusters=3, layers=2, steps=1, branches="cond")
    labels = flux_dit.generate("a red star", 3, record=[record], **call).records.clusters.label.values.ravel()
    assert (figure.data[1].z[::-1] == analysis.relabel_by_border(labels, (8, 8)).reshape(8, 8)).all()
    box = widgets.cluster(flux_dit, "a red star", steps=2, cfg=2.0)
    box.children[0].value = " "
    assert "non-empty text" in box.children[3].value


def test_the_guide_shows_both_pictures_and_says_what_cannot_be(flux_dit: malib.DiT) -> None:
    call = {"steps": 2, "cfg": 2.0, "guidance": None}
    for rule, guide in (("top", malib.DetailGuidance(0.5, 1, malib.TopK(2))), ("skip", malib.SkipLayerGuidance(0.5, 1))):
        pair = widgets.guided(flux_dit, "a red star", 3, rule, 2, 1, 0.5, **call)
        assert (pair.columns[1].images == flux_dit.generate("a red star", 3, guide=guide, **call).images).all()
    box = widgets.guide(flux_dit, "a red star", steps=2, cfg=2.0)
    box.children[0].value = " "
    assert "non-empty text" in box.children[3].value


def test_the_matcher_shows_the_match_of_the_point(flux_dit: malib.DiT) -> None:
    pair = correspondence.scene_pairs(2)[1]
    point = pair.source_points[0]
    figure = widgets.corresponding(flux_dit, pair, point, 1, "adaln", 2, sigma=0.3, ensemble=1)
    similarity, marks = figure.data[2].z, [(t.x[0] + 0.5, t.y[0] + 0.5) for t in figure.data[3:]]
    best = np.unravel_index(np.argmax(similarity), similarity.shape)
    assert marks == [tuple(point), *[(best[1] + 0.5, best[0] + 0.5)] * 2]
    box = widgets.correspond(flux_dit, [pair], sigma=0.3, ensemble=1)
    (_, x, _), status = box.children[1].children, box.children[2]
    x.value = 0.25
    assert status.value == ""


def test_the_claims_are_told_with_their_verdicts() -> None:
    values = np.linspace(0.3, 0.5, 8)
    estimates = {("disruption_collapses", name): analysis.bootstrap(values * s) for name, s in (("all", 1), ("one", 0.1))}
    estimates["dg_adds_detail", "one"] = analysis.bootstrap(-values)
    shown = widgets.verdict_table(estimates, "disruption_collapses")
    assert shown.verdict.tolist() == ["holds", "does not hold"] and shown.setting.tolist() == ["all", "one"]
    box = widgets.claim(estimates)
    which, text, table = box.children
    which.value = "dg_adds_detail"
    assert "at least 0" in text.value and "does not hold" in table.value


def test_the_transporter_shows_source_target_and_result(flux_dit: malib.DiT) -> None:
    call = {"steps": 2, "cfg": 2.0, "guidance": None}
    trio = widgets.transported(
        flux_dit, "a red star", "a blue ring", 3, "top", 2, 0.5, "source", "cond", (1, 2), (0, 0), **call
    )
    edit = malib.Transport(
        malib.TopK(2), "a blue ring", mask="source", strength=0.5, branches="cond", layers=(1, 2), steps=(0,)
    )
    assert (trio.columns[2].images == flux_dit.generate("a red star", 3, edits=[edit], **call).images).all()
    assert trio.columns[0].prompts == ["a blue ring"] and "Transport" in trio._repr_html_()
    box = widgets.transport(flux_dit, "a red star", "a blue ring", steps=2, cfg=2.0)
    box.children[0].value = " "
    assert "non-empty text" in box.children[5].value


def test_the_film_leads_from_the_target_to_the_source(flux_dit: malib.DiT) -> None:
    call = {"steps": 2, "cfg": 2.0, "guidance": None}
    plain = flux_dit.generate("a red star", 3, **call)
    for way in ("top", "prompt"):
        strip = widgets.interpolated(flux_dit, "a red star", "a blue ring", 3, way, 2, "all", 3, **call)
        assert len(strip.columns) == 3 and (strip.columns[0].images == plain.images).all()
        assert [c.provenance["call"]["edits"][0]["strength"] for c in strip.columns[1:]] == [0.5, 1.0]
    box = widgets.interpolate(flux_dit, "a red star", "a blue ring", steps=2, cfg=2.0)
    box.children[0].value = " "
    assert "non-empty text" in box.children[4].value


def test_an_uploaded_subject_enters_the_picture_or_is_refused_in_a_sentence(flux_dit: malib.DiT) -> None:
    side, call = flux_dit.size, {"steps": 2, "cfg": 2.0, "guidance": None}
    picture = np.random.default_rng(0).integers(0, 255, size=(side, side, 3), dtype=np.uint8)
    pair = widgets.subject_driven(flux_dit, "a red star", 3, picture[None], "a ring", "top", 2, 0.5, "all", "noise", **call)
    edit = malib.Transport(malib.TopK(2), malib.Images(picture[None], "a ring"), strength=0.5)
    assert (pair.columns[1].images == flux_dit.generate("a red star", 3, edits=[edit], **call).images).all()
    box = widgets.subject(flux_dit, "a red star", picture, steps=2, cfg=2.0)
    (upload, _), preview, status = box.children[1].children, box.children[2], box.children[5]
    assert status.value == "" and preview.value == png(picture)
    file = {"name": "x.png", "type": "image/png", "size": 3, "last_modified": datetime.now(UTC)}
    upload.value = ({**file, "content": memoryview(png(255 - picture))},)
    assert status.value == "" and preview.value == png(255 - picture)
    upload.value = ({**file, "content": memoryview(b"abc")},)
    assert "give a complete PNG" in status.value


def test_the_explorer_draws_what_the_records_hold(flux_dit: malib.DiT) -> None:
    seen = widgets.record_sample(flux_dit, "a red star", 4, steps=2, cfg=2.0, guidance=None, k=3)
    token_map, spectrum = widgets.explorer_figures(seen, step=1, layer=2, branch="uncond", rank=2)
    site = {"step": 1, "layer": 2, "branch": "uncond"}
    values = seen.records.hidden_states.value.isel(sample=0, channel=1).sel(site).values.reshape(8, 8)
    assert (token_map.data[1].z[::-1] == values).all()
    score = seen.records.channel_stats.score.isel(sample=0).sel(site)
    assert spectrum.data[0].y == pytest.approx((score / score.median()).values)


def test_the_explorer_controls_redraw_and_report(flux_dit: malib.DiT) -> None:
    box = widgets.explore(flux_dit, "a red star", steps=2, cfg=2.0)
    text, (_, k, rank), (step, _layer) = box.children[0], box.children[1].children, box.children[2].children
    branch, status = box.children[3], box.children[4]
    assert branch.options == ("cond", "uncond")
    k.value = 3
    assert rank.max == 3
    step.value, branch.value, rank.value = 0, "uncond", 3
    text.value = " "
    assert "non-empty text" in status.value
