"""Numbers with intervals, distances between sets of pictures, who judges them, and verdicts on ``data/claims.yaml``."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from typing import TYPE_CHECKING, Any

import numpy as np

if TYPE_CHECKING:
    import xarray as xr
    from pandas.io.formats.style import Styler


@dataclass(frozen=True)
class Estimate:
    """A mean with its 95 % bootstrap interval over ``n`` independent units."""

    mean: float
    low: float
    high: float
    n: int

    def __str__(self) -> str:
        return f"{self.mean:.3g} [{self.low:.3g}, {self.high:.3g}], n = {self.n}"


def bootstrap(values: np.ndarray, resamples: int = 2000, seed: int = 0) -> Estimate:
    """Mean of independent units and its 95 % percentile interval.

    Args:
        values: (n,) one number an independent unit (a prompt, say), without NaN.
        resamples: number of bootstrap draws.
        seed: of the draws.

    Raises:
        ValueError: no values, or NaN among them.
    """
    values = np.asarray(values, dtype=np.float64)
    if values.ndim != 1 or not len(values) or np.isnan(values).any():
        told = f"shape {values.shape} with {np.isnan(values).sum()} NaN"
        raise ValueError(f"bootstrap needs a vector of numbers without NaN, not {told}; leave out what was not measured.")
    return resample(lambda chosen: values[chosen].mean(), len(values), resamples, seed)


def resample(statistic: Callable[[np.ndarray], float], n: int, resamples: int = 500, seed: int = 0) -> Estimate:
    """Any statistic of ``n`` units with its 95 % percentile interval; ``statistic`` takes the indices of the units drawn."""
    draws = np.random.default_rng(seed).integers(n, size=(resamples, n))
    low, high = _exact(np.nanpercentile([statistic(chosen) for chosen in draws], [2.5, 97.5]))
    return Estimate(float(statistic(np.arange(n))), float(low), float(high), n)


def _exact(ends: np.ndarray) -> np.ndarray:
    """Ends of an interval without their last digits: an exact 0 must not count as above or below 0 by its rounding."""
    return ends.round(12) + 0.0  # no -0


def pairwise(matrix: np.ndarray, resamples: int = 2000, seed: int = 0) -> Estimate:
    """Mean over all pairs of units of a symmetric measure, with its 95 % interval from resampling the units.

    Args:
        matrix: (n, n), entry (i, j) the measure of units i and j; the diagonal is not used.
        resamples: number of bootstrap draws; pairs of a unit with itself are left out of each.
        seed: of the draws.
    """

    def mean(chosen: np.ndarray) -> float:
        apart = chosen[:, None] != chosen
        return matrix[np.ix_(chosen, chosen)][apart].mean() if apart.any() else np.nan

    return resample(mean, len(matrix), resamples, seed)


def interval(values: xr.DataArray, over: str = "prompt", resamples: int = 2000, seed: int = 0) -> xr.Dataset:
    """``mean``, ``low`` and ``high`` of a 95 % bootstrap interval over one dimension, for every entry of the others."""
    import xarray as xr

    moved = values.transpose(over, ...)
    n, rest = moved.shape[0], moved.shape[1:]
    draws = np.random.default_rng(seed).multinomial(n, np.full(n, 1 / n), size=resamples) / n
    means = draws @ moved.values.reshape(n, -1).astype(np.float64)
    low, high = _exact(np.percentile(means, [2.5, 97.5], axis=0))
    mean = moved.mean(over)
    bounds = {name: mean.copy(data=bound.reshape(rest)) for name, bound in (("low", low), ("high", high))}
    return xr.Dataset({"mean": mean, **bounds})


def by(table: Mapping[tuple, xr.DataArray], *names: str) -> xr.Dataset:
    """A full grid of conditions as one dataset of means and 95 % intervals over the samples.

    Args:
        table: (sample, ...) values for every combination of conditions, by a tuple of their labels.
        names: one name for each place of the tuples; they become the first dimensions.

    Raises:
        KeyError: a combination is missing.
    """
    import xarray as xr

    def nested(prefix: tuple) -> xr.DataArray:
        if len(prefix) == len(names):
            return table[prefix]
        labels = list(dict.fromkeys(key[len(prefix)] for key in table))
        parts = [nested((*prefix, label)) for label in labels]
        return xr.concat(parts, names[len(prefix)], coords="minimal").assign_coords({names[len(prefix)]: labels})

    return interval(nested(()), over="sample")


@cache
def claims() -> dict[str, dict[str, Any]]:
    """The claims as written down before the runs."""
    import yaml

    from .dit import data_folder

    return yaml.safe_load((data_folder() / "claims.yaml").read_text())


def _claim(name: str) -> dict[str, Any]:
    """One claim; KeyError with the known names where there is none of this name."""
    if name not in claims():
        raise KeyError(f"'{name}' is no claim; data/claims.yaml has {', '.join(claims())}.")
    return claims()[name]


FAIR = 0.05
"""How far the amounts that two edits change may differ in a fair comparison."""


def rule(claim: str) -> str:
    """A claim's decision rule in words, e.g. "at least 10"."""
    return ", ".join(f"{name.replace('_', ' ')} {value:g}" for name, value in _claim(claim)["rule"].items())


