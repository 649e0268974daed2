"""Location of the bundled data, and the settings of known checkpoints."""

from __future__ import annotations

import functools
from pathlib import Path
from typing import Any

import yaml

BUNDLED = "mini-flux"


def data_folder() -> Path:
    """Return the folder of the bundled data: inside an installed package, or beside it in a checkout."""
    inside = Path(__file__).parent / "data"
    return inside if inside.exists() else Path(__file__).parent.parent / "data"


@functools.cache
def known_models() -> dict[str, dict[str, Any]]:
    """Return the rows of data/models.yaml by short name, e.g. "flux-dev"."""
    return yaml.safe_load((data_folder() / "models.yaml").read_text())


def preset_of(model: str | Path) -> dict[str, Any]:
    """Return the settings of a checkpoint that data/models.yaml lists.

    Args:
        model: a short name such as "flux-dev", or a hub id.

    Returns:
        ``id``, and those of size (pixels), steps, cfg, guidance and k that are known; {} for any other model.
    """
    for name, row in known_models().items():
        if str(model) in (name, row["id"]):
            return {key: value["value"] if key != "id" else value for key, value in row.items()}
    return {}
