"""``load`` and ``DiT``: the one object around a diffusers pipeline, and its one verb, ``generate``."""

from __future__ import annotations

import functools
import hashlib
import inspect
import logging
import platform
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from pathlib import Path
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any

import numpy as np
import yaml

from . import scenes
from .cache import Store, describe, key_of
from .edits import Pictures, Recorded
from .families import Family, family_of
from .generation import Generation, Renoised, flatten, restore
from .records import Run, Window, name_of

if TYPE_CHECKING:
    import torch
    import xarray as xr


log = logging.getLogger("malib")
BUNDLED = "mini-flux"


def data_folder() -> Path:
    """Where the bundled data lie: inside an installed package, or beside it in a checkout."""
    inside = Path(__file__).parent / "data"
    return inside if inside.exists() else Path(__file__).parent.parent / "data"


@functools.cache
def _known_models() -> dict[str, dict[str, Any]]:
    return yaml.safe_load((data_folder() / "models.yaml").read_text())


def preset_of(model: str | Path) -> dict[str, Any]:
    """The settings of a known checkpoint (data/models.yaml): its ``id``, and size, steps, cfg, guidance, k where known.

    Args:
        model: a short name such as "flux-dev", or a hub id; of anything else nothing is known: {}.
    """
    for name, row in _known_models().items():
        if str(model) in (name, row["id"]):
            return {key: value["value"] if key != "id" else value for key, value in row.items()}
    return {}


def load(
    model: str | Path | Any = BUNDLED,
    *,
    device: str | None = None,
    dtype: str | None = None,
    revision: str | None = None,
    device_map: str | None = None,
    offload: str | None = None,
    quantize: str | None = None,
    cache: Store | bool = True,
    batch_size: int = 8,
) -> DiT:
    """Open a diffusion transformer. Only safetensors are read, and no code from the hub is run.

    Args:
        model: "mini-flux" (bundled), a short name of data/models.yaml such as "flux-dev", a hub id such as
            "black-forest-labs/FLUX.1-dev", a folder in diffusers format, or a diffusers pipeline that is open already.
        device: "cpu", "cuda", "mps"; None takes a GPU when there is one.
        dtype: "float32", "bfloat16" or "float16"; None means float32 on the CPU and bfloat16 on a GPU.
        revision: a branch, tag or commit of the hub.
        device_map: "balanced" spreads the parts over several GPUs; "cuda" loads straight onto one.
        offload: "model" keeps on the GPU only the part that is at work, "sequential" only the layer; both need a GPU.
        quantize: "8bit" or "4bit" quantises the transformer (bitsandbytes, on a GPU).
        cache: True for the store in ``$MALIB_CACHE`` (or ~/.cache/malib/generations), False for none, or a ``Store``.
        batch_size: how many samples travel through the model at once.

    Raises:
        FileNotFoundError: the model is neither bundled, nor a folder, nor to be had from the hub.
        PermissionError: the model is gated, and no token with an accepted licence was found.
        ValueError: its architecture is not in ``malib.families``, or an argument is not one of the above.
    """
    import torch

    opening = {"device": device, "dtype": dtype, "revision": revision, "device_map": device_map, "offload": offload}
    settings = {"cache": cache, "batch_size": batch_size}
    if hasattr(model, "components"):
        if given := [name for name, value in {**opening, "quantize": quantize}.items() if value is not None]:
            raise ValueError(f"{', '.join(given)} cannot be set on a pipeline that is open already; open it with them.")
        return DiT(model, **settings)
    gpu = torch.cuda.is_available()
    device = device or ("cuda" if gpu else "cpu")
    dtype = dtype or ("bfloat16" if device.startswith("cuda") else "float32")
    for name, value, allowed in (
        ("dtype", dtype, ("float32", "bfloat16", "float16")),
        ("offload", offload, (None, "model", "sequential")),
        ("quantize", quantize, (None, "8bit", "4bit")),
    ):
        if value not in allowed:
            raise ValueError(f"{name} '{value}' is unknown; use {', '.join(a for a in allowed if a)}.")
    if (offload or quantize) and not gpu:
        raise ValueError(f"{'offload' if offload else 'quantize'} needs a GPU and there is none; leave it away.")
    known = preset_of(model)
    source = data_folder() / BUNDLED if str(model) == BUNDLED else known.get("id", model)
    asked = {"revision": revision, "device_map": device_map}
    if quantize:
        asked["quantization_config"] = _quantization(quantize, getattr(torch, dtype))
    pipeline = _opened(source, dtype=getattr(torch, dtype), **{k: v for k, v in asked.items() if v})
    dit = DiT(pipeline if offload or device_map else pipeline.to(device), name=str(source if known else model), **settings)
    if offload:
        dit.offload(offload)
    return dit


