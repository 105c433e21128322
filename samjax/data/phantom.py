"""Phantom fundus photographs: pictures drawn by rule, with exact masks, in any number.

They let the demo, the tests and every experiment's smoke run learn something without a download.
A picture has what a fundus camera shows of a retina: a circular field of view with uneven light,
arteries and veins that grow out of the optic disc and branch, the disc with its cup, the darker
fovea, and (by chance) lesions, of which the pale scars are meant to be mistaken for a disc.

Anatomy and appearance are drawn from two separate random streams: one seed gives the same eye
under every look. Hence held-out phantoms need other seeds, not another look.

    python -m samjax.data.phantom --out DIR --look colour --count 24 --size 256 --target disc

Nothing here is a model of disease: no number measured on phantoms says anything about patients.
"""

from __future__ import annotations

import io
import math
import os
import shutil
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import numpy as np
from PIL import Image, ImageDraw
from scipy import ndimage, special

from samjax.data.phantom_anatomy import draw_anatomy

Colour = tuple[float, float, float]
Target = Literal["disc", "vessel", "cup", "disc+cup", "all"]
LookName = Literal["colour", "pale", "redfree", "dark", "angiogram"]

VESSEL, DISC, CUP = 1, 2, 3
MIN_SIDE = 32  # pixels; below it the cup can vanish

# Quantiles of the normal distribution: fine enough for grey levels, and faster than drawing them.
_NORMAL = special.ndtri((np.arange(256) + 0.5) / 256).astype(np.float32)


@dataclass(frozen=True, kw_only=True)
class Look:
    """How an eye is photographed. Colours are RGB in 0..255 and come before the illumination."""

    background: Colour = (205, 105, 50)
    artery: Colour = (165, 48, 22)
    vein: Colour = (120, 26, 16)
    reflex: Colour = (215, 110, 65)  # light streak along the middle of wide arteries
    disc: Colour = (250, 190, 105)
    cup: Colour = (255, 232, 170)
    rim: Colour = (170, 80, 40)  # thin ring on the border of the disc
    fovea: Colour = (110, 42, 18)
    haze: Colour = (235, 150, 85)  # nerve fibres around the disc
    bright_lesion: Colour = (250, 215, 110)
    dark_lesion: Colour = (105, 18, 12)
    surround: Colour = (3, 2, 2)  # outside the field of view

    vessel_contrast: float = 0.8  # opacities, 0..1
    vessel_on_disc: float = 1.0  # share of the vessels' contrast that is left on the disc
    disc_contrast: float = 0.9
    rim_contrast: float = 0.25
    fovea_contrast: float = 0.6
    haze_contrast: float = 0.4
    lesions: float = 1.0  # mean number of each of: exudate groups, haemorrhage groups, scars

    field_of_view: float = 0.97  # radius over half the shorter side; above 1 it is cropped
    vignetting: float = 0.5  # light lost at the border of the field of view, 0..1
    unevenness: float = 0.2  # light gained and lost across the field of view, 0..1
    texture: float = 0.05  # standard deviation of the mottled background, relative
    exposure: float = 0.1  # standard deviation per picture, relative
    colour_jitter: float = 0.05  # standard deviation per picture and channel, relative
    noise: float = 2.5  # standard deviation, grey levels
    blur: float = 0.5  # Gaussian sigma in pixels of a picture whose shorter side is 256
    jpeg_quality: int = 85
    grey: bool = False  # noise and jitter are the same in all channels


