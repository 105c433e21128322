"""The frames of a clip, decoded when they are asked for.

A folder of JPEG files is read as SAM 2's loader reads it (sam2/utils/misc.py): in the order of
the numbers in the names, as Pillow decodes them, without regard to an EXIF rotation. A video file
is turned as its own metadata says, as players turn it.
"""

from __future__ import annotations

import operator
import os
from abc import ABC, abstractmethod
from bisect import bisect_right
from collections import OrderedDict
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import ArrayLike
from PIL import Image

from samjax.data.images import DECODE_ERRORS

IMAGE_SUFFIXES = frozenset({".jpg", ".jpeg", ".png"})
VIDEO_SUFFIXES = frozenset(
    {".mp4", ".m4v", ".mov", ".mkv", ".webm", ".avi", ".gif", ".mpg", ".mpeg", ".wmv"}
)
# Images that are not read. They are reported: a frame must not vanish from the clip.
_OTHER_IMAGES = frozenset({".bmp", ".gif", ".heic", ".jp2", ".tif", ".tiff", ".webp", ".dcm"})
_KEPT = 8  # decoded frames that stay in memory
# Containers that store when each frame is shown. In the others it is guessed, B-frames wrongly.
_TIMED_CONTAINERS = frozenset({"mov", "matroska"})  # mov: mp4 and m4v too; matroska: webm too
_HIDDEN_FRAME_CODECS = frozenset({"vp8"})  # some of whose packets are never shown


class Frames(ABC):
    """A clip: `len(frames)` frames; `frames[i]` is uint8 (h, w, 3) RGB, read-only; it iterates.

    Attributes:
        size: (h, w) of every frame, in pixels.
    """

    size: tuple[int, int]
    _length: int

    def __len__(self) -> int:
        return self._length

    def __getitem__(self, index: int, /) -> np.ndarray:
        """Frame `index`, uint8 (h, w, 3) RGB at the original size. Not to be written to.

        Raises:
            IndexError: `index` is not one of 0 to len - 1.
            ValueError: the frame cannot be read, or has another size than the first.
        """
        index = operator.index(index)
        if not 0 <= index < len(self):
            raise IndexError(
                f"frame {index} of a clip of {len(self)} frames: expected 0 to {len(self) - 1}"
            )
        frame = self._read(index)
        frame.setflags(write=False)  # it may be handed out again
        return frame

    def __iter__(self) -> Iterator[np.ndarray]:
        return (self[index] for index in range(len(self)))

    @abstractmethod
    def _read(self, index: int) -> np.ndarray: ...


def open_frames(source: str | os.PathLike[str] | ArrayLike | Sequence[Any] | Frames) -> Frames:
    """Opens a clip. Only a few frames are in memory at a time, those of an array apart.

    Args:
        source: one of
            a folder of .jpg, .jpeg or .png files whose names are frame numbers (`00000.jpg`,
            `7.png`), sorted by these; gaps are allowed, documents and hidden files left out;
            a video file (mp4, m4v, mov, mkv, webm, avi, gif, mpg, wmv), which needs PyAV. The
            packets of mp4, mov, mkv and webm are listed, which tells the exact number of frames
            and where decoding may start; the other kinds are decoded once to count their frames,
            and again from the start when going back;
            an array uint8 (t, h, w, 3) RGB or (t, h, w) grey, which is not copied;
            a list of such images, uint8 (h, w, 3) or (h, w), of equal size;
            what this function has returned.

    Raises:
        FileNotFoundError: no such file or folder.
        ValueError: a clip without frames; a folder with images whose names are no numbers or the
            same number; a file that is no video; an array of another shape or type.
        ImportError: a video file, and PyAV is not installed.
    """
    if isinstance(source, Frames):
        return source
    if not isinstance(source, str | os.PathLike):
        return _Images(source)
    path = Path(source)
    if not path.exists():
        raise FileNotFoundError(f"{path}: no such file or folder")
    if path.is_dir():
        return _Folder(path)
    if path.suffix.lower() not in VIDEO_SUFFIXES:
        raise ValueError(
            f"{path}: not a clip; expected a folder of JPEG files, or a video file "
            f"({', '.join(sorted(VIDEO_SUFFIXES))})"
        )
    return _Video(path)


