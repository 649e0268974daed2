"""The figure registry and its runner: ``python -m malib.figures`` runs the notebooks and fills ``figures/``.

One notebook, one kernel process. A figure is its numbers: every png and pdf has a json with what it shows and its
provenance.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import logging
import sys
import time
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

if TYPE_CHECKING:
    import xarray as xr
    from matplotlib.figure import Figure
    from pandas.io.formats.style import Styler

TIERS = {"preview": "preview", "full": "paper"}
_BF16 = {"dtype": "bfloat16"}
"""The dtype of large models; on a CPU with bfloat16 arithmetic an image takes a third of the time."""


@dataclass(frozen=True)
class Notebook:
    """A notebook, its figures, its parameters by tier, and whether it ends with a table of verdicts."""

    name: str
    figures: tuple[str, ...]
    tiers: dict[str, dict[str, Any]]
    has_claims: bool = True

    def files(self, figure: str) -> list[str]:
        """Return the file names of a figure: png, pdf and json."""
        return [f"{self.name[:2]}_{figure}.{kind}" for kind in ("png", "pdf", "json")]

    @property
    def claims(self) -> list[str]:
        """File names of its table of verdicts: one, or none."""
        return [f"{self.name[:2]}_claims.json"] if self.has_claims else []


NOTEBOOKS = (
    Notebook(
        "01_discovery",
        (
            "channels",
            "layers",
            "token_maps",
            "tokens",
            "sigma",
            "origin",
            "gates",
            "norm_share",
            "streams",
            "birth",
            "sizes",
        ),
        {"preview": {"prompts": 12, "seeds": 3, "dumps": 8}, "full": {**_BF16, "prompts": 48, "seeds": 4, "dumps": 24}},
    ),
    Notebook(
        "02_disruption",
        ("strength", "blocks", "steps", "streams", "losses", "pictures"),
        {
            "preview": {"prompts": 5, "steps": 6, "ks": [2, 8, 32], "draws": 1},
            "full": {**_BF16, "prompts": 24, "steps": 20, "ks": [1, 2, 4, 8, 16, 32], "draws": 3},
        },
    ),
    Notebook(
        "03_clustering",
        ("layers", "foreground", "channels", "maps", "generated", "embedding", "two_subjects"),
        {
            "preview": {"pictures": 24, "ks": [2, 8, 32], "draws": 1, "steps": 10},
            "full": {**_BF16, "pictures": 192, "ks": [1, 2, 4, 8, 16, 32, 64], "draws": 3, "steps": 20},
        },
    ),
    Notebook(
        "04_transport",
        ("channels", "branches", "attributes", "blocks", "steps", "masks", "tradeoff", "sources", "matrix", "pictures"),
        {
            "preview": {"pairs": 4, "steps": 4, "ks": [2, 8, 32], "strengths": [0.5, 1.0], "draws": 1},
            "full": {
                **_BF16,
                "pairs": 32,
                "steps": 20,
                "ks": [1, 2, 4, 8, 16, 32],
                "strengths": [0.25, 0.5, 0.75, 1.0],
                "draws": 3,
            },
        },
    ),
    Notebook(
        "05_prompt_interpolation",
        ("filmstrips", "edits", "tradeoff"),
        {
            "preview": {"pairs": 3, "steps": 5, "strengths": [0.5, 1.0], "draws": 1},
            "full": {**_BF16, "pairs": 24, "steps": 20, "strengths": [0.25, 0.5, 0.75, 1.0], "draws": 3},
        },
    ),
    Notebook(
        "06_subject_driven",
        ("methods", "pictures"),
        {"preview": {"pairs": 5, "steps": 6, "draws": 1}, "full": {**_BF16, "pairs": 48, "steps": 20, "draws": 3}},
    ),
    Notebook(
        "07_detail_guidance",
        ("weights", "without_cfg", "layers", "guidances", "pictures"),
        {
            "preview": {"prompts": 5, "steps": 6, "ws": [0.5, 1.0, 2.0], "draws": 1},
            "full": {**_BF16, "prompts": 32, "steps": 20, "ws": [0.25, 0.5, 1.0, 2.0, 4.0], "draws": 3},
        },
    ),
    Notebook(
        "08_correspondence",
        ("layers", "ladder", "noise", "matches"),
        {
            "preview": {"pairs": 12, "ensemble": 2, "sigmas": [0.05, 0.26, 0.5], "draws": 1},
            "full": {**_BF16, "pairs": 96, "ensemble": 8, "sigmas": [0.02, 0.1, 0.26, 0.4, 0.6, 0.8], "draws": 3},
        },
    ),
    Notebook(
        "09_three_readings",
        ("verdicts", "readings"),
        {
            "preview": {"prompts": 5, "pairs": 6, "steps": 6, "ensemble": 2, "ks": [2, 8, 32], "draws": 1},
            "full": {**_BF16, "prompts": 32, "pairs": 48, "steps": 20, "ensemble": 8, "ks": [2, 8, 32], "draws": 3},
        },
        has_claims=False,  # its verdicts are a figure
    ),
)


class RunError(Exception):
    """Something that was requested does not exist; the message is one sentence."""


def notebook_folder() -> Path:
    """Return the folder of the notebooks: inside an installed package, or beside it in a checkout."""
    inside = Path(__file__).parent / "notebooks"
    return inside if inside.exists() else Path(__file__).parent.parent / "notebooks"


def save(
    figure: Figure, data: xr.Dataset, name: str, folder: str | Path, provenance: Mapping[str, Any], **parameters: Any
) -> Figure:
    """Write ``<name>.png``, ``.pdf`` and ``.json``, and return the figure.

    Args:
        figure: a matplotlib figure.
        data: the numbers it shows; ``data.attrs["n"]`` is the number of samples. Images (uint8) are stored by their
            hash.
        name: for example "01_channels".
        folder: where to write; "" writes nothing, as in an interactive notebook.
        provenance: of the generation behind the numbers (model, weights, device, dtype, versions, call).
        parameters: the notebook's parameters.
    """
    if not folder:
        return figure
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    figure.savefig(folder / f"{name}.png", dpi=150, bbox_inches="tight")
    figure.savefig(folder / f"{name}.pdf", bbox_inches="tight", metadata={"CreationDate": None})
    hashes = {k: hashlib.sha256(v.values.tobytes()).hexdigest() for k, v in data.data_vars.items() if v.dtype == np.uint8}
    origin = {k: v for k, v in provenance.items() if k != "call"}
    call = {k: v for k, v in provenance.get("call", {}).items() if k in ("steps", "cfg", "guidance", "size", "seeds")}
    document = {
        "figure": name,
        "n": data.attrs.get("n"),
        "parameters": parameters,
        **origin,
        **call,
        "pictures": hashes,
        "numbers": _rounded(data.drop_vars(list(hashes)).to_dict()),
    }
    (folder / f"{name}.json").write_text(json.dumps(document) + "\n")
    return figure


def save_claims(table: Styler, name: str, folder: str | Path, provenance: Mapping[str, Any], **parameters: Any) -> Styler:
    """Write a table of verdicts as ``<name>.json``, and return it.

    Args:
        table: from ``analysis.verdicts``.
        name: for example "01_claims".
        folder: where to write; "" writes nothing.
        provenance: as for ``save``.
        parameters: the notebook's parameters.
    """
    if folder:
        origin = {k: v for k, v in provenance.items() if k != "call"}
        document = {"parameters": parameters, **origin, "claims": table.data.to_dict("records")}
        Path(folder).mkdir(parents=True, exist_ok=True)
        (Path(folder) / f"{name}.json").write_text(json.dumps(document, indent=1) + "\n")
    return table


def _rounded(value: Any) -> Any:
    """Round numbers to five significant digits; NaN becomes null, because JSON has none."""
    if isinstance(value, dict):
        return {str(k): _rounded(v) for k, v in value.items()}
    if isinstance(value, (list, tuple)):
        return [_rounded(v) for v in value]
    if isinstance(value, float):
        return None if value != value else float(f"{value:.5g}")
    return value


def select(only: list[str] | None) -> list[Notebook]:
    """Return the notebooks of some names: notebooks ("01_discovery", "01") or figures ("channels", "01_channels").

    Raises:
        RunError: a name that is neither.
    """
    if not only:
        return list(NOTEBOOKS)
    chosen = {}
    for name in only:
        found = [n for n in NOTEBOOKS if name in _names(n)]
        if not found:
            known = ", ".join(f"{n.name} ({', '.join(n.figures)})" for n in NOTEBOOKS)
            raise RunError(f"'{name}' is neither a notebook nor a figure; known are {known}.")
        chosen |= {n.name: n for n in found}
    return list(chosen.values())


def _names(notebook: Notebook) -> list[str]:
    """Return all names of a notebook and its figures."""
    number = notebook.name[:2]
    return [notebook.name, number, *notebook.figures, *(f"{number}_{figure}" for figure in notebook.figures)]


def parameters_for(notebook: Notebook, tier: str, given: dict[str, Any]) -> dict[str, Any]:
    """Return a notebook's parameters: those of the tier, then the preset of a known model, then those given.

    Args:
        notebook: the notebook.
        tier: "preview" or "full".
        given: parameters from the command line.

    Raises:
        RunError: a parameter that the notebook does not have (papermill itself would only log it).
    """
    import papermill

    logging.getLogger("papermill").setLevel(logging.ERROR)
    known = papermill.inspect_notebook(str(notebook_folder() / f"{notebook.name}.ipynb"))
    from .presets import preset_of

    preset = {name: value for name, value in preset_of(given.get("model", "")).items() if name in known}
    wanted = {**notebook.tiers[tier], **preset, **given}
    for one, many in (("k", "ks"), ("w", "ws")):  # the verdicts are read at the one
        if many in known and many not in given and one in wanted:
            wanted[many] = sorted({*wanted[many], wanted[one]})
    for name in wanted:
        if name not in known:
            raise RunError(f"'{name}' is not a parameter of {notebook.name}; it has {', '.join(known)}.")
    return wanted


def check_model(model: str) -> None:
    """Refuse a model that is neither bundled, nor a short name, nor a folder, nor of the form of a hub id.

    Raises:
        RunError: with what to give instead.
    """
    from .presets import BUNDLED, preset_of

    path = Path(model)
    if model == BUNDLED or preset_of(model) or (path / "model_index.json").is_file():
        return
    if path.exists() or model.count("/") != 1 or model.startswith((".", "/", "~")):
        raise RunError(
            f"'{model}' is not a model; give '{BUNDLED}', a short name of data/models.yaml, a folder with model_index.json, "
            "or a hub id like owner/name."
        )


def run(notebook: Notebook, parameters: dict[str, Any], folder: Path, force: bool = False) -> dict[str, Any]:
    """Run one notebook through papermill.

    Args:
        notebook: the notebook.
        parameters: its parameters.
        folder: where its figures go.
        force: run it even if nothing changed.

    Returns:
        A row for the summary: notebook, status ("drawn", "unchanged" or "failed"), seconds, error.
    """
    import papermill

    began, started = time.monotonic(), time.time() - 2  # some file systems keep whole seconds
    source = notebook_folder() / f"{notebook.name}.ipynb"
    stamp_path = folder / "executed" / f"{notebook.name}.stamp"
    stamp = _stamp(source, parameters)
    outputs = [folder / name for figure in notebook.figures for name in notebook.files(figure)]
    outputs += [folder / name for name in notebook.claims]
    row = {"notebook": notebook, "status": "unchanged", "seconds": 0.0, "error": ""}
    if not force and stamp_path.exists() and stamp_path.read_text() == stamp and all(p.exists() for p in outputs):
        return row
    stamp_path.parent.mkdir(parents=True, exist_ok=True)
    stamp_path.unlink(missing_ok=True)
    try:
        papermill.execute_notebook(
            str(source),
            str(folder / "executed" / f"{notebook.name}.ipynb"),
            {**parameters, "out": str(folder.resolve()), "interactive": False},
            cwd=str(source.parent),
            kernel_name="python3",
            extra_arguments=["--IPKernelApp.log_level=ERROR"],
            progress_bar=sys.stderr.isatty() or {"mininterval": 10},
        )
        missing = [p.name for p in outputs if not p.exists() or p.stat().st_mtime < started]
        if missing:
            raise RuntimeError(f"{notebook.name} ended without the files {', '.join(missing)}.")
        stamp_path.write_text(stamp)
        row["status"] = "drawn"
    except papermill.PapermillExecutionError as error:
        row |= {"status": "failed", "error": f"{notebook.name}, cell {error.cell_index}: {error.ename}: {error.evalue}"}
    except Exception as error:
        row |= {"status": "failed", "error": f"{notebook.name}: {type(error).__name__}: {error}"}
    return row | {"seconds": time.monotonic() - began}


def _stamp(notebook: Path, parameters: dict[str, Any]) -> str:
    """Return a hash of all that a notebook's figures depend on: its source, the library, the data, the parameters."""
    from .presets import BUNDLED, data_folder

    digest = hashlib.sha256(json.dumps(parameters, sort_keys=True, default=str).encode())
    files = [notebook, *sorted(Path(__file__).parent.rglob("*.py"))]
    files += sorted(p for p in data_folder().rglob("*") if p.is_file())
    files += [Path(parameters["reference"])] if parameters.get("reference") else []
    for path in files:
        digest.update(path.name.encode() + hashlib.sha256(path.read_bytes()).digest())
    for folder in (Path(parameters.get("model", BUNDLED)), *_folders(parameters.get("baselines"))):
        for path in sorted(folder.rglob("*")) if folder.is_dir() else ():  # gigabytes of weights: size and time only
            digest.update(repr((path.name, path.stat().st_size, path.stat().st_mtime_ns)).encode())
    return digest.hexdigest()


