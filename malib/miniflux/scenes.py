"""Captioned 64 x 64 scenes: attributes, captions and samples. ``rendering`` draws their images and exact masks.

A scene is one or two shaded subjects on a patterned background. It follows from its attributes and one integer seed, so
captions, images and masks are recomputed when needed and never stored. Textured scenes add fine textures on subjects and
backgrounds; all other scenes are the same with and without them.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

import numpy as np

from .textures import TEXTURES

if TYPE_CHECKING:
    from ..dit import DiT


SIZE = 64


COLOURS = {
    "red": (214, 39, 40),
    "green": (38, 158, 70),
    "blue": (40, 84, 214),
    "yellow": (242, 216, 48),
    "purple": (142, 58, 182),
    "orange": (242, 132, 32),
    "white": (242, 242, 242),
    "black": (30, 30, 34),
}


SHAPES = ("circle", "square", "triangle", "star", "ring", "cross")


SIZES = ("small", "large")


POSITIONS = ("left", "center", "right")


PATTERNS = ("plain", "striped", "checkered", "gradient")


_SYNONYMS = {
    "large": ("big", "huge"),
    "small": ("little", "tiny"),
    "center": ("middle", "centre"),
    "circle": ("disc", "ball"),
    "ring": ("donut",),
    "cross": ("plus",),
    "purple": ("violet",),
    "striped": ("stripy",),
    "checkered": ("checked",),
}


_GRAMMAR = [
    "a",
    "an",
    "and",
    "at",
    "background",
    "front",
    "in",
    "is",
    "it",
    "left",
    "of",
    "on",
    "right",
    "the",
    "there",
    "to",
    "with",
    ",",
    ".",
]


_WORDS = [*_GRAMMAR, *COLOURS, *SHAPES, *SIZES, *POSITIONS, *PATTERNS]


VOCABULARY = tuple(dict.fromkeys(_WORDS + [word for words in _SYNONYMS.values() for word in words]))
"""Every word of the captions of scenes without textures; mini-flux's tokenizers know these and no others."""
TEXTURED_VOCABULARY = (*VOCABULARY, *TEXTURES)
"""Every word of all captions."""


@dataclass(frozen=True)
class Subject:
    """One subject of a scene: ``shape``, ``colour``, ``size``, ``position`` and ``texture``, each a word of the tables."""

    shape: str
    colour: str
    size: str = "large"
    position: str = "center"
    texture: str = "plain"

    def __post_init__(self) -> None:
        for value, allowed in (
            (self.shape, SHAPES),
            (self.colour, COLOURS),
            (self.size, SIZES),
            (self.position, POSITIONS),
            (self.texture, ("plain", *TEXTURES)),
        ):
            if value not in allowed:
                raise ValueError(f"'{value}' is not one of {', '.join(allowed)}; use one of these words.")


@dataclass(frozen=True)
class Scene:
    """One or two subjects on a background; ``seed`` fixes all that the caption leaves open (exact position, angle, light).

    Two subjects have different positions.
    """

    subjects: tuple[Subject, ...]
    pattern: str = "plain"
    background: str = "white"
    seed: int = 0

    def __post_init__(self) -> None:
        if len(self.subjects) not in (1, 2):
            raise ValueError(f"{len(self.subjects)} subjects were given; a scene has one or two.")
        if len({s.position for s in self.subjects}) < len(self.subjects):
            raise ValueError("Two subjects have the same position; give them two of left, center and right.")
        for value, allowed in ((self.pattern, (*PATTERNS, *TEXTURES)), (self.background, COLOURS)):
            if value not in allowed:
                raise ValueError(f"'{value}' is not one of {', '.join(allowed)}; use one of these words.")

    @property
    def caption(self) -> str:
        """The canonical caption, which names every attribute."""
        who = " and ".join(_noun_phrase(s) for s in self.subjects)
        return f"{who}, on {_with_article(f'{self.pattern} {self.background} background')}"


def held_out(subject: Subject) -> bool:
    """Return True for the one colour in eight that never occurs in training for the subject's size, shape and position."""
    code = (
        list(COLOURS).index(subject.colour)
        + 2 * SHAPES.index(subject.shape)
        + 3 * POSITIONS.index(subject.position)
        + 5 * SIZES.index(subject.size)
    )
    return code % len(COLOURS) == 6


