"""ipywidgets controls over the plain functions of ``malib.viz.views``."""

from __future__ import annotations

import html
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING

from ..analysis import claims, correspondence
from ..analysis.controls import control_edits, control_guides
from ..generation import png
from ..sources import ROUTES
from .images import open_image
from .views import (
    clustered,
    corresponding,
    disrupted,
    explorer_figures,
    guided,
    interpolated,
    record_sample,
    subject_driven,
    transported,
    verdict_table,
)

if TYPE_CHECKING:
    import ipywidgets
    import numpy as np
    import plotly.graph_objects as go

    from ..analysis.correspondence import Pair
    from ..analysis.statistics import Estimate
    from ..dit import DiT
    from ..generation import Comparison, Generation


def explore(
    dit: DiT, prompt: str, *, steps: int = 20, cfg: float | None = None, guidance: float | None = None
) -> ipywidgets.VBox:
    """Explore one sample: prompt, seed, step, block, branch, k and rank, with token map and spectrum.

    A new prompt, seed or k runs the model (or reads the cache); the other controls select among the results.

    Args:
        dit: the model.
        prompt: shown first.
        steps: as of ``DiT.generate``.
        cfg: as of ``DiT.generate``.
        guidance: as of ``DiT.generate``.
    """
    import ipywidgets as w
    from IPython.display import display

    text, seed = _prompt_and_seed(prompt)
    k = w.IntSlider(8, 1, min(32, dit.width), description="k", continuous_update=False)
    step = w.IntSlider(steps - 1, 0, steps - 1, description="step")
    layer = w.Dropdown(options=[(b.name, b.layer) for b in dit.blocks], value=len(dit.blocks) // 2, description="block")
    branch = w.ToggleButtons(options=["cond"], description="branch", style={"button_width": "70px"})
    rank = w.IntSlider(1, 1, k.value, description="rank")
    status, output = w.HTML(), w.Output()
    shown: dict[str, Generation] = {}

    def draw(_: object = None) -> None:
        if "now" not in shown:
            return
        with output:
            output.clear_output(wait=True)
            for figure in explorer_figures(shown["now"], step.value, layer.value, branch.value, rank.value):
                display(figure)

    def run(_: object = None) -> None:
        status.value = "running ..."
        try:
            shown["now"] = record_sample(dit, text.value, seed.value, steps=steps, cfg=cfg, guidance=guidance, k=k.value)
        except Exception as error:  # shown next to the controls
            status.value = f"<b>{html.escape(str(error))}</b>"
            return
        status.value = ""
        rank.max = k.value
        branch.options = [str(b) for b in shown["now"].records.channel_stats.branch.values]
        draw()

    for control in (text, seed, k):
        control.observe(run, "value")
    for control in (step, layer, branch, rank):
        control.observe(draw, "value")
    run()
    return w.VBox([text, w.HBox([seed, k, rank]), w.HBox([step, layer]), branch, status, output])


def disrupt(
    dit: DiT, prompt: str, *, steps: int = 20, cfg: float | None = None, guidance: float | None = None
) -> ipywidgets.VBox:
    """Show a disrupted image next to the unedited one, by prompt, seed, selection rule, k, blocks, steps and mode.

    Args:
        dit: the model.
        prompt: shown first.
        steps: as of ``DiT.generate``.
        cfg: as of ``DiT.generate``.
        guidance: as of ``DiT.generate``.
    """
    import ipywidgets as w

    last = len(dit.blocks) - 1
    text, seed = _prompt_and_seed(prompt)
    rule = w.Dropdown(options=list(control_edits(1)), description="channels")
    mode = w.Dropdown(options=["zero", "mean", "scale"], description="mode", tooltip="scale halves them")
    k = w.IntSlider(8, 1, min(64, dit.width), description="k", continuous_update=False)
    layers = w.IntRangeSlider(value=(0, last), min=0, max=last, description="blocks", continuous_update=False)
    window = w.IntRangeSlider(value=(0, steps - 1), min=0, max=steps - 1, description="steps", continuous_update=False)

    def show() -> Comparison:
        given = (text.value, seed.value, rule.value, k.value, layers.value, window.value, mode.value)
        return disrupted(dit, *given, steps=steps, cfg=cfg, guidance=guidance)

    return _board(show, text, [seed, rule, mode], [k, layers, window])


def guide(
    dit: DiT, prompt: str, *, steps: int = 20, cfg: float | None = None, guidance: float | None = None
) -> ipywidgets.VBox:
    """Show a guided image next to the plain one, by prompt, seed, weight, block and channels of the degraded model.

    Args:
        dit: the model.
        prompt: shown first.
        steps: as of ``DiT.generate``.
        cfg: as of ``DiT.generate``.
        guidance: as of ``DiT.generate``.
    """
    import ipywidgets as w

    text, seed = _prompt_and_seed(prompt)
    rule = w.Dropdown(options=[*control_guides(1, 0, 1), "skip"], description="without", tooltip="skip: without the block")
    layer = w.Dropdown(options=[(b.name, b.layer) for b in dit.blocks], value=len(dit.blocks) // 2, description="block")
    weight = w.FloatSlider(1.0, min=-1, max=4, step=0.25, description="w", continuous_update=False)
    k = w.IntSlider(8, 1, min(64, dit.width), description="k", continuous_update=False)

    def show() -> Comparison:
        given = (text.value, seed.value, rule.value, k.value, layer.value, weight.value)
        return guided(dit, *given, steps=steps, cfg=cfg, guidance=guidance)

    return _board(show, text, [seed, rule, layer], [weight, k])


def transport(
    dit: DiT, target: str, source: str, *, steps: int = 20, cfg: float | None = None, guidance: float | None = None
) -> ipywidgets.VBox:
    """Show source, target and result, by prompts, channels, k, strength, mask, branch, blocks and steps.

    Args:
        dit: the model.
        target: prompt shown first.
        source: prompt shown first.
        steps: as of ``DiT.generate``.
        cfg: as of ``DiT.generate``.
        guidance: as of ``DiT.generate``.
    """
    import ipywidgets as w

    last, scale = len(dit.blocks) - 1, dit.default_cfg if cfg is None else cfg
    text, seed = _prompt_and_seed(target)
    text.description = "target"
    other = w.Text(source, description="source", continuous_update=False, layout=w.Layout(width="720px"))
    rule = w.Dropdown(options=["top", "random", "bottom", "all"], description="channels")
    k = w.IntSlider(8, 1, min(64, dit.width // 2), description="k", continuous_update=False)
    strength = w.FloatSlider(value=1.0, min=0, max=1, step=0.05, description="strength", continuous_update=False)
    mask = w.Dropdown(options=["all", "source", "target", "union"], description="tokens")
    branch = w.Dropdown(options=["both", "cond", "uncond"] if scale > 1 else ["both"], description="branch")
    layers = w.IntRangeSlider(value=(0, last), min=0, max=last, description="blocks", continuous_update=False)
    window = w.IntRangeSlider(value=(0, steps - 1), min=0, max=steps - 1, description="steps", continuous_update=False)

    def show() -> Comparison:
        chosen = (rule.value, k.value, strength.value, mask.value, branch.value, layers.value, window.value)
        return transported(dit, text.value, other.value, seed.value, *chosen, steps=steps, cfg=cfg, guidance=guidance)

    return _board(show, text, [other], [seed, rule, k], [strength, mask, branch], [layers, window])


def subject(
    dit: DiT,
    prompt: str,
    reference: np.ndarray,
    description: str = "",
    *,
    steps: int = 20,
    cfg: float | None = None,
    guidance: float | None = None,
) -> ipywidgets.VBox:
    """Show an image with channels of a reference, by prompt, reference, channels, k, strength, tokens and route.

    Args:
        dit: the model.
        prompt: shown first.
        reference: uint8 (H, W, 3), until another one is uploaded.
        description: of the reference.
        steps: as of ``DiT.generate``.
        cfg: as of ``DiT.generate``.
        guidance: as of ``DiT.generate``.
    """
    import ipywidgets as w

    text, seed = _prompt_and_seed(prompt)
    upload = w.FileUpload(accept="image/*", description="reference")
    words = w.Text(description, description="shows", continuous_update=False, layout=w.Layout(width="520px"))
    rule = w.Dropdown(options=["top", "random", "all"], description="channels")
    k = w.IntSlider(8, 1, min(64, dit.width // 2), description="k", continuous_update=False)
    strength = w.FloatSlider(value=1.0, min=0, max=1, step=0.05, description="strength", continuous_update=False)
    mask = w.Dropdown(options=["union", "source", "target", "all"], description="tokens")
    route = w.Dropdown(options=list(ROUTES), description="route")
    preview = w.Image(value=png(reference), width=96, height=96)

    def show() -> Comparison:
        given = open_image(bytes(upload.value[0]["content"]), (dit.size, dit.size)) if upload.value else reference[None]
        preview.value = png(given[0])
        chosen = (words.value, rule.value, k.value, strength.value, mask.value, route.value)
        return subject_driven(dit, text.value, seed.value, given, *chosen, steps=steps, cfg=cfg, guidance=guidance)

    board = _board(show, text, [upload, words], [seed, rule, k], [strength, mask, route])
    board.children = (*board.children[:2], preview, *board.children[2:])
    return board


def interpolate(
    dit: DiT, target: str, source: str, *, steps: int = 20, cfg: float | None = None, guidance: float | None = None
) -> ipywidgets.VBox:
    """Show the sequence from target to source, by prompts, channels or the prompt itself, k, tokens and number of frames.

    Args:
        dit: the model.
        target: prompt shown first.
        source: prompt shown first.
        steps: as of ``DiT.generate``.
        cfg: as of ``DiT.generate``.
        guidance: as of ``DiT.generate``.
    """
    import ipywidgets as w

    text, seed = _prompt_and_seed(target)
    text.description = "target"
    other = w.Text(source, description="source", continuous_update=False, layout=w.Layout(width="720px"))
    ways = ["top", "random", "all", *(["prompt"] if dit.family.conditioning else [])]
    way = w.Dropdown(options=ways, description="way")
    k = w.IntSlider(8, 1, min(64, dit.width // 2), description="k", continuous_update=False)
    mask = w.Dropdown(options=["all", "source", "target", "union"], description="tokens")
    frames = w.IntSlider(4, 2, 8, description="frames", continuous_update=False)

    def show() -> Comparison:
        given = (text.value, other.value, seed.value, way.value, k.value, mask.value, frames.value)
        return interpolated(dit, *given, steps=steps, cfg=cfg, guidance=guidance)

    return _board(show, text, [other], [seed, way, k], [mask, frames])


def cluster(
    dit: DiT, prompt: str, *, steps: int = 20, cfg: float | None = None, guidance: float | None = None
) -> ipywidgets.VBox:
    """Show an image, its clusters and its heat, by prompt, seed, block, step, k, selection rule and number of clusters.

    Args:
        dit: the model.
        prompt: shown first.
        steps: as of ``DiT.generate``.
        cfg: as of ``DiT.generate``.
        guidance: as of ``DiT.generate``.
    """
    import ipywidgets as w

    text, seed = _prompt_and_seed(prompt)
    rule = w.Dropdown(options=["top", "random", "bottom"], description="channels")
    k = w.IntSlider(8, 1, min(64, dit.width // 2), description="k", continuous_update=False)
    layer = w.Dropdown(options=[(b.name, b.layer) for b in dit.blocks], value=len(dit.blocks) // 2, description="block")
    step = w.IntSlider(steps - 1, 0, steps - 1, description="step", continuous_update=False)
    clusters = w.IntSlider(2, 2, 6, description="clusters", continuous_update=False)

    def show() -> go.Figure:
        given = (text.value, seed.value, rule.value, k.value, layer.value, step.value, clusters.value)
        return clustered(dit, *given, steps=steps, cfg=cfg, guidance=guidance)

    return _board(show, text, [seed, rule, k], [layer, step, clusters])


def correspond(dit: DiT, pairs: Sequence[Pair], *, sigma: float = 0.26, ensemble: int = 4) -> ipywidgets.VBox:
    """Show the match of a point, by pair, block, features and number of discarded channels.

    A click on the source, or two sliders, set the point.

    Args:
        dit: the model.
        pairs: to choose from.
        sigma: noise level of the features.
        ensemble: number of noises.
    """
    import ipywidgets as w
    import numpy as np
    import plotly.graph_objects as go
    from IPython.display import display

    which = w.IntSlider(1, 1, len(pairs), description="pair", continuous_update=False)
    layer = w.Dropdown(options=[(b.name, b.layer) for b in dit.blocks], value=len(dit.blocks) // 2, description="block")
    kinds = correspondence.KINDS if all(b.stack.modulation for b in dit.blocks) else correspondence.KINDS[:2]
    kind = w.Dropdown(options=kinds, value=kinds[-1], description="features")
    discarded = w.IntSlider(0, 0, min(16, dit.width // 2), description="discard", continuous_update=False)
    x, y = (w.FloatSlider(0.5, min=0, max=1, step=0.005, description=name, continuous_update=False) for name in "xy")
    status, output, moving = w.HTML(), w.Output(), {"now": False}

    def clicked(trace: object, points: object, state: object) -> None:
        if points.point_inds:
            height, width = pairs[which.value - 1].source.shape[:2]
            moving["now"] = True  # two sliders change, the point once
            x.value, y.value = (points.xs[0] + 0.5) / width, (points.ys[0] + 0.5) / height
            moving["now"] = False
            show()

    def show(_: object = None) -> None:
        if moving["now"]:
            return
        pair = pairs[which.value - 1]
        height, width = pair.source.shape[:2]
        point = np.array([x.value * width, y.value * height])
        try:
            given = (point, layer.value, kind.value, discarded.value)
            figure = go.FigureWidget(corresponding(dit, pair, *given, sigma=sigma, ensemble=ensemble))
        except Exception as error:  # shown next to the controls
            status.value = f"<b>{html.escape(str(error))}</b>"
            return
        status.value = ""
        figure.data[0].on_click(clicked)
        output.clear_output(wait=True)
        with output:
            display(figure)

    for control in (which, layer, kind, discarded, x, y):
        control.observe(show, "value")
    show()
    return w.VBox([w.HBox([which, layer, kind]), w.HBox([discarded, x, y]), status, output])


def claim(estimates: Mapping[tuple[str, str], Estimate]) -> ipywidgets.VBox:
    """Show a claim with its source, metric, decision rule and controls, and its ``estimates`` by (claim, setting)."""
    import ipywidgets as w

    which = w.Dropdown(options=list(dict.fromkeys(name for name, _ in estimates)), description="claim")
    text, table = w.HTML(), w.HTML()

    def show(_: object = None) -> None:
        about = claims.load_claims()[which.value]
        lines = {key: about[key] for key in ("says", "source", "metric", "controls", "notebook")} | {
            "rule": claims.decision_rule(which.value)
        }
        text.value = "<br>".join(f"<b>{name}</b>: {value}" for name, value in lines.items())
        table.value = verdict_table(estimates, which.value).to_html(index=False, border=0)

    which.observe(show, "value")
    show()
    return w.VBox([which, text, table])


def _prompt_and_seed(prompt: str) -> tuple[ipywidgets.Text, ipywidgets.BoundedIntText]:
    import ipywidgets as w

    text = w.Text(prompt, description="prompt", continuous_update=False, layout=w.Layout(width="720px"))
    return text, w.BoundedIntText(0, 0, 2**31 - 1, description="seed", layout=w.Layout(width="180px"))


def _board(show: Callable[[], object], text: ipywidgets.Text, *rows: list[ipywidgets.Widget]) -> ipywidgets.VBox:
    """Return rows of controls over the result of ``show``, which is called again whenever one of them changes."""
    import ipywidgets as w
    from IPython.display import display

    status, output = w.HTML(), w.Output()

    def run(_: object = None) -> None:
        status.value = "running ..."
        try:
            shown = show()
        except Exception as error:  # shown next to the controls
            status.value = f"<b>{html.escape(str(error))}</b>"
            return
        status.value = ""
        with output:
            output.clear_output(wait=True)
            display(shown)

    for control in (text, *(c for row in rows for c in row)):
        control.observe(run, "value")
    run()
    return w.VBox([text, *(w.HBox(row) for row in rows), status, output])
