"""Text encoders that are trained before the flow model and then frozen, as the encoders of large models are.

CLIP's text encoder is trained by contrast with an image encoder on renderings (Radford et al., arXiv 2103.00020); both also
give a CLIP score. T5's encoder is trained on captions alone, so that the token of a noun carries the attributes of its
phrase. ``python -m malib.miniflux.encoders --out runs/encoders`` trains both in minutes on a CPU.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Sequence
from itertools import pairwise
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import torch
from safetensors.torch import save_file
from torch import Tensor, nn
from torch.nn import functional

from . import scenes
from .data import progress_bar, render_batches
from .rendering import render
from .text import TEXT_LENGTH, word_tokenizer
from .textures import TEXTURES

if TYPE_CHECKING:
    from transformers import CLIPTextModel, T5EncoderModel

WIDTH = 128
HEADS = {
    "shape": scenes.SHAPES,
    "colour": tuple(scenes.COLOURS),
    "size": scenes.SIZES,
    "position": scenes.POSITIONS,
    "texture": ("plain", *TEXTURES),
    "background": tuple(scenes.COLOURS),
    "pattern": (*scenes.PATTERNS, *TEXTURES),
}
"""The words of each attribute; those of a subject first, background and pattern last."""
OF_SUBJECT = ("shape", "colour", "size", "position", "texture")
_SPECIAL = {"pad_token_id": 0, "bos_token_id": 2, "eos_token_id": 3}
_HELD_OUT = 2_000_000_000


def build_clip() -> CLIPTextModel:
    """Return CLIP's text encoder with fresh weights: two layers of 128, for captions with textures."""
    from transformers import CLIPTextConfig, CLIPTextModel

    config = CLIPTextConfig(
        vocab_size=len(word_tokenizer(bos=True, textured=True)),
        hidden_size=WIDTH,
        intermediate_size=4 * WIDTH,
        projection_dim=WIDTH,
        num_hidden_layers=2,
        num_attention_heads=4,
        max_position_embeddings=TEXT_LENGTH,
        **_SPECIAL,
    )
    return CLIPTextModel(config)


def build_t5() -> T5EncoderModel:
    """Return T5's encoder with fresh weights: three layers of 128, for captions with textures."""
    from transformers import T5Config, T5EncoderModel

    config = T5Config(
        vocab_size=len(word_tokenizer(bos=False, textured=True)),
        d_model=WIDTH,
        d_kv=32,
        d_ff=2 * WIDTH,
        num_layers=3,
        num_heads=4,
        dropout_rate=0.0,
        feed_forward_proj="gated-gelu",
        decoder_start_token_id=0,
        **_SPECIAL,
    )
    return T5EncoderModel(config)


class ImageEncoder(nn.Module):
    """A small convolutional network: images, float (B, 3, 64, 64) in [-1, 1], to vectors (B, 128)."""

    def __init__(self, width: int = 32) -> None:
        super().__init__()
        sizes = (3, width, 2 * width, 4 * width, 4 * width)
        self.layers = nn.Sequential(
            *(
                nn.Sequential(nn.Conv2d(a, b, 3, 2 if i else 1, 1), nn.GroupNorm(8, b), nn.SiLU())
                for i, (a, b) in enumerate(pairwise(sizes))
            ),
            nn.AdaptiveAvgPool2d(4),
            nn.Flatten(),
            nn.Linear(4 * width * 16, WIDTH),
        )

    def forward(self, images: Tensor) -> Tensor:  # noqa: D102
        return self.layers(images)


def tokens(captions: Sequence[str], bos: bool) -> Tensor:
    """Return token ids (B, 32) of ``captions``, padded as in the pipeline; ``bos`` selects CLIP's tokenizer."""
    tokenizer = word_tokenizer(bos=bos, textured=True)
    padded = tokenizer(list(captions), padding="max_length", max_length=TEXT_LENGTH, truncation=True, return_tensors="pt")
    return padded.input_ids


def contrastive_loss(texts: Tensor, images: Tensor, scale: Tensor) -> Tensor:
    """Return the symmetric cross entropy of matching captions and images (arXiv 2103.00020, figure 3).

    Args:
        texts: (B, d).
        images: (B, d), in the same order.
        scale: logarithm of the inverse temperature.
    """
    logits = scale.exp() * functional.normalize(texts, dim=1) @ functional.normalize(images, dim=1).T
    target = torch.arange(len(logits), device=logits.device)
    return (functional.cross_entropy(logits, target) + functional.cross_entropy(logits.T, target)) / 2


