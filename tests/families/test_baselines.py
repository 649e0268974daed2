"""The papers' own baselines, with tiny adapters and editing pipelines of random weights."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from diffusers import FluxKontextPipeline, QwenImageEditPipeline
from safetensors.torch import load_file, save_file
from transformers import CLIPVisionConfig, CLIPVisionModelWithProjection

from malib import DiT
from malib.analysis import baselines

from .. import architectures

PROMPTS, SEEDS = ["a red star", "a blue ring"], [3, 4]


def references(dit: DiT, number: int = 2) -> np.ndarray:
    return np.random.default_rng(0).integers(0, 255, (number, dit.size, dit.size, 3), dtype=np.uint8)


@pytest.fixture
def adapter(flux_dit: DiT, tmp_path: Path) -> dict[str, str]:
    """An IP-Adapter for the tiny FLUX, in the layout of the published ones."""
    config, noise = flux_dit.pipeline.transformer.config, torch.Generator().manual_seed(0)
    vision = {"hidden_size": 16, "intermediate_size": 32, "projection_dim": 12, "num_hidden_layers": 1}
    encoder = CLIPVisionModelWithProjection(CLIPVisionConfig(**vision, num_attention_heads=2, image_size=32, patch_size=8))
    encoder.save_pretrained(tmp_path / "encoder")
    words, inner = config.joint_attention_dim, config.num_attention_heads * config.attention_head_dim
    shapes = {"image_proj.proj.weight": (4 * words, 12), "image_proj.proj.bias": (4 * words,)}
    shapes |= {"image_proj.norm.weight": (words,), "image_proj.norm.bias": (words,)}
    for block in range(config.num_layers):
        for name in ("to_k_ip", "to_v_ip"):
            shapes |= {
                f"ip_adapter.{block}.{name}.weight": (inner, words),
                f"ip_adapter.{block}.{name}.bias": (inner,),
            }
    save_file({n: torch.randn(s, generator=noise) for n, s in shapes.items()}, tmp_path / "ip.safetensors")
    return {
        "pretrained_model_name_or_path_or_dict": str(tmp_path),
        "weight_name": "ip.safetensors",
        "image_encoder_pretrained_model_name_or_path": str(tmp_path / "encoder"),
    }


def test_an_ip_adapter_reads_the_reference_and_leaves_the_model_as_it_was(flux_dit: DiT, adapter: dict[str, str]) -> None:
    call = {"steps": 2, "cfg": 2.0}
    before, plain, images = flux_dit.fingerprint, flux_dit.generate(PROMPTS, SEEDS, **call).images, references(flux_dit)
    found = baselines.ip_adapter(flux_dit, adapter, images, PROMPTS, SEEDS, **call)
    other = baselines.ip_adapter(flux_dit, adapter, images[::-1].copy(), PROMPTS, SEEDS, **call)
    assert found.shape == plain.shape and (found != plain).any() and (found != other).any()
    off = baselines.ip_adapter(flux_dit, adapter, images, PROMPTS, SEEDS, scale=0.0, **call)
    assert np.abs(off.astype(int) - plain).max() <= 1
    assert flux_dit.fingerprint == before and (flux_dit.generate(PROMPTS, SEEDS, **call).images == plain).all()


def test_an_adapter_that_fails_is_taken_off_too(flux_dit: DiT, adapter: dict[str, str]) -> None:
    before = flux_dit.fingerprint
    with pytest.raises(ValueError, match="must be non-negative"):
        baselines.ip_adapter(flux_dit, adapter, references(flux_dit), PROMPTS, SEEDS, steps=-1)
    assert flux_dit.fingerprint == before


def test_an_adapter_that_does_not_fit_leaves_nothing_behind(flux_dit: DiT, adapter: dict[str, str], tmp_path: Path) -> None:
    before, images, place = flux_dit.fingerprint, references(flux_dit), tmp_path / "ip.safetensors"
    good = baselines.ip_adapter(flux_dit, adapter, images, PROMPTS, SEEDS, steps=2)
    weights = load_file(place)
    save_file({n: x for n, x in weights.items() if "to_v_ip" not in n}, place)
    with pytest.raises(KeyError):
        baselines.ip_adapter(flux_dit, adapter, images, PROMPTS, SEEDS, steps=2)
    assert flux_dit.fingerprint == before and flux_dit.pipeline.image_encoder is None
    save_file(weights, place)
    assert (baselines.ip_adapter(flux_dit, adapter, images, PROMPTS, SEEDS, steps=2) == good).all()


def test_what_has_no_adapter_says_so(flux_dit: DiT) -> None:
    dit = DiT(architectures.build("sana"))
    with pytest.raises(ValueError, match="has no IP-Adapter for"):
        baselines.ip_adapter(dit, {}, references(dit), PROMPTS, SEEDS)
    with pytest.raises(ValueError, match="as many of each"):
        baselines.ip_adapter(flux_dit, {}, references(flux_dit, 1), PROMPTS, SEEDS)
    with pytest.raises(ValueError, match="takes no image to edit"):
        baselines.edit_images(flux_dit.pipeline, references(flux_dit), PROMPTS, SEEDS, steps=2)


@pytest.mark.parametrize("name", ["kontext", "qwen"])
def test_an_editing_pipeline_gives_a_picture_for_every_reference(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    module = "diffusers.pipelines.qwenimage.pipeline_qwenimage_edit"
    monkeypatch.setattr(f"{module}.calculate_dimensions", lambda area, ratio: (32, 32, None))  # not a million pixels
    own = architectures.build("flux" if name == "kontext" else "qwen-image")
    if name == "kontext":
        pipeline = FluxKontextPipeline(**own.components)
    else:
        pipeline = QwenImageEditPipeline(own.scheduler, own.vae, None, None, None, own.transformer)
        read = own.encode_prompt
        pipeline.encode_prompt = lambda image, prompt, **kwargs: read(prompt, **kwargs)
    pipeline.set_progress_bar_config(disable=True)
    images = references(DiT(own))
    found = baselines.edit_images(pipeline, images, PROMPTS, SEEDS, steps=2)
    assert found.shape == images.shape and found.dtype == np.uint8
    assert (found[0] != baselines.edit_images(pipeline, images[::-1].copy(), PROMPTS, SEEDS, steps=2)[0]).any()
    assert (found[1] == baselines.edit_images(pipeline, images[1:], PROMPTS[1:], SEEDS[1:], steps=2)[0]).all()
