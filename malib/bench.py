"""``make bench``: what reading costs, as ratios to plain generation, alternating the contestants in one run."""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from . import scenes
from .dit import load, versions
from .metrics import bootstrap
from .records import ChannelStats

if TYPE_CHECKING:
    from .dit import DiT


def keep_everything(dit: DiT, prompts: list[str], steps: int) -> None:
    """The obvious alternative: a hook on every block that keeps every output on the host."""
    kept, handles = [], []
    for block in dit.blocks:
        handles.append(block.module.register_forward_hook(lambda m, a, out: kept.append(out[-1].cpu().clone())))
    try:
        dit.generate(prompts, steps=steps)
    finally:
        for handle in handles:
            handle.remove()


def contestants(dit: DiT, prompts: list[str], steps: int) -> dict[str, Callable[[], object]]:
    """What is timed, by name; "plain" is what the others are held against."""
    means = ChannelStats(keep=("step", "branch", "layer"), top=0)
    return {
        "plain": lambda: dit.generate(prompts, steps=steps),
        "channel statistics, means": lambda: dit.generate(prompts, steps=steps, record=[means]),
        "channel statistics, every sample": lambda: dit.generate(prompts, steps=steps, record=[ChannelStats()]),
        "hooks that keep everything": lambda: keep_everything(dit, prompts, steps),
    }


def main(argv: list[str] | None = None) -> None:
    """Command line: ``python -m malib.bench``."""
    parser = argparse.ArgumentParser(prog="python -m malib.bench", description=__doc__)
    parser.add_argument("--model", default="mini-flux")
    parser.add_argument("--device")
    parser.add_argument("--samples", type=int, default=8)
    parser.add_argument("--steps", type=int, default=10)
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--out", type=Path, default=Path("figures/benchmark.json"))
    args = parser.parse_args(argv)
    dit = load(args.model, device=args.device, cache=False, batch_size=args.samples)
    prompts = scenes.captions(args.samples) if args.model == "mini-flux" else dit.prompts(args.samples)
    runs = contestants(dit, prompts, args.steps)
    seconds: dict[str, list[float]] = {name: [] for name in runs}
    for number in range(args.rounds + 1):
        for name, run in runs.items():
            began = time.perf_counter()
            run()
            if number:  # the first round warms up
                seconds[name].append(time.perf_counter() - began)
    rows = {}
    print(f"{dit}\n{args.samples} samples of {args.steps} steps, {args.rounds} rounds\n")
    for name, times in seconds.items():
        ratio = bootstrap(np.array(times) / np.array(seconds["plain"]))
        rows[name] = {"seconds": float(np.median(times)), "ratio": [ratio.mean, ratio.low, ratio.high]}
        print(f"{name:<34} {rows[name]['seconds']:7.2f} s   x {ratio.mean:.3f} [{ratio.low:.3f}, {ratio.high:.3f}]")
    args.out.parent.mkdir(parents=True, exist_ok=True)
    document = {"model": repr(dit), "samples": args.samples, "steps": args.steps, "rounds": args.rounds, "rows": rows}
    args.out.write_text(json.dumps(document | {"versions": versions()}, indent=1) + "\n")


if __name__ == "__main__":
    main()
