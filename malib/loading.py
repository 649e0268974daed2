"""Open a diffusion transformer by name, folder or hub id."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from .cache import Store
from .dit import DiT
from .presets import BUNDLED, data_folder, known_models, preset_of

if TYPE_CHECKING:
    import torch


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
            "black-forest-labs/FLUX.1-dev", a folder in diffusers format, or an open diffusers pipeline.
        device: "cpu", "cuda", "mps"; None means a GPU if there is one.
        dtype: "float32", "bfloat16" or "float16"; None means float32 on the CPU and bfloat16 on a GPU.
        revision: a branch, tag or commit of the hub.
        device_map: "balanced" spreads the components over several GPUs; "cuda" loads directly onto one.
        offload: "model" keeps only the computing component on the GPU, "sequential" only the layer; both need a GPU.
        quantize: "8bit" or "4bit" quantises the transformer (bitsandbytes, on a GPU).
        cache: True for the store in ``$MALIB_CACHE`` (or ~/.cache/malib/generations), False for none, or a ``Store``.
        batch_size: number of samples, auxiliary ones included, in one call of the pipeline.

    Returns:
        The model, ready for ``generate``.

    Raises:
        FileNotFoundError: the model is neither bundled, nor a folder, nor available from the hub.
        PermissionError: the model is gated, and no token with an accepted licence was found.
        ValueError: its architecture is not in ``malib.families``, or an argument is not one of the above.
    """
    import torch

    opening = {"device": device, "dtype": dtype, "revision": revision, "device_map": device_map, "offload": offload}
    settings = {"cache": cache, "batch_size": batch_size}
    if hasattr(model, "components"):
        if given := [name for name, value in {**opening, "quantize": quantize}.items() if value is not None]:
            raise ValueError(f"{', '.join(given)} cannot be set on an open pipeline; set them when you open it.")
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
        raise ValueError(f"{'offload' if offload else 'quantize'} needs a GPU and there is none; omit it.")
    known = preset_of(model)
    source = data_folder() / BUNDLED if str(model) == BUNDLED else known.get("id", model)
    options = {"revision": revision, "device_map": device_map}
    if quantize:
        options["quantization_config"] = _quantization(quantize, getattr(torch, dtype))
    pipeline = _open(source, dtype=getattr(torch, dtype), **{k: v for k, v in options.items() if v})
    dit = DiT(pipeline if offload or device_map else pipeline.to(device), name=str(source if known else model), **settings)
    if offload:
        dit.offload(offload)
    return dit


def _open(source: str | Path, **options: Any) -> Any:
    """Open the pipeline of a folder or hub id; every failure is one sentence."""
    from huggingface_hub.errors import GatedRepoError

    try:
        with _quiet_loading():
            from diffusers import DiffusionPipeline

            return DiffusionPipeline.from_pretrained(source, use_safetensors=True, **options)
    except GatedRepoError as error:
        raise PermissionError(
            f"'{source}' is gated: accept its licence on its page on the hub, then run `hf auth login` with your token."
        ) from error
    except (OSError, ValueError) as error:
        raise FileNotFoundError(
            f"'{source}' could not be opened: it is neither '{BUNDLED}', nor a short name ({', '.join(known_models())}), "
            "nor a diffusers folder with safetensors, and the hub did not provide it; check the name and the network "
            f"({str(error).strip().splitlines()[0][:200]})."
        ) from error


def _quantization(kind: str, dtype: torch.dtype) -> Any:
    from diffusers import PipelineQuantizationConfig

    settings = {"4bit": {"load_in_4bit": True, "bnb_4bit_compute_dtype": dtype}, "8bit": {"load_in_8bit": True}}[kind]
    return PipelineQuantizationConfig(
        quant_backend=f"bitsandbytes_{kind}", quant_kwargs=settings, components_to_quantize=["transformer"]
    )


@contextmanager
def _quiet_loading() -> Iterator[None]:
    """Hide the loaders' progress bars and hints, not their errors."""
    from diffusers.utils import logging as diffusers_logging
    from transformers.utils import logging as transformers_logging

    libraries = (diffusers_logging, transformers_logging)
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
