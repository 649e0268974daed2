"""``make bench``: what reading costs. Ratios to plain generation, the methods alternating in one run; memory; the cache.

Timings are ratios within one round, so that a noisy machine slows all methods alike. Peak memory is that of a process of
its own for each method.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from malib.analysis.statistics import bootstrap
from malib.cache import Store
from malib.edits import Transport
from malib.fingerprint import versions
from malib.loading import load
from malib.presets import BUNDLED, data_folder
from malib.records import ChannelStats, HiddenStates
from malib.rules import TopK
from malib.spatial import kmeans, min_max

if TYPE_CHECKING:
    from malib.dit import DiT
    from malib.generation import Generation

MARKS = "<!-- bench -->", "<!-- /bench -->"
_MEMORY_STEPS = 4


def plain(dit: DiT, prompts: list[str], steps: int) -> None:
    """Generation alone."""
    dit.generate(prompts, steps=steps)


def running_means(dit: DiT, prompts: list[str], steps: int) -> None:
    """malib: statistics of every channel at every block, step and branch, averaged over the samples while running."""
    dit.generate(prompts, steps=steps, record=[ChannelStats(keep=("step", "branch", "layer"), top=0)])


def every_sample(dit: DiT, prompts: list[str], steps: int) -> None:
    """malib: the same statistics of every sample."""
    dit.generate(prompts, steps=steps, record=[ChannelStats()])


def kept_outputs(dit: DiT, prompts: list[str], steps: int) -> None:
    """Hooks as baukit's ``TraceDict`` sets them, that keep every output of every call; statistics at the end."""
    kept, handles = [], []
    for block in dit.blocks:
        index = block.stack.returns.index("image")
        handles.append(
            block.module.register_forward_hook(
                lambda m, a, out, i=index: kept.append((out[i] if isinstance(out, tuple) else out).detach().clone())
            )
        )
    try:
        dit.generate(prompts, steps=steps)
    finally:
        for handle in handles:
            handle.remove()
    for x in kept:
        _statistics(x)


def nnsight_statistics(dit: DiT, prompts: list[str], steps: int) -> None:
    """nnsight: the same statistics of every sample, saved from inside one trace over the whole pipeline."""
    model = _nnsight_model(dit.name)
    sites = [
        (getattr(model.transformer, b.stack.attribute)[int(b.name.split()[-1])], b.stack.returns.index("image"))
        for b in dit.blocks
    ]
    branches = len(dit.family.order) if dit.family.passes == "sequential" and dit.default_cfg > 1 else 1
    size = min(dit.batch_size, len(prompts))
    for start in range(0, len(prompts), size):
        call = dit.arguments(prompts[start : start + size], list(range(size)), steps)
        asked = call.pop("prompt")
        with model.generate(asked, **call) as tracer:
            kept = list().save()  # noqa: C408
            for _ in tracer.iter[: steps * branches]:
                for block, index in sites:
                    kept.append(_statistics(block.output[index]))


def transport_paired(dit: DiT, prompts: list[str], steps: int) -> None:
    """malib: a transport of 8 channels everywhere, source and target in one batch: twice the pictures."""
    dit.generate(prompts, steps=steps, edits=[Transport(TopK(8), prompts[::-1])])


def transport_replayed(dit: DiT, prompts: list[str], steps: int) -> None:
    """malib: the same from a source that was recorded before."""
    dit.generate(prompts, steps=steps, edits=[Transport(TopK(8), _source(dit, tuple(prompts), steps))])


METHODS: dict[str, Callable[[DiT, list[str], int], None]] = {
    "plain generation": plain,
    "malib, running means": running_means,
    "malib, every sample": every_sample,
    "hooks that keep every output": kept_outputs,
    "nnsight, every sample": nnsight_statistics,
    "malib, transport, paired": transport_paired,
    "malib, transport, replayed": transport_replayed,
}
_TWICE = ("malib, transport, paired",)


def benchmark(dit: DiT, prompts: list[str], steps: int, rounds: int, names: Sequence[str] = ()) -> dict[str, dict[str, Any]]:
    """Seconds of each method in each round, and their ratio to plain generation with its 95 % interval.

    A paired transport generates its sources, too, and is compared with plain generation of twice the pictures.

    Args:
        dit: the model.
        prompts: one a picture.
        steps: denoising steps.
        rounds: after one that warms up.
        names: some of ``METHODS``, "plain generation" among them; () for all whose library is installed.
    """
    seconds: dict[str, list[float]] = {name: [] for name in names or _present()}
    for number in range(rounds + 1):
        for name in seconds:
            began = time.perf_counter()
            METHODS[name](dit, prompts, steps)
            if number:  # the first round warms up
                seconds[name].append(time.perf_counter() - began)
    base, rows = np.array(seconds["plain generation"]), {}
    for name, times in seconds.items():
        ratio = bootstrap(np.array(times) / (base * (2 if name in _TWICE else 1)))
        rows[name] = {"seconds": float(np.median(times)), "ratio": [ratio.mean, ratio.low, ratio.high]}
    return rows


