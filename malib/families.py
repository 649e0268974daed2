"""What differs between diffusion transformers, as data. A new architecture is a new row here, not a branch elsewhere."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

STREAMS = ("image", "text")
BRANCHES = ("cond", "uncond")


@dataclass(frozen=True)
class Gate:
    """One AdaLN gate of a block.

    ``module`` names the norm whose returned tuple holds the gate at ``index``; None means that row ``index`` of
    ``scale_shift_table + timestep`` is the gate (the PixArt way). The channels of the gate are those of ``stream``.
    """

    name: str
    module: str | None
    index: int
    stream: str = "image"


@dataclass(frozen=True)
class Stack:
    """A list of equal blocks.

    Attributes:
        attribute: name of the ModuleList on the transformer.
        label: short name of its blocks ("double", "single", ...).
        returns: the streams in the order in which a block returns them; a block may return None for a stream.
        arguments: for each stream that enters the block, its parameter name.
        gates: the AdaLN gates of a block.
    """

    attribute: str
    label: str
    returns: tuple[str, ...]
    arguments: dict[str, str]
    gates: tuple[Gate, ...] = ()


@dataclass(frozen=True)
class Family:
    """One architecture.

    Attributes:
        transformer: class name of the diffusers transformer; the key by which a pipeline finds its row.
        stacks: block stacks in execution order.
        passes: how true classifier-free guidance runs: "sequential" (one call a branch, in the order of ``order``) or
            "batched" (one call, the batch being the concatenation of ``order``).
        order: the branches in that order.
        cfg_argument: the pipeline's argument for the classifier-free scale.
        guidance_argument: the pipeline's argument for the embedded guidance value, if the architecture may have one.
        conditioning: the transformer's arguments that carry the prompt.
        latents: dtype in which the pipeline draws its noise; None for that of the weights.
        sequence_tokenizer: the tokenizer whose ``model_max_length`` is the length of the text stream, if it is variable.
        call: further constant arguments of the pipeline.
    """

    transformer: str
    stacks: tuple[Stack, ...]
    passes: str
    order: tuple[str, ...]
    cfg_argument: str
    guidance_argument: str | None = None
    conditioning: tuple[str, ...] = ("encoder_hidden_states", "pooled_projections")
    latents: str | None = None
    sequence_tokenizer: str | None = None
    call: dict[str, Any] = field(default_factory=dict)


_BOTH = {"image": "hidden_states", "text": "encoder_hidden_states"}
_MM_GATES = (
    Gate("attention", "norm1", 1),
    Gate("mlp", "norm1", 4),
    Gate("attention", "norm1_context", 1, "text"),
    Gate("mlp", "norm1_context", 4, "text"),
)

FAMILIES = {
    family.transformer: family
    for family in (
        Family(
            "FluxTransformer2DModel",
            (
                Stack("transformer_blocks", "double", ("text", "image"), _BOTH, _MM_GATES),
                Stack("single_transformer_blocks", "single", ("text", "image"), _BOTH, (Gate("block", "norm", 1),)),
            ),
            passes="sequential",
            order=("cond", "uncond"),
            cfg_argument="true_cfg_scale",
            guidance_argument="guidance_scale",
            sequence_tokenizer="tokenizer_2",
        ),
        Family(
            "SD3Transformer2DModel",
            (Stack("transformer_blocks", "joint", ("text", "image"), _BOTH, _MM_GATES),),
            passes="batched",
            order=("uncond", "cond"),
            cfg_argument="guidance_scale",
        ),
        Family(
            "SanaTransformer2DModel",
            (
                Stack(
                    "transformer_blocks",
                    "block",
                    ("image",),
                    {"image": "hidden_states"},
                    (Gate("attention", None, 2), Gate("mlp", None, 5)),
                ),
            ),
            passes="batched",
            order=("uncond", "cond"),
            cfg_argument="guidance_scale",
            conditioning=("encoder_hidden_states", "encoder_attention_mask"),
            latents="float32",
            call={"use_resolution_binning": False},
        ),
    )
}


def family_of(transformer: object) -> Family:
    """The row of a transformer.

    Raises:
        ValueError: the architecture has no row yet.
    """
    name = type(transformer).__name__
    if name not in FAMILIES:
        raise ValueError(
            f"{name} is not a known architecture ({', '.join(FAMILIES)}); add a row for it to malib/families.py."
        )
    return FAMILIES[name]
