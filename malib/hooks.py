"""The only room that touches torch hooks. It turns module calls into events and leaves the model as it found it.

An event says where a tensor was seen: denoising step, guidance branch, layer (index over all block stacks in execution
order), stream and point. Steps are counted by the scheduler's own ``step``; branches come from ``cache_context`` where the
pipeline names them, otherwise from the family's row; a batched call is cut into its branches.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, ExitStack
from dataclasses import dataclass, replace
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from .families import BRANCHES, Family, Gate, Stack


@dataclass(frozen=True)
class Block:
    """One transformer block: ``layer`` counts over all stacks, ``name`` is e.g. "single 3"."""

    layer: int
    name: str
    module: nn.Module
    stack: Stack


@dataclass(frozen=True)
class Event:
    """Where a tensor was seen.

    ``gate`` names the AdaLN gate when ``point`` is "gate", and "shift" or "scale" when it is "modulation". At the point
    "prompt" the tensors are what carries the prompt into the transformer, before any block: ``layer`` is -1 then, and
    ``gate`` the name of the argument. At the point "velocity" they are what the transformer predicts, and ``layer`` is -1,
    too.
    """

    step: int
    branch: str
    layer: int
    stream: str
    point: str
    gate: str = ""


class Listener(Protocol):
    """Reads, or writes in place, the tensors of the events it wants.

    One that has ``groups`` (numbers by name) is called with a third argument, the tensors of its companions by name: samples
    that travel behind the others in the same batch, group after group. All others never see companions. It also has
    ``needs(step, branch)``: whether it will read companions there, or later what the model makes of them there. Where no
    listener does, they are left out of the call (but for the point "prompt"), and get their samples' velocity.
    """

    writes: bool

    def wants(self, layer: int, stream: str, point: str) -> bool:
        """Asked once for each site before the run; hooks are registered for wanted sites alone."""

    def __call__(self, event: Event, x: Tensor) -> None:
        """``x`` is (samples, tokens, channels); (samples, channels) for a gate; of the latents' shape for the velocity."""


def blocks_of(transformer: nn.Module, family: Family) -> list[Block]:
    """All blocks in execution order."""
    found: list[Block] = []
    for stack in family.stacks:
        for index, module in enumerate(getattr(transformer, stack.attribute)):
            found.append(Block(len(found), f"{stack.label} {index}", module, stack))
    return found