def memory(model: str, device: str | None, counts: list[int]) -> dict[str, dict[str, float]]:
    """Peak memory in MiB by method and number of prompts, each in a process of its own."""
    found: dict[str, dict[str, float]] = {}
    for name in _present():
        for count in counts:
            command = [
                sys.executable,
                "-m",
                "tests.benchmarks.bench",
                "--peak",
                name,
                "--model",
                model,
                "--samples",
                str(count),
            ]
            out = subprocess.run(
                command + (["--device", device] if device else []), check=True, capture_output=True, text=True
            )
            found.setdefault(name, {})[str(count)] = float(out.stdout.split()[-1])
    return found


def peak(name: str, model: str, device: str | None, samples: int) -> float:
    """Peak memory of this process, or of its GPU, in MiB, after one method has run."""
    dit = load(model, device=device, cache=False)
    METHODS[name](dit, _prompts(dit, samples), _MEMORY_STEPS)
    if dit.device.startswith("cuda"):
        return torch.cuda.max_memory_allocated() / 2**20
    status = Path("/proc/self/status")
    if status.exists():  # what getrusage gives on Linux never falls below the peak of the process that started this one
        (line,) = (line for line in status.read_text().splitlines() if line.startswith("VmHWM"))
        return int(line.split()[1]) / 2**10
    import resource

    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / (2**20 if sys.platform == "darwin" else 2**10)


def cache_times(dit: DiT, prompts: list[str], steps: int) -> dict[str, float]:
    """Seconds of one recorded call, cold and from the cache."""
    with tempfile.TemporaryDirectory() as folder:
        dit.store, times = Store(folder), {}
        for name in ("cold", "warm"):
            began = time.perf_counter()
            dit.generate(prompts, steps=steps, record=[ChannelStats()])
            times[name] = time.perf_counter() - began
        dit.store = None
    return times


def two_means(dit: DiT, prompts: list[str], steps: int, rounds: int) -> dict[str, Any]:
    """Seconds of scikit-learn's ``KMeans`` over those of ``spatial.kmeans``, K = 2, same restarts, on tokens of the model.

    Returns:
        ``sets`` of tokens that were clustered; ``ratio`` of the seconds with its 95 % interval; ``same``, the share of the
        sets in which at least 99 % of the tokens fall into the same two clusters; ``inertia``, the mean ratio ours / theirs.
    """
    from sklearn.cluster import KMeans

    run = dit.generate(prompts, steps=steps, record=[HiddenStates(channels=TopK(8), branches="cond")])
    values = run.records.hidden_states.value.transpose(..., "token", "channel").values
    points = min_max(torch.from_numpy(values.reshape(-1, *values.shape[-2:])))
    ratios = []
    for _ in range(rounds):
        began = time.perf_counter()
        ours = kmeans(points)
        middle = time.perf_counter()
        theirs = np.stack([KMeans(2, n_init=4, max_iter=30, random_state=0).fit_predict(x) for x in points.numpy()])
        ratios.append((time.perf_counter() - middle) / (middle - began))
    agree = (ours.numpy() == theirs).mean(1)
    spread = [
        np.array([_inertia(x, y) for x, y in zip(points.numpy(), labels, strict=True)]) for labels in (ours.numpy(), theirs)
    ]
    ratio = bootstrap(np.array(ratios))
    return {
        "sets": len(points),
        "ratio": [ratio.mean, ratio.low, ratio.high],
        "same": float((np.maximum(agree, 1 - agree) >= 0.99).mean()),
        "inertia": float((spread[0] / spread[1]).mean()),
    }


def first_image() -> dict[str, float]:
    """Seconds in a fresh interpreter: ``import malib`` alone, and until the first picture of 20 guided steps is there."""
    code = (
        "import time; began = time.perf_counter(); import malib; imported = time.perf_counter() - began; "
        "malib.load(device='cpu', cache=False).generate('a large red star on the left'); "
        "print(imported, time.perf_counter() - began)"
    )
    out = subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True).stdout
    imported, picture = map(float, out.split()[-2:])
    return {"import malib": imported, "first picture": picture}


