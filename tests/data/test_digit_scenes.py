"""Digit scenes: what is said of a scene is what is drawn, and no scan is on both sides of the split."""

import io
import re
from collections import Counter

import numpy as np
import pytest
from PIL import Image as PILImage
from sklearn.datasets import load_digits

from molmo_model.config import DatasetConfig
from molmo_model.data.datasets import FAMILIES, digit_scenes
from molmo_model.data.example import Example
from molmo_model.errors import ConfigError

MAKE = FAMILIES["digit_scenes"].make


def config(train=40, evaluation=20, **options):
    return DatasetConfig(family="digit_scenes", train_examples=train, eval_examples=evaluation, options=options)


@pytest.fixture(scope="module")
def scenes() -> list[tuple[str, Example]]:
    return list(MAKE(config(300, 150), 17))


def pixels(example):
    return np.asarray(PILImage.open(io.BytesIO(example.images[0].data)))


def by_style(example, style):
    return [c for c in example.conversations if c.style == style]


def test_no_scan_is_on_both_sides(scenes):
    split = digit_scenes.scan_split()
    assert {side: len(scans) for side, scans in split.items()} == {"train": 1500, "eval": 297}
    used = {side: {scan for s, e in scenes if s == side for scan in e.metadata["scans"]} for side in split}
    assert used["train"] & used["eval"] == set()
    assert used["train"] <= set(split["train"].tolist())
    assert used["eval"] <= set(split["eval"].tolist())
    labels = load_digits().target
    assert min(Counter(labels[split["eval"]].tolist()).values()) >= 15  # every digit can be evaluated


def test_the_split_does_not_depend_on_the_seed():
    scans = {scan for side, e in MAKE(config(0, 30), 99) if side == "eval" for scan in e.metadata["scans"]}
    assert scans <= set(digit_scenes.scan_split()["eval"].tolist())


def test_what_is_said_is_what_scikit_learn_says(scenes):
    digits = load_digits()
    for _, example in scenes:
        (caption,) = by_style(example, "scene_caption")
        read = [cell for row in caption.metadata["cells"] for cell in row if cell is not None]
        assert read == digits.target[example.metadata["scans"]].tolist()
        rows = [row.split(" ") for row in caption.messages[-1].text.split(" / ")]
        assert [[None if c == "." else int(c) for c in row] for row in rows] == caption.metadata["cells"]
        assert caption.metadata["answer"] == caption.messages[-1].text


def test_what_is_drawn_is_the_scan(scenes):
    """The gold box of every digit, shrunk to 8x8, looks like the scan, and cells without a digit are flat."""
    digits = load_digits().images
    for _, example in scenes[:12]:
        canvas = pixels(example).astype(float)
        (caption,) = by_style(example, "scene_caption")
        scans = iter(example.metadata["scans"])
        for row, cells in enumerate(caption.metadata["cells"]):
            for col, value in enumerate(cells):
                cell = canvas[row * 32 : row * 32 + 32, col * 32 : col * 32 + 32]
                if value is None:
                    assert cell.max() == cell.min()
                    continue
                scan = digits[next(scans)]
                places = [(s, t, left) for s in (26, 27, 28) for t in range(33 - s) for left in range(33 - s)]
                assert max(_likeness(cell, scan, *place) for place in places) > 0.95


def _likeness(cell, scan, size, top, left):
    box = PILImage.fromarray(cell[top : top + size, left : left + size])
    small = np.asarray(box.resize((8, 8), PILImage.Resampling.NEAREST))
    return np.corrcoef(small.ravel(), scan.ravel())[0, 1]