def _pixels(size: Sequence[int]) -> str:
    return f"{size[1]}x{size[0]} pixels (width x height)"


class _Images(Frames):
    """Frames that are in memory already."""

    def __init__(self, source: Any) -> None:
        if isinstance(source, list | tuple):
            self._frames = [np.asarray(frame) for frame in source]
            for index, frame in enumerate(self._frames):
                _check_array(frame, f"frame {index} of the list", ("h", "w"))
                if frame.shape[:2] != self._frames[0].shape[:2]:
                    raise ValueError(
                        f"frame {index} of the list is {_pixels(frame.shape)}, frame 0 "
                        f"{_pixels(self._frames[0].shape)}: expected the same size"
                    )
        else:
            clip = np.asarray(source)
            _check_array(clip, "the clip", ("t", "h", "w"))
            self._frames = list(clip)  # views
        self._length = len(self._frames)
        if not self._length:
            raise ValueError("the clip is empty: expected at least one frame")
        height, width = self._frames[0].shape[:2]
        self.size = height, width

    def _read(self, index: int) -> np.ndarray:
        frame = self._frames[index]
        # A view, so that the flag of the caller's array stays as it is.
        return frame.view() if frame.ndim == 3 else np.repeat(frame[..., None], 3, axis=2)


def _check_array(array: np.ndarray, what: str, axes: tuple[str, ...]) -> None:
    """`array` is uint8 of the named axes, with or without three colours behind them."""
    grey, colour = f"({', '.join(axes)})", f"({', '.join(axes)}, 3)"
    expected = f"expected uint8 {colour} RGB or {grey} grey"
    is_grey = array.ndim == len(axes)
    if is_grey and "t" in axes and array.shape[-1] == 3:
        raise ValueError(
            f"{what} has the shape {array.shape} of one image; expected {colour}: "
            "a clip of one frame is image[None]"
        )
    if not is_grey and (array.ndim != len(axes) + 1 or array.shape[-1] != 3):
        raise ValueError(f"{what} has the shape {array.shape}; {expected}")
    if array.dtype != np.uint8:
        bad = int((~np.isfinite(array)).sum()) if array.dtype.kind == "f" else 0
        nan = f", {bad} of them NaN or infinite" if bad else ""
        raise ValueError(f"{what} has {array.dtype} values{nan}; {expected}, of 0..255")
    height_and_width = array.shape[len(axes) - 2 : len(axes)]
    if 0 in height_and_width:
        raise ValueError(f"{what} has the shape {array.shape}, without pixels; {expected}")


