"""Every notebook, run by papermill as the runner does, on the bundled model and on other architectures."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

import malib
from malib import figures, widgets

from .. import architectures

SMALL = ["-p", "prompts=3", "-p", "seeds=2", "-p", "steps=3", "-p", "dumps=2"]


@pytest.mark.parametrize("model", ["mini-flux", "sd3", "sana"])
def test_discovery(model: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys) -> None:
    monkeypatch.setenv("MALIB_CACHE", str(tmp_path / "cache"))
    if model != "mini-flux":
        architectures.build(model).save_pretrained(tmp_path / model)
    source = model if model == "mini-flux" else str(tmp_path / model)
    status = figures.main(["--only", "01_discovery", "--model", source, "--out", str(tmp_path / "out"), *SMALL])
    assert status == 0, capsys.readouterr().out
    documents = {p.stem: json.loads(p.read_text()) for p in (tmp_path / "out").glob("*.json")}
    assert set(documents) == {f"01_{figure}" for figure in figures.NOTEBOOKS[0].figures}
    for name, document in documents.items():
        assert (
            document["n"] > 0
            and (name == "01_birth" or len(document["weights"]) == 64)
            and document["parameters"]["seeds"] == 2
        ), name
        assert (tmp_path / "out" / f"{name}.png").stat().st_size > 5000
    assert documents["01_channels"]["n"] == 6
    shares = documents["01_origin"]["numbers"]["data_vars"]["share"]["data"]
    assert all(sum(row) == pytest.approx(1, abs=1e-3) for row in shares)


def test_the_explorer_draws_what_the_records_hold(flux_dit: malib.DiT) -> None:
    seen = widgets.watch(flux_dit, "a red star", 4, steps=2, cfg=2.0, guidance=None, k=3)
    token_map, spectrum = widgets.look(seen, step=1, layer=2, branch="uncond", rank=2)
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
