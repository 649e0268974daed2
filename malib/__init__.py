"""Read, edit and visualise massive activations in diffusion transformers.

``malib.load()`` opens the bundled mini-flux; ``DiT.generate`` generates images with records and edits. PyTorch and diffusers
are imported on first use.
"""

from importlib import import_module
from typing import Any

from .cache import Store
from .dit import DiT
from .edits import Disrupt, Interpolate, Transport
from .generation import Comparison, Generation, Renoised
from .guidance import DetailGuidance, SkipLayerGuidance
from .loading import load
from .records import ChannelStats, Clusters, Gates, HiddenStates, Modulation
from .rules import BottomK, Channels, DoseMatched, EnergyMatched, RandomK, TopK
from .sources import Images

__all__ = [
    "BottomK",
    "ChannelStats",
    "Channels",
    "Clusters",
    "Comparison",
    "DetailGuidance",
    "DiT",
    "Disrupt",
    "DoseMatched",
    "EnergyMatched",
    "Gates",
    "Generation",
    "HiddenStates",
    "Images",
    "Interpolate",
    "Modulation",
    "RandomK",
    "Renoised",
    "SkipLayerGuidance",
    "Store",
    "TopK",
    "Transport",
    "load",
]

_RENAMED = {"AmountMatched": DoseMatched, "Pictures": Images}
_MOVED = {
    "channels": "analysis.channels",
    "correspondence": "analysis.correspondence",
    "judge": "miniflux.evaluator",
    "metrics": "analysis",
    "plots": "viz.plots",
    "rivals": "analysis.baselines",
    "scenes": "miniflux.scenes",
    "train": "miniflux.train",
    "widgets": "viz.widgets",
}


def __getattr__(name: str) -> Any:
    """Resolve the names of version 0.1 (CHANGELOG.md lists them)."""
    if name in _RENAMED:
        return _RENAMED[name]
    if name in _MOVED:
        return import_module(f"{__name__}.{_MOVED[name]}")
    raise AttributeError(f"module '{__name__}' has no attribute '{name}'")
