"""ipywidgets controls. Every widget is a view over a plain function, so a headless run calls the function instead."""

from __future__ import annotations

import functools
import html
import operator
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING

from . import correspondence, edits, metrics, plots
from .channels import BottomK, RandomK, TopK
from .generation import open_picture, png
from .guidance import SkipLayerGuidance, controls
from .records import ChannelStats, Clusters, HiddenStates
from .spatial import by_border, on_grid, token_grid

if TYPE_CHECKING:
    import ipywidgets
    import numpy as np
    import pandas as pd
    import plotly.graph_objects as go

    from .correspondence import Pair
    from .dit import DiT
    from .generation import Comparison, Generation


def watch(dit: DiT, prompt: str, seed: int, *, steps: int, cfg: float | None, guidance: float | None, k: int) -> Generation:
    """One sample with all that the explorer shows: scores everywhere, and the top ``k`` channels in full."""
    record = [ChannelStats(top=0), HiddenStates(channels=TopK(k))]
    return dit.generate(prompt, seed, steps=steps, cfg=cfg, guidance=guidance, record=record)


def look(generation: Generation, step: int, layer: int, branch: str, rank: int) -> tuple[go.Figure, go.Figure]:
    """Token map of the channel of one rank (1 = highest score), and the spectrum of all channels, at one site."""
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


def explore(
    dit: DiT, prompt: str, *, steps: int = 20, cfg: float | None = None, guidance: float | None = None
) -> ipywidgets.VBox:
    """Prompt, seed, step, block, branch, k and rank, with live token map and spectrum.

    A new prompt, seed or k runs the model (or reads the cache); the other controls only look.
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
            for figure in look(shown["now"], step.value, layer.value, branch.value, rank.value):
                display(figure)

    def run(_: object = None) -> None:
        status.value = "running ..."
        try:
            shown["now"] = watch(dit, text.value, seed.value, steps=steps, cfg=cfg, guidance=guidance, k=k.value)
        except Exception as error:  # shown beside the controls, where the person looks
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


def _window(layers: tuple[int, int], steps: tuple[int, int]) -> dict[str, tuple[int, ...]]:
    """Fields of an edit's window from the ends of two range sliders, inclusive."""
    return {name: tuple(range(first, last + 1)) for name, (first, last) in (("layers", layers), ("steps", steps))}


def disturbed(
    dit: DiT,
    prompt: str,
    seed: int,
    rule: str,
    k: int,
    layers: tuple[int, int],
    steps_disturbed: tuple[int, int],
    mode: str,
    *,
    steps: int,
    cfg: float | None,
    guidance: float | None,
) -> Comparison:
    """One sample undisturbed and disturbed; ``rule`` as in ``edits.controls``, first and last block and step inclusive."""
    edit = edits.controls(k, **_window(layers, steps_disturbed))[rule][0][0]
    if rule != "equal norm":  # which is a mode of its own
        edit = replace(edit, mode=mode, factor=0.5)
    call = {"steps": steps, "cfg": cfg, "guidance": guidance}
    return dit.generate(prompt, seed, **call) | dit.generate(prompt, seed, edits=[edit], **call)


def disturb(
    dit: DiT, prompt: str, *, steps: int = 20, cfg: float | None = None, guidance: float | None = None
) -> ipywidgets.VBox:
    """Prompt, seed, rule, k, blocks, steps and mode; the disturbed picture beside the undisturbed one."""
    import ipywidgets as w

    last = len(dit.blocks) - 1
    text, seed = _prompt_and_seed(prompt)
    rule = w.Dropdown(options=list(edits.controls(1)), description="channels")
    mode = w.Dropdown(options=["zero", "mean", "scale"], description="mode", tooltip="scale halves them")
    k = w.IntSlider(8, 1, min(64, dit.width), description="k", continuous_update=False)
    layers = w.IntRangeSlider(value=(0, last), min=0, max=last, description="blocks", continuous_update=False)
    window = w.IntRangeSlider(value=(0, steps - 1), min=0, max=steps - 1, description="steps", continuous_update=False)

    def show() -> Comparison:
        given = (text.value, seed.value, rule.value, k.value, layers.value, window.value, mode.value)
        return disturbed(dit, *given, steps=steps, cfg=cfg, guidance=guidance)

    return _board(show, text, [seed, rule, mode], [k, layers, window])


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
    """One sample plain and with Detail Guidance; ``rule`` as in ``guidance.controls``, or "skip" to skip the block."""
    guide = SkipLayerGuidance(w, layer) if rule == "skip" else controls(w, layer, k)[rule][0]
    call = {"steps": steps, "cfg": cfg, "guidance": guidance}
    return dit.generate(prompt, seed, **call) | dit.generate(prompt, seed, guide=guide, **call)


