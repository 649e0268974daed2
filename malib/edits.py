"""What can be written during a generation. Edits are frozen dataclasses; they change the named entries alone, in place.

Several edits of one call are applied in the given order, each to what the one before has left.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar

from .channels import BottomK, EnergyMatched, RandomK, Rule, TopK, random_frame
from .records import Run, Window, _Listener

if TYPE_CHECKING:
    import xarray as xr
    from torch import Tensor

    from .hooks import Event

MODES = ("zero", "mean", "scale", "rotate")


@dataclass(frozen=True)
class Disrupt(Window):
    """Destroy what the selected channels carry (MAs-DiT, arXiv 2605.13974, disruption probe).

    By default in every token, at the output of every block, at every step and in every branch; the fields of ``Window``
    restrict it. The resolved selection is recorded as ``mask`` (sample, step, branch, layer, channel).

    Attributes:
        channels: a rule such as ``TopK(8)``; it sees the hidden states just before they are changed.
        mode: what becomes of the selected entries. "zero": 0. "mean": their channel's mean over the disrupted tokens, so
            that only the differences between tokens are lost. "scale": ``factor`` times themselves. "rotate": nothing
            happens to them; instead, in every token, a vector of the very norm that "zero" would remove is taken away in a
            random subspace of as many dimensions (the equal-norm control; it needs a rule with a fixed k).
        factor: of mode "scale"; 1 changes nothing, 0 is mode "zero".
        tokens: token indices that are changed; None for all.
        seed: of the random subspace; another one for each layer, the same for all samples and steps.
    """

    version: ClassVar[int] = 2

    channels: Rule
    mode: str = "zero"
    factor: float = 0.0
    tokens: tuple[int, ...] | None = None
    seed: int = 0

    def __post_init__(self) -> None:
        super().__post_init__()
        if not isinstance(self.channels, Rule):
            raise TypeError(f"Disrupt was given {self.channels!r}; give it a rule such as TopK(8) or Channels((3, 7)).")
        if self.mode not in MODES:
            raise ValueError(f"Mode '{self.mode}' is unknown; use one of {', '.join(MODES)}.")
        if self.tokens is not None:
            object.__setattr__(self, "tokens", tuple(self.tokens))

    def start(self, run: Run) -> _DisruptListener:
        """A listener that applies the edit and records what it selected."""
        return _DisruptListener(self, run)


def controls(k: int, draws: int = 1, **window: Any) -> dict[str, list[list[Disrupt]]]:
    """The disruption of the massive channels and all that it must be held against, as lists of edits by name.

    Args:
        k: number of massive channels.
        draws: how many random draws of each control that has some; average over them.
        window: fields of ``Window`` for every edit.

    Returns:
        "top" and "bottom" k; "random" k, the top k excluded; "equal energy", so many random channels as hold the top k's
        energy; "equal norm", the same norm taken from every token in a random subspace.
    """
    seeds = range(draws)
    return {
        "top": [[Disrupt(TopK(k), **window)]],
        "bottom": [[Disrupt(BottomK(k), **window)]],
        "random": [[Disrupt(RandomK(k, seed=s, without_top=k), **window)] for s in seeds],
        "equal energy": [[Disrupt(EnergyMatched(k, seed=s), **window)] for s in seeds],
        "equal norm": [[Disrupt(TopK(k), mode="rotate", seed=s, **window)] for s in seeds],
    }


class _DisruptListener(_Listener):
    writes = True
    record: Disrupt

    def __call__(self, event: Event, x: Tensor) -> None:
        if not self.record.covers(event):
            return
        tokens = self.record.tokens
        if tokens is not None and not 0 <= min(tokens) <= max(tokens) < x.shape[1]:
            raise ValueError(
                f"Tokens {min(tokens)} to {max(tokens)} were to be disrupted; this run has tokens 0 to {x.shape[1] - 1}."
            )
        mask = self.record.channels.mask(x, event.layer)
        if tokens is None:
            self._change(x, x, mask, event.layer)
        else:
            part = x[:, list(tokens)]
            self._change(part, x, mask, event.layer)
            x[:, list(tokens)] = part
        self.keep("mask", (event.step, event.branch, event.layer), mask)

    def _change(self, part: Tensor, x: Tensor, mask: Tensor, layer: int) -> None:
        """Change ``part``, the disrupted tokens of ``x``, in place; rules see all tokens."""
        mode, chosen = self.record.mode, mask[:, None]
        if mode == "zero":
            part.masked_fill_(chosen, 0)
        elif mode == "mean":
            part.copy_(part.float().mean(1, keepdim=True).to(part.dtype).where(chosen, part))
        elif mode == "scale":
            part.copy_((part * self.record.factor).where(chosen, part))
        else:
            ids = self.record.channels.ids(x, layer)
            frame = random_frame(x.shape[2], ids.shape[1], self.record.seed, layer).to(part.device)
            removed = part.float().gather(2, ids[:, None].expand(-1, part.shape[1], -1))
            part.sub_((removed @ frame.T).to(part.dtype))

    def dataset(self) -> xr.Dataset:
        import xarray as xr

        mask = self._assemble("mask", ("channel",))
        return xr.Dataset() if mask is None else xr.Dataset({"mask": mask})
