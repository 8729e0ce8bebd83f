"""Films are probed and decoded as their containers say, whatever their frame rate, and bad ones are refused by name."""

import gc
import io
import os
import struct
from fractions import Fraction

import av
import numpy as np
import pytest

from molmo_model.data import video_file
from molmo_model.data.timeline import Timeline
from molmo_model.data.video_file import VideoLimits, decode_frames, probe_video
from molmo_model.errors import DataError
from tests.data.films import NTSC, film, number_of, real_film


def all_frames(data: bytes) -> list[tuple[int, np.ndarray]]:
    """Tick and pixels of every frame, decoded from the start by PyAV alone."""
    with av.open(io.BytesIO(data)) as container:
        return [(frame.pts, frame.to_ndarray(format="rgb24")) for frame in container.decode(video=0)]


REAL = {
    "bikes.mp4": (640, 272, 250, 10.0, (1, 12800)),
    "carphone_distorted.mp4": (176, 144, 120, 4.004, NTSC),
    "carphone_pristine.mp4": (176, 144, 120, 4.004, NTSC),
    "bigbuckbunny.mp4": (1280, 720, 132, 5.28, (1, 12800)),
}


@pytest.mark.parametrize("name", REAL)
def test_facts_of_real_films(name):
    video = probe_video(real_film(name), name=name)
    found = (video.width, video.height, video.frames, pytest.approx(video.duration), video.timeline.time_base)
    assert found == REAL[name]
    assert video.format == "MP4" and video.clip is None


@pytest.mark.parametrize("name", ["bikes.mp4", "carphone_pristine.mp4"])
def test_chosen_frames_of_real_films_are_those_of_a_full_decode(name):
    data = real_film(name)
    video, wanted = probe_video(data, name=name), all_frames(data)
    assert video.timeline.ticks.tolist() == [tick for tick, _ in wanted]
    for chosen in ([0], [video.frames - 1], [140 % video.frames, 75, 3, 76, 77], range(0, video.frames, 37)):
        found = dict(decode_frames(video, chosen, name=name))
        assert sorted(found) == sorted(set(chosen))
        for number, pixels in found.items():
            np.testing.assert_array_equal(pixels, wanted[number][1])


def test_frame_899_at_29_97_frames_per_second():
    """Counted at a rate cut off to 29 it would stand at 31.0 s."""
    video = probe_video(film([1001 * i for i in range(905)], codec="mpeg4"))
    assert video.timeline.time(899) == Fraction(899 * 1001, 30000)
    assert float(video.timeline.time(899)) == pytest.approx(29.9966, abs=1e-4)
    assert video.timeline.steps == ((1001, 904),)
    ((_, pixels),) = decode_frames(video, [899])
    assert number_of(pixels) == 899


UNEVEN = [0, 1, 1001, 5000, 5001, 9000, 20000, 20777, 61111, 61112, 61113, 90000, 90100, 123456, 200000]


@pytest.mark.parametrize(
    ("container", "codec", "base"),
    [
        ("mp4", "libx264", NTSC),
        ("mp4", "mpeg4", (1, 10007)),
        ("matroska", "libx264", (1, 1000)),
        ("mpegts", "libx264", (1, 90000)),
    ],
)
def test_uneven_times_are_right_to_the_tick(container, codec, base):
    data = film(UNEVEN, time_base=base, container=container, codec=codec)
    video = probe_video(data)
    begin = video.timeline.begin  # a transport stream begins later where there are B-frames: its times must rise
    assert begin == 0 or container == "mpegts"
    assert [video.timeline.time(i) - begin for i in range(video.frames)] == [tick * Fraction(*base) for tick in UNEVEN]
    for chosen in ([9], [14, 2, 8], range(15)):
        assert {number: number_of(pixels) for number, pixels in decode_frames(video, chosen)} == {i: i for i in chosen}


def test_the_frame_on_the_screen_is_the_last_that_has_appeared():
    rng = np.random.default_rng(1)
    ticks = np.cumsum(rng.integers(1, 400, 60)).tolist()
    timeline = Timeline.of(ticks, 50, (1, 600))
    assert timeline.ticks.tolist() == ticks and timeline.frames == 60
    for time in [Fraction(int(n), 1200) for n in rng.integers(0, 2 * ticks[-1] + 400, 500)]:
        shown = [i for i, tick in enumerate(ticks) if tick * Fraction(1, 600) <= time]
        assert timeline.frame_at(time) == (shown[-1] if shown else 0)


