"""Phantom scans: a CT of an abdomen and MR images of a head, as ellipsoids with exact labels.

They let the tests and every experiment's smoke run read, slice and learn without a download. The
CT is in Hounsfield units: air, a layer of fat, soft tissue, a spine, organs. The MR images are
several modalities on one grid: a background of exactly 0 (as skull-stripped images have it), a
brain, and a tumour of nested parts, which each modality shows with another contrast.

These shapes model no disease and no scanner: no number measured on them says anything about
patients.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np

_AIR, _FAT, _TISSUE, _BONE = -1000, -100, 40, 600  # Hounsfield units
_NOISE = 12.0  # standard deviation in Hounsfield units
_FAT_FROM = 0.86  # of the body's radius outwards


@dataclass(frozen=True)
class Ellipsoid:
    """Centre and radii in a body whose surface is the unit sphere, and its Hounsfield units.

    The axes are those of RAS: right, anterior, superior.
    """

    centre: tuple[float, float, float]
    radii: tuple[float, float, float]
    hounsfield: float


_SPINE = Ellipsoid((0.0, -0.62, 0.0), (0.13, 0.15, 9.0), _BONE)  # runs through every slice
# In the order in which they are painted: what comes later lies on what came before.
ORGANS: dict[str, Ellipsoid] = {
    "liver": Ellipsoid((0.42, 0.12, 0.25), (0.34, 0.46, 0.60), 110),
    "stomach": Ellipsoid((-0.30, 0.40, 0.25), (0.24, 0.22, 0.50), 20),
    "spleen": Ellipsoid((-0.58, -0.22, 0.30), (0.15, 0.24, 0.45), 125),
    "right kidney": Ellipsoid((0.36, -0.48, -0.20), (0.15, 0.17, 0.45), 170),
    "left kidney": Ellipsoid((-0.36, -0.50, -0.10), (0.15, 0.17, 0.45), 175),
    "pancreas": Ellipsoid((-0.08, 0.10, 0.00), (0.22, 0.10, 0.30), 90),
    "duodenum": Ellipsoid((0.10, 0.28, -0.20), (0.10, 0.12, 0.35), 50),
    "gallbladder": Ellipsoid((0.36, 0.58, -0.05), (0.12, 0.13, 0.35), 10),
    "aorta": Ellipsoid((-0.07, -0.34, 0.00), (0.09, 0.10, 9.0), 250),
    "postcava": Ellipsoid((0.13, -0.32, 0.00), (0.09, 0.10, 9.0), 160),
    "veins": Ellipsoid((0.14, 0.02, 0.10), (0.13, 0.07, 0.25), 150),
    "esophagus": Ellipsoid((-0.14, -0.16, 0.70), (0.07, 0.07, 0.40), 30),
    "right adrenal gland": Ellipsoid((0.22, -0.14, 0.30), (0.06, 0.08, 0.25), 70),
    "left adrenal gland": Ellipsoid((-0.30, -0.16, 0.30), (0.06, 0.08, 0.25), 75),
    "bladder": Ellipsoid((0.05, 0.45, -0.80), (0.22, 0.20, 0.25), 5),
    "prostate": Ellipsoid((0.03, 0.05, -0.85), (0.12, 0.12, 0.20), 60),
    "liver tumour": Ellipsoid((0.50, 0.15, 0.25), (0.12, 0.14, 0.25), 55),
    "kidney tumour": Ellipsoid((0.42, -0.55, -0.20), (0.08, 0.09, 0.25), 80),
}


def phantom_ct(
    shape: tuple[int, int, int], organs: Mapping[str, int], *, seed: int = 0
) -> tuple[np.ndarray, np.ndarray]:
    """A CT of an abdomen.

    Args:
        shape: (i, j, k) of at least 1; the axes run to the right, to the front and upwards.
        organs: name, one of ``ORGANS`` → label, 1 to 255. Each has a voxel at least where the
            grid is fine enough to tell the organs' centres apart.
        seed: of sizes, places and noise.

    Returns:
        Hounsfield units int16 (i, j, k), and labels uint8 of that shape.

    Raises:
        ValueError: an unknown organ, a label out of its range, or no voxels.
    """
    unknown = [name for name in organs if name not in ORGANS]
    if unknown or not all(0 < label < 256 for label in organs.values()):
        raise ValueError(f"organs {dict(organs)}: expected labels 1 to 255 of {', '.join(ORGANS)}")
    rng = np.random.default_rng(seed)
    grid = _grid(shape)
    body = np.sqrt(grid[0] ** 2 + grid[1] ** 2) / rng.uniform(0.92, 0.99)
    body = np.broadcast_to(body, shape)
    values = np.where(body < 1, np.where(body < _FAT_FROM, _TISSUE, _FAT), _AIR).astype(np.float64)
    values[_inside(grid, _SPINE.centre, _SPINE.radii)] = _SPINE.hounsfield
    labels = np.zeros(shape, np.uint8)
    places = {}
    for name in ORGANS:
        shift, size = rng.uniform(-0.02, 0.02, 3), rng.uniform(0.9, 1.1, 3)
        if name in organs:  # drawn for all, so that one more organ does not move the others
            centre = _snapped(np.array(ORGANS[name].centre) + shift, shape)
            where = _inside(grid, centre, size * ORGANS[name].radii)
            values[where], labels[where] = ORGANS[name].hounsfield, organs[name]
            places[name] = _voxel(centre, shape)
    for name, place in places.items():  # none is covered wholly
        values[place], labels[place] = ORGANS[name].hounsfield, organs[name]
    values += rng.normal(0, _NOISE, shape)
    return np.rint(values).clip(-1024, 3071).astype(np.int16), labels


def phantom_mr(
    shape: tuple[int, int, int],
    modalities: int = 1,
    nested: Sequence[int] = (1,),
    *,
    seed: int = 0,
) -> tuple[np.ndarray, np.ndarray]:
    """MR images of a head with a tumour.

    Args:
        shape: (i, j, k) of at least 1.
        modalities: number of images; the contrast of the n-th is the same for every seed.
        nested: labels of the tumour's parts, 1 to 255, from the outermost to the core.
        seed: of the tumour's place and size, and of the noise.

    Returns:
        Signals int16 (modalities, i, j, k), above 0 in the brain and 0 elsewhere, and labels
        uint8 (i, j, k).

    Raises:
        ValueError: no modality, no part, a label out of its range, or no voxels.
    """
    if modalities < 1 or not nested or not all(0 < label < 256 for label in nested):
        raise ValueError(
            f"modalities {modalities}, nested {tuple(nested)}: expected at least one of each, and "
            "labels 1 to 255"
        )
    rng = np.random.default_rng(seed)
    grid = _grid(shape)
    centre = _snapped(rng.uniform(-0.3, 0.3, 3), shape)
    radius = rng.uniform(0.40, 0.55, 3)
    parts = np.zeros(shape, np.intp)  # 0 for the brain, then the parts inwards
    labels = np.zeros(shape, np.uint8)
    for depth, label in enumerate(nested):
        where = _inside(grid, centre, radius * (1 - depth / len(nested)))
        where[_voxel(centre, shape)] = True
        parts[where], labels[where] = depth + 1, label
    brain = _inside(grid, (0.0, 0.0, 0.0), (0.92, 0.95, 1.6)) | (labels > 0)
    images = []
    for modality in range(modalities):
        contrast = np.random.default_rng((7, modality)).permutation(len(nested) + 1)
        signal = 300.0 + 250.0 * contrast[parts] + rng.normal(0, 20, shape)
        images.append(np.where(brain, signal.clip(1), 0))
    return np.rint(np.stack(images)).astype(np.int16), labels


def _grid(shape: tuple[int, int, int]) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Places of the voxels' centres along each axis, -1 to 1 across the volume; they broadcast."""
    if len(shape) != 3 or min(shape) < 1:
        raise ValueError(f"shape {tuple(shape)}: expected three lengths of at least 1")
    i, j, k = ((np.arange(length) + 0.5) * 2 / length - 1 for length in shape)
    return i[:, None, None], j[None, :, None], k[None, None, :]


def _inside(
    grid: tuple[np.ndarray, np.ndarray, np.ndarray],
    centre: Sequence[float] | np.ndarray,
    radii: Sequence[float] | np.ndarray,
) -> np.ndarray:
    i, j, k = (((g - c) / r) ** 2 for g, c, r in zip(grid, centre, radii, strict=True))
    return i + j + k <= 1


def _voxel(centre: np.ndarray, shape: tuple[int, int, int]) -> tuple[int, ...]:
    """The voxel in which a place lies."""
    lengths = np.array(shape)
    return tuple(((centre + 1) * lengths / 2).astype(int).clip(0, lengths - 1).tolist())


def _snapped(centre: np.ndarray, shape: tuple[int, int, int]) -> np.ndarray:
    """The centre of the voxel in which a place lies: small ellipsoids then have one at least."""
    return (np.array(_voxel(centre, shape)) + 0.5) * 2 / np.array(shape) - 1
