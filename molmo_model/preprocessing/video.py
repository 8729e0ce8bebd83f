"""From a film to the frames that are shown: which ones, what is written before each, how finely each is pooled.

Everything here follows from a film's facts (`Timeline`, clip) and the config, without a pixel, so what an example costs
is known before it is decoded. Times are exact fractions of seconds on the container's clock: the first time of a clip
is its start, and the frame that stands for time t is the last one that appears at or before t, the one on the screen
then. What is written is when that frame appears. A frame that several times fall on is shown once: a clip with fewer
frames than `max_frames` is shown whole, a slide that stays for a minute costs one frame.

In training with `random_sampling` a frame is drawn from those between its own and the next chosen one, so the number of
frames, and with it that of crops and image tokens, stays what it is without drawing.

    <bos> [FPS 2.00 ] time 0.00 <im_start> rows <im_end> time 0.50 <im_start> rows <im_end> ... question

Every frame is one crop, laid out like a low-resolution view, and an image of its own for the attention: its tokens see
each other in both directions, and earlier frames. Low- and high-resolution frames share the token `<im_patch>` (the
`shared_low_high_embedding` of the reference, as image views do here), not `<im_low>`: `generate` counts places of one
token. Windows of fewer patches are filled up with holes on the right.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from fractions import Fraction
from math import ceil
from typing import Any

import numpy as np
import numpy.typing as npt

from molmo_model.data.example import Video
from molmo_model.data.timeline import Timeline
from molmo_model.errors import ConfigError
from molmo_model.model_config import CropMode, FrameSampling, FrameTimes, VideoConfig
from molmo_model.preprocessing.image import Pixels
from molmo_model.preprocessing.tiling import Layout, TilingSpec, tiling_layout

IntArray = npt.NDArray[np.int64]


@dataclass(frozen=True)
class VideoSpec:
    """What decides the frames of a film and their tokens; a part of the `PreprocessorConfig`. See `VideoConfig`."""

    max_frames: int = 8
    sampling: FrameSampling = FrameSampling.uniform
    candidate_fps: tuple[float, ...] = (0.25, 0.5, 1.0, 2.0, 4.0, 8.0, 16.0)
    random_sampling: bool = False
    times: FrameTimes = FrameTimes.per_frame
    pooling_size: tuple[int, int] = (3, 3)
    high_res_every: int = 0
    select_frames_by_query: str | None = None

    def __post_init__(self) -> None:
        if self.max_frames < 1 or self.high_res_every < 0 or len(self.pooling_size) != 2 or min(self.pooling_size) < 1:
            raise ConfigError(
                f"video: max_frames {self.max_frames} and both numbers of pooling_size {list(self.pooling_size)} must "
                f"be at least 1, high_res_every {self.high_res_every} at least 0"
            )
        if not self.candidate_fps or min(self.candidate_fps) <= 0:
            raise ConfigError(f"video.candidate_fps is {list(self.candidate_fps)}; it must hold numbers above 0")
        if self.select_frames_by_query and not self.high_res_every:
            raise ConfigError(
                "video.select_frames_by_query chooses which frames are high-resolution ones, and video.high_res_every "
                "is 0, so there are none; set it"
            )

    @classmethod
    def of(cls, config: VideoConfig) -> "VideoSpec":
        """What the params say."""
        pool = tuple(config.pooling_size)
        if len(pool) != 2:
            raise ConfigError(f"video.pooling_size {list(pool)} must be two numbers, height and width")
        return cls(
            max_frames=config.max_frames,
            sampling=config.sampling,
            candidate_fps=tuple(config.candidate_fps),
            random_sampling=config.random_sampling,
            times=config.times,
            pooling_size=(pool[0], pool[1]),
            high_res_every=config.high_res_every,
            select_frames_by_query=config.select_frames_by_query,
        )

    @classmethod
    def from_json(cls, raw: dict[str, Any]) -> "VideoSpec":
        """What is in a checkpoint; none of it in those that were written before films could be shown.

        Raises:
            TypeError, ValueError: unknown or wrong values.
        """
        fields, kinds = dict(raw), {"sampling": FrameSampling, "times": FrameTimes}
        for name, kind in {**kinds, "candidate_fps": tuple, "pooling_size": tuple}.items():
            if name in fields:
                fields[name] = kind(fields[name])
        return cls(**fields)


@dataclass(frozen=True)
class Clip:
    """The frames of one film that are shown."""

    frames: tuple[int, ...]
    """Their numbers in the film, rising."""
    prefix: str
    """Text before all of them."""
    texts: tuple[str, ...]
    """Text before each."""
    high: tuple[bool, ...]
    """Which of them are high-resolution ones."""


@dataclass(frozen=True)
class Film:
    """All films of an example, as one row of C frames."""

    clips: tuple[Clip, ...]
    layouts: tuple[Layout, ...]
    """[C]"""
    texts: tuple[str, ...]
    """[C] what stands before each frame."""
    crops: Pixels | None = None
    """[C, S, S, 3] once they are decoded."""

    @property
    def crop_frames(self) -> IntArray:
        """[C] number of the frame within its clip."""
        return np.concatenate([np.arange(len(clip.frames)) for clip in self.clips])

    @property
    def crop_videos(self) -> IntArray:
        """[C] number of the clip within the example."""
        return np.repeat(np.arange(len(self.clips)), [len(clip.frames) for clip in self.clips])


def lay_out(clips: Sequence[Clip], spec: VideoSpec, tiling: TilingSpec) -> Film:
    """The frames of an example's films, with their layouts and texts. Several films are announced by number."""
    low, high = frame_layouts(spec, tiling)
    texts = [
        (f"Video {number} " if len(clips) > 1 and place == 0 else "") + (clip.prefix if place == 0 else "") + text
        for number, clip in enumerate(clips, start=1)
        for place, text in enumerate(clip.texts)
    ]
    return Film(tuple(clips), tuple(high if fine else low for clip in clips for fine in clip.high), tuple(texts))