def guide(
    dit: DiT, prompt: str, *, steps: int = 20, cfg: float | None = None, guidance: float | None = None
) -> ipywidgets.VBox:
    """Prompt, seed, weight, block and channels of the degraded model; the guided picture beside the plain one."""
    import ipywidgets as w

    text, seed = _prompt_and_seed(prompt)
    rule = w.Dropdown(options=[*controls(1, 0, 1), "skip"], description="without", tooltip="skip: without the block")
    layer = w.Dropdown(options=[(b.name, b.layer) for b in dit.blocks], value=len(dit.blocks) // 2, description="block")
    weight = w.FloatSlider(1.0, min=-1, max=4, step=0.25, description="w", continuous_update=False)
    k = w.IntSlider(8, 1, min(64, dit.width), description="k", continuous_update=False)

    def show() -> Comparison:
        given = (text.value, seed.value, rule.value, k.value, layer.value, weight.value)
        return guided(dit, *given, steps=steps, cfg=cfg, guidance=guidance)

    return _board(show, text, [seed, rule, layer], [weight, k])


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
    steps_moved: tuple[int, int],
    *,
    steps: int,
    cfg: float | None,
    guidance: float | None,
) -> Comparison:
    """Source, target and the target with the source's channels; first and last block and step inclusive.

    ``rule`` is "top", "bottom", "random" or "all"; ``mask`` "all", "source", "target" or "union"; ``branch`` "both", "cond"
    or "uncond".
    """
    chosen = {"top": TopK(k), "bottom": BottomK(k), "random": RandomK(k, without_top=k), "all": TopK(dit.width)}[rule]
    window = {**_window(layers, steps_moved), "branches": None if branch == "both" else branch}
    edit = edits.Transport(chosen, source, mask=None if mask == "all" else mask, strength=strength, **window)
    call = {"steps": steps, "cfg": cfg, "guidance": guidance}
    plain = [dit.generate(prompt, seed, **call) for prompt in (source, target)]
    return plain[0] | plain[1] | dit.generate(target, seed, edits=[edit], **call)


def transport(
    dit: DiT, target: str, source: str, *, steps: int = 20, cfg: float | None = None, guidance: float | None = None
) -> ipywidgets.VBox:
    """Two prompts, channels, k, strength, mask, branch, blocks and steps; source, target and result side by side."""
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