def test_times_begin_where_the_container_begins():
    video = probe_video(film(range(90000, 90000 + 30 * 1001, 1001)))
    assert video.timeline.begin == 3 and video.duration == pytest.approx(1.001, abs=1e-4)


def test_few_frames_are_decoded_for_few_frames(monkeypatch):
    video = probe_video(film([1001 * i for i in range(600)], gop=30))
    assert len(video.timeline.keys) >= 10
    decoded = 0
    found = video_file._found

    def counted(container, stream, *rest):
        class Counting:
            def decode(self, stream):
                nonlocal decoded
                for frame in container.decode(stream):
                    decoded += 1
                    yield frame

            def seek(self, *args, **kwargs):
                container.seek(*args, **kwargs)

        return found(Counting(), stream, *rest)

    monkeypatch.setattr(video_file, "_found", counted)
    chosen = [5, 310, 599]
    assert [number_of(pixels) for _, pixels in decode_frames(video, chosen)] == chosen
    assert decoded < 120  # 6 + at most two groups of pictures each


def test_a_wrong_index_of_key_frames_costs_time_and_nothing_else():
    video = probe_video(film([1001 * i for i in range(80)], gop=40))
    lying = Timeline(video.timeline.time_base, 0, video.timeline.steps, video.timeline.last, (0, 13, 55, 79))
    wrong = type(video)(video.data, video.width, video.height, video.format, lying)
    chosen = [14, 39, 41, 56, 78]
    assert {n: number_of(pixels) for n, pixels in decode_frames(wrong, chosen)} == {n: n for n in chosen}


@pytest.mark.parametrize("codec", ["mjpeg", "mpeg4"])
def test_other_codecs(codec):
    video = probe_video(film([1000 * i for i in range(40)], container="matroska", codec=codec, time_base=(1, 1000)))
    assert [number_of(pixels) for _, pixels in decode_frames(video, [0, 17, 39])] == [0, 17, 39]
    assert len(video.timeline.keys) <= 40


def test_sound_is_ignored():
    silent, loud = film(range(0, 20020, 1001)), film(range(0, 20020, 1001), sound=True)
    assert probe_video(loud).timeline == probe_video(silent).timeline


MATRICES = {
    90: (0, 1, -1, 0),
    180: (-1, 0, 0, -1),
    270: (0, -1, 1, 0),
}
"""a, b, c, d of a track header's matrix (ISO/IEC 14496-12) that shows a picture turned clockwise by the degrees: the
point (x, y) goes to (a x + c y, b x + d y)."""


