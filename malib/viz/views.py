"""What the widgets show, as plain functions that a headless run calls."""

from __future__ import annotations

import functools
import operator
from collections.abc import Mapping
from dataclasses import replace
from typing import TYPE_CHECKING

from .. import edits
from ..analysis import claims, correspondence
from ..analysis.controls import control_edits, control_guides
from ..analysis.masks import relabel_by_border
from ..guidance import SkipLayerGuidance
from ..records import ChannelStats, Clusters, HiddenStates
from ..rules import BottomK, RandomK, TopK
from ..sources import Images
from ..spatial import on_grid, token_grid
from . import plots

if TYPE_CHECKING:
    import numpy as np
    import pandas as pd
    import plotly.graph_objects as go

    from ..analysis.correspondence import Pair
    from ..analysis.statistics import Estimate
    from ..dit import DiT
    from ..generation import Comparison, Generation


def record_sample(
    dit: DiT, prompt: str, seed: int, *, steps: int, cfg: float | None, guidance: float | None, k: int
) -> Generation:
    """Generate one sample with all that the explorer shows: scores everywhere, and the top ``k`` channels in full.

    Args:
        dit: the model.
        prompt: of the sample.
        seed: of the sample.
        steps: as of ``DiT.generate``.
        cfg: as of ``DiT.generate``.
        guidance: as of ``DiT.generate``.
        k: number of channels.
    """
    record = [ChannelStats(top=0), HiddenStates(channels=TopK(k))]
    return dit.generate(prompt, seed, steps=steps, cfg=cfg, guidance=guidance, record=record)


def explorer_figures(generation: Generation, step: int, layer: int, branch: str, rank: int) -> tuple[go.Figure, go.Figure]:
    """Return the token map of one channel and the spectrum of all channels, at one site.

    Args:
        generation: from ``record_sample``.
        step: denoising step.
        layer: block.
        branch: "cond" or "uncond".
        rank: of the channel; 1 for the highest score.
    """
    site = {"step": step, "layer": layer, "branch": branch}
    stats, states = (
        d.isel(sample=0).sel(site) for d in (generation.records.channel_stats, generation.records.hidden_states)
    )
    height, width = generation.images.shape[1:3]
    values = on_grid(states.value.isel(channel=rank - 1), height, width)
    channel, k = int(states.channel_id.isel(channel=rank - 1)), states.sizes["channel"]
    where = f"{stats.block.item()}, step {step} (sigma {float(stats.sigma):.2f}), {branch}"
    return (
        plots.interactive_map(values, generation.images[0], f"channel {channel}, rank {rank}"),
        plots.interactive_spectrum(stats.score, k, where),
    )


def _window(layers: tuple[int, int], steps: tuple[int, int]) -> dict[str, tuple[int, ...]]:
    """Return the fields of an edit's window from the ends of two range sliders, inclusive."""
    return {name: tuple(range(first, last + 1)) for name, (first, last) in (("layers", layers), ("steps", steps))}


def disrupted(
    dit: DiT,
    prompt: str,
    seed: int,
    rule: str,
    k: int,
    layers: tuple[int, int],
    edited_steps: tuple[int, int],
    mode: str,
    *,
    steps: int,
    cfg: float | None,
    guidance: float | None,
) -> Comparison:
    """Return one sample unedited and disrupted.

    Args:
        dit: the model.
        prompt: of the sample.
        seed: of the sample.
        rule: a name of ``control_edits``.
        k: number of channels.
        layers: first and last block, inclusive.
        edited_steps: first and last denoising step, inclusive.
        mode: of ``Disrupt``.
        steps: as of ``DiT.generate``.
        cfg: as of ``DiT.generate``.
        guidance: as of ``DiT.generate``.
    """
    edit = control_edits(k, **_window(layers, edited_steps))[rule][0][0]
    if rule != "equal norm":  # which is a mode of its own
        edit = replace(edit, mode=mode, factor=0.5)
    call = {"steps": steps, "cfg": cfg, "guidance": guidance}
    return dit.generate(prompt, seed, **call) | dit.generate(prompt, seed, edits=[edit], **call)


