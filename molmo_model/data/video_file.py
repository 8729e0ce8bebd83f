"""From the bytes of a film to its facts and to single frames, through PyAV; sound is not looked at.

Films are untrusted: the file's size, the picture's size, the length and the number of frames are bounded, before
anything is decoded as far as the header says them; only containers that hold their own data are opened, never
playlists, which name other files and addresses. `probe_video` decodes a film once from end to end, because one that is
cut short or broken is otherwise found in the middle of a training. `decode_frames` then goes from key frame to key
frame and decodes no more than it must.

A frame is named by its presentation time in ticks of the container (`timeline.py`). Pictures come upright, as the
display matrix says. Pixels that are not square are not stretched.
"""

import io
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from math import isfinite
from typing import Any

import numpy as np
import numpy.typing as npt

from molmo_model.data.example import Video
from molmo_model.data.timeline import Timeline
from molmo_model.errors import DataError

Pixels = npt.NDArray[np.uint8]

CONTAINERS = "mov,mp4,m4a,3gp,3g2,mj2,matroska,webm,avi,mpegts,mpeg,ogg,flv"
"""Demuxers that untrusted bytes may reach, by FFmpeg's names."""
FORMATS = {"mov": "MP4", "matroska": "MKV", "mpegts": "TS"}
"""What the first name of a demuxer is called in an example; others by that name in capitals."""


@dataclass(frozen=True)
class VideoLimits:
    """What a film may be at most."""

    bytes: int = 256 * 2**20
    """Of the file."""
    pixels: int = 3840 * 2160
    """Of one frame."""
    frames: int = 250_000
    seconds: float = 4 * 3600.0


LIMITS = VideoLimits()


def probe_video(
    data: bytes, *, name: str = "video", clip: tuple[float, float | None] | None = None, limits: VideoLimits = LIMITS
) -> Video:
    """The facts of a film, after it was decoded once.

    Args:
        data: the file's bytes.
        name: what to call it in errors.
        clip: first and last second, on the container's clock, of the part that is meant; None is all of it, an end of
            None is the film's.
        limits: what is refused.

    Raises:
        DataError: no film that can be read, beyond the limits, broken or cut short, or the clip lies outside of it.
    """
    with _opened(data, name, limits) as (container, stream):
        stream.thread_type = "AUTO"
        times, turned, size = _scan(container, stream, name, limits)
        time_base = stream.time_base or container.streams.video[0].codec_context.time_base
        kind = _kind(container)
    ticks, last, keys = _rising(times)
    timeline = Timeline.of(ticks, last, (time_base.numerator, time_base.denominator), keys)
    if timeline.end - timeline.begin > limits.seconds:
        raise DataError(f"{name}: {float(timeline.end - timeline.begin):.0f} s are more than {limits.seconds:.0f} s")
    width, height = reversed(size) if turned else size
    return Video(data, width, height, kind, timeline, None if clip is None else fit_clip(clip, timeline, name))


def peek_video(data: bytes, *, name: str = "video", limits: VideoLimits = LIMITS) -> tuple[str, int, int]:
    """Format, width and height of a film as its header says them; its frames may still be broken, and shown turned.

    Raises:
        DataError: no film that can be read, or beyond the limits as far as the header says it.
    """
    with _opened(data, name, limits) as (container, stream):
        return _kind(container), stream.codec_context.width, stream.codec_context.height


def decode_frames(video: Video, frames: Sequence[int], *, name: str = "video") -> Iterator[tuple[int, Pixels]]:
    """The given frames of a film, by number, as upright RGB [H, W, 3]: each once, one at a time, as they are found.

    Raises:
        DataError: the film cannot be decoded at one of them, or has another size than recorded.
    """
    ticks = video.timeline.ticks
    wanted = {int(ticks[frame]): frame for frame in sorted(set(frames))}
    limits = VideoLimits(bytes=max(LIMITS.bytes, len(video.data)), pixels=video.width * video.height)
    for seek in (True, False):  # a container whose index is wrong leads past a frame: then from the start, once
        if not wanted:
            return
        with _opened(video.data, name, limits) as (container, stream):
            stream.codec_context.thread_count = 1  # loader workers are as many as the cores
            for tick, pixels in _found(container, stream, sorted(wanted), _key_ticks(video) if seek else [], name):
                if pixels.shape[:2] != (video.height, video.width):
                    raise DataError(
                        f"{name}: a frame has {pixels.shape[1]} x {pixels.shape[0]} pixels, but {video.width} x "
                        f"{video.height} are recorded; build the shards again"
                    )
                yield wanted.pop(tick), pixels
    if wanted:
        seconds = float(min(wanted) * video.timeline.base)
        raise DataError(f"{name}: has no frame at {seconds:.4f} s, though one is recorded; build the shards again")


