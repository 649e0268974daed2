"""Tiny pipelines of each architecture with random weights: real diffusers classes, no download, milliseconds a step."""

from __future__ import annotations

import torch
from diffusers import (
    AutoencoderDC,
    AutoencoderKL,
    DPMSolverMultistepScheduler,
    FlowMatchEulerDiscreteScheduler,
    FluxPipeline,
    FluxTransformer2DModel,
    SanaPipeline,
    SanaTransformer2DModel,
    SD3Transformer2DModel,
    StableDiffusion3Pipeline,
)
from transformers import (
    CLIPTextConfig,
    CLIPTextModel,
    CLIPTextModelWithProjection,
    Gemma2Config,
    Gemma2Model,
    T5Config,
    T5EncoderModel,
)

from malib.train import _tokenizer

SIZE = 32
SPECIAL = {"pad_token_id": 0, "bos_token_id": 2, "eos_token_id": 3}


def _clip(cls, width: int):
    config = CLIPTextConfig(
        vocab_size=100,
        hidden_size=width,
        intermediate_size=32,
        projection_dim=width,
        num_hidden_layers=2,
        num_attention_heads=2,
        max_position_embeddings=32,
        **SPECIAL,
    )
    return cls(config)


def _t5(width: int):
    return T5EncoderModel(T5Config(vocab_size=100, d_model=width, d_kv=8, d_ff=32, num_layers=1, num_heads=2, **SPECIAL))


def _vae():
    return AutoencoderKL(
        down_block_types=("DownEncoderBlock2D",) * 2,
        up_block_types=("UpDecoderBlock2D",) * 2,
        block_out_channels=(8, 8),
        layers_per_block=1,
        latent_channels=4,
        norm_num_groups=4,
        sample_size=SIZE,
        mid_block_add_attention=False,
        shift_factor=0.0,
        scaling_factor=1.0,
    )


def flux(guidance_embeds: bool = False) -> FluxPipeline:
    transformer = FluxTransformer2DModel(
        patch_size=1,
        in_channels=16,
        num_layers=2,
        num_single_layers=2,
        attention_head_dim=16,
        num_attention_heads=2,
        joint_attention_dim=32,
        pooled_projection_dim=16,
        guidance_embeds=guidance_embeds,
        axes_dims_rope=(4, 4, 8),
    )
    scheduler = FlowMatchEulerDiscreteScheduler(shift=1.0)
    return FluxPipeline(
        scheduler, _vae(), _clip(CLIPTextModel, 16), _tokenizer(True), _t5(32), _tokenizer(False), transformer
    )


def sd3() -> StableDiffusion3Pipeline:
    transformer = SD3Transformer2DModel(
        sample_size=SIZE // 2,
        patch_size=2,
        in_channels=4,
        out_channels=4,
        num_layers=3,
        attention_head_dim=8,
        num_attention_heads=4,
        joint_attention_dim=32,
        caption_projection_dim=32,
        pooled_projection_dim=32,
    )
    one, two = _clip(CLIPTextModelWithProjection, 16), _clip(CLIPTextModelWithProjection, 16)
    scheduler = FlowMatchEulerDiscreteScheduler(shift=3.0)
    return StableDiffusion3Pipeline(
        transformer, scheduler, _vae(), one, _tokenizer(True), two, _tokenizer(True), _t5(32), _tokenizer(False)
    )


def sana() -> SanaPipeline:
    transformer = SanaTransformer2DModel(
        patch_size=1,
        in_channels=4,
        out_channels=4,
        num_layers=3,
        num_attention_heads=4,
        attention_head_dim=8,
        num_cross_attention_heads=4,
        cross_attention_head_dim=8,
        cross_attention_dim=32,
        caption_channels=16,
        sample_size=SIZE // 2,
    )
    vae = AutoencoderDC(
        in_channels=3,
        latent_channels=4,
        attention_head_dim=2,
        encoder_block_types="ResBlock",
        decoder_block_types="ResBlock",
        encoder_block_out_channels=(8, 8),
        decoder_block_out_channels=(8, 8),
        encoder_qkv_multiscales=((), ()),
        decoder_qkv_multiscales=((), ()),
        encoder_layers_per_block=(1, 1),
        decoder_layers_per_block=(1, 1),
        downsample_block_type="conv",
        upsample_block_type="interpolate",
    )
    gemma = Gemma2Model(
        Gemma2Config(
            vocab_size=100,
            hidden_size=16,
            intermediate_size=32,
            num_hidden_layers=1,
            num_attention_heads=2,
            num_key_value_heads=2,
            head_dim=8,
            **SPECIAL,
        )
    )
    scheduler = DPMSolverMultistepScheduler(prediction_type="flow_prediction", use_flow_sigmas=True, flow_shift=3.0)
    return SanaPipeline(_tokenizer(False), gemma, vae, transformer, scheduler)


BUILDERS = {"flux": flux, "flux-guided": lambda: flux(guidance_embeds=True), "sd3": sd3, "sana": sana}


def build(name: str):
    """A tiny pipeline with every transformer weight drawn from a normal, so that all gates are open."""
    torch.manual_seed(0)
    pipeline = BUILDERS[name]()
    with torch.no_grad():
        for parameter in pipeline.transformer.parameters():
            parameter.normal_(0, 0.15)
    return pipeline