def _opened(source: str | Path, **asked: Any) -> Any:
    """The pipeline of a folder or hub id; every way to fail is one sentence."""
    from huggingface_hub.errors import GatedRepoError

    try:
        with _quiet_loading():
            from diffusers import DiffusionPipeline

            return DiffusionPipeline.from_pretrained(source, use_safetensors=True, **asked)
    except GatedRepoError as error:
        raise PermissionError(
            f"'{source}' is gated: accept its licence on its page on the hub, then run `hf auth login` with your token."
        ) from error
    except (OSError, ValueError) as error:
        raise FileNotFoundError(
            f"'{source}' could not be opened: it is neither '{BUNDLED}', nor a short name ({', '.join(_known_models())}), "
            "nor a diffusers folder with safetensors, and the hub did not give it; check the name and the network "
            f"({str(error).strip().splitlines()[0][:200]})."
        ) from error


def _quantization(kind: str, dtype: torch.dtype) -> Any:
    from diffusers import PipelineQuantizationConfig

    settings = {"4bit": {"load_in_4bit": True, "bnb_4bit_compute_dtype": dtype}, "8bit": {"load_in_8bit": True}}[kind]
    return PipelineQuantizationConfig(
        quant_backend=f"bitsandbytes_{kind}", quant_kwargs=settings, components_to_quantize=["transformer"]
    )