LOOKS: dict[str, Look] = {
    "colour": Look(),
    "pale": Look(
        background=(226, 150, 112),
        artery=(200, 84, 62),
        vein=(166, 58, 52),
        reflex=(236, 160, 130),
        disc=(254, 226, 176),
        cup=(255, 248, 222),
        rim=(200, 128, 92),
        fovea=(160, 78, 50),
        haze=(244, 190, 150),
        bright_lesion=(252, 236, 170),
        dark_lesion=(150, 44, 40),
        vignetting=0.3,
        texture=0.04,
    ),
    "redfree": Look(
        background=(98, 118, 100),
        artery=(58, 72, 60),
        vein=(36, 46, 38),
        reflex=(112, 134, 114),
        disc=(186, 206, 186),
        cup=(226, 240, 226),
        rim=(78, 94, 80),
        fovea=(34, 44, 36),
        haze=(132, 154, 134),
        bright_lesion=(206, 222, 204),
        dark_lesion=(30, 38, 32),
        fovea_contrast=0.7,
        noise=4.5,
        blur=0.6,
        grey=True,
    ),
    "dark": Look(
        background=(128, 52, 20),
        artery=(100, 26, 10),
        vein=(68, 12, 8),
        reflex=(140, 56, 26),
        disc=(214, 130, 50),
        cup=(242, 184, 98),
        rim=(96, 38, 16),
        fovea=(62, 18, 8),
        haze=(156, 80, 34),
        bright_lesion=(220, 160, 56),
        dark_lesion=(56, 8, 6),
        vessel_contrast=0.75,
        vignetting=0.65,
        unevenness=0.3,
        texture=0.07,
        noise=3.5,
        blur=0.8,
    ),
    "angiogram": Look(
        background=(72, 72, 72),
        artery=(214, 214, 214),
        vein=(236, 236, 236),
        reflex=(245, 245, 245),
        disc=(30, 30, 30),
        cup=(14, 14, 14),
        rim=(205, 205, 205),
        fovea=(24, 24, 24),
        haze=(92, 92, 92),
        bright_lesion=(235, 235, 235),
        dark_lesion=(20, 20, 20),
        vessel_contrast=0.9,
        vessel_on_disc=0.2,
        rim_contrast=0.75,
        haze_contrast=0.3,
        vignetting=0.4,
        noise=5.0,
        blur=0.6,
        grey=True,
    ),
}


# ---------------------------------------------------------------- picture


class _Canvas:
    """Coverage of a picture's pixels, 0..1, drawn several times too large and averaged down."""

    def __init__(self, size: tuple[int, int], radius: float):
        h, w = size
        self.times = int(np.clip(round(768 / min(h, w)), 2, 4))
        self.image = Image.new("L", (w * self.times, h * self.times))
        self.draw = ImageDraw.Draw(self.image)
        self.scale = radius * self.times
        self.centre = np.array([w, h]) * self.times / 2

    def lines(self, ends: np.ndarray, widths: np.ndarray) -> _Canvas:
        """Strokes (n, 4) with round ends."""
        ends = ends * self.scale + np.tile(self.centre, 2)
        widths = np.maximum(widths * self.scale, 0.8 * self.times)
        for (x0, y0, x1, y1), width in zip(ends.tolist(), widths.tolist(), strict=True):
            self.draw.line((x0, y0, x1, y1), 255, round(width))
            if (half := width / 2) > 4:  # thinner joints show no gap
                self.draw.ellipse((x1 - half, y1 - half, x1 + half, y1 + half), 255)
        return self

    def spots(self, spots: np.ndarray) -> _Canvas:
        """Ellipses (n, 4): x, y, rx, ry."""
        centres, radii = spots[:, :2] * self.scale + self.centre, spots[:, 2:] * self.scale
        for box in np.concatenate([centres - radii, centres + radii], axis=1).tolist():
            self.draw.ellipse(box, 255)
        return self

    def coverage(self) -> np.ndarray:
        return np.asarray(self.image.reduce(self.times), np.float32) / 255


def _mottle(rng: np.random.Generator, size: tuple[int, int], cells: int) -> np.ndarray:
    """Smooth random field (h, w) of about unit variance with `cells` bumps across."""
    grid = rng.normal(0, 1, (cells, cells)).astype(np.float32)
    return np.asarray(Image.fromarray(grid).resize((size[1], size[0]), Image.Resampling.BICUBIC))


def _soft(depth: np.ndarray, softness: float) -> np.ndarray:
    """Opacity of a blob: 1 inside, 0 outside, and a slope of `softness` radii on the border."""
    return np.clip((1 - depth) / softness + 0.5, 0, 1)


def _column(colour: Colour) -> np.ndarray:
    return np.array(colour, np.float32).reshape(3, 1, 1)


