"""Films as tokens and crops: sampling against its definition in words, and one layout for plan, training and prompt."""

import math
from dataclasses import replace
from fractions import Fraction
from typing import Any

import numpy as np
import pytest

from molmo_model.data.example import Conversation, Example, Message, Video
from molmo_model.data.timeline import Timeline
from molmo_model.data.video_file import probe_video
from molmo_model.errors import ConfigError, DataError
from molmo_model.model_config import CropMode, FrameSampling, FrameTimes, PreprocessingConfig, VideoConfig
from molmo_model.preprocessing.collator import collate, collate_prompts
from molmo_model.preprocessing.preprocessor import Preprocessor
from molmo_model.preprocessing.preprocessor_config import PreprocessorConfig
from molmo_model.preprocessing.video import VideoSpec, plan_clip, possible_texts
from tests.data.builders import picture
from tests.data.films import film, number_of, real_film

TALK = Conversation("qa", (Message("user", "What happens?"), Message("assistant", "It moves.")))
MORE = Conversation("qa", (Message("user", "Who is it?"), Message("assistant", "A man.")))
NTSC = [1001 * i for i in range(300)]


def facts(ticks: list[int], base: tuple[int, int] = (1, 30000), last: int = 1001, clip: Any = None) -> Video:
    """A film without its bytes."""
    return Video(b"\0", 96, 64, "MP4", Timeline.of(ticks, last, base), clip)


def uneven(seed: int, frames: int = 80) -> Video:
    rng = np.random.default_rng(seed)
    steps = rng.choice([1, 20, 33, 34, 500, 3000], frames)
    return facts((np.cumsum(steps) - steps[0]).tolist(), (1, 1000), int(rng.integers(0, 500)))


def times_in_words(video: Video, spec: VideoSpec) -> list[Fraction]:
    """The times of section 6, element by element. What is counted in frames there is time here."""
    timeline = video.timeline
    begin, end = timeline.begin, timeline.end
    if video.clip is not None:
        begin, end = max(begin, Fraction(str(video.clip[0]))), min(end, Fraction(str(video.clip[1])))
    before = [tick for tick in timeline.ticks.tolist() if tick < end / timeline.base]
    last = max([begin, *(tick * timeline.base for tick in before[-1:])])
    n = spec.max_frames
    uniform = [begin + (end - begin) * i / n for i in range(n)]
    if spec.sampling is FrameSampling.uniform:
        return uniform
    if spec.sampling is FrameSampling.uniform_last_frame:
        return [last] if n == 1 else [begin + (last - begin) * i / (n - 1) for i in range(n)]

    def at_rate(rate: float) -> list[Fraction]:
        times = [begin]
        while times[-1] + 1 / Fraction(str(rate)) < end and len(times) <= n:  # more than n is too many already
            times.append(times[-1] + 1 / Fraction(str(rate)))
        return times

    for rate in sorted(spec.candidate_fps, reverse=True):
        if len(at_rate(rate)) <= n:
            return at_rate(rate)
    return at_rate(min(spec.candidate_fps))[:n] if spec.sampling is FrameSampling.fps else uniform


def frames_in_words(video: Video, spec: VideoSpec) -> list[int]:
    """The last frame at or before each time, each once."""
    ticks, limits = video.timeline.ticks.tolist(), [time / video.timeline.base for time in times_in_words(video, spec)]
    shown = [max([0, *(i for i, tick in enumerate(ticks) if tick <= math.floor(limit))]) for limit in limits]
    return sorted(set(shown))


VIDEOS = {
    "ntsc": facts(NTSC),
    "clip": facts(NTSC, clip=(2.5, 7.25)),
    "clip from the start": facts(NTSC, clip=(0.0, 1.0)),
    "clip within a frame": facts(NTSC, clip=(5.01, 5.015)),
    "late": facts([90000 + tick for tick in NTSC]),
    "one frame": facts([0], last=0),
    "three frames": facts([0, 30000, 31000]),
    "uneven": uneven(1),
    "uneven too": uneven(2, 200),
    "long": facts(list(range(0, 6000, 10)), (1, 10), 10),
}


@pytest.mark.parametrize("name", VIDEOS)
@pytest.mark.parametrize("max_frames", [1, 2, 7, 16])
@pytest.mark.parametrize("sampling", list(FrameSampling))
def test_sampling_is_what_its_definition_says(name, max_frames, sampling):
    video = VIDEOS[name]
    for candidates in ((0.25, 0.5, 1.0, 2.0, 4.0, 8.0, 16.0), (0.1, 29.97), (3.0,)):
        spec = VideoSpec(max_frames=max_frames, sampling=sampling, candidate_fps=candidates)
        clip = plan_clip(video, spec)
        assert list(clip.frames) == frames_in_words(video, spec)
        assert 1 <= len(clip.frames) <= max_frames


