"""Massive activations in diffusion transformers: read them, edit them, draw them.

``malib.load()`` opens the bundled mini-flux; ``DiT.generate`` is the one verb. Heavy libraries load when used.
"""

from .cache import Store
from .channels import AmountMatched, BottomK, Channels, EnergyMatched, RandomK, TopK
from .dit import DiT, load
from .edits import Disrupt, Interpolate, Pictures, Transport
from .generation import Comparison, Generation, Renoised
from .guidance import DetailGuidance, SkipLayerGuidance
from .records import ChannelStats, Clusters, Gates, HiddenStates, Modulation

__all__ = [
    "AmountMatched",
    "BottomK",
    "ChannelStats",
    "Channels",
    "Clusters",
    "Comparison",
    "DetailGuidance",
    "DiT",
    "Disrupt",
    "EnergyMatched",
    "Gates",
    "Generation",
    "HiddenStates",
    "Interpolate",
    "Modulation",
    "Pictures",
    "RandomK",
    "Renoised",
    "SkipLayerGuidance",
    "Store",
    "TopK",
    "Transport",
    "load",
]
