"""Saved figures (matplotlib, seaborn) and interactive ones (plotly): one function per figure, from a labelled dataset."""

from .clustering import embedding, mask_layers, mask_maps, mask_rules, mask_size
from .correspondence import matches, noise_grid
from .discovery import channels, emergence, gates, layers, norm_share, origin, sigma, sizes, streams, token_maps, tokens
from .effects import attribute_table, image_grid, losses, readings, sites, strength, tradeoff, verdicts
from .interactive import interactive_clusters, interactive_map, interactive_match, interactive_spectrum

__all__ = [
    "attribute_table",
    "channels",
    "embedding",
    "emergence",
    "gates",
    "image_grid",
    "interactive_clusters",
    "interactive_map",
    "interactive_match",
    "interactive_spectrum",
    "layers",
    "losses",
    "mask_layers",
    "mask_maps",
    "mask_rules",
    "mask_size",
    "matches",
    "noise_grid",
    "norm_share",
    "origin",
    "readings",
    "sigma",
    "sites",
    "sizes",
    "streams",
    "strength",
    "token_maps",
    "tokens",
    "tradeoff",
    "verdicts",
]
