"""Differences between diffusion transformers, as data. A new architecture is a new row, not a branch elsewhere."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

STREAMS = ("image", "text")
BRANCHES = ("cond", "uncond")
PRIVATE_NAMES = (
    ("diffusers.DiffusionPipeline", "_execution_device"),
    ("diffusers.FluxPipeline", "_pack_latents"),
    ("diffusers.FluxPipeline", "_unpack_latents"),
    ("diffusers.Flux2Pipeline", "_patchify_latents"),
    ("diffusers.Flux2Pipeline", "_unpatchify_latents"),
    ("torch._dynamo.eval_frame", "OptimizedModule"),
    ("torch.nn.Module", "_compiled_call_impl"),
)
"""Every private name of other libraries that malib uses: the reason why diffusers and torch have upper bounds."""


@dataclass(frozen=True)
class Gate:
    """An AdaLN gate of a block.

    With neither ``module`` nor ``argument``, row ``index`` of ``scale_shift_table + timestep`` is the gate, as in
    PixArt.

    Attributes:
        name: "attention", "mlp" or "block" (one gate for both).
        module: the submodule that returns the gate: at ``index`` of the tuple that it returns, or, with ``parts``, as
            one of the equal parts of the tensor that it returns.
        index: position in the tuple, the parts or the table.
        stream: stream whose channels the gate scales.
        parts: number of equal parts of the tensor along the channels; -1 for a linear layer whose outputs are a multiple
            of its inputs.
        argument: the block's argument that contains the tensor, where a stack of blocks shares its modulation.
        tanh: whether the block applies tanh to the gate.
    """

    name: str
    module: str | None = None
    index: int = 0
    stream: str = "image"
    parts: int = 0
    argument: str | None = None
    tanh: bool = False


@dataclass(frozen=True)
class Stack:
    """A list of equal blocks.

    Attributes:
        attribute: name of the ModuleList on the transformer.
        label: short name of its blocks ("double", "single", ...).
        returns: the streams in the order in which a block returns them; a block may return None for a stream.
        arguments: for each stream that enters the block, the parameter's name, in the order of the parameters.
        gates: the AdaLN gates of a block.
        modulation: "shift" and "scale" of the first LayerNorm of the image tokens, where correspondence can use them.
        joined: order of the streams where one tensor contains both: "text first" or "image first" (the padding of the
            image then counts as text); None where each stream has its own tensor.
    """

    attribute: str
    label: str
    returns: tuple[str, ...]
    arguments: dict[str, str]
    gates: tuple[Gate, ...] = ()
    modulation: tuple[Gate, ...] = ()
    joined: str | None = None


@dataclass(frozen=True)
class Family:
    """An architecture.

    Attributes:
        transformer: class name of the diffusers transformer, by which a pipeline finds its row.
        stacks: block stacks in execution order.
        passes: how true classifier-free guidance runs: "sequential" (one call for each branch, in the order of
            ``order``) or "batched" (one call on the concatenation of ``order``).
        order: the branches in that order.
        cfg_argument: the pipeline's argument for the classifier-free scale; None where there is no true guidance.
        cfg_offset: added to the scale before the pipeline receives it, -1 where it computes cond + s (cond - uncond).
        rescales: whether the pipeline rescales the velocity after guidance.
        guidance_argument: the pipeline's argument for the embedded guidance value, if the architecture may have one.
        conditioning: the transformer's arguments that carry the prompt.
        patch: latent pixels per side of a token; None where the transformer's config says so (``patch_size``).
        latents: dtype in which the pipeline draws its noise; None for that of the weights.
        images: how images can enter: "flow", in a rectified flow (``Renoised``, ``Images``); "ddpm", as a start only
            (``Renoised``); None, not at all: the pipeline takes no sigmas (CogView4), or no latents (DiT).
        packs_itself: whether the pipeline packs given latents, channels of 2 x 2 latent pixels as one token.
        sequence_tokenizer: the tokenizer whose ``model_max_length`` is the length of the text stream, if it is variable.
        classes: whether the model generates ImageNet classes; prompts are then class names or numbers.
        pipeline: class name of the pipeline, where several share a transformer.
        call: further constant arguments of the pipeline.
    """

    transformer: str
    stacks: tuple[Stack, ...]
    passes: str
    order: tuple[str, ...]
    cfg_argument: str | None
    cfg_offset: float = 0.0
    rescales: bool = False
    guidance_argument: str | None = None
    conditioning: tuple[str, ...] = ("encoder_hidden_states", "pooled_projections")
    patch: int | None = None
    latents: str | None = None
    images: str | None = "flow"
    packs_itself: bool = False
    sequence_tokenizer: str | None = None
    classes: bool = False
    pipeline: str | None = None
    call: dict[str, Any] = field(default_factory=dict)


_IMAGE = {"image": "hidden_states"}
_BOTH = {"image": "hidden_states", "text": "encoder_hidden_states"}
_ONE = {"image": "hidden_states", "text": "hidden_states"}
_GATES = (Gate("attention", "norm1", 1), Gate("mlp", "norm1", 4))
_MM_GATES = (*_GATES, Gate("attention", "norm1_context", 1, "text"), Gate("mlp", "norm1_context", 4, "text"))
_TABLE_GATES = (Gate("attention", index=2), Gate("mlp", index=5))
_SINGLE_GATE = (Gate("block", "norm", 1),)
_ADALN = (Gate("shift", "norm1.linear", 0, parts=-1), Gate("scale", "norm1.linear", 1, parts=-1))
_SINGLE_ADALN = (Gate("shift", "norm.linear", 0, parts=-1), Gate("scale", "norm.linear", 1, parts=-1))
_TABLE_ADALN = (Gate("shift", index=0), Gate("scale", index=1))


def _shared(argument: str, stream: str = "image") -> tuple[Gate, Gate]:
    return (
        Gate("attention", index=2, stream=stream, parts=6, argument=argument),
        Gate("mlp", index=5, stream=stream, parts=6, argument=argument),
    )


def _modulated(module: str, stream: str = "image") -> tuple[Gate, Gate]:
    return Gate("attention", module, 2, stream, parts=6), Gate("mlp", module, 5, stream, parts=6)


_FLUX2 = (
    Stack(
        "transformer_blocks",
        "double",
        ("text", "image"),
        _BOTH,
        (*_shared("temb_mod_img"), *_shared("temb_mod_txt", "text")),
    ),
    Stack(
        "single_transformer_blocks",
        "single",
        ("text", "image"),
        _ONE,
        (Gate("block", index=2, parts=3, argument="temb_mod"),),
        joined="text first",
    ),
)
_Z_GATES = (
    Gate("attention", "adaLN_modulation", 1, parts=4, tanh=True),
    Gate("mlp", "adaLN_modulation", 3, parts=4, tanh=True),
)

FAMILIES = (
    Family(
        "FluxTransformer2DModel",
        (
            Stack("transformer_blocks", "double", ("text", "image"), _BOTH, _MM_GATES, _ADALN),
            Stack("single_transformer_blocks", "single", ("text", "image"), _BOTH, _SINGLE_GATE, _SINGLE_ADALN),
        ),
        passes="sequential",
        order=("cond", "uncond"),
        cfg_argument="true_cfg_scale",
        guidance_argument="guidance_scale",
        patch=2,
        sequence_tokenizer="tokenizer_2",
    ),
    Family(
        "Flux2Transformer2DModel",
        _FLUX2,
        passes="sequential",
        order=("cond", "uncond"),
        cfg_argument="guidance_scale",
        conditioning=("encoder_hidden_states",),
        patch=2,
        packs_itself=True,
        pipeline="Flux2KleinPipeline",
    ),
    Family(
        "Flux2Transformer2DModel",
        _FLUX2,
        passes="sequential",
        order=("cond",),
        cfg_argument=None,
        guidance_argument="guidance_scale",
        conditioning=("encoder_hidden_states",),
        patch=2,
        packs_itself=True,
        pipeline="Flux2Pipeline",
    ),
    Family(
        "QwenImageTransformer2DModel",
        (
            Stack(
                "transformer_blocks",
                "double",
                ("text", "image"),
                _BOTH,
                (*_modulated("img_mod"), *_modulated("txt_mod", "text")),
            ),
        ),
        passes="sequential",
        order=("cond", "uncond"),
        cfg_argument="true_cfg_scale",
        rescales=True,
        guidance_argument="guidance_scale",
        conditioning=("encoder_hidden_states", "encoder_hidden_states_mask"),
        patch=2,
    ),
    Family(
        "SD3Transformer2DModel",
        (Stack("transformer_blocks", "joint", ("text", "image"), _BOTH, _MM_GATES, _ADALN),),
        passes="batched",
        order=("uncond", "cond"),
        cfg_argument="guidance_scale",
    ),
    Family(
        "SanaTransformer2DModel",
        (Stack("transformer_blocks", "block", ("image",), _IMAGE, _TABLE_GATES, _TABLE_ADALN),),
        passes="batched",
        order=("uncond", "cond"),
        cfg_argument="guidance_scale",
        conditioning=("encoder_hidden_states", "encoder_attention_mask"),
        latents="float32",
        call={"use_resolution_binning": False},
    ),
    Family(
        "PixArtTransformer2DModel",
        (Stack("transformer_blocks", "block", ("image",), _IMAGE, _TABLE_GATES, _TABLE_ADALN),),
        passes="batched",
        order=("uncond", "cond"),
        cfg_argument="guidance_scale",
        conditioning=("encoder_hidden_states", "encoder_attention_mask"),
        images="ddpm",
        call={"use_resolution_binning": False, "clean_caption": False},
    ),
    Family(
        "DiTTransformer2DModel",
        (Stack("transformer_blocks", "block", ("image",), _IMAGE, _GATES),),
        passes="batched",
        order=("cond", "uncond"),
        cfg_argument="guidance_scale",
        conditioning=(),
        images=None,
        classes=True,
    ),
    Family(
        "AuraFlowTransformer2DModel",
        (
            Stack("joint_transformer_blocks", "joint", ("text", "image"), _BOTH, _MM_GATES),
            Stack("single_transformer_blocks", "single", ("text", "image"), _ONE, _GATES, joined="text first"),
        ),
        passes="batched",
        order=("uncond", "cond"),
        cfg_argument="guidance_scale",
        conditioning=("encoder_hidden_states",),
    ),
    Family(
        "ChromaTransformer2DModel",
        (
            Stack("transformer_blocks", "double", ("text", "image"), _BOTH, _MM_GATES),
            Stack("single_transformer_blocks", "single", ("text", "image"), _ONE, _SINGLE_GATE, joined="text first"),
        ),
        passes="sequential",
        order=("cond", "uncond"),
        cfg_argument="guidance_scale",
        conditioning=("encoder_hidden_states", "attention_mask"),
        patch=2,
    ),
    Family(
        "CogView4Transformer2DModel",
        (
            Stack(
                "transformer_blocks",
                "joint",
                ("image", "text"),
                _BOTH,
                (*_GATES, Gate("attention", "norm1", 6, "text"), Gate("mlp", "norm1", 9, "text")),
            ),
        ),
        passes="sequential",
        order=("cond", "uncond"),
        cfg_argument="guidance_scale",
        conditioning=("encoder_hidden_states",),
        latents="float32",
        images=None,
    ),
    Family(
        "ZImageTransformer2DModel",
        (
            Stack("noise_refiner", "refiner", ("image",), {"image": "x"}, _Z_GATES, joined="image first"),
            Stack("layers", "joint", ("image", "text"), {"image": "x", "text": "x"}, _Z_GATES, joined="image first"),
        ),
        passes="batched",
        order=("cond", "uncond"),
        cfg_argument="guidance_scale",
        cfg_offset=-1.0,
        conditioning=(),
        patch=2,
        latents="float32",
    ),
)


def family_of(pipeline: Any) -> Family:
    """Return the row of a pipeline.

    Raises:
        ValueError: no row fits the pipeline.
    """
    if getattr(pipeline, "transformer", None) is None:
        raise ValueError(f"{type(pipeline).__name__} has no transformer; malib studies diffusion transformers.")
    name = type(pipeline.transformer).__name__
    rows = [family for family in FAMILIES if family.transformer == name]
    if not rows:
        known = ", ".join(dict.fromkeys(family.transformer for family in FAMILIES))
        raise ValueError(f"{name} is not a known architecture ({known}); add a row for it to malib/families.py.")
    return next((family for family in rows if family.pipeline == type(pipeline).__name__), rows[0])