def guided(
    dit: DiT,
    prompt: str,
    seed: int,
    rule: str,
    k: int,
    layer: int,
    w: float,
    *,
    steps: int,
    cfg: float | None,
    guidance: float | None,
) -> Comparison:
    """Return one sample plain and with Detail Guidance.

    Args:
        dit: the model.
        prompt: of the sample.
        seed: of the sample.
        rule: a name of ``control_guides``, or "skip" to skip the block.
        k: number of channels.
        layer: the degraded block.
        w: weight of the guidance.
        steps: as of ``DiT.generate``.
        cfg: as of ``DiT.generate``.
        guidance: as of ``DiT.generate``.
    """
    guide = SkipLayerGuidance(w, layer) if rule == "skip" else control_guides(w, layer, k)[rule][0]
    call = {"steps": steps, "cfg": cfg, "guidance": guidance}
    return dit.generate(prompt, seed, **call) | dit.generate(prompt, seed, guide=guide, **call)


def transported(
    dit: DiT,
    target: str,
    source: str,
    seed: int,
    rule: str,
    k: int,
    strength: float,
    mask: str,
    branch: str,
    layers: tuple[int, int],
    edited_steps: tuple[int, int],
    *,
    steps: int,
    cfg: float | None,
    guidance: float | None,
) -> Comparison:
    """Return source, target, and the target with the source's channels.

    Args:
        dit: the model.
        target: prompt.
        source: prompt.
        seed: of both.
        rule: "top", "bottom", "random" or "all".
        k: number of channels.
        strength: of ``Transport``.
        mask: "all", "source", "target" or "union".
        branch: "both", "cond" or "uncond".
        layers: first and last block, inclusive.
        edited_steps: first and last denoising step, inclusive.
        steps: as of ``DiT.generate``.
        cfg: as of ``DiT.generate``.
        guidance: as of ``DiT.generate``.
    """
    chosen = {"top": TopK(k), "bottom": BottomK(k), "random": RandomK(k, without_top=k), "all": TopK(dit.width)}[rule]
    window = {**_window(layers, edited_steps), "branches": None if branch == "both" else branch}
    edit = edits.Transport(chosen, source, mask=None if mask == "all" else mask, strength=strength, **window)
    call = {"steps": steps, "cfg": cfg, "guidance": guidance}
    plain = [dit.generate(prompt, seed, **call) for prompt in (source, target)]
    return plain[0] | plain[1] | dit.generate(target, seed, edits=[edit], **call)


def subject_driven(
    dit: DiT,
    prompt: str,
    seed: int,
    reference: np.ndarray,
    description: str,
    rule: str,
    k: int,
    strength: float,
    mask: str,
    route: str,
    *,
    steps: int,
    cfg: float | None,
    guidance: float | None,
) -> Comparison:
    """Return the prompt's image, and the same with channels of a reference.

    Args:
        dit: the model.
        prompt: of the target.
        seed: of the target.
        reference: uint8 (1, H, W, 3).
        description: of the reference.
        rule: "top", "random" or "all".
        k: number of channels.
        strength: of ``Transport``.
        mask: "all", "source", "target" or "union".
        route: as of ``Images``.
        steps: as of ``DiT.generate``.
        cfg: as of ``DiT.generate``.
        guidance: as of ``DiT.generate``.
    """
    chosen = {"top": TopK(k), "random": RandomK(k, without_top=k), "all": TopK(dit.width)}[rule]
    source = Images(reference, description, route)
    edit = edits.Transport(chosen, source, mask=None if mask == "all" else mask, strength=strength)
    call = {"steps": steps, "cfg": cfg, "guidance": guidance}
    return dit.generate(prompt, seed, **call) | dit.generate(prompt, seed, edits=[edit], **call)