@contextmanager
def _opened(data: bytes, name: str, limits: VideoLimits) -> Iterator[tuple[Any, Any]]:
    """The container and its first film, closed afterwards; whatever PyAV raises becomes a `DataError`."""
    import av

    if not data or len(data) > limits.bytes:
        raise DataError(f"{name}: {len(data)} bytes; a film has at least 1 and at most {limits.bytes}")
    # a second bound for what only the stream's own headers say; twice, as FFmpeg counts the rims of its buffers too
    bound = {"max_pixels": str(2 * limits.pixels + 2**20)}
    try:
        with av.open(
            io.BytesIO(data),
            container_options={"format_whitelist": CONTAINERS},
            options=bound,
            metadata_errors="replace",
        ) as container:
            stream = next((s for s in container.streams.video if not _is_cover(s)), None)
            if stream is None:
                raise DataError(f"{name}: has no moving picture; its streams are {_kinds(container) or 'none'}")
            context = stream.codec_context
            if context is None:  # FFmpeg reads the container, but has no decoder for what is in it
                raise DataError(f"{name}: its codec is unknown; write it as H.264 or VP9")
            if context.width * context.height > limits.pixels:
                raise DataError(
                    f"{name}: {context.width} x {context.height} pixels are more than {limits.pixels}; make it smaller"
                )
            context.options = bound
            yield container, stream
    except DataError:
        raise
    except (av.FFmpegError, OSError, ValueError, MemoryError, OverflowError) as error:
        raise DataError(f"{name}: cannot be decoded ({len(data)} bytes): {error}") from error


def _is_cover(stream: Any) -> bool:
    """Whether a stream is a single picture that comes with music."""
    return bool(stream.disposition & type(stream.disposition).attached_pic)


def _kind(container: Any) -> str:
    """What the container is called in an example."""
    name = container.format.name.split(",")[0]
    return FORMATS.get(name, name.upper())


def _kinds(container: Any) -> str:
    return ", ".join(sorted({stream.type for stream in container.streams}))


def _scan(
    container: Any, stream: Any, name: str, limits: VideoLimits
) -> tuple[list[tuple[int, int, bool]], bool, tuple[int, int]]:
    """(tick, ticks shown, key frame) of every frame, whether pictures lie on their side, and their coded size."""
    times: list[tuple[int, int, bool]] = []
    packets, size, turned = 0, (0, 0), False
    for packet in container.demux(stream):
        packets += packet.size > 0
        if packet.is_corrupt:
            raise DataError(f"{name}: is broken or cut short at packet {packets}")
        for frame in packet.decode():
            if frame.is_corrupt:
                raise DataError(f"{name}: is broken or cut short: frame {len(times)} does not decode")
            if frame.pts is None:
                raise DataError(
                    f"{name}: frame {len(times)} has no presentation time; write it into an MP4 or MKV file"
                )
            found = (frame.width, frame.height)
            if times and found != size:
                raise DataError(f"{name}: changes its size from {size} to {found} at frame {len(times)}")
            size, turned = found, frame.rotation % 180 != 0
            times.append((frame.pts, frame.duration or 0, bool(frame.key_frame)))
            if len(times) > limits.frames:
                raise DataError(f"{name}: has more than {limits.frames} frames")
    if packets < stream.frames:
        raise DataError(f"{name}: is cut short: {packets} of {stream.frames} frames are there")
    if not times:
        raise DataError(f"{name}: has no frame that can be decoded")
    return times, turned, size


def _rising(times: list[tuple[int, int, bool]]) -> tuple[list[int], int, list[int]]:
    """Ticks without repetitions, how long the last frame is shown, and the numbers of key frames."""
    unique = {tick: (shown, key) for tick, shown, key in times}
    ticks = sorted(unique)
    shown = unique[ticks[-1]][0]
    last = shown if shown > 0 else (ticks[-1] - ticks[-2] if len(ticks) > 1 else 0)
    return ticks, last, [number for number, tick in enumerate(ticks) if unique[tick][1]]


def fit_clip(clip: tuple[float, float | None], timeline: Timeline, name: str) -> tuple[float, float]:
    """The clip with its end, inside the film.

    Raises:
        DataError: it is empty, or lies outside.
    """
    begin, end = float(timeline.begin), float(timeline.end)
    start, stop = float(clip[0]), end if clip[1] is None else float(clip[1])
    if not (isfinite(start) and isfinite(stop)) or start < 0 or stop <= start:
        raise DataError(f"{name}: clip_start {start} and clip_end {stop} enclose no time")
    if start >= end or stop <= begin:
        raise DataError(f"{name}: the clip from {start} to {stop} s lies outside the film, {begin:.3f} to {end:.3f} s")
    return start, stop


def _key_ticks(video: Video) -> list[int]:
    return [int(video.timeline.ticks[key]) for key in video.timeline.keys]


def _found(container: Any, stream: Any, wanted: list[int], keys: list[int], name: str) -> Iterator[tuple[int, Pixels]]:
    """The frames at the wanted ticks, rising, as far as they come; seeks where that skips anything."""
    at = None
    frames = container.decode(stream)
    for target in wanted:
        key = max((tick for tick in keys if tick <= target), default=None)
        if key is not None and key != keys[0] and (at is None or key > at):
            container.seek(key, stream=stream, backward=True)
            frames = container.decode(stream)
        for frame in frames:
            at = frame.pts
            if at is None or at < target:
                continue
            if at > target:
                return
            if frame.is_corrupt:
                raise DataError(f"{name}: is broken at {float(at * stream.time_base):.4f} s")
            yield at, _upright(frame)
            break


def _upright(frame: Any) -> Pixels:
    """A frame as RGB [H, W, 3], turned as its display matrix says."""
    pixels = frame.to_ndarray(format="rgb24")
    turns = round(frame.rotation / 90) % 4
    return np.ascontiguousarray(np.rot90(pixels, turns)) if turns else pixels
