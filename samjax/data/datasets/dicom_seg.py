"""Your own scans in DICOM: a series of slices and a DICOM segmentation object (SEG) a case.

Bridge et al., Highdicom, Journal of Digital Imaging 2022: `pip install 'samjax[dicom]'`. The SEG's
frames are laid onto the series by where they lie (ImagePositionPatient), not by their order. Where
a segment has no frame, it is background: writers leave out empty frames.

A patient is the PatientID; where that was blanked, a case is a patient of its own.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from samjax.data.datasets.base import Case, Scans, wrong_tree
from samjax.data.images import DataError
from samjax.data.intensity import Intensity, Percentiles, Window
from samjax.data.itk import storage_class
from samjax.data.volumes import Volume, read_volume

TREE = """
    CASE/…/*.dcm          a series of slices, one file each, in one folder anywhere below CASE,
    CASE/…/seg.dcm        and one DICOM SEG of it
  or, a folder a split:
    train/CASE/…          test/CASE/…
"""
_SEG = (b"1.2.840.10008.5.1.4.1.1.66.4", b"1.2.840.10008.5.1.4.1.1.66.7")  # the second: label map
_OFF_GRID = 0.1  # of a voxel's shortest edge: how far a frame may lie off its slice
_LPS_TO_RAS = np.array([-1.0, -1.0, 1.0])
_PLANE = ("ImagePositionPatient", "ImageOrientationPatient", "PixelSpacing")
_IDENTITY = ("SeriesInstanceUID", "FrameOfReferenceUID", "PatientID", "Modality")
_EXTENT = ("Rows", "Columns", "NumberOfFrames")


class _Seg(NamedTuple):
    """Where a SEG belongs, and the label of each of its segments."""

    folder: Path
    series: str
    labels: Mapping[int, int]


class _Grid(NamedTuple):
    """Where the slices of a series lie; LPS in mm."""

    places: np.ndarray  # (k, 3), in the order of `read_volume`
    directions: np.ndarray  # (6,) of a row, then of a column
    spacing: np.ndarray  # (2,) between rows, between columns
    size: tuple[int, int]  # rows, columns
    frame_of_reference: str


def dicom_seg(
    root: str | Path,
    split: str = "train",
    *,
    classes: Sequence[str] | None = None,
    intensity: Intensity | None = None,
) -> Scans:
    """Reads DICOM series with their segmentations.

    Args:
        root: see ``TREE``.
        split: the folder that holds the cases; "train" where there is none.
        classes: segment labels (names); the first becomes label 1. Then a case may lack some, and
            number them as it likes. None for all segments by their numbers, which then must have
            the same names in every case.
        intensity: units to grey values; None for -125 to 275 Hounsfield units where all cases are
            CT, else for percentiles.

    Raises:
        DataError: another tree; a case without SEG or with several; a SEG of a series that is not
            there, in another frame of reference, or with segments of other names; a multi-frame
            image. At an example: fractional segments, segments that overlap, frames that lie off
            the slices, and what `samjax.data.volumes.read_volume` refuses.
        ImportError: highdicom is not installed.
    """
    root = Path(root)
    folder = root / split
    if split == "train" and not folder.is_dir():
        folder = root
    names = [f.name for f in folder.iterdir() if f.is_dir()] if folder.is_dir() else []
    names = sorted(name for name in names if not name.startswith("."))
    if not names:
        raise wrong_tree(folder if folder.is_dir() else root, f"cases of {split!r}", TREE)
    segs: dict[Path, _Seg] = {}
    cases, modalities = [], set()
    segments: dict[Path, dict[int, str]] = {}
    for name in names:
        file, header, image_file, image = _case(folder / name)
        segments[file] = _segments(header)
        known = segments[next(iter(segments))]
        labels = _labels(file, segments[file], known, next(iter(segments)), classes)
        segs[file] = _Seg(image_file.parent, image.SeriesInstanceUID, labels)
        modalities.add(image.get("Modality"))
        patient = str(image.get("PatientID") or "")
        cases.append(Case(name, (image_file.parent,), (file,), patient))
    known = next(iter(segments.values()))
    series = {seg.folder: seg.series for seg in segs.values()}
    return Scans(
        dataset="dicom_seg",
        root=root,
        split=split,
        cases=tuple(cases),
        class_names=tuple(known[n] for n in sorted(known)) if classes is None else tuple(classes),
        intensity=intensity or (Window(-125, 275) if modalities == {"CT"} else Percentiles()),
        axis=None,
        read=partial(_read, segs=segs, series=series),
        shape=partial(_shape, series=series),
    )


def _case(folder: Path) -> tuple[Path, Any, Path, Any]:
    """The SEG and its header, an image file of the series that it refers to and its header."""
    files = [f for f in sorted(folder.rglob("*")) if f.is_file() and not f.name.startswith(".")]
    kinds = {file: storage_class(file) for file in files}
    found = [file for file, kind in kinds.items() if kind in _SEG]
    if len(found) != 1:
        listed = f" ({', '.join(file.name for file in found)})" if found else ""
        raise DataError(f"{folder}: {len(found)} DICOM SEGs{listed}; expected one a case")
    seg = _header(found[0], "SegmentSequence", "ReferencedSeriesSequence", "FrameOfReferenceUID")
    wanted = [str(s.SeriesInstanceUID) for s in seg.get("ReferencedSeriesSequence", [])]
    if len(wanted) != 1 or not seg.get("SegmentSequence"):
        raise DataError(f"{found[0]}: refers to {len(wanted)} series; expected one, and segments")
    others = {}
    images = [f for f, kind in kinds.items() if kind is not None and kind not in _SEG]
    first = {file.parent: file for file in reversed(images)}  # mostly, one file tells of them all
    for file in dict.fromkeys((*first.values(), *images)):
        image = _header(file, *_IDENTITY, *_PLANE, *_EXTENT)
        uid = image.get("SeriesInstanceUID")
        if uid == wanted[0]:
            _check_slice(file, image)
            if image.get("FrameOfReferenceUID") != seg.get("FrameOfReferenceUID"):
                raise DataError(
                    f"{found[0]}: lies in the frame of reference {seg.get('FrameOfReferenceUID')}, "
                    f"but {file} in {image.get('FrameOfReferenceUID')}; expected one"
                )
            return found[0], seg, file, image
        others[uid] = file
    listed = ", ".join(f"{uid} ({file.name})" for uid, file in others.items())
    raise DataError(
        f"{found[0]}: is of the series {wanted[0]}, which is not in {folder}; found "
        f"{listed or 'no images'}"
    )


def _segments(seg: Any) -> dict[int, str]:
    """Names by number; a label map may describe its background, as number 0."""
    names = {int(s.SegmentNumber): str(s.SegmentLabel) for s in seg.SegmentSequence}
    return {number: name for number, name in names.items() if number != 0}


def _labels(
    file: Path,
    segments: dict[int, str],
    known: dict[int, str],
    known_file: Path,
    classes: Sequence[str] | None,
) -> dict[int, int]:
    """Segment number to label."""
    if classes is not None:
        unknown = [name for name in segments.values() if name not in classes]
        if unknown:
            raise DataError(f"{file}: segment {unknown[0]!r}; expected of {', '.join(classes)}")
        return {number: list(classes).index(name) + 1 for number, name in segments.items()}
    if segments != known:
        raise DataError(
            f"{file}: segments {segments}, but {known_file} has {known}; expected the same, or "
            "classes= with their names"
        )
    if not 1 <= len(segments) <= 255:
        raise DataError(f"{file}: segments {segments}; expected 1 to 255")
    return {number: label for label, number in enumerate(sorted(segments), start=1)}


def _header(file: Path, *tags: str) -> Any:
    pydicom, _ = _libraries()
    try:
        return pydicom.dcmread(file, stop_before_pixels=True, specific_tags=list(tags))
    except Exception as error:  # pydicom lets through whatever it stumbles over
        raise DataError(f"{file}: not a readable DICOM file ({error})") from error


def _check_slice(file: Path, image: Any) -> None:
    if int(image.get("NumberOfFrames") or 1) > 1:
        raise DataError(
            f"{file}: a DICOM image of {image.NumberOfFrames} frames; expected a file a slice"
        )
    lacking = [tag for tag in (*_PLANE, *_EXTENT[:2]) if image.get(tag) is None]
    if lacking:
        raise DataError(f"{file}: no {', '.join(lacking)}; expected one slice of a volume")


def _grid(folder: Path, series: str) -> _Grid:
    slices = []
    for file in sorted(folder.iterdir()):
        if file.is_file() and storage_class(file) not in (None, *_SEG):
            image = _header(file, *_IDENTITY, *_PLANE, *_EXTENT)
            if image.get("SeriesInstanceUID") == series:
                _check_slice(file, image)
                slices.append(image)
    if not slices:
        raise DataError(f"{folder}: no images of the series {series}")
    directions = np.array(slices[0].ImageOrientationPatient, float)
    places = np.array([image.ImagePositionPatient for image in slices], float)
    order = np.argsort(places @ np.cross(directions[:3], directions[3:]), kind="stable")
    return _Grid(
        places[order],
        directions,
        np.array(slices[0].PixelSpacing, float),
        (int(slices[0].Rows), int(slices[0].Columns)),
        str(slices[0].get("FrameOfReferenceUID")),
    )


def _shape(folder: Path, *, series: Mapping[Path, str]) -> tuple[int, int, int]:
    grid = _grid(folder, series[folder])
    return grid.size[1], grid.size[0], len(grid.places)


def _read(path: Path, *, segs: Mapping[Path, _Seg], series: Mapping[Path, str]) -> Volume:
    """The volume of a series' folder, or the labels of a SEG on the grid of its series."""
    if path in segs:
        return _read_labels(path, segs[path])
    return read_volume(path, series=series[path])


def _read_labels(file: Path, seg: _Seg) -> Volume:
    grid = _grid(seg.folder, seg.series)
    labels = np.zeros((len(grid.places), *grid.size), np.uint8)
    for number, values, label_of in _frames(file, seg, grid):
        for value, label in label_of.items():
            found = values == value
            below = labels[number][found]
            if ((below != 0) & (below != label)).any():
                raise DataError(f"{file}: its segments overlap; expected one a voxel")
            labels[number][found] = label
    if len(grid.places) == 1:  # of one slice, only ITK knows how thick it takes it to be
        affine = read_volume(seg.folder, series=seg.series).affine
    else:
        rows, columns = grid.spacing
        step = (grid.places[-1] - grid.places[0]) / (len(grid.places) - 1)
        edges = (grid.directions[:3] * columns, grid.directions[3:] * rows, step)
        affine = np.eye(4)
        affine[:3] = np.column_stack([*edges, grid.places[0]]) * _LPS_TO_RAS[:, None]
    return Volume(labels.transpose(2, 1, 0), affine)


def _frames(file: Path, seg: _Seg, grid: _Grid) -> Iterator[tuple[int, np.ndarray, dict]]:
    """(slice, stored values (rows, columns), value → label) of each frame."""
    _, highdicom = _libraries()
    try:
        stored = highdicom.seg.segread(file)
        kind = str(stored.SegmentationType)
        if kind == "FRACTIONAL":
            raise DataError(f"{file}: a SEG of fractions; expected BINARY or LABELMAP")
        frames = stored.pixel_array.reshape(-1, stored.Rows, stored.Columns)
        shared = stored.SharedFunctionalGroupsSequence[0]
        for values, own in zip(frames, stored.PerFrameFunctionalGroupsSequence, strict=True):
            at = _slice_of(file, values.shape, own, shared, grid)
            label_of = dict(seg.labels)
            if kind == "BINARY":
                found = _group(file, own, shared, "SegmentIdentificationSequence")
                label_of = {1: seg.labels[int(found.ReferencedSegmentNumber)]}
            elif unknown := set(np.unique(values).tolist()) - {0, *label_of}:
                raise DataError(f"{file}: values {sorted(unknown)} of no segment")
            yield at, values, label_of
    except DataError:
        raise
    except Exception as error:  # highdicom and pydicom let through whatever they stumble over
        reason = str(error) or type(error).__name__
        raise DataError(f"{file}: not a readable DICOM SEG ({reason})") from error


def _slice_of(file: Path, size: tuple[int, ...], own: Any, shared: Any, grid: _Grid) -> int:
    """The slice on which a frame lies."""
    place = np.array(_group(file, own, shared, "PlanePositionSequence").ImagePositionPatient, float)
    plane = _group(file, own, shared, "PlaneOrientationSequence").ImageOrientationPatient
    spacing = np.array(_group(file, own, shared, "PixelMeasuresSequence").PixelSpacing, float)
    off_plane = np.abs(np.array(plane, float) - grid.directions).max()
    off_spacing = np.abs(spacing / grid.spacing - 1).max()
    if size != grid.size or off_plane > 1e-3 or off_spacing > 1e-3:
        raise DataError(
            f"{file}: frames of {size} pixels, {spacing.tolist()} mm apart, along {list(plane)}; "
            f"expected those of its series, {grid.size}, {grid.spacing.tolist()}, "
            f"{grid.directions.tolist()}"
        )
    away = np.linalg.norm(grid.places - place, axis=1)
    nearest = int(away.argmin())
    edges = [*grid.spacing.tolist(), *np.linalg.norm(np.diff(grid.places[:2], axis=0), axis=1)]
    if away[nearest] > _OFF_GRID * min(edges):
        raise DataError(
            f"{file}: a frame at {place.tolist()}, {away[nearest]:.2f} mm off the nearest slice of "
            "its series"
        )
    return nearest


def _group(file: Path, own: Any, shared: Any, name: str) -> Any:
    """A functional group of a frame, or else of all frames."""
    for groups in (own, shared):
        if groups.get(name):
            return groups[name][0]
    raise DataError(f"{file}: a frame without {name}; expected one that lies on a slice")


def _libraries() -> tuple[Any, Any]:
    try:
        import highdicom
        import pydicom
    except ImportError as error:
        raise ImportError("DICOM SEG needs highdicom: pip install 'samjax[dicom]'") from error
    return pydicom, highdicom
