from __future__ import annotations

import re
from pathlib import Path

from malib import families, figures

README = (Path(__file__).parents[2] / "README.md").read_text()


def test_the_story_runs_as_it_stands(capsys) -> None:
    code = re.search(r"```python\n(.*?)```", README, re.DOTALL).group(1)
    scope: dict = {}
    exec(compile(code, "README.md", "exec"), scope)
    assert scope["base"].images.shape == scope["hurt"].images.shape == (1, 64, 64, 3)
    assert (scope["base"].images != scope["hurt"].images).any()
    assert "layer" in capsys.readouterr().out


def test_every_local_link_and_picture_exists() -> None:
    root = Path(__file__).parents[2]
    for target in re.findall(r"\]\(([^)#:]+)\)", README):
        assert (root / target).exists(), target


def test_the_commands_for_other_models_name_parameters_that_the_notebooks_have() -> None:
    for command in re.findall(r'make figures[^"\n]*ARGS="([^"]*)"', README):
        words = command.split()
        only = words[words.index("--only") + 1 :] if "--only" in words else []
        only = only[: next((i for i, w in enumerate(only) if w.startswith("-")), len(only))]
        given = [words[i + 1].split("=")[0] for i, word in enumerate(words) if word == "-p"]
        for notebook in figures.select(only):
            assert figures.parameters_for(notebook, "preview", dict.fromkeys(given))


def row_of(family: families.Family) -> str:
    """A family as a row of the README's table, without its name."""
    passes = {"sequential": "two calls", "batched": "one batch"}[family.passes]
    kinds = {passes: family.cfg_argument, "then rescaled": family.rescales, "embedded": family.guidance_argument}
    guidance = [kind for kind, has in kinds.items() if has]
    gates = [" and ".join(g.name for g in stack.gates if g.stream == "image") for stack in family.stacks]
    cells = (
        [stack.label for stack in family.stacks],
        guidance,
        dict.fromkeys(gates),
        [{"flow": "yes", "ddpm": "as a start", None: "no"}[family.pictures]],
    )
    return " | ".join(", ".join(cell) for cell in cells) + " |"


def test_the_table_of_architectures_is_that_of_the_rows() -> None:
    table = README.split("<!-- models -->")[1].split("<!-- /models -->")[0].strip().splitlines()[2:]
    assert len(table) == len(families.FAMILIES)
    for line, family in zip(table, families.FAMILIES, strict=True):
        assert f"`{family.pipeline or family.transformer}`" in line and line.endswith(row_of(family))
