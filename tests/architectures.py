"""Tiny pipelines of each architecture with random weights: real diffusers classes, no download, milliseconds a step.

FLUX.2, Qwen-Image, CogView4 and Z-Image read their prompts with large language models behind chat templates: there
``encode_prompt`` is replaced by random vectors that depend on the prompt alone; all else of the pipeline's call is real.
"""

from __future__ import annotations

import zlib
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
from diffusers import (
    AuraFlowPipeline,
    AuraFlowTransformer2DModel,
    AutoencoderDC,
    AutoencoderKL,
    AutoencoderKLFlux2,
    AutoencoderKLQwenImage,
    ChromaPipeline,
    ChromaTransformer2DModel,
    CogView4Pipeline,
    CogView4Transformer2DModel,
    DDIMScheduler,
    DiTPipeline,
    DiTTransformer2DModel,
    DPMSolverMultistepScheduler,
    FlowMatchEulerDiscreteScheduler,
    Flux2KleinPipeline,
    Flux2Pipeline,
    Flux2Transformer2DModel,
    FluxPipeline,
    FluxTransformer2DModel,
    PixArtSigmaPipeline,
    PixArtTransformer2DModel,
    QwenImagePipeline,
    QwenImageTransformer2DModel,
    SanaPipeline,
    SanaTransformer2DModel,
    SD3Transformer2DModel,
    StableDiffusion3Pipeline,
    ZImagePipeline,
    ZImageTransformer2DModel,
)
from transformers import (
    CLIPTextConfig,
    CLIPTextModel,
    CLIPTextModelWithProjection,
    Gemma2Config,
    Gemma2Model,
    T5Config,
    T5EncoderModel,
    UMT5Config,
    UMT5EncoderModel,
)

from malib.miniflux import scenes
from malib.miniflux.text import word_tokenizer

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


def _t5(width: int, encoder=T5EncoderModel, config=T5Config):
    return encoder(config(vocab_size=100, d_model=width, d_kv=8, d_ff=32, num_layers=1, num_heads=2, **SPECIAL))


def _vae(cls=AutoencoderKL, **more):
    more = more or {"shift_factor": 0.0, "scaling_factor": 1.0}
    return cls(
        down_block_types=("DownEncoderBlock2D",) * 2,
        up_block_types=("UpDecoderBlock2D",) * 2,
        block_out_channels=(8, 8),
        layers_per_block=1,
        latent_channels=4,
        norm_num_groups=4,
        sample_size=SIZE,
        mid_block_add_attention=False,
        **more,
    )


def _embedded(prompt: str | list[str], transformer: torch.nn.Module, tokens: int = 5) -> torch.Tensor:
    """What stands for a language model's reading of prompts: (prompts, tokens, 32), a function of each prompt alone."""
    prompts = [prompt] if isinstance(prompt, str) else prompt
    draws = [torch.Generator().manual_seed(zlib.crc32(p.encode())) for p in prompts]
    return torch.stack([torch.randn(tokens, 32, generator=g) for g in draws]).to(transformer.dtype)


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
        scheduler, _vae(), _clip(CLIPTextModel, 16), word_tokenizer(True), _t5(32), word_tokenizer(False), transformer
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
        transformer, scheduler, _vae(), one, word_tokenizer(True), two, word_tokenizer(True), _t5(32), word_tokenizer(False)
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
    return SanaPipeline(word_tokenizer(False), gemma, vae, transformer, scheduler)


def _flux2(cls, guidance_embeds: bool, **more):
    transformer = Flux2Transformer2DModel(
        in_channels=16,
        num_layers=2,
        num_single_layers=2,
        attention_head_dim=16,
        num_attention_heads=2,
        joint_attention_dim=32,
        timestep_guidance_channels=16,
        axes_dims_rope=(4, 4, 4, 4),
        guidance_embeds=guidance_embeds,
    )
    vae = _vae(AutoencoderKLFlux2, use_quant_conv=True)
    vae.bn.running_mean.uniform_(-1, 1)
    vae.bn.running_var.uniform_(0.5, 2)
    pipeline = cls(FlowMatchEulerDiscreteScheduler(shift=1.0), vae, None, None, transformer, **more)

    def encode_prompt(prompt, **kwargs):
        states = _embedded(prompt, transformer)
        return states, pipeline._prepare_text_ids(states)

    pipeline.encode_prompt = encode_prompt
    return pipeline