def sample_scene(seed: int, subjects: int | None = None, unseen: bool = False, textured: bool = False) -> Scene:
    """Draw a scene from ``seed``.

    Args:
        seed: any non-negative integer; the same seed gives the same scene.
        subjects: 1 or 2; None draws two with probability 0.4.
        unseen: False draws from the combinations used in training, True draws only held-out subjects.
        textured: also draw textures: of the background in three of seven scenes, of a subject in three of five.
    """
    rng = np.random.default_rng([seed, 7])
    count = subjects or (2 if rng.random() < 0.4 else 1)
    places = rng.permutation(POSITIONS)[:count]
    chosen: list[Subject] = []
    while len(chosen) < count:
        subject = Subject(*(str(rng.choice(words)) for words in (SHAPES, list(COLOURS), SIZES)), str(places[len(chosen)]))
        twin = any((s.shape, s.colour) == (subject.shape, subject.colour) for s in chosen)
        if held_out(subject) == unseen and not twin:
            chosen.append(subject)
    free = [c for c in COLOURS if all(s.colour != c for s in chosen)]
    scene = Scene(tuple(chosen), str(rng.choice(PATTERNS)), str(rng.choice(free)), seed)
    if not textured:
        return scene
    fine = np.random.default_rng([seed, 13])  # separate, so that all other attributes stay the same
    pattern = str(fine.choice([scene.pattern] * 4 + list(TEXTURES)))
    textures = [str(fine.choice(["plain", "plain", *TEXTURES])) for _ in scene.subjects]
    subjects = tuple(replace(s, texture=t) for s, t in zip(scene.subjects, textures, strict=True))
    return replace(scene, subjects=subjects, pattern=pattern)


def paraphrase(scene: Scene, rng: np.random.Generator) -> str:
    """Vary the caption: words omitted, reordered, or replaced by synonyms.

    Args:
        scene: the scene.
        rng: decides about the variation.
    """
    return paraphrase_and_names(scene, rng)[0]


def paraphrase_and_names(scene: Scene, rng: np.random.Generator) -> tuple[str, set[str]]:
    """Return a paraphrase of the caption and the attributes that it names.

    Args:
        scene: the scene.
        rng: decides about the variation.
    """
    drop = dict(zip(("size", "colour", "position"), rng.random(3) < (0.12, 0.04, 0.12), strict=True))
    style = rng.random()
    phrases = [_noun_phrase(s, drop, position_first=0.85 < style <= 0.92) for s in scene.subjects]
    pattern = "" if rng.random() < 0.12 else f"{scene.pattern} "
    background = _with_article(f"{pattern}{scene.background} background")
    named = {"shape", "texture", "background", *(name for name, dropped in drop.items() if not dropped)}
    named |= {"pattern"} if pattern else set()
    who = " and ".join(phrases)
    if rng.random() < 0.08:
        text, named = who, named - {"background", "pattern"}
    elif style < 0.7:
        text = f"{who}, on {background}"
    elif style < 0.78:
        text = f"{background} with {who}"
    elif style < 0.85:
        text = f"on {background}, {who}"
    elif style < 0.92:
        text = f"{who}, on {background}"
    else:
        bare = " , ".join(_bare_phrase(s, drop) for s in scene.subjects)
        text = f"{bare}, {pattern}{scene.background} background"
    if rng.random() < 0.15:
        words = text.replace(",", " ,").split()
        text = " ".join(str(rng.choice(_SYNONYMS[w])) if w in _SYNONYMS and rng.random() < 0.5 else w for w in words)
    return text, named


def names_of(word: str) -> tuple[str, ...]:
    """Return a word of the tables and its synonyms."""
    return word, *_SYNONYMS.get(word, ())


def correspondences(count: int, seed: int = 0) -> list[tuple[Scene, Scene]]:
    """Return pairs of one-subject scenes with the same shape and all else different; the shapes alternate.

    Args:
        count: number of pairs; a longer list begins with the shorter one.
        seed: of the choice.
    """
    found: list[tuple[Scene, Scene]] = []
    index = 0
    while len(found) < count:
        first = 1_800_000_000 + seed * 1_000_003 + 2 * index
        one, two = sample_scene(first, 1), sample_scene(first + 1, 1)
        (shape, *others), (other_shape, *other_others) = attributes(one), attributes(two)
        wanted = SHAPES[len(found) % len(SHAPES)]
        if shape == other_shape == wanted and all(a != b for a, b in zip(others, other_others, strict=True)):
            found.append((one, two))
        index += 1
    return found


def gallery(
    count: int, seed: int = 0, subjects: int | None = 1, unseen: bool = False, textured: bool = False
) -> list[Scene]:
    """Return scenes with different canonical captions.

    Args:
        count: number of scenes; a longer list begins with the shorter one.
        seed: of the choice.
        subjects: 1 or 2 per scene; None for both.
        unseen: only combinations that never occur in training.
        textured: also draw textures.
    """
    found: dict[str, Scene] = {}
    index = 0
    while len(found) < count:
        scene = sample_scene(1_500_000_000 + seed * 1_000_003 + index, subjects, unseen, textured)
        found.setdefault(scene.caption, scene)
        index += 1
    return list(found.values())


