"""Edits: what can be written into hidden states and prompts during a generation."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, ClassVar

import numpy as np

from .generation import Generation
from .rules import Rule, random_frame
from .sources import Images, Recorded
from .window import BaseListener, Run, Window

if TYPE_CHECKING:
    import xarray as xr
    from torch import Tensor

    from .hooks import Event


MODES = ("zero", "mean", "scale", "rotate")


SELECT_ON = ("source", "target", "union")


@dataclass(frozen=True)
class Disrupt(Window):
    """Remove what the selected channels carry (MAs-DiT, arXiv 2605.13974, disruption).

    By default in every token, at the output of every block, at every step and in every branch; the fields of ``Window``
    restrict it. Recorded are the selection, ``mask`` (sample, step, branch, layer, channel), and the ``dose`` (sample,
    step, branch, layer): the squared norm changed per token, mean over all tokens.

    Attributes:
        channels: a selection rule such as ``TopK(8)``; it sees the hidden states just before they change.
        mode: what replaces the selected entries. "zero": 0. "mean": the channel's mean over the disrupted tokens, which
            removes the differences between tokens only. "scale": ``factor`` times themselves. "rotate": the entries
            stay; in every token, a vector of the norm that "zero" would remove is subtracted in a random subspace of as
            many dimensions (the norm-matched control; it needs a selection rule with a fixed k).
        factor: of mode "scale"; 1 changes nothing, 0 equals mode "zero".
        tokens: token indices to change; None for all.
        seed: of the random subspace; each layer has its own draw, the same for all samples and steps.
    """

    version: ClassVar[int] = 3

    channels: Rule
    mode: str = "zero"
    factor: float = 0.0
    tokens: tuple[int, ...] | None = None
    seed: int = 0

    def __post_init__(self) -> None:
        super().__post_init__()
        _check_rule(self)
        if self.mode not in MODES:
            raise ValueError(f"Mode '{self.mode}' is unknown; use {', '.join(MODES)}.")
        if self.tokens is not None:
            object.__setattr__(self, "tokens", tuple(self.tokens))

    def start(self, run: Run) -> _DisruptListener:
        """Return a listener that applies the edit and records what it selected."""
        return _DisruptListener(self, run)


class _EditListener(BaseListener):
    """Base class of listeners that know which samples of the call are in the batch."""

    writes = True

    def __init__(self, record: Window, run: Run) -> None:
        super().__init__(record, run)
        self._done, self._size = 0, 0
        _check_number("doses", record.channels.samples or 1, run)

    def rows(self, given: int, count: int) -> slice:
        """Return the rows of this batch among ``given`` values: one for all samples, or one for each."""
        self._size = count
        return slice(None) if given == 1 else slice(self._done, self._done + count)

    def rule(self, event: Event, count: int) -> Rule:
        """Return the edit's selection rule for the samples of this batch."""
        rule = self.record.channels
        return rule.at(event.step, event.branch, self.rows(rule.samples or 1, count))

    def flush(self) -> None:
        super().flush()
        self._done += self._size


class _DisruptListener(_EditListener):
    record: Disrupt

    def __call__(self, event: Event, x: Tensor) -> None:
        if not self.record.covers(event):
            return
        tokens = self.record.tokens
        if tokens is not None and not 0 <= min(tokens) <= max(tokens) < x.shape[1]:
            raise ValueError(
                f"Tokens {min(tokens)} to {max(tokens)} exceed this run, which has tokens 0 to {x.shape[1] - 1}; choose "
                "among these."
            )
        rule, before, change = self.rule(event, len(x)), x.clone(), None
        if rule.uses_change:
            changed = x.clone()
            self._apply(changed, x.new_ones(x.shape[0], x.shape[2], dtype=bool), event.layer)
            change = x - changed
        mask = rule.mask(x, event.layer, change)
        self._apply(x, mask, event.layer)
        site = event.step, event.branch, event.layer
        self.keep("mask", site, mask)
        self.keep("dose", site, _dose(before, x))

    def _apply(self, x: Tensor, mask: Tensor, layer: int) -> None:
        """Change the selected channels of ``x`` in place, in the edit's tokens."""
        if self.record.tokens is None:
            self._change(x, x, mask, layer)
        else:
            part = x[:, list(self.record.tokens)]
            self._change(part, x, mask, layer)
            x[:, list(self.record.tokens)] = part

    def _change(self, part: Tensor, x: Tensor, mask: Tensor, layer: int) -> None:
        """Change ``part``, the disrupted tokens of ``x``, in place; selection rules see all tokens."""
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

        found = {name: self._assemble(name, dims) for name, dims in (("mask", ("channel",)), ("dose", ()))}
        return xr.Dataset({n: v for n, v in found.items() if v is not None})


