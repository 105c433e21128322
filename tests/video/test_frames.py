"""The frames of a clip: folders, video files read in any order, arrays, and what is refused."""

import random
import sys
import weakref
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from samjax.video import frames as module
from samjax.video.frames import open_frames

HEIGHT, WIDTH, COUNT = 48, 64, 40


@pytest.fixture(scope="module")
def av():
    return pytest.importorskip("av")


def write_images(
    folder: Path, names: list[str], size: tuple[int, int] = (6, 9)
) -> list[np.ndarray]:
    """One PNG or JPEG per name, each of one grey level; the levels as decoded."""
    folder.mkdir(exist_ok=True)
    for number, name in enumerate(names):
        Image.new("RGB", size[::-1], (10 + 20 * number,) * 3).save(folder / name)
    return [np.array(Image.open(folder / name).convert("RGB")) for name in names]


def write_video(av, path: Path, codec: str, options: dict | None = None, **more) -> Path:
    """COUNT frames whose grey level is 10 + 5 times their number, on which a dot moves."""
    with av.open(str(path), "w", options=more.get("container", {})) as container:
        stream = container.add_stream(codec, rate=25, options=options or {})
        stream.height, stream.width = HEIGHT, WIDTH
        stream.pix_fmt = more.get("pixels", "yuv420p")
        for number in range(COUNT):
            pixels = np.full((HEIGHT, WIDTH, 3), 10 + 5 * number, np.uint8)
            pixels[8:16, number : number + 8] = 255 - pixels[0, 0]
            frame = av.VideoFrame.from_ndarray(pixels, "rgb24").reformat(format=stream.pix_fmt)
            container.mux(stream.encode(frame))
        container.mux(stream.encode())
    return path


def decoded(av, path: Path) -> list[np.ndarray]:
    with av.open(str(path)) as container:
        return [frame.to_ndarray(format="rgb24") for frame in container.decode(video=0)]


def number_of(frame: np.ndarray) -> int:
    return round((float(np.median(frame)) - 10) / 5)


def h264(av) -> tuple[str, dict]:
    """A codec with B-frames and a key frame every 12."""
    if "libx264" in av.codecs_available:
        return "libx264", {"g": "12", "bf": "3", "sc_threshold": "0"}
    return "mpeg4", {"g": "12", "bf": "2", "b": "4M", "sc_threshold": "1000000000"}


@pytest.fixture(scope="module")
def mp4(av, tmp_path_factory) -> Path:
    codec, options = h264(av)
    return write_video(av, tmp_path_factory.mktemp("clip") / "clip.mp4", codec, options)


def test_a_folder_is_sorted_by_number(tmp_path):
    names = ["7.jpg", "00000.jpg", "10.JPG", "002.png"]
    images = dict(zip(names, write_images(tmp_path, names), strict=True))
    for other in (".DS_Store", "._7.jpg", "notes.txt", "masks.json"):
        (tmp_path / other).write_text("no image")
    (tmp_path / "5.jpg").mkdir()
    frames = open_frames(str(tmp_path))
    assert len(frames) == 4
    assert frames.size == (6, 9)
    for frame, name in zip(frames, ["00000.jpg", "002.png", "7.jpg", "10.JPG"], strict=True):
        assert frame.dtype == np.uint8
        np.testing.assert_array_equal(frame, images[name])


def test_a_folder_is_read_as_pillow_reads_it(tmp_path, rng):
    """Grey, palette and rotated files: `.convert("RGB")`, and the EXIF orientation stays."""
    exif = Image.Exif()
    exif[0x0112] = 6
    pixels = rng.integers(0, 256, (6, 9), dtype=np.uint8)
    Image.fromarray(pixels).save(tmp_path / "0.jpg", exif=exif)
    Image.fromarray(pixels).convert("P").save(tmp_path / "1.png")
    frames = open_frames(tmp_path)
    assert frames.size == (6, 9)
    for frame, name in zip(frames, ("0.jpg", "1.png"), strict=True):
        with Image.open(tmp_path / name) as image:
            np.testing.assert_array_equal(frame, np.array(image.convert("RGB")))


