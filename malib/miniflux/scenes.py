"""Captioned 64 x 64 scenes with exact masks: the world of mini-flux.

A scene is one or two shaded subjects on a patterned background. It follows from its attributes and one integer seed, so
captions, images and masks are recomputed when needed and never stored.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

import numpy as np

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
"""Every word of the captions; the bundled tokenizers know these and no others."""

_PALETTE = {name: np.array(rgb, dtype=np.float32) / 255 for name, rgb in COLOURS.items()}
_COLUMN = {"left": 18.0, "center": 32.0, "right": 46.0}
_RADIUS = {"small": (7.0, 8.5), "large": (12.0, 14.0)}
_Y, _X = np.mgrid[0:SIZE, 0:SIZE].astype(np.float32) + 0.5


@dataclass(frozen=True)
class Subject:
    """One subject of a scene: ``shape``, ``colour``, ``size`` and ``position``, each a word of this module's tables."""

    shape: str
    colour: str
    size: str = "large"
    position: str = "center"

    def __post_init__(self) -> None:
        for value, allowed in (
            (self.shape, SHAPES),
            (self.colour, COLOURS),
            (self.size, SIZES),
            (self.position, POSITIONS),
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
        for value, allowed in ((self.pattern, PATTERNS), (self.background, COLOURS)):
            if value not in allowed:
                raise ValueError(f"'{value}' is not one of {', '.join(allowed)}; use one of these words.")

    @property
    def caption(self) -> str:
        """The canonical caption, which names every attribute."""
        who = " and ".join(_noun_phrase(s) for s in self.subjects)
        return f"{who}, on {_with_article(f'{self.pattern} {self.background} background')}"


@dataclass(frozen=True)
class Rendering:
    """``image``: float32 (64, 64, 3) in [0, 1]. ``labels``: uint8 (64, 64), 0 background, i + 1 the subject i."""

    image: np.ndarray
    labels: np.ndarray

    @property
    def mask(self) -> np.ndarray:
        """Boolean (64, 64): True on any subject."""
        return self.labels > 0


def held_out(subject: Subject) -> bool:
    """Return True for the one colour in eight that never occurs in training for the subject's size, shape and position."""
    code = (
        list(COLOURS).index(subject.colour)
        + 2 * SHAPES.index(subject.shape)
        + 3 * POSITIONS.index(subject.position)
        + 5 * SIZES.index(subject.size)
    )
    return code % len(COLOURS) == 6


def sample_scene(seed: int, subjects: int | None = None, unseen: bool = False) -> Scene:
    """Draw a scene from ``seed``.

    Args:
        seed: any non-negative integer; the same seed gives the same scene.
        subjects: 1 or 2; None draws two with probability 0.4.
        unseen: False draws from the combinations used in training, True draws only held-out subjects.
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
    return Scene(tuple(chosen), str(rng.choice(PATTERNS)), str(rng.choice(free)), seed)


def paraphrase(scene: Scene, rng: np.random.Generator) -> str:
    """Vary the caption: words omitted, reordered, or replaced by synonyms.

    Args:
        scene: the scene.
        rng: decides about the variation.
    """
    drop = dict(zip(("size", "colour", "position"), rng.random(3) < (0.12, 0.04, 0.12), strict=True))
    style = rng.random()
    phrases = [_noun_phrase(s, drop, position_first=0.85 < style <= 0.92) for s in scene.subjects]
    pattern = "" if rng.random() < 0.12 else f"{scene.pattern} "
    background = _with_article(f"{pattern}{scene.background} background")
    who = " and ".join(phrases)
    if rng.random() < 0.08:
        text = who
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
    return text


def render(scene: Scene) -> Rendering:
    """Render a scene, anti-aliased from signed distances, with light, rim, highlight and shadow.

    Returns:
        The image in [0, 1] and the exact label map (a pixel belongs to a subject when its centre is inside of it).
    """
    rng = np.random.default_rng([scene.seed, 11])
    image = _background(scene, rng)
    labels = np.zeros((SIZE, SIZE), dtype=np.uint8)
    for index, (subject, centre) in enumerate(zip(scene.subjects, _centres(scene, rng), strict=True)):
        radius = rng.uniform(*_RADIUS[subject.size])
        angle = np.deg2rad(rng.uniform(-9, 9))
        distance = _signed_distance(subject.shape, *centre, radius, angle)
        shadow = np.pad(distance, ((2, 0), (2, 0)), mode="edge")[:SIZE, :SIZE]
        image = image * (1 - 0.4 * np.clip(0.5 - shadow / 3, 0, 1))[..., None]
        coverage = np.clip(0.5 - distance, 0, 1)[..., None]
        image = image * (1 - coverage) + _shaded(subject, distance, *centre, radius) * coverage
        labels[distance <= 0] = index + 1
    return Rendering(np.clip(image, 0, 1).astype(np.float32), labels)


def key_points(scene: Scene) -> list[np.ndarray]:
    """Return the points of each subject that every image of its shape has, in one order, exact.

    Returns:
        For each subject (n, 2): x and y in pixels; the centre of the first pixel is (0.5, 0.5). Of a circle and a ring
        the four outermost points (and the ring's four innermost), of all others the corners. No shape is rotated by more
        than 9 degrees, so that points that look the same after a rotation can be distinguished.
    """
    rng = np.random.default_rng([scene.seed, 11])
    _background(scene, rng)  # advances rng as render does
    found = []
    for subject, centre in zip(scene.subjects, _centres(scene, rng), strict=True):
        radius, angle = rng.uniform(*_RADIUS[subject.size]), np.deg2rad(rng.uniform(-9, 9))
        if subject.shape in ("circle", "ring"):
            ends = np.array([(0, -1), (1, 0), (0, 1), (-1, 0)])
            points = ends * radius if subject.shape == "circle" else np.concatenate([1.02 * ends, 0.5 * ends]) * radius
        else:
            points = _turned(subject.shape, radius, angle)
        found.append(points + centre)
    return found


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


def empty(scene: Scene) -> np.ndarray:
    """Render the background of a scene without its subjects; float32 (64, 64, 3) in [0, 1]."""
    return np.clip(_background(scene, np.random.default_rng([scene.seed, 11])), 0, 1).astype(np.float32)


def gallery(count: int, seed: int = 0, subjects: int | None = 1, unseen: bool = False) -> list[Scene]:
    """Return scenes with different canonical captions.

    Args:
        count: number of scenes; a longer list begins with the shorter one.
        seed: of the choice.
        subjects: 1 or 2 per scene; None for both.
        unseen: only combinations that never occur in training.
    """
    found: dict[str, Scene] = {}
    index = 0
    while len(found) < count:
        scene = sample_scene(1_500_000_000 + seed * 1_000_003 + index, subjects, unseen)
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


def captions(count: int, seed: int = 0, subjects: int | None = 1, unseen: bool = False) -> list[str]:
    """Return the captions of ``gallery``, with the same arguments.

    Args:
        count: number of captions.
        seed: of the choice.
        subjects: 1 or 2 per scene; None for both.
        unseen: only combinations that never occur in training.
    """
    return [scene.caption for scene in gallery(count, seed, subjects, unseen)]


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


def _centres(scene: Scene, rng: np.random.Generator) -> list[tuple[float, float]]:
    """Return (x, y) of each subject in pixels; neighbours are on a diagonal so that they do not overlap."""
    jitter = rng.uniform(-2, 2, size=(len(scene.subjects), 2))
    if len(scene.subjects) == 1:
        rows = [32 + 3 * jitter[0, 1]]
    elif {s.position for s in scene.subjects} == {"left", "right"}:
        rows = [32 + 3 * jitter[0, 1], 32 + 3 * jitter[1, 1]]
    else:
        rows = [18 + jitter[0, 1], 46 + jitter[1, 1]][:: 1 if rng.random() < 0.5 else -1]
    return [(_COLUMN[s.position] + jitter[i, 0], rows[i]) for i, s in enumerate(scene.subjects)]


def _background(scene: Scene, rng: np.random.Generator) -> np.ndarray:
    """Render two tones of one colour mixed by the pattern, under a soft light from a random side."""
    base = _PALETTE[scene.background]
    other = base + 0.22 if scene.background == "black" else base * 0.68
    phase, angle = rng.uniform(0, 2 * np.pi, size=2)
    if scene.pattern == "striped":
        tilt = rng.choice([0.0, np.pi / 4, np.pi / 2, 3 * np.pi / 4])
        period = rng.uniform(9, 12)
        wave = np.sin((_X * np.cos(tilt) + _Y * np.sin(tilt)) * 2 * np.pi / period + phase)
        mix = np.clip(0.5 + wave * period / (2 * np.pi), 0, 1)
    elif scene.pattern == "checkered":
        cell = rng.uniform(7, 9)
        wave = np.sin(_X * np.pi / cell + phase) * np.sin(_Y * np.pi / cell + angle)
        mix = np.clip(0.5 + wave * cell / np.pi, 0, 1)
    elif scene.pattern == "gradient":
        other = base + 0.45 if scene.background == "black" else base * 0.3
        mix = 0.5 + ((_X - 32) * np.cos(angle) + (_Y - 32) * np.sin(angle)) / 72
    else:
        mix = np.zeros_like(_X)
    side = rng.uniform(0, 2 * np.pi)
    light = 1 + 0.08 * ((_X - 32) * np.cos(side) + (_Y - 32) * np.sin(side)) / 32
    mix = np.clip(mix, 0, 1)[..., None]
    return (base * (1 - mix) + other * mix) * light[..., None]


def _shaded(subject: Subject, distance: np.ndarray, x: float, y: float, radius: float) -> np.ndarray:
    """Render the subject's own colours: light from the upper left, a dark rim, and a small highlight."""
    base = _PALETTE[subject.colour]
    u, v = (_X - x) / radius, (_Y - y) / radius
    light = np.clip(0.92 - 0.24 * (u + v), 0.5, 1.25)
    rim = 1 - 0.45 * np.exp(-((np.minimum(distance, 0) + 0.6) ** 2) / 1.2)
    shine = 0.55 * np.exp(-((u + 0.38) ** 2 + (v + 0.38) ** 2) / 0.035)
    body = (base + (0.10 if subject.colour == "black" else 0.0)) * (light * rim)[..., None]
    return body * (1 - shine[..., None]) + shine[..., None]


def _signed_distance(shape: str, x: float, y: float, radius: float, angle: float) -> np.ndarray:
    """Return the distance in pixels to the outline, negative inside; (64, 64)."""
    if shape == "circle":
        return np.hypot(_X - x, _Y - y) - radius
    if shape == "ring":
        return np.abs(np.hypot(_X - x, _Y - y) - 0.76 * radius) - 0.26 * radius
    return _polygon_distance(np.add(_turned(shape, radius, angle), (x, y)))


def _turned(shape: str, radius: float, angle: float) -> np.ndarray:
    """Return the corners of a shape around its centre, (corners, 2)."""
    turn = np.array([[np.cos(angle), np.sin(angle)], [-np.sin(angle), np.cos(angle)]])
    return (_OUTLINES[shape] * radius) @ turn


def _polygon_distance(corners: np.ndarray) -> np.ndarray:
    start, end = corners.astype(np.float32), np.roll(corners, -1, axis=0).astype(np.float32)
    edge = end - start
    px, py = _X[..., None] - start[:, 0], _Y[..., None] - start[:, 1]
    along = np.clip((px * edge[:, 0] + py * edge[:, 1]) / (edge**2).sum(1), 0, 1)
    squared = (px - along * edge[:, 0]) ** 2 + (py - along * edge[:, 1]) ** 2
    straddles = (start[:, 1] <= _Y[..., None]) != (end[:, 1] <= _Y[..., None])
    to_the_right = (px * edge[:, 1] - py * edge[:, 0]) * np.sign(edge[:, 1]) < 0
    inside = (straddles & to_the_right).sum(-1) % 2 == 1
    return np.where(inside, -1, 1) * np.sqrt(squared.min(-1))


def _regular(corners: int, radii: tuple[float, ...]) -> np.ndarray:
    turn = -np.pi / 2 + 2 * np.pi * np.arange(corners) / corners
    radius = np.resize(radii, corners)
    return np.stack([radius * np.cos(turn), radius * np.sin(turn)], axis=1)


_OUTLINES = {
    "square": np.array([(-1, -1), (1, -1), (1, 1), (-1, 1)]) * 0.86,
    "triangle": _regular(3, (1.2,)) + np.array((0, 0.15)),
    "star": _regular(10, (1.2, 0.5)),
    "cross": np.array(
        [(-1, -3), (1, -3), (1, -1), (3, -1), (3, 1), (1, 1), (1, 3), (-1, 3), (-1, 1), (-3, 1), (-3, -1), (-1, -1)]
    )
    * 0.35,
}
