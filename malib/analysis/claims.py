"""The claims of ``data/claims.yaml`` and their verdicts."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import cache
from typing import TYPE_CHECKING, Any

import numpy as np

from .statistics import Estimate

if TYPE_CHECKING:
    from pandas.io.formats.style import Styler


@cache
def load_claims() -> dict[str, dict[str, Any]]:
    """Return the claims, as written before the runs, by name."""
    import yaml

    from ..presets import data_folder

    return yaml.safe_load((data_folder() / "claims.yaml").read_text())


def _claim(name: str) -> dict[str, Any]:
    """Return one claim; KeyError with the known names if there is none of this name."""
    if name not in load_claims():
        raise KeyError(f"'{name}' is not a claim; data/claims.yaml has {', '.join(load_claims())}.")
    return load_claims()[name]


FAIR = 0.05
"""Largest relative difference between the doses of two edits in a fair comparison."""


def decision_rule(claim: str) -> str:
    """Return a claim's decision rule as text, for example "at least 10".

    Args:
        claim: name of the claim.

    Raises:
        KeyError: an unknown claim.
    """
    return ", ".join(f"{name.replace('_', ' ')} {value:g}" for name, value in _claim(claim)["rule"].items())


def verdict(claim: str, estimate: Estimate, dose: float | Sequence[float] = 1.0) -> str:
    """Apply a claim's decision rule: "holds", "does not hold" or "undecided" (always with fewer than five units).

    Args:
        claim: name of the claim.
        estimate: of the claim's metric.
        dose: dose of the control over that of the massive channels, for a comparison with a control. A result in favour
            of the massive channels counts only if the control's dose is at least as large, a result against them only if
            it is at most as large, each within 5 %; otherwise the verdict is "no fair control". With several doses (one
            for each block) every dose must satisfy the condition. The two conditions are exchanged for a claim whose
            ``larger_change`` is "lowers": a larger dose lowers the control's number.

    Raises:
        KeyError: an unknown claim.
    """
    limits = _claim(claim)["rule"]
    if estimate.n < 5:
        return "undecided"
    if "at_least" in limits:
        above, below = estimate.low > limits["at_least"], estimate.high < limits["at_least"]
    else:
        above, below = estimate.high < limits["at_most"], estimate.low > limits["at_most"]
    enough, not_more = _fair(dose)
    if _claim(claim).get("larger_change") == "lowers":
        enough, not_more = not_more, enough
    if (above and not enough) or (below and not not_more):
        return "no fair control"
    return "holds" if above else "does not hold" if below else "undecided"


def verdicts(estimates: Mapping[str, Estimate], doses: Mapping[str, float | Sequence[float]] | None = None) -> Styler:
    """Return the table of some claims: source, decision rule, measured number, dose of the control, verdict.

    Args:
        estimates: estimate of each claim's metric.
        doses: as for ``verdict``, for the claims that are compared with an energy-matched or norm-matched control.
    """
    import pandas as pd

    doses, rows = doses or {}, []
    for name, estimate in estimates.items():
        changed = doses.get(name, 1.0)
        span = " to ".join(f"{x:.2f}" for x in sorted({np.min(changed), np.max(changed)})) if name in doses else ""
        row = {"claim": name, "source": _claim(name)["source"], "rule": decision_rule(name), "measured": str(estimate)}
        row |= {"control changed": span} if doses else {}
        rows.append(row | {"verdict": verdict(name, estimate, changed)})
    return pd.DataFrame(rows).style.hide(axis="index")


def differs_from_control(massive: Estimate, control: Estimate, gap: Estimate, dose: float) -> bool:
    """Return whether massive channels differ from a control: 0 is outside of the interval, and the dose does not explain it.

    A control of larger effect must have a dose at most as large, one of smaller effect at least as large.

    Args:
        massive: effect of the massive channels, 0 for none.
        control: effect of the control.
        gap: their paired difference.
        dose: as for ``verdict``.
    """
    enough, not_more = _fair(dose)
    outside = gap.low > 0 or gap.high < 0
    return bool(outside and (not_more if abs(control.mean) > abs(massive.mean) else enough))


def _fair(dose: float | Sequence[float]) -> tuple[bool, bool]:
    """Return whether a dose is at least, and at most, that of the massive channels; neither where nothing changed (NaN)."""
    return np.min(dose) >= 1 - FAIR, np.max(dose) <= 1 + FAIR