@dataclass(frozen=True, eq=False)
class Transport(Window):
    """Replace activations of the target by a source's: ``X_t <- X_t (1 - M) + X_s M`` (MAs-DiT, arXiv 2605.13974).

    ``M = strength * p m^T`` with p the mask of tokens and m that of channels. By default at the output of every block,
    at every step and in every branch; the fields of ``Window`` restrict it. Recorded are ``mask`` (sample, step, branch,
    layer, channel), ``tokens`` (sample, step, branch, layer, token) where not all tokens are replaced, and the ``dose``,
    as by ``Disrupt``.

    Source and target are batched together, so that they are at the same step, and share the target's noise. A
    ``Generation`` with a record ``HiddenStates(channels=<the same rule>)`` is replayed instead: it costs only the
    copying and keeps its own noise. Where the target's own scores or foreground are needed, the unedited target is
    appended to the batch as well, because after the first transport the target's states contain the source's.

    Attributes:
        channels: a selection rule such as ``TopK(8)``.
        source: a prompt for all targets, or one for each; ``Images``; or a ``Generation``.
        mask: which tokens. None: all. "source" | "target" | "union": their foreground by two-means at the same site (the
            cluster that fills less of the border). Or numbers in [0, 1] of shape (tokens,) or (rows, columns), for all
            samples or one for each.
        mask_channels: selection rule of the channels for two-means; None for ``channels``.
        select_on: the states whose scores select the channels: "source", "target", or "union" of both selections.
        strength: from 0, which changes nothing, to 1, the paper's replacement.
        seeds: of the source's noise, one for all targets or one for each; None shares each target's.
    """

    version: ClassVar[int] = 2

    channels: Rule
    source: str | Sequence[str] | Images | Recorded | Generation
    mask: str | np.ndarray | None = None
    select_on: str = "source"
    strength: float = 1.0
    seeds: tuple[int, ...] | None = None
    mask_channels: Rule | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        _check_rule(self)
        if self.select_on not in SELECT_ON:
            raise ValueError(f"select_on='{self.select_on}' is unknown; use {', '.join(SELECT_ON)}.")
        _check_strength(self.strength)
        if isinstance(self.mask, str) and self.mask not in SELECT_ON:
            raise ValueError(f"mask='{self.mask}' is unknown; use {', '.join(SELECT_ON)}, None, or an array.")
        if isinstance(self.mask, str) and self.stream != "image":
            raise ValueError(f"mask='{self.mask}' needs positions in the image; text tokens have none, so omit mask.")
        if self.mask is not None and not isinstance(self.mask, str):
            mask = np.asarray(self.mask, dtype=np.float32)
            object.__setattr__(self, "mask", mask)
            if not ((mask >= 0) & (mask <= 1)).all():
                raise ValueError("The mask contains numbers outside [0, 1]; give booleans, or numbers from 0 to 1.")
        if isinstance(self.seeds, int):
            object.__setattr__(self, "seeds", (self.seeds,))
        source = self.source
        if isinstance(source, Generation):
            source = Recorded.of(source, self.channels, self)
        elif not isinstance(source, (Images, Recorded)):
            source = (source,) if isinstance(source, str) else source
            if not isinstance(source, Sequence) or not all(isinstance(s, str) for s in source):
                raise TypeError(
                    f"source is {type(self.source).__name__}; give a prompt or a list of them, Images(...) around "
                    "images, or a Generation."
                )
            source = tuple(source)
        object.__setattr__(self, "source", source)
        elsewhere = self.mask in ("source", "union") if isinstance(self.mask, str) else False
        if isinstance(source, Recorded) and (
            self.select_on != "source" or (elsewhere and self.mask_channels not in (None, self.channels))
        ):
            raise ValueError(
                "A recorded source contains only the channels that its own selection rule chose; with select_on= or "
                "mask_channels= give a prompt or images."
            )
        if isinstance(source, Recorded) and self.seeds is not None:
            raise ValueError("A recorded source has its own noise; omit seeds, or give a prompt or images.")

    @property
    def auxiliary(self) -> tuple[str, ...]:
        """Auxiliary samples: the "source", unless it was recorded, and the unedited "target", where needed."""
        source = () if isinstance(self.source, Recorded) else ("source",)
        asked = {self.select_on, self.mask if isinstance(self.mask, str) else "source"}
        return source if asked == {"source"} else (*source, "target")

    @property
    def prompts(self) -> tuple[str, ...]:
        """Prompts of the auxiliary source."""
        return self.source.prompts if isinstance(self.source, Images) else self.source

    def start(self, run: Run) -> _TransportListener:
        """Return a listener that applies the edit and records what it selected."""
        count = len(self.source.images) if isinstance(self.source, Images) else len(self.source)
        _check_number("sources", count, run)
        _check_number("source seeds", len(self.seeds or (0,)), run)
        if isinstance(self.source, Recorded) and len(self.source.sigmas) != run.steps:
            raise ValueError(
                f"The source was recorded in {len(self.source.sigmas)} steps and this run has {run.steps}; use as many."
            )
        return _TransportListener(self, run)