def verdict(claim: str, estimate: Estimate, amount: float | Sequence[float] = 1.0) -> str:
    """Apply a claim's decision rule: "holds", "does not hold" or "undecided" (always so below five units).

    Args:
        claim: its name.
        estimate: of the claim's metric.
        amount: how much the control of a comparison changed, over how much the massive channels did (the edits' ``amount``).
            What speaks for the massive channels counts only if the control changed at least as much, what speaks against
            them only if at most as much, each within 5 %; else there was "no fair control". Of several (one a block) each
            counts. The other way round for a claim whose ``larger_change`` "lowers" the control's number.

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
    enough, not_more = _fair(amount)
    if _claim(claim).get("larger_change") == "lowers":
        enough, not_more = not_more, enough
    if (above and not enough) or (below and not not_more):
        return "no fair control"
    return "holds" if above else "does not hold" if below else "undecided"


def verdicts(found: Mapping[str, Estimate], amounts: Mapping[str, float | Sequence[float]] | None = None) -> Styler:
    """The table of some claims: source, rule, measured number, what the control changed, verdict.

    Args:
        found: the estimate of each claim's metric.
        amounts: as for ``verdict``, of the claims that are held against a control of equal energy or norm.
    """
    import pandas as pd

    amounts, rows = amounts or {}, []
    for name, estimate in found.items():
        changed = amounts.get(name, 1.0)
        told = " to ".join(f"{x:.2f}" for x in sorted({np.min(changed), np.max(changed)})) if name in amounts else ""
        row = {"claim": name, "source": _claim(name)["source"], "rule": rule(name), "measured": str(estimate)}
        row |= {"control changed": told} if amounts else {}
        rows.append(row | {"verdict": verdict(name, estimate, changed)})
    return pd.DataFrame(rows).style.hide(axis="index")


def differs(massive: Estimate, control: Estimate, gap: Estimate, amount: float) -> bool:
    """Whether massive channels differ from a control: 0 lies outside the interval, and the ``amount`` is not to blame.

    A control of larger effect must have changed at most as much, one of smaller effect at least as much.

    Args:
        massive: what the massive channels did, 0 for nothing.
        control: what the control did.
        gap: their difference, paired.
        amount: as for ``verdict``.
    """
    enough, not_more = _fair(amount)
    outside = gap.low > 0 or gap.high < 0
    return bool(outside and (not_more if abs(control.mean) > abs(massive.mean) else enough))


def _fair(amount: float | Sequence[float]) -> tuple[bool, bool]:
    """Whether a control changed at least, and at most, as much; neither where nothing was changed (NaN)."""
    return np.min(amount) >= 1 - FAIR, np.max(amount) <= 1 + FAIR


def frechet_distance(a: np.ndarray, b: np.ndarray) -> float:
    """Frechet distance of two sets of features, taken as normal (FID without Inception; Heusel et al., arXiv 1706.08500).

    Biased upward when there are few samples: compare sets of equal size, and prefer ``kernel_distance`` below thousands.

    Args:
        a: (n, d) features.
        b: (m, d) features.

    Raises:
        ValueError: other shapes, or fewer than two rows.
    """
    a, b = _features(a, b)
    first, second = np.cov(a, rowvar=False), np.cov(b, rowvar=False)
    roots = np.linalg.eigvals(first @ second).real.clip(0)
    gap = np.square(a.mean(0) - b.mean(0)).sum()
    return float(gap + np.trace(first) + np.trace(second) - 2 * np.sqrt(roots).sum())


def kernel_distance(a: np.ndarray, b: np.ndarray, resamples: int = 500, seed: int = 0) -> Estimate:
    """Unbiased squared maximum mean discrepancy with the cubic kernel (KID; Binkowski et al., arXiv 1801.01401).

    About 0 for two sets of one distribution, and then as often negative as positive.

    Args:
        a: (n, d) features.
        b: (m, d) features.
        resamples: bootstrap draws of both sets; pairs of a sample with itself are left out of each.
        seed: of the draws.

    Raises:
        ValueError: other shapes, or fewer than two rows.
    """
    a, b = _features(a, b)
    within_a, within_b, between = (np.power(x @ y.T / a.shape[1] + 1, 3) for x, y in ((a, a), (b, b), (a, b)))

    def distance(rows: np.ndarray, columns: np.ndarray) -> float:
        inside = [
            k[np.ix_(chosen, chosen)][chosen[:, None] != chosen].mean()
            for k, chosen in ((within_a, rows), (within_b, columns))
        ]
        return sum(inside) - 2 * between[np.ix_(rows, columns)].mean()

    rng = np.random.default_rng(seed)
    draws = [distance(rng.integers(len(a), size=len(a)), rng.integers(len(b), size=len(b))) for _ in range(resamples)]
    low, high = np.percentile(draws, [2.5, 97.5])
    return Estimate(float(distance(np.arange(len(a)), np.arange(len(b)))), float(low), float(high), min(len(a), len(b)))


def _features(a: np.ndarray, b: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    a, b = np.asarray(a, dtype=np.float64), np.asarray(b, dtype=np.float64)
    if a.ndim != 2 or b.ndim != 2 or a.shape[1] != b.shape[1] or min(len(a), len(b)) < 2:
        raise ValueError(f"Features must be (n, d) and (m, d) with n, m >= 2; shapes {a.shape} and {b.shape} were given.")
    return a, b


DETAILS = ("edges", "texture", "high_frequency")


def detail(images: np.ndarray) -> dict[str, np.ndarray]:
    """How much local detail pictures hold, whatever they show (our choice: the papers measure detail by preference models).

    Args:
        images: uint8 (B, H, W, 3).

    Returns:
        (B,) each, of the luminance in [0, 1]: ``edges``, the mean length of the gradient (a pixel); ``texture``, the mean
        standard deviation in 5 x 5 windows; ``high_frequency``, the standard deviation of what lies above half the Nyquist
        frequency (0.25 cycles a pixel).
    """
    from scipy.ndimage import uniform_filter

    grey = images.astype(np.float64) @ (0.299, 0.587, 0.114) / 255
    down, across = np.gradient(grey, axis=(1, 2))
    window = (0, 5, 5)
    variance = uniform_filter(grey**2, window) - uniform_filter(grey, window) ** 2
    height, width = grey.shape[1:]
    frequency = np.hypot(np.fft.fftfreq(height)[:, None], np.fft.fftfreq(width))
    power = np.abs(np.fft.fft2(grey)) ** 2 / (height * width) ** 2
    return {
        "edges": np.hypot(down, across).mean((1, 2)),
        "texture": np.sqrt(variance.clip(0)).mean((1, 2)),
        "high_frequency": np.sqrt((power * (frequency > 0.25)).sum((1, 2))),
    }


def image_distance(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    """Root mean squared difference of pictures, uint8 (B, H, W, 3), in [0, 1]; (B,)."""
    gap = a.astype(np.float64) - b.astype(np.float64)
    return np.sqrt(np.square(gap).mean((1, 2, 3))) / 255


@dataclass(frozen=True)
class Panel:
    """Who judges the pictures: the bundled judge for mini-flux, models of the user's choice for large ones.

    Every member takes uint8 pictures (B, H, W, 3).

    Attributes:
        features: pictures -> float (B, d), for ``frechet_distance`` and ``kernel_distance``.
        agreement: pictures and what was asked for (prompts; scenes for the bundled judge) -> float (B,), more is better.
        masks: pictures -> boolean (B, H, W), True on the foreground.
        attributes: like ``agreement``, but one array a kind of attribute, for those who can tell them apart.
        quality: pictures -> float (B,), how good they look whatever they show, more is better.
    """

    features: Callable[[np.ndarray], np.ndarray] | None = None
    agreement: Callable[[np.ndarray, Sequence[Any]], np.ndarray] | None = None
    masks: Callable[[np.ndarray], np.ndarray] | None = None
    attributes: Callable[[np.ndarray, Sequence[Any]], dict[str, np.ndarray]] | None = None
    quality: Callable[[np.ndarray], np.ndarray] | None = None


def bundled_panel() -> Panel:
    """The judge in every seat; its agreement is the share of a scene's attributes that the picture shows."""
    from .judge import prompt_accuracy, read

    def attributes(images: np.ndarray, asked: Sequence[Any]) -> dict[str, np.ndarray]:
        return {name: hit for name, hit in prompt_accuracy(read(images), asked).items() if name != "all"}

    def agreement(images: np.ndarray, asked: Sequence[Any]) -> np.ndarray:
        return np.mean(list(attributes(images, asked).values()), axis=0)

    return Panel(lambda images: read(images).features, agreement, lambda images: read(images).masks, attributes)


