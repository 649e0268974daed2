"""What can be written during a generation. Edits are frozen dataclasses; they change the named entries alone, in place.

Several edits of one call are applied in the given order, each to what the one before has left.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, ClassVar

import numpy as np

from . import channels
from .cache import describe
from .channels import Rule, TopK, random_frame
from .generation import Generation, check_pictures
from .records import HiddenStates, Run, Window, _Listener, name_of

if TYPE_CHECKING:
    import xarray as xr
    from torch import Tensor

    from .hooks import Event

MODES = ("zero", "mean", "scale", "rotate")
WHOSE = ("source", "target", "union")
ROUTES = ("noise", "inversion")


@dataclass(frozen=True)
class Disrupt(Window):
    """Destroy what the selected channels carry (MAs-DiT, arXiv 2605.13974, disruption probe).

    By default in every token, at the output of every block, at every step and in every branch; the fields of ``Window``
    restrict it. Recorded are the resolved selection, ``mask`` (sample, step, branch, layer, channel), and the ``amount``
    (sample, step, branch, layer) that was changed: the squared norm of the change of a token, the mean over all tokens.

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
        Those of ``channels.controls``, and "equal norm", the same norm taken from every token in a random subspace.
    """
    found = {name: [[Disrupt(rule, **window)] for rule in rules] for name, rules in channels.controls(k, draws).items()}
    return found | {"equal norm": [[Disrupt(TopK(k), mode="rotate", seed=s, **window)] for s in range(draws)]}


class _EditListener(_Listener):
    """Knows which samples of the run are in the batch."""

    writes = True

    def __init__(self, record: Window, run: Run) -> None:
        super().__init__(record, run)
        self._done, self._size = 0, 0
        _check_number("amounts", record.channels.samples or 1, run)

    def rows(self, held: int, count: int) -> slice:
        """The rows of this batch of what was given once for all, or once a sample."""
        self._size = count
        return slice(None) if held == 1 else slice(self._done, self._done + count)

    def rule(self, event: Event, count: int) -> Rule:
        """The record's rule for the samples of this batch."""
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
                f"Tokens {min(tokens)} to {max(tokens)} were to be disrupted; this run has tokens 0 to {x.shape[1] - 1}."
            )
        rule, before, change = self.rule(event, len(x)), x.clone(), None
        if rule.weighs:
            changed = x.clone()
            self._apply(changed, x.new_ones(x.shape[0], x.shape[2], dtype=bool), event.layer)
            change = x - changed
        mask = rule.mask(x, event.layer, change)
        self._apply(x, mask, event.layer)
        site = event.step, event.branch, event.layer
        self.keep("mask", site, mask)
        self.keep("amount", site, _amount(before, x))

    def _apply(self, x: Tensor, mask: Tensor, layer: int) -> None:
        """Change the selected channels of ``x`` in place, in the record's tokens."""
        if self.record.tokens is None:
            self._change(x, x, mask, layer)
        else:
            part = x[:, list(self.record.tokens)]
            self._change(part, x, mask, layer)
            x[:, list(self.record.tokens)] = part

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

        found = {name: self._assemble(name, dims) for name, dims in (("mask", ("channel",)), ("amount", ()))}
        return xr.Dataset({n: v for n, v in found.items() if v is not None})


@dataclass(frozen=True, eq=False)
class Pictures:
    """Real pictures as the source of a transport. How a picture becomes activations is ours: the paper does not say.

    Attributes:
        images: uint8 (n, height, width, 3), of the size of the generation; one for all targets, or one a target.
        prompts: what they show, one for all or one a picture; "" is allowed.
        route: "noise": at every step the model reads ``(1 - sigma) * picture + sigma * noise`` with the target's own noise.
            "inversion": it reads the point at sigma of the path that leads from the picture back to noise, found by Euler
            steps of the same flow upwards, without guidance.
    """

    version: ClassVar[int] = 1

    images: np.ndarray
    prompts: tuple[str, ...] = ("",)
    route: str = "noise"

    def __post_init__(self) -> None:
        prompts = (self.prompts,) if isinstance(self.prompts, str) else tuple(self.prompts)
        object.__setattr__(self, "prompts", prompts)
        check_pictures(self.images)
        if len(prompts) not in (1, len(self.images)):
            raise ValueError(
                f"{len(self.images)} pictures but {len(prompts)} prompts were given; give one, or one a picture."
            )
        if self.route not in ROUTES:
            raise ValueError(f"Route '{self.route}' is unknown; use {' or '.join(ROUTES)}.")