@dataclass(frozen=True, eq=False, kw_only=True)
class Interpolate(Window):
    """Interpolate the prompt's embeddings between target and source: the plain baseline of a transport.

    ``(1 - strength) * target + strength * source`` of everything that carries the prompt into the transformer. Where a
    model masks the padding of its prompts, the tokens of both prompts are visible, even at strength 1.

    Attributes:
        source: a prompt for all targets, or one for each.
        strength: from 0 (the target's prompt) to 1 (the source's).
    """

    version: ClassVar[int] = 1
    points: ClassVar[tuple[str, ...]] = ("prompt",)
    auxiliary: ClassVar[tuple[str, ...]] = ("source",)
    seeds: ClassVar[None] = None

    source: str | Sequence[str]
    strength: float = 0.5
    stream: str = field(default="text", init=False)
    point: str = field(default="prompt", init=False)
    layers: None = field(default=None, init=False)

    def __post_init__(self) -> None:
        super().__post_init__()
        _check_strength(self.strength)
        object.__setattr__(self, "source", (self.source,) if isinstance(self.source, str) else tuple(self.source))

    @property
    def prompts(self) -> tuple[str, ...]:
        """Prompts of the auxiliary source."""
        return self.source

    def start(self, run: Run) -> _InterpolateListener:
        """Return a listener that applies the edit."""
        _check_number("sources", len(self.source), run)
        return _InterpolateListener(self, run)


def _dose(before: Tensor, after: Tensor) -> Tensor:
    """Return the squared norm changed per token, mean over the tokens: (B, tokens, channels) twice -> (B,), float32."""
    return (after.float() - before.float()).square().sum(2).mean(1)


def _check_rule(edit: Disrupt | Transport) -> None:
    if not isinstance(edit.channels, Rule):
        name = type(edit).__name__
        raise TypeError(f"{name} was given {edit.channels!r}; give it a rule such as TopK(8) or Channels((3, 7)).")


def _check_strength(strength: float) -> None:
    if not 0 <= strength <= 1:
        raise ValueError(f"strength is {strength}; it must lie between 0 and 1.")


def _check_number(name: str, found: int, run: Run) -> None:
    if found not in (1, run.samples):
        raise ValueError(f"{found} {name} were given for {run.samples} prompts; give one for all, or one a prompt.")


class _InterpolateListener(BaseListener):
    writes = True
    record: Interpolate

    def __init__(self, record: Interpolate, run: Run) -> None:
        super().__init__(record, run)
        self.groups: dict[str, int] = {}

    def needs(self, step: int, branch: str) -> bool:
        """Return False: only the source's prompt is read, which is known before a call."""
        return False

    def __call__(self, event: Event, x: Tensor, auxiliary: dict[str, Tensor]) -> None:
        if not self.record.covers(event) or not self.record.strength:
            return
        if event.gate.endswith("mask"):
            x.copy_(x.maximum(auxiliary["source"]))
        else:
            x.lerp_(auxiliary["source"], self.record.strength)

    def dataset(self) -> xr.Dataset:
        import xarray as xr

        return xr.Dataset()