def colour_masks(images: np.ndarray) -> np.ndarray:
    """A crude stand-in for a segmenter: two-means on the pixels' colours, the cluster that fills less of the border.

    Args:
        images: uint8 (B, H, W, 3).

    Returns:
        Boolean (B, H, W).
    """
    import torch

    from .spatial import foreground, kmeans

    count, height, width = images.shape[:3]
    pixels = torch.from_numpy(images).float().view(count, height * width, 3)
    labels = kmeans(pixels, restarts=2, iterations=10).numpy()
    return foreground(labels, labels * 0.0, (height, width)).reshape(count, height, width)


def consequences(images: np.ndarray, base: np.ndarray, panel: Panel, asked: Sequence[Any]) -> xr.DataArray:
    """What a change did to pictures, in detail and in meaning.

    Args:
        images: uint8 (B, H, W, 3), changed.
        base: the same pictures undisturbed.
        panel: who judges; what it lacks is left out.
        asked: what each picture was to show, for the panel.

    Returns:
        (sample, measure): ``distance`` to the base; the kinds of ``detail`` as the log of their ratio to the base's (each at
        least 1e-4, or one flat picture would outweigh all others); with a panel ``layout`` (IoU of the foreground masks),
        ``agreement`` and its attributes, and ``quality``.
    """
    import xarray as xr

    found = {"distance": image_distance(images, base)}
    before, after = detail(base), detail(images)
    found |= {name: np.log(np.maximum(after[name], 1e-4) / np.maximum(before[name], 1e-4)) for name in DETAILS}
    if panel.masks:
        a, b = panel.masks(images), panel.masks(base)
        union = (a | b).sum((1, 2))
        found["layout"] = np.where(union > 0, (a & b).sum((1, 2)) / np.maximum(union, 1), 1.0)
    if panel.agreement:
        found["agreement"] = panel.agreement(images, asked)
    if panel.attributes:
        found |= panel.attributes(images, asked)
    if panel.quality:
        found["quality"] = panel.quality(images)
    values = np.stack([np.asarray(v, dtype=np.float64) for v in found.values()], axis=1)
    return xr.DataArray(values, dims=("sample", "measure"), coords={"measure": list(found)})


