"""Pictures and latents: the normalisation that an autoencoder's latents need, and the layout a pipeline holds them in."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from .families import Family


@dataclass(frozen=True)
class Latents:
    """The way of pictures into a pipeline's latents and back.

    *Unpacked* latents (B, C, h, w) are normalised as the transformer was trained on them; *packed* is how the pipeline's
    loop holds them: the same, or (B, tokens, channels).
    """

    pipeline: Any
    family: Family

    @torch.no_grad()
    def encode(self, images: np.ndarray) -> Tensor:
        """Pictures, uint8 (B, H, W, 3), as unpacked latents."""
        vae, device = self.pipeline.vae, self.pipeline._execution_device  # where an offloaded part computes
        pixels = torch.from_numpy(images).permute(0, 3, 1, 2).to(device, vae.dtype) / 127.5 - 1
        found = vae.encode(pixels[:, :, None] if _reads_films(vae) else pixels)
        latents = found.latent_dist.mean if hasattr(found, "latent_dist") else found.latent
        latents = latents[:, :, 0] if _reads_films(vae) else latents
        if self.family.packs_itself:
            latents = self.pipeline._patchify_latents(latents)
        mean, scale = _moments(vae, latents)
        return (latents - mean) * scale

    @torch.no_grad()
    def decode(self, latents: Tensor) -> np.ndarray:
        """Unpacked latents as pictures, float (B, H, W, 3) in [0, 1]: the pipeline's own last step."""
        vae = self.pipeline.vae
        latents = latents.to(self.pipeline._execution_device, vae.dtype)
        mean, scale = _moments(vae, latents)
        latents = latents / scale + mean
        if self.family.packs_itself:
            latents = self.pipeline._unpatchify_latents(latents)
        pixels = vae.decode(latents[:, :, None] if _reads_films(vae) else latents, return_dict=False)[0]
        return self.pipeline.image_processor.postprocess(pixels[:, :, 0] if pixels.ndim == 5 else pixels, output_type="np")

    def pack(self, latents: Tensor) -> Tensor:
        """Unpacked latents as the pipeline's loop holds them."""
        if self.family.packs_itself:
            return latents.flatten(2).transpose(1, 2)
        pack = getattr(self.pipeline, "_pack_latents", None)
        return pack(latents, *latents.shape) if pack else latents

    def unpack(self, latents: Tensor, size: tuple[int, int], grid: tuple[int, int]) -> Tensor:
        """The way back from ``pack``, for pictures of ``size`` pixels and ``grid`` tokens (height, width)."""
        if self.family.packs_itself:
            return latents.transpose(1, 2).unflatten(2, grid)
        unpack = getattr(self.pipeline, "_unpack_latents", None)
        unpacked = unpack(latents, *size, self.pipeline.vae_scale_factor) if unpack else latents
        return unpacked[:, :, 0] if unpacked.ndim == 5 else unpacked

    def given(self, latents: Tensor) -> Tensor:
        """Unpacked latents as the pipeline's argument ``latents`` takes them."""
        return latents if self.family.packs_itself else self.pack(latents)


def _reads_films(vae: nn.Module) -> bool:
    """Whether an autoencoder is one of films, with an axis of frames behind the channels (Qwen-Image's is)."""
    return any(isinstance(module, nn.Conv3d) for module in vae.encoder.modules())


def _moments(vae: nn.Module, like: Tensor) -> tuple[Any, Any]:
    """What is taken from latents, and what they are multiplied by: numbers, or (C, 1, 1) as ``like`` where by channel."""
    config = vae.config
    if hasattr(vae, "bn"):  # FLUX.2
        mean, scale = vae.bn.running_mean, (vae.bn.running_var + config.batch_norm_eps).rsqrt()
    elif config.get("latents_mean") is not None:
        mean, scale = torch.tensor(config.latents_mean), 1 / torch.tensor(config.latents_std)
    else:
        return config.get("shift_factor") or 0, config.scaling_factor
    return tuple(x[:, None, None].to(like.device, like.dtype) for x in (mean, scale))