class Tap(AbstractContextManager):
    """While entered, sends events of a pipeline's transformer to listeners; those that write come first.

    Args:
        pipeline: a diffusers pipeline with ``transformer`` and ``scheduler``.
        family: the transformer's row.
        samples: number of samples of the pipeline call, by which batched guidance is told from a plain batch.
        listeners: called in the given order, writers before readers.
        groups: how many groups of companions are among the samples, behind the others and as many each.
        tokens: number of image tokens, by which they are found in a tensor that holds text and image.

    Attributes:
        step: the denoising step.
        latents: what the scheduler's last step returned.

    Raises:
        RuntimeError: the transformer is compiled or a cache accelerator is on, which would hide or fake block outputs.
    """

    def __init__(
        self,
        pipeline: Any,
        family: Family,
        samples: int,
        listeners: Sequence[Listener],
        groups: int = 0,
        tokens: int = 0,
    ) -> None:
        self._pipeline, self._family, self._samples, self._tokens = pipeline, family, samples, tokens
        self._own = samples // (1 + groups)
        self._listeners = sorted(listeners, key=lambda listener: not listener.writes)
        self._undo = ExitStack()
        self._companioned = [listener for listener in listeners if getattr(listener, "groups", None)]
        self._calls, self._named, self._branches = 0, "", BRANCHES[:1]
        self._lengths, self._places = [samples], None  # samples of each branch in this call, and where all find theirs
        self.step, self.latents = 0, None

    def __enter__(self) -> Tap:
        transformer = self._pipeline.transformer
        _refuse_opaque(transformer)
        with ExitStack() as undo:
            self._replace(undo, self._pipeline.scheduler, "step", self._scheduler_step)
            if hasattr(transformer, "cache_context"):
                self._replace(undo, transformer, "cache_context", self._cache_context)
            undo.callback(transformer.register_forward_pre_hook(self._on_call, with_kwargs=True).remove)
            if wanted := self._wanting(-1, "text", "prompt"):
                hook = self._prompt_hook(wanted)
                undo.callback(transformer.register_forward_pre_hook(hook, with_kwargs=True).remove)
            if wanted := self._wanting(-1, "image", "velocity"):
                undo.callback(transformer.register_forward_hook(self._velocity_hook(wanted)).remove)
            if self._companioned:
                undo.callback(transformer.register_forward_pre_hook(self._leave_out, with_kwargs=True).remove)
                undo.callback(transformer.register_forward_hook(self._fill_in).remove)
            for block in blocks_of(transformer, self._family):
                self._tap_block(undo, block)
            self._undo = undo.pop_all()
        return self

    def __exit__(self, *error: object) -> None:
        self._undo.close()

    def begin(self, step: int) -> None:
        """Start a denoising step; the scheduler's ``step`` does this by itself."""
        self.step, self._calls = step, 0

    def _replace(self, undo: ExitStack, owner: Any, name: str, wrap: Callable) -> None:
        """Shadow a method on the instance; the shadow is removed, or an earlier one put back, on exit."""
        before = vars(owner).get(name)
        original = getattr(owner, name)
        object.__setattr__(owner, name, wrap(original))

        def restore() -> None:
            if before is None:
                vars(owner).pop(name, None)
            else:
                object.__setattr__(owner, name, before)

        undo.callback(restore)

    def _scheduler_step(self, original: Callable) -> Callable:
        @functools.wraps(original)  # pipelines look at its signature
        def step(*args: Any, **kwargs: Any) -> Any:
            result = original(*args, **kwargs)
            self.latents = result[0]
            self.begin(self.step + 1)
            return result

        return step

    def _cache_context(self, original: Callable) -> Callable:
        @functools.wraps(original)
        def cache_context(name: str, *args: Any, **kwargs: Any) -> Any:
            self._named = name
            return original(name, *args, **kwargs)

        return cache_context

    def _on_call(self, module: nn.Module, args: tuple, kwargs: dict[str, Any]) -> None:
        batch = len(args[0] if args else kwargs["hidden_states"])
        order = self._family.order
        if self._family.passes == "batched":
            self._branches = order if batch == len(order) * self._samples else BRANCHES[:1]
        else:
            self._branches = (self._named if self._named in BRANCHES else order[self._calls],)
        self._calls += 1
        self._lengths, self._places = [self._samples] * len(self._branches), None

    def _leave_out(self, module: nn.Module, args: tuple, kwargs: dict[str, Any]) -> tuple[tuple, dict] | None:
        """Take the companions that no one needs out of a call: they cost as much as any sample."""
        kept = [any(listener.needs(self.step, branch) for listener in self._companioned) for branch in self._branches]
        if all(kept):
            return None
        batch, rows, self._places = len(self._branches) * self._samples, [], []
        for number, keep in enumerate(kept):
            self._lengths[number] = length = self._samples if keep else self._own
            self._places += [len(rows) + i % length for i in range(self._samples)]
            rows += range(number * self._samples, number * self._samples + length)

        def take(name: str, x: Any) -> Any:
            if isinstance(x, dict):
                return {key: take(key, value) for key, value in x.items()}
            if isinstance(x, Tensor) and not (name.endswith("_ids") and x.ndim == 2):  # those are places of tokens
                return x[rows] if x.ndim and len(x) == batch else x
            return [x[row] for row in rows] if isinstance(x, list) and len(x) == batch else x

        return tuple(take("", x) for x in args), take("", kwargs)

    def _fill_in(self, module: nn.Module, args: tuple, output: Any) -> Any:
        """Give companions that were left out the velocity of their samples, so that the pipeline can go on."""
        if self._places is None:
            return None
        x = output[0]
        x = x[self._places] if isinstance(x, Tensor) else [x[place] for place in self._places]
        if isinstance(output, tuple):
            return (x, *output[1:])
        return replace(output, **{next(iter(output)): x})

    def _tap_block(self, undo: ExitStack, block: Block) -> None:
        stack = block.stack
        for stream, argument in stack.arguments.items():
            if wanted := self._wanting(block.layer, stream, "input"):
                hook = self._input_hook(block, stream, argument, wanted)
                undo.callback(block.module.register_forward_pre_hook(hook, with_kwargs=True).remove)
        for index, stream in enumerate(stack.returns):
            if wanted := self._wanting(block.layer, stream, "output"):
                hook = self._output_hook(block, stream, index, wanted)
                undo.callback(block.module.register_forward_hook(hook, with_kwargs=True).remove)
        for point, gates in (("gate", stack.gates), ("modulation", stack.modulation)):
            for gate in gates:
                if wanted := self._wanting(block.layer, gate.stream, point):
                    undo.callback(self._tap_gate(block, gate, point, wanted))

    def _wanting(self, layer: int, stream: str, point: str) -> list[Listener]:
        return [listener for listener in self._listeners if listener.wants(layer, stream, point)]

    def _send(self, wanted: list[Listener], x: Tensor, *site: Any) -> None:
        for branch, part in zip(self._branches, x.split(self._lengths), strict=True):
            event, (own, *companions) = Event(self.step, branch, *site), part.split(self._own)
            for listener in wanted:
                groups = getattr(listener, "groups", None)
                if groups is None:
                    listener(event, own)
                elif companions or not groups:
                    listener(event, own, {name: companions[number] for name, number in groups.items()})

    def _part(self, x: Tensor, stack: Stack, stream: str) -> Tensor:
        """The tokens of a stream, as a view where one tensor holds both streams."""
        if stack.joined is None:
            return x
        first = self._tokens if stack.joined == "image first" else x.shape[1] - self._tokens
        before = (stream == "image") == (stack.joined == "image first")
        return x[:, :first] if before else x[:, first:]

    def _prompt_hook(self, wanted: list[Listener]) -> Callable:
        def hook(module: nn.Module, args: tuple, kwargs: dict[str, Any]) -> tuple[tuple, dict]:
            changed = dict(kwargs)
            for name in self._family.conditioning:
                if (x := kwargs.get(name)) is not None:
                    changed[name] = x.clone()  # the pipeline holds on to it for the steps to come
                    self._send(wanted, changed[name], -1, "text", "prompt", name)
            return args, changed

        return hook

    def _velocity_hook(self, wanted: list[Listener]) -> Callable:
        def hook(module: nn.Module, args: tuple, output: Any) -> Any:
            x = output[0]
            if isinstance(x, Tensor):
                self._send(wanted, x, -1, "image", "velocity")
                return None
            stacked = torch.stack(x)  # Z-Image gives a list of samples
            self._send(wanted, stacked, -1, "image", "velocity")
            return (list(stacked.unbind()), *output[1:])

        return hook

    def _input_hook(self, block: Block, stream: str, argument: str, wanted: list[Listener]) -> Callable:
        position = list(dict.fromkeys(block.stack.arguments.values())).index(argument)
        writes = any(listener.writes for listener in wanted)

        def hook(module: nn.Module, args: tuple, kwargs: dict[str, Any]) -> tuple[tuple, dict] | None:
            x = kwargs[argument] if argument in kwargs else args[position]
            if writes:
                x = x.clone()  # the block before, or the pipeline, may still hold the tensor that enters
            self._send(wanted, self._part(x, block.stack, stream), block.layer, stream, "input")
            if not writes:
                return None
            if argument in kwargs:
                return args, {**kwargs, argument: x}
            return (*args[:position], x, *args[position + 1 :]), kwargs

        return hook

    def _output_hook(self, block: Block, stream: str, index: int, wanted: list[Listener]) -> Callable:
        argument = block.stack.arguments[stream]
        writes = any(listener.writes for listener in wanted)

        def hook(module: nn.Module, args: tuple, kwargs: dict[str, Any], output: Any) -> Any:
            x = output[index] if isinstance(output, tuple) else output
            if x is None:
                return None
            entering = kwargs.get(argument, args[0] if args else None)
            shared = writes and entering is not None and _same_storage(x, entering)
            if shared:  # a block that passes its input through: writing in place would reach further than this site
                x = x.clone()
            self._send(wanted, self._part(x, block.stack, stream), block.layer, stream, "output")
            if not shared:
                return None
            return (*output[:index], x, *output[index + 1 :]) if isinstance(output, tuple) else x

        return hook

    def _tap_gate(self, block: Block, gate: Gate, point: str, wanted: list[Listener]) -> Callable[[], None]:
        site = (block.layer, gate.stream, point, gate.name)
        parts = gate.parts
        if parts < 0:
            linear = block.module.get_submodule(gate.module)
            parts = linear.out_features // linear.in_features

        def send(x: Tensor) -> None:
            part = x.flatten(1).chunk(parts, dim=1)[gate.index] if parts else x
            self._send(wanted, part.tanh() if gate.tanh else part, *site)

        def before(module: nn.Module, args: tuple, kwargs: dict[str, Any]) -> None:
            if gate.argument:
                send(kwargs[gate.argument])
                return
            timestep = kwargs["timestep"] if "timestep" in kwargs else args[4]
            table = module.scale_shift_table
            send((table[None] + timestep.reshape(len(timestep), *table.shape))[:, gate.index])

        def after(module: nn.Module, args: tuple, output: Any) -> None:
            if parts:
                send(output)
            elif isinstance(output, tuple) and len(output) > gate.index:  # the last SD3 block has no text gates
                send(output[gate.index])

        if gate.module is None:
            return block.module.register_forward_pre_hook(before, with_kwargs=True).remove
        return block.module.get_submodule(gate.module).register_forward_hook(after).remove


def _same_storage(a: Tensor, b: Tensor) -> bool:
    return a.untyped_storage().data_ptr() == b.untyped_storage().data_ptr()


def _refuse_opaque(transformer: nn.Module) -> None:
    compiled = isinstance(transformer, torch._dynamo.eval_frame.OptimizedModule) or any(
        getattr(m, "_compiled_call_impl", None) is not None for m in transformer.modules()
    )
    if compiled:
        raise RuntimeError("The transformer is compiled, which hides its blocks from hooks; load it without torch.compile.")
    if getattr(transformer, "is_cache_enabled", False):
        raise RuntimeError("A cache accelerator is on, which skips blocks; call transformer.disable_cache() first.")
