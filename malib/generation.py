"""What a call of ``generate`` gives: images, records and where they came from; how it shows itself and how it is stored."""

from __future__ import annotations

import html
import struct
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any, ClassVar

import numpy as np

if TYPE_CHECKING:
    from PIL.Image import Image


def check_pictures(images: np.ndarray) -> None:
    """Refuse what is no stack of pictures, uint8 (B, H, W, 3)."""
    if not isinstance(images, np.ndarray):
        raise TypeError(f"Pictures must be an array, uint8 (B, H, W, 3), not {type(images).__name__}; see open_picture.")
    if images.dtype != np.uint8 or images.ndim != 4 or images.shape[3] != 3:
        raise ValueError(f"Pictures must be uint8 (B, H, W, 3), not {images.dtype} {images.shape}.")


def open_picture(source: str | Path | bytes, size: tuple[int, int]) -> np.ndarray:
    """A picture file as an array: turned as its EXIF says, on white where it is transparent, cropped to the middle.

    Args:
        source: path of a PNG, JPEG, WebP, ... or its bytes, as an upload widget gives them.
        size: (height, width) in pixels that is wanted.

    Returns:
        uint8 (1, height, width, 3).

    Raises:
        ValueError: there is no such file, or it is no picture.
    """
    import io

    from PIL import Image, ImageOps, UnidentifiedImageError

    name = "The picture" if isinstance(source, bytes) else f"'{source}'"
    try:
        with Image.open(io.BytesIO(source) if isinstance(source, bytes) else source) as opened:
            opened.load()
            with suppress(struct.error, ValueError, SyntaxError):  # a broken EXIF says nothing; the picture is whole
                ImageOps.exif_transpose(opened, in_place=True)
            turned = opened.convert("RGBA")
    except (OSError, SyntaxError, ValueError, struct.error, EOFError, Image.DecompressionBombError) as error:
        told = "not a known format" if isinstance(error, UnidentifiedImageError) else str(error)
        reason = (told.splitlines() or [type(error).__name__])[0][:120]
        raise ValueError(
            f"{name} could not be read as a picture ({reason}); give a whole PNG, JPEG or WebP file."
        ) from error
    white = Image.new("RGBA", turned.size, "white")
    white.alpha_composite(turned)
    fitted = ImageOps.fit(white.convert("RGB"), (size[1], size[0]), Image.Resampling.LANCZOS)
    return np.asarray(fitted, dtype=np.uint8)[None].copy()


@dataclass(frozen=True, eq=False)
class Renoised:
    """Where a generation begins: given pictures under noise, ``(1 - sigma) * latents + sigma * noise``.

    A model trained as DDPM (PixArt) reads ``sqrt(1 - sigma²) * latents + sigma * noise`` instead, at its nearest timestep.
    With one step the model reads the pictures at exactly this sigma, and the image is its one-step guess at them (rectified
    flow). The noise is that of the sample's seed, the same as in a plain generation.

    Attributes:
        images: uint8 (samples, height, width, 3), one a prompt.
        sigma: noise level, above 0 and at most 1; the steps of the call lead from here to 0, evenly in sigma (DDPM: in
            timesteps).
    """

    version: ClassVar[int] = 1
    images: np.ndarray
    sigma: float

    def __post_init__(self) -> None:
        check_pictures(self.images)
        if not 0 < self.sigma <= 1:
            raise ValueError(f"sigma is {self.sigma}; it must be above 0 and at most 1.")


@dataclass(frozen=True)
class Generation:
    """What one call of ``generate`` gave.

    Attributes:
        images: uint8 (samples, height, width, 3).
        latents: the final latents as the pipeline holds them, float32 (samples, ...).
        records: one ``xarray.Dataset`` for each record and edit, under its snake_case name (``channel_stats``, ``disrupt``);
            the second of a kind is ``channel_stats_2``.
        provenance: the call, key, weights' fingerprint, sigmas, versions, device and dtype.
    """

    images: np.ndarray
    latents: np.ndarray
    records: SimpleNamespace
    provenance: dict[str, Any] = field(repr=False)

    @property
    def prompts(self) -> list[str]:
        """One prompt a sample."""
        return self.provenance["call"]["prompts"]

    @property
    def seeds(self) -> list[int]:
        """One seed a sample."""
        return self.provenance["call"]["seeds"]

    @property
    def pil(self) -> list[Image]:
        """The images for PIL."""
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
        told = [_in_words(g) for g in self.columns]
        several = len({tuple(g.prompts) for g, words in zip(self.columns, told, strict=True) if not words}) > 1
        named = [w or (", ".join(g.prompts) if several else "undisturbed") for g, w in zip(self.columns, told, strict=True)]
        heads = "".join(f'<th style="{left}">{html.escape(name)}</th>' for name in named)
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
    """A generation as named arrays and a JSON document, for the store."""
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
    """What ``flatten`` gave, as a generation."""
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


def _in_words(generation: Generation) -> str:
    """The edits of a generation in a few words, without the fields that say "everywhere"; "" where there are none."""
    plain = {"mode": "zero", "factor": 0.0, "seed": 0, "whose": "source", "strength": 1.0}
    silent = ("type", "version", "stream", "point", "kind")

    def words(value: Any) -> str:
        if isinstance(value, dict) and "array" in value:
            return "x".join(map(str, value["shape"]))
        if isinstance(value, dict) and value.get("type") in ("Pictures", "Recorded"):
            return {"Pictures": "pictures", "Recorded": "recorded"}[value["type"]]
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
    """A picture, uint8 (H, W, 3), as the bytes of a PNG file."""
    import io

    from PIL import Image

    buffer = io.BytesIO()
    Image.fromarray(image).save(buffer, "png")
    return buffer.getvalue()