ATTRIBUTES = ("shape", "colour", "size", "position", "background", "pattern")


def moves(images: np.ndarray, pairs: Sequence[tuple[Any, Any]]) -> xr.Dataset:
    """How far pictures have moved from one scene to another, attribute by attribute, as the bundled judge reads them.

    Args:
        images: uint8 (B, 64, 64, 3).
        pairs: for each picture the one-subject scenes (target, source) between which it lies.

    Returns:
        ``toward`` (sample, attribute): 1 where the picture shows the source's word and not the target's, 0 the other way
        round, NaN for neither or both; where the two have the same word, 0 if it is shown, else NaN. ``subjects`` (sample):
        how many positions hold a subject.
    """
    import xarray as xr

    from .judge import read
    from .scenes import POSITIONS, attributes

    reading = read(images)
    toward, subjects = np.full((len(images), len(ATTRIBUTES)), np.nan), np.zeros(len(images), dtype=int)
    for i, (target, source) in enumerate(pairs):
        there = [p for p in range(len(POSITIONS)) if reading.words["shape"][i, p] != "none"]
        subjects[i] = len(there)
        seen = [{str(reading.words[a][i, p]) for p in there} for a in ATTRIBUTES[:3]]
        seen += [{POSITIONS[p] for p in there}, *({str(reading.words[a][i])} for a in ATTRIBUTES[4:])]
        for number, (words, old, new) in enumerate(zip(seen, attributes(target), attributes(source), strict=True)):
            if old == new and old in words:
                toward[i, number] = 0
            elif (old in words) != (new in words):
                toward[i, number] = float(new in words)
    dims = ("sample", "attribute")
    return xr.Dataset({"toward": (dims, toward), "subjects": ("sample", subjects)}, coords={"attribute": list(ATTRIBUTES)})


