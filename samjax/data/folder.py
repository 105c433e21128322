"""A folder of images and a folder of masks as a random access data set."""

from collections.abc import Container, Sequence
from pathlib import Path
from typing import Any

from samjax.data.images import (
    DataError,
    check_sizes,
    image_header_size,
    mask_header_size,
    read_image,
    read_mask,
)

IMAGE_SUFFIXES = frozenset({".png", ".jpg", ".jpeg", ".tif", ".tiff", ".bmp", ".gif", ".webp"})
# What may lie beside the images without being one. Anything else is reported, because an image
# in a format that is not read must not vanish from the training set.
_DOCUMENT_SUFFIXES = frozenset(
    {"", ".txt", ".md", ".rst", ".csv", ".tsv", ".json", ".jsonl", ".xml", ".yaml", ".yml"}
    | {".html", ".pdf", ".doc", ".docx", ".xls", ".xlsx", ".db", ".ini", ".log", ".py", ".ipynb"}
)
_SEPARATORS = "_-. "


class FolderDataset:
    """Images of one folder with the masks of another, paired by name.

    A mask belongs to the image whose stem it has, or whose stem, a separator (`_`, `-`, `.` or a
    space) and anything more it has: `IDRiD_01.jpg` and `IDRiD_01_OD.png`. The longest such image
    stem wins. With `mask_suffix`, only masks whose stem ends with it are looked at, and each must
    be named image stem + suffix (`mask_suffix="_1stHO"` where a second observer's lie there too).
    Images: png, jpg, tif, bmp, gif, webp, of 8 bits a channel; masks: the same but jpg.
    Sub-folders, hidden files and documents (txt, csv, …) are not looked at.

    Args:
        images_dir: folder of the images.
        masks_dir: folder of the masks, another one than `images_dir`.
        classes: None for binary masks, whose values are 0 and 1, or 0 and 255 → labels 0, 1.
            Otherwise the values of the classes: the i-th becomes label i (counted from 1), 0 is
            the background, any other value is an error.
        mask_suffix: see above.

    Raises:
        DataError: a folder is missing or empty; or images without mask, masks without image,
            several masks for an image, files of other formats: all of them in one message.
        ValueError: `classes` are not different whole numbers above 0.
    """

    def __init__(
        self,
        images_dir: str | Path,
        masks_dir: str | Path,
        classes: Sequence[int] | None = None,
        mask_suffix: str | None = None,
    ) -> None:
        self.images_dir = Path(images_dir)
        self.masks_dir = Path(masks_dir)
        self.classes = None if classes is None else _checked_classes(classes)
        self.pairs = _pair(self.images_dir, self.masks_dir, mask_suffix)

    @property
    def num_classes(self) -> int:
        """Number of classes beside the background: labels run from 0 to this."""
        return 1 if self.classes is None else len(self.classes)

    def __len__(self) -> int:
        return len(self.pairs)

    def __getitem__(self, index: int, /) -> dict[str, Any]:
        """Decodes one pair: image uint8 (h, w, 3) RGB, mask uint8 (h, w) labels, name (stem).

        Raises:
            DataError: a file cannot be read, the sizes differ, the mask has unknown values.
        """
        image_path, mask_path = self.pairs[index]
        image = read_image(image_path)
        mask = read_mask(mask_path, self.classes)
        check_sizes(image_path, image.shape[:2], mask_path, mask.shape)
        return {"image": image, "mask": mask, "name": image_path.stem}

    def check(self) -> None:
        """Looks at every pair before the work begins, reading headers only (fast).

        Catches files that are not images, unusable pixel formats, JPEG masks and sizes that
        differ. Values and truncated pixel data are checked when an example is read.

        Raises:
            DataError: with every problem found.
        """
        problems = []
        for image_path, mask_path in self.pairs:
            try:
                image_size, mask_size = image_header_size(image_path), mask_header_size(mask_path)
                check_sizes(image_path, image_size, mask_path, mask_size)
            except DataError as error:
                problems.append(str(error))
        if problems:
            raise DataError(
                f"{len(problems)} of {len(self)} pairs in {self.images_dir} and {self.masks_dir} "
                "cannot be used:\n  " + "\n  ".join(problems)
            )


