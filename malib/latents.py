"""Images and latents: encoding, decoding, noise levels and rectified-flow inversion."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from .families import Family


@dataclass(frozen=True)
class Latents:
    """Conversion between images and the latents of a pipeline.

    *Unpacked* latents (B, C, h, w) are normalised as in the transformer's training. *Packed* latents have the layout of the
    pipeline's denoising loop: the same, or (B, tokens, channels).
    """

    pipeline: Any
    family: Family

    @torch.no_grad()
    def encode(self, images: np.ndarray) -> Tensor:
        """Encode images, uint8 (B, H, W, 3), to unpacked latents."""
        vae, device = self.pipeline.vae, self.pipeline._execution_device  # where an offloaded component computes
        pixels = torch.from_numpy(images).permute(0, 3, 1, 2).to(device, vae.dtype) / 127.5 - 1
        encoded = vae.encode(pixels[:, :, None] if _encodes_videos(vae) else pixels)
        latents = encoded.latent_dist.mean if hasattr(encoded, "latent_dist") else encoded.latent
        latents = latents[:, :, 0] if _encodes_videos(vae) else latents
        if self.family.packs_itself:
            latents = self.pipeline._patchify_latents(latents)
        mean, scale = _moments(vae, latents)
        return (latents - mean) * scale

    @torch.no_grad()
    def decode(self, latents: Tensor) -> np.ndarray:
        """Decode unpacked latents to images, float (B, H, W, 3) in [0, 1], as the pipeline's last step does."""
        vae = self.pipeline.vae
        latents = latents.to(self.pipeline._execution_device, vae.dtype)
        mean, scale = _moments(vae, latents)
        latents = latents / scale + mean
        if self.family.packs_itself:
            latents = self.pipeline._unpatchify_latents(latents)
        pixels = vae.decode(latents[:, :, None] if _encodes_videos(vae) else latents, return_dict=False)[0]
        return self.pipeline.image_processor.postprocess(pixels[:, :, 0] if pixels.ndim == 5 else pixels, output_type="np")

    def pack(self, latents: Tensor) -> Tensor:
        """Convert unpacked latents to packed ones."""
        if self.family.packs_itself:
            return latents.flatten(2).transpose(1, 2)
        pack = getattr(self.pipeline, "_pack_latents", None)
        return pack(latents, *latents.shape) if pack else latents

    def unpack(self, latents: Tensor, size: tuple[int, int], grid: tuple[int, int]) -> Tensor:
        """Convert packed latents to unpacked ones.

        Args:
            latents: packed latents.
            size: (height, width) of the images in pixels.
            grid: (rows, columns) of the image tokens.
        """
        if self.family.packs_itself:
            return latents.transpose(1, 2).unflatten(2, grid)
        unpack = getattr(self.pipeline, "_unpack_latents", None)
        unpacked = unpack(latents, *size, self.pipeline.vae_scale_factor) if unpack else latents
        return unpacked[:, :, 0] if unpacked.ndim == 5 else unpacked

    def as_argument(self, latents: Tensor) -> Tensor:
        """Convert unpacked latents to the layout of the pipeline's argument ``latents``."""
        return latents if self.family.packs_itself else self.pack(latents)

    def noise(self, shape: Sequence[int], seeds: Sequence[int]) -> Tensor:
        """Draw the noise that the pipeline draws for ``seeds``, as unpacked latents of ``shape`` (B, C, h, w)."""
        from diffusers.utils.torch_utils import randn_tensor

        dtype = getattr(torch, self.family.latents) if self.family.latents else self.pipeline.transformer.dtype
        generators = [torch.Generator("cpu").manual_seed(s) for s in seeds]
        return randn_tensor(tuple(shape), generator=generators, device=self.pipeline._execution_device, dtype=dtype)

    def renoise(self, clean: Tensor, noise: Tensor, sigma: float) -> Tensor:
        """Mix unpacked latents ``clean`` with ``noise`` at a noise level ``sigma`` in [0, 1], as in the model's training."""
        if self.family.images == "flow":
            return clean.to(noise.dtype).lerp(noise, sigma)
        kept = float(self.pipeline.scheduler.alphas_cumprod[self.timestep(sigma)])
        return kept**0.5 * clean + (1 - kept) ** 0.5 * noise

    def timestep(self, sigma: float) -> int:
        """Return the timestep of a DDPM whose sqrt(1 - alpha_bar) is nearest to ``sigma``."""
        return int((self.pipeline.scheduler.alphas_cumprod - (1 - sigma**2)).abs().argmin())

    def start(self, clean: Tensor, noise: Tensor, sigma: float, steps: int) -> dict[str, Any]:
        """Return the pipeline's arguments for denoising that begins with images at a noise level.

        Args:
            clean: unpacked latents of the images.
            noise: unpacked, of the same shape.
            sigma: first noise level, above 0 and at most 1.
            steps: number of denoising steps.

        Raises:
            ValueError: a DDPM has fewer timesteps below ``sigma`` than steps.
        """
        latents = self.as_argument(self.renoise(clean, noise, sigma))
        if self.family.images == "flow":
            return {"latents": latents, "sigmas": [sigma * (1 - i / steps) for i in range(steps)]}
        first = self.timestep(sigma)
        if steps > first + 1:
            raise ValueError(f"steps={steps} exceeds the {first + 1} timesteps below sigma {sigma:g}; use at most as many.")
        return {"latents": latents, "timesteps": [round(first * (1 - i / steps)) for i in range(steps)]}

    def invert(self, clean: Tensor, arguments: dict[str, Any], size: tuple[int, int], grid: tuple[int, int]) -> list[Tensor]:
        """Follow a rectified flow from images to noise by Euler steps.

        Args:
            clean: unpacked latents of the images.
            arguments: of the pipeline, without true guidance.
            size: (height, width) of the images in pixels.
            grid: (rows, columns) of the image tokens.

        Returns:
            ``steps`` + 1 unpacked latents, at sigma 0, 1 / steps, ..., 1.
        """
        from diffusers import FlowMatchEulerDiscreteScheduler

        path, steps = [clean], arguments["num_inference_steps"]

        def keep(_: Any, index: int, timestep: Any, tensors: dict[str, Any]) -> dict[str, Any]:
            path.append(self.unpack(tensors["latents"], size, grid))
            return {}

        own = {
            "latents": self.as_argument(clean),
            "sigmas": [1 - i / steps for i in range(steps)],
            "output_type": "latent",
            "callback_on_step_end": keep,
        }
        upwards = FlowMatchEulerDiscreteScheduler(shift=1.0, invert_sigmas=True)
        with torch.no_grad(), replaced_scheduler(self.pipeline, upwards):
            self.pipeline(**arguments | own)
        return path