def make_phantom(
    seed: int | Sequence[int], look: Look | str, size: tuple[int, int] = (256, 256)
) -> dict[str, np.ndarray]:
    """Draw one phantom photograph with its label map.

    Args:
        seed: non-negative integer, or several, e.g. (set, number). Same seed, same result; the
            same seed under another look, or at another size, is the same eye.
        look: a `Look` or a name from `LOOKS`.
        size: (h, w) in pixels, each at least 32. The field of view follows the shorter side.

    Returns:
        image: uint8 (h, w, 3), RGB.
        mask: uint8 (h, w), 0 background, 1 vessel, 2 optic disc, 3 cup; where they overlap cup
            goes before disc before vessel, so the disc is filled where vessels cross it.

    Raises:
        ValueError: unknown look, or a size below 32 pixels.
    """
    look = _find_look(look)
    if len(size) != 2 or min(size) < MIN_SIDE:
        raise ValueError(f"size is {tuple(size)}, expected (h, w) of at least {MIN_SIDE} pixels")
    h, w = size = (int(size[0]), int(size[1]))
    body, light = (np.random.default_rng(s) for s in np.random.SeedSequence(seed).spawn(2))
    eye = draw_anatomy(body, look.lesions)

    # Pixels in one unit of length.
    radius = look.field_of_view * light.uniform(0.94, 1.04) * min(h, w) / 2
    y, x = np.mgrid[:h, :w].astype(np.float32)
    x, y = (x + 0.5 - w / 2) / radius, (y + 0.5 - h / 2) / radius
    from_centre = np.sqrt(x * x + y * y)
    visible = np.clip((1 - from_centre) * radius / 2 + 0.5, 0, 1)
    disc, cup = eye.disc.depth(x, y), eye.cup.depth(x, y)

    is_vein = eye.segments[:, 5] > 0
    ends, widths = eye.segments[:, :4], eye.segments[:, 4]
    artery = _Canvas(size, radius).lines(ends[~is_vein], widths[~is_vein]).coverage()
    vein = _Canvas(size, radius).lines(ends[is_vein], widths[is_vein]).coverage()
    wide = ~is_vein & (widths > 0.014)
    reflex = _Canvas(size, radius).lines(ends[wide], 0.25 * widths[wide]).coverage()

    mask = np.zeros(size, np.uint8)
    mask[(np.maximum(artery, vein) >= 0.5) & (from_centre < 1)] = VESSEL
    mask[disc <= 1] = DISC
    mask[(cup <= 1) & (disc <= 1)] = CUP

    # Colours, back to front. Channels come first here: numpy is several times faster that way.
    mottle = 0.8 * _mottle(light, size, 7) + 0.45 * _mottle(light, size, 24)
    image = _column(look.background) * (1 + look.texture * mottle)

    def paint(colour: Colour, opacity: np.ndarray) -> None:
        nonlocal image
        image += opacity * (_column(colour) - image)

    to_fovea = (x - eye.fovea[0]) ** 2 + (y - eye.fovea[1]) ** 2
    paint(look.fovea, look.fovea_contrast * np.exp(-to_fovea / (2 * 0.11**2)))
    paint(look.haze, look.haze_contrast * np.exp(-((np.maximum(disc - 0.6, 0) / 1.3) ** 2)))
    for scar in eye.scars:
        opacity = _soft(scar.depth(x, y), 0.6) * (1 + 0.25 * mottle)
        paint(look.bright_lesion, light.uniform(0.3, 0.55) * opacity)
    for bright, colour in ((1, look.bright_lesion), (0, look.dark_lesion)):
        chosen = eye.spots[eye.spots[:, 4] == bright]
        if len(chosen):
            spots = _Canvas(size, radius).spots(chosen[:, :4]).coverage()
            paint(colour, 0.75 * ndimage.gaussian_filter(spots, 0.004 * radius))
    opacity = look.disc_contrast * light.uniform(0.8, 1.0)
    paint(look.disc, opacity * _soft(disc, 0.12))
    paint(look.cup, opacity * _soft(cup, 0.4))
    paint(look.rim, look.rim_contrast * np.exp(-(((disc - 1) / 0.1) ** 2)))
    contrast = look.vessel_contrast * light.uniform(0.8, 1.0)
    contrast = contrast * (1 - (1 - look.vessel_on_disc) * _soft(disc, 0.3))
    paint(look.vein, contrast * vein)
    paint(look.artery, contrast * artery)
    paint(look.reflex, 0.5 * contrast * reflex)

    # Light, optics, sensor, file.
    channels = 1 if look.grey else 3
    direction = light.uniform(0, 2 * math.pi)
    slope = look.unevenness * (math.cos(direction) * x + math.sin(direction) * y)
    fall = look.vignetting * light.uniform(0.6, 1.2) * from_centre**3
    tint = light.normal(0, look.colour_jitter, (channels, 1, 1)) + light.normal(0, look.exposure)
    image *= np.maximum(1 + slope - fall, 0.05) * np.exp(tint).astype(np.float32)
    image = _column(look.surround) + visible * (image - _column(look.surround))
    blur = look.blur * min(h, w) / 256 * light.uniform(0.7, 1.3)
    image = ndimage.gaussian_filter(image, (0, blur, blur))
    image += look.noise * _NORMAL[light.integers(0, 256, (channels, h, w), np.uint8)]
    pixels = np.clip(image + 0.5, 0, 255).astype(np.uint8).transpose(1, 2, 0)
    file = io.BytesIO()
    Image.fromarray(pixels).save(file, "JPEG", quality=look.jpeg_quality)
    return {"image": np.array(Image.open(file)), "mask": mask}


