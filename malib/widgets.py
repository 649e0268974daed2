"""ipywidgets controls. Every widget is a view over a plain function, so a headless run calls the function instead."""

from __future__ import annotations

from typing import TYPE_CHECKING

from . import plots
from .channels import TopK
from .records import ChannelStats, HiddenStates
from .spatial import on_grid

if TYPE_CHECKING:
    import ipywidgets
    import plotly.graph_objects as go

    from .dit import DiT, Generation


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

    text = w.Text(prompt, description="prompt", continuous_update=False, layout=w.Layout(width="720px"))
    seed = w.BoundedIntText(0, 0, 2**31 - 1, description="seed", layout=w.Layout(width="180px"))
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
            status.value = f"<b>{error}</b>"
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