def _resolved(value: Any) -> Any:
    """Make every existing path absolute: a notebook runs in a folder of its own."""
    if isinstance(value, dict):
        return {name: _resolved(part) for name, part in value.items()}
    return str(Path(value).resolve()) if isinstance(value, str) and value and Path(value).exists() else value


def _folders(value: Any) -> list[Path]:
    """Return the folders that a parameter names."""
    if isinstance(value, dict):
        return [folder for part in value.values() for folder in _folders(part)]
    return [Path(value)] if isinstance(value, str) and Path(value).is_absolute() else []


def summary(rows: list[dict[str, Any]], folder: Path) -> str:
    """Return the closing tables: figure, n, seconds of its notebook, status; claim, measured number, verdict.

    Args:
        rows: from ``run``.
        folder: where the figures are.
    """
    green, red, plain = ("\033[32m", "\033[31m", "\033[0m") if sys.stdout.isatty() else ("", "", "")
    lines = [f"{'figure':<24} {'n':>7} {'seconds':>8}  status"]
    for row in rows:
        notebook = row["notebook"]
        for figure in notebook.figures:
            path = folder / notebook.files(figure)[-1]
            drawn = row["status"] != "failed" and path.exists()
            n = json.loads(path.read_text())["n"] if drawn else None
            colour = red if row["status"] == "failed" else green
            name = f"{notebook.name[:2]}_{figure}"
            count = "-" if n is None else n
            lines.append(f"{name:<24} {count:>7} {row['seconds']:>8.1f}  {colour}{row['status']}{plain}")
    done = [name for row in rows if row["status"] != "failed" for name in row["notebook"].claims]
    claims = [claim for name in done for claim in json.loads((folder / name).read_text())["claims"]]
    lines += ["", f"{'claim':<32} {'measured':<38} verdict"] if claims else []
    lines += [f"{claim['claim']:<32} {claim['measured']:<38} {claim['verdict']}" for claim in claims]
    lines += [row["error"] for row in rows if row["error"]]
    return "\n".join([*lines, f"Figures are in {folder}"])