def share_of_way(images: np.ndarray, start: np.ndarray, goal: np.ndarray, region: np.ndarray) -> np.ndarray:
    """How much nearer pictures are to a goal than their start was, by root mean squared distance inside a region.

    Args:
        images: uint8 (B, H, W, 3); ``start`` and ``goal`` likewise.
        region: boolean (B, H, W); where it is empty the whole picture counts.

    Returns:
        (B,): 1 at the goal, 0 as far from it as the start, negative farther; 0 where start and goal are equal.
    """
    before = distance_inside(start, goal, region)
    return np.where(before > 0, 1 - distance_inside(images, goal, region) / np.maximum(before, 1e-9), 0.0)


def distance_inside(a: np.ndarray, b: np.ndarray, region: np.ndarray) -> np.ndarray:
    """Root mean squared distance of pictures inside a region, in gray levels.

    Args:
        a: uint8 (B, H, W, 3).
        b: likewise.
        region: boolean (B, H, W); where it is empty the whole picture counts.

    Returns:
        (B,), in [0, 255].
    """
    where = np.where(region.any((1, 2))[:, None, None], region, True)[..., None]
    gap = np.square(a.astype(np.float64) - b.astype(np.float64)) * where
    return np.sqrt(gap.sum((1, 2, 3)) / (3 * where.sum((1, 2, 3))))


