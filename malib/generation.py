"""The result of a call of ``generate``: images, records and provenance, their display and their storage format."""

from __future__ import annotations

import html
from dataclasses import dataclass, field
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any, ClassVar

import numpy as np

if TYPE_CHECKING:
    from PIL.Image import Image


def check_images(images: np.ndarray) -> None:
    """Raise TypeError or ValueError unless ``images`` is an array of images, uint8 (B, H, W, 3)."""
    if not isinstance(images, np.ndarray):
        raise TypeError(
            f"Images must be an array, uint8 (B, H, W, 3), not {type(images).__name__}; see viz.images.open_image."
        )
    if images.dtype != np.uint8 or images.ndim != 4 or images.shape[3] != 3:
        raise ValueError(f"Images must be uint8 (B, H, W, 3), not {images.dtype} {images.shape}.")


@dataclass(frozen=True, eq=False)
class Renoised:
    """Start of a generation: given images at a noise level, ``(1 - sigma) * latents + sigma * noise``.

    A model trained as DDPM (PixArt) reads ``sqrt(1 - sigma²) * latents + sigma * noise`` instead, at its nearest
    timestep. With one step the model reads the images at exactly this sigma, and the result is its one-step estimate of
    them (rectified flow). The noise is that of the sample's seed, the same as in a plain generation.

    Attributes:
        images: uint8 (samples, height, width, 3), one for each prompt.
        sigma: noise level, above 0 and at most 1; the steps of the call lead from here to 0, evenly in sigma (DDPM: in
            timesteps).
    """

    version: ClassVar[int] = 1
    images: np.ndarray
    sigma: float

    def __post_init__(self) -> None:
        check_images(self.images)
        if not 0 < self.sigma <= 1:
            raise ValueError(f"sigma is {self.sigma}; it must be above 0 and at most 1.")


@dataclass(frozen=True)
class Generation:
    """The result of one call of ``generate``.

    Attributes:
        images: uint8 (samples, height, width, 3).
        latents: the final latents in the pipeline's layout, float32 (samples, ...).
        records: one ``xarray.Dataset`` for each record and edit, under its snake_case name (``channel_stats``,
            ``disrupt``); the second of a kind is ``channel_stats_2``.
        provenance: the call, key, fingerprint of the weights, sigmas, versions, device and dtype.
    """

    images: np.ndarray
    latents: np.ndarray
    records: SimpleNamespace
    provenance: dict[str, Any] = field(repr=False)

    @property
    def prompts(self) -> list[str]:
        """One prompt for each sample."""
        return self.provenance["call"]["prompts"]

    @property
    def seeds(self) -> list[int]:
        """One seed for each sample."""
        return self.provenance["call"]["seeds"]

    @property
    def pil(self) -> list[Image]:
        """The images as PIL images."""
        from PIL import Image

        return [Image.fromarray(image) for image in self.images]

    def __len__(self) -> int:
        return len(self.images)

    def __repr__(self) -> str:
        names = ", ".join(vars(self.records)) or "none"
        return f"Generation({len(self)} samples of {self.images.shape[2]} x {self.images.shape[1]} px, records: {names})"

    def __or__(self, other: Generation | Comparison) -> Comparison:
        return Comparison((self,)) | other

    def _repr_html_(self) -> str:
        return Comparison((self,))._repr_html_()


@dataclass(frozen=True)
class Comparison:
    """Generations side by side, one column each: ``base | hurt``."""

    columns: tuple[Generation, ...]

    def __or__(self, other: Generation | Comparison) -> Comparison:
        return Comparison(self.columns + (other.columns if isinstance(other, Comparison) else (other,)))

    def _repr_html_(self) -> str:
        left, rows = "text-align:left;vertical-align:bottom;max-width:24em;white-space:normal", []
        summaries = [_summary(g) for g in self.columns]
        several = len({tuple(g.prompts) for g, words in zip(self.columns, summaries, strict=True) if not words}) > 1
        plain = [", ".join(g.prompts) if several else "unedited" for g in self.columns]
        labels = [w or p for w, p in zip(summaries, plain, strict=True)]
        heads = "".join(f'<th style="{left}">{html.escape(name)}</th>' for name in labels)
        for i in range(max(len(g) for g in self.columns)):
            cells = (
                f'<td style="{left}"><img style="{_sized(g)}" title="{html.escape(g.prompts[i])}, seed {g.seeds[i]}" '
                f'src="{_inline(g.images[i])}"></td>'
                if i < len(g)
                else "<td></td>"
                for g in self.columns
            )
            rows.append(f"<tr>{''.join(cells)}</tr>")
        return f"<table><tr>{heads}</tr>{''.join(rows)}</table>"


