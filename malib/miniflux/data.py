"""Training data of the bundled models: rendered scenes, their latents, and the held-out batch."""

from __future__ import annotations

import functools
import math
import multiprocessing
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from tqdm.auto import tqdm

from . import rendering, scenes
from .architecture import Preset

if TYPE_CHECKING:
    from diffusers import AutoencoderKL


HELD_OUT_SEED = 2_000_000_000


def _training_scene(seed: int, index: int, textured: bool = False) -> scenes.Scene:
    return scenes.sample_scene(seed * 10_000_000 + index, textured=textured)


@functools.cache
def _large_singles(seed: int, count: int) -> np.ndarray:
    """Return the indices of the training scenes of one large subject."""
    found = [_training_scene(seed, i).subjects for i in range(count)]
    return np.array([i for i, subjects in enumerate(found) if [s.size for s in subjects] == ["large"]])


def _pixels(job: tuple[int, int, bool]) -> np.ndarray:
    image = rendering.render(_training_scene(*job)).image
    return (image * 255).round().astype(np.uint8)


def render_batches(seed: int, count: int, batch: int, textured: bool = False) -> Iterator[Tensor]:
    """Iterate over rendered scenes 0 to ``count`` - 1 in order, float (B, 3, 64, 64) in [-1, 1]; worker processes render.

    Args:
        seed: of the scenes.
        count: number of scenes.
        batch: scenes per batch.
        textured: scenes with textures.
    """
    context = multiprocessing.get_context("spawn")
    with context.Pool(min(multiprocessing.cpu_count(), 16)) as pool:
        images: list[np.ndarray] = []
        for image in pool.imap(_pixels, ((seed, i, textured) for i in range(count)), chunksize=64):
            images.append(image)
            if len(images) == batch:
                yield torch.from_numpy(np.stack(images)).permute(0, 3, 1, 2).float() / 127.5 - 1
                images = []
        if images:
            yield torch.from_numpy(np.stack(images)).permute(0, 3, 1, 2).float() / 127.5 - 1


@torch.no_grad()
def scene_latents(vae: AutoencoderKL, preset: Preset, seed: int, out: Path, device: str) -> Tensor:
    """Return the scaled latents of all training scenes, fp16 (N, 4, 32, 32), which are kept on disk between runs.

    Args:
        vae: the trained autoencoder.
        preset: of the training.
        seed: of the scenes.
        out: working folder of the training.
        device: where to compute.
    """
    path = out / "latents.safetensors"
    if not path.exists():
        parts = []
        batches = render_batches(seed, preset.scenes, 64)
        for images in progress_bar(batches, "latents", total=math.ceil(preset.scenes / 64)):
            with torch.autocast(device, torch.bfloat16):
                mean = vae.encode(images.to(device, memory_format=torch.channels_last)).latent_dist.mean
            parts.append(((mean.float() - vae.config.shift_factor) * vae.config.scaling_factor).half().cpu())
        save_file({"latents": torch.cat(parts).contiguous()}, path.with_suffix(".tmp"))
        path.with_suffix(".tmp").replace(path)
    return load_file(path)["latents"]


def draw_batch(
    latents: Tensor, preset: Preset, seed: int, step: int, device: str
) -> tuple[Tensor, list[str], Tensor, Tensor]:
    """Draw the clean latents, captions, sigmas (logit-normal, shifted) and noise of a training step.

    Args:
        latents: (N, 4, 32, 32) of all training scenes.
        preset: of the training.
        seed: of the training.
        step: training step; the result depends on (seed, step) only.
        device: of the tensors.
    """
    rng = np.random.default_rng([seed, step])
    indices = rng.integers(len(latents), size=preset.batch)
    if preset.focus:
        again = np.random.default_rng([seed, step, 1])
        focused = again.random(preset.batch) < preset.focus
        indices[focused] = again.choice(_large_singles(seed, len(latents)), focused.sum())
    captions = [
        "" if rng.random() < preset.empty_captions else scenes.paraphrase(_training_scene(seed, int(i)), rng)
        for i in indices
    ]
    sigma = torch.sigmoid(torch.from_numpy(rng.standard_normal(preset.batch)).float())
    sigma = preset.shift * sigma / (1 + (preset.shift - 1) * sigma)
    noise = torch.from_numpy(rng.standard_normal((preset.batch, *latents.shape[1:]), dtype=np.float32))
    return latents[indices].to(device).float(), captions, sigma.to(device), noise.to(device)


@torch.no_grad()
def held_out_batch(vae: AutoencoderKL, device: str, count: int = 32) -> tuple[Tensor, list[str], Tensor, Tensor]:
    """Return scenes of unseen combinations at evenly spread sigmas, the same for every training.

    Args:
        vae: the trained autoencoder.
        device: of the tensors.
        count: number of scenes.

    Returns:
        Clean latents, captions, sigmas and noise.
    """
    chosen = [scenes.sample_scene(HELD_OUT_SEED + i, unseen=True) for i in range(count)]
    images = torch.from_numpy(np.stack([rendering.render(s).image for s in chosen])).permute(0, 3, 1, 2).to(device) * 2 - 1
    clean = (vae.encode(images).latent_dist.mean - vae.config.shift_factor) * vae.config.scaling_factor
    noise = torch.randn(clean.shape, generator=torch.Generator().manual_seed(0)).to(device)
    return clean, [s.caption for s in chosen], ((torch.arange(count) + 0.5) / count).to(device), noise


def progress_bar(items: Any, label: str, **kwargs: Any) -> tqdm:
    """Wrap an iterable in a progress bar that prints at most every ten seconds.

    Args:
        items: the iterable.
        label: printed before the bar.
        kwargs: further arguments of tqdm.
    """
    return tqdm(items, desc=label, mininterval=10, dynamic_ncols=True, **kwargs)
