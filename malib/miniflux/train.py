"""Train mini-flux from a seed: first its autoencoder, then its transformer with both text encoders.

``python -m malib.miniflux.train --preset mini --out runs/mini`` can be stopped at any time and resumes. The result is a
standard ``FluxPipeline`` directory. Rectified flow: ``x = (1 - sigma) * x0 + sigma * noise``, target ``noise - x0``.
"""

from __future__ import annotations

import argparse
import json
import math
import shutil
import time
from dataclasses import asdict, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from . import scenes
from .architecture import PRESETS, Preset, build_pipeline, load_weights, pack, position_ids, trained_weights
from .card import model_card
from .data import draw_batch, held_out_batch, progress_bar, render_batches, scene_latents
from .probe import join_probes, load_probe, probe, probe_steps, save_probe
from .text import encode_text

if TYPE_CHECKING:
    from diffusers import AutoencoderKL, FluxPipeline


CHECKPOINT_EVERY = 250


LOSS_BAND = 0.1
"""One seed with one and with two threads differs by 4.6 %: the order of sums is enough."""


_FREE = ("steps", "shift", "decay_share", "focus")


def train(preset: Preset, seed: int, out: Path, device: str = "cpu", compiled: bool = True) -> Path:
    """Train a preset, or resume its training, and export the pipeline.

    Args:
        preset: one of ``PRESETS``, perhaps with some fields replaced.
        seed: fixes initialisation, scenes, captions and noise.
        out: working folder for latents, checkpoints, snapshots and logs (hundreds of MB: keep it outside of the
            repository).
        device: "cpu" or "cuda"; both compute in bf16 autocast with fp32 weights.
        compiled: use ``torch.compile`` on the transformer.

    Returns:
        ``out / "pipeline"``, the exported ``FluxPipeline`` directory.
    """
    out.mkdir(parents=True, exist_ok=True)
    plans = _plans(preset, seed, out)
    (out / "preset.json").write_text(json.dumps({**asdict(preset), "seed": seed, "plans": plans}, indent=1))
    pipeline = build_pipeline(preset, seed).to(device)
    _train_vae(pipeline.vae, preset, seed, out, device)
    latents = scene_latents(pipeline.vae, preset, seed, out, device)
    _train_flow(pipeline, latents, preset, seed, out, device, compiled)
    pipeline.transformer.to(torch.bfloat16)  # halves the download; the text encoders stay fp32 so that plain loading works
    pipeline.vae.half()
    pipeline.save_pretrained(out / "pipeline")
    (out / "pipeline" / "prompts.txt").write_text("\n".join(scenes.captions(1000)) + "\n")
    pipeline.transformer.float()
    pipeline.vae.float()
    found, earlier = probe(pipeline, out / "snapshots"), out / "earlier.safetensors"
    if earlier.exists():
        found = join_probes(load_probe(earlier), found, preset.steps)
    save_probe(found, out / "probe.safetensors")
    (out / "pipeline" / "README.md").write_text(model_card(pipeline, preset, seed, out))
    return out / "pipeline"


def _plans(preset: Preset, seed: int, out: Path) -> list[dict[str, float]]:
    """Return the plans of a training so far: "from" which step, and the fields of the preset that may change meanwhile.

    Raises:
        ValueError: the folder contains another training, or one with more steps than planned here.
    """
    plan = {"from": 0, **{name: getattr(preset, name) for name in _FREE}}
    if not (out / "preset.json").exists():
        return [plan]
    stored = json.loads((out / "preset.json").read_text())
    wanted = json.loads(json.dumps({**asdict(preset), "seed": seed}))
    plans, log = stored.pop("plans"), out / "log.jsonl"
    done = json.loads(log.read_text().splitlines()[-1])["step"] if log.exists() else 0
    if preset.steps < done or any(wanted[k] != v for k, v in stored.items() if k not in _FREE):
        raise ValueError(
            f"{out} has another training ({done} of {stored['steps']} steps of {stored['name']}, seed {stored['seed']}); "
            "go on with the same settings and at least as many steps, or give another folder with --out."
        )
    same = all(plans[-1].get(k) == plan[k] for k in _FREE)
    return plans if same else [*plans, {**plan, "from": done}]