def _checked_classes(classes: Sequence[int]) -> tuple[int, ...]:
    values = tuple(int(value) for value in classes)
    if not values or len(values) > 255 or len(set(values)) < len(values) or min(values) < 1:
        raise ValueError(
            f"classes {','.join(str(v) for v in values) or '(none)'}: expected 1 to 255 different "
            "mask values above 0 (0 is the background)"
        )
    return values


def _files(folder: Path, what: str) -> list[Path]:
    """The files of a folder that are, or could be, images; by name."""
    if not folder.is_dir():
        raise DataError(f"{what} folder {folder}: no such folder")
    files = [f for f in sorted(folder.iterdir()) if f.is_file() and not f.name.startswith(".")]
    files = [f for f in files if f.suffix.lower() not in _DOCUMENT_SUFFIXES]
    if not any(f.suffix.lower() in IMAGE_SUFFIXES for f in files):
        found = f" (found {', '.join(f.name for f in files[:5])})" if files else ""
        raise DataError(
            f"{what} folder {folder}: no {what}s of a known format{found}; expected "
            f"{', '.join(sorted(IMAGE_SUFFIXES))} directly in it, not in sub-folders"
        )
    return files


def _pair(images_dir: Path, masks_dir: Path, suffix: str | None) -> tuple[tuple[Path, Path], ...]:
    image_files, mask_files = _files(images_dir, "image"), _files(masks_dir, "mask")
    if images_dir.resolve() == masks_dir.resolve():
        raise DataError(f"{images_dir}: images and masks must lie in different folders")
    if suffix is not None:
        mask_files = [f for f in mask_files if f.stem.endswith(suffix)]

    unknown = [f for f in image_files + mask_files if f.suffix.lower() not in IMAGE_SUFFIXES]
    images: dict[str, list[Path]] = {}
    for file in image_files:
        images.setdefault(file.stem, []).append(file)
    masks: dict[str, list[Path]] = {stem: [] for stem in images}
    orphans = []
    for file in mask_files:
        stem = _image_stem(file.stem, masks, suffix)
        if stem is None:
            orphans.append(file)
        else:
            masks[stem].append(file)

    sections = {
        f"in an unknown format (known: {', '.join(sorted(IMAGE_SUFFIXES))})": unknown,
        "images with the same name": [f for same in images.values() if same[1:] for f in same],
        "images without a mask": [f for s, same in images.items() if not masks[s] for f in same],
        "masks without an image": orphans,
        "several masks for one image (--mask-suffix chooses)": [
            f for same in masks.values() if same[1:] for f in same
        ],
        "JPEG masks, whose values are not exact (expected PNG or TIFF)": [
            f for f in mask_files if f.suffix.lower() in (".jpg", ".jpeg")
        ],
    }
    problems = [
        f"{title} ({len(files)}): {', '.join(f.name for f in files)}"
        for title, files in sections.items()
        if files
    ]
    if problems:
        rule = (
            "is named like its image, or like it plus one of '_', '-', '.', ' ' and more"
            if suffix is None
            else f"is named like its image plus {suffix!r}"
        )
        raise DataError(
            f"images {images_dir} and masks {masks_dir} do not pair up (a mask {rule}):\n  "
            + "\n  ".join(problems)
        )
    return tuple((images[stem][0], masks[stem][0]) for stem in images)


def _image_stem(mask_stem: str, stems: Container[str], suffix: str | None) -> str | None:
    """The image stem that a mask belongs to, the longest one that fits."""
    if suffix is not None:
        stem = mask_stem[: len(mask_stem) - len(suffix)]
        return stem if stem in stems else None
    if mask_stem in stems:
        return mask_stem
    for end in range(len(mask_stem) - 2, 0, -1):
        if mask_stem[end] in _SEPARATORS and mask_stem[:end] in stems:
            return mask_stem[:end]
    return None
