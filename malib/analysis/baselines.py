"""The image-conditioned methods that MAs-DiT (arXiv 2605.13974) compares with and that diffusers contains.

Each needs trained weights of its own, which this project does not ship: give a folder or a hub id.
"""

from __future__ import annotations

import inspect
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from ..generation import check_images

if TYPE_CHECKING:
    from ..dit import DiT


def ip_adapter(
    dit: DiT,
    adapter: Mapping[str, Any],
    images: np.ndarray,
    prompts: Sequence[str],
    seeds: Sequence[int],
    *,
    scale: float = 1.0,
    **call: Any,
) -> np.ndarray:
    """Generate images under an IP-Adapter (Ye et al., arXiv 2308.06721), which is removed afterwards.

    Args:
        dit: a FLUX.1 or SD3 model.
        adapter: arguments of the pipeline's ``load_ip_adapter``: ``pretrained_model_name_or_path_or_dict``,
            ``weight_name``, for FLUX.1 ``image_encoder_pretrained_model_name_or_path``.
        images: references, uint8 (n, H, W, 3), one for each prompt; the results have their size.
        prompts: n prompts.
        seeds: n seeds, as of ``DiT.generate``.
        scale: strength of the adapter.
        call: ``steps``, ``cfg`` and ``guidance``, as of ``DiT.generate``.

    Returns:
        uint8 (n, H, W, 3).

    Raises:
        ValueError: diffusers has no IP-Adapter for this pipeline, it is offloaded, or unequal numbers were given.
    """
    import torch
    from PIL import Image

    pipeline = dit.pipeline
    if not hasattr(pipeline, "load_ip_adapter"):
        raise ValueError(f"diffusers has no IP-Adapter for {dit.name}; use a FLUX.1 or SD3 model.")
    if dit.offloaded:
        raise ValueError("An IP-Adapter cannot be loaded into an offloaded model; open the model without offload.")
    _check(images, prompts, seeds)
    options = dict(adapter)
    if "image_encoder_dtype" in inspect.signature(pipeline.load_ip_adapter).parameters:
        options.setdefault("image_encoder_dtype", getattr(torch, dit.dtype))
    results, size = [], tuple(images.shape[1:3])
    try:
        pipeline.load_ip_adapter(**options)
        pipeline.set_ip_adapter_scale(scale)
        for image, prompt, seed in zip(images, prompts, seeds, strict=True):
            arguments = dit.arguments([prompt], [seed], size=size, **call)
            with torch.no_grad():
                results.append(pipeline(**arguments, ip_adapter_image=Image.fromarray(image)).images[0])
    finally:
        pipeline.unload_ip_adapter()
    return (np.stack(results) * 255).round().astype(np.uint8)


def edit_images(
    pipeline: Any, images: np.ndarray, prompts: Sequence[str], seeds: Sequence[int], *, steps: int
) -> np.ndarray:
    """Edit references by a prompt with an editing pipeline: Qwen-Image-Edit, FLUX.1 Kontext, ...

    Args:
        pipeline: a diffusers pipeline whose call takes ``image`` and ``prompt``; its other settings are not changed.
        images: references, uint8 (n, H, W, 3), one for each prompt; the results have their size.
        prompts: n prompts.
        seeds: n seeds.
        steps: denoising steps.

    Returns:
        uint8 (n, H, W, 3).

    Raises:
        ValueError: the pipeline takes no image, or unequal numbers were given.
    """
    import torch
    from PIL import Image, ImageOps

    known = inspect.signature(pipeline.__call__).parameters
    if not {"image", "prompt"} <= set(known):
        raise ValueError(f"{type(pipeline).__name__} takes no image to edit; use one such as Qwen-Image-Edit.")
    _check(images, prompts, seeds)
    height, width = images.shape[1:3]
    settings = {"height": height, "width": width, "max_area": height * width, "_auto_resize": False, "negative_prompt": " "}
    settings, results = {name: value for name, value in settings.items() if name in known}, []
    for image, prompt, seed in zip(images, prompts, seeds, strict=True):
        source, generator = Image.fromarray(image), torch.Generator("cpu").manual_seed(int(seed))
        with torch.no_grad():
            result = pipeline(image=source, prompt=prompt, generator=generator, num_inference_steps=steps, **settings)
        results.append(np.asarray(ImageOps.fit(result.images[0].convert("RGB"), (width, height))))
    return np.stack(results)


def _check(images: np.ndarray, prompts: Sequence[str], seeds: Sequence[int]) -> None:
    check_images(images)
    if not len(images) == len(prompts) == len(seeds):
        raise ValueError(
            f"{len(images)} references, {len(prompts)} prompts and {len(seeds)} seeds were given; give as many of each."
        )