def plan_clip(video: Video, spec: VideoSpec, rng: np.random.Generator | None = None) -> Clip:
    """The frames of a film, the high-resolution ones spaced evenly.

    Args:
        rng: draws the frames where the spec says so; None takes the first of each interval.
    """
    intervals, prefix = _plan(video, spec)
    frames = [first for first, _ in intervals]
    if rng is not None and spec.random_sampling:
        frames = [_draw(video.timeline, interval, float(share)) for interval, share in _with_draws(intervals, rng)]
    every = spec.high_res_every
    high = tuple(every > 0 and place % every == 0 for place in range(len(frames)))
    texts = tuple(frame_text(video.timeline.time(frame), spec.times) for frame in frames)
    return Clip(tuple(frames), prefix, texts, high)


def possible_texts(video: Video, spec: VideoSpec) -> list[set[str]]:
    """For every frame of the plan all texts that may stand before it, whatever is drawn."""
    intervals, _ = _plan(video, spec)
    return [
        {frame_text(video.timeline.time(frame), spec.times) for frame in range(first, stop)}
        for first, stop in (intervals if spec.random_sampling else [(first, first + 1) for first, _ in intervals])
    ]


def best_frames(clip: Clip, scores: npt.NDArray[np.floating]) -> Clip:
    """The clip with its high-resolution frames moved to the best scores; of equal ones the earlier are taken."""
    best = set(np.argsort(-np.asarray(scores, dtype=np.float64), kind="stable")[: sum(clip.high)].tolist())
    return replace(clip, high=tuple(place in best for place in range(len(clip.frames))))


def sample_times(
    begin: Fraction, end: Fraction, last: Fraction, spec: VideoSpec
) -> tuple[list[Fraction], Fraction, Fraction]:
    """The times at which a clip is looked at, rising; seconds from one to the next; and where the last interval ends.

    Args:
        begin, end: of the clip.
        last: when its last frame appears.
    """
    length, count = end - begin, spec.max_frames
    if spec.sampling is FrameSampling.uniform_last_frame:
        step = (last - begin) / (count - 1) if count > 1 else Fraction(0)
        return [last - step * place for place in range(count)][::-1], step, end
    if spec.sampling is not FrameSampling.uniform:
        rates = sorted(Fraction(str(rate)) for rate in spec.candidate_fps)
        fitting = [rate for rate in rates if _frame_count(length, rate) <= count]
        if fitting or spec.sampling is FrameSampling.fps:
            rate = fitting[-1] if fitting else rates[0]
            shown = min(_frame_count(length, rate), count)
            return [begin + place / rate for place in range(shown)], 1 / rate, min(begin + shown / rate, end)
    return [begin + length * place / count for place in range(count)], length / count, end