def interpolated(path: Sequence[Tensor]) -> Callable[[float], Tensor]:
    """Return the latents of an inversion as a function of sigma, linear between its Euler steps.

    Args:
        path: as returned by ``Latents.invert``.
    """
    steps = len(path) - 1

    def at(sigma: float) -> Tensor:
        position = min(max(sigma, 0.0), 1.0) * steps
        low = min(int(position), steps - 1)
        return torch.lerp(path[low], path[low + 1], position - low)

    return at


def noise_levels(scheduler: Any, steps: int) -> list[float]:
    """Return sigma of each of the ``steps``: the share of noise in a rectified flow, sqrt(1 - alpha_bar) in a DDPM.

    The timesteps of ``scheduler`` are set already.
    """
    if hasattr(scheduler, "alphas_cumprod") and not scheduler.config.get("use_flow_sigmas"):
        return [float((1 - scheduler.alphas_cumprod[int(t)]) ** 0.5) for t in scheduler.timesteps[:steps]]
    return [float(s) for s in scheduler.sigmas[:steps]]


@contextmanager
def replaced_scheduler(pipeline: Any, scheduler: Any = None) -> Iterator[None]:
    """Replace the scheduler of ``pipeline`` for a while.

    None as ``scheduler`` stands for a rectified-flow scheduler that uses sigmas as given.
    """
    from diffusers import FlowMatchEulerDiscreteScheduler

    own = pipeline.scheduler
    pipeline.scheduler = scheduler or FlowMatchEulerDiscreteScheduler(shift=1.0)
    try:
        yield
    finally:
        pipeline.scheduler = own


def _encodes_videos(vae: nn.Module) -> bool:
    """Return whether an autoencoder has an axis of frames after the channels, as Qwen-Image's has."""
    return any(isinstance(module, nn.Conv3d) for module in vae.encoder.modules())


def _moments(vae: nn.Module, like: Tensor) -> tuple[Any, Any]:
    """Return the shift and the scale of latents: numbers, or (C, 1, 1) where they differ by channel."""
    config = vae.config
    if hasattr(vae, "bn"):  # FLUX.2
        mean, scale = vae.bn.running_mean, (vae.bn.running_var + config.batch_norm_eps).rsqrt()
    elif config.get("latents_mean") is not None:
        mean, scale = torch.tensor(config.latents_mean), 1 / torch.tensor(config.latents_std)
    else:
        return config.get("shift_factor") or 0, config.scaling_factor
    return tuple(x[:, None, None].to(like.device, like.dtype) for x in (mean, scale))
