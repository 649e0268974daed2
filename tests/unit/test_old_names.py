from __future__ import annotations

import pytest

import malib
from malib import analysis
from malib.miniflux import evaluator, scenes


def test_names_of_version_one_are_importable_from_malib() -> None:
    from malib import AmountMatched, Pictures, correspondence, judge, metrics, plots, rivals, train, widgets
    from malib import scenes as old_scenes

    assert (AmountMatched, Pictures) == (malib.DoseMatched, malib.Images)
    assert (metrics, judge, old_scenes) == (analysis, evaluator, scenes)
    modules = (correspondence, plots, rivals, train, widgets)
    assert [m.__name__.split(".", 1)[1] for m in modules] == [
        "analysis.correspondence",
        "viz.plots",
        "analysis.baselines",
        "miniflux.train",
        "viz.widgets",
    ]
    with pytest.raises(AttributeError, match="no attribute 'nothing'"):
        _ = malib.nothing