class _Folder(Frames):
    """A folder of image files named by their frame numbers."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._files = _numbered_files(folder)
        self._length = len(self._files)
        self._kept: OrderedDict[int, np.ndarray] = OrderedDict()
        height, width = self[0].shape[:2]
        self.size = height, width

    def _name(self, index: int) -> str:
        return f"{self._folder}: frame {index} ({self._files[index].name})"

    def _read(self, index: int) -> np.ndarray:
        if index in self._kept:
            self._kept.move_to_end(index)
            return self._kept[index]
        try:
            with self._files[index].open("rb") as file, Image.open(file) as image:
                if image.mode.startswith(("I", "F")):  # which Pillow would clip at 255
                    raise ValueError("more than 8 bits per channel")
                pixels = np.array(image.convert("RGB"))
        except DECODE_ERRORS as error:
            reason = str(error) or type(error).__name__
            raise ValueError(f"{self._name(index)}: cannot be read ({reason})") from error
        size = getattr(self, "size", pixels.shape[:2])
        if pixels.shape[:2] != size:
            raise ValueError(
                f"{self._name(index)} is {_pixels(pixels.shape)}, frame 0 "
                f"({self._files[0].name}) {_pixels(size)}: expected the same size"
            )
        self._kept[index] = pixels
        if len(self._kept) > _KEPT:
            self._kept.popitem(last=False)
        return pixels


def _numbered_files(folder: Path) -> list[Path]:
    """The image files of a folder by the numbers that are their names."""
    files = [f for f in sorted(folder.iterdir()) if f.is_file() and not f.name.startswith(".")]
    images = [f for f in files if f.suffix.lower() in IMAGE_SUFFIXES | _OTHER_IMAGES]
    if not images:
        found = f" (found {', '.join(f.name for f in files[:5])})" if files else ""
        raise ValueError(
            f"{folder}: no frames{found}; expected images named by their frame numbers, "
            "such as 00000.jpg, directly in it"
        )
    by_number: dict[int, Path] = {}
    for file in images:
        if file.suffix.lower() in _OTHER_IMAGES:
            raise ValueError(
                f"{file}: expected frames that are {', '.join(sorted(IMAGE_SUFFIXES))}"
            )
        if not (file.stem.isascii() and file.stem.isdigit()):
            raise ValueError(f"{file}: expected a frame number as the name, such as 00000.jpg")
        other = by_number.setdefault(int(file.stem), file)
        if other != file:
            raise ValueError(f"{folder}: {other.name} and {file.name} have the same frame number")
    return [by_number[number] for number in sorted(by_number)]


class _Video(Frames):
    """A video file. Frame i is the i-th that the decoder gives when it begins at the start.

    Where the container stores the time at which each frame is shown, these times identify the
    frames, and decoding may start at any key frame. What the decoder gives is checked against
    them, so that a frame is the right one or an error. Elsewhere frames are counted from the start.
    """

    def __init__(self, path: Path) -> None:
        self._av, self._path = _import_av(), path
        self._container: Any = None
        self._passed: OrderedDict[int, Any] = OrderedDict()  # the last frames, still YUV
        self._decoded: Iterator[tuple[int, Any]] = iter(())
        self._next = -1  # the number of the frame that `_decoded` gives next; -1: none
        self._problem = ""
        try:
            # By time stamp, the number of the frame; None where time stamps are not to be trusted.
            self._numbers, self._starts = self._listed()
            if self._numbers is None or not self._advance_from(0, 0):
                self._numbers, self._starts = None, [0]
                self._length = self._counted()
            else:
                self._length = len(self._numbers)
        except self._av.FFmpegError as error:
            raise ValueError(f"{path}: not a readable video ({error.strerror})") from error
        if not self._length:
            raise ValueError(f"{path}: a video without frames")
        height, width = self[0].shape[:2]
        self.size = height, width

    def _stream(self) -> Any:
        """The file's first video stream, at its start."""
        if self._container is not None:
            self._container.close()
        self._container = self._av.open(str(self._path))
        streams = self._container.streams.video
        if not streams or streams[0].codec_context is None:
            reason = "PyAV has no decoder for it" if streams else "no video in it"
            raise ValueError(f"{self._path}: not a readable video ({reason})")
        return streams[0]

    def _listed(self) -> tuple[dict[int, int] | None, list[int]]:
        """Numbers the frames by the packets' time stamps, and finds the key frames' numbers."""
        stream = self._stream()
        times, keys, cut_off = [], [], []
        for packet in self._container.demux(stream):
            if packet.size and not packet.is_discard:  # to be decoded, but not shown
                times.append(packet.pts)
                if packet.is_keyframe:
                    keys.append(packet.pts)
                if packet.is_corrupt:
                    cut_off.append(packet.pts)
        container = self._container.format.name.split(",")[0]
        trusted = (
            container in _TIMED_CONTAINERS
            and stream.codec_context.codec.canonical_name not in _HIDDEN_FRAME_CODECS
            and None not in times
            and len(set(times)) == len(times)
        )
        numbers = {time: number for number, time in enumerate(sorted(times))} if trusted else None
        if cut_off:
            which = f"frame {numbers[cut_off[0]]}: " if numbers else ""
            raise ValueError(f"{self._path}: {which}cannot be read (the file is cut off there)")
        if numbers is None:
            return None, [0]
        return numbers, sorted({0, *(numbers[time] for time in keys)})

    def _counted(self) -> int:
        """The number of frames, by decoding them all."""
        count = 0
        try:
            for frame in self._frames_from(0):
                if frame.is_corrupt:
                    raise ValueError(f"{self._path}: frame {count}: cannot be read (damaged data)")
                count += 1
        except self._av.FFmpegError as error:
            raise ValueError(
                f"{self._path}: cannot be read beyond its first {count} frames ({error.strerror})"
            ) from error
        return count

    def _frames_from(self, start: int) -> Iterator[Any]:
        """The decoder's frames from a key frame, or one before it, on."""
        stream = self._stream()
        if start:
            self._container.seek(list(self._numbers or ())[start], stream=stream)
        for packet in self._container.demux(stream):
            try:
                frames = packet.decode()
            except self._av.FFmpegError:
                yield from stream.codec_context.decode(None)  # whole, but not yet handed out
                raise
            yield from frames

    def _read(self, index: int) -> np.ndarray:
        start = self._starts[bisect_right(self._starts, index) - 1]
        found = index in self._passed or (start <= self._next <= index and self._advance(index))
        # Not every key frame is one that decoding can start from: the second try is from frame 0.
        if not (
            found or self._advance_from(start, index) or (start and self._advance_from(0, index))
        ):
            raise ValueError(f"{self._path}: frame {index}: cannot be read ({self._problem})")
        frame = self._passed[index]
        pixels = frame.to_ndarray(format="rgb24")
        # The angle is that by which it has to be turned, counterclockwise.
        pixels = np.ascontiguousarray(np.rot90(pixels, round(frame.rotation / 90) % 4))
        size = getattr(self, "size", pixels.shape[:2])
        if pixels.shape[:2] != size:
            raise ValueError(
                f"{self._path}: frame {index} is {_pixels(pixels.shape)}, frame 0 "
                f"{_pixels(size)}: expected the same size"
            )
        return pixels

    def _advance_from(self, start: int, index: int) -> bool:
        """`_advance`, from the key frame number `start` on."""
        numbers, frames = self._numbers, self._frames_from(start)
        if numbers is None:
            self._decoded = enumerate(frames)
        else:
            self._decoded = ((numbers.get(frame.pts, -1), frame) for frame in frames)
        self._next = start
        self._passed.clear()
        return self._advance(index)

    def _advance(self, index: int) -> bool:
        """Decodes on to frame `index`; False, and `_problem`, where that is not possible."""
        try:
            while self._next <= index:
                number, frame = next(self._decoded)
                if number < self._next:
                    continue  # before the key frame: of the group that the seek cut through
                if number > self._next or frame.is_corrupt:
                    reason = "is damaged" if frame.is_corrupt else "is missing"
                    self._problem = f"frame {self._next} {reason}"
                    break
                self._passed[number] = frame
                self._next += 1
                if len(self._passed) > _KEPT:
                    self._passed.popitem(last=False)
            else:
                return True
        except StopIteration:
            self._problem = f"the video ends before frame {self._next}"
        except self._av.FFmpegError as error:
            self._problem = f"near frame {self._next}: {error.strerror}"
        self._next = -1
        return False


def _import_av() -> Any:
    try:
        import av
    except ImportError as error:
        raise ImportError(
            "reading a video file needs PyAV: pip install 'samjax[video]' "
            "(or give a folder of JPEG files)"
        ) from error
    return av