@pytest.mark.parametrize("degrees", MATRICES)
def test_pictures_come_upright(degrees):
    """Phones film on their side and say so in the track header, written here byte by byte."""
    plain = film([0, 1001, 2002])
    at = plain.index(b"tkhd") + 4 + 40
    a, b, c, d = (value << 16 for value in MATRICES[degrees])
    turned = plain[:at] + struct.pack(">9i", a, b, 0, c, d, 0, 0, 0, 1 << 30) + plain[at + 36 :]
    video = probe_video(turned)
    assert (video.width, video.height) == ((96, 64) if degrees == 180 else (64, 96))
    (_, pixels), (_, upright) = next(decode_frames(video, [1])), next(decode_frames(probe_video(plain), [1]))
    np.testing.assert_array_equal(pixels, np.rot90(upright, -degrees // 90))


GOOD = [1001 * i for i in range(30)]
BAD = {
    "nothing": (lambda: b"", "0 bytes"),
    "no film": (lambda: b"\x89PNG" * 300, "cannot be decoded"),
    "a playlist": (lambda: b"ffconcat version 1.0\nfile /etc/hostname\n", "cannot be decoded"),
    "another playlist": (lambda: b"#EXTM3U\n#EXTINF:5,\nfile:///etc/hostname\n", "cannot be decoded"),
    "sound alone": (lambda: film([], picture=False, sound=True), "no moving picture; its streams are audio"),
    "no frames": (lambda: film([]), "video: "),
    "cut short before its index": (lambda: film(GOOD)[:-300], "cannot be decoded"),
    "cut short behind its index": (lambda: film(GOOD, fast_start=True)[:-1200], "cut short|cannot be"),
    "broken in the middle": (lambda: _spoil(film(GOOD, fast_start=True)), "broken|cannot be decoded|cut short"),
}  # fmt: skip


def _spoil(data: bytes) -> bytes:
    """Noise over a large part of the pictures."""
    noise = np.random.default_rng(0).integers(0, 256, len(data) // 3, dtype=np.uint8).tobytes()
    return data[: len(data) // 2] + noise + data[len(data) // 2 + len(noise) :]


@pytest.mark.parametrize("what", BAD)
def test_bad_files_are_refused_by_name(what):
    make, reason = BAD[what]
    with pytest.raises(DataError, match=f"film 7: .*({reason.removeprefix('video: ')})"):
        probe_video(make(), name="film 7")


def test_a_huge_header_is_refused_before_anything_is_decoded():
    data = film(GOOD, codec="mjpeg")
    with pytest.raises(DataError, match="film: 96 x 64 pixels are more than 6000"):
        probe_video(data, name="film", limits=VideoLimits(pixels=6000))
    frame_header = b"\xff\xc0\x00\x11\x08"  # of a JPEG, where the decoder learns the size
    assert data.count(frame_header) == len(GOOD)
    size = struct.pack(">HH", 64, 96)
    lying = data.replace(frame_header + size, frame_header + struct.pack(">HH", 65500, 65500))  # 12 GB as RGB
    with pytest.raises(DataError, match=r"pixels are more than|cannot be decoded"):
        probe_video(lying)


@pytest.mark.parametrize(
    ("limits", "reason"),
    [({"frames": 29}, "more than 29 frames"), ({"seconds": 0.9}, "1 s are more than 1 s"), ({"bytes": 500}, "bytes")],
)
def test_bounds(limits, reason):
    with pytest.raises(DataError, match=reason):
        probe_video(film(GOOD), limits=VideoLimits(**limits))


def test_decoding_finds_out_about_other_bytes():
    one, other = probe_video(film(GOOD)), film([3 * tick for tick in GOOD])
    with pytest.raises(DataError, match=r"clip: has no frame at 0\.0334 s"):
        list(decode_frames(type(one)(other, 96, 64, "MP4", one.timeline), [1], name="clip"))
    with pytest.raises(DataError, match="96 x 64"):
        list(decode_frames(type(one)(one.data, 96, 80, "MP4", one.timeline), [1], name="clip"))
    with pytest.raises(DataError, match="clip: cannot be decoded"):
        list(decode_frames(type(one)(one.data[:400], 96, 64, "MP4", one.timeline), [1], name="clip"))


CLIPS = [
    ((0.0, None), (0.0, 1.001)),
    ((0.0, 0.5), (0.0, 0.5)),
    ((0.25, 9.0), (0.25, 9.0)),
]


@pytest.mark.parametrize(("asked", "found"), CLIPS)
def test_clips(asked, found):
    """A start of 0.0 is a start."""
    assert probe_video(film(GOOD), clip=asked).clip == pytest.approx(found, abs=1e-4)


@pytest.mark.parametrize(
    "clip", [(0.5, 0.5), (0.6, 0.5), (1.5, None), (-1.0, 0.5), (float("nan"), 1.0), (0.0, float("inf"))]
)
def test_clips_that_enclose_nothing_are_refused(clip):
    with pytest.raises(DataError, match="clip"):
        probe_video(film(GOOD), name="film", clip=clip)


def test_nothing_stays_open():
    data, broken = film(GOOD), film(GOOD)[:-300]
    video = probe_video(data)
    gc.collect()
    before = sorted(os.listdir("/proc/self/fd")) if os.path.isdir("/proc/self/fd") else []
    for _ in range(20):
        list(decode_frames(video, [3, 20]))
        next(decode_frames(video, [3, 20]))  # and a reader that leaves half way
        with pytest.raises(DataError):
            probe_video(broken)
    gc.collect()
    assert not before or len(os.listdir("/proc/self/fd")) <= len(before) + 1