@dataclass(frozen=True, eq=False)
class Recorded:
    """Selected channels of a source, recorded once: ``values`` (sample, step, branch, layer, token, rank), their ``ids``.

    ``sigmas`` of all steps of its run and the fingerprint of its ``weights`` tell whether it fits another run.
    """

    version: ClassVar[int] = 1

    values: np.ndarray
    ids: np.ndarray
    steps: tuple[int, ...]
    branches: tuple[str, ...]
    layers: tuple[int, ...]
    sigmas: tuple[float, ...]
    weights: str

    @classmethod
    def of(cls, source: Generation, rule: Rule, window: Window) -> Recorded:
        """What ``HiddenStates(channels=rule)`` has recorded in a generation, at the stream and point of a window.

        Raises:
            ValueError: the generation holds no such record.
        """
        wanted, number = {"channels": describe(rule), "stream": window.stream, "point": window.point, "tokens": None}, 1
        for item in source.provenance["call"]["record"]:
            if item["type"] != "HiddenStates":
                continue
            if all(item[name] == value for name, value in wanted.items()):
                break
            number += 1
        else:
            raise ValueError(
                f"The source holds no hidden states of {rule}; generate it with record=[HiddenStates(channels={rule})]."
            )
        data = getattr(source.records, name_of(HiddenStates()) + (f"_{number}" if number > 1 else ""))
        places = (tuple(data[name].values.tolist()) for name in ("step", "branch", "layer"))
        origin = tuple(source.provenance["sigmas"]), source.provenance["weights"]
        return cls(data.value.values, data.channel_id.values, *places, *origin)

    def __len__(self) -> int:
        return len(self.values)


