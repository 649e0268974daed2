"""Interactive plotly figures for the widgets."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

if TYPE_CHECKING:
    import plotly.graph_objects as go
    import xarray as xr


def interactive_map(values: xr.DataArray, image: np.ndarray, title: str) -> go.Figure:
    """Plot one channel over the image grid, next to the image.

    Args:
        values: (row, column).
        image: uint8 (height, width, 3).
        title: of the figure.
    """
    import plotly.graph_objects as go
    from plotly.subplots import make_subplots

    figure = make_subplots(1, 2, subplot_titles=("image", title), horizontal_spacing=0.06)
    figure.add_trace(go.Image(z=image), 1, 1)
    figure.add_trace(
        go.Heatmap(z=values.values[::-1], colorscale="RdBu_r", zmid=float(np.median(values)), colorbar_len=0.9), 1, 2
    )
    figure.update_xaxes(visible=False)
    figure.update_yaxes(visible=False)
    figure.update_yaxes(scaleanchor="x2", col=2)
    return figure.update_layout(height=340, width=720, margin={"l": 10, "r": 10, "t": 40, "b": 10})


def interactive_match(
    source: np.ndarray, target: np.ndarray, similarity: np.ndarray, point: np.ndarray, found: np.ndarray
) -> go.Figure:
    """Plot the source with a point, the target with its match, and the similarity of every pixel.

    Args:
        source: uint8 (height, width, 3).
        target: uint8 (height, width, 3).
        similarity: (height, width) of the target.
        point: (2,) in the source.
        found: (2,) in the target.
    """
    import plotly.graph_objects as go
    from plotly.subplots import make_subplots

    figure = make_subplots(
        1, 3, subplot_titles=("source: click a point", "target: its match", "similarity"), horizontal_spacing=0.03
    )
    for column, image in ((1, source), (2, target)):
        figure.add_trace(go.Image(z=image), 1, column)
    figure.add_trace(go.Heatmap(z=similarity, colorscale="Viridis", colorbar_len=0.9), 1, 3)
    for column, (x, y) in ((1, point), (2, found), (3, found)):
        marker = {"size": 13, "symbol": "cross-thin", "line": {"width": 3, "color": "white"}}
        figure.add_trace(go.Scatter(x=[x - 0.5], y=[y - 0.5], mode="markers", marker=marker, hoverinfo="skip"), 1, column)
    figure.update_xaxes(visible=False)
    figure.update_yaxes(visible=False)
    figure.update_yaxes(autorange="reversed", scaleanchor="x3", col=3)
    layout = {"height": 340, "width": 980, "showlegend": False, "margin": {"l": 10, "r": 10, "t": 40, "b": 10}}
    return figure.update_layout(**layout)


def interactive_spectrum(scores: xr.DataArray, k: int, title: str) -> go.Figure:
    """Plot scores over the median by channel, the top ``k`` marked.

    Args:
        scores: (channel).
        k: number of marked channels.
        title: of the figure.
    """
    import plotly.graph_objects as go

    values = (scores / scores.median()).values
    colours = np.where(np.argsort(np.argsort(-values)) < k, "#d55e00", "#8fa3b5")
    figure = go.Figure(go.Bar(x=np.arange(len(values)), y=values, marker_color=colours, marker_line_width=0))
    figure.update_layout(
        title=title,
        xaxis_title="channel",
        yaxis_title="score / median",
        bargap=0,
        height=320,
        width=720,
        margin={"l": 10, "r": 10, "t": 50, "b": 10},
        template="plotly_white",
    )
    return figure


def interactive_clusters(labels: xr.DataArray, heat: xr.DataArray, image: np.ndarray, title: str) -> go.Figure:
    """Plot an image, its clusters and its heat.

    Args:
        labels: (row, column).
        heat: (row, column).
        image: uint8 (height, width, 3).
        title: of the figure.
    """
    import plotly.graph_objects as go
    from plotly.subplots import make_subplots

    figure = make_subplots(1, 3, subplot_titles=("image", "clusters", "heat"), horizontal_spacing=0.04)
    figure.add_trace(go.Image(z=image), 1, 1)
    figure.add_trace(go.Heatmap(z=labels.values[::-1], colorscale="Viridis", showscale=False), 1, 2)
    figure.add_trace(go.Heatmap(z=heat.values[::-1], colorscale="Magma", colorbar_len=0.9), 1, 3)
    figure.update_xaxes(visible=False)
    figure.update_yaxes(visible=False)
    for column in (2, 3):
        figure.update_yaxes(scaleanchor=f"x{column}", col=column)
    return figure.update_layout(title=title, height=330, width=960, margin={"l": 10, "r": 10, "t": 60, "b": 10})