def harmonic(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    """Harmonic mean of two measures, negative ones counting as 0."""
    a, b = np.maximum(a, 0), np.maximum(b, 0)
    return np.where(a + b > 0, 2 * a * b / np.maximum(a + b, 1e-9), 0.0)


def transport_scores(
    images: np.ndarray,
    target: np.ndarray,
    source: np.ndarray,
    figures: tuple[np.ndarray, np.ndarray],
    pairs: Sequence[tuple[Any, Any]] | None = None,
    wanted: Sequence[str] = ATTRIBUTES[:4],
) -> xr.DataArray:
    """What a transport did: likeness to the source, preservation of the target, and their harmonic mean, the composite.

    The paper names a composite and does not define it; this one is ours.

    Args:
        images: uint8 (B, H, W, 3), transported.
        target: the undisturbed targets.
        source: the undisturbed sources.
        figures: boolean (B, H, W), the foregrounds of target and source, as of ``Panel.masks``.
        pairs: the scenes, for pictures that the bundled judge can read.
        wanted: the attributes that are to become the source's; all others are to stay the target's.

    Returns:
        (sample, measure): in pixels ``near_source``, the share of the way from target to source inside the source's subject,
        and ``near_target``, that from source to target outside of both subjects. With ``pairs`` ``likeness`` is the share of
        the wanted attributes that are the source's, ``preservation`` that of the others that are the target's, and there are
        each attribute (1 where it is the source's) and ``clean`` (exactly one subject); without ``pairs`` the two are the
        pixels' measures.
    """
    import xarray as xr

    near = share_of_way(images, target, source, figures[1])
    kept = share_of_way(images, source, target, ~(figures[0] | figures[1]))
    found = {"likeness": near, "preservation": kept}
    if pairs is not None:
        moved = moves(images, pairs)
        toward, asked = moved.toward.values, np.isin(ATTRIBUTES, wanted)
        found = {"likeness": (toward[:, asked] == 1).mean(1), "preservation": (toward[:, ~asked] == 0).mean(1)}
        found |= {name: (toward[:, i] == 1).astype(float) for i, name in enumerate(ATTRIBUTES)}
        found["clean"] = (moved.subjects.values == 1).astype(float)
    found |= {"composite": harmonic(found["likeness"], found["preservation"]), "near_source": near, "near_target": kept}
    values = np.stack([np.asarray(v, dtype=np.float64) for v in found.values()], axis=1)
    return xr.DataArray(values, dims=("sample", "measure"), coords={"measure": list(found)})


def vision_features(model: Any, processor: Any, batch_size: int = 16) -> Callable[[np.ndarray], np.ndarray]:
    """Features of a transformers vision model (DINOv2, CLIP's vision tower, ...), for a ``Panel``.

    Args:
        model: gives ``pooler_output``, or ``last_hidden_state`` (then its mean over the tokens is taken).
        processor: the model's image processor.
        batch_size: pictures at once.
    """

    def features(batch: np.ndarray) -> Any:
        out = model(**processor(images=list(batch), return_tensors="pt").to(model.device))
        pooled = getattr(out, "pooler_output", None)
        return out.last_hidden_state.mean(1) if pooled is None else pooled

    return _in_batches(features, batch_size)


def clip_agreement(model: Any, processor: Any, batch_size: int = 16) -> Callable[[np.ndarray, Sequence[str]], np.ndarray]:
    """CLIP score, 100 max(cos, 0) of picture and prompt (Hessel et al., arXiv 2104.08718, without its factor 2.5).

    Args:
        model: a transformers ``CLIPModel`` or one of its kin that gives ``image_embeds`` and ``text_embeds``; HPSv2.1 and
            PickScore are CLIP models with other weights, and enter here.
        processor: its ``CLIPProcessor``; prompts are cut at the model's length.
        batch_size: pictures at once.
    """

    def scores(batch: np.ndarray, prompts: Sequence[str]) -> Any:
        words = {"text": list(prompts), "padding": True, "truncation": True}
        out = model(**processor(images=list(batch), **words, return_tensors="pt").to(model.device))
        cosine = (_unit(out.image_embeds) * _unit(out.text_embeds)).sum(-1)
        return 100 * cosine.clamp(min=0)

    return _in_batches(scores, batch_size)


def blip_agreement(model: Any, processor: Any, batch_size: int = 8) -> Callable[[np.ndarray, Sequence[str]], np.ndarray]:
    """Probability, by BLIP's matching head, that prompt and picture belong together (Li et al., arXiv 2201.12086).

    Args:
        model: a transformers ``BlipForImageTextRetrieval``.
        processor: its ``BlipProcessor``; prompts are cut at the model's length.
        batch_size: pictures at once.
    """

    def scores(batch: np.ndarray, prompts: Sequence[str]) -> Any:
        words = {"text": list(prompts), "padding": True, "truncation": True}
        inputs = processor(images=list(batch), **words, return_tensors="pt").to(model.device)
        return model(**inputs, use_itm_head=True).itm_score.softmax(-1)[:, 1]

    return _in_batches(scores, batch_size)


def aesthetic_quality(model: Any, processor: Any, head: Any, batch_size: int = 16) -> Callable[[np.ndarray], np.ndarray]:
    """An aesthetic score from CLIP's picture embeddings, as LAION's predictor gives it, for a ``Panel``.

    Args:
        model: a transformers ``CLIPVisionModelWithProjection``.
        processor: its image processor.
        head: the predictor, a module from normalised embeddings (B, d) to (B, 1).
        batch_size: pictures at once.
    """

    def scores(batch: np.ndarray) -> Any:
        inputs = processor(images=list(batch), return_tensors="pt").to(model.device)
        return head(_unit(model(**inputs).image_embeds))[:, 0]

    return _in_batches(scores, batch_size)


def segmenter_masks(model: Any, processor: Any, batch_size: int = 8) -> Callable[[np.ndarray], np.ndarray]:
    """Foreground masks of a transformers segmentation model, for a ``Panel``.

    Args:
        model: gives ``logits`` (B, classes, h, w); with one class its sign tells the foreground, with more everything but
            class 0 is foreground.
        processor: its image processor.
        batch_size: pictures at once.
    """

    def masks(batch: np.ndarray) -> Any:
        from torch.nn.functional import interpolate

        logits = model(**processor(images=list(batch), return_tensors="pt").to(model.device)).logits
        logits = interpolate(logits.float(), batch.shape[1:3], mode="bilinear", align_corners=False)
        return logits[:, 0] > 0 if logits.shape[1] == 1 else logits.argmax(1) > 0

    return _in_batches(masks, batch_size)


def torchmetrics_pairs(metric: Any) -> Callable[[np.ndarray, np.ndarray], np.ndarray]:
    """A torchmetrics image metric (LPIPS, SSIM, ...) as a function of two stacks of pictures, one number a pair.

    Args:
        metric: takes float (1, 3, H, W) pairs in [0, 1]; for LPIPS pass ``normalize=True`` when it is made.
    """

    def distance(a: np.ndarray, b: np.ndarray) -> np.ndarray:
        import torch

        first, second = (torch.from_numpy(x).permute(0, 3, 1, 2).float() / 255 for x in (a, b))
        with torch.no_grad():
            return np.array([float(metric(x[None], y[None])) for x, y in zip(first, second, strict=True)])

    return distance


def _unit(x: Any) -> Any:
    return x / x.norm(dim=-1, keepdim=True)


def _in_batches(function: Callable, batch_size: int) -> Callable:
    """The same function over batches, without gradients, its results joined on the host."""

    def whole(*arguments: Any) -> np.ndarray:
        import torch

        with torch.no_grad():
            parts = [
                function(*(a[start : start + batch_size] for a in arguments)).cpu().numpy()
                for start in range(0, len(arguments[0]), batch_size)
            ]
        return np.concatenate(parts)

    return whole
