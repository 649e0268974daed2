from __future__ import annotations

import ast
import pkgutil
from pathlib import Path

import pytest

from malib.families import PRIVATE_NAMES

ROOT = Path(__file__).parents[2] / "malib"


@pytest.mark.parametrize(("owner", "name"), PRIVATE_NAMES)
def test_a_private_name_of_another_library_exists(owner: str, name: str) -> None:
    assert hasattr(pkgutil.resolve_name(owner), name), f"{owner} has lost {name}; see malib.families.PRIVATE_NAMES"


def test_no_other_private_name_is_used() -> None:
    """Private attributes that malib reads, without those that it defines itself."""
    defined, read = set(), set()
    for path in ROOT.rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.Attribute) and node.attr.startswith("_") and not node.attr.startswith("__"):
                own = isinstance(node.value, ast.Name) and node.value.id in ("self", "cls")
                (defined if own or isinstance(node.ctx, ast.Store) else read).add(node.attr)
            elif isinstance(node, ast.FunctionDef):
                defined.add(node.name)
            elif isinstance(node, ast.Call) and getattr(node.func, "id", "") in ("getattr", "hasattr"):
                read |= {a.value for a in node.args[1:2] if isinstance(a, ast.Constant) and a.value.startswith("_")}
    of_torch = {"_foreach_lerp_", "_version", "_dynamo"}  # the documented way to update many tensors, counter, compiler
    assert read - defined - of_torch <= {name for _, name in PRIVATE_NAMES}