def subject_driven(
    dit: DiT,
    prompt: str,
    seed: int,
    picture: np.ndarray,
    told: str,
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
    """The prompt's picture, and the same with channels of a reference ``picture``, uint8 (1, H, W, 3).

    ``rule`` is "top", "random" or "all"; ``mask`` "all", "source", "target" or "union"; ``route`` as of ``Pictures``.
    """
    chosen = {"top": TopK(k), "random": RandomK(k, without_top=k), "all": TopK(dit.width)}[rule]
    source = edits.Pictures(picture, told, route)
    edit = edits.Transport(chosen, source, mask=None if mask == "all" else mask, strength=strength)
    call = {"steps": steps, "cfg": cfg, "guidance": guidance}
    return dit.generate(prompt, seed, **call) | dit.generate(prompt, seed, edits=[edit], **call)


def subject(
    dit: DiT,
    prompt: str,
    picture: np.ndarray,
    told: str = "",
    *,
    steps: int = 20,
    cfg: float | None = None,
    guidance: float | None = None,
) -> ipywidgets.VBox:
    """A prompt, a reference, uploaded or ``picture`` (H, W, 3), and what it shows; channels, k, strength, tokens, route."""
    import ipywidgets as w

    text, seed = _prompt_and_seed(prompt)
    upload = w.FileUpload(accept="image/*", description="reference")
    words = w.Text(told, description="shows", continuous_update=False, layout=w.Layout(width="520px"))
    rule = w.Dropdown(options=["top", "random", "all"], description="channels")
    k = w.IntSlider(8, 1, min(64, dit.width // 2), description="k", continuous_update=False)
    strength = w.FloatSlider(value=1.0, min=0, max=1, step=0.05, description="strength", continuous_update=False)
    mask = w.Dropdown(options=["union", "source", "target", "all"], description="tokens")
    route = w.Dropdown(options=list(edits.ROUTES), description="route")
    preview = w.Image(value=png(picture), width=96, height=96)

    def show() -> Comparison:
        given = open_picture(bytes(upload.value[0]["content"]), (dit.size, dit.size)) if upload.value else picture[None]
        preview.value = png(given[0])
        chosen = (words.value, rule.value, k.value, strength.value, mask.value, route.value)
        return subject_driven(dit, text.value, seed.value, given, *chosen, steps=steps, cfg=cfg, guidance=guidance)

    board = _board(show, text, [upload, words], [seed, rule, k], [strength, mask, route])
    board.children = (*board.children[:2], preview, *board.children[2:])
    return board


def filmed(
    dit: DiT,
    target: str,
    source: str,
    seed: int,
    way: str,
    k: int,
    mask: str,
    frames: int,
    *,
    steps: int,
    cfg: float | None,
    guidance: float | None,
) -> Comparison:
    """A strip of pictures from target to source, evenly spaced in strength.

    ``way`` is "top", "random" or "all" for a transport of such channels in the tokens of ``mask`` ("all", "source",
    "target", "union"), or "prompt" for interpolated prompt embeddings.
    """
    rules = {"top": TopK(k), "random": RandomK(k, without_top=k), "all": TopK(dit.width)}
    call, strip = {"steps": steps, "cfg": cfg, "guidance": guidance}, []
    for number in range(frames):
        strength = number / (frames - 1)
        if way == "prompt":
            edit = edits.Interpolate(source=source, strength=strength)
        else:
            edit = edits.Transport(rules[way], source, mask=None if mask == "all" else mask, strength=strength)
        strip.append(dit.generate(target, seed, edits=[edit] if strength else [], **call))
    return functools.reduce(operator.or_, strip)


def film(
    dit: DiT, target: str, source: str, *, steps: int = 20, cfg: float | None = None, guidance: float | None = None
) -> ipywidgets.VBox:
    """Two prompts, which channels or the prompt itself, k, tokens and number of frames; the strip from one to the other."""
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
        return filmed(dit, *given, steps=steps, cfg=cfg, guidance=guidance)

    return _board(show, text, [other], [seed, way, k], [mask, frames])


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
    """The clusters and the heat of one generation's tokens at one site; ``rule`` is "top", "bottom" or "random"."""
    chosen = {"top": TopK(k), "bottom": BottomK(k), "random": RandomK(k, without_top=k)}[rule]
    record = Clusters(channels=chosen, clusters=clusters, layers=layer, steps=step, branches="cond")
    run = dit.generate(prompt, seed, steps=steps, cfg=cfg, guidance=guidance, record=[record])
    data = run.records.clusters.squeeze(("sample", "step", "branch", "layer"))
    shape = run.images.shape[1:3]
    data["label"] = data.label.copy(data=by_border(data.label.values, token_grid(data.sizes["token"], *shape)))
    where = f"{data.block.item()}, step {step}, {rule} {k}"
    return plots.interactive_clusters(on_grid(data.label, *shape), on_grid(data.heat, *shape), run.images[0], where)


def cluster(
    dit: DiT, prompt: str, *, steps: int = 20, cfg: float | None = None, guidance: float | None = None
) -> ipywidgets.VBox:
    """Prompt, seed, block, step, k, rule and number of clusters; the picture beside its clusters and its heat."""
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


def corresponding(
    dit: DiT, pair: Pair, point: np.ndarray, layer: int, kind: str, discarded: int, *, sigma: float, ensemble: int
) -> go.Figure:
    """A point of a pair's source and its match in the target, by the features of one block without its top channels."""
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


def correspond(dit: DiT, pairs: Sequence[Pair], *, sigma: float = 0.26, ensemble: int = 4) -> ipywidgets.VBox:
    """Pair, block, features and number of discarded channels; a click into the source, or two sliders, set the point."""
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
            moving["now"] = True  # two sliders move, the point but once
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
        except Exception as error:  # shown beside the controls, where the person looks
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


def told(estimates: Mapping[tuple[str, str], metrics.Estimate], claim: str) -> pd.DataFrame:
    """The number of a claim under every setting, with its verdict; ``estimates`` by (claim, setting)."""
    import pandas as pd

    found = {setting: value for (name, setting), value in estimates.items() if name == claim}
    rows = [(setting, str(value), metrics.verdict(claim, value)) for setting, value in found.items()]
    return pd.DataFrame(rows, columns=["setting", "measured", "verdict"])


def claim(estimates: Mapping[tuple[str, str], metrics.Estimate]) -> ipywidgets.VBox:
    """Pick a claim; its source, metric, rule and controls as written down, and its evidence."""
    import ipywidgets as w

    which = w.Dropdown(options=list(dict.fromkeys(name for name, _ in estimates)), description="claim")
    text, table = w.HTML(), w.HTML()

    def show(_: object = None) -> None:
        about = metrics.claims()[which.value]
        lines = {key: about[key] for key in ("says", "source", "metric", "controls", "notebook")} | {
            "rule": metrics.rule(which.value)
        }
        text.value = "<br>".join(f"<b>{name}</b>: {value}" for name, value in lines.items())
        table.value = told(estimates, which.value).to_html(index=False, border=0)

    which.observe(show, "value")
    show()
    return w.VBox([which, text, table])


def _prompt_and_seed(prompt: str) -> tuple[ipywidgets.Text, ipywidgets.BoundedIntText]:
    import ipywidgets as w

    text = w.Text(prompt, description="prompt", continuous_update=False, layout=w.Layout(width="720px"))
    return text, w.BoundedIntText(0, 0, 2**31 - 1, description="seed", layout=w.Layout(width="180px"))


def _board(show: Callable[[], object], text: ipywidgets.Text, *rows: list[ipywidgets.Widget]) -> ipywidgets.VBox:
    """Rows of controls over what ``show`` gives, which is called again whenever one of them changes."""
    import ipywidgets as w
    from IPython.display import display

    status, output = w.HTML(), w.Output()

    def run(_: object = None) -> None:
        status.value = "running ..."
        try:
            shown = show()
        except Exception as error:  # shown beside the controls, where the person looks
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