class DiT:
    """A diffusion transformer inside its diffusers pipeline.

    Attributes:
        pipeline: the diffusers pipeline, unchanged.
        family: its row in ``malib.families``.
        preset: what data/models.yaml knows of it; {} for a model that is not listed.
        blocks: its transformer blocks in execution order.
    """

    def __init__(self, pipeline: Any, *, name: str = "", cache: Store | bool = False, batch_size: int = 8) -> None:
        from .hooks import blocks_of
        from .latents import Latents

        if batch_size < 1:
            raise ValueError(f"batch_size is {batch_size}; it must be at least 1.")
        self.family: Family = family_of(pipeline)
        self.pipeline, self.name, self.batch_size = pipeline, name or type(pipeline).__name__, batch_size
        self.preset = preset_of(self.name) if "/" in self.name else {}  # load resolves short names to hub ids
        self.blocks = tuple(blocks_of(pipeline.transformer, self.family))
        self._latents = Latents(pipeline, self.family)
        self.store = Store() if cache is True else (cache or None)
        self._fingerprint: tuple[tuple, str] | None = None
        self._pinned = False
        for part in pipeline.components.values():
            if hasattr(part, "eval"):
                part.eval()  # a freshly built encoder may still drop out, and no two runs would agree
        pipeline.set_progress_bar_config(disable=True)

    def __repr__(self) -> str:
        count = sum(p.numel() for p in self.pipeline.transformer.parameters())
        return (
            f"DiT({self.name}: {len(self.blocks)} blocks, width {self.width}, "
            f"{count / 1e6:.0f} M parameters, {self.device}, {self.dtype})"
        )

    @property
    def device(self) -> str:
        """Where the transformer computes."""
        return str(self.pipeline._execution_device)

    @property
    def dtype(self) -> str:
        """The transformer's dtype, e.g. "float32"."""
        return str(self.pipeline.transformer.dtype).removeprefix("torch.")

    @property
    def label(self) -> str:
        """Name and dtype, as a figure's footer names the model."""
        return f"{self.name}, {self.dtype}"

    @property
    def width(self) -> int:
        """Number of channels of the hidden states."""
        config = self.pipeline.transformer.config
        return config.get("dim") or config.num_attention_heads * config.attention_head_dim

    @property
    def size(self) -> int:
        """The side in pixels for which the model was made."""
        if "size" in self.preset:
            return self.preset["size"]
        transformer, vae = self.pipeline.transformer.config, self.pipeline.vae.config
        latent = transformer.get("sample_size") or getattr(self.pipeline, "default_sample_size", None)
        return latent * self._scale if transformer.get("sample_size") else vae.get("sample_size") or latent * self._scale

    @property
    def _scale(self) -> int:
        """Pixels a side of a latent pixel."""
        return getattr(self.pipeline, "vae_scale_factor", None) or 2 ** (
            len(self.pipeline.vae.config.block_out_channels) - 1
        )

    def grid(self, size: tuple[int, int] | None = None) -> tuple[int, int]:
        """(rows, columns) of the image tokens.

        Args:
            size: (height, width) in pixels; None for the model's own size.

        Raises:
            ValueError: the size is no whole number of tokens.
        """
        height, width = size or (self.size, self.size)
        side = self._scale * (self.family.patch or self.pipeline.transformer.config.patch_size)
        if height % side or width % side or min(height, width) < side:
            raise ValueError(
                f"{width} x {height} pixels are no whole number of tokens of {side} x {side}; use multiples of {side}."
            )
        return height // side, width // side

    @property
    def default_cfg(self) -> float:
        """The true guidance scale of a call that names none: the preset's; else 3, or 1 for a model that is distilled."""
        if "cfg" in self.preset:
            return self.preset["cfg"]
        return 1.0 if self._takes_guidance() or not self._takes_cfg() else 3.0

    @property
    def draws_scenes(self) -> bool:
        """Whether this is a model of ``malib.scenes``, whose pictures the bundled judge can read."""
        return self._knows_scenes() and self.size == scenes.SIZE

    def _knows_scenes(self) -> bool:
        known = set(getattr(getattr(self.pipeline, "tokenizer", None), "get_vocab", dict)())
        return set(scenes.VOCABULARY) <= known and len(known) < 1000  # only tokenizers of our own are so small

    def prompts(self, count: int) -> list[str]:
        """``count`` prompts that suit the model: scene captions for mini-flux, else everyday ones (data/prompts) or classes.

        Raises:
            ValueError: more prompts than there are.
        """
        if self._knows_scenes():
            return scenes.captions(count)
        if self.family.classes:
            found = list(self.pipeline.labels) or [str(i) for i in range(1000)]
        else:
            found = (data_folder() / "prompts" / "everyday.txt").read_text().splitlines()
        if count > len(found):
            raise ValueError(f"{count} prompts were asked for; there are {len(found)} for {self.name}.")
        return found[:count]

    @property
    def fingerprint(self) -> str:
        """A hash of every weight, setting, tokenizer and adapter strength; weights changed in place change it.

        A write through ``tensor.data`` alone goes unseen, for PyTorch does not count it.
        """
        parts = [(n, m) for n, m in sorted(self.pipeline.components.items()) if hasattr(m, "named_parameters")]
        tensors = [(f"{n}.{k}", t) for n, m in parts for k, t in (*m.named_parameters(), *m.named_buffers())]
        state = () if self._pinned else tuple((id(t), t.data_ptr(), t._version) for _, t in tensors)
        if self._fingerprint is None or self._fingerprint[0] != state:
            digest = hashlib.sha256()
            sums = [(name, tuple(t.shape), str(t.dtype), *_checksum(t)) for name, t in tensors]
            digest.update(repr([(*s[:3], int(s[3]), int(s[4])) for s in sums]).encode())
            self._fingerprint = state, digest.hexdigest()
        settings = [(n, _settings(c)) for n, c in sorted(self.pipeline.components.items())]
        return hashlib.sha256(repr((type(self.pipeline).__name__, settings, self._fingerprint[1])).encode()).hexdigest()

    @property
    def context(self) -> dict[str, Any]:
        """What a result depends on besides its call: weights, device, dtype and versions; a part of every cache key."""
        device = self.device.split(":")[0]
        return {"weights": self.fingerprint, "device": device, "dtype": self.dtype, "versions": versions()}

    @property
    def offloaded(self) -> bool:
        """Whether only what is at work is kept on the GPU."""
        return self._pinned

    def offload(self, kind: str) -> None:
        """Keep only what is at work on the GPU; from then on weights changed in place go unseen by the fingerprint.

        Args:
            kind: "model" (part by part) or "sequential" (layer by layer: least memory, slowest).
        """
        _ = self.fingerprint  # the weights must be seen before accelerate hides them
        self._fingerprint, self._pinned = ((), self._fingerprint[1]), True
        if kind == "model":
            self.pipeline.enable_model_cpu_offload()
        else:
            self.pipeline.enable_sequential_cpu_offload()

    def generate(
        self,
        prompts: str | Sequence[str],
        seeds: int | Sequence[int] = 0,
        *,
        steps: int = 20,
        cfg: float | None = None,
        guidance: float | None = None,
        record: Sequence[Any] = (),
        edits: Sequence[Any] = (),
        guide: Any = None,
        size: tuple[int, int] | None = None,
        start: Renoised | None = None,
    ) -> Generation:
        """Generate images; read what ``record`` names and change what ``edits`` name on the way.

        Args:
            prompts: one prompt a sample.
            seeds: ``s`` gives sample i the seed s + i; a list gives each its own. An image depends on its prompt, seed and
                edits, not on its place in the batch.
            steps: denoising steps.
            cfg: true classifier-free guidance scale; 1 means none, and then there is no "uncond" branch. None means
                ``default_cfg``.
            guidance: the embedded guidance value of distilled models; None for the preset's (FLUX.1-dev: 3.5) or the
                pipeline's.
            record: records such as ``ChannelStats()``; they read what the next block receives, that is after the edits.
            edits: edits such as ``Disrupt(TopK(8))``, applied in order.
            guide: ``DetailGuidance`` or ``SkipLayerGuidance``; not together with edits.
            size: (height, width) in pixels; None for the model's own size, or that of the pictures of ``start``.
            start: begin with these pictures, one a prompt, at some noise level; None begins with noise.

        Raises:
            ValueError: no or empty prompts, unequal numbers of prompts and seeds, a layer, step or channel out of range.
            RuntimeError: the transformer is compiled or uses a cache accelerator.
        """
        import torch

        prompts = [prompts] if isinstance(prompts, str) else list(prompts)
        _check_prompts(prompts)
        seeds = [seeds + i for i in range(len(prompts))] if isinstance(seeds, int) else [int(s) for s in seeds]
        if len(seeds) != len(prompts):
            raise ValueError(f"{len(prompts)} prompts but {len(seeds)} seeds were given; give one seed, or one a prompt.")
        if steps < 1:
            raise ValueError(f"steps is {steps}; it must be at least 1.")
        cfg = self.default_cfg if cfg is None else cfg
        record, edits = _as_windows(record, "record"), _as_windows(edits, "edits")
        if guide is not None and "degraded" not in getattr(guide, "companions", ()):
            raise TypeError(f"guide was given {guide!r}; give a DetailGuidance or a SkipLayerGuidance.")
        if guide is not None and guide.w:
            if edits:
                raise ValueError("guide and edits were given; the degraded model has no edits, so give one of the two.")
            edits = [guide]
        if guidance is None and self._takes_guidance():
            guidance = self.preset.get("guidance")
        if cfg > 1 and not self._takes_cfg():
            raise ValueError(f"{self.name} is distilled and has no true guidance; leave cfg=None and set guidance instead.")
        if guidance is not None and not self._takes_guidance():
            raise ValueError(f"{self.name} has no embedded guidance; leave guidance=None and set cfg instead.")
        self._warn_unknown_words(
            [*prompts, *(p for e in edits if "source" in getattr(e, "companions", ()) for p in e.prompts)]
        )
        height, width = size or (start.images.shape[1:3] if start else (self.size, self.size))
        self._check_size(height, width)
        if start and (len(start.images) != len(prompts) or start.images.shape[1:3] != (height, width)):
            found, *shape = start.images.shape[:3]
            raise ValueError(
                f"{found} pictures of {shape[1]} x {shape[0]} pixels were given to start from, but {len(prompts)} prompts "
                f"for {width} x {height}; give one picture of this size a prompt."
            )
        call = {
            "prompts": prompts,
            "seeds": seeds,
            "steps": steps,
            "cfg": float(cfg),
            "guidance": guidance,
            "record": record,
            "edits": edits,
            "size": [height, width],
            "start": start,
        }
        run = Run(len(prompts), steps, self.blocks, (height, width), float(cfg))
        listeners = [item.start(run) for item in (*edits, *record)]
        self._check_sites(edits, cfg)
        groups = self._groups(edits, listeners, (height, width))
        described, context = describe(call), self.context
        key = key_of({**described, **context})
        if self.store and (found := self.store.get(key)):
            return restore(*found)
        images, latents, sigmas = [], [], []
        at_once = max(1, self.batch_size // (1 + len(groups)))
        for first in range(0, len(prompts), at_once):
            part = slice(first, first + at_once)
            try:
                begin = Renoised(start.images[part], start.sigma) if start else None
                with self._exact_sigmas() if start and self.family.pictures == "flow" else nullcontext():
                    batch = self._batch(
                        part, prompts, seeds, groups, listeners, steps, cfg, guidance, (height, width), begin
                    )
            except BaseException as error:
                for listener in listeners:
                    listener.discard()
                if isinstance(error, torch.OutOfMemoryError):
                    raise MemoryError(
                        f"{at_once * (1 + len(groups))} samples of {width} x {height} do not fit on {self.device}; use a "
                        "smaller batch_size or size, fewer records, or load(..., offload='model') or quantize='4bit'."
                    ) from error
                raise
            images.append(batch[0])
            latents.append(batch[1])
            sigmas = batch[2]
            _check_recorded(edits, sigmas)
            for listener in listeners:
                listener.flush()
        records = self._datasets((*edits, *record), listeners, prompts, seeds, sigmas)
        result = Generation(
            np.concatenate(images),
            np.concatenate(latents),
            SimpleNamespace(**records),
            {
                "call": described,
                "key": key,
                **context,
                "model": self.name,
                "sigmas": sigmas,
            },
        )
        if self.store:
            self.store.put(key, *flatten(result))
        return result

    def arguments(
        self,
        prompts: list[str],
        seeds: list[int],
        steps: int,
        cfg: float | None = None,
        guidance: float | None = None,
        size: tuple[int, int] | None = None,
        start: Renoised | None = None,
    ) -> dict[str, Any]:
        """What the diffusers pipeline is called with for one batch, so that the same call can be made by hand."""
        import torch

        family, pipeline = self.family, self.pipeline
        cfg = self.default_cfg if cfg is None else cfg
        height, width = size or (self.size, self.size)
        arguments: dict[str, Any] = {
            "generator": [torch.Generator("cpu").manual_seed(s) for s in seeds],
            "num_inference_steps": steps,
            "output_type": "np",
            **family.call,
        }
        if family.classes:
            arguments["class_labels"] = self._class_ids(prompts)
        else:
            arguments |= {"prompt": prompts, "height": height, "width": width}
        if family.cfg_argument:
            arguments[family.cfg_argument] = cfg + family.cfg_offset
        if cfg > 1 and "negative_prompt" in inspect.signature(pipeline.__call__).parameters:
            arguments["negative_prompt"] = [""] * len(prompts)
        if guidance is not None:
            arguments[family.guidance_argument] = guidance
        if family.sequence_tokenizer:
            limit = getattr(pipeline, family.sequence_tokenizer).model_max_length
            arguments["max_sequence_length"] = min(limit, 512)
        if start:
            clean = self.encode(start.images)
            arguments["latents"] = self._latents.given(
                self._mixed(clean, self._noise(tuple(clean.shape), seeds), start.sigma)
            )
            if self.family.pictures == "flow":
                arguments["sigmas"] = [start.sigma * (1 - i / steps) for i in range(steps)]
            else:
                first = self._timestep(start.sigma)
                if steps > first + 1:
                    raise ValueError(f"Below sigma {start.sigma:g} lie {first + 1} timesteps; use at most so many steps.")
                arguments["timesteps"] = [round(first * (1 - i / steps)) for i in range(steps)]
        return arguments

    def encode(self, images: np.ndarray) -> torch.Tensor:
        """Pictures, uint8 (B, H, W, 3), as the latents that the transformer was trained on, before packing."""
        self._check_pictures()
        return self._latents.encode(images)

    def decode(self, latents: np.ndarray, size: tuple[int, int] | None = None) -> np.ndarray:
        """Latents as a ``Generation`` holds them, as pictures: the pipeline's own last step.

        Args:
            latents: (B, ...), as in ``Generation.latents``.
            size: (height, width) in pixels; None for the model's own size.

        Returns:
            uint8 (B, H, W, 3).
        """
        import torch

        self._check_pictures()
        size, found = size or (self.size, self.size), []
        for packed in torch.from_numpy(latents).split(self.batch_size):
            found.append(self._latents.decode(self._latents.unpack(packed, size, self.grid(size))))
        return (np.concatenate(found) * 255).round().astype(np.uint8)

    def restored(self, images: np.ndarray) -> np.ndarray:
        """Pictures, uint8 (B, H, W, 3), once through the autoencoder: what the model could draw at best."""
        return self.decode(self._latents.pack(self.encode(images)).float().cpu().numpy(), images.shape[1:3])

    @contextmanager
    def _exact_sigmas(self, scheduler: Any = None) -> Iterator[None]:
        """The pipeline with a plain rectified-flow scheduler, which takes sigmas as they are given, or with another one."""
        from diffusers import FlowMatchEulerDiscreteScheduler

        own = self.pipeline.scheduler
        self.pipeline.scheduler = scheduler or FlowMatchEulerDiscreteScheduler(shift=1.0)
        try:
            yield
        finally:
            self.pipeline.scheduler = own

    def _check_sites(self, edits: list[Any], cfg: float) -> None:
        """Refuse an edit whose branch or stream this run does not have: it would change nothing, and nobody would know."""
        for edit in edits:
            name = type(edit).__name__
            if edit.branches is not None and "cond" not in edit.branches and cfg <= 1:
                raise ValueError(f"{name} is for the branch uncond, but without true guidance (cfg=1) there is cond alone.")
            stacks = {b.stack.label: b.stack for b in self.blocks if edit.layers is None or b.layer in edit.layers}
            sites = {"output": "returns", "input": "arguments"}
            if edit.point in sites and not any(edit.stream in getattr(s, sites[edit.point]) for s in stacks.values()):
                raise ValueError(
                    f"{name} is for the {edit.stream} stream, which no block of its layers has at its {edit.point}; use "
                    "another stream, or other layers."
                )

    def _groups(self, edits: list[Any], listeners: list[Any], size: tuple[int, int]) -> list[Any]:
        """The groups of companions: the edit whose they are, None for undisturbed targets; tells the listeners theirs."""
        groups: list[Any] = []
        for edit, listener in zip(edits, listeners, strict=False):
            source = getattr(edit, "source", None)
            if isinstance(source, Pictures) and source.images.shape[1:3] != size:
                raise ValueError(
                    f"The source's pictures have {source.images.shape[2]} x {source.images.shape[1]} pixels, the generation "
                    f"{size[1]} x {size[0]}; resize them, or pass size=."
                )
            if isinstance(source, Pictures):
                self._check_pictures(("flow",))
            if isinstance(source, Recorded) and source.weights != self.fingerprint:
                raise ValueError(f"The source was recorded with other weights than those of {self.name}; record it again.")
            if edit.point == "prompt" and not self.family.conditioning:
                raise ValueError(f"{self.name} takes its prompts in a form that {type(edit).__name__} cannot mix.")
            for name in getattr(edit, "companions", ()):
                if name in ("source", "degraded"):
                    groups.append(edit)
                    listener.groups[name] = len(groups) - 1
                else:
                    if None not in groups:
                        groups.append(None)
                    listener.groups[name] = groups.index(None)
        return groups

    def _batch(
        self,
        part: slice,
        prompts: list[str],
        seeds: list[int],
        groups: list[Any],
        listeners: list[Any],
        steps: int,
        cfg: float,
        guidance: float | None,
        size: tuple[int, int],
        start: Renoised | None,
    ) -> tuple[np.ndarray, np.ndarray, list[float]]:
        """One batch of samples, with their companions behind them, group after group."""
        own, everyone, all_seeds = len(prompts[part]), prompts[part], seeds[part]
        routes: list[tuple[slice, Callable[[float], torch.Tensor]]] = []
        for edit in groups:
            if edit is None or "degraded" in edit.companions:  # the targets once more
                everyone, all_seeds = everyone + prompts[part], all_seeds + seeds[part]
                continue
            asked, noise = _rows(edit.prompts, part, own), _rows(edit.seeds, part, own) if edit.seeds else seeds[part]
            if isinstance(edit.source, Pictures):
                shown, rows = np.stack(_rows(edit.source.images, part, own)), slice(len(everyone), len(everyone) + own)
                routes.append((rows, self._route(shown, asked, noise, edit.source, steps, guidance)))
            everyone, all_seeds = everyone + asked, all_seeds + noise
        if start:
            start = Renoised(np.concatenate([start.images] * (1 + len(groups))), start.sigma)
        arguments = self.arguments(everyone, all_seeds, steps, cfg, guidance, size, start)
        if routes:
            first = start.sigma if start else 1.0
            if not start:
                shape = routes[0][1](first).shape
                arguments["latents"] = self._latents.given(self._noise((len(everyone), *shape[1:]), all_seeds))
            for rows, at in routes:
                arguments["latents"][rows] = self._latents.given(at(first))
        return self._run(arguments, listeners, own, routes)

    def _route(
        self,
        images: np.ndarray,
        prompts: list[str],
        seeds: list[int],
        source: Pictures,
        steps: int,
        guidance: float | None,
    ) -> Callable[[float], torch.Tensor]:
        """What the model is to read of pictures at a noise level, as a function of sigma; unpacked latents."""
        import torch

        clean = self.encode(images)
        if source.route == "noise":
            noise = self._noise(tuple(clean.shape), seeds)
            return lambda sigma: clean.to(noise.dtype).lerp(noise, sigma)
        path = self.invert(images, prompts, steps, guidance)

        def at(sigma: float) -> torch.Tensor:
            """Between two points of the path the flow goes straight, for it was found by Euler steps."""
            place = min(max(sigma, 0.0), 1.0) * steps
            low = min(int(place), steps - 1)
            return torch.lerp(path[low], path[low + 1], place - low)

        return at

    def invert(
        self, images: np.ndarray, prompts: Sequence[str], steps: int = 20, guidance: float | None = None
    ) -> list[torch.Tensor]:
        """Rectified-flow inversion: the way from pictures back to noise, by Euler steps upwards, without true guidance.

        Args:
            images: uint8 (B, H, W, 3).
            prompts: what they show, one a picture; "" is allowed.
            steps: Euler steps from sigma 0 to 1.
            guidance: embedded guidance of distilled models; None for the pipeline's default.

        Returns:
            ``steps`` + 1 unpacked latents (B, C, h, w), at sigma 0, 1 / steps, ..., 1.
        """
        import torch
        from diffusers import FlowMatchEulerDiscreteScheduler

        self._check_pictures(("flow",))
        clean = self.encode(images)
        found = [clean]
        size = tuple(images.shape[1:3])
        arguments = self.arguments(list(prompts), [0] * len(images), steps, 1.0, guidance, size)
        arguments |= {
            "latents": self._latents.given(clean),
            "sigmas": [1 - i / steps for i in range(steps)],
            "output_type": "latent",
        }

        def keep(_: Any, index: int, timestep: Any, tensors: dict[str, Any]) -> dict[str, Any]:
            found.append(self._latents.unpack(tensors["latents"], size, self.grid(size)))
            return {}

        with torch.no_grad(), self._exact_sigmas(FlowMatchEulerDiscreteScheduler(shift=1.0, invert_sigmas=True)):
            self.pipeline(**arguments, callback_on_step_end=keep)
        return found

    def _noise(self, shape: tuple[int, ...], seeds: list[int]) -> torch.Tensor:
        """The noise that the pipeline draws for these seeds, unpacked."""
        import torch
        from diffusers.utils.torch_utils import randn_tensor

        generators = [torch.Generator("cpu").manual_seed(s) for s in seeds]
        dtype = getattr(torch, self.family.latents or self.dtype)
        return randn_tensor(shape, generator=generators, device=self.pipeline._execution_device, dtype=dtype)

    def _mixed(self, clean: torch.Tensor, noise: torch.Tensor, sigma: float) -> torch.Tensor:
        """Pictures at a noise level, as the model has been trained on them."""
        if self.family.pictures == "flow":
            return clean.to(noise.dtype).lerp(noise, sigma)
        kept = float(self.pipeline.scheduler.alphas_cumprod[self._timestep(sigma)])
        return kept**0.5 * clean + (1 - kept) ** 0.5 * noise

    def _timestep(self, sigma: float) -> int:
        """The timestep of a model trained as DDPM whose sqrt(1 - alpha_bar) is nearest to sigma."""
        return int((self.pipeline.scheduler.alphas_cumprod - (1 - sigma**2)).abs().argmin())

    def _run(
        self,
        arguments: dict[str, Any],
        listeners: list[Any],
        own: int,
        routes: list[tuple[slice, Callable[[float], torch.Tensor]]],
    ) -> tuple[np.ndarray, np.ndarray, list[float]]:
        """One batch through the pipeline: images, final latents and sigmas of its first ``own`` samples."""
        import torch

        from .hooks import Tap

        pipeline, samples = self.pipeline, len(arguments["generator"])

        def follow(_: Any, index: int, timestep: Any, tensors: dict[str, Any]) -> dict[str, Any]:
            latents = tensors["latents"].clone()
            for rows, at in routes:  # pictures are read where their own route is at the next noise level
                latents[rows] = self._latents.pack(at(float(pipeline.scheduler.sigmas[index + 1]))).to(latents.dtype)
            return {"latents": latents}

        if routes:
            arguments["callback_on_step_end"] = follow
        rows, columns = self.grid((arguments.get("height", self.size), arguments.get("width", self.size)))
        with torch.no_grad(), Tap(pipeline, self.family, samples, listeners, samples // own - 1, rows * columns) as tap:
            pixels = np.asarray(pipeline(**arguments).images)[:own]
        if not np.isfinite(pixels).all():
            warnings.warn("Some images hold NaN; in float16 use bfloat16 or float32 instead.", stacklevel=3)
            pixels = np.nan_to_num(pixels)
        return (
            (pixels * 255).round().astype(np.uint8),
            tap.latents[:own].float().cpu().numpy(),
            _noise_levels(pipeline.scheduler, arguments["num_inference_steps"]),
        )

    def _takes_guidance(self) -> bool:
        return bool(self.family.guidance_argument and self.pipeline.transformer.config.get("guidance_embeds"))

    def _takes_cfg(self) -> bool:
        return bool(self.family.cfg_argument) and not self.pipeline.config.get("is_distilled")

    def _check_size(self, height: int, width: int) -> None:
        self.grid((height, width))
        if self.family.classes and (height, width) != (self.size, self.size):
            raise ValueError(
                f"{self.name} draws {self.size} x {self.size} pixels alone, not {width} x {height}; leave size=None."
            )

    def _check_pictures(self, ways: tuple[str, ...] = ("flow", "ddpm")) -> None:
        if self.family.pictures not in ways:
            raise ValueError(
                f"Pictures cannot enter or leave the latents of {type(self.pipeline).__name__} here; take a model that the "
                "README lists with pictures as a source, such as FLUX.1, SD3 or Sana."
            )

    def _class_ids(self, prompts: list[str]) -> list[int]:
        """ImageNet classes by number or by one of their names."""
        known = getattr(self.pipeline, "labels", {})
        found = [int(p) if p.isdigit() else known.get(p) for p in prompts]
        for prompt, number in zip(prompts, found, strict=True):
            if number is None or number >= self.pipeline.transformer.config.num_embeds_ada_norm:
                raise ValueError(
                    f"'{prompt}' is no class of {self.name}; give its number, or one of the {len(known)} names in "
                    "pipeline.labels."
                )
        return found

    def _datasets(
        self, items: Sequence[Any], listeners: list[Any], prompts: list[str], seeds: list[int], sigmas: list[float]
    ) -> dict[str, xr.Dataset]:
        """Datasets by name, with prompt, seed, sigma and block as coordinates."""
        found: dict[str, xr.Dataset] = {}
        for item, listener in zip(items, listeners, strict=True):
            data = listener.dataset()
            if "sample" in data.dims:
                data = data.assign_coords(prompt=("sample", prompts), seed=("sample", seeds))
            if "step" in data.dims:
                data = data.assign_coords(sigma=("step", [sigmas[i] for i in data.step.values]))
            if "layer" in data.dims:
                data = data.assign_coords(block=("layer", [self.blocks[i].name for i in data.layer.values]))
            name, number = name_of(item), 2
            while name in found:
                name, number = f"{name_of(item)}_{number}", number + 1
            found[name] = data
        return found

    def _warn_unknown_words(self, prompts: list[str]) -> None:
        """Name the words for which a tokenizer has nothing but its <unk>."""
        unknown: set[str] = set()
        for name in ("tokenizer", "tokenizer_2", "tokenizer_3"):
            tokenizer = getattr(self.pipeline, name, None)
            unk = getattr(tokenizer, "unk_token_id", None)
            if unk is None or unk in (tokenizer.eos_token_id, tokenizer.pad_token_id) or not tokenizer.is_fast:
                continue
            for prompt in set(prompts):
                encoded = tokenizer(prompt, return_offsets_mapping=True)
                for token, (start, end) in zip(encoded.input_ids, encoded.offset_mapping, strict=True):
                    if token == unk and end > start:
                        unknown.add(prompt[start:end])
        if unknown:
            words = ", ".join(f"'{w}'" for w in sorted(unknown))
            warnings.warn(f"{self.name} does not know {words}; it was not trained on such words.", stacklevel=3)


def _noise_levels(scheduler: Any, steps: int) -> list[float]:
    """Sigma of each step: the share of noise in a rectified flow, sqrt(1 - alpha_bar) for a model trained as DDPM."""
    if hasattr(scheduler, "alphas_cumprod") and not scheduler.config.get("use_flow_sigmas"):
        return [float((1 - scheduler.alphas_cumprod[int(t)]) ** 0.5) for t in scheduler.timesteps[:steps]]
    return [float(s) for s in scheduler.sigmas[:steps]]


def versions() -> dict[str, str]:
    """Versions of what computes the numbers."""
    from importlib.metadata import PackageNotFoundError, version

    found = {"python": platform.python_version()}
    for package in ("torch", "diffusers", "transformers", "malib"):
        try:
            found[package] = version(package)
        except PackageNotFoundError:
            found[package] = "source"
    return found


@contextmanager
def _quiet_loading():
    """Hide the loaders' progress bars and hints; errors still come through."""
    from diffusers.utils import logging as of_diffusers
    from transformers.utils import logging as of_transformers

    libraries = (of_diffusers, of_transformers)
    before = [(library.get_verbosity(), library.is_progress_bar_enabled()) for library in libraries]
    for library in libraries:
        library.set_verbosity_error()
        library.disable_progress_bar()
    try:
        yield
    finally:
        for library, (verbosity, bar) in zip(libraries, before, strict=True):
            library.set_verbosity(verbosity)
            if bar:
                library.enable_progress_bar()


def _settings(component: Any) -> str:
    """What of a pipeline's part changes its results besides weights: class, config, vocabulary, adapters."""
    parts: list[Any] = [type(component).__name__]
    config = getattr(component, "config", None)
    if config is not None:
        settings = config.to_dict() if hasattr(config, "to_dict") else dict(config)
        parts.append(sorted((k, v) for k, v in settings.items() if not k.startswith("_") and k != "transformers_version"))
    if hasattr(component, "get_vocab"):
        parts += [sorted(component.get_vocab().items()), component.model_max_length]
    for name, module in component.named_modules() if hasattr(component, "named_modules") else ():
        if hasattr(module, "lora_A"):
            parts.append((name, module.scaling, module.active_adapters, module.disable_adapters))
    return hashlib.sha256(repr(parts).encode()).hexdigest()


def _checksum(tensor: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Two 64-bit sums over the raw bits, the second weighted by position; wrapping, so equal on every device."""
    import torch

    flat = tensor.detach().contiguous().view(-1)
    if not flat.numel():
        return torch.zeros(()), torch.zeros(())
    whole = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}[flat.element_size()]
    plain = weighted = torch.zeros((), dtype=torch.int64, device=flat.device)
    for start in range(0, flat.numel(), 1 << 24):  # bounded scratch memory on large tensors
        bits = flat[start : start + (1 << 24)].view(whole).long()
        place = torch.arange(start + 1, start + 1 + len(bits), device=flat.device)
        plain, weighted = plain + bits.sum(), weighted + (bits * place).sum()
    return plain, weighted


def _rows(values: Sequence[Any], part: slice, count: int) -> list[Any]:
    """The part of a batch of what was given once for all, or once a sample."""
    return list(values) * count if len(values) == 1 else list(values[part])


def _check_prompts(prompts: list[str]) -> None:
    if not prompts:
        raise ValueError("No prompts were given; give at least one.")
    for i, prompt in enumerate(prompts):
        if not isinstance(prompt, str) or not prompt.strip():
            raise ValueError(f"Prompt {i} is {prompt!r}; every prompt must be non-empty text.")


def _check_recorded(edits: list[Any], sigmas: list[float]) -> None:
    """Refuse a source that was recorded at other noise levels than those of the run."""
    for source in (getattr(edit, "source", None) for edit in edits):
        if isinstance(source, Recorded) and not np.allclose(source.sigmas, sigmas, atol=1e-4):
            raise ValueError(
                f"The source was recorded from sigma {source.sigmas[0]:.3g} on and this run begins at {sigmas[0]:.3g}, or "
                "the steps between differ; record it with the same start and scheduler."
            )


def _as_windows(items: Any, name: str) -> list[Any]:
    items = [items] if isinstance(items, Window) else list(items)
    for item in items:
        if not isinstance(item, Window):
            raise TypeError(f"{name} was given {item!r}; give instances such as ChannelStats() or Disrupt(TopK(8)).")
    return items
