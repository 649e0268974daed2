"""One call of ``generate``: its checked arguments, and its batches with auxiliary samples appended to the primary ones."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar

import numpy as np
import torch

from . import prompts as prompt_tools
from .generation import Renoised
from .hooks import Tap
from .latents import interpolated, noise_levels, replaced_scheduler
from .sources import Images, Recorded
from .window import Run, Window, name_of

if TYPE_CHECKING:
    import xarray as xr
    from torch import Tensor

    from .dit import DiT

Route = Callable[[float], "Tensor"]
"""Unpacked latents of given images as a function of sigma."""


@dataclass(frozen=True, eq=False)
class Call:
    """The arguments of ``DiT.generate``, under the same names; ``checked`` fills in the defaults."""

    version: ClassVar[int] = 1

    prompts: list[str]
    seeds: list[int]
    steps: int
    cfg: float
    guidance: float | None
    record: list[Window]
    edits: list[Window]
    size: tuple[int, int]
    start: Renoised | None

    def checked(self, dit: DiT, guide: Any) -> Call:
        """Return the call with all defaults of ``dit`` and with the ``guide`` as its edit; errors as of ``generate``."""
        prompts, seeds, start = self.prompts, self.seeds, self.start
        prompts = [prompts] if isinstance(prompts, str) else list(prompts)
        prompt_tools.check(prompts)
        seeds = [seeds + i for i in range(len(prompts))] if isinstance(seeds, int) else [int(s) for s in seeds]
        if len(seeds) != len(prompts):
            raise ValueError(f"{len(prompts)} prompts but {len(seeds)} seeds were given; give one seed, or one per prompt.")
        if self.steps < 1:
            raise ValueError(f"steps is {self.steps}; it must be at least 1.")
        record, edits = _as_windows(self.record, "record"), _with_guide(_as_windows(self.edits, "edits"), guide)
        cfg, guidance = _guidances(dit, self.cfg, self.guidance)
        sources = [p for e in edits if "source" in getattr(e, "auxiliary", ()) for p in e.prompts]
        prompt_tools.warn_unknown_words(dit.pipeline, dit.name, [*prompts, *sources])
        height, width = self.size or (start.images.shape[1:3] if start else (dit.size, dit.size))
        dit.grid((height, width))
        if dit.family.classes and (height, width) != (dit.size, dit.size):
            raise ValueError(
                f"{dit.name} generates {dit.size} x {dit.size} pixels alone, not {width} x {height}; omit size."
            )
        if start and (len(start.images) != len(prompts) or start.images.shape[1:3] != (height, width)):
            count, *shape = start.images.shape[:3]
            raise ValueError(
                f"start has {count} images of {shape[1]} x {shape[0]} pixels for {len(prompts)} prompts of {width} x "
                f"{height}; give one image of this size per prompt."
            )
        return Call(prompts, seeds, self.steps, float(cfg), guidance, record, edits, (height, width), start)


class Sampler:
    """Run the batches of a call.

    A batch holds the primary samples, and after them one group of auxiliary samples for each source, degraded model or
    unedited target that an edit reads. Records see the primary samples only.

    Args:
        dit: the model.
        call: what to generate.

    Raises:
        ValueError: a record or an edit does not fit the model or the call.
    """

    def __init__(self, dit: DiT, call: Call) -> None:
        self._dit, self._call = dit, call
        run = Run(len(call.prompts), call.steps, dit.blocks, call.size, call.cfg)
        self._listeners = [item.start(run) for item in (*call.edits, *call.record)]
        for edit in call.edits:
            self._check_site(edit)
            self._check_source(edit)
        self._groups = self._assign_groups()

    def run(self) -> tuple[np.ndarray, np.ndarray, list[float]]:
        """Generate all samples.

        Returns:
            Images, uint8 (samples, H, W, 3); final latents, float32 (samples, ...); and sigma of each step.

        Raises:
            MemoryError: a batch does not fit on the device.
        """
        call, dit = self._call, self._dit
        images, latents, sigmas = [], [], []
        count = max(1, dit.batch_size // (1 + len(self._groups)))
        for first in range(0, len(call.prompts), count):
            try:
                batch = self._batch(slice(first, first + count))
            except BaseException as error:
                for listener in self._listeners:
                    listener.discard()
                if isinstance(error, torch.OutOfMemoryError):
                    raise MemoryError(
                        f"{count * (1 + len(self._groups))} samples of {call.size[1]} x {call.size[0]} pixels do not fit on "
                        f"{dit.device}; use a smaller batch_size or size, fewer records, or load(..., offload='model') or "
                        "quantize='4bit'."
                    ) from error
                raise
            images.append(batch[0])
            latents.append(batch[1])
            sigmas = batch[2]
            self._check_recorded(sigmas)
            for listener in self._listeners:
                listener.flush()
        return np.concatenate(images), np.concatenate(latents), sigmas

    def datasets(self, sigmas: Sequence[float]) -> dict[str, xr.Dataset]:
        """Return the datasets of all edits and records by name, with prompt, seed, sigma and block as coordinates."""
        call, blocks = self._call, self._dit.blocks
        datasets: dict[str, xr.Dataset] = {}
        for item, listener in zip((*call.edits, *call.record), self._listeners, strict=True):
            data = listener.dataset()
            if "sample" in data.dims:
                data = data.assign_coords(prompt=("sample", call.prompts), seed=("sample", call.seeds))
            if "step" in data.dims:
                data = data.assign_coords(sigma=("step", [sigmas[i] for i in data.step.values]))
            if "layer" in data.dims:
                data = data.assign_coords(block=("layer", [blocks[i].name for i in data.layer.values]))
            name, number = name_of(item), 2
            while name in datasets:
                name, number = f"{name_of(item)}_{number}", number + 1
            datasets[name] = data
        return datasets

    def _check_site(self, edit: Window) -> None:
        """Refuse an edit whose branch or stream this run lacks: it would silently change nothing."""
        name = type(edit).__name__
        if edit.branches is not None and "cond" not in edit.branches and self._call.cfg <= 1:
            raise ValueError(f"{name} is for the branch uncond, but cfg=1 has the branch cond alone; use cfg above 1.")
        stacks = {b.stack.label: b.stack for b in self._dit.blocks if edit.layers is None or b.layer in edit.layers}
        sites = {"output": "returns", "input": "arguments"}
        if edit.point in sites and not any(edit.stream in getattr(s, sites[edit.point]) for s in stacks.values()):
            raise ValueError(
                f"{name} is for the {edit.stream} stream, which no block of its layers has at its {edit.point}; use "
                "another stream, or other layers."
            )

    def _check_source(self, edit: Window) -> None:
        dit, source, (height, width) = self._dit, getattr(edit, "source", None), self._call.size
        if isinstance(source, Images):
            if source.images.shape[1:3] != (height, width):
                raise ValueError(
                    f"The source images have {source.images.shape[2]} x {source.images.shape[1]} pixels, the generation "
                    f"{width} x {height}; resize them, or pass size=."
                )
            dit.check_images_enter(("flow",))
        if isinstance(source, Recorded) and source.weights != dit.fingerprint:
            raise ValueError(f"The source was recorded with other weights than those of {dit.name}; record it again.")
        if edit.point == "prompt" and not dit.family.conditioning:
            raise ValueError(f"{dit.name} represents prompts in a form that {type(edit).__name__} cannot mix.")

    def _check_recorded(self, sigmas: list[float]) -> None:
        """Refuse a source that was recorded at other noise levels than those of the run."""
        for source in (getattr(edit, "source", None) for edit in self._call.edits):
            if isinstance(source, Recorded) and not np.allclose(source.sigmas, sigmas, atol=1e-4):
                raise ValueError(
                    f"The source was recorded from sigma {source.sigmas[0]:.3g} on and this run begins at {sigmas[0]:.3g}, "
                    "or the steps between differ; record it with the same start and scheduler."
                )

    def _assign_groups(self) -> list[Window | None]:
        """Number the groups of auxiliary samples, tell each listener its own, and return the edit of each.

        None stands for the unedited targets, which all edits share.
        """
        groups: list[Window | None] = []
        for edit, listener in zip(self._call.edits, self._listeners, strict=False):
            for name in getattr(edit, "auxiliary", ()):
                if name in ("source", "degraded"):
                    groups.append(edit)
                    listener.groups[name] = len(groups) - 1
                else:
                    if None not in groups:
                        groups.append(None)
                    listener.groups[name] = groups.index(None)
        return groups

    def _batch(self, part: slice) -> tuple[np.ndarray, np.ndarray, list[float]]:
        """Run the samples of one part of the call: images, final latents and sigmas."""
        call, dit = self._call, self._dit
        start = Renoised(call.start.images[part], call.start.sigma) if call.start else None
        with replaced_scheduler(dit.pipeline) if start and dit.family.images == "flow" else nullcontext():
            primary = len(call.prompts[part])
            prompts, seeds = call.prompts[part], call.seeds[part]
            routes: list[tuple[slice, Route]] = []
            for edit in self._groups:
                if edit is None or "degraded" in edit.auxiliary:
                    prompts, seeds = prompts + call.prompts[part], seeds + call.seeds[part]
                    continue
                source_prompts = _rows(edit.prompts, part, primary)
                source_seeds = _rows(edit.seeds, part, primary) if edit.seeds else call.seeds[part]
                if isinstance(edit.source, Images):
                    images = np.stack(_rows(edit.source.images, part, primary))
                    rows = slice(len(prompts), len(prompts) + primary)
                    routes.append((rows, self._route(images, source_prompts, source_seeds, edit.source.route)))
                prompts, seeds = prompts + source_prompts, seeds + source_seeds
            if start:
                start = Renoised(np.concatenate([start.images] * (1 + len(self._groups))), start.sigma)
            arguments = dit.arguments(prompts, seeds, call.steps, call.cfg, call.guidance, call.size, start)
            if routes:
                self._enter(arguments, routes, start.sigma if start else 1.0, seeds, bool(start))
            return self._run(arguments, primary)

    def _route(self, images: np.ndarray, prompts: list[str], seeds: list[int], kind: str) -> Route:
        """Return the latents of source images at every noise level: the images under noise, or on their inverted path."""
        dit, latents = self._dit, self._dit.latents
        if kind == "inversion":
            return interpolated(dit.invert(images, prompts, self._call.steps, self._call.guidance))
        clean = latents.encode(images)
        noise = latents.noise(clean.shape, seeds)
        return lambda sigma: latents.renoise(clean, noise, sigma)

    def _enter(
        self, arguments: dict[str, Any], routes: list[tuple[slice, Route]], sigma: float, seeds: list[int], started: bool
    ) -> None:
        """Put source images into the batch, at the first noise level and before every further step."""
        latents, scheduler = self._dit.latents, self._dit.pipeline.scheduler
        if not started:
            shape = routes[0][1](sigma).shape
            noise = latents.noise((len(seeds), *shape[1:]), seeds)
            arguments["latents"] = latents.as_argument(noise)
        for rows, at in routes:
            arguments["latents"][rows] = latents.as_argument(at(sigma))

        def follow(_: Any, index: int, timestep: Any, tensors: dict[str, Any]) -> dict[str, Any]:
            state = tensors["latents"].clone()
            for rows, at in routes:
                state[rows] = latents.pack(at(float(scheduler.sigmas[index + 1]))).to(state.dtype)
            return {"latents": state}

        arguments["callback_on_step_end"] = follow

    def _run(self, arguments: dict[str, Any], primary: int) -> tuple[np.ndarray, np.ndarray, list[float]]:
        """Call the pipeline once: images, final latents and sigmas of the ``primary`` samples."""
        dit, samples, pipeline = self._dit, len(arguments["generator"]), self._dit.pipeline
        rows, columns = dit.grid(self._call.size)
        groups = samples // primary - 1
        with (
            torch.no_grad(),
            Tap(pipeline, dit.family, samples, self._listeners, groups, rows * columns) as tap,
        ):
            pixels = np.asarray(pipeline(**arguments).images)[:primary]
        if not np.isfinite(pixels).all():
            warnings.warn("Some images contain NaN; use bfloat16 or float32 instead of float16.", stacklevel=3)
            pixels = np.nan_to_num(pixels)
        return (
            (pixels * 255).round().astype(np.uint8),
            tap.latents[:primary].float().cpu().numpy(),
            noise_levels(pipeline.scheduler, arguments["num_inference_steps"]),
        )


def _as_windows(items: Any, name: str) -> list[Window]:
    """Return the records or edits that the argument ``name`` holds as a list."""
    items = [items] if isinstance(items, Window) else list(items)
    for item in items:
        if not isinstance(item, Window):
            raise TypeError(f"{name} contains {item!r}; give instances such as ChannelStats() or Disrupt(TopK(8)).")
    return items


def _with_guide(edits: list[Window], guide: Any) -> list[Window]:
    """Return the edits of a call, of which a guide with a weight is the only one."""
    if guide is not None and "degraded" not in getattr(guide, "auxiliary", ()):
        raise TypeError(f"guide is {guide!r}; give a DetailGuidance or a SkipLayerGuidance.")
    if guide is None or not guide.w:
        return edits
    if edits:
        raise ValueError("guide and edits were both given, and the degraded model has no edits; give one of the two.")
    return [guide]


def _guidances(dit: DiT, cfg: float | None, guidance: float | None) -> tuple[float, float | None]:
    """Return the true guidance scale and the embedded guidance, with defaults filled in."""
    cfg = dit.default_cfg if cfg is None else cfg
    if guidance is None and dit.takes_guidance:
        guidance = dit.preset.get("guidance")
    if cfg > 1 and not dit.takes_cfg:
        raise ValueError(f"{dit.name} is distilled and has no true guidance; omit cfg and set guidance instead.")
    if guidance is not None and not dit.takes_guidance:
        raise ValueError(f"{dit.name} has no embedded guidance; omit guidance and set cfg instead.")
    return cfg, guidance


def _rows(values: Sequence[Any], part: slice, count: int) -> list[Any]:
    """Return the values of a batch: one value repeated, or the batch's part of one value a sample."""
    return list(values) * count if len(values) == 1 else list(values[part])