def test_rates_below_one_and_films_too_long_for_the_lowest():
    spec = VideoSpec(max_frames=10, sampling=FrameSampling.fps)
    video = facts(list(range(0, 30 * 600, 20)), (1, 600), 20)  # 30 s of 30 frames per second
    assert [video.timeline.time(i) for i in plan_clip(video, spec).frames] == [4 * i for i in range(8)]
    longer = VIDEOS["long"]  # 600 s: even 0.25 frames per second are 150
    assert [longer.timeline.time(i) for i in plan_clip(longer, spec).frames] == [4 * i for i in range(10)]
    uniform = replace(spec, sampling=FrameSampling.fps_uniform)
    assert [longer.timeline.time(i) for i in plan_clip(longer, uniform).frames] == [60 * i for i in range(10)]


TEXTS = {
    FrameTimes.none: ("", ["", "", ""]),
    FrameTimes.per_frame: ("", ["time 0.00 ", "time 3.34 ", "time 6.67 "]),
    FrameTimes.per_frame_compact: ("", ["0.0 ", "3.3 ", "6.7 "]),
    FrameTimes.fps_prefix: ("FPS 0.30 ", ["", "", ""]),
    FrameTimes.delta_prefix: ("Sampling Delta 3.34 ", ["", "", ""]),
}


@pytest.mark.parametrize("times", TEXTS)
def test_texts(times):
    clip = plan_clip(VIDEOS["ntsc"], VideoSpec(max_frames=3, times=times))  # 10.01 s
    assert (clip.prefix, list(clip.texts)) == TEXTS[times]


def test_the_written_rate_is_that_of_the_frames():
    spec = VideoSpec(max_frames=64, sampling=FrameSampling.fps, times=FrameTimes.fps_prefix)
    assert plan_clip(VIDEOS["ntsc"], spec).prefix == "FPS 4.00 "
    assert plan_clip(VIDEOS["three frames"], spec).prefix == f"FPS {3 / (32001 / 30000):.2f} "  # each frame once
    assert plan_clip(VIDEOS["one frame"], spec).prefix == "FPS 16.00 "
    assert plan_clip(VIDEOS["one frame"], replace(spec, sampling=FrameSampling.uniform)).prefix == "FPS 0.00 "
    last = replace(spec, sampling=FrameSampling.uniform_last_frame, max_frames=3, times=FrameTimes.delta_prefix)
    assert plan_clip(VIDEOS["ntsc"], last).prefix == f"Sampling Delta {299 * 1001 / 30000 / 2:.2f} "


@pytest.mark.parametrize("sampling", list(FrameSampling))
@pytest.mark.parametrize("name", VIDEOS)
def test_random_frames_stay_in_their_intervals(name, sampling):
    spec = VideoSpec(max_frames=7, sampling=sampling, random_sampling=True)
    video = VIDEOS[name]
    fixed = list(plan_clip(video, spec).frames)
    drawn = [plan_clip(video, spec, np.random.default_rng(seed)) for seed in range(30)]
    possible = possible_texts(video, spec)
    stops = [*fixed[1:], video.frames]
    for clip in drawn:
        assert all(first <= frame < stop for first, frame, stop in zip(fixed, clip.frames, stops, strict=True))
        for text, texts in zip(clip.texts, possible, strict=True):
            assert text in texts
    if any(stop - first > 10 for first, stop in zip(fixed[:-1], stops[:-1], strict=True)):
        assert len({clip.frames for clip in drawn}) > 10
    if sampling is FrameSampling.uniform_last_frame and video.clip is None:
        assert all(clip.frames[-1] == video.frames - 1 for clip in drawn)
    if video.clip is not None:
        assert all(video.timeline.time(frame) < video.clip[1] for clip in drawn for frame in clip.frames)
    again = plan_clip(video, spec, np.random.default_rng(3))
    assert again == drawn[3]


def test_random_frames_are_spread_evenly_over_time():
    spec = VideoSpec(max_frames=2, random_sampling=True)
    video = facts([*range(0, 500, 1), 500, 1000], (1, 1000), 1000)  # 500 short frames, then 0.5 s and 1 s on one
    shown = [plan_clip(video, spec, np.random.default_rng(seed)).frames for seed in range(400)]
    halves = [first >= 500 for first, _ in shown]  # the first interval is [0, 1) s, half of it the one long frame
    assert 0.4 < np.mean(halves) < 0.6
    assert {second for _, second in shown} == {501}


