"""What can be written during a generation. Edits are frozen dataclasses; they change the named entries alone, in place."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

from .channels import Rule
from .records import Run, Window, _Listener

if TYPE_CHECKING:
    import xarray as xr
    from torch import Tensor

    from .hooks import Event


@dataclass(frozen=True)
class Disrupt(Window):
    """Set the selected channels to zero in every token (MAs-DiT, arXiv 2605.13974, disruption probe).

    By default at the output of every block, at every step and in every branch; the fields of ``Window`` restrict it. The
    resolved selection is recorded as ``mask`` (sample, step, branch, layer, channel).

    Attributes:
        channels: a rule such as ``TopK(8)``; it sees the hidden states just before they are changed.
    """

    version: ClassVar[int] = 1

    channels: Rule

    def __post_init__(self) -> None:
        super().__post_init__()
        if not isinstance(self.channels, Rule):
            raise TypeError(f"Disrupt was given {self.channels!r}; give it a rule such as TopK(8) or Channels((3, 7)).")

    def start(self, run: Run) -> _DisruptListener:
        """A listener that applies the edit and records what it selected."""
        return _DisruptListener(self, run)


class _DisruptListener(_Listener):
    writes = True
    record: Disrupt

    def __call__(self, event: Event, x: Tensor) -> None:
        if self.record.covers(event):
            mask = self.record.channels.mask(x, event.layer)
            x.masked_fill_(mask[:, None], 0)
            self.keep("mask", (event.step, event.branch, event.layer), mask)

    def dataset(self) -> xr.Dataset:
        import xarray as xr

        mask = self._assemble("mask", ("channel",))
        return xr.Dataset() if mask is None else xr.Dataset({"mask": mask})