def flatten(result: Generation) -> tuple[dict[str, np.ndarray], dict]:
    """Convert a generation to named arrays and a JSON document, for the store."""
    arrays, layout = {"images": result.images, "latents": result.latents}, {}
    for name, data in vars(result.records).items():
        layout[name] = {"variables": {}, "coords": {}}
        for part, variables in (("variables", data.data_vars), ("coords", data.coords)):
            for key, variable in variables.items():
                entry: dict[str, Any] = {"dims": list(variable.dims)}
                if variable.dtype.kind in "USO":
                    entry["values"] = variable.values.tolist()
                else:
                    arrays[f"{name}/{part}/{key}"] = variable.values
                layout[name][part][key] = entry
    return arrays, {"provenance": result.provenance, "records": layout}


def restore(arrays: dict[str, np.ndarray], document: dict) -> Generation:
    """Build a generation from the ``arrays`` and the ``document`` that ``flatten`` returned."""
    import xarray as xr

    records = {}
    for name, parts in document["records"].items():
        built = {
            part: {
                key: (entry["dims"], entry["values"] if "values" in entry else arrays[f"{name}/{part}/{key}"])
                for key, entry in variables.items()
            }
            for part, variables in parts.items()
        }
        records[name] = xr.Dataset(built["variables"], coords=built["coords"])
    return Generation(arrays["images"], arrays["latents"], SimpleNamespace(**records), document["provenance"])


def _summary(generation: Generation) -> str:
    """The edits of a generation in a few words, without the fields that say "everywhere"; "" where there are none."""
    plain = {"mode": "zero", "factor": 0.0, "seed": 0, "select_on": "source", "strength": 1.0}
    silent = ("type", "version", "stream", "point", "kind")

    def words(value: Any) -> str:
        if isinstance(value, dict) and "array" in value:
            return "x".join(map(str, value["shape"]))
        if isinstance(value, dict) and value.get("type") in ("Images", "Recorded"):
            return {"Images": "images", "Recorded": "recorded"}[value["type"]]
        if isinstance(value, dict):
            unused = {"factor": value.get("mode") != "scale"}
            said = [
                f"{k}={words(v)}"
                for k, v in value.items()
                if k not in silent and v is not None and not (k in plain and v == plain[k]) and not unused.get(k)
            ]
            return f"{value.get('type', '')}({', '.join(said)})"
        if isinstance(value, list):
            whole = len(value) > 2 and all(isinstance(v, int) for v in value)
            if whole and value == list(range(value[0], value[-1] + 1)):
                return f"{value[0]}-{value[-1]}"
            return ", ".join(map(words, value))
        return f"{value:.3g}" if isinstance(value, float) else str(value)

    return ", ".join(words(e) for e in generation.provenance["call"]["edits"])


def _sized(generation: Generation) -> str:
    width = max(192, min(generation.images.shape[2], 384))
    return f"image-rendering:pixelated;max-width:none;width:{width}px"


def _inline(image: np.ndarray) -> str:
    import base64

    return "data:image/png;base64," + base64.b64encode(png(image)).decode()


def png(image: np.ndarray) -> bytes:
    """Encode an image, uint8 (H, W, 3), as a PNG file."""
    import io

    from PIL import Image

    buffer = io.BytesIO()
    Image.fromarray(image).save(buffer, "png")
    return buffer.getvalue()
