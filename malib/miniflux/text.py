"""Tokenizer and text encodings of the scenes' captions."""

from __future__ import annotations

from typing import TYPE_CHECKING

from torch import Tensor

from . import scenes

if TYPE_CHECKING:
    from diffusers import FluxPipeline
    from transformers import PreTrainedTokenizerFast


TEXT_LENGTH = 32


def encode_text(pipeline: FluxPipeline, captions: list[str]) -> tuple[Tensor, Tensor]:
    """Encode captions exactly as ``FluxPipeline`` does for its transformer.

    Args:
        pipeline: with both text encoders.
        captions: B captions.

    Returns:
        T5 states (B, 32, 128) and CLIP pooled vectors (B, 64).
    """
    states = []
    for tokenizer in (pipeline.tokenizer, pipeline.tokenizer_2):
        ids = tokenizer(captions, padding="max_length", max_length=TEXT_LENGTH, truncation=True, return_tensors="pt")
        states.append(ids.input_ids.to(pipeline.transformer.device))
    pooled = pipeline.text_encoder(states[0]).pooler_output
    return pipeline.text_encoder_2(states[1])[0], pooled


def word_tokenizer(bos: bool, textured: bool = False) -> PreTrainedTokenizerFast:
    """Return a tokenizer with one token per word of the scenes' captions.

    ``bos`` puts <s> in front, as CLIP's does; ``textured`` adds the words of the textures.
    """
    from tokenizers import Tokenizer, models, normalizers, pre_tokenizers, processors
    from transformers import PreTrainedTokenizerFast

    vocabulary = scenes.TEXTURED_VOCABULARY if textured else scenes.VOCABULARY
    words = ("<pad>", "<unk>", "<s>", "</s>", *vocabulary)
    tokenizer = Tokenizer(models.WordLevel({w: i for i, w in enumerate(words)}, unk_token="<unk>"))
    tokenizer.normalizer = normalizers.Lowercase()
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer.post_processor = processors.TemplateProcessing(
        single="<s> $A </s>" if bos else "$A </s>", special_tokens=[("<s>", 2), ("</s>", 3)]
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        model_max_length=TEXT_LENGTH,
        pad_token="<pad>",
        unk_token="<unk>",
        bos_token="<s>",
        eos_token="</s>",
    )