def table(document: dict[str, Any]) -> str:
    """The results as Markdown."""
    counts = list(next(iter(document["memory"].values())))
    lines = [
        f"{document['samples']} pictures of {document['steps']} guided steps, {document['rounds']} rounds, "
        f"{document['model']}, torch {document['versions']['torch']}; peak memory with {_MEMORY_STEPS} steps.",
        "",
        f"| | time, relative to plain generation | peak memory in MiB for {', '.join(counts)} pictures |",
        "|---|---|---|",
    ]
    for name, row in document["rows"].items():
        mean, low, high = row["ratio"]
        peaks = ", ".join(f"{document['memory'][name][c]:,.0f}" for c in counts)
        name += " (of twice the pictures)" if name in _TWICE else ""
        lines.append(f"| {name} | {mean:.3f} [{low:.3f}, {high:.3f}] | {peaks} |")
    start, store, clusters = document["start"], document["cache"], document["two_means"]
    mean, low, high = clusters["ratio"]
    lines += [
        "",
        f"The same call again comes from the cache: {store['cold']:.1f} s cold, {store['warm']:.2f} s warm. `import malib` "
        f"takes {start['import malib']:.2f} s; the first picture is there {start['first picture']:.1f} s after it began.",
        "",
        f"Two-means on {clusters['sets']} sets of tokens: scikit-learn, one set after another, takes {mean:.1f} [{low:.1f}, "
        f"{high:.1f}] times as long as `spatial.kmeans` on all at once; {clusters['same']:.1%} of the sets are split alike, "
        f"and the inertia is {clusters['inertia']:.4f} times scikit-learn's.",
    ]
    return "\n".join(lines)


def publish(document: dict[str, Any], text: str, out: Path, page: Path | None, marks: tuple[str, str]) -> None:
    """Write the results, print their table, and put it between two marks of a page, if one is given."""
    out.parent.mkdir(parents=True, exist_ok=True)
    out.write_text(json.dumps(document, indent=1) + "\n")
    print(text)
    if page:
        before, rest = page.read_text().split(marks[0])
        page.write_text(f"{before}{marks[0]}\n{text}\n{marks[1]}{rest.split(marks[1])[1]}")


def _statistics(x: Any) -> tuple[Any, ...]:
    x = x.float()
    return x.mean(1).abs(), x.abs().mean(1), x.abs().amax(1), x.square().mean(1)


def _inertia(points: np.ndarray, labels: np.ndarray) -> float:
    """Sum of squared distances of points (N, D) to the mean of their cluster."""
    return sum(np.square(points[labels == c] - points[labels == c].mean(0)).sum() for c in np.unique(labels))


def _present() -> list[str]:
    """The methods whose library is installed; nnsight comes with the extra "bench"."""
    try:
        import nnsight  # noqa: F401
    except ImportError:
        return [name for name in METHODS if "nnsight" not in name]
    return list(METHODS)


@cache
def _source(dit: DiT, prompts: tuple[str, ...], steps: int) -> Generation:
    return dit.generate(list(prompts[::-1]), steps=steps, record=[HiddenStates(channels=TopK(8))])


@cache
def _nnsight_model(model: str) -> Any:
    from nnsight.modeling.diffusion import DiffusionModel

    found = DiffusionModel(str(data_folder() / BUNDLED if model == BUNDLED else model), dispatch=True)
    found.pipeline.set_progress_bar_config(disable=True)
    return found


def _prompts(dit: DiT, count: int) -> list[str]:
    known = dit.prompts(min(count, 8))
    return [known[i % len(known)] for i in range(count)]


def main(argv: list[str] | None = None) -> None:
    """Command line: ``python -m tests.benchmarks.bench``."""
    parser = argparse.ArgumentParser(prog="python -m tests.benchmarks.bench", description=__doc__.splitlines()[0])
    parser.add_argument("--model", default=BUNDLED)
    parser.add_argument("--device")
    parser.add_argument("--samples", type=int, default=8)
    parser.add_argument("--steps", type=int, default=10)
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--out", type=Path, default=Path("figures/benchmark.json"))
    parser.add_argument("--readme", type=Path, help="put the table between the marks of this file")
    parser.add_argument("--peak", choices=METHODS, help="only print the peak memory of one method")
    args = parser.parse_args(argv)
    if args.peak:
        print(peak(args.peak, args.model, args.device, args.samples))
        return
    dit = load(args.model, device=args.device, cache=False, batch_size=args.samples)
    prompts = _prompts(dit, args.samples)
    document = {
        "model": repr(dit),
        "samples": args.samples,
        "steps": args.steps,
        "rounds": args.rounds,
        "rows": benchmark(dit, prompts, args.steps, args.rounds),
        "memory": memory(args.model, args.device, [8, 32, 128]),
        "cache": cache_times(dit, prompts, args.steps),
        "start": first_image(),
        "two_means": two_means(dit, prompts, _MEMORY_STEPS, args.rounds),
        "versions": versions(),
    }
    publish(document, table(document), args.out, args.readme, MARKS)


if __name__ == "__main__":
    main()
