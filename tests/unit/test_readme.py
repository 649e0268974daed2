from __future__ import annotations

import re
from pathlib import Path

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
