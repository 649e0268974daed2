"""The language of the library: retired expressions, and the shape of docstrings."""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
MODULES = sorted((ROOT / "malib").rglob("*.py"))
PAGES = sorted((ROOT / "docs").glob("*.md"))  # CHANGELOG.md names the old names
RETIRED = (
    r"\bleav(e|es|ing) (it |them )?away\b",
    r"\bhang(s)? on\b",
    r"\bh(e|o)ld against\b",
    r"\b(are|is|was|were) born\b|\b(its|their) birth\b",
    r"\btravel(s|led|ling)?\b",
    r"\brooms?\b|\bthe house\b",
    r"\bthe mend\b|\bmended\b",
    r"\bnobody\b|\bno one\b",
    r"\bcontestants?\b|\brivals?\b|\bracers?\b",
    r"\bwho judges\b|\bthe judge\b|\bjudges?\b",
    r"\bundisturbed\b|\bdisturbed\b",
    r"\bcompanions?\b",
    r"\brides? along\b",
    r"\bpictures?\b",
    r"\bmassiveness\b",
    r"\bfilmstrips?\b",
    r"\bwhat was asked\b|\b(is|are|was) asked\b",
    r"\b(is|are|was) told\b",
    r"\bone verb\b",
    r"\bfor nothing\b",
    r"(?<!\")\bequal (energy|norm)\b",
)
LABELS = {
    "equal energy": "a label of the committed full-size figures, renamed together with the control itself",
    "equal norm": "likewise",
    "filmstrips": "the committed figure 05_filmstrips",
    "a picture": "the default prompt of a reading, part of its numbers",
    "pictures": "the committed figures 02, 04, 06 and 07_pictures, and the parameter of notebook 03",
    "judge": "a module of version 0.1 that malib still resolves",
    "rivals": "likewise",
    "Pictures": "a class of version 0.1 that malib still resolves",
}
"""String constants that may be a retired expression as a whole, and why."""
FIGURE_TEXTS = ROOT / "malib" / "viz" / "plots"
"""The texts inside of figures are rewritten together with the notebooks."""


def prose(path: Path) -> Iterator[tuple[int, str]]:
    """Line number and text of a page or a module, without the constants that may stay."""
    lines = path.read_text().splitlines()
    if path.suffix == ".py":
        tree = ast.parse(path.read_text())
        docstrings = {id(n.value) for n in ast.walk(tree) if isinstance(n, ast.Expr)}
        for node in ast.walk(tree):
            if not isinstance(node, ast.Constant) or not isinstance(node.value, str) or node.lineno != node.end_lineno:
                continue
            if node.value in LABELS or (FIGURE_TEXTS in path.parents and id(node) not in docstrings):
                line, start, end = lines[node.lineno - 1].encode(), node.col_offset, node.end_col_offset
                lines[node.lineno - 1] = (line[:start] + b" " * (end - start) + line[end:]).decode()
    yield from enumerate(lines, 1)


@pytest.mark.parametrize("path", [*MODULES, *PAGES], ids=lambda p: p.relative_to(ROOT).as_posix())
def test_no_retired_expression(path: Path) -> None:
    hits = [
        f"{path.relative_to(ROOT)}:{number}: {match.group()}"
        for number, line in prose(path)
        for pattern in RETIRED
        for match in re.finditer(pattern, line, re.IGNORECASE)
    ]
    assert not hits, "\n".join(hits)


def public(tree: ast.Module) -> Iterator[tuple[str, ast.FunctionDef | ast.ClassDef]]:
    """Public classes, functions and methods by dotted name."""
    for node in tree.body:
        if not isinstance(node, (ast.FunctionDef, ast.ClassDef)) or node.name.startswith("_"):
            continue
        yield node.name, node
        for inner in node.body if isinstance(node, ast.ClassDef) else ():
            if isinstance(inner, ast.FunctionDef) and not inner.name.startswith("_"):
                yield f"{node.name}.{inner.name}", inner


def arguments(function: ast.FunctionDef) -> list[str]:
    """Names of a function's arguments, without self and cls."""
    of = function.args
    names = [a.arg for a in (*of.posonlyargs, *of.args, *of.kwonlyargs)]
    return [n for n in names if n not in ("self", "cls")]


@pytest.mark.parametrize("path", MODULES, ids=lambda p: p.relative_to(ROOT).as_posix())
def test_docstrings_have_a_summary_line_and_describe_their_arguments(path: Path) -> None:
    tree, faults = ast.parse(path.read_text()), []
    assert (ast.get_docstring(tree) or "").split("\n")[0].endswith("."), "the module's first line states its purpose"
    for name, node in public(tree):
        text = ast.get_docstring(node) or ""
        lines = text.split("\n")
        if not text:
            if not any("noqa: D102" in line for line in ast.get_source_segment(path.read_text(), node).split("\n")[:1]):
                faults.append(f"{name}: no docstring")
            continue
        if not lines[0].rstrip().endswith((".", ":")) or (len(lines) > 1 and lines[1].strip()):
            faults.append(f"{name}: the summary is not one line")
        if not isinstance(node, ast.FunctionDef):
            continue
        wanted = arguments(node)
        described = re.search(r"^Args:$", text, re.MULTILINE)
        mentioned = all(f"``{a}``" in text for a in wanted)
        if len(wanted) > 1 and not described and not mentioned:
            faults.append(f"{name}: no Args for {', '.join(wanted)}")
        if described:
            missing = [a for a in wanted if not re.search(rf"^    \**{a}\b.*:", text, re.MULTILINE)]
            faults += [f"{name}: Args lacks {', '.join(missing)}"] if missing else []
    assert not faults, "\n".join(faults)