def revive(data: Path, preset: Preset, seed: int, out: Path) -> None:
    """Rebuild a working folder from an installed training, so that it can resume.

    The weights are the installed ones (the mean, in bf16); the optimizer starts afresh, with a warm-up.

    Args:
        data: a folder that ``install`` has filled.
        preset: the installed training's preset.
        seed: its seed.
        out: the working folder to create; it must not contain a training.

    Raises:
        FileNotFoundError: ``data`` has no such training.
        FileExistsError: ``out`` contains a training already.
    """
    from diffusers import FluxPipeline

    log, model = data / "probes" / f"{preset.name}-{seed}.json", data / f"{preset.name}-flux"
    if not (log.exists() and model.exists()):
        raise FileNotFoundError(f"{data} has no training of {preset.name} with seed {seed}; omit --revive to begin one.")
    if (out / "preset.json").exists():
        raise FileExistsError(f"{out} contains a training already; omit --revive to resume it, or give another --out.")
    out.mkdir(parents=True, exist_ok=True)
    about = json.loads(log.read_text())
    shutil.copytree(model / "vae", out / "vae")
    shutil.copy(log.with_suffix(".safetensors"), out / "earlier.safetensors")
    (out / "vae_log.json").write_text(json.dumps(about.pop("vae")))
    rows = about.pop("flow")
    (out / "log.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    pipeline = FluxPipeline.from_pretrained(model)
    weights = {name: tensor.detach().float() for name, tensor in trained_weights(pipeline).items()}
    state = {"weights": weights, "ema": weights, "optimizer": None, "step": rows[-1]["step"], "seconds": rows[-1]["seconds"]}
    torch.save({**state, "warm_from": rows[-1]["step"]}, out / "checkpoint.pt")
    (out / "preset.json").write_text(json.dumps(about, indent=1))


def install(out: Path, data: Path, model: bool = True) -> None:
    """Copy a finished training into a data folder: ``<name>-flux/``, ``probes/<name>-<seed>.safetensors`` and its log.

    Args:
        out: the training's working folder.
        data: the data folder.
        model: False omits the model and copies probe and log only.

    Raises:
        FileNotFoundError: the training is not finished.
    """
    if not (out / "probe.safetensors").exists():
        raise FileNotFoundError(f"{out} has no finished training; run malib.miniflux.train --out {out} to its end.")
    about = json.loads((out / "preset.json").read_text())
    name = f"{about['name']}-{about['seed']}"
    if model:
        shutil.copytree(out / "pipeline", data / f"{about['name']}-flux", dirs_exist_ok=True)
    (data / "probes").mkdir(parents=True, exist_ok=True)
    shutil.copy(out / "probe.safetensors", data / "probes" / f"{name}.safetensors")
    rows = [json.loads(line) for line in (out / "log.jsonl").read_text().splitlines()]
    log = {**about, "vae": json.loads((out / "vae_log.json").read_text()), "flow": rows}
    (data / "probes" / f"{name}.json").write_text(json.dumps(log, indent=1) + "\n")


def loss_deviation(rows: list[dict[str, float]], stored: list[dict[str, float]]) -> float:
    """Return the largest relative deviation of two trainings' loss curves over the steps that both have logged.

    Args:
        rows: ``step``, ``loss`` (mean since the row before) and ``held_out``, as in ``log.jsonl``.
        stored: the same of another training, as under ``flow`` in ``data/probes/<name>-<seed>.json``.

    Returns:
        Infinity where a loss is not finite.

    Raises:
        ValueError: they have no step in common.
    """
    known = {row["step"]: row for row in stored}
    shared = [(row[kind], known[row["step"]][kind]) for row in rows if row["step"] in known for kind in ("loss", "held_out")]
    if not shared:
        raise ValueError(
            f"The two logs share no step: {[r['step'] for r in rows]} and {list(known)}; compare equal presets."
        )
    gaps = [abs(now - then) / then for now, then in shared]
    return max(gaps) if np.isfinite(gaps).all() else math.inf


def _train_vae(vae: AutoencoderKL, preset: Preset, seed: int, out: Path, device: str) -> None:
    """Train with L1 on pixels and their differences (for sharp edges) and a light KL term; set the latents' scale."""
    path = out / "vae"
    if path.exists():
        fresh = type(vae).from_pretrained(path)
        vae.load_state_dict(fresh.state_dict())
        vae.register_to_config(scaling_factor=fresh.config.scaling_factor, shift_factor=fresh.config.shift_factor)
        return
    generator = torch.Generator(device).manual_seed(seed)
    optimizer = torch.optim.AdamW(vae.parameters(), lr=2e-3, betas=(0.9, 0.99), weight_decay=0.0)
    vae.to(memory_format=torch.channels_last).train()
    count = min(preset.vae_steps * preset.vae_batch, preset.scenes)
    batches = list(render_batches(seed, count, preset.vae_batch))
    log = []
    for step in progress_bar(range(preset.vae_steps), "VAE"):
        share = step / preset.vae_steps
        for group in optimizer.param_groups:
            group["lr"] = 2e-3 * min(1.0, (step + 1) / 50) * 0.5 * (1 + math.cos(math.pi * share))
        images = batches[step % len(batches)].to(device, memory_format=torch.channels_last)
        with torch.autocast(device, torch.bfloat16):
            posterior = vae.encode(images).latent_dist
            restored = vae.decode(posterior.sample(generator)).sample
        error = restored.float() - images
        edges = error.diff(dim=2).abs().mean() + error.diff(dim=3).abs().mean()
        loss = error.abs().mean() + 0.5 * edges + 1e-3 * posterior.kl().mean() / posterior.mean[0].numel()
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        nn.utils.clip_grad_norm_(vae.parameters(), 1.0)
        optimizer.step()
        if step % 50 == 0 or step == preset.vae_steps - 1:
            log.append({"step": step, "loss": loss.item(), "psnr": -10 * math.log10(error.square().mean().item() / 4)})
    vae.eval()
    with torch.no_grad():
        sample = torch.cat([vae.encode(b.to(device)).latent_dist.mean for b in batches[:32]])
    vae.register_to_config(scaling_factor=1 / sample.std().item(), shift_factor=sample.mean().item())
    (out / "vae_log.json").write_text(json.dumps(log))
    vae.save_pretrained(path.with_suffix(".tmp"))
    path.with_suffix(".tmp").rename(path)


class _Ema:
    """Exponential mean of the weights, with a warm-up so that early snapshots follow the training."""

    def __init__(self, weights: dict[str, Tensor], decay: float) -> None:
        self.decay, self.mean = decay, {k: v.detach().clone() for k, v in weights.items()}

    @torch.no_grad()
    def update(self, weights: dict[str, Tensor], step: int) -> None:
        rate = 1 - min(self.decay, (1 + step) / (10 + step))
        torch._foreach_lerp_(list(self.mean.values()), [weights[k] for k in self.mean], rate)


def _train_flow(
    pipeline: FluxPipeline,
    latents: Tensor,
    preset: Preset,
    seed: int,
    out: Path,
    device: str,
    compiled: bool,
) -> None:
    weights = trained_weights(pipeline)
    optimizer = torch.optim.AdamW(weights.values(), lr=preset.learning_rate, betas=(0.9, 0.95), weight_decay=0.0, fused=True)
    ema, start, seconds, warm_from = _Ema(weights, preset.ema), 0, 0.0, 0
    checkpoint, log_path, snapshots = out / "checkpoint.pt", out / "log.jsonl", out / "snapshots"
    snapshots.mkdir(exist_ok=True)
    if checkpoint.exists():
        state = torch.load(checkpoint, map_location=device, weights_only=True)
        load_weights(pipeline, state["weights"])
        if state["optimizer"] is not None:
            optimizer.load_state_dict(state["optimizer"])
        ema.mean, start, seconds, warm_from = state["ema"], state["step"], state["seconds"], state.get("warm_from", 0)
        lines = log_path.read_text().splitlines() if log_path.exists() else []
        log_path.write_text("".join(f"{line}\n" for line in lines if json.loads(line)["step"] <= start))
    forward = torch.compile(pipeline.transformer) if compiled else pipeline.transformer
    held_out = held_out_batch(pipeline.vae, device)
    probes, began, losses = set(probe_steps(preset.steps)), time.monotonic() - seconds, []
    for step in progress_bar(range(start, preset.steps + 1), "flow", initial=start, total=preset.steps):
        if step in probes:
            save_file({k: v.to(torch.bfloat16) for k, v in ema.mean.items()}, snapshots / f"{step:06d}.safetensors")
        last = step == preset.steps
        if step > start and (step % CHECKPOINT_EVERY == 0 or last):
            state = {"weights": weights, "optimizer": optimizer.state_dict(), "ema": ema.mean, "step": step}
            state |= {"seconds": time.monotonic() - began, "warm_from": warm_from}
            torch.save(state, checkpoint.with_suffix(".tmp"))
            checkpoint.with_suffix(".tmp").replace(checkpoint)
            row = {
                "step": step,
                "loss": float(torch.stack(losses).mean()),
                "held_out": _held_out_loss(pipeline, held_out),
                "seconds": round(time.monotonic() - began, 1),
            }
            with log_path.open("a") as log:
                log.write(json.dumps(row) + "\n")
            losses = []
        if last:
            break
        for group in optimizer.param_groups:
            group["lr"] = preset.learning_rate * _schedule(step, preset, warm_from)
        loss = _flow_loss(pipeline, forward, *draw_batch(latents, preset, seed, step, device))
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        nn.utils.clip_grad_norm_(weights.values(), 1.0)
        optimizer.step()
        ema.update(weights, step)
        losses.append(loss.detach())
    load_weights(pipeline, ema.mean)


def _schedule(step: int, preset: Preset, warm_from: int = 0) -> float:
    """Return the learning rate's factor: linear warm-up, constant, linear decay to zero over the last ``decay_share``."""
    return min(1.0, (step - warm_from + 1) / preset.warmup, (preset.steps - step) / (preset.decay_share * preset.steps))


def _flow_loss(
    pipeline: FluxPipeline, forward: Any, clean: Tensor, captions: list[str], sigma: Tensor, noise: Tensor
) -> Tensor:
    mixed = torch.lerp(clean, noise, sigma.view(-1, 1, 1, 1))
    text_ids, image_ids = position_ids(clean.device)
    with torch.autocast(clean.device.type, torch.bfloat16):
        states, pooled = encode_text(pipeline, captions)
        velocity = forward(
            hidden_states=pack(mixed),
            encoder_hidden_states=states,
            pooled_projections=pooled,
            timestep=sigma,
            img_ids=image_ids,
            txt_ids=text_ids,
            return_dict=False,
        )[0]
    return nn.functional.mse_loss(velocity.float(), pack(noise - clean))


@torch.no_grad()
def _held_out_loss(pipeline: FluxPipeline, batch: tuple[Tensor, list[str], Tensor, Tensor]) -> float:
    return _flow_loss(pipeline, pipeline.transformer, *batch).item()


def main(argv: list[str] | None = None) -> None:
    """Run the command line: ``python -m malib.miniflux.train --preset mini``."""
    parser = argparse.ArgumentParser(prog="python -m malib.miniflux.train", description=__doc__)
    parser.add_argument("--preset", choices=PRESETS, default="mini")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path, help="working folder (default: ~/.cache/malib/train/PRESET-SEED)")
    parser.add_argument("--steps", type=int, help="replace the preset's number of steps")
    parser.add_argument("--batch", type=int, help="replace the preset's batch size")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--revive", type=Path, metavar="DATA", help="go on with what is installed in this folder")
    parser.add_argument("--install", type=Path, metavar="DATA", help="when done, copy model, probe and log into this folder")
    parser.add_argument("--install-probe", type=Path, metavar="DATA", help="when done, copy probe and log alone")
    parser.add_argument(
        "--compare",
        type=Path,
        metavar="DATA",
        help=f"when done, hold the loss curve to the one in this folder, +-{100 * LOSS_BAND:g} %%",
    )
    parser.add_argument("--evaluator", action="store_true", help="train the evaluator, into --out (default: data/evaluator)")
    parser.add_argument("--eager", action="store_true", help="do without torch.compile")
    args = parser.parse_args(argv)
    if args.evaluator:
        from .evaluator import train_evaluator

        given = {"steps": args.steps} if args.steps else {}
        print(train_evaluator(args.out or Path("data/evaluator"), args.seed, **given))
        return
    changes = {k: v for k in ("steps", "batch") if (v := getattr(args, k)) is not None}
    preset = replace(PRESETS[args.preset], **changes)
    out = args.out or Path.home() / ".cache" / "malib" / "train" / f"{preset.name}-{args.seed}"
    stored = args.compare and args.compare / "probes" / f"{preset.name}-{args.seed}.json"
    if stored and not stored.exists():
        parser.error(f"There is no loss curve {stored}; omit --compare, or give a folder that --install has filled.")
    try:
        if args.revive:
            revive(args.revive, preset, args.seed, out)
        print(train(preset, args.seed, out, args.device, not args.eager))
    except (ValueError, FileNotFoundError, FileExistsError) as error:
        parser.error(str(error))
    if stored:
        _compare(out, stored, parser)
    if args.install_probe:
        install(out, args.install_probe, model=False)
    if args.install:
        install(out, args.install)


def _compare(out: Path, stored: Path, parser: argparse.ArgumentParser) -> None:
    """Print the deviation of ``out``'s loss curve from a stored one; exit with an error beyond ``LOSS_BAND``."""
    rows = [json.loads(line) for line in (out / "log.jsonl").read_text().splitlines()]
    deviation = loss_deviation(rows, json.loads(stored.read_text())["flow"])
    print(f"largest deviation of the loss from {stored}: {deviation:.2%} (at most {LOSS_BAND:.0%})")
    if deviation > LOSS_BAND:
        parser.error("The loss curve has left its band; another version of torch, or a changed training, explains it.")


if __name__ == "__main__":
    main()