def test_a_folder_keeps_only_the_last_frames(tmp_path):
    names = [f"{number}.png" for number in range(30)]
    Image.new("L", (9, 6)).save(tmp_path / names[0])
    for name in names[1:]:
        (tmp_path / name).write_bytes((tmp_path / names[0]).read_bytes())
    frames = open_frames(tmp_path)
    alive = [weakref.ref(frame) for frame in frames]
    assert 1 <= sum(frame() is not None for frame in alive) <= 8
    assert frames[29] is frames[29]  # the last ones are not decoded again
    with pytest.raises(ValueError, match="read-only"):
        frames[29][0] = 1


@pytest.mark.parametrize(
    ("names", "reason"),
    [
        ([], "no frames; expected images named by their frame numbers"),
        (["notes.txt"], r"no frames \(found notes.txt\)"),
        (["0.jpg", "first.jpg"], r"first.jpg: expected a frame number as the name"),
        (["0.jpg", "frame_1.png"], r"frame_1.png: expected a frame number"),
        (["0.jpg", "-1.jpg"], r"-1.jpg: expected a frame number"),
        (["1.jpg", "001.jpg"], r"001.jpg and 1.jpg have the same frame number"),
        (["1.jpg", "1.png"], r"1.jpg and 1.png have the same frame number"),
        (["0.jpg", "1.bmp"], r"1.bmp: expected frames that are \.jpeg, \.jpg, \.png"),
    ],
)
def test_a_folder_that_is_no_clip(tmp_path, names, reason):
    for name in names:
        if name.endswith("txt"):
            (tmp_path / name).touch()
        else:
            Image.new("L", (9, 6)).save(tmp_path / name)
    with pytest.raises(ValueError, match=reason) as error:
        open_frames(tmp_path)
    assert str(tmp_path) in str(error.value)