def train_clip(
    seed: int = 0, steps: int = 900, batch: int = 192, pool: int = 24_000, device: str = "cpu"
) -> tuple[CLIPTextModel, ImageEncoder, Tensor]:
    """Train CLIP's text encoder and the image encoder on renderings of textured scenes and paraphrased captions.

    Args:
        seed: of initialisation, scenes and captions.
        steps: training steps.
        batch: pairs of caption and image per step.
        pool: number of renderings, which the steps draw from.
        device: where to compute.

    Returns:
        Both encoders, and the logarithm of the inverse temperature.
    """
    torch.manual_seed(seed)
    text, image = build_clip().to(device).train(), ImageEncoder().to(device).train()
    scale = nn.Parameter(torch.tensor(np.log(1 / 0.07), dtype=torch.float32, device=device))
    images = torch.cat(list(render_batches(seed, pool, 256, textured=True))).mul(127).round().to(torch.int8)
    parameters = [*text.parameters(), *image.parameters(), scale]
    optimizer = torch.optim.AdamW(parameters, lr=1e-3, weight_decay=0.01)
    for step in progress_bar(range(steps), "CLIP"):
        rng = np.random.default_rng([seed, step, 2])
        rows = rng.integers(pool, size=batch)
        captions = [scenes.paraphrase(scenes.sample_scene(seed * 10_000_000 + int(i), textured=True), rng) for i in rows]
        for group in optimizer.param_groups:
            group["lr"] = 1e-3 * min(1.0, (step + 1) / 50) * 0.5 * (1 + np.cos(np.pi * step / steps))
        pooled = text(tokens(captions, bos=True).to(device)).pooler_output
        loss = contrastive_loss(pooled, image(images[rows].to(device).float() / 127), scale)
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        nn.utils.clip_grad_norm_(parameters, 1.0)
        optimizer.step()
    return text.eval().requires_grad_(False), image.eval().requires_grad_(False), scale.detach()


def noun_positions(ids: Tensor) -> tuple[Tensor, Tensor]:
    """Return where the nouns of captions are.

    Args:
        ids: token ids (B, 32) of T5's tokenizer.

    Returns:
        (B, 2) positions of the first and second subject's shape, and (B,) of the word "background"; -1 where there is none.
    """
    tokenizer = word_tokenizer(bos=False, textured=True)
    shapes = torch.tensor(tokenizer.convert_tokens_to_ids([w for s in scenes.SHAPES for w in scenes.names_of(s)]))
    subjects = torch.full((len(ids), 2), -1)
    for row, places in enumerate(torch.isin(ids, shapes)):
        found = places.nonzero()[:2, 0]
        subjects[row, : len(found)] = found
    ground = ids == tokenizer.convert_tokens_to_ids("background")
    return subjects, torch.where(ground.any(1), ground.int().argmax(1), -1)


def labels(chosen: Sequence[scenes.Scene], named: Sequence[set[str]]) -> dict[str, Tensor]:
    """Return the word of each attribute as an index, -100 where the caption does not name it.

    Args:
        chosen: B scenes.
        named: the attributes that each caption names.

    Returns:
        (B, 2) for the attributes of a subject, (B,) for background and pattern.
    """
    table = {name: torch.full((len(chosen), 2) if name in OF_SUBJECT else (len(chosen),), -100) for name in HEADS}
    for i, (scene, words) in enumerate(zip(chosen, named, strict=True)):
        for name in words & {"background", "pattern"}:
            table[name][i] = HEADS[name].index(getattr(scene, name))
        for j, subject in enumerate(scene.subjects):
            for name in words & set(OF_SUBJECT):
                table[name][i, j] = HEADS[name].index(getattr(subject, name))
    return table


def train_t5(seed: int = 0, steps: int = 1200, batch: int = 192, device: str = "cpu") -> T5EncoderModel:
    """Train T5's encoder on captions alone: a linear head on each noun's token predicts the attributes of its phrase.

    Args:
        seed: of initialisation, scenes and captions.
        steps: training steps.
        batch: captions per step.
        device: where to compute.
    """
    torch.manual_seed(seed)
    encoder = build_t5().to(device).train()
    heads = nn.ModuleDict({name: nn.Linear(WIDTH, len(words)) for name, words in HEADS.items()}).to(device)
    parameters = [*encoder.parameters(), *heads.parameters()]
    optimizer = torch.optim.AdamW(parameters, lr=1e-3, weight_decay=0.01)
    for step in progress_bar(range(steps), "T5"):
        rng = np.random.default_rng([seed, step, 3])
        chosen = [scenes.sample_scene(seed * 10_000_000 + int(i), textured=True) for i in rng.integers(10**6, size=batch)]
        captions, named = zip(*(scenes.paraphrase_and_names(scene, rng) for scene in chosen), strict=True)
        for group in optimizer.param_groups:
            group["lr"] = 1e-3 * min(1.0, (step + 1) / 50) * 0.5 * (1 + np.cos(np.pi * step / steps))
        ids = tokens(captions, bos=False)
        states = encoder(ids.to(device))[0]
        loss = torch.zeros((), device=device)
        for name, (rows, target) in _targets(ids, labels(chosen, named)).items():
            loss = loss + functional.cross_entropy(heads[name](states[rows]), target.to(device))
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        nn.utils.clip_grad_norm_(parameters, 1.0)
        optimizer.step()
    return encoder.eval().requires_grad_(False)


