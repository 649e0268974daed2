"""The controls of massive channels, as selection rules, edits and guides by name."""

from __future__ import annotations

from functools import partial
from typing import TYPE_CHECKING, Any

from ..edits import Disrupt
from ..guidance import DetailGuidance
from ..rules import BottomK, DoseMatched, EnergyMatched, RandomK, Rule, TopK

if TYPE_CHECKING:
    import xarray as xr


def control_rules(k: int, draws: int = 1, doses: xr.DataArray | None = None) -> dict[str, list[Rule]]:
    """Return the massive channels and their controls as selection rules by name.

    Args:
        k: number of massive channels.
        draws: number of random draws of each random control; average over them.
        doses: doses of the run with the top ``k``, which the energy-matched control then matches site by site
            (``DoseMatched``); None matches what the top ``k`` would change in the control's own run.

    Returns:
        "top" k; "equal energy", energy-matched random channels; "random" k without the top k; "bottom" k.
    """
    matched = EnergyMatched if doses is None else partial(DoseMatched, doses=doses)
    return {
        "top": [TopK(k)],
        "equal energy": [matched(k, seed=s) for s in range(draws)],
        "random": [RandomK(k, seed=s, without_top=k) for s in range(draws)],
        "bottom": [BottomK(k)],
    }


def control_edits(k: int, draws: int = 1, **window: Any) -> dict[str, list[list[Disrupt]]]:
    """Return the disruption of the massive channels and its controls, as lists of edits by name.

    Args:
        k: number of massive channels.
        draws: number of random draws of each random control; average over them.
        window: fields of ``Window`` for every edit.

    Returns:
        The rules of ``control_rules``, each in a ``Disrupt``; and "equal norm", the norm-matched random direction.
    """
    edits = {name: [[Disrupt(rule, **window)] for rule in rules] for name, rules in control_rules(k, draws).items()}
    return edits | {"equal norm": [[Disrupt(TopK(k), mode="rotate", seed=s, **window)] for s in range(draws)]}


def control_guides(w: float, layer: int, k: int, draws: int = 1, **window: Any) -> dict[str, list[DetailGuidance]]:
    """Return Detail Guidance and its controls, as lists of guides by name.

    Args:
        w: weight of the term, for all guides.
        layer: the layer that is degraded.
        k: number of massive channels.
        draws: number of random draws of each random control; average over them.
        window: ``steps``, if not all.

    Returns:
        The edits of ``control_edits``, each as the degradation.
    """
    return {
        name: [DetailGuidance(w, layer, edit.channels, edit.mode, edit.seed, **window) for (edit,) in variants]
        for name, variants in control_edits(k, draws).items()
    }
