"""Digit clips: what is said of a clip is what its frames show, and the files are the same every time."""

import re
from collections import Counter

import numpy as np
import pytest
from sklearn.datasets import load_digits

from molmo_model.config import DatasetConfig
from molmo_model.data.datasets import FAMILIES, digit_clips, digit_scans
from molmo_model.data.video_file import decode_frames
from molmo_model.errors import ConfigError

MAKE = FAMILIES["digit_clips"].make


def config(train=6, evaluation=4, **options):
    return DatasetConfig(family="digit_clips", train_examples=train, eval_examples=evaluation, options=options)


@pytest.fixture(scope="module")
def clips():
    return list(MAKE(config(60, 30), 17))


def middles(frames):
    """Row and column of the middle of the ink in each frame."""
    places = np.indices(frames.shape[1:])
    ink = np.where(frames > 100, frames, 0).astype(float)
    return np.stack([(ink * place).sum((1, 2)) / ink.sum((1, 2)) for place in places], axis=1)


def test_frames_show_the_scans_in_order_on_their_ways(clips):
    """A digit, shrunk to 8x8, looks like its scan; it moves as it is said to, and along nothing else."""
    digits = load_digits()
    for _, example in clips[:12]:
        (film,) = example.videos
        count = len(example.metadata["scans"])
        assert (film.frames, film.duration, film.width) == (4 * count, count, 64)
        frames = np.stack([pixels[..., 0] for _, pixels in decode_frames(film, range(film.frames))])
        for place, (scan, way) in enumerate(zip(example.metadata["scans"], example.metadata["ways"], strict=True)):
            shown = frames[4 * place : 4 * place + 4]
            moved = np.diff(middles(shown), axis=0)
            step = np.array(digit_clips.WAYS[way]) * 12  # 64 - 28 pixels in three steps
            assert np.abs(moved - step).max() < 1
            top, left = (round(18 * (1 - direction)) for direction in digit_clips.WAYS[way])
            box = shown[0][top : top + 28, left : left + 28].astype(float)
            small = box.reshape(4, 7, 4, 7).mean((1, 3))
            coarse = digits.images[scan].reshape(4, 2, 4, 2).mean((1, 3))
            assert np.corrcoef(small.ravel(), coarse.ravel())[0, 1] > 0.95


def test_answers_are_those_of_the_scans(clips):
    target = load_digits().target
    for split, example in clips:
        digits = [str(digit) for digit in target[example.metadata["scans"]].tolist()]
        assert set(example.metadata["scans"]) <= set(digit_scans.scan_split()[split].tolist())
        assert len(set(digits)) == len(digits) in (2, 3, 4)
        said = [(c.style, c.messages[0].text, c.messages[1].text) for c in example.conversations]
        assert said[0][2] == " ".join(digits)
        for style, question, answer in said:
            if style == "clip_qa":
                place = re.fullmatch(r"Which digit appears (\w+)\?", question).group(1)
                assert answer == digits[-1 if place == "last" else digit_clips.PLACES.index(place)]
            if style == "clip_motion":
                digit = re.fullmatch(r"Which way does the digit (\d) move\?", question).group(1)
                assert answer == example.metadata["ways"][digits.index(digit)]
            if style == "clip_count":
                assert answer == str(len(digits))
    ways = Counter(way for _, example in clips for way in example.metadata["ways"])
    assert set(ways) == set(digit_clips.WAYS) and max(ways.values()) < 0.4 * ways.total()


def test_the_same_bytes_again_however_many_are_made():
    few, many = list(MAKE(config(3, 0), 5)), list(MAKE(config(6, 0), 5))
    assert [e.content_hash() for _, e in few] == [e.content_hash() for _, e in many[:3]]
    other = list(MAKE(config(3, 0), 6))
    assert not {e.content_hash() for _, e in few} & {e.content_hash() for _, e in other}
    assert FAMILIES["digit_clips"].fingerprint(config(), 1).keys() == {"scikit-learn digits", "PyAV"}


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"canvas": 63}, "canvas is 63; a film's sides must be even"),
        ({"max_digits": 9}, "max_digits is 9"),
        ({"size": 65}, "size is 65"),
        ({"frames": 4}, "frames_per_digit"),
    ],
)
def test_wrong_options_are_refused(options, message):
    with pytest.raises(ConfigError, match=message):
        next(MAKE(config(**options), 1))
