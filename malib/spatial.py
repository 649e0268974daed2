"""Tokens as positions in the image: maps, two-means masks (MAs-DiT, arXiv 2605.13974), and the agreement of masks."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import xarray as xr
    from torch import Tensor

    from .rules import Rule


def token_grid(tokens: int, height: int, width: int) -> tuple[int, int]:
    """Return (rows, columns) of ``tokens`` in an image of ``height`` x ``width`` pixels; ValueError if they fill no grid."""
    rows = round((tokens * height / width) ** 0.5)
    columns = tokens // max(rows, 1)
    if rows * columns != tokens:
        raise ValueError(f"{tokens} tokens do not fill a grid of the shape {height} x {width}; pass the size of the image.")
    return rows, columns


def on_grid(values: xr.DataArray, height: int, width: int) -> xr.DataArray:
    """Reshape ``token`` to (``row``, ``column``), row by row, as diffusers arranges the tokens.

    ``values`` has a dimension ``token``; ``height`` and ``width`` of the image are in pixels.
    """
    import xarray as xr

    ordered = values.transpose(..., "token")
    grid = token_grid(ordered.sizes["token"], height, width)
    coords = {name: c for name, c in ordered.coords.items() if "token" not in c.dims}
    return xr.DataArray(ordered.values.reshape(*ordered.shape[:-1], *grid), coords, (*ordered.dims[:-1], "row", "column"))


def min_max(x: Tensor) -> Tensor:
    """Scale each channel of ``x`` (B, tokens, channels) to [0, 1] over the tokens; a constant channel becomes 0."""
    x = x.float()
    low, high = x.amin(1, keepdim=True), x.amax(1, keepdim=True)
    span = high - low
    return (x - low) / span.where(span > 0, span.new_ones(()))


def subspace(x: Tensor, rule: Rule, layer: int) -> tuple[Tensor, Tensor]:
    """Return the tokens in selected channels, each scaled to [0, 1] over the tokens.

    Args:
        x: hidden states (B, tokens, channels).
        rule: selection rule, resolved for each sample.
        layer: of the hidden states.

    Returns:
        Points (B, tokens, k), or all channels with the others set to 0 where the rule has no fixed k; and the heat (B,
        tokens), their mean over the selected channels.
    """
    try:
        ids = rule.ids(x, layer)
    except TypeError:
        mask = rule.mask(x, layer)[:, None]
        points = min_max(x) * mask
        return points, points.sum(2) / mask.sum(2)
    points = min_max(x.gather(2, ids[:, None].expand(-1, x.shape[1], -1)))
    return points, points.mean(2)


def foreground_masks(points: Tensor, grid: tuple[int, int]) -> Tensor:
    """Return foregrounds by two-means and the rule "border" of ``foreground``, without a host synchronisation.

    Args:
        points: (B, tokens, D), as from ``subspace``.
        grid: (rows, columns) of the tokens.

    Returns:
        Boolean (B, tokens).
    """
    one = kmeans(points, restarts=2, iterations=12).bool()
    framed = one.view(-1, *grid)
    edge = framed[:, 1:-1, [0, -1]].sum((1, 2)) + framed[:, [0, -1]].sum((1, 2))
    total = 2 * (grid[0] + grid[1]) - 4
    return one ^ (edge > total / 2)[:, None]


def kmeans(x: Tensor, clusters: int = 2, restarts: int = 4, iterations: int = 30, seed: int = 0) -> Tensor:
    """Run k-means on many sets of points at once, on the device and without a host synchronisation.

    K-means++ starts; the restart with the least inertia is returned. The labels of a set depend on its points and the
    seed, not on its place among the sets nor on the device.

    Args:
        x: (B, N, D) points.
        clusters: number of clusters, at least 2.
        restarts: starts for each set.
        iterations: Lloyd steps; always all of them, because a test of convergence would synchronise with the host.
        seed: of the starts.

    Returns:
        Labels (B, N), long, in [0, clusters).

    Raises:
        ValueError: fewer than two clusters, or more than points.
    """
    import torch

    if not 2 <= clusters <= x.shape[1]:
        raise ValueError(f"clusters={clusters} is out of range; use 2 to {x.shape[1]}, the number of points.")
    sets, points, _ = x.shape
    x = x.float().repeat_interleave(restarts, 0)
    generator, rows = torch.Generator().manual_seed(seed), torch.arange(len(x), device=x.device)
    first = torch.randint(points, (restarts,), generator=generator).to(x.device).repeat(sets)
    draws = torch.rand(clusters - 1, restarts, generator=generator).to(x.device).repeat(1, sets)
    centres = x[rows, first][:, None]
    for draw in draws:
        away = torch.cdist(x, centres).square().amin(2) + 1e-12  # so that equal points have a distribution, too
        share = away.cumsum(1)
        chosen = torch.searchsorted(share, (draw * share[:, -1])[:, None]).clamp(max=points - 1)[:, 0]
        centres = torch.cat([centres, x[rows, chosen][:, None]], dim=1)
    for _ in range(iterations):
        near = torch.nn.functional.one_hot(torch.cdist(x, centres).argmin(2), clusters).to(x.dtype)
        count = near.sum(1)[..., None]
        centres = ((near.mT @ x) / count.clamp(min=1)).where(count > 0, centres)
    distance, labels = torch.cdist(x, centres).square().min(2)
    best = distance.sum(1).view(sets, restarts).argmin(1)
    return labels.view(sets, restarts, points)[rows[:sets], best]
