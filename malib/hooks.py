"""Register PyTorch hooks on a diffusers transformer and report each tensor with its step, guidance branch, layer and stream.

The scheduler's own ``step`` counts the steps. The branch comes from ``cache_context`` where the pipeline names it, otherwise
from the family's row; a batched call is split into its branches. All hooks are removed on exit.
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
    """A transformer block: ``layer`` is its index over all stacks, ``name`` is for example "single 3"."""

    layer: int
    name: str
    module: nn.Module
    stack: Stack


@dataclass(frozen=True)
class Event:
    """Where a tensor was seen.

    Attributes:
        step: denoising step.
        branch: "cond" or "uncond".
        layer: index over all block stacks in execution order; -1 at the points "prompt" and "velocity".
        stream: "image" or "text".
        point: "input" or "output" of a block, "gate", "modulation", "prompt" (what carries the prompt into the
            transformer) or "velocity" (what the transformer predicts).
        gate: name of the AdaLN gate at "gate", "shift" or "scale" at "modulation", the argument's name at "prompt", else
            "".
    """

    step: int
    branch: str
    layer: int
    stream: str
    point: str
    gate: str = ""


class Listener(Protocol):
    """What reads tensors, or writes them in place, at the sites that it wants.

    A listener with ``groups`` (numbers by name) also receives the tensors of its auxiliary samples by name: samples that
    are appended to the batch, group after group. No other listener sees them. It defines ``needs(step, branch)``:
    whether it reads auxiliary samples there, or later what the model makes of them there. Where no listener needs them,
    they are left out of the call (except at the point "prompt") and receive the velocity of their primary samples.
    """

    writes: bool

    def wants(self, layer: int, stream: str, point: str) -> bool:
        """Return whether the listener reads a site; hooks are registered for wanted sites only.

        Args:
            layer: index of the block; -1 for the prompt and the velocity.
            stream: "image" or "text".
            point: as in ``Event``.
        """

    def __call__(self, event: Event, x: Tensor) -> None:
        """Read or write ``x``.

        Args:
            event: where the tensor was seen.
            x: (samples, tokens, channels); (samples, channels) for a gate; of the latents' shape for the velocity.
        """


def blocks_of(transformer: nn.Module, family: Family) -> list[Block]:
    """Return all blocks of a ``transformer`` of this ``family`` in execution order."""
    blocks: list[Block] = []
    for stack in family.stacks:
        for index, module in enumerate(getattr(transformer, stack.attribute)):
            blocks.append(Block(len(blocks), f"{stack.label} {index}", module, stack))
    return blocks


class Tap(AbstractContextManager):
    """While entered, send the events of a pipeline's transformer to listeners; listeners that write come first.

    Args:
        pipeline: a diffusers pipeline with ``transformer`` and ``scheduler``.
        family: the transformer's architecture.
        samples: number of samples of the pipeline call, which distinguishes batched guidance from a plain batch.
        listeners: called in the given order, writers before readers.
        groups: number of groups of auxiliary samples, each as large as the primary samples that precede them.
        tokens: number of image tokens, which separates the streams of a tensor that contains text and image.

    Attributes:
        step: the denoising step.
        latents: what the scheduler's last step returned.

    Raises:
        RuntimeError: the transformer is compiled or a cache accelerator is on, which hides or fakes block outputs.
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
        self._primary = samples // (1 + groups)
        self._listeners = sorted(listeners, key=lambda listener: not listener.writes)
        self._undo = ExitStack()
        self._readers_of_auxiliary = [listener for listener in listeners if getattr(listener, "groups", None)]
        self._calls, self._named, self._branches = 0, "", BRANCHES[:1]
        self._lengths, self._places = [samples], None  # samples of each branch in this call; row of each sample
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
            if self._readers_of_auxiliary:
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
        """Replace a method on the instance; on exit the earlier one, or the class's, is back."""
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
        @functools.wraps(original)  # pipelines inspect its signature
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
        """Remove the auxiliary samples that no listener needs from a call: each costs as much as a primary one."""
        kept = [
            any(listener.needs(self.step, branch) for listener in self._readers_of_auxiliary) for branch in self._branches
        ]
        if all(kept):
            return None
        batch, rows, self._places = len(self._branches) * self._samples, [], []
        for number, keep in enumerate(kept):
            self._lengths[number] = length = self._samples if keep else self._primary
            self._places += [len(rows) + i % length for i in range(self._samples)]
            rows += range(number * self._samples, number * self._samples + length)

        def take(name: str, x: Any) -> Any:
            if isinstance(x, dict):
                return {key: take(key, value) for key, value in x.items()}
            if isinstance(x, Tensor) and not (name.endswith("_ids") and x.ndim == 2):  # positions of tokens
                return x[rows] if x.ndim and len(x) == batch else x
            return [x[row] for row in rows] if isinstance(x, list) and len(x) == batch else x

        return tuple(take("", x) for x in args), take("", kwargs)

    def _fill_in(self, module: nn.Module, args: tuple, output: Any) -> Any:
        """Give auxiliary samples that were left out the velocity of their primary samples."""
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
            event, (primary, *auxiliary) = Event(self.step, branch, *site), part.split(self._primary)
            for listener in wanted:
                groups = getattr(listener, "groups", None)
                if groups is None:
                    listener(event, primary)
                elif auxiliary or not groups:
                    listener(event, primary, {name: auxiliary[number] for name, number in groups.items()})

    def _part(self, x: Tensor, stack: Stack, stream: str) -> Tensor:
        """Return the tokens of a stream, as a view where one tensor contains both streams."""
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
                    changed[name] = x.clone()  # the pipeline uses it again in later steps
                    self._send(wanted, changed[name], -1, "text", "prompt", name)
            return args, changed

        return hook

    def _velocity_hook(self, wanted: list[Listener]) -> Callable:
        def hook(module: nn.Module, args: tuple, output: Any) -> Any:
            x = output[0]
            if isinstance(x, Tensor):
                self._send(wanted, x, -1, "image", "velocity")
                return None
            stacked = torch.stack(x)  # Z-Image returns a list of samples
            self._send(wanted, stacked, -1, "image", "velocity")
            return (list(stacked.unbind()), *output[1:])

        return hook

    def _input_hook(self, block: Block, stream: str, argument: str, wanted: list[Listener]) -> Callable:
        position = list(dict.fromkeys(block.stack.arguments.values())).index(argument)
        writes = any(listener.writes for listener in wanted)

        def hook(module: nn.Module, args: tuple, kwargs: dict[str, Any]) -> tuple[tuple, dict] | None:
            x = kwargs[argument] if argument in kwargs else args[position]
            if writes:
                x = x.clone()  # the previous block or the pipeline may still use the tensor
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
            if shared:  # the block returns its input: writing in place would change other sites
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
        raise RuntimeError("The transformer is compiled, which hides its blocks from hooks; use it without torch.compile.")
    if getattr(transformer, "is_cache_enabled", False):
        raise RuntimeError("A cache accelerator is on, which skips blocks; call transformer.disable_cache() first.")
