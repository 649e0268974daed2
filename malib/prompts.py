"""Prompts of a model: those that suit it, words that its tokenizers lack, and class names."""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from .families import Family
from .presets import data_folder


def suitable(pipeline: Any, family: Family, name: str, count: int) -> list[str]:
    """Return prompts that suit a model.

    They are the first lines of ``prompts.txt`` in the model's folder; class names for a class-conditional model; the
    everyday prompts of data/prompts for every other model.

    Args:
        pipeline: the diffusers pipeline.
        family: its architecture.
        name: the model's name, for the error.
        count: number of prompts.

    Raises:
        ValueError: ``count`` exceeds the number of prompts.
    """
    own = Path(str(pipeline.config.get("_name_or_path") or "")) / "prompts.txt"
    if own.is_file():
        prompts = own.read_text().splitlines()
    elif family.classes:
        prompts = list(pipeline.labels) or [str(i) for i in range(1000)]
    else:
        prompts = (data_folder() / "prompts" / "everyday.txt").read_text().splitlines()
    if count > len(prompts):
        raise ValueError(f"{count} prompts exceed the {len(prompts)} that exist for {name}; ask for at most as many.")
    return prompts[:count]


def check(prompts: Sequence[str]) -> None:
    """Raise ValueError where there is no prompt, or one that is not text or is blank."""
    if not prompts:
        raise ValueError("The list of prompts is empty; give at least one prompt.")
    for i, prompt in enumerate(prompts):
        if not isinstance(prompt, str) or not prompt.strip():
            raise ValueError(f"Prompt {i} is {prompt!r}; every prompt must be non-empty text.")


def warn_unknown_words(pipeline: Any, name: str, prompts: Sequence[str]) -> None:
    """Warn about words of ``prompts`` for which a tokenizer of ``pipeline`` (named ``name``) has only its unknown token."""
    unknown: set[str] = set()
    for attribute in ("tokenizer", "tokenizer_2", "tokenizer_3"):
        tokenizer = getattr(pipeline, attribute, None)
        unk = getattr(tokenizer, "unk_token_id", None)
        if unk is None or unk in (tokenizer.eos_token_id, tokenizer.pad_token_id) or not tokenizer.is_fast:
            continue
        for prompt in set(prompts):
            encoded = tokenizer(prompt, return_offsets_mapping=True)
            for token, (start, end) in zip(encoded.input_ids, encoded.offset_mapping, strict=True):
                if token == unk and end > start:
                    unknown.add(prompt[start:end])
    if unknown:
        words = ", ".join(f"'{w}'" for w in sorted(unknown))
        warnings.warn(f"{name} was not trained on {words}; its tokenizer has no token for them.", stacklevel=3)


def class_ids(pipeline: Any, name: str, prompts: Sequence[str]) -> list[int]:
    """Return the ImageNet class ids of prompts.

    Args:
        pipeline: of a class-conditional model.
        name: the model's name, for the error.
        prompts: class numbers, or one of the names of a class.

    Raises:
        ValueError: a prompt is neither.
    """
    known = getattr(pipeline, "labels", {})
    ids = [int(p) if p.isdigit() else known.get(p) for p in prompts]
    for prompt, number in zip(prompts, ids, strict=True):
        if number is None or number >= pipeline.transformer.config.num_embeds_ada_norm:
            raise ValueError(
                f"'{prompt}' is no class of {name}; give a class number or one of the {len(known)} names in pipeline.labels."
            )
    return ids
