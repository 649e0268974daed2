"""Content-addressed store on disk: the same call on the same weights is computed once.

``objects/ab/<key>/{data.safetensors, meta.json}`` where the key is the sha256 of the call's canonical JSON. An entry
appears whole or not at all; a damaged one is reported, removed and computed again. Nothing is pickled.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import logging
import os
import shutil
import tempfile
import time
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

import numpy as np

log = logging.getLogger("malib")


def default_folder() -> Path:
    """Return ``$MALIB_CACHE``, or ``~/.cache/malib/generations``."""
    return Path(os.environ.get("MALIB_CACHE") or Path.home() / ".cache" / "malib" / "generations")


def describe(value: Any) -> Any:
    """Convert a value to plain JSON: dataclasses by type, version and fields; arrays by shape, dtype, hash and labels.

    Raises:
        TypeError: a value without a faithful description.
    """
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        fields = {f.name: describe(getattr(value, f.name)) for f in dataclasses.fields(value)}
        return {"type": type(value).__name__, "version": getattr(value, "version", 1), **fields}
    if isinstance(value, Mapping):
        return {str(k): describe(v) for k, v in value.items()}
    if hasattr(value, "dims"):  # an xarray.DataArray
        labels = {name: describe(value[name].values) for name in value.dims if name in value.coords}
        return {"labelled": describe(value.values), "dims": list(value.dims), **labels}
    if isinstance(value, (list, tuple)):
        return [describe(v) for v in value]
    if isinstance(value, np.generic):
        return value.item()
    if hasattr(value, "numpy"):
        value = value.detach().cpu().numpy()
    if isinstance(value, np.ndarray):
        digest = hashlib.sha256(np.ascontiguousarray(value).tobytes()).hexdigest()
        return {"array": digest, "shape": list(value.shape), "dtype": str(value.dtype)}
    if value is None or isinstance(value, (str, int, float, bool)):
        return value
    raise TypeError(f"{type(value).__name__} cannot be part of a cached call; use numbers, text, arrays or dataclasses.")


def key_of(call: Any) -> str:
    """Return the sha256 of a call's canonical JSON."""
    return hashlib.sha256(json.dumps(describe(call), sort_keys=True, separators=(",", ":")).encode()).hexdigest()


class Store:
    """Named arrays and a JSON document under each key.

    Args:
        folder: folder of the store, created when missing; None for ``default_folder()``.
        budget: bytes on disk; when exceeded, the least recently used entries are removed.
    """

    def __init__(self, folder: Path | str | None = None, budget: int = 10 * 2**30) -> None:
        self.folder = Path(folder) if folder else default_folder()
        self.budget = budget

    def path(self, key: str) -> Path:
        """Return the folder of an entry."""
        return self.folder / "objects" / key[:2] / key

    def get(self, key: str) -> tuple[dict[str, np.ndarray], dict] | None:
        """Return an entry; None if there is none, or it is damaged (then it is reported in the log and removed)."""
        from safetensors.numpy import load

        entry = self.path(key)
        if not entry.exists():
            return None
        try:
            meta = json.loads((entry / "meta.json").read_text())
            data = (entry / "data.safetensors").read_bytes()
            if hashlib.sha256(data).hexdigest() != meta["sha256"]:
                raise ValueError("its checksum differs")
            arrays = load(data)
            with suppress(PermissionError):  # a shared store may be read-only
                os.utime(entry / "meta.json")
        except (OSError, ValueError, KeyError) as error:
            log.warning("Cache entry %s is damaged (%s); it is removed and computed again.", key[:12], error)
            shutil.rmtree(entry, ignore_errors=True)
            return None
        return arrays, meta["document"]

    def put(self, key: str, arrays: Mapping[str, np.ndarray], document: dict) -> None:
        """Write named ``arrays`` and a JSON ``document`` under ``key``: data, then the meta file, then one rename.

        A full disk loses the entry, not the run.
        """
        from safetensors.numpy import save

        entry = self.path(key)
        temporary = None
        try:
            entry.parent.mkdir(parents=True, exist_ok=True)
            temporary = Path(tempfile.mkdtemp(prefix=".new-", dir=entry.parent))
            data = save({name: np.ascontiguousarray(a) for name, a in arrays.items()})
            _write(temporary / "data.safetensors", data)
            meta = {"sha256": hashlib.sha256(data).hexdigest(), "bytes": len(data), "document": document}
            _write(temporary / "meta.json", json.dumps(meta).encode())
            if entry.exists():
                shutil.rmtree(entry, ignore_errors=True)
            temporary.replace(entry)
        except OSError as error:
            if temporary:
                shutil.rmtree(temporary, ignore_errors=True)
            if not entry.exists():
                log.warning("The result was not cached (%s); free some space or set MALIB_CACHE to another disk.", error)
            return
        self._trim(keep=key)

    def _trim(self, keep: str) -> None:
        for abandoned in self.folder.glob("objects/*/.new-*"):  # of a process that was killed while writing
            with suppress(FileNotFoundError):
                if time.time() - abandoned.stat().st_mtime > 3600:
                    shutil.rmtree(abandoned, ignore_errors=True)
        entries = []
        for meta in self.folder.glob("objects/*/*/meta.json"):
            try:
                entries.append((meta.stat().st_mtime, sum(f.stat().st_size for f in meta.parent.iterdir()), meta.parent))
            except FileNotFoundError:  # another process trimmed it
                continue
        total = sum(size for _, size, _ in entries)
        for _, size, entry in sorted(entries):
            if total <= self.budget:
                break
            if entry.name != keep:
                shutil.rmtree(entry, ignore_errors=True)
                total -= size


def _write(path: Path, data: bytes) -> None:
    with path.open("wb") as file:
        file.write(data)
        file.flush()
        os.fsync(file.fileno())