def qwen_image() -> QwenImagePipeline:
    transformer = QwenImageTransformer2DModel(
        in_channels=16,
        out_channels=4,
        num_layers=3,
        attention_head_dim=16,
        num_attention_heads=2,
        joint_attention_dim=32,
        axes_dims_rope=(4, 4, 8),
    )
    vae = AutoencoderKLQwenImage(
        base_dim=8,
        z_dim=4,
        dim_mult=[1, 1],
        num_res_blocks=1,
        temperal_downsample=[False],
        latents_mean=[0.5, -1.0, 0.0, 2.0],
        latents_std=[1.0, 0.5, 2.0, 1.5],
    )
    pipeline = QwenImagePipeline(FlowMatchEulerDiscreteScheduler(shift=1.0), vae, None, None, transformer)
    pipeline.default_sample_size = SIZE // 2

    def encode_prompt(prompt, **kwargs):
        states = _embedded(prompt, transformer)
        return states, torch.ones(states.shape[:2], dtype=torch.long)

    pipeline.encode_prompt = encode_prompt
    return pipeline


def pixart() -> PixArtSigmaPipeline:
    transformer = PixArtTransformer2DModel(
        num_attention_heads=4,
        attention_head_dim=8,
        in_channels=4,
        out_channels=8,
        num_layers=3,
        cross_attention_dim=32,
        sample_size=SIZE // 2,
        caption_channels=16,
        use_additional_conditions=False,
    )
    return PixArtSigmaPipeline(word_tokenizer(False), _t5(16), _vae(), transformer, DPMSolverMultistepScheduler())


def dit_xl() -> DiTPipeline:
    transformer = DiTTransformer2DModel(
        num_attention_heads=4, attention_head_dim=8, in_channels=4, out_channels=8, num_layers=3, sample_size=SIZE // 2
    )
    return DiTPipeline(transformer, _vae(), DDIMScheduler(clip_sample=False), dict(enumerate(LABELS)))


def auraflow() -> AuraFlowPipeline:
    transformer = AuraFlowTransformer2DModel(
        sample_size=SIZE // 2,
        num_mmdit_layers=2,
        num_single_dit_layers=2,
        attention_head_dim=8,
        num_attention_heads=4,
        joint_attention_dim=16,
        caption_projection_dim=32,
        pos_embed_max_size=256,
    )
    tokenizer = word_tokenizer(False)
    encoder = _t5(16, UMT5EncoderModel, UMT5Config)
    return AuraFlowPipeline(tokenizer, encoder, _vae(), transformer, FlowMatchEulerDiscreteScheduler(shift=1.0))


def chroma() -> ChromaPipeline:
    transformer = ChromaTransformer2DModel(
        in_channels=16,
        num_layers=2,
        num_single_layers=2,
        attention_head_dim=16,
        num_attention_heads=2,
        joint_attention_dim=32,
        axes_dims_rope=(4, 4, 8),
        approximator_num_channels=16,
        approximator_hidden_dim=32,
        approximator_layers=1,
    )
    return ChromaPipeline(FlowMatchEulerDiscreteScheduler(shift=1.0), _vae(), _t5(32), word_tokenizer(False), transformer)


def cogview4() -> CogView4Pipeline:
    transformer = CogView4Transformer2DModel(
        in_channels=4,
        out_channels=4,
        num_layers=3,
        attention_head_dim=8,
        num_attention_heads=4,
        text_embed_dim=32,
        time_embed_dim=16,
        condition_dim=8,
        sample_size=SIZE // 2,
        pos_embed_max_size=32,
    )
    scheduler = FlowMatchEulerDiscreteScheduler(shift=1.0)
    pipeline = CogView4Pipeline(None, None, _vae(), transformer, scheduler)
    pipeline.encode_prompt = lambda prompt, negative_prompt=None, *args, **kwargs: (
        _embedded(prompt, transformer, 16),
        _embedded(negative_prompt or [""] * len(prompt), transformer, 16),
    )
    return pipeline


def z_image() -> ZImagePipeline:
    transformer = ZImageTransformer2DModel(
        in_channels=4,
        dim=32,
        n_layers=3,
        n_refiner_layers=1,
        n_heads=2,
        n_kv_heads=2,
        cap_feat_dim=32,
        axes_dims=[4, 4, 8],
        axes_lens=[128, 32, 32],
    )
    pipeline = ZImagePipeline(FlowMatchEulerDiscreteScheduler(shift=1.0), _vae(), None, None, transformer)
    pipeline.encode_prompt = lambda prompt, negative_prompt=None, **kwargs: (
        [_embedded(p, transformer, 3 + len(p) % 5)[0] for p in prompt],
        [_embedded(p, transformer)[0] for p in negative_prompt or []],
    )
    return pipeline


