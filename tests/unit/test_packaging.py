from __future__ import annotations

import json
import re
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest
import yaml

ROOT = Path(__file__).parents[2]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())
NOTEBOOKS = sorted((ROOT / "notebooks").glob("*.ipynb"))


def test_environment_and_pyproject_ask_for_the_same() -> None:
    environment = yaml.safe_load((ROOT / "environment.yml").read_text())
    conda = {d.replace("pytorch", "torch") for d in environment["dependencies"]}
    project = PROJECT["project"]
    wanted = {*project["dependencies"], *project["optional-dependencies"]["dev"], f"python{project['requires-python']}"}
    assert conda == wanted


def test_each_dependency_says_which_notebook_needs_it() -> None:
    lines = [line for line in (ROOT / "environment.yml").read_text().splitlines() if line.startswith("  - ")]
    assert all("#" in line for line in lines if "python>" not in line)


def test_constraints_pin_every_direct_dependency() -> None:
    pinned = {
        re.split("[=]", line)[0].lower().replace("_", "-") for line in (ROOT / "constraints.txt").read_text().splitlines()
    }
    wanted = {re.split("[<>=]", d)[0] for d in PROJECT["project"]["dependencies"]}
    assert wanted <= pinned and "torch==2.13.0" in (ROOT / "constraints.txt").read_text().splitlines()


def test_what_the_wheel_carries_exists() -> None:
    for source in PROJECT["tool"]["hatch"]["build"]["targets"]["wheel"]["force-include"]:
        assert (ROOT / source).is_dir()


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda p: p.name)
def test_notebooks_are_stored_without_outputs_and_with_short_cells(path: Path) -> None:
    notebook = json.loads(path.read_text())
    cells = [c for c in notebook["cells"] if c["cell_type"] == "code"]
    assert all(not c["outputs"] and c["execution_count"] is None for c in cells)
    assert "widgets" not in notebook["metadata"]
    tagged = [c for c in cells if "parameters" in c["metadata"].get("tags", [])]
    assert len(tagged) == 1
    for cell in cells:
        assert sum(bool(line.strip()) for line in "".join(cell["source"]).splitlines()) <= 15, "".join(cell["source"])


def test_importing_malib_loads_nothing_heavy() -> None:
    heavy = ("torch", "diffusers", "transformers", "xarray", "pandas", "matplotlib", "plotly", "scipy", "sklearn")
    code = f"import sys, malib; print(*[m for m in {heavy!r} if m in sys.modules])"
    assert subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True).stdout.strip() == ""


def test_the_repository_names_no_path_of_a_machine() -> None:
    for path in [*ROOT.glob("*.md"), *ROOT.glob("malib/*.py"), *NOTEBOOKS, ROOT / "Makefile"]:
        assert not re.search(r"/(work|home|root|Users)/", path.read_text()), path
