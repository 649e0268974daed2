"""Massive activations in diffusion transformers: read them, edit them, draw them.

``malib.load()`` opens the bundled mini-flux; ``DiT.generate`` is the one verb. Heavy libraries load when used.
"""

from .cache import Store
from .channels import BottomK, Channels, EnergyMatched, RandomK, TopK
from .dit import DiT, load
from .edits import Disrupt
from .generation import Comparison, Generation
from .records import ChannelStats, Gates, HiddenStates

__all__ = [
    "BottomK",
    "ChannelStats",
    "Channels",
    "Comparison",
    "DiT",
    "Disrupt",
    "EnergyMatched",
    "Gates",
    "Generation",
    "HiddenStates",
    "RandomK",
    "Store",
    "TopK",
    "load",
]
