"""``DiT``: a diffusion transformer in its diffusers pipeline, and ``generate``."""

from __future__ import annotations

import inspect
from collections.abc import Sequence
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any

import numpy as np

from . import prompts as prompt_tools
from .cache import Store, describe, key_of
from .families import Family, family_of
from .fingerprint import Fingerprint, versions
from .generation import Generation, Renoised, flatten, restore
from .presets import preset_of

if TYPE_CHECKING:
    from torch import Tensor


class DiT:
    """A diffusion transformer in its diffusers pipeline. ``malib.load`` opens one by name.

    Args:
        pipeline: an open diffusers pipeline of an architecture in ``malib.families``.
        name: how figures and messages name the model; "" for the pipeline's class.
        cache: a ``Store`` for results, True for the default one, False for none.
        batch_size: number of samples, auxiliary ones included, in one call of the pipeline.

    Attributes:
        pipeline: the diffusers pipeline, unchanged.
        family: its row in ``malib.families``.
        preset: its settings in data/models.yaml; {} for a model that is not listed.
        blocks: its transformer blocks in execution order.
        latents: conversion between images and latents.

    Raises:
        ValueError: an unknown architecture, or a batch size below 1.
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
        self.latents = Latents(pipeline, self.family)
        self.store = Store() if cache is True else (cache or None)
        self._fingerprint = Fingerprint(pipeline)
        for part in pipeline.components.values():
            if hasattr(part, "eval"):
                part.eval()  # dropout in a freshly built encoder would make every run different
        pipeline.set_progress_bar_config(disable=True)

    def __repr__(self) -> str:
        count = sum(p.numel() for p in self.pipeline.transformer.parameters())
        return (
            f"DiT({self.name}: {len(self.blocks)} blocks, width {self.width}, "
            f"{count / 1e6:.0f} M parameters, {self.device}, {self.dtype})"
        )

    @property
    def device(self) -> str:
        """Device on which the transformer computes."""
        return str(self.pipeline._execution_device)

    @property
    def dtype(self) -> str:
        """Dtype of the transformer, e.g. "float32"."""
        return str(self.pipeline.transformer.dtype).removeprefix("torch.")

    @property
    def label(self) -> str:
        """Name and dtype, for the footer of a figure."""
        return f"{self.name}, {self.dtype}"

    @property
    def width(self) -> int:
        """Number of channels of the hidden states."""
        config = self.pipeline.transformer.config
        return config.get("dim") or config.num_attention_heads * config.attention_head_dim

    @property
    def size(self) -> int:
        """Side in pixels of the images that the model was made for."""
        if "size" in self.preset:
            return self.preset["size"]
        transformer, vae = self.pipeline.transformer.config, self.pipeline.vae.config
        latent = transformer.get("sample_size") or getattr(self.pipeline, "default_sample_size", None)
        return latent * self._scale if transformer.get("sample_size") else vae.get("sample_size") or latent * self._scale

    @property
    def _scale(self) -> int:
        """Pixels per side of a latent pixel."""
        return getattr(self.pipeline, "vae_scale_factor", None) or 2 ** (
            len(self.pipeline.vae.config.block_out_channels) - 1
        )

    def grid(self, size: tuple[int, int] | None = None) -> tuple[int, int]:
        """Return (rows, columns) of the image tokens; ``size`` is (height, width) in pixels, None for the model's own.

        Raises:
            ValueError: the size is not a whole number of tokens.
        """
        height, width = size or (self.size, self.size)
        side = self._scale * (self.family.patch or self.pipeline.transformer.config.patch_size)
        if height % side or width % side or min(height, width) < side:
            raise ValueError(
                f"{width} x {height} pixels are not a whole number of tokens of {side} x {side}; use multiples of {side}."
            )
        return height // side, width // side

    @property
    def default_cfg(self) -> float:
        """Default true guidance scale: the preset's; else 3, or 1 for a distilled model."""
        if "cfg" in self.preset:
            return self.preset["cfg"]
        return 1.0 if self.takes_guidance or not self.takes_cfg else 3.0

    @property
    def takes_guidance(self) -> bool:
        """Whether the model is distilled to an embedded guidance value."""
        return bool(self.family.guidance_argument and self.pipeline.transformer.config.get("guidance_embeds"))

    @property
    def takes_cfg(self) -> bool:
        """Whether the pipeline has true classifier-free guidance."""
        return bool(self.family.cfg_argument) and not self.pipeline.config.get("is_distilled")

    def prompts(self, count: int) -> list[str]:
        """Return ``count`` prompts that suit the model (``malib.prompts.suitable``); ValueError if it has fewer."""
        return prompt_tools.suitable(self.pipeline, self.family, self.name, count)

    @property
    def fingerprint(self) -> str:
        """Hash of all weights, settings, tokenizers and adapter strengths (``malib.fingerprint``)."""
        return self._fingerprint.value

    @property
    def context(self) -> dict[str, Any]:
        """What a result depends on besides its call: weights, device, dtype and versions; part of every cache key."""
        device = self.device.split(":")[0]
        return {"weights": self.fingerprint, "device": device, "dtype": self.dtype, "versions": versions()}

    @property
    def offloaded(self) -> bool:
        """Whether accelerate moves the components to the GPU only while they compute."""
        return self._fingerprint.pinned

    def offload(self, kind: str) -> None:
        """Keep only the computing part on the GPU. From then on the fingerprint does not see weights that change in place.

        ``kind`` is "model" (component by component) or "sequential" (layer by layer: least memory, slowest).
        """
        self._fingerprint.pin()
        offload = {
            "model": self.pipeline.enable_model_cpu_offload,
            "sequential": self.pipeline.enable_sequential_cpu_offload,
        }
        offload[kind]()

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
        """Generate images with records and edits.

        An image depends on its prompt, seed and edits, not on its place in the batch.

        Args:
            prompts: one prompt for each sample.
            seeds: ``s`` gives sample i the seed s + i; a list gives one seed for each sample.
            steps: denoising steps.
            cfg: true classifier-free guidance scale; 1 means none, and no "uncond" branch. None means ``default_cfg``.
            guidance: embedded guidance value of distilled models; None for the preset's (FLUX.1-dev: 3.5) or the
                pipeline's.
            record: records such as ``ChannelStats()``. They see what the next block receives, after the edits.
            edits: edits such as ``Disrupt(TopK(8))``, applied in order.
            guide: ``DetailGuidance`` or ``SkipLayerGuidance``; not together with edits.
            size: (height, width) in pixels; None for the model's own size, or that of the images of ``start``.
            start: begin with given images at a noise level, one for each prompt; None begins with noise.

        Returns:
            Images, latents, one dataset for each edit and record, and provenance.

        Raises:
            ValueError: no or empty prompts, unequal numbers of prompts and seeds, a layer, step or channel out of range.
            RuntimeError: the transformer is compiled or uses a cache accelerator.
        """
        from .sampling import Call, Sampler

        call = Call(prompts, seeds, steps, cfg, guidance, record, edits, size, start).checked(self, guide)
        sampler = Sampler(self, call)
        described, context = describe(call), self.context
        key = key_of({**described, **context})
        if self.store and (entry := self.store.get(key)):
            return restore(*entry)
        images, latents, sigmas = sampler.run()
        provenance = {"call": described, "key": key, **context, "model": self.name, "sigmas": sigmas}
        result = Generation(images, latents, SimpleNamespace(**sampler.datasets(sigmas)), provenance)
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
        """Return the arguments of the diffusers pipeline for one batch, so that the same call can be made by hand.

        ``prompts`` and ``seeds`` have one entry for each sample; ``steps``, ``cfg``, ``guidance``, ``size`` and
        ``start`` are as of ``generate``.

        Raises:
            ValueError: the images of ``start`` cannot enter this architecture, or too many steps for their noise level.
        """
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
            arguments["class_labels"] = prompt_tools.class_ids(pipeline, self.name, prompts)
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
            noise = self.latents.noise(clean.shape, seeds)
            arguments |= self.latents.start(clean, noise, start.sigma, steps)
        return arguments

    def encode(self, images: np.ndarray) -> Tensor:
        """Encode ``images``, uint8 (B, H, W, 3), to unpacked latents; ValueError if they cannot enter this architecture."""
        self.check_images_enter()
        return self.latents.encode(images)

    def decode(self, latents: np.ndarray, size: tuple[int, int] | None = None) -> np.ndarray:
        """Decode ``latents`` (B, ...), as in ``Generation.latents``, to images, uint8 (B, H, W, 3).

        ``size`` is (height, width) in pixels, None for the model's own.

        Raises:
            ValueError: images cannot leave the latents of this architecture.
        """
        import torch

        self.check_images_enter()
        size, images = size or (self.size, self.size), []
        for packed in torch.from_numpy(latents).split(self.batch_size):
            images.append(self.latents.decode(self.latents.unpack(packed, size, self.grid(size))))
        return (np.concatenate(images) * 255).round().astype(np.uint8)

    def restored(self, images: np.ndarray) -> np.ndarray:
        """Encode and decode images, uint8 (B, H, W, 3): the best that the autoencoder allows the model to generate."""
        return self.decode(self.latents.pack(self.encode(images)).float().cpu().numpy(), images.shape[1:3])

    def invert(
        self, images: np.ndarray, prompts: Sequence[str], steps: int = 20, guidance: float | None = None
    ) -> list[Tensor]:
        """Invert a rectified flow: follow it from images to noise by Euler steps, without true guidance.

        Args:
            images: uint8 (B, H, W, 3).
            prompts: one description for each image; "" is allowed.
            steps: Euler steps from sigma 0 to 1.
            guidance: embedded guidance of distilled models; None for the pipeline's default.

        Returns:
            ``steps`` + 1 unpacked latents (B, C, h, w), at sigma 0, 1 / steps, ..., 1.

        Raises:
            ValueError: the model is not a rectified flow, or images cannot enter its latents.
        """
        self.check_images_enter(("flow",))
        size = tuple(images.shape[1:3])
        arguments = self.arguments(list(prompts), [0] * len(images), steps, 1.0, guidance, size)
        return self.latents.invert(self.encode(images), arguments, size, self.grid(size))

    def check_images_enter(self, kinds: tuple[str, ...] = ("flow", "ddpm")) -> None:
        """Raise ValueError unless images can enter the latents of this architecture as one of ``kinds``."""
        if self.family.images not in kinds:
            raise ValueError(
                f"Images cannot enter or leave the latents of {type(self.pipeline).__name__}; use a model that the README "
                "lists with images as a source, such as FLUX.1, SD3 or Sana."
            )