LABELS = (  # what the contract draws, as the names of classes
    "a red star",
    "a small blue ring on the left",
    "a large yellow cross on the right",
    "a white square",
    "a cross",
    "a star",
    "a ring",
)
BUILDERS = {
    "flux": flux,
    "flux-guided": lambda: flux(guidance_embeds=True),
    "flux2-klein": lambda: _flux2(Flux2KleinPipeline, False),
    "flux2-dev": lambda: _flux2(Flux2Pipeline, True),
    "qwen-image": qwen_image,
    "sd3": sd3,
    "sana": sana,
    "pixart": pixart,
    "dit-xl": dit_xl,
    "auraflow": auraflow,
    "chroma": chroma,
    "cogview4": cogview4,
    "z-image": z_image,
}


@dataclass(frozen=True)
class Known:
    """What a reader of a pipeline's source knows, written by hand and apart from malib's own rows.

    Attributes:
        calls: the branches in the order of the transformer's calls, each call a tuple of the branches in its batch.
        image: for each label of blocks, what of a block's output are the image tokens.
        terms: for each label, what a block adds to the image tokens: (gate or None, submodule, its image tokens).
        text: how many blocks return a text stream.
        tokens: number of image tokens.
    """

    calls: tuple[tuple[str, ...], ...]
    image: dict[str, Callable]
    terms: dict[str, tuple[tuple[str | None, str, Callable], ...]]
    text: int
    tokens: int = 64


def _first(x):
    return x[0]


def _second(x):
    return x[1]


def _whole(x):
    return x


def _end(x):
    return x[:, -64:]


def _start(x):
    return x[:, :64]


def _flat(x):
    return x.flatten(2).transpose(1, 2)


APART, UNCOND_FIRST, COND_FIRST = (("cond",), ("uncond",)), (("uncond", "cond"),), (("cond", "uncond"),)
_ATTN_FF = (("attention", "attn", _first), ("mlp", "ff", _whole))
_CROSS = (("attention", "attn1", _whole), (None, "attn2", _whole))
_FLUX2_KNOWN = (
    {"double": _second, "single": _end},
    {"double": _ATTN_FF, "single": (("block", "attn", _end),)},
    4,
)
KNOWN = {
    "flux": Known(
        APART,
        {"double": _second, "single": _second},
        {"double": _ATTN_FF, "single": (("block", "proj_out", _end),)},
        4,
    ),
    "flux2-klein": Known(APART, *_FLUX2_KNOWN),
    "flux2-dev": Known((("cond",),), *_FLUX2_KNOWN),
    "qwen-image": Known(
        APART, {"double": _second}, {"double": (("attention", "attn", _first), ("mlp", "img_mlp", _whole))}, 3
    ),
    "sd3": Known(UNCOND_FIRST, {"joint": _second}, {"joint": _ATTN_FF}, 2),
    "sana": Known(UNCOND_FIRST, {"block": _whole}, {"block": (*_CROSS, ("mlp", "ff", _flat))}, 0, 256),
    "pixart": Known(UNCOND_FIRST, {"block": _whole}, {"block": (*_CROSS, ("mlp", "ff", _whole))}, 0),
    "dit-xl": Known(COND_FIRST, {"block": _whole}, {"block": (("attention", "attn1", _whole), ("mlp", "ff", _whole))}, 0),
    "auraflow": Known(  # its blocks add the MLP to what entered: the attention acts through the MLP alone
        UNCOND_FIRST,
        {"joint": _second, "single": _end},
        {"joint": (("mlp", "ff", _whole),), "single": (("mlp", "ff", _end),)},
        4,
    ),
    "chroma": Known(
        APART,
        {"double": _second, "single": _end},
        {"double": _ATTN_FF, "single": (("block", "proj_out", _end),)},
        4,
    ),
    "cogview4": Known(APART, {"joint": _first}, {"joint": (("attention", "attn1", _first), ("mlp", "ff", _whole))}, 3),
    "z-image": Known(
        COND_FIRST,
        {"refiner": _start, "joint": _start},
        dict.fromkeys(("refiner", "joint"), (("attention", "attention_norm2", _start), ("mlp", "ffn_norm2", _start))),
        3,
    ),
}


def build(name: str):
    """A tiny pipeline with every transformer weight drawn from a normal, so that all gates are open."""
    torch.manual_seed(0)
    pipeline = BUILDERS[name]()
    with torch.no_grad():
        for parameter in pipeline.transformer.parameters():
            parameter.normal_(0, 0.15)
    return pipeline


def save(name: str, folder: Path) -> None:
    """Write a tiny pipeline to a folder, with prompts whose words its tokenizers know."""
    build(name).save_pretrained(folder)
    if name != "dit-xl":  # its prompts are class names
        (folder / "prompts.txt").write_text("\n".join(scenes.captions(64)) + "\n")
