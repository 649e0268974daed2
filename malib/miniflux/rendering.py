"""Images and exact masks, key points and textures of scenes."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from .scenes import COLOURS, SIZE, Scene, Subject
from .textures import CONTRAST, TEXTURES, texture_map

LUMINANCE = np.array((0.299, 0.587, 0.114), dtype=np.float32)
_PALETTE = {name: np.array(rgb, dtype=np.float32) / 255 for name, rgb in COLOURS.items()}


_COLUMN = {"left": 18.0, "center": 32.0, "right": 46.0}


_RADIUS = {"small": (7.0, 8.5), "large": (12.0, 14.0)}


_Y, _X = np.mgrid[0:SIZE, 0:SIZE].astype(np.float32) + 0.5


@dataclass(frozen=True)
class Rendering:
    """The pixels of a scene.

    Attributes:
        image: float32 (64, 64, 3) in [0, 1].
        labels: uint8 (64, 64), 0 background, i + 1 the subject i.
        texture: float32 (64, 64), the luminance that the textures add; 0 where there are none.
    """

    image: np.ndarray
    labels: np.ndarray
    texture: np.ndarray

    @property
    def mask(self) -> np.ndarray:
        """Boolean (64, 64): True on any subject."""
        return self.labels > 0


def render(scene: Scene) -> Rendering:
    """Render a scene, anti-aliased from signed distances, with light, rim, highlight and shadow.

    Textures are added to the finished colours, so that they are known exactly.

    Returns:
        The image in [0, 1], the exact label map (a pixel belongs to a subject when its centre is inside of it), and the
        luminance of the textures.
    """
    rng, fine = np.random.default_rng([scene.seed, 11]), np.random.default_rng([scene.seed, 17])
    image = _background(scene, rng)
    texture = _texture(scene.pattern, fine)
    labels = np.zeros((SIZE, SIZE), dtype=np.uint8)
    for index, (subject, centre) in enumerate(zip(scene.subjects, _centres(scene, rng), strict=True)):
        radius = rng.uniform(*_RADIUS[subject.size])
        angle = np.deg2rad(rng.uniform(-9, 9))
        distance = _signed_distance(subject.shape, *centre, radius, angle)
        shadow = np.pad(distance, ((2, 0), (2, 0)), mode="edge")[:SIZE, :SIZE]
        image = image * (1 - 0.4 * np.clip(0.5 - shadow / 3, 0, 1))[..., None]
        coverage = np.clip(0.5 - distance, 0, 1)[..., None]
        image = image * (1 - coverage) + _shaded(subject, distance, *centre, radius) * coverage
        texture = texture * (1 - coverage[..., 0]) + _texture(subject.texture, fine) * coverage[..., 0]
        labels[distance <= 0] = index + 1
    plain = np.clip(image, 0, 1).astype(np.float32)
    textured = np.clip(image + texture[..., None], 0, 1).astype(np.float32) if texture.any() else plain
    return Rendering(textured, labels, (textured - plain) @ LUMINANCE)


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


def empty(scene: Scene) -> np.ndarray:
    """Render the background of a scene without its subjects; float32 (64, 64, 3) in [0, 1]."""
    return np.clip(_background(scene, np.random.default_rng([scene.seed, 11])), 0, 1).astype(np.float32)


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


def _texture(name: str, rng: np.random.Generator) -> np.ndarray:
    """Return what a texture adds to every colour; 0 for patterns without fine texture."""
    return CONTRAST * texture_map(name, SIZE, rng) if name in TEXTURES else np.zeros((SIZE, SIZE))


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