def main(argv: list[str] | None = None) -> int:
    """Run the command line; 0 when all figures exist, 1 when a notebook failed, 2 for an unknown name or model."""
    parser = argparse.ArgumentParser(prog="python -m malib.figures", description="Run the notebooks, fill figures/.")
    parser.add_argument("--tier", choices=TIERS, default="preview", help="preview: minutes; full: the paper's figures")
    parser.add_argument("--list", action="store_true", help="list the figures and stop")
    parser.add_argument("--only", nargs="+", metavar="NAME", help="figures or notebooks")
    parser.add_argument("--model", help="mini-flux (default), a short name of data/models.yaml, a folder, or a hub id")
    parser.add_argument("--device", help="cpu, cuda, mps (default: a GPU when there is one)")
    parser.add_argument("-p", "--parameter", action="append", default=[], metavar="NAME=VALUE", help="a notebook parameter")
    parser.add_argument("--out", type=Path, help="where to write (default: figures/preview or figures/paper)")
    parser.add_argument("--force", action="store_true", help="run unchanged notebooks too (the cache stays warm)")
    args = parser.parse_args(argv)
    if args.list:
        for notebook in NOTEBOOKS:
            for figure in notebook.figures:
                print(f"{notebook.name[:2]}_{figure:<20} {notebook.name}  {notebook.tiers[args.tier]}")
        return 0
    try:
        given = _given(args)
        folder = args.out or _default_folder(args.tier, args.model)
        jobs = [(n, parameters_for(n, args.tier, given)) for n in select(args.only)]
    except RunError as error:
        print(error, file=sys.stderr)
        return 2
    rows = []
    for index, (notebook, parameters) in enumerate(jobs, 1):
        print(f"[{index}/{len(jobs)}] {notebook.name} {parameters}", file=sys.stderr)
        rows.append(run(notebook, parameters, folder, args.force))
    print(summary(rows, folder))
    return int(any(row["status"] == "failed" for row in rows))


def _default_folder(tier: str, model: str | None) -> Path:
    """Return figures/preview or figures/paper for the bundled model, another model's own folder otherwise."""
    from .presets import BUNDLED

    folder = Path("figures")
    if model and model != BUNDLED:
        folder = folder / (Path(model).resolve().name if Path(model).is_dir() else model.replace("/", "--"))
    return folder / TIERS[tier]


def _given(args: argparse.Namespace) -> dict[str, Any]:
    import yaml

    given: dict[str, Any] = {}
    for item in args.parameter:
        name, equals, value = item.partition("=")
        if not equals:
            raise RunError(f"'{item}' is not a parameter; write it as NAME=VALUE.")
        given[name] = yaml.safe_load(value)
    if (path := given.get("reference")) and not Path(path).is_file():
        raise RunError(f"There is no image '{path}'; give the path of a PNG or JPEG.")
    for name in ("reference", "baselines"):
        if name in given:
            given[name] = _resolved(given[name])
    if args.model:
        check_model(args.model)
        folder = Path(args.model)
        given["model"] = str(folder.resolve()) if folder.is_dir() else args.model
    if args.device:
        given["device"] = args.device
    return given


if __name__ == "__main__":
    sys.exit(main())