def _find_look(look: Look | str) -> Look:
    if isinstance(look, Look):
        return look
    if look not in LOOKS:
        raise ValueError(f"unknown look {look!r}, expected one of {', '.join(LOOKS)}")
    return LOOKS[look]


# ---------------------------------------------------------------- folder


def target_mask(mask: np.ndarray, target: Target) -> np.ndarray:
    """Map a phantom's labels (0..3) to what a mask file holds, uint8 of the same shape.

    disc (cup included), vessel, cup: 0 or 255. disc+cup: 1 disc rim, 2 cup. all: unchanged.
    """
    if target == "disc":
        return np.where(mask >= DISC, 255, 0).astype(np.uint8)
    if target in ("vessel", "cup"):
        return np.where(mask == (VESSEL if target == "vessel" else CUP), 255, 0).astype(np.uint8)
    if target == "disc+cup":
        return np.maximum(mask, 1).astype(np.uint8) - 1
    if target == "all":
        return mask.astype(np.uint8)
    raise ValueError(f"unknown target {target!r}, expected disc, vessel, cup, disc+cup or all")


def write_phantom_folder(
    out_dir: str | Path,
    look: Look | str,
    count: int,
    size: int | tuple[int, int] = 256,
    seed: int = 0,
    target: Target = "disc",
) -> None:
    """Write `count` phantoms as out_dir/images/NAME.png and out_dir/masks/NAME.png.

    Picture i is `make_phantom((seed, i), …)`: sets of different seeds share no picture, and a
    larger set begins with the smaller one. For the mask values see `target_mask`. The folder
    appears complete or not at all.

    Raises:
        ValueError: a bad look, count, size or target, or out_dir exists and is not empty.
    """
    out_dir = Path(out_dir)
    look, name = _find_look(look), look if isinstance(look, str) else "phantom"
    size = (size, size) if isinstance(size, int) else size
    target_mask(np.zeros((1, 1), np.uint8), target)
    if count < 1:
        raise ValueError(f"count is {count}, expected at least 1")
    if out_dir.exists() and (not out_dir.is_dir() or any(out_dir.iterdir())):
        raise ValueError(f"{out_dir}: exists already, expected a new or empty folder")
    out_dir.parent.mkdir(parents=True, exist_ok=True)
    partial = out_dir.with_name(f".{out_dir.name}.{os.getpid()}.partial")
    try:
        for kind in ("images", "masks"):
            (partial / kind).mkdir(parents=True)
        for i in range(count):
            phantom = make_phantom((seed, i), look, size)
            file = f"{name}_{i:04d}.png"
            Image.fromarray(phantom["image"]).save(partial / "images" / file)
            Image.fromarray(target_mask(phantom["mask"], target)).save(partial / "masks" / file)
        if out_dir.exists():
            out_dir.rmdir()
        partial.rename(out_dir)
    except BaseException:
        shutil.rmtree(partial, ignore_errors=True)
        raise


def _command(
    out: Path,
    look: LookName = "colour",
    count: int = 24,
    size: int = 256,
    target: Target = "disc",
    seed: int = 0,
) -> None:
    """Write phantom fundus photographs with masks.

    Args:
        out: new folder; gets images/ and masks/.
        look: how the eye is photographed.
        count: number of pictures.
        size: side length in pixels.
        target: what the masks show.
        seed: sets of different seeds share no picture.
    """
    write_phantom_folder(out, look, count, size, seed, target)
    print(f"wrote {count} pictures to {out}")


if __name__ == "__main__":
    import tyro

    try:
        tyro.cli(_command)
    except (ValueError, OSError) as error:
        raise SystemExit(f"error: {error}") from None
