from __future__ import annotations

import ast
import json
import re
import subprocess
import sys
import tomllib
import zipfile
from pathlib import Path

import pytest
import yaml

ROOT = Path(__file__).parents[2]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())
NOTEBOOKS = sorted((ROOT / "notebooks").glob("*.ipynb"))


EXTRAS = PROJECT["project"]["optional-dependencies"]
LIBRARY = PROJECT["project"]["dependencies"]
IMPORTED_AS = {"pillow": "PIL", "pyyaml": "yaml", "scikit-learn": "sklearn", "umap-learn": "umap"}


def names(requirements: list[str]) -> set[str]:
    """Names under which the packages of some requirements are imported."""
    found = {re.split(r"[<>=\[]", r)[0] for r in requirements}
    return {IMPORTED_AS.get(name, name) for name in found}


def imported(folder: str, top: bool = False) -> set[str]:
    """Packages that the modules below a folder (``top``: in the folder alone) import, without the standard library."""
    modules: set[str] = set()
    for path in (ROOT / folder).glob("*.py" if top else "**/*.py"):
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.Import):
                modules |= {alias.name.split(".")[0] for alias in node.names}
            elif isinstance(node, ast.ImportFrom) and node.level == 0:
                modules.add(node.module.split(".")[0])
    return modules - set(sys.stdlib_module_names) - {"malib"}


def test_environment_and_pyproject_ask_for_the_same() -> None:
    environment = yaml.safe_load((ROOT / "environment.yml").read_text())
    conda = {d.replace("pytorch", "torch") for d in environment["dependencies"]}
    extras = {r for r in (*EXTRAS["notebooks"], *EXTRAS["dev"]) if not r.startswith("malib[")}
    assert conda == {*LIBRARY, *extras, f"python{PROJECT['project']['requires-python']}"}


def test_the_library_imports_what_it_depends_on() -> None:
    extra = {"papermill", "matplotlib", "sklearn"}  # of malib.figures and of the probe of text encoders: extra "notebooks"
    library = imported("malib", top=True) | imported("malib/analysis") | imported("malib/miniflux")
    assert library - extra - {"huggingface_hub"} <= names(LIBRARY)  # diffusers depends on it
    assert imported("malib/viz") <= names([*LIBRARY, *EXTRAS["notebooks"]]) | {"IPython"}
    unused = names(LIBRARY) - library
    assert unused == {"accelerate"}, "a dependency that no module imports"  # diffusers needs it to load large models


def test_diffusers_is_capped_below_its_next_minor_version() -> None:
    (requirement,) = [r for r in LIBRARY if r.startswith("diffusers")]
    low, high = re.fullmatch(r"diffusers>=0\.(\d+),<0\.(\d+)", requirement).groups()
    assert int(high) == int(low) + 1


def test_each_dependency_says_which_notebook_needs_it() -> None:
    lines = [line for line in (ROOT / "environment.yml").read_text().splitlines() if line.startswith("  - ")]
    assert all("#" in line for line in lines if "python>" not in line)


def test_constraints_pin_every_direct_dependency() -> None:
    pinned = {
        re.split("[=]", line)[0].lower().replace("_", "-") for line in (ROOT / "constraints.txt").read_text().splitlines()
    }
    direct = {re.split("[<>=]", d)[0] for d in (*LIBRARY, *EXTRAS["notebooks"], *EXTRAS["dev"]) if "[" not in d}
    assert direct <= pinned and "torch==2.13.0" in (ROOT / "constraints.txt").read_text().splitlines()


def test_the_wheel_carries_library_data_and_notebooks(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "hatchling", "build", "-t", "wheel", "-d", str(tmp_path)]
    subprocess.run(command, cwd=ROOT, check=True, capture_output=True)
    (wheel,) = tmp_path.glob("*.whl")
    carried = set(zipfile.ZipFile(wheel).namelist())
    modules = {p.relative_to(ROOT).as_posix() for p in (ROOT / "malib").rglob("*.py")}
    data = {f"malib/{p.relative_to(ROOT).as_posix()}" for p in (ROOT / "data").rglob("*") if p.is_file()}
    assert modules | data | {f"malib/notebooks/{p.name}" for p in NOTEBOOKS} <= carried
    assert not [name for name in carried if name.startswith(("tests", "figures"))]
    assert wheel.stat().st_size <= 50e6


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
    for path in [*ROOT.glob("*.md"), *ROOT.glob("malib/**/*.py"), *ROOT.glob("docs/*.md"), *NOTEBOOKS, ROOT / "Makefile"]:
        assert not re.search(r"/(work|home|root|Users)/", path.read_text()), path
