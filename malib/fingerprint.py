"""What a result depends on besides its call: weights, settings, device, dtype and versions."""

from __future__ import annotations

import hashlib
import platform
from collections.abc import Iterator
from importlib.metadata import PackageNotFoundError, version
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from torch import Tensor


class Fingerprint:
    """Hash of the weights, settings, tokenizers and adapter strengths of a diffusers pipeline.

    Args:
        pipeline: the diffusers pipeline.
    """

    def __init__(self, pipeline: Any) -> None:
        self._pipeline = pipeline
        self._state: tuple = ()
        self._weights = ""
        self.pinned = False

    def pin(self) -> None:
        """Hash the weights now and never again: accelerate hides the weights of offloaded models."""
        self._weights, self.pinned = self._hash_of_weights(), True

    @property
    def value(self) -> str:
        """64 hex digits. Weights that change in place change it; a write through ``tensor.data`` is not detected."""
        components = sorted(self._pipeline.components.items())
        settings = [(name, _settings(component)) for name, component in components]
        whole = (type(self._pipeline).__name__, settings, self._hash_of_weights())
        return hashlib.sha256(repr(whole).encode()).hexdigest()

    def _hash_of_weights(self) -> str:
        if self.pinned:
            return self._weights
        state = tuple((id(t), t.data_ptr(), t._version) for _, t in self._tensors())
        if not self._weights or state != self._state:
            sums = [(name, tuple(t.shape), str(t.dtype), *_checksum(t)) for name, t in self._tensors()]
            rows = repr([(*s[:3], int(s[3]), int(s[4])) for s in sums])
            self._state, self._weights = state, hashlib.sha256(rows.encode()).hexdigest()
        return self._weights

    def _tensors(self) -> Iterator[tuple[str, Tensor]]:
        for name, part in sorted(self._pipeline.components.items()):
            if hasattr(part, "named_parameters"):
                for key, tensor in (*part.named_parameters(), *part.named_buffers()):
                    yield f"{name}.{key}", tensor


def versions() -> dict[str, str]:
    """Return the versions of Python and of the packages that compute the numbers."""
    found = {"python": platform.python_version()}
    for package in ("torch", "diffusers", "transformers", "malib"):
        try:
            found[package] = version(package)
        except PackageNotFoundError:
            found[package] = "source"
    return found


def _settings(component: Any) -> str:
    """Hash what changes the results of a pipeline's component besides weights: class, config, vocabulary, adapters."""
    parts: list[Any] = [type(component).__name__]
    config = getattr(component, "config", None)
    if config is not None:
        settings = config.to_dict() if hasattr(config, "to_dict") else dict(config)
        parts.append(sorted((k, v) for k, v in settings.items() if not k.startswith("_") and k != "transformers_version"))
    if hasattr(component, "get_vocab"):
        parts += [sorted(component.get_vocab().items()), component.model_max_length]
    for name, module in component.named_modules() if hasattr(component, "named_modules") else ():
        if hasattr(module, "lora_A"):
            parts.append((name, module.scaling, module.active_adapters, module.disable_adapters))
    return hashlib.sha256(repr(parts).encode()).hexdigest()


def _checksum(tensor: Tensor) -> tuple[Tensor, Tensor]:
    """Return two 64-bit sums over the raw bits, the second weighted by position; they wrap, so all devices agree."""
    import torch

    flat = tensor.detach().contiguous().view(-1)
    if not flat.numel():
        return torch.zeros(()), torch.zeros(())
    integers = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}[flat.element_size()]
    plain = weighted = torch.zeros((), dtype=torch.int64, device=flat.device)
    for start in range(0, flat.numel(), 1 << 24):  # bounded scratch memory on large tensors
        bits = flat[start : start + (1 << 24)].view(integers).long()
        position = torch.arange(start + 1, start + 1 + len(bits), device=flat.device)
        plain, weighted = plain + bits.sum(), weighted + (bits * position).sum()
    return plain, weighted