def frame_text(time: Fraction, times: FrameTimes) -> str:
    """The text before a frame that appears at `time`."""
    if times is FrameTimes.per_frame:
        return f"time {float(time):.2f} "
    return f"{float(time):.1f} " if times is FrameTimes.per_frame_compact else ""


def frame_layouts(spec: VideoSpec, tiling: TilingSpec) -> tuple[Layout, Layout]:
    """The layouts of low- and of high-resolution frames: both one crop, windows of one width W."""
    plain = replace(tiling, mode=CropMode.resize)
    low = tiling_layout(0, 0, replace(plain, pooling=spec.pooling_size))
    high = tiling_layout(0, 0, plain)
    width = max(low.pooling.shape[1], high.pooling.shape[1]) if spec.high_res_every else low.pooling.shape[1]
    wide = [
        replace(one, pooling=fill_windows(one.pooling, width)) if spec.high_res_every else one for one in (low, high)
    ]
    return wide[0], wide[1]


def fill_windows(pooling: IntArray, width: int) -> IntArray:
    """Windows [T, W] as [T, width], filled up with holes on the right."""
    missing = width - pooling.shape[1]
    return np.pad(pooling, ((0, 0), (0, missing)), constant_values=-1) if missing > 0 else pooling


def _frame_count(length: Fraction, rate: Fraction) -> int:
    """Times begin, begin + 1 / rate, ... before begin + length; at least one."""
    return max(ceil(length * rate), 1)


def _plan(video: Video, spec: VideoSpec) -> tuple[list[tuple[int, int]], str]:
    """[first, end) frames of every interval, of which the first is shown, and the text before all of them."""
    timeline = video.timeline
    begin, end = timeline.begin, timeline.end
    if video.clip is not None:
        begin, end = max(begin, Fraction(str(video.clip[0]))), min(end, Fraction(str(video.clip[1])))
    final = _frame_before(timeline, end)
    last = max(timeline.time(final), begin)
    times, step, stop = sample_times(begin, end, last, spec)
    frames = sorted({timeline.frame_at(time) for time in times})
    ends = [*frames[1:], max(_frame_before(timeline, stop), frames[-1]) + 1]
    if len(frames) < len(times):  # some times fell on one frame
        step = (last - begin if spec.sampling is FrameSampling.uniform_last_frame else end - begin) / len(frames)
    return list(zip(frames, ends, strict=True)), _prefix(step, spec.times)


def _frame_before(timeline: Timeline, time: Fraction) -> int:
    """The last frame that appears before `time`; the first one if none does."""
    return max(int(np.searchsorted(timeline.ticks, ceil(time / timeline.base), side="left")) - 1, 0)


def _prefix(step: Fraction, times: FrameTimes) -> str:
    if times is FrameTimes.fps_prefix:
        return f"FPS {float(1 / step) if step else 0.0:.2f} "
    return f"Sampling Delta {float(step):.2f} " if times is FrameTimes.delta_prefix else ""


def _with_draws(intervals: list[tuple[int, int]], rng: np.random.Generator) -> list[tuple[tuple[int, int], np.float64]]:
    return list(zip(intervals, rng.random(len(intervals)), strict=True))


def _draw(timeline: Timeline, interval: tuple[int, int], share: float) -> int:
    """The frame on the screen after `share` of the time between the first frame of an interval and its end."""
    first, stop = interval
    begin = timeline.time(first)
    end = timeline.time(stop) if stop < timeline.frames else timeline.end
    return min(max(timeline.frame_at(begin + (end - begin) * Fraction(share)), first), stop - 1)