def pairs(count: int, seed: int = 0) -> list[tuple[Scene, Scene]]:
    """Return pairs (target, source) of one-subject scenes that differ in every attribute.

    The source's subject would be visible on the target's background.

    Args:
        count: number of pairs; a longer list begins with the shorter one.
        seed: of the choice.
    """
    found: list[tuple[Scene, Scene]] = []
    index = 0
    while len(found) < count:
        first = 1_700_000_000 + seed * 1_000_003 + 2 * index
        target, source = sample_scene(first, 1), sample_scene(first + 1, 1)
        both = zip(attributes(target), attributes(source), strict=True)
        if all(a != b for a, b in both) and source.subjects[0].colour != target.background:
            found.append((target, source))
        index += 1
    return found


def variants(count: int, attribute: str, seed: int = 0) -> list[tuple[Scene, Scene]]:
    """Return pairs (target, source) of one-subject scenes that differ in one attribute only.

    Args:
        count: number of pairs; a longer list begins with the shorter one.
        attribute: "shape", "colour", "size", "position", "background" or "pattern".
        seed: of the choice.

    Raises:
        ValueError: an unknown attribute.
    """
    words = {"shape": SHAPES, "colour": tuple(COLOURS), "size": SIZES, "position": POSITIONS}
    backgrounds = {"background": tuple(COLOURS), "pattern": PATTERNS}
    if attribute not in words | backgrounds:
        raise ValueError(f"'{attribute}' is not an attribute of a scene; use {', '.join(words | backgrounds)}.")
    rng, found = np.random.default_rng([seed, 23]), []
    for target in gallery(count, 100 + seed):
        subject, colour = target.subjects[0], target.background
        now = getattr(subject if attribute in words else target, attribute)
        free = [w for w in (words | backgrounds)[attribute] if w not in (now, subject.colour, colour)]
        word = str(rng.choice(free))
        changed = {"subjects": (replace(subject, **{attribute: word}),)} if attribute in words else {attribute: word}
        found.append((target, replace(target, **changed)))
    return found


def attributes(scene: Scene) -> tuple[str, ...]:
    """Return shape, colour, size and position of the first subject, then background and pattern."""
    subject = scene.subjects[0]
    return subject.shape, subject.colour, subject.size, subject.position, scene.background, scene.pattern


def captions(count: int, seed: int = 0, subjects: int | None = 1, unseen: bool = False, textured: bool = False) -> list[str]:
    """Return the captions of ``gallery``, with the same arguments.

    Args:
        count: number of captions.
        seed: of the choice.
        subjects: 1 or 2 per scene; None for both.
        unseen: only combinations that never occur in training.
        textured: also draw textures.
    """
    return [scene.caption for scene in gallery(count, seed, subjects, unseen, textured)]


def is_scene_model(dit: DiT) -> bool:
    """Return whether a model generates scenes of this module at their size, so that the bundled evaluator applies."""
    known = set(getattr(getattr(dit.pipeline, "tokenizer", None), "get_vocab", dict)())
    return set(VOCABULARY) <= known and len(known) < 1000 and dit.size == SIZE  # only our own tokenizers are so small


def with_seed(scene: Scene, seed: int) -> Scene:
    """Return ``scene`` with another ``seed``: the same attributes in another rendering."""
    return replace(scene, seed=seed)


def _with_article(words: str) -> str:
    return f"{'an' if words[0] in 'aeiou' else 'a'} {words}"


def _where(position: str) -> str:
    return "in the center" if position == "center" else f"on the {position}"


def _bare_phrase(subject: Subject, drop: dict[str, bool]) -> str:
    words = [
        "" if drop["size"] else subject.size,
        "" if subject.texture == "plain" else subject.texture,
        "" if drop["colour"] else subject.colour,
        subject.shape,
        "" if drop["position"] else subject.position,
    ]
    return " ".join(w for w in words if w)


def _noun_phrase(subject: Subject, drop: dict[str, bool] | None = None, position_first: bool = False) -> str:
    drop = drop or {"size": False, "colour": False, "position": False}
    noun = _with_article(_bare_phrase(subject, {**drop, "position": True}))
    if drop["position"]:
        return noun
    where = _where(subject.position)
    return f"{where} {noun}" if position_first else f"{noun} {where}"
