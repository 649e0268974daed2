"""The runner on small notebooks made for it: refusals, failures, and what is skipped."""

from __future__ import annotations

import json
from pathlib import Path

import nbformat
import pytest

from malib import figures
from malib.figures import Notebook

DRAW = """
import json, pathlib
for name in {names}:
    for kind in ("png", "pdf", "json"):
        pathlib.Path(out, f"{{name}}.{{kind}}").write_text(json.dumps({{"n": size}}))
"""
CLAIM = """
from malib import analysis, figures
found = analysis.verdicts({"few_channels": analysis.Estimate(12.0, 11.0, 13.0, size)})
figures.save_claims(found, "92_claims", out, {"device": "cpu", "call": {}}, size=size)
"""


def write(folder: Path, name: str, *cells: str) -> None:
    first = nbformat.v4.new_code_cell(
        "size = 3\nmodel = 'mini-flux'\nout = ''\ninteractive = True", metadata={"tags": ["parameters"]}
    )
    notebook = nbformat.v4.new_notebook(cells=[first, *map(nbformat.v4.new_code_cell, cells)])
    notebook.metadata["kernelspec"] = {"name": "python3", "language": "python", "display_name": "Python 3"}
    nbformat.write(notebook, folder / f"{name}.ipynb")


def statuses(text: str) -> dict[str, str]:
    """Status by figure, from the summary table."""
    return {line.split()[0]: line.split()[-1] for line in text.splitlines() if line.startswith("9") and "," not in line}


@pytest.fixture
def two(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A notebook that fails in its second cell, and one that draws."""
    write(tmp_path, "91_bad", "raise ValueError('the sky fell')")
    write(tmp_path, "92_good", DRAW.format(names=["92_one", "92_two"]), CLAIM)
    registry = (
        Notebook("91_bad", ("zero",), {"preview": {"size": 1}, "full": {"size": 9}}),
        Notebook("92_good", ("one", "two"), {"preview": {"size": 5}, "full": {"size": 9}}),
    )
    monkeypatch.setattr(figures, "NOTEBOOKS", registry)
    monkeypatch.setattr(figures, "notebook_folder", lambda: tmp_path)
    return tmp_path


def test_a_failing_notebook_is_named_and_leaves_the_others_running(two: Path, capsys) -> None:
    assert figures.main(["--out", str(two / "out")]) == 1
    text = capsys.readouterr().out
    assert "91_bad, cell 2: ValueError: the sky fell" in text
    assert statuses(text) == {"91_zero": "failed", "92_one": "drawn", "92_two": "drawn"}
    assert json.loads((two / "out" / "92_one.json").read_text()) == {"n": 5}
    assert [line.split() for line in text.splitlines() if "few_channels" in line] == [
        ["few_channels", "12", "[11,", "13],", "n", "=", "5", "holds"]
    ]
    saved = json.loads((two / "out" / "92_claims.json").read_text())
    assert saved["claims"][0]["rule"] == "at least 10" and saved["device"] == "cpu" and saved["parameters"] == {"size": 5}


def test_unchanged_notebooks_are_skipped_until_forced_or_changed(two: Path, capsys) -> None:
    args = ["--only", "92_good", "--out", str(two / "out")]
    said = []
    for extra in ([], [], ["--force"], ["-p", "size=7"]):
        assert figures.main(args + extra) == 0
        said.append(statuses(capsys.readouterr().out)["92_one"])
    assert said == ["drawn", "unchanged", "drawn", "drawn"]
    assert json.loads((two / "out" / "92_two.json").read_text()) == {"n": 7}
    (two / "out" / "92_two.pdf").unlink()
    assert figures.main([*args, "-p", "size=7"]) == 0
    assert statuses(capsys.readouterr().out)["92_two"] == "drawn" and (two / "out" / "92_two.pdf").exists()


@pytest.fixture
def seeing(two: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A notebook that writes down which reference and baselines it was given; the person stands in its folder."""
    write(two, "93_seen", DRAW.format(names=["93_it"]).replace("size", '1, "seen": [reference, baselines]'))
    notebook = nbformat.read(two / "93_seen.ipynb", 4)
    notebook.cells[0].source += "\nreference = ''\nbaselines = {}"
    nbformat.write(notebook, two / "93_seen.ipynb")
    monkeypatch.setattr(figures, "NOTEBOOKS", (Notebook("93_seen", ("it",), {"preview": {}}, has_claims=False),))
    monkeypatch.chdir(two)
    return two


@pytest.mark.parametrize(
    ("given", "file", "again", "expected"),
    [
        ("reference=mine.png", "mine.png", "one", ["{here}/mine.png", {}]),  # read, so that the same bytes are the same
        (
            'baselines={"edit_model": "editor", "other": "owner/name"}',
            "editor/weights",
            None,
            ["", {"edit_model": "{here}/editor", "other": "owner/name"}],
        ),
    ],
)
def test_files_are_found_from_where_the_person_stands_and_watched(
    seeing: Path, capsys, given: str, file: str, again: str | None, expected: list
) -> None:
    said = []
    (seeing / file).parent.mkdir(exist_ok=True)
    for content in ("one", again, "longer"):
        if content:
            (seeing / file).write_text(content)
        assert figures.main(["--out", "out", "-p", given]) == 0
        said.append(statuses(capsys.readouterr().out)["93_it"])
    assert said == ["drawn", "unchanged", "drawn"]
    found = json.dumps(json.loads(Path("out/93_it.json").read_text())["seen"])
    assert found == json.dumps(expected).replace("{here}", str(seeing))


@pytest.mark.parametrize(
    ("args", "words"),
    [
        (["--only", "99_none"], "neither a notebook nor a figure"),
        (["--only", "one", "-p", "sise=4"], "'sise' is not a parameter of 92_good"),
        (["--only", "one", "-p", "size"], "NAME=VALUE"),
        (["--only", "one", "-p", "reference=nowhere.png"], "no image 'nowhere.png'"),
        (["--model", "nowhere"], "is not a model"),
        (["--model", "/tmp"], "is not a model"),
    ],
)
def test_what_does_not_exist_is_refused_in_one_sentence(two: Path, capsys, args: list[str], words: str) -> None:
    assert figures.main([*args, "--out", str(two / "out")]) == 2
    captured = capsys.readouterr()
    assert words in captured.err and captured.err.strip().count("\n") == 0
    assert not (two / "out").exists()


def test_figures_can_be_chosen_by_either_name(two: Path) -> None:
    for name in ("92_good", "92", "two", "92_two"):
        assert [n.name for n in figures.select([name])] == ["92_good"]


def test_a_notebook_that_does_not_draw_all_its_figures_fails(two: Path, capsys) -> None:
    write(two, "92_good", DRAW.format(names=["92_one"]))
    assert figures.main(["--only", "92_good", "--out", str(two / "out")]) == 1
    assert "ended without the files 92_two.png" in capsys.readouterr().out


def test_list_names_every_figure(capsys) -> None:
    assert figures.main(["--list"]) == 0
    text = capsys.readouterr().out
    assert all(f"{n.name[:2]}_{f}" in text for n in figures.NOTEBOOKS for f in n.figures)
