"""Presets of the bundled models, and their pipelines with fresh weights."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from . import scenes
from .text import TEXT_LENGTH, word_tokenizer

if TYPE_CHECKING:
    from diffusers import FluxPipeline


@dataclass(frozen=True)
class Preset:
    """Everything that determines a training except its seed; ``heads`` * 64 is the width of the transformer.

    ``shift`` raises the training's noise levels, sigma -> shift sigma / (1 + (shift - 1) sigma) (Stable Diffusion 3, eq.
    23): captions decide about a scene above sigma .7, where a plain logit-normal law has a fifth of its draws. ``focus``
    is the share of scenes drawn from those of one large subject, where the shape has most weight in the loss.
    ``card_captions`` is the number of images of each kind that the card evaluates: few where the training is too short
    for good images.
    """

    name: str
    heads: int
    double_blocks: int
    single_blocks: int
    steps: int
    batch: int
    learning_rate: float = 1e-3
    warmup: int = 100
    decay_share: float = 0.3
    ema: float = 0.998
    shift: float = 3.0
    focus: float = 0.0
    empty_captions: float = 0.1
    scenes: int = 40_000
    vae_channels: tuple[int, int] = (32, 64)
    vae_steps: int = 1000
    vae_batch: int = 16
    card_captions: int = 256


PRESETS = {
    p.name: p
    for p in (
        Preset("tiny", 2, 1, 4, steps=1000, batch=32, scenes=8000, vae_channels=(16, 32), vae_steps=300, card_captions=32),
        Preset("small", 4, 1, 4, steps=1000, batch=32, scenes=8000, vae_channels=(16, 32), vae_steps=300, card_captions=32),
        Preset("medium", 6, 1, 4, steps=1000, batch=32, scenes=8000, vae_channels=(16, 32), vae_steps=300, card_captions=32),
        Preset("mini", 6, 1, 4, steps=15750, batch=32, decay_share=0.222, shift=5.0, focus=0.5, vae_steps=1200),
        Preset("base", 8, 2, 6, steps=40_000, batch=128, learning_rate=7e-4, ema=0.9995, scenes=200_000),
    )
}


def build_pipeline(preset: Preset, seed: int = 0) -> FluxPipeline:
    """Build a ``FluxPipeline`` of the preset's size with fresh weights: adaLN-zero, otherwise the libraries' initialisation.

    Args:
        preset: sizes of the transformer and the autoencoder.
        seed: of the weights.
    """
    from diffusers import AutoencoderKL, FlowMatchEulerDiscreteScheduler, FluxPipeline, FluxTransformer2DModel
    from transformers import CLIPTextConfig, CLIPTextModel, T5Config, T5EncoderModel

    torch.manual_seed(seed)
    tokenizer, tokenizer_2 = word_tokenizer(bos=True), word_tokenizer(bos=False)
    vocabulary, special = len(tokenizer), {"pad_token_id": 0, "bos_token_id": 2, "eos_token_id": 3}
    transformer = FluxTransformer2DModel(
        patch_size=1,
        in_channels=16,
        num_layers=preset.double_blocks,
        num_single_layers=preset.single_blocks,
        attention_head_dim=64,
        num_attention_heads=preset.heads,
        joint_attention_dim=128,
        pooled_projection_dim=64,
        guidance_embeds=False,
        axes_dims_rope=(16, 24, 24),
    )
    for name, module in transformer.named_modules():
        modulates = name.endswith(("norm.linear", "norm1.linear", "norm1_context.linear", "norm_out.linear"))
        if modulates or name == "proj_out":
            nn.init.zeros_(module.weight)
            nn.init.zeros_(module.bias)
    text_encoder = CLIPTextModel(
        CLIPTextConfig(
            vocab_size=vocabulary,
            hidden_size=64,
            intermediate_size=256,
            projection_dim=64,
            num_hidden_layers=1,
            num_attention_heads=2,
            max_position_embeddings=TEXT_LENGTH,
            **special,
        )
    )
    text_encoder_2 = T5EncoderModel(
        T5Config(
            vocab_size=vocabulary,
            d_model=128,
            d_kv=32,
            d_ff=256,
            num_layers=1,
            num_heads=4,
            dropout_rate=0.0,
            feed_forward_proj="gated-gelu",
            decoder_start_token_id=0,
            **special,
        )
    )
    vae = AutoencoderKL(
        down_block_types=("DownEncoderBlock2D",) * 2,
        up_block_types=("UpDecoderBlock2D",) * 2,
        block_out_channels=preset.vae_channels,
        layers_per_block=1,
        latent_channels=4,
        norm_num_groups=8,
        sample_size=scenes.SIZE,
        mid_block_add_attention=False,
        use_quant_conv=False,
        use_post_quant_conv=False,
        scaling_factor=1.0,
        shift_factor=0.0,
    )
    scheduler = FlowMatchEulerDiscreteScheduler(shift=1.0)
    return FluxPipeline(scheduler, vae, text_encoder, tokenizer, text_encoder_2, tokenizer_2, transformer)


def pack(latents: Tensor) -> Tensor:
    """Convert ``latents`` (B, 4, 32, 32) to tokens (B, 256, 16), in FLUX's order."""
    b, c, h, w = latents.shape
    return latents.view(b, c, h // 2, 2, w // 2, 2).permute(0, 2, 4, 1, 3, 5).reshape(b, h * w // 4, c * 4)


def position_ids(device: str | torch.device) -> tuple[Tensor, Tensor]:
    """Return text ids (32, 3) and image ids (256, 3) for the rotary embedding."""
    side = scenes.SIZE // 4
    image = torch.zeros(side, side, 3, device=device)
    image[..., 1] += torch.arange(side, device=device)[:, None]
    image[..., 2] += torch.arange(side, device=device)[None]
    return torch.zeros(TEXT_LENGTH, 3, device=device), image.reshape(-1, 3)


_TRAINED = ("transformer", "text_encoder", "text_encoder_2")


def trained_weights(pipeline: FluxPipeline) -> dict[str, Tensor]:
    """Return the parameters of the transformer and both text encoders by name."""
    return {f"{part}.{name}": tensor for part in _TRAINED for name, tensor in getattr(pipeline, part).named_parameters()}


@torch.no_grad()
def load_weights(pipeline: FluxPipeline, weights: dict[str, Tensor]) -> None:
    """Copy weights into a pipeline.

    Args:
        pipeline: of the weights' architecture.
        weights: tensors by name, as from ``trained_weights``.
    """
    for name, tensor in trained_weights(pipeline).items():
        tensor.copy_(weights[name])