def test_questions_counts_and_points_agree_with_the_caption(scenes):
    asked_empty = 0
    for _, example in scenes:
        (caption,) = by_style(example, "scene_caption")
        cells = caption.metadata["cells"]
        values = [value for row in cells for value in row if value is not None]
        questions = by_style(example, "scene_qa")
        assert min(5, len(values)) <= len(questions) <= 5
        assert len({c.messages[0].text for c in questions}) == len(questions)
        for question in questions:
            row, col = map(
                int, re.fullmatch(r"Which digit is in row (\d), column (\d)\?", question.messages[0].text).groups()
            )
            value = cells[row - 1][col - 1]
            assert (
                question.messages[1].text == question.metadata["answer"] == ("empty" if value is None else str(value))
            )
            asked_empty += value is None
        total, one = by_style(example, "scene_count")
        assert (total.messages[1].text, total.metadata["answer"]) == (str(len(values)), len(values))
        digit = int(re.fullmatch(r"How many times does the digit (\d) appear\?", one.messages[0].text).group(1))
        assert one.metadata["answer"] == values.count(digit) == int(one.messages[1].text)
        named, placed = by_style(example, "scene_point")
        digit = int(named.messages[1].label.removeprefix("digit "))
        expected = [(r, c) for r, row in enumerate(cells) for c, value in enumerate(row) if value == digit]
        assert [_cell_of(point) for point in named.messages[1].points] == expected
        row, col = map(int, re.findall(r"\d", placed.messages[1].label))
        assert [_cell_of(point) for point in placed.messages[1].points] == [(row - 1, col - 1)]
        assert cells[row - 1][col - 1] is not None
        for pointing in (named, placed):
            assert [list(point) for point in pointing.messages[1].points] == pointing.metadata["points"]
            for (x, y), (left, top, right, bottom) in zip(
                pointing.messages[1].points, pointing.metadata["boxes"], strict=True
            ):
                assert left < x < right
                assert top < y < bottom
                assert min(right - left, bottom - top) / 2 >= pointing.metadata["radius"] - 0.001
    assert 0.05 < asked_empty / sum(len(by_style(e, "scene_qa")) for _, e in scenes) < 0.3


def _cell_of(point):
    x, y = point
    return int(y / 100 * 3), int(x / 100 * 3)


def test_no_answer_is_a_good_guess(scenes):
    answers = Counter(c.metadata["answer"] for _, e in scenes for c in by_style(e, "scene_qa"))
    assert answers.most_common(1)[0][1] / answers.total() < 0.25
    totals = Counter(by_style(e, "scene_count")[0].metadata["answer"] for _, e in scenes)
    assert set(totals) == set(range(3, 10))


def test_an_example_does_not_depend_on_how_many_are_made():
    few, many = list(MAKE(config(3, 2), 5)), list(MAKE(config(9, 4), 5))
    assert [e.content_hash() for _, e in few[:3]] == [e.content_hash() for _, e in many[:3]]
    assert [e.content_hash() for _, e in few[3:]] == [e.content_hash() for _, e in many[9:11]]
    other = [e.content_hash() for _, e in MAKE(config(3, 2), 6)]
    assert not set(other) & {e.content_hash() for _, e in few}
    ids = [e.id for _, e in many]
    assert len(set(ids)) == len(ids)


def test_options_change_the_scene_and_wrong_ones_are_refused():
    (_, example), *_ = MAKE(config(1, 0, canvas=64, rows=2, cols=2, min_filled=1, questions=2, noise=3), 1)
    assert (example.images[0].width, example.images[0].height) == (64, 64)
    assert len(by_style(example, "scene_caption")[0].metadata["cells"]) == 2
    for options, message in [
        ({"canvass": 96}, "did you mean 'canvas'"),
        ({"canvas": "wide"}, "canvas"),
        ({"max_size": 40}, "max_size is 40, but a cell is 32"),
        ({"min_filled": 10}, r"min_filled is 10; it must lie in \[1, 9\]"),
        ({"jitter": -1}, "jitter"),
    ]:
        with pytest.raises(ConfigError, match=message):
            next(MAKE(config(**options), 1))
    with pytest.raises(ConfigError, match="train_examples"):
        next(MAKE(DatasetConfig(family="digit_scenes"), 1))


def test_fingerprint_is_that_of_the_data_alone():
    one = FAMILIES["digit_scenes"].fingerprint(config(), 1)
    assert one == FAMILIES["digit_scenes"].fingerprint(config(7, 7), 2)
    assert all(re.fullmatch(r"[0-9a-f]{64}", digest) for digest in one.values())


def test_more_digits_can_be_asked_about():
    """`asked` adds conversations about other digits that are there, and nothing else changes."""
    for (_, one), (_, three) in zip(MAKE(config(30, 0), 5), MAKE(config(30, 0, asked=3), 5), strict=True):
        digits = load_digits().target[one.metadata["scans"]].tolist()
        asked = [int(c.messages[0].text.split()[6]) for c in by_style(three, "scene_count")[1:]]
        assert len(set(asked)) == len(asked) == 1 + min(2, len(set(digits) - {asked[0]}))
        assert set(asked[1:]) <= set(digits)
        pointed = [c for c in by_style(three, "scene_point") if c.messages[-1].label.startswith("digit")]
        for conversation in pointed:
            value = int(conversation.messages[-1].label.split()[1])
            assert len(conversation.metadata["points"]) == digits.count(value) > 0
        assert len({c.messages[-1].label for c in pointed}) == len(pointed)
        assert by_style(one, "scene_caption") == by_style(three, "scene_caption")
        assert by_style(one, "scene_count") == by_style(three, "scene_count")[:2]
