from __future__ import annotations

import json
from pathlib import Path

from ..compare_figures import compare


def write(folder: Path, **document) -> Path:
    folder.mkdir()
    (folder / "01_x.json").write_text(json.dumps(document))
    return folder


def test_renamed_labels_are_equal_and_numbers_are_not(tmp_path: Path) -> None:
    old = write(tmp_path / "old", numbers={"lead": [1.0, 2.0], "rule": ["agreement", "top"]}, key="a")
    same = write(tmp_path / "same", numbers={"top_ratio": [1.0, 2.0], "rule": ["adherence", "top"]}, key="b")
    other = write(tmp_path / "other", numbers={"top_ratio": [1.0, 2.1], "rule": ["adherence", "top"]}, key="b")
    assert compare(old, same) == []
    assert compare(old, other) == ["01_x.json/numbers/top_ratio/1: 2.0 -> 2.1"]
    assert compare(old, tmp_path) == ["01_x.json: only in one folder"]