@pytest.fixture(scope="module")
def moving() -> Video:
    return probe_video(film([1001 * i for i in range(100)], codec="mpeg4"))


def make(build: Any, every: int = 0, image: int = 64, **video: Any) -> Preprocessor:
    """Crops of 4 x 4 patches of 16 pixels; images are pooled by 2 x 2, low-resolution frames by 3 x 3 patches."""
    return build(image_size=image, video=VideoConfig(high_res_every=every, **video))


def example(*videos: Video, talks: tuple[Conversation, ...] = (TALK,)) -> Example:
    return Example("e", (), talks, videos=videos)


def test_the_tokens_of_a_film_by_hand(build, moving):
    preprocessor = make(build, every=2, max_frames=3)
    encoded = preprocessor.encode(example(moving))
    config, vocabulary = preprocessor.config, preprocessor.vocabulary
    start, end, patch, col = config.im_start_id, config.im_end_id, config.im_patch_id, config.im_col_id
    view = [start, *[patch, patch, col] * 2, end]  # 4 x 4 patches: 2 x 2 windows of 2 x 2, and of 3 x 3 as well
    ids = [vocabulary.bos_id]
    images = [0]
    for number, frame in enumerate((0, 33, 66), start=1):
        said = vocabulary.encode(f"time {frame * 1001 / 30000:.2f} ").tolist()
        ids += said + view
        images += [0] * len(said) + [number] * len(view)
    assert encoded.input_ids[: len(ids)].tolist() == ids
    assert encoded.image_ids[: len(ids)].tolist() == images
    assert vocabulary.decode(encoded.input_ids[len(ids) :].tolist()).startswith("What happens?")
    assert encoded.image_token_counts.tolist() == [4, 4, 4]
    assert [number_of(crop) for crop in encoded.pixels.repeat(3, axis=2)] == [0, 33, 66]
    assert encoded.crop_frames.tolist() == [0, 1, 2] and encoded.crop_videos.tolist() == [0, 0, 0]
    # frames 0 and 2 by 2 x 2, filled up to nine places; frame 1 by 3 x 3, one line of holes before and one after
    assert encoded.pooling.shape == (12, 9)
    assert encoded.pooling[0].tolist() == [0, 1, 4, 5, *[-1] * 5]
    assert encoded.pooling[3].tolist() == [10, 11, 14, 15, *[-1] * 5]
    assert encoded.pooling[4].tolist() == [-1, -1, -1, -1, 16, 17, -1, 20, 21]
    assert encoded.pooling[8].tolist() == [32, 33, 36, 37, *[-1] * 5]


def test_low_resolution_frames_take_fewer_tokens(build, moving):
    fine = make(build, image=96, every=1, max_frames=4).encode(example(moving))
    mixed = make(build, image=96, every=4, max_frames=4).encode(example(moving))
    coarse = make(build, image=96, max_frames=4).encode(example(moving))
    assert fine.image_token_counts.tolist() == [9, 9, 9, 9] and fine.pooling.shape[1] == 9
    assert mixed.image_token_counts.tolist() == [9, 4, 4, 4]
    assert coarse.image_token_counts.tolist() == [4, 4, 4, 4] and (coarse.pooling >= 0).all()


@pytest.mark.parametrize("times", list(FrameTimes))
@pytest.mark.parametrize("sampling", list(FrameSampling))
@pytest.mark.parametrize("random", [False, True])
def test_what_is_planned_is_what_is_encoded(build, moving, times, sampling, random):
    preprocessor = make(build, image=96, every=3, max_frames=9, sampling=sampling, times=times, random_sampling=random)
    films = (moving, replace(moving, clip=(0.0, 1.5)), replace(moving, clip=(2.0, 2.01)))
    told = example(*films, talks=(TALK, MORE))
    light = tuple(replace(one, data=b"\0") for one in films)
    bound = preprocessor.cost_parts([], told.conversations, "e", light)
    for seed in (None, 0, 1, 2):
        rng = [None if seed is None else np.random.default_rng(seed) for _ in range(2)]
        encoded = preprocessor.encode(told, rng=rng[0])
        assert preprocessor.cost([], told.conversations, rng[1], videos=light) == (len(encoded), len(encoded.pixels))
        assert len(encoded) <= bound.tokens and len(encoded.pixels) == bound.crops
        assert (encoded.input_ids == preprocessor.config.im_patch_id).sum() == len(encoded.pooling)
        assert encoded.image_token_counts.sum() == len(encoded.pooling)
    if not random:
        assert bound.tokens == len(encoded)
    announced = preprocessor.vocabulary.decode(encoded.input_ids.tolist())
    assert all(f"Video {number} " in announced for number in (1, 2, 3))


