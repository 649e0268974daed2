"""``make scale``: what reading costs at the true size of FLUX.1-dev, with random weights.

On a GPU all of its 57 blocks; on the CPU three of them, one double and two single, which is the proportion of all (19 and
38): every block adds the same kind of work to both sides of the ratio, so that it carries over.
"""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from malib.dit import DiT
from malib.fingerprint import versions
from malib.miniflux.text import word_tokenizer
from malib.records import ChannelStats

from .bench import METHODS, benchmark, publish

if TYPE_CHECKING:
    from diffusers import FluxPipeline

MARKS = "<!-- scale -->", "<!-- /scale -->"
ALL_BLOCKS = 19, 38
"""Double and single blocks of FLUX.1-dev."""
SHARE = 1, 2
"""The blocks of a benchmark on the CPU."""
SIDE, TEXT = 1024, 512
STEPS = 28
"""Of a picture, for the memory; the benchmark takes fewer."""
_METHODS = tuple(METHODS)[:3]


def build(blocks: tuple[int, int], device: str) -> FluxPipeline:
    """A ``FluxPipeline`` of double and single blocks of FLUX.1-dev's width (3072) with random weights, in bf16.

    Text encoders and autoencoder have FLUX.1-dev's interfaces (4096 and 768 channels, 16 latent channels) and next to no
    inside: they cost the same with and without malib.
    """
    from diffusers import AutoencoderKL, FlowMatchEulerDiscreteScheduler, FluxPipeline, FluxTransformer2DModel
    from transformers import CLIPTextConfig, CLIPTextModel, T5Config, T5EncoderModel

    tokenizers = [word_tokenizer(bos) for bos in (True, False)]
    for tokenizer in tokenizers:
        tokenizer.model_max_length = TEXT
    known = {"vocab_size": len(tokenizers[0]), "pad_token_id": 0, "bos_token_id": 2, "eos_token_id": 3}
    clip = {"hidden_size": 768, "intermediate_size": 64, "num_hidden_layers": 1, "max_position_embeddings": TEXT}
    before = torch.get_default_dtype()
    torch.set_default_dtype(torch.bfloat16)
    try:
        with torch.device(device):
            transformer = FluxTransformer2DModel(num_layers=blocks[0], num_single_layers=blocks[1], guidance_embeds=True)
            text_encoder = CLIPTextModel(CLIPTextConfig(**clip, **known))
            text_encoder_2 = T5EncoderModel(T5Config(d_model=4096, d_kv=8, d_ff=64, num_layers=1, num_heads=2, **known))
            vae = AutoencoderKL(
                down_block_types=("DownEncoderBlock2D",) * 4,
                up_block_types=("UpDecoderBlock2D",) * 4,
                block_out_channels=(8,) * 4,
                layers_per_block=1,
                latent_channels=16,
                norm_num_groups=4,
                mid_block_add_attention=False,
                sample_size=SIDE,
                scaling_factor=1.0,
                shift_factor=0.0,
            )
    finally:
        torch.set_default_dtype(before)
    scheduler = FlowMatchEulerDiscreteScheduler(shift=3.0)
    return FluxPipeline(scheduler, vae, text_encoder, tokenizers[0], text_encoder_2, tokenizers[1], transformer)


def measure(device: str, rounds: int, steps: int) -> dict[str, Any]:
    """The benchmark at true size, and what the record of a whole picture holds.

    Args:
        device: "cpu" or "cuda".
        rounds: after one that warms up.
        steps: denoising steps of the images in the benchmark.

    Returns:
        ``rows`` as of ``benchmark``, on a GPU with the ``peak`` memory in MiB; ``record``, MiB of the statistics of one
        picture of 28 steps at all 57 blocks.
    """
    gpu = device.startswith("cuda")
    blocks = ALL_BLOCKS if gpu else SHARE
    dit = DiT(build(blocks, device), name="FLUX.1-dev's width", batch_size=1)
    prompts = ["a large red star on the left"]
    found = {"model": repr(dit), "blocks": blocks, "side": SIDE, "text": TEXT, "steps": steps, "rounds": rounds}
    found["rows"] = benchmark(dit, prompts, steps, rounds, _METHODS)
    if gpu:
        for name in _METHODS:
            torch.cuda.reset_peak_memory_stats()
            METHODS[name](dit, prompts, steps)
            found["rows"][name]["peak"] = torch.cuda.max_memory_allocated() / 2**20
    size = ChannelStats().size(samples=1, steps=STEPS, layers=sum(ALL_BLOCKS), channels=dit.width, tokens=4096, branches=1)
    return {**found, "record": size / 2**20, "versions": versions()}


def table(document: dict[str, Any]) -> str:
    """The results as Markdown."""
    double, single = document["blocks"]
    lines = [
        f"{document['side']} x {document['side']} pixels, {document['text']} text tokens, {double} double and {single} "
        f"single blocks, random weights, {document['steps']} steps, {document['rounds']} rounds, {document['model']}, "
        f"torch {document['versions']['torch']}.",
        "",
        "| | seconds | time, relative to plain generation |",
        "|---|---|---|",
    ]
    for name, row in document["rows"].items():
        mean, low, high = row["ratio"]
        peak = f", peak {row['peak']:,.0f} MiB" if "peak" in row else ""
        lines.append(f"| {name} | {row['seconds']:.2f}{peak} | {mean:.3f} [{low:.3f}, {high:.3f}] |")
    return "\n".join(
        [*lines, "", f"The statistics of one picture of {STEPS} steps at all 57 blocks take {document['record']:.1f} MiB."]
    )


def main(argv: list[str] | None = None) -> None:
    """Command line: ``python -m tests.benchmarks.scale``."""
    parser = argparse.ArgumentParser(prog="python -m tests.benchmarks.scale", description=__doc__.splitlines()[0])
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--steps", type=int, default=2)
    parser.add_argument("--out", type=Path, default=Path("figures/scale.json"))
    parser.add_argument("--readme", type=Path, help="put the table between the marks of this file")
    args = parser.parse_args(argv)
    document = measure(args.device, args.rounds, args.steps)
    publish(document, table(document), args.out, args.readme, MARKS)


if __name__ == "__main__":
    main()
