"""Sources of a transport: given images, or recorded hidden states."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

import numpy as np

from .cache import describe
from .generation import Generation, check_images
from .records import HiddenStates
from .rules import Rule
from .window import Window, name_of

if TYPE_CHECKING:
    pass


ROUTES = ("noise", "inversion")


@dataclass(frozen=True, eq=False)
class Images:
    """Given images as the source of a transport.

    How an image becomes activations is our choice; the paper (MAs-DiT, arXiv 2605.13974) does not say.

    Attributes:
        images: uint8 (n, height, width, 3), of the size of the generation; one for all targets, or one for each target.
        prompts: descriptions of the images, one for all or one for each; "" is allowed.
        route: "noise": at every step the model reads ``(1 - sigma) * latents + sigma * noise`` with the target's own
            noise. "inversion": it reads the point at sigma of the path from the image back to noise, found by Euler
            steps of the same flow upwards, without guidance.
    """

    version: ClassVar[int] = 1

    images: np.ndarray
    prompts: tuple[str, ...] = ("",)
    route: str = "noise"

    def __post_init__(self) -> None:
        prompts = (self.prompts,) if isinstance(self.prompts, str) else tuple(self.prompts)
        object.__setattr__(self, "prompts", prompts)
        check_images(self.images)
        if len(prompts) not in (1, len(self.images)):
            raise ValueError(f"{len(self.images)} images but {len(prompts)} prompts were given; give one, or one per image.")
        if self.route not in ROUTES:
            raise ValueError(f"Route '{self.route}' is unknown; use {' or '.join(ROUTES)}.")


@dataclass(frozen=True, eq=False)
class Recorded:
    """Selected channels of a source, recorded once.

    Attributes:
        values: (sample, step, branch, layer, token, rank).
        ids: channel ids (sample, step, branch, layer, rank).
        steps: recorded denoising steps.
        branches: recorded branches.
        layers: recorded layers.
        sigmas: noise levels of all steps of the source's run.
        weights: fingerprint of the model.
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
        """Return what ``HiddenStates(channels=rule)`` recorded in a generation, at the stream and point of a window.

        Args:
            source: a generation with such a record.
            rule: the record's selection rule.
            window: the transport that reads it.

        Raises:
            ValueError: the generation has no such record.
        """
        fields, number = {"channels": describe(rule), "stream": window.stream, "point": window.point, "tokens": None}, 1
        for item in source.provenance["call"]["record"]:
            if item["type"] != "HiddenStates":
                continue
            if all(item[name] == value for name, value in fields.items()):
                break
            number += 1
        else:
            raise ValueError(
                f"The source has no hidden states of {rule}; generate it with record=[HiddenStates(channels={rule})]."
            )
        data = getattr(source.records, name_of(HiddenStates()) + (f"_{number}" if number > 1 else ""))
        places = (tuple(data[name].values.tolist()) for name in ("step", "branch", "layer"))
        origin = tuple(source.provenance["sigmas"]), source.provenance["weights"]
        return cls(data.value.values, data.channel_id.values, *places, *origin)

    def __len__(self) -> int:
        return len(self.values)