def test_the_prompt_is_what_training_feeds(build, moving):
    preprocessor = make(build, every=2, max_frames=5)
    trained, asked = preprocessor.encode(example(moving)), preprocessor.encode_prompt(example(moving))
    np.testing.assert_array_equal(asked.input_ids, trained.input_ids[: len(asked)])
    for name in ("image_ids", "position_ids", "segment_ids"):
        np.testing.assert_array_equal(getattr(asked, name), getattr(trained, name)[: len(asked)])
    for name in ("pixels", "pooling", "crop_frames", "crop_videos", "image_token_counts"):
        np.testing.assert_array_equal(getattr(asked, name), getattr(trained, name))
    assert asked.prompt_text == "What happens?"


def test_batches_number_their_clips(build, moving):
    preprocessor = make(build, max_frames=3)
    still = Example("s", (picture(7),), (TALK,))
    silent = Example("t", (), (TALK,))
    two, one = example(moving, replace(moving, clip=(1.0, 1.04))), example(moving)
    encoded = {
        name: preprocessor.encode(each) for name, each in {"two": two, "one": one, "s": still, "t": silent}.items()
    }
    batch = collate([[encoded["two"], encoded["s"]], [encoded["t"], encoded["one"]]], None, preprocessor.config)
    stills = len(encoded["s"].pixels)
    assert batch["crop_videos"].tolist() == [0, 0, 0, 1, 1, *[-1] * stills, 2, 2, 2]
    assert batch["crop_frames"].tolist() == [0, 1, 2, 0, 1, *[-1] * stills, 0, 1, 2]
    assert batch["pooling"].shape[1] == 9
    windows = batch["pooling"].numpy()
    assert len(windows) == (batch["input_ids"] == preprocessor.config.im_patch_id).sum()
    crops = [set((row[row >= 0] // 16).tolist()) for row in windows]
    assert all(len(crop) == 1 for crop in crops)  # every window lies in one crop, also after shifting and filling up
    assert [max(crop) for crop in crops] == sorted(max(crop) for crop in crops)
    plain = collate([[encoded["s"]], [encoded["t"]]], None, preprocessor.config)
    assert "crop_videos" not in plain and plain["pooling"].shape[1] == 4
    prompts = [preprocessor.encode_prompt(each) for each in (one, silent, two)]
    asked = collate_prompts(prompts, preprocessor.config)
    assert asked["crop_videos"].tolist() == [0, 0, 0, 1, 1, 1, 2, 2]
    assert asked["image_counts"].tolist() == [3, 0, 5]


def test_letterboxed_frames_say_what_is_picture(tokenizer, moving):
    config = PreprocessorConfig.build(
        make_section(), image_size=64, patch_size=16, pooling_size=2, resize="clip", vocab_size=520, patch_masks=True
    )
    encoded = Preprocessor(config, tokenizer).encode(example(moving))
    assert encoded.patch_masks.shape == (3, 16)  # 96 x 64 in 64 x 64: 42 lines of picture, 11 of bar above and below
    share = [5 / 16, 1, 1, 5 / 16]
    np.testing.assert_allclose(encoded.patch_masks, np.repeat(share, 4)[None].repeat(3, 0))
    assert (encoded.pixels[:, :11] == 0).all() and (encoded.pixels[:, 53:] == 0).all()
    assert (encoded.pixels[:, 34:50] > 100).all()


def make_section() -> Any:
    return PreprocessingConfig(max_crops=4, overlap_margins=[1, 1], video=VideoConfig(max_frames=3))


def test_real_films_show_what_they_should(build):
    video = probe_video(real_film("bikes.mp4"))
    preprocessor = make(build, max_frames=4, sampling=FrameSampling.uniform_last_frame)
    clip = plan_clip(video, preprocessor.config.video)
    assert clip.frames == (0, 83, 166, 249) and clip.texts[-1] == "time 9.96 "
    encoded = preprocessor.encode(example(video))
    assert len(encoded.pixels) == 4 and len({crop.tobytes() for crop in encoded.pixels}) == 4


REFUSED = {
    "token selector": {"selector_tokens": 4},
    "crop_mode hierarchical": {"crop_mode": "hierarchical"},
    "connector.pooling stack": {"equal_windows": "connector.pooling stack"},
}


@pytest.mark.parametrize("what", REFUSED)
def test_models_without_a_place_for_films_say_so(build, moving, what):
    changes = {name: CropMode(value) if name == "crop_mode" else value for name, value in REFUSED[what].items()}
    preprocessor = make(build)
    refusing = Preprocessor(replace(preprocessor.config, **changes), preprocessor.tokenizer)
    with pytest.raises(ConfigError, match=f"example e: .*{what}"):
        refusing.encode(example(moving))
    with pytest.raises(ConfigError, match=what):
        refusing.cost_parts([], [TALK], "e", [moving])


def test_windows_of_one_size_are_welcome_everywhere(build, moving):
    preprocessor = make(build, every=2, pooling_size=[2, 2])
    config = replace(preprocessor.config, equal_windows="connector.pooling stack")
    assert Preprocessor(config, preprocessor.tokenizer).encode(example(moving)).pooling.shape[1] == 4


def test_too_many_films_and_too_few_tokens(build, moving):
    with pytest.raises(DataError, match=r"example e: has 9 videos.* max_images 8; raise .*preprocessing.max_images"):
        make(build).encode(example(*[moving] * 9))
    with pytest.raises(DataError, match="example e: its images take"):
        make(build).encode(example(moving), max_tokens=20)


def test_a_film_that_does_not_decode_is_told_by_name(build, moving):
    broken = replace(moving, data=moving.data[: len(moving.data) // 2])
    with pytest.raises(DataError, match="example e, video 1: "):
        make(build).encode(example(broken))


def test_the_config_keeps_what_films_need(build):
    config = make(build, every=4, select_frames_by_query="some/siglip", sampling=FrameSampling.fps).config
    assert PreprocessorConfig.from_json(config.to_json()) == config
    raw = config.to_json()
    del raw["video"], raw["equal_windows"]  # as checkpoints were before films could be shown
    assert PreprocessorConfig.from_json(raw) == replace(config, video=VideoSpec())


@pytest.mark.parametrize(
    ("section", "reason"),
    [
        ({"pooling_size": [3]}, "two numbers"),
        ({"candidate_fps": []}, "candidate_fps"),
        ({"select_frames_by_query": "x"}, "high_res_every"),
    ],
)
def test_contradictions_in_the_params_are_refused(build, section, reason):
    with pytest.raises(ConfigError, match=reason):
        make(build, **section)


class Scorer:
    """Likes the frame whose number the question names, and records what it was asked."""

    def __init__(self) -> None:
        self.asked: list[str] = []

    def __call__(self, frames: np.ndarray, question: str) -> np.ndarray:
        self.asked.append(question)
        wanted = int(question.split()[-1])
        return np.array([-abs(number_of(frame.repeat(3, axis=1)) - wanted) for frame in frames], dtype=np.float32)


def asking(*numbers: int) -> tuple[Conversation, ...]:
    return tuple(
        Conversation("qa", (Message("user", f"Which is {number}"), Message("assistant", "This."))) for number in numbers
    )


def test_the_question_chooses_the_fine_frames(build, moving):
    preprocessor = make(build, image=96, every=3, max_frames=5, select_frames_by_query="x")
    preprocessor.frame_scorer = scorer = Scorer()
    for number, fine in {0: [0, 1], 99: [3, 4], 40: [2, 3]}.items():  # frames 0, 19, 39, 59, 79
        told = example(moving, talks=asking(number))
        for encoded in (preprocessor.encode(told), preprocessor.encode_prompt(told)):
            counts = encoded.image_token_counts.tolist()
            assert [place for place, count in enumerate(counts) if count == 9] == sorted(fine)
            assert preprocessor.cost([], told.conversations, videos=[moving])[0] >= len(encoded)
        assert preprocessor.cost([], told.conversations, videos=[moving])[0] == len(preprocessor.encode(told))
    assert scorer.asked[0] == "Which is 0"


def test_frames_can_follow_one_question_only(build, moving):
    preprocessor = make(build, every=3, select_frames_by_query="some/siglip")
    with pytest.raises(ConfigError, match="some/siglip, but this preprocessor has no frame_scorer"):
        preprocessor.encode(example(moving))
    preprocessor.frame_scorer = Scorer()
    with pytest.raises(DataError, match="max_conversations: 1"):
        preprocessor.encode(example(moving, talks=asking(1, 2)))
    preprocessor.encode(example(moving, talks=asking(1, 2)), conversations=[1])
    assert preprocessor.frame_scorer.asked == ["Which is 2"]