@dataclass(frozen=True, eq=False)
class Transport(Window):
    """Carry a source's activations into the target's: ``X_t <- X_t (1 - M) + X_s M`` (MAs-DiT, arXiv 2605.13974).

    ``M = strength * p m^T`` with p the mask of tokens and m that of channels. By default at the output of every block, at
    every step and in every branch; the fields of ``Window`` restrict it. What was chosen is recorded: ``mask`` (sample,
    step, branch, layer, channel) and, where they are not all, ``tokens`` (sample, step, branch, layer, token); and the
    ``amount`` that was changed, as by ``Disrupt``.

    Source and target travel in one batch, in step by construction, and share the target's noise. A ``Generation`` that has
    recorded ``HiddenStates(channels=<the same rule>)`` is replayed instead: it costs nothing but the copying, and keeps its
    own noise. Where the target's own scores or foreground are asked for, the undisturbed target travels along as well: after
    the first transport the target's states hold the source's.

    Attributes:
        channels: a rule such as ``TopK(8)``.
        source: a prompt for all targets or one a target; ``Pictures``; or a ``Generation``.
        mask: which tokens. None: all. "source" | "target" | "union": the foreground of these, by two-means at the very site
            (the cluster that fills less of the border). Or numbers in [0, 1], (tokens,), (rows, columns), or one of these a
            sample.
        mask_channels: the rule in whose channels two-means is done; None for ``channels``.
        whose: whose scores choose the channels: "source", "target", or "union" of both choices.
        strength: from 0, which changes nothing, to 1, the paper's swap.
        seeds: of the source's noise, one for all or one a target; None shares each target's.
    """

    version: ClassVar[int] = 2

    channels: Rule
    source: str | Sequence[str] | Pictures | Recorded | Generation
    mask: str | np.ndarray | None = None
    whose: str = "source"
    strength: float = 1.0
    seeds: tuple[int, ...] | None = None
    mask_channels: Rule | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        _check_rule(self)
        if self.whose not in WHOSE:
            raise ValueError(f"whose='{self.whose}' is unknown; use one of {', '.join(WHOSE)}.")
        _check_strength(self.strength)
        if isinstance(self.mask, str) and self.mask not in WHOSE:
            raise ValueError(f"mask='{self.mask}' is unknown; use one of {', '.join(WHOSE)}, None, or an array.")
        if isinstance(self.mask, str) and self.stream != "image":
            raise ValueError(f"mask='{self.mask}' needs places in the picture; text tokens have none, so leave mask=None.")
        if self.mask is not None and not isinstance(self.mask, str):
            mask = np.asarray(self.mask, dtype=np.float32)
            object.__setattr__(self, "mask", mask)
            if not ((mask >= 0) & (mask <= 1)).all():
                raise ValueError("The mask holds numbers outside [0, 1]; give booleans, or numbers from 0 to 1.")
        if isinstance(self.seeds, int):
            object.__setattr__(self, "seeds", (self.seeds,))
        source = self.source
        if isinstance(source, Generation):
            source = Recorded.of(source, self.channels, self)
        elif not isinstance(source, (Pictures, Recorded)):
            source = (source,) if isinstance(source, str) else source
            if not isinstance(source, Sequence) or not all(isinstance(s, str) for s in source):
                raise TypeError(
                    f"source is {type(self.source).__name__}; give a prompt or a list of them, Pictures(...) around "
                    "pictures, or a Generation."
                )
            source = tuple(source)
        object.__setattr__(self, "source", source)
        elsewhere = self.mask in ("source", "union") if isinstance(self.mask, str) else False
        if isinstance(source, Recorded) and (
            self.whose != "source" or (elsewhere and self.mask_channels not in (None, self.channels))
        ):
            raise ValueError(
                "A recorded source holds the channels that its own rule chose, and no others; with whose= or mask_channels= "
                "give a prompt or pictures."
            )
        if isinstance(source, Recorded) and self.seeds is not None:
            raise ValueError("A recorded source has its own noise; leave seeds=None, or give a prompt or pictures.")

    @property
    def companions(self) -> tuple[str, ...]:
        """Who travels with the target: the "source", unless it was recorded, and the undisturbed "target", where needed."""
        source = () if isinstance(self.source, Recorded) else ("source",)
        asked = {self.whose, self.mask if isinstance(self.mask, str) else "source"}
        return source if asked == {"source"} else (*source, "target")

    @property
    def prompts(self) -> tuple[str, ...]:
        """Of a paired source."""
        return self.source.prompts if isinstance(self.source, Pictures) else self.source

    def start(self, run: Run) -> _TransportListener:
        """A listener that applies the edit and records what it selected."""
        count = len(self.source.images) if isinstance(self.source, Pictures) else len(self.source)
        _check_number("sources", count, run)
        _check_number("source seeds", len(self.seeds or (0,)), run)
        if isinstance(self.source, Recorded) and len(self.source.sigmas) != run.steps:
            raise ValueError(
                f"The source was recorded in {len(self.source.sigmas)} steps and this run has {run.steps}; use as many."
            )
        return _TransportListener(self, run)


@dataclass(frozen=True, eq=False, kw_only=True)
class Interpolate(Window):
    """Interpolate the prompt's embeddings between target and source, the plain baseline of a transport.

    ``(1 - strength) * target + strength * source`` of everything that carries the prompt into the transformer. Where a model
    masks the padding of its prompts, the tokens of both prompts are seen, even at strength 1.

    Attributes:
        source: a prompt for all targets, or one a target.
        strength: from 0 (the target's prompt) to 1 (the source's).
    """

    version: ClassVar[int] = 1
    points: ClassVar[tuple[str, ...]] = ("prompt",)
    companions: ClassVar[tuple[str, ...]] = ("source",)
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
        """Of the source."""
        return self.source

    def start(self, run: Run) -> _InterpolateListener:
        """A listener that applies the edit."""
        _check_number("sources", len(self.source), run)
        return _InterpolateListener(self, run)


