"""Compare the numbers of two folders of figures: ``python -m tests.compare_figures OLD NEW``.

For a change that must not change any number. Labels that a rename has changed are translated by ``RENAMED`` first; versions,
keys and fingerprints are not compared.
"""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path
from typing import Any

RENAMED = {
    "agreement": "adherence",
    "amount": "dose",
    "kept": "overlap",
    "lead": "top_ratio",
    "whose": "select_on",
}
"""Labels of version 0.1 -> 0.2, as keys or as whole values."""
IGNORED = {"key", "versions", "weights"}


def translated(value: Any) -> Any:
    """Return a document with old labels replaced by new ones."""
    if isinstance(value, dict):
        return {RENAMED.get(k, k): translated(v) for k, v in value.items() if k not in IGNORED}
    if isinstance(value, list):
        return [translated(v) for v in value]
    return RENAMED.get(value, value) if isinstance(value, str) else value


def differences(old: Any, new: Any, where: str = "") -> list[str]:
    """Return one line for each place where two documents differ."""
    if isinstance(old, dict) and isinstance(new, dict):
        lines = [f"{where}/{k}: only in one" for k in sorted(set(old) ^ set(new))]
        return lines + [line for k in old if k in new for line in differences(old[k], new[k], f"{where}/{k}")]
    if isinstance(old, list) and isinstance(new, list) and len(old) == len(new):
        return [line for i, (a, b) in enumerate(zip(old, new, strict=True)) for line in differences(a, b, f"{where}/{i}")]
    return [] if old == new else [f"{where}: {str(old)[:80]} -> {str(new)[:80]}"]


def compare(old: Path, new: Path) -> list[str]:
    """Return one line for each difference between the json files of two folders."""
    names = [{p.name for p in folder.glob("*.json")} for folder in (old, new)]
    lines = [f"{name}: only in one folder" for name in sorted(names[0] ^ names[1])]
    for name in sorted(names[0] & names[1]):
        one, two = (translated(json.loads((folder / name).read_text())) for folder in (old, new))
        lines += differences(one, two, name)
    return lines


def main() -> int:
    """Command line; 0 where all numbers are equal."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("old", type=Path)
    parser.add_argument("new", type=Path)
    args = parser.parse_args()
    lines = compare(args.old, args.new)
    print(*lines, sep="\n")
    print(f"{len(list(args.new.glob('*.json')))} files, {len(lines)} differences")
    return bool(lines)


if __name__ == "__main__":
    sys.exit(main())