def test_broken_frames_are_named_when_they_are_read(tmp_path, rng):
    names = [f"{number:05d}.jpg" for number in range(0, 50, 10)]
    write_images(tmp_path, names)
    Image.fromarray(rng.integers(0, 256, (60, 90, 3), dtype=np.uint8)).save(tmp_path / names[1])
    whole = (tmp_path / names[2]).read_bytes()
    (tmp_path / names[2]).write_bytes(whole[: len(whole) // 2])
    Image.fromarray(np.zeros((6, 9), np.uint16)).save(tmp_path / names[3], "PNG")
    (tmp_path / names[4]).write_text("not a picture")
    frames = open_frames(tmp_path)
    assert len(frames) == 5
    sizes = (
        r"frame 1 \(00010.jpg\) is 90x60 pixels \(width x height\), "
        r"frame 0 \(00000.jpg\) 9x6 pixels \(width x height\): expected the same size"
    )
    with pytest.raises(ValueError, match=sizes):
        frames[1]
    with pytest.raises(ValueError, match=r"frame 2 \(00020.jpg\): cannot be read \(.*[Tt]runcated"):
        frames[2]
    with pytest.raises(ValueError, match=r"frame 3 \(00030.jpg\): cannot be read \(more than 8"):
        frames[3]
    with pytest.raises(
        ValueError, match=r"frame 4 \(00040.jpg\): cannot be read \(cannot identify"
    ):
        frames[4]
    (tmp_path / names[0]).write_bytes(b"")
    with pytest.raises(ValueError, match=r"frame 0 \(00000.jpg\): cannot be read"):
        open_frames(tmp_path)


@pytest.mark.parametrize("index", [8, 99, -1])
def test_indices_are_checked(index):
    frames = open_frames(np.zeros((8, 6, 9, 3), np.uint8))
    with pytest.raises(IndexError, match=f"frame {index} of a clip of 8 frames: expected 0 to 7"):
        frames[index]
    assert frames[np.int64(7)].shape == (6, 9, 3)
    with pytest.raises(TypeError):
        frames[0.0]


def test_arrays_and_lists(rng):
    clip = rng.integers(0, 256, (5, 6, 9, 3), dtype=np.uint8)
    grey = clip[..., 0]
    for source in (clip, list(clip), tuple(clip)):
        frames = open_frames(source)
        assert (len(frames), frames.size) == (5, (6, 9))
        assert frames[2].base is not None  # not copied
        np.testing.assert_array_equal(np.stack(list(frames)), clip)
        assert open_frames(frames) is frames
    for source in (grey, list(grey)):
        np.testing.assert_array_equal(
            np.stack(list(open_frames(source))), grey[..., None].repeat(3, 3)
        )
    np.testing.assert_array_equal(open_frames([grey[0], clip[1]])[1], clip[1])
    assert clip.flags.writeable


NAN = np.full((2, 6, 9, 3), np.nan, np.float32)


@pytest.mark.parametrize(
    ("source", "reason"),
    [
        (np.zeros((0, 6, 9, 3), np.uint8), "the clip is empty"),
        ([], "the clip is empty"),
        (NAN, r"the clip has float32 values, 324 of them NaN or infinite; expected uint8"),
        (np.zeros((2, 6, 9)), r"the clip has float64 values; expected uint8 \(t, h, w, 3\) RGB"),
        (np.zeros((2, 6, 9), bool), "bool values"),
        (np.zeros((6, 9), np.uint8), r"the clip has the shape \(6, 9\); expected"),
        (np.zeros((6, 9, 3), np.uint8), r"of one image; .* image\[None\]"),
        (np.zeros((2, 3, 6, 9), np.uint8), r"the clip has the shape \(2, 3, 6, 9\)"),
        (np.zeros((2, 6, 9, 4), np.uint8), r"the clip has the shape \(2, 6, 9, 4\)"),
        (np.zeros((2, 0, 9, 3), np.uint8), "without pixels"),
        ([np.zeros((6, 9), np.uint8), NAN[0]], "frame 1 of the list has float32 values, 162 of"),
        ([np.zeros((2, 6, 9, 3), np.uint8)], "frame 0 of the list has the shape"),
        (["0.jpg"], "frame 0 of the list"),
        (
            [np.zeros((6, 9), np.uint8), np.zeros((6, 8, 3), np.uint8)],
            "frame 1 of the list is 8x6 pixels .* frame 0 9x6 pixels",
        ),
    ],
)
def test_arrays_that_are_no_clip(source, reason):
    with pytest.raises(ValueError, match=reason):
        open_frames(source)


def test_files_that_are_no_clip(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"nowhere.mp4: no such file or folder"):
        open_frames(tmp_path / "nowhere.mp4")
    Image.new("L", (9, 6)).save(tmp_path / "0.jpg")
    with pytest.raises(ValueError, match=r"0.jpg: not a clip; expected a folder .*\.mp4"):
        open_frames(tmp_path / "0.jpg")


def test_pyav_is_named_where_it_is_missing(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "av", None)
    (tmp_path / "clip.mp4").touch()
    with pytest.raises(ImportError, match=r"pip install 'samjax\[video\]'"):
        open_frames(tmp_path / "clip.mp4")


ORDERS = {
    "in order": list(range(COUNT)),
    "in reverse": list(range(COUNT))[::-1],
    "at random": random.Random(0).choices(range(COUNT), k=80),
}
KINDS = [
    ("clip.mp4", "libx264", {"g": "12", "bf": "3"}),
    ("open.mp4", "libx264", {"x264-params": "keyint=12:bframes=3:open-gop=1:scenecut=0"}),
    ("refresh.mp4", "libx264", {"x264-params": "keyint=12:intra-refresh=1:bframes=0"}),
    ("short.mp4", "libx264", {"g": "2", "bf": "3"}),
    ("clip.mov", "mpeg4", {"g": "12", "bf": "2", "sc_threshold": "1000000000"}),
    ("clip.mkv", "libx264", {"g": "12", "bf": "3"}),
    ("clip.webm", "libvpx-vp9", {"g": "12"}),
    ("old.webm", "libvpx", {"g": "12", "auto-alt-ref": "1", "lag-in-frames": "8"}),
    ("clip.avi", "mpeg4", {"g": "12", "bf": "2"}),
    ("b-frames.avi", "libx264", {"g": "12", "bf": "3"}),  # whose packets' times are no times
    ("clip.gif", "gif", {}),
    ("clip.MPG", "mpeg2video", {"g": "12", "bf": "2"}),
]


@pytest.mark.parametrize(("name", "codec", "options"), KINDS, ids=[kind[0] for kind in KINDS])
def test_frame_i_of_a_video_is_the_ith_decoded(av, tmp_path, name, codec, options):
    if codec not in av.codecs_available:
        pytest.skip(f"PyAV has no {codec} here")
    pixels = "rgb8" if codec == "gif" else "yuv420p"
    path = write_video(av, tmp_path / name, codec, options, pixels=pixels)
    expected = decoded(av, path)
    assert len(expected) == COUNT
    for order in ORDERS.values():
        frames = open_frames(path)
        assert (len(frames), frames.size) == (COUNT, (HEIGHT, WIDTH))
        for index in order:
            np.testing.assert_array_equal(frames[index], expected[index])
            assert name == "clip.gif" or abs(number_of(frames[index]) - index) <= 1
    assert not frames[3].flags.writeable


def test_the_clip_of_this_test_has_b_frames_and_key_frames(av, mp4):
    """Otherwise the test above would show little."""
    with av.open(str(mp4)) as container:
        packets = [packet for packet in container.demux(video=0) if packet.size]
    times = [packet.pts for packet in packets]
    assert times != sorted(times)
    assert 3 <= sum(packet.is_keyframe for packet in packets) <= COUNT // 6
    assert [number_of(frame) for frame in open_frames(mp4)] == list(range(COUNT))


def test_a_video_in_order_is_decoded_once(mp4, monkeypatch):
    frames = open_frames(mp4)
    starts = []
    original = module._Video._frames_from
    monkeypatch.setattr(
        module._Video,
        "_frames_from",
        lambda self, start: starts.append(start) or original(self, start),
    )
    alive = [weakref.ref(frame) for frame in frames]
    assert starts == []
    assert sum(frame() is not None for frame in alive) <= 1
    frames = open_frames(mp4)
    starts.clear()
    for index in reversed(range(24, 36)):
        frames[index]
    assert starts == [24, 24]  # once for frame 35, once more for those that were no longer kept
    frames[39]
    assert starts == [24, 24, 36]


def test_a_clip_cut_by_its_edit_list_counts_what_is_shown(av, mp4, tmp_path):
    """Frames before time 0 are in the file for the decoder's sake only."""
    path = tmp_path / "cut.mp4"
    with av.open(str(mp4)) as source, av.open(str(path), "w") as target:
        stream = target.add_stream_from_template(source.streams.video[0])
        step = int(1 / (25 * source.streams.video[0].time_base))
        for packet in source.demux(video=0):
            if packet.size:
                packet.pts -= 5 * step
                packet.dts -= 5 * step
                packet.stream = stream
                target.mux(packet)
    expected = decoded(av, path)
    frames = open_frames(path)
    assert len(frames) == len(expected) == COUNT - 5
    for index in ORDERS["at random"]:
        if index < len(frames):
            np.testing.assert_array_equal(frames[index], expected[index])
            assert number_of(frames[index]) == index + 5


def test_a_phones_video_is_turned_upright(av, mp4, tmp_path):
    """As a player does; the matrix is that of a phone held upright."""
    data = bytearray(mp4.read_bytes())
    matrix = data.index(b"tkhd") + 4 + 40
    one = (1 << 16).to_bytes(4, "big")
    minus_one = (-(1 << 16)).to_bytes(4, "big", signed=True)
    data[matrix : matrix + 20] = bytes(4) + one + bytes(4) + minus_one + bytes(4)
    (tmp_path / "phone.mp4").write_bytes(data)
    frames = open_frames(tmp_path / "phone.mp4")
    assert frames.size == (WIDTH, HEIGHT)
    for index, frame in enumerate(decoded(av, mp4)):
        np.testing.assert_array_equal(frames[index], np.rot90(frame, -1))


def test_damage_in_the_middle_of_a_video_is_an_error_there(av, mp4, tmp_path):
    with av.open(str(mp4)) as container:
        packets = [packet for packet in container.demux(video=0) if packet.size]
        spans = [(packet.pos, packet.size) for packet in packets]
    data = bytearray(mp4.read_bytes())
    start, size = spans[13]  # in the second group of frames
    data[start : start + size] = bytes(size)
    path = tmp_path / "damaged.mp4"
    path.write_bytes(data)
    frames, expected = open_frames(path), decoded(av, mp4)
    assert len(frames) == COUNT
    for index in (*range(13), *range(24, 40), *reversed(range(24))):
        if 13 <= index < 24:
            reason = rf"damaged.mp4: frame {index}: cannot be read \(.*frame 1\d"
            with pytest.raises(ValueError, match=reason):
                frames[index]
        else:
            np.testing.assert_array_equal(frames[index], expected[index])


@pytest.mark.parametrize("share", [0.4, 0.6, 0.9])
def test_a_truncated_video_is_an_error(av, tmp_path, mp4, share):
    whole = mp4.read_bytes()
    path = tmp_path / "cut.mp4"
    path.write_bytes(whole[: int(len(whole) * share)])  # its index is at the end, and gone
    with pytest.raises(ValueError, match=r"cut.mp4: not a readable video \("):
        open_frames(path)
    codec, options = h264(av)
    first = write_video(av, path, codec, options, container={"movflags": "faststart"})
    whole = first.read_bytes()
    with av.open(str(path)) as container:
        packet = next(p for n, p in enumerate(container.demux(video=0)) if n == int(COUNT * share))
        end, number = packet.pos + packet.size // 2, round(packet.pts * packet.time_base * 25)
    path.write_bytes(whole[:end])
    with pytest.raises(ValueError, match=r"cut.mp4: frame \d+: cannot be read .*cut off") as error:
        open_frames(path)
    assert abs(int(str(error.value).split("frame ")[1].split(":")[0]) - number) <= 3  # B-frames


def test_damage_in_a_video_without_times_is_an_error(av, tmp_path):
    path = write_video(av, tmp_path / "clip.avi", "mjpeg", pixels="yuvj420p")
    with av.open(str(path)) as container:
        packet = next(p for n, p in enumerate(container.demux(video=0)) if n == 20)
    data = bytearray(path.read_bytes())
    data[packet.pos + 8 : packet.pos + 8 + packet.size] = bytes(packet.size)
    path.write_bytes(data)
    with pytest.raises(ValueError, match=r"clip.avi: cannot be read beyond its first 20 frames"):
        open_frames(path)


def test_videos_without_frames(av, tmp_path):
    (tmp_path / "text.mp4").write_text("not a video")
    (tmp_path / "empty.mkv").touch()
    for name in ("text.mp4", "empty.mkv"):
        with pytest.raises(ValueError, match=rf"{name}: not a readable video"):
            open_frames(tmp_path / name)
    with av.open(str(tmp_path / "sound.mp4"), "w") as container:
        stream = container.add_stream("aac", rate=44100)
        sound = av.AudioFrame.from_ndarray(np.zeros((1, 1024), np.float32), "fltp", "mono")
        sound.sample_rate = 44100
        container.mux(stream.encode(sound))
        container.mux(stream.encode())
    with pytest.raises(ValueError, match=r"sound.mp4: not a readable video \(no video in it\)"):
        open_frames(tmp_path / "sound.mp4")
    with av.open(str(tmp_path / "none.avi"), "w") as container:
        stream = container.add_stream("mjpeg", rate=25)
        stream.height, stream.width, stream.pix_fmt = HEIGHT, WIDTH, "yuvj420p"
        container.start_encoding()
    with pytest.raises(
        ValueError, match=r"none.avi: (a video without frames|not a readable video)"
    ):
        open_frames(tmp_path / "none.avi")


def test_real_frames(shared_data):
    folder = shared_data / "sam_example_images" / "bedroom_frames"
    if not folder.is_dir():
        pytest.skip(f"{folder} is not there")
    frames = open_frames(folder)
    files = sorted(folder.glob("*.jpg"), key=lambda file: int(file.stem))
    assert (len(frames), frames.size) == (8, (540, 960))
    for file, frame in zip(files, frames, strict=True):
        with Image.open(file) as image:
            np.testing.assert_array_equal(frame, np.array(image.convert("RGB")))