def _targets(ids: Tensor, table: dict[str, Tensor]) -> dict[str, tuple[tuple[Tensor, Tensor], Tensor]]:
    """Return for each attribute the (row, position) of the nouns that carry it, and the index of its word."""
    subjects, background = noun_positions(ids)
    targets = {}
    for name, index in table.items():
        places = subjects if name in OF_SUBJECT else background
        known = (index >= 0) & (places >= 0)
        rows = known.nonzero()[:, 0]
        targets[name] = (rows, places[known]), index[known]
    return targets


@torch.no_grad()
def read_out(clip: CLIPTextModel, t5: T5EncoderModel, count: int = 3000) -> dict[str, dict[str, float]]:
    """Measure how well a linear read-out predicts each attribute from frozen encoders, on held-out one-subject captions.

    Args:
        clip: whose pooled vector is read.
        t5: whose noun tokens are read.
        count: captions; the first two thirds fit the read-out, the others, of unseen combinations, measure it.

    Returns:
        Accuracy by attribute for "pooled" and "noun".
    """
    from sklearn.linear_model import LogisticRegression

    fit = 2 * count // 3
    chosen = [scenes.sample_scene(_HELD_OUT + 700_000 + i, 1, unseen=i >= fit, textured=True) for i in range(count)]
    captions = [scene.caption for scene in chosen]
    pooled = clip(tokens(captions, bos=True)).pooler_output
    ids = tokens(captions, bos=False)
    states, table = t5(ids)[0], labels(chosen, [set(HEADS)] * count)
    targets = _targets(ids, table)
    result: dict[str, dict[str, float]] = {"pooled": {}, "noun": {}}
    for name in HEADS:
        (rows, places), index = targets[name]
        for kind, x in (("pooled", pooled[rows]), ("noun", states[rows, places])):
            model = LogisticRegression(max_iter=300).fit(x[:fit].numpy(), index[:fit].numpy())
            result[kind][name] = float(model.score(x[fit:].numpy(), index[fit:].numpy()))
    return result


@torch.no_grad()
def match_accuracy(clip: CLIPTextModel, image: ImageEncoder, count: int = 192) -> float:
    """Return the share of unseen renderings whose own caption is the nearest of ``count``.

    Args:
        clip: text encoder.
        image: image encoder.
        count: number of scenes with different captions.
    """
    chosen = scenes.gallery(count, 77, subjects=None, unseen=True, textured=True)
    images = torch.from_numpy(np.stack([render(s).image for s in chosen])).permute(0, 3, 1, 2) * 2 - 1
    texts = functional.normalize(clip(tokens([s.caption for s in chosen], bos=True)).pooler_output, dim=1)
    nearest = (functional.normalize(image(images), dim=1) @ texts.T).argmax(1)
    return float((nearest == torch.arange(count)).float().mean())


def main(argv: list[str] | None = None) -> None:
    """Run the command line: ``python -m malib.miniflux.encoders --out runs/encoders``."""
    parser = argparse.ArgumentParser(prog="python -m malib.miniflux.encoders", description=__doc__.splitlines()[0])
    parser.add_argument(
        "--out", type=Path, required=True, help="folder for both encoders, the image encoder and their report"
    )
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--device", default="cpu")
    args = parser.parse_args(argv)
    clip, image, scale = train_clip(args.seed, device=args.device)
    t5 = train_t5(args.seed, device=args.device)
    for module in (clip, image, t5):
        module.cpu()
    clip.save_pretrained(args.out / "text_encoder")
    t5.save_pretrained(args.out / "text_encoder_2")
    weights = {name: tensor.contiguous() for name, tensor in image.state_dict().items()}
    save_file(weights | {"logit_scale": scale.cpu()}, args.out / "image_encoder.safetensors")
    report = {"seed": args.seed, "match": match_accuracy(clip, image), "read_out": read_out(clip, t5)}
    (args.out / "report.json").write_text(json.dumps(report, indent=1) + "\n")
    print(json.dumps(report, indent=1))


if __name__ == "__main__":
    main()