def _amount(before: Tensor, after: Tensor) -> Tensor:
    """Squared norm of the change of a token, mean over the tokens: (B, tokens, channels) twice -> (B,), float32."""
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


class _InterpolateListener(_Listener):
    writes = True
    record: Interpolate

    def __init__(self, record: Interpolate, run: Run) -> None:
        super().__init__(record, run)
        self.groups: dict[str, int] = {}

    def needs(self, step: int, branch: str) -> bool:
        """Only the source's prompt is read, which is there before a call."""
        return False

    def __call__(self, event: Event, x: Tensor, companions: dict[str, Tensor]) -> None:
        if not self.record.covers(event) or not self.record.strength:
            return
        if event.gate.endswith("mask"):
            x.copy_(x.maximum(companions["source"]))
        else:
            x.lerp_(companions["source"], self.record.strength)

    def dataset(self) -> xr.Dataset:
        import xarray as xr

        return xr.Dataset()


class _TransportListener(_EditListener):
    record: Transport

    def __init__(self, record: Transport, run: Run) -> None:
        super().__init__(record, run)
        self.groups: dict[str, int] = {}  # which companions of the batch are "source" and "target"
        self._given: Tensor | None = None

    def needs(self, step: int, branch: str) -> bool:
        """A prompt's source draws its own picture until it is last read; pictures are given anew at every step."""
        if isinstance(self.record.source, Pictures) and "target" not in self.groups:
            return self.record.reaches(step, branch)
        return self.record.steps is None or step <= max(self.record.steps)

    def __call__(self, event: Event, x: Tensor, companions: dict[str, Tensor]) -> None:
        if not self.record.covers(event):
            return
        rule, whose, site = self.rule(event, len(x)), self.record.whose, (event.step, event.branch, event.layer)
        if "source" in companions:
            source, mask, values = companions["source"], None, None
        else:
            source, mask, values = self._recorded(event, x)
        tokens = self._tokens(event, x, {**companions, "source": source}, values)
        if mask is None:
            change = (source - x) * self.record.strength if rule.weighs else None
            if rule.weighs and tokens is not None:
                change = change * tokens[..., None]
            masks = [rule.mask(s, event.layer, change) for name, s in companions.items() if whose in (name, "union")]
            mask = masks[0] | masks[-1]
        weight = mask[:, None] if tokens is None else mask[:, None] * tokens[..., None]
        if self.record.strength == 1 and weight.dtype == mask.dtype:
            moved = source.where(weight, x)
        else:
            moved = x.lerp(source, (weight * self.record.strength).to(x.dtype))
        self.keep("amount", site, _amount(x, moved))
        x.copy_(moved)
        self.keep("mask", site, mask)
        if tokens is not None:
            self.keep("tokens", site, tokens)

    def _tokens(self, event: Event, x: Tensor, states: dict[str, Tensor], values: Tensor | None) -> Tensor | None:
        """The mask of tokens: None for all, boolean (B, tokens) by two-means, or the given numbers."""
        wanted, rule = self.record.mask, self.record.mask_channels or self.record.channels
        if wanted is None:
            return None
        if not isinstance(wanted, str):
            return self._given_tokens(wanted, x)
        from .spatial import figure_masks, min_max, subspace, token_grid

        grid, masks = token_grid(x.shape[1], *self.run.size), []
        for name in ("source", "target"):
            if wanted in (name, "union"):
                replayed = name == "source" and values is not None
                points = min_max(values) if replayed else subspace(states[name], rule, event.layer)[0]
                masks.append(figure_masks(points, grid))
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
        """The target with the source's channels put in, their mask, and their values (B, tokens, k)."""
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

        axes = {"mask": ("channel",), "tokens": ("token",), "amount": ()}
        found = {name: self._assemble(name, dims) for name, dims in axes.items()}
        return xr.Dataset({n: v for n, v in found.items() if v is not None})
