"""Analysis of channel scores and of selections of channels."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from itertools import combinations
from typing import TYPE_CHECKING

import numpy as np

if TYPE_CHECKING:
    import xarray as xr
    from torch import Tensor


def jaccard(a: Tensor, b: Tensor) -> Tensor:
    """Compute the Jaccard overlap of two selections.

    Args:
        a: (..., k) channel ids, without repetition in a row.
        b: (..., k') channel ids, likewise.

    Returns:
        (...) float: size of the intersection over size of the union, in [0, 1].
    """
    shared = (a.unsqueeze(-1) == b.unsqueeze(-2)).sum((-1, -2)).float()
    return shared / (a.shape[-1] + b.shape[-1] - shared)


def crossed(data: xr.Dataset) -> xr.Dataset:
    """Reshape the samples of a full grid of prompts and seeds, (sample) -> (prompt, seed).

    Args:
        data: dataset with ``prompt`` and ``seed`` along ``sample``.

    Raises:
        ValueError: a pair of prompt and seed is missing or occurs twice.
    """
    pairs = list(zip(data.prompt.values.tolist(), data.seed.values.tolist(), strict=True))
    prompts, seeds = (list(dict.fromkeys(p[i] for p in pairs)) for i in (0, 1))
    if len(set(pairs)) != len(pairs) or len(pairs) != len(prompts) * len(seeds):
        raise ValueError(
            f"{len(pairs)} samples are not a full grid of {len(prompts)} prompts and {len(seeds)} seeds; generate every "
            "pair once."
        )
    indexed = data.set_index(sample=("prompt", "seed")).unstack("sample")
    return indexed.sel(prompt=prompts, seed=seeds).transpose("prompt", "seed", ...)


def ratio(scores: xr.DataArray) -> xr.DataArray:
    """Divide scores by the median score of their site: a measure that needs no absolute scale.

    Args:
        scores: (..., channel).
    """
    return scores / scores.median("channel")


def top_ratios(scores: xr.DataArray, ranks: Sequence[int] = (1, 2, 3)) -> xr.DataArray:
    """Return the scores of given ranks over the median score, with ``rank`` in place of ``channel``.

    Args:
        scores: (..., channel).
        ranks: 1 for the highest.
    """
    import xarray as xr

    ordered = np.sort(ratio(scores).transpose(..., "channel").values, axis=-1)[..., ::-1]
    dims = [d for d in scores.dims if d != "channel"]
    coords = {n: c for n, c in scores.coords.items() if "channel" not in c.dims}
    selected = ordered[..., [r - 1 for r in ranks]]
    return xr.DataArray(selected, dims=(*dims, "rank"), coords={**coords, "rank": list(ranks)})


def sun_criterion(values: xr.DataArray) -> xr.Dataset:
    """Apply the absolute criterion of Sun et al. (arXiv 2402.17762) to each (..., token, channel) array.

    Args:
        values: hidden states, (..., token, channel).

    Returns:
        ``maximum`` and ``median`` of |x|, their ``ratio``, and ``massive``: the number of entries that exceed both 100
        and 1,000 times the median.
    """
    import xarray as xr

    size = abs(values)
    median, maximum = size.median(("token", "channel")), size.max(("token", "channel"))
    massive = ((size > 100) & (size > 1000 * median)).sum(("token", "channel"))
    return xr.Dataset({"maximum": maximum, "median": median, "ratio": maximum / median, "massive": massive})


def variance_shares(values: xr.DataArray, factors: Sequence[str]) -> xr.DataArray:
    """Compute the shares of the variance due to each factor and each interaction, in a full grid with one value per cell.

    The sum of squares of a set of factors is that of its effect: its cell means minus the effects of all its subsets.
    The highest interaction cannot be separated from noise. These are shares of the sample's own variance, not variance
    components: with few levels a main effect contains a part of the interactions.

    Args:
        values: array with the factors among its dimensions.
        factors: names of the dimensions to decompose; the others remain.

    Returns:
        ``source`` (such as "step", "prompt", "prompt x step") by the other dimensions; sums to 1 over ``source``.
    """
    import xarray as xr

    effects: dict[tuple[str, ...], xr.DataArray] = {(): values.mean(factors)}
    sums = {}
    for size in range(1, len(factors) + 1):
        for group in combinations(factors, size):
            effect = values.mean([f for f in factors if f not in group])
            for smaller, known in list(effects.items()):
                if set(smaller) < set(group):
                    effect = effect - known
            effects[group] = effect
            cells = np.prod([values.sizes[f] for f in factors if f not in group])
            sums[" x ".join(group)] = (effect**2).sum(group) * cells
    stacked = xr.concat(list(sums.values()), dim="source", coords="minimal", compat="override").assign_coords(
        source=list(sums)
    )
    return stacked / stacked.sum("source")


def overlap(channels: xr.DataArray, along: str, k: int) -> xr.DataArray:
    """Compute the Jaccard overlap of the top ``k`` for all pairs of entries along a dimension.

    Args:
        channels: ids over (..., rank), highest first.
        along: the dimension whose entries are compared.
        k: number of ranks.

    Returns:
        (along, other, ...), 1 on the diagonal.

    Raises:
        ValueError: fewer than two entries, or fewer ranks than ``k``.
    """
    import torch
    import xarray as xr

    if channels.sizes["rank"] < k:
        raise ValueError(f"k={k} exceeds the {channels.sizes['rank']} recorded ranks; record more with top={k}.")
    ordered = channels.isel(rank=slice(k)).transpose(along, ..., "rank")
    ids = torch.from_numpy(ordered.values.astype(np.int64))
    if len(ids) < 2:
        raise ValueError(f"'{along}' has {len(ids)} entry; give at least two to compare.")
    rows = torch.stack([torch.stack([jaccard(a, b) for b in ids]) for a in ids])
    return xr.DataArray(rows.numpy(), dims=(along, "other", *ordered.dims[1:-1]))


def off_diagonal(pairs: xr.DataArray) -> xr.DataArray:
    """Average the result of ``overlap`` over the pairs of different entries: (along, other, ...) -> (...).

    Args:
        pairs: (along, other, ...), from ``overlap``.
    """
    along, n = pairs.dims[0], pairs.shape[0]
    return (pairs.sum((along, "other")) - n) / (n * (n - 1))


def random_overlap(k: int, channels: int) -> float:
    """Return the expected Jaccard overlap of two random sets of ``k`` out of ``channels`` (hypergeometric)."""
    from scipy.stats import hypergeom

    shared = np.arange(k + 1)
    return float((hypergeom(channels, k, k).pmf(shared) * shared / (2 * k - shared)).sum())


def random_ratio(channels: int) -> float:
    """Return the expected largest over median of ``channels`` absolute normal values: the ratio by chance.

    Args:
        channels: number of channels.
    """
    from scipy.integrate import quad
    from scipy.stats import halfnorm

    return quad(lambda x: 1 - halfnorm.cdf(x) ** channels, 0, 20, points=[1, 2, 3, 4, 5])[0] / halfnorm.median()


def emergence(scores: xr.DataArray, k: int) -> xr.Dataset:
    """Follow the massive channels over the steps of a training.

    Args:
        scores: (train_step, layer, channel), as from ``miniflux.probe.load_probe`` at one sigma or on average.
        k: number of top channels.

    Returns:
        ``top_ratio`` (train_step): highest score over the median, mean over the blocks; ``overlap`` (train_step):
        Jaccard overlap of the top k with those at the end, mean over the blocks; ``top`` (layer, rank): the ids at the
        end.
    """
    import xarray as xr

    ordered = scores.transpose("train_step", "layer", "channel")
    ids = np.argsort(-ordered.values, axis=-1, kind="stable")[..., :k]
    top = xr.DataArray(
        ids, {n: c for n, c in ordered.coords.items() if "channel" not in c.dims}, (*ordered.dims[:2], "rank")
    )
    stable = overlap(top, "train_step", k).isel(other=-1).mean("layer")
    ratios = top_ratios(ordered, (1,)).sel(rank=1, drop=True).mean("layer")
    return xr.Dataset({"top_ratio": ratios, "overlap": stable, "top": top.isel(train_step=-1, drop=True)})


def select_channels(values: xr.DataArray, ids: Mapping[int, Sequence[int]]) -> xr.DataArray:
    """Select for each layer the channels named for it: (..., layer, channel) -> (..., layer, rank).

    Args:
        values: array with the dimensions layer and channel.
        ids: the same number of channel ids for each layer.
    """
    import xarray as xr

    ordered = values.sel(layer=list(ids)).transpose(..., "layer", "channel")
    places = np.broadcast_to(np.array(list(ids.values())), (*ordered.shape[:-1], len(next(iter(ids.values())))))
    coords = {name: c for name, c in ordered.coords.items() if "channel" not in c.dims}
    return xr.DataArray(np.take_along_axis(ordered.values, places, -1), coords, (*ordered.dims[:-1], "rank"))


def percentile(values: xr.DataArray) -> xr.DataArray:
    """Return each channel's rank among the channels of its site, from 0 (lowest) to 1; ties share their mean rank.

    Args:
        values: (..., channel).
    """
    from scipy.stats import rankdata

    ordered = values.transpose(..., "channel")
    return ordered.copy(data=(rankdata(ordered.values, axis=-1) - 1) / (ordered.sizes["channel"] - 1))


def energy_curve(energy: xr.DataArray) -> xr.DataArray:
    """Return the share of the tokens' squared norm in the 1, 2, ... channels of highest energy: (..., channels).

    Args:
        energy: (..., channel), summed or averaged over the tokens.
    """
    import xarray as xr

    ordered = np.sort(energy.transpose(..., "channel").values, axis=-1)[..., ::-1].cumsum(-1)
    dims = [d for d in energy.dims if d != "channel"]
    coords = {n: c for n, c in energy.coords.items() if "channel" not in c.dims}
    count = np.arange(1, ordered.shape[-1] + 1)
    return xr.DataArray(ordered / ordered[..., -1:], dims=(*dims, "channels"), coords={**coords, "channels": count})