def interpolated(
    dit: DiT,
    target: str,
    source: str,
    seed: int,
    method: str,
    k: int,
    mask: str,
    frames: int,
    *,
    steps: int,
    cfg: float | None,
    guidance: float | None,
) -> Comparison:
    """Return a sequence of images from target to source, evenly spaced in strength.

    Args:
        dit: the model.
        target: prompt.
        source: prompt.
        seed: of both.
        method: "top", "random" or "all" for a transport of such channels, or "prompt" for interpolated prompt
            embeddings.
        k: number of channels.
        mask: tokens of a transport: "all", "source", "target" or "union".
        frames: number of images.
        steps: as of ``DiT.generate``.
        cfg: as of ``DiT.generate``.
        guidance: as of ``DiT.generate``.
    """
    rules = {"top": TopK(k), "random": RandomK(k, without_top=k), "all": TopK(dit.width)}
    call, strip = {"steps": steps, "cfg": cfg, "guidance": guidance}, []
    for number in range(frames):
        strength = number / (frames - 1)
        if method == "prompt":
            edit = edits.Interpolate(source=source, strength=strength)
        else:
            edit = edits.Transport(rules[method], source, mask=None if mask == "all" else mask, strength=strength)
        strip.append(dit.generate(target, seed, edits=[edit] if strength else [], **call))
    return functools.reduce(operator.or_, strip)


def clustered(
    dit: DiT,
    prompt: str,
    seed: int,
    rule: str,
    k: int,
    layer: int,
    step: int,
    clusters: int,
    *,
    steps: int,
    cfg: float | None,
    guidance: float | None,
) -> go.Figure:
    """Return the clusters and the heat of one sample's tokens at one site.

    Args:
        dit: the model.
        prompt: of the sample.
        seed: of the sample.
        rule: "top", "bottom" or "random".
        k: number of channels.
        layer: block.
        step: denoising step.
        clusters: number of clusters.
        steps: as of ``DiT.generate``.
        cfg: as of ``DiT.generate``.
        guidance: as of ``DiT.generate``.
    """
    chosen = {"top": TopK(k), "bottom": BottomK(k), "random": RandomK(k, without_top=k)}[rule]
    record = Clusters(channels=chosen, clusters=clusters, layers=layer, steps=step, branches="cond")
    run = dit.generate(prompt, seed, steps=steps, cfg=cfg, guidance=guidance, record=[record])
    data = run.records.clusters.squeeze(("sample", "step", "branch", "layer"))
    shape = run.images.shape[1:3]
    data["label"] = data.label.copy(data=relabel_by_border(data.label.values, token_grid(data.sizes["token"], *shape)))
    where = f"{data.block.item()}, step {step}, {rule} {k}"
    return plots.interactive_clusters(on_grid(data.label, *shape), on_grid(data.heat, *shape), run.images[0], where)


def corresponding(
    dit: DiT, pair: Pair, point: np.ndarray, layer: int, kind: str, discarded: int, *, sigma: float, ensemble: int
) -> go.Figure:
    """Return a point of a pair's source and its match in the target, by the features of one block.

    Args:
        dit: the model.
        pair: source and target.
        point: (2,) in the source, in pixels.
        layer: block.
        kind: of the features, as of ``correspondence.features``.
        discarded: number of top channels that are set to zero.
        sigma: noise level.
        ensemble: number of noises.
    """
    import numpy as np

    ends = [pair.source, pair.target]
    shown = correspondence.resized(ends, dit.size)
    prompt = f"a {pair.category}"
    states = correspondence.read(dit, shown, prompt, layers=[layer], sigma=sigma, ensemble=ensemble)
    values = correspondence.features(states, layer, kind, TopK(discarded) if discarded else None)
    sizes = pair.source.shape[:2], pair.target.shape[:2]
    found = correspondence.match(*values, np.atleast_2d(point), *sizes)[0]
    alike = correspondence.similarity(*values, np.atleast_2d(point), *sizes)[0]
    return plots.interactive_match(*ends, alike, point, found)


def verdict_table(estimates: Mapping[tuple[str, str], Estimate], claim: str) -> pd.DataFrame:
    """Return the number of a claim under every setting, with its verdict.

    Args:
        estimates: by (claim, setting).
        claim: name of the claim.
    """
    import pandas as pd

    found = {setting: value for (name, setting), value in estimates.items() if name == claim}
    rows = [(setting, str(value), claims.verdict(claim, value)) for setting, value in found.items()]
    return pd.DataFrame(rows, columns=["setting", "measured", "verdict"])
