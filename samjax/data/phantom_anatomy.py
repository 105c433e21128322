"""The anatomy of a phantom eye: disc, cup, fovea, vessel tree, lesions, as plain geometry.

`samjax.data.phantom` photographs it. Lengths are in radii of the field of view, whose centre is
the origin; x points right, y down. Vessel widths follow Murray's law at every branching,
w^3 = w1^3 + w2^3 (Murray, PNAS 12(3), 1926); the arcades' course around the fovea is drawn to
look right and follows no published atlas.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np


@dataclass(frozen=True)
class Blob:
    """A closed, slightly wavy outline; `depth` is 0 at its centre and 1 on its border."""

    x: float
    y: float
    rx: float
    ry: float
    angle: float
    waves: np.ndarray  # (2, k): amplitude, relative to the radius, and phase of harmonics 2, 3, …

    def depth(self, x: np.ndarray, y: np.ndarray) -> np.ndarray:
        dx, dy = x - float(self.x), y - float(self.y)  # np.float64 would widen the whole picture
        cos, sin = math.cos(self.angle), math.sin(self.angle)
        u, v = (cos * dx + sin * dy) / float(self.rx), (cos * dy - sin * dx) / float(self.ry)
        around, border = np.arctan2(v, u), np.ones_like(u)
        for harmonic, (amplitude, phase) in enumerate(self.waves.T.tolist(), start=2):
            border += amplitude * np.cos(harmonic * around + phase)
        return np.sqrt(u * u + v * v) / border


@dataclass(frozen=True)
class Anatomy:
    """Where everything lies; the field of view has radius 1 and its centre at (0, 0)."""

    disc: Blob
    cup: Blob
    fovea: tuple[float, float]
    segments: np.ndarray  # (n, 6): x0, y0, x1, y1, width, 1 for a vein and 0 for an artery
    scars: list[Blob]
    spots: np.ndarray  # (n, 5): x, y, rx, ry, 1 for a bright and 0 for a dark lesion


def _waves(rng: np.random.Generator, size: float) -> np.ndarray:
    return np.stack([rng.normal(0, size, 3) / np.arange(1, 4), rng.uniform(0, 2 * np.pi, 3)])


def _grow_vessels(
    rng: np.random.Generator, to_fovea: float, centre: tuple[float, float]
) -> np.ndarray:
    """Vessel segments (n, 6) around a disc at the origin, with the fovea at (to_fovea, 0).

    `centre` is that of the field of view, in the same frame.

    All growing tips take one step at a time. A tip's course turns by a steady bend, and its
    heading swings around that course; side branches leave at random and split the width by
    Murray's law.
    """
    step, swing, memory = 0.05, 0.26, 0.65
    roots = []
    for side in (-1.0, 1.0):
        for vein, width in ((0.0, 0.024), (1.0, 0.034)):
            apart = 0.14 if vein else -0.08
            # Course in radians (0 towards the fovea) and bend in radians per radius: arcades
            # leave almost upright and close around the fovea; the other vessels fan out.
            arcade = (1.45 + apart + rng.normal(0, 0.1), -rng.uniform(0.9, 1.4))
            nasal = (2.1 + apart + rng.normal(0, 0.15), rng.uniform(-0.1, 0.5))
            macular = (0.75 + apart + rng.normal(0, 0.12), -rng.uniform(0.3, 0.9))
            for (course, bend), share in ((arcade, 1.0), (nasal, 0.75), (macular, 0.42)):
                size = width * share * rng.uniform(0.85, 1.15)
                roots.append((0.0, 0.005 * side, side * course, side * bend, 0.0, size, vein))
    tips = np.array(roots).T
    segments = []
    for _ in range(40):
        x, y, course, bend, sway, width, vein = tips
        chance, kick = rng.random((4, x.size)), rng.standard_normal((3, x.size))
        sway = memory * sway + (1 - memory**2) ** 0.5 * swing * kick[0]
        course = course + (bend + kick[1]) * step
        new_x, new_y = x + step * np.cos(course + sway), y + step * np.sin(course + sway)
        segments.append(np.array([x, y, new_x, new_y, width, vein]))
        x, y, width = new_x, new_y, width * (1 - 0.4 * step)

        # Branches start outside the disc and more often on wide vessels.
        splits = (chance[0] < step * (1.2 + 100 * width)) & (np.hypot(x, y) > 0.17)
        share = 0.12 + 0.38 * chance[1]
        turn = np.where(chance[2] < 0.5, -1, 1) * (0.5 + 0.5 * chance[3])
        child_bend = 0.4 * bend - 0.5 * turn + 0.3 * kick[2]
        child = np.array([x, y, course + turn, child_bend, sway, width * np.cbrt(share), vein])
        width = np.where(splits, width * np.cbrt(1 - share), width)
        course = np.where(splits, course - 0.4 * turn * share, course)
        parent = np.array([x, y, course, bend, sway, width, vein])
        tips = np.concatenate([parent, child[:, splits]], axis=1)
        # Tips end when too thin, outside the field of view, or at the vessel-free fovea.
        inside = np.hypot(tips[0] - centre[0], tips[1] - centre[1]) < 1.05
        near_fovea = np.hypot(tips[0] - to_fovea, tips[1]) < 0.13
        tips = tips[:, (tips[5] > 0.0065) & inside & ~near_fovea]
        if not tips.size:
            break
    return np.concatenate(segments, axis=1).T


def _lesions(rng: np.random.Generator, disc: Blob, mean: float) -> tuple[list[Blob], np.ndarray]:
    """Pale disc-like scars, and groups of small bright and dark spots, all clear of the disc."""

    def place() -> tuple[float, float]:
        for _ in range(50):
            x, y = rng.uniform(-0.75, 0.75, 2)
            if np.hypot(x, y) < 0.75 and np.hypot(x - disc.x, y - disc.y) > 3.2 * disc.rx:
                return x, y
        return -disc.x, -disc.y  # the disc is in the middle of every draw: take the other side

    scars = []
    for _ in range(min(rng.poisson(mean), 2)):
        radius = disc.rx * rng.uniform(0.4, 0.85)
        flat, angle = rng.uniform(0.75, 1.0), rng.uniform(0, np.pi)
        scars.append(Blob(*place(), radius, radius * flat, angle, _waves(rng, 0.07)))
    spots = [np.zeros((0, 5))]
    for bright, most, spread in ((1.0, 22, 0.09), (0.0, 9, 0.2)):
        for _ in range(min(rng.poisson(mean), 3)):
            number = rng.integers(3, most)
            centres = np.array(place()) + rng.normal(0, spread, (number, 2))
            clear = np.hypot(centres[:, 0] - disc.x, centres[:, 1] - disc.y) > 1.6 * disc.rx
            radii = rng.lognormal(np.log(0.010), 0.5, (number, 2))
            group = np.concatenate([centres, radii, np.full((number, 1), bright)], axis=1)
            spots.append(group[clear])
    return scars, np.concatenate(spots)


def draw_anatomy(rng: np.random.Generator, lesions: float) -> Anatomy:
    """Draws an eye; `lesions` scales how many of them there are (0: none)."""
    right = rng.choice((-1.0, 1.0))  # side of the picture on which the disc lies
    x, y = right * rng.uniform(0.25, 0.62), rng.uniform(-0.22, 0.22)
    radius = rng.uniform(0.13, 0.19)
    tilt = rng.uniform(-0.25, 0.25)
    disc = Blob(x, y, radius, radius * rng.uniform(0.86, 1.08), tilt, _waves(rng, 0.012))
    ratio = float(np.clip(rng.normal(0.5, 0.13), 0.28, 0.78))
    room = 0.5 * (0.95 - ratio) * radius  # keeps the cup inside the disc
    cup = Blob(
        x + rng.uniform(-0.6, 0.6) * room,
        y + rng.uniform(-0.6, 0.6) * room,
        disc.rx * ratio,
        disc.ry * ratio * rng.uniform(0.9, 1.1),
        tilt,
        _waves(rng, 0.025),
    )
    # Vessels grow in a frame of their own, fovea along +x. Into the picture: mirror, turn, move.
    to_fovea = rng.uniform(0.72, 0.85)
    turn = -right * rng.normal(0.1, 0.12)  # the fovea lies a little below the disc
    cos, sin = math.cos(turn), math.sin(turn)
    start = np.array([cup.x, cup.y])  # vessels leave through the cup
    axes = np.array([[-right * cos, -sin], [-right * sin, cos]])
    segments = _grow_vessels(rng, to_fovea, tuple(-start @ axes))
    for columns in (slice(0, 2), slice(2, 4)):
        segments[:, columns] = segments[:, columns] @ axes.T + start
    fovea = start + axes @ np.array([to_fovea, 0.0])
    scars, spots = _lesions(rng, disc, lesions)
    return Anatomy(disc, cup, (float(fovea[0]), float(fovea[1])), segments, scars, spots)
