from __future__ import annotations

import json
import re
from pathlib import Path

import pytest

from malib import ChannelStats, Clusters, DiT, Gates, HiddenStates, TopK, analysis, families, figures

ROOT = Path(__file__).parents[2]
README = (ROOT / "README.md").read_text()


@pytest.mark.slow
def test_the_story_runs_as_it_stands(capsys) -> None:
    code = re.search(r"```python\n(.*?)```", README, re.DOTALL).group(1)
    scope: dict = {}
    exec(compile(code, "README.md", "exec"), scope)
    assert scope["base"].images.shape == scope["hurt"].images.shape == (1, 64, 64, 3)
    assert (scope["base"].images != scope["hurt"].images).any()
    assert "layer" in capsys.readouterr().out


def test_every_local_link_and_picture_exists() -> None:
    for target in re.findall(r"\]\(([^)#:]+)\)", README):
        assert (ROOT / target).exists(), target


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
        [{"flow": "yes", "ddpm": "as a start", None: "no"}[family.images]],
    )
    return " | ".join(", ".join(cell) for cell in cells) + " |"


def test_the_table_of_architectures_is_that_of_the_rows() -> None:
    table = README.split("<!-- models -->")[1].split("<!-- /models -->")[0].strip().splitlines()[2:]
    assert len(table) == len(families.FAMILIES)
    for line, family in zip(table, families.FAMILIES, strict=True):
        assert f"`{family.pipeline or family.transformer}`" in line and line.endswith(row_of(family))


def claim_table() -> str:
    """The verdicts of figures/paper, as the README shows them."""
    lines = ["| | claim | whose | measured | control changed | rule | verdict |", "|---|---|---|---|---|---|---|"]
    known = analysis.load_claims()
    for name in [name for notebook in figures.NOTEBOOKS for name in notebook.claims]:
        path = ROOT / "figures" / "paper" / name
        for row in json.loads(path.read_text())["claims"] if path.exists() else []:
            claim = known[row["claim"]]
            cells = (name[:2], claim["says"], re.split(r" \(|:", claim["source"])[0])
            found = (row["measured"], row.get("control changed", ""), row["rule"], row["verdict"])
            lines.append(f"| {' | '.join(cells + found)} |")
    return "\n".join(lines)


def test_the_table_of_verdicts_is_that_of_the_figures() -> None:
    assert README.split("<!-- claims -->")[1].split("<!-- /claims -->")[0].strip() == claim_table()


RUNS = {  # blocks, width and image tokens at 1024 x 1024 (mini-flux: 64 x 64); steps and branches of data/models.yaml
    "mini-flux": (20, 2, 5, 256, 384),
    "FLUX.1-dev": (28, 1, 57, 4096, 3072),
    "Qwen-Image": (50, 2, 60, 4096, 3072),
    "SD3 medium": (28, 2, 24, 4096, 1536),
    "SANA 1.5 1.6B": (20, 2, 20, 1024, 2240),
}
RECORDS = {
    "`ChannelStats()`": ChannelStats(),
    '`ChannelStats(keep=("layer",), top=0)`': ChannelStats(keep=("layer",), top=0),
    "`Gates()`": Gates(),
    "`Clusters()`": Clusters(),
    "`HiddenStates(channels=TopK(8))`": HiddenStates(channels=TopK(8)),
    "`HiddenStates(layers=3, steps=0)`": HiddenStates(layers=3, steps=0),
    "`HiddenStates()`": HiddenStates(),
}


def size_table() -> str:
    lines = [f"| record | {' | '.join(RUNS)} |", "|---" * (1 + len(RUNS)) + "|"]
    for name, record in RECORDS.items():
        found = [record.size(1, *run) / 2**20 for run in RUNS.values()]
        cells = [f"{mib:.1f} MiB" if mib < 1024 else f"{mib / 1024:,.0f} GiB" for mib in found]
        lines.append(f"| {name} | {' | '.join(cells)} |")
    return "\n".join(lines)


def test_the_table_of_sizes_is_what_the_records_say() -> None:
    assert README.split("<!-- sizes -->")[1].split("<!-- /sizes -->")[0].strip() == size_table()


def test_a_record_is_no_larger_than_it_said(flux_dit: DiT) -> None:
    for record in (
        ChannelStats(),
        ChannelStats(keep=("layer",), top=0),
        Gates(layers=0),
        HiddenStates(channels=TopK(3)),
        HiddenStates(layers=1),
        Clusters(),
    ):
        run = flux_dit.generate(["a star", "a ring"], steps=2, cfg=3.0, record=[record])
        (found,) = vars(run.records).values()
        said = record.size(2, 2, 2, len(flux_dit.blocks), 64, flux_dit.width)
        assert sum(v.nbytes for v in found.data_vars.values()) <= said
        if not isinstance(record, Gates):
            assert sum(v.nbytes for v in found.data_vars.values()) == said