class _TransportListener(_EditListener):
    record: Transport

    def __init__(self, record: Transport, run: Run) -> None:
        super().__init__(record, run)
        self.groups: dict[str, int] = {}  # which auxiliary of the batch are "source" and "target"
        self._given: Tensor | None = None

    def needs(self, step: int, branch: str) -> bool:
        """Return whether a call needs the source: a prompt's is generated along, given images enter at every step."""
        if isinstance(self.record.source, Images) and "target" not in self.groups:
            return self.record.reaches(step, branch)
        return self.record.steps is None or step <= max(self.record.steps)

    def __call__(self, event: Event, x: Tensor, auxiliary: dict[str, Tensor]) -> None:
        if not self.record.covers(event):
            return
        rule, select_on, site = self.rule(event, len(x)), self.record.select_on, (event.step, event.branch, event.layer)
        if "source" in auxiliary:
            source, mask, values = auxiliary["source"], None, None
        else:
            source, mask, values = self._recorded(event, x)
        tokens = self._tokens(event, x, {**auxiliary, "source": source}, values)
        if mask is None:
            change = (source - x) * self.record.strength if rule.uses_change else None
            if rule.uses_change and tokens is not None:
                change = change * tokens[..., None]
            masks = [rule.mask(s, event.layer, change) for name, s in auxiliary.items() if select_on in (name, "union")]
            mask = masks[0] | masks[-1]
        weight = mask[:, None] if tokens is None else mask[:, None] * tokens[..., None]
        if self.record.strength == 1 and weight.dtype == mask.dtype:
            moved = source.where(weight, x)
        else:
            moved = x.lerp(source, (weight * self.record.strength).to(x.dtype))
        self.keep("dose", site, _dose(x, moved))
        x.copy_(moved)
        self.keep("mask", site, mask)
        if tokens is not None:
            self.keep("tokens", site, tokens)

    def _tokens(self, event: Event, x: Tensor, states: dict[str, Tensor], values: Tensor | None) -> Tensor | None:
        """Return the mask of tokens: None for all, boolean (B, tokens) by two-means, or the given numbers."""
        wanted, rule = self.record.mask, self.record.mask_channels or self.record.channels
        if wanted is None:
            return None
        if not isinstance(wanted, str):
            return self._given_tokens(wanted, x)
        from .spatial import foreground_masks, min_max, subspace, token_grid

        grid, masks = token_grid(x.shape[1], *self.run.size), []
        for name in ("source", "target"):
            if wanted in (name, "union"):
                replayed = name == "source" and values is not None
                points = min_max(values) if replayed else subspace(states[name], rule, event.layer)[0]
                masks.append(foreground_masks(points, grid))
        return masks[0] | masks[-1]

    def _given_tokens(self, wanted: np.ndarray, x: Tensor) -> Tensor:
        import torch

        from .spatial import token_grid

        if self._given is None:
            one = [(x.shape[1],)] + ([token_grid(x.shape[1], *self.run.size)] if self.record.stream == "image" else [])
            allowed = one + [(self.run.samples, *shape) for shape in one]
            if wanted.shape not in allowed:
                raise ValueError(
                    f"The mask has shape {wanted.shape}, but this run's tokens have {' or '.join(map(str, one))}; give one "
                    "of these, or one a sample."
                )
            whole = np.isin(wanted, (0, 1)).all()
            mask = torch.from_numpy(wanted.astype(bool) if whole else wanted)
            self._given = mask.reshape(-1, x.shape[1]).to(x.device)
        return self._given[self.rows(len(self._given), len(x))].expand(len(x), -1)

    def _recorded(self, event: Event, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Return the target with the source's channels, their mask, and their values (B, tokens, k)."""
        import torch

        known = self.record.source
        try:
            place = tuple(
                names.index(name)
                for names, name in ((known.steps, event.step), (known.branches, event.branch), (known.layers, event.layer))
            )
        except ValueError:
            raise ValueError(
                f"The source was not recorded at step {event.step}, branch {event.branch}, layer {event.layer}; record it "
                "there, with the same guidance, or narrow the transport's window."
            ) from None
        if known.values.shape[4] != x.shape[1]:
            raise ValueError(f"The source has {known.values.shape[4]} tokens and the target {x.shape[1]}; use equal sizes.")
        here = (self.rows(len(known), len(x)), *place)  # one small copy a site: the whole record may not fit the device
        values = torch.from_numpy(known.values[here]).to(x.device, x.dtype).expand(len(x), -1, -1)
        ids = torch.from_numpy(known.ids[here]).to(x.device).long().expand(len(x), -1)
        mask = torch.zeros(len(x), x.shape[2], dtype=torch.bool, device=x.device).scatter_(1, ids, True)
        return x.scatter(2, ids[:, None].expand(-1, x.shape[1], -1), values), mask, values

    def dataset(self) -> xr.Dataset:
        import xarray as xr

        axes = {"mask": ("channel",), "tokens": ("token",), "dose": ()}
        found = {name: self._assemble(name, dims) for name, dims in axes.items()}
        return xr.Dataset({n: v for n, v in found.items() if v is not None})
