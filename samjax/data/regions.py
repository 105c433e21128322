"""Where in an object point prompts are drawn: the regions of SAM2LoRA, and the plain one.

SAM2LoRA (arXiv 2510.10288; sayanmndl21/SAM2LoRA, ``dataloader/datautils.py``: ``get_points``) draws
from the mask eroded by 2x2 pixels, and has four regions. What differs here is said at each of them.
"""

from __future__ import annotations

import numpy as np
from scipy import ndimage

REGIONS = ("foreground", "general", "center", "periphery", "density", "density_released")
"""What `draw_points` knows; only the last draws pixels outside the mask."""

_DENSE_KERNEL = 15  # pixels, upstream's `density_blur_size`


def as_region(region: str) -> str:
    """The region, checked: `ValueError` where it is none of `REGIONS`."""
    if region not in REGIONS:
        raise ValueError(f"region {region!r}: expected one of {', '.join(REGIONS)}")
    return region


def draw_points(
    mask: np.ndarray, count: int, rng: np.random.Generator, region: str = "foreground"
) -> np.ndarray:
    """Draws `count` foreground points of a mask.

    The regions, all but the first within the mask eroded by 2x2 pixels (`erode_once`):

        foreground         any pixel of the mask, evenly, with replacement
        general            the same of the eroded mask
        center, periphery  the pixels nearest to the centroid, or farthest from it, that keep a
                           distance from each other: the longest side of the array over `count`,
                           or five times as much. Where that leaves too few it is halved, as often
                           as needed (upstream returns too few, and compares x with y in it).
        density            evenly, without replacement, from what an erosion by 15x15 leaves; by
                           less where fewer than `count` pixels would be left
        density_released   the same as upstream's code does it: where the erosions leave nothing,
                           as of thin vessels, every pixel of the picture qualifies, background too

    A mask with fewer pixels than `count` gives some of them again.

    Args:
        mask: bool (h, w).
        count: at least 0.
        rng: the only source of chance; `center` and `periphery` need none.
        region: of `REGIONS`.

    Returns:
        int64 (count, 2), (x, y) in pixels; (0, 2) where the mask is empty, whatever the region.

    Raises:
        ValueError: unknown region.
    """
    as_region(region)
    if not mask.any() or not count:
        return np.zeros((0, 2), np.int64)
    if region == "foreground":
        places = _with_replacement(mask, count, rng)
    elif region == "general":
        places = _with_replacement(erode_once(mask), count, rng)
    elif region in ("center", "periphery"):
        places = _by_distance(erode_once(mask), count, farthest=region == "periphery")
    else:
        places = _dense(mask, count, rng, released=region == "density_released")
    rows, columns = np.divmod(places, mask.shape[1])
    return np.stack([columns, rows], axis=-1)


def erode_once(mask: np.ndarray) -> np.ndarray:
    """The mask bool (h, w) eroded by 2x2 pixels, or as it is where nothing would be left of it.

    A pixel stays if it, its left, its upper and its upper left neighbour are in the mask, as
    OpenCV anchors a kernel of even size. What lies outside the picture erodes nothing.
    """
    eroded = _erode(mask, 2)
    return eroded if eroded.any() else mask


def _erode(mask: np.ndarray, side: int) -> np.ndarray:
    return ndimage.minimum_filter(mask.astype(np.uint8), side, mode="constant", cval=1) > 0


def _with_replacement(mask: np.ndarray, count: int, rng: np.random.Generator) -> np.ndarray:
    candidates = np.flatnonzero(mask)
    return candidates[rng.integers(len(candidates), size=count)]


def _by_distance(mask: np.ndarray, count: int, *, farthest: bool) -> np.ndarray:
    places = np.argwhere(mask)
    distances = np.linalg.norm(places - places.mean(axis=0), axis=1)
    places = places[np.argsort(-distances if farthest else distances, kind="stable")]
    spacing = (5 if farthest else 1) / count * max(mask.shape)
    wanted = min(count, len(places))
    while len(chosen := _keep_apart(places, wanted, spacing)) < wanted:
        spacing /= 2
    return np.resize(np.ravel_multi_index(tuple(chosen.T), mask.shape), count)


def _keep_apart(places: np.ndarray, count: int, spacing: float) -> np.ndarray:
    """At most `count` of the places (n, 2), each the first that is far enough from those before."""
    chosen = []
    while len(places) and len(chosen) < count:
        chosen.append(places[0])
        places = places[((places - places[0]) ** 2).sum(axis=1) > spacing**2]
    return np.array(chosen)


def _dense(mask: np.ndarray, count: int, rng: np.random.Generator, *, released: bool) -> np.ndarray:
    core = _erode(mask, 2) if released else erode_once(mask)
    if released and not _erode(core, _DENSE_KERNEL).any():
        core, side = np.ones_like(mask), 1
    else:
        # The largest that leaves enough: windows are nested, so what is left shrinks as they grow.
        side, largest = 1, _DENSE_KERNEL
        while side < largest:
            middle = (side + largest + 1) // 2
            if _erode(core, middle).sum() >= count:
                side = middle
            else:
                largest = middle - 1
    candidates = np.flatnonzero(_erode(core, side))
    return rng.choice(candidates, count, replace=len(candidates) < count)
